// SPDX-License-Identifier: GPL-2.0

//! Counting a vCPU's exits by reason.
//!
//! A histogram on the `kvm_exit` tracepoint, in a tracefs instance of our own: the kernel counts,
//! and unlike events in a ring buffer nothing gets lost.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    path::{
        Path,
        PathBuf, //
    }, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};

use crate::payload::Payload;

/// Where tracefs is.
pub const TRACEFS: &str = "/sys/kernel/tracing";

/// Exits by the vendor's own number of the reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<u64, u64>);

/// Whose numbers exit reasons are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    Svm,
    Vmx,
}

impl Vendor {
    /// The one of this host.
    pub fn of_host() -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let has = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
        if has("svm") {
            Ok(Self::Svm)
        } else {
            ensure!(has("vmx"), "this CPU has neither VMX nor SVM");
            Ok(Self::Vmx)
        }
    }

    /// As the module calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Svm => "svm",
            Self::Vmx => "vmx",
        }
    }

    /// KVM's module for it, as in /proc/modules.
    pub fn module(self) -> &'static str {
        match self {
            Self::Svm => "kvm_amd",
            Self::Vmx => "kvm_intel",
        }
    }

    /// The exits that a payload provokes: one group of reasons for each instruction in it.
    ///
    /// From arch/x86/include/uapi/asm/vmx.h and svm.h. On SVM, HLT exits as IDLE_HLT where the CPU
    /// has it.
    fn reasons(self, payload: Payload) -> &'static [&'static [u64]] {
        match (self, payload) {
            (_, Payload::Nothing) => &[],
            (Self::Vmx, Payload::Hlt) => &[&[12]],
            (Self::Vmx, Payload::Cstate | Payload::Aperfmperf) => &[&[31]],
            (Self::Vmx, Payload::Mwait) => &[&[36], &[39]],
            (Self::Vmx, Payload::Pause) => &[&[40]],
            (Self::Svm, Payload::Hlt) => &[&[0x78, 0xa6]],
            (Self::Svm, Payload::Cstate | Payload::Aperfmperf) => &[&[0x7c]],
            (Self::Svm, Payload::Mwait) => &[&[0x8b, 0x8c], &[0x8a]],
            (Self::Svm, Payload::Pause) => &[&[0x77]],
        }
    }
}

impl Counts {
    /// The exits of `payload`'s kind, one number for each instruction in it.
    pub fn of(&self, vendor: Vendor, payload: Payload) -> Vec<u64> {
        let count = |reason| self.0.get(reason).copied().unwrap_or(0);
        vendor
            .reasons(payload)
            .iter()
            .map(|group| group.iter().map(count).sum())
            .collect()
    }

    fn parse(histogram: &str) -> Result<Self> {
        let mut counts = BTreeMap::new();
        for line in histogram.lines().filter(|line| line.starts_with('{')) {
            // { exit_reason:        120 } hitcount:       1000
            let mut words = line
                .split(|c: char| c.is_whitespace() || c == ':')
                .filter(|w| !w.is_empty());
            let mut after = |name: &str| -> Result<u64> {
                words
                    .find(|word| *word == name)
                    .and_then(|_| words.next())
                    .and_then(|word| word.parse().ok())
                    .with_context(|| format!("no {name} in '{line}'"))
            };
            counts.insert(after("exit_reason")?, after("hitcount")?);
        }
        let dropped = histogram
            .lines()
            .find_map(|line| line.trim().strip_prefix("Dropped:"));
        ensure!(
            dropped.is_some_and(|count| count.trim() == "0"),
            "the histogram dropped events:\n{histogram}"
        );
        Ok(Self(counts))
    }
}

/// Counts the exits of one thread.
pub struct Counter {
    instance: PathBuf,
    trigger: String,
}

impl Counter {
    const HISTOGRAM: &str = "hist:keys=exit_reason:size=256";
    /// No reason on VMX, whose numbers end before.
    const SVM_EXIT_MSR: u64 = 0x7c;

    /// Begins to count. Writes of MSRs are left out: arming a timer is one, and SVM tells them from
    /// reads by EXITINFO1 only.
    pub fn start(tid: i32) -> Result<Self> {
        let instance = Path::new(TRACEFS).join("instances/exitpolicy-test");
        match fs::create_dir(&instance) {
            // Left over from a test that failed half-way.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => fs::remove_dir(&instance)
                .and_then(|()| fs::create_dir(&instance))
                .context("cannot remake the tracefs instance")?,
            other => other.context("cannot make a tracefs instance")?,
        }
        let counter = Self {
            instance,
            trigger: format!(
                "{} if common_pid=={tid} && (exit_reason!={:#x} || info1==0)",
                Self::HISTOGRAM,
                Self::SVM_EXIT_MSR
            ),
        };
        fs::write(counter.event("trigger"), &counter.trigger)
            .context("cannot count kvm_exit; is kvm loaded?")?;
        Ok(counter)
    }

    /// What was counted.
    pub fn finish(self) -> Result<Counts> {
        Counts::parse(&fs::read_to_string(self.event("hist"))?)
    }

    fn event(&self, file: &str) -> PathBuf {
        self.instance.join("events/kvm/kvm_exit").join(file)
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        // The trigger pins kvm.ko. What cannot be removed fails the next counter.
        let _ = fs::write(self.event("trigger"), format!("!{}", self.trigger));
        let _ = fs::remove_dir(&self.instance);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram() {
        let text = "# event histogram\n#\n# trigger info: hist:keys=exit_reason\n#\n\n\
                    { exit_reason:        123 } hitcount:          1\n\
                    { exit_reason:        120 } hitcount:       1000\n\n\
                    Totals:\n    Hits: 1001\n    Entries: 2\n    Dropped: 0\n";
        let counts = Counts::parse(text).expect("a histogram");
        assert_eq!(counts.of(Vendor::Svm, Payload::Hlt), [1000]);
        assert_eq!(counts.of(Vendor::Svm, Payload::Mwait), [0, 0]);
    }

    #[test]
    fn dropped_events_are_an_error() {
        assert!(Counts::parse("Totals:\n    Hits: 1\n    Dropped: 1\n").is_err());
        assert!(Counts::parse("").is_err());
    }
}
