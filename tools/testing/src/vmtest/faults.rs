// SPDX-License-Identifier: GPL-2.0

//! Every allocation fails once: what is asked for then fails as a whole, or goes without, and
//! nothing stays half done.

use std::{
    fs,
    path::Path,
    sync::Arc, //
};

use anyhow::{
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
        Outcome, //
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
        Test::new("faults::load_while_a_vm_runs", move || {
            load_while_a_vm_runs(vendor)
        }),
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
        let changes = faults.each(
            || set(Exits::NONE, Exits::HLT),
            |outcome| ensure_enomem(outcome).map(drop),
        )?;
        ensure!(changes == 0, "{changes} allocations to change a policy");
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

/// A VM that runs is changed without any memory.
fn overriding(vendor: Vendor) -> Result<()> {
    let faults = Faults::of_module(EXITPOLICY)?;
    let cgroup = Cgroup::new("own")?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    vmm.hide_pv_unhalt(vm)?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    let id = interface::only_vm()?.id;
    vmm.start_run(vcpu, Work::new(Payload::Hlt, u32::MAX))?;
    let mut failed = 0;
    let device = Device::open()?;
    for disable in [Exits::HLT, Exits::NONE] {
        let argument = uapi::Override {
            vm: id,
            disable: disable.bits(),
            ..Default::default()
        };
        failed += faults.each(
            || Ok(device.overriding(uapi::SET_VM, argument)?),
            |outcome| ensure_enomem(outcome).map(drop),
        )?;
    }
    ensure!(failed == 0, "{failed} allocations to change a VM");
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
                ensure!(
                    (now.missed > before.missed) == failed,
                    "missed {} before, {} now; failed: {failed}",
                    before.missed,
                    now.missed
                );
                ensure!(now.vms <= 1, "{now:?}");
                if !failed {
                    let view = interface::only_vm()?;
                    ensure!(view.effective == floor(vendor)? | Exits::HLT, "{view:?}");
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
        let mut failed = 0;
        loop {
            let missed = device.info()?.missed;
            faults.arm_workers(failed + 1)?;
            let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
            let vcpu = vm.create_vcpu(0)?;
            let ids: Vec<u64> = device.vms()?.iter().map(|vm| vm.id).collect();
            ensure!(ids.len() == 1, "{ids:?}");
            let directory = sysfs::vm_directory(ids[0]).join("vcpu0");
            let has_failed = || -> Result<bool> { Ok(device.info()?.missed > missed) };
            ensure!(
                soon(|| Ok(has_failed()? || directory.exists()))?,
                "the worker does nothing"
            );
            let this_one = has_failed()?;
            faults.arm_workers(0)?;
            drop((vcpu, vm));
            interface::ensure_no_vms()?;
            if !this_one {
                return Ok(failed);
            }
            failed += 1;
        }
    })
}

/// The module is loaded, or says why not and leaves nothing behind.
fn load() -> Result<()> {
    modules::unload(EXITPOLICY)?;
    let image = modules::image()?;
    let result = without_leaks(|| {
        let faults = Faults::of_any_module()?;
        faults.each(
            || modules::load_image(&image),
            |outcome| {
                match (outcome.result, outcome.failed) {
                    // It can do without some things, such as the names of locks.
                    (Ok(()), _) => modules::unload(EXITPOLICY)?,
                    (Err(Errno::ENOMEM), true) => {}
                    (Err(errno), _) => anyhow::bail!("it failed with {errno}"),
                }
                nothing_hooked()
            },
        )
    });
    modules::load(EXITPOLICY)?;
    result
}

/// The same while there is a VM to adopt, which runs on in any case.
fn load_while_a_vm_runs(vendor: Vendor) -> Result<()> {
    modules::unload(EXITPOLICY)?;
    let cgroup = Cgroup::new("own")?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    vmm.start_run(vcpu, Work::new(Payload::Hlt, u32::MAX))?;
    let image = modules::image()?;
    let result = without_leaks(|| {
        let faults = Faults::of_any_module()?;
        faults.each(
            || modules::load_image(&image),
            |outcome| {
                match (outcome.result, outcome.failed) {
                    (Ok(()), failed) => {
                        let known = Device::open()?.info()?.vms;
                        ensure!(known == 1 || failed, "{known} VMs");
                        modules::unload(EXITPOLICY)?;
                    }
                    (Err(Errno::ENOMEM), true) => {}
                    (Err(errno), _) => anyhow::bail!("it failed with {errno}"),
                }
                nothing_hooked()
            },
        )
    });
    modules::load(EXITPOLICY)?;
    result?;
    let progress = vmm.progress(vcpu)?;
    ensure!(
        soon(|| Ok(vmm.progress(vcpu)? > progress + 10))?,
        "the guest is stuck"
    );
    let view = interface::only_vm()?;
    ensure!(view.adopted && view.effective == floor(vendor)?, "{view:?}");
    vmm.kill()?;
    interface::ensure_no_vms()
}
