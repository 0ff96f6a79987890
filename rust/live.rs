// SPDX-License-Identifier: GPL-2.0

//! Changes VMs that run.
//!
//! Only a vCPU's own thread can write its controls. So a change has two ends: here an administrator
//! decides, writes the VM's flags and asks each vCPU; there KVM, on the vCPU's way into the guest,
//! calls `recalc_intercepts` because it was asked, and the hook on it writes the controls. Nobody
//! waits with a lock held.

use crate::{
    engine::{
        Engine,
        Facts, //
    },
    kernel_ext::{
        cgroup::Cgroup,
        ftrace, //
    },
    kvm,
    policy::{
        live::permitted,
        Exits,
        Resolved, //
    },
    vm::{
        Progress,
        Vm, //
    },
};
use kernel::{
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
        if ftrace::is_dead() {
            // Nobody tells us of the end of VMs any more.
            pr_err_once!("ftrace has failed: VMs that run stay as they are\n");
            self.vms.abandon();
        }
        let change = |id| {
            if self.decide_again(&facts, scope, stamp, id) {
                self.ask(id);
            }
        };
        match scope {
            Scope::One(id) => change(id),
            _ => self.vms.for_each(change),
        }
        stamp
    }

    /// Returns whether the VM is in `scope`.
    fn decide_again(&self, facts: &Facts, scope: Scope, stamp: u64, id: u64) -> bool {
        let policies = match scope {
            Scope::One(_) => None,
            Scope::Stale => {
                // Before the look at what there is: who moves the VMM meanwhile marks it again.
                match self
                    .vms
                    .with(id, |vm, _| core::mem::replace(&mut vm.stale, false))
                {
                    Some(true) => self.policies_of(scope, id),
                    _ => return false,
                }
            }
            Scope::All | Scope::Below(_) => match self.policies_of(scope, id) {
                None => return false,
                policies => policies,
            },
        };
        self.vms
            .with(id, |vm, kvm| {
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
                vm.stamp = stamp;
                if let Some(kvm) = kvm {
                    vm.look_for_limits(kvm, facts.vendor);
                    vm.write_flags(kvm, facts.vendor, false);
                    vm.account();
                }
                if vm.decision != before {
                    self.decided(vm, !vm.decision.clamped.is_empty());
                }
            })
            .is_some()
    }

    /// The cgroup that the VM's VMM is in now, and what that one's policies say; nothing if it is
    /// not in `scope`. What a VMM that has ended got last stays.
    fn policies_of(&self, scope: Scope, id: u64) -> Option<(u64, Resolved)> {
        let (process, last) = self
            .vms
            .with(id, |vm, _| (vm.process.clone(), (vm.cgroup, vm.resolved)))?;
        let rcu = rcu::read_lock();
        let Some(cgroup) = Cgroup::of_process(&process, &rcu).map(Cgroup::domain) else {
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
                    if vcpu.in_force == vm.target(vcpu) && vcpu.sure {
                        continue;
                    }
                    // SAFETY: There is a `kvm` only if the VM is not dying.
                    if let Some(vcpu) = unsafe { kvm.vcpu(index as u32 - 1) } {
                        vcpu.ask();
                        return true;
                    }
                }
                false
            })
        };
        while ask_one() == Some(true) {}
    }

    /// Waits until all vCPUs that were asked with this stamp have changed or will have when they
    /// execute guest code next. `in_l2` is called when one is in L2. Returns how many have not
    /// after `limit`.
    pub(crate) fn wait_for(&self, stamp: u64, limit: Delta, in_l2: impl Fn(&Self)) -> u32 {
        const SHORT: Delta = Delta::from_micros(50);
        const LONG: Delta = Delta::from_millis(1);
        /// How often a request is repeated that was taken and not followed: a probe that was missed.
        const REPETITIONS: u32 = 100;

        let begin = Instant::<Monotonic>::now();
        let mut rounds = 0;
        loop {
            let awaited = self.awaited(stamp, rounds < REPETITIONS);
            if awaited.vcpus == 0 || begin.elapsed() >= limit {
                return awaited.vcpus;
            }
            if awaited.in_l2 {
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
                if vm.stamp != stamp {
                    return;
                }
                for index in 0..vm.vcpus.len() {
                    let progress = vm.progress(kvm, index);
                    if !progress.is_awaited() {
                        continue;
                    }
                    awaited.vcpus += 1;
                    awaited.in_l2 |= progress == Progress::InL2;
                    // SAFETY: There is a `kvm` only if the VM is not dying.
                    let vcpu = kvm.and_then(|kvm| unsafe { kvm.vcpu(index as u32) });
                    if let Some(vcpu) = vcpu {
                        if repeat && progress == Progress::Pending && !vcpu.is_asked() {
                            vcpu.ask();
                        }
                    }
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
        let any = self
            .vms
            .with(id, |vm, _| vm.vcpus.iter().any(|vcpu| vcpu.in_l2));
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

    /// The number of vCPUs that are on their way, and of VMs that hold the module.
    pub(crate) fn on_their_way(&self) -> (u64, u64) {
        let (mut pending, mut holding) = (0, 0);
        self.vms.for_each(|id| {
            self.vms.with(id, |vm, kvm| {
                pending += vm.pending(kvm);
                holding += u64::from(vm.is_held());
            });
        });
        (pending, holding)
    }

    /// Whether some VM waits for [`Engine::set_quiet_flags`].
    pub(crate) fn wants_quiet(&self) -> bool {
        let mut any = false;
        self.vms.for_each(|id| {
            any |= self.vms.with(id, |vm, _| vm.wants_quiet) == Some(true);
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
                    vm.account();
                }
            });
        });
    }

    /// Writes the controls of a vCPU that recalculates its intercepts, and returns whether the
    /// worker has something to do. On entry of `kvm_x86_ops.recalc_intercepts`.
    pub(crate) fn recalculating(&self, loaded: kvm::LoadedVcpu<'_>) -> bool {
        let vcpu = loaded.vcpu();
        let (Some(facts), Some(kvm), Some(index)) = (self.facts(), vcpu.vm(), vcpu.index()) else {
            return false;
        };
        let (own_limits, _) = facts.vendor.limits(vcpu);
        let index = index as usize;
        let deliver = || {
            self.vms.with_key(kvm.key(), |vm, kvm| {
                let kvm = kvm?;
                let flags = Exits::from_bits_truncate(kvm.disabled_exits());
                let target = vm.target(vm.vcpus.get(index)?) & !own_limits.forbidden;
                let open = permitted(target, flags);
                let before = vm.vcpus.get_mut(index)?;
                before.entered = true;
                before.in_l2 = false;
                let same = before.in_force == open && before.sure;
                // What KVM makes of the flags by itself is left to it.
                if !same || open != flags {
                    let written = facts.vendor.write_controls(loaded, open);
                    let vcpu = vm.vcpus.get_mut(index)?;
                    match written {
                        Ok(()) => {
                            vcpu.in_force = open;
                            vcpu.sure = true;
                        }
                        Err(_) => vcpu.in_l2 = !same,
                    }
                }
                vm.write_flags(kvm, facts.vendor, false);
                vm.account();
                let vcpu = vm.vcpus.get(index)?;
                // The flags did not permit it, or this guest has learnt of PV_UNHALT since.
                let undone = !vcpu.in_l2 && vcpu.in_force != vm.target(vcpu);
                vm.stale |= undone;
                Some(vm.stale || vm.wants_quiet || vcpu.in_l2)
            })
        };
        if let Some(Some(wake)) = deliver() {
            return wake;
        }
        // The VM is older than we are, or there was no memory for it.
        // SAFETY: The vCPU runs, so that its VM has its first vCPU.
        unsafe { self.adopt(kvm, kernel::current!()) };
        true
    }

    /// Asks a vCPU that leaves L2, if it has to change.
    pub(crate) fn leaving_l2(&self, vcpu: kvm::Vcpu<'_>) {
        if let (Some(kvm), Some(index)) = (vcpu.vm(), vcpu.index()) {
            let waits = self.vms.with_key(kvm.key(), |vm, _| {
                vm.vcpus.get(index as usize).is_some_and(|it| it.in_l2)
            });
            if waits == Some(true) {
                vcpu.ask();
            }
        }
    }

    /// What must be known for KVM_SET_CPUID to be repeatable: whether `hlt` is disabled, if that
    /// was changed after a vCPU may have run.
    pub(crate) fn changed_hlt(&self, kvm: kvm::Vm<'_>) -> Option<bool> {
        self.vms.with_key(kvm.key(), |vm, kvm| {
            let flags = Exits::from_bits_truncate(kvm?.disabled_exits());
            vm.hlt_changed.then_some(flags.contains(Exits::HLT))
        })?
    }
}

struct Awaited {
    vcpus: u32,
    in_l2: bool,
}

impl Vm {
    /// The number of vCPUs that are on their way.
    pub(crate) fn pending(&self, kvm: Option<kvm::Vm<'_>>) -> u64 {
        (0..self.vcpus.len())
            .filter(|index| self.progress(kvm, *index) != Progress::InForce)
            .count() as u64
    }
}
