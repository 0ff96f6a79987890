// SPDX-License-Identifier: GPL-2.0

//! KVM: its VMs as the hooks see them, and what can be asked of it through `/dev/kvm`.

use crate::{
    bindings,
    kernel_ext::{
        file::{
            FileOperations,
            OwnedFd,
            OwnedFile, //
        },
        fprobe::Call, //
    },
    policy::Exits,
    probe::{
        ensure_all,
        WrongField, //
    },
};
use core::{
    marker::PhantomData,
    mem::{
        offset_of,
        size_of, //
    },
    ptr::{
        self,
        NonNull, //
    },
};
use kernel::{
    bindings as kernel_bindings,
    ffi::c_long,
    prelude::*, //
};

/// A `struct kvm`, for as long as the context that gave it to us lasts.
///
/// Nothing is ever borrowed from it: KVM changes it under us, so that all access is by raw
/// pointers. What may be read, and who writes it, is said at each method.
///
/// # Invariants
///
/// `ptr` points to a live `struct kvm` for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Vm<'a> {
    ptr: NonNull<bindings::kvm>,
    _lifetime: PhantomData<&'a ()>,
}

impl<'a> Vm<'a> {
    /// The VM with this key.
    ///
    /// # Safety
    ///
    /// Its `vm_destroy` must not return for `'a`.
    pub(crate) unsafe fn from_key(key: usize) -> Option<Self> {
        // INVARIANT: KVM frees a VM after its vm_destroy (virt/kvm/kvm_main.c: kvm_destroy_vm()).
        NonNull::new(key as *mut bindings::kvm).map(|ptr| Self {
            ptr,
            _lifetime: PhantomData,
        })
    }

    /// The VM that a file of KVM's belongs to, if it is one of a VM or a vCPU.
    ///
    /// # Safety
    ///
    /// `file` must be an open file, that stays open for `'a`.
    pub(crate) unsafe fn of_file(file: *const bindings::file, identity: &Identity) -> Option<Self> {
        // SAFETY: By the safety requirements.
        let (operations, data) = unsafe {
            (
                bindings::exitpolicy_file_operations(file),
                bindings::exitpolicy_file_data(file),
            )
        };
        let ptr = if operations == identity.vm.0 {
            data.cast::<bindings::kvm>()
        } else if operations == identity.vcpu.0 {
            // SAFETY: Only KVM's files have its operations, and a vCPU's has the vCPU, which lives
            // as long as the VM, of which the file has a reference.
            unsafe { (*data.cast::<bindings::kvm_vcpu>()).kvm }
        } else {
            return None;
        };
        // INVARIANT: The file has a reference on the VM.
        NonNull::new(ptr).map(|ptr| Self {
            ptr,
            _lifetime: PhantomData,
        })
    }

    /// The VM's identity. Another VM may have the same once this one is gone.
    pub(crate) fn key(self) -> usize {
        self.ptr.addr().get()
    }

    /// The identity of the VM that is being destroyed; nothing else of it may be used.
    ///
    /// # Safety
    ///
    /// `call` must be one of a `kvm_x86_ops.vm_destroy`, whose argument is a `struct kvm`.
    pub(crate) unsafe fn key_of_destroyed(call: &Call<'_>) -> usize {
        call.argument(0)
    }

    /// The exits that are disabled, with bits that we do not know as they are.
    ///
    /// Written by KVM under `kvm->lock` before the first vCPU exists (vm_init and
    /// KVM_CAP_X86_DISABLE_EXITS), and by us.
    pub(crate) fn disabled_exits(self) -> u64 {
        // SAFETY: Alive, by the invariant; a word, which others may write meanwhile.
        unsafe { ptr::read_volatile(&raw const (*self.ptr.as_ptr()).arch.disabled_exits) }
    }

    /// Changes the flags.
    ///
    /// # Safety
    ///
    /// No other may write them meanwhile. KVM does until a vCPU is online, and under `kvm->lock`
    /// (x86.c: kvm_vm_ioctl_enable_cap()).
    pub(crate) unsafe fn set_disabled_exits(self, bits: u64) {
        // SAFETY: Alive, by the invariant. Readers without the lock, in KVM, read one word.
        unsafe { ptr::write_volatile(&raw mut (*self.ptr.as_ptr()).arch.disabled_exits, bits) }
    }

    /// The number of vCPUs that user space can reach. Grows only, under `kvm->lock`.
    pub(crate) fn online_vcpus(self) -> u32 {
        // SAFETY: Alive, by the invariant; an atomic counter, read like `atomic_read()` does.
        unsafe { ptr::read_volatile(&raw const (*self.ptr.as_ptr()).online_vcpus.counter) as u32 }
    }

    /// The VM as functions of the vendor's have it.
    pub(crate) fn as_ptr(self) -> *mut bindings::kvm {
        self.ptr.as_ptr()
    }

    /// Whether its vCPUs may run: the VMM's address space is there, and has not ended with the last
    /// process that had it. KVM takes their calls from who has that one only (kvm_main.c:
    /// kvm_vcpu_ioctl()), and nobody can have it again; but files that somebody else has - of the
    /// VM, a vCPU, their statistics, guest_memfd - keep the VM.
    pub(crate) fn can_run(self) -> bool {
        // SAFETY: Alive, by the invariant.
        unsafe { bindings::exitpolicy_vm_memory_is_used(self.as_ptr()) }
    }

    /// The address space that the VM belongs to, as an identity only. Never changes.
    pub(crate) fn mm(self) -> usize {
        // SAFETY: Alive, by the invariant; set by kvm_create_vm() for good.
        unsafe { (*self.ptr.as_ptr()).mm.addr() }
    }

    /// The number of vCPUs that exist or are being created. Changes under `kvm->lock`.
    pub(crate) fn created_vcpus(self) -> c_int {
        // SAFETY: Alive, by the invariant.
        unsafe { ptr::read_volatile(&raw const (*self.ptr.as_ptr()).created_vcpus) }
    }

    /// Whether the guest's registers are out of KVM's reach, as VMMs ask for it today: TDX, SEV-SNP,
    /// and VMs that were made for SEV-ES (svm/sev.c: sev_vm_init()). Set when the VM is made.
    pub(crate) fn has_protected_state(self) -> bool {
        // SAFETY: Alive, by the invariant.
        let field = unsafe { &raw const (*self.ptr.as_ptr()).arch.has_protected_state };
        // SAFETY: As above; a byte, since Rust's `bool` must be 0 or 1.
        unsafe { ptr::read_volatile(field.cast::<u8>()) != 0 }
    }

    /// Fails unless a VM whose first vCPU is being created has in its fields what KVM has put there,
    /// as far as that is known: in those that are used, where it is not 0, and else in those beside
    /// them. `mm` is the address space of its VMM, who has asked for nothing.
    pub(crate) fn ensure_new(self, mm: usize) -> Result<(), WrongField> {
        let kvm = self.as_ptr();
        // SAFETY: Alive, by the invariant, and written under `kvm->lock`, or before there are vCPUs.
        let (pages, first_page, vm_type, clock) = unsafe {
            let arch = &raw const (*kvm).arch;
            let pages = &raw const (*arch).active_mmu_pages;
            let first_page = ptr::read_volatile(&raw const (*pages).next);
            let clock = ptr::read_volatile(&raw const (*arch).kvmclock_offset);
            (pages, first_page, (*arch).vm_type, clock)
        };
        ensure_all(&[
            ("kvm.mm", self.mm() == mm),
            ("kvm.created_vcpus", self.created_vcpus() == 1),
            ("kvm.online_vcpus", self.online_vcpus() == 0),
            (
                "kvm.arch.vm_type",
                u32::from(vm_type) == bindings::KVM_X86_DEFAULT_VM,
            ),
            ("kvm.arch.has_protected_state", !self.has_protected_state()),
            // Behind these two: an empty list, which is its own first entry.
            (
                "kvm.arch.active_mmu_pages",
                ptr::eq(first_page.cast_const(), pages),
            ),
            (
                "kvm.arch.disabled_exits",
                Exits::from_bits(self.disabled_exits()).is_some(),
            ),
            // Behind that: the time that the host has been up, below 0.
            ("kvm.arch.kvmclock_offset", clock < 0),
        ])
    }

    /// Whether it is a TDX VM, whose vCPUs are no VMX vCPUs. Set by vm_init for good.
    pub(crate) fn is_tdx(self) -> bool {
        // SAFETY: Alive, by the invariant.
        let vm_type = unsafe { ptr::read_volatile(&raw const (*self.ptr.as_ptr()).arch.vm_type) };
        u32::from(vm_type) == bindings::KVM_X86_TDX_VM
    }

    /// The online vCPU with this index, for as long as none of the VM's vCPUs is freed.
    ///
    /// # Safety
    ///
    /// No `vcpu_free` of a vCPU of this VM that was online may return for `'b`.
    pub(crate) unsafe fn vcpu<'b>(self, index: u32) -> Option<Vcpu<'b>>
    where
        'a: 'b,
    {
        // SAFETY: Alive, by the invariant; kvm_get_vcpu() looks at online vCPUs only.
        let vcpu = unsafe { bindings::exitpolicy_vcpu(self.ptr.as_ptr(), index) };
        // INVARIANT: It is freed after its vcpu_free (x86.c: kvm_arch_vcpu_destroy()).
        NonNull::new(vcpu).map(|ptr| Vcpu {
            ptr,
            _lifetime: PhantomData,
        })
    }
}

/// A `struct kvm_vcpu`, like [`Vm`].
///
/// # Invariants
///
/// `ptr` points to a live `struct kvm_vcpu` of a live VM for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Vcpu<'a> {
    ptr: NonNull<bindings::kvm_vcpu>,
    _lifetime: PhantomData<&'a ()>,
}

impl<'a> Vcpu<'a> {
    /// The vCPU that a probed function has as its first argument.
    ///
    /// # Safety
    ///
    /// `call` must be one of a function of KVM's whose first argument is a `struct kvm_vcpu` with
    /// its `kvm` set.
    pub(crate) unsafe fn of_call(call: &'a Call<'_>) -> Option<Self> {
        let ptr = NonNull::new(call.argument(0) as *mut bindings::kvm_vcpu)?;
        // INVARIANT: KVM calls with a vCPU that does not go before the call returns, nor does its
        // VM, which the file behind the ioctl, or the one that destroys it, holds.
        Some(Self {
            ptr,
            _lifetime: PhantomData,
        })
    }

    /// The vCPU as private structures of the vendor's have it as their first member.
    pub(crate) fn as_ptr(self) -> *mut bindings::kvm_vcpu {
        self.ptr.as_ptr()
    }

    /// Its VM. Set before anybody can see the vCPU, for good.
    pub(crate) fn vm(self) -> Option<Vm<'a>> {
        // SAFETY: Alive, by the invariant. INVARIANT: So is its VM.
        let ptr = NonNull::new(unsafe { (*self.as_ptr()).kvm })?;
        Some(Vm {
            ptr,
            _lifetime: PhantomData,
        })
    }

    /// What KVM_CREATE_VCPU was called with. Never changes.
    pub(crate) fn id(self) -> u32 {
        // SAFETY: Alive, by the invariant.
        unsafe { (*self.as_ptr()).vcpu_id as u32 }
    }

    /// Its place among the VM's vCPUs, unless it is being created or its creation has failed.
    pub(crate) fn index(self) -> Option<u32> {
        // SAFETY: Alive, by the invariant. Written before it is online, and when it fails to be.
        unsafe { ptr::read_volatile(&raw const (*self.as_ptr()).vcpu_idx) }
            .try_into()
            .ok()
    }

    /// As [`Vm::ensure_new`], of a vCPU on entry of `vcpu_create`, without an interrupt controller.
    pub(crate) fn ensure_new(self) -> Result<(), WrongField> {
        ensure_all(&[
            ("kvm_vcpu.vcpu_id", self.id() == 0),
            ("kvm_vcpu.vcpu_idx", self.index().is_none()),
            ("kvm_vcpu.arch.apic", !self.has_lapic()),
            ("kvm_vcpu.arch.last_vmentry_cpu", !self.has_run()),
        ])
    }

    /// The same on entry of `vcpu_free`, when it was made and has never run.
    pub(crate) fn ensure_made(self) -> Result<(), WrongField> {
        /// APIC_DEFAULT_PHYS_BASE, and what cpuid_query_maxphyaddr() says without a table.
        const APIC_BASE: u64 = 0xfee0_0000;
        const NO_MAXPHYADDR: c_int = 36;

        // SAFETY: Alive, by the invariant; nobody else knows it any more.
        let arch = unsafe { &raw const (*self.as_ptr()).arch };
        // SAFETY: As above.
        let (entries, count, apic_base, maxphyaddr) = unsafe {
            (
                (*arch).cpuid_entries,
                (*arch).cpuid_nent,
                (*arch).apic_base,
                (*arch).maxphyaddr,
            )
        };
        ensure_all(&[
            ("kvm_vcpu.vcpu_idx", self.index() == Some(0)),
            // As KVM does for a new one (x86.c: kvm_vcpu_after_set_cpuid()).
            ("kvm_vcpu.requests", self.is_asked()),
            ("kvm_vcpu.mode", !self.in_guest()),
            // Beside `apic`.
            ("kvm_vcpu.arch.apic_base", apic_base & !0xfff == APIC_BASE),
            ("kvm_vcpu.arch.apic", !self.has_lapic()),
            (
                "kvm_vcpu.arch.cpuid_entries",
                entries.is_null() && count == 0,
            ),
            // Behind it.
            ("kvm_vcpu.arch.maxphyaddr", maxphyaddr == NO_MAXPHYADDR),
            ("kvm_vcpu.arch.last_vmentry_cpu", !self.has_run()),
            ("kvm_vcpu.arch.pv_cpuid.features", !self.knows_pv_unhalt()),
        ])
    }

    /// Whether it may be executing guest code. If not, it will look at its requests before it does.
    ///
    /// Ordered after [`Vcpu::ask`], as virt/kvm/vcpu-requests describes.
    pub(crate) fn in_guest(self) -> bool {
        // SAFETY: Alive, by the invariant.
        unsafe { bindings::exitpolicy_vcpu_in_guest(self.as_ptr()) }
    }

    /// Asks it to call `recalc_intercepts` before it executes guest code again, and makes it leave
    /// the guest for that. Does not wait.
    pub(crate) fn ask(self) {
        // SAFETY: Alive, by the invariant.
        unsafe { bindings::exitpolicy_vcpu_ask(self.as_ptr()) }
    }

    /// Whether it was asked and has not looked yet.
    pub(crate) fn is_asked(self) -> bool {
        // SAFETY: Alive, by the invariant.
        unsafe { bindings::exitpolicy_vcpu_is_asked(self.as_ptr()) }
    }

    /// Whether it runs a guest of its guest. Changes in its own thread.
    pub(crate) fn in_l2(self) -> bool {
        // SAFETY: Alive, by the invariant.
        unsafe { bindings::exitpolicy_vcpu_in_l2(self.as_ptr()) }
    }

    /// Whether it may be on its way from L1, where it was seen outside of the guest, into L2, and so
    /// get there without having changed. VMX only.
    pub(crate) fn may_enter_l2(self) -> bool {
        // SAFETY: Alive, by the invariant.
        unsafe { bindings::exitpolicy_vcpu_may_enter_l2(self.as_ptr()) }
    }

    /// Whether its guest was told of paravirtual unhalting, now or before.
    ///
    /// Written by KVM_SET_CPUID before the vCPU runs, and by [`Vcpu::tell_pv_unhalt`].
    pub(crate) fn knows_pv_unhalt(self) -> bool {
        // SAFETY: Alive, by the invariant; written by KVM_SET_CPUID, a word.
        let features =
            unsafe { ptr::read_volatile(&raw const (*self.as_ptr()).arch.pv_cpuid.features) };
        features & 1 << bindings::KVM_FEATURE_PV_UNHALT != 0
    }

    /// Lets it use paravirtual unhalting, as far as KVM asks (KVM_CAP_ENFORCE_PV_FEATURE_CPUID).
    ///
    /// # Safety
    ///
    /// `vcpu->mutex` must be held.
    pub(crate) unsafe fn tell_pv_unhalt(self) {
        // SAFETY: Alive, by the invariant; written under the mutex only.
        unsafe {
            let features = &raw mut (*self.as_ptr()).arch.pv_cpuid.features;
            ptr::write_volatile(
                features,
                ptr::read_volatile(features) | 1 << bindings::KVM_FEATURE_PV_UNHALT,
            );
        }
    }

    /// Whether KVM keeps its local APIC.
    pub(crate) fn has_lapic(self) -> bool {
        // SAFETY: Alive, by the invariant; set when it is created, for good.
        !unsafe { (*self.as_ptr()).arch.apic }.is_null()
    }

    /// Whether it has run.
    pub(crate) fn has_run(self) -> bool {
        // SAFETY: Alive, by the invariant; -1 until it has.
        unsafe { ptr::read_volatile(&raw const (*self.as_ptr()).arch.last_vmentry_cpu) != -1 }
    }
}

/// A vCPU that is on its way into the guest, in its own thread, on this CPU: its controls can be
/// written.
#[derive(Clone, Copy)]
pub(crate) struct LoadedVcpu<'a>(Vcpu<'a>);

impl<'a> LoadedVcpu<'a> {
    /// The vCPU that recalculates its intercepts.
    ///
    /// # Safety
    ///
    /// `call` must be one of a `kvm_x86_ops.recalc_intercepts`. KVM calls that for a vCPU that is
    /// loaded only (x86.c: vcpu_enter_guest()), and a probe's handler runs with preemption
    /// disabled, so that it stays where it is.
    pub(crate) unsafe fn of_call(call: &'a Call<'_>) -> Option<Self> {
        // SAFETY: By the safety requirements.
        unsafe { Vcpu::of_call(call) }.map(Self)
    }

    /// The vCPU itself.
    pub(crate) fn vcpu(self) -> Vcpu<'a> {
        self.0
    }
}

/// Compares the layouts that bindgen found with those that the C compiler found. Says what
/// differs, and fails with [`ENOEXEC`].
pub(crate) fn check_layouts() -> Result {
    // SAFETY: A constant.
    let c = unsafe { &bindings::exitpolicy_layout };
    for (what, rust, c) in [
        ("sizeof(struct kvm)", size_of::<bindings::kvm>(), c.kvm_size),
        ("kvm.mm", offset_of!(bindings::kvm, mm), c.kvm_mm),
        (
            "kvm.created_vcpus",
            offset_of!(bindings::kvm, created_vcpus),
            c.kvm_created_vcpus,
        ),
        (
            "kvm.online_vcpus",
            offset_of!(bindings::kvm, online_vcpus),
            c.kvm_online_vcpus,
        ),
        (
            "kvm.arch.disabled_exits",
            offset_of!(bindings::kvm, arch.disabled_exits),
            c.kvm_disabled_exits,
        ),
        (
            "kvm.arch.has_protected_state",
            offset_of!(bindings::kvm, arch.has_protected_state),
            c.kvm_has_protected_state,
        ),
        (
            "kvm.arch.vm_type",
            offset_of!(bindings::kvm, arch.vm_type),
            c.kvm_vm_type,
        ),
        (
            "kvm_vcpu.kvm",
            offset_of!(bindings::kvm_vcpu, kvm),
            c.kvm_vcpu_kvm,
        ),
        (
            "kvm_vcpu.vcpu_id",
            offset_of!(bindings::kvm_vcpu, vcpu_id),
            c.kvm_vcpu_id,
        ),
        (
            "kvm_vcpu.vcpu_idx",
            offset_of!(bindings::kvm_vcpu, vcpu_idx),
            c.kvm_vcpu_idx,
        ),
        (
            "kvm_vcpu.arch.apic",
            offset_of!(bindings::kvm_vcpu, arch.apic),
            c.kvm_vcpu_apic,
        ),
        (
            "kvm_vcpu.arch.cpuid_entries",
            offset_of!(bindings::kvm_vcpu, arch.cpuid_entries),
            c.kvm_vcpu_cpuid_entries,
        ),
        (
            "kvm_vcpu.arch.cpuid_nent",
            offset_of!(bindings::kvm_vcpu, arch.cpuid_nent),
            c.kvm_vcpu_cpuid_nent,
        ),
        (
            "kvm_vcpu.arch.pv_cpuid.features",
            offset_of!(bindings::kvm_vcpu, arch.pv_cpuid.features),
            c.kvm_vcpu_pv_cpuid,
        ),
        (
            "kvm_vcpu.arch.last_vmentry_cpu",
            offset_of!(bindings::kvm_vcpu, arch.last_vmentry_cpu),
            c.kvm_vcpu_last_vmentry_cpu,
        ),
        (
            "vcpu_svm.vcpu",
            offset_of!(bindings::vcpu_svm, vcpu),
            c.vcpu_svm_vcpu,
        ),
        (
            "vcpu_svm.vmcb01.ptr",
            offset_of!(bindings::vcpu_svm, vmcb01.ptr),
            c.vcpu_svm_vmcb01,
        ),
        (
            "vmcb.control.intercepts",
            offset_of!(bindings::vmcb, control.intercepts),
            c.vmcb_intercepts,
        ),
        (
            "vmcb.control.pause_filter_thresh",
            offset_of!(bindings::vmcb, control.pause_filter_thresh),
            c.vmcb_pause_filter_thresh,
        ),
        (
            "vmcb.control.pause_filter_count",
            offset_of!(bindings::vmcb, control.pause_filter_count),
            c.vmcb_pause_filter_count,
        ),
        (
            "vcpu_vmx.vcpu",
            offset_of!(bindings::vcpu_vmx, vcpu),
            c.vcpu_vmx_vcpu,
        ),
        (
            "vcpu_vmx.vmcs01",
            offset_of!(bindings::vcpu_vmx, vmcs01),
            c.vcpu_vmx_vmcs01,
        ),
        (
            "vcpu_vmx.loaded_vmcs",
            offset_of!(bindings::vcpu_vmx, loaded_vmcs),
            c.vcpu_vmx_loaded_vmcs,
        ),
        (
            "vcpu_vmx.ple_window",
            offset_of!(bindings::vcpu_vmx, ple_window),
            c.vcpu_vmx_ple_window,
        ),
        (
            "vcpu_vmx.ple_window_dirty",
            offset_of!(bindings::vcpu_vmx, ple_window_dirty),
            c.vcpu_vmx_ple_window_dirty,
        ),
        (
            "loaded_vmcs.controls_shadow.exec",
            offset_of!(bindings::loaded_vmcs, controls_shadow.exec),
            c.loaded_vmcs_exec,
        ),
        (
            "loaded_vmcs.controls_shadow.secondary_exec",
            offset_of!(bindings::loaded_vmcs, controls_shadow.secondary_exec),
            c.loaded_vmcs_secondary_exec,
        ),
        (
            "sizeof(struct fprobe)",
            size_of::<bindings::fprobe>(),
            c.fprobe_size,
        ),
        (
            "fprobe.entry_handler",
            offset_of!(bindings::fprobe, entry_handler),
            c.fprobe_entry_handler,
        ),
    ] {
        if rust != c {
            pr_err!("{} is {} in the bindings and {} in C\n", what, rust, c);
            return Err(ENOEXEC);
        }
    }
    Ok(())
}

/// `/dev/kvm`, opened from within the kernel. While it is open, the vendor module stays loaded.
pub(crate) struct DevKvm(OwnedFile);

impl DevKvm {
    /// Opens the device. Fails with [`ENOENT`], [`ENODEV`] or [`ENXIO`] where no vendor module is
    /// loaded. Process context.
    pub(crate) fn open() -> Result<Self> {
        OwnedFile::open(
            c"/dev/kvm",
            kernel_bindings::O_RDWR | kernel_bindings::O_CLOEXEC,
        )
        .map(Self)
    }

    /// KVM_CHECK_EXTENSION.
    fn check_extension(&self, extension: u32) -> Result<c_long> {
        self.0.ioctl(bindings::CONST_KVM_CHECK_EXTENSION, extension)
    }

    /// The exits that KVM_CAP_X86_DISABLE_EXITS accepts on this host.
    pub(crate) fn accepted_exits(&self) -> Result<Exits> {
        self.check_extension(bindings::KVM_CAP_X86_DISABLE_EXITS)
            .map(|bits| Exits::from_bits_truncate(bits as u64))
    }

    /// Makes a VM with one vCPU and removes them again, for hooks to look at; `made` is told its key
    /// before it has the vCPU. Returns what their files are known by. Needs a task with an address
    /// space and a table of file descriptors.
    pub(crate) fn make_throw_away_vm(&self, made: impl FnOnce(usize)) -> Result<Identity> {
        let vm_fd = OwnedFd::from_ioctl(self.0.ioctl(bindings::CONST_KVM_CREATE_VM, 0)?);
        let vm = vm_fd.file()?;
        made(vm.data());
        let vcpu_fd = OwnedFd::from_ioctl(vm.ioctl(bindings::CONST_KVM_CREATE_VCPU, 0)?);
        let identity = Identity {
            vm: vm.operations(),
            vcpu: vcpu_fd.file()?.operations(),
        };
        // The vCPU holds the VM, and the last reference to each is to be put now, not on the way
        // back to user space.
        drop(vm);
        vcpu_fd.close_now()?;
        vm_fd.close_now()?;
        Ok(identity)
    }
}

/// What KVM's files are known by.
pub(crate) struct Identity {
    vm: FileOperations,
    vcpu: FileOperations,
}
