// SPDX-License-Identifier: GPL-2.0

//! Which vendor module is in use, and when it comes and goes.

use crate::{
    admin::Admin,
    adopt::adopt_open_vms,
    bindings,
    build_id::{
        self,
        Image, //
    },
    engine::Facts,
    hooks::Hooks,
    kernel_ext::{
        file::OwnedFile,
        function,
        module_notifier::ModuleEvents, //
    },
    kvm::DevKvm,
    vendor::{
        Vendor,
        VENDORS, //
    },
};
use core::sync::atomic::Ordering;
use kernel::{
    bindings as kernel_bindings, new_mutex,
    prelude::*,
    str::CString,
    sync::{
        Arc,
        Mutex, //
    },
};

/// The vendor module in use, with the hooks on it.
#[pin_data(PinnedDrop)]
pub(crate) struct Host {
    admin: Arc<Admin>,
    /// Held while hooks are made and removed, so that one vendor module that comes and one that
    /// goes do not meet.
    #[pin]
    attached: Mutex<Option<Attached>>,
}

/// Field order is drop order.
struct Attached {
    vendor: &'static dyn Vendor,
    _hooks: Hooks,
    _closed: Closed,
}

impl Host {
    pub(crate) fn new(admin: Arc<Admin>) -> impl PinInit<Self> {
        pin_init!(Self {
            admin,
            attached <- new_mutex!(None, "exitpolicy_host"),
        })
    }

    /// Hooks the vendor module that is loaded, if there is one; one that is yet to be ready comes
    /// with the notifier.
    ///
    /// `loaded` is a vendor whose module is known to be; then it is an error not to find it. To be
    /// called in a task with an address space. An error is one that the log explains; nothing is
    /// hooked then.
    pub(crate) fn attach(&self, loaded: Option<&dyn Vendor>) -> Result {
        let mut uncalled = None;
        for vendor in VENDORS {
            let Some(image) = build_id::find(vendor.module())? else {
                continue;
            };
            // Before the lock: opening it may load a module, whose notifier wants the lock. While
            // it is open, the vendor module stays, and KVM with it.
            let kvm = match DevKvm::open() {
                Ok(kvm) => kvm,
                // What is built in need not have found its CPU.
                Err(ENOENT | ENODEV | ENXIO) if image == Image::Kernel => continue,
                Err(error) => {
                    pr_err!(
                        "{} is loaded, but /dev/kvm cannot be opened: {:?}\n",
                        vendor.module(),
                        error
                    );
                    return Err(error);
                }
            };
            // Of what stays, and before anything is hooked: a hook reads structures.
            build_id::check(vendor.module(), image)?;
            let kvm_image = build_id::find(c"kvm")?.unwrap_or(image);
            build_id::check(c"kvm", kvm_image)?;
            if self.attach_to(vendor, &kvm)? {
                return Ok(());
            }
            // Both may be built in; then one of them is never called.
            uncalled = Some(vendor);
        }
        match (uncalled, loaded) {
            (None, None) => Ok(()),
            (Some(vendor), _) => {
                let functions = vendor.functions();
                pr_err!(
                    "{}, {} or {} was not called when a VM was made and removed\n",
                    functions.vcpu_create,
                    functions.vcpu_free,
                    functions.vm_destroy
                );
                Err(ENOEXEC)
            }
            (None, Some(vendor)) => {
                pr_err!(
                    "{} is loaded, but not to be found in /sys\n",
                    vendor.module()
                );
                Err(ENOENT)
            }
        }
    }

    /// Hooks one vendor module. Returns whether the hooks fire; if not, nothing is hooked.
    fn attach_to(&self, vendor: &'static dyn Vendor, kvm: &DevKvm) -> Result<bool> {
        let mut attached = self.attached.lock();
        if attached.is_some() {
            return Ok(true);
        }
        let engine = self.admin.engine();
        let supported = vendor.supported(kvm.accepted_exits()?);
        let closed = Closed::find(vendor)?;
        read_parameters(vendor)?;
        let hooks = Hooks::register(vendor, &self.admin)?;
        let probe = &engine.probe;
        let looked = probe
            .run(vendor, || kvm.make_throw_away_vm(|vm| probe.expect(vm)))
            .inspect_err(|error| {
                // Otherwise it has said why.
                if *error != EUCLEAN {
                    pr_err!(
                        "cannot make a VM to look at {}: {:?}\n",
                        vendor.module(),
                        *error
                    );
                }
            })?;
        let Some((floor, identity)) = looked else {
            return Ok(false);
        };
        engine.set_facts(Some(Facts {
            vendor,
            supported,
            floor,
        }));
        *attached = Some(Attached {
            vendor,
            _hooks: hooks,
            _closed: closed,
        });
        // From here on, no VM can be new and unseen.
        if adopt_open_vms(engine, &identity) != 0 {
            Admin::wake(&self.admin);
        }
        pr_info!(
            "{}: supported {}, floor {}\n",
            vendor.name(),
            supported,
            floor
        );
        Ok(true)
    }

    /// Removes the hooks on `module`, or on any if there is no name, and forgets its VMs.
    fn detach(&self, module: Option<&CStr>) {
        let mut attached = self.attached.lock();
        let detached = match &*attached {
            Some(it) if module.is_none_or(|name| name == it.vendor.module()) => attached.take(),
            _ => None,
        };
        if let Some(detached) = detached {
            // From here on, nobody who begins touches a VM.
            self.admin.engine().set_facts(None);
            self.admin.stop_watching_l2();
            // Nobody who has begun is left: our device and files are gone, or the VMs are, with
            // their vendor module (but for one that KVM's files of statistics keep, which do not
            // hold that module: KVM itself does not survive its end then). That leaves the worker.
            // The hooks that tell of the end of VMs must outlast whoever touches them.
            self.admin.settle();
            self.admin.engine().vms.clear();
            // Waits for handlers that run, of which some may have had the facts still.
            drop(detached);
            self.admin.engine().vms.clear();
            Admin::wake(&self.admin);
        }
    }
}

/// KVM's functions that we call, for as long as this exists.
struct Closed(());

impl Closed {
    /// Finds them. Says which one it was if one cannot be found.
    fn find(vendor: &dyn Vendor) -> Result<Self> {
        let find = |symbol| {
            function::find(symbol).inspect_err(|_| {
                pr_err!(
                    "cannot find {}; this kernel is not one that the module was made for\n",
                    symbol
                );
            })
        };
        let functions = vendor.functions();
        let set_intercept_for_msr = find(functions.set_intercept_for_msr)?;
        let switch_to_sw_timer = functions.switch_to_sw_timer.map(find).transpose()?;
        // SAFETY: The build id is that of the KVM that we were made for, where these functions have
        // the types that the shim has; they are called by hooks only, which end before them.
        unsafe {
            bindings::exitpolicy_use_set_intercept_for_msr(set_intercept_for_msr.get());
            bindings::exitpolicy_use_switch_to_sw_timer(
                switch_to_sw_timer.map_or(0, |function| function.get()),
            );
        }
        Ok(Self(()))
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        // SAFETY: Without a function, a call does nothing.
        unsafe {
            bindings::exitpolicy_use_set_intercept_for_msr(0);
            bindings::exitpolicy_use_switch_to_sw_timer(0);
        }
    }
}

/// Reads the parameters of a vendor module that is loaded. They cannot be changed (0444).
fn read_parameters(vendor: &dyn Vendor) -> Result {
    for (name, value) in vendor.parameters() {
        let path =
            CString::try_from_fmt(fmt!("/sys/module/{}/parameters/{}", vendor.module(), *name))?;
        let mut buffer = [0; 16];
        let number = OwnedFile::open(&path, kernel_bindings::O_RDONLY)
            .and_then(|file| file.read(&mut buffer))
            .and_then(|text| core::str::from_utf8(text).map_err(|_| EINVAL))
            .and_then(|text| text.trim().parse().map_err(|_| EINVAL))
            .inspect_err(|error| pr_err!("cannot read {}: {:?}\n", &*path, *error))?;
        value.store(number, Ordering::Relaxed);
    }
    Ok(())
}

#[pinned_drop]
impl PinnedDrop for Host {
    fn drop(self: Pin<&mut Self>) {
        self.detach(None);
    }
}

/// A [`Host`] as the module notifier sees it.
pub(crate) struct HostEvents(pub(crate) Arc<Host>);

impl ModuleEvents for HostEvents {
    fn module_live(&self, name: &CStr) {
        if let Some(vendor) = VENDORS.into_iter().find(|vendor| vendor.module() == name) {
            // The log has the reason. The vendor module works as if we were not there.
            let _ = self.0.attach(Some(vendor));
        }
    }

    fn module_going(&self, name: &CStr) {
        self.0.detach(Some(name));
    }
}
