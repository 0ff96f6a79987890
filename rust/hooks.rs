// SPDX-License-Identifier: GPL-2.0

//! The hooks: which functions of KVM's, and what happens at each.
//!
//! None of them is on the way into or out of a guest: KVM calls them when vCPUs and VMs come and
//! go, when a guest's CPUID is set, and when somebody has asked a vCPU to recalculate its
//! intercepts. The exception is [`NestedVmexit`], which is there only while it is needed.

use crate::{
    admin::Admin,
    engine::Engine,
    kernel_ext::fprobe::{
        Call,
        Fprobe,
        Handler, //
    },
    kvm,
    vendor::Vendor, //
};
use kernel::{
    pr_err_once,
    prelude::*,
    sync::Arc, //
};

/// The hooks on one vendor module and on KVM itself. Dropping them waits for those that run.
pub(crate) struct Hooks {
    _vcpu_create: Hook<VcpuCreate>,
    _recalc_intercepts: Hook<RecalcIntercepts>,
    _set_cpuid: Hook<SetCpuid>,
    _vcpu_free: Hook<VcpuFree>,
    _vm_destroy: Hook<VmDestroy>,
}

/// A hook that is in place until it is dropped.
pub(crate) type Hook<H> = Pin<KBox<Fprobe<H>>>;

impl Hooks {
    /// Registers them. Says which one it was if one cannot be.
    pub(crate) fn register(vendor: &dyn Vendor, admin: &Arc<Admin>) -> Result<Self> {
        let functions = vendor.functions();
        // The ends of VMs and vCPUs first, so that none is known whose end is not.
        let vm_destroy = hook(functions.vm_destroy, VmDestroy(admin.clone()))?;
        let vcpu_free = hook(functions.vcpu_free, VcpuFree(admin.clone()))?;
        Ok(Self {
            _set_cpuid: hook(c"kvm_set_cpuid", SetCpuid(admin.clone()))?,
            _recalc_intercepts: hook(functions.recalc_intercepts, RecalcIntercepts(admin.clone()))?,
            _vcpu_create: hook(functions.vcpu_create, VcpuCreate(admin.clone()))?,
            _vcpu_free: vcpu_free,
            _vm_destroy: vm_destroy,
        })
    }
}

/// Registers a hook. Says so if it cannot be.
fn hook<H: Handler>(symbol: &'static CStr, handler: H) -> Result<Hook<H>> {
    KBox::try_pin_init(Fprobe::register(symbol, handler), GFP_KERNEL).inspect_err(|error| {
        pr_err!(
            "cannot hook {}: {:?}; this kernel is not one that the module was made for\n",
            symbol,
            *error
        );
    })
}

/// Registers the hook on the end of L2. Says so once if it cannot be: a guest in L2 has it tried
/// again and again.
pub(crate) fn hook_nested_vmexit(
    symbol: &'static CStr,
    engine: Arc<Engine>,
) -> Result<Hook<NestedVmexit>> {
    let probe = Fprobe::register(symbol, NestedVmexit(engine));
    KBox::try_pin_init(probe, GFP_KERNEL).inspect_err(|error| {
        pr_err_once!(
            "cannot hook {}: {:?}; vCPUs in L2 change when they are asked again\n",
            symbol,
            *error
        );
    })
}

/// On entry of `kvm_x86_ops.vcpu_create`: decide on the VM.
struct VcpuCreate(Arc<Admin>);

impl Handler for VcpuCreate {
    fn entered(&self, call: &Call<'_>) {
        // SAFETY: We are registered on a vcpu_create only; kvm_vcpu_init() has set `kvm`.
        if let Some(vcpu) = unsafe { kvm::Vcpu::of_call(call) } {
            // SAFETY: This is the entry of vcpu_create.
            if unsafe { self.0.engine().vcpu_created(vcpu) } {
                Admin::wake(&self.0);
            }
        }
    }
}

/// On entry of `kvm_x86_ops.recalc_intercepts`: write what was changed.
struct RecalcIntercepts(Arc<Admin>);

impl Handler for RecalcIntercepts {
    fn entered(&self, call: &Call<'_>) {
        // SAFETY: We are registered on a recalc_intercepts only.
        if let Some(vcpu) = unsafe { kvm::LoadedVcpu::of_call(call) } {
            if self.0.engine().recalculating(vcpu) {
                Admin::wake(&self.0);
            }
        }
    }
}

/// On entry of kvm_set_cpuid(): let it repeat what a guest was told.
struct SetCpuid(Arc<Admin>);

impl Handler for SetCpuid {
    fn entered(&self, call: &Call<'_>) {
        // SAFETY: We are registered on kvm_set_cpuid() only, whose first argument is a vCPU.
        if let Some(vcpu) = unsafe { kvm::Vcpu::of_call(call) } {
            // SAFETY: This is kvm_set_cpuid().
            unsafe { self.0.engine().cpuid_set(call, vcpu) };
        }
    }
}

/// On entry of `kvm_x86_ops.vcpu_free`: do not touch the VM any more.
struct VcpuFree(Arc<Admin>);

impl Handler for VcpuFree {
    fn entered(&self, call: &Call<'_>) {
        // SAFETY: We are registered on a vcpu_free only.
        if let Some(vcpu) = unsafe { kvm::Vcpu::of_call(call) } {
            self.0.engine().vcpu_freed(vcpu);
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

/// On entry of the function that leaves L2: ask a vCPU again that could not be changed in there.
///
/// This is on the way of guests that have guests, and therefore registered only while there is
/// such a vCPU. Asking again from the hook on recalc_intercepts, while still in L2, would keep the
/// vCPU from ever entering.
pub(crate) struct NestedVmexit(Arc<Engine>);

impl Handler for NestedVmexit {
    fn entered(&self, call: &Call<'_>) {
        // SAFETY: We are registered on a nested_vmexit only, whose first argument is a vCPU.
        if let Some(vcpu) = unsafe { kvm::Vcpu::of_call(call) } {
            self.0.leaving_l2(vcpu);
        }
    }
}
