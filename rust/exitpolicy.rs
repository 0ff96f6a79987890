// SPDX-License-Identifier: GPL-2.0

//! Disables KVM exits per cgroup, by the host's administrator, for VMMs that know nothing of it.
//!
//! `Documentation/design.md` has the architecture. In short, from the outside in: `interface` is
//! what is seen from outside, `admin` what an administrator can do, `engine` what happens to a new
//! VM and `live` to one that runs, `hooks` where it happens, `host` and `vendor` which KVM it
//! happens to; `policy` is the pure algebra, `store` and `vm` are what is remembered, and
//! `kernel_ext` and `bindings` hold what is unsafe.

mod admin;
mod adopt;
mod bindings;
mod build_id;
mod cpuid;
mod engine;
mod hooks;
mod host;
mod interface;
mod kernel_ext;
mod kvm;
mod live;
#[allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "user space compiles the same files, as a crate, and uses more of them"
)]
mod policy;
mod probe;
mod store;
mod vendor;
mod vm;

use admin::Admin;
use engine::Engine;
use host::{
    Host,
    HostEvents, //
};
use interface::{
    chardev::Chardev,
    sysfs::root::Sysfs, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};
use kernel_ext::{
    cgroup::CgroupWatch,
    module_notifier::ModuleNotifier, //
};

/// For the kernel's own formatting macros.
impl kernel::fmt::Display for policy::Exits {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

#[cfg(CONFIG_PREEMPT_RT)]
compile_error!("hooks allocate memory with preemption disabled, which PREEMPT_RT forbids");

module! {
    type: ExitPolicy,
    name: "kvm_exitpolicy",
    authors: ["The exitpolicy developers"],
    description: "KVM exits per cgroup, by the host's administrator",
    license: "GPL",
}

/// The loaded module.
///
/// Field order is drop order. First nobody can give orders any more, then nothing happens any
/// more, then nobody is at work. No VM has anything from us by then: it would hold the module.
struct ExitPolicy {
    _chardev: Pin<KBox<Chardev>>,
    _sysfs: Sysfs,
    _notifier: Pin<KBox<ModuleNotifier<HostEvents>>>,
    _host: Arc<Host>,
    _watch: CgroupWatch<Admin>,
    _settled: Settled,
}

/// Waits for the worker when it is dropped.
struct Settled(Arc<Admin>);

impl Drop for Settled {
    fn drop(&mut self) {
        self.0.settle();
    }
}

impl kernel::Module for ExitPolicy {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        // The other way round than the fields are dropped, so that what was made is dropped in the
        // right order if something fails.
        kvm::check_layouts()?;
        let engine = Arc::pin_init(Engine::new(), GFP_KERNEL)?;
        let admin = Admin::new(engine)?;
        let settled = Settled(admin.clone());
        let watch = CgroupWatch::new(admin.clone()).inspect_err(|error| {
            pr_err!("cannot watch the tracepoints of cgroups: {:?}\n", *error);
        })?;
        let host = Arc::pin_init(Host::new(admin.clone()), GFP_KERNEL)?;
        let events = HostEvents(host.clone());
        let notifier = KBox::try_pin_init(ModuleNotifier::register(events), GFP_KERNEL)?;
        // From here on a vendor module that comes is hooked; this is for one that is there.
        host.attach(None)?;
        let sysfs = Sysfs::new(&admin)?;
        let chardev = KBox::try_pin_init(Chardev::new(admin), GFP_KERNEL)?;
        Ok(Self {
            _chardev: chardev,
            _sysfs: sysfs,
            _notifier: notifier,
            _host: host,
            _watch: watch,
            _settled: settled,
        })
    }
}
