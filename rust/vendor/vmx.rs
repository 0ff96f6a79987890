// SPDX-License-Identifier: GPL-2.0

//! Intel: arch/x86/kvm/vmx/vmx.c. "SDM" is Intel's manual, volume 3.
//!
//! TDX VMs have operations of their own and are left alone.

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
        live::Limits,
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
use kernel::{
    pr_warn_once,
    prelude::*, //
};

pub(super) struct Vmx;

/// kvm_intel.ple_gap and kvm_intel.ple_window, as they were when it was loaded.
static PLE_GAP: AtomicU32 = AtomicU32::new(0);
static PLE_WINDOW: AtomicU32 = AtomicU32::new(0);

/// The controls of a VMCS that make MWAIT and MONITOR exit, HLT, and PAUSE in loops.
const MWAIT: u32 =
    bindings::CONST_CPU_BASED_MWAIT_EXITING | bindings::CONST_CPU_BASED_MONITOR_EXITING;
const HLT: u32 = bindings::CONST_CPU_BASED_HLT_EXITING;
const EXEC_CONTROLS: u32 = MWAIT | HLT;
const PLE: u32 = bindings::CONST_SECONDARY_EXEC_PAUSE_LOOP_EXITING;

/// Those of [`EXEC_CONTROLS`] that let through what is in `open`, and no other exit.
fn exec_controls(open: Exits) -> u32 {
    let exits = |exit, control| if open.contains(exit) { 0 } else { control };
    exits(Exits::MWAIT, MWAIT) | exits(Exits::HLT, HLT)
}

/// The same of [`PLE`].
fn secondary_controls(open: Exits) -> u32 {
    if open.contains(Exits::PAUSE) {
        0
    } else {
        PLE
    }
}

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

    fn functions(&self) -> &'static Functions {
        &Functions {
            vcpu_create: c"vmx_vcpu_create",
            recalc_intercepts: c"vmx_recalc_intercepts",
            vcpu_free: c"vmx_vcpu_free",
            vm_destroy: c"vmx_vm_destroy",
            nested_vmexit: Some(c"__nested_vmx_vmexit"),
            set_intercept_for_msr: c"vmx_set_intercept_for_msr",
            switch_to_sw_timer: Some(c"kvm_lapic_switch_to_sw_timer"),
        }
    }

    fn parameters(&self) -> &'static [Parameter] {
        static PARAMETERS: [Parameter; 2] = [(c"ple_gap", &PLE_GAP), (c"ple_window", &PLE_WINDOW)];
        &PARAMETERS
    }

    fn supported(&self, accepted: Exits) -> Exits {
        accepted
    }

    fn limits(&self, vcpu: kvm::Vcpu<'_>) -> (Limits, Refusal) {
        // SAFETY: No requirements.
        if unsafe { bindings::exitpolicy_on_hyperv() } {
            // KVM may use an enlightened VMCS, which is memory; whether it does is a secret of its.
            return (Limits::HIDDEN, Refusal::HyperV);
        }
        if vcpu.knows_pv_unhalt() {
            // A kick injects nothing, so that the VMCS of a vCPU that halts natively keeps its activity
            // state, and the vCPU sleeps on.
            // KVM, asked in time, would not have told the guest (cpuid.c:
            // kvm_apply_cpuid_pv_features_quirk()).
            return (Limits::KICKED, Refusal::PvUnhalt);
        }
        (Limits::NONE, Refusal::None)
    }

    fn ensure_made(&self, vcpu: kvm::Vcpu<'_>, floor: Exits) -> Result<(), WrongField> {
        let vmx = vcpu.as_ptr().cast::<bindings::vcpu_vmx>();
        // SAFETY: A vCPU of kvm-intel is the first member of a `struct vcpu_vmx`, and nobody else
        // knows this one.
        let (vmcs01, loaded, exec, secondary, window) = unsafe {
            let vmcs01 = &raw const (*vmx).vmcs01;
            let controls = &raw const (*vmcs01).controls_shadow;
            (
                vmcs01,
                (*vmx).loaded_vmcs,
                (*controls).exec,
                (*controls).secondary_exec,
                (*vmx).ple_window,
            )
        };
        let ple_window = if floor.contains(Exits::PAUSE) {
            0
        } else {
            PLE_WINDOW.load(Ordering::Relaxed)
        };
        ensure_all(&[
            // Outside of L2, this is what KVM uses.
            ("vcpu_vmx.vmcs01", ptr::eq(loaded, vmcs01)),
            (
                "loaded_vmcs.controls_shadow.exec",
                exec & EXEC_CONTROLS == exec_controls(floor),
            ),
            (
                "loaded_vmcs.controls_shadow.secondary_exec",
                secondary & PLE == secondary_controls(floor),
            ),
            ("vcpu_vmx.ple_window", window == ple_window),
        ])
    }

    fn quiet_flags(&self) -> Exits {
        Exits::NONE
    }

    fn write_controls(&self, vcpu: kvm::LoadedVcpu<'_>, open: Exits) -> Result<(), InL2> {
        let vmx = vcpu.vcpu().as_ptr().cast::<bindings::vcpu_vmx>();
        // SAFETY: A vCPU of kvm-intel is the first member of a `struct vcpu_vmx`. What is read and
        // written of it here is its own thread's, which this is.
        let vmcs01 = unsafe { &raw mut (*vmx).vmcs01 };
        // SAFETY: As above.
        if unsafe { (*vmx).loaded_vmcs } != vmcs01 {
            return Err(InL2);
        }
        // SAFETY: As above; vmcs01 is current on this CPU, as the vCPU is loaded and not in L2.
        let vmcs = unsafe { CurrentVmcs::new(vmcs01) };

        if open.contains(Exits::MWAIT) && vcpu.vcpu().has_lapic() {
            // The preemption timer may stop while the guest is in a C-state (SDM 26.5.1), and KVM
            // does not use it from the moment the flag is set (lapic.c: kvm_can_use_hv_timer()).
            // One that is armed must move.
            // SAFETY: This is the vCPU's thread, with the vCPU loaded, and it has a local APIC;
            // vcpu_block() calls it from there too.
            unsafe { bindings::exitpolicy_switch_to_sw_timer(vcpu.vcpu().as_ptr()) };
        }

        vmcs.change_exec(EXEC_CONTROLS, exec_controls(open));
        if !open.contains(Exits::HLT) {
            // INIT needs no help: vmx_vcpu_reset() writes ACTIVE whatever the flag says.
            vmcs.leave_hlt();
        }

        vmcs.change_secondary_exec(PLE, secondary_controls(open));
        if !open.contains(Exits::PAUSE) {
            // As init_vmcs(): a vCPU that began without PAUSE exits has no gap, and has a window
            // only if vmx_vcpu_load() has seen the flag clear before this.
            let gap = PLE_GAP.load(Ordering::Relaxed);
            vmcs.write(bindings::vmcs_field_PLE_GAP, gap.into());
            // SAFETY: The vCPU's own thread, as above.
            unsafe {
                if (*vmx).ple_window == 0 {
                    (*vmx).ple_window = PLE_WINDOW.load(Ordering::Relaxed);
                    // vmx_vcpu_run() writes it.
                    (*vmx).ple_window_dirty = true;
                }
            }
        }
        Ok(())
    }

    fn write_msrs(&self, vcpu: kvm::LoadedVcpu<'_>, open: Exits) {
        // The bitmap is in memory that belongs to vmcs01. Of that and L1's, KVM makes L2's with L1's
        // next VMLAUNCH or VMRESUME (nested.c: nested_vmx_prepare_msr_bitmap()).
        for msr in [
            bindings::MSR_CORE_C1_RES,
            bindings::MSR_CORE_C3_RESIDENCY,
            bindings::MSR_CORE_C6_RESIDENCY,
            bindings::MSR_CORE_C7_RESIDENCY,
        ] {
            set_msr_read_exit(vcpu, msr, !open.contains(Exits::CSTATE));
        }
        for msr in [bindings::MSR_IA32_APERF, bindings::MSR_IA32_MPERF] {
            set_msr_read_exit(vcpu, msr, !open.contains(Exits::APERFMPERF));
        }
    }
}

/// The VMCS that is current on this CPU.
///
/// # Invariants
///
/// It is that of `loaded`, which this thread alone uses, and stays current while this exists.
struct CurrentVmcs {
    loaded: *mut bindings::loaded_vmcs,
}

impl CurrentVmcs {
    /// # Safety
    ///
    /// As the type's invariants say.
    unsafe fn new(loaded: *mut bindings::loaded_vmcs) -> Self {
        // INVARIANT: The caller's promise.
        Self { loaded }
    }

    /// VMREAD.
    fn read(&self, field: bindings::vmcs_field) -> u64 {
        // SAFETY: A VMCS is current, by the invariant. If the field does not exist, or VMX is off
        // on a host that is going down, this is 0.
        unsafe { bindings::exitpolicy_vmread(field) }
    }

    /// VMWRITE.
    fn write(&self, field: bindings::vmcs_field, value: u64) {
        // SAFETY: A VMCS is current, by the invariant; the callers write what KVM writes there.
        if !unsafe { bindings::exitpolicy_vmwrite(field, value) } {
            pr_warn_once!("cannot write {:#x} to VMCS field {:#x}\n", value, field);
        }
    }

    /// Sets the controls that are in `mask` to what `bits` says, in the VMCS and in KVM's shadow of
    /// it: from that, KVM's next change of another control writes all of them.
    fn change(&self, field: bindings::vmcs_field, shadow: *mut u32, mask: u32, bits: u32) {
        // SAFETY: `shadow` is in `loaded`, which is ours, by the invariant.
        let old = unsafe { ptr::read(shadow) };
        let new = old & !mask | bits;
        if new != old {
            self.write(field, new.into());
            // SAFETY: As above.
            unsafe { ptr::write(shadow, new) };
        }
    }

    fn change_exec(&self, mask: u32, bits: u32) {
        // SAFETY: Ours, by the invariant.
        let shadow = unsafe { &raw mut (*self.loaded).controls_shadow.exec };
        self.change(
            bindings::vmcs_field_CPU_BASED_VM_EXEC_CONTROL,
            shadow,
            mask,
            bits,
        );
    }

    fn change_secondary_exec(&self, mask: u32, bits: u32) {
        // SAFETY: Ours, by the invariant.
        let shadow = unsafe { &raw mut (*self.loaded).controls_shadow.secondary_exec };
        self.change(
            bindings::vmcs_field_SECONDARY_VM_EXEC_CONTROL,
            shadow,
            mask,
            bits,
        );
    }

    /// Ends a native HLT that an exit has interrupted. It is in the VMCS (SDM 28.3.4, "Saving
    /// Non-Register State"), and VM entry would return to it, with HLT exiting or without: KVM
    /// knows nothing of it, and would not wake the vCPU. The guest finds itself behind its HLT, as
    /// after an NMI, and also if its IF is clear: no more than what each exit does to it on SVM.
    fn leave_hlt(&self) {
        let state = self.read(bindings::vmcs_field_GUEST_ACTIVITY_STATE);
        if state == u64::from(bindings::GUEST_ACTIVITY_HLT) {
            self.write(
                bindings::vmcs_field_GUEST_ACTIVITY_STATE,
                bindings::GUEST_ACTIVITY_ACTIVE.into(),
            );
        }
    }
}
