// SPDX-License-Identifier: GPL-2.0

//! Changes VMs that run.
//!
//! Only a vCPU's own thread can write its controls. So a change has two ends: here an administrator
//! decides, writes the VM's flags and asks each vCPU; there KVM, on the vCPU's way into the guest,
//! calls `recalc_intercepts` because it was asked, and the hook on it writes the controls. Nobody
//! waits with a lock held.

use crate::{
    cpuid,
    engine::{
        Engine,
        Facts, //
    },
    kernel_ext::{
        cgroup::Cgroup,
        fprobe::Call,
        ftrace,
        process::Process, //
    },
    kvm,
    policy::{
        live::permitted,
        Exits,
        Resolved, //
    },
    vendor::InL2,
    vm::{
        Progress,
        Vm, //
    },
};
use kernel::{
    alloc::flags::GFP_KERNEL,
    ffi::c_int,
    pr_err_once,
    sync::rcu,
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    },
};

/// Which VMs a change is about.
#[derive(Clone, Copy)]
pub(crate) enum Scope {
    /// Every VM.
    All,
    /// Those in this cgroup and below.
    Below(u64),
    /// Those that were marked.
    Stale,
    /// One, by its id; without asking the policies again.
    One(u64),
}

impl Engine {
    /// Decides again on the VMs in `scope`, and asks their vCPUs to follow. Returns a stamp to wait
    /// for. May sleep; one call at a time.
    pub(crate) fn change(&self, scope: Scope) -> u64 {
        let stamp = self.next_stamp();
        let Some(facts) = self.facts() else {
            return stamp;
        };
        self.check_hooks();
        let mut heirs = Heirs::default();
        let mut change = |id| {
            if self.decide_again(&facts, scope, stamp, id, &mut heirs) {
                self.ask(id);
            }
        };
        match scope {
            Scope::One(id) => change(id),
            _ => self.vms.for_each(change),
        }
        stamp
    }

    /// Makes sure that the hooks that tell of the end of VMs still do. To be called before VMs are
    /// looked at, in process context. May sleep.
    pub(crate) fn check_hooks(&self) {
        if ftrace::is_dead() {
            pr_err_once!("ftrace has failed: VMs that run stay as they are\n");
            self.vms.abandon();
        }
    }

    /// Returns whether the VM is in `scope`.
    fn decide_again(
        &self,
        facts: &Facts,
        scope: Scope,
        stamp: u64,
        id: u64,
        heirs: &mut Heirs,
    ) -> bool {
        let policies = match scope {
            Scope::One(_) => None,
            Scope::Stale => {
                // Before the look at what there is: who moves the VMM meanwhile marks it again.
                let marks = self.vms.with(id, |vm, _| {
                    let stale = core::mem::replace(&mut vm.stale, false);
                    (stale, core::mem::replace(&mut vm.moved, false), vm.cgroup)
                });
                let Some((stale, moved, before)) = marks else {
                    return false;
                };
                let policies = if stale || moved {
                    self.policies_of(scope, id, heirs)
                } else {
                    None
                };
                // Threads are moved without their process leaving its domain.
                if !stale && policies.is_none_or(|(cgroup, _)| cgroup == before) {
                    return false;
                }
                policies
            }
            Scope::All | Scope::Below(_) => match self.policies_of(scope, id, heirs) {
                None => return false,
                policies => policies,
            },
        };
        self.complete(facts, id, GFP_KERNEL);
        self.vms
            .with(id, |vm, kvm| {
                if let Some(kvm) = kvm {
                    // One that is listed and neither online nor being created was not made after
                    // all, in a way that no hook tells of.
                    let online = kvm.online_vcpus();
                    if kvm.created_vcpus() == online as c_int {
                        vm.truncate(online as usize);
                    }
                }
                if let Some((cgroup, resolved)) = policies {
                    vm.cgroup = cgroup;
                    vm.overridable = self.enabled();
                    vm.resolved = if vm.overridable {
                        resolved
                    } else {
                        Resolved::UNRESTRICTED
                    };
                }
                let before = vm.decision;
                vm.decide(facts.supported);
                vm.secure(facts.supported);
                vm.stamp = stamp;
                if let Some(kvm) = kvm {
                    vm.look_for_limits(kvm, facts.vendor);
                    vm.write_flags(kvm, facts.vendor, false);
                    vm.account(kvm);
                }
                if vm.decision != before {
                    self.decided(vm, !vm.decision.clamped.is_empty());
                }
            })
            .is_some()
    }

    /// The cgroup that the VM's VMM is in now, and what that one's policies say; nothing if it is
    /// not in `scope`. What a VMM that has ended got last stays: its memory has ended with it, or
    /// else it goes on in another process. One that runs another program by now has ended: KVM
    /// takes its vCPUs' calls from who has its memory only.
    fn policies_of(&self, scope: Scope, id: u64, heirs: &mut Heirs) -> Option<(u64, Resolved)> {
        let (process, mm, in_use, last) = self.vms.with(id, |vm, kvm| {
            let in_use = kvm.is_some_and(kvm::Vm::can_run);
            (vm.process.clone(), vm.mm, in_use, (vm.cgroup, vm.resolved))
        })?;
        let rcu = rcu::read_lock();
        // The VM holds its VMM's `struct mm_struct`, so that it is nobody else's; if the VM goes
        // meanwhile, what is found is of no use.
        let mut cgroup = Cgroup::of_process(&process, mm, &rcu);
        if in_use && cgroup.is_none() {
            if let Some((heir, its)) = heirs.of(mm, &rcu) {
                // The old one is dropped here, after the lock.
                drop(self.vms.with(id, |vm, _| vm.inherit(heir)));
                cgroup = Some(its);
            }
        }
        let Some(cgroup) = cgroup.map(Cgroup::domain) else {
            return matches!(scope, Scope::All).then_some(last);
        };
        if let Scope::Below(top) = scope {
            if !cgroup.ancestors_and_self().any(|cgroup| cgroup.id() == top) {
                return None;
            }
        }
        Some((cgroup.id(), self.store.resolve(cgroup)))
    }

    /// Asks those vCPUs of a VM that have to change.
    fn ask(&self, id: u64) {
        // A lock for each: there may be a thousand, and each may need an interrupt sent.
        let mut index = 0;
        let mut ask_one = || {
            self.vms.with(id, |vm, kvm| {
                while let (Some(kvm), Some(vcpu)) = (kvm, vm.vcpus.get(index)) {
                    index += 1;
                    if !vm.has_to_change(vcpu) && vcpu.sure {
                        continue;
                    }
                    // SAFETY: There is a `kvm` only if the VM is not dying.
                    if let Some(vcpu) = unsafe { kvm.vcpu(index as u32 - 1) } {
                        vm.ask(index - 1, vcpu);
                        return true;
                    }
                }
                false
            })
        };
        while ask_one() == Some(true) {}
    }

    /// Waits until all vCPUs that were asked with this stamp, or a later one, have changed or will
    /// have when they execute guest code next. `in_l2` is called when one is in L2. Returns how many
    /// have not after `limit`, or when a signal comes.
    pub(crate) fn wait_for(&self, stamp: u64, limit: Delta, in_l2: impl Fn(&Self)) -> u32 {
        const SHORT: Delta = Delta::from_micros(50);
        const LONG: Delta = Delta::from_millis(1);
        /// How often a request is repeated that was taken and not followed: a probe that was missed.
        const REPETITIONS: u32 = 100;

        let begin = Instant::<Monotonic>::now();
        let mut rounds = 0;
        let mut watched = false;
        loop {
            let awaited = self.awaited(stamp, rounds < REPETITIONS);
            let over = begin.elapsed() >= limit || kernel::current!().signal_pending();
            if awaited.vcpus == 0 || over {
                return awaited.vcpus;
            }
            if awaited.in_l2 && !watched {
                watched = true;
                in_l2(self);
            }
            fsleep(if rounds < 20 { SHORT } else { LONG });
            rounds += 1;
        }
    }

    /// Looks for vCPUs that may still execute guest code as they were before.
    fn awaited(&self, stamp: u64, repeat: bool) -> Awaited {
        let mut awaited = Awaited {
            vcpus: 0,
            in_l2: false,
        };
        self.vms.for_each(|id| {
            self.vms.with(id, |vm, kvm| {
                if vm.stamp < stamp {
                    return;
                }
                for index in 0..vm.vcpus.len() {
                    let progress = vm.progress(kvm, index);
                    let Some(known) = vm.vcpus.get_mut(index) else {
                        break;
                    };
                    // SAFETY: There is a `kvm` only if the VM is not dying.
                    let vcpu = kvm.and_then(|kvm| unsafe { kvm.vcpu(index as u32) });
                    // It has taken the request, and is about to follow, or a probe was missed.
                    let lost = vcpu.filter(|vcpu| {
                        let unfinished = match progress {
                            Progress::InForce => false,
                            Progress::NextEntry | Progress::Pending => true,
                            Progress::InL2 => !known.in_l2,
                        };
                        repeat && unfinished && !vcpu.is_asked()
                    });
                    // It looks again before it executes guest code, until it has changed.
                    known.outside |= progress == Progress::NextEntry;
                    if let Some(vcpu) = lost {
                        vm.ask(index, vcpu);
                    }
                    awaited.vcpus += u32::from(progress.is_awaited() || lost.is_some());
                    awaited.in_l2 |= progress == Progress::InL2;
                }
            });
        });
        awaited
    }

    /// Whether a vCPU waits for the end of L2.
    pub(crate) fn any_in_l2(&self) -> bool {
        let mut any = false;
        self.vms.for_each(|id| any |= self.has_vcpu_in_l2(id));
        any
    }

    fn has_vcpu_in_l2(&self, id: u64) -> bool {
        let any = self.vms.with(id, |vm, kvm| {
            // One that has failed may have left since, and what it failed at been taken back; one
            // that sleeps in L2 will fail.
            vm.vcpus.iter().enumerate().any(|(index, vcpu)| {
                let progress = vm.progress(kvm, index);
                progress == Progress::InL2 || (vcpu.in_l2 && progress != Progress::InForce)
            })
        });
        any == Some(true)
    }

    /// Asks VMs again that have vCPUs in L2.
    pub(crate) fn ask_in_l2(&self) {
        self.vms.for_each(|id| {
            if self.has_vcpu_in_l2(id) {
                self.ask(id);
            }
        });
    }

    /// Asks vCPUs again that have failed in L2 and left it since.
    pub(crate) fn ask_who_left_l2(&self) {
        self.vms.for_each(|id| {
            self.vms.with(id, |vm, kvm| {
                for index in 0..vm.vcpus.len() {
                    let failed = vm.vcpus.get(index).is_some_and(|vcpu| vcpu.in_l2);
                    let left =
                        !matches!(vm.progress(kvm, index), Progress::InForce | Progress::InL2);
                    // SAFETY: There is a `kvm` only if the VM is not dying.
                    let vcpu = kvm.and_then(|kvm| unsafe { kvm.vcpu(index as u32) });
                    let vcpu = vcpu.filter(|vcpu| failed && left && !vcpu.is_asked());
                    if let Some(vcpu) = vcpu {
                        vm.ask(index, vcpu);
                    }
                }
            });
        });
    }

    /// The number of vCPUs that are on their way, and of VMs that hold the module.
    pub(crate) fn on_their_way(&self) -> (u64, u64) {
        self.check_hooks();
        let (mut pending, mut holding) = (0, 0);
        self.vms.for_each(|id| {
            self.vms.with(id, |vm, kvm| {
                pending += vm.pending(kvm);
                // Its VMM may have ended since, of which nothing tells.
                if let (true, Some(kvm)) = (vm.is_held(), kvm) {
                    vm.account(kvm);
                }
                holding += u64::from(vm.is_held());
            });
        });
        (pending, holding)
    }

    /// Whether some VM waits for [`Engine::set_quiet_flags`].
    pub(crate) fn wants_quiet(&self) -> bool {
        let mut any = false;
        self.vms.for_each(|id| {
            // Not one that is dying, which can take long, and gets no flags any more.
            any |= self.vms.with(id, |vm, kvm| vm.wants_quiet && kvm.is_some()) == Some(true);
        });
        any
    }

    /// Sets the flags that could not be set while CPUs look at vCPUs. To be called when none does.
    pub(crate) fn set_quiet_flags(&self) {
        let Some(facts) = self.facts() else {
            return;
        };
        self.vms.for_each(|id| {
            self.vms.with(id, |vm, kvm| {
                if let (true, Some(kvm)) = (vm.wants_quiet, kvm) {
                    vm.write_flags(kvm, facts.vendor, true);
                    // INIT makes KVM look at these flags, too (svm.c: init_vmcb()). A vCPU that got
                    // one before has the exit back, and asks for a recalculation on its way in.
                    for vcpu in &mut vm.vcpus {
                        vcpu.rewrite = true;
                    }
                    vm.account(kvm);
                }
            });
        });
    }

    /// Writes the controls of a vCPU that recalculates its intercepts, and returns whether the
    /// worker has something to do. On entry of `kvm_x86_ops.recalc_intercepts`.
    pub(crate) fn recalculating(&self, loaded: kvm::LoadedVcpu<'_>) -> bool {
        let (Some(facts), Some(kvm)) = (self.facts(), loaded.vcpu().vm()) else {
            return false;
        };
        let deliver = || {
            self.vms
                .with_key(kvm.key(), |vm, kvm| vm.deliver(kvm?, loaded, &facts))
                .flatten()
        };
        deliver().unwrap_or_else(|| {
            // The VM is older than we are, or there was no memory for the vCPU.
            // SAFETY: The vCPU runs, so that its VM has its first vCPU.
            unsafe { self.adopt(kvm, kernel::current!()) };
            deliver();
            true
        })
    }

    /// Asks a vCPU that leaves L2, if it has to change.
    pub(crate) fn leaving_l2(&self, vcpu: kvm::Vcpu<'_>) {
        if let (Some(kvm), Some(index)) = (vcpu.vm(), vcpu.index()) {
            let index = index as usize;
            self.vms.with_key(kvm.key(), |vm, _| {
                if vm.vcpus.get(index).is_some_and(|it| it.in_l2) {
                    vm.ask(index, vcpu);
                }
            });
        }
    }

    /// Lets a VMM repeat its guest's CPUID.
    ///
    /// # Safety
    ///
    /// `call` must be one of kvm_set_cpuid(), with `vcpu` as its first argument. It runs in an ioctl
    /// of the vCPU, under `vcpu->mutex`.
    pub(crate) unsafe fn cpuid_set(&self, call: &Call<'_>, vcpu: kvm::Vcpu<'_>) {
        // Without facts no VM is known, nor whether these are where we look for them.
        let (Some(_), Some(kvm), Some(index)) = (self.facts(), vcpu.vm(), vcpu.index()) else {
            return;
        };
        // SAFETY: By the safety requirements.
        let (incoming, stored) =
            unsafe { (cpuid::Table::incoming(call), cpuid::Table::stored(vcpu)) };
        let offered = incoming.has_pv_unhalt();
        self.vms.with_key(kvm.key(), |vm, kvm| {
            let kvm = kvm?;
            let native = Exits::from_bits_truncate(kvm.disabled_exits()).contains(Exits::HLT);
            let changed = vm.changed && vm.vcpus.len() > index as usize;
            // What is taken out of a guest's CPUID is to be given back, unless the flag will be set
            // when the module has gone.
            let veils = native
                || (changed && offered && (vm.halts_at_home() || (vm.overridable && vm.hold())));
            let known = vm.vcpus.get_mut(index as usize)?;
            if !vcpu.has_run() && !vcpu.in_l2() {
                known.offered_pv_unhalt = offered;
                // What KVM is about to store.
                known.has_pv_unhalt = offered && !native;
                // A KVM_RUN that a signal ended may have looked at what was stored before.
                known.entered = false;
            } else if !changed {
                // KVM has made the stored table by the same flags as it will look at this one.
            } else if veils {
                // KVM takes the bit out of the incoming table, which is its own copy, if the flag is
                // set when it looks, a moment from now. Without the bit in either of the two, they
                // are equal whatever happens to the flag until then.
                let had = stored.has_pv_unhalt();
                incoming.set_pv_unhalt(false);
                stored.set_pv_unhalt(false);
                known.offered_pv_unhalt |= had;
                known.has_pv_unhalt = false;
                // A guest that runs shall not notice.
                known.veiled |= had && !native;
                let known = *known;
                if known.veiled || vm.has_to_change(&known) {
                    vm.ask(index as usize, vcpu);
                }
            } else if offered {
                // The flag stays as it is while policies are switched off, or the module is being
                // unloaded, and so does the guest's CPUID: better than to hold the module until the
                // vCPU runs.
                incoming.set_pv_unhalt(stored.has_pv_unhalt());
            }
            vm.account(kvm);
            Some(())
        });
    }
}

/// The process found last to have a VMM's memory, or that none was: it may have made many VMs, and to
/// look takes all threads of the host.
#[derive(Default)]
struct Heirs(Option<(usize, Option<Process>)>);

impl Heirs {
    fn of<'rcu>(&mut self, mm: usize, rcu: &'rcu rcu::Guard) -> Option<(Process, &'rcu Cgroup)> {
        match &self.0 {
            Some((of, None)) if *of == mm => return None,
            Some((of, Some(heir))) if *of == mm => {
                if let Some(cgroup) = Cgroup::of_process(heir, mm, rcu) {
                    return Some((heir.clone(), cgroup));
                }
                // It has ended since, and there may be another one.
            }
            _ => {}
        }
        let found = Process::with_memory(mm, rcu);
        self.0 = Some((mm, found.as_ref().map(|(heir, _)| heir.clone())));
        found
    }
}

struct Awaited {
    vcpus: u32,
    in_l2: bool,
}

impl Vm {
    /// Writes the controls of a vCPU of this VM, and returns whether the worker has something to
    /// do, or nothing if the vCPU is not known.
    fn deliver(
        &mut self,
        kvm: kvm::Vm<'_>,
        loaded: kvm::LoadedVcpu<'_>,
        facts: &Facts,
    ) -> Option<bool> {
        let vcpu = loaded.vcpu();
        let index = vcpu.index()? as usize;
        let known = *self.vcpus.get(index)?;
        let flags = Exits::from_bits_truncate(kvm.disabled_exits());
        let was_in_l2 = known.in_l2;
        let as_flags = known.in_force == flags && !known.rewrite;
        if known.entered && !self.has_to_change(&known) && as_flags && !known.veiled {
            // What KVM makes of the flags by itself is left to it.
            self.vcpus.get_mut(index)?.in_l2 = false;
            return Some(was_in_l2);
        }

        let (own, refusal) = facts.vendor.limits(vcpu);
        if self.limits.union(own) != self.limits {
            // It was not online when the others were looked at, or its guest was told since.
            self.limits = self.limits.union(own);
            self.refusal = refusal;
            self.stale = true;
        }
        // What the flags did not permit so far, as they could not be written.
        self.write_flags(kvm, facts.vendor, false);
        let target = self.target(&known);
        let open = permitted(target, self.flags);
        let same = known.in_force == open && known.sure;
        let mut in_l2 = false;
        if !same || open != self.flags || known.rewrite {
            let now = match facts.vendor.write_controls(loaded, open) {
                Ok(()) => {
                    let known = self.vcpus.get_mut(index)?;
                    known.in_force = open;
                    known.sure = true;
                    known.rewrite = false;
                    open
                }
                Err(InL2) => {
                    in_l2 = !same;
                    // Nothing is half applied: it may be taken back before L2 ends.
                    known.in_force
                }
            };
            facts.vendor.write_msrs(loaded, now);
        }
        // SAFETY: This is KVM_RUN, which holds the mutex.
        let stored = unsafe { cpuid::Table::stored(vcpu) };
        if !known.entered {
            // The flag may have changed between our look at it and KVM's, when CPUID was set. KVM
            // notes the table's features as it stores it (cpuid.c: kvm_vcpu_after_set_cpuid()).
            // Until the vCPU has run the two are the same, and what is noted need not be searched.
            let fresh = !vcpu.has_run() && !vcpu.in_l2();
            self.vcpus.get_mut(index)?.has_pv_unhalt = if fresh {
                vcpu.knows_pv_unhalt()
            } else {
                stored.has_pv_unhalt()
            };
        }
        let known = *self.vcpus.get(index)?;
        let pv_unhalt = self.pv_unhalt_to_be(&known);
        let native = Exits::from_bits_truncate(kvm.disabled_exits()).contains(Exits::HLT);
        let unveil = known.veiled && !native && (self.overridable || !self.halts_at_home());
        let known = self.vcpus.get_mut(index)?;
        known.entered = true;
        known.in_l2 = in_l2;
        known.outside = false;
        known.veiled = false;
        if let Some(on) = pv_unhalt.or(unveil.then_some(true)) {
            stored.set_pv_unhalt(on);
            known.has_pv_unhalt = on;
            // A guest that has learned of it, and from which only the bit is taken, goes on kicking.
            if on {
                // SAFETY: As above.
                unsafe { vcpu.tell_pv_unhalt() };
            }
        }
        let undone = !in_l2 && known.in_force != target;

        self.write_flags(kvm, facts.vendor, false);
        self.account(kvm);
        // Flags cannot be written while a vCPU is not known; to ask again at once would be in vain.
        if undone && self.knows_all_of(kvm) {
            self.stale = true;
        }
        Some(self.stale || self.wants_quiet || in_l2 || was_in_l2)
    }

    /// The number of vCPUs that are on their way.
    pub(crate) fn pending(&self, kvm: Option<kvm::Vm<'_>>) -> u64 {
        (0..self.vcpus.len())
            .filter(|index| self.progress(kvm, *index) != Progress::InForce)
            .count() as u64
    }
}
