// SPDX-License-Identifier: GPL-2.0

//! What it costs to change a VM that runs: from the call until the last vCPU has it, or has it
//! before it executes anything, and the exits that this takes.

use std::collections::BTreeMap;

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use figures::{
    change::{
        exits,
        BLOCKED,
        GROUP,
        NATIVE,
        RUNNING, //
    },
    Figure,
    Unit, //
};
use nix::{
    sched::{
        sched_setaffinity,
        CpuSet, //
    },
    unistd::gettid, //
};

use super::{
    cpus,
    tsc,
    unit, //
};
use crate::{
    cgroup::Cgroup,
    client::{
        Thread,
        Vmm, //
    },
    exits::Window,
    interface::ioctl,
    pause,
    payload::Payload,
    soon,
    uapi::{
        self,
        Device, //
    },
    vmm::{
        Action,
        Guest,
        Work, //
    }, //
};

/// Where the vCPUs are when they are changed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// In the guest, or waiting for a CPU to go on there. `hlt` is given.
    Running,
    /// In a HLT that does not exit and nothing ends. `hlt` is taken back.
    HaltedNatively,
    /// In the kernel, after a HLT that exited and nothing ends. `hlt` is given.
    Blocked,
}

impl State {
    const ALL: [Self; 3] = [Self::Running, Self::HaltedNatively, Self::Blocked];

    fn name(self) -> &'static str {
        match self {
            Self::Running => RUNNING,
            Self::HaltedNatively => NATIVE,
            Self::Blocked => BLOCKED,
        }
    }

    /// The policy that the VM begins with.
    fn before(self) -> Exits {
        match self {
            Self::Running | Self::Blocked => Exits::NONE,
            Self::HaltedNatively => Exits::HLT,
        }
    }

    /// What it is changed to.
    fn after(self) -> Exits {
        Exits::HLT & !self.before()
    }
}

/// Keeps a thread on a CPU.
fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(gettid(), &set)?)
}

/// A VM whose vCPUs are in one state.
struct Rig {
    state: State,
    vmm: Vmm,
    guest: Guest,
    vcpus: Vec<Thread>,
    id: u64,
}

impl Rig {
    fn new(cgroup: &Cgroup, state: State, vcpus: usize) -> Result<Self> {
        let mut vmm = Vmm::start(cgroup)?;
        let vm = vmm.create_vm()?;
        vmm.hide_pv_unhalt(vm)?;
        let guest = vmm.guest(vm)?;
        // The first CPU is the caller's, where there is another one.
        let cpus = cpus()?;
        let vcpus = (0..vcpus)
            .map(|index| {
                let vcpu = vmm.create_vcpu(vm, index)?;
                let cpu = if cpus.len() > 1 {
                    1 + index % (cpus.len() - 1)
                } else {
                    0
                };
                vmm.pin(vcpu, cpus[cpu])?;
                Ok(vcpu)
            })
            .collect::<Result<Vec<_>>>()?;
        let pid = vmm.pid();
        let vms = Device::open()?.vms()?;
        let mine = vms.iter().find(|vm| vm.pid as i32 == pid);
        let id = mine.context("the module does not know the VM")?.id;
        let work = match state {
            State::Running => Work::gated(Payload::Pause),
            // Without a timer.
            State::HaltedNatively | State::Blocked => Work {
                ticks: 0,
                ..Work::new(Payload::Hlt, u32::MAX)
            },
        };
        for vcpu in &vcpus {
            vmm.start_run(*vcpu, work)?;
        }
        let mut rig = Self {
            state,
            vmm,
            guest,
            vcpus,
            id,
        };
        rig.wait(0)?;
        Ok(rig)
    }

    /// Waits until every vCPU is where it shall be, for the time `number`.
    fn wait(&mut self, number: u32) -> Result<()> {
        if self.state == State::Running {
            // What they spin at is before the first execution.
            pause();
            return Ok(());
        }
        let all = |begun: u32| {
            let mut vcpus = 0..self.vcpus.len();
            vcpus.all(|index| self.guest.params(index).begun >= begun)
        };
        ensure!(soon(|| Ok(all(number + 1)))?, "vCPUs do not halt");
        pause();
        Ok(())
    }

    /// The change, with the time that it took.
    fn change(&self) -> Result<i64> {
        let device = Device::open()?;
        let argument = uapi::Override {
            vm: self.id,
            disable: self.state.after().bits(),
            timeout_ms: uapi::MAX_TIMEOUT,
            ..Default::default()
        };
        let start = tsc();
        let answer = device.overriding(uapi::SET_VM, argument)?;
        let end = tsc();
        ensure!(answer.pending == 0, "{} vCPUs are pending", answer.pending);
        Ok(end - start)
    }

    /// Back to where it was before.
    fn change_back(&mut self, number: u32) -> Result<()> {
        ensure!(ioctl::reset_override(self.id, None)? == 0, "pending");
        if self.state != State::Running {
            // Whoever was in a HLT goes on behind it, to the next one. One step after the other, as
            // who halts natively keeps the rest waiting for the CPU.
            for vcpu in self.vcpus.clone() {
                self.vmm.leave(vcpu)?;
                self.vmm.act(vcpu, Action::SetRunnable)?;
            }
            for vcpu in self.vcpus.clone() {
                self.vmm.go_on(vcpu)?;
            }
        }
        self.wait(number)
    }
}

/// Whether an exit is for an interrupt of the host's, as the one is that makes a vCPU leave the
/// guest, and not for what the guest does.
fn is_of_host(reason: &str) -> bool {
    // As the trace calls it on VMX, and on SVM.
    ["EXTERNAL_INTERRUPT", "interrupt"].contains(&reason)
}

/// The change of one VM in one state, again and again.
fn figures(state: State, vcpus: usize, count: u32) -> Result<Vec<Figure>> {
    let cgroup = Cgroup::new("bench-change")?;
    ioctl::set_policy(&cgroup, state.before(), Exits::ALL)?;
    let mut rig = Rig::new(&cgroup, state, vcpus)?;
    let mut took = Vec::new();
    let mut number = 0;
    // The first one fills caches.
    for round in 0..=count {
        let value = rig.change()?;
        if round > 0 {
            took.push(value);
        }
        number += 1;
        rig.change_back(number)?;
    }
    // To count costs, so nothing is measured meanwhile.
    let tids: Vec<i32> = rig.vcpus.iter().map(|vcpu| vcpu.tid).collect();
    let window = Window::of(&tids)?;
    let (mut all, mut kicks) = (Vec::new(), Vec::new());
    let mut reasons = BTreeMap::new();
    for _ in 0..count {
        let exits = window.exits(|| rig.change())?;
        all.push(exits.values().sum::<u64>().try_into()?);
        let of_host = exits.iter().filter(|(reason, _)| is_of_host(reason));
        kicks.push(of_host.map(|(_, count)| *count as i64).sum());
        for (reason, exits) in exits {
            *reasons.entry(reason).or_insert(0.0) += exits as f64 / f64::from(count);
        }
        number += 1;
        rig.change_back(number)?;
    }
    drop(window);
    let case = match vcpus {
        1 => "1 vCPU".to_string(),
        more => format!("{more} vCPUs"),
    };
    let kicks = Figure::new(GROUP, "", "", Unit::Exits, kicks)?.median;
    let took = Figure::new(GROUP, state.name(), &case, unit()?, took)?;
    let mut exits = Figure::new(GROUP, &exits(state.name()), &case, Unit::Exits, all)?;
    exits.reasons = reasons;
    exits.own = Some(kicks as f64);
    Ok(vec![took.at(vcpus as u64), exits.at(vcpus as u64)])
}

/// VMs of so many vCPUs, in every state, `count` changes each.
pub fn measure(vcpus: &[usize], count: u32) -> Result<Vec<Figure>> {
    pin(cpus()?[0])?;
    let mut all = Vec::new();
    for state in State::ALL {
        for vcpus in vcpus {
            let what = || format!("{}, {vcpus} vCPUs", state.name());
            all.extend(figures(state, *vcpus, count).with_context(what)?);
        }
    }
    Ok(all)
}
