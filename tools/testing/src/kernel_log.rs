// SPDX-License-Identifier: GPL-2.0

//! What the kernel says while a test runs.

use std::{
    fs::{
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
    Context,
    Result, //
};

/// What no test may cause, in lower case.
const BAD: [&str; 21] = [
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
    // A unit test of KUnit's has failed.
    "not ok ",
];

/// Notices that look bad and are not, by their text.
const HARMLESS: [&str; 2] = [
    // About the CPU that Bochs's `ryzen` is.
    "AMD Zen1 DIV0 bug detected. Disable SMT for full protection.",
    "AMD Zen1 FPDSS bug detected, enabling mitigation.",
];

/// What announces a call trace that is no complaint: memory was missing, as the tests of that want.
const NO_MEMORY: &str = "vmalloc error: ";

/// Where that call trace ends.
const END_OF_TRACE: &str = " </TASK>";

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

/// Those lines that no test may cause.
pub fn bad_lines(lines: &[String]) -> Vec<&str> {
    let mut no_memory = false;
    let bad = |line: &&str| {
        no_memory |= line.contains(NO_MEMORY);
        no_memory &= *line != END_OF_TRACE;
        // Functions are named, each behind a space.
        if no_memory && (*line == "Call Trace:" || line.starts_with(' ')) {
            return false;
        }
        let lower = line.to_lowercase();
        // Where a word begins, as "debug:" is no "bug:".
        let has = |pattern: &&str| {
            let mut found = lower.match_indices(*pattern);
            found.any(|(at, _)| !lower[..at].ends_with(char::is_alphanumeric))
        };
        BAD.iter().any(has) && !HARMLESS.contains(line)
    };
    lines.iter().map(String::as_str).filter(bad).collect()
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
        ]
        .map(String::from);
        let bad = bad_lines(&lines);
        assert_eq!(bad, [&lines[0], &lines[2], &lines[4], &lines[5]]);
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
