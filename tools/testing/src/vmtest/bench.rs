// SPDX-License-Identifier: GPL-2.0

//! A quick form of the benches, where instructions can be counted: what must cost nothing costs
//! nothing, and what must not grow does not. All figures are `make bench`'s.

use std::collections::BTreeMap;

use anyhow::{
    ensure,
    Context,
    Result, //
};
use figures::{
    decision::{
        ABSENT,
        HOOKED,
        POLICIES,
        WHOLE, //
    },
    idle::{
        slack,
        BOTH_HALT,
        CPUID,
        SELF_IPI, //
    },
    Figure,
    Unit, //
};
use testing::bench::{
    decision,
    idle,
    unit, //
};

use crate::Test;

/// Policies on the host.
const MANY: usize = 1_000;

pub fn tests() -> Vec<Test> {
    let counted = unit().is_ok_and(|unit| unit == Unit::Instructions);
    let tests = [
        Test::new("bench::idle_costs_nothing", idle_costs_nothing),
        Test::new("bench::decisions_cost_the_same", decisions_cost_the_same),
    ];
    tests.map(|test| test.ignored(!counted)).into()
}

/// CPUID and IPIs cost a guest the same number of instructions with the module absent, loaded, and
/// loaded with many policies. Where two vCPUs share the only CPU, the host's scheduler is part of it,
/// which is the same but for a few.
fn idle_costs_nothing() -> Result<()> {
    let mut by_name: BTreeMap<String, Vec<(String, i64)>> = BTreeMap::new();
    for figure in idle::measure(100, MANY)?.0 {
        let cases = by_name.entry(figure.name).or_default();
        cases.push((figure.case, figure.median));
    }
    eprintln!("    {by_name:?}");
    for name in [CPUID, SELF_IPI, BOTH_HALT] {
        ensure!(by_name.contains_key(name), "no figures for {name}");
    }
    for (name, cases) in by_name {
        let without = cases[0].1;
        let slack = slack(&name, without);
        let is_same = |median: i64| (median - without).abs() <= slack;
        ensure!(
            cases.len() == 3 && cases.iter().all(|(_, median)| is_same(*median)),
            "{name}: {cases:?}"
        );
    }
    Ok(())
}

/// A decision among many policies costs what one among few does.
fn decisions_cost_the_same() -> Result<()> {
    let figures = decision::by_policies(9, &[1, MANY])?;
    let of = |name: &str, case: &str| {
        let mut figures = figures.iter();
        let figure = figures.find(|figure| figure.name == name && figure.case == case);
        figure.with_context(|| format!("no {name}, {case}"))
    };
    let all = |case: &str, value: fn(&Figure) -> i64| -> Result<i64> {
        let added = HOOKED.iter();
        added.map(|[_, added]| Ok(value(of(added, case)?))).sum()
    };
    let one = format!("1 {POLICIES}");
    let few = all(&one, |added| added.median)?;
    let case = format!("{MANY} {POLICIES}");
    let many = all(&case, |added| added.median)?;
    let creation = of(WHOLE, ABSENT)?.median;
    eprintln!("    added: {few} and {many} instructions, of {creation} for a VM");
    ensure!(of(HOOKED[0][1], &one)?.median > 0, "nothing was decided");
    // What a tree takes more for so many, and no more.
    ensure!(many < few + few / 4, "it grows with the number of policies");
    // Not for less than it spreads.
    let least = all(&case, |added| added.low)?;
    ensure!(least < creation / 100, "it is more than 1 % of making a VM");
    Ok(())
}
