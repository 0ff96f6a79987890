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
    bail,
    Context,
    Result, //
};
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

const USAGE: &str = "\
usage: tinyvmm [--halts N] [--disable-exits EXITS] [--json]

Runs a guest on /dev/kvm that executes HLT N times (1000), each ended by its
timer, and tells how many exits that cost.

  --disable-exits EXITS  ask KVM to disable these exits: hlt,pause,... or all
  --json                 print JSON
";

struct Options {
    halts: u32,
    exits: Exits,
    json: bool,
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("tinyvmm: {error:#}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tinyvmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options {
        halts: 1000,
        exits: Exits::NONE,
        json: false,
    };
    while let Some(argument) = arguments.next() {
        let mut value = || {
            let value = arguments.next();
            value.with_context(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "--halts" => options.halts = value()?.parse().context("--halts needs a number")?,
            "--disable-exits" => options.exits = value()?.parse()?,
            "--json" | "-j" => options.json = true,
            "--help" | "-h" => return Ok(None),
            other => bail!("unknown argument {other}"),
        }
    }
    Ok(Some(options))
}

fn run(options: &Options) -> Result<()> {
    let vm = Arc::new(Vm::new()?);
    vm.disable_exits(options.exits.bits())
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
