// SPDX-License-Identifier: GPL-2.0

//! What the module costs VMs that it changes nothing of: nothing.

use anyhow::{
    ensure,
    Context,
    Result, //
};
use figures::Figure;

use super::{
    ensure_comparable_tscs,
    is_for_this_host,
    Policies,
    Rig, //
};
use crate::{
    cgroup::Cgroup,
    interface,
    modules::{
        self,
        Unloaded, //
    },
    timed::{
        Operation,
        Work, //
    }, //
};

pub const GROUP: &str = "idle";

/// What is measured in one state of the host.
fn figures(case: &str, count: u32) -> Result<Vec<Figure>> {
    let cgroup = Cgroup::new("bench-idle")?;
    let one = |operation| [Work::new(operation, count)];
    let two = |first, second| [Work::new(first, count), Work::new(second, count)];
    let mut figures = Vec::new();
    if is_for_this_host(1)? {
        let mut rig = Rig::new(&cgroup, 1)?;
        for (name, operation) in [
            ("CPUID", Operation::Cpuid),
            ("IPI to itself", Operation::SelfIpi),
        ] {
            let measured = rig.measure(&one(operation)).context(name)?;
            figures.push(measured.figure(GROUP, name, case)?);
        }
        ensure!(
            rig.taken(0) == count,
            "{} interrupts, not {count}",
            rig.taken(0)
        );
    }
    let mut rig = Rig::new(&cgroup, 2)?;
    let name = "IPI round trip, both halt";
    let works = two(Operation::PingHlt, Operation::PongHlt);
    let measured = rig.measure(&works).context(name)?;
    figures.push(measured.figure(GROUP, name, case)?);
    // On one CPU, who spins keeps the other one from answering.
    if is_for_this_host(2)? {
        ensure_comparable_tscs()?;
        let name = "IPI round trip, both run";
        let works = two(Operation::PingSpin, Operation::PongSpin);
        let measured = rig.measure(&works).context(name)?;
        figures.push(measured.figure(GROUP, name, case)?);
    }
    Ok(figures)
}

/// With the module absent, loaded, and loaded with `policies` policies.
pub fn measure(count: u32, policies: usize) -> Result<Vec<Figure>> {
    let mut all = Vec::new();
    let unloaded = Unloaded::new()?;
    all.extend(figures("absent", count).context("without the module")?);
    drop(unloaded);
    modules::load_both()?;
    interface::ensure_empty()?;
    all.extend(figures("no policy", count).context("with the module")?);
    let many = Policies::new(policies)?;
    let case = format!("{policies} policies");
    let with = figures(&case, count).with_context(|| case.clone())?;
    all.extend(with.into_iter().map(|figure| figure.at(policies as u64)));
    drop(many);
    Ok(all)
}
