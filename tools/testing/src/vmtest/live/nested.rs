// SPDX-License-Identifier: GPL-2.0

//! Guests that have guests. "L1" is the guest that is changed, "L2" its own guest.
//!
//! SVM changes a vCPU wherever it is, as KVM keeps L1's controls in memory and makes those of L2
//! from them. VMX can change it in L1 only: in L2 it stays as it was, is shown as pending, and
//! changes when it leaves for L1.

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use testing::{
    cgroup::Cgroup,
    client::Vmm,
    exits::{
        hooked_functions,
        Calls,
        Counter,
        Vendor, //
    },
    faults::Faults,
    interface::{
        self,
        command,
        ioctl,
        sysfs,
        IN_FORCE, //
    },
    kernel_log::KernelLog,
    modules::{
        self,
        EXITPOLICY, //
    },
    pause,
    payload::{
        Payload,
        TIMER_VECTOR, //
    },
    soon,
    uapi::{
        self,
        Device, //
    },
    vmm::Work,
    POLLS, //
};

use super::{
    changeable,
    few,
    Make,
    Rig, //
};
use crate::{
    few_will_do,
    lifecycle::ensure_not_unloadable,
    wrong_kernel::{
        misspelt,
        renamed, //
    },
    Test, //
};

const IN_L2: &str = "pending: in L2";
/// The command's exit status for vCPUs that were waited for in vain.
const ON_THEIR_WAY: i32 = 5;

/// What leaves L2 on VMX.
const NESTED_VMEXIT: &str = "__nested_vmx_vmexit";

/// How long to wait for a vCPU in L2, in ms. On VMX that is going to be in vain.
fn limit(vendor: Vendor) -> u32 {
    match vendor {
        Vendor::Svm => uapi::MAX_TIMEOUT,
        Vendor::Vmx => 20,
    }
}

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let changes = if few_will_do()? { 100 } else { 500 };
    // Each of them has the hook registered and removed, beside a vCPU that leaves for KVM all the
    // time.
    let with_hook = if few_will_do()? { 20 } else { 500 };
    let no_waiting = vendor == Vendor::Svm;
    let no_aperf = !changeable(vendor)?.contains(Exits::APERFMPERF);
    Ok(vec![
        Test::new(
            format!("live::nested::l2_halts_{changes}_times"),
            move || l2_halts(vendor, changes),
        ),
        Test::new(
            format!("live::nested::l1_intercepts_hlt_{changes}_times"),
            move || l1_intercepts_hlt(vendor, changes),
        ),
        Test::new(
            format!("live::nested::l2_leaves_on_and_on_{with_hook}_times"),
            move || l2_leaves_on_and_on(vendor, with_hook),
        ),
        Test::new("live::nested::taken_while_l2_halts", move || {
            taken_while_l2_halts(vendor)
        }),
        Test::new("live::nested::given_while_l2_sleeps", move || {
            given_while_l2_sleeps(vendor)
        }),
        Test::new("live::nested::pending_in_l2", move || pending_in_l2(vendor)).ignored(no_waiting),
        Test::new("live::nested::hook_that_cannot_be", move || {
            hook_that_cannot_be(vendor)
        })
        .ignored(no_waiting),
        Test::new(
            format!("live::nested::l2_reads_aperf_{with_hook}_times"),
            move || l2_reads_aperf(vendor, with_hook),
        )
        .ignored(no_aperf),
        Test::new("live::nested::taken_back_in_l2", move || {
            taken_back_in_l2(vendor, Payload::L2Hlt)
        })
        .ignored(no_waiting),
        Test::new("live::nested::aperf_taken_back_in_l2", move || {
            taken_back_in_l2(vendor, Payload::L2Aperf)
        })
        .ignored(no_waiting || no_aperf),
        Test::new("live::nested::switched_off_in_l2", move || {
            switched_off_in_l2(vendor)
        }),
    ])
}

/// A VM whose first vCPU has a guest of its own.
struct Nested {
    rig: Rig,
    /// What L2 executes.
    payload: Payload,
    /// How often L2 was made to leave.
    trips: u32,
}

impl Nested {
    /// L2 stands at the gate.
    fn start(vendor: Vendor, cgroup: &Cgroup, payload: Payload) -> Result<Self> {
        let mut nested = Self::new(vendor, cgroup, 1)?;
        if payload == Payload::L2Aperf {
            nested.payload = Payload::Aperfmperf;
        }
        nested.rig.start_one(0, Work::gated(payload))?;
        // It has got there.
        nested.leave()?;
        nested.back();
        Ok(nested)
    }

    fn new(vendor: Vendor, cgroup: &Cgroup, vcpus: usize) -> Result<Self> {
        let make = Make {
            vcpus,
            ..Make::default()
        };
        let rig = Rig::new(vendor, cgroup, make)?;
        Ok(Self {
            rig,
            payload: Payload::Hlt,
            trips: 0,
        })
    }

    /// Makes L2 leave. L1 stands at its own gate then.
    fn leave(&mut self) -> Result<()> {
        self.trips += 1;
        self.rig.guest.set_l2(0, self.trips, self.trips - 1);
        let l1 = || self.rig.guest.l1(0);
        self.rig
            .wait(|| l1().left == self.trips || l1().failed != 0)
            .and_then(|()| self.ensure_well())
            .with_context(|| format!("L2 does not leave: {:x?}", l1()))
    }

    fn ensure_well(&self) -> Result<()> {
        let l1 = self.rig.guest.l1(0);
        ensure!(l1.failed == 0, "L1 failed: {l1:x?}");
        Ok(())
    }

    fn back(&self) {
        self.rig.guest.set_l2(0, self.trips, self.trips);
    }

    fn state(&self) -> Result<String> {
        Ok(self.rig.view()?.vcpu(0)?.state.clone())
    }

    /// Gives or takes L2's exit, and waits so many ms at most. Returns how many vCPUs are pending.
    fn change(&self, on: bool, timeout_ms: u32) -> Result<u32> {
        self.change_by(&Device::open()?, on, timeout_ms)
    }

    fn change_by(&self, device: &Device, on: bool, timeout_ms: u32) -> Result<u32> {
        let (command, disable) = match on {
            true => (uapi::SET_VM, self.payload.exit()),
            false => (uapi::RESET_VM, Exits::NONE),
        };
        let argument = uapi::Override {
            vm: self.rig.id,
            flags: uapi::VM_VCPU,
            vcpu_id: 0,
            timeout_ms,
            disable: disable.bits(),
            ..Default::default()
        };
        Ok(device.overriding(command, argument)?.pending)
    }

    /// Fails unless each of L2's executions costs so many exits.
    fn check(&mut self, counter: &Counter, exits_each: u64) -> Result<()> {
        let payload = self.payload;
        let before = counter.read()?;
        self.rig
            .step(&[0], few(payload))
            .with_context(|| format!("{:x?}", self.rig.guest.l1(0)))?;
        let window = before[0].until(&counter.read()?[0]);
        let exits = window.of(self.rig.vendor, payload);
        let expected = exits_each * u64::from(few(payload));
        ensure!(
            exits == [expected],
            "{exits:?} exits for {payload:?}, should be {expected}: {window:?}\n{:?}",
            self.rig.view()
        );
        Ok(())
    }

    /// Fails unless the vCPU, in L2, follows a change as it should, and has it when it is there
    /// again.
    fn ensure_followed(&mut self, counter: &Counter, pending: u32, before: u64) -> Result<()> {
        if self.rig.vendor == Vendor::Svm {
            ensure!(pending == 0, "pending: {:?}", self.rig.view());
            return self.rig.ensure_settled();
        }
        ensure!(pending == 1, "{pending} pending: {:?}", self.rig.view());
        ensure!(
            soon(|| Ok(self.state()? == IN_L2))?,
            "not in L2: {:?}",
            self.rig.view()
        );
        self.check(counter, before).context("in L2 as before")?;
        ensure!(self.state()? == IN_L2, "not in L2: {:?}", self.rig.view());
        self.leave()?;
        ensure!(
            soon(|| Ok(self.state()? == IN_FORCE))?,
            "in L1: {:?}",
            self.rig.view()
        );
        self.back();
        Ok(())
    }

    /// L2 leaves, with the hook in place, and so does not execute in L1 as it was.
    fn leave_and_change(&mut self) -> Result<()> {
        self.leave()?;
        ensure!(self.state()? == IN_FORCE, "in L1: {:?}", self.rig.view());
        Ok(())
    }

    /// L2 halts once, without a timer.
    fn fall_asleep(&mut self) -> Result<()> {
        let work = Work {
            ticks: 0,
            until: 1,
            ..Work::gated(Payload::L2Hlt)
        };
        self.rig.start_one(0, work)?;
        self.rig.wait(|| self.rig.guest.params(0).begun == 1)
    }

    /// The other vCPU wakes L2.
    fn wake(&mut self) -> Result<()> {
        let work = Work {
            // Fixed, to the x2APIC id 0.
            icr: [0x4000 | TIMER_VECTOR as u32, 0],
            ..Work::new(Payload::Ipi, 1)
        };
        self.rig.vmm.run(self.rig.vcpus[1], work)?;
        self.rig
            .wait(|| self.rig.guest.params(0).executed == 1)
            .context("L2 sleeps on")
    }

    /// L2 goes on with HLTs that its timer ends, each with so many exits.
    fn halt_on(mut self, counter: Counter, exits_each: u64) -> Result<()> {
        self.rig
            .guest
            .set_ticks(0, Work::gated(Payload::L2Hlt).ticks);
        self.check(&counter, exits_each)?;
        drop(counter);
        ensure_hooked(false)?;
        self.end()
    }

    /// HLT is given in L2, where it is pending, and the hook asks again when L2 ends.
    fn give_in_l2(&self) -> Result<()> {
        self.give_in_l2_without_hook()?;
        ensure_hooked(true)
    }

    /// HLT is given in L2, where it is pending.
    fn give_in_l2_without_hook(&self) -> Result<()> {
        let pending = self.change(true, limit(self.rig.vendor))?;
        ensure!(pending == 1, "{pending} pending: {:?}", self.rig.view());
        ensure!(
            soon(|| Ok(self.state()? == IN_L2))?,
            "not in L2: {:?}",
            self.rig.view()
        );
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        self.rig.vmm.stop(self.rig.vcpus[0])?;
        self.ensure_well()?;
        self.rig.end()
    }
}

fn is_hooked() -> Result<bool> {
    let mut hooked = hooked_functions()?.into_iter();
    Ok(hooked.any(|line| line.split_whitespace().next() == Some(NESTED_VMEXIT)))
}

/// Fails unless the hook is, or is not, there, a moment from now at the latest.
fn ensure_hooked(hooked: bool) -> Result<()> {
    // To read the list takes a while.
    for _ in 0..POLLS / 20 {
        if is_hooked()? == hooked {
            return Ok(());
        }
        pause();
    }
    bail!(
        "{NESTED_VMEXIT} should {}be hooked: {:#?}",
        if hooked { "" } else { "not " },
        hooked_functions()?
    );
}

/// L1 lets L2 read APERF. Once that is taken back, no read of L2's is native any more; what SVM is given in
/// L2, L2 has when L1 enters it next.
fn l2_reads_aperf(vendor: Vendor, changes: u32) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut nested = Nested::start(vendor, &cgroup, Payload::L2Aperf)?;
    let counter = nested.rig.counter()?;
    nested.check(&counter, 1)?;
    for change in 0..changes {
        let on = change % 2 == 0;
        let pending = nested.change(on, limit(vendor))?;
        let follow = |nested: &mut Nested| {
            nested.ensure_followed(&counter, pending, u64::from(on))?;
            if on && vendor == Vendor::Svm {
                nested.leave()?;
                nested.back();
            }
            nested.check(&counter, u64::from(!on))
        };
        follow(&mut nested).with_context(|| format!("change {change}"))?;
    }
    drop(counter);
    ensure_hooked(false)?;
    nested.end()
}

/// L1 lets L2 halt, so that L2's HLTs are as L1's would be.
fn l2_halts(vendor: Vendor, changes: u32) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut nested = Nested::start(vendor, &cgroup, Payload::L2Hlt)?;
    let counter = nested.rig.counter()?;
    nested.check(&counter, 1)?;
    for change in 0..changes {
        let on = change % 2 == 0;
        let exits = |passes: bool| u64::from(!passes);
        let pending = nested.change(on, limit(vendor))?;
        nested
            .ensure_followed(&counter, pending, exits(!on))
            .and_then(|()| nested.check(&counter, exits(on)))
            .with_context(|| format!("change {change}"))?;
    }
    drop(counter);
    let l1 = nested.rig.guest.l1(0);
    ensure!(l1.hlts == 0, "{l1:?}");
    ensure_hooked(false)?;
    nested.end()
}

/// Each of L2's HLTs exits, whatever L1 has, and L1 halts in its place, with an exit or without.
fn l1_intercepts_hlt(vendor: Vendor, changes: u32) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut nested = Nested::start(vendor, &cgroup, Payload::L2HltIntercepted)?;
    let counter = nested.rig.counter()?;
    nested.check(&counter, 2)?;
    for change in 0..changes {
        let on = change % 2 == 0;
        nested.change(on, limit(vendor))?;
        // Each one leaves L2 for L1, which changes then.
        let in_force = soon(|| {
            nested.rig.step(&[0], 1)?;
            Ok(nested.state()? == IN_FORCE)
        })?;
        ensure!(in_force, "change {change}: {:?}", nested.rig.view());
        nested
            .check(&counter, if on { 1 } else { 2 })
            .with_context(|| format!("change {change}"))?;
    }
    drop(counter);
    let (executed, l1) = (nested.rig.guest.params(0).executed, nested.rig.guest.l1(0));
    ensure!(l1.hlts == executed, "{executed} HLTs of L2: {l1:?}");
    ensure_hooked(false)?;
    nested.end()
}

/// L2 leaves and is entered all the time, so that each change comes through soon, if it finds the
/// vCPU in L2 or not.
fn l2_leaves_on_and_on(vendor: Vendor, changes: u32) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut nested = Nested::start(vendor, &cgroup, Payload::L2Hlt)?;
    nested.rig.guest.set_l2(0, u32::MAX, u32::MAX);
    let counter = nested.rig.counter()?;
    for change in 0..changes {
        let on = change % 2 == 0;
        let pending = nested.change(on, uapi::MAX_TIMEOUT)?;
        ensure!(pending == 0, "pending: {:?}", nested.rig.view());
        nested.rig.ensure_settled()?;
        nested
            .check(&counter, u64::from(!on))
            .with_context(|| format!("change {change}"))?;
    }
    drop(counter);
    ensure_hooked(false)?;
    nested.end()
}

/// L2 halts natively while HLT is taken. It wakes, and wakes again where HLT exits.
fn taken_while_l2_halts(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut nested = Nested::new(vendor, &cgroup, 2)?;
    nested.rig.set(Some(0), Exits::HLT)?;
    nested.fall_asleep()?;
    let counter = nested.rig.counter()?;
    // The host comes by, and L2 halts on.
    let total = || -> Result<u64> { Ok(counter.read()?[0].total()) };
    let before = total()?;
    ensure!(
        soon(|| Ok(total()? >= before + 3))?,
        "the host leaves the vCPU alone"
    );
    let pending = nested.change(false, limit(vendor))?;
    if vendor == Vendor::Vmx {
        ensure!(pending == 1, "{pending} pending: {:?}", nested.rig.view());
        ensure!(
            nested.rig.guest.params(0).executed == 0,
            "it woke by the change"
        );
        ensure_hooked(true)?;
    } else {
        ensure!(pending == 0, "pending: {:?}", nested.rig.view());
    }
    nested.wake()?;
    nested.leave_and_change()?;
    nested.back();
    nested.halt_on(counter, 1)
}

/// L2 sleeps in KVM while HLT is given.
fn given_while_l2_sleeps(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut nested = Nested::new(vendor, &cgroup, 2)?;
    let counter = nested.rig.counter()?;
    nested.fall_asleep()?;
    ensure!(
        soon(|| Ok(counter.read()?[0].of(vendor, Payload::Hlt) == [1]))?,
        "L2 did not halt"
    );
    let pending = nested.change(true, limit(vendor))?;
    ensure!(
        nested.rig.guest.params(0).executed == 0,
        "it woke by the change"
    );
    if vendor == Vendor::Vmx {
        // It will be in L2 when it wakes, as it was before.
        ensure!(pending == 1, "{pending} pending: {:?}", nested.rig.view());
        ensure!(nested.state()? == IN_L2, "{:?}", nested.rig.view());
        ensure_hooked(true)?;
    } else {
        ensure!(pending == 0, "pending: {:?}", nested.rig.view());
    }
    nested.wake()?;
    nested.leave_and_change()?;
    nested.back();
    nested.halt_on(counter, 0)
}

/// What is shown of a vCPU that cannot be changed for being in L2, and the hook that waits for it.
fn pending_in_l2(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut nested = Nested::start(vendor, &cgroup, Payload::L2Hlt)?;
    ensure_hooked(false)?;
    nested.give_in_l2()?;
    let view = interface::only_vm()?;
    let vcpu = view.vcpu(0)?;
    ensure!(
        (view.pending, vcpu.state.as_str()) == (1, IN_L2)
            && vcpu.wanted.contains(Exits::HLT)
            && !vcpu.in_force.contains(Exits::HLT),
        "{view:?}"
    );
    let info = Device::open()?.info()?;
    ensure!((info.pending, info.holding) == (1, 1), "{info:?}");
    ensure_not_unloadable()?;
    let id = nested.rig.id.to_string();
    let set = command::run(&["vm", "set", &id, "--disable", "hlt", "--timeout", "20ms"])?;
    let said = String::from_utf8_lossy(&set.stderr);
    ensure!(
        set.status.code() == Some(ON_THEIR_WAY) && said.contains("vCPU 0 (pending: in L2)"),
        "{}: {said}",
        set.status
    );

    nested.leave_and_change()?;
    let view = interface::only_vm()?;
    let vcpu = view.vcpu(0)?;
    ensure!(
        (view.pending, vcpu.state.as_str()) == (0, IN_FORCE) && vcpu.in_force == vcpu.wanted,
        "{view:?}"
    );
    ensure_hooked(false)?;
    nested.back();
    nested.end()
}

/// A kernel in which the hook on the end of L2 cannot be registered: it is tried on and on, by the
/// worker, whatever other VMs have it do, and the log says so once. The vCPU is not asked for that, and
/// changes when somebody asks it again.
fn hook_that_cannot_be(vendor: Vendor) -> Result<()> {
    modules::unload(EXITPOLICY)?;
    let other = misspelt(NESTED_VMEXIT);
    let image = renamed(&modules::image()?, NESTED_VMEXIT, &other)?;
    modules::load_image(&image)?;
    let result = without_the_hook(vendor, &other);
    // With the VM, which holds the module, gone.
    let again = interface::ensure_no_vms()
        .and_then(|()| Ok(modules::unload(EXITPOLICY)?))
        .and_then(|()| modules::load(EXITPOLICY));
    result.and(again)
}

fn without_the_hook(vendor: Vendor, symbol: &str) -> Result<()> {
    const OTHERS: usize = 5;
    let mut log = KernelLog::from_now()?;
    let cgroup = Cgroup::new("own")?;
    let mut nested = Nested::start(vendor, &cgroup, Payload::L2Hlt)?;
    // Meanwhile L1 goes back to L2.
    ensure_hooked(false)?;
    nested.give_in_l2_without_hook()?;
    let tid = nested.rig.vcpus[0].tid;
    let calls = Calls::of("vmx_recalc_intercepts", &[tid])?;
    let mut vmm = Vmm::start(&cgroup)?;
    for _ in 0..OTHERS {
        let vm = vmm.create_vm()?;
        vmm.create_vcpu(vm, 0)?;
        // The worker makes their directories, and then looks for vCPUs in L2.
        ensure!(soon(|| Ok(sysfs::vm_ids()?.len() == 2))?, "not listed");
        vmm.close(vm)?;
        ensure!(soon(|| Ok(sysfs::vm_ids()?.len() == 1))?, "still listed");
    }
    vmm.kill()?;
    let asked = calls.by(tid)?;
    ensure!(asked == 0, "asked {asked} times in vain");
    drop(calls);
    nested.leave()?;
    let pending = nested.change(true, uapi::MAX_TIMEOUT)?;
    ensure!(
        pending == 0 && nested.state()? == IN_FORCE,
        "{:?}",
        nested.rig.view()
    );
    nested.back();
    nested.end()?;
    let mut lines = log.lines()?;
    lines.retain(|line| line.contains(symbol));
    ensure!(lines.len() == 1, "not one line: {lines:#?}");
    Ok(())
}

/// There is no memory for the hook: the change is pending as it would be with it, and made once there
/// is. The worker tries as well, and nobody keeps memory from it. Returns how many allocations failed.
pub fn hook_without_memory(vendor: Vendor) -> Result<u32> {
    let faults = Faults::of_module(EXITPOLICY)?;
    let cgroup = Cgroup::new("own")?;
    let mut nested = Nested::start(vendor, &cgroup, Payload::L2Hlt)?;
    let device = Device::open()?;
    let failed = faults.each(
        || nested.change_by(&device, true, limit(vendor)),
        |outcome| {
            let pending = outcome.result?;
            ensure!(pending == 1, "{pending} pending: {:?}", nested.rig.view());
            ensure!(
                soon(is_hooked)?,
                "the worker does not hook: {:?}",
                nested.rig.view()
            );
            let pending = nested.change(false, uapi::MAX_TIMEOUT)?;
            ensure!(pending == 0, "{pending} pending: {:?}", nested.rig.view());
            ensure_hooked(false)
        },
    )?;
    nested.give_in_l2()?;
    nested.leave_and_change()?;
    nested.back();
    drop(device);
    nested.end()?;
    Ok(failed)
}

/// What is pending in L2 is taken back there: nothing is to be done any more, nor waited for.
fn taken_back_in_l2(vendor: Vendor, payload: Payload) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut nested = Nested::start(vendor, &cgroup, payload)?;
    let counter = nested.rig.counter()?;
    nested.give_in_l2()?;
    let pending = nested.change(false, uapi::MAX_TIMEOUT)?;
    ensure!(pending == 0, "pending: {:?}", nested.rig.view());
    ensure!(nested.state()? == IN_FORCE, "{:?}", nested.rig.view());
    nested.check(&counter, 1)?;
    nested.leave()?;
    ensure_hooked(false)?;
    nested.back();
    nested.check(&counter, 1)?;
    drop(counter);
    nested.end()
}

/// The master switch, for rmmod, while L2 has what was given to L1.
fn switched_off_in_l2(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut nested = Nested::start(vendor, &cgroup, Payload::L2Hlt)?;
    let counter = nested.rig.counter()?;
    nested.check(&counter, 0)?;
    let device = Device::open()?;
    let off = device.switch(uapi::Enabled {
        timeout_ms: limit(vendor),
        ..Default::default()
    })?;
    let result = (|| {
        if vendor == Vendor::Vmx {
            ensure_not_unloadable()?;
        }
        nested.ensure_followed(&counter, off.pending, 0)?;
        nested.check(&counter, 1)?;
        ensure_hooked(false)?;
        let info = device.info()?;
        ensure!((info.pending, info.holding) == (0, 0), "{info:?}");
        Ok(())
    })();
    device.set_enabled(true)?;
    result?;
    drop(counter);
    nested.leave()?;
    nested.back();
    nested.end()
}
