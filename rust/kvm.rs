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
    ptr::{
        self,
        NonNull, //
    },
};
use kernel::{
    bindings as kernel_bindings,
    ffi::c_long,
    prelude::*,
    task::Task, //
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
        unsafe {
            ptr::read_volatile(&raw const (*self.ptr.as_ptr()).online_vcpus.counter) as u32
        }
    }

    /// The address space that the VM belongs to, as an identity only. Never changes.
    pub(crate) fn mm(self) -> usize {
        // SAFETY: Alive, by the invariant; set by kvm_create_vm() for good.
        unsafe { (*self.ptr.as_ptr()).mm.addr() }
    }

    fn created_vcpus(self) -> c_int {
        // SAFETY: Alive, by the invariant; changes under `kvm->lock`, but may be read without.
        unsafe { ptr::read_volatile(&raw const (*self.ptr.as_ptr()).created_vcpus) }
    }

    fn max_vcpus(self) -> c_int {
        // SAFETY: As above.
        unsafe { ptr::read_volatile(&raw const (*self.ptr.as_ptr()).max_vcpus) }
    }
}

/// Reads the number of online vCPUs of the VM with this key.
///
/// # Safety
///
/// The VM must be alive: the caller holds a lock that its vm_destroy has to take.
pub(crate) unsafe fn online_vcpus_of(key: usize) -> u32 {
    match NonNull::new(ptr::with_exposed_provenance_mut(key)) {
        // INVARIANT: Alive, as the caller promises.
        Some(ptr) => Vm {
            ptr,
            _lifetime: PhantomData,
        }
        .online_vcpus(),
        None => 0,
    }
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
        self.0
            .ioctl(bindings::CONST_KVM_CHECK_EXTENSION, extension)
    }

    /// The exits that KVM_CAP_X86_DISABLE_EXITS accepts on this host.
    pub(crate) fn accepted_exits(&self) -> Result<Exits> {
        self.check_extension(bindings::KVM_CAP_X86_DISABLE_EXITS)
            .map(|bits| Exits::from_bits_truncate(bits as u64))
    }

    /// Makes a VM with one vCPU, for a look at what KVM makes of it, and returns the exits that
    /// KVM disabled in it by itself.
    ///
    /// `before_vcpu` is told the VM's key before the vCPU is created. Needs a task with an address
    /// space and a table of file descriptors. The VM is gone when that task returns to user space.
    ///
    /// Fails with [`EUCLEAN`] if `struct kvm` does not look like the one that we know.
    pub(crate) fn probe_floor(&self, before_vcpu: impl FnOnce(usize)) -> Result<Exits> {
        let vm_fd = OwnedFd::from_ioctl(self.0.ioctl(bindings::CONST_KVM_CREATE_VM, 0)?);
        let vm_file = vm_fd.file()?;
        // kvm_init() gives /dev/kvm's and the VM files' operations the same owner. A thread of
        // this task that plays with the descriptor meanwhile gets no further than here.
        if vm_file.owner() != self.0.owner() {
            return Err(EBADF);
        }
        let vm = Vm {
            // INVARIANT: The VM that we have just made is what its file's private data points to,
            // and `vm_file`, which outlives `vm`, holds it.
            ptr: NonNull::new(vm_file.private_data().cast()).ok_or(EBADF)?,
            _lifetime: PhantomData,
        };

        // SAFETY: `current` is valid, and its `mm` changes by its own doing only.
        let mm = unsafe { (*Task::current_raw()).mm }.addr();
        let max_vcpus = self.check_extension(bindings::KVM_CAP_MAX_VCPUS)?;
        let floor = Exits::from_bits(vm.disabled_exits()).ok_or(EUCLEAN)?;
        if vm.mm() != mm
            || vm.max_vcpus() as c_long != max_vcpus
            || (vm.created_vcpus(), vm.online_vcpus()) != (0, 0)
        {
            return Err(EUCLEAN);
        }

        before_vcpu(vm.key());
        let _vcpu_fd =
            OwnedFd::from_ioctl(vm_file.ioctl(bindings::CONST_KVM_CREATE_VCPU, 0)?);
        if (vm.created_vcpus(), vm.online_vcpus()) != (1, 1) {
            return Err(EUCLEAN);
        }
        Ok(floor)
    }
}
