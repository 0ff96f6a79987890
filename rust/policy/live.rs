// SPDX-License-Identifier: GPL-2.0

//! Changing a VM that runs: what the VM's flags may say while its vCPUs differ, and what the
//! controls of a vCPU may say while the flags are as they are.
//!
//! KVM has one set of flags for a VM, `kvm->arch.disabled_exits`, and controls for each vCPU. It
//! derives the controls from the flags when it makes a vCPU, and looks at the flags again in many
//! places later. `Documentation/live.md` lists them; these two rules follow.

use super::Exits;

/// Exits whose flag *leads*: it is set before the first control opens, and cleared after the last
/// one has closed.
///
/// KVM repairs what a native HLT leaves behind, and keeps timers out of reach of C-states, only
/// while the flag says that a guest may halt; without need, this does no harm.
pub const LEADING: Exits = Exits::HLT.union(Exits::MWAIT);

/// Exits whose flag *follows*: it is cleared before the first control closes, and set, if at all,
/// after the last one has opened.
///
/// While such a flag is set, KVM opens the control again whenever it looks, or warns of an exit
/// that should not be; while it is clear, KVM leaves an open control alone.
pub const FOLLOWING: Exits = Exits::PAUSE.union(Exits::CSTATE).union(Exits::APERFMPERF);

/// What cannot be changed in a VM that runs, or must not be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Exits that stay as they are, either way.
    pub fixed: Exits,
    /// Exits that must not be disabled.
    pub forbidden: Exits,
}

impl Limits {
    /// No limit.
    pub const NONE: Self = Self {
        fixed: Exits::NONE,
        forbidden: Exits::NONE,
    };

    /// A guest with encrypted registers (SEV-ES): an exit is the guest's to report, by #VC, and it
    /// has been told which ones there are. HLT alone is KVM's to choose: what exits is the
    /// instruction itself.
    pub const ENCRYPTED: Self = Self {
        fixed: FOLLOWING.union(Exits::MWAIT),
        forbidden: Exits::NONE,
    };

    /// Nobody but KVM knows where the controls are.
    pub const HIDDEN: Self = Self {
        fixed: Exits::ALL,
        forbidden: Exits::NONE,
    };

    /// The guest's spinlocks halt, and wait for a kick that does not end a native HLT.
    pub const KICKED: Self = Self {
        fixed: Exits::NONE,
        forbidden: Exits::HLT,
    };

    /// What is in either.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            fixed: self.fixed | other.fixed,
            forbidden: self.forbidden | other.forbidden,
        }
    }

    /// What a vCPU can be given of what it should have.
    pub fn target(self, wanted: Exits, in_force: Exits) -> Exits {
        (wanted & !self.forbidden & !self.fixed) | (in_force & self.fixed)
    }
}

/// A vCPU that is being changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// What its controls shall let through.
    pub target: Exits,
    /// What they do let through.
    pub in_force: Exits,
}

/// What the controls of a vCPU may let through now: its target, as far as the flags permit.
pub fn permitted(target: Exits, flags: Exits) -> Exits {
    (target & (flags | FOLLOWING)) | (flags & FOLLOWING)
}

/// What a VM's flags have to be now.
///
/// - `now`: what they are.
/// - `keep`: what was set when the guest's CPUID was made, and its VMM asked for. Its flags stay, so
///   that the VMM can repeat that CPUID.
/// - `home`: what the VM has by itself: the floor, and what its VMM asked for.
/// - `vcpus`: all of them, and at least one.
///
/// # Examples
///
/// `hlt` is given to one vCPU of two: its flag leads, and only then may the control open.
///
/// ```
/// use exitpolicy_policy::{live::{flags, permitted, Change}, Exits};
///
/// let stays = Change { target: Exits::NONE, in_force: Exits::NONE };
/// let changes = Change { target: Exits::HLT, in_force: Exits::NONE };
/// assert_eq!(permitted(changes.target, Exits::NONE), Exits::NONE);
/// let next = flags(Exits::NONE, Exits::NONE, Exits::NONE, [stays, changes]);
/// assert_eq!(next, Exits::HLT);
/// assert_eq!(permitted(changes.target, next), Exits::HLT);
/// ```
pub fn flags(
    now: Exits,
    keep: Exits,
    home: Exits,
    vcpus: impl IntoIterator<Item = Change>,
) -> Exits {
    let (some, every_target, every_in_force) = vcpus.into_iter().fold(
        (keep, Exits::ALL, Exits::ALL),
        |(some, target, in_force), vcpu| {
            (
                some | vcpu.target | vcpu.in_force,
                target & vcpu.target,
                in_force & vcpu.in_force,
            )
        },
    );
    let leading = some & LEADING;
    // Beyond what is set already, only what the VM has by itself: to set a flag that the module
    // would have to clear again is of no use.
    let following = (now | (home & every_in_force)) & every_target & FOLLOWING;
    leading | following
}

/// An instruction that SVM intercepts: KVM's INTERCEPT_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intercept {
    Hlt,
    /// HLT with no virtual interrupt pending.
    IdleHlt,
    Monitor,
    Mwait,
    Pause,
}

/// What the VMCB of a vCPU that lets `open` through intercepts, and what not.
///
/// With IDLE_HLT in the CPU, KVM sets that intercept and never the one for every HLT (svm.c:
/// init_vmcb()).
pub fn intercepts(open: Exits, has_idle_hlt: bool) -> [(Intercept, bool); 4] {
    let hlt = if has_idle_hlt {
        Intercept::IdleHlt
    } else {
        Intercept::Hlt
    };
    [
        (hlt, !open.contains(Exits::HLT)),
        (Intercept::Monitor, !open.contains(Exits::MWAIT)),
        (Intercept::Mwait, !open.contains(Exits::MWAIT)),
        (Intercept::Pause, !open.contains(Exits::PAUSE)),
    ]
}
