// SPDX-License-Identifier: GPL-2.0

//! Changes of VMs that run: how they are asked for, and how far they have come.

use crate::uapi;
use exitpolicy_policy::Exits;
use std::{
    fmt,
    str::FromStr,
    time::Duration, //
};

/// How a change is applied to VMs that run. By default they get it, and it is waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Apply {
    /// They are left as they are.
    pub new_only: bool,
    /// Whether their vCPUs are waited for.
    pub wait: Wait,
}

impl Apply {
    /// The flags of the commands that take this.
    pub(crate) fn flags(self) -> u32 {
        let new_only = if self.new_only { uapi::NEW_ONLY } else { 0 };
        new_only | self.wait.flags()
    }
}

/// Whether vCPUs are waited for that are in the guest while something changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// They change a moment after the command has returned.
    No,
    /// The command returns once they have changed, and at the latest after this time.
    UpTo(Timeout),
}

impl Default for Wait {
    fn default() -> Self {
        Self::UpTo(Timeout::DEFAULT)
    }
}

impl Wait {
    pub(crate) fn flags(self) -> u32 {
        match self {
            Self::No => uapi::NO_WAIT,
            Self::UpTo(_) => 0,
        }
    }

    pub(crate) fn timeout_ms(self) -> u32 {
        match self {
            Self::No => 0,
            Self::UpTo(Timeout(milliseconds)) => milliseconds,
        }
    }
}

/// How long vCPUs are waited for: whole milliseconds, from one to [`Timeout::MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timeout(u32);

impl Timeout {
    /// What the module waits for if it is not told.
    pub const DEFAULT: Self = Self(1_000);

    /// The longest that the module takes.
    pub const MAX: Self = Self(60_000);

    /// Rounds up to a millisecond. Nothing if it is too long, or no time at all, which would mean
    /// the default to the module.
    pub fn new(duration: Duration) -> Option<Self> {
        let milliseconds = u32::try_from(duration.as_nanos().div_ceil(1_000_000)).ok()?;
        (1..=Self::MAX.0)
            .contains(&milliseconds)
            .then_some(Self(milliseconds))
    }

    /// The longest that is no longer than this, and [`Timeout::MAX`], but a millisecond at least.
    pub fn at_most(duration: Duration) -> Self {
        let milliseconds = u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
        Self(milliseconds.clamp(1, Self::MAX.0))
    }

    /// As the standard library has it.
    pub fn duration(self) -> Duration {
        Duration::from_millis(self.0.into())
    }
}

impl fmt::Display for Timeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.duration()).fmt(f)
    }
}

/// Why something is no [`Timeout`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found}; write a number and a unit, from '1ms' to '60s', as in '500ms' or '5s'")]
pub struct ParseTimeoutError {
    found: String,
}

impl FromStr for Timeout {
    type Err = ParseTimeoutError;

    fn from_str(text: &str) -> Result<Self, ParseTimeoutError> {
        let found = match humantime::parse_duration(text) {
            Ok(Duration::ZERO) => "no time at all".into(),
            Ok(duration) => match Self::new(duration) {
                Some(timeout) => return Ok(timeout),
                None => "too long".into(),
            },
            Err(error) => error.to_string(),
        };
        Err(ParseTimeoutError { found })
    }
}

/// How far a vCPU has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is as it should be, except for what is refused.
    InForce,
    /// It is not in the guest, and will change before it is.
    NextEntry,
    /// It is in the guest, and was asked to leave it.
    Pending,
    /// It is in a guest of its guest, and will change when that one exits.
    InL2,
}

impl State {
    /// What this version does not know is on its way, in whatever manner.
    pub(crate) fn from_number(number: u32) -> Self {
        match number {
            uapi::VCPU_IN_FORCE => Self::InForce,
            uapi::VCPU_NEXT_ENTRY => Self::NextEntry,
            uapi::VCPU_IN_L2 => Self::InL2,
            _ => Self::Pending,
        }
    }

    /// A name that stays the same, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::InForce => "in_force",
            Self::NextEntry => "at_next_entry",
            Self::Pending => "pending",
            Self::InL2 => "in_l2",
        }
    }

    /// Whether the vCPU may be executing guest code by what held before.
    pub fn is_behind(self) -> bool {
        matches!(self, Self::Pending | Self::InL2)
    }
}

/// As in sysfs.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::InForce => "in force",
            Self::NextEntry => "at next entry",
            Self::Pending => "pending",
            Self::InL2 => "pending: in L2",
        })
    }
}

/// Why a VM is not given what it should have, or keeps what it should not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// `hlt`, on Intel: the guest was told of KVM_FEATURE_PV_UNHALT, whose kick would not end a
    /// native HLT.
    PvUnhalt,
    /// All but `hlt`: the guest's state is encrypted.
    Protected,
    /// All: KVM runs on Hyper-V and does not use the CPU's own VMCS.
    HyperV,
    /// The module is newer than this.
    Unknown,
}

impl Refusal {
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            uapi::REFUSAL_NONE => return None,
            uapi::REFUSAL_PV_UNHALT => Self::PvUnhalt,
            uapi::REFUSAL_PROTECTED => Self::Protected,
            uapi::REFUSAL_HYPERV => Self::HyperV,
            _ => Self::Unknown,
        })
    }

    /// A name that stays the same, for programs; as in sysfs.
    pub fn name(self) -> &'static str {
        match self {
            Self::PvUnhalt => "pv_unhalt",
            Self::Protected => "protected",
            Self::HyperV => "hyperv",
            Self::Unknown => "unknown",
        }
    }
}

/// For people.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::PvUnhalt => "guest uses PV_UNHALT",
            Self::Protected => "guest state is encrypted",
            Self::HyperV => "KVM runs on Hyper-V",
            Self::Unknown => "for a reason that only a newer exitpolicy knows",
        })
    }
}

/// A vCPU: what it should have and what it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vcpu {
    /// The id of its VM.
    pub vm: u64,
    /// Its id, as in KVM_CREATE_VCPU.
    pub id: u32,
    /// Its override, which stands in for that of the VM and for the cgroup's `disable`.
    pub disable: Option<Exits>,
    /// What it should have.
    pub wanted: Exits,
    /// What it has.
    pub in_force: Exits,
    /// How far it has come.
    pub state: State,
    /// Where `in_force` may stay different from `wanted`.
    pub refused: Exits,
    /// Why.
    pub refusal: Option<Refusal>,
}

impl Vcpu {
    /// Where it differs from what it should have because that is refused.
    pub fn withheld(&self) -> Exits {
        differing(self.wanted, self.in_force) & self.refused
    }
}

/// How far it has come and what is refused.
impl fmt::Display for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let refusal = self.refusal.filter(|_| !self.withheld().is_empty());
        match (self.state, refusal) {
            (State::InForce, Some(refusal)) => write!(f, "refused: {refusal}"),
            (state, Some(refusal)) => write!(f, "{state}; refused: {refusal}"),
            (state, None) => state.fmt(f),
        }
    }
}

/// What is in one of the two sets.
pub(crate) fn differing(one: Exits, other: Exits) -> Exits {
    (one & !other) | (other & !one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_and_bounded() {
        for (text, milliseconds) in [
            ("1ms", 1),
            ("1us", 1),
            ("500ms", 500),
            ("1500us", 2),
            ("5s", 5_000),
            ("1s 500ms", 1_500),
            ("1m", 60_000),
            ("60000ms", 60_000),
        ] {
            assert_eq!(text.parse(), Ok(Timeout(milliseconds)), "{text}");
        }
        for (text, found) in [
            ("0s", "no time at all; "),
            ("0", "no time at all; "),
            ("60001ms", "too long; "),
            ("60s 1ns", "too long; "),
            ("1000years", "too long; "),
            ("5", "time unit needed"),
            ("-5s", "expected number"),
            ("", "value was empty"),
            ("soon", "expected number"),
        ] {
            let error = text.parse::<Timeout>().unwrap_err().to_string();
            assert!(error.starts_with(found), "{text}: {error}");
            assert!(error.contains("'500ms'"), "{text}: {error}");
        }
        assert_eq!(Timeout::at_most(Duration::ZERO), Timeout(1));
        assert_eq!(Timeout::at_most(Duration::MAX), Timeout::MAX);
        assert_eq!(Timeout(1_500).to_string(), "1s 500ms");
    }

    #[test]
    fn the_module_is_told_how_to_apply() {
        assert_eq!(Apply::default().flags(), 0);
        assert_eq!(Apply::default().wait.timeout_ms(), 1_000);
        let apply = Apply {
            new_only: true,
            wait: Wait::No,
        };
        assert_eq!(apply.flags(), uapi::NEW_ONLY | uapi::NO_WAIT);
        assert_eq!(apply.wait.timeout_ms(), 0);
    }

    #[test]
    fn a_vcpu_says_what_keeps_it() {
        let mut vcpu = Vcpu {
            vm: 1,
            id: 0,
            disable: None,
            wanted: Exits::HLT | Exits::PAUSE,
            in_force: Exits::HLT | Exits::PAUSE,
            state: State::InForce,
            refused: Exits::HLT,
            refusal: Some(Refusal::PvUnhalt),
        };
        // Refused, and yet not different.
        assert_eq!(vcpu.to_string(), "in force");
        vcpu.in_force = Exits::PAUSE;
        assert_eq!(vcpu.withheld(), Exits::HLT);
        assert_eq!(vcpu.to_string(), "refused: guest uses PV_UNHALT");
        vcpu.in_force = Exits::NONE;
        vcpu.state = State::InL2;
        assert_eq!(
            vcpu.to_string(),
            "pending: in L2; refused: guest uses PV_UNHALT"
        );
        vcpu.in_force = Exits::HLT;
        vcpu.state = State::NextEntry;
        assert_eq!(vcpu.to_string(), "at next entry");
    }
}
