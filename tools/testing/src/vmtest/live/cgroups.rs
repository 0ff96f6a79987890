// SPDX-License-Identifier: GPL-2.0

//! VMMs that move, stop, grow and repeat themselves while policies change.

use std::{
    fs,
    ops::Range,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        atomic::{
            AtomicBool,
            Ordering, //
        },
        Arc, //
    },
    thread, //
};

use anyhow::{
    anyhow,
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use kvm_bindings::{
    kvm_cpuid_entry2,
    CpuId, //
};
use serde_json::json;
use testing::{
    cgroup::Cgroup,
    client::{
        file_of,
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
        command,
        ioctl,
        SwitchedOff,
        VcpuView,
        IN_FORCE,
        NEXT_ENTRY, //
    },
    modules::{
        self,
        EXITPOLICY, //
    },
    payload::{
        Payload,
        TIMER_VECTOR, //
    },
    soon,
    uapi::{
        self,
        Device, //
    },
    vmm::{
        Action,
        Irqchip,
        Vm,
        Work, //
    }, //
};

use super::{
    changeable,
    few,
    halted::wait_for_native_halts,
    is_certain,
    Make,
    Rig, //
};
use crate::{
    few_will_do,
    lifecycle::ensure_not_unloadable,
    matrix::floor,
    Test, //
};

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let changeable = changeable(vendor)?;
    let filtered = [
        // APERF and not MPERF; three of the four residency counters.
        (Payload::Aperfmperf, 0xe8, 1, few(Payload::Aperfmperf) / 2),
        (Payload::Cstate, 0x3fc, 3, few(Payload::Cstate) / 4 * 3),
    ]
    .map(|(payload, base, count, denied)| {
        let exit = payload.exit();
        Test::new(format!("live::vmm::msr_filter_{exit}"), move || {
            msr_filter(vendor, payload, (base, count), denied)
        })
        .ignored(!changeable.contains(exit))
    });
    let irqchips = [("split", Irqchip::Split), ("no", Irqchip::None)].map(|(name, irqchip)| {
        Test::new(format!("live::vmm::{name}_irqchip"), move || {
            other_irqchip(vendor, irqchip)
        })
    });
    let mut tests = vec![
        Test::new("live::cgroup::moved_back_and_forth", move || moved(vendor)),
        Test::new("live::cgroup::stopped_vmm_moved", move || {
            stopped_vmm_moved(vendor)
        }),
        Test::new("live::off::on_under_load", move || off_and_on(vendor)),
        Test::new("live::off::unloaded_under_load", move || unloaded(vendor)),
        Test::new("live::off::straggler", move || straggler(vendor)),
        Test::new("live::off::holds_what_is_to_come", move || {
            holds_what_is_to_come(vendor)
        }),
        Test::new("live::off::straggler_that_never_runs", move || {
            straggler_that_never_runs(vendor)
        }),
        Test::new("live::off::kept_without_its_vmm", kept_without_its_vmm),
        Test::new("live::vmm::hot_plug", move || hot_plug(vendor)),
        Test::new("live::vmm::64_vcpus", move || many_vcpus(vendor)),
        Test::new("live::vmm::cpuid_repeated", move || cpuid_repeated(vendor)),
        Test::new(
            "live::vmm::cpuid_of_two_hypervisors",
            cpuid_of_two_hypervisors,
        )
        // VMX refuses `hlt` to who could tell.
        .ignored(vendor == Vendor::Vmx),
        Test::new("live::vmm::cpuid_of_withheld_hlt", move || {
            cpuid_of_withheld_hlt(vendor)
        }),
        Test::new("live::vmm::vcpu_fails_meanwhile", move || {
            vcpu_fails_meanwhile(vendor)
        }),
        Test::new("live::vmm::cpuid_repeated_meanwhile", move || {
            cpuid_repeated_meanwhile(vendor)
        })
        // VMX refuses `hlt` to who could tell.
        .ignored(vendor == Vendor::Vmx),
    ];
    tests.extend(irqchips);
    tests.extend(filtered);
    Ok(tests)
}

/// From one cgroup to another and back, again and again, while the guest runs.
fn moved(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let (with, without) = (Cgroup::new("with")?, Cgroup::new("without")?);
    ioctl::set_policy(&with, Exits::HLT, Exits::ALL)?;
    let mut rig = Rig::pair(vendor, &without)?;
    rig.start(Payload::Hlt)?;
    let counter = rig.counter()?;
    for round in 0..20 {
        let on = round % 2 == 0;
        let to = if on { &with } else { &without };
        to.add_process(rig.vmm.pid())?;
        ensure!(
            soon(|| Ok(rig.view()?.cgroup == to.path()))?,
            "round {round}: {:?}",
            rig.view()?
        );
        let view = rig.settled()?;
        let expected = if on { floor | Exits::HLT } else { floor };
        ensure!(view.effective == expected, "round {round}: {view:?}");
        rig.check_all(&counter, Payload::Hlt, on)
            .with_context(|| format!("round {round}"))?;
    }
    // Faster than anyone can follow: the last move counts.
    for round in 0..20 {
        for to in [&with, &without, &with] {
            to.add_process(rig.vmm.pid())?;
        }
        ensure!(
            soon(|| Ok(rig.view()?.cgroup == with.path()))?,
            "round {round}: {:?}",
            rig.view()?
        );
        let view = rig.settled()?;
        ensure!(
            view.effective == floor | Exits::HLT,
            "round {round}: {view:?}"
        );
        rig.check_all(&counter, Payload::Hlt, true)
            .with_context(|| format!("round {round}, fast"))?;
        without.add_process(rig.vmm.pid())?;
        ensure!(
            soon(|| Ok(rig.view()?.cgroup == without.path()))?,
            "round {round}: {:?}",
            rig.view()?
        );
        rig.settled()?;
        rig.check_all(&counter, Payload::Hlt, false)?;
    }
    drop(counter);
    rig.stop()?;
    rig.end()
}

/// A VMM that does not run at all is moved, and has the right thing when it goes on.
fn stopped_vmm_moved(vendor: Vendor) -> Result<()> {
    let (with, without) = (Cgroup::new("with")?, Cgroup::new("without")?);
    ioctl::set_policy(&with, Exits::HLT, Exits::ALL)?;
    let mut rig = Rig::pair(vendor, &without)?;
    rig.start(Payload::Hlt)?;
    let counter = rig.counter()?;
    let pid = nix::unistd::Pid::from_raw(rig.vmm.pid());
    let signal = |signal| nix::sys::signal::kill(pid, signal);
    for (to, on) in [(&with, true), (&without, false), (&with, true)] {
        signal(nix::sys::signal::Signal::SIGSTOP)?;
        to.add_process(rig.vmm.pid())?;
        let decided = || {
            let view = rig.view()?;
            let certain = view.each.iter().all(|vcpu| is_certain(&vcpu.state));
            Ok(view.cgroup == to.path() && certain)
        };
        let decided = soon(decided);
        signal(nix::sys::signal::Signal::SIGCONT)?;
        ensure!(decided?, "{:?}", rig.view()?);
        rig.check_all(&counter, Payload::Hlt, on)?;
    }
    drop(counter);
    rig.stop()?;
    rig.end()
}

/// The master switch, while guests run.
fn off_and_on(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let device = Device::open()?;
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    rig.start(Payload::Hlt)?;
    let counter = rig.counter()?;
    for round in 0..20 {
        rig.check_all(&counter, Payload::Hlt, true)
            .with_context(|| format!("round {round}"))?;
        let off = SwitchedOff::new()?;
        rig.ensure_settled()?;
        ensure!(rig.view()?.effective == floor, "{:?}", rig.view()?);
        rig.check_all(&counter, Payload::Hlt, false)
            .with_context(|| format!("round {round}, off"))?;
        ensure!(
            soon(|| Ok(device.info()?.holding == 0))?,
            "{:?}",
            device.info()?
        );
        // Overrides wait for better days, too.
        if round % 2 == 0 {
            rig.set(None, Exits::HLT)?;
            rig.check_all(&counter, Payload::Hlt, false)
                .with_context(|| format!("round {round}, override while off"))?;
        }
        drop(off);
        rig.ensure_settled()?;
    }
    // On for new VMs only: this one keeps what it had.
    device.set_enabled(false)?;
    device.switch(uapi::Enabled {
        flags: uapi::NEW_ONLY,
        enabled: 1,
        ..Default::default()
    })?;
    rig.check_all(&counter, Payload::Hlt, false)
        .context("on for new VMs only")?;
    device.set_enabled(true)?;
    rig.check_all(&counter, Payload::Hlt, true).context("on")?;
    drop(counter);
    rig.stop()?;
    rig.end()
}

/// Everything is given back under load, the module goes, and comes again, and the guest never
/// notices.
fn unloaded(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let all = changeable(vendor)?;
    let payloads: Vec<Payload> = Payload::EXITS
        .into_iter()
        .filter(|payload| all.contains(payload.exit()))
        .collect();
    let mut rig = Rig::pair(vendor, &cgroup)?;
    for round in 0..6 {
        let payload = payloads[round % payloads.len()];
        ioctl::set_policy(&cgroup, all, Exits::ALL)?;
        rig.start(payload)?;
        {
            let counter = rig.counter()?;
            rig.check_all(&counter, payload, true)
                .with_context(|| format!("round {round}"))?;
            ensure_not_unloadable()?;
        }
        // Now without the gate: they run while it happens.
        rig.stop()?;
        for vcpu in rig.vcpus.clone() {
            rig.vmm.start_run(vcpu, Work::new(payload, u32::MAX))?;
        }
        for index in 0..rig.vcpus.len() {
            rig.wait(|| rig.guest.params(index).executed > 10)?;
        }
        interface::drain()?;
        modules::unload(EXITPOLICY).with_context(|| format!("round {round}"))?;
        for index in 0..rig.vcpus.len() {
            let before = rig.guest.params(index).executed;
            rig.wait(|| rig.guest.params(index).executed > before + 10)
                .context("after the module was unloaded")?;
        }
        rig.stop()?;
        rig.start(payload)?;
        {
            let counter = rig.counter()?;
            rig.check_all(&counter, payload, false)
                .context("without the module")?;
        }
        modules::load(EXITPOLICY)?;
        // Its ids begin anew.
        let view = interface::only_vm()?;
        ensure!(view.adopted && view.requested.is_empty(), "{view:?}");
        rig.id = view.id;
        rig.stop()?;
    }
    rig.end()
}

/// Switched off while a vCPU's thread is outside KVM_RUN: it has its change when it enters, and
/// until then the module must stay.
fn straggler(vendor: Vendor) -> Result<()> {
    let device = Device::open()?;
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    rig.start(Payload::Hlt)?;
    {
        let counter = rig.counter()?;
        rig.check_all(&counter, Payload::Hlt, true)?;
    }
    let paused = rig.vcpus[1];
    rig.vmm.leave(paused)?;
    let answer = device.switch(uapi::Enabled::default())?;
    ensure!(
        answer.pending == 0,
        "waited for a vCPU that cannot run: {answer:?}"
    );
    rig.step(&[0], 5)?;
    let view = interface::only_vm()?;
    let info = device.info()?;
    ensure!(
        view.vcpu(1)?.state == NEXT_ENTRY && view.pending == 1,
        "{view:?}"
    );
    ensure!((info.pending, info.holding) == (1, 1), "{info:?}");
    drop(device);
    ensure_not_unloadable()?;
    // The command names it, and does not wait for ever.
    let off = command::json(&["off"])?;
    ensure!(
        off["holders"] == json!([rig.id])
            && off["stragglers"][0]["vcpu"] == 1
            && off["stragglers"][0]["state"] == "at_next_entry"
            && off["stragglers"]
                .as_array()
                .is_some_and(|all| all.len() == 1),
        "{off}"
    );
    let unload = command::run(&["unload", "--timeout", "100ms"])?;
    let said = String::from_utf8_lossy(&unload.stderr);
    ensure!(
        unload.status.code() == Some(1) && said.contains("vCPU 1 (at next entry)"),
        "{}: {said}",
        unload.status
    );

    // It runs, and that was all that was waited for.
    rig.vmm.go_on(paused)?;
    rig.step(&[1], 5)?;
    rig.settled()?;
    {
        let counter = rig.counter()?;
        rig.check_all(&counter, Payload::Hlt, false)?;
    }
    command::text(&["unload"])?;
    ensure!(!modules::is_loaded(EXITPOLICY)?, "it is still loaded");
    rig.step(&[0, 1], 5)?;
    modules::load(EXITPOLICY)?;
    rig.stop()?;
    rig.end()
}

/// A vCPU that never runs keeps what it was made with until its VM goes.
fn straggler_that_never_runs(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let rig = Rig::pair(vendor, &cgroup)?;
    let device = Device::open()?;
    ensure!(device.info()?.holding == 1, "{:?}", device.info()?);
    let answer = device.switch(uapi::Enabled::default())?;
    ensure!(answer.pending == 0, "{answer:?}");
    let view = interface::only_vm()?;
    ensure!(
        view.pending == 2 && view.each.iter().all(|vcpu| vcpu.state == NEXT_ENTRY),
        "{view:?}"
    );
    ensure!(device.info()?.holding == 1, "{:?}", device.info()?);
    drop(device);
    ensure_not_unloadable()?;
    rig.end()?;
    interface::drain()?;
    modules::unload(EXITPOLICY)?;
    modules::load(EXITPOLICY)
}

/// Somebody else keeps a VM whose VMM was killed: nobody can run it any more, and so it holds nothing.
fn kept_without_its_vmm() -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    for killed_first in [true, false] {
        let mut vmm = Vmm::start(&cgroup)?;
        let vm = vmm.create_vm()?;
        vmm.hide_pv_unhalt(vm)?;
        let vcpus = [vmm.create_vcpu(vm, 0)?, vmm.create_vcpu(vm, 1)?];
        // The other one never has what it should.
        let report = vmm.run(vcpus[0], Work::new(Payload::Hlt, 2))?;
        ensure!(report.halt_exits == 0, "{report:?}");
        let kept = vm_file_of(vmm.pid())?;
        let device = Device::open()?;
        if killed_first {
            vmm.kill()?;
            let answer = device.switch(uapi::Enabled::default())?;
            ensure!(answer.pending == 0, "{answer:?}");
        } else {
            // What is taken back is so at the vCPUs' next entry, which does not come.
            device.switch(uapi::Enabled::default())?;
            ensure!(device.info()?.holding == 1, "{:?}", device.info()?);
            vmm.kill()?;
        }
        let info = device.info()?;
        ensure!(
            (info.vms, info.pending, info.holding) == (1, 0, 0),
            "killed first: {killed_first}: {info:?}"
        );
        drop(device);
        modules::unload(EXITPOLICY)?;
        modules::load(EXITPOLICY)?;
        ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
        drop(kept);
        interface::ensure_no_vms()?;
    }
    Ok(())
}

/// The VM that a process has open.
fn vm_file_of(pid: i32) -> Result<OwnedFd> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        if fs::read_link(&path)? == Path::new("anon_inode:kvm-vm") {
            let fd = path
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok());
            return file_of(pid, fd.context("no number")?);
        }
    }
    bail!("process {pid} has no VM open");
}

/// A vCPU that is to get something at its next entry holds the module before it has it: after the
/// module, nobody would take it back.
fn holds_what_is_to_come(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    rig.start(Payload::Hlt)?;
    rig.step(&[0, 1], 5)?;
    for vcpu in rig.vcpus.clone() {
        rig.vmm.leave(vcpu)?;
    }
    let holding = || -> Result<u64> { Ok(Device::open()?.info()?.holding) };
    for exit in (changeable(vendor)? & !floor(vendor)?).iter() {
        ioctl::set_override(rig.id, None, exit)?;
        let view = interface::only_vm()?;
        ensure!(
            view.pending == 2 && view.each.iter().all(|vcpu| vcpu.state == NEXT_ENTRY),
            "{exit}: {view:?}"
        );
        ensure!(holding()? == 1, "nothing holds the module for {exit}");
        ensure_not_unloadable().with_context(|| exit.to_string())?;
        ioctl::reset_override(rig.id, None)?;
        ensure!(
            holding()? == 0,
            "the module is held for nothing after {exit}"
        );
    }
    for vcpu in rig.vcpus.clone() {
        rig.vmm.go_on(vcpu)?;
    }
    rig.step(&[0, 1], 5)?;
    rig.settled()?;
    rig.stop()?;
    rig.end()
}

/// Does `work` while `hlt` is given to a VM and taken back as fast as can be.
fn while_hlt_changes(vm: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let enough = AtomicBool::new(false);
    let changes = thread::scope(|scope| -> Result<u32> {
        let changer = scope.spawn(|| -> Result<u32> {
            let mut changes = 0;
            while !enough.load(Ordering::Acquire) {
                ioctl::set_override(vm, None, Exits::HLT)?;
                ioctl::reset_override(vm, None)?;
                changes += 2;
            }
            Ok(changes)
        });
        let worked = work();
        enough.store(true, Ordering::Release);
        let changes = changer.join().map_err(|_| anyhow!("the thread panicked"))?;
        worked?;
        changes
    })?;
    ensure!(changes > 2, "{changes} changes");
    eprintln!("    {changes} changes meanwhile");
    Ok(())
}

/// vCPUs are added while others change the VM all the time.
fn hot_plug(vendor: Vendor) -> Result<()> {
    const VCPUS: usize = 12;
    let cgroup = Cgroup::new("own")?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    rig.start(Payload::Hlt)?;
    while_hlt_changes(rig.id, || {
        for index in rig.vcpus.len()..VCPUS {
            let vcpu = rig.vmm.create_vcpu(rig.vm, index)?;
            rig.vcpus.push(vcpu);
            rig.start_one(index, Work::gated(Payload::Hlt))?;
            rig.step(&[0, index], 1)?;
        }
        Ok(())
    })?;
    let counter = rig.counter()?;
    rig.check_all(&counter, Payload::Hlt, false)?;
    rig.set(None, Exits::HLT)?;
    rig.check_all(&counter, Payload::Hlt, true)?;
    let view = rig.settled()?;
    ensure!(view.each.len() == VCPUS, "{view:?}");
    drop(counter);
    rig.stop()?;
    rig.end()
}

/// A VM whose VMM has interrupt controllers of its own, or should have.
fn other_irqchip(vendor: Vendor, irqchip: Irqchip) -> Result<()> {
    let all = changeable(vendor)?;
    let floor = floor(vendor)?;
    let cgroup = Cgroup::new("own")?;
    let make = Make {
        vcpus: 2,
        irqchip,
        ..Make::default()
    };
    let mut rig = Rig::new(vendor, &cgroup, make)?;
    if irqchip == Irqchip::None {
        woken_by_the_vmm(&mut rig)?;
    }
    // Without a LAPIC, nothing else would wake who sleeps.
    let payloads = match irqchip {
        Irqchip::None => &[Payload::Pause, Payload::Cstate, Payload::Aperfmperf][..],
        _ => &Payload::EXITS,
    };
    for _ in 0..3 {
        // All of them while it runs, those that are not looked at too.
        rig.start(Payload::Timer)?;
        rig.set(None, all)?;
        rig.set(Some(1), Exits::NONE)?;
        rig.reset(None)?;
        rig.set(None, all)?;
        rig.stop()?;
        rig.check_some(payloads, floor | all)?;
        rig.reset(None)?;
        rig.check_some(payloads, floor)?;
    }
    rig.end()
}

/// A native HLT ends by an interrupt of the VMM's, and by having its exits back.
fn woken_by_the_vmm(rig: &mut Rig) -> Result<()> {
    let vcpu = rig.vcpus[0];
    for round in 0..3 {
        rig.set(None, Exits::HLT)?;
        let work = Work {
            until: 1,
            ..Work::gated(Payload::Hlt)
        };
        rig.start_one(0, work)?;
        wait_for_native_halts(rig, &[(0, vcpu)], 1)?;
        rig.vmm.leave(vcpu)?;
        // On SVM that was the end of its HLT, and it takes interrupts in the next one only.
        if rig.vendor == Vendor::Vmx {
            rig.vmm.act(vcpu, Action::Interrupt)?;
        }
        rig.vmm.go_on(vcpu)?;
        rig.wait_executed(0, 1)
            .with_context(|| format!("round {round}"))?;
        let params = rig.guest.params(0);
        ensure!(
            params.interrupts == 1 || rig.vendor == Vendor::Svm,
            "{params:?}"
        );

        rig.guest.open_gate(0, 1);
        wait_for_native_halts(rig, &[(0, vcpu)], 2)?;
        rig.reset(None)?;
        rig.wait_executed(0, 2)
            .with_context(|| format!("round {round}, taken"))?;
        let view = rig.settled()?;
        ensure!(!view.vcpu(0)?.in_force.contains(Exits::HLT), "{view:?}");
        rig.vmm.stop(vcpu)?;
    }
    Ok(())
}

/// A large VM changes in one call, whether its vCPUs sleep in KVM, halt natively, run or never ran, and
/// who slept wakes by an IPI, not by the change.
fn many_vcpus(vendor: Vendor) -> Result<()> {
    const VCPUS: usize = 64;
    const BLOCKED: Range<usize> = 0..40;
    const NATIVE: Range<usize> = 40..43;
    const WAKER: usize = 43;
    const RUNNER: usize = 44;
    let all = changeable(vendor)?;
    let cgroup = Cgroup::new("own")?;
    let make = Make {
        vcpus: VCPUS,
        ..Make::default()
    };
    let mut rig = Rig::new(vendor, &cgroup, make)?;
    let floor = floor(vendor)?;
    let ensure_wanted = |rig: &Rig, disable: Exits| -> Result<()> {
        let view = rig.view()?;
        let wanted = floor | disable;
        let is_fine = |vcpu: &VcpuView| vcpu.wanted == wanted && is_certain(&vcpu.state);
        ensure!(
            view.each.len() == VCPUS && view.each.iter().all(is_fine),
            "{view:?}"
        );
        Ok(())
    };
    // Ends the sleeper's HLT, whichever of its HLTs that is.
    let wake = |rig: &mut Rig, index: usize, which: u32| -> Result<()> {
        let ipi = Work {
            // Fixed, to the x2APIC id that is the index.
            icr: [0x4000 | TIMER_VECTOR as u32, index as u32],
            ..Work::new(Payload::Ipi, 1)
        };
        rig.vmm.run(rig.vcpus[WAKER], ipi)?;
        rig.wait_executed(index, which)
    };

    // What the VM has, those have not that are to halt natively, and the other way round.
    rig.set(None, all & !Exits::HLT)?;
    for index in NATIVE {
        rig.set(Some(index as u32), Exits::HLT)?;
    }
    let asleep = Work {
        ticks: 0,
        until: 1,
        ..Work::gated(Payload::Hlt)
    };
    let threads = |rig: &Rig, range: Range<usize>| -> Vec<(usize, Thread)> {
        range.map(|index| (index, rig.vcpus[index])).collect()
    };
    let tids: Vec<i32> = rig.vcpus[BLOCKED].iter().map(|vcpu| vcpu.tid).collect();
    // A histogram has place for so many.
    let counters = tids
        .chunks(20)
        .map(Counter::of)
        .collect::<Result<Vec<_>>>()?;
    let have_halted = |times: u64| -> Result<bool> {
        let mut of_all = Vec::new();
        for counter in &counters {
            of_all.extend(counter.read()?);
        }
        let halts = |counts: &Counts| counts.of(vendor, Payload::Hlt) == [times];
        Ok(of_all.iter().all(halts))
    };
    for index in BLOCKED.chain(NATIVE) {
        rig.start_one(index, asleep)?;
    }
    ensure!(soon(|| have_halted(1))?, "they do not halt in KVM");
    wait_for_native_halts(&rig, &threads(&rig, NATIVE), 1)?;
    rig.start_one(RUNNER, Work::gated(Payload::Hlt))?;
    rig.step(&[RUNNER], 1)?;

    rig.reset(None)?;
    ensure_wanted(&rig, Exits::NONE)?;
    for index in BLOCKED {
        let params = rig.guest.params(index);
        ensure!(params.executed == 0, "woken by the change: {params:?}");
    }
    for index in BLOCKED.chain(NATIVE) {
        wake(&mut rig, index, 1)?;
        // And to sleep again, all of them in KVM.
        rig.guest.open_gate(index, 1);
    }
    ensure!(soon(|| have_halted(2))?, "they do not halt again");

    for disable in [all, Exits::NONE, all] {
        if disable.is_empty() {
            rig.reset(None)?;
        } else {
            rig.set(None, disable)?;
        }
        rig.step(&[RUNNER], 1)?;
        ensure_wanted(&rig, disable)?;
        let view = rig.view()?;
        ensure!(
            view.vcpu(RUNNER as u32)?.in_force == floor | disable,
            "{view:?}"
        );
        // One that never ran.
        let count = few(Payload::Hlt);
        let counted = rig.vmm.count(rig.vcpus[VCPUS - 1], Payload::Hlt, count)?;
        let exits = counted.exits.of(vendor, Payload::Hlt);
        let expected = if disable.is_empty() { count } else { 0 };
        ensure!(
            exits == [u64::from(expected)],
            "{exits:?} exits of the last one"
        );
    }
    let view = interface::only_vm()?;
    ensure!(view.vcpus == VCPUS as u32, "{view:?}");
    for index in BLOCKED.chain(NATIVE) {
        wake(&mut rig, index, 2)?;
        rig.vmm
            .stop(rig.vcpus[index])
            .with_context(|| format!("vCPU {index}"))?;
        let view = rig.view()?;
        let vcpu = view.vcpu(index as u32)?;
        ensure!(
            vcpu.state == IN_FORCE && vcpu.in_force == floor | all,
            "{vcpu:?}"
        );
    }
    rig.vmm.stop(rig.vcpus[RUNNER])?;
    rig.end()
}

/// VMMs tell vCPUs that have run their CPUID again, and KVM takes only what it has.
fn cpuid_repeated(vendor: Vendor) -> Result<()> {
    for pv_unhalt in [true, false] {
        for requested in [Exits::NONE, Exits::HLT] {
            let cgroup = Cgroup::new("own")?;
            let make = Make {
                vcpus: 2,
                requested,
                pv_unhalt,
                ..Make::default()
            };
            let mut rig = Rig::new(vendor, &cgroup, make)?;
            let repeat = |rig: &mut Rig, when: &str| -> Result<()> {
                for vcpu in rig.vcpus.clone() {
                    rig.vmm.act(vcpu, Action::SetCpuid).with_context(|| {
                        format!("PV_UNHALT {pv_unhalt}, asked for {requested}, {when}")
                    })?;
                    rig.vmm.run(vcpu, Work::new(Payload::Hlt, 3))?;
                }
                Ok(())
            };
            for vcpu in rig.vcpus.clone() {
                rig.vmm.run(vcpu, Work::new(Payload::Hlt, 3))?;
            }
            repeat(&mut rig, "unchanged")?;
            for round in 0..4 {
                ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
                repeat(&mut rig, &format!("round {round}: given"))?;
                ioctl::set_policy(&cgroup, Exits::NONE, Exits::NONE)?;
                repeat(&mut rig, &format!("round {round}: taken"))?;
                // Before the vCPU has run with the change.
                ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
                for vcpu in rig.vcpus.clone() {
                    rig.vmm
                        .act(vcpu, Action::SetCpuid)
                        .context("given, not run")?;
                }
                ioctl::set_policy(&cgroup, Exits::NONE, Exits::NONE)?;
                for vcpu in rig.vcpus.clone() {
                    rig.vmm
                        .act(vcpu, Action::SetCpuid)
                        .context("taken, not run")?;
                }
                ioctl::clear_policy(&cgroup)?;
                repeat(&mut rig, &format!("round {round}: as asked for"))?;
            }
            // What is given back of CPUID is given back when they run.
            Device::open()?.set_enabled(false)?;
            repeat(&mut rig, "off")?;
            interface::drain()?;
            modules::unload(EXITPOLICY)?;
            repeat(&mut rig, "without the module")?;
            modules::load(EXITPOLICY)?;
            rig.end()?;
        }
    }
    Ok(())
}

/// The same where a policy withheld what the VMM asked for, so that KVM told the guest of PV_UNHALT,
/// which it will not do once the VM has its own. VMX refuses that to a guest that could tell.
fn cpuid_of_withheld_hlt(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    for unload in [false, true] {
        ioctl::set_policy(&cgroup, Exits::NONE, Exits::NONE)?;
        let make = Make {
            vcpus: 2,
            requested: Exits::HLT,
            pv_unhalt: true,
            ..Make::default()
        };
        let mut rig = Rig::new(vendor, &cgroup, make)?;
        let repeat = |rig: &mut Rig, when: &str| -> Result<()> {
            for vcpu in rig.vcpus.clone() {
                rig.vmm
                    .act(vcpu, Action::SetCpuid)
                    .with_context(|| when.to_string())?;
                rig.vmm.run(vcpu, Work::new(Payload::Hlt, 3))?;
            }
            Ok(())
        };
        for vcpu in rig.vcpus.clone() {
            let report = rig.vmm.run(vcpu, Work::new(Payload::Hlt, 3))?;
            ensure!(report.pv_unhalt, "not told of PV_UNHALT: {report:?}");
        }
        if !unload {
            repeat(&mut rig, "withheld")?;
            ioctl::set_policy(&cgroup, Exits::NONE, Exits::ALL)?;
            repeat(&mut rig, "allowed")?;
            ioctl::clear_policy(&cgroup)?;
            repeat(&mut rig, "as asked for")?;
            ioctl::set_policy(&cgroup, Exits::NONE, Exits::NONE)?;
            repeat(&mut rig, "withheld again")?;
        }
        ioctl::clear_policy(&cgroup)?;
        let off = SwitchedOff::new()?;
        for vcpu in rig.vcpus.clone() {
            rig.vmm.run(vcpu, Work::new(Payload::Hlt, 3))?;
        }
        let own = rig.view()?.vcpu(0)?.in_force.contains(Exits::HLT);
        ensure!(own == (vendor == Vendor::Svm), "hlt: {own}");
        if unload {
            interface::drain()?;
            modules::unload(EXITPOLICY)?;
            repeat(&mut rig, "without the module")?;
            modules::load(EXITPOLICY)?;
        } else {
            repeat(&mut rig, "off")?;
        }
        drop(off);
        rig.end()?;
    }
    Ok(())
}

/// Policies come and go while vCPUs are being made that fail in the end: nothing is kept for them,
/// and the module is held no longer.
fn vcpu_fails_meanwhile(vendor: Vendor) -> Result<()> {
    let rounds = if few_will_do()? { 20 } else { 200 };
    let cgroup = Cgroup::new("own")?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    let device = Device::open()?;
    let thread = rig.vmm.thread()?;
    let next = rig.vcpus.len();
    let mut failures = 0;
    for round in 0..rounds {
        let done = AtomicBool::new(false);
        thread::scope(|scope| -> Result<()> {
            let changer = scope.spawn(|| {
                let result = ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)
                    .and_then(|()| ioctl::clear_policy(&cgroup));
                done.store(true, Ordering::Release);
                result
            });
            let mut result = Ok(());
            while result.is_ok() && !done.load(Ordering::Acquire) {
                failures += 1;
                result = match rig.vmm.fail_to_create_vcpu(thread, rig.vm, next) {
                    Ok(libc::EMFILE) => Ok(()),
                    other => Err(anyhow!("KVM_CREATE_VCPU: {other:?}")),
                };
            }
            changer
                .join()
                .map_err(|_| anyhow!("the thread panicked"))??;
            result
        })?;
        ensure!(
            soon(|| Ok(device.info()?.holding == 0))?,
            "round {round}: {:?}",
            device.info()?
        );
    }
    eprintln!("    {failures} vCPUs failed");
    rig.end()
}

/// The same with leaves of KVM's at two bases, the higher one first in the table: KVM uses the lower
/// one.
fn cpuid_of_two_hypervisors() -> Result<()> {
    /// KVM_CPUID_SIGNATURE, and the next one that a guest looks at.
    const BASES: [u32; 2] = [0x4000_0000, 0x4000_0100];
    let give_up = AtomicBool::new(false);
    let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
    let mut entries = Vec::new();
    let usual = vm.cpuid();
    for base in [BASES[1], BASES[0]] {
        for entry in usual.as_slice() {
            if entry.function & !0xff == BASES[0] {
                entries.push(kvm_cpuid_entry2 {
                    function: base | (entry.function & 0xff),
                    ..*entry
                });
            }
        }
    }
    let others = usual.as_slice().iter();
    entries.extend(others.filter(|entry| entry.function & !0xff != BASES[0]));
    let cpuid = CpuId::from_entries(&entries)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid(&cpuid)?;
    let work = Work::new(Payload::Hlt, 3);
    ensure!(vcpu.run(work, &give_up)?.pv_unhalt, "not told of PV_UNHALT");
    let id = interface::only_vm()?.id;
    for round in 0..4 {
        ioctl::set_override(id, None, Exits::HLT)?;
        vcpu.set_cpuid(&cpuid)
            .with_context(|| format!("round {round}: given"))?;
        vcpu.run(work, &give_up)?;
        ioctl::reset_override(id, None)?;
        vcpu.set_cpuid(&cpuid)
            .with_context(|| format!("round {round}: taken"))?;
        vcpu.run(work, &give_up)?;
    }
    // The guest is told again what it was.
    let off = SwitchedOff::new()?;
    ensure!(vcpu.run(work, &give_up)?.pv_unhalt, "not told again");
    drop(off);
    drop((vcpu, vm));
    interface::ensure_no_vms()
}

/// A vCPU that knows PV_UNHALT is told its CPUID again while `hlt` is given and taken as fast as can
/// be: whatever KVM finds, it is what it has. Where `hlt` was taken already, the guest does not notice.
fn cpuid_repeated_meanwhile(vendor: Vendor) -> Result<()> {
    let times = if few_will_do()? { 100 } else { 2_000 };
    let cgroup = Cgroup::new("own")?;
    let make = Make {
        vcpus: 1,
        pv_unhalt: true,
        ..Make::default()
    };
    let mut rig = Rig::new(vendor, &cgroup, make)?;
    let vcpu = rig.vcpus[0];
    let ensure_told = |rig: &mut Rig, when: &str| -> Result<()> {
        let report = rig.vmm.run(vcpu, Work::new(Payload::Hlt, 3))?;
        ensure!(report.pv_unhalt, "{when}: {report:?}");
        Ok(())
    };
    ensure_told(&mut rig, "at first")?;
    let device = Device::open()?;
    for round in 0..4 {
        rig.set(None, Exits::HLT)?;
        let wanted = rig.view()?.vcpu(0)?.wanted;
        ensure!(wanted.contains(Exits::HLT), "{wanted} is wanted");
        rig.reset(None)?;
        for _ in 0..round {
            rig.vmm.act(vcpu, Action::SetCpuid)?;
        }
        ensure_told(&mut rig, "taken")?;
        ensure!(
            soon(|| Ok(device.info()?.holding == 0))?,
            "round {round}: {:?}",
            device.info()?
        );
    }

    while_hlt_changes(rig.id, || {
        for time in 0..times {
            rig.vmm
                .act(vcpu, Action::SetCpuid)
                .with_context(|| format!("time {time}"))?;
            if time % 16 == 0 {
                rig.vmm.run(vcpu, Work::new(Payload::Hlt, 1))?;
            }
        }
        Ok(())
    })?;

    let off = SwitchedOff::new()?;
    ensure_told(&mut rig, "off")?;
    rig.vmm.act(vcpu, Action::SetCpuid)?;
    ensure!(
        soon(|| Ok(device.info()?.holding == 0))?,
        "{:?}",
        device.info()?
    );
    drop(off);
    rig.end()
}

/// What the VMM's filter denies exits, and faults, whatever is passed through.
fn msr_filter(vendor: Vendor, payload: Payload, deny: (u32, u32), denied: u32) -> Result<()> {
    let count = few(payload);
    for filter_first in [true, false] {
        let cgroup = Cgroup::new("own")?;
        let mut rig = Rig::pair(vendor, &cgroup)?;
        rig.start(payload)?;
        // Some of them the CPU or KVM lacks; those fault without a filter.
        rig.step(&[0, 1], count)?;
        let faults = rig.guest.params(0).gp;
        let counter = rig.counter()?;
        let check = |rig: &mut Rig, exits: u32, what: &str| -> Result<()> {
            let before = [0, 1].map(|index| rig.guest.params(index).gp);
            let windows = rig.window(&counter, payload)?;
            for index in 0..2 {
                let gp = rig.guest.params(index).gp - before[index];
                ensure!(
                    windows[index].of(vendor, payload) == [u64::from(exits)] && gp >= denied,
                    "{what}: vCPU {index}: {gp} faults, should be {denied} at least, {faults} \
                     without a filter; {:?}, should be {exits} exits",
                    windows[index]
                );
            }
            Ok(())
        };
        if filter_first {
            rig.vmm.deny_msr_reads(rig.vm, deny.0, deny.1)?;
            check(&mut rig, count, "filtered")?;
            rig.set(None, payload.exit())?;
        } else {
            rig.set(None, payload.exit())?;
            rig.vmm.deny_msr_reads(rig.vm, deny.0, deny.1)?;
        }
        check(&mut rig, denied, "passed through")?;
        for round in 0..5 {
            rig.reset(None)?;
            check(&mut rig, count, &format!("round {round}: taken back"))?;
            rig.set(None, payload.exit())?;
            check(&mut rig, denied, &format!("round {round}: given"))?;
        }
        drop(counter);
        rig.stop()?;
        rig.end()?;
    }
    Ok(())
}
