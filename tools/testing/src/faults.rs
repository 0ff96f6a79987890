// SPDX-License-Identifier: GPL-2.0

//! Allocations that fail on purpose, on kernels that were built for it.
//!
//! Documentation/fault-injection/fault-injection.rst of the kernel: a task's `fail-nth` makes its
//! nth allocation from now on fail, and only those count that have certain code on the stack.

use std::{
    fs,
    path::{
        Path,
        PathBuf, //
    }, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};

const FAILSLAB: &str = "/sys/kernel/debug/failslab";
const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

/// Whether this kernel can do it.
pub fn are_possible() -> bool {
    Path::new(FAILSLAB).exists()
}

/// Whose allocations fail, for as long as the value lives.
pub struct Faults {
    saved: Vec<(PathBuf, String)>,
}

/// What came of an operation.
pub struct Outcome<T> {
    pub result: T,
    /// An allocation failed in it.
    pub failed: bool,
}

impl Faults {
    /// Those with code of a module on the stack.
    pub fn of_module(name: &str) -> Result<Self> {
        let symbols = fs::read_to_string("/proc/kallsyms")?;
        let owner = format!("[{name}]");
        let code = symbols.lines().filter_map(|line| {
            // "address type name [module]"
            let mut words = line.split_whitespace();
            let (address, kind) = (words.next()?, words.next()?);
            let is_code = matches!(kind, "t" | "T") && words.nth(1) == Some(owner.as_str());
            is_code
                .then(|| u64::from_str_radix(address, 16).ok())
                .flatten()
        });
        let code: Vec<u64> = code.collect();
        let first = code.iter().min().context("the module has no code")?;
        let last = code.iter().max().context("the module has no code")?;
        // The last function is no longer than that.
        Self::with_range(*first, last + 0x1000)
    }

    /// Those with code of any module on the stack, one that is just being loaded included.
    pub fn of_any_module() -> Result<Self> {
        let symbols = fs::read_to_string("/proc/kallsyms")?;
        let end = symbols.lines().find(|line| line.ends_with(" _end"));
        let end = end.and_then(|line| line.split(' ').next());
        let end = u64::from_str_radix(end.context("no _end in /proc/kallsyms")?, 16)?;
        ensure!(end != 0, "/proc/kallsyms hides addresses");
        Self::with_range(end, u64::MAX - 1)
    }

    fn with_range(start: u64, end: u64) -> Result<Self> {
        let mut faults = Self { saved: Vec::new() };
        for (file, value) in [
            ("require-start", format!("{start:#x}")),
            ("require-end", format!("{end:#x}")),
            ("stacktrace-depth", "32".to_string()),
            ("ignore-gfp-wait", "N".to_string()),
            ("verbose", "0".to_string()),
            ("times", "-1".to_string()),
        ] {
            let path = Path::new(FAILSLAB).join(file);
            let before = fs::read_to_string(&path)?;
            fs::write(&path, &value).with_context(|| format!("{file} = {value}"))?;
            faults.saved.push((path, before));
        }
        Ok(faults)
    }

    /// Does something of which the nth allocation, from 1 on, fails.
    pub fn nth<T>(&self, nth: u32, operation: impl FnOnce() -> T) -> Result<Outcome<T>> {
        const FILE: &str = "/proc/thread-self/fail-nth";
        fs::write(FILE, nth.to_string())?;
        let result = operation();
        let left = fs::read_to_string(FILE);
        fs::write(FILE, "0")?;
        Ok(Outcome {
            result,
            failed: left?.trim() == "0",
        })
    }

    /// Does something again and again, and another allocation fails each time, until none is left.
    /// `check` gets each outcome. Returns how many failed.
    pub fn each<T>(
        &self,
        mut operation: impl FnMut() -> T,
        mut check: impl FnMut(Outcome<T>) -> Result<()>,
    ) -> Result<u32> {
        for nth in 1..10_000 {
            let outcome = self.nth(nth, &mut operation)?;
            let failed = outcome.failed;
            check(outcome).with_context(|| format!("allocation {nth}"))?;
            if !failed {
                return Ok(nth - 1);
            }
        }
        bail!("there is no end of allocations");
    }

    /// Makes the nth allocation of each of the kernel's workers fail, or none with 0.
    pub fn arm_workers(&self, nth: u32) -> Result<()> {
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let comm = fs::read_to_string(path.join("comm"));
            // They come and go.
            if comm.is_ok_and(|comm| comm.starts_with("kworker/")) {
                let _ = fs::write(path.join("fail-nth"), nth.to_string());
            }
        }
        Ok(())
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        let _ = self.arm_workers(0);
        for (path, before) in &self.saved {
            let _ = fs::write(path, before.trim());
        }
    }
}

/// Memory that nobody refers to any more.
pub struct Leaks(());

impl Leaks {
    /// From now on.
    pub fn from_now() -> Result<Self> {
        // What there is already is not looked at again.
        fs::write(KMEMLEAK, "scan")?;
        fs::write(KMEMLEAK, "clear")?;
        Ok(Self(()))
    }

    /// Fails if something was allocated since, by this module's code, and lost.
    pub fn ensure_none(self, module: &str) -> Result<()> {
        // An object is told of when it was seen lost in two scans.
        for _ in 0..2 {
            fs::write(KMEMLEAK, "scan")?;
        }
        let text = fs::read_to_string(KMEMLEAK)?;
        let owner = format!("[{module}]");
        let ours = text
            .split("unreferenced object")
            .filter(|object| object.contains(&owner));
        let ours: Vec<&str> = ours.collect();
        ensure!(ours.is_empty(), "memory was lost: {}", ours.join("\n"));
        Ok(())
    }
}
