// SPDX-License-Identifier: GPL-2.0

//! Allocations that fail on purpose, on kernels that were built for it.
//!
//! Documentation/fault-injection/fault-injection.rst of the kernel: a task's `fail-nth` makes its
//! nth allocation from now on fail, and only those count that have certain code on the stack.

use std::{
    fs,
    ops::Range,
    path::{
        Path,
        PathBuf, //
    },
    thread,
    time::Duration, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};

const FAILSLAB: &str = "/sys/kernel/debug/failslab";
const FAIL_PAGE_ALLOC: &str = "/sys/kernel/debug/fail_page_alloc";
const FAIL_FUNCTION: &str = "/sys/kernel/debug/fail_function";
const SLABS: &str = "/sys/kernel/slab";
/// Where kmemleak tells, in kernels that have it.
pub const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

/// Whether this kernel can do it.
pub fn are_possible() -> bool {
    Path::new(FAILSLAB).exists()
}

/// Memory of those who watch the others, kmemleak and debugobjects: they make do without it.
const OF_WATCHERS: [&str; 3] = [
    "debug_objects_cache",
    "kmemleak_object",
    "kmemleak_scan_area",
];

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

/// The kernel's workers, each of which has an allocation to fail.
pub struct Workers {
    nth: u32,
    armed: Vec<PathBuf>,
}

/// How far workers got.
#[derive(PartialEq, Eq)]
pub enum Progress {
    /// An allocation failed.
    Failed,
    /// There were allocations, and fewer than that.
    Fewer,
    /// They had none.
    Idle,
}

impl Faults {
    /// Those with code of a module on the stack.
    pub fn of_module(name: &str) -> Result<Self> {
        Self::with_code(code_of(name)?, 0..0)
    }

    /// The same, without those of the files that each VM has in debugfs.
    pub fn of_module_but_vm_files(name: &str) -> Result<Self> {
        Self::with_code(code_of(name)?, vm_files()?)
    }

    /// Those with code of a module on the stack that is yet to be loaded, or of any other one.
    ///
    /// Without those of the files that each VM has in debugfs: one is like the other, and they are
    /// as many as all the rest.
    pub fn of_module_to_come() -> Result<Self> {
        Self::with_code(code_of_modules()?, vm_files()?)
    }

    /// Those with some code on the stack, and no other code.
    fn with_code(required: Range<u64>, rejected: Range<u64>) -> Result<Self> {
        let mut faults = Self { saved: Vec::new() };
        faults.set_code(FAILSLAB, required, rejected)?;
        for (file, value) in [("ignore-gfp-wait", "N"), ("cache-filter", "Y")] {
            faults.set(Path::new(FAILSLAB).join(file), value)?;
        }
        for cache in fs::read_dir(SLABS)? {
            let cache = cache?;
            if !OF_WATCHERS.iter().any(|name| cache.file_name() == *name) {
                faults.set(cache.path().join("failslab"), "1")?;
            }
        }
        // fail-nth counts whole pages, too, whoever allocates them.
        faults.set(Path::new(FAIL_PAGE_ALLOC).join("require-end"), "0")?;
        Ok(faults)
    }

    /// Those pages with code of a module on the stack that is yet to be loaded, or of any other one,
    /// but for those of the files in debugfs.
    fn of_pages() -> Result<Self> {
        let mut faults = Self { saved: Vec::new() };
        faults.set_code(FAIL_FUNCTION, code_of_modules()?, vm_files()?)?;
        // fail-nth counts these, too.
        for other in [FAILSLAB, FAIL_PAGE_ALLOC] {
            faults.set(Path::new(other).join("require-end"), "0")?;
        }
        Ok(faults)
    }

    /// Lets only that count which has some code on the stack, and no other code.
    fn set_code(&mut self, what: &str, required: Range<u64>, rejected: Range<u64>) -> Result<()> {
        for (file, value) in [
            ("require-start", format!("{:#x}", required.start)),
            ("require-end", format!("{:#x}", required.end)),
            ("reject-start", format!("{:#x}", rejected.start)),
            ("reject-end", format!("{:#x}", rejected.end)),
            ("stacktrace-depth", "32".to_string()),
            ("verbose", "0".to_string()),
            ("times", "-1".to_string()),
        ] {
            self.set(Path::new(what).join(file), &value)?;
        }
        Ok(())
    }

    fn set(&mut self, path: PathBuf, value: &str) -> Result<()> {
        let what = || format!("{} = {value}", path.display());
        let before = fs::read_to_string(&path).with_context(what)?;
        fs::write(&path, value).with_context(what)?;
        self.saved.push((path, before));
        Ok(())
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
        check: impl FnMut(Outcome<T>) -> Result<()>,
    ) -> Result<u32> {
        each_nth(|nth| self.nth(nth, &mut operation), check)
    }

    /// Makes the nth allocation of each of the kernel's workers fail.
    pub fn arm_workers(&self, nth: u32) -> Result<Workers> {
        let mut workers = Workers {
            nth,
            armed: Vec::new(),
        };
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let comm = fs::read_to_string(path.join("comm"));
            let file = path.join("fail-nth");
            // They come and go.
            if comm.is_ok_and(|comm| comm.starts_with("kworker/"))
                && fs::write(&file, nth.to_string()).is_ok()
            {
                workers.armed.push(file);
            }
        }
        Ok(workers)
    }
}

/// As [`Faults::each`], for whole pages, with code of a module on the stack that is yet to be loaded.
///
/// Failslab knows slabs only, and the page allocator's own faults spare pages that it may wait for.
/// So the function that asks for these faults fails, by the kernel's fail_function, which is there
/// while something is done only: it is a probe.
pub fn each_page<T>(
    mut operation: impl FnMut() -> T,
    check: impl FnMut(Outcome<T>) -> Result<()>,
) -> Result<u32> {
    const FUNCTION: &str = "should_fail_alloc_page";
    let faults = Faults::of_pages()?;
    let inject = Path::new(FAIL_FUNCTION).join("inject");
    let once = |nth| -> Result<Outcome<T>> {
        fs::write(&inject, FUNCTION).context("fail_function does not take it")?;
        let outcome = faults.nth(nth, &mut operation);
        fs::write(&inject, format!("!{FUNCTION}"))?;
        outcome
    };
    each_nth(once, check)
}

fn each_nth<T>(
    mut operation: impl FnMut(u32) -> Result<Outcome<T>>,
    mut check: impl FnMut(Outcome<T>) -> Result<()>,
) -> Result<u32> {
    for nth in 1..10_000 {
        let outcome = operation(nth)?;
        let failed = outcome.failed;
        check(outcome).with_context(|| format!("allocation {nth}"))?;
        if !failed {
            return Ok(nth - 1);
        }
    }
    bail!("there is no end of allocations");
}

impl Drop for Faults {
    fn drop(&mut self) {
        for (path, before) in self.saved.iter().rev() {
            let _ = fs::write(path, before.trim());
        }
    }
}

impl Workers {
    /// How far the one got that got farthest.
    pub fn progress(&self) -> Progress {
        let left = |file| fs::read_to_string(file).ok()?.trim().parse().ok();
        match self.armed.iter().filter_map(left).min() {
            Some(0) => Progress::Failed,
            Some(left) if left < self.nth => Progress::Fewer,
            _ => Progress::Idle,
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for file in &self.armed {
            let _ = fs::write(file, "0");
        }
    }
}

/// Where a module's code is.
fn code_of(module: &str) -> Result<Range<u64>> {
    let functions = functions(module)?;
    let first = functions.first().context("the module has no code")?.0;
    let last = functions.last().context("the module has no code")?.0;
    // The last function is no longer than that.
    Ok(first..last + 0x1000)
}

/// Where the code of all modules is.
fn code_of_modules() -> Result<Range<u64>> {
    let symbols = fs::read_to_string("/proc/kallsyms")?;
    let end = symbols.lines().find(|line| line.ends_with(" _end"));
    let end = end.and_then(|line| line.split(' ').next());
    let end = u64::from_str_radix(end.context("no _end in /proc/kallsyms")?, 16)?;
    ensure!(end != 0, "/proc/kallsyms hides addresses");
    Ok(end..u64::MAX - 1)
}

/// Where KVM makes the files that each VM has in debugfs.
fn vm_files() -> Result<Range<u64>> {
    let kvm = functions("kvm")?;
    let at = kvm.iter().position(|it| it.1 == "kvm_create_vm_debugfs");
    let at = at.context("KVM has no kvm_create_vm_debugfs")?;
    let next = kvm.get(at + 1).context("no function behind it")?;
    Ok(kvm[at].0..next.0)
}

/// Where the functions of a module begin, and their names, in ascending order.
fn functions(module: &str) -> Result<Vec<(u64, String)>> {
    let owner = format!("[{module}]");
    let mut functions = Vec::new();
    for line in fs::read_to_string("/proc/kallsyms")?.lines() {
        // "address type name [module]"
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [address, "t" | "T", name, of] = words[..] {
            if of == owner {
                functions.push((u64::from_str_radix(address, 16)?, name.to_string()));
            }
        }
    }
    functions.sort_unstable();
    Ok(functions)
}

/// Memory that nobody refers to any more.
pub struct Leaks(());

impl Leaks {
    /// From now on. Fails if there is some already that this module's code has allocated.
    pub fn from_now(module: &str) -> Result<Self> {
        ensure_no_leaks(module).context("before the test")?;
        // What there is of others is not looked at again.
        fs::write(KMEMLEAK, "clear")?;
        Ok(Self(()))
    }

    /// Fails if something was allocated since, by this module's code or while a module was
    /// initialised, and lost.
    pub fn ensure_none(self, module: &str) -> Result<()> {
        ensure_none_lost(|object| {
            is_of_module(object, module) || object.contains("do_one_initcall")
        })
    }
}

/// Whether this kernel finds memory that was lost.
pub fn leaks_are_found() -> bool {
    Path::new(KMEMLEAK).exists()
}

/// Fails if memory was lost that this module's code has allocated, or code of a module that is gone.
pub fn ensure_no_leaks(module: &str) -> Result<()> {
    ensure_none_lost(|object| is_of_module(object, module))
}

fn ensure_none_lost(is_ours: impl Fn(&str) -> bool) -> Result<()> {
    // An object is told of when it was seen lost in two scans, and is five seconds old
    // (mm/kmemleak.c: MSECS_MIN_AGE).
    thread::sleep(Duration::from_millis(5_500));
    for _ in 0..2 {
        fs::write(KMEMLEAK, "scan")?;
    }
    let text = fs::read_to_string(KMEMLEAK)?;
    let objects = text.split("unreferenced object").skip(1);
    let ours: Vec<&str> = objects.filter(|object| is_ours(object)).collect();
    ensure!(ours.is_empty(), "memory was lost: {}", ours.join("\n"));
    Ok(())
}

/// Whether a function of this module's is in the call trace of an object; those of a module that
/// is not loaded any more have addresses in place of names.
fn is_of_module(object: &str, module: &str) -> bool {
    let owner = format!("[{module}]");
    // Behind the address and the size of the object itself.
    let trace = object.split("backtrace").nth(1).unwrap_or("");
    let is_nameless = |word: &str| word.starts_with("0xffffffff");
    trace.contains(&owner) || trace.split_whitespace().any(is_nameless)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_memory_it_is() {
        let object = |frame: &str| {
            format!(
                " 0xffffffffa0001000 (size 64):\n  comm \"insmod\", pid 9, jiffies 4294894131\n  \
                 hex dump (first 4 bytes):\n    00 00 00 00  ....\n  backtrace (crc 7b44bdcb):\n    \
                 __kmalloc_noprof+0x2c0/0x3e0\n    {frame}\n    do_syscall_64+0x5c/0xf0\n"
            )
        };
        let is_ours = |frame| is_of_module(&object(frame), "ours");
        assert!(is_ours("f+0x1/0x2 [ours]"));
        assert!(is_ours("0xffffffffa0123456"));
        assert!(!is_ours("f+0x1/0x2 [theirs]"));
        assert!(!is_ours("f+0x1/0x2"));
    }
}
