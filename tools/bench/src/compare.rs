// SPDX-License-Identifier: GPL-2.0

//! What was measured against what was measured before.

use std::collections::BTreeMap;

use figures::{
    Document,
    Figure,
    Key,
    Unit, //
};

/// By how much a count of instructions may grow.
const TOLERANCE: f64 = 0.02;
/// By how many ticks, as well: an emulator with several CPUs lets each of them have so many at a
/// time.
const QUANTUM: f64 = 16.0;

fn is_counted(unit: Unit) -> bool {
    matches!(unit, Unit::Instructions | Unit::Ticks)
}

/// Whether there is something in it that repeats, and can be compared.
pub fn repeats(document: &Document) -> bool {
    let mut figures = document.figures.iter();
    figures.any(|figure| is_counted(figure.unit))
}

/// What became of one figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// The median by the reference's.
    Ratio(f64),
    /// It has no reference.
    New,
    /// It is no count that repeats.
    NotCompared,
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

/// Holds a document against its reference.
pub fn compare(now: &Document, reference: &Document) -> Comparison {
    let mut comparison = Comparison::default();
    let host = &now.host;
    if !repeats(now) || !repeats(reference) {
        let note =
            format!("{host}: not counted in instructions, so not held against the reference");
        comparison.notes.push(note);
        comparison.verdicts = vec![Verdict::NotCompared; now.figures.len()];
        return comparison;
    }
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
    let before = by_key(reference);
    for figure in &now.figures {
        let Some(old) = before.get(&figure.key()) else {
            let note = format!("{}: new, without a reference", name(host, figure.key()));
            comparison.notes.push(note);
            comparison.verdicts.push(Verdict::New);
            continue;
        };
        if old.unit != figure.unit {
            let wrong = format!(
                "{}: {} in place of {}",
                name(host, figure.key()),
                figure.unit,
                old.unit
            );
            comparison.wrong.push(wrong);
        }
        if !is_counted(figure.unit) {
            comparison.verdicts.push(Verdict::NotCompared);
            continue;
        }
        let ratio = figure.median as f64 / old.median as f64;
        let slack = match figure.unit {
            Unit::Ticks => QUANTUM,
            _ => 0.0,
        };
        // What spreads by more than that by itself is worse only if it is so beyond its quarters.
        if figure.median as f64 > old.median as f64 * (1.0 + TOLERANCE) + slack
            && figure.low > old.high
        {
            let wrong = format!(
                "{}: {} {}, and {} in the reference: {:+.1} %",
                name(host, figure.key()),
                figure.median,
                figure.unit,
                old.median,
                (ratio - 1.0) * 100.0
            );
            comparison.wrong.push(wrong);
        }
        comparison.verdicts.push(Verdict::Ratio(ratio));
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
}
