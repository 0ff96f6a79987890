// SPDX-License-Identifier: GPL-2.0

//! AMD: arch/x86/kvm/svm/svm.c.

use super::Vendor;
use crate::{
    bindings,
    policy::Exits, //
};
use kernel::prelude::*;

pub(super) struct Svm;

impl Vendor for Svm {
    fn id(&self) -> u32 {
        bindings::EXITPOLICY_VENDOR_SVM
    }

    fn name(&self) -> &'static str {
        "svm"
    }

    fn module(&self) -> &'static CStr {
        c"kvm_amd"
    }

    fn vcpu_create(&self) -> &'static CStr {
        c"svm_vcpu_create"
    }

    fn vm_destroy(&self) -> &'static CStr {
        c"svm_vm_destroy"
    }

    fn supported(&self, accepted: Exits) -> Exits {
        // KVM accepts `cstate` everywhere, and SVM has no code for it: the MSRs are Intel's.
        accepted & !Exits::CSTATE
    }
}
