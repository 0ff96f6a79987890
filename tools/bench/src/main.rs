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
        let text = documents.iter().map(page).collect::<String>();
        fs::write(directory.join("README.md"), format!("{PAGE}{text}"))?;
    }
    if let Some(directory) = &options.pictures {
        fs::create_dir_all(directory)?;
        let drawn = groups::draw_all(&documents, directory)?;
        println!("drew {} in {}", drawn.join(", "), directory.display());
    }
    wrong.iter().for_each(|wrong| println!("WRONG: {wrong}"));
    Ok(wrong.is_empty())
}

/// What the references say, for people.
const PAGE: &str = "<!-- SPDX-License-Identifier: GPL-2.0 -->\n\
    # All figures\n\n\
    Written by `tools/bench/run --save`. [What they say](../../Documentation/performance.md).\n";

/// All that was measured on one host, in Markdown.
fn page(document: &Document) -> String {
    let mut table = table(document, None).build();
    table.with(Style::markdown());
    let mut page = format!(
        "\n## {}\n\n{}\n\n{table}\n\n",
        document.host,
        about(document)
    );
    for line in groups::findings(document) {
        page += &format!("- {line}\n");
    }
    page
}

/// On what it was measured.
fn about(document: &Document) -> String {
    let machine = &document.machine;
    format!(
        "{}: {}, {} CPU(s), {} ({} kHz); Linux {}; emulator: {}; kvm_exitpolicy {}",
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
                Verdict::New => "new".to_string(),
                Verdict::NotCompared => "-".to_string(),
            }),
        );
        table.push_record(record);
    }
    table
}

/// Prints all that was measured on one host.
fn show(document: &Document, comparison: Option<&Comparison>) {
    println!("{}", about(document));
    for hooked in &document.hooked {
        println!("hooked: {hooked}");
    }
    let mut table = table(document, comparison).build();
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
