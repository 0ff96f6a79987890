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
    probe::Probe,
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
    /// The VM that is made to look at KVM, and not to be decided on.
    pub(crate) probe: Probe,
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
            probe: Probe::new(),
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
            u64::from(facts.vendor.id()) | facts.supported.bits() << 8 | facts.floor.bits() << 16
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

    /// Decides on the VM of a vCPU that is being created, unless it has one already, and writes
    /// the decision into the VM. Returns whether there is a VM more to show.
    ///
    /// # Safety
    ///
    /// To be called on entry of `kvm_x86_ops.vcpu_create`: KVM then holds `kvm->lock`
    /// (virt/kvm/kvm_main.c: kvm_vm_ioctl_create_vcpu()), and has not looked at the flags for this
    /// vCPU yet.
    pub(crate) unsafe fn vcpu_created(&self, vm: kvm::Vm<'_>) -> bool {
        if self.probe.vcpu_created(vm) {
            return false;
        }
        let online = vm.online_vcpus();
        let known = self.vms.by_key(vm.key());
        // Only the first vCPU decides. A VM that has one is decided on, or older than we are.
        if online != 0 {
            if let Some(known) = known {
                self.vms.replace(Record {
                    vcpus: online + 1,
                    ..known
                });
            }
            return false;
        }
        let Some(facts) = self.facts() else {
            // Its creator was faster than our notifier.
            self.count_missed();
            return false;
        };

        let known = known.filter(|before| self.is_earlier_try(vm, before));
        let flags = vm.disabled_exits();
        let current = Exits::from_bits_truncate(flags);
        let requested = match known {
            // What is there now and was not put there by us, KVM_ENABLE_CAP has added since.
            Some(before) => before.requested | (current & !before.effective),
            None => current & !facts.floor,
        };

        let task = kernel::current!();
        let (cgroup, resolved) = {
            let rcu = rcu::read_lock();
            let cgroup = Cgroup::of_task(task, &rcu).domain();
            let resolved = if self.enabled() {
                self.store.resolve(cgroup)
            } else {
                Resolved::UNRESTRICTED
            };
            (cgroup.id(), resolved)
        };
        let decision = resolved.decide(facts.floor, requested, facts.supported);

        let mut record = Record {
            id: known.map_or(0, |before| before.id),
            pid: task.tgid() as u32,
            mm: vm.mm(),
            cgroup,
            floor: facts.floor,
            requested,
            effective: decision.effective,
            clamped: decision.clamped,
            vcpus: 1,
        };
        if known.is_some() {
            self.vms.replace(record);
        } else if let Ok(added) = self.vms.add(vm.key(), record) {
            record = added;
        } else {
            // What is not allowed is taken all the same. But nothing is given: if this vCPU cannot
            // be created, nobody would know at the next try that the VMM did not ask for it.
            record.effective = Resolved {
                disable: Exits::NONE,
                ..resolved
            }
            .decide(facts.floor, requested, facts.supported)
            .effective;
            self.count_missed();
        }

        if record.effective != current {
            let unknown = flags & !Exits::ALL.bits();
            // SAFETY: The caller promises that `kvm->lock` is held; no vCPU is online.
            unsafe { vm.set_disabled_exits(unknown | record.effective.bits()) };
        }
        if !record.clamped.is_empty() {
            self.clamps.add(1, Relaxed);
        }
        trace::decision(&record);
        known.is_none()
    }

    /// Whether a record is of an earlier try to create this VM's first vCPU, which failed after
    /// our hook, and not of another VM, at the same address, whose end we have not seen.
    fn is_earlier_try(&self, vm: kvm::Vm<'_>, record: &Record) -> bool {
        let same = record.mm == vm.mm();
        if !same {
            self.vms.remove(vm.key());
            self.count_missed();
        }
        same
    }

    /// Forgets a VM that is being destroyed, and returns whether it was known.
    pub(crate) fn vm_destroyed(&self, key: usize) -> bool {
        self.probe.vm_destroyed(key);
        self.vms.remove(key)
    }
}
