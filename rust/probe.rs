// SPDX-License-Identifier: GPL-2.0

//! A throw-away VM, to see what KVM makes of a VM by itself and whether the hooks fire.

use crate::{
    kvm,
    policy::Exits,
    vendor::{
        self,
        Vendor, //
    },
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Full,
        Relaxed, //
    },
    task::Task, //
};

/// What the hooks have seen of the VM that a task makes for them.
///
/// Until that VM has been looked at, nobody knows whether KVM has its fields where this module looks
/// for them: no pointer of a vCPU's is followed by a hook before it has led to this VM.
pub(crate) struct Probe {
    /// The task, as an identity only, or 0.
    task: Atomic<usize>,
    /// The vendor whose VM it is, by its id.
    vendor: Atomic<u32>,
    /// The VM's key, as its file has it.
    expected: Atomic<usize>,
    /// The VM's key, once its vCPU was created, that and [`Probe::FREED`] once the vCPU was freed,
    /// and [`Probe::DESTROYED`] once the VM was destroyed.
    vm: Atomic<usize>,
    /// The flags that the VM had, or [`Probe::REFUSED`].
    flags: Atomic<u64>,
}

/// The name of a field that has not what KVM has put there.
pub(crate) type WrongField = &'static str;

/// Fails with the first of some fields that has not what it should.
pub(crate) fn ensure_all(fields: &[(WrongField, bool)]) -> Result<(), WrongField> {
    match fields.iter().find(|(_, right)| !right) {
        Some((field, _)) => Err(field),
        None => Ok(()),
    }
}

impl Probe {
    /// No key: KVM's VMs are aligned.
    const DESTROYED: usize = 1;
    /// In no key, likewise.
    const FREED: usize = 2;
    /// No flags that we know.
    const REFUSED: u64 = u64::MAX;

    pub(crate) fn new() -> Self {
        Self {
            task: Atomic::new(0),
            vendor: Atomic::new(0),
            expected: Atomic::new(0),
            vm: Atomic::new(0),
            flags: Atomic::new(0),
        }
    }

    /// Watches the VM that `make` makes and removes in this task, and returns the exits that KVM
    /// disabled in it, and what `make` returned, or nothing if a hook did not fire. One call at a
    /// time. `make` calls [`Probe::expect`].
    ///
    /// Fails with [`EUCLEAN`], after saying why, if the VM or its vCPU did not look like one.
    pub(crate) fn run<T>(
        &self,
        vendor: &dyn Vendor,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<Option<(Exits, T)>> {
        self.vendor.store(vendor.id(), Relaxed);
        self.expected.store(0, Relaxed);
        self.vm.store(0, Relaxed);
        self.flags.store(0, Relaxed);
        // Ordered by being the same task that the hooks run in.
        self.task.store(Task::current_raw().addr(), Relaxed);
        let made = make();
        self.task.store(0, Relaxed);
        let last = self.vm.xchg(0, Full);
        let made = made?;
        match self.flags.load(Relaxed) {
            Self::REFUSED => Err(EUCLEAN),
            flags if last == Self::DESTROYED => Ok(Some((Exits::from_bits_truncate(flags), made))),
            _ => Ok(None),
        }
    }

    /// Says which VM it is, before it has a vCPU.
    pub(crate) fn expect(&self, key: usize) {
        self.expected.store(key, Relaxed);
    }

    /// Says which field is wrong, if one is.
    fn judge(&self, vendor: &dyn Vendor, fields: Result<(), WrongField>) {
        if let Err(field) = fields {
            self.flags.store(Self::REFUSED, Relaxed);
            pr_err!(
                "{}: a new VM has something else where {} should be: \
                 this module was built from other sources than KVM\n",
                vendor.module(),
                field
            );
        }
    }

    /// Whether this vCPU, which is being created, is one of the VM; then takes a look at both.
    pub(crate) fn vcpu_created(&self, vcpu: kvm::Vcpu<'_>) -> bool {
        let current = Task::current_raw();
        if self.task.load(Relaxed) != current.addr() {
            return false;
        }
        // SAFETY: `current` is valid, and its `mm` changes by its own doing only.
        let mm = unsafe { (*current).mm }.addr();
        let expected = self.expected.load(Relaxed);
        let looked = match vcpu.vm() {
            Some(vm) if vm.key() == expected => {
                self.vm.store(expected, Relaxed);
                self.flags.store(vm.disabled_exits(), Relaxed);
                vm.ensure_new(mm).and_then(|()| vcpu.ensure_new())
            }
            _ => Err("kvm_vcpu.kvm"),
        };
        if let Some(vendor) = vendor::by_id(self.vendor.load(Relaxed)) {
            self.judge(vendor, looked);
        }
        true
    }

    /// Takes note if the vCPU that is being freed is one of it, after a look at what KVM has made of
    /// the vCPU.
    pub(crate) fn vcpu_freed(&self, key: usize, vcpu: kvm::Vcpu<'_>) {
        if self.vm.cmpxchg(key, key | Self::FREED, Full).is_err() {
            return;
        }
        let flags = self.flags.load(Relaxed);
        let vendor = vendor::by_id(self.vendor.load(Relaxed));
        if let (Some(vendor), false) = (vendor, flags == Self::REFUSED) {
            let floor = Exits::from_bits_truncate(flags);
            let looked = vcpu.ensure_made();
            self.judge(
                vendor,
                looked.and_then(|()| vendor.ensure_made(vcpu, floor)),
            );
        }
    }

    /// Takes note if the VM that is being destroyed is the one.
    pub(crate) fn vm_destroyed(&self, key: usize) {
        let _ = self.vm.cmpxchg(key | Self::FREED, Self::DESTROYED, Full);
    }
}
