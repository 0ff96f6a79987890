// SPDX-License-Identifier: GPL-2.0

//! The directory itself.

use super::show;
use crate::{
    admin::{
        Admin,
        How, //
    },
    engine::Engine,
    kernel_ext::{
        capability::require_sys_admin,
        cgroup::{
            Cgroup,
            CgroupRef, //
        },
        kobject::{
            Attribute,
            Attributes,
            Directory,
            Parent, //
        },
    },
    policy::Exits, //
};
use kernel::{
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
        // Names alone tell how many VMs others have, and how large; and who has a directory open
        // can list it for ever. So nobody gets near these before their mode is right.
        Parent::<()>::Kernel.set_mode(c"exitpolicy", 0o700)?;
        let cgroups = Directory::new(fmt!("cgroups"), Parent::Directory(&root), ())?;
        let vms = Directory::new(fmt!("vms"), Parent::Directory(&root), ())?;
        Parent::Directory(&root).set_mode(c"cgroups", 0o700)?;
        Parent::Directory(&root).set_mode(c"vms", 0o700)?;
        Parent::<()>::Kernel.set_mode(c"exitpolicy", 0o755)?;
        Admin::publish(admin, cgroups, vms);
        Ok(Self {
            _published: Published(admin.clone()),
            _root: root,
        })
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
        Cgroup::from_path(path)
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
            root.0.set_enabled(enabled, How::LIVE);
            Ok(())
        }),
        Attribute::private(c"missed", |root: &Self, out| {
            show(out, root.engine().missed())
        }),
        Attribute::private(c"clamps", |root: &Self, out| {
            show(out, root.engine().clamps())
        }),
        Attribute::private(c"pending", |root: &Self, out| {
            show(out, root.engine().on_their_way().0)
        }),
        Attribute::private(c"holding", |root: &Self, out| {
            show(out, root.engine().on_their_way().1)
        }),
        Attribute::write_only(c"attach", |root: &Self, path| {
            require_sys_admin()?;
            let cgroup = Self::cgroup_at(path)?;
            Admin::attach(&root.0, &cgroup, How::LIVE)
        }),
        Attribute::write_only(c"detach", |root: &Self, path| {
            require_sys_admin()?;
            let cgroup = Self::cgroup_at(path)?.id();
            root.0.clear_policy(cgroup, How::LIVE).map(|_| ())
        }),
    ];
}
