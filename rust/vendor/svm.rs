// SPDX-License-Identifier: GPL-2.0

//! AMD: arch/x86/kvm/svm/svm.c. "APM" is AMD's manual, volume 2.

use super::{
    set_msr_read_exit,
    Functions,
    InL2,
    Parameter,
    Refusal,
    Vendor, //
};
use crate::{
    bindings,
    kvm,
    policy::{
        live::{
            intercepts,
            Intercept,
            Limits, //
        },
        Exits, //
    },
    probe::{
        ensure_all,
        WrongField, //
    }, //
};
use core::{
    ptr,
    sync::atomic::{
        AtomicU32,
        Ordering, //
    },
};
use kernel::prelude::*;

pub(super) struct Svm;

/// kvm_amd.pause_filter_count and kvm_amd.pause_filter_thresh, as they were when it was loaded.
static PAUSE_FILTER_COUNT: AtomicU32 = AtomicU32::new(0);
static PAUSE_FILTER_THRESH: AtomicU32 = AtomicU32::new(0);

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

    fn functions(&self) -> &'static Functions {
        &Functions {
            vcpu_create: c"svm_vcpu_create",
            recalc_intercepts: c"svm_recalc_intercepts",
            vcpu_free: c"svm_vcpu_free",
            vm_destroy: c"svm_vm_destroy",
            // vmcb01 can be written at any time, and what the hooked function does next carries it
            // over to vmcb02 (svm.h: svm_mark_intercepts_dirty()). For MSRs see write_msrs().
            nested_vmexit: None,
            set_intercept_for_msr: c"svm_set_intercept_for_msr",
            // SVM has no such timer.
            switch_to_sw_timer: None,
        }
    }

    fn parameters(&self) -> &'static [Parameter] {
        static PARAMETERS: [Parameter; 2] = [
            (c"pause_filter_count", &PAUSE_FILTER_COUNT),
            (c"pause_filter_thresh", &PAUSE_FILTER_THRESH),
        ];
        &PARAMETERS
    }

    fn supported(&self, accepted: Exits) -> Exits {
        // KVM accepts `cstate` everywhere, and SVM has no code for it: the MSRs are Intel's.
        accepted & !Exits::CSTATE
    }

    fn limits(&self, vcpu: kvm::Vcpu<'_>) -> (Limits, Refusal) {
        // Not has_protected_state() alone: KVM_SEV_ES_INIT, migration and mirrors make SEV-ES VMs
        // without it (svm/sev.c: sev_guest_init(), sev_migrate_from()).
        let is_encrypted = |vm: kvm::Vm<'_>| {
            // SAFETY: A VM of kvm-amd, that is alive.
            let is_sev_es = unsafe { bindings::exitpolicy_svm_is_encrypted(vm.as_ptr()) };
            is_sev_es || vm.has_protected_state()
        };
        if vcpu.vm().is_some_and(is_encrypted) {
            return (Limits::ENCRYPTED, Refusal::Protected);
        }
        // No limit for PV_UNHALT: a kick makes the vCPU leave the guest, which ends a native HLT
        // (APM 15.9: RIP is past it in the VMCB, and there is no activity state). One that comes
        // just before the HLT is late: until the next interrupt of this CPU, its guest's timer
        // among them.
        (Limits::NONE, Refusal::None)
    }

    fn ensure_made(&self, vcpu: kvm::Vcpu<'_>, floor: Exits) -> Result<(), WrongField> {
        let svm = vcpu.as_ptr().cast::<bindings::vcpu_svm>();
        // SAFETY: A vCPU of kvm-amd is the first member of a `struct vcpu_svm`, and nobody else
        // knows this one.
        let (vmcb01, current, vmcb, ptr) = unsafe {
            let vmcb01 = &raw const (*svm).vmcb01;
            (vmcb01, (*svm).current_vmcb, (*svm).vmcb, (*vmcb01).ptr)
        };
        // Outside of L2, this is what KVM uses.
        ensure_all(&[(
            "vcpu_svm.vmcb01",
            ptr::eq(current, vmcb01) && ptr::eq(vmcb, ptr) && !ptr.is_null(),
        )])?;
        // SAFETY: It is KVM's VMCB, as both of its pointers say.
        let control = unsafe { &raw const (*ptr).control };
        // SAFETY: As above.
        let words = unsafe { &raw const (*control).intercepts }.cast::<u32>();
        // SAFETY: No requirements.
        let has_idle_hlt = unsafe { bindings::exitpolicy_cpu_has_idle_hlt() };
        let right = intercepts(floor, has_idle_hlt)
            .into_iter()
            .all(|(instruction, on)| {
                let bit = intercept_bit(instruction);
                // SAFETY: As above; the bit is one of the intercepts', in words of 32.
                let word = unsafe { ptr::read(words.add((bit / 32) as usize)) };
                (word & 1 << (bit % 32) != 0) == on
            });
        // SAFETY: As above.
        let (count, thresh) = unsafe {
            (
                (*control).pause_filter_count,
                (*control).pause_filter_thresh,
            )
        };
        let (filter_count, filter_thresh) = if floor.contains(Exits::PAUSE) {
            (0, 0)
        } else {
            (
                PAUSE_FILTER_COUNT.load(Ordering::Relaxed) as u16,
                PAUSE_FILTER_THRESH.load(Ordering::Relaxed) as u16,
            )
        };
        ensure_all(&[
            ("vmcb.control.intercepts", right),
            ("vmcb.control.pause_filter_count", count == filter_count),
            ("vmcb.control.pause_filter_thresh", thresh == filter_thresh),
        ])
    }

    fn quiet_flags(&self) -> Exits {
        // svm_vcpu_load() looks at the flag, and shrink_ple_window(), which it calls, looks again
        // and warns: both with preemption disabled.
        Exits::PAUSE
    }

    fn write_controls(&self, vcpu: kvm::LoadedVcpu<'_>, open: Exits) -> Result<(), InL2> {
        let svm = vcpu.vcpu().as_ptr().cast::<bindings::vcpu_svm>();
        // SAFETY: A vCPU of kvm-amd is the first member of a `struct vcpu_svm`. It has its VMCB for
        // life, which is written by its own thread only: this one. The CPU reads it at VMRUN.
        let control = unsafe { &raw mut (*(*svm).vmcb01.ptr).control };
        // The words that are written here are marked as dirty by what the hooked function does
        // next (svm_recalc_instruction_intercepts() changes one at least). INIT makes KVM write
        // them anew, and init_vmcb() asks for a recalculation itself, which brings us here again.
        // SAFETY: As above.
        let words = unsafe { &raw mut (*control).intercepts }.cast::<u32>();
        let intercept = |bit: u32, on: bool| {
            // SAFETY: As above; the bit is one of the intercepts', in words of 32.
            unsafe {
                let word = words.add((bit / 32) as usize);
                let old = ptr::read(word);
                let mask = 1 << (bit % 32);
                ptr::write(word, if on { old | mask } else { old & !mask });
                old & mask != 0
            }
        };

        // SAFETY: No requirements.
        let has_idle_hlt = unsafe { bindings::exitpolicy_cpu_has_idle_hlt() };
        for (instruction, on) in intercepts(open, has_idle_hlt) {
            let was_on = intercept(intercept_bit(instruction), on);
            if instruction == Intercept::Pause && on && !was_on {
                // As init_vmcb(): a vCPU that began without PAUSE exits has no filter. From here on
                // KVM lets the window grow and shrink.
                let count = PAUSE_FILTER_COUNT.load(Ordering::Relaxed) as u16;
                let thresh = PAUSE_FILTER_THRESH.load(Ordering::Relaxed) as u16;
                // SAFETY: As above.
                unsafe {
                    (*control).pause_filter_count = count;
                    if thresh != 0 {
                        (*control).pause_filter_thresh = thresh;
                    }
                }
            }
        }
        Ok(())
    }

    fn write_msrs(&self, vcpu: kvm::LoadedVcpu<'_>, open: Exits) {
        let exit = !open.contains(Exits::APERFMPERF);
        for msr in [bindings::MSR_IA32_APERF, bindings::MSR_IA32_MPERF] {
            set_msr_read_exit(vcpu, msr, exit);
            if exit {
                // L2 has a bitmap of its own, which KVM makes of this one and L1's with L1's next
                // VMRUN only (nested.c: nested_svm_merge_msrpm()). That L1 wants no exit is no
                // matter: KVM emulates the read then (nested_svm_exit_handled_msr()).
                // SAFETY: A vCPU of kvm-amd, in its own thread.
                unsafe { bindings::exitpolicy_svm_exit_in_l2(vcpu.vcpu().as_ptr(), msr) };
            }
        }
    }
}

/// Where a VMCB has an intercept: INTERCEPT_*.
fn intercept_bit(instruction: Intercept) -> u32 {
    match instruction {
        Intercept::Hlt => bindings::INTERCEPT_HLT,
        Intercept::IdleHlt => bindings::INTERCEPT_IDLE_HLT,
        Intercept::Monitor => bindings::INTERCEPT_MONITOR,
        Intercept::Mwait => bindings::INTERCEPT_MWAIT,
        Intercept::Pause => bindings::INTERCEPT_PAUSE,
    }
}
