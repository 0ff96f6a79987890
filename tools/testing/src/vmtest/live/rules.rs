// SPDX-License-Identifier: GPL-2.0

//! Who decides on what a running VM gets, what the interfaces say of it, and what is refused.

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use testing::{
    cgroup::Cgroup,
    exits::Vendor,
    interface::{
        self,
        command,
        ioctl,
        sysfs,
        VmView,
        IN_FORCE,
        NEXT_ENTRY, //
    },
    payload::Payload,
    soon,
    uapi::{
        self,
        Device, //
    },
    vmm::{
        Action,
        Work, //
    }, //
};

use super::{
    changeable,
    Make,
    Rig, //
};
use crate::{
    few_will_do,
    matrix::{
        floor,
        supported, //
    },
    Test, //
};

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let other = changeable(vendor)? & !Exits::HLT;
    let other = other.iter().next().context("nothing but HLT")?;
    let refused = [
        ("when_run", told_when_run as fn(Vendor) -> Result<()>),
        ("before_it_ran", told_before_it_ran),
    ]
    .map(|(name, body)| {
        Test::new(format!("live::rules::pv_unhalt_{name}"), move || {
            body(vendor)
        })
    });
    let mut tests = vec![
        Test::new("live::rules::precedence", move || precedence(vendor, other)),
        Test::new("live::rules::states", move || states(vendor)),
        Test::new("live::rules::no_wait", move || no_wait(vendor)),
        Test::new("live::rules::what_was_said_holds", move || {
            what_was_said_holds(vendor)
        }),
        Test::new("live::rules::interfaces", move || interfaces(vendor, other)),
        Test::new("live::rules::hlt_from_the_start", move || {
            hlt_from_the_start(vendor)
        }),
    ];
    tests.extend(refused);
    Ok(tests)
}

/// A vCPU that a call has found on its way to what it should have is not shown as pending later. It
/// goes in and out of the guest all the time.
fn what_was_said_holds(vendor: Vendor) -> Result<()> {
    let changes = if few_will_do()? { 100 } else { 5_000 };
    let cgroup = Cgroup::new("own")?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    rig.start_one(0, Work::new(Payload::Mwait, u32::MAX))?;
    let mut on_its_way = 0;
    for change in 0..changes {
        if change % 2 == 0 {
            rig.set(Some(0), Exits::HLT)?;
        } else {
            rig.reset(Some(0))?;
        }
        let vcpus = Device::open()?.vcpus(rig.id)?;
        on_its_way += u32::from(vcpus[0].state != uapi::VCPU_IN_FORCE);
        rig.ensure_settled()
            .with_context(|| format!("change {change}"))?;
    }
    eprintln!("    {changes} changes, {on_its_way} of them still on their way afterwards");
    rig.vmm.stop(rig.vcpus[0])?;
    rig.end()
}

/// Overrides of the VM and of one vCPU, and what is allowed, in all combinations.
fn precedence(vendor: Vendor, other: Exits) -> Result<()> {
    let (floor, supported) = (floor(vendor)?, supported(vendor)?);
    let cgroup = Cgroup::new("own")?;
    let make = Make {
        vcpus: 2,
        requested: other,
        ..Make::default()
    };
    let mut rig = Rig::new(vendor, &cgroup, make)?;
    let disable = Exits::HLT;
    let overrides = [None, Some(Exits::NONE), Some(Exits::HLT), Some(Exits::ALL)];
    let expected = |disable: Exits, allow: Exits| floor | ((other | disable & supported) & allow);
    for allow in [Exits::ALL, !other, !Exits::HLT, Exits::NONE] {
        ioctl::set_policy(&cgroup, disable, allow)?;
        for vm in overrides {
            for vcpu in overrides {
                // The VM's last, as taking it away takes those of the vCPUs too.
                match vm {
                    None => rig.reset(None)?,
                    Some(set) => rig.set(None, set)?,
                }
                match vcpu {
                    None => rig.reset(Some(1))?,
                    Some(set) => rig.set(Some(1), set)?,
                }
                let view = rig.view()?;
                let of_vm = expected(vm.unwrap_or(disable), allow);
                let of_vcpu = expected(vcpu.or(vm).unwrap_or(disable), allow);
                ensure!(
                    view.disable == vm
                        && view.effective == of_vm
                        && view.requested == other
                        && view.clamped == other & !allow
                        && view.vcpu(0)?.wanted == of_vm
                        && view.vcpu(0)?.disable.is_none()
                        && view.vcpu(1)?.wanted == of_vcpu
                        && view.vcpu(1)?.disable == vcpu,
                    "VM {vm:?}, vCPU {vcpu:?}, allowed {allow}: {view:?}"
                );
            }
        }
        let view = interface::only_vm()?;
        for payload in Payload::EXITS {
            if !supported.contains(payload.exit()) {
                continue;
            }
            rig.start(payload)?;
            {
                let counter = rig.counter()?;
                let passes = [0, 1].map(|id| view.each[id].wanted.contains(payload.exit()));
                rig.check(&counter, payload, &passes)
                    .with_context(|| format!("allowed {allow}: {view:?}"))?;
            }
            rig.stop()?;
        }
        // Now that they have run, they have it.
        let view = rig.settled()?;
        ensure!(view.pending == 0, "{view:?}");
    }
    rig.end()
}

/// What is said of vCPUs that run, that do not, and that never did.
fn states(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let device = Device::open()?;
    let cgroup = Cgroup::new("own")?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    let view = interface::only_vm()?;
    ensure!(
        view.each.iter().all(|vcpu| vcpu.state == IN_FORCE) && view.pending == 0,
        "nothing was changed yet: {view:?}"
    );
    ensure!(device.info()?.holding == 0, "{:?}", device.info()?);

    // One runs, the other one does not.
    rig.start_one(0, Work::gated(Payload::Hlt))?;
    rig.step(&[0], 1)?;
    rig.set(None, Exits::HLT)?;
    rig.step(&[0], 1)?;
    let view = interface::only_vm()?;
    ensure!(
        view.vcpu(0)?.state == IN_FORCE && view.vcpu(0)?.in_force == floor | Exits::HLT,
        "{view:?}"
    );
    ensure!(
        view.vcpu(1)?.state == NEXT_ENTRY && view.vcpu(1)?.wanted == floor | Exits::HLT,
        "{view:?}"
    );
    let info = device.info()?;
    ensure!(
        view.pending == 1 && info.pending == 1 && info.holding == 1,
        "{view:?}, {info:?}"
    );
    ensure!(sysfs::top("pending")? == "1", "sysfs: pending");
    ensure!(sysfs::top("holding")? == "1", "sysfs: holding");

    rig.start_one(1, Work::gated(Payload::Hlt))?;
    rig.step(&[1], 1)?;
    let view = interface::only_vm()?;
    let info = device.info()?;
    ensure!(
        view.vcpu(1)?.state == IN_FORCE && view.pending == 0 && info.pending == 0,
        "{view:?}, {info:?}"
    );

    rig.reset(None)?;
    rig.step(&[0, 1], 1)?;
    rig.settled()?;
    // A worker may have to see that there is nothing left to hold.
    ensure!(
        soon(|| Ok(device.info()?.holding == 0))?,
        "{:?}",
        device.info()?
    );
    rig.stop()?;
    rig.end()
}

/// Nobody waits, and it happens all the same.
fn no_wait(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let directory = cgroup.open()?;
    let device = Device::open()?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    rig.start(Payload::Hlt)?;
    let counter = rig.counter()?;
    for round in 0..20 {
        let on = round % 2 == 0;
        let pending = match round / 2 % 2 {
            0 => {
                let argument = uapi::Override {
                    flags: uapi::NO_WAIT,
                    vm: rig.id,
                    disable: if on { Exits::HLT.bits() } else { 0 },
                    ..Default::default()
                };
                let command = if on { uapi::SET_VM } else { uapi::RESET_VM };
                device.overriding(command, argument)?.pending
            }
            _ => {
                let argument = uapi::Policy {
                    flags: uapi::NO_WAIT | uapi::POLICY_DISABLE,
                    cgroup_fd: std::os::fd::AsRawFd::as_raw_fd(&directory),
                    disable: if on { Exits::HLT.bits() } else { 0 },
                    ..Default::default()
                };
                device.policy(uapi::SET_POLICY, argument)?.pending
            }
        };
        ensure!(pending == 0, "{pending} vCPUs waited for");
        let view = rig.settled()?;
        ensure!(view.effective.contains(Exits::HLT) == on, "{view:?}");
        rig.check_all(&counter, Payload::Hlt, on)
            .with_context(|| format!("round {round}"))?;
    }
    drop(counter);
    rig.stop()?;
    rig.end()
}

/// What can be changed through one interface is what the others show, and what the guest gets.
fn interfaces(vendor: Vendor, other: Exits) -> Result<()> {
    let floor = floor(vendor)?;
    let cgroup = Cgroup::new("own")?;
    let mut rig = Rig::pair(vendor, &cgroup)?;
    let id = rig.id.to_string();
    rig.start(Payload::Hlt)?;
    let counter = rig.counter()?;
    let check = |rig: &mut Rig, passes: [bool; 2], what: &str| -> Result<VmView> {
        rig.check(&counter, Payload::Hlt, &passes)
            .context(what.to_string())?;
        rig.settled()?;
        interface::only_vm().context(what.to_string())
    };
    sysfs::set_override(rig.id, None, Some(Exits::HLT | other))?;
    let view = check(&mut rig, [true, true], "the VM by sysfs")?;
    ensure!(view.effective == floor | Exits::HLT | other, "{view:?}");
    sysfs::set_override(rig.id, Some(1), Some(Exits::NONE))?;
    check(&mut rig, [true, false], "a vCPU by sysfs")?;
    sysfs::set_override(rig.id, Some(1), None)?;
    check(&mut rig, [true, true], "a vCPU inherits, by sysfs")?;
    sysfs::set_override(rig.id, None, None)?;
    let view = check(&mut rig, [false, false], "the VM inherits, by sysfs")?;
    ensure!(view.effective == floor, "{view:?}");

    command::text(&["vm", "set", &id, "--disable", "hlt"])?;
    check(&mut rig, [true, true], "the VM by the command")?;
    command::text(&["vm", "set", &id, "--vcpu", "0", "--disable", "none"])?;
    check(&mut rig, [false, true], "a vCPU by the command")?;
    command::text(&["vm", "reset", &id, "--vcpu", "0"])?;
    check(&mut rig, [true, true], "a vCPU is reset, by the command")?;
    command::text(&["vm", "reset", &id])?;
    check(&mut rig, [false, false], "the VM is reset, by the command")?;

    sysfs::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    check(&mut rig, [true, true], "a policy by sysfs")?;
    let directory = sysfs::policy_directory(&cgroup)?;
    std::fs::write(directory.join("allow"), "none")?;
    check(&mut rig, [false, false], "allow by sysfs")?;
    command::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    check(&mut rig, [true, true], "a policy by the command")?;
    let top = std::path::Path::new(interface::SYSFS);
    std::fs::write(top.join("enabled"), "0")?;
    check(&mut rig, [false, false], "off by sysfs")?;
    command::text(&["on"])?;
    check(&mut rig, [true, true], "on by the command")?;
    command::text(&["off"])?;
    check(&mut rig, [false, false], "off by the command")?;
    std::fs::write(top.join("enabled"), "1")?;
    check(&mut rig, [true, true], "on by sysfs")?;
    std::fs::write(top.join("detach"), cgroup.path())?;
    check(&mut rig, [false, false], "detached by sysfs")?;
    command::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    check(&mut rig, [true, true], "attached by the command")?;
    command::text(&["policy", "clear", &cgroup.path()])?;
    check(&mut rig, [false, false], "cleared by the command")?;
    drop(counter);
    rig.stop()?;
    rig.end()
}

/// A VM whose HLT never exits loses that and gets it again: nothing is refused, whatever its VMM
/// put into the guest's CPUID, as KVM itself took PV_UNHALT out of it.
fn hlt_from_the_start(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    for asked in [true, false] {
        let cgroup = Cgroup::new("own")?;
        if !asked {
            ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
        }
        let make = Make {
            vcpus: 2,
            requested: if asked { Exits::HLT } else { Exits::NONE },
            pv_unhalt: true,
            ..Make::default()
        };
        let mut rig = Rig::new(vendor, &cgroup, make)?;
        rig.start(Payload::Hlt)?;
        let counter = rig.counter()?;
        rig.check_all(&counter, Payload::Hlt, true)?;
        for round in 0..10 {
            ioctl::set_policy(&cgroup, Exits::NONE, !Exits::HLT)?;
            rig.ensure_settled()?;
            rig.check_all(&counter, Payload::Hlt, false)
                .with_context(|| format!("round {round}"))?;
            ensure!(rig.view()?.effective == floor, "{:?}", rig.view()?);
            ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
            rig.ensure_settled()?;
            rig.check_all(&counter, Payload::Hlt, true)
                .with_context(|| format!("round {round}"))?;
            let view = rig.settled()?;
            ensure!(
                view.refused.is_empty() && view.refusal == "none",
                "{view:?}"
            );
        }
        drop(counter);
        rig.stop()?;
        rig.end()?;
    }
    Ok(())
}

/// Fails unless `hlt` is refused, or, on SVM, given, and all interfaces say so.
fn check_refused(rig: &Rig, on_vmx: bool) -> Result<()> {
    let refused = on_vmx && rig.vendor == Vendor::Vmx;
    let view = interface::only_vm()?;
    let (set, reason, number) = if refused {
        (Exits::HLT, "pv_unhalt", uapi::REFUSAL_PV_UNHALT)
    } else {
        (Exits::NONE, "none", uapi::REFUSAL_NONE)
    };
    ensure!(
        view.effective.contains(Exits::HLT) && view.refused == set && view.refusal == reason,
        "{view:?}"
    );
    let device = Device::open()?;
    for vcpu in device.vcpus(rig.id)? {
        ensure!(
            vcpu.refused == set.bits()
                && vcpu.refusal == number
                && vcpu.wanted & Exits::HLT.bits() != 0
                && !(refused && vcpu.in_force & Exits::HLT.bits() != 0),
            "{vcpu:?}"
        );
    }
    // What is not given needs no giving back.
    let expected = u64::from(!refused);
    ensure!(
        soon(|| Ok(device.info()?.holding == expected))?,
        "{:?}, {:?}, {view:?}",
        device.info()?,
        device.vcpus(rig.id)?
    );
    Ok(())
}

/// A guest that was told of PV_UNHALT cannot be given HLT on Intel, by any way.
fn told_when_run(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let make = Make {
        vcpus: 2,
        pv_unhalt: true,
        ..Make::default()
    };
    let mut rig = Rig::new(vendor, &cgroup, make)?;
    // One vCPU that was told is enough.
    rig.start_one(0, Work::gated(Payload::Hlt))?;
    rig.step(&[0], 1)?;
    let passes = vendor == Vendor::Svm;

    ioctl::set_override(rig.id, None, Exits::HLT)?;
    check_refused(&rig, true).context("by the VM's override")?;
    rig.start_one(1, Work::gated(Payload::Hlt))?;
    let counter = rig.counter()?;
    rig.check_all(&counter, Payload::Hlt, passes)?;
    ioctl::reset_override(rig.id, None)?;
    rig.check_all(&counter, Payload::Hlt, false)?;
    let view = rig.settled()?;
    ensure!(
        view.refused.is_empty() && view.refusal == "none",
        "{view:?}"
    );

    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    rig.check_all(&counter, Payload::Hlt, passes)?;
    check_refused(&rig, true).context("by policy")?;
    ioctl::clear_policy(&cgroup)?;
    rig.check_all(&counter, Payload::Hlt, false)?;

    for vcpu in [0, 1] {
        ioctl::set_override(rig.id, Some(vcpu), Exits::HLT)?;
    }
    rig.check_all(&counter, Payload::Hlt, passes)?;
    for vcpu in Device::open()?.vcpus(rig.id)? {
        let refused = if passes { Exits::NONE } else { Exits::HLT };
        ensure!(vcpu.refused == refused.bits(), "{vcpu:?}");
    }
    // Other exits are given along with it.
    let others = changeable(vendor)?;
    ioctl::set_override(rig.id, None, others)?;
    for vcpu in [0, 1] {
        ioctl::reset_override(rig.id, Some(vcpu))?;
    }
    rig.check_all(&counter, Payload::Hlt, passes)?;
    drop(counter);
    rig.stop()?;
    let in_force = if passes { others } else { others & !Exits::HLT };
    rig.check_each(floor(vendor)? | in_force)?;
    rig.end()
}

/// Until its guest runs, a VMM may tell it something else.
fn told_before_it_ran(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let make = Make {
        vcpus: 2,
        pv_unhalt: true,
        ..Make::default()
    };
    // Not told anything yet: HLT is given, and KVM takes PV_UNHALT out of what the VMM tells then.
    let mut rig = Rig::new(vendor, &cgroup, make)?;
    ioctl::set_override(rig.id, None, Exits::HLT)?;
    rig.start(Payload::Hlt)?;
    {
        let counter = rig.counter()?;
        rig.check_all(&counter, Payload::Hlt, true)?;
    }
    check_refused(&rig, false).context("given before CPUID was made")?;
    rig.stop()?;
    rig.end()?;

    let mut rig = Rig::new(vendor, &cgroup, make)?;
    for vcpu in rig.vcpus.clone() {
        rig.vmm.act(vcpu, Action::SetCpuid)?;
    }
    ioctl::set_override(rig.id, None, Exits::HLT)?;
    if vendor == Vendor::Vmx {
        check_refused(&rig, true).context("told of it")?;
    }
    rig.vmm.hide_pv_unhalt(rig.vm)?;
    for vcpu in rig.vcpus.clone() {
        rig.vmm.act(vcpu, Action::SetCpuid)?;
    }
    // It is looked at when something is decided.
    rig.set(None, Exits::HLT)?;
    rig.start(Payload::Hlt)?;
    {
        let counter = rig.counter()?;
        rig.check_all(&counter, Payload::Hlt, true)?;
    }
    check_refused(&rig, false).context("told otherwise")?;
    rig.stop()?;
    rig.end()
}
