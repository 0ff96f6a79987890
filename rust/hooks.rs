// SPDX-License-Identifier: GPL-2.0

//! The hooks: which operations of KVM's vendor module, and what happens at each.
//!
//! None of them is on the way into or out of a guest: a running VM executes nothing of this
//! module.

use crate::{
    admin::Admin,
    kernel_ext::fprobe::{
        Call,
        Fprobe,
        Handler, //
    },
    kvm,
    vendor::Vendor, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// The hooks on one vendor module. Dropping them waits for those that run.
pub(crate) struct Hooks {
    _vcpu_create: Pin<KBox<Fprobe<VcpuCreate>>>,
    _vm_destroy: Pin<KBox<Fprobe<VmDestroy>>>,
}

impl Hooks {
    /// Registers them. Says which one it was if one cannot be.
    pub(crate) fn register(vendor: &dyn Vendor, admin: &Arc<Admin>) -> Result<Self> {
        Ok(Self {
            _vcpu_create: hook(vendor.vcpu_create(), VcpuCreate(admin.clone()))?,
            _vm_destroy: hook(vendor.vm_destroy(), VmDestroy(admin.clone()))?,
        })
    }
}

fn hook<H: Handler>(symbol: &'static CStr, handler: H) -> Result<Pin<KBox<Fprobe<H>>>> {
    KBox::try_pin_init(Fprobe::register(symbol, handler), GFP_KERNEL).inspect_err(|error| {
        pr_err!(
            "cannot hook {}: {:?}; this kernel is not one that the module was made for\n",
            symbol,
            *error
        );
    })
}

/// On entry of `kvm_x86_ops.vcpu_create`: decide on the VM.
struct VcpuCreate(Arc<Admin>);

impl Handler for VcpuCreate {
    fn entered(&self, call: &Call<'_>) {
        // SAFETY: We are registered on a vcpu_create only.
        if let Some(vm) = unsafe { kvm::Vm::of_created_vcpu(call) } {
            // SAFETY: This is the entry of vcpu_create.
            if unsafe { self.0.engine().vcpu_created(vm) } {
                Admin::wake(&self.0);
            }
        }
    }
}

/// On entry of `kvm_x86_ops.vm_destroy`: forget the VM.
struct VmDestroy(Arc<Admin>);

impl Handler for VmDestroy {
    fn entered(&self, call: &Call<'_>) {
        // SAFETY: We are registered on a vm_destroy only.
        let key = unsafe { kvm::Vm::key_of_destroyed(call) };
        if self.0.engine().vm_destroyed(key) {
            Admin::wake(&self.0);
        }
    }
}
