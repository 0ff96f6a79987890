// SPDX-License-Identifier: GPL-2.0

//! What a bench measured, as it is written and read.

use std::{
    collections::BTreeMap,
    fmt, //
};

use anyhow::{
    ensure,
    Result, //
};
use serde::{
    Deserialize,
    Serialize, //
};

/// Counts up when a key of [`Document`] changes its meaning or goes away.
pub const SCHEMA: u32 = 1;

/// The group "idle", and what its report and its tests must know of it.
pub mod idle {
    pub const GROUP: &str = "idle";
    pub const CPUID: &str = "CPUID";
    pub const SELF_IPI: &str = "IPI to itself";
    pub const BOTH_HALT: &str = "IPI round trip, both halt";
    pub const BOTH_RUN: &str = "IPI round trip, both run";
    /// The case without the module.
    pub const ABSENT: &str = "module absent";

    /// By how many instructions a figure may differ from what it is without the module: not at
    /// all. Where two vCPUs halt on one CPU the host's scheduler is part of it, which is the same
    /// but for a few.
    pub fn slack(name: &str, absent: i64) -> i64 {
        if name == BOTH_HALT {
            absent / 1000
        } else {
            0
        }
    }
}

/// The group "gain", and what its report must know of it.
pub mod gain {
    pub const GROUP: &str = "gain";
    /// The cases: with exits, and without.
    pub const TRAPPED: &str = "trapped";
    pub const PASSED: &str = "passed through";
}

/// The group "change", and what its report must know of it.
pub mod change {
    pub const GROUP: &str = "change";
    /// Where the vCPUs are when they are changed.
    pub const RUNNING: &str = "hlt given to vCPUs that run";
    pub const NATIVE: &str = "hlt taken from vCPUs that halt natively";
    pub const BLOCKED: &str = "hlt given to vCPUs that are blocked";

    /// What the exits meanwhile are called.
    pub fn exits(state: &str) -> String {
        format!("{state}: exits")
    }
}

/// The group "guest", and what its report must know of it.
pub mod guest {
    pub const GROUP: &str = "guest";
    /// The cases.
    pub const TRAPPED: &str = "trapped";
    pub const NO_PV: &str = "trapped, no pvspinlock";
    pub const HLT: &str = "hlt passed through";
    pub const ALL: &str = "all passed through";
    /// The work in which many wait for locks.
    pub const LOCKS: &str = "waiting for locks, 4 vCPUs on 1 CPU";
    /// What goes where `hlt` is passed through, as a reason.
    pub const REASON_HLT: &str = "HLT";
    /// Hypercalls of who releases a lock for which somebody has halted.
    pub const KICKS: &str = "kicks";
    /// For fewer of them than that, as a median, nobody has waited for locks.
    pub const ENOUGH_KICKS: i64 = 16;

    /// What those of a work's exits that have one reason are called.
    pub fn by_reason(work: &str, reason: &str) -> String {
        format!("{work}: {reason}")
    }
}

/// The group "decision", and what its report and its tests must know of it.
pub mod decision {
    pub const GROUP: &str = "decision";
    /// From before KVM_CREATE_VM until the first KVM_RUN has returned, what the VMM's thread
    /// executes: it also waits for RCU there, which takes until the next tick or the one after.
    pub const WHOLE: &str = "KVM_CREATE_VM to first KVM_RUN, in the thread";
    /// The ioctls among these that call a hooked function, the decision in the first of them; and
    /// what the module adds to each.
    pub const HOOKED: [[&str; 2]; 3] = [
        ["first KVM_CREATE_VCPU", "added to KVM_CREATE_VCPU"],
        ["KVM_SET_CPUID2", "added to KVM_SET_CPUID2"],
        ["first KVM_RUN", "added to KVM_RUN"],
    ];
    /// What workers of the kernel execute from before a VM is made until it is gone.
    pub const WORKERS: &str = "a VM made and ended, in workers";
    /// What a decision does for each level of cgroups, and nothing else of it, as a call of its own.
    pub const RESOLVE: &str = "EXITPOLICY_RESOLVE_POLICY";
    /// The case without the module.
    pub const ABSENT: &str = "module absent";
    /// What the numbers in the other cases count.
    pub const POLICIES: &str = "policies";
    pub const DEPTH: &str = "depth";
}

/// What a TSC counts, or what else was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Executed by an emulator whose TSC counts them. No time.
    Instructions,
    /// Of the same emulator's TSC where the host has several CPUs: they execute in turns, and a
    /// CPU that waits is counted as one that works, so that one instruction is up to two ticks.
    Ticks,
    /// Of a real TSC.
    Cycles,
    /// VM exits.
    Exits,
    /// Of memory.
    Kib,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Instructions => "instructions",
            Self::Ticks => "ticks",
            Self::Cycles => "cycles",
            Self::Exits => "exits",
            Self::Kib => "KiB",
        })
    }
}

/// One thing, measured again and again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// "gain", "idle", ...
    pub group: String,
    /// What was measured.
    pub name: String,
    /// Under which circumstances: what pictures and readers compare.
    pub case: String,
    /// The number in `case`, if there is one: what the picture has on its axis.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<u64>,
    pub unit: Unit,
    pub repeats: usize,
    pub min: i64,
    /// A quarter of the values is less.
    pub low: i64,
    pub median: i64,
    /// A quarter of the values is more.
    pub high: i64,
    pub max: i64,
    /// VM exits for each operation, all of them, as KVM counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exits: Option<f64>,
    /// VM exits for each operation by reason, where they were counted: in a run of its own, as
    /// to count them costs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub reasons: BTreeMap<String, f64>,
    /// Those of `reasons` that the figure is about: by the instruction itself, or by who changes
    /// the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own: Option<f64>,
}

impl Figure {
    /// What came of it again and again. Without values there is no figure.
    pub fn new(
        group: &str,
        name: &str,
        case: &str,
        unit: Unit,
        mut values: Vec<i64>,
    ) -> Result<Self> {
        ensure!(
            !values.is_empty(),
            "{group}: {name}, {case}: nothing was measured"
        );
        values.sort_unstable();
        let last = values.len() - 1;
        let quarter = |quarters: usize| values[last * quarters / 4];
        Ok(Self {
            group: group.to_string(),
            name: name.to_string(),
            case: case.to_string(),
            at: None,
            unit,
            repeats: values.len(),
            min: values[0],
            low: quarter(1),
            median: quarter(2),
            high: quarter(3),
            max: values[last],
            exits: None,
            reasons: BTreeMap::new(),
            own: None,
        })
    }

    /// With the number in its case.
    pub fn at(mut self, at: u64) -> Self {
        self.at = Some(at);
        self
    }

    /// With VM exits for each operation.
    pub fn exits(mut self, exits: f64) -> Self {
        self.exits = Some(exits);
        self
    }

    /// What tells figures apart.
    pub fn key(&self) -> Key<'_> {
        (&self.group, &self.name, &self.case)
    }
}

/// [`Figure::key`].
pub type Key<'a> = (&'a str, &'a str, &'a str);

/// What this machine has not, and could therefore not be measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Absent {
    pub group: String,
    pub name: String,
    pub reason: String,
}

impl Absent {
    pub fn new(group: &str, name: &str, reason: String) -> Self {
        Self {
            group: group.to_string(),
            name: name.to_string(),
            reason,
        }
    }
}

/// On what it was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Of the host, as uname has it.
    pub kernel: String,
    /// Of the emulator, with its version, or "none".
    pub emulator: String,
    /// Its model name.
    pub cpu: String,
    pub cpus: usize,
    pub vendor: String,
    /// TSC ticks in a ms, as KVM says.
    pub tsc_khz: u32,
    /// Build id of kvm_exitpolicy.
    pub module: String,
}

/// All that was measured on one host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Document {
    pub schema: u32,
    /// The lab's name for the host, or the machine's own.
    pub host: String,
    pub machine: Machine,
    /// The functions that the module hooks, as ftrace has them: all that there is of it while no VM
    /// is made and none is changed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hooked: Vec<String>,
    pub figures: Vec<Figure>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub absent: Vec<Absent>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarters() -> Result<()> {
        let figure = Figure::new("g", "n", "c", Unit::Cycles, vec![5, 1, 4, 2, 3])?;
        let spread = [
            figure.min,
            figure.low,
            figure.median,
            figure.high,
            figure.max,
        ];
        assert_eq!(spread, [1, 2, 3, 4, 5]);
        Ok(())
    }

    #[test]
    fn no_figure_without_values() {
        assert!(Figure::new("g", "n", "c", Unit::Cycles, vec![]).is_err());
    }
}
