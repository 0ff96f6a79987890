// SPDX-License-Identifier: GPL-2.0

//! What the references say, for people, in Markdown.

use figures::{
    Document,
    Figure, //
};
use tabled::{
    builder::Builder,
    settings::Style, //
};

use crate::{
    about,
    groups::{
        self,
        distinct,
        find,
        of,
        Kind, //
    },
    not_measured,
    table,
    table_of_reasons,
    targets::findings, //
};

const HEAD: &str = "<!-- SPDX-License-Identifier: GPL-2.0 -->\n\
    # All figures\n\n\
    Written by `tools/bench/run --save`, from the files beside it. \
    [What they say](../../Documentation/performance.md).\n\n\
    Medians; behind one that spreads by more than 2 %, a quarter of the values is less than the first number, and \
    a quarter more than the second.\n";

/// All that was measured: each group, then each host.
pub fn page(documents: &[Document]) -> String {
    let mut page = HEAD.to_string();
    for Kind { name, title, .. } in &groups::ALL {
        let hosts: Vec<_> = documents
            .iter()
            .map(|document| (document, of(document, name)))
            .filter(|(_, figures)| !figures.is_empty())
            .collect();
        if hosts.is_empty() {
            continue;
        }
        page += &format!("\n## {name}\n\n{title}.\n\n![{title}]({name}.svg)\n");
        for (document, figures) in hosts {
            page += &format!("\n{}", markdown(by_case(&document.host, &figures)));
            for line in findings(document, name).lines {
                page += &format!("- {line}\n");
            }
            let absent = document
                .absent
                .iter()
                .filter(|absent| absent.group == *name);
            for absent in absent {
                page += &format!("- {}\n", not_measured(absent));
            }
        }
    }
    for document in documents {
        page += &format!("\n## {}\n\n{}\n\n", document.host, about(document));
        page += "Hooked, and nothing else:";
        for hooked in &document.hooked {
            page += &format!(" `{hooked}`");
        }
        page += &format!("\n\n{}", markdown(table(document, None)));
        if let Some(reasons) = table_of_reasons(document) {
            page += &format!("\n{}", markdown(reasons));
        }
    }
    page
}

fn markdown(table: Builder) -> String {
    format!("{}\n\n", table.build().with(Style::markdown()))
}

/// A line for each name, and a column for each case.
fn by_case(host: &str, figures: &[&Figure]) -> Builder {
    let cases = distinct(figures, |figure| &figure.case);
    let mut table = Builder::default();
    table.push_record([host, "unit"].into_iter().chain(cases.iter().copied()));
    for name in distinct(figures, |figure| &figure.name) {
        let mut units = figures.iter().filter(|figure| figure.name == name);
        let unit = units.next().map(|figure| figure.unit.to_string());
        let mut record = vec![name.to_string(), unit.unwrap_or_default()];
        for case in &cases {
            record.push(find(figures, name, case).map(cell).unwrap_or_default());
        }
        table.push_record(record);
    }
    table
}

/// A figure in short.
fn cell(figure: &Figure) -> String {
    let mut cell = grouped(figure.median);
    if (figure.high - figure.low).abs() * 50 > figure.median.abs() {
        cell += &format!(" ({} to {})", grouped(figure.low), grouped(figure.high));
    }
    cell
}

/// A number with commas.
fn grouped(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if number < 0 {
        grouped.insert(0, '-');
    }
    grouped
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn commas() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(-999), "-999");
        assert_eq!(grouped(1000), "1,000");
        assert_eq!(grouped(-12_345_678), "-12,345,678");
        assert_eq!(numbers("1,234, 0,100,10000 and 12"), ["1,234"]);
    }

    /// Numbers with commas where they belong.
    fn numbers(text: &str) -> Vec<&str> {
        let words = text.split(|c: char| !c.is_ascii_digit() && c != ',');
        let words = words.map(|word| word.trim_matches(','));
        let is_grouped =
            |word: &&str| word.contains(',') && word.split(',').skip(1).all(|part| part.len() == 3);
        words.filter(is_grouped).collect()
    }

    /// What people are told is what was measured.
    #[test]
    fn documents_have_the_figures_of_the_references() {
        let read = |file: &str| {
            let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../");
            fs::read_to_string(format!("{root}{file}")).expect("a file of the checkout")
        };
        let page = read("bench/results/README.md").replace(',', "");
        let said = read("Documentation/performance.md");
        for number in numbers(&said) {
            let digits = number.replace(',', "");
            let is_there = page
                .split(|c: char| !c.is_ascii_digit())
                .any(|word| word == digits);
            assert!(is_there, "{number} is not in bench/results/README.md");
        }
    }
}
