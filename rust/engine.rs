// SPDX-License-Identifier: GPL-2.0

//! Decides what a VM gets.

use crate::{
    interface::trace,
    kernel_ext::{
        cgroup::Cgroup,
        process::Process, //
    },
    kvm,
    policy::{
        Decision,
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
        hold_module,
        New,
        Vcpu,
        Vm,
        Vms, //
    },
};
use kernel::{
    alloc::{
        flags::__GFP_NOWARN,
        Flags, //
    },
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            AtomicFlag,
            Full,
            Relaxed, //
        },
        rcu, //
    },
    task::Task, //
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

/// How hooks allocate what a VM can make large: it cannot wait, and shall not fill the log.
fn in_hook() -> Flags {
    GFP_ATOMIC | __GFP_NOWARN
}

/// The cgroup whose policies and whose ancestors' are those of a task.
fn domain_of<'rcu>(task: &Task, rcu: &'rcu rcu::Guard) -> &'rcu Cgroup {
    Cgroup::of_task(task, rcu).domain()
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
    /// Counts changes of policies, so that a decision can tell whether it is of yesterday.
    generation: Atomic<u64>,
    /// The last change that was begun.
    stamp: Atomic<u64>,
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
            generation: Atomic::new(0),
            stamp: Atomic::new(0),
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

    /// Turns the master switch. VMs that have their decision keep it until it is changed.
    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Relaxed);
        self.policies_changed();
    }

    /// To be called after policies have changed and before VMs are decided on again: one that is
    /// being decided on and not to be seen yet will find out.
    pub(crate) fn policies_changed(&self) {
        self.generation.fetch_add(1, Full);
    }

    /// A stamp for another change.
    pub(crate) fn next_stamp(&self) -> u64 {
        self.stamp.fetch_add(1, Relaxed) + 1
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
    /// the decision into the VM. Returns whether the worker has something to do.
    ///
    /// # Safety
    ///
    /// To be called on entry of `kvm_x86_ops.vcpu_create`: KVM then holds `kvm->lock`
    /// (virt/kvm/kvm_main.c: kvm_vm_ioctl_create_vcpu()), and has not looked at the flags for this
    /// vCPU yet.
    pub(crate) unsafe fn vcpu_created(&self, vcpu: kvm::Vcpu<'_>) -> bool {
        if self.probe.vcpu_created(vcpu) {
            return false;
        }
        let Some(facts) = self.facts() else {
            // Its creator was faster than our notifier.
            self.count_missed();
            return false;
        };
        let Some(vm) = vcpu.vm() else {
            return false;
        };
        let online = vm.online_vcpus();
        let id = if online == 0 {
            // SAFETY: By the safety requirements; no vCPU is online.
            unsafe { self.first_vcpu_created(&facts, vm) }
        } else {
            self.vms.id_of(vm.key()).or_else(|| {
                // SAFETY: A vCPU is online.
                unsafe { self.adopt(vm, kernel::current!()) }
            })
        };
        let Some(id) = id else {
            return false;
        };
        if self
            .add_vcpu(&facts, id, online as usize, vcpu.id(), true, in_hook())
            .is_err()
        {
            self.count_missed();
            // The worker can wait for memory.
            self.vms.with(id, |vm, _| vm.stale = true);
        }
        true
    }

    /// Decides on a VM, writes the decision into it, and returns its id if it could be remembered.
    ///
    /// # Safety
    ///
    /// `kvm->lock` must be held, and no vCPU be online.
    unsafe fn first_vcpu_created(&self, facts: &Facts, vm: kvm::Vm<'_>) -> Option<u64> {
        let flags = vm.disabled_exits();
        let current = Exits::from_bits_truncate(flags);
        let known = self
            .vms
            .id_of(vm.key())
            .filter(|id| self.is_earlier_try(vm, *id));
        let earlier = known.and_then(|id| {
            self.vms
                .with(id, |vm, _| (vm.requested, vm.flags, vm.disable))
        });
        let (requested, disable) = match earlier {
            // What is there now and was not put there by us, KVM_ENABLE_CAP has added since.
            Some((requested, written, disable)) => (requested | (current & !written), disable),
            None => (current & !facts.floor, None),
        };

        let task = kernel::current!();
        let generation = self.generation.load(Acquire);
        let mut overridable = self.enabled();
        let (cgroup, resolved) = self.policies_of_task(task);
        let mut resolved = if overridable {
            resolved
        } else {
            Resolved::UNRESTRICTED
        };
        let mut decision = resolved.overridden(disable.filter(|_| overridable)).decide(
            facts.floor,
            requested,
            facts.supported,
        );
        let home = facts.floor | requested;
        let mut hold = None;
        if decision.effective != home {
            hold = hold_module();
            if hold.is_none() {
                // The module is being unloaded, and nothing is to be left behind.
                (resolved, overridable) = (Resolved::UNRESTRICTED, false);
                decision = resolved.decide(facts.floor, requested, facts.supported);
            }
        }

        let id = match (known, Process::of(task)) {
            (Some(id), _) => {
                self.vms.with(id, |vm, kvm| {
                    vm.cgroup = cgroup;
                    vm.requested = requested;
                    vm.resolved = resolved;
                    vm.overridable = overridable;
                    vm.decision = decision;
                    vm.flags = decision.effective;
                    vm.keep = home & decision.effective;
                    // The override has changed meanwhile.
                    vm.stale |= vm.disable != disable;
                    if let Some(kvm) = kvm {
                        vm.account(kvm);
                    }
                });
                Some(id)
            }
            (None, Some(process)) => {
                let new = New {
                    process,
                    mm: vm.mm(),
                    cgroup,
                    floor: facts.floor,
                    requested,
                    flags: decision.effective,
                    resolved,
                    overridable,
                    decision,
                    adopted: false,
                    hold,
                };
                self.vms.add(vm.key(), new).ok()
            }
            (None, None) => None,
        };
        if id.is_none() {
            // What is not allowed is taken all the same. But nothing is given: if this vCPU cannot
            // be created, nobody would know at the next try that the VMM did not ask for it.
            decision.effective = resolved
                .overridden(Some(Exits::NONE))
                .decide(facts.floor, requested, facts.supported)
                .effective;
            self.count_missed();
        }

        if decision.effective != current {
            let unknown = flags & !Exits::ALL.bits();
            // SAFETY: The caller promises that `kvm->lock` is held; no vCPU is online.
            unsafe { vm.set_disabled_exits(unknown | decision.effective.bits()) };
        }
        let clamped = !decision.clamped.is_empty();
        match id {
            Some(id) => {
                // What has changed until the VM could be seen was not seen to concern it.
                let again = self.generation.load(Acquire) != generation
                    || domain_of(task, &rcu::read_lock()).id() != cgroup;
                self.vms.with(id, |vm, _| {
                    vm.stale |= again;
                    self.decided(vm, clamped);
                });
            }
            None => {
                self.count_clamps(clamped);
                trace::decision(&trace::Decided {
                    vm: 0,
                    cgroup,
                    pid: task.tgid() as u32,
                    floor: facts.floor,
                    requested,
                    decision,
                });
            }
        }
        id
    }

    /// The domain cgroup of a task, and what its policies say.
    fn policies_of_task(&self, task: &Task) -> (u64, Resolved) {
        let rcu = rcu::read_lock();
        let cgroup = domain_of(task, &rcu);
        (cgroup.id(), self.store.resolve(cgroup))
    }

    /// Remembers a vCPU, which is new or was there before the VM was known. Fails with [`ENOMEM`],
    /// and with [`EAGAIN`] if it has to wait for an earlier one.
    fn add_vcpu(
        &self,
        facts: &Facts,
        id: u64,
        index: usize,
        vcpu: u32,
        new: bool,
        flags: Flags,
    ) -> Result {
        let make = |vm: &Vm, kvm: Option<kvm::Vm<'_>>| {
            let disabled = kvm.map_or(0, kvm::Vm::disabled_exits);
            Vcpu {
                id: vcpu,
                disable: None,
                wanted: vm.wanted(None, facts.supported).effective,
                // KVM makes its controls from the flags, as they are then.
                in_force: Exits::from_bits_truncate(disabled),
                sure: new || !vm.changed,
                entered: false,
                in_l2: false,
                outside: false,
                rewrite: false,
                offered_pv_unhalt: false,
                has_pv_unhalt: false,
                veiled: false,
            }
        };
        self.vms.add_vcpu(id, index, new, flags, make, |vm, kvm| {
            // Both look at each vCPU that is known, and there may be thousands to be found: once,
            // with the last of them.
            if let Some(kvm) = kvm.filter(|kvm| vm.knows_all_of(*kvm)) {
                // Who gives the VM an override may not have come to it yet.
                vm.secure(facts.supported);
                vm.write_flags(kvm, facts.vendor, false);
                vm.account(kvm);
            }
        })
    }

    /// Remembers those online vCPUs of a VM that are not known. The context is that of `flags`.
    pub(crate) fn complete(&self, facts: &Facts, id: u64, flags: Flags) {
        loop {
            let missing = self.vms.with(id, |vm, kvm| {
                let (kvm, index) = (kvm?, vm.vcpus.len());
                // SAFETY: There is a `kvm` only if the VM is not dying.
                let vcpu = unsafe { kvm.vcpu(index as u32) }?;
                Some((index, vcpu.id()))
            });
            let Some(Some((index, vcpu))) = missing else {
                return;
            };
            if self.add_vcpu(facts, id, index, vcpu, false, flags).is_err() {
                self.count_missed();
                return;
            }
        }
    }

    /// Takes on a VM that is older than the module, as it is, and has the worker decide on it.
    /// Returns its id, if it could be remembered.
    ///
    /// # Safety
    ///
    /// The VM must stay for the call, and a vCPU of it must be online, so that its flags are what
    /// its VMM asked for and KVM writes them no more. `task` must be one of its VMM's.
    pub(crate) unsafe fn adopt(&self, vm: kvm::Vm<'_>, task: &Task) -> Option<u64> {
        let facts = self.facts()?;
        let online = vm.online_vcpus();
        if vm.is_tdx() || online == 0 {
            return None;
        }
        let flags = Exits::from_bits_truncate(vm.disabled_exits());
        let requested = flags & !facts.floor;
        let id = match self.vms.id_of(vm.key()) {
            Some(id) => id,
            None => {
                let new = New {
                    process: Process::of(task)?,
                    mm: vm.mm(),
                    cgroup: domain_of(task, &rcu::read_lock()).id(),
                    floor: facts.floor,
                    requested,
                    flags,
                    resolved: Resolved::UNRESTRICTED,
                    overridable: self.enabled(),
                    decision: Decision {
                        effective: flags,
                        clamped: Exits::NONE,
                    },
                    adopted: true,
                    hold: None,
                };
                match self.vms.add(vm.key(), new) {
                    Ok(id) => id,
                    Err(_) => {
                        self.count_missed();
                        return None;
                    }
                }
            }
        };
        self.complete(&facts, id, in_hook());
        self.vms.with(id, |vm, _| vm.stale = true);
        Some(id)
    }

    /// Whether a VM that is known is this one, whose first vCPU could not be created after our
    /// hook, and not another VM, at the same address, whose end we have not seen.
    fn is_earlier_try(&self, vm: kvm::Vm<'_>, id: u64) -> bool {
        let same = self.vms.with(id, |known, _| known.mm == vm.mm()) == Some(true);
        if !same {
            self.vms.remove(vm.key());
            self.count_missed();
        }
        same
    }

    fn count_clamps(&self, clamped: bool) {
        if clamped {
            self.clamps.add(1, Relaxed);
        }
    }

    /// Counts and traces a decision.
    pub(crate) fn decided(&self, vm: &Vm, clamped: bool) {
        self.count_clamps(clamped);
        trace::decision(&trace::Decided {
            vm: vm.id,
            cgroup: vm.cgroup,
            pid: vm.pid,
            floor: vm.floor,
            requested: vm.requested,
            decision: vm.decision,
        });
    }

    /// Takes note of a vCPU that is being freed: an online one with its VM, or one whose creation has
    /// failed. Atomic context.
    pub(crate) fn vcpu_freed(&self, vcpu: kvm::Vcpu<'_>) {
        if let Some(vm) = vcpu.vm() {
            self.probe.vcpu_freed(vm.key(), vcpu);
            let facts = self.facts();
            self.vms
                .with_key(vm.key(), |vm, kvm| match (vcpu.index(), kvm) {
                    // Its creation has failed, and the flags need not be for it any more.
                    (None, Some(kvm)) => {
                        vm.truncate(kvm.online_vcpus() as usize);
                        if let Some(facts) = facts {
                            vm.write_flags(kvm, facts.vendor, false);
                            vm.account(kvm);
                        }
                    }
                    // It goes with its VM.
                    _ => vm.dying = true,
                });
        }
    }

    /// Forgets a VM that is being destroyed, and returns whether it was known.
    pub(crate) fn vm_destroyed(&self, key: usize) -> bool {
        self.probe.vm_destroyed(key);
        self.vms.remove(key)
    }
}
