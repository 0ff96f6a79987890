// SPDX-License-Identifier: GPL-2.0

//! What goes on beside the exits: timers that are armed, and windows of pause-loop exiting.

use std::collections::BTreeMap;

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use testing::{
    cgroup::Cgroup,
    exits::{
        Histogram,
        Vendor, //
    },
    interface::{
        self,
        ioctl, //
    },
    payload::Payload,
    vmm::Work, //
};

use super::{
    changeable,
    Make,
    Rig, //
};
use crate::{
    is_slow_host,
    Test, //
};

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let changeable = changeable(vendor)?;
    let timers = [
        ("spinning", Payload::Timer, Exits::NONE),
        ("halting", Payload::Hlt, Exits::HLT),
    ]
    .map(|(name, payload, with)| {
        Test::new(format!("live::mwait::armed_timer_{name}"), move || {
            armed_timer(vendor, payload, with)
        })
        // On SVM, a native HLT ends by the host's next tick.
        .ignored(!changeable.contains(Exits::MWAIT) || vendor == Vendor::Svm && halts(payload))
    });
    let pauses = [("asked_for", true), ("given", false)].map(|(name, asked)| {
        Test::new(format!("live::pause::window_when_{name}"), move || {
            pause_window(vendor, asked)
        })
        .ignored(!changeable.contains(Exits::PAUSE))
    });
    Ok(timers.into_iter().chain(pauses).collect())
}

fn halts(payload: Payload) -> bool {
    payload == Payload::Hlt
}

/// Whether this host's KVM uses the VMX preemption timer for its guests' timers.
fn has_hv_timer() -> bool {
    interface::read("/sys/module/kvm_intel/parameters/preemption_timer").is_ok_and(|it| it == "Y")
}

/// How often the timer is armed while `mwait` changes.
const ROUNDS: u32 = 10;
/// Long enough to be armed when the change comes, in ns of the guest.
const FAR: u32 = 300_000_000;

/// A timer that was armed before the change fires after it, once, and on time.
fn armed_timer(vendor: Vendor, payload: Payload, with: Exits) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let make = Make {
        vcpus: 1,
        ..Make::default()
    };
    let mut rig = Rig::new(vendor, &cgroup, make)?;
    rig.set(None, with)?;
    let keys = ["vcpu_id", "hv_timer_in_use"];
    let switches = Histogram::start("kvm/kvm_hv_timer_state", &keys, "vcpu_id>=0")?;
    let count = |in_use: u64| -> Result<u64> {
        let counts = switches.read()?;
        Ok(counts.get(&vec![0, in_use]).copied().unwrap_or(0))
    };
    let due = u64::from(FAR) * u64::from(rig.vmm.tsc_khz(rig.vcpus[0])?) / 1_000_000;
    let work = Work {
        ticks: FAR,
        ..Work::gated(payload)
    };
    rig.start_one(0, work)?;
    let hv = vendor == Vendor::Vmx && has_hv_timer();
    let mut latest = 0;
    for round in 0..ROUNDS {
        // Armed with MWAIT's exits on, and switched over; the next one is armed without them.
        for (exits, moves) in [(with | Exits::MWAIT, true), (with, false)] {
            let hardware_before = count(1)?;
            let goal = rig.guest.open_gate(0, 1);
            rig.wait(|| rig.guest.params(0).begun == goal)?;
            // A moment for the guest, to get from there to where the timer is armed.
            let mut looks = 0;
            while moves && hv && count(1)? == hardware_before && looks < 1_000 {
                testing::pause();
                looks += 1;
            }
            let (hardware, software) = (count(1)?, count(0)?);
            if hv && moves {
                ensure!(
                    hardware > hardware_before,
                    "round {round}: KVM did not arm it"
                );
            }
            rig.set(None, exits)?;
            rig.wait(|| rig.guest.params(0).executed == goal)
                .with_context(|| format!("round {round}: the timer is lost"))?;
            let params = rig.guest.params(0);
            ensure!(params.interrupts == goal, "round {round}: {params:?}");
            let took = params.timer_took();
            latest = latest.max(took);
            // Where the TSC counts instructions, it says how late.
            ensure!(
                took >= due - due / 100 && (took <= due + due / 10 || !is_slow_host()?),
                "round {round}: the timer took {took} in place of {due}"
            );
            if hv && moves {
                ensure!(
                    count(0)? > software,
                    "round {round}: the timer stayed where it stops in C-states"
                );
            } else if hv {
                ensure!(
                    hardware == hardware_before,
                    "round {round}: KVM used it for a guest that may execute MWAIT"
                );
            }
        }
    }
    eprintln!("    due after {due}, {latest} at most");
    rig.vmm.stop(rig.vcpus[0])?;
    rig.end()
}

/// How the window of a vCPU's pause-loop exiting, or count of its pause filter, changed: new, old.
type Windows = BTreeMap<(u64, u64), u64>;

/// One vCPU executes PAUSE until its window was seen to grow and to shrink.
fn windows_of(rig: &mut Rig) -> Result<Windows> {
    let keys = ["new", "old"];
    let updates = Histogram::start("kvm/kvm_ple_window_update", &keys, "vcpu_id>=0")?;
    rig.start_one(0, Work::gated(Payload::Pause))?;
    let mut windows = Windows::new();
    for _ in 0..100 {
        rig.step(&[0], 20_000)?;
        windows = updates
            .read()?
            .into_iter()
            .map(|(keys, count)| ((keys[0], keys[1]), count))
            .collect();
        let grown = windows.keys().any(|(new, old)| new > old);
        let shrunk = windows.keys().any(|(new, old)| new < old);
        if grown && shrunk {
            break;
        }
    }
    rig.vmm.stop(rig.vcpus[0])?;
    Ok(windows)
}

fn smallest(windows: &Windows) -> Option<u64> {
    windows.keys().flat_map(|(new, old)| [*new, *old]).min()
}

/// A VM that began without PAUSE exits gets them, and they work as in a VM that always had them.
fn pause_window(vendor: Vendor, asked: bool) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut plain = Rig::pair(vendor, &cgroup)?;
    let expected = windows_of(&mut plain)?;
    let base = smallest(&expected).context("the window of a plain VM never changed")?;
    plain.end()?;

    let make = Make {
        vcpus: 2,
        requested: if asked { Exits::PAUSE } else { Exits::NONE },
        ..Make::default()
    };
    if !asked {
        ioctl::set_policy(&cgroup, Exits::PAUSE, Exits::ALL)?;
    }
    let mut rig = Rig::new(vendor, &cgroup, make)?;
    ensure!(
        rig.view()?.effective.contains(Exits::PAUSE),
        "{:?}",
        rig.view()?
    );
    for round in 0..3 {
        rig.start(Payload::Pause)?;
        {
            let counter = rig.counter()?;
            rig.check_all(&counter, Payload::Pause, true)
                .with_context(|| format!("round {round}"))?;
            ioctl::set_policy(&cgroup, Exits::NONE, !Exits::PAUSE)?;
            rig.ensure_settled()?;
            rig.check_all(&counter, Payload::Pause, false)
                .with_context(|| format!("round {round}, taken back"))?;
        }
        rig.stop()?;
        let windows = windows_of(&mut rig)?;
        ensure!(
            windows.keys().any(|(new, old)| new > old)
                && windows.keys().any(|(new, old)| new < old),
            "round {round}: the window does not grow and shrink: {windows:?}"
        );
        ensure!(
            smallest(&windows) == Some(base),
            "round {round}: {windows:?}, that of a plain VM: {expected:?}"
        );
        ioctl::set_policy(&cgroup, Exits::PAUSE, Exits::ALL)?;
    }
    rig.end()
}
