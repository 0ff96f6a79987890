// SPDX-License-Identifier: GPL-2.0

//! What differs between kvm-amd and kvm-intel. Nothing else knows which CPU it is.

mod svm;
mod vmx;

use crate::{
    bindings,
    kvm,
    policy::{
        live::Limits,
        Exits, //
    },
    probe::WrongField, //
};
use core::sync::atomic::AtomicU32;
use kernel::prelude::*;

/// One implementation of KVM's vendor operations.
pub(crate) trait Vendor: Sync {
    /// EXITPOLICY_VENDOR_*.
    fn id(&self) -> u32;

    /// What the administrator reads.
    fn name(&self) -> &'static str;

    /// The module's name, as in `/sys/module`.
    fn module(&self) -> &'static CStr;

    /// The functions to hook, and to call.
    fn functions(&self) -> &'static Functions;

    /// Parameters of the module that are needed to let vCPUs have PAUSE exits that began without.
    fn parameters(&self) -> &'static [Parameter];

    /// Which of the exits that KVM accepts can be disabled in earnest.
    fn supported(&self, accepted: Exits) -> Exits;

    /// What cannot be changed in the VM of this vCPU while it runs, as far as this vCPU shows, and
    /// why.
    fn limits(&self, vcpu: kvm::Vcpu<'_>) -> (Limits, Refusal);

    /// Fails unless a vCPU that was made and has never run has in its fields what KVM has put there
    /// for a VM with these exits disabled. On entry of `vcpu_free`. No pointer is followed whose
    /// place is not certain.
    fn ensure_made(&self, vcpu: kvm::Vcpu<'_>, floor: Exits) -> Result<(), WrongField>;

    /// Exits whose flag can be set only while no vCPU is looked at by any CPU.
    fn quiet_flags(&self) -> Exits;

    /// Makes the vCPU's controls let through what is in `open`, and no other exit. Nothing is
    /// written where they are out of reach.
    fn write_controls(&self, vcpu: kvm::LoadedVcpu<'_>, open: Exits) -> Result<(), InL2>;

    /// The same for reads of MSRs, which are within reach everywhere.
    fn write_msrs(&self, vcpu: kvm::LoadedVcpu<'_>, open: Exits);
}

/// A parameter of the vendor module, with a place to keep its value in.
pub(crate) type Parameter = (&'static CStr, &'static AtomicU32);

/// KVM's functions by their names. Hooked are, of `kvm_x86_ops`, the four first.
pub(crate) struct Functions {
    /// Gets a `struct kvm_vcpu`.
    pub(crate) vcpu_create: &'static CStr,
    /// Gets a `struct kvm_vcpu`.
    pub(crate) recalc_intercepts: &'static CStr,
    /// Gets a `struct kvm_vcpu`.
    pub(crate) vcpu_free: &'static CStr,
    /// Gets a `struct kvm`.
    pub(crate) vm_destroy: &'static CStr,
    /// Leaves L2, and gets a `struct kvm_vcpu`; hooked while a vCPU in L2 has to be changed, where
    /// that cannot be done at once.
    pub(crate) nested_vmexit: Option<&'static CStr>,
    /// Opens or closes an MSR for a `struct kvm_vcpu`; called.
    pub(crate) set_intercept_for_msr: &'static CStr,
    /// Takes a `struct kvm_vcpu`'s timer away from the CPU; called.
    pub(crate) switch_to_sw_timer: Option<&'static CStr>,
}

/// The vCPU runs a guest of its guest, and its own controls are out of reach.
pub(crate) struct InL2;

/// EXITPOLICY_REFUSAL_*: why a VM does not get what it should.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    None,
    PvUnhalt,
    Protected,
    HyperV,
}

impl Refusal {
    /// The number in the uapi header.
    pub(crate) fn id(self) -> u32 {
        match self {
            Self::None => bindings::EXITPOLICY_REFUSAL_NONE,
            Self::PvUnhalt => bindings::EXITPOLICY_REFUSAL_PV_UNHALT,
            Self::Protected => bindings::EXITPOLICY_REFUSAL_PROTECTED,
            Self::HyperV => bindings::EXITPOLICY_REFUSAL_HYPERV,
        }
    }

    /// What sysfs shows.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::PvUnhalt => "pv_unhalt",
            Self::Protected => "protected",
            Self::HyperV => "hyperv",
        }
    }
}

/// All that there are.
pub(crate) static VENDORS: [&dyn Vendor; 2] = [&svm::Svm, &vmx::Vmx];

/// The vendor with this id, if it is one.
pub(crate) fn by_id(id: u32) -> Option<&'static dyn Vendor> {
    VENDORS.into_iter().find(|vendor| vendor.id() == id)
}

/// Lets reads of an MSR exit or not, as far as the VMM's filter permits.
fn set_msr_read_exit(vcpu: kvm::LoadedVcpu<'_>, msr: u32, exit: bool) {
    // SAFETY: The vCPU is alive, and this is its thread, which KVM's own calls of the function
    // behind this are made in as well, from the very function that is being entered.
    unsafe { bindings::exitpolicy_set_intercept_for_msr(vcpu.vcpu().as_ptr(), msr, exit) };
}
