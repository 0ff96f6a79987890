// SPDX-License-Identifier: GPL-2.0

//! What each group's figures say together: a few lines, and a picture.

use std::{
    collections::BTreeSet,
    path::Path, //
};

use anyhow::{
    anyhow,
    bail,
    Context,
    Result, //
};
use figures::{
    Document,
    Figure,
    Unit, //
};

use crate::picture::{
    draw,
    Panel,
    Plot, //
};

/// The figures of one group, on one host.
fn of<'a>(document: &'a Document, group: &str) -> Vec<&'a Figure> {
    let figures = document.figures.iter();
    figures.filter(|figure| figure.group == group).collect()
}

/// What has a name, in the order in which it was measured.
fn distinct<'a>(figures: &[&'a Figure], name: impl Fn(&'a Figure) -> &'a str) -> Vec<&'a str> {
    let mut names = Vec::new();
    for figure in figures {
        let name = name(figure);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn find<'a>(figures: &[&'a Figure], name: &str, case: &str) -> Option<&'a Figure> {
    let mut figures = figures.iter();
    figures
        .find(|figure| figure.name == name && figure.case == case)
        .copied()
}

/// "Intel (Haswell, Bochs 3.0, 2 CPUs)", or what it is.
fn host(document: &Document) -> String {
    let machine = &document.machine;
    let vendor = match machine.vendor.as_str() {
        "vmx" => "Intel",
        "svm" => "AMD",
        other => other,
    };
    let on = match machine.emulator.as_str() {
        "none" => machine.cpu.clone(),
        emulator => emulator.to_string(),
    };
    let cpus = match machine.cpus {
        1 => "1 CPU".to_string(),
        cpus => format!("{cpus} CPUs"),
    };
    format!("{vendor}, {on}, {cpus}")
}

/// What the values of some figures are, for an axis.
fn unit(figures: &[&Figure]) -> String {
    let what = figures
        .first()
        .map_or(Unit::Instructions, |figure| figure.unit);
    match what {
        Unit::Instructions => "emulated instructions".to_string(),
        Unit::Ticks => "ticks of the emulator".to_string(),
        other => other.to_string(),
    }
}

/// What is below a picture.
fn note(documents: &[&Document], figures: &[&Figure]) -> String {
    let kernel = documents
        .first()
        .map_or("", |document| &document.machine.kernel);
    let kind = match figures.first().map(|figure| figure.unit) {
        Some(Unit::Instructions | Unit::Ticks) => {
            "Instructions that the emulator executed (ticks: up to two for one), not time: "
        }
        _ => "",
    };
    format!("{kind}median, less is better. Linux {kernel}.")
}

/// In lines that fit below a bar.
fn wrapped(text: &str) -> String {
    const WIDTH: usize = 15;
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.len() + word.len() < WIDTH => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_string()),
        }
    }
    lines.join("\n")
}

/// Bars for each name, and one of them for each case.
fn clusters(figures: &[&Figure], value: impl Fn(&Figure) -> Option<f64>) -> Plot {
    let names = distinct(figures, |figure| &figure.name);
    let cases = distinct(figures, |figure| &figure.case);
    let of_name = |name: &&str| {
        let values = cases
            .iter()
            .map(|case| find(figures, name, case).and_then(&value));
        (wrapped(name), values.collect())
    };
    Plot::Bars {
        clusters: names.iter().map(of_name).collect(),
        series: cases.iter().map(|case| case.to_string()).collect(),
    }
}

/// What there is for a group in some of the documents.
struct Group<'a> {
    name: &'static str,
    hosts: Vec<(&'a Document, Vec<&'a Figure>)>,
}

impl<'a> Group<'a> {
    fn new(name: &'static str, documents: &'a [Document]) -> Option<Self> {
        let hosts: Vec<_> = documents
            .iter()
            .map(|document| (document, of(document, name)))
            .filter(|(_, figures)| !figures.is_empty())
            .collect();
        (!hosts.is_empty()).then_some(Self { name, hosts })
    }

    fn draw(&self, directory: &Path, title: &str, panels: &[Panel]) -> Result<()> {
        let documents: Vec<_> = self.hosts.iter().map(|(document, _)| *document).collect();
        let note = note(&documents, &self.hosts[0].1);
        draw(directory, self.name, title, &note, panels)
    }
}

fn median(figure: &Figure) -> Option<f64> {
    Some(figure.median as f64)
}

/// The exits by the instruction itself, and not those that arm a timer or end an interrupt: of all
/// exits, as many as there were by reason in the run that counted these, and was slower for that.
fn own_exits(figure: &Figure) -> Option<f64> {
    let reasons: &[&str] = match figure.name.as_str() {
        name if name.contains("HLT") => &["HLT"],
        name if name.contains("MWAIT") => &["MONITOR", "MWAIT"],
        name if name.contains("PAUSE") => &["PAUSE"],
        name if name.contains("read of") => &["RDMSR", "MSR"],
        _ => return None,
    };
    let own: f64 = reasons
        .iter()
        .filter_map(|reason| figure.reasons.get(*reason))
        .sum();
    let all: f64 = figure.reasons.values().sum();
    if own == 0.0 {
        return Some(0.0);
    }
    Some(figure.exits? * own / all)
}

fn gain(group: &Group<'_>, directory: &Path) -> Result<()> {
    let mut panels = Vec::new();
    for (document, figures) in &group.hosts {
        panels.push(Panel {
            title: format!("What it costs the guest: {}", host(document)),
            y: unit(figures),
            plot: clusters(figures, median),
        });
        panels.push(Panel {
            title: format!("VM exits by the instruction itself: {}", host(document)),
            y: "exits per operation".to_string(),
            plot: clusters(figures, own_exits),
        });
    }
    let title = "Trapped by KVM, and passed through by a policy";
    group.draw(directory, title, &panels)
}

fn idle(group: &Group<'_>, directory: &Path) -> Result<()> {
    let panels: Vec<Panel> = group
        .hosts
        .iter()
        .map(|(document, figures)| Panel {
            title: host(document),
            y: unit(figures),
            plot: clusters(figures, median),
        })
        .collect();
    let title = "A VM of which the module changes nothing: the same with it and without";
    group.draw(directory, title, &panels)
}

/// Figures of a name that have a number in their cases, by it.
fn points(figures: &[&Figure], name: &str) -> Vec<(f64, f64)> {
    let of_name = figures.iter().filter(|figure| figure.name == name);
    of_name
        .filter_map(|figure| Some((figure.at? as f64, figure.median as f64)))
        .collect()
}

/// That of making a VM, of the ioctl, of what workers do, of the decision, and of looking it up.
fn names_of_decision<'a>(figures: &[&'a Figure]) -> Result<[&'a str; 5]> {
    let names = distinct(figures, |figure| &figure.name);
    let others = |names| anyhow!("the figures of a decision are others: {names:?}");
    names.try_into().map_err(others)
}

fn decision(group: &Group<'_>, directory: &Path) -> Result<()> {
    let mut panels = Vec::new();
    for (document, figures) in &group.hosts {
        let [whole, _, _, decision, resolve] = names_of_decision(figures)?;
        let creation = find(figures, whole, "absent").context("no VMs without the module")?;
        let decided = points(figures, decision);
        let percent = decided
            .iter()
            .map(|(x, _)| (*x, creation.median as f64 / 100.0))
            .collect();
        panels.push(Panel {
            title: format!("Added to the first KVM_CREATE_VCPU: {}", host(document)),
            y: unit(figures),
            plot: Plot::Lines {
                x: "policies on the host".to_string(),
                logarithmic: true,
                series: vec![
                    ("the decision".to_string(), decided),
                    ("1 % of making a VM".to_string(), percent),
                ],
            },
        });
        panels.push(Panel {
            title: format!("Looking policies up, by a call: {}", host(document)),
            y: unit(figures),
            plot: Plot::Lines {
                x: "depth of the cgroup, a policy on each level".to_string(),
                logarithmic: false,
                series: vec![(resolve.to_string(), points(figures, resolve))],
            },
        });
    }
    let title = "The decision about a new VM: once, when its first vCPU is made";
    group.draw(directory, title, &panels)
}

fn change(group: &Group<'_>, directory: &Path) -> Result<()> {
    let mut panels = Vec::new();
    for (document, figures) in &group.hosts {
        let (exits, took): (Vec<&Figure>, Vec<&Figure>) = figures
            .iter()
            .partition(|figure| figure.unit == Unit::Exits);
        for (title, y, figures) in [
            (
                "Until every vCPU has it, or has it at its next entry",
                unit(&took),
                took,
            ),
            (
                "VM exits of the whole VM meanwhile",
                "exits".to_string(),
                exits,
            ),
        ] {
            panels.push(Panel {
                title: format!("{title}: {}", host(document)),
                y,
                plot: clusters(&figures, median),
            });
        }
    }
    group.draw(directory, "Changing a VM that runs", &panels)
}

fn command(group: &Group<'_>, directory: &Path) -> Result<()> {
    let mut panels = Vec::new();
    for (document, figures) in &group.hosts {
        let (memory, took): (Vec<&Figure>, Vec<&Figure>) =
            figures.iter().partition(|figure| figure.unit == Unit::Kib);
        for (title, figures) in [("From start to end", took), ("Memory at its peak", memory)] {
            panels.push(Panel {
                title: format!("{title}: {}", host(document)),
                y: unit(&figures),
                plot: clusters(&figures, median),
            });
        }
    }
    let title = "The command, and bpftool, with nothing to list";
    group.draw(directory, title, &panels)
}

/// Exits by reason, a panel for each work: what it is about is which of them go, and how many come.
fn guest(group: &Group<'_>, directory: &Path) -> Result<()> {
    let mut panels = Vec::new();
    for (document, figures) in &group.hosts {
        let cases = distinct(figures, |figure| &figure.case);
        for name in distinct(figures, |figure| &figure.name) {
            let of_name: Vec<_> = figures
                .iter()
                .filter(|figure| figure.name == name)
                .collect();
            let reasons: BTreeSet<_> = of_name.iter().flat_map(|f| f.reasons.keys()).collect();
            let count = |reason: &str, case: &str| {
                let mut figures = of_name.iter();
                let figure = figures.find(|figure| figure.case == case)?;
                Some(figure.reasons.get(reason).copied().unwrap_or(0.0))
            };
            let cluster = |reason: &String| {
                let values = cases.iter().map(|case| count(reason, case)).collect();
                (reason.clone(), values)
            };
            panels.push(Panel {
                title: format!("{name}: {}", host(document)),
                y: "VM exits".to_string(),
                plot: Plot::Bars {
                    clusters: reasons.into_iter().map(cluster).collect(),
                    series: cases.iter().map(ToString::to_string).collect(),
                },
            });
        }
    }
    let title = "A Linux guest: what it exits for";
    group.draw(directory, title, &panels)
}

/// Draws a picture for each group that there is.
pub fn draw_all(documents: &[Document], directory: &Path) -> Result<Vec<&'static str>> {
    type Draw = fn(&Group<'_>, &Path) -> Result<()>;
    let all: [(&'static str, Draw); 6] = [
        ("gain", gain),
        ("idle", idle),
        ("decision", decision),
        ("change", change),
        ("command", command),
        ("guest", guest),
    ];
    let mut drawn = Vec::new();
    for (name, draw) in all {
        if let Some(group) = Group::new(name, documents) {
            draw(&group, directory)?;
            drawn.push(name);
        }
    }
    if drawn.is_empty() {
        bail!("there is nothing to draw");
    }
    Ok(drawn)
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

/// What the targets of the groups say about these figures.
pub fn findings(document: &Document) -> Vec<String> {
    let mut lines = Vec::new();
    let host = &document.host;
    let idle = of(document, "idle");
    for name in distinct(&idle, |figure| &figure.name) {
        let Some(absent) = find(&idle, name, "absent") else {
            continue;
        };
        for figure in idle.iter().filter(|figure| figure.name == name) {
            if figure.case != "absent" {
                let ratio = figure.median as f64 / absent.median as f64;
                lines.push(format!(
                    "{host}: {name}, {}: {ratio:.3} of what it is without the module",
                    figure.case
                ));
            }
        }
    }
    let decision = of(document, "decision");
    if let Ok([whole, _, workers, decided, resolve]) = names_of_decision(&decision) {
        if let Some(creation) = find(&decision, whole, "absent") {
            for (policies, cost) in points(&decision, decided) {
                lines.push(format!(
                    "{host}: a decision, {policies} policies: {cost} {}, {:.2} % of making a VM",
                    creation.unit,
                    100.0 * cost / creation.median as f64
                ));
            }
        }
        if let Some(absent) = find(&decision, workers, "absent") {
            for (policies, cost) in points(&decision, workers) {
                lines.push(format!(
                    "{host}: {workers}, {policies} policies: {} {} more than without the module",
                    cost - absent.median as f64,
                    absent.unit
                ));
            }
        }
        if let Some((_, slope)) = line(&points(&decision, resolve)) {
            lines.push(format!(
                "{host}: {resolve}, for each level: {slope:.0} more"
            ));
        }
    }
    lines
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
}
