// SPDX-License-Identifier: GPL-2.0

//! Runs the self-tests of Linux's KVM in a host, and compares what they said in three.

use std::{
    fs::{
        self,
        File, //
    },
    io::{
        self,
        Write, //
    },
    os::unix::process::{
        CommandExt,
        ExitStatusExt, //
    },
    path::{
        Path,
        PathBuf, //
    },
    process::{
        Child,
        Command,
        ExitCode,
        ExitStatus,
        Stdio, //
    },
    time::{
        Duration,
        Instant, //
    }, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};
use clap::{
    Args,
    Parser,
    Subcommand, //
};
use nix::{
    sys::signal::{
        killpg,
        Signal, //
    },
    unistd::Pid, //
};
use testing::{
    interface::ensure_no_vms,
    kernel_log::{
        bad_lines,
        KernelLog, //
    },
    modules,
    pause,
    selftests::{
        outcome,
        result_line,
        List,
        Results,
        Table, //
    },
    uapi::Device, //
};

/// What the tests exit with if the host has not what they need (tools/testing/selftests/kselftest.h).
const KSFT_SKIP: i32 = 4;

/// Where the output of a test goes.
const OUTPUT: &str = "/tmp/kselftest";

/// Runs the self-tests of Linux's KVM, and compares what they said.
#[derive(Parser)]
enum Options {
    /// Run tests, each in a process of its own, and tell how each ended
    Run {
        /// Where they are
        #[arg(long, value_name = "DIR")]
        directory: PathBuf,
        /// End a test after so many seconds of the host's; 120 is what the tests' own settings say
        #[arg(long, value_name = "SECONDS", default_value_t = 120)]
        limit: u64,
        /// Their names, each with its arguments, in one word
        tests: Vec<String>,
    },
    #[command(flatten)]
    Look(Look),
}

/// What is done with results.
#[derive(Subcommand)]
enum Look {
    /// Print the tests to be run: their names, and their arguments
    Commands(Given),
    /// Print those that are not as they should be
    Wrong(Given),
    /// Print the three columns, and fail unless all is as it should be
    Table(Given),
}

/// What there is.
#[derive(Args)]
struct Given {
    /// The host's name
    #[arg(long)]
    host: String,
    /// The file with the names of all tests
    #[arg(long, value_name = "FILE")]
    tests: PathBuf,
    /// The file with those that are not run, arguments, and the differences that are meant to be
    /// there
    #[arg(long, value_name = "FILE")]
    list: PathBuf,
    /// How many tests have to pass without the module
    #[arg(long, value_name = "N", default_value_t = 0)]
    passes: usize,
    /// What "run" has printed: with the module absent, without policy, all passed through
    results: Vec<PathBuf>,
}

fn main() -> ExitCode {
    let result = match Options::parse() {
        Options::Run {
            directory,
            limit,
            tests,
        } => run_all(&directory, Duration::from_secs(limit), &tests).map(|()| true),
        Options::Look(look) => look.look(),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("kselftests: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// --- in the host --------------------------------------------------------------

fn run_all(directory: &Path, limit: Duration, tests: &[String]) -> Result<()> {
    // One test reads the host's own registers.
    modules::load("msr")?;
    // Whatever is said between two tests is the later one's.
    let mut log = KernelLog::from_boot()?;
    for test in tests {
        let (name, arguments) = test.split_once(' ').unwrap_or((test, ""));
        // The name first: if the host dies, it is known of what.
        print!("{}", result_line(name, ""));
        io::stdout().flush()?;
        let begin = Instant::now();
        let mut command = Command::new(directory.join(name));
        command.args(arguments.split_whitespace());
        let (outcome, words) = run(&mut command, limit, &mut log)?;
        println!("{outcome} ({:.1} s)", begin.elapsed().as_secs_f32());
        for line in words {
            println!("    | {line}");
        }
    }
    Ok(())
}

/// How many VMs the module has missed, if it is there.
fn missed() -> Result<Option<u64>> {
    if !modules::is_loaded(modules::EXITPOLICY)? {
        return Ok(None);
    }
    Ok(Some(Device::open()?.info()?.missed))
}

/// Whether the module has lost sight of a VM, or still sees one.
fn ensure_module_is_well(missed_before: Option<u64>) -> Result<()> {
    if let Some(before) = missed_before {
        ensure_no_vms()?;
        let missed = missed()?;
        ensure!(missed == Some(before), "missed: {before}, then {missed:?}");
    }
    Ok(())
}

/// Runs a test. How it ended, and what there is to say if it did not pass.
fn run(test: &mut Command, limit: Duration, log: &mut KernelLog) -> Result<(String, Vec<String>)> {
    let missed = missed()?;
    let output = File::create(OUTPUT)?;
    let mut child = test
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot run {test:?}"))?;
    let status = wait(&mut child, limit)?;
    let output = String::from_utf8_lossy(&fs::read(OUTPUT)?).into_owned();
    let module = ensure_module_is_well(missed);
    let lines = log.lines()?;
    let bad = bad_lines(&lines);

    let how = how(status);
    let mut words = Vec::new();
    if how != "pass" {
        // The end says what it was, and there can be a lot before.
        let all: Vec<_> = output.lines().collect();
        words.extend(all.iter().rev().take(12).rev().map(ToString::to_string));
    }
    words.extend(bad.iter().map(|line| format!("kernel: {line}")));
    if let Err(error) = &module {
        words.push(format!("module: {error:#}"));
    }
    Ok((
        outcome(&how, &output, !bad.is_empty(), module.is_err()),
        words,
    ))
}

/// Waits until a test ends, or ends it; with all that it has started.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let group = Pid::from_raw(child.id().try_into()?);
    let begin = Instant::now();
    let mut status = child.try_wait()?;
    while status.is_none() && begin.elapsed() < limit {
        pause();
        status = child.try_wait()?;
    }
    // There may be nobody left.
    let _ = killpg(group, Signal::SIGKILL);
    child.wait()?;
    Ok(status)
}

fn how(status: Option<ExitStatus>) -> String {
    let Some(status) = status else {
        return "hang".to_string();
    };
    match (status.code(), status.signal()) {
        (Some(0), _) => "pass".to_string(),
        (Some(KSFT_SKIP), _) => "skip".to_string(),
        (_, Some(signal)) => match Signal::try_from(signal) {
            Ok(signal) => signal.to_string(),
            Err(_) => format!("signal-{signal}"),
        },
        _ => "fail".to_string(),
    }
}

// --- afterwards ---------------------------------------------------------------

impl Look {
    fn look(&self) -> Result<bool> {
        let (Self::Commands(given) | Self::Wrong(given) | Self::Table(given)) = self;
        let text =
            |path: &Path| fs::read_to_string(path).with_context(|| path.display().to_string());
        let tests: Vec<_> = text(&given.tests)?.lines().map(String::from).collect();
        let list =
            List::parse(&text(&given.list)?).with_context(|| given.list.display().to_string())?;
        list.ensure_known(&tests)?;
        let print = |test: &str| println!("{}", list.command(&given.host, test));
        if let Self::Commands(_) = self {
            let is_run = |test: &&String| !list.is_excluded(&given.host, test);
            tests.iter().filter(is_run).for_each(|test| print(test));
            return Ok(true);
        }
        let results: Vec<_> = given
            .results
            .iter()
            .map(|path| Ok(Results::parse(&text(path)?)))
            .collect::<Result<_>>()?;
        let results: [_; 3] = results
            .try_into()
            .ok()
            .context("three files of results, please")?;
        let table = Table::new(&given.host, &tests, &list, &results, given.passes);
        match self {
            Self::Wrong(_) => table.wrong().for_each(print),
            _ => print!("{table}"),
        }
        Ok(matches!(self, Self::Wrong(_)) || table.is_good())
    }
}
