// SPDX-License-Identifier: GPL-2.0

//! A throw-away VM, to see what KVM makes of a VM by itself and whether the hooks fire.

use crate::{
    kvm,
    policy::Exits, //
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
pub(crate) struct Probe {
    /// The task, as an identity only, or 0.
    task: Atomic<usize>,
    /// The VM's key, once its vCPU was created, that and [`Probe::FREED`] once the vCPU was freed,
    /// and [`Probe::DESTROYED`] once the VM was destroyed.
    vm: Atomic<usize>,
    /// The flags that the VM had, or [`Probe::IMPLAUSIBLE`].
    flags: Atomic<u64>,
}

impl Probe {
    /// No key: KVM's VMs are aligned.
    const DESTROYED: usize = 1;
    /// In no key, likewise.
    const FREED: usize = 2;
    /// No flags that we know.
    const IMPLAUSIBLE: u64 = u64::MAX;

    pub(crate) fn new() -> Self {
        Self {
            task: Atomic::new(0),
            vm: Atomic::new(0),
            flags: Atomic::new(0),
        }
    }

    /// Watches the VM that `make` makes and removes in this task, and returns the exits that KVM
    /// disabled in it, and what `make` returned, or nothing if a hook did not fire. One call at a
    /// time.
    ///
    /// Fails with [`EUCLEAN`] if the VM did not look like one, or has flags that we do not know.
    pub(crate) fn run<T>(&self, make: impl FnOnce() -> Result<T>) -> Result<Option<(Exits, T)>> {
        self.vm.store(0, Relaxed);
        // Ordered by being the same task that the hooks run in.
        self.task.store(Task::current_raw().addr(), Relaxed);
        let made = make();
        self.task.store(0, Relaxed);
        let made = made?;
        if self.vm.xchg(0, Full) != Self::DESTROYED {
            return Ok(None);
        }
        let flags = self.flags.load(Relaxed);
        let floor = Exits::from_bits(flags).ok_or(EUCLEAN)?;
        Ok(Some((floor, made)))
    }

    /// Whether this VM, a vCPU of which is being created, is the one; then takes a look at it.
    pub(crate) fn vcpu_created(&self, vm: kvm::Vm<'_>) -> bool {
        let current = Task::current_raw();
        if self.task.load(Relaxed) != current.addr() {
            return false;
        }
        // SAFETY: `current` is valid, and its `mm` changes by its own doing only.
        let mm = unsafe { (*current).mm }.addr();
        let plausible = vm.mm() == mm && vm.created_vcpus() == 1 && vm.online_vcpus() == 0;
        let flags = if plausible {
            vm.disabled_exits()
        } else {
            Self::IMPLAUSIBLE
        };
        self.flags.store(flags, Relaxed);
        self.vm.store(vm.key(), Relaxed);
        true
    }

    /// Takes note if the vCPU that is being freed is one of it.
    pub(crate) fn vcpu_freed(&self, key: usize) {
        let _ = self.vm.cmpxchg(key, key | Self::FREED, Full);
    }

    /// Takes note if the VM that is being destroyed is the one.
    pub(crate) fn vm_destroyed(&self, key: usize) {
        let _ = self.vm.cmpxchg(key | Self::FREED, Self::DESTROYED, Full);
    }
}
