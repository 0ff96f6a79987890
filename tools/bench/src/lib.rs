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
    /// Version and build id of kvm_exitpolicy.
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
