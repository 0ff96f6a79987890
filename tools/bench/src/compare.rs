// SPDX-License-Identifier: GPL-2.0

//! What was measured against what was measured before.

use std::collections::BTreeMap;

use figures::{
    Document,
    Figure,
    Key,
    Unit, //
};

/// By how much a count may grow.
const TOLERANCE: f64 = 0.02;
/// By how many ticks, as well: an emulator with several CPUs lets each of them have so many at a
/// time.
const QUANTUM: f64 = 16.0;
/// By how many exits for each operation, as well: those for the host's timer are among them.
const CHANCE: f64 = 0.1;

/// What its TSC counts, if that is among the figures.
fn counted(document: &Document) -> Option<Unit> {
    let units = document.figures.iter().map(|figure| figure.unit);
    units
        .into_iter()
        .find(|unit| matches!(unit, Unit::Instructions | Unit::Ticks | Unit::Cycles))
}

/// Whether it is of a CPU that no other one has to be like.
pub fn counts_cycles(document: &Document) -> bool {
    counted(document) == Some(Unit::Cycles)
}

/// What became of one figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// The median by the reference's.
    Ratio(f64),
    /// The median without the reference's, which has no ratio to anything.
    Difference(i64),
    /// It has no reference.
    New,
    /// It is no count that repeats.
    NotCompared,
}

impl Verdict {
    fn of(old: i64, new: i64) -> Self {
        if old > 0 {
            Self::Ratio(new as f64 / old as f64)
        } else {
            Self::Difference(new - old)
        }
    }
}

/// What became of all of them.
#[derive(Debug, Default)]
pub struct Comparison {
    /// In the order of the document's figures.
    pub verdicts: Vec<Verdict>,
    /// Each of them is a failure.
    pub wrong: Vec<String>,
    /// What should be known.
    pub notes: Vec<String>,
}

fn by_key(document: &Document) -> BTreeMap<Key<'_>, &Figure> {
    let figures = document.figures.iter();
    figures.map(|figure| (figure.key(), figure)).collect()
}

fn name(host: &str, (group, name, case): Key<'_>) -> String {
    format!("{host}: {group}: {name}, {case}")
}

/// Whether a figure has grown by more than it may.
fn has_grown(old: &Figure, new: &Figure) -> bool {
    let slack = match new.unit {
        Unit::Ticks => QUANTUM,
        _ => 0.0,
    };
    let most = old.median as f64 + old.median.max(0) as f64 * TOLERANCE + slack;
    // What spreads by more than that by itself has grown only if it is beyond three quarters of the
    // reference: so the median where everything repeats. Where CPUs take turns, values come in
    // several kinds, and which kind the median is of is chance: so all but a quarter of them.
    let beyond = match new.unit {
        Unit::Instructions | Unit::Kib => new.median,
        _ => new.low,
    };
    new.median as f64 > most && beyond > old.high
}

/// Which exits of each operation have grown by more than they may, or are not there.
fn grown_exits(old: &Figure, new: &Figure) -> Vec<String> {
    // Who spins through exits has more of them the longer that takes.
    let spread = (old.high - old.low) as f64 / old.median.max(1) as f64;
    let has_grown = |old: f64, new: f64| new > old * (1.0 + TOLERANCE.max(spread)) + CHANCE;
    let mut grown = Vec::new();
    match (old.exits, new.exits) {
        (Some(old), Some(new)) if has_grown(old, new) => {
            grown.push(format!("{new:.2} exits, and {old:.2} in the reference"));
        }
        (Some(_), None) => grown.push("its exits were not counted".to_string()),
        _ => (),
    }
    if !old.reasons.is_empty() && new.reasons.is_empty() {
        grown.push("its exits were not counted by reason".to_string());
    }
    for (reason, new) in &new.reasons {
        let old = old.reasons.get(reason).copied().unwrap_or(0.0);
        if has_grown(old, *new) {
            grown.push(format!(
                "{new:.2} exits for {reason}, and {old:.2} in the reference"
            ));
        }
    }
    grown
}

/// Holds a document against its reference.
pub fn compare(now: &Document, reference: &Document) -> Comparison {
    let mut comparison = Comparison::default();
    let host = &now.host;
    let (counts, counted_then) = (counted(now), counted(reference));
    if counts != counted_then {
        let what = |unit: Option<Unit>| unit.map_or("nothing".to_string(), |unit| unit.to_string());
        let note = format!(
            "{host}: its TSC counts {}, and the reference's {}: nothing is held against it",
            what(counts),
            what(counted_then)
        );
        comparison.notes.push(note);
        comparison.verdicts = vec![Verdict::NotCompared; now.figures.len()];
        return comparison;
    }
    let repeats = matches!(counts, Some(Unit::Instructions | Unit::Ticks));
    for (what, old, new) in [
        ("the kernel", &reference.machine.kernel, &now.machine.kernel),
        (
            "the emulator",
            &reference.machine.emulator,
            &now.machine.emulator,
        ),
        ("the CPU", &reference.machine.cpu, &now.machine.cpu),
    ] {
        if old != new {
            let note = format!("{host}: {what} was {old} and is {new}");
            comparison.notes.push(note);
        }
    }
    if !repeats {
        let note = format!("{host}: nothing repeats here: only what is missing is noticed");
        comparison.notes.push(note);
    }
    let before = by_key(reference);
    for figure in &now.figures {
        let what = name(host, figure.key());
        let Some(old) = before.get(&figure.key()) else {
            let note = format!("{what}: new, without a reference");
            comparison.notes.push(note);
            comparison.verdicts.push(Verdict::New);
            continue;
        };
        if old.unit != figure.unit {
            let wrong = format!("{what}: {} in place of {}", figure.unit, old.unit);
            comparison.wrong.push(wrong);
        }
        if old.unit != figure.unit || !repeats {
            comparison.verdicts.push(Verdict::NotCompared);
            continue;
        }
        let verdict = Verdict::of(old.median, figure.median);
        if has_grown(old, figure) {
            let by = match verdict {
                Verdict::Ratio(ratio) => format!("{:+.1} %", (ratio - 1.0) * 100.0),
                _ => format!("{:+}", figure.median - old.median),
            };
            let wrong = format!(
                "{what}: {} {}, and {} in the reference: {by}",
                figure.median, figure.unit, old.median
            );
            comparison.wrong.push(wrong);
        }
        // Of a figure that is a number of exits, that number is held against the other one.
        if figure.unit != Unit::Exits {
            let grown = grown_exits(old, figure).into_iter();
            comparison
                .wrong
                .extend(grown.map(|grown| format!("{what}: {grown}")));
        }
        comparison.verdicts.push(verdict);
    }
    let after = by_key(now);
    for key in before.keys().filter(|key| !after.contains_key(*key)) {
        let wrong = format!("{}: was not measured", name(host, *key));
        comparison.wrong.push(wrong);
    }
    comparison
}

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use figures::{
        Machine,
        SCHEMA, //
    };

    use super::*;

    fn document(figures: &[(&str, i64, Unit)]) -> Result<Document> {
        let figure = |(name, value, unit): &(&str, i64, Unit)| {
            Figure::new("group", name, "case", *unit, vec![*value])
        };
        Ok(Document {
            schema: SCHEMA,
            host: "host".to_string(),
            machine: Machine {
                kernel: String::new(),
                emulator: String::new(),
                cpu: String::new(),
                cpus: 1,
                vendor: String::new(),
                tsc_khz: 0,
                module: String::new(),
            },
            hooked: Vec::new(),
            figures: figures.iter().map(figure).collect::<Result<_>>()?,
            absent: Vec::new(),
        })
    }

    fn wrong(old: &[(&str, i64, Unit)], new: &[(&str, i64, Unit)]) -> Result<Vec<String>> {
        Ok(compare(&document(new)?, &document(old)?).wrong)
    }

    #[test]
    fn regressions() -> Result<()> {
        let old = [("a", 1000, Unit::Instructions)];
        assert!(wrong(&old, &[("a", 1020, Unit::Instructions)])?.is_empty());
        assert!(wrong(&old, &[("a", 500, Unit::Instructions)])?.is_empty());
        let found = wrong(&old, &[("a", 1021, Unit::Instructions)])?;
        assert_eq!(
            found,
            ["host: group: a, case: 1021 instructions, and 1000 in the reference: +2.1 %"]
        );
        Ok(())
    }

    #[test]
    fn missing_and_new() -> Result<()> {
        let old = [("a", 1, Unit::Instructions), ("b", 1, Unit::Instructions)];
        let new = [("a", 1, Unit::Instructions), ("c", 1, Unit::Instructions)];
        let comparison = compare(&document(&new)?, &document(&old)?);
        assert_eq!(comparison.wrong, ["host: group: b, case: was not measured"]);
        assert_eq!(
            comparison.notes,
            ["host: group: c, case: new, without a reference"]
        );
        Ok(())
    }

    #[test]
    fn cycles_are_no_instructions() -> Result<()> {
        let old = [("a", 1, Unit::Instructions)];
        let comparison = compare(&document(&[("a", 9, Unit::Cycles)])?, &document(&old)?);
        assert!(comparison.wrong.is_empty());
        assert_eq!(comparison.verdicts, [Verdict::NotCompared]);
        Ok(())
    }

    #[test]
    fn nothing_and_less() -> Result<()> {
        let zero = [("a", 0, Unit::Instructions)];
        let less = [("a", -1000, Unit::Instructions)];
        assert!(wrong(&zero, &zero)?.is_empty() && wrong(&less, &less)?.is_empty());
        // None of them may grow by 2 % of what is nothing, or less.
        let found = wrong(&zero, &[("a", 7, Unit::Instructions)])?;
        assert_eq!(
            found,
            ["host: group: a, case: 7 instructions, and 0 in the reference: +7"]
        );
        assert_eq!(wrong(&less, &[("a", -990, Unit::Instructions)])?.len(), 1);
        assert!(wrong(&less, &[("a", -1010, Unit::Instructions)])?.is_empty());
        let comparison = compare(&document(&less)?, &document(&zero)?);
        assert_eq!(comparison.verdicts, [Verdict::Difference(-1000)]);
        Ok(())
    }

    #[test]
    fn beyond_what_it_spreads() -> Result<()> {
        let figure = |unit, low, median, high| -> Result<Figure> {
            Ok(Figure {
                low,
                high,
                ..Figure::new("g", "n", "c", unit, vec![median])?
            })
        };
        let old = figure(Unit::Instructions, 900, 1000, 1100)?;
        assert!(!has_grown(
            &old,
            &figure(Unit::Instructions, 900, 1100, 1200)?
        ));
        assert!(has_grown(
            &old,
            &figure(Unit::Instructions, 900, 1101, 1200)?
        ));
        let old = figure(Unit::Ticks, 900, 1000, 1100)?;
        assert!(!has_grown(&old, &figure(Unit::Ticks, 900, 2000, 2000)?));
        assert!(has_grown(&old, &figure(Unit::Ticks, 1101, 2000, 2000)?));
        let old = figure(Unit::Ticks, 13, 13, 13)?;
        assert!(!has_grown(&old, &figure(Unit::Ticks, 29, 29, 29)?));
        assert!(has_grown(&old, &figure(Unit::Ticks, 30, 30, 30)?));
        Ok(())
    }

    #[test]
    fn exits() -> Result<()> {
        let ticks = [("t", 1, Unit::Ticks)];
        let with = |exits: f64, reasons: &[(&str, f64)]| -> Result<Document> {
            let mut document = document(&ticks)?;
            document.figures[0].exits = Some(exits);
            let reasons = reasons.iter();
            document.figures[0].reasons = reasons
                .map(|(reason, count)| (reason.to_string(), *count))
                .collect();
            Ok(document)
        };
        let old = with(1.0, &[("HLT", 1.0)])?;
        let wrong = |new: &Document| compare(new, &old).wrong;
        assert!(wrong(&with(1.1, &[("HLT", 1.1)])?).is_empty());
        assert_eq!(
            wrong(&with(2.0, &[("HLT", 1.0), ("CPUID", 1.0)])?),
            [
                "host: group: t, case: 2.00 exits, and 1.00 in the reference",
                "host: group: t, case: 1.00 exits for CPUID, and 0.00 in the reference"
            ]
        );
        assert_eq!(wrong(&document(&ticks)?).len(), 2);
        // Numbers of exits are figures, too.
        let one = [("t", 1, Unit::Ticks), ("e", 1, Unit::Exits)];
        let two = [("t", 1, Unit::Ticks), ("e", 2, Unit::Exits)];
        assert_eq!(
            super::compare(&document(&two)?, &document(&one)?)
                .wrong
                .len(),
            1
        );
        Ok(())
    }

    #[test]
    fn missing_where_nothing_repeats() -> Result<()> {
        let old = [("a", 1, Unit::Exits), ("b", 1, Unit::Exits)];
        assert!(wrong(&old, &[("a", 9, Unit::Exits), ("b", 9, Unit::Exits)])?.is_empty());
        assert_eq!(wrong(&old, &[("a", 9, Unit::Exits)])?.len(), 1);
        Ok(())
    }
}
