// SPDX-License-Identifier: GPL-2.0

//! Policies: what a cgroup says, what its descendants inherit, and what a VM gets.

use super::Exits;

/// What the administrator said for one cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Given to every VM in the cgroup, asked for or not.
    pub disable: Exits,
    /// The most that any VM in the cgroup may get.
    pub allow: Exits,
}

impl Policy {
    /// A policy that changes nothing by itself. It still ends the inheritance of `disable`.
    pub const NEUTRAL: Self = Self {
        disable: Exits::NONE,
        allow: Exits::ALL,
    };

    /// Replaces those sets that are given.
    #[must_use]
    pub fn with(self, disable: Option<Exits>, allow: Option<Exits>) -> Self {
        Self {
            disable: disable.unwrap_or(self.disable),
            allow: allow.unwrap_or(self.allow),
        }
    }
}

/// What a VM in some cgroup is subject to, once the policies of its ancestors are taken together.
///
/// `disable` comes from the nearest ancestor-or-self that has a policy. `allow` is the
/// intersection over all ancestors-or-self that have one, so that a subtree can narrow what it was
/// allowed and never widen it.
///
/// # Examples
///
/// A tenant who allows itself everything is held by what is allowed above it:
///
/// ```
/// use exitpolicy_policy::{Exits, Policy, Resolved};
///
/// let tenant = Policy { disable: Exits::ALL, allow: Exits::ALL };
/// let slice = Policy { disable: Exits::NONE, allow: Exits::HLT };
/// let resolved = Resolved::from_nearest_to_root([("tenant", tenant), ("slice", slice)]);
/// assert_eq!(resolved.source, Some("tenant"));
///
/// let (floor, requested, supported) = (Exits::PAUSE, Exits::MWAIT, Exits::ALL);
/// let decision = resolved.decide(floor, requested, supported);
/// assert_eq!(decision.effective, Exits::PAUSE | Exits::HLT);
/// assert_eq!(decision.clamped, Exits::MWAIT);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved<Source = u64> {
    /// Given to every VM, asked for or not.
    pub disable: Exits,
    /// The most that any VM may get.
    pub allow: Exits,
    /// The cgroup whose `disable` this is, if there is any policy.
    pub source: Option<Source>,
}

impl<Source> Resolved<Source> {
    /// What holds where no ancestor has a policy: KVM and the VMM decide alone.
    pub const UNRESTRICTED: Self = Self {
        disable: Exits::NONE,
        allow: Exits::ALL,
        source: None,
    };

    /// Takes the policies from a cgroup up to the root, nearest first, each with its cgroup.
    pub fn from_nearest_to_root(policies: impl IntoIterator<Item = (Source, Policy)>) -> Self {
        policies
            .into_iter()
            .fold(Self::UNRESTRICTED, |below, (cgroup, policy)| Self {
                allow: below.allow & policy.allow,
                disable: if below.source.is_some() {
                    below.disable
                } else {
                    policy.disable
                },
                source: below.source.or(Some(cgroup)),
            })
    }

    /// The same with another `disable`, if there is one.
    #[must_use]
    pub fn overridden(self, disable: Option<Exits>) -> Self {
        Self {
            disable: disable.unwrap_or(self.disable),
            ..self
        }
    }

    /// Decides what a VM gets.
    ///
    /// `floor` is what KVM disabled by itself, `requested` what the VMM asked for, `supported` what
    /// KVM can disable on this host. The result never lacks an exit of `floor`: KVM would then
    /// intercept every single PAUSE on a CPU that has no pause-loop exiting.
    pub fn decide(&self, floor: Exits, requested: Exits, supported: Exits) -> Decision {
        let wanted = requested | (self.disable & supported);
        Decision {
            effective: floor | (wanted & self.allow),
            clamped: requested & !self.allow & !floor,
        }
    }
}

/// What a VM gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The exits that are disabled, `floor` included.
    pub effective: Exits,
    /// What the VMM asked for and `allow` took away.
    pub clamped: Exits,
}
