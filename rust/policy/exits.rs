// SPDX-License-Identifier: GPL-2.0

//! Sets of exits.

use core::{
    fmt,
    ops::{
        BitAnd,
        BitOr,
        Not, //
    },
    str::FromStr, //
};

/// A set of the exits that KVM can stop intercepting.
///
/// The bits are `KVM_X86_DISABLE_EXITS_*` of `include/uapi/linux/kvm.h`.
///
/// # Invariants
///
/// No bit outside [`Exits::ALL`] is set.
///
/// # Examples
///
/// ```
/// use exitpolicy_policy::Exits;
///
/// let set: Exits = "hlt, mwait".parse()?;
/// assert_eq!(set, Exits::MWAIT | Exits::HLT);
/// assert_eq!(set.to_string(), "mwait,hlt");
/// assert_eq!((!set & Exits::HLT).to_string(), "none");
/// assert_eq!(Exits::from_bits(1 << 5), None);
/// # Ok::<(), exitpolicy_policy::ParseExitsError>(())
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Exits(u64);

impl Exits {
    /// No exit.
    pub const NONE: Self = Self(0);
    /// MWAIT and MONITOR.
    pub const MWAIT: Self = Self(1 << 0);
    /// HLT.
    pub const HLT: Self = Self(1 << 1);
    /// PAUSE, and with it pause-loop exiting and the pause filter.
    pub const PAUSE: Self = Self(1 << 2);
    /// Reads of MSR_CORE_C1_RES and MSR_CORE_C3/C6/C7_RESIDENCY.
    pub const CSTATE: Self = Self(1 << 3);
    /// Reads of IA32_APERF and IA32_MPERF.
    pub const APERFMPERF: Self = Self(1 << 4);
    /// Every exit there is.
    pub const ALL: Self = Self((1 << 5) - 1);

    /// The exits and their names, in the order of their bits.
    pub const NAMES: [(Self, &'static str); 5] = [
        (Self::MWAIT, "mwait"),
        (Self::HLT, "hlt"),
        (Self::PAUSE, "pause"),
        (Self::CSTATE, "cstate"),
        (Self::APERFMPERF, "aperfmperf"),
    ];

    /// Takes KVM's bits, or nothing if one of them is unknown.
    pub const fn from_bits(bits: u64) -> Option<Self> {
        if bits & !Self::ALL.0 == 0 {
            // INVARIANT: Just checked.
            Some(Self(bits))
        } else {
            None
        }
    }

    /// Takes KVM's bits and leaves out those that are unknown.
    pub const fn from_bits_truncate(bits: u64) -> Self {
        // INVARIANT: Masked.
        Self(bits & Self::ALL.0)
    }

    /// KVM's bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// What is in either. `|`, for constants.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether every exit of `other` is in `self`.
    pub const fn contains(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// The members, each as a set of one.
    pub fn iter(self) -> impl Iterator<Item = Self> {
        Self::NAMES
            .into_iter()
            .map(|(exit, _)| exit)
            .filter(move |exit| self.contains(*exit))
    }
}

impl BitOr for Exits {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Exits {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Not for Exits {
    type Output = Self;

    fn not(self) -> Self {
        // INVARIANT: Masked.
        Self(!self.0 & Self::ALL.0)
    }
}

/// The form that [`Exits::from_str`] accepts: `hlt,mwait`, `all` or `none`.
impl fmt::Display for Exits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        if *self == Self::ALL {
            return f.write_str("all");
        }
        let mut separator = "";
        for (exit, name) in Self::NAMES {
            if self.contains(exit) {
                f.write_str(separator)?;
                f.write_str(name)?;
                separator = ",";
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Exits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text is no set of exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseExitsError {
    /// Nothing was given. The empty set has a name, so that it is never set by accident.
    Empty,
    /// One of the words is no exit, or `all` or `none` stands beside other words.
    Unknown,
}

impl fmt::Display for ParseExitsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "no exit given; to name the empty set, write 'none'",
            Self::Unknown => {
                "not a set of exits; write 'all', 'none', or some of \
                 mwait, hlt, pause, cstate, aperfmperf with commas between"
            }
        })
    }
}

impl core::error::Error for ParseExitsError {}

/// Reads `all`, `none`, or names with commas between. Space around the whole and around each name
/// is ignored, naming an exit twice is the same as naming it once.
impl FromStr for Exits {
    type Err = ParseExitsError;

    fn from_str(text: &str) -> Result<Self, ParseExitsError> {
        match text.trim() {
            "" => Err(ParseExitsError::Empty),
            "all" => Ok(Self::ALL),
            "none" => Ok(Self::NONE),
            names => names.split(',').try_fold(Self::NONE, |set, word| {
                Self::NAMES
                    .into_iter()
                    .find(|(_, name)| *name == word.trim())
                    .map(|(exit, _)| set | exit)
                    .ok_or(ParseExitsError::Unknown)
            }),
        }
    }
}
