// SPDX-License-Identifier: GPL-2.0

//! KVM: its VMs as the hooks see them, and what can be asked of it through `/dev/kvm`.

use crate::{
    bindings,
    kernel_ext::{
        file::{
            OwnedFd,
            OwnedFile, //
        },
        fprobe::Call, //
    },
    policy::Exits, //
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
    /// The VM of the vCPU that is being created.
    ///
    /// # Safety
    ///
    /// `call` must be one of a `kvm_x86_ops.vcpu_create`, whose argument is a `struct kvm_vcpu`.
    pub(crate) unsafe fn of_created_vcpu(call: &'a Call<'_>) -> Option<Self> {
        let vcpu = call.argument(0) as *const bindings::kvm_vcpu;
        // SAFETY: By the safety requirements; kvm_vm_ioctl_create_vcpu() has set `kvm`, which
        // stays the same. INVARIANT: The VM's file, which the caller has open, holds the VM until
        // the call returns.
        let ptr = NonNull::new(unsafe { (*vcpu).kvm })?;
        Some(Self {
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

    /// Makes KVM intercept what is not in `bits`, for vCPUs that are initialised from now on.
    ///
    /// # Safety
    ///
    /// The caller must hold `kvm->lock`, which all other writers hold too, and no vCPU may be
    /// online.
    pub(crate) unsafe fn set_disabled_exits(self, bits: u64) {
        // SAFETY: Alive, by the invariant. Readers without the lock, in KVM, read one word.
        unsafe { ptr::write_volatile(&raw mut (*self.ptr.as_ptr()).arch.disabled_exits, bits) }
    }

    /// The number of vCPUs that user space can reach. Grows only, under `kvm->lock`.
    pub(crate) fn online_vcpus(self) -> u32 {
        // SAFETY: Alive, by the invariant; an atomic counter, read like `atomic_read()` does.
        unsafe { ptr::read_volatile(&raw const (*self.ptr.as_ptr()).online_vcpus.counter) as u32 }
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
            "kvm_vcpu.kvm",
            offset_of!(bindings::kvm_vcpu, kvm),
            c.kvm_vcpu_kvm,
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

    /// Makes a VM with one vCPU and removes them again, for hooks to look at. Needs a task with an
    /// address space and a table of file descriptors.
    pub(crate) fn make_throw_away_vm(&self) -> Result {
        let vm_fd = OwnedFd::from_ioctl(self.0.ioctl(bindings::CONST_KVM_CREATE_VM, 0)?);
        let vm = vm_fd.file()?;
        let vcpu_fd = OwnedFd::from_ioctl(vm.ioctl(bindings::CONST_KVM_CREATE_VCPU, 0)?);
        // The vCPU holds the VM, and the last reference to each is to be put now, not on the way
        // back to user space.
        drop(vm);
        vcpu_fd.close_now()?;
        vm_fd.close_now()
    }
}
