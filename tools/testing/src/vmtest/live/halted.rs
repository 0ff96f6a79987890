// SPDX-License-Identifier: GPL-2.0

//! `hlt` changes while the guest halts.
//!
//! On Intel a vCPU that halted natively stays halted, for the CPU, until something says otherwise;
//! who takes HLT's exits back has to, by each of the ways on which a VMM goes on from there. On AMD
//! every exit ends a native HLT, the next tick of the host at the latest.

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use testing::{
    cgroup::Cgroup,
    client::Thread,
    exits::{
        Counter,
        Vendor, //
    },
    interface::{
        ioctl,
        IN_FORCE, //
    },
    payload::{
        Payload,
        TIMER_VECTOR, //
    },
    soon,
    vmm::{
        Action,
        Work,
        SIPI_PAGE, //
    }, //
};

use super::{
    few,
    is_certain,
    Rig, //
};
use crate::Test;

/// How often each is done.
const ROUNDS: u32 = 5;

/// The vCPU that halts. The other one sends it what wakes it.
const SLEEPER: usize = 1;
const WAKER: usize = 0;

/// LAPIC: an INIT, a start-up IPI, and the interrupt of the timer's vector.
const ICR_INIT: u32 = 0x4500;
const ICR_SIPI: u32 = 0x4600 | SIPI_PAGE as u32;
const ICR_FIXED: u32 = 0x4000 | TIMER_VECTOR as u32;

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    type Body = fn(&mut Rig) -> Result<()>;
    let tests: [(&str, Body); 20] = [
        ("taken_then_timer", taken_then_timer),
        ("taken_then_ipi", taken_then_ipi),
        ("taken_and_given_then_ipi", taken_and_given_then_ipi),
        ("given_while_blocked", given_while_blocked),
        ("taken_in_guest_then_runnable", |rig| {
            runnable(rig, Taken::InGuest)
        }),
        ("taken_then_runnable", |rig| runnable(rig, Taken::Before)),
        ("runnable_then_taken", |rig| runnable(rig, Taken::After)),
        ("taken_then_nmi", |rig| {
            event(rig, Action::Nmi, Taken::Before)
        }),
        ("nmi_then_taken", |rig| {
            event(rig, Action::Nmi, Taken::After)
        }),
        ("taken_in_guest_then_exception", |rig| {
            event(rig, Action::InjectException, Taken::InGuest)
        }),
        ("taken_then_exception", |rig| {
            event(rig, Action::InjectException, Taken::Before)
        }),
        ("exception_then_taken", |rig| {
            event(rig, Action::InjectException, Taken::After)
        }),
        ("taken_then_smi", |rig| {
            event(rig, Action::Smi, Taken::Before)
        }),
        ("smi_then_taken", |rig| {
            event(rig, Action::Smi, Taken::After)
        }),
        ("taken_in_guest_then_smi", |rig| {
            event(rig, Action::Smi, Taken::InGuest)
        }),
        ("taken_in_smm", taken_in_smm),
        ("given_in_smm", given_in_smm),
        ("taken_then_init_sipi", |rig| init_sipi(rig, true)),
        ("taken_between_init_and_sipi", |rig| init_sipi(rig, false)),
        ("taken_then_migrated", migrated),
    ];
    let tests = tests.into_iter().map(|(name, body)| {
        Test::new(format!("live::halted::{name}"), move || {
            for round in 0..ROUNDS {
                let cgroup = Cgroup::new("own")?;
                let mut rig = Rig::pair(vendor, &cgroup)?;
                body(&mut rig).with_context(|| format!("round {round}"))?;
                rig.end()?;
            }
            Ok(())
        })
    });
    Ok(tests.collect())
}

/// A guest that halts once, and its timer, in ns; 0 for none.
fn one_halt(ticks: u32) -> Work {
    Work {
        ticks,
        until: 1,
        ..Work::gated(Payload::Hlt)
    }
}

/// The sleeper, which this thread runs, is in its first HLT.
fn wait_for_native_halt(rig: &Rig, vcpu: Thread) -> Result<()> {
    wait_for_native_halts(rig, &[(SLEEPER, vcpu)], 1)
}

/// These vCPUs are in that HLT of theirs: it has begun, and they were interrupted since by the host,
/// more than once, without getting to its end.
pub(super) fn wait_for_native_halts(
    rig: &Rig,
    vcpus: &[(usize, Thread)],
    which: u32,
) -> Result<()> {
    let tids: Vec<i32> = vcpus.iter().map(|(_, vcpu)| vcpu.tid).collect();
    let counter = Counter::of(&tids)?;
    let each = |is_so: &dyn Fn(usize) -> bool| vcpus.iter().all(|(index, _)| is_so(*index));
    rig.wait(|| each(&|index| rig.guest.params(index).begun == which))?;
    let before = counter.read()?;
    let interrupted = || -> Result<bool> {
        let now = counter.read()?;
        let mut pairs = before.iter().zip(&now);
        Ok(pairs.all(|(before, now)| now.total() >= before.total() + 3))
    };
    ensure!(soon(interrupted)?, "the host leaves the vCPU alone");
    for (index, _) in vcpus {
        ensure_halting(rig, rig.guest.params(*index).executed + 1 - which)?;
    }
    Ok(())
}

/// `executed` is 0 until the HLT has ended.
fn ensure_halting(rig: &Rig, executed: u32) -> Result<()> {
    let halting = executed == 0 || rig.vendor == Vendor::Svm;
    ensure!(halting, "the guest does not halt any more");
    Ok(())
}

/// Gives HLT natively, and lets the sleeper halt so.
fn fall_asleep(rig: &mut Rig, ticks: u32) -> Result<()> {
    rig.set(None, Exits::HLT)?;
    rig.start_one(SLEEPER, one_halt(ticks))?;
    wait_for_native_halt(rig, rig.vcpus[SLEEPER])
}

/// What the waker sends, once for each time that its gate is opened.
fn sender(icr: u32) -> Work {
    Work {
        // Destination: the sleeper's x2APIC id, which is its index.
        icr: [icr, SLEEPER as u32],
        ..Work::gated(Payload::Ipi)
    }
}

fn send(rig: &mut Rig, icr: u32) -> Result<()> {
    rig.start_one(WAKER, sender(icr))?;
    rig.step(&[WAKER], 1)?;
    rig.vmm.stop(rig.vcpus[WAKER]).map(drop)
}

fn wait_for_end_of_halt(rig: &Rig) -> Result<()> {
    rig.wait(|| rig.guest.params(SLEEPER).executed == 1)
        .context("the vCPU sleeps on")
}

/// The sleeper halts on, each time with an exit or without, ended by its timer.
fn halts_on(rig: &mut Rig, passes: bool) -> Result<()> {
    let counter = rig.counter()?;
    let before = counter.read()?;
    let work = Work::gated(Payload::Hlt);
    rig.vmm.stop(rig.vcpus[SLEEPER])?;
    rig.start_one(SLEEPER, work)?;
    rig.step(&[SLEEPER], few(Payload::Hlt))?;
    let exits = before[SLEEPER].until(&counter.read()?[SLEEPER]);
    let expected = if passes { 0 } else { few(Payload::Hlt) };
    ensure!(
        exits.of(rig.vendor, Payload::Hlt) == [u64::from(expected)],
        "{exits:?}, should be {expected} for HLT"
    );
    rig.vmm.stop(rig.vcpus[SLEEPER]).map(drop)
}

/// Not soon, but before anyone gives up.
const FAR: u32 = 300_000_000;

fn taken_then_timer(rig: &mut Rig) -> Result<()> {
    fall_asleep(rig, FAR)?;
    rig.reset(None)?;
    wait_for_end_of_halt(rig)?;
    halts_on(rig, false)
}

fn taken_then_ipi(rig: &mut Rig) -> Result<()> {
    fall_asleep(rig, 0)?;
    rig.reset(None)?;
    send(rig, ICR_FIXED)?;
    wait_for_end_of_halt(rig)?;
    halts_on(rig, false)
}

fn taken_and_given_then_ipi(rig: &mut Rig) -> Result<()> {
    fall_asleep(rig, 0)?;
    for _ in 0..20 {
        rig.reset(None)?;
        rig.set(None, Exits::HLT)?;
    }
    send(rig, ICR_FIXED)?;
    wait_for_end_of_halt(rig)?;
    halts_on(rig, true)
}

/// The guest sleeps in KVM, not in the CPU, when HLT is given.
fn given_while_blocked(rig: &mut Rig) -> Result<()> {
    let counter = rig.counter()?;
    rig.start_one(SLEEPER, one_halt(0))?;
    rig.wait(|| rig.guest.params(SLEEPER).begun == 1)?;
    let vendor = rig.vendor;
    ensure!(
        soon(|| Ok(counter.read()?[SLEEPER].of(vendor, Payload::Hlt) == [1]))?,
        "the guest did not halt"
    );
    drop(counter);
    rig.set(None, Exits::HLT)?;
    // It need not be woken for that.
    let state = &rig.view()?.vcpu(SLEEPER as u32)?.state.clone();
    ensure!(is_certain(state), "{state}");
    ensure!(
        rig.guest.params(SLEEPER).executed == 0,
        "it woke by the change"
    );
    send(rig, ICR_FIXED)?;
    wait_for_end_of_halt(rig)?;
    halts_on(rig, true)
}

/// Out of KVM_RUN, with the guest halting.
fn leave(rig: &mut Rig) -> Result<()> {
    let report = rig.vmm.leave(rig.vcpus[SLEEPER])?;
    ensure!(
        report.stuck_at.is_some(),
        "the guest came to an end: {report:?}"
    );
    ensure_halting(rig, report.executed)
}

/// Takes HLT back from a vCPU that is outside KVM_RUN, and so gets it when it enters.
fn take_outside(rig: &Rig) -> Result<()> {
    rig.reset(None)?;
    let view = rig.view()?;
    let state = &view.vcpu(SLEEPER as u32)?.state;
    ensure!(is_certain(state), "{view:?}");
    Ok(())
}

/// When HLT is taken back from a vCPU that something happens to outside KVM_RUN.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Taken {
    /// While it halts, so that KVM, which looks at its flags, repairs nothing later.
    InGuest,
    Before,
    After,
}

/// Out of KVM_RUN, having halted natively, with HLT taken back in there or not.
fn leave_with(rig: &mut Rig, taken: Taken) -> Result<()> {
    fall_asleep(rig, 0)?;
    if taken == Taken::InGuest {
        rig.reset(None)?;
        let view = rig.settled()?;
        ensure!(
            !view.vcpu(SLEEPER as u32)?.in_force.contains(Exits::HLT),
            "{view:?}"
        );
        return rig.vmm.leave(rig.vcpus[SLEEPER]).map(drop);
    }
    leave(rig)?;
    if taken == Taken::Before {
        take_outside(rig)?;
    }
    Ok(())
}

/// A reset, as VMMs do it: the vCPU runs something else from now on.
fn runnable(rig: &mut Rig, taken: Taken) -> Result<()> {
    leave_with(rig, taken)?;
    let sleeper = rig.vcpus[SLEEPER];
    rig.vmm.act(sleeper, Action::SetRunnable)?;
    rig.vmm.prepare(sleeper, one_halt(50_000))?;
    if taken == Taken::After {
        take_outside(rig)?;
    }
    rig.vmm.go_on(sleeper)?;
    wait_for_end_of_halt(rig)?;
    halts_on(rig, false)
}

/// Something that ends any HLT, given by the VMM.
fn event(rig: &mut Rig, action: Action, taken: Taken) -> Result<()> {
    leave_with(rig, taken)?;
    let sleeper = rig.vcpus[SLEEPER];
    rig.vmm.act(sleeper, action)?;
    if taken == Taken::After {
        take_outside(rig)?;
    }
    rig.vmm.go_on(sleeper)?;
    wait_for_end_of_halt(rig)?;
    let expected = match action {
        Action::Nmi => (1, 0, 0),
        Action::Smi => (0, 0, 1),
        _ => (0, 1, 0),
    };
    let has_come = || {
        let params = rig.guest.params(SLEEPER);
        (params.nmis, params.exceptions, rig.guest.smis()) == expected
    };
    rig.wait(has_come)
        .with_context(|| format!("{:?}", rig.guest.params(SLEEPER)))?;
    halts_on(rig, false)
}

/// The vCPU is in system management mode, and stays there. It was in its HLT or at its gate.
fn enter_smm(rig: &mut Rig) -> Result<()> {
    let sleeper = rig.vcpus[SLEEPER];
    rig.guest.hold_in_smm(true);
    rig.vmm.act(sleeper, Action::Smi)?;
    rig.vmm.go_on(sleeper)?;
    rig.wait(|| rig.guest.smis() == 1)
        .context("no system management interrupt")
}

/// A change in there is in force in there, before the guest goes back to where it was.
fn ensure_changed_in_smm(rig: &Rig, hlt: bool) -> Result<()> {
    let view = rig.settled()?;
    let in_force = view.vcpu(SLEEPER as u32)?.in_force;
    ensure!(in_force.contains(Exits::HLT) == hlt, "{view:?}");
    ensure_halting(rig, rig.guest.params(SLEEPER).executed)?;
    rig.guest.hold_in_smm(false);
    Ok(())
}

/// It came from a native HLT, which the interrupt has ended.
fn taken_in_smm(rig: &mut Rig) -> Result<()> {
    fall_asleep(rig, 0)?;
    leave(rig)?;
    enter_smm(rig)?;
    rig.reset(None)?;
    ensure_changed_in_smm(rig, false)?;
    wait_for_end_of_halt(rig)?;
    halts_on(rig, false)
}

/// It came from the gate, and halts natively from then on.
fn given_in_smm(rig: &mut Rig) -> Result<()> {
    let work = Work {
        until: 0,
        ..one_halt(0)
    };
    rig.start_one(SLEEPER, work)?;
    rig.wait(|| rig.guest.params(SLEEPER).cpuid1_ecx != 0)?;
    leave(rig)?;
    enter_smm(rig)?;
    rig.set(Some(SLEEPER as u32), Exits::HLT)?;
    ensure_changed_in_smm(rig, true)?;
    rig.guest.open_gate(SLEEPER, 1);
    wait_for_native_halt(rig, rig.vcpus[SLEEPER])?;
    send(rig, ICR_FIXED)?;
    wait_for_end_of_halt(rig)?;
    halts_on(rig, true)
}

/// The guest's own reset of a vCPU.
fn init_sipi(rig: &mut Rig, take_first: bool) -> Result<()> {
    fall_asleep(rig, 0)?;
    if take_first {
        rig.reset(None)?;
    }
    send(rig, ICR_INIT)?;
    if !take_first {
        rig.reset(None)?;
    }
    send(rig, ICR_SIPI)?;
    let sleeper = rig.vcpus[SLEEPER];
    ensure!(soon(|| rig.vmm.ended(sleeper))?, "the vCPU sleeps on");
    let report = rig.vmm.wait(sleeper)?;
    ensure!(report.by_sipi, "{report:?}");
    // To take HLT back is an end of it, too: the guest may have got further before its INIT.
    Ok(())
}

/// The vCPU goes on in another VM, whose vCPU halted natively too.
fn migrated(rig: &mut Rig) -> Result<()> {
    // KVM wants the LAPIC's id to be the same.
    let here = rig.vcpus[SLEEPER];
    let twin = rig.vmm.create_twin(rig.vm)?;
    rig.vmm.hide_pv_unhalt(twin)?;
    let there = rig.vmm.create_vcpu(twin, SLEEPER)?;
    let views = ioctl::vms()?;
    let twin_id = views.iter().map(|view| view.id).max().context("no VM")?;
    // The one that is to be overwritten halts, and HLT is taken back from it in there: of what it
    // leaves in the VMCS, KVM repairs nothing later.
    let pending = ioctl::set_override(twin_id, None, Exits::HLT)?;
    ensure!(pending == 0, "{pending} vCPUs are pending");
    rig.vmm.start_run(there, one_halt(0))?;
    wait_for_native_halt(rig, there)?;
    ioctl::reset_override(twin_id, None)?;
    let is_taken = || -> Result<bool> {
        let view = ioctl::vm(twin_id)?;
        let vcpu = view.vcpu(SLEEPER as u32)?;
        Ok(vcpu.state == IN_FORCE && !vcpu.in_force.contains(Exits::HLT))
    };
    ensure!(soon(is_taken)?, "{:?}", ioctl::vm(twin_id)?);
    rig.vmm.leave(there)?;

    // Nothing but that it goes on elsewhere ends this one's.
    fall_asleep(rig, 0)?;
    leave(rig)?;
    take_outside(rig)?;
    rig.vmm.migrate(here, there)?;
    rig.vmm.go_on(there)?;
    wait_for_end_of_halt(rig)?;
    rig.vmm.stop(there)?;
    rig.vmm.close(twin)?;
    Ok(())
}
