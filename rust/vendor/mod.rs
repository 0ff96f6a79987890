// SPDX-License-Identifier: GPL-2.0

//! What differs between kvm-amd and kvm-intel. Nothing else knows which CPU it is.

mod svm;
mod vmx;

use crate::policy::Exits;
use kernel::prelude::*;

/// One implementation of KVM's vendor operations.
pub(crate) trait Vendor: Sync {
    /// EXITPOLICY_VENDOR_*.
    fn id(&self) -> u32;

    /// What the administrator reads.
    fn name(&self) -> &'static str;

    /// The module's name, as in `/sys/module`.
    fn module(&self) -> &'static CStr;

    /// The implementation of `kvm_x86_ops.vcpu_create`, which gets a `struct kvm_vcpu`.
    fn vcpu_create(&self) -> &'static CStr;

    /// The implementation of `kvm_x86_ops.vm_destroy`, which gets a `struct kvm`.
    fn vm_destroy(&self) -> &'static CStr;

    /// Which of the exits that KVM accepts can be disabled in earnest.
    fn supported(&self, accepted: Exits) -> Exits;
}

/// All that there are.
pub(crate) static VENDORS: [&dyn Vendor; 2] = [&svm::Svm, &vmx::Vmx];

/// The vendor with this id, if it is one.
pub(crate) fn by_id(id: u32) -> Option<&'static dyn Vendor> {
    VENDORS.into_iter().find(|vendor| vendor.id() == id)
}
