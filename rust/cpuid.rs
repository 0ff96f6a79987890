// SPDX-License-Identifier: GPL-2.0

//! Lets a VMM repeat its guest's CPUID, with the module and after it.
//!
//! Once a vCPU has run, KVM_SET_CPUID must repeat what is stored (cpuid.c: kvm_set_cpuid()); QEMU
//! does so when it plugs a vCPU in again, and ends if it fails. KVM takes KVM_FEATURE_PV_UNHALT out
//! of the incoming table if `hlt` is disabled *now* (cpuid.c: kvm_apply_cpuid_pv_features_quirk()),
//! and out of the stored one if it was disabled *then*, so that after a change the two would never
//! be equal again.

use crate::{
    bindings,
    kernel_ext::fprobe::Call,
    kvm, //
};

/// Where hypervisors have their leaves (arch/x86/include/asm/cpuid/api.h:
/// for_each_possible_cpuid_base_hypervisor()).
const HYPERVISOR_BASE: u32 = 0x4000_0000;
const HYPERVISOR_STEP: u32 = 0x100;
const HYPERVISOR_COUNT: usize = 0x100;

/// "KVMKVMKVM" in EBX, ECX and EDX.
const KVM_SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];

const PV_UNHALT: u32 = 1 << bindings::KVM_FEATURE_PV_UNHALT;

/// A table of CPUID entries that belongs to KVM.
///
/// # Invariants
///
/// `entries` points to `count` entries that nobody else writes.
pub(crate) struct Table {
    entries: *mut bindings::kvm_cpuid_entry2,
    count: usize,
}

impl Table {
    /// What the vCPU's guest is told.
    ///
    /// # Safety
    ///
    /// `vcpu->mutex` must be held, as it is in the vCPU's ioctls, KVM_RUN among them, for as long as
    /// the table is used.
    pub(crate) unsafe fn stored(vcpu: kvm::Vcpu<'_>) -> Self {
        // SAFETY: The vCPU is alive. INVARIANT: Its mutex is held, as the caller promises.
        unsafe {
            Self {
                entries: (*vcpu.as_ptr()).arch.cpuid_entries,
                count: usize::try_from((*vcpu.as_ptr()).arch.cpuid_nent).unwrap_or(0),
            }
        }
    }

    /// What the guest shall be told.
    ///
    /// # Safety
    ///
    /// `call` must be one of kvm_set_cpuid(), whose second argument is a table and whose third is
    /// its length, and outlive the table.
    pub(crate) unsafe fn incoming(call: &Call<'_>) -> Self {
        // INVARIANT: It is the caller's own until it is stored.
        Self {
            entries: call.argument(1) as *mut _,
            count: call.argument(2) as u32 as usize,
        }
    }

    fn find(
        &self,
        mut is_it: impl FnMut(&bindings::kvm_cpuid_entry2) -> bool,
    ) -> Option<*mut bindings::kvm_cpuid_entry2> {
        (0..self.count)
            // SAFETY: Within the table, by the invariant.
            .map(|index| unsafe { self.entries.add(index) })
            // SAFETY: As above; nobody writes it meanwhile.
            .find(|entry| is_it(unsafe { &**entry }))
    }

    /// The lowest base whose leaf has KVM's signature, if there are more; of several entries for a
    /// leaf, the first one counts (cpuid.c: kvm_get_hypervisor_cpuid()).
    fn base(&self) -> Option<u32> {
        let mut seen = [false; HYPERVISOR_COUNT];
        let mut lowest = None;
        self.find(|entry| {
            let offset = entry.function.wrapping_sub(HYPERVISOR_BASE);
            let leaf = (offset / HYPERVISOR_STEP) as usize;
            if let (0, Some(seen)) = (offset % HYPERVISOR_STEP, seen.get_mut(leaf)) {
                let is_first = !core::mem::replace(seen, true);
                let is_kvm = [entry.ebx, entry.ecx, entry.edx] == KVM_SIGNATURE;
                if is_first && is_kvm && lowest.is_none_or(|lowest| entry.function < lowest) {
                    lowest = Some(entry.function);
                }
            }
            false
        });
        lowest
    }

    /// The register with KVM's paravirtual features.
    fn features(&self) -> Option<*mut u32> {
        let base = self.base()?;
        let features = self.find(|entry| entry.function == base | bindings::KVM_CPUID_FEATURES)?;
        // SAFETY: An entry of the table.
        Some(unsafe { &raw mut (*features).eax })
    }

    /// Whether it has PV_UNHALT.
    pub(crate) fn has_pv_unhalt(&self) -> bool {
        self.features()
            // SAFETY: In an entry of the table.
            .is_some_and(|features| unsafe { *features } & PV_UNHALT != 0)
    }

    /// Puts PV_UNHALT in or takes it out, where there are paravirtual features at all.
    pub(crate) fn set_pv_unhalt(&self, on: bool) {
        if let Some(features) = self.features() {
            // SAFETY: In an entry of the table, which is ours for now, by the invariant.
            unsafe {
                *features = *features & !PV_UNHALT | if on { PV_UNHALT } else { 0 };
            }
        }
    }
}
