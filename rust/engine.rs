// SPDX-License-Identifier: GPL-2.0

//! Decides what a VM gets.

use crate::{
    interface::trace,
    kernel_ext::cgroup::Cgroup,
    kvm,
    policy::{
        Exits,
        Resolved, //
    },
    store::Store,
    vendor::{
        self,
        Vendor, //
    },
    vm::{
        Record,
        Vms, //
    },
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            AtomicFlag,
            Full,
            Relaxed, //
        },
        rcu, //
    },
};

/// What is known of the vendor module in use. Constant for as long as it is loaded.
#[derive(Clone, Copy)]
pub(crate) struct Facts {
    pub(crate) vendor: &'static dyn Vendor,
    /// What KVM can disable on this host.
    pub(crate) supported: Exits,
    /// What KVM disables in every VM by itself.
    pub(crate) floor: Exits,
}

/// What the hooks use and what the administrator reads and writes.
///
/// All of it may be used in atomic context and from any number of CPUs.
#[pin_data]
pub(crate) struct Engine {
    #[pin]
    pub(crate) store: Store,
    #[pin]
    pub(crate) vms: Vms,
    /// [`Facts`], packed into one word so that nobody sees half of them; 0 without a vendor.
    facts: Atomic<u64>,
    enabled: AtomicFlag,
    /// VMs and vCPUs that could not be decided on or kept track of.
    missed: Atomic<u64>,
    /// Decisions that took something away that the VMM had asked for.
    clamps: Atomic<u64>,
    /// The VM that is made to look at KVM, and not to be decided on; see [`Engine::probing`].
    probe: Atomic<usize>,
}

impl Engine {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            store <- Store::new(),
            vms <- Vms::new(),
            facts: Atomic::new(0),
            enabled: AtomicFlag::new(true),
            missed: Atomic::new(0),
            clamps: Atomic::new(0),
            probe: Atomic::new(0),
        })
    }

    /// What is known of the vendor in use, if there is one.
    pub(crate) fn facts(&self) -> Option<Facts> {
        let word = self.facts.load(Relaxed);
        Some(Facts {
            vendor: vendor::by_id((word & 0xff) as u32)?,
            supported: Exits::from_bits_truncate(word >> 8),
            floor: Exits::from_bits_truncate(word >> 16),
        })
    }

    /// Makes decisions possible, or impossible with nothing.
    pub(crate) fn set_facts(&self, facts: Option<Facts>) {
        let word = facts.map_or(0, |facts| {
            u64::from(facts.vendor.id())
                | facts.supported.bits() << 8
                | facts.floor.bits() << 16
        });
        self.facts.store(word, Relaxed);
    }

    /// The master switch.
    pub(crate) fn enabled(&self) -> bool {
        self.enabled.load(Relaxed)
    }

    /// Turns the master switch. VMs that have their decision keep it.
    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Relaxed);
    }

    pub(crate) fn missed(&self) -> u64 {
        self.missed.load(Relaxed)
    }

    pub(crate) fn count_missed(&self) {
        self.missed.add(1, Relaxed);
    }

    pub(crate) fn clamps(&self) -> u64 {
        self.clamps.load(Relaxed)
    }

    /// From now on the VM with this key is not decided on; what its vCPU's creation tells is only
    /// that the hook works.
    pub(crate) fn begin_probing(&self, key: usize) {
        self.probe.store(key, Relaxed);
    }

    /// Ends it, and returns whether the hook has fired since [`Engine::begin_probing`].
    pub(crate) fn end_probing(&self) -> bool {
        self.probe.xchg(0, Full) == 0
    }

    /// Decides on the VM of a vCPU that is being created, unless it has one already, and writes
    /// the decision into the VM. Returns whether there is a VM more to show.
    ///
    /// # Safety
    ///
    /// To be called on entry of `kvm_x86_ops.vcpu_create`: KVM then holds `kvm->lock`
    /// (virt/kvm/kvm_main.c: kvm_vm_ioctl_create_vcpu()), and has not looked at the flags for this
    /// vCPU yet.
    pub(crate) unsafe fn vcpu_created(&self, vm: kvm::Vm<'_>) -> bool {
        // Only the first vCPU decides. A VM that has one is decided on, or older than we are.
        if vm.online_vcpus() != 0 {
            return false;
        }
        if self.probe.cmpxchg(vm.key(), 0, Full).is_ok() {
            return false;
        }
        let Some(facts) = self.facts() else {
            // Its creator was faster than our notifier.
            self.count_missed();
            return false;
        };

        let known = self.earlier_try(vm);
        let flags = vm.disabled_exits();
        let current = Exits::from_bits_truncate(flags);
        let requested = match known {
            // What is there now and was not put there by us, KVM_ENABLE_CAP has added since.
            Some(before) => before.requested | (current & !before.effective),
            None => current & !facts.floor,
        };

        let current_task = kernel::current!();
        let leader = current_task.group_leader();
        let (cgroup, resolved) = {
            let rcu = rcu::read_lock();
            let cgroup = Cgroup::domain_of(leader, &rcu);
            let resolved = if self.enabled() {
                self.store.resolve(cgroup)
            } else {
                Resolved::UNRESTRICTED
            };
            (cgroup.id(), resolved)
        };
        let decision = resolved.decide(facts.floor, requested, facts.supported);

        if decision.effective != current {
            let unknown = flags & !Exits::ALL.bits();
            // SAFETY: The caller promises that `kvm->lock` is held; no vCPU is online.
            unsafe { vm.set_disabled_exits(unknown | decision.effective.bits()) };
        }
        if !decision.clamped.is_empty() {
            self.clamps.add(1, Relaxed);
        }

        let record = Record {
            id: known.map_or(0, |before| before.id),
            pid: leader.pid() as u32,
            mm: vm.mm(),
            cgroup,
            floor: facts.floor,
            requested,
            effective: decision.effective,
            clamped: decision.clamped,
        };
        let record = if known.is_some() {
            self.vms.replace(record);
            record
        } else {
            // Without memory the decision holds all the same, unlisted: what the administrator
            // does not allow must not depend on it.
            self.vms.add(vm.key(), record).unwrap_or_else(|_| {
                self.count_missed();
                record
            })
        };
        trace::decision(&record);
        known.is_none()
    }

    /// The record of an earlier try to create this VM's first vCPU, which failed after our hook.
    fn earlier_try(&self, vm: kvm::Vm<'_>) -> Option<Record> {
        let record = self.vms.by_key(vm.key())?;
        if record.mm == vm.mm() {
            return Some(record);
        }
        // Another VM at the address of one whose end we have not seen.
        self.vms.remove(vm.key());
        self.count_missed();
        None
    }
}
