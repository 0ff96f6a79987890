// SPDX-License-Identifier: GPL-2.0

//! Changing VMs that run.

use std::{
    sync::OnceLock,
    thread,
    time::Duration, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use testing::{
    cgroup::Cgroup,
    client::{
        Thread,
        Vmm, //
    },
    exits::{
        Counter,
        Counts,
        Vendor, //
    },
    interface::{
        self,
        ioctl,
        VcpuView,
        VmView,
        IN_FORCE,
        NEXT_ENTRY, //
    },
    modules::{
        self,
        EXITPOLICY, //
    },
    pause,
    payload::Payload,
    soon,
    uapi::{
        self,
        Device, //
    },
    vmm::{
        Guest,
        Irqchip,
        Work, //
    },
    POLLS, //
};

use crate::{
    matrix::{
        floor,
        supported, //
    },
    Test, //
};

mod cgroups;
mod flips;
mod halted;
mod loaded;
pub mod nested;
mod rules;
mod timers;
pub mod torture;

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let tests = [
        flips::tests(vendor)?,
        halted::tests(vendor)?,
        timers::tests(vendor)?,
        rules::tests(vendor)?,
        cgroups::tests(vendor)?,
        loaded::tests(vendor)?,
        torture::tests(vendor)?,
        nested::tests(vendor)?,
    ];
    Ok(tests.into_iter().flatten().collect())
}

/// The exits that can be changed on this host.
fn changeable(vendor: Vendor) -> Result<Exits> {
    Ok(supported(vendor)? & !floor(vendor)?)
}

/// How often a guest executes what it is about, to tell whether that exits. A native HLT can last
/// until the host's next tick.
fn few(payload: Payload) -> u32 {
    match payload {
        Payload::Pause => PAUSES.get().copied().unwrap_or(20),
        Payload::Hlt | Payload::Mwait => 2,
        _ => 20,
    }
}

/// How many executions of PAUSE exit for sure where they do: some pass a filter or a window, how
/// many is for each host to say. Found out once.
static PAUSES: OnceLock<u32> = OnceLock::new();

/// Fills [`PAUSES`], with what a VM says that nothing was done to.
fn count_pauses(vendor: Vendor) -> Result<()> {
    if PAUSES.get().is_some() || !changeable(vendor)?.contains(Exits::PAUSE) {
        return Ok(());
    }
    let cgroup = Cgroup::new("plain")?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    let mut count = 20;
    let exits = loop {
        let exits = vmm.count(vcpu, Payload::Pause, count)?.exits;
        let exits = exits.of(vendor, Payload::Pause)[0];
        if exits > 0 {
            break exits;
        }
        ensure!(count < 1 << 24, "no exit in {count} executions of PAUSE");
        count *= 4;
    };
    vmm.kill()?;
    if modules::is_loaded(EXITPOLICY)? {
        interface::ensure_no_vms()?;
    }
    // Where not every one exits, windows grow, and a vCPU that is interrupted begins a new one: so is
    // it on a host with one CPU while the test begins to wait.
    let times = if exits == u64::from(count) { 1 } else { 64 };
    PAUSES.get_or_init(|| count * times);
    Ok(())
}

/// A VM that is changed while it runs.
pub struct Rig {
    vendor: Vendor,
    vmm: Vmm,
    vm: usize,
    guest: Guest,
    vcpus: Vec<Thread>,
    /// What the module calls the VM.
    pub id: u64,
}

/// How a VM is made.
#[derive(Clone, Copy, Default)]
struct Make {
    vcpus: usize,
    /// What its VMM asks for.
    requested: Exits,
    /// Whether its guest is told of PV_UNHALT. On Intel, that is the end of changing `hlt`.
    pv_unhalt: bool,
    irqchip: Irqchip,
}

impl Rig {
    fn new(vendor: Vendor, cgroup: &Cgroup, make: Make) -> Result<Self> {
        count_pauses(vendor)?;
        let mut vmm = Vmm::start(cgroup)?;
        let vm = vmm.create_vm_with(make.irqchip)?;
        if !make.requested.is_empty() {
            vmm.disable_exits(vm, make.requested)?;
        }
        if !make.pv_unhalt {
            vmm.hide_pv_unhalt(vm)?;
        }
        let guest = vmm.guest(vm)?;
        let mut vcpus = Vec::new();
        for index in 0..make.vcpus {
            vcpus.push(vmm.create_vcpu(vm, index)?);
        }
        // A VM that is made while the module is not there, or that has no vCPU, gets its id later.
        let id = if modules::is_loaded(EXITPOLICY)? {
            let pid = vmm.pid();
            let vms = Device::open()?.vms()?;
            let mine = vms.iter().find(|vm| vm.pid as i32 == pid);
            mine.map_or(0, |vm| vm.id)
        } else {
            0
        };
        Ok(Self {
            vendor,
            vmm,
            vm,
            guest,
            vcpus,
            id,
        })
    }

    /// Two vCPUs, in a cgroup without a policy.
    fn pair(vendor: Vendor, cgroup: &Cgroup) -> Result<Self> {
        let make = Make {
            vcpus: 2,
            ..Make::default()
        };
        Self::new(vendor, cgroup, make)
    }

    /// Every vCPU runs, and stands at the gate.
    fn start(&mut self, payload: Payload) -> Result<()> {
        for index in 0..self.vcpus.len() {
            self.start_one(index, Work::gated(payload))?;
        }
        Ok(())
    }

    fn start_one(&mut self, index: usize, work: Work) -> Result<()> {
        self.vmm.start_run(self.vcpus[index], work)
    }

    pub fn stop(&mut self) -> Result<()> {
        for vcpu in self.vcpus.clone() {
            self.vmm.stop(vcpu)?;
        }
        Ok(())
    }

    /// Waits for something that the guest or KVM does soon.
    fn wait(&self, mut is_so: impl FnMut() -> bool) -> Result<()> {
        for look in 0..POLLS {
            if is_so() {
                return Ok(());
            }
            // Not for long: on a host with one CPU, to look interrupts the guest.
            if look < 20 {
                thread::sleep(Duration::from_micros(20));
            } else {
                pause();
            }
        }
        bail!("the guest is stuck");
    }

    /// Lets these vCPUs execute `count` times, and waits until they have.
    fn step(&mut self, vcpus: &[usize], count: u32) -> Result<()> {
        let goals: Vec<(usize, u32)> = vcpus
            .iter()
            .map(|index| (*index, self.guest.open_gate(*index, count)))
            .collect();
        for (index, goal) in goals {
            self.wait_executed(index, goal)?;
        }
        Ok(())
    }

    /// Waits until a vCPU has executed so many times.
    fn wait_executed(&mut self, index: usize, goal: u32) -> Result<()> {
        let moved = self.wait(|| self.guest.params(index).executed >= goal);
        if moved.is_ok() {
            return Ok(());
        }
        let (vcpu, params) = (self.vcpus[index], self.guest.params(index));
        let state = if self.vmm.ended(vcpu)? {
            // What KVM_RUN said tells more than that nothing moves.
            format!("it runs no more: {:?}", self.vmm.wait(vcpu))
        } else {
            format!("{:?}", self.vmm.look_at(vcpu))
        };
        moved.with_context(|| {
            format!("vCPU {index}, which should get to {goal}: {params:?}; {state}")
        })
    }

    /// Begins to count the exits of each vCPU.
    fn counter(&self) -> Result<Counter> {
        let tids: Vec<i32> = self.vcpus.iter().map(|vcpu| vcpu.tid).collect();
        Counter::of(&tids)
    }

    /// The exits that `few` executions cost each vCPU.
    fn window(&mut self, counter: &Counter, payload: Payload) -> Result<Vec<Counts>> {
        let all: Vec<usize> = (0..self.vcpus.len()).collect();
        let before = counter.read()?;
        self.step(&all, few(payload))?;
        let after = counter.read()?;
        let windows = before.iter().zip(&after);
        Ok(windows.map(|(before, after)| before.until(after)).collect())
    }

    /// Fails unless every vCPU's executions exit, or do not, as `passes` says of each.
    fn check(&mut self, counter: &Counter, payload: Payload, passes: &[bool]) -> Result<()> {
        let windows = self.window(counter, payload)?;
        let count = u64::from(few(payload));
        for (index, (window, passes)) in windows.iter().zip(passes).enumerate() {
            let exits = window.of(self.vendor, payload);
            let fine = match (*passes, payload) {
                (true, _) => exits.iter().all(|exits| *exits == 0),
                (false, Payload::Pause) => (1..=count).contains(&exits[0]),
                (false, _) => exits.iter().all(|exits| *exits == count),
            };
            ensure!(
                fine,
                "vCPU {index}: {exits:?} exits in {count} executions of {payload:?}, which should \
                 {}: {window:?}\n{:?}",
                if *passes { "not exit" } else { "exit" },
                self.view(),
            );
        }
        Ok(())
    }

    /// The same for all vCPUs alike.
    fn check_all(&mut self, counter: &Counter, payload: Payload, passes: bool) -> Result<()> {
        self.check(counter, payload, &vec![passes; self.vcpus.len()])
    }

    /// Each payload on all vCPUs, which have `in_force`.
    fn check_each(&mut self, in_force: Exits) -> Result<()> {
        self.check_some(&Payload::EXITS, in_force)
    }

    fn check_some(&mut self, payloads: &[Payload], in_force: Exits) -> Result<()> {
        for payload in payloads.iter().copied() {
            if !supported(self.vendor)?.contains(payload.exit()) {
                continue;
            }
            self.start(payload)?;
            {
                let counter = self.counter()?;
                self.check_all(&counter, payload, in_force.contains(payload.exit()))?;
            }
            self.stop()?;
        }
        Ok(())
    }

    /// Gives the VM, or one vCPU, an override. Everything must have changed when it returns.
    fn set(&self, vcpu: Option<u32>, disable: Exits) -> Result<()> {
        let pending = ioctl::set_override(self.id, vcpu, disable)?;
        ensure!(
            pending == 0,
            "{pending} vCPUs are pending: {:?}",
            self.view()?
        );
        self.ensure_settled()
    }

    /// Takes an override away.
    fn reset(&self, vcpu: Option<u32>) -> Result<()> {
        let pending = ioctl::reset_override(self.id, vcpu)?;
        ensure!(
            pending == 0,
            "{pending} vCPUs are pending: {:?}",
            self.view()?
        );
        self.ensure_settled()
    }

    /// Fails unless each vCPU has what it should have, or will before it is in the guest again.
    fn ensure_settled(&self) -> Result<()> {
        for vcpu in Device::open()?.vcpus(self.id)? {
            let settled = match vcpu.state {
                uapi::VCPU_IN_FORCE => vcpu.in_force == vcpu.wanted,
                uapi::VCPU_NEXT_ENTRY => true,
                _ => false,
            };
            ensure!(settled && vcpu.refused == 0, "{vcpu:?}");
        }
        Ok(())
    }

    fn view(&self) -> Result<VmView> {
        ioctl::vm(self.id)
    }

    /// The VM once every vCPU has what it should have, by its having run since.
    fn settled(&self) -> Result<VmView> {
        let in_force = |vcpu: &VcpuView| vcpu.state == IN_FORCE;
        let mut view = self.view()?;
        soon(|| {
            view = self.view()?;
            Ok(view.each.iter().all(in_force))
        })?;
        for vcpu in &view.each {
            ensure!(
                in_force(vcpu) && vcpu.in_force == vcpu.wanted,
                "{vcpu:?} in {view:?}"
            );
        }
        Ok(view)
    }

    pub fn end(self) -> Result<()> {
        self.vmm.kill()?;
        interface::ensure_no_vms()
    }
}

/// Whether a vCPU will be right before its guest executes anything.
fn is_certain(state: &str) -> bool {
    [IN_FORCE, NEXT_ENTRY].contains(&state)
}
