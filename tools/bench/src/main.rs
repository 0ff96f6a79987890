// SPDX-License-Identifier: GPL-2.0

//! Shows what the benches measured: a table, what it says of the targets, a comparison with the
//! committed references, and pictures.

use std::{
    collections::BTreeSet,
    fs,
    path::{
        Path,
        PathBuf, //
    },
    process::ExitCode, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};
use clap::Parser;
use figures::{
    Absent,
    Document,
    Figure,
    SCHEMA, //
};
use tabled::{
    builder::Builder,
    settings::{
        object::Columns,
        Alignment,
        Padding,
        Style, //
    }, //
};

mod compare;
mod groups;
mod page;
mod picture;
mod targets;

use compare::{
    compare,
    Comparison,
    Verdict, //
};
use groups::Kind;
use targets::findings;

/// Shows what the benches measured, and fails if a target is missed, or if a figure has grown by
/// more than 2 % since the references were made, or is missing.
#[derive(Parser)]
struct Options {
    /// What exitpolicy-bench printed, each file of one host
    #[arg(required = true)]
    documents: Vec<PathBuf>,
    /// Where the references are, HOST.json each
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// Make what was measured the references, in place of a comparison
    #[arg(long, requires = "reference")]
    save: bool,
    /// Draw into this directory
    #[arg(long, value_name = "DIR")]
    pictures: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("exitpolicy-bench-report: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn read(path: &Path) -> Result<Document> {
    let name = || path.display().to_string();
    let text = fs::read_to_string(path).with_context(name)?;
    let document: Document = serde_json::from_str(&text).with_context(name)?;
    ensure!(
        document.schema == SCHEMA,
        "{}: schema {}, not {SCHEMA}",
        name(),
        document.schema
    );
    let keys: BTreeSet<_> = document.figures.iter().map(|figure| figure.key()).collect();
    ensure!(
        keys.len() == document.figures.len() && !keys.is_empty(),
        "{}: no figures, or one of them twice",
        name()
    );
    Ok(document)
}

/// The references in a directory, but for those of hosts that were measured now.
fn others(directory: &Path, documents: &[Document]) -> Result<Vec<Document>> {
    let mut others = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            let reference = read(&path)?;
            if documents
                .iter()
                .all(|document| document.host != reference.host)
            {
                others.push(reference);
            }
        }
    }
    Ok(others)
}

fn run(options: &Options) -> Result<bool> {
    let mut documents: Vec<Document> = options
        .documents
        .iter()
        .map(|path| read(path))
        .collect::<Result<_>>()?;
    let mut wrong = Vec::new();
    for document in &documents {
        let comparison = match &options.reference {
            Some(directory) if !options.save => {
                let path = directory.join(format!("{}.json", document.host));
                if path.exists() {
                    Some(compare(document, &read(&path)?))
                } else if compare::counts_cycles(document) {
                    // A machine of one's own.
                    None
                } else {
                    let missing = format!(
                        "{}: no {}, which --save makes",
                        document.host,
                        path.display()
                    );
                    wrong.push(missing);
                    None
                }
            }
            _ => None,
        };
        show(document, comparison.as_ref());
        for Kind { name, .. } in &groups::ALL {
            let missed = findings(document, name).wrong.into_iter();
            wrong.extend(missed.map(|missed| format!("{}: {name}: {missed}", document.host)));
        }
        if let Some(comparison) = comparison {
            comparison.notes.iter().for_each(|note| println!("{note}"));
            wrong.extend(comparison.wrong);
        }
    }
    wrong.iter().for_each(|wrong| println!("WRONG: {wrong}"));
    if let (Some(directory), true) = (&options.reference, options.save) {
        // What misses its target is nothing to hold others against.
        if !wrong.is_empty() {
            println!("nothing is saved");
            return Ok(false);
        }
        for document in &documents {
            let path = directory.join(format!("{}.json", document.host));
            let text = serde_json::to_string_pretty(document)? + "\n";
            fs::write(&path, text).with_context(|| path.display().to_string())?;
            println!("{} is the reference from now on", path.display());
        }
        documents.extend(others(directory, &documents)?);
        // The same order, whichever were measured.
        documents.sort_by_key(|document| {
            (
                document.machine.cpus,
                document.machine.vendor != "vmx",
                document.host.clone(),
            )
        });
        fs::write(directory.join("README.md"), page::page(&documents))?;
    }
    if let Some(directory) = &options.pictures {
        fs::create_dir_all(directory)?;
        let drawn = groups::draw_all(&documents, directory)?;
        println!("drew {} in {}", drawn.join(", "), directory.display());
    }
    Ok(wrong.is_empty())
}

/// On what it was measured.
fn about(document: &Document) -> String {
    let machine = &document.machine;
    format!(
        "{}: {}, {} CPU(s), {} ({} kHz); Linux {}; emulator: {}; kvm_exitpolicy, build id {}",
        document.host,
        machine.vendor,
        machine.cpus,
        machine.cpu,
        machine.tsc_khz,
        machine.kernel,
        machine.emulator,
        machine.module
    )
}

/// "HLT 1.00, WRMSR 2.00"
fn reasons(figure: &Figure) -> String {
    let reasons = figure.reasons.iter();
    let reasons: Vec<String> = reasons
        .map(|(reason, count)| format!("{reason} {count:.2}"))
        .collect();
    reasons.join(", ")
}

/// All figures of one host.
fn table(document: &Document, comparison: Option<&Comparison>) -> Builder {
    let mut table = Builder::default();
    let mut heads = vec![
        "GROUP", "WHAT", "CASE", "MEDIAN", "UNIT", "QUARTERS", "MIN", "MAX", "N", "EXITS",
    ];
    heads.extend(comparison.map(|_| "REFERENCE"));
    table.push_record(heads);
    for (index, figure) in document.figures.iter().enumerate() {
        let exits = figure.exits.map(|exits| format!("{exits:.2}"));
        let mut record = vec![
            figure.group.clone(),
            figure.name.clone(),
            figure.case.clone(),
            figure.median.to_string(),
            figure.unit.to_string(),
            format!("{}..{}", figure.low, figure.high),
            figure.min.to_string(),
            figure.max.to_string(),
            figure.repeats.to_string(),
            exits.unwrap_or("-".to_string()),
        ];
        record.extend(
            comparison.map(|comparison| match comparison.verdicts[index] {
                Verdict::Ratio(ratio) => format!("{ratio:.3}"),
                Verdict::Difference(difference) => format!("{difference:+}"),
                Verdict::New => "new".to_string(),
                Verdict::NotCompared => "-".to_string(),
            }),
        );
        table.push_record(record);
    }
    table
}

/// The exits of those figures whose exits were counted by reason.
fn table_of_reasons(document: &Document) -> Option<Builder> {
    let mut table = Builder::default();
    table.push_record(["GROUP", "WHAT", "CASE", "EXITS BY REASON"]);
    let figures = document.figures.iter();
    let counted: Vec<_> = figures
        .filter(|figure| !figure.reasons.is_empty())
        .collect();
    for figure in &counted {
        table.push_record([&figure.group, &figure.name, &figure.case, &reasons(figure)]);
    }
    (!counted.is_empty()).then_some(table)
}

fn print(table: Builder) {
    let mut table = table.build();
    table.with(Style::empty()).with(Padding::new(0, 2, 0, 0));
    for column in [3, 6, 7, 8, 9, 10] {
        if table.count_columns() > 4 {
            table.modify(Columns::one(column), Alignment::right());
        }
    }
    let text = table.to_string();
    text.lines()
        .for_each(|line| println!("{}", line.trim_end()));
}

/// Prints all that was measured on one host.
fn show(document: &Document, comparison: Option<&Comparison>) {
    println!("{}", about(document));
    for hooked in &document.hooked {
        println!("hooked: {hooked}");
    }
    print(table(document, comparison));
    table_of_reasons(document).into_iter().for_each(print);
    for absent in &document.absent {
        println!("{}", not_measured(absent));
    }
    for Kind { name, .. } in &groups::ALL {
        for line in findings(document, name).lines {
            println!("{}: {name}: {line}", document.host);
        }
    }
    println!();
}

fn not_measured(absent: &Absent) -> String {
    format!(
        "not measured: {}: {}: {}",
        absent.group, absent.name, absent.reason
    )
}
