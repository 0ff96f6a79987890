// SPDX-License-Identifier: GPL-2.0

//! Every exit in every situation: what the VM gets, what its guest sees, and what is said of it.

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use testing::{
    cgroup::Cgroup,
    client::{
        Counted,
        Thread,
        Vmm, //
    },
    exits::Vendor,
    interface::{
        self,
        command,
        ioctl,
        sysfs,
        VcpuView,
        VmView, //
    },
    payload::Payload,
    uapi::Device,
    vmm::Vm, //
};

use crate::Test;

/// How often a guest executes what it is about. A pause filter lets many a PAUSE pass.
fn executions(payload: Payload) -> u32 {
    if payload == Payload::Pause {
        60_000
    } else {
        1_000
    }
}

/// Where the policies are, and who sets them.
#[derive(Clone, Copy, Debug)]
enum Situation {
    /// Neither policy nor wish.
    NoPolicy,
    /// The VMM's cgroup disables the exit. By ioctl.
    OwnPolicy,
    /// The cgroup above does, and the VMM's own has no policy. By sysfs.
    Inherited,
    /// The VMM's cgroup disables it, and the one above does not allow it. By the command.
    Narrowed,
    /// The VMM asks for it.
    AskedFor,
    /// The VMM asks for it, and the cgroup above does not allow it.
    Clamped,
}

impl Situation {
    const ALL: [(Self, &'static str); 6] = [
        (Self::NoPolicy, "no_policy"),
        (Self::OwnPolicy, "own_policy"),
        (Self::Inherited, "inherited"),
        (Self::Narrowed, "narrowed"),
        (Self::AskedFor, "asked_for"),
        (Self::Clamped, "clamped"),
    ];
}

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let supported = supported(vendor)?;
    let mut tests = vec![Test::new("matrix::supported", move || {
        supported_is_what_kvm_says(vendor)
    })];
    for payload in Payload::EXITS {
        let exit = payload.exit();
        for (situation, name) in Situation::ALL {
            let test = Test::new(format!("matrix::{exit}::{name}"), move || {
                check(vendor, payload, situation)
            });
            tests.push(test.ignored(!supported.contains(exit)));
        }
    }
    tests.push(Test::new("matrix::all_disabled", move || {
        all_at_once(vendor, Exits::ALL)
    }));
    tests.push(Test::new("matrix::all_but_hlt_disabled", move || {
        all_at_once(vendor, !Exits::HLT)
    }));
    tests.push(
        Test::new("matrix::cstate_is_nothing_on_svm", move || {
            cstate_is_nothing_on_svm(vendor)
        })
        .ignored(vendor != Vendor::Svm),
    );
    Ok(tests)
}

/// What KVM says it can disable, less what it accepts and does not do.
pub fn supported(vendor: Vendor) -> Result<Exits> {
    let by_kvm = Vm::supported()?;
    Ok(match vendor {
        Vendor::Svm => by_kvm & !Exits::CSTATE,
        Vendor::Vmx => by_kvm,
    })
}

/// What KVM itself disables, told by its parameters rather than by the module.
pub fn floor(vendor: Vendor) -> Result<Exits> {
    let parameter = match vendor {
        Vendor::Svm => "/sys/module/kvm_amd/parameters/pause_filter_count",
        Vendor::Vmx => "/sys/module/kvm_intel/parameters/ple_gap",
    };
    Ok(if interface::read(parameter)? == "0" {
        Exits::PAUSE
    } else {
        Exits::NONE
    })
}

fn supported_is_what_kvm_says(vendor: Vendor) -> Result<()> {
    let expected = supported(vendor)?;
    let info = Device::open()?.info()?;
    ensure!(
        info.supported == expected.bits(),
        "supported {:#x}, should be {expected}",
        info.supported
    );
    ensure!(
        info.floor == floor(vendor)?.bits(),
        "floor {:#x}, should be {}",
        info.floor,
        floor(vendor)?
    );
    let by_sysfs: Exits = sysfs::top("supported")?.parse()?;
    ensure!(by_sysfs == expected, "sysfs says {by_sysfs}");
    ensure!(sysfs::top("vendor")? == vendor.name(), "sysfs: vendor");
    let floor_by_sysfs: Exits = sysfs::top("floor")?.parse()?;
    ensure!(floor_by_sysfs == floor(vendor)?, "sysfs: {floor_by_sysfs}");
    Ok(())
}

fn check(vendor: Vendor, payload: Payload, situation: Situation) -> Result<()> {
    let exit = payload.exit();
    let floor = floor(vendor)?;
    let above = Cgroup::new("above")?;
    let own = above.child("own")?;

    let (mut requested, mut disabled, mut allow) = (Exits::NONE, Exits::NONE, Exits::ALL);
    match situation {
        Situation::NoPolicy => (),
        Situation::OwnPolicy => {
            disabled = exit;
            ioctl::set_policy(&own, exit, Exits::ALL)?;
        }
        Situation::Inherited => {
            disabled = exit;
            sysfs::set_policy(&above, exit, Exits::ALL)?;
        }
        Situation::Narrowed => {
            disabled = exit;
            allow = !exit;
            command::set_policy(&above, Exits::NONE, allow)?;
            command::set_policy(&own, exit, Exits::ALL)?;
        }
        Situation::AskedFor => requested = exit,
        Situation::Clamped => {
            requested = exit;
            allow = !exit;
            ioctl::set_policy(&above, Exits::NONE, allow)?;
        }
    }
    let effective = floor | ((requested | disabled) & allow);
    let clamped = requested & !allow & !floor;
    let clamps = Device::open()?.info()?.clamps;

    let mut vmm = Vmm::start(&own)?;
    let vm = vmm.create_vm()?;
    if !requested.is_empty() {
        vmm.disable_exits(vm, requested)?;
    }
    let vcpu = vmm.create_vcpu(vm, 0)?;
    let view = interface::only_vm()?;
    // In KVM's flags, a wish for what is in the floor leaves no trace.
    let requested = requested & !floor;
    let expected = VmView {
        id: view.id,
        pid: vmm.pid(),
        cgroup: own.path(),
        vcpus: 1,
        floor,
        requested,
        effective,
        clamped,
        disable: None,
        refused: Exits::NONE,
        refusal: "none".to_string(),
        pending: 0,
        adopted: false,
        each: vec![VcpuView::settled(0, effective)],
    };
    ensure!(
        view == expected,
        "the module says {view:?},\nshould say {expected:?}"
    );
    let info = Device::open()?.info()?;
    ensure!(
        info.clamps - clamps == u64::from(!clamped.is_empty()),
        "clamps went from {clamps} to {}",
        info.clamps
    );
    ensure!(info.missed == 0, "missed: {}", info.missed);

    check_guest(vendor, &mut vmm, vcpu, payload, effective)?;
    vmm.close(vm)?;
    vmm.kill()
}

/// Runs the guest, and compares what it took and saw with what should be disabled.
pub fn check_guest(
    vendor: Vendor,
    vmm: &mut Vmm,
    vcpu: Thread,
    payload: Payload,
    effective: Exits,
) -> Result<()> {
    let counted = check_exits_of(vendor, vmm, vcpu, payload, effective)?;
    // KVM takes the feature from the guest exactly when HLT does not exit: a lock's waiter that
    // halted natively would miss the kick.
    ensure!(
        counted.report.pv_unhalt != effective.contains(Exits::HLT),
        "the guest's CPUID has PV_UNHALT: {}, with {effective} disabled",
        counted.report.pv_unhalt
    );
    Ok(())
}

/// The same without the guest's CPUID, which is made once and tells of the VM's first days.
pub fn check_exits_of(
    vendor: Vendor,
    vmm: &mut Vmm,
    vcpu: Thread,
    payload: Payload,
    effective: Exits,
) -> Result<Counted> {
    let counted = vmm.count(vcpu, payload, executions(payload))?;
    check_exits(vendor, payload, &counted, effective)
        .with_context(|| format!("{payload:?} with {effective} disabled: {counted:?}"))?;
    Ok(counted)
}

fn check_exits(
    vendor: Vendor,
    payload: Payload,
    counted: &Counted,
    effective: Exits,
) -> Result<()> {
    let count = u64::from(executions(payload));
    let exits = counted.exits.of(vendor, payload);
    // On SVM, KVM has no code for it.
    let nothing = vendor == Vendor::Svm && payload == Payload::Cstate;
    let passed_through = effective.contains(payload.exit()) && !nothing;
    match payload {
        _ if passed_through => ensure!(
            exits.iter().all(|exits| *exits == 0),
            "{exits:?} exits, should be none"
        ),
        Payload::Pause => ensure!(
            (1..=count).contains(&exits[0]),
            "{exits:?} exits in {count} executions, should be at least one"
        ),
        _ => ensure!(
            exits.iter().all(|exits| *exits == count),
            "{exits:?} exits, should be {count}"
        ),
    }
    if payload == Payload::Hlt {
        ensure!(
            counted.report.halt_exits == exits[0],
            "halt_exits grew by {}, and kvm_exit was hit {} times",
            counted.report.halt_exits,
            exits[0]
        );
    }
    Ok(())
}

/// One VM with several exits disabled runs every payload.
fn all_at_once(vendor: Vendor, disable: Exits) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, disable, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    let effective = floor(vendor)? | (disable & supported(vendor)?);
    let view = interface::only_vm()?;
    ensure!(view.effective == effective, "effective: {}", view.effective);
    for payload in Payload::EXITS {
        check_guest(vendor, &mut vmm, vcpu, payload, effective)?;
    }
    Ok(())
}

/// A policy cannot give what KVM does not have. A VMM that asks gets KVM's empty promise.
fn cstate_is_nothing_on_svm(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::CSTATE, Exits::ALL)?;
    for requested in [Exits::NONE, Exits::CSTATE] {
        let mut vmm = Vmm::start(&cgroup)?;
        let vm = vmm.create_vm()?;
        if !requested.is_empty() {
            vmm.disable_exits(vm, requested)?;
        }
        let vcpu = vmm.create_vcpu(vm, 0)?;
        let view = interface::only_vm()?;
        ensure!(
            view.requested == requested && view.effective == floor | requested,
            "{view:?}"
        );
        check_guest(vendor, &mut vmm, vcpu, Payload::Cstate, view.effective)?;
        vmm.close(vm)?;
        vmm.kill()?;
        interface::ensure_no_vms()?;
    }
    Ok(())
}
