// SPDX-License-Identifier: GPL-2.0

//! What the module costs VMs that it changes nothing of: nothing.

use anyhow::{
    ensure,
    Context,
    Result, //
};
use figures::{
    idle::{
        ABSENT,
        BOTH_HALT,
        BOTH_RUN,
        CPUID,
        GROUP,
        SELF_IPI, //
    },
    Absent,
    Figure, //
};

use super::{
    ensure_comparable_tscs,
    why_not_here,
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

/// What is measured in one state of the host.
fn figures(case: &str, count: u32) -> Result<Vec<Figure>> {
    let cgroup = Cgroup::new("bench-idle")?;
    let one = |operation| [Work::new(operation, count)];
    let two = |first, second| [Work::new(first, count), Work::new(second, count)];
    let mut figures = Vec::new();
    if why_not_here(1)?.is_none() {
        let mut rig = Rig::new(&cgroup, 1)?;
        for (name, operation) in [(CPUID, Operation::Cpuid), (SELF_IPI, Operation::SelfIpi)] {
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
    let works = two(Operation::PingHlt, Operation::PongHlt);
    let measured = rig.measure(&works).context(BOTH_HALT)?;
    figures.push(measured.figure(GROUP, BOTH_HALT, case)?);
    // On one CPU, who spins keeps the other one from answering.
    if why_not_here(2)?.is_none() {
        ensure_comparable_tscs()?;
        let works = two(Operation::PingSpin, Operation::PongSpin);
        let measured = rig.measure(&works).context(BOTH_RUN)?;
        figures.push(measured.figure(GROUP, BOTH_RUN, case)?);
    }
    Ok(figures)
}

/// What is not measured on this host.
fn absent() -> Result<Vec<Absent>> {
    let mut absent = Vec::new();
    for (name, vcpus) in [(CPUID, 1), (SELF_IPI, 1), (BOTH_RUN, 2)] {
        let why = why_not_here(vcpus)?.into_iter();
        absent.extend(why.map(|reason| Absent::new(GROUP, name, reason)));
    }
    Ok(absent)
}

/// With the module absent, loaded, and loaded with `policies` policies.
pub fn measure(count: u32, policies: usize) -> Result<(Vec<Figure>, Vec<Absent>)> {
    let mut all = Vec::new();
    let unloaded = Unloaded::new()?;
    all.extend(figures(ABSENT, count).context("without the module")?);
    drop(unloaded);
    modules::load_both()?;
    interface::ensure_empty()?;
    all.extend(figures("no policy", count).context("with the module")?);
    let many = Policies::new(policies)?;
    let case = format!("{policies} policies");
    let with = figures(&case, count).with_context(|| case.clone())?;
    all.extend(with.into_iter().map(|figure| figure.at(policies as u64)));
    drop(many);
    Ok((all, absent()?))
}
