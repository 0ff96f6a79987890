// SPDX-License-Identifier: GPL-2.0

//! The VMs that are known, and what is known of them.

use crate::{
    bindings,
    kernel_ext::{
        module_ref::ModuleRef,
        process::Process,
        raw_spinlock::{
            new_raw_spinlock,
            RawSpinLock, //
        },
    },
    kvm,
    policy::{
        live::{
            self,
            Change,
            Limits,
            FOLLOWING,
            LEADING, //
        },
        Decision,
        Exits,
        Resolved, //
    },
    vendor::{
        Refusal,
        Vendor, //
    },
};
use kernel::{
    alloc::Flags,
    module::this_module,
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNode,
        RBTreeNodeReservation, //
    },
};

/// A VM.
pub(crate) struct Vm {
    /// Counts up from 1.
    pub(crate) id: u64,
    key: usize,
    /// The VMM.
    pub(crate) process: Process,
    /// Its number in the initial pid namespace.
    pub(crate) pid: u32,
    /// The VMM's address space, as an identity only.
    pub(crate) mm: usize,
    /// The VMM's domain cgroup, when the VM was last decided on.
    pub(crate) cgroup: u64,
    pub(crate) floor: Exits,
    /// What the VMM asked for.
    pub(crate) requested: Exits,
    /// What the flags were after the last look at them.
    pub(crate) flags: Exits,
    /// Flags that stay, see [`live::flags`].
    pub(crate) keep: Exits,
    /// What the policies say, and whether overrides count: not with the master switch off.
    pub(crate) resolved: Resolved,
    pub(crate) overridable: bool,
    /// Stands in for the cgroup's `disable`.
    pub(crate) disable: Option<Exits>,
    /// What follows from all that.
    pub(crate) decision: Decision,
    pub(crate) limits: Limits,
    pub(crate) refusal: Refusal,
    /// Its vCPUs cannot be changed in L2.
    l2_stays: bool,
    /// By their index in KVM's array. The last one may be being created.
    pub(crate) vcpus: KVec<Vcpu>,
    /// Older than this module.
    pub(crate) adopted: bool,
    /// Flags were changed after a vCPU may have run.
    pub(crate) changed: bool,
    /// A vCPU of it is being freed: KVM's structures must not be used any more.
    pub(crate) dying: bool,
    /// The worker is to decide on it again.
    pub(crate) stale: bool,
    /// So it is if the VMM's cgroup is not the one that was decided for.
    pub(crate) moved: bool,
    /// Flags are to be set for which no vCPU may be looked at.
    pub(crate) wants_quiet: bool,
    /// The last command that changed it.
    pub(crate) stamp: u64,
    /// How many vCPUs have a directory in sysfs, or are about to.
    published: usize,
    /// There while the VM is not as it would be without us.
    hold: Option<ModuleRef>,
}

/// A vCPU.
#[derive(Clone, Copy)]
pub(crate) struct Vcpu {
    /// What KVM_CREATE_VCPU was called with.
    pub(crate) id: u32,
    /// Stands in for the VM's, or the cgroup's, `disable`.
    pub(crate) disable: Option<Exits>,
    /// What it should have.
    pub(crate) wanted: Exits,
    /// What its controls let through.
    pub(crate) in_force: Exits,
    /// Whether that is certain. The flags may have changed while it was made.
    pub(crate) sure: bool,
    /// Whether it was on its way into the guest since it is known.
    pub(crate) entered: bool,
    /// It could not be changed for being in L2.
    pub(crate) in_l2: bool,
    /// Since it was asked it was seen where it looks at its requests before it executes guest code.
    pub(crate) outside: bool,
    /// KVM may have given it other controls since they were looked at, by the flags as they were.
    pub(crate) rewrite: bool,
    /// The VMM wanted the guest to be told of PV_UNHALT, before the vCPU ran.
    pub(crate) offered_pv_unhalt: bool,
    /// What the guest reads in CPUID has it.
    pub(crate) has_pv_unhalt: bool,
    /// It has it not, and shall have it again before it executes anything.
    pub(crate) veiled: bool,
}

impl Vcpu {
    /// What its controls may let through, as the flags' rules have to reckon with it.
    fn possibly_open(&self, flags: Exits) -> Exits {
        if self.sure {
            self.in_force
        } else {
            ((self.in_force | flags) & LEADING) | (self.in_force & flags & FOLLOWING)
        }
    }
}

/// How far a vCPU is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    InForce,
    NextEntry,
    Pending,
    InL2,
}

impl Progress {
    /// EXITPOLICY_VCPU_*.
    pub(crate) fn id(self) -> u32 {
        match self {
            Self::InForce => bindings::EXITPOLICY_VCPU_IN_FORCE,
            Self::NextEntry => bindings::EXITPOLICY_VCPU_NEXT_ENTRY,
            Self::Pending => bindings::EXITPOLICY_VCPU_PENDING,
            Self::InL2 => bindings::EXITPOLICY_VCPU_IN_L2,
        }
    }

    /// Whether it may execute guest code as it was before.
    pub(crate) fn is_awaited(self) -> bool {
        matches!(self, Self::Pending | Self::InL2)
    }

    /// What sysfs shows.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::InForce => "in force",
            Self::NextEntry => "at next entry",
            Self::Pending => "pending",
            Self::InL2 => "pending: in L2",
        }
    }
}

/// What is known of a VM when the VM is added.
pub(crate) struct New {
    pub(crate) process: Process,
    pub(crate) mm: usize,
    pub(crate) cgroup: u64,
    pub(crate) floor: Exits,
    pub(crate) requested: Exits,
    pub(crate) flags: Exits,
    pub(crate) resolved: Resolved,
    pub(crate) overridable: bool,
    pub(crate) decision: Decision,
    pub(crate) adopted: bool,
    pub(crate) hold: Option<ModuleRef>,
}

impl Vm {
    /// Whether its vCPUs may halt natively once the VM has what it has by itself.
    pub(crate) fn halts_at_home(&self) -> bool {
        let flags = self.limits.target(self.home(), self.flags);
        (flags | self.keep).contains(Exits::HLT)
    }

    /// Whether what the vCPU's guest reads in CPUID is not what KVM will compare what its VMM repeats
    /// with, once the VM has what it has by itself.
    fn differs_in_pv_unhalt(&self, vcpu: &Vcpu) -> bool {
        if self.halts_at_home() {
            vcpu.has_pv_unhalt
        } else {
            vcpu.offered_pv_unhalt && !vcpu.has_pv_unhalt
        }
    }

    /// What the vCPU's guest is to read in CPUID of PV_UNHALT, if that is to change, as the VM gets
    /// back what it has by itself.
    pub(crate) fn pv_unhalt_to_be(&self, vcpu: &Vcpu) -> Option<bool> {
        (!self.overridable && self.differs_in_pv_unhalt(vcpu)).then_some(!vcpu.has_pv_unhalt)
    }

    /// Whether the vCPU has to go through the hook.
    pub(crate) fn has_to_change(&self, vcpu: &Vcpu) -> bool {
        !vcpu.sure || vcpu.in_force != self.target(vcpu) || self.pv_unhalt_to_be(vcpu).is_some()
    }

    /// Calls `work` with KVM's structure, unless that must not be used any more. In the table, under
    /// its lock only.
    fn work_on<R>(&mut self, work: impl FnOnce(&mut Self, Option<kvm::Vm<'_>>) -> R) -> R {
        let kvm = if self.dying {
            None
        } else {
            // SAFETY: The hook on vm_destroy removes the entry before the function begins, under
            // the lock, which is held until `work` returns.
            unsafe { kvm::Vm::from_key(self.key) }
        };
        work(self, kvm)
    }

    /// What the VM has by itself.
    pub(crate) fn home(&self) -> Exits {
        self.floor | self.requested
    }

    /// What a vCPU can have of what it should.
    pub(crate) fn target(&self, vcpu: &Vcpu) -> Exits {
        self.limits.target(vcpu.wanted, vcpu.in_force)
    }

    /// What a vCPU with this override should have.
    pub(crate) fn wanted(&self, disable: Option<Exits>, supported: Exits) -> Decision {
        let disable = if self.overridable {
            disable.or(self.disable)
        } else {
            None
        };
        self.resolved
            .overridden(disable)
            .decide(self.floor, self.requested, supported)
    }

    /// Works out what the VM and its vCPUs should have.
    pub(crate) fn decide(&mut self, supported: Exits) {
        self.decision = self.wanted(None, supported);
        for index in 0..self.vcpus.len() {
            if let Some(disable) = self.vcpus.get(index).map(|vcpu| vcpu.disable) {
                let wanted = self.wanted(disable, supported).effective;
                if let Some(vcpu) = self.vcpus.get_mut(index) {
                    vcpu.wanted = wanted;
                }
            }
        }
    }

    /// Asks the vendor what cannot be changed.
    pub(crate) fn look_for_limits(&mut self, kvm: kvm::Vm<'_>, vendor: &dyn Vendor) {
        self.limits = Limits::NONE;
        self.refusal = Refusal::None;
        self.l2_stays = vendor.functions().nested_vmexit.is_some();
        for index in 0..self.vcpus.len() {
            // SAFETY: The VM is not dying, or there would be no `kvm` (`Vms::with`).
            if let Some(vcpu) = unsafe { kvm.vcpu(index as u32) } {
                let (limits, refusal) = vendor.limits(vcpu);
                self.limits = self.limits.union(limits);
                if self.refusal == Refusal::None {
                    self.refusal = refusal;
                }
            }
        }
    }

    /// The VMM's process has ended, and `heir` has its memory, so that KVM takes it for the VMM
    /// (virt/kvm/kvm_main.c: kvm_vcpu_ioctl()). Returns what is to be dropped.
    pub(crate) fn inherit(&mut self, heir: Process) -> Process {
        self.pid = heir.number();
        core::mem::replace(&mut self.process, heir)
    }

    /// Forgets vCPUs that were not made after all.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.vcpus.truncate(len);
        self.published = self.published.min(len);
    }

    /// Whether all vCPUs that are online are known.
    pub(crate) fn knows_all_of(&self, kvm: kvm::Vm<'_>) -> bool {
        self.vcpus.len() >= kvm.online_vcpus() as usize
    }

    /// Brings the flags in step with the vCPUs. `quiet` is whether no CPU looks at a vCPU now.
    pub(crate) fn write_flags(&mut self, kvm: kvm::Vm<'_>, vendor: &dyn Vendor, quiet: bool) {
        // Until one is online, KVM_ENABLE_CAP may be writing them. One that is not known, for lack
        // of memory, may need any of them.
        let online = kvm.online_vcpus() as usize;
        if online == 0 || !self.knows_all_of(kvm) {
            // Nor can a moment without anybody help; once all are known, this is called again.
            self.wants_quiet = false;
            return;
        }
        let bits = kvm.disabled_exits();
        let now = Exits::from_bits_truncate(bits);
        self.flags = now;
        let next = live::flags(
            now,
            self.keep,
            self.home(),
            self.vcpus.iter().map(|vcpu| Change {
                target: self.target(vcpu),
                in_force: vcpu.possibly_open(now),
            }),
        );
        let unquiet = next & !now & vendor.quiet_flags();
        self.wants_quiet = !quiet && !unquiet.is_empty();
        let next = if quiet { next } else { next & !unquiet };
        if next == now {
            return;
        }
        // SAFETY: A vCPU is online, so that KVM writes them no more, and we do so under the lock
        // that `self` is behind.
        unsafe { kvm.set_disabled_exits(bits & !Exits::ALL.bits() | next.bits()) };
        self.flags = next;
        // Who is being made may have been given controls by the old ones.
        for vcpu in self.vcpus.iter_mut().skip(online) {
            vcpu.sure = false;
        }
        self.changed = true;
    }

    /// Holds the module if the VM is to be different from what it is by itself. If it cannot be
    /// held, as it is being unloaded, the VM is to be what it is by itself.
    pub(crate) fn secure(&mut self, supported: Exits) {
        let home = self.home();
        let differs =
            self.decision.effective != home || self.vcpus.iter().any(|vcpu| vcpu.wanted != home);
        if differs && !self.hold() {
            self.resolved = Resolved::UNRESTRICTED;
            self.overridable = false;
            self.decide(supported);
        }
    }

    /// Holds the module, until [`Vm::account`] finds no need for it. Returns whether it is held:
    /// not if it is being unloaded.
    pub(crate) fn hold(&mut self) -> bool {
        if self.hold.is_none() {
            self.hold = hold_module();
        }
        self.hold.is_some()
    }

    /// Holds the module while the VM is not as it would be without it, or will not be; not for one
    /// that never runs again.
    pub(crate) fn account(&mut self, kvm: kvm::Vm<'_>) {
        let home = self.home();
        let differs = self.flags != self.limits.target(home, self.flags)
            || self.vcpus.iter().any(|vcpu| {
                let at_home = self.limits.target(home, vcpu.in_force);
                !vcpu.sure
                    || vcpu.in_force != at_home
                    || self.target(vcpu) != at_home
                    || self.differs_in_pv_unhalt(vcpu)
            });
        if differs && kvm.can_run() {
            self.hold();
        } else {
            self.hold = None;
        }
    }

    /// Whether the VM holds the module.
    pub(crate) fn is_held(&self) -> bool {
        self.hold.is_some()
    }

    /// Asks an online vCPU of this VM, by its index.
    pub(crate) fn ask(&mut self, index: usize, vcpu: kvm::Vcpu<'_>) {
        if let Some(known) = self.vcpus.get_mut(index) {
            known.outside = false;
        }
        vcpu.ask();
    }

    /// How far a vCPU is. `kvm` is there unless the VM is dying.
    pub(crate) fn progress(&self, kvm: Option<kvm::Vm<'_>>, index: usize) -> Progress {
        let Some(vcpu) = self.vcpus.get(index) else {
            return Progress::InForce;
        };
        if !self.has_to_change(vcpu) {
            return Progress::InForce;
        }
        if kvm.is_some_and(|kvm| !kvm.can_run()) {
            return Progress::InForce;
        }
        // SAFETY: There is a `kvm` only if the VM is not dying.
        let Some(now) = kvm.and_then(|kvm| unsafe { kvm.vcpu(index as u32) }) else {
            return Progress::NextEntry;
        };
        // It may be at the last look at its requests, for which KVM lets it seem to be in the guest
        // (x86.c: vcpu_enter_guest()), and what was said of it holds.
        if vcpu.outside && now.is_asked() {
            return Progress::NextEntry;
        }
        // In this order: one that is seen outside, and not on its way into L2, and then in L1, gets
        // into L2 through L1 only, where it changes.
        let on_its_way = now.in_guest() || (self.l2_stays && now.may_enter_l2());
        if self.l2_stays && now.in_l2() {
            Progress::InL2
        } else if on_its_way {
            Progress::Pending
        } else {
            Progress::NextEntry
        }
    }

    /// Where a vCPU that should have `wanted`, and has `in_force`, may stay different from it.
    pub(crate) fn refused_of(&self, wanted: Exits, in_force: Exits) -> Exits {
        let target = self.limits.target(wanted, in_force);
        (wanted & !target) | (target & !wanted)
    }

    /// What the VM is refused, or keeps in spite of what it should have.
    pub(crate) fn refused(&self) -> Exits {
        self.vcpus.iter().fold(
            self.refused_of(self.decision.effective, self.flags),
            |refused, vcpu| refused | self.refused_of(vcpu.wanted, vcpu.in_force),
        )
    }

    /// Why, if anything is refused.
    pub(crate) fn shown_refusal(&self) -> Refusal {
        if self.refused().is_empty() {
            Refusal::None
        } else {
            self.refusal
        }
    }
}

/// Holds this module. Fails while it is being unloaded.
pub(crate) fn hold_module() -> Option<ModuleRef> {
    ModuleRef::get(this_module::<crate::ExitPolicy>())
}

struct Tables {
    last_id: u64,
    by_id: RBTree<u64, Vm>,
    /// The `struct kvm`'s address -> id.
    by_key: RBTree<usize, u64>,
    /// (VMM's memory, id), for those that look for the VMs of a process.
    by_mm: RBTree<(usize, u64), ()>,
    count: u64,
    /// Up to which id there may be a directory in sysfs.
    published: u64,
    /// The lowest id with a vCPU that has no directory yet.
    unpublished_vcpu: u64,
    /// Ids up to `published` whose VM is gone and whose directory may still be there.
    gone: RBTree<u64, Vm>,
}

/// The VMs that exist.
///
/// An entry does not hold its VM. Hooks on the entry of `vcpu_free` and `vm_destroy` mark it and
/// remove it, under the lock: so, with the lock held, a VM that has an entry exists, and one whose
/// entry is not marked has all its online vCPUs.
#[pin_data]
pub(crate) struct Vms {
    #[pin]
    tables: RawSpinLock<Tables>,
}

impl Vms {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            tables <- new_raw_spinlock!(
                Tables {
                    last_id: 0,
                    by_id: RBTree::new(),
                    by_key: RBTree::new(),
                    by_mm: RBTree::new(),
                    count: 0,
                    published: 0,
                    unpublished_vcpu: u64::MAX,
                    gone: RBTree::new(),
                },
                "exitpolicy_vms"
            ),
        })
    }

    /// Works on a VM, with KVM's structure unless that must not be used any more. Any context but
    /// NMI and interrupts; `work` must not sleep, nor allocate or free memory.
    pub(crate) fn with<R>(
        &self,
        id: u64,
        work: impl FnOnce(&mut Vm, Option<kvm::Vm<'_>>) -> R,
    ) -> Option<R> {
        let mut tables = self.tables.lock();
        Some(tables.by_id.get_mut(&id)?.work_on(work))
    }

    /// As [`Vms::with`], of the VM with this key.
    pub(crate) fn with_key<R>(
        &self,
        key: usize,
        work: impl FnOnce(&mut Vm, Option<kvm::Vm<'_>>) -> R,
    ) -> Option<R> {
        let mut tables = self.tables.lock();
        let id = *tables.by_key.get(&key)?;
        Some(tables.by_id.get_mut(&id)?.work_on(work))
    }

    /// The id of the VM with this key.
    pub(crate) fn id_of(&self, key: usize) -> Option<u64> {
        self.tables.lock().by_key.get(&key).copied()
    }

    /// Adds a VM without vCPUs, unless it is known, and returns its id. Fails with [`ENOMEM`].
    /// Atomic context.
    pub(crate) fn add(&self, key: usize, new: New) -> Result<u64> {
        let by_id = RBTreeNodeReservation::new(GFP_ATOMIC)?;
        let by_key = RBTreeNodeReservation::new(GFP_ATOMIC)?;
        let by_mm = RBTreeNodeReservation::new(GFP_ATOMIC)?;
        let pid = new.process.number();
        let mut tables = self.tables.lock();
        if let Some(id) = tables.by_key.get(&key).copied() {
            // Somebody else was faster. What is left over is freed after the lock, which is raw.
            drop(tables);
            return Ok(id);
        }
        tables.last_id += 1;
        let id = tables.last_id;
        let vm = Vm {
            id,
            key,
            process: new.process,
            pid,
            mm: new.mm,
            cgroup: new.cgroup,
            floor: new.floor,
            requested: new.requested,
            flags: new.flags,
            keep: (new.floor | new.requested) & new.flags,
            resolved: new.resolved,
            overridable: new.overridable,
            disable: None,
            decision: new.decision,
            limits: Limits::NONE,
            refusal: Refusal::None,
            l2_stays: false,
            vcpus: KVec::new(),
            adopted: new.adopted,
            changed: false,
            dying: false,
            stale: false,
            moved: false,
            wants_quiet: false,
            stamp: 0,
            published: 0,
            hold: new.hold,
        };
        tables.by_id.insert(by_id.into_node(id, vm));
        tables.by_key.insert(by_key.into_node(key, id));
        tables.by_mm.insert(by_mm.into_node((new.mm, id), ()));
        tables.count += 1;
        Ok(id)
    }

    /// Adds a vCPU with this index, and what `make` makes of the VM, then calls `added`. If there is
    /// one, its creation has failed if `replace`, and it goes; or this one is known. Fails with
    /// [`ENOMEM`], and with [`EAGAIN`] if one before it is not known. The context is that of `flags`.
    pub(crate) fn add_vcpu(
        &self,
        id: u64,
        index: usize,
        replace: bool,
        flags: Flags,
        make: impl Fn(&Vm, Option<kvm::Vm<'_>>) -> Vcpu,
        added: impl Fn(&mut Vm, Option<kvm::Vm<'_>>),
    ) -> Result {
        enum Step {
            Done(Result),
            Enlarge,
        }

        let mut spare = KVec::new();
        loop {
            let step = |vm: &mut Vm, kvm: Option<kvm::Vm<'_>>| {
                if vm.vcpus.len() < index {
                    return Step::Done(Err(EAGAIN));
                }
                if replace {
                    vm.truncate(index);
                } else if vm.vcpus.len() > index {
                    return Step::Done(Ok(()));
                }
                if vm.vcpus.capacity() <= index && spare.capacity() > index {
                    for vcpu in vm.vcpus.iter() {
                        let _ = spare.push_within_capacity(*vcpu);
                    }
                    core::mem::swap(&mut spare, &mut vm.vcpus);
                }
                let vcpu = make(vm, kvm);
                if vm.vcpus.push_within_capacity(vcpu).is_err() {
                    return Step::Enlarge;
                }
                added(vm, kvm);
                Step::Done(Ok(()))
            };
            // What the VM had before, if anything, is freed with `spare`, after the lock.
            match self.with(id, step).ok_or(ENOENT)? {
                Step::Done(result) => {
                    let mut tables = self.tables.lock();
                    tables.unpublished_vcpu = tables.unpublished_vcpu.min(id);
                    return result;
                }
                Step::Enlarge => {
                    spare = KVec::with_capacity((index + 1).next_power_of_two(), flags)?;
                }
            }
        }
    }

    /// Never touches the VMs that there are again.
    pub(crate) fn abandon(&self) {
        self.for_each(|id| {
            self.with(id, |vm, _| vm.dying = true);
        });
    }

    /// Forgets the VM with this key, and returns whether it was known. Atomic context.
    pub(crate) fn remove(&self, key: usize) -> bool {
        // Memory is freed after the lock, which is a raw one.
        let forgotten = self.tables.lock().forget(key);
        forgotten.is_some()
    }

    /// Forgets all VMs.
    pub(crate) fn clear(&self) {
        loop {
            let first = self.tables.lock().by_key.keys().next().copied();
            match first {
                Some(key) => self.remove(key),
                None => return,
            };
        }
    }

    /// The number of VMs.
    pub(crate) fn count(&self) -> u64 {
        self.tables.lock().count
    }

    /// The next higher id of a VM.
    pub(crate) fn next_after(&self, id: u64) -> Option<u64> {
        let tables = self.tables.lock();
        let cursor = tables.by_id.cursor_lower_bound(&id.checked_add(1)?)?;
        Some(*cursor.current().0)
    }

    /// Calls `work` with the id of each VM, in ascending order. VMs may come and go meanwhile.
    pub(crate) fn for_each(&self, mut work: impl FnMut(u64)) {
        let mut last = 0;
        while let Some(id) = self.next_after(last) {
            work(id);
            last = id;
        }
    }

    /// Has the VMs of processes with this memory looked at, and returns whether there are any. Any
    /// context but NMI and interrupts.
    pub(crate) fn process_moved(&self, mm: usize) -> bool {
        let mut tables = self.tables.lock();
        let Tables { by_id, by_mm, .. } = &mut *tables;
        let mut found = false;
        let mut from = 0;
        while let Some(cursor) = by_mm.cursor_lower_bound(&(mm, from)) {
            let (owner, id) = *cursor.current().0;
            if owner != mm {
                break;
            }
            if let Some(vm) = by_id.get_mut(&id) {
                vm.moved = true;
                found = true;
            }
            from = id + 1;
        }
        found
    }

    /// The next VM that has no directory in sysfs yet. The caller is about to make it one.
    pub(crate) fn next_to_publish(&self) -> Option<u64> {
        let mut tables = self.tables.lock();
        let published = tables.published;
        let id = *tables
            .by_id
            .cursor_lower_bound(&(published + 1))?
            .current()
            .0;
        tables.published = id;
        Some(id)
    }

    /// The next vCPU that has no directory yet, with its VM's id and its index. The caller is about
    /// to make it one.
    pub(crate) fn next_vcpu_to_publish(&self) -> Option<(u64, usize, u32)> {
        loop {
            // Anew for each VM: there may be thousands without anything to be done.
            let mut tables = self.tables.lock();
            let from = tables.unpublished_vcpu;
            let published = tables.published;
            let Some(mut cursor) = tables.by_id.cursor_lower_bound_mut(&from) else {
                tables.unpublished_vcpu = u64::MAX;
                return None;
            };
            let (id, vm) = cursor.current_mut();
            let id = *id;
            if id > published {
                // Its own directory comes first, and with it we are called again.
                return None;
            }
            if let Some(vcpu) = vm.vcpus.get(vm.published) {
                vm.published += 1;
                return Some((id, vm.published - 1, vcpu.id));
            }
            tables.unpublished_vcpu = id.saturating_add(1);
        }
    }

    /// A VM that is gone while its directory may still be there. The caller is about to remove it.
    pub(crate) fn next_to_unpublish(&self) -> Option<u64> {
        let mut tables = self.tables.lock();
        let id = *tables.gone.iter().next()?.0;
        let node = tables.gone.remove_node(&id);
        drop(tables);
        drop(node);
        Some(id)
    }
}

impl Tables {
    /// Forgets a VM, and returns what is to be freed.
    fn forget(&mut self, key: usize) -> Option<Forgotten> {
        let id = *self.by_key.get(&key)?;
        let key = self.by_key.remove_node(&key);
        let mut mm = None;
        if let Some(vm) = self.by_id.get_mut(&id) {
            // Now, and not after the lock: who sees that no VM holds the module can unload it.
            vm.hold = None;
            mm = Some(vm.mm);
        }
        let mm = mm.and_then(|mm| self.by_mm.remove_node(&(mm, id)));
        let mut vm = self.by_id.remove_node(&id);
        if vm.is_some() {
            self.count -= 1;
        }
        if id <= self.published {
            if let Some(node) = vm.take() {
                self.gone.insert(node);
            }
        }
        Some(Forgotten {
            _key: key,
            _mm: mm,
            _vm: vm,
        })
    }
}

/// What is in no tree any more.
struct Forgotten {
    _key: Option<RBTreeNode<usize, u64>>,
    _mm: Option<RBTreeNode<(usize, u64), ()>>,
    _vm: Option<RBTreeNode<u64, Vm>>,
}
