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
    Document,
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
mod picture;

use compare::{
    compare,
    Comparison,
    Verdict, //
};

/// Shows what the benches measured, and fails if a count of instructions has grown by more than 2 %
/// since the references were made, or is missing.
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

fn run(options: &Options) -> Result<bool> {
    let documents: Vec<Document> = options
        .documents
        .iter()
        .map(|path| read(path))
        .collect::<Result<_>>()?;
    let mut wrong = Vec::new();
    for document in &documents {
        let comparison = match &options.reference {
            // What real CPUs count has nothing to be held against.
            Some(directory) if !options.save && compare::repeats(document) => {
                let path = directory.join(format!("{}.json", document.host));
                let reference = read(&path).context("the reference, which --save makes")?;
                Some(compare(document, &reference))
            }
            _ => None,
        };
        show(document, comparison.as_ref());
        if let Some(comparison) = comparison {
            comparison.notes.iter().for_each(|note| println!("{note}"));
            wrong.extend(comparison.wrong);
        }
    }
    if let (Some(directory), true) = (&options.reference, options.save) {
        for document in &documents {
            let path = directory.join(format!("{}.json", document.host));
            let text = serde_json::to_string_pretty(document)? + "\n";
            fs::write(&path, text).with_context(|| path.display().to_string())?;
            println!("{} is the reference from now on", path.display());
        }
    }
    if let Some(directory) = &options.pictures {
        fs::create_dir_all(directory)?;
        let drawn = groups::draw_all(&documents, directory)?;
        println!("drew {} in {}", drawn.join(", "), directory.display());
    }
    wrong.iter().for_each(|wrong| println!("WRONG: {wrong}"));
    Ok(wrong.is_empty())
}

/// Prints all that was measured on one host.
fn show(document: &Document, comparison: Option<&Comparison>) {
    let machine = &document.machine;
    println!(
        "{}: {}, {} CPU(s), {} ({} kHz); Linux {}; emulator: {}; kvm_exitpolicy {}",
        document.host,
        machine.vendor,
        machine.cpus,
        machine.cpu,
        machine.tsc_khz,
        machine.kernel,
        machine.emulator,
        machine.module
    );
    for hooked in &document.hooked {
        println!("hooked: {hooked}");
    }
    let mut table = Builder::default();
    table.push_record([
        "GROUP",
        "WHAT",
        "CASE",
        "MEDIAN",
        "UNIT",
        "QUARTERS",
        "MIN",
        "MAX",
        "N",
        "EXITS",
        "REFERENCE",
    ]);
    for (index, figure) in document.figures.iter().enumerate() {
        let verdict = comparison.map(|comparison| comparison.verdicts[index]);
        table.push_record([
            figure.group.clone(),
            figure.name.clone(),
            figure.case.clone(),
            figure.median.to_string(),
            figure.unit.to_string(),
            format!("{}..{}", figure.low, figure.high),
            figure.min.to_string(),
            figure.max.to_string(),
            figure.repeats.to_string(),
            figure
                .exits
                .map_or("-".to_string(), |exits| format!("{exits:.2}")),
            match verdict {
                Some(Verdict::Ratio(ratio)) => format!("{ratio:.3}"),
                Some(Verdict::New) => "new".to_string(),
                Some(Verdict::NotCompared) | None => "-".to_string(),
            },
        ]);
    }
    let mut table = table.build();
    table.with(Style::empty()).with(Padding::new(0, 2, 0, 0));
    for column in [3, 6, 7, 8, 9, 10] {
        table.modify(Columns::one(column), Alignment::right());
    }
    let text = table.to_string();
    text.lines()
        .for_each(|line| println!("{}", line.trim_end()));
    for absent in &document.absent {
        println!(
            "not measured: {}: {}: {}",
            absent.group, absent.name, absent.reason
        );
    }
    groups::findings(document)
        .iter()
        .for_each(|line| println!("{line}"));
    println!();
}
