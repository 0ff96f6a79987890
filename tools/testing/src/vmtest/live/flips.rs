// SPDX-License-Identifier: GPL-2.0

//! Each exit, both ways, many times, while the guest runs.

use std::{
    fs,
    os::fd::AsRawFd, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use nix::{
    sched::{
        sched_getaffinity,
        sched_setaffinity,
        CpuSet, //
    },
    unistd::{
        gettid,
        Pid, //
    }, //
};
use testing::{
    cgroup::Cgroup,
    exits::{
        Calls,
        Histogram,
        Vendor, //
    },
    interface::{
        self,
        ioctl, //
    },
    payload::Payload,
    uapi::{
        self,
        Device, //
    }, //
};

use super::{
    changeable,
    few,
    Rig, //
};
use crate::{
    is_slow_host,
    is_slow_kernel,
    Test, //
};

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let changeable = changeable(vendor)?;
    // AMD has a faster host, for what its CPU has.
    let few_will_do = is_slow_kernel() || is_slow_host()? && vendor == Vendor::Svm;
    let changes_of = |exit| {
        if few_will_do && exit != Exits::APERFMPERF {
            100
        } else {
            1_000
        }
    };
    let mut tests = Vec::new();
    for payload in Payload::EXITS {
        let exit = payload.exit();
        let changes = changes_of(exit);
        let ignored = !changeable.contains(exit);
        let vm = Test::new(format!("live::{exit}::vm_{changes}_times"), move || {
            whole_vm(vendor, payload, changes)
        });
        let vcpu = Test::new(format!("live::{exit}::vcpu_{changes}_times"), move || {
            one_vcpu(vendor, payload, changes)
        });
        let policy = Test::new(format!("live::{exit}::policy"), move || {
            by_policy(vendor, payload)
        });
        tests.extend([vm, vcpu, policy].map(|test| test.ignored(ignored)));
    }
    let changes = changes_of(Exits::HLT);
    tests.push(Test::new(
        format!("live::cost::one_exit_a_change_{changes}_times"),
        move || cost(vendor, changes),
    ));
    Ok(tests)
}

/// The VM gets an override and loses it again, and all of its vCPUs follow.
fn whole_vm(vendor: Vendor, payload: Payload, changes: u32) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    rig.start(payload)?;
    let counter = rig.counter()?;
    rig.check_all(&counter, payload, false)?;
    for change in 0..changes {
        let on = change % 2 == 0;
        if on {
            rig.set(None, payload.exit())?;
        } else {
            rig.reset(None)?;
        }
        rig.check_all(&counter, payload, on)
            .with_context(|| format!("change {change}"))?;
    }
    let view = rig.settled()?;
    ensure!(view.disable.is_none(), "{view:?}");
    drop(counter);
    rig.stop()?;
    rig.end()
}

/// One vCPU gets an override of its own and loses it again, and the other one does not notice.
fn one_vcpu(vendor: Vendor, payload: Payload, changes: u32) -> Result<()> {
    let exit = payload.exit();
    let cgroup = Cgroup::new("own")?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    rig.start(payload)?;
    let counter = rig.counter()?;
    for change in 0..changes {
        let on = change % 2 == 0;
        // The other one's turn half of the time.
        let which = change as usize / 2 % 2;
        let mut passes = [false; 2];
        passes[which] = on;
        if on {
            rig.set(Some(which as u32), exit)?;
        } else {
            rig.reset(Some(which as u32))?;
        }
        rig.check(&counter, payload, &passes)
            .with_context(|| format!("change {change}"))?;
    }
    // An exception from what the VM has.
    rig.set(None, exit)?;
    rig.set(Some(1), Exits::NONE)?;
    rig.check(&counter, payload, &[true, false])?;
    let view = interface::only_vm()?;
    ensure!(
        view.disable == Some(exit)
            && view.vcpu(0)?.disable.is_none()
            && view.vcpu(1)?.disable == Some(Exits::NONE),
        "{view:?}"
    );
    // With the VM's override go those of its vCPUs.
    rig.reset(None)?;
    rig.check(&counter, payload, &[false, false])?;
    let view = rig.settled()?;
    ensure!(view.vcpu(1)?.disable.is_none(), "{view:?}");
    drop(counter);
    rig.stop()?;
    rig.end()
}

/// A policy comes, is changed by ioctl, and goes, while the guest runs.
fn by_policy(vendor: Vendor, payload: Payload) -> Result<()> {
    let exit = payload.exit();
    let above = Cgroup::new("above")?;
    let cgroup = above.child("own")?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    rig.start(payload)?;
    let counter = rig.counter()?;
    let check = |rig: &mut Rig, passes: bool| -> Result<()> {
        rig.ensure_settled()?;
        rig.check_all(&counter, payload, passes)
    };
    check(&mut rig, false)?;
    ioctl::set_policy(&above, exit, Exits::ALL)?;
    check(&mut rig, true).context("inherited")?;
    ioctl::set_policy(&cgroup, Exits::NONE, Exits::ALL)?;
    check(&mut rig, false).context("own policy")?;
    ioctl::clear_policy(&cgroup)?;
    check(&mut rig, true).context("inherited again")?;
    ioctl::set_policy(&above, exit, !exit)?;
    check(&mut rig, false).context("not allowed")?;

    // For new VMs only: this one stays as it is.
    let directory = above.open()?;
    let argument = uapi::Policy {
        flags: uapi::POLICY_ALLOW | uapi::NEW_ONLY,
        cgroup_fd: directory.as_raw_fd(),
        allow: Exits::ALL.bits(),
        ..Default::default()
    };
    let device = Device::open()?;
    device.policy(uapi::SET_POLICY, argument)?;
    check(&mut rig, false).context("for new VMs only")?;
    let mut younger = Rig::pair(vendor, &cgroup)?;
    let view = younger.view()?;
    ensure!(view.effective.contains(exit), "{view:?}");
    younger.check_each(view.effective)?;
    younger.vmm.kill()?;

    ioctl::set_policy(&above, exit, Exits::ALL)?;
    check(&mut rig, true).context("allowed")?;
    let argument = uapi::Policy {
        flags: uapi::NEW_ONLY,
        ..argument
    };
    device.policy(uapi::CLEAR_POLICY, argument)?;
    check(&mut rig, true).context("cleared for new VMs only")?;
    // It is asked again when there is something to ask.
    ioctl::set_policy(&cgroup, Exits::NONE, Exits::ALL)?;
    check(&mut rig, false).context("nothing left to inherit")?;
    drop(counter);
    rig.stop()?;
    rig.end()
}

/// Interrupts of one of the host's CPUs: those that ask it to reschedule, and all others.
fn interrupts(cpu: usize) -> Result<[u64; 2]> {
    let text = fs::read_to_string("/proc/interrupts")?;
    let mut lines = text.lines();
    // Only CPUs that are online have a column.
    let heads: Vec<&str> = lines.next().context("empty")?.split_whitespace().collect();
    let name = format!("CPU{cpu}");
    let column = heads.iter().position(|head| *head == name);
    let column = column.context("no such CPU")?;
    let mut sums = [0; 2];
    for line in lines {
        let mut words = line.split_whitespace();
        let name = words.next().context("a line without a name")?;
        let counts: Vec<&str> = words.take(heads.len()).collect();
        // ERR and MIS are not per CPU.
        if counts.len() == heads.len() {
            sums[usize::from(name != "RES:")] += counts[column].parse::<u64>()?;
        }
    }
    Ok(sums)
}

/// A guest that executes nothing that exits leaves for the host's interrupts, and once for a
/// change; the vCPU that is not changed does not leave for it.
///
/// The exit does not say whose the interrupt was, but the host's own are counted elsewhere. Nor does
/// who is asked and not in the guest leave it, but each request makes KVM recalculate.
fn cost(vendor: Vendor, changes: u32) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    // The last CPU for the vCPU that is changed, the first one for the test and the other vCPU; on
    // a host with one CPU, nobody needs to be interrupted.
    let test = gettid();
    let all = sched_getaffinity(test)?;
    let cpus: Vec<usize> = (0..CpuSet::count())
        .filter(|cpu| all.is_set(*cpu) == Ok(true))
        .collect();
    let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
    let pin = |tid, cpu| -> Result<()> {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        Ok(sched_setaffinity(Pid::from_raw(tid), &set)?)
    };
    pin(rig.vcpus[0].tid, last)?;
    pin(rig.vcpus[1].tid, first)?;
    rig.start(Payload::Hlt)?;
    pin(test.as_raw(), first)?;
    let result = (|| {
        let counter = rig.counter()?;
        let filter = format!("cpu=={last}");
        let others = Histogram::start("ipi/ipi_send_cpu", &["cpu"], &filter)?;
        let tids = [rig.vcpus[0].tid, rig.vcpus[1].tid];
        let recalculated = Calls::of(&format!("{}_recalc_intercepts", vendor.name()), &tids)?;
        // Both stand at the gate from here on.
        rig.step(&[0, 1], few(Payload::Hlt))?;
        let exits_before = counter.read()?;
        let of_others = || -> Result<u64> { Ok(others.read()?.values().sum()) };
        let others_before = of_others()?;
        let before = interrupts(last)?;
        for change in 0..changes {
            if change % 2 == 0 {
                rig.set(Some(0), Exits::HLT)?;
            } else {
                rig.reset(Some(0))?;
            }
        }
        let exits = counter.read()?;
        let after = interrupts(last)?;
        let others = of_others()? - others_before;
        let recalculations = [recalculated.by(tids[0])?, recalculated.by(tids[1])?];
        let [requests, interrupts] = [0, 1].map(|kind| after[kind] - before[kind]);
        // What the module sends is not traced.
        let asked = requests.saturating_sub(others);
        let changed = exits_before[0].until(&exits[0]);
        let other = exits_before[1].until(&exits[1]);
        eprintln!(
            "    {changes} changes, {} exits, {interrupts} interrupts and {others} requests to \
             reschedule from elsewhere; asked to leave {asked} times; controls written \
             {recalculations:?} times",
            changed.total()
        );
        // One request for each change, or for several while it is on its way, or again for one that
        // was taken and not followed yet, on a slow host; and none for who does not change.
        ensure!(
            (1..=2 * u64::from(changes)).contains(&recalculations[0]) && recalculations[1] == 0,
            "controls were written {recalculations:?} times for {changes} changes of one vCPU"
        );
        for exits in [&changed, &other] {
            ensure!(
                exits.total() == exits.of_host(vendor),
                "the guest left by itself: {exits:?}"
            );
        }
        ensure!(
            asked <= u64::from(changes),
            "{asked} requests to leave the guest"
        );
        ensure!(
            changed.total() <= interrupts + others + u64::from(changes),
            "{} exits",
            changed.total()
        );
        if first != last {
            // Of two requests at the same time a slow host's CPU sees one. Then nobody can tell
            // whose it was, and that the guest left at all has to do.
            let told = requests >= others;
            if !told {
                eprintln!("    whose requests these were cannot be told: {requests} came");
            }
            ensure!(
                asked > 0 || (!told && requests > 0 && changed.total() > 0),
                "the guest was never asked, so nothing was tested"
            );
        }
        Ok(())
    })();
    sched_setaffinity(test, &all)?;
    result?;
    rig.stop()?;
    rig.end()
}
