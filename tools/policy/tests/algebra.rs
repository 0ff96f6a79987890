// SPDX-License-Identifier: GPL-2.0

//! Properties of the policy algebra. Each was seen to fail with the algebra broken in the place
//! that it watches.

use exitpolicy_policy::{
    Decision,
    Exits,
    ParseExitsError,
    Policy,
    Resolved, //
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::subsequence, //
};

fn exits() -> impl Strategy<Value = Exits> {
    (0..=Exits::ALL.bits()).prop_map(Exits::from_bits_truncate)
}

fn policy() -> impl Strategy<Value = Policy> {
    (exits(), exits()).prop_map(|(disable, allow)| Policy { disable, allow })
}

/// The policies from a cgroup up to the root, nearest first, each with its cgroup.
fn policies() -> impl Strategy<Value = Vec<(u64, Policy)>> {
    vec(policy(), 0..6).prop_map(|policies| (1..).zip(policies).collect())
}

/// What KVM and the VMM say.
#[derive(Clone, Copy, Debug)]
struct Vm {
    floor: Exits,
    requested: Exits,
    supported: Exits,
}

fn vm() -> impl Strategy<Value = Vm> {
    (exits(), exits(), exits()).prop_map(|(floor, requested, supported)| Vm {
        floor,
        requested,
        supported,
    })
}

fn resolve(policies: &[(u64, Policy)]) -> Resolved {
    Resolved::from_nearest_to_root(policies.iter().copied())
}

fn decide(policies: &[(u64, Policy)], vm: Vm) -> Decision {
    resolve(policies).decide(vm.floor, vm.requested, vm.supported)
}

/// What design.md says of one exit: the formula, exit by exit and without sets.
fn is_effective(exit: Exits, policies: &[(u64, Policy)], vm: Vm) -> bool {
    let disable = policies
        .first()
        .is_some_and(|(_, nearest)| nearest.disable.contains(exit));
    let allowed = policies
        .iter()
        .all(|(_, policy)| policy.allow.contains(exit));
    let wanted = vm.requested.contains(exit) || (disable && vm.supported.contains(exit));
    vm.floor.contains(exit) || (wanted && allowed)
}

proptest! {
    #[test]
    fn the_floor_always_holds(policies in policies(), vm in vm()) {
        prop_assert!(decide(&policies, vm).effective.contains(vm.floor));
    }

    #[test]
    fn the_decision_is_the_formula(policies in policies(), vm in vm()) {
        let decision = decide(&policies, vm);
        for exit in Exits::ALL.iter() {
            prop_assert_eq!(
                decision.effective.contains(exit),
                is_effective(exit, &policies, vm),
                "{}", exit,
            );
        }
    }

    #[test]
    fn without_policies_the_vmm_gets_what_it_asked_for(vm in vm()) {
        let decision = decide(&[], vm);
        prop_assert_eq!(decision.effective, vm.floor | vm.requested);
        prop_assert_eq!(decision.clamped, Exits::NONE);
        prop_assert_eq!(resolve(&[]).source, None);
    }

    /// Whatever a cgroup in a delegated subtree says, its VMs get no more than the ones above
    /// allow: what it may get with all requested and all disabled there is the most.
    #[test]
    fn a_descendant_never_widens(
        above in policies(),
        below in vec(policy(), 0..4),
        vm in vm(),
    ) {
        let all: Vec<_> = (100..).zip(below).chain(above.iter().copied()).collect();
        let most = above
            .iter()
            .fold(Exits::ALL, |most, (_, policy)| most & policy.allow);
        prop_assert!(most.contains(resolve(&all).allow));
        prop_assert!((most | vm.floor).contains(decide(&all, vm).effective));
    }

    #[test]
    fn narrowing_an_allow_never_widens(
        mut policies in policies(),
        place in any::<prop::sample::Index>(),
        kept in exits(),
        vm in vm(),
    ) {
        prop_assume!(!policies.is_empty());
        let before = decide(&policies, vm);
        let place = place.index(policies.len());
        policies[place].1.allow = policies[place].1.allow & kept;
        let after = decide(&policies, vm);
        prop_assert!(before.effective.contains(after.effective));
        prop_assert!(after.clamped.contains(before.clamped));
    }

    /// Who asks for more never gets less, and who is given more neither.
    #[test]
    fn effective_is_monotone(policies in policies(), vm in vm(), more in exits()) {
        let before = decide(&policies, vm).effective;
        let asks = Vm { requested: vm.requested | more, ..vm };
        prop_assert!(decide(&policies, asks).effective.contains(before));

        let can = Vm { supported: vm.supported | more, ..vm };
        prop_assert!(decide(&policies, can).effective.contains(before));

        let mut gives = policies;
        if let Some((_, nearest)) = gives.first_mut() {
            nearest.disable = nearest.disable | more;
        }
        prop_assert!(decide(&gives, vm).effective.contains(before));
    }

    #[test]
    fn clamped_is_what_was_requested_and_not_given(policies in policies(), vm in vm()) {
        let decision = decide(&policies, vm);
        prop_assert_eq!(decision.clamped, vm.requested & !decision.effective);
    }

    #[test]
    fn disable_is_that_of_the_nearest(policies in policies()) {
        let resolved = resolve(&policies);
        let nearest = policies.first();
        prop_assert_eq!(resolved.source, nearest.map(|(cgroup, _)| *cgroup));
        prop_assert_eq!(
            resolved.disable,
            nearest.map_or(Exits::NONE, |(_, policy)| policy.disable),
        );
    }

    /// Policies are attached in any order, changed and removed again: what holds in a cgroup
    /// depends on what is there and on nothing else.
    #[test]
    fn the_order_of_attaching_does_not_matter(
        attached in vec((0..6u64, policy()), 0..12),
        order in Just((0..6u64).collect::<Vec<_>>()).prop_shuffle(),
        cleared in subsequence((0..6u64).collect::<Vec<_>>(), 0..6),
        vm in vm(),
    ) {
        use std::collections::HashMap;

        // Cgroup 0 is the nearest one, 5 the root.
        let walk = |store: &HashMap<u64, Policy>| {
            let path: Vec<_> = (0..6)
                .filter_map(|cgroup| Some((cgroup, *store.get(&cgroup)?)))
                .collect();
            (resolve(&path), decide(&path, vm))
        };

        let mut history = HashMap::new();
        for (cgroup, policy) in &attached {
            let old = history.get(cgroup).copied().unwrap_or(Policy::NEUTRAL);
            history.insert(*cgroup, old.with(Some(policy.disable), None));
            let old = history[cgroup];
            history.insert(*cgroup, old.with(None, Some(policy.allow)));
        }
        for cgroup in &cleared {
            history.remove(cgroup);
        }

        let mut shuffled = HashMap::new();
        for cgroup in order {
            let last = attached.iter().rev().find(|(other, _)| *other == cgroup);
            if let Some((_, policy)) = last.filter(|_| !cleared.contains(&cgroup)) {
                shuffled.insert(cgroup, *policy);
            }
        }
        prop_assert_eq!(walk(&history), walk(&shuffled));
    }

    #[test]
    fn what_is_not_given_stays(
        policy in policy(),
        disable in proptest::option::of(exits()),
        allow in proptest::option::of(exits()),
    ) {
        let changed = policy.with(disable, allow);
        prop_assert_eq!(changed.disable, disable.unwrap_or(policy.disable));
        prop_assert_eq!(changed.allow, allow.unwrap_or(policy.allow));
    }

    /// Policies that say nothing change nothing, but that they end the inheritance of "disable".
    #[test]
    fn a_neutral_policy_restricts_nothing(policies in policies(), vm in vm()) {
        let mut with = policies.clone();
        with.push((7, Policy::NEUTRAL));
        prop_assert_eq!(decide(&with, vm), decide(&policies, vm));
    }

    #[test]
    fn sets_are_printed_as_they_are_read(set in exits()) {
        prop_assert_eq!(set.to_string().parse(), Ok(set));
        prop_assert_eq!(format!("{set:?}"), set.to_string());
    }

    #[test]
    fn order_space_and_repetition_do_not_matter(
        words in vec((0..5usize, " {0,2}", "[ \t\n]{0,2}"), 1..8),
    ) {
        let text = words
            .iter()
            .map(|(word, before, after)| format!("{before}{}{after}", Exits::NAMES[*word].1))
            .collect::<Vec<_>>()
            .join(",");
        let set = words
            .iter()
            .fold(Exits::NONE, |set, (word, ..)| set | Exits::NAMES[*word].0);
        prop_assert_eq!(text.parse(), Ok(set));
    }

    /// Anything is either refused, or means the same when printed and read again, and is then
    /// made of words that are known.
    #[test]
    fn everything_else_is_refused(
        text in prop_oneof![
            any::<String>(),
            "[ ,a-z]{0,24}",
            "(hlt|mwait|pause|cstate|aperfmperf|all|none|HLT|hl|)([ ,;]{1,2}(hlt|all|none|pause|x|))*",
        ],
    ) {
        let known = match text.trim() {
            "all" | "none" => true,
            names => names.split(',').all(|word| {
                Exits::NAMES.iter().any(|(_, name)| *name == word.trim())
            }),
        };
        match text.parse::<Exits>() {
            Ok(set) => {
                prop_assert!(known);
                prop_assert_eq!(set.to_string().parse(), Ok(set));
            }
            Err(error) => {
                prop_assert!(!known);
                prop_assert_eq!(error == ParseExitsError::Empty, text.trim().is_empty());
            }
        }
    }

    #[test]
    fn bits_are_kvms(bits in any::<u64>()) {
        let known = bits & 0x1f;
        prop_assert_eq!(Exits::from_bits(bits).is_some(), bits == known);
        prop_assert_eq!(Exits::from_bits_truncate(bits).bits(), known);
    }

    #[test]
    fn sets_are_sets(a in exits(), b in exits()) {
        prop_assert!((a | b).contains(a) && (a | b).contains(b));
        prop_assert!(a.contains(a & b) && b.contains(a & b));
        prop_assert_eq!(a | !a, Exits::ALL);
        prop_assert_eq!(a & !a, Exits::NONE);
        prop_assert_eq!(!(a | b), !a & !b);
        prop_assert_eq!(a.iter().fold(Exits::NONE, |set, exit| set | exit), a);
        prop_assert_eq!(a.is_empty(), a == Exits::NONE);
    }
}
