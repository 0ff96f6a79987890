// SPDX-License-Identifier: GPL-2.0

//! The module is loaded on a host where VMs run already.

use std::{
    fs,
    io::{
        self,
        Read,
        Write, //
    },
    os::unix::net::UnixStream,
    process::Command,
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
use libc::{
    CLONE_FILES,
    SIGCHLD, //
};
use nix::{
    sys::{
        signal::{
            kill,
            Signal, //
        },
        wait::{
            waitpid,
            WaitStatus, //
        },
    },
    unistd::{
        fork,
        gettid,
        ForkResult,
        Pid, //
    }, //
};
use testing::{
    cgroup::Cgroup,
    client::Vmm,
    exits::{
        Calls,
        Vendor, //
    },
    interface::{
        self,
        command,
        ioctl,
        sysfs, //
    },
    modules::{
        self,
        EXITPOLICY, //
    },
    payload::Payload,
    soon,
    uapi::Device,
    vmm::{
        Irqchip,
        Vcpu,
        Vm,
        Work, //
    }, //
};

use super::{
    changeable,
    Make,
    Rig, //
};
use crate::{
    lifecycle::ensure_not_unloadable,
    matrix::floor,
    Test, //
};

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let other = changeable(vendor)? & !Exits::HLT;
    let other = other.iter().next().context("nothing but HLT")?;
    Ok([
        ("asked_for_nothing", Exits::NONE),
        ("asked_for_hlt", Exits::HLT),
        ("asked_for_another", other),
    ]
    .into_iter()
    .map(|(name, requested)| {
        Test::new(format!("live::loaded::{name}"), move || {
            adopted(vendor, requested)
        })
    })
    .chain([
        Test::new("live::loaded::without_a_vcpu", move || {
            without_a_vcpu(vendor, other)
        }),
        Test::new("live::loaded::among_others", among_others),
        Test::new("live::loaded::in_shared_files", in_shared_files),
        Test::new(
            "live::loaded::behind_a_leader_that_exited",
            behind_a_leader_that_exited,
        ),
        Test::new("live::loaded::again_and_again", move || {
            again_and_again(vendor)
        }),
    ])
    .collect())
}

/// A VM that runs is taken for what it is, changed, given back, and left.
fn adopted(vendor: Vendor, requested: Exits) -> Result<()> {
    let floor = floor(vendor)?;
    modules::unload(EXITPOLICY)?;
    let cgroup = Cgroup::new("own")?;
    let make = Make {
        vcpus: 2,
        requested,
        // KVM takes it out if HLT was asked for.
        pv_unhalt: requested.contains(Exits::HLT),
        ..Make::default()
    };
    let mut rig = Rig::new(vendor, &cgroup, make)?;
    rig.start(Payload::Hlt)?;
    let counter = rig.counter()?;
    let asked = requested.contains(Exits::HLT);
    rig.check_all(&counter, Payload::Hlt, asked)?;

    modules::load(EXITPOLICY)?;
    let view = interface::only_vm()?;
    ensure!(
        view.adopted
            && view.requested == requested
            && view.effective == floor | requested
            && view.floor == floor
            && view.clamped.is_empty()
            && view.cgroup == cgroup.path()
            && view.pid == rig.vmm.pid()
            && view.vcpus == 2
            && view.each.len() == 2
            && view.pending == 0,
        "{view:?}"
    );
    rig.id = view.id;
    rig.check_all(&counter, Payload::Hlt, asked)
        .context("adopted")?;
    // Nothing is given, nothing is held.
    let info = Device::open()?.info()?;
    ensure!((info.holding, info.missed) == (0, 0), "{info:?}");

    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    rig.ensure_settled()?;
    rig.check_all(&counter, Payload::Hlt, true)
        .context("given")?;
    ioctl::set_policy(&cgroup, Exits::NONE, Exits::NONE)?;
    rig.ensure_settled()?;
    rig.check_all(&counter, Payload::Hlt, false)
        .context("taken")?;
    let view = rig.settled()?;
    ensure!(view.clamped == requested, "{view:?}");
    if !requested.is_empty() {
        ensure_not_unloadable()?;
    }
    rig.set(Some(1), Exits::ALL)?;
    rig.check_all(&counter, Payload::Hlt, false)
        .context("not allowed")?;
    ioctl::set_policy(&cgroup, Exits::NONE, Exits::ALL)?;
    rig.check(&counter, Payload::Hlt, &[asked, true])
        .context("one vCPU")?;
    ensure_not_unloadable()?;
    // A vCPU that comes later is none the worse.
    let late = rig.vmm.create_vcpu(rig.vm, 2)?;
    drop(counter);
    rig.vcpus.push(late);
    rig.start_one(2, Work::gated(Payload::Hlt))?;
    let counter = rig.counter()?;
    rig.check(&counter, Payload::Hlt, &[asked, true, asked])
        .context("a late vCPU")?;

    interface::drain()?;
    rig.check_all(&counter, Payload::Hlt, asked)
        .context("given back")?;
    drop(counter);
    rig.stop()?;
    rig.check_each(floor | requested)?;
    modules::unload(EXITPOLICY)?;
    rig.check_each(floor | requested)?;
    modules::load(EXITPOLICY)?;
    ensure!(interface::only_vm()?.requested == requested, "loaded again");
    rig.end()
}

/// Whoever has made no VM can have as many and as large tables of files as it likes: nobody looks at
/// them when the module is loaded.
fn among_others() -> Result<()> {
    const OTHERS: u64 = 20;
    modules::unload(EXITPOLICY)?;
    let cgroup = Cgroup::new("own")?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    vmm.create_vcpu(vm, 0)?;
    let mut others = Vec::new();
    for _ in 0..OTHERS {
        others.push(Command::new("sleep").arg("1000000").spawn()?);
    }
    let image = modules::image()?;
    let tid = gettid().as_raw();
    let calls = Calls::of("iterate_fd", &[tid])?;
    let loaded = modules::load_image(&image);
    let tables = calls.by(tid)?;
    drop(calls);
    for other in &mut others {
        other.kill()?;
        other.wait()?;
    }
    loaded?;
    ensure!(interface::only_vm()?.adopted, "not found");
    // The VMM's, and this process', which has made VMs, too.
    ensure!((1..=2).contains(&tables), "{tables} tables of files");
    vmm.kill()?;
    interface::ensure_no_vms()
}

/// Processes that share their files have VMs of their own there.
fn in_shared_files() -> Result<()> {
    modules::unload(EXITPOLICY)?;
    let own = Arc::new(Vm::new(Irqchip::Kernel)?);
    let vcpu = own.create_vcpu(0)?;
    let (mut here, mut there) = UnixStream::pair()?;
    // SAFETY: As fork(2), but for the files: this process has one thread, as the tests run in the main
    // thread, one at a time.
    let child = unsafe { libc::syscall(libc::SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0) };
    if child == 0 {
        let mut live = || -> Result<()> {
            let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
            let _vcpu = vm.create_vcpu(0)?;
            there.write_all(b"1")?;
            // Until nobody needs it; to close it is for us to do.
            there.read_exact(&mut [0])?;
            Ok(())
        };
        let status = live().is_err().into();
        // SAFETY: Ends the process without running what belongs to the parent.
        unsafe { libc::_exit(status) };
    }
    ensure!(child > 0, "clone: {}", io::Error::last_os_error());
    here.read_exact(&mut [0])?;
    modules::load(EXITPOLICY)?;
    let vms = ioctl::vms()?;
    here.write_all(b"1")?;
    let status = waitpid(Pid::from_raw(child as i32), None)?;
    ensure!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
    ensure!(vms.len() == 2 && vms.iter().all(|vm| vm.adopted), "{vms:?}");
    drop((vcpu, own));
    interface::ensure_no_vms()
}

/// Threads share a table of files that is looked at once, also if the first of them has exited, and
/// whatever threads the kernel has made among them for a VM that has run.
fn behind_a_leader_that_exited() -> Result<()> {
    const THREADS: usize = 20;
    modules::unload(EXITPOLICY)?;
    // SAFETY: This process has one thread: the tests run in the main thread, one at a time.
    let child = match unsafe { fork() }? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let some_threads = || -> Result<()> {
                for _ in 0..THREADS / 2 {
                    thread::Builder::new().spawn(|| loop {
                        thread::park()
                    })?;
                }
                Ok(())
            };
            let live = || -> Result<Vcpu> {
                some_threads()?;
                let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
                let mut vcpu = vm.create_vcpu(0)?;
                vcpu.run(Work::new(Payload::Hlt, 1), &AtomicBool::new(false))?;
                some_threads()?;
                Ok(vcpu)
            };
            let _vcpu = live().unwrap_or_else(|error| {
                eprintln!("    {error:?}");
                // SAFETY: Ends the process without running what belongs to the parent.
                unsafe { libc::_exit(1) }
            });
            // SAFETY: Ends this thread, and neither the others nor what belongs to it.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
            unreachable!()
        }
    };
    let exited = || -> Result<bool> {
        let stat = fs::read_to_string(format!("/proc/{child}/stat"))?;
        Ok(stat
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.starts_with(" Z")))
    };
    let result = (|| {
        ensure!(soon(exited)?, "the thread does not exit");
        let image = modules::image()?;
        let tid = gettid().as_raw();
        let calls = Calls::of("iterate_fd", &[tid])?;
        modules::load_image(&image)?;
        let tables = calls.by(tid)?;
        ensure!(interface::only_vm()?.adopted, "not found");
        // That one, and this process', which has made VMs, too.
        ensure!((1..=2).contains(&tables), "{tables} tables of files");
        Ok(())
    })();
    kill(child, Signal::SIGKILL)?;
    waitpid(child, None)?;
    result?;
    interface::ensure_no_vms()
}

/// A VM that has no vCPU yet is like one that is yet to be made.
fn without_a_vcpu(vendor: Vendor, other: Exits) -> Result<()> {
    modules::unload(EXITPOLICY)?;
    let cgroup = Cgroup::new("own")?;
    let make = Make {
        vcpus: 0,
        requested: other,
        ..Make::default()
    };
    let mut rig = Rig::new(vendor, &cgroup, make)?;
    modules::load(EXITPOLICY)?;
    let unmanaged = command::unmanaged()?;
    ensure!(
        unmanaged == [(rig.vmm.pid(), "no_vcpu".to_string())],
        "{unmanaged:?}"
    );
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let vcpu = rig.vmm.create_vcpu(rig.vm, 0)?;
    let unmanaged = command::unmanaged()?;
    ensure!(unmanaged.is_empty(), "{unmanaged:?}");
    rig.vcpus.push(vcpu);
    let view = interface::only_vm()?;
    ensure!(
        view.requested == other && view.effective == floor(vendor)? | other | Exits::HLT,
        "{view:?}"
    );
    rig.id = view.id;
    rig.check_each(view.effective)?;
    rig.end()
}

/// Several VMs run on while the module comes and goes.
fn again_and_again(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut rigs = vec![Rig::pair(vendor, &cgroup)?, Rig::pair(vendor, &cgroup)?];
    for rig in &mut rigs {
        for vcpu in rig.vcpus.clone() {
            rig.vmm.start_run(vcpu, Work::new(Payload::Hlt, u32::MAX))?;
        }
    }
    for round in 0..10 {
        let ids: Vec<u64> = ioctl::vms()?.iter().map(|view| view.id).collect();
        ensure!(ids.len() == rigs.len(), "round {round}: {ids:?}");
        ensure!(
            testing::soon(|| Ok(sysfs::vm_ids()? == ids))?,
            "round {round}: sysfs has {:?}",
            sysfs::vm_ids()?
        );
        ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
        for view in ioctl::vms()? {
            ensure!(
                view.each
                    .iter()
                    .all(|vcpu| vcpu.wanted.contains(Exits::HLT)),
                "{view:?}"
            );
        }
        ensure_not_unloadable()?;
        // Drained only half of the time: the other half, the policy's end gives it all back.
        if round % 2 == 0 {
            interface::drain()?;
        } else {
            ioctl::clear_policy(&cgroup)?;
            let device = Device::open()?;
            ensure!(
                testing::soon(|| Ok(device.info()?.holding == 0))?,
                "{:?}",
                device.info()?
            );
        }
        modules::unload(EXITPOLICY).with_context(|| format!("round {round}"))?;
        for rig in &mut rigs {
            for index in 0..rig.vcpus.len() {
                let goal = rig.guest.params(index).executed + 4;
                rig.wait_executed(index, goal)
                    .with_context(|| format!("round {round}"))?;
            }
        }
        modules::load(EXITPOLICY)?;
    }
    for rig in &mut rigs {
        rig.stop()?;
    }
    for rig in rigs {
        rig.vmm.kill()?;
    }
    interface::ensure_no_vms()
}
