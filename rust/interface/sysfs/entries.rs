// SPDX-License-Identifier: GPL-2.0

//! What is below `cgroups` and `vms`.

use super::{
    parse,
    show,
    show_path, //
};
use crate::{
    admin::{
        Admin,
        How, //
    },
    kernel_ext::{
        capability::require_sys_admin,
        kobject::{
            Attribute,
            Attributes,
            Output, //
        },
    },
    kvm,
    policy::{
        Exits,
        Policy, //
    },
    vm::{
        Vcpu,
        Vm, //
    },
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// The files of `cgroups/<id>`.
pub(crate) struct PolicyFiles {
    admin: Arc<Admin>,
    cgroup: u64,
}

impl PolicyFiles {
    pub(crate) fn new(admin: Arc<Admin>, cgroup: u64) -> Self {
        Self { admin, cgroup }
    }

    fn policy(&self) -> Result<Policy> {
        self.admin.engine().store.get(self.cgroup).ok_or(ENODEV)
    }

    fn change(&self, disable: Option<Exits>, allow: Option<Exits>) -> Result {
        require_sys_admin()?;
        self.admin
            .change_policy(self.cgroup, disable, allow, How::LIVE)
    }
}

impl Attributes for PolicyFiles {
    const ATTRIBUTES: &'static [Attribute<Self>] = &[
        Attribute::private(c"path", |this: &Self, out| show_path(out, this.cgroup)),
        Attribute::private(c"disable", |this: &Self, out| {
            show(out, this.policy()?.disable)
        })
        .writable(|this: &Self, text| this.change(Some(parse(text)?), None)),
        Attribute::private(c"allow", |this: &Self, out| show(out, this.policy()?.allow))
            .writable(|this: &Self, text| this.change(None, Some(parse(text)?))),
    ];
}

/// An override, or how to say that there is none.
const INHERIT: &str = "inherit";

fn show_override(out: &mut Output<'_>, disable: Option<Exits>) -> Result {
    match disable {
        Some(disable) => show(out, disable),
        None => show(out, INHERIT),
    }
}

fn parse_override(text: &[u8]) -> Result<Option<Exits>> {
    if text.trim_ascii() == INHERIT.as_bytes() {
        Ok(None)
    } else {
        parse(text).map(Some)
    }
}

/// The files of `vms/<id>`.
pub(crate) struct VmFiles {
    admin: Arc<Admin>,
    id: u64,
}

impl VmFiles {
    pub(crate) fn new(admin: Arc<Admin>, id: u64) -> Self {
        Self { admin, id }
    }

    fn get<R>(&self, get: impl FnOnce(&Vm, Option<kvm::Vm<'_>>) -> R) -> Result<R> {
        let engine = self.admin.engine();
        engine.check_hooks();
        engine
            .vms
            .with(self.id, |vm, kvm| get(vm, kvm))
            .ok_or(ENODEV)
    }

    fn set_override(&self, vcpu: Option<u32>, text: &[u8]) -> Result {
        require_sys_admin()?;
        let disable = parse_override(text)?;
        match self.admin.set_override(self.id, vcpu, disable, How::LIVE) {
            Err(ENOENT) => Err(ENODEV),
            result => result.map(|_| ()),
        }
    }
}

impl Attributes for VmFiles {
    const ATTRIBUTES: &'static [Attribute<Self>] = &[
        Attribute::private(c"pid", |vm: &Self, out| show(out, vm.get(|vm, _| vm.pid)?)),
        Attribute::private(c"cgroup", |vm: &Self, out| {
            show_path(out, vm.get(|vm, _| vm.cgroup)?)
        }),
        Attribute::private(c"adopted", |vm: &Self, out| {
            show(out, u8::from(vm.get(|vm, _| vm.adopted)?))
        }),
        Attribute::private(c"floor", |vm: &Self, out| {
            show(out, vm.get(|vm, _| vm.floor)?)
        }),
        Attribute::private(c"requested", |vm: &Self, out| {
            show(out, vm.get(|vm, _| vm.requested)?)
        }),
        Attribute::private(c"effective", |vm: &Self, out| {
            show(out, vm.get(|vm, _| vm.decision.effective)?)
        }),
        Attribute::private(c"clamped", |vm: &Self, out| {
            show(out, vm.get(|vm, _| vm.decision.clamped)?)
        }),
        Attribute::private(c"disable", |vm: &Self, out| {
            show_override(out, vm.get(|vm, _| vm.disable)?)
        })
        .writable(|vm: &Self, text| vm.set_override(None, text)),
        Attribute::private(c"refused", |vm: &Self, out| {
            show(out, vm.get(|vm, _| vm.refused())?)
        }),
        Attribute::private(c"refusal", |vm: &Self, out| {
            show(out, vm.get(|vm, _| vm.shown_refusal().name())?)
        }),
        Attribute::private(c"pending", |vm: &Self, out| show(out, vm.get(Vm::pending)?)),
        Attribute::private(c"vcpus", |vm: &Self, out| {
            show(out, vm.get(|vm, _| vm.vcpus.len())?)
        }),
    ];
}

/// The files of `vms/<id>/vcpu<N>`.
pub(crate) struct VcpuFiles {
    vm: VmFiles,
    id: u32,
}

impl VcpuFiles {
    pub(crate) fn new(admin: Arc<Admin>, vm: u64, id: u32) -> Self {
        Self {
            vm: VmFiles::new(admin, vm),
            id,
        }
    }

    fn get<R>(&self, get: impl FnOnce(&Vm, Option<kvm::Vm<'_>>, usize, &Vcpu) -> R) -> Result<R> {
        self.vm
            .get(|vm, kvm| {
                let index = vm.vcpus.iter().position(|vcpu| vcpu.id == self.id)?;
                Some(get(vm, kvm, index, vm.vcpus.get(index)?))
            })?
            .ok_or(ENODEV)
    }
}

impl Attributes for VcpuFiles {
    const ATTRIBUTES: &'static [Attribute<Self>] = &[
        Attribute::private(c"disable", |vcpu: &Self, out| {
            show_override(out, vcpu.get(|_, _, _, vcpu| vcpu.disable)?)
        })
        .writable(|vcpu: &Self, text| vcpu.vm.set_override(Some(vcpu.id), text)),
        Attribute::private(c"wanted", |vcpu: &Self, out| {
            show(out, vcpu.get(|_, _, _, vcpu| vcpu.wanted)?)
        }),
        Attribute::private(c"in_force", |vcpu: &Self, out| {
            show(out, vcpu.get(|_, _, _, vcpu| vcpu.in_force)?)
        }),
        Attribute::private(c"state", |vcpu: &Self, out| {
            let progress = vcpu.get(|vm, kvm, index, _| vm.progress(kvm, index))?;
            show(out, progress.name())
        }),
    ];
}
