// SPDX-License-Identifier: GPL-2.0

//! Where each bit of a decision comes from.

use exitpolicy_policy::{
    Exits,
    Policy,
    Resolved, //
};

/// What becomes of one exit in the VMs of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// KVM itself disables it in every VM, whatever the policies say.
    Floor,
    /// Every VM gets it disabled, asked for or not, unless it has an override.
    Given,
    /// A VM gets it disabled if its VMM asks.
    OnRequest,
    /// No VM gets it disabled: some `allow` does not let it through.
    Withheld,
    /// KVM cannot disable it on this host.
    Unsupported,
}

impl Fate {
    /// A name that stays the same, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Given => "given",
            Self::OnRequest => "on_request",
            Self::Withheld => "withheld",
            Self::Unsupported => "unsupported",
        }
    }
}

/// Why one exit has its fate. Cgroups are given by their ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// The exit, a set of one.
    pub exit: Exits,
    /// What becomes of it.
    pub fate: Fate,
    /// Whose `disable` names it, if the one that counts does.
    pub disabled_by: Option<u64>,
    /// Whose `allow` leaves it out, nearest first.
    pub withheld_by: Vec<u64>,
}

/// Explains what the VMs of a cgroup get.
///
/// `policies` are those of the cgroup and of its ancestors, nearest first, each with the id of
/// its cgroup; `floor` and `supported` are KVM's.
pub fn explain(
    policies: &[(u64, Policy)],
    floor: Exits,
    supported: Exits,
) -> (Resolved, Vec<Reason>) {
    let resolved = Resolved::from_nearest_to_root(policies.iter().copied());
    // What the VMM of least, and that of most demand gets. KVM refuses to be asked for more.
    let least = resolved.decide(floor, Exits::NONE, supported).effective;
    let most = resolved.decide(floor, supported, supported).effective;
    let reasons = Exits::ALL
        .iter()
        .map(|exit| Reason {
            exit,
            fate: if floor.contains(exit) {
                Fate::Floor
            } else if least.contains(exit) {
                Fate::Given
            } else if most.contains(exit) {
                Fate::OnRequest
            } else if supported.contains(exit) {
                Fate::Withheld
            } else {
                Fate::Unsupported
            },
            disabled_by: resolved.source.filter(|_| resolved.disable.contains(exit)),
            withheld_by: policies
                .iter()
                .filter(|(_, policy)| !policy.allow.contains(exit))
                .map(|(cgroup, _)| *cgroup)
                .collect(),
        })
        .collect();
    (resolved, reasons)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> Exits {
        text.parse().unwrap()
    }

    fn policy(disable: &str, allow: &str) -> Policy {
        Policy {
            disable: set(disable),
            allow: set(allow),
        }
    }

    fn fates(reasons: &[Reason]) -> Vec<Fate> {
        reasons.iter().map(|reason| reason.fate).collect()
    }

    #[test]
    fn without_policies_the_vmm_decides() {
        let (resolved, reasons) = explain(&[], Exits::PAUSE, set("hlt,pause"));
        assert_eq!(resolved, Resolved::UNRESTRICTED);
        assert_eq!(
            fates(&reasons),
            [
                Fate::Unsupported,
                Fate::OnRequest,
                Fate::Floor,
                Fate::Unsupported,
                Fate::Unsupported,
            ],
        );
        assert!(reasons
            .iter()
            .all(|reason| reason.disabled_by.is_none() && reason.withheld_by.is_empty()));
    }

    #[test]
    fn each_bit_has_its_reason() {
        let policies = [
            (3, policy("mwait,hlt,cstate", "all")),
            (2, policy("pause", "mwait,hlt,aperfmperf")),
            (1, policy("none", "hlt,pause,aperfmperf")),
        ];
        let (resolved, reasons) =
            explain(&policies, Exits::NONE, set("mwait,hlt,pause,aperfmperf"));
        assert_eq!(resolved.source, Some(3));
        assert_eq!(
            fates(&reasons),
            [
                Fate::Withheld,
                Fate::Given,
                Fate::Withheld,
                Fate::Unsupported,
                Fate::OnRequest,
            ],
        );
        assert_eq!(reasons[0].disabled_by, Some(3));
        assert_eq!(reasons[0].withheld_by, [1]);
        assert_eq!(reasons[1].disabled_by, Some(3));
        assert!(reasons[1].withheld_by.is_empty());
        // The nearest policy's `disable` counts, and no other.
        assert_eq!(reasons[2].disabled_by, None);
        assert_eq!(reasons[2].withheld_by, [2]);
        assert_eq!(reasons[3].disabled_by, Some(3));
        assert_eq!(reasons[3].withheld_by, [2, 1]);
    }

    #[test]
    fn the_floor_outdoes_a_narrow_allow() {
        let (_, reasons) = explain(&[(1, policy("none", "none"))], Exits::PAUSE, Exits::ALL);
        assert_eq!(reasons[2].fate, Fate::Floor);
        assert_eq!(reasons[1].fate, Fate::Withheld);
    }
}
