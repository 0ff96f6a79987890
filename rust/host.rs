// SPDX-License-Identifier: GPL-2.0

//! Which vendor module is in use, and when it comes and goes.

use crate::{
    admin::Admin,
    build_id,
    engine::Facts,
    hooks::Hooks,
    kernel_ext::module_notifier::ModuleEvents,
    kvm::DevKvm,
    vendor::{
        Vendor,
        VENDORS, //
    },
};
use kernel::{
    new_mutex,
    prelude::*,
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

struct Attached {
    vendor: &'static dyn Vendor,
    _hooks: Hooks,
}

impl Host {
    pub(crate) fn new(admin: Arc<Admin>) -> impl PinInit<Self> {
        pin_init!(Self {
            admin,
            attached <- new_mutex!(None, "exitpolicy_host"),
        })
    }

    /// Hooks the vendor module, if one is loaded; no error if none is.
    ///
    /// To be called in a task with an address space. Every other error is one that the log
    /// explains; nothing is hooked then.
    pub(crate) fn attach(&self) -> Result {
        let mut attached = self.attached.lock();
        if attached.is_some() {
            return Ok(());
        }
        // While it is open, the vendor module stays.
        let kvm = match DevKvm::open() {
            Ok(kvm) => kvm,
            Err(ENOENT | ENODEV | ENXIO) => return Ok(()),
            Err(error) => {
                pr_err!("cannot open /dev/kvm: {:?}\n", error);
                return Err(error);
            }
        };
        build_id::check(c"kvm").inspect_err(|error| complain_of_build_id(c"kvm", *error))?;
        for vendor in VENDORS {
            // Before anything is hooked: a hook reads structures.
            match build_id::check(vendor.module()) {
                Ok(()) => (),
                Err(ENOENT) => continue,
                Err(error) => {
                    complain_of_build_id(vendor.module(), error);
                    return Err(error);
                }
            }
            let hooks = match Hooks::register(vendor, &self.admin) {
                Ok(hooks) => hooks,
                Err(ENOENT) => continue,
                Err(error) => return Err(error),
            };
            if let Some(facts) = self.probe(&kvm, vendor)? {
                self.admin.engine().set_facts(Some(facts));
                *attached = Some(Attached {
                    vendor,
                    _hooks: hooks,
                });
                pr_info!(
                    "{}: supported {}, floor {}\n",
                    vendor.name(),
                    facts.supported,
                    facts.floor
                );
                return Ok(());
            }
        }
        let [amd, intel] = VENDORS.map(Vendor::vcpu_create);
        pr_err!(
            "neither {} nor {} can be hooked, or the hook does not fire: this KVM is not one that \
             the module was made for, or ftrace is off (sysctl kernel.ftrace_enabled)\n",
            amd,
            intel
        );
        Err(ENOEXEC)
    }

    /// Makes a VM to see what KVM does by itself, and whether this vendor's hook fires. Returns
    /// nothing if it does not.
    fn probe(&self, kvm: &DevKvm, vendor: &'static dyn Vendor) -> Result<Option<Facts>> {
        let engine = self.admin.engine();
        let accepted = kvm.accepted_exits();
        let floor = kvm.probe_floor(|key| engine.begin_probing(key));
        // In any case, lest another VM at the same address is taken for it.
        let fired = engine.end_probing();
        let floor = floor.inspect_err(|error| {
            if *error == EUCLEAN {
                pr_err!("struct kvm is not laid out as the one that the module was built for\n");
            } else {
                pr_err!("cannot make a VM to look at KVM: {:?}\n", *error);
            }
        })?;
        Ok(fired.then_some(Facts {
            vendor,
            supported: vendor.supported(accepted?),
            floor,
        }))
    }

    /// Removes the hooks on `module`, or on any if there is no name, and forgets its VMs.
    fn detach(&self, module: Option<&CStr>) {
        let mut attached = self.attached.lock();
        let detached = match &*attached {
            Some(it) if module.is_none_or(|name| name == it.vendor.module()) => attached.take(),
            _ => None,
        };
        if let Some(detached) = detached {
            self.admin.engine().set_facts(None);
            // Waits for handlers that run.
            drop(detached);
            // A vendor module goes after its VMs. Those that are left are left by mistake.
            self.admin.engine().vms.clear();
            Admin::wake(&self.admin);
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Host {
    fn drop(self: Pin<&mut Self>) {
        self.detach(None);
    }
}

/// For what [`build_id::check`] does not say itself.
fn complain_of_build_id(image: &CStr, error: Error) {
    if error != ENOEXEC {
        pr_err!(
            "cannot read the build id of {} in /sys: {:?}\n",
            image,
            error
        );
    }
}

/// A [`Host`] as the module notifier sees it.
pub(crate) struct HostEvents(pub(crate) Arc<Host>);

impl ModuleEvents for HostEvents {
    fn module_live(&self, name: &CStr) {
        if VENDORS.iter().any(|vendor| vendor.module() == name) {
            // The log has the reason. The vendor module works as if we were not there.
            let _ = self.0.attach();
        }
    }

    fn module_going(&self, name: &CStr) {
        self.0.detach(Some(name));
    }
}
