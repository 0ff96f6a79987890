// SPDX-License-Identifier: GPL-2.0

//! Whose cgroup counts, when, and how often: VMMs that move, have threads, fork, fail and die.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::AsRawFd,
    process::{
        self,
        Command, //
    },
    sync::{
        atomic::AtomicBool,
        Arc, //
    },
    thread, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use nix::unistd::gettid;
use testing::{
    cgroup::Cgroup,
    client::Vmm,
    exits::{
        Calls,
        Vendor, //
    },
    interface::{
        self,
        ioctl,
        sysfs,
        SwitchedOff,
        VcpuView,
        VmView, //
    },
    payload::Payload,
    server::{
        Answer,
        Request, //
    },
    soon,
    uapi::{
        self,
        Device, //
    },
    vmm::{
        Irqchip,
        Vm,
        Work, //
    }, //
};

use crate::{
    cgroups::{
        ensure_slab_shrinks_to,
        slab, //
    },
    child::{
        in_child,
        in_same_memory,
        in_same_memory_until_exec,
        Heir, //
    },
    few_will_do,
    matrix::{
        check_exits_of,
        check_guest,
        floor,
        supported, //
    },
    races::Here,
    Test, //
};

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let other = other_exit(vendor)?;
    Ok(vec![
        Test::new("placement::moved_before_the_first_vcpu", move || {
            moved_before_the_first_vcpu(vendor)
        }),
        Test::new("placement::moved_after_the_first_vcpu", move || {
            moved_after_the_first_vcpu(vendor)
        }),
        Test::new("placement::vcpu_threads_in_threaded_cgroups", move || {
            vcpu_threads_in_threaded_cgroups(vendor)
        }),
        Test::new("placement::two_vms_of_one_process", move || {
            two_vms_of_one_process(vendor)
        }),
        Test::new("placement::two_first_vcpus_at_once", move || {
            two_first_vcpus_at_once(vendor)
        }),
        Test::new("placement::two_vcpus_of_one_vm_at_once", move || {
            two_vcpus_of_one_vm_at_once(vendor)
        }),
        Test::new("placement::first_vcpu_fails", move || {
            first_vcpu_fails(vendor, other)
        }),
        Test::new("placement::override_between_two_tries", move || {
            override_between_two_tries(vendor)
        }),
        Test::new("placement::policy_goes_between_two_tries", move || {
            policy_goes_between_two_tries(vendor, other)
        }),
        Test::new("placement::clamped_wish_survives_a_failure", move || {
            clamped_wish_survives_a_failure(vendor)
        }),
        Test::new("placement::leader_gone", move || leader_gone(vendor)),
        Test::new("placement::vm_without_vcpu", vm_without_vcpu),
        Test::new("placement::fork", fork),
        Test::new("placement::memory_outlives_process", move || {
            memory_outlives_process(vendor, false)
        }),
        Test::new("placement::memory_outlives_exec", move || {
            memory_outlives_process(vendor, true)
        }),
        Test::new("placement::heir_of_many", heir_of_many),
        Test::new("placement::heirs_are_let_go", heirs_are_let_go),
        Test::new("placement::vmm_killed", vmm_killed),
        Test::new("placement::switched_off", move || switched_off(vendor)),
        Test::new("placement::cgroup_removed", cgroup_removed),
    ])
}

/// An exit beside HLT that a VMM can ask for here and that KVM does not disable itself.
fn other_exit(vendor: Vendor) -> Result<Exits> {
    let choice = supported(vendor)? & !floor(vendor)? & !Exits::HLT;
    let first = choice.iter().next();
    first.context("KVM can disable nothing but HLT here")
}

/// What HLT costs, with this set disabled.
fn check_hlt(
    vendor: Vendor,
    vmm: &mut Vmm,
    vcpu: testing::client::Thread,
    effective: Exits,
) -> Result<()> {
    check_guest(vendor, vmm, vcpu, Payload::Hlt, effective)
}

/// A service manager moves a VMM after it has begun.
fn moved_before_the_first_vcpu(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let (with, without) = (Cgroup::new("with")?, Cgroup::new("without")?);
    ioctl::set_policy(&with, Exits::HLT, Exits::ALL)?;
    for (from, to, effective) in [
        (&without, &with, floor | Exits::HLT),
        (&with, &without, floor),
    ] {
        let mut vmm = Vmm::start(from)?;
        let vm = vmm.create_vm()?;
        to.add_process(vmm.pid())?;
        let vcpu = vmm.create_vcpu(vm, 0)?;
        let view = interface::only_vm()?;
        ensure!(
            view.cgroup == to.path() && view.effective == effective,
            "{view:?}"
        );
        check_hlt(vendor, &mut vmm, vcpu, effective)?;
        vmm.kill()?;
        interface::ensure_no_vms()?;
    }
    Ok(())
}

/// A thread group whose leader has exited still moves, but the leader, a zombie, stays behind in
/// the old cgroup. What counts is where those are that live.
fn leader_gone(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let (old, new) = (Cgroup::new("old")?, Cgroup::new("new")?);
    ioctl::set_policy(&old, Exits::HLT, Exits::ALL)?;
    ioctl::set_policy(&new, Exits::NONE, Exits::NONE)?;
    let group = || nix::unistd::getpid().as_raw();
    let survivor = || -> Result<()> {
        let stat = format!("/proc/{}/stat", group());
        ensure!(
            soon(|| Ok(fs::read_to_string(&stat)?.contains(") Z ")))?,
            "the leader does not go"
        );
        new.add_process(group())?;
        let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
        let _vcpu = vm.create_vcpu(0)?;
        let view = interface::only_vm()?;
        ensure!(
            view.cgroup == new.path() && view.effective == floor && view.pid == group(),
            "{view:?}"
        );
        Ok(())
    };
    in_child(|| {
        old.add_process(group())?;
        thread::scope(|scope| {
            scope.spawn(|| {
                let result = survivor();
                if let Err(error) = &result {
                    eprintln!("    {error:?}");
                }
                // SAFETY: Ends the process, the scope's other thread being gone already.
                unsafe { libc::_exit(result.is_err().into()) }
            });
            // SAFETY: Ends this thread, the leader, and not the process; all that is on its stack
            // stays there.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
            unreachable!("the leader goes on")
        })
    })?;
    interface::ensure_no_vms()
}

/// A move is a new decision, also for the vCPUs that there are; what becomes of the cgroup that was
/// left does not matter any more.
fn moved_after_the_first_vcpu(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let (with, without) = (Cgroup::new("with")?, Cgroup::new("without")?);
    ioctl::set_policy(&with, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&with)?;
    let vm = vmm.create_vm()?;
    let first = vmm.create_vcpu(vm, 0)?;
    // The guest's CPUID is made while HLT does not exit, so that it can be given back to it.
    check_hlt(vendor, &mut vmm, first, floor | Exits::HLT)?;
    let mut vcpus = vec![first];
    for (index, (to, effective)) in [(&without, floor), (&with, floor | Exits::HLT)]
        .into_iter()
        .enumerate()
    {
        to.add_process(vmm.pid())?;
        let moved = || -> Result<bool> {
            let views = ioctl::vms()?;
            let settled = |vcpu: &VcpuView| vcpu.wanted == effective;
            Ok(views.len() == 1
                && views[0].cgroup == to.path()
                && views[0].effective == effective
                && views[0].each.iter().all(settled))
        };
        ensure!(soon(moved)?, "after the move: {:?}", ioctl::vms()?);
        vcpus.push(vmm.create_vcpu(vm, index + 1)?);
        let view = interface::only_vm()?;
        ensure!(view.each.len() == vcpus.len(), "{view:?}");
        for vcpu in &vcpus {
            check_exits_of(vendor, &mut vmm, *vcpu, Payload::Hlt, effective)?;
        }
        if to.path() == without.path() {
            ioctl::set_policy(&with, Exits::NONE, Exits::ALL)?;
            ensure!(
                interface::only_vm()?.effective == floor,
                "still in the old cgroup"
            );
            ioctl::set_policy(&with, Exits::HLT, Exits::ALL)?;
            ensure!(
                interface::only_vm()?.effective == floor,
                "still in the old cgroup"
            );
        }
    }
    Ok(())
}

/// libvirt's way: the machine's cgroup is a domain, its vCPUs' and its emulator's are threaded.
fn vcpu_threads_in_threaded_cgroups(vendor: Vendor) -> Result<()> {
    let effective = floor(vendor)? | Exits::HLT;
    for leader_too in [false, true] {
        let machine = Cgroup::new("machine")?;
        ioctl::set_policy(&machine, Exits::HLT, Exits::ALL)?;
        let mut vmm = Vmm::start(&machine)?;
        let threads = [vmm.thread()?, vmm.thread()?];
        let mut threaded = Vec::new();
        for (index, thread) in threads.iter().enumerate() {
            let cgroup = machine.child(&format!("vcpu{index}"))?;
            // Policies sit on domain cgroups: from here on, this one says nothing to anyone.
            ioctl::set_policy(&cgroup, Exits::NONE, Exits::NONE)?;
            cgroup.make_threaded()?;
            cgroup.add_thread(thread.tid)?;
            threaded.push(cgroup);
        }
        if leader_too {
            let emulator = machine.child("emulator")?;
            emulator.make_threaded()?;
            emulator.add_thread(vmm.pid())?;
            threaded.push(emulator);
        }
        let vm = vmm.create_vm()?;
        vmm.create_vcpus(&[(threads[0], vm, 0)])?;
        vmm.create_vcpus(&[(threads[1], vm, 1)])?;
        let view = interface::only_vm()?;
        ensure!(
            view.cgroup == machine.path() && view.effective == effective && view.vcpus == 2,
            "with the leader in a threaded cgroup: {leader_too}: {view:?}"
        );
        ensure!(view.pid == vmm.pid(), "pid {} is a thread's", view.pid);
        for thread in threads {
            check_hlt(vendor, &mut vmm, thread, effective)?;
        }
        vmm.kill()?;
        drop(threaded);
        interface::ensure_no_vms()?;
    }
    Ok(())
}

/// Each VM has a decision of its own, which a policy for new VMs does not change.
fn two_vms_of_one_process(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let cgroup = Cgroup::new("own")?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vms = [vmm.create_vm()?, vmm.create_vm()?];
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let first = vmm.create_vcpu(vms[0], 0)?;
    let directory = cgroup.open()?;
    Device::open()?.policy(
        uapi::SET_POLICY,
        uapi::Policy {
            flags: uapi::POLICY_DISABLE | uapi::NEW_ONLY,
            cgroup_fd: directory.as_raw_fd(),
            ..Default::default()
        },
    )?;
    let second = vmm.create_vcpu(vms[1], 0)?;

    let views = ioctl::vms()?;
    let effective: Vec<Exits> = views.iter().map(|view| view.effective).collect();
    ensure!(effective == [floor | Exits::HLT, floor], "{views:?}");
    let ids: Vec<u64> = views.iter().map(|view| view.id).collect();
    ensure!(
        soon(|| Ok(sysfs::vm_ids()? == ids))?,
        "not {ids:?} in sysfs"
    );
    for (id, view) in ids.iter().zip(&views) {
        ensure!(sysfs::vm(*id)? == *view, "sysfs differs from {view:?}");
    }
    check_hlt(vendor, &mut vmm, first, floor | Exits::HLT)?;
    check_hlt(vendor, &mut vmm, second, floor)?;

    // The end of one is not the end of the other.
    vmm.close(vms[0])?;
    ensure!(
        soon(|| Ok(sysfs::vm_ids()? == ids[1..]))?,
        "sysfs has {:?}",
        sysfs::vm_ids()?
    );
    ensure!(ioctl::vms()? == views[1..], "{:?}", ioctl::vms()?);
    check_hlt(vendor, &mut vmm, second, floor)
}

const RACES: usize = 20;

/// Two VMs of one process get their first vCPUs at the same moment.
fn two_first_vcpus_at_once(vendor: Vendor) -> Result<()> {
    let effective = floor(vendor)? | Exits::HLT;
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let threads = [vmm.thread()?, vmm.thread()?];
    for race in 0..RACES {
        let vms = [vmm.create_vm()?, vmm.create_vm()?];
        vmm.create_vcpus(&[(threads[0], vms[0], 0), (threads[1], vms[1], 0)])?;
        let views = ioctl::vms()?;
        ensure!(
            views.len() == 2
                && views
                    .iter()
                    .all(|view| view.effective == effective && view.requested == Exits::NONE),
            "race {race}: {views:?}"
        );
        if race == 0 {
            for thread in threads {
                check_hlt(vendor, &mut vmm, thread, effective)?;
            }
        }
        for vm in vms {
            vmm.close(vm)?;
        }
    }
    Ok(())
}

/// One VM gets its first two vCPUs at the same moment: one decision.
fn two_vcpus_of_one_vm_at_once(vendor: Vendor) -> Result<()> {
    let effective = floor(vendor)? | Exits::HLT;
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let threads = [vmm.thread()?, vmm.thread()?];
    for race in 0..RACES {
        let vm = vmm.create_vm()?;
        vmm.create_vcpus(&[(threads[0], vm, 0), (threads[1], vm, 1)])?;
        let views = ioctl::vms()?;
        ensure!(
            views.len() == 1
                && views[0].effective == effective
                && views[0].requested == Exits::NONE
                && views[0].vcpus == 2,
            "race {race}: {views:?}"
        );
        if race == 0 {
            for thread in threads {
                check_hlt(vendor, &mut vmm, thread, effective)?;
            }
        }
        vmm.close(vm)?;
    }
    Ok(())
}

/// KVM_CREATE_VCPU fails behind our hook, which has written its decision by then, and KVM still
/// takes KVM_ENABLE_CAP. What the module wrote must not come back as the VMM's wish.
fn first_vcpu_fails(vendor: Vendor, other: Exits) -> Result<()> {
    let floor = floor(vendor)?;
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.thread()?;
    for _ in 0..2 {
        let errno = vmm.fail_to_create_vcpu(vcpu, vm, 0)?;
        ensure!(errno == libc::EMFILE, "KVM_CREATE_VCPU: errno {errno}");
    }
    vmm.disable_exits(vm, other)?;
    vmm.create_vcpus(&[(vcpu, vm, 0)])?;
    let view = interface::only_vm()?;
    let effective = floor | Exits::HLT | other;
    ensure!(
        view.requested == other && view.effective == effective && view.clamped.is_empty(),
        "{view:?}"
    );
    check_hlt(vendor, &mut vmm, vcpu, effective)
}

/// An override of a VM that has no vCPU yet is a part of the next decision.
fn override_between_two_tries(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let cgroup = Cgroup::new("own")?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.thread()?;
    let errno = vmm.fail_to_create_vcpu(vcpu, vm, 0)?;
    ensure!(errno == libc::EMFILE, "KVM_CREATE_VCPU: errno {errno}");
    ioctl::set_override(interface::only_vm()?.id, None, Exits::HLT)?;
    vmm.create_vcpus(&[(vcpu, vm, 0)])?;
    let view = interface::only_vm()?;
    let effective = floor | Exits::HLT;
    ensure!(view.effective == effective, "{view:?}");
    check_hlt(vendor, &mut vmm, vcpu, effective)
}

/// The decision is made again, and what the first one gave is taken back.
fn policy_goes_between_two_tries(vendor: Vendor, other: Exits) -> Result<()> {
    let floor = floor(vendor)?;
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.thread()?;
    let errno = vmm.fail_to_create_vcpu(vcpu, vm, 0)?;
    ensure!(errno == libc::EMFILE, "KVM_CREATE_VCPU: errno {errno}");
    ioctl::clear_policy(&cgroup)?;
    vmm.disable_exits(vm, other)?;
    vmm.create_vcpus(&[(vcpu, vm, 0)])?;
    let view = interface::only_vm()?;
    ensure!(
        view.requested == other && view.effective == floor | other,
        "{view:?}"
    );
    check_hlt(vendor, &mut vmm, vcpu, floor | other)
}

/// What the VMM asked for is remembered even though the first decision took it out of KVM's flags.
fn clamped_wish_survives_a_failure(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::NONE, Exits::NONE)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    vmm.disable_exits(vm, Exits::HLT)?;
    let vcpu = vmm.thread()?;
    let errno = vmm.fail_to_create_vcpu(vcpu, vm, 0)?;
    ensure!(errno == libc::EMFILE, "KVM_CREATE_VCPU: errno {errno}");
    ioctl::clear_policy(&cgroup)?;
    vmm.create_vcpus(&[(vcpu, vm, 0)])?;
    let view = interface::only_vm()?;
    let effective = floor | Exits::HLT;
    ensure!(
        view.requested == Exits::HLT && view.effective == effective && view.clamped.is_empty(),
        "{view:?}"
    );
    check_hlt(vendor, &mut vmm, vcpu, effective)
}

/// Nothing is decided on a VM that gets no vCPU, and its end disturbs nothing.
fn vm_without_vcpu() -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    ensure!(ioctl::vms()?.is_empty(), "{:?}", ioctl::vms()?);
    vmm.close(vm)?;
    let info = Device::open()?.info()?;
    ensure!(info.missed == 0, "missed {}", info.missed);
    Ok(())
}

/// All threads of the host are looked through once for who has the VMs of a process that has ended,
/// not for each of them.
fn heir_of_many() -> Result<()> {
    const VMS: usize = 8;
    let cgroup = Cgroup::new("own")?;
    let here = Here::in_cgroup(&cgroup)?;
    let mut vms = Vec::new();
    for _ in 0..VMS {
        vms.push(Arc::new(Vm::new(Irqchip::Kernel)?));
    }
    let vcpus = in_same_memory(|| -> Result<Vec<_>> {
        vms.iter()
            .map(|vm| vm.create_vcpu(0).context("KVM_CREATE_VCPU"))
            .collect()
    })??;
    let device = Device::open()?;
    let of_us = || -> Result<usize> {
        let vms = device.vms()?;
        let ours = vms.iter().filter(|vm| vm.pid == process::id());
        Ok(ours.count())
    };
    ensure!(of_us()? == 0, "{:?}", device.vms()?);
    let tid = gettid().as_raw();
    let calls = Calls::of("exitpolicy_memory_process", &[tid])?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let looks = calls.by(tid)?;
    drop(calls);
    ensure!(of_us()? == VMS, "{:?}", device.vms()?);
    ensure!(looks == 1, "looked {looks} times");
    drop((vcpus, vms, here));
    interface::ensure_no_vms()
}

/// The VM of a process that has ended is that of one that has its memory; of others that have it,
/// nothing is kept.
fn heirs_are_let_go() -> Result<()> {
    // The caches have filled by then.
    const BEFORE: u64 = 20;
    let rounds = if few_will_do()? { 100 } else { 200 };
    let cgroup = Cgroup::new("own")?;
    let here = Here::in_cgroup(&cgroup)?;
    let device = Device::open()?;
    let mut before = BTreeMap::new();
    for round in 0..BEFORE + rounds {
        if round == BEFORE {
            before = slab()?;
            // Debian's kernel has it under this name.
            ensure!(before.contains_key("pid"), "{before:?}");
        }
        let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
        // The VM's process is the one of its first vCPU.
        let vcpu = in_same_memory(|| vm.create_vcpu(0))?.context("KVM_CREATE_VCPU")?;
        let heirs = [Heir::start()?, Heir::start()?];
        ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
        ioctl::clear_policy(&cgroup)?;
        // Not by sysfs: what was looked up there, the kernel remembers for a while.
        let vms = device.vms()?;
        let known = [process::id() as i32, heirs[0].pid(), heirs[1].pid()];
        let pid = vms.first().context("no VM")?.pid as i32;
        ensure!(known.contains(&pid), "round {round}: {pid}");
        drop((heirs, vcpu));
    }
    drop(here);
    interface::ensure_no_vms()?;
    ensure_slab_shrinks_to(&before, rounds / 2)
}

/// The process that made the first vCPU ends, or executes a program, and another one goes on with its
/// memory: for KVM, that one is the VMM, too.
fn memory_outlives_process(vendor: Vendor, executes: bool) -> Result<()> {
    let floor = floor(vendor)?;
    let (one, other) = (Cgroup::new("one")?, Cgroup::new("other")?);
    let here = Here::in_cgroup(&one)?;
    let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
    // On Intel, its guest is refused `hlt` else.
    vm.hide_pv_unhalt();
    let (vcpu, program) = if executes {
        let mut sleep = Command::new("sleep");
        sleep.arg("1000000");
        let (vcpu, program) = in_same_memory_until_exec(|| vm.create_vcpu(0), &mut sleep)?;
        (vcpu, Some(program))
    } else {
        (in_same_memory(|| vm.create_vcpu(0))?, None)
    };
    let mut vcpu = vcpu?;
    let mut check = |view: &VmView, cgroup: &Cgroup, effective: Exits| -> Result<()> {
        ensure!(
            view.cgroup == cgroup.path() && view.effective == effective,
            "{view:?}"
        );
        let report = vcpu.run(Work::new(Payload::Hlt, 2), &AtomicBool::new(false))?;
        let exits = if effective.contains(Exits::HLT) { 0 } else { 2 };
        ensure!(report.halt_exits == exits, "{report:?}");
        Ok(())
    };
    let view = interface::only_vm()?;
    ensure!(view.pid != process::id() as i32, "{view:?}");
    check(&view, &one, floor)?;

    ioctl::set_policy(&one, Exits::HLT, Exits::ALL)?;
    let view = interface::only_vm()?;
    ensure!(view.pid == process::id() as i32, "{view:?}");
    check(&view, &one, floor | Exits::HLT)?;

    other.add_process(process::id() as i32)?;
    ensure!(
        soon(|| Ok(interface::only_vm()?.cgroup == other.path()))?,
        "the move was not seen: {:?}",
        interface::only_vm()?
    );
    check(&interface::only_vm()?, &other, floor)?;
    drop((vcpu, vm, program));
    drop(here);
    interface::ensure_no_vms()
}

/// A forked child holds the VM and can do nothing with it.
fn fork() -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    vmm.create_vcpu(vm, 0)?;
    let before = interface::only_vm()?;
    let answer = vmm.ask(&Request::Fork { vm })?;
    let Answer::Fork {
        child,
        create_vcpu,
        enable_cap,
    } = answer
    else {
        anyhow::bail!("not an answer: {answer:?}");
    };
    ensure!(
        (create_vcpu, enable_cap) == (libc::EIO, libc::EIO),
        "in the child, KVM_CREATE_VCPU and KVM_ENABLE_CAP gave {create_vcpu} and {enable_cap}"
    );
    ensure!(interface::only_vm()? == before, "the fork changed the VM");

    // The child's files keep it alive.
    vmm.close(vm)?;
    ensure!(interface::only_vm()? == before, "the VM is gone too early");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(child),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    interface::ensure_no_vms()
}

/// A VMM that has no time to clean up.
fn vmm_killed() -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    for index in 0..2 {
        let vcpu = vmm.create_vcpu(vm, index)?;
        vmm.start_run(vcpu, Work::new(Payload::Hlt, u32::MAX))?;
        ensure!(
            soon(|| Ok(vmm.progress(vcpu)? > 10))?,
            "vCPU {index} does not run"
        );
    }
    ensure!(interface::only_vm()?.vcpus == 2, "{:?}", ioctl::vms()?);
    vmm.kill()?;
    interface::ensure_no_vms()
}

/// The master switch: off, every VM has what its VMM asked for; on, every VM is decided on.
fn switched_off(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let give = Cgroup::new("give")?;
    let take = Cgroup::new("take")?;
    ioctl::set_policy(&give, Exits::HLT, Exits::ALL)?;
    ioctl::set_policy(&take, Exits::NONE, Exits::NONE)?;

    let mut early = Vmm::start(&give)?;
    let vm = early.create_vm()?;
    let early_vcpu = early.create_vcpu(vm, 0)?;
    check_hlt(vendor, &mut early, early_vcpu, floor | Exits::HLT)?;
    let hlt = |vmm: &mut Vmm, vcpu, effective| -> Result<()> {
        check_exits_of(vendor, vmm, vcpu, Payload::Hlt, effective).map(drop)
    };

    let off = SwitchedOff::new()?;
    ensure!(sysfs::top("enabled")? == "0", "enabled");
    let clamps = Device::open()?.info()?.clamps;
    hlt(&mut early, early_vcpu, floor).context("given back")?;

    let mut given = Vmm::start(&give)?;
    let vm = given.create_vm()?;
    let given_vcpu = given.create_vcpu(vm, 0)?;
    check_hlt(vendor, &mut given, given_vcpu, floor)?;

    let mut asking = Vmm::start(&take)?;
    let vm = asking.create_vm()?;
    asking.disable_exits(vm, Exits::HLT)?;
    let asking_vcpu = asking.create_vcpu(vm, 0)?;
    check_hlt(vendor, &mut asking, asking_vcpu, floor | Exits::HLT)?;
    let info = Device::open()?.info()?;
    ensure!(info.clamps == clamps, "something was clamped");
    ensure!(info.holding == 0, "{} VMs are held", info.holding);

    drop(off);
    ensure!(sysfs::top("enabled")? == "1", "enabled");
    let hlt_again = match vendor {
        Vendor::Svm => floor | Exits::HLT,
        // The switch has given back PV_UNHALT too, and whoever was told of it is refused.
        Vendor::Vmx => floor,
    };
    hlt(&mut early, early_vcpu, hlt_again).context("given again")?;
    hlt(&mut asking, asking_vcpu, floor).context("clamped now")?;
    // This one's guest was told of PV_UNHALT when nothing was in the way of it.
    let views = ioctl::vms()?;
    let view = views.iter().find(|view| view.pid == given.pid());
    let view = view.context("the VM is gone")?;
    ensure!(view.effective == floor | Exits::HLT, "{view:?}");
    ensure!(view.refused == view.effective & !hlt_again, "{view:?}");
    hlt(&mut given, given_vcpu, hlt_again)?;

    let vm = asking.create_vm()?;
    asking.disable_exits(vm, Exits::HLT)?;
    let clamped_vcpu = asking.create_vcpu(vm, 0)?;
    check_hlt(vendor, &mut asking, clamped_vcpu, floor)?;
    let info = Device::open()?.info()?;
    ensure!(
        info.clamps - clamps == 2,
        "clamps went from {clamps} to {}",
        info.clamps
    );
    Ok(())
}

/// A VM outlives its cgroup.
fn cgroup_removed() -> Result<()> {
    let refuge = Cgroup::new("refuge")?;
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    vmm.create_vcpu(vm, 0)?;
    let before = interface::only_vm()?;
    refuge.add_process(vmm.pid())?;
    cgroup.remove()?;
    ensure!(
        soon(|| Ok(interface::only_vm()?.cgroup == refuge.path()))?,
        "{:?}",
        ioctl::vms()?
    );
    let view = interface::only_vm()?;
    ensure!(view.effective == before.effective & !Exits::HLT, "{view:?}");
    Ok(())
}
