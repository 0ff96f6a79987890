// SPDX-License-Identifier: GPL-2.0

//! Runs a guest that halts a number of times, or for ever, and tells how many HLT exits that cost.

use std::{
    fs,
    io::{
        self,
        Write, //
    },
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
        Irqchip,
        Report,
        Vm,
        Work, //
    }, //
};

/// Runs a guest on /dev/kvm that executes HLT, each ended by its timer, and tells how many exits
/// that cost.
#[derive(Parser)]
struct Options {
    /// How many times; 0: until it is killed
    #[arg(long, value_name = "N", default_value_t = 1000)]
    halts: u32,
    /// Tell it after every N, too, while the guest goes on; 0: at the end only
    #[arg(long, value_name = "N", default_value_t = 0)]
    every: u32,
    /// Do not tell the guest of KVM_FEATURE_PV_UNHALT, as `-cpu host,-kvm-pv-unhalt` does it in
    /// QEMU. On Intel, "hlt" of a VM that runs can be changed then
    #[arg(long)]
    no_pv_unhalt: bool,
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
    let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
    vm.disable_exits(options.disable_exits.bits())
        .context("KVM_ENABLE_CAP(KVM_CAP_X86_DISABLE_EXITS)")?;
    if options.no_pv_unhalt {
        vm.hide_pv_unhalt();
    }
    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let total = match options.halts {
        0 => u32::MAX,
        halts => halts,
    };
    let every = match options.every {
        0 => total,
        every => every,
    };
    let mut left = total;
    while left > 0 {
        let work = Work::new(Payload::Hlt, every.min(left));
        let report = vcpu.run(work, &AtomicBool::new(false))?;
        ensure_complete(work, &report)?;
        tell(options.json, &report)?;
        if options.halts > 0 {
            left -= report.executed;
        }
    }
    Ok(())
}

fn tell(json: bool, report: &Report) -> Result<()> {
    let cgroup = own_cgroup()?;
    // Whoever read it may be gone.
    let mut stdout = io::stdout();
    if json {
        let report = json!({
            "cgroup": cgroup,
            "halts": report.executed,
            "halt_exits": report.halt_exits,
            "pv_unhalt": report.pv_unhalt,
        });
        writeln!(stdout, "{report}")?;
    } else {
        writeln!(
            stdout,
            "guest in {cgroup}: {} HLT, {} HLT exits",
            report.executed, report.halt_exits
        )?;
    }
    Ok(())
}

/// The cgroup of this process in the default hierarchy.
fn own_cgroup() -> Result<String> {
    let cgroups = fs::read_to_string("/proc/self/cgroup")?;
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(own.unwrap_or("no cgroup of version 2").to_string())
}
