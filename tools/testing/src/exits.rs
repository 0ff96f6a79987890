// SPDX-License-Identifier: GPL-2.0

//! Counting a vCPU's exits by reason.
//!
//! A histogram on the `kvm_exit` tracepoint, in a tracefs instance of our own: the kernel counts,
//! and unlike events in a ring buffer nothing gets lost.

use std::{
    collections::BTreeMap,
    fs::{
        self,
        OpenOptions, //
    },
    io::{
        ErrorKind,
        Write, //
    },
    path::{
        Path,
        PathBuf, //
    },
    sync::atomic::{
        AtomicUsize,
        Ordering, //
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

/// The functions that ftrace hooks just now, each with what it does there.
pub fn hooked_functions() -> Result<Vec<String>> {
    let text = fs::read_to_string(Path::new(TRACEFS).join("enabled_functions"))?;
    Ok(text.lines().map(str::to_string).collect())
}

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

    /// What a reason is called there, for people: those that a guest of ours brings about.
    fn reason_name(self, reason: u64) -> String {
        let name = match (self, reason) {
            (Self::Vmx, 0) => "exception or NMI",
            (Self::Vmx, 1) | (Self::Svm, 0x60) => "interrupt",
            (Self::Vmx, 7) | (Self::Svm, 0x64) => "IRQ window",
            (Self::Vmx, 10) | (Self::Svm, 0x72) => "CPUID",
            (Self::Vmx, 12) | (Self::Svm, 0x78 | 0xa6) => "HLT",
            (Self::Vmx, 28) => "control register",
            (Self::Vmx, 30) | (Self::Svm, 0x7b) => "I/O",
            (Self::Vmx, 31) => "RDMSR",
            (Self::Vmx, 32) => "WRMSR",
            // EXITINFO1 says which; with the counter for all of them nobody looks.
            (Self::Svm, 0x7c) => "MSR",
            (Self::Vmx, 36) | (Self::Svm, 0x8b | 0x8c) => "MWAIT",
            (Self::Vmx, 39) | (Self::Svm, 0x8a) => "MONITOR",
            (Self::Vmx, 40) | (Self::Svm, 0x77) => "PAUSE",
            (Self::Vmx, 18) => "VMCALL",
            (Self::Svm, 0x81) => "VMMCALL",
            (Self::Vmx, 48) | (Self::Svm, 0x400) => "page fault",
            (Self::Vmx, 52) => "preemption timer",
            (Self::Svm, 0x61) => "exception or NMI",
            _ => return format!("{reason:#x}"),
        };
        name.to_string()
    }

    /// The exits that a payload provokes: one group of reasons for each instruction in it.
    ///
    /// From arch/x86/include/uapi/asm/vmx.h and svm.h. On SVM, HLT exits as IDLE_HLT where the CPU
    /// has it.
    fn reasons(self, payload: Payload) -> &'static [&'static [u64]] {
        match (self, payload) {
            (_, Payload::Nothing | Payload::Timer | Payload::Ipi | Payload::Wakeups) => &[],
            (_, Payload::L2Hlt | Payload::L2HltIntercepted | Payload::L2Aperf | Payload::Svme) => {
                &[]
            }
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

    /// All of them by names, as KVM's own tools have them, or by number.
    pub fn by_name(&self, vendor: Vendor) -> BTreeMap<String, u64> {
        let mut named = BTreeMap::new();
        for (reason, count) in &self.0 {
            *named.entry(vendor.reason_name(*reason)).or_insert(0) += count;
        }
        named
    }

    /// Those that there are in `later` and not yet here.
    pub fn until(&self, later: &Self) -> Self {
        let more = later.0.iter().map(|(reason, count)| {
            let before = self.0.get(reason).copied().unwrap_or(0);
            (*reason, count - before)
        });
        Self(more.filter(|(_, count)| *count > 0).collect())
    }

    /// Those of several together.
    pub fn sum(all: &[Self]) -> Self {
        let mut sum = BTreeMap::new();
        for (reason, count) in all.iter().flat_map(|counts| &counts.0) {
            *sum.entry(*reason).or_insert(0) += count;
        }
        Self(sum)
    }

    /// Exits for the host's own interrupts.
    pub fn of_host(&self, vendor: Vendor) -> u64 {
        // From the same headers: INTR, NMI and SMI on SVM; exceptions or NMIs, and external
        // interrupts on VMX.
        let reasons: &[u64] = match vendor {
            Vendor::Svm => &[0x60, 0x61, 0x62],
            Vendor::Vmx => &[0, 1],
        };
        let count = |reason| self.0.get(reason).copied().unwrap_or(0);
        reasons.iter().map(count).sum()
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

/// How many histograms there are. The next one's place is known by that, so that what a test left
/// behind is found.
static DEPTH: AtomicUsize = AtomicUsize::new(0);

/// Counts events by the values of some of their fields.
pub struct Histogram {
    instance: PathBuf,
    event: String,
    keys: Vec<&'static str>,
    trigger: String,
}

impl Histogram {
    /// Begins to count events, as "system/event", of which `filter` is true.
    pub fn start(event: &str, keys: &[&'static str], filter: &str) -> Result<Self> {
        let depth = DEPTH.fetch_add(1, Ordering::Relaxed);
        let name = format!("instances/exitpolicy-test-{depth}");
        let instance = Path::new(TRACEFS).join(name);
        match fs::create_dir(&instance) {
            // Left over from a test that failed half-way.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => fs::remove_dir(&instance)
                .and_then(|()| fs::create_dir(&instance))
                .context("cannot remake the tracefs instance")?,
            other => other.context("cannot make a tracefs instance")?,
        }
        let histogram = Self {
            instance,
            event: event.to_string(),
            keys: keys.to_vec(),
            trigger: format!("hist:keys={}:size=256 if {filter}", keys.join(",")),
        };
        fs::write(histogram.file("trigger"), &histogram.trigger)
            .with_context(|| format!("cannot count {event}; is kvm loaded?"))?;
        Ok(histogram)
    }

    /// What was counted so far, by the values of the keys.
    pub fn read(&self) -> Result<BTreeMap<Vec<u64>, u64>> {
        parse(&self.keys, &fs::read_to_string(self.file("hist"))?)
    }

    fn file(&self, file: &str) -> PathBuf {
        self.instance.join("events").join(&self.event).join(file)
    }
}

impl Drop for Histogram {
    fn drop(&mut self) {
        // The trigger pins kvm.ko. What cannot be removed fails the next one.
        let _ = fs::write(self.file("trigger"), format!("!{}", self.trigger));
        let _ = fs::remove_dir(&self.instance);
        DEPTH.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What is counted exactly from one moment to another, by events in a ring buffer with marks.
pub struct Window {
    instance: PathBuf,
}

impl Window {
    /// Begins to record the exits of some threads.
    pub fn of(tids: &[i32]) -> Result<Self> {
        let instance = Path::new(TRACEFS).join("instances/exitpolicy-window");
        fs::create_dir(&instance).context("cannot make a tracefs instance")?;
        let window = Self { instance };
        let event = window.instance.join("events/kvm/kvm_exit");
        let mine: Vec<String> = tids
            .iter()
            .map(|tid| format!("common_pid=={tid}"))
            .collect();
        fs::write(event.join("filter"), mine.join("||")).context("which threads' exits")?;
        fs::write(event.join("enable"), "1").context("is kvm loaded?")?;
        Ok(window)
    }

    /// Exits while `body` runs, by the reason as the trace has it.
    pub fn exits<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<BTreeMap<String, u64>> {
        let trace = self.instance.join("trace");
        fs::write(&trace, "").context("cannot clear the trace")?;
        let mut marker = OpenOptions::new()
            .append(true)
            .open(self.instance.join("trace_marker"))?;
        marker.write_all(b"begin")?;
        let result = body();
        marker.write_all(b"end")?;
        result?;
        let text = fs::read_to_string(&trace)?;
        ensure!(
            !text.contains("LOST"),
            "events were lost in the trace:\n{text}"
        );
        let mark = |mark: &str| {
            let mut lines = text.lines();
            let mark = format!("tracing_mark_write: {mark}");
            lines
                .position(|line| line.trim_end().ends_with(&mark))
                .with_context(|| format!("no {mark} in the trace"))
        };
        let (begin, end) = (mark("begin")?, mark("end")?);
        let mut exits = BTreeMap::new();
        for line in text.lines().take(end).skip(begin) {
            if let Some(reason) = reason_of(line)? {
                *exits.entry(reason.to_string()).or_insert(0) += 1;
            }
        }
        Ok(exits)
    }
}

/// The reason in a line of the trace, if that is an exit.
fn reason_of(line: &str) -> Result<Option<&str>> {
    let Some((_, exit)) = line.split_once(" kvm_exit: ") else {
        return Ok(None);
    };
    let mut words = exit.split_whitespace();
    let reason = words
        .find(|word| *word == "reason")
        .and_then(|_| words.next());
    Ok(Some(
        reason.with_context(|| format!("no reason in '{line}'"))?,
    ))
}

impl Drop for Window {
    fn drop(&mut self) {
        // What cannot be removed fails the next one.
        let _ = fs::write(self.instance.join("events/kvm/kvm_exit/enable"), "0");
        let _ = fs::remove_dir(&self.instance);
    }
}

/// Counts calls of a function of the kernel's, by thread.
pub struct Calls {
    // Dropped before its event goes.
    histogram: Option<Histogram>,
    name: String,
}

impl Calls {
    /// Begins to count those by some threads.
    pub fn of(function: &str, tids: &[i32]) -> Result<Self> {
        let name = format!("exitpolicy_test_{function}");
        add_kprobe(&format!("p:kprobes/{name} {function}"))?;
        let mut calls = Self {
            histogram: None,
            name,
        };
        let mine: Vec<String> = tids
            .iter()
            .map(|tid| format!("common_pid=={tid}"))
            .collect();
        let event = format!("kprobes/{}", calls.name);
        calls.histogram = Some(Histogram::start(&event, &["common_pid"], &mine.join("||"))?);
        Ok(calls)
    }

    /// Calls by one thread so far.
    pub fn by(&self, tid: i32) -> Result<u64> {
        let all = self.histogram.as_ref().context("no histogram")?.read()?;
        Ok(all.get(&vec![tid as u64]).copied().unwrap_or(0))
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.histogram = None;
        // One that stays is what the next one fails for.
        let _ = add_kprobe(&format!("-:kprobes/{}", self.name));
    }
}

/// Adds or removes an event.
fn add_kprobe(definition: &str) -> Result<()> {
    let path = Path::new(TRACEFS).join("kprobe_events");
    let mut file = OpenOptions::new().append(true).open(path)?;
    file.write_all(definition.as_bytes())
        .with_context(|| format!("tracefs does not take '{definition}'"))
}

fn parse(keys: &[&str], histogram: &str) -> Result<BTreeMap<Vec<u64>, u64>> {
    let mut counts = BTreeMap::new();
    for line in histogram.lines().filter(|line| line.starts_with('{')) {
        // { common_pid:        77, exit_reason:        120 } hitcount:       1000
        let mut words = line
            .split(|c: char| c.is_whitespace() || c == ':' || c == ',')
            .filter(|w| !w.is_empty());
        let mut after = |name: &str| -> Result<u64> {
            words
                .find(|word| *word == name)
                .and_then(|_| words.next())
                .and_then(|word| word.parse().ok())
                .with_context(|| format!("no {name} in '{line}'"))
        };
        let values = keys.iter().map(|key| after(key)).collect::<Result<_>>()?;
        counts.insert(values, after("hitcount")?);
    }
    let dropped = histogram
        .lines()
        .find_map(|line| line.trim().strip_prefix("Dropped:"));
    ensure!(
        dropped.is_some_and(|count| count.trim() == "0"),
        "the histogram dropped events:\n{histogram}"
    );
    Ok(counts)
}

/// Counts the exits of threads.
pub struct Counter {
    histogram: Histogram,
    tids: Vec<i32>,
}

impl Counter {
    const KEYS: [&str; 2] = ["common_pid", "exit_reason"];
    /// No reason on VMX, whose numbers end before.
    const SVM_EXIT_MSR: u64 = 0x7c;

    /// Begins to count those of one thread.
    pub fn start(tid: i32) -> Result<Self> {
        Self::of(&[tid])
    }

    /// Begins to count. Writes of MSRs are left out: arming a timer is one, and SVM tells them from
    /// reads by EXITINFO1 only.
    pub fn of(tids: &[i32]) -> Result<Self> {
        let mine: Vec<String> = tids
            .iter()
            .map(|tid| format!("common_pid=={tid}"))
            .collect();
        let filter = format!(
            "({}) && (exit_reason!={:#x} || info1==0)",
            mine.join("||"),
            Self::SVM_EXIT_MSR
        );
        Ok(Self {
            histogram: Histogram::start("kvm/kvm_exit", &Self::KEYS, &filter)?,
            tids: tids.to_vec(),
        })
    }

    /// Begins to count all of them.
    pub fn of_all(tids: &[i32]) -> Result<Self> {
        let mine: Vec<String> = tids
            .iter()
            .map(|tid| format!("common_pid=={tid}"))
            .collect();
        Ok(Self {
            histogram: Histogram::start("kvm/kvm_exit", &Self::KEYS, &mine.join("||"))?,
            tids: tids.to_vec(),
        })
    }

    /// What was counted so far, one for each thread.
    pub fn read(&self) -> Result<Vec<Counts>> {
        let all = self.histogram.read()?;
        let of = |tid: &i32| {
            let mine = all.iter().filter(|(keys, _)| keys[0] == *tid as u64);
            Counts(mine.map(|(keys, count)| (keys[1], *count)).collect())
        };
        Ok(self.tids.iter().map(of).collect())
    }

    /// What was counted of the one thread, or the first.
    pub fn finish(self) -> Result<Counts> {
        Ok(self.read()?.swap_remove(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram() {
        let text = "# event histogram\n#\n# trigger info: hist:keys=common_pid,exit_reason\n#\n\n\
                    { common_pid:         77, exit_reason:        123 } hitcount:          1\n\
                    { common_pid:         78, exit_reason:        120 } hitcount:       1000\n\n\
                    Totals:\n    Hits: 1001\n    Entries: 2\n    Dropped: 0\n";
        let counts = parse(&Counter::KEYS, text).expect("a histogram");
        let expected = [(vec![77, 123], 1), (vec![78, 120], 1000)];
        assert!(counts.into_iter().eq(expected));
    }

    #[test]
    fn exits_of_a_window() {
        let before = Counts(BTreeMap::from([(0x78, 5), (0x60, 2)]));
        let after = Counts(BTreeMap::from([(0x78, 9), (0x60, 2), (0x8a, 1)]));
        let window = before.until(&after);
        assert_eq!(window.of(Vendor::Svm, Payload::Hlt), [4]);
        assert_eq!(window.of(Vendor::Svm, Payload::Mwait), [0, 1]);
        assert_eq!((window.total(), window.of_host(Vendor::Svm)), (5, 0));
    }

    #[test]
    fn reasons_in_a_trace() {
        let exit = " vcpu-7 [001] d.... 5.0: kvm_exit: vcpu 0 reason EXTERNAL_INTERRUPT rip 0x10 info1 0x0";
        let entry = " vcpu-7 [001] d.... 5.1: kvm_entry: vcpu 0, rip 0x10";
        assert_eq!(reason_of(exit).expect("one"), Some("EXTERNAL_INTERRUPT"));
        assert_eq!(reason_of(entry).expect("none"), None);
        assert!(reason_of(" kvm_exit: vcpu 0").is_err());
    }

    #[test]
    fn dropped_events_are_an_error() {
        assert!(parse(&[], "Totals:\n    Hits: 1\n    Dropped: 1\n").is_err());
        assert!(parse(&[], "").is_err());
    }
}
