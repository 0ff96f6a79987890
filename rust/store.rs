// SPDX-License-Identifier: GPL-2.0

//! The policies: cgroup id -> [`Policy`].

use crate::{
    kernel_ext::{
        cgroup::Cgroup,
        value_map::ValueMap, //
    },
    policy::{
        Exits,
        Policy,
        Resolved, //
    },
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};

/// The policies that administrators have set.
///
/// A policy fits into one word, so that readers take no lock: a VM that is being decided on while
/// a policy changes sees the old one or the new one. Resolving costs a look-up for each ancestor.
///
/// Cgroups are named by their ids, which are never used again: an entry pins no cgroup, and one
/// that is left behind by a removed cgroup applies to nothing.
#[pin_data]
pub(crate) struct Store {
    #[pin]
    policies: ValueMap,
    count: Atomic<u64>,
}

/// Where `allow` begins in a packed policy.
const ALLOW_SHIFT: u32 = 8;

fn pack(policy: Policy) -> usize {
    (policy.disable.bits() | policy.allow.bits() << ALLOW_SHIFT) as usize
}

fn unpack(value: usize) -> Policy {
    let bits = value as u64;
    Policy {
        disable: Exits::from_bits_truncate(bits),
        allow: Exits::from_bits_truncate(bits >> ALLOW_SHIFT),
    }
}

impl Store {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            policies <- ValueMap::new(),
            count: Atomic::new(0),
        })
    }

    /// The number of policies.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// The policy of this very cgroup. Any context.
    pub(crate) fn get(&self, cgroup: u64) -> Option<Policy> {
        self.policies.get(cgroup as usize).map(unpack)
    }

    /// Gives a cgroup a policy. The caller keeps others from adding or removing any meanwhile.
    pub(crate) fn add(&self, cgroup: u64, policy: Policy) -> Result {
        if self
            .policies
            .insert(cgroup as usize, pack(policy))?
            .is_none()
        {
            self.count.add(1, Relaxed);
        }
        Ok(())
    }

    /// Changes those sets of a policy that are given, at once, and returns the result, or nothing
    /// if the cgroup has no policy.
    pub(crate) fn change(
        &self,
        cgroup: u64,
        disable: Option<Exits>,
        allow: Option<Exits>,
    ) -> Option<Policy> {
        self.policies
            .update(cgroup as usize, |old| {
                pack(unpack(old).with(disable, allow))
            })
            .map(unpack)
    }

    /// Takes a cgroup's policy away, and returns whether it had one.
    pub(crate) fn remove(&self, cgroup: u64) -> bool {
        let removed = self.policies.remove(cgroup as usize).is_some();
        if removed {
            let _ = self.count.fetch_sub(1, Relaxed);
        }
        removed
    }

    /// The policy with the next higher cgroup id.
    pub(crate) fn next_after(&self, cgroup: u64) -> Option<(u64, Policy)> {
        self.policies
            .next_after(cgroup as usize)
            .map(|(id, value)| (id as u64, unpack(value)))
    }

    /// What a VM in `cgroup`, or in the domain of it, is subject to. Any context in which `cgroup`
    /// may be used.
    pub(crate) fn resolve(&self, cgroup: &Cgroup) -> Resolved {
        Resolved::from_nearest_to_root(
            cgroup
                .domain()
                .ancestors_and_self()
                .map(Cgroup::id)
                .filter_map(|id| self.get(id).map(|policy| (id, policy))),
        )
    }
}
