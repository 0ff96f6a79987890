// SPDX-License-Identifier: GPL-2.0

//! The targets of the groups, and what the figures say of them.

use anyhow::{
    ensure,
    Context,
    Result, //
};
use figures::{
    change,
    decision,
    gain,
    guest,
    idle,
    Document,
    Figure,
    Unit, //
};

use crate::groups::{
    added,
    distinct,
    need,
    of,
    points, //
};

/// What the figures of one group say.
#[derive(Debug, Default)]
pub struct Findings {
    pub lines: Vec<String>,
    /// Targets that are missed, and findings that could not be had. Each of them is a failure.
    pub wrong: Vec<String>,
}

impl Findings {
    fn say(&mut self, line: String) {
        self.lines.push(line);
    }

    /// Says it, and that it should not be so if it does not hold.
    fn judge(&mut self, holds: bool, line: String, target: &str) {
        if !holds {
            self.wrong.push(format!("{line}; the target is {target}"));
        }
        self.lines.push(line);
    }
}

/// What the figures of a group say, on one host.
pub fn findings(document: &Document, group: &str) -> Findings {
    type Judge = fn(&[&Figure], &mut Findings) -> Result<()>;
    let judges: [(&str, Judge); 5] = [
        (gain::GROUP, saved),
        (idle::GROUP, unchanged),
        (decision::GROUP, decided),
        (change::GROUP, changed),
        (guest::GROUP, linux),
    ];
    let mut findings = Findings::default();
    let figures = of(document, group);
    let judge = judges.iter().find(|(name, _)| *name == group);
    if let (Some((_, judge)), false) = (judge, figures.is_empty()) {
        if let Err(error) = judge(&figures, &mut findings) {
            findings.wrong.push(format!("{error:#}"));
        }
    }
    findings
}

/// What is passed through does not exit.
fn saved(figures: &[&Figure], findings: &mut Findings) -> Result<()> {
    for name in distinct(figures, |figure| &figure.name) {
        let trapped = need(figures, name, gain::TRAPPED)?;
        let passed = need(figures, name, gain::PASSED)?;
        let (before, after) = trapped
            .own
            .zip(passed.own)
            .with_context(|| format!("{name}: its exits were not counted"))?;
        let line = format!(
            "{name}: {} in place of {} {}, {after} in place of {before:.2} exits by the instruction",
            passed.median, trapped.median, trapped.unit
        );
        findings.judge(after == 0.0, line, "0 where it is passed through");
        ensure!(before > 0.0, "{name}: it does not exit where it is trapped");
    }
    Ok(())
}

/// Nothing of the module's is on the path.
fn unchanged(figures: &[&Figure], findings: &mut Findings) -> Result<()> {
    for name in distinct(figures, |figure| &figure.name) {
        let absent = need(figures, name, idle::ABSENT)?;
        let of_name = figures.iter().filter(|figure| figure.name == name);
        let others: Vec<_> = of_name
            .filter(|figure| figure.case != idle::ABSENT)
            .collect();
        ensure!(others.len() == 2, "{name}: there are not three cases");
        for figure in others {
            let more = figure.median - absent.median;
            // Where two CPUs take turns, one VM differs from the next.
            let holds =
                figure.unit != Unit::Instructions || more.abs() <= idle::slack(name, absent.median);
            let line = format!(
                "{name}, {}: {:.3} of what it is without the module ({more:+} {})",
                figure.case,
                figure.median as f64 / absent.median as f64,
                figure.unit
            );
            findings.judge(holds, line, "1.000");
        }
    }
    Ok(())
}

/// A decision is a small part of making a VM, whatever the number of policies.
fn decided(figures: &[&Figure], findings: &mut Findings) -> Result<()> {
    let making = need(figures, decision::WHOLE, decision::ABSENT)?;
    let share = |cost: i64| 100.0 * cost as f64 / making.median as f64;
    let by_policies = added(figures)?;
    for sum in &by_policies {
        let line = format!(
            "added to making a VM, {} policies: {} {}, {:.2} %",
            sum.policies,
            sum.median,
            making.unit,
            share(sum.median)
        );
        // Not for less than it spreads.
        findings.judge(share(sum.low) <= 1.0, line, "1 %, but for what it spreads");
    }
    let mut some = by_policies.iter().filter(|sum| sum.policies > 0);
    if let (Some(few), Some(many)) = (some.next(), some.next_back()) {
        // What a tree takes more for so many, and no more.
        let line = format!(
            "{} policies in place of {}: {:.3} of it",
            many.policies,
            few.policies,
            many.median as f64 / few.median as f64
        );
        let most = few.median + few.median / 4;
        findings.judge(many.median <= most, line, "1.25 at most");
    }
    let resolve = points(figures, decision::RESOLVE, decision::DEPTH)?;
    let resolve: Vec<_> = resolve
        .iter()
        .map(|(at, figure)| (*at as f64, figure.median as f64))
        .collect();
    let (at_0, slope) = line(&resolve).context("no line through one depth")?;
    let is_linear = resolve
        .iter()
        .all(|(depth, cost)| (at_0 + slope * depth - cost).abs() <= cost / 100.0);
    let line = format!("{}, for each level: {slope:.0} more", decision::RESOLVE);
    findings.judge(is_linear, line, "a straight line, up to 1 %");
    let most = by_policies.last().context("no policies")?.median;
    let deepest = resolve.last().map_or(1.0, |(depth, _)| *depth);
    let cost = most as f64 + slope * (deepest - 1.0);
    let room = making.median as f64 / 100.0 - most as f64;
    findings.say(format!(
        "so with a policy on each of {deepest} levels {cost:.0} {} would be added, {:.2} %, and no more than the 1 % \
         that was the target with {:.0} levels",
        making.unit,
        100.0 * cost / making.median as f64,
        (1.0 + room / slope).floor().max(0.0)
    ));
    let absent = need(figures, decision::WORKERS, decision::ABSENT)?;
    for (policies, figure) in points(figures, decision::WORKERS, decision::POLICIES)? {
        findings.say(format!(
            "{}, {policies} policies: {} {} more than without the module",
            decision::WORKERS,
            figure.median - absent.median,
            absent.unit
        ));
    }
    Ok(())
}

/// A change takes one exit of each vCPU at most.
fn changed(figures: &[&Figure], findings: &mut Findings) -> Result<()> {
    for state in [change::RUNNING, change::NATIVE, change::BLOCKED] {
        let exits = change::exits(state);
        for (vcpus, figure) in points(figures, &exits, "vCPU")? {
            let kicks = figure
                .own
                .with_context(|| format!("{exits}: not counted by reason"))?;
            // Who goes on behind a HLT that was native does something: those exits are its own.
            let (caused, which) = match state {
                change::NATIVE => (
                    kicks,
                    " by the change, and the rest by the guest that goes on",
                ),
                _ => (figure.median as f64, ""),
            };
            let line = format!(
                "{state}, {}: {} exits, {caused}{which}",
                figure.case, figure.median
            );
            findings.judge(caused <= vcpus as f64, line, "one for each vCPU");
        }
    }
    Ok(())
}

/// A guest whose `hlt` is passed through has no exits for it, and who waits for locks is kicked.
fn linux(figures: &[&Figure], findings: &mut Findings) -> Result<()> {
    let names = distinct(figures, |figure| &figure.name);
    for work in names.iter().filter(|name| !name.contains(": ")) {
        let hlt = guest::by_reason(work, guest::REASON_HLT);
        let trapped = need(figures, &hlt, guest::TRAPPED)?;
        for case in [guest::HLT, guest::ALL] {
            let passed = need(figures, &hlt, case)?;
            let line = format!(
                "{work}, {case}: {} exits for HLT at most in {} runs, in place of {}",
                passed.max, passed.repeats, trapped.median
            );
            findings.judge(passed.max == 0, line, "0");
        }
    }
    let kicks = |case| need(figures, &guest::by_reason(guest::LOCKS, guest::KICKS), case);
    let (with, without) = (kicks(guest::TRAPPED)?, kicks(guest::NO_PV)?);
    let line = format!(
        "{}: {} kicks with pvspinlock, {} without",
        guest::LOCKS,
        with.median,
        without.median
    );
    let target = format!(
        "{} or more with it, else nobody waits for locks, and none without",
        guest::ENOUGH_KICKS
    );
    let holds = with.median >= guest::ENOUGH_KICKS && without.max == 0;
    findings.judge(holds, line, &target);
    Ok(())
}

/// A straight line through points, by least squares: what it has at 0, and its slope.
fn line(points: &[(f64, f64)]) -> Option<(f64, f64)> {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let both: f64 = points
        .iter()
        .map(|point| (point.0 - x) * (point.1 - y))
        .sum();
    let square: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    (square > 0.0).then(|| (y - both / square * x, both / square))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slope() {
        let (at_0, slope) = line(&[(1.0, 12.0), (2.0, 14.0), (4.0, 18.0)]).expect("a line");
        assert!((at_0 - 10.0).abs() < 1e-9 && (slope - 2.0).abs() < 1e-9);
        assert!(line(&[(1.0, 1.0)]).is_none());
    }

    fn judged(judge: fn(&[&Figure], &mut Findings) -> Result<()>, all: &[Figure]) -> Result<usize> {
        let mut findings = Findings::default();
        judge(&all.iter().collect::<Vec<_>>(), &mut findings)?;
        Ok(findings.wrong.len())
    }

    fn figure(group: &str, name: &str, case: &str, unit: Unit, value: i64) -> Result<Figure> {
        Figure::new(group, name, case, unit, vec![value])
    }

    #[test]
    fn idle_must_not_change() -> Result<()> {
        let three = |name: &str, unit, values: [i64; 3]| -> Result<Vec<Figure>> {
            let cases = [idle::ABSENT, "no policy", "many"].into_iter().zip(values);
            cases
                .map(|(case, value)| figure(idle::GROUP, name, case, unit, value))
                .collect()
        };
        let wrong = |name: &str, unit, values| judged(unchanged, &three(name, unit, values)?);
        assert_eq!(
            wrong(idle::CPUID, Unit::Instructions, [1209, 1209, 1209])?,
            0
        );
        assert_eq!(
            wrong(idle::CPUID, Unit::Instructions, [1209, 1210, 1208])?,
            2
        );
        assert_eq!(
            wrong(idle::BOTH_HALT, Unit::Instructions, [9000, 9009, 9010])?,
            1
        );
        assert_eq!(wrong(idle::BOTH_HALT, Unit::Ticks, [9000, 9500, 9010])?, 0);
        let all = three(idle::CPUID, Unit::Instructions, [1, 1, 1])?;
        assert!(judged(unchanged, &all[..2]).is_err() && judged(unchanged, &all[1..]).is_err());
        Ok(())
    }

    #[test]
    fn what_is_passed_through_must_not_exit() -> Result<()> {
        let pair = |before: Option<f64>, after: Option<f64>| -> Result<Vec<Figure>> {
            let mut pair = Vec::new();
            for (case, own) in [(gain::TRAPPED, before), (gain::PASSED, after)] {
                let figure = figure(gain::GROUP, "HLT", case, Unit::Ticks, 1)?;
                pair.push(Figure { own, ..figure });
            }
            Ok(pair)
        };
        assert_eq!(judged(saved, &pair(Some(1.0), Some(0.0))?)?, 0);
        assert_eq!(judged(saved, &pair(Some(1.0), Some(0.01))?)?, 1);
        assert!(judged(saved, &pair(Some(0.0), Some(0.0))?).is_err());
        assert!(judged(saved, &pair(Some(1.0), None)?).is_err());
        assert!(judged(saved, &pair(Some(1.0), Some(0.0))?[..1]).is_err());
        Ok(())
    }

    #[test]
    fn a_change_takes_an_exit_of_each_vcpu() -> Result<()> {
        let states = |running: i64, native: i64, kicks: f64, blocked: i64| -> Result<Vec<Figure>> {
            let states = [
                (change::RUNNING, running, 0.0),
                (change::NATIVE, native, kicks),
                (change::BLOCKED, blocked, 0.0),
            ];
            let figures = states.into_iter().map(|(state, exits, kicks)| {
                let name = change::exits(state);
                let mut figure = figure(change::GROUP, &name, "8 vCPUs", Unit::Exits, exits)?.at(8);
                figure.own = Some(kicks);
                Ok(figure)
            });
            figures.collect()
        };
        assert_eq!(judged(changed, &states(8, 20, 8.0, 0)?)?, 0);
        assert_eq!(judged(changed, &states(9, 20, 9.0, 9)?)?, 3);
        assert!(judged(changed, &states(8, 8, 8.0, 0)?[..2]).is_err());
        Ok(())
    }

    #[test]
    fn a_decision_is_one_percent_at_most() -> Result<()> {
        let all = |few: i64, many: i64, at_4: i64| -> Result<Vec<Figure>> {
            let new = |name: &str, case: &str, value| {
                figure(decision::GROUP, name, case, Unit::Instructions, value)
            };
            let mut all = vec![
                new(decision::WHOLE, decision::ABSENT, 100_000)?,
                new(decision::WORKERS, decision::ABSENT, 10)?,
                new(decision::WORKERS, "1 policies", 10)?.at(1),
            ];
            let [vcpu, cpuid, run] = decision::HOOKED.map(|[_, added]| added);
            for (at, value) in [(1, few), (100, many)] {
                let case = format!("{at} policies");
                all.push(new(vcpu, &case, value)?.at(at));
                all.push(new(cpuid, &case, 10)?.at(at));
                all.push(new(run, &case, -10)?.at(at));
            }
            for (at, value) in [(1, 100), (2, 110), (4, at_4)] {
                all.push(new(decision::RESOLVE, &format!("depth {at}"), value)?.at(at));
            }
            Ok(all)
        };
        assert_eq!(judged(decided, &all(900, 1_000, 130)?)?, 0);
        assert_eq!(judged(decided, &all(900, 1_001, 130)?)?, 1);
        assert_eq!(judged(decided, &all(700, 900, 130)?)?, 1);
        assert_eq!(judged(decided, &all(900, 1_000, 160)?)?, 1);
        for missing in 0..all(900, 1_000, 130)?.len() {
            let mut without = all(900, 1_000, 130)?;
            let gone = without.remove(missing);
            // Of what there are several, one less leaves enough.
            if !gone.name.starts_with("added") && gone.name != decision::RESOLVE {
                assert!(judged(decided, &without).is_err(), "{gone:?}");
            }
        }
        Ok(())
    }
}
