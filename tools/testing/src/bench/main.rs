// SPDX-License-Identifier: GPL-2.0

//! Measures what passing exits through saves, and what the module costs, on this host, and prints
//! one line of JSON ([`Document`]).

use std::process::ExitCode;

use anyhow::{
    Context,
    Result, //
};
use clap::{
    Parser,
    ValueEnum, //
};
use figures::{
    decision::{
        GROUP,
        POLICIES, //
    },
    Absent,
    Document,
    SCHEMA, //
};
use testing::{
    bench::{
        self,
        change,
        command,
        decision,
        gain,
        guest,
        idle, //
    },
    client::SERVE,
    exits::hooked_functions,
    interface,
    kernel_log::{
        bad_lines,
        KernelLog, //
    },
    modules,
    server, //
};

/// A group of figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    /// What an exit that is passed through saves the guest
    Gain,
    /// What the module costs VMs that it does not change
    Idle,
    /// What it costs that a VM is decided on
    Decision,
    /// What it costs to change a VM that runs
    Change,
    /// What the command costs, beside bpftool
    Command,
    /// What a Linux guest exits for: counts, for which every host will do
    Guest,
}

/// Measures, as root, on a KVM host on which nothing else runs, and prints one line of JSON.
/// What is printed on stderr is for people. The module is unloaded and loaded again on the way.
#[derive(Parser)]
struct Options {
    /// What to measure
    #[arg(required = true)]
    groups: Vec<Group>,
    /// What to call the host
    #[arg(long, default_value = "this")]
    host: String,
    /// Name and version of the emulator, where the host is an emulated one
    #[arg(long, default_value = "unknown", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    emulator: String,
    /// How often each operation of a guest is measured
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(32..=8192))]
    count: u32,
    /// How many VMs are made for each figure about their creation
    #[arg(long, default_value_t = 31)]
    vms: usize,
    /// How often each VM is changed
    #[arg(long, default_value_t = 11)]
    changes: u32,
    /// How often a Linux guest does each work
    #[arg(long, default_value_t = 5)]
    works: usize,
    /// For how many policies: the last one is the "many" of the group idle, too
    #[arg(long, value_delimiter = ',', default_value = "0,100,10000")]
    policies: Vec<usize>,
}

fn main() -> ExitCode {
    let result = match std::env::args().nth(1).as_deref() {
        Some(SERVE) => server::serve(),
        _ => run(&Options::parse()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("exitpolicy-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What is said where so many policies are left out.
fn without_most(policies: &[usize]) -> Option<Absent> {
    const MOST: usize = 100_000;
    let is_missing = policies.iter().all(|count| *count < MOST);
    let why = "only where --policies has it, as making so many takes longer than all the rest";
    is_missing.then(|| Absent::new(GROUP, &format!("{MOST} {POLICIES}"), why.to_string()))
}

fn run(options: &Options) -> Result<()> {
    if options.groups.iter().any(|group| *group != Group::Guest) {
        bench::unit()?;
    }
    let mut log = KernelLog::from_now()?;
    modules::load_both()?;
    interface::ensure_empty()?;
    let many = options.policies.iter().copied().max().unwrap_or(0);
    let mut document = Document {
        schema: SCHEMA,
        host: options.host.clone(),
        machine: bench::machine(&options.emulator)?,
        hooked: hooked_functions()?
            .iter()
            .map(|line| {
                line.split_whitespace()
                    .take(2)
                    .collect::<Vec<_>>()
                    .join(" ")
            })
            .collect(),
        figures: Vec::new(),
        absent: Vec::new(),
    };
    for group in &options.groups {
        eprintln!("exitpolicy-bench: measuring {group:?}");
        match group {
            Group::Gain => {
                let (figures, absent) = gain::measure(options.count)?;
                document.figures.extend(figures);
                document.absent.extend(absent);
            }
            Group::Idle => {
                let (figures, absent) = idle::measure(options.count, many)?;
                document.figures.extend(figures);
                document.absent.extend(absent);
            }
            Group::Decision => {
                let depths = [1, 2, 4, 8, 16, 32];
                let by_policies = decision::by_policies(options.vms, &options.policies)?;
                document.figures.extend(by_policies);
                let by_depth = decision::by_depth(options.vms, &depths)?;
                document.figures.extend(by_depth);
                document.absent.extend(without_most(&options.policies));
            }
            Group::Command => {
                let (figures, absent) = command::measure(options.vms)?;
                document.figures.extend(figures);
                document.absent.extend(absent);
            }
            Group::Guest => document.figures.extend(guest::measure(options.works)?),
            Group::Change => document
                .figures
                .extend(change::measure(&[1, 8, 64], options.changes)?),
        }
        interface::ensure_empty().with_context(|| format!("after {group:?}"))?;
    }
    // A host that complains is none to measure on.
    let lines = log.lines()?;
    let bad = bad_lines(&lines);
    anyhow::ensure!(bad.is_empty(), "the kernel complained: {bad:#?}");
    println!("{}", serde_json::to_string(&document)?);
    Ok(())
}
