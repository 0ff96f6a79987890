// SPDX-License-Identifier: GPL-2.0

//! Intel: arch/x86/kvm/vmx/vmx.c. TDX VMs have operations of their own and are left alone.

use super::Vendor;
use crate::{
    bindings,
    policy::Exits, //
};
use kernel::prelude::*;

pub(super) struct Vmx;

impl Vendor for Vmx {
    fn id(&self) -> u32 {
        bindings::EXITPOLICY_VENDOR_VMX
    }

    fn name(&self) -> &'static str {
        "vmx"
    }

    fn module(&self) -> &'static CStr {
        c"kvm_intel"
    }

    fn vcpu_create(&self) -> &'static CStr {
        c"vmx_vcpu_create"
    }

    fn vm_destroy(&self) -> &'static CStr {
        c"vmx_vm_destroy"
    }

    fn supported(&self, accepted: Exits) -> Exits {
        accepted
    }
}
