// SPDX-License-Identifier: GPL-2.0

//! What the kernel says while a test runs.

use std::{
    fs::{
        self,
        File,
        OpenOptions, //
    },
    io::{
        ErrorKind,
        Read,
        Seek,
        SeekFrom, //
    },
    os::unix::fs::OpenOptionsExt, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};

/// What no test may cause, in lower case.
const BAD: [&str; 24] = [
    "warning:",
    "bug:",
    "bug ",
    "oops",
    "info: possible",
    "info: task",
    "info: rcu",
    "info: trying to register non-static key",
    "rcu: info",
    "suspicious rcu usage",
    "call trace",
    "kasan",
    "ubsan",
    "refcount_t",
    "unable to handle",
    "general protection fault",
    "list_add corruption",
    "list_del corruption",
    "rust_kernel: panicked",
    "soft lockup",
    "deprecated workqueue",
    // A unit test of KUnit's has failed.
    "not ok ",
    // The module's own: it cannot do what it was sure to be able to (`rust/vendor/vmx.rs:write()`,
    // `rust/live.rs:check_hooks()`).
    " to vmcs field ",
    "ftrace has failed",
];

/// Notices that look bad and are not, by their text.
const HARMLESS: [&str; 4] = [
    // While it boots in QEMU on a busy machine, whose timer is late then.
    "..MP-BIOS bug: 8254 timer not connected to IO-APIC",
    // About the CPU that Bochs's `ryzen` is.
    "AMD Zen1 DIV0 bug detected. Disable SMT for full protection.",
    "AMD Zen1 FPDSS bug detected, enabling mitigation.",
    // About Bochs's Intel CPU, where there are two.
    "MDS CPU bug present and SMT on, data leak possible. See \
     https://www.kernel.org/doc/html/latest/admin-guide/hw-vuln/mds.html for more details.",
];

/// What announces a call trace that is no complaint: memory was missing, as the tests of that want.
const NO_MEMORY: &str = "vmalloc error: ";

/// Where that call trace ends.
const END_OF_TRACE: &str = " </TASK>";

/// How KCSAN begins a report of a data race, and what ends it.
const DATA_RACE: &str = "BUG: KCSAN: ";
const END_OF_DATA_RACE: &str = "=====";
/// Ours, in a call trace.
const MODULE: &str = "[kvm_exitpolicy]";
/// Of the kernel's own functions those that we call, and that race with others of its own: over
/// `flags` of a task (`kernel/capability.c:ns_capable()` sets PF_SUPERPRIV), and over `data` of a
/// work that is queued while it begins (`kernel/workqueue.c:process_one_work()`).
const RACY: [&str; 2] = [" capable+", " queue_delayed_work_on+"];

/// The kernel's log from some moment on.
pub struct KernelLog(File);

impl KernelLog {
    /// From now on.
    pub fn from_now() -> Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .context("cannot read the kernel's log")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// All that is still there.
    pub fn from_boot() -> Result<Self> {
        let mut log = Self::from_now()?;
        log.0.seek(SeekFrom::Start(0))?;
        Ok(log)
    }

    /// What was said since, one line a message.
    pub fn lines(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    // "priority,sequence,time,flags;message", then lines of key=value.
                    let message = text.split_once(';').map_or("", |(_, rest)| rest);
                    lines.push(message.lines().next().unwrap_or("").to_string());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(lines),
                // Records were overwritten before they were read. What they said is unknown.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {
                    lines.push("BUG: the kernel's log overran".to_string());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Fails if the kernel has lockdep and has switched it off, as it does for good with its first report,
/// and with some of others (`kernel/locking/lockdep_proc.c`). Nothing that a test does then is looked at.
pub fn ensure_lockdep_looks() -> Result<()> {
    let stats = match fs::read_to_string("/proc/lockdep_stats") {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        stats => stats?,
    };
    let on = stats
        .lines()
        .find_map(|line| line.trim().strip_prefix("debug_locks:"))
        .context("lockdep does not say whether it is on")?;
    ensure!(on.trim() == "1", "lockdep is off");
    Ok(())
}

/// Whether a report of KCSAN's is about what the module does. The kernel has data races of its own,
/// also in KVM. An access is the module's if it or a function that it has called makes it, or if
/// nobody knows who makes it: Rust code is not watched.
fn is_our_race(report: &[String]) -> bool {
    if report.iter().any(|line| line.contains("unknown origin")) {
        return true;
    }
    let is_access = |line: &String| {
        line.split_once(" to 0x")
            .is_some_and(|(kind, rest)| !kind.starts_with(' ') && rest.contains(" by "))
    };
    let starts = (0..report.len()).filter(|&at| is_access(&report[at]));
    starts.map(|at| &report[at + 1..]).any(|trace| {
        let racy = |frame: &String| RACY.iter().any(|racy| frame.starts_with(racy));
        // With one of the C functions between that Rust needs for inline ones.
        let frames = trace
            .iter()
            .take(3)
            .take_while(|line| line.starts_with(' '));
        frames.clone().any(|frame| frame.contains(MODULE)) && !frames.clone().any(racy)
    })
}

/// Those lines that no test may cause.
pub fn bad_lines(lines: &[String]) -> Vec<&str> {
    let mut rest = lines;
    let mut bad = Vec::new();
    while let Some(at) = rest.iter().position(|line| line.starts_with(DATA_RACE)) {
        let report = &rest[at..];
        let ends = |line: &String| line.starts_with(END_OF_DATA_RACE);
        let end = report.iter().position(ends);
        let (report, after) = report.split_at(end.unwrap_or(report.len()));
        bad.extend(bad_lines_but_races(&rest[..at]));
        // Nobody knows what one says that is cut off.
        if end.is_none() || is_our_race(report) {
            bad.push(&report[0]);
        }
        // Whatever else is said meanwhile is among its lines. Functions are named, each behind a
        // space.
        let others = report[1..].iter().filter(|line| !line.starts_with(' '));
        bad.extend(others.filter(|line| is_bad(line)).map(String::as_str));
        rest = after;
    }
    bad.extend(bad_lines_but_races(rest));
    bad
}

fn bad_lines_but_races(lines: &[String]) -> Vec<&str> {
    let mut no_memory = false;
    let bad = |line: &&str| {
        no_memory |= line.contains(NO_MEMORY);
        no_memory &= *line != END_OF_TRACE;
        // Functions are named, each behind a space.
        if no_memory && (*line == "Call Trace:" || line.starts_with(' ')) {
            return false;
        }
        is_bad(line)
    };
    lines.iter().map(String::as_str).filter(bad).collect()
}

fn is_bad(line: &str) -> bool {
    let lower = line.to_lowercase();
    // Where a word begins, as "debug:" is no "bug:".
    let has = |pattern: &&str| {
        let mut found = lower.match_indices(*pattern);
        found.any(|(at, _)| !lower[..at].ends_with(char::is_alphanumeric))
    };
    BAD.iter().any(has) && !HARMLESS.contains(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_lines_are_found() {
        let lines = [
            "WARNING: CPU: 0 PID: 1 at kernel/trace/fprobe.c:1 f+0x0/0x0",
            "kvm: MONITOR instruction emulated as NOP!",
            "BUG: kernel NULL pointer dereference, address: 0000000000000008",
            "debug: something",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
            "    not ok 2 update_makes_nothing",
            "..MP-BIOS bug: 8254 timer not connected to IO-APIC",
        ]
        .map(String::from);
        let bad = bad_lines(&lines);
        assert_eq!(bad, [&lines[0], &lines[2], &lines[4], &lines[5]]);
    }

    #[test]
    fn data_races_of_the_module_are_found() {
        let lines = |text: &str| text.lines().map(String::from).collect::<Vec<_>>();
        let report = |first: &str, second: &str| {
            lines(&format!(
                "==========\nBUG: KCSAN: data-race in a / b\n\n\
                 write to 0xff1100013ba31140 of 8 bytes by task 82 on cpu 1:\n{first}\n\
                 x64_sys_call+0x1/0x2\n\n\
                 read to 0xff1100013ba31140 of 8 bytes by task 10 on cpu 0:\n{second}\n\
                 Reported by Kernel Concurrency Sanitizer on:\n==========\nWARNING: 1"
            ))
        };
        let count = |first: &str, second: &str| bad_lines(&report(first, second)).len();
        let (stock, ours) = (" kvm_f+0x1/0x2 [kvm]", " f+0x1/0x2 [kvm_exitpolicy]");
        // What comes after it is seen in any case.
        assert_eq!(count(stock, stock), 1);
        assert_eq!(count(ours, stock), 2);
        assert_eq!(count(stock, ours), 2);
        let called = " memcpy+0x1/0x2\n rust_helper_f+0x1/0x2\n f+0x1/0x2 [kvm_exitpolicy]";
        assert_eq!(count(stock, called), 2);
        for racy in [" capable", " queue_delayed_work_on"] {
            let called = format!("{racy}+0x1/0x2\n f+0x1/0x2 [kvm_exitpolicy]");
            assert_eq!(count(&called, stock), 1);
        }
        // What others say meanwhile.
        assert_eq!(count(" kvm_f+0x1/0x2\nOops: 0", stock), 2);
        let cut_off = lines("BUG: KCSAN: data-race in a / b\n\nread to 0xff of 8 bytes");
        assert_eq!(bad_lines(&cut_off).len(), 1);
        let far = " f+0x1/0x2\n g+0x1/0x2\n h+0x1/0x2\n f+0x1/0x2 [kvm_exitpolicy]";
        assert_eq!(count(far, stock), 1);
        let unknown = lines(
            "BUG: KCSAN: data-race in a\n\nrace at unknown origin, with read to 0xff of 8 bytes by task 1 on cpu 0:\n==========",
        );
        assert_eq!(bad_lines(&unknown).len(), 1);
    }

    #[test]
    fn missing_memory_is_no_complaint() {
        let lines = [
            "vmtest: vmalloc error: size 1152, align 0x1, vm_struct allocation failed",
            "Call Trace:",
            " ? kasan_save_track+0x4f/0x70",
            " </TASK>",
            " ? kasan_save_track+0x4f/0x70",
            "Call Trace:",
        ]
        .map(String::from);
        assert_eq!(bad_lines(&lines), [&lines[4], &lines[5]]);
    }
}
