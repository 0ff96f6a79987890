// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/exitpolicy`. Each file is described in
//! `Documentation/ABI/testing/sysfs-kernel-exitpolicy`.

use crate::{
    admin::Admin,
    engine::Engine,
    kernel_ext::{
        capability::require_sys_admin,
        cgroup::{
            all_visible,
            Cgroup,
            CgroupRef, //
        },
        kobject::{
            Attribute,
            Attributes,
            Directory,
            Output,
            Parent, //
        },
    },
    policy::{
        Exits,
        Policy, //
    },
    vm::Record, //
};
use kernel::{
    bindings,
    fmt::Write,
    prelude::*,
    sync::Arc, //
};

/// The whole of it. Field order is drop order: what is below goes first.
pub(crate) struct Sysfs {
    _published: Published,
    _root: Pin<KBox<Directory<RootFiles>>>,
}

/// Evidence that [`Admin::publish`] was called, and the promise to take it back.
struct Published(Arc<Admin>);

impl Drop for Published {
    fn drop(&mut self) {
        self.0.unpublish();
    }
}

impl Sysfs {
    pub(crate) fn new(admin: &Arc<Admin>) -> Result<Self> {
        let root = Directory::new(
            fmt!("exitpolicy"),
            Parent::<()>::Kernel,
            RootFiles(admin.clone()),
        )?;
        let cgroups = Directory::new(fmt!("cgroups"), Parent::Directory(&root), ())?;
        let vms = Directory::new(fmt!("vms"), Parent::Directory(&root), ())?;
        Admin::publish(admin, cgroups, vms);
        Ok(Self {
            _published: Published(admin.clone()),
            _root: root,
        })
    }
}

/// Writes what [`Display`](kernel::fmt::Display) makes of a value.
fn show(out: &mut Output<'_>, value: impl kernel::fmt::Display) -> Result {
    out.write_fmt(fmt!("{}", value)).map_err(|_| ENOSPC)
}

fn parse(text: &[u8]) -> Result<Exits> {
    let text = core::str::from_utf8(text).map_err(|_| EINVAL)?;
    text.parse().map_err(|_| EINVAL)
}

/// Writes a cgroup's path as the reader's cgroup namespace has it, or `removed`, or `hidden` if it
/// is outside of that namespace or removed.
fn show_path(out: &mut Output<'_>, cgroup: u64) -> Result {
    match Cgroup::from_id(cgroup) {
        Ok(cgroup) => {
            let mut buffer = KVec::from_elem(0, bindings::PATH_MAX as usize, GFP_KERNEL)?;
            out.write_bytes(cgroup.path(&mut buffer)?.to_bytes())
        }
        Err(ENOENT) if all_visible() => out.write_bytes(b"removed"),
        Err(ENOENT) => out.write_bytes(b"hidden"),
        Err(error) => Err(error),
    }
}

/// The files of `/sys/kernel/exitpolicy` itself.
struct RootFiles(Arc<Admin>);

impl RootFiles {
    fn engine(&self) -> &Engine {
        self.0.engine()
    }

    fn cgroup_at(path: &[u8]) -> Result<CgroupRef> {
        // Paths are those of /proc/PID/cgroup, which begin with a slash.
        if !path.starts_with(b"/") {
            return Err(EINVAL);
        }
        let mut bytes = KVec::with_capacity(path.len() + 1, GFP_KERNEL)?;
        bytes.extend_from_slice(path, GFP_KERNEL)?;
        bytes.push(0, GFP_KERNEL)?;
        Cgroup::from_path(CStr::from_bytes_with_nul(&bytes).map_err(|_| EINVAL)?)
    }
}

impl Attributes for RootFiles {
    const ATTRIBUTES: &'static [Attribute<Self>] = &[
        Attribute::public(c"vendor", |root: &Self, out| {
            show(
                out,
                root.engine().facts().map_or("none", |it| it.vendor.name()),
            )
        }),
        Attribute::public(c"supported", |root: &Self, out| {
            show(
                out,
                root.engine().facts().map_or(Exits::NONE, |it| it.supported),
            )
        }),
        Attribute::public(c"floor", |root: &Self, out| {
            show(
                out,
                root.engine().facts().map_or(Exits::NONE, |it| it.floor),
            )
        }),
        Attribute::public(c"enabled", |root: &Self, out| {
            show(out, u8::from(root.engine().enabled()))
        })
        .writable(|root: &Self, text| {
            require_sys_admin()?;
            let enabled = match text {
                b"1" => true,
                b"0" => false,
                _ => return Err(EINVAL),
            };
            root.engine().set_enabled(enabled);
            Ok(())
        }),
        Attribute::public(c"missed", |root: &Self, out| {
            show(out, root.engine().missed())
        }),
        Attribute::public(c"clamps", |root: &Self, out| {
            show(out, root.engine().clamps())
        }),
        Attribute::write_only(c"attach", |root: &Self, path| {
            require_sys_admin()?;
            let cgroup = Self::cgroup_at(path)?;
            root.0.attach(&cgroup)
        }),
        Attribute::write_only(c"detach", |root: &Self, path| {
            require_sys_admin()?;
            root.0.clear_policy(Self::cgroup_at(path)?.id())
        }),
    ];
}

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
