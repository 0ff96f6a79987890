// SPDX-License-Identifier: GPL-2.0

//! Tests of the module and the command, to be run as root in an emulated KVM host.
//!
//! Every test is also a test of the kernel's log, and leaves neither VM nor policy behind.

use std::{
    fs,
    path::Path,
    process::ExitCode,
    sync::Mutex, //
};

use anyhow::{
    anyhow,
    ensure,
    Context,
    Result, //
};
use libtest_mimic::{
    Arguments,
    Failed,
    Trial, //
};
use testing::{
    client::SERVE,
    exits::Vendor,
    faults::{
        ensure_no_leaks,
        leaks_are_found, //
    },
    interface,
    kernel_log::{
        bad_lines,
        ensure_lockdep_looks,
        KernelLog, //
    },
    modules::{
        self,
        EXITPOLICY, //
    },
    server,
    uapi::Device, //
};

mod bad_input;
mod bench;
mod cgroups;
mod child;
mod churn;
mod command;
mod faults;
mod fuzz;
mod guest;
mod guest_live;
mod isolation;
mod kunit;
mod lifecycle;
mod live;
mod matrix;
mod placement;
mod races;
mod soak;
mod stock;
mod tracing;
mod wrong_kernel;

/// A test, and whether this host can run it.
struct Test {
    name: String,
    body: Box<dyn Fn() -> Result<()> + Send>,
    /// It needs neither module nor command.
    stock: bool,
    ignored: bool,
}

impl Test {
    fn new(name: impl Into<String>, body: impl Fn() -> Result<()> + Send + 'static) -> Self {
        Self {
            name: name.into(),
            body: Box::new(body),
            stock: false,
            ignored: false,
        }
    }

    /// The host has not what it takes.
    fn ignored(mut self, ignored: bool) -> Self {
        self.ignored = ignored;
        self
    }

    /// The test is about KVM as it is, or loads the module itself.
    fn stock(mut self) -> Self {
        self.stock = true;
        self
    }

    fn into_trial(self) -> Trial {
        let Self {
            name, body, stock, ..
        } = self;
        let run = move || run(stock, &body).map_err(|error| Failed::from(format!("{error:?}")));
        Trial::test(name, run).with_ignored_flag(self.ignored)
    }
}

/// What the kernel says, from its boot on: each line is somebody's, whatever is run.
static LOG: Mutex<Option<KernelLog>> = Mutex::new(None);

/// Fails if the kernel has complained since the last look.
fn ensure_no_complaint() -> Result<()> {
    let mut log = LOG.lock().map_err(|_| anyhow!("a test panicked"))?;
    let log = match &mut *log {
        Some(log) => log,
        none => none.insert(KernelLog::from_boot()?),
    };
    let lines = log.lines()?;
    let bad = bad_lines(&lines);
    ensure!(
        bad.is_empty(),
        "the kernel complained: {}\nits log:\n{}",
        bad[0],
        lines.join("\n")
    );
    Ok(())
}

/// Runs one test in clean surroundings.
fn run(stock: bool, body: impl Fn() -> Result<()>) -> Result<()> {
    ensure_no_complaint().context("before the test")?;
    ensure_lockdep_looks().context("before the test")?;
    if !stock {
        modules::load_both()?;
        // Of one that failed.
        Device::open()?.set_enabled(true)?;
        interface::ensure_empty().context("before the test")?;
    }
    let cgroups = testing::cgroup::children_of_root()?;
    let mut result = body();
    if !stock {
        let after = interface::ensure_empty().context("after the test");
        result = result.and(after);
    }
    let left: Vec<_> = testing::cgroup::children_of_root()?
        .difference(&cgroups)
        .cloned()
        .collect();
    if !left.is_empty() {
        result = result.and(Err(anyhow!("cgroups are left: {left:?}")));
    }
    match (ensure_no_complaint(), result) {
        (Ok(()), result) => result,
        (Err(complaint), Ok(())) => Err(complaint),
        (Err(complaint), Err(other)) => Err(complaint.context(format!("{other:?}"))),
    }
}

/// Whether this is one of those hosts, known by their little memory, whose emulator needs minutes
/// for what QEMU does in seconds.
fn is_slow_host() -> Result<bool> {
    const MUCH_MEMORY: u64 = 2 << 20; // in KiB
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let total: u64 = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .context("no MemTotal in /proc/meminfo")?;
    Ok(total < MUCH_MEMORY)
}

/// Whether the kernel looks for mistakes, and takes several times as long for everything.
fn is_slow_kernel() -> bool {
    Path::new("/sys/kernel/debug/kmemleak").exists()
}

/// Whether tests that are about great numbers do with smaller ones.
fn few_will_do() -> Result<bool> {
    Ok(is_slow_kernel() || is_slow_host()?)
}

/// All that the kernel's log still has.
fn whole_log() -> Result<()> {
    let lines = KernelLog::from_boot()?.lines()?;
    let bad = bad_lines(&lines);
    ensure!(bad.is_empty(), "the kernel complained: {bad:#?}");
    Ok(())
}

fn tests() -> Result<Vec<Test>> {
    let vendor = Vendor::of_host()?;
    // What is supported is KVM's to say, and it says so on /dev/kvm.
    modules::load(vendor.module())?;
    // The host was booted, and the modules loaded, before any test looked at the log.
    let boot = Test::new("boot::kernel_log", whole_log);
    let tests = [
        vec![boot.stock()],
        stock::tests(vendor)?,
        matrix::tests(vendor)?,
        placement::tests(vendor)?,
        tracing::tests(vendor),
        command::tests(vendor),
        bad_input::tests(),
        lifecycle::tests(vendor)?,
        wrong_kernel::tests(vendor)?,
        isolation::tests(vendor)?,
        live::tests(vendor)?,
        kunit::tests(),
        faults::tests(vendor),
        races::tests(vendor)?,
        cgroups::tests()?,
        bench::tests(),
        fuzz::tests(vendor)?,
        guest::tests(vendor),
        guest_live::tests(vendor)?,
        // What was said between tests, and after the last one, by workers and the like.
        vec![
            Test::new("end::kernel_log", whole_log).stock(),
            // kmemleak does not look by itself.
            Test::new("end::no_leaks", || ensure_no_leaks(EXITPOLICY))
                .stock()
                .ignored(!leaks_are_found()),
        ],
    ];
    Ok(tests.into_iter().flatten().collect())
}

/// In the environment: the name of the first test to run, where a run before this one was stopped.
const FROM: &str = "EXITPOLICY_FROM";

/// Those from that name on.
fn from(mut tests: Vec<Test>, name: Option<String>) -> Result<Vec<Test>> {
    if let Some(name) = name {
        let first = tests.iter().position(|test| test.name == name);
        tests.drain(..first.with_context(|| format!("{FROM}: there is no test {name}"))?);
    }
    Ok(tests)
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let role = match words.next().as_deref() {
        Some(SERVE) => Some(server::serve()),
        Some(churn::CHURN) => Some(churn::churn()),
        Some(soak::SOAK) => Some(
            words
                .next()
                .and_then(|minutes| minutes.parse().ok())
                .context("how many minutes?")
                .and_then(soak::soak),
        ),
        _ => None,
    };
    if let Some(result) = role {
        return match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:?}");
                ExitCode::FAILURE
            }
        };
    }
    let mut arguments = Arguments::from_args();
    // One cgroup hierarchy, one module, one kernel log: one test at a time.
    arguments.test_threads = Some(1);
    match tests().and_then(|tests| from(tests, std::env::var(FROM).ok())) {
        Ok(tests) => {
            let trials = tests.into_iter().map(Test::into_trial).collect();
            let conclusion = libtest_mimic::run(&arguments, trials);
            match ensure_no_complaint().context("after the last test") {
                Err(error) if !arguments.list => {
                    eprintln!("{error:?}");
                    ExitCode::FAILURE
                }
                _ => conclusion.exit_code(),
            }
        }
        Err(error) => {
            eprintln!("cannot test here: {error:#}");
            ExitCode::FAILURE
        }
    }
}
