// SPDX-License-Identifier: GPL-2.0

//! Runs a guest that halts a number of times, and tells how many HLT exits that cost.

use std::{
    fs,
    process::ExitCode,
    sync::{
        atomic::AtomicBool,
        Arc, //
    }, //
};

use anyhow::{
    Context,
    Result, //
};
use clap::Parser;
use exitpolicy_policy::Exits;
use serde_json::json;
use testing::{
    payload::Payload,
    vmm::{
        ensure_complete,
        Vm,
        Work, //
    }, //
};

/// Runs a guest on /dev/kvm that executes HLT, each ended by its timer, and tells how many exits
/// that cost.
#[derive(Parser)]
struct Options {
    /// How many times
    #[arg(long, value_name = "N", default_value_t = 1000)]
    halts: u32,
    /// Ask KVM to disable these exits: hlt,pause,... or all
    #[arg(long, value_name = "EXITS", default_value = "none")]
    disable_exits: Exits,
    /// Print JSON
    #[arg(short, long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tinyvmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let vm = Arc::new(Vm::new()?);
    vm.disable_exits(options.disable_exits.bits())
        .context("KVM_ENABLE_CAP(KVM_CAP_X86_DISABLE_EXITS)")?;
    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let work = Work::new(Payload::Hlt, options.halts);
    let report = vcpu.run(work, &AtomicBool::new(false))?;
    ensure_complete(work, &report)?;
    let cgroup = own_cgroup()?;
    if options.json {
        let report = json!({
            "cgroup": cgroup,
            "halts": report.executed,
            "halt_exits": report.halt_exits,
            "pv_unhalt": report.pv_unhalt,
        });
        println!("{report}");
    } else {
        println!(
            "guest in {cgroup}: {} HLT, {} HLT exits",
            report.executed, report.halt_exits
        );
    }
    Ok(())
}

/// The cgroup of this process in the default hierarchy.
fn own_cgroup() -> Result<String> {
    let cgroups = fs::read_to_string("/proc/self/cgroup")?;
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(own.unwrap_or("no cgroup of version 2").to_string())
}
