// SPDX-License-Identifier: GPL-2.0

//! What is below `cgroups` and `vms`.

use super::{
    parse,
    show,
    show_path, //
};
use crate::{
    engine::Engine,
    kernel_ext::{
        capability::require_sys_admin,
        kobject::{
            Attribute,
            Attributes, //
        },
    },
    policy::{
        Exits,
        Policy, //
    },
    vm::Record, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// The files of `cgroups/<id>`.
pub(crate) struct PolicyFiles {
    engine: Arc<Engine>,
    cgroup: u64,
}

impl PolicyFiles {
    pub(crate) fn new(engine: Arc<Engine>, cgroup: u64) -> Self {
        Self { engine, cgroup }
    }

    fn policy(&self) -> Result<Policy> {
        self.engine.store.get(self.cgroup).ok_or(ENODEV)
    }

    fn change(&self, disable: Option<Exits>, allow: Option<Exits>) -> Result {
        require_sys_admin()?;
        self.engine
            .store
            .change(self.cgroup, disable, allow)
            .map(|_| ())
            .ok_or(ENODEV)
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

/// The files of `vms/<id>`.
pub(crate) struct VmFiles {
    engine: Arc<Engine>,
    id: u64,
}

impl VmFiles {
    pub(crate) fn new(engine: Arc<Engine>, id: u64) -> Self {
        Self { engine, id }
    }

    fn record(&self) -> Result<Record> {
        self.engine.vms.get(self.id).ok_or(ENODEV)
    }
}

impl Attributes for VmFiles {
    const ATTRIBUTES: &'static [Attribute<Self>] = &[
        Attribute::private(c"pid", |vm: &Self, out| show(out, vm.record()?.pid)),
        Attribute::private(c"cgroup", |vm: &Self, out| {
            show_path(out, vm.record()?.cgroup)
        }),
        Attribute::private(c"floor", |vm: &Self, out| show(out, vm.record()?.floor)),
        Attribute::private(c"requested", |vm: &Self, out| {
            show(out, vm.record()?.requested)
        }),
        Attribute::private(c"effective", |vm: &Self, out| {
            show(out, vm.record()?.effective)
        }),
        Attribute::private(c"clamped", |vm: &Self, out| show(out, vm.record()?.clamped)),
        Attribute::private(c"vcpus", |vm: &Self, out| show(out, vm.record()?.vcpus)),
    ];
}
