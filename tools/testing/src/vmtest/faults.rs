// SPDX-License-Identifier: GPL-2.0

//! Every allocation fails once: what is asked for then fails as a whole, or goes without, and
//! nothing stays half done.

use std::{
    fs::{
        self,
        File, //
    },
    os::fd::{
        AsRawFd,
        RawFd, //
    },
    path::Path,
    sync::{
        atomic::AtomicBool,
        Arc, //
    },
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use nix::{
    errno::Errno,
    sys::{
        signal::{
            kill,
            Signal, //
        },
        wait::waitpid, //
    },
    unistd::{
        fork,
        ForkResult,
        Pid, //
    },
};
use testing::{
    cgroup::Cgroup,
    client::{
        file_of,
        Vmm, //
    },
    exits::{
        hooked_functions,
        Vendor, //
    },
    faults::{
        self,
        Faults,
        Leaks,
        Outcome,
        Progress, //
    },
    interface::{
        self,
        ioctl,
        sysfs, //
    },
    modules::{
        self,
        EXITPOLICY, //
    },
    payload::Payload,
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
    lifecycle::{
        nothing_hooked,
        unload_soon, //
    },
    live::nested::hook_without_memory,
    matrix::{
        check_guest,
        floor, //
    },
    tracing::{
        decisions_in,
        has, //
    },
    Test, //
};

pub fn tests(vendor: Vendor) -> Vec<Test> {
    let possible = faults::are_possible();
    [
        Test::new("faults::policy", policy),
        Test::new("faults::policy_by_sysfs", policy_by_sysfs),
        Test::new("faults::override", move || overriding(vendor)),
        Test::new("faults::device", device),
        Test::new("faults::read", read),
        Test::new("faults::vcpus", move || vcpus(vendor)),
        Test::new("faults::worker", worker),
        Test::new("faults::vcpu_directory", vcpu_directory),
        Test::new("faults::load", load),
        Test::new("faults::load_with_a_vm", move || load_with_a_vm(vendor)),
        Test::new("faults::load_without_pages", load_without_pages),
        Test::new("faults::vendor_loaded", move || vendor_loaded(vendor)),
        Test::new("faults::found_running", move || found_running(vendor)),
        Test::new("faults::l2_hook", move || {
            without_leaks(|| hook_without_memory(vendor))
        })
        // Nothing is hooked for L2.
        .ignored(vendor == Vendor::Svm),
    ]
    .into_iter()
    .map(|test| {
        let ignored = test.ignored || !possible;
        test.ignored(ignored)
    })
    .collect()
}

/// Does what a test is about without losing memory, and says how many allocations failed.
fn without_leaks(what: impl FnOnce() -> Result<u32>) -> Result<()> {
    let leaks = Leaks::from_now(EXITPOLICY)?;
    let failed = what()?;
    eprintln!("    {failed} allocations failed, one at a time");
    ensure!(failed > 0, "no allocation failed, so nothing was tested");
    leaks.ensure_none(EXITPOLICY)
}

/// Fails unless an operation worked, or failed for lack of memory if one was made to.
fn ensure_enomem<T>(outcome: Outcome<Result<T>>) -> Result<Option<T>> {
    match outcome.result {
        Ok(value) => Ok(Some(value)),
        Err(error) => {
            let errno = error
                .chain()
                .find_map(|cause| cause.downcast_ref::<std::io::Error>()?.raw_os_error());
            ensure!(
                outcome.failed && errno == Some(libc::ENOMEM),
                "it failed otherwise: {error:?}"
            );
            Ok(None)
        }
    }
}

/// Fails unless an operation worked, although an allocation may have failed in it.
fn ensure_worked<T>(outcome: Outcome<Result<T>>) -> Result<()> {
    outcome.result?;
    Ok(())
}

/// A policy is made, or not, and changing one needs no memory that could be missing.
fn policy() -> Result<()> {
    without_leaks(|| {
        let faults = Faults::of_module(EXITPOLICY)?;
        let cgroup = Cgroup::new("own")?;
        let device = Device::open()?;
        let directory = cgroup.open()?;
        let set = |disable: Exits, allow: Exits| {
            let argument = uapi::Policy {
                flags: uapi::POLICY_DISABLE | uapi::POLICY_ALLOW,
                cgroup_fd: testing::cgroup::fd_of(&directory),
                disable: disable.bits(),
                allow: allow.bits(),
                ..Default::default()
            };
            Ok(device.policy(uapi::SET_POLICY, argument).map(drop)?)
        };
        let failed = faults.each(
            || set(Exits::HLT, Exits::ALL),
            |outcome| {
                let failed = outcome.failed;
                // It can do without some things: nobody may hear of a new directory.
                let set = ensure_enomem(outcome)?.is_some();
                ensure!(set || failed, "not set, and nothing failed");
                let expected = set.then_some((Exits::HLT, Exits::ALL));
                ensure!(ioctl::policy(&cgroup)? == expected, "not all or nothing");
                let shown = sysfs::policy_ids()?.contains(&cgroup.id()?);
                ensure!(shown == set, "sysfs does not agree");
                ensure!(
                    Device::open()?.info()?.policies == u64::from(set),
                    "the number of policies"
                );
                if set && failed {
                    ioctl::clear_policy(&cgroup)?;
                }
                Ok(())
            },
        )?;
        faults.each(
            || set(Exits::NONE, Exits::HLT),
            |outcome| {
                ensure_worked(outcome)?;
                let changed = ioctl::policy(&cgroup)?;
                ensure!(changed == Some((Exits::NONE, Exits::HLT)), "{changed:?}");
                ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)
            },
        )?;
        faults.each(
            || {
                let argument = uapi::Policy {
                    cgroup_fd: testing::cgroup::fd_of(&directory),
                    ..Default::default()
                };
                Ok(device.policy(uapi::CLEAR_POLICY, argument).map(drop)?)
            },
            |outcome| {
                ensure_worked(outcome)?;
                let left = ioctl::policy(&cgroup)?;
                ensure!(left.is_none(), "{left:?}");
                ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)
            },
        )?;
        ioctl::clear_policy(&cgroup)?;
        Ok(failed)
    })
}

/// The same by writing into sysfs.
fn policy_by_sysfs() -> Result<()> {
    without_leaks(|| {
        let faults = Faults::of_module(EXITPOLICY)?;
        let cgroup = Cgroup::new("own")?;
        let attach = Path::new(interface::SYSFS).join("attach");
        let failed = faults.each(
            || Ok(fs::write(&attach, cgroup.path())?),
            |outcome| {
                let failed = outcome.failed;
                let set = ensure_enomem(outcome)?.is_some();
                let policy = ioctl::policy(&cgroup)?;
                ensure!(policy.is_some() == set, "{policy:?}, attached: {set}");
                ensure!(
                    sysfs::policy_ids()?.contains(&cgroup.id()?) == set,
                    "sysfs does not agree"
                );
                if set && failed {
                    ioctl::clear_policy(&cgroup)?;
                }
                Ok(())
            },
        )?;
        // What is there is changed whatever fails.
        let directory = sysfs::policy_directory(&cgroup)?;
        for (file, set) in [("disable", Exits::HLT), ("allow", Exits::HLT)] {
            let path = directory.join(file);
            faults.each(|| Ok(fs::write(&path, set.to_string())?), ensure_worked)?;
        }
        let expected = Some((Exits::HLT, Exits::HLT));
        ensure!(ioctl::policy(&cgroup)? == expected, "not changed");
        // It is taken away, or it is all there.
        let detach = Path::new(interface::SYSFS).join("detach");
        let failed_to_detach = faults.each(
            || Ok(fs::write(&detach, cgroup.path())?),
            |outcome| {
                let failed = outcome.failed;
                let gone = ensure_enomem(outcome)?.is_some();
                let policy = ioctl::policy(&cgroup)?;
                let expected = if gone { None } else { expected };
                ensure!(policy == expected, "{policy:?}, detached: {gone}");
                ensure!(
                    sysfs::policy_ids()?.contains(&cgroup.id()?) != gone,
                    "sysfs does not agree"
                );
                if gone && failed {
                    ioctl::set_policy(&cgroup, Exits::HLT, Exits::HLT)?;
                }
                Ok(())
            },
        )?;
        ensure!(
            failed_to_detach > 0,
            "no allocation failed in detach, so nothing was tested"
        );
        Ok(failed + failed_to_detach)
    })
}

/// Every file of the module's in sysfs, read with a VM and a policy there: its content, or ENOMEM.
fn read() -> Result<()> {
    without_leaks(|| {
        let faults = Faults::of_module(EXITPOLICY)?;
        let cgroup = Cgroup::new("own")?;
        ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
        let mut vmm = Vmm::start(&cgroup)?;
        let vm = vmm.create_vm()?;
        vmm.create_vcpu(vm, 0)?;
        interface::only_vm()?;
        let mut failed = 0;
        for (path, content) in sysfs::snapshot()? {
            if path.is_dir() {
                continue;
            }
            failed += faults
                .each(
                    || Ok(fs::read_to_string(&path)?),
                    |outcome| {
                        if let Some(read) = ensure_enomem(outcome)? {
                            ensure!(read == content, "{read:?}, was {content:?}");
                        }
                        Ok(())
                    },
                )
                .with_context(|| path.display().to_string())?;
        }
        vmm.kill()?;
        interface::ensure_no_vms()?;
        ioctl::clear_policy(&cgroup)?;
        Ok(failed)
    })
}

/// A VM that runs is changed, whatever memory is missing.
fn overriding(vendor: Vendor) -> Result<()> {
    let faults = Faults::of_module(EXITPOLICY)?;
    let cgroup = Cgroup::new("own")?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    vmm.hide_pv_unhalt(vm)?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    let id = interface::only_vm()?.id;
    vmm.start_run(vcpu, Work::new(Payload::Hlt, u32::MAX))?;
    let device = Device::open()?;
    let floor = floor(vendor)?;
    for disable in [Exits::HLT, Exits::NONE] {
        let argument = uapi::Override {
            vm: id,
            disable: disable.bits(),
            ..Default::default()
        };
        faults.each(
            || Ok(device.overriding(uapi::SET_VM, argument)?),
            |outcome| {
                ensure_worked(outcome)?;
                let view = interface::only_vm()?;
                let in_force = view.vcpu(0)?.in_force;
                ensure!(
                    view.effective == floor | disable && in_force == floor | disable,
                    "{view:?}"
                );
                // For the next time.
                Ok(ioctl::set_override(id, None, Exits::HLT & !disable).map(drop)?)
            },
        )?;
    }
    vmm.kill()?;
    interface::ensure_no_vms()
}

/// Opening the device, and asking.
fn device() -> Result<()> {
    without_leaks(|| {
        let faults = Faults::of_module(EXITPOLICY)?;
        let before = Device::open()?.info()?;
        faults.each(
            || Device::open()?.info().context("GET_INFO"),
            |outcome| {
                if let Some(info) = ensure_enomem(outcome)? {
                    ensure!(info == before, "{info:?}");
                }
                Ok(())
            },
        )
    })
}

/// A VM for which there is no memory is made all the same, counted, and given nothing that it could
/// keep, and what is not allowed is taken from it; the next one is as it should be.
fn vcpus(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::MWAIT, !Exits::HLT)?;
    cgroup.add_process(std::process::id() as i32)?;
    let floor = floor(vendor)?;
    let whole = floor | Exits::MWAIT;
    let mut unknown = 0;
    let result = without_leaks(|| {
        let faults = Faults::of_module(EXITPOLICY)?;
        let device = Device::open()?;
        let mut before = device.info()?;
        faults.each(
            || {
                decisions_in(|| -> Result<_> {
                    let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
                    vm.disable_exits(Exits::HLT.bits())?;
                    let vcpus = [vm.create_vcpu(0)?, vm.create_vcpu(1)?];
                    Ok((vm, vcpus))
                })
            },
            |outcome| {
                let failed = outcome.failed;
                let (made, events) = outcome.result?;
                // KVM's own allocations do not fail here.
                let mut made = made.context("KVM failed")?;
                let now = device.info()?;
                ensure!(now.vms <= 1, "{now:?}");
                let event = events.first().context("no decision")?;
                let clamped = format!("clamped={}", Exits::HLT);
                ensure!(has(event, &clamped), "no {clamped} in {event}");
                if now.missed > before.missed {
                    ensure!(failed, "missed without need: {now:?}");
                    // If it is known, the worker finds what there was no memory for.
                    if now.vms == 1 {
                        let view = interface::only_vm()?;
                        ensure!(view.vcpus == 2, "not whole after all: {view:?}");
                    }
                } else {
                    // Nothing, or nothing that anybody needed.
                    let view = interface::only_vm()?;
                    ensure!(
                        view.effective == whole && view.vcpus == 2,
                        "not whole, and not counted: {view:?}"
                    );
                }
                let is_unknown = has(event, "vm=0");
                unknown += u32::from(is_unknown);
                if is_unknown {
                    // What its flags were when it was found: it was clamped while it was unknown.
                    let view = interface::only_vm()?;
                    ensure!(view.requested.is_empty(), "not clamped: {view:?}");
                }
                let effective = if is_unknown { floor } else { whole };
                let effective = format!("effective={effective}");
                ensure!(has(event, &effective), "no {effective} in {event}");
                // With its second vCPU it is found after all, for what it is by then, and decided on
                // as every VM that is known.
                for found in &events[1..] {
                    ensure!(
                        is_unknown && has(found, &format!("effective={whole}")),
                        "{events:#?}"
                    );
                }
                for vcpu in &mut made.1 {
                    let report = vcpu.run(Work::new(Payload::Hlt, 2), &AtomicBool::new(false))?;
                    ensure!(report.halt_exits == 2, "HLT is not taken: {report:?}");
                }
                drop(made);
                interface::ensure_no_vms()?;
                before = device.info()?;
                ensure!(before.holding == 0, "{before:?}");
                Ok(())
            },
        )
    });
    // Where it was.
    fs::write(
        "/sys/fs/cgroup/cgroup.procs",
        std::process::id().to_string(),
    )?;
    result?;
    eprintln!("    {unknown} VMs were not known");
    ensure!(unknown > 0, "every VM was known, so nothing was tested");
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    check_guest(vendor, &mut vmm, vcpu, Payload::Mwait, whole)
}

/// A VM whose directory could not be made is decided on and listed by ioctl, and counted.
fn worker() -> Result<()> {
    without_leaks(|| {
        let faults = Faults::of_module(EXITPOLICY)?;
        let device = Device::open()?;
        let mut nth = 1;
        // A worker that was not there when they were armed may do the work.
        let mut idle = 0;
        while idle < 10 {
            let missed = device.info()?.missed;
            let workers = faults.arm_workers(nth)?;
            let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
            let vcpu = vm.create_vcpu(0)?;
            let ids: Vec<u64> = device.vms()?.iter().map(|vm| vm.id).collect();
            ensure!(ids.len() == 1, "{ids:?}");
            let is_whole = || -> Result<bool> {
                let asked = ioctl::vm(ids[0])?;
                Ok(sysfs::vm(ids[0]).is_ok_and(|shown| shown == asked))
            };
            let has_missed = || -> Result<bool> { Ok(device.info()?.missed > missed) };
            ensure!(
                soon(|| Ok(has_missed()? || is_whole()?))?,
                "allocation {nth}: not whole, and not counted"
            );
            drop((vcpu, vm));
            // The worker has done all of it when it removes the directory.
            interface::ensure_no_vms()?;
            match workers.progress() {
                Progress::Failed => nth += 1,
                Progress::Fewer => {
                    ensure!(!has_missed()?, "missed without need");
                    return Ok(nth - 1);
                }
                Progress::Idle => idle += 1,
            }
        }
        bail!("allocation {nth}: the worker is never one that was armed")
    })
}

/// A vCPU whose directory could not be made: those of the others stay the vCPUs' own, and are taken
/// away when the creation of one fails, which may happen again and again.
fn vcpu_directory() -> Result<()> {
    let faults = Faults::of_module(EXITPOLICY)?;
    let device = Device::open()?;
    let cgroup = Cgroup::new("own")?;
    let (mut nth, mut idle) = (1, 0);
    loop {
        let missed = device.info()?.missed;
        let workers = faults.arm_workers(nth)?;
        let mut vmm = Vmm::start(&cgroup)?;
        let vm = vmm.create_vm()?;
        for index in 0..3 {
            vmm.create_vcpu(vm, index)?;
        }
        let id = ioctl::vms()?.first().context("no VM")?.id;
        let directory = |index: u32| sysfs::vm_directory(id).join(format!("vcpu{index}"));
        let has_missed = || -> Result<bool> { Ok(device.info()?.missed > missed) };
        ensure!(
            soon(|| Ok(has_missed()? || directory(2).exists()))?,
            "allocation {nth}: the worker does nothing"
        );
        // It goes on with the next ones at once, if it can.
        for _ in 0..50 {
            if !directory(2).exists() {
                testing::pause();
            }
        }
        let progress = workers.progress();
        drop(workers);
        let has_hole = !directory(0).exists() && directory(2).exists();
        if has_hole {
            eprintln!("    allocation {nth} was for the directory of the first vCPU");
            let thread = vmm.thread()?;
            for turn in 0..5 {
                // The worker sees it while it is not known that it fails.
                for index in [3, 4] {
                    let mut tries = 0;
                    while !directory(index).exists() {
                        ensure!(
                            tries < 100_000,
                            "turn {turn}: the worker never sees vCPU {index}"
                        );
                        tries += 1;
                        let errno = vmm.fail_to_create_vcpu(thread, vm, index as usize)?;
                        ensure!(errno == libc::EMFILE, "{errno}");
                    }
                }
                ensure!(!directory(3).exists(), "turn {turn}: one too many");
            }
        }
        vmm.kill()?;
        interface::ensure_no_vms()?;
        match progress {
            _ if has_hole => return Ok(()),
            Progress::Failed => nth += 1,
            Progress::Fewer => bail!("none of {nth} allocations was for the first vCPU"),
            // As in worker().
            Progress::Idle if idle == 10 => bail!("the worker is never one that was armed"),
            Progress::Idle => idle += 1,
        }
    }
}

/// The module is loaded, or says why not and leaves nothing behind.
fn load() -> Result<()> {
    modules::unload(EXITPOLICY)?;
    let image = modules::image()?;
    let result = without_leaks(|| {
        let faults = Faults::of_module_to_come()?;
        faults.each(
            || modules::load_image(&image),
            |outcome| {
                match (outcome.result, outcome.failed) {
                    // It can do without some things, such as the names of locks.
                    (Ok(()), _) => modules::unload(EXITPOLICY)?,
                    (Err(Errno::ENOMEM), true) => {}
                    (Err(errno), _) => bail!("it failed with {errno}"),
                }
                nothing_hooked()
            },
        )
    });
    modules::load(EXITPOLICY)?;
    result
}

/// The same with a VM to adopt, whose guest gets on after each try. It waits meanwhile, as it would
/// take half of the host's time.
fn load_with_a_vm(vendor: Vendor) -> Result<()> {
    modules::unload(EXITPOLICY)?;
    let cgroup = Cgroup::new("own")?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    vmm.run(vcpu, Work::new(Payload::Hlt, 10))?;
    let image = modules::image()?;
    let result = without_leaks(|| {
        let faults = Faults::of_module_to_come()?;
        faults.each(
            || modules::load_image(&image),
            |outcome| {
                match (outcome.result, outcome.failed) {
                    (Ok(()), failed) => {
                        let info = Device::open()?.info()?;
                        ensure!(
                            info.vms == 1 || (failed && info.missed > 0),
                            "the VM is neither known nor counted: {info:?}"
                        );
                        modules::unload(EXITPOLICY)?;
                    }
                    (Err(Errno::ENOMEM), true) => {}
                    (Err(errno), _) => bail!("it failed with {errno}"),
                }
                nothing_hooked()?;
                vmm.run(vcpu, Work::new(Payload::Hlt, 10))?;
                Ok(())
            },
        )
    });
    modules::load(EXITPOLICY)?;
    result?;
    let effective = floor(vendor)?;
    check_guest(vendor, &mut vmm, vcpu, Payload::Hlt, effective)?;
    let view = interface::only_vm()?;
    ensure!(view.adopted && view.effective == effective, "{view:?}");
    vmm.kill()?;
    interface::ensure_no_vms()
}

/// The same for whole pages, which are not among the slab's objects: who allocates them is asked to
/// fail as a function, by the kernel's fail_function.
fn load_without_pages() -> Result<()> {
    modules::unload(EXITPOLICY)?;
    let image = modules::image()?;
    let result = without_leaks(|| {
        faults::each_page(
            || modules::load_image(&image),
            |outcome| {
                match (outcome.result, outcome.failed) {
                    (Ok(()), _) => modules::unload(EXITPOLICY)?,
                    (Err(Errno::ENOMEM), true) => {}
                    (Err(errno), _) => bail!("it failed with {errno}"),
                }
                nothing_hooked()
            },
        )
    });
    modules::load(EXITPOLICY)?;
    result
}

/// A vendor module that is loaded after ours works whatever fails in ours, which hooks it or leaves
/// nothing on it, and hooks it the next time.
fn vendor_loaded(vendor: Vendor) -> Result<()> {
    let image = modules::image_of(vendor)?;
    let before = Device::open()?.info()?;
    let hooks = hooked_functions()?.len();
    unload_soon(vendor.module())?;
    let result = without_leaks(|| {
        let faults = Faults::of_module_but_vm_files(EXITPOLICY)?;
        faults.each(
            || modules::load_image(&image),
            |outcome| {
                let loaded = outcome.result;
                ensure!(loaded.is_ok(), "the vendor's module: {loaded:?}");
                let info = Device::open()?.info()?;
                let hooked = hooked_functions()?;
                if info.vendor == 0 {
                    ensure!(outcome.failed, "not hooked, and nothing failed");
                    ensure!(hooked.is_empty(), "hooks are left: {hooked:?}");
                } else {
                    ensure!(
                        info == before && hooked.len() == hooks,
                        "{info:?}: {hooked:?}"
                    );
                }
                unload_soon(vendor.module())
            },
        )
    });
    modules::load(vendor.module())?;
    result?;
    ensure!(Device::open()?.info()? == before, "not as before");
    Ok(())
}

/// A VM that nobody had open when the module was loaded, on its way from one process to another, is
/// found when it runs, or counted, and runs.
fn found_running(vendor: Vendor) -> Result<()> {
    let give_up = AtomicBool::new(false);
    let floor = floor(vendor)?;
    without_leaks(|| {
        for nth in 1..100 {
            modules::unload(EXITPOLICY)?;
            let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
            let mut vcpu = vm.create_vcpu(0)?;
            let away = Away::new(&[vm.as_raw_fd(), vcpu.as_raw_fd()])?;
            modules::load(EXITPOLICY)?;
            let info = Device::open()?.info()?;
            away.back()?;
            ensure!((info.vms, info.missed) == (0, 0), "{info:?}");
            let faults = Faults::of_module(EXITPOLICY)?;
            let outcome = faults.nth(nth, || vcpu.run(Work::new(Payload::Hlt, 2), &give_up))?;
            let report = outcome.result?;
            ensure!(report.executed == 2, "{report:?}");
            let info = Device::open()?.info()?;
            if info.missed == 0 {
                let view = interface::only_vm()?;
                ensure!(
                    view.adopted && view.vcpus == 1 && view.effective == floor,
                    "not whole, and not counted: {view:?}"
                );
            } else {
                ensure!(outcome.failed, "missed without need: {info:?}");
            }
            drop((vcpu, vm));
            interface::ensure_no_vms()?;
            if !outcome.failed {
                return Ok(nth - 1);
            }
        }
        bail!("there is no end of allocations");
    })
}

/// Open files of this process that a child has in its stead, whose memory is not the VMM's.
struct Away {
    fds: Vec<RawFd>,
    child: Pid,
}

impl Away {
    fn new(fds: &[RawFd]) -> Result<Self> {
        // SAFETY: This process has one thread: the tests run in the main thread, one at a time.
        let child = match unsafe { fork() }? {
            ForkResult::Parent { child } => child,
            ForkResult::Child => loop {
                nix::unistd::pause();
            },
        };
        let nothing = File::open("/dev/null")?;
        for fd in fds {
            // SAFETY: Puts another file in the place of one that this process has open.
            ensure!(unsafe { libc::dup3(nothing.as_raw_fd(), *fd, libc::O_CLOEXEC) } == *fd);
        }
        let fds = fds.to_vec();
        Ok(Self { fds, child })
    }

    /// Puts them back.
    fn back(self) -> Result<()> {
        for fd in &self.fds {
            let file = file_of(self.child.as_raw(), *fd)?;
            // SAFETY: As above, the other way round.
            ensure!(unsafe { libc::dup3(file.as_raw_fd(), *fd, libc::O_CLOEXEC) } == *fd);
        }
        Ok(())
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        let _ = kill(self.child, Signal::SIGKILL);
        let _ = waitpid(self.child, None);
    }
}
