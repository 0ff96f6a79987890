// SPDX-License-Identifier: GPL-2.0

//! Lets a VMM repeat its guest's CPUID after `hlt` was changed.
//!
//! Once a vCPU has run, KVM_SET_CPUID must repeat what is stored (cpuid.c: kvm_set_cpuid()); QEMU
//! does so when it plugs a vCPU in again. KVM takes KVM_FEATURE_PV_UNHALT out of the incoming table
//! if `hlt` is disabled *now* (cpuid.c: kvm_apply_cpuid_pv_features_quirk()), and out of the stored
//! one if it was disabled *then*, so that after a change the two would never be equal again.

use crate::{
    bindings,
    kernel_ext::fprobe::Call,
    kvm, //
};

/// Where hypervisors have their leaves (arch/x86/include/asm/cpuid/api.h:
/// for_each_possible_cpuid_base_hypervisor()).
const HYPERVISOR_BASES: core::ops::Range<u32> = 0x4000_0000..0x4001_0000;
const HYPERVISOR_STEP: usize = 0x100;

/// "KVMKVMKVM" in EBX, ECX and EDX.
const KVM_SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];

const PV_UNHALT: u32 = 1 << bindings::KVM_FEATURE_PV_UNHALT;

/// A table of CPUID entries that belongs to KVM.
///
/// # Invariants
///
/// `entries` points to `count` entries that nobody else writes.
struct Table {
    entries: *mut bindings::kvm_cpuid_entry2,
    count: usize,
}

impl Table {
    fn find(&self, function: u32) -> Option<*mut bindings::kvm_cpuid_entry2> {
        (0..self.count)
            // SAFETY: Within the table, by the invariant.
            .map(|index| unsafe { self.entries.add(index) })
            // SAFETY: As above.
            .find(|entry| unsafe { (**entry).function } == function)
    }

    /// The register with KVM's paravirtual features.
    fn features(&self) -> Option<*mut u32> {
        HYPERVISOR_BASES
            .step_by(HYPERVISOR_STEP)
            .find(|base| {
                self.find(*base).is_some_and(|entry| {
                    // SAFETY: An entry of the table.
                    let signature = unsafe { [(*entry).ebx, (*entry).ecx, (*entry).edx] };
                    signature == KVM_SIGNATURE
                })
            })
            .and_then(|base| self.find(base | bindings::KVM_CPUID_FEATURES))
            // SAFETY: An entry of the table.
            .map(|entry| unsafe { &raw mut (*entry).eax })
    }
}

/// Brings the stored table's PV_UNHALT in step with what KVM will make of the incoming one.
/// `hlt_disabled` is what the VM's flag says.
///
/// # Safety
///
/// `call` must be one of kvm_set_cpuid(), with `vcpu` as its first argument, a table and its length
/// as the next. It runs in an ioctl of the vCPU, under `vcpu->mutex`, which keeps the stored table.
pub(crate) unsafe fn keep_repeatable(call: &Call<'_>, vcpu: kvm::Vcpu<'_>, hlt_disabled: bool) {
    let incoming = Table {
        entries: call.argument(1) as *mut _,
        count: call.argument(2) as u32 as usize,
    };
    // SAFETY: The vCPU is alive. INVARIANT: Its mutex is held, as the caller promises.
    let stored = unsafe {
        Table {
            entries: (*vcpu.as_ptr()).arch.cpuid_entries,
            count: usize::try_from((*vcpu.as_ptr()).arch.cpuid_nent).unwrap_or(0),
        }
    };
    if let (Some(incoming), Some(stored)) = (incoming.features(), stored.features()) {
        // SAFETY: Both belong to this thread for now, by the invariants.
        unsafe {
            let told = if hlt_disabled {
                0
            } else {
                *incoming & PV_UNHALT
            };
            *stored = *stored & !PV_UNHALT | told;
        }
    }
}
