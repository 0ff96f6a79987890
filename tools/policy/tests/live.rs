// SPDX-License-Identifier: GPL-2.0

//! Properties of changing a VM that runs, in a model of a VM whose vCPUs follow when they like.
//! Each was seen to fail with the rules broken in the place that it watches.

use exitpolicy_policy::{
    live::{
        flags,
        intercepts,
        permitted,
        Change,
        Intercept,
        Limits,
        FOLLOWING,
        LEADING, //
    },
    Exits, //
};
use proptest::{
    collection::vec,
    prelude::*, //
};

fn exits() -> impl Strategy<Value = Exits> {
    (0..=Exits::ALL.bits()).prop_map(Exits::from_bits_truncate)
}

/// What can happen to a VM.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A vCPU should have something else.
    Want(usize, Exits),
    /// The VM should, and vCPUs to come.
    WantAll(Exits),
    /// The VM should, and nobody can write its flags now, as it is being made.
    WantAllUnseen(Exits),
    /// A vCPU goes into the guest.
    Enter(usize),
    /// A vCPU is made.
    Plug,
    /// It turns out what cannot be changed.
    Limit(Limits),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (0..4usize, exits()).prop_map(|(vcpu, wanted)| Event::Want(vcpu, wanted)),
        exits().prop_map(Event::WantAll),
        exits().prop_map(Event::WantAllUnseen),
        (0..4usize).prop_map(Event::Enter),
        (0..4usize).prop_map(Event::Enter),
        Just(Event::Plug),
        (exits(), exits()).prop_map(|(fixed, forbidden)| {
            // What is open already is never found to be forbidden in the model's time.
            Event::Limit(Limits {
                fixed,
                forbidden: forbidden & !fixed,
            })
        }),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Vcpu {
    wanted: Exits,
    in_force: Exits,
}

#[derive(Debug)]
struct Vm {
    floor: Exits,
    requested: Exits,
    keep: Exits,
    flags: Exits,
    wanted: Exits,
    limits: Limits,
    vcpus: Vec<Vcpu>,
}

impl Vm {
    /// A VM that has just got its first vCPU.
    fn new(floor: Exits, requested: Exits, effective: Exits) -> Self {
        let floor = floor & Exits::PAUSE;
        let effective = effective | floor;
        Self {
            floor,
            requested,
            keep: (floor | requested) & effective,
            flags: effective,
            wanted: effective,
            limits: Limits::NONE,
            vcpus: vec![Vcpu {
                wanted: effective,
                in_force: effective,
            }],
        }
    }

    fn home(&self) -> Exits {
        self.floor | self.requested
    }

    fn target(&self, vcpu: &Vcpu) -> Exits {
        self.limits.target(vcpu.wanted, vcpu.in_force)
    }

    fn write_flags(&mut self) {
        let changes: Vec<_> = self
            .vcpus
            .iter()
            .map(|vcpu| Change {
                target: self.target(vcpu),
                in_force: vcpu.in_force,
            })
            .collect();
        self.flags = flags(self.flags, self.keep, self.home(), changes);
    }

    fn enter(&mut self, index: usize) {
        let index = index % self.vcpus.len();
        let target = self.target(&self.vcpus[index]);
        let open = permitted(target, self.flags);
        self.vcpus[index].in_force = open;
        // The guest must not be in danger between the one and the other.
        assert!(self.flags.contains(open & LEADING), "{self:?}");
        assert!(open.contains(self.flags & FOLLOWING), "{self:?}");
        self.write_flags();
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Want(vcpu, wanted) => {
                let index = vcpu % self.vcpus.len();
                self.vcpus[index].wanted = wanted | self.floor;
            }
            Event::WantAll(wanted) | Event::WantAllUnseen(wanted) => {
                self.wanted = wanted | self.floor;
                for vcpu in &mut self.vcpus {
                    vcpu.wanted = wanted | self.floor;
                }
            }
            Event::Enter(vcpu) => return self.enter(vcpu),
            Event::Plug => {
                if self.vcpus.len() < 4 {
                    // KVM makes its controls from the flags.
                    self.vcpus.push(Vcpu {
                        wanted: self.wanted,
                        in_force: self.flags,
                    });
                }
            }
            Event::Limit(limits) => self.limits = limits,
        }
        if !matches!(event, Event::WantAllUnseen(_)) {
            self.write_flags();
        }
    }

    /// Every vCPU has gone into the guest, a second time if the flags came late.
    fn settle(&mut self) {
        for _ in 0..2 {
            (0..self.vcpus.len()).for_each(|index| self.enter(index));
        }
    }
}

fn vm() -> impl Strategy<Value = Vm> {
    (exits(), exits(), exits())
        .prop_map(|(floor, requested, effective)| Vm::new(floor, requested, effective))
}

/// All sets.
fn all() -> impl Iterator<Item = Exits> + Clone {
    (0..=Exits::ALL.bits()).map(Exits::from_bits_truncate)
}

#[test]
fn encrypted_guests_change_hlt_only() {
    for (wanted, in_force) in all().flat_map(|set| all().map(move |other| (set, other))) {
        let target = Limits::ENCRYPTED.target(wanted, in_force);
        assert_eq!(target & Exits::HLT, wanted & Exits::HLT);
        assert_eq!(target & !Exits::HLT, in_force & !Exits::HLT);
        assert_eq!(Limits::HIDDEN.target(wanted, in_force), in_force);
        let kicked = Limits::KICKED.target(wanted, in_force);
        assert_eq!(kicked, wanted & !Exits::HLT);
    }
}

/// As KVM's init_vmcb() makes a VMCB with the same flags.
#[test]
fn idle_hlt_stands_in_for_hlt() {
    for (open, has_idle_hlt) in all().flat_map(|open| [(open, false), (open, true)]) {
        let on = |which| {
            let mut all = intercepts(open, has_idle_hlt).into_iter();
            all.find(|(intercept, _)| *intercept == which)
                .map(|(_, on)| on)
        };
        let (used, other) = if has_idle_hlt {
            (Intercept::IdleHlt, Intercept::Hlt)
        } else {
            (Intercept::Hlt, Intercept::IdleHlt)
        };
        assert_eq!(on(used), Some(!open.contains(Exits::HLT)));
        assert_eq!(on(other), None, "it is KVM's, and off");
        assert_eq!(on(Intercept::Monitor), Some(!open.contains(Exits::MWAIT)));
        assert_eq!(on(Intercept::Mwait), on(Intercept::Monitor));
        assert_eq!(on(Intercept::Pause), Some(!open.contains(Exits::PAUSE)));
    }
}

proptest! {
    /// KVM repairs what a native HLT leaves, and keeps timers from native MWAITs, by the flag.
    #[test]
    fn leading_flags_are_set_while_a_control_is_open(mut vm in vm(), events in vec(event(), 0..40)) {
        for event in events {
            vm.happen(event);
            for vcpu in &vm.vcpus {
                prop_assert!(vm.flags.contains(vcpu.in_force & LEADING), "{vm:?}");
            }
        }
    }

    /// KVM would warn of a PAUSE exit, or open the MSRs again.
    #[test]
    fn following_flags_are_clear_while_a_control_is_closed(
        mut vm in vm(),
        events in vec(event(), 0..40),
    ) {
        for event in events {
            vm.happen(event);
            for vcpu in &vm.vcpus {
                prop_assert!(vcpu.in_force.contains(vm.flags & FOLLOWING), "{vm:?}");
            }
        }
    }

    /// A VMM can repeat the CPUID that it set when it had what it asked for.
    #[test]
    fn kept_flags_stay(mut vm in vm(), events in vec(event(), 0..40)) {
        for event in events {
            vm.happen(event);
            prop_assert!(vm.flags.contains(vm.keep & LEADING), "{vm:?}");
        }
    }

    /// What is open was wanted, is fixed, or is on its way out.
    #[test]
    fn everything_arrives(mut vm in vm(), events in vec(event(), 0..40)) {
        for event in events {
            vm.happen(event);
        }
        vm.settle();
        for vcpu in &vm.vcpus {
            prop_assert_eq!(vcpu.in_force, vm.target(vcpu), "{:?}", vm);
        }
        // No flag is set without a reason.
        let open = vm.vcpus.iter().map(|vcpu| vcpu.in_force);
        let needed = open.fold(vm.keep, |needed, open| needed | open);
        prop_assert!(needed.contains(vm.flags), "{vm:?}");
    }

    /// Given back what it asked for, a VM is as if nobody had ever touched it.
    #[test]
    fn nothing_is_left(mut vm in vm(), events in vec(event(), 0..40)) {
        for event in events {
            vm.happen(event);
        }
        vm.happen(Event::Limit(Limits::NONE));
        vm.happen(Event::WantAll(vm.home()));
        vm.settle();
        prop_assert_eq!(vm.flags, vm.home(), "{:?}", vm);
        for vcpu in &vm.vcpus {
            prop_assert_eq!(vcpu.in_force, vm.home(), "{:?}", vm);
        }
    }

    /// A vCPU in L2, or one that is not in the guest, keeps nobody else from changing.
    #[test]
    fn one_waits_alone(mut vm in vm(), wanted in exits()) {
        vm.happen(Event::Plug);
        vm.settle();
        vm.happen(Event::WantAll(wanted));
        let before = vm.vcpus[0].in_force;
        vm.enter(1);
        vm.enter(1);
        prop_assert_eq!(vm.vcpus[0].in_force, before);
        prop_assert_eq!(vm.vcpus[1].in_force, vm.target(&vm.vcpus[1]), "{:?}", vm);
    }
}
