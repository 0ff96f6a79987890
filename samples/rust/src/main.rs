// SPDX-License-Identifier: GPL-2.0

//! The smallest client in Rust: lets the VMs of a cgroup halt natively, those that run too, and
//! says what then holds for them, inheritance included.
//!
//! ```sh
//! cargo build && sudo target/debug/halt-natively machine.slice
//! ```

use exitpolicy::{
    cgroup::Hierarchy,
    live::Apply,
    policy::Exits,
    Device,
    Error,
    Host, //
};
use std::{
    env,
    process::ExitCode, //
};

fn run(cgroup: &str) -> Result<(), Error> {
    let host = Host::default();
    let module = Device::open(&host)?;
    let cgroup = Hierarchy::find(&host)?.open(cgroup)?;
    let in_vain = module.set_policy(&cgroup, Some(Exits::HLT), None, Apply::default())?;
    let holds = module.resolve_policy(&cgroup)?;
    println!(
        "disable {}, allow {}; vCPUs that were waited for in vain: {in_vain}",
        holds.disable, holds.allow,
    );
    Ok(())
}

fn main() -> ExitCode {
    let Some(cgroup) = env::args().nth(1) else {
        eprintln!("usage: halt-natively CGROUP");
        return ExitCode::from(2);
    };
    match run(&cgroup) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(hint) = error.hint() {
                eprintln!("  hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
