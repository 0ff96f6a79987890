// SPDX-License-Identifier: GPL-2.0

//! Every allocation fails once: what is asked for then fails as a whole, or goes without, and
//! nothing stays half done.

use std::{
    fs,
    path::Path,
    sync::Arc, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use nix::errno::Errno;
use testing::{
    cgroup::Cgroup,
    client::Vmm,
    exits::Vendor,
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
    lifecycle::nothing_hooked,
    matrix::{
        check_guest,
        floor, //
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
        Test::new("faults::vcpus", move || vcpus(vendor)),
        Test::new("faults::worker", worker),
        Test::new("faults::load", load),
        Test::new("faults::load_with_a_vm", move || load_with_a_vm(vendor)),
    ]
    .into_iter()
    .map(|test| test.ignored(!possible))
    .collect()
}

/// Does what a test is about without losing memory, and says how many allocations failed.
fn without_leaks(what: impl FnOnce() -> Result<u32>) -> Result<()> {
    let leaks = Leaks::from_now()?;
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
        faults.each(|| set(Exits::NONE, Exits::HLT), ensure_worked)?;
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
    for disable in [Exits::HLT, Exits::NONE] {
        let argument = uapi::Override {
            vm: id,
            disable: disable.bits(),
            ..Default::default()
        };
        faults.each(
            || Ok(device.overriding(uapi::SET_VM, argument)?),
            ensure_worked,
        )?;
    }
    let effective = interface::only_vm()?.effective;
    ensure!(effective == floor(vendor)?, "{effective}");
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
/// keep; the next one is as it should be.
fn vcpus(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, !Exits::MWAIT)?;
    cgroup.add_process(std::process::id() as i32)?;
    let result = without_leaks(|| {
        let faults = Faults::of_module(EXITPOLICY)?;
        let device = Device::open()?;
        let mut before = device.info()?;
        faults.each(
            || -> Result<_> {
                let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
                let vcpus = [vm.create_vcpu(0)?, vm.create_vcpu(1)?];
                Ok((vm, vcpus))
            },
            |outcome| {
                let failed = outcome.failed;
                // KVM's own allocations do not fail here.
                let made = outcome.result.context("KVM failed")?;
                let now = device.info()?;
                ensure!(now.vms <= 1, "{now:?}");
                if now.missed > before.missed {
                    ensure!(failed, "missed without need: {now:?}");
                } else {
                    // Nothing, or nothing that anybody needed.
                    let view = interface::only_vm()?;
                    let effective = floor(vendor)? | Exits::HLT;
                    ensure!(
                        view.effective == effective && view.vcpus == 2,
                        "not whole, and not counted: {view:?}"
                    );
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
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    let effective = floor(vendor)? | Exits::HLT;
    check_guest(vendor, &mut vmm, vcpu, Payload::Hlt, effective)
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
                Progress::Fewer => return Ok(nth - 1),
                Progress::Idle => idle += 1,
            }
        }
        bail!("allocation {nth}: the worker is never one that was armed")
    })
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
