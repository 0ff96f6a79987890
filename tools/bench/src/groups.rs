// SPDX-License-Identifier: GPL-2.0

//! The groups of figures: what is drawn of each.

use std::path::Path;

use anyhow::{
    bail,
    Context,
    Result, //
};
use figures::{
    change,
    decision,
    guest,
    Document,
    Figure,
    Unit, //
};

use crate::picture::{
    draw,
    Bar,
    Panel,
    Plot, //
};

/// A group, by its name, what is said above its figures, and what draws them.
pub struct Kind {
    pub name: &'static str,
    pub title: &'static str,
    draw: fn(&Group<'_>, &Path) -> Result<()>,
}

/// All of them, in the order of the documents about them.
pub const ALL: [Kind; 6] = [
    Kind {
        name: "gain",
        title: "Trapped by KVM, and passed through by a policy",
        draw: gain,
    },
    Kind {
        name: "idle",
        title: "A VM of which the module changes nothing: the same with it and without",
        draw: idle,
    },
    Kind {
        name: "decision",
        title: "A new VM, which is decided on once, when its first vCPU is made",
        draw: new_vm,
    },
    Kind {
        name: "change",
        title: "Changing a VM that runs",
        draw: changed,
    },
    Kind {
        name: "guest",
        title: "A Linux guest: what it exits for",
        draw: linux,
    },
    Kind {
        name: "command",
        title: "The command, and bpftool, with nothing to list",
        draw: command,
    },
];

/// The figures of one group, on one host.
pub fn of<'a>(document: &'a Document, group: &str) -> Vec<&'a Figure> {
    let figures = document.figures.iter();
    figures.filter(|figure| figure.group == group).collect()
}

/// What has a name, in the order in which it was measured.
pub fn distinct<'a>(figures: &[&'a Figure], name: impl Fn(&'a Figure) -> &'a str) -> Vec<&'a str> {
    let mut names = Vec::new();
    for figure in figures {
        let name = name(figure);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

pub fn find<'a>(figures: &[&'a Figure], name: &str, case: &str) -> Option<&'a Figure> {
    let mut figures = figures.iter();
    figures
        .find(|figure| figure.name == name && figure.case == case)
        .copied()
}

/// A figure that must be there.
pub fn need<'a>(figures: &[&'a Figure], name: &str, case: &str) -> Result<&'a Figure> {
    find(figures, name, case).with_context(|| format!("there is no figure '{name}, {case}'"))
}

/// Those of a name that have a number of such things in their cases, by it.
pub fn points<'a>(
    figures: &[&'a Figure],
    name: &str,
    things: &str,
) -> Result<Vec<(u64, &'a Figure)>> {
    let of_name = figures
        .iter()
        .filter(|figure| figure.name == name && figure.case.contains(things));
    let points: Vec<_> = of_name
        .filter_map(|figure| Some((figure.at?, *figure)))
        .collect();
    if points.is_empty() {
        bail!("there is no figure '{name}' by {things}");
    }
    Ok(points)
}

/// "Intel, Bochs 3.0, 2 CPUs", or what it is.
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
        Unit::Exits => "VM exits".to_string(),
        other => other.to_string(),
    }
}

/// In lines that fit below a bar.
fn wrapped(text: &str) -> String {
    const WIDTH: usize = 20;
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
fn clusters(figures: &[&Figure], value: impl Fn(&Figure) -> Option<Bar>) -> Plot {
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

/// The median, with its quarters.
fn median(figure: &Figure) -> Option<Bar> {
    Some(Bar {
        value: figure.median as f64,
        low: figure.low as f64,
        high: figure.high as f64,
    })
}

/// The exits by the instruction itself, and not those that arm a timer or end an interrupt.
fn own_exits(figure: &Figure) -> Option<Bar> {
    figure.own.map(Bar::exactly)
}

/// What there is for a group in some of the documents.
struct Group<'a> {
    kind: &'static Kind,
    hosts: Vec<(&'a Document, Vec<&'a Figure>)>,
}

impl<'a> Group<'a> {
    fn new(kind: &'static Kind, documents: &'a [Document]) -> Option<Self> {
        let hosts: Vec<_> = documents
            .iter()
            .map(|document| (document, of(document, kind.name)))
            .filter(|(_, figures)| !figures.is_empty())
            .collect();
        (!hosts.is_empty()).then_some(Self { kind, hosts })
    }

    fn draw(&self, directory: &Path, panels: &[Panel]) -> Result<()> {
        draw(
            directory,
            self.kind.name,
            self.kind.title,
            &self.note(),
            panels,
        )
    }

    /// What is below its picture: what the values are.
    fn note(&self) -> String {
        let figures = self.hosts.iter().flat_map(|(_, figures)| figures);
        let units: Vec<Unit> = figures.map(|figure| figure.unit).collect();
        let mut note = "Medians; thin lines: from a quarter of the values to three. ".to_string();
        if units.contains(&Unit::Instructions) {
            note += "Instructions that the emulator executed, not time. ";
        }
        if units.contains(&Unit::Ticks) {
            note += "Ticks: its instructions, too, up to two for one, not time. ";
        }
        note + "Linux " + &self.hosts[0].0.machine.kernel
    }
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
            title: "VM exits by the instruction itself, in a run that counting them slows"
                .to_string(),
            y: "exits per operation".to_string(),
            plot: clusters(figures, own_exits),
        });
    }
    group.draw(directory, &panels)
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
    group.draw(directory, &panels)
}

/// What the module adds to making a VM, in all hooked calls together.
pub struct Added {
    pub policies: u64,
    pub median: i64,
    /// The same of first quarters.
    pub low: i64,
}

/// For each number of policies.
pub fn added(figures: &[&Figure]) -> Result<Vec<Added>> {
    let mut together: Vec<Added> = Vec::new();
    for [_, name] in decision::HOOKED {
        for (policies, figure) in points(figures, name, decision::POLICIES)? {
            let (median, low) = (figure.median, figure.low);
            match together.iter_mut().find(|sum| sum.policies == policies) {
                Some(sum) => {
                    sum.median += median;
                    sum.low += low;
                }
                None => together.push(Added {
                    policies,
                    median,
                    low,
                }),
            }
        }
    }
    Ok(together)
}

fn new_vm(group: &Group<'_>, directory: &Path) -> Result<()> {
    let mut panels = Vec::new();
    for (document, figures) in &group.hosts {
        let making = need(figures, decision::WHOLE, decision::ABSENT)?;
        let mut clusters = Vec::new();
        for Added {
            policies: at,
            median: together,
            ..
        } in added(figures)?
        {
            let mut bars = Vec::new();
            for [_, added] in decision::HOOKED {
                let mut points = points(figures, added, decision::POLICIES)?.into_iter();
                let point = points.find(|(other, _)| *other == at);
                bars.push(point.and_then(|(_, figure)| median(figure)));
            }
            bars.push(Some(Bar::exactly(together as f64)));
            bars.push(Some(Bar::exactly((making.median / 100) as f64)));
            clusters.push((format!("{at} {}", decision::POLICIES), bars));
        }
        let series = decision::HOOKED.map(|[_, added]| added).into_iter();
        panels.push(Panel {
            title: format!(
                "What the module adds to making a VM, by policies on the host: {}",
                host(document)
            ),
            y: unit(figures),
            plot: Plot::Bars {
                series: series
                    .chain(["together", "1 % of making the VM"])
                    .map(ToString::to_string)
                    .collect(),
                clusters,
            },
        });
        let resolve = points(figures, decision::RESOLVE, decision::DEPTH)?.into_iter();
        panels.push(Panel {
            title: format!(
                "Looking policies up, by {}: {}",
                decision::RESOLVE,
                host(document)
            ),
            y: unit(figures),
            plot: Plot::Line {
                x: "depth of the cgroup, a policy on each level".to_string(),
                points: resolve
                    .map(|(at, figure)| (at as f64, figure.median as f64))
                    .collect(),
            },
        });
    }
    group.draw(directory, &panels)
}

fn changed(group: &Group<'_>, directory: &Path) -> Result<()> {
    let states = [change::RUNNING, change::NATIVE, change::BLOCKED];
    let mut panels = Vec::new();
    for (document, figures) in &group.hosts {
        let of_names = |names: [String; 3]| -> Vec<&Figure> {
            let figures = figures.iter();
            figures
                .filter(|figure| names.contains(&figure.name))
                .copied()
                .collect()
        };
        let took = of_names(states.map(ToString::to_string));
        panels.push(Panel {
            title: format!(
                "Until every vCPU has it, or has it at its next entry: {}",
                host(document)
            ),
            y: unit(&took),
            plot: clusters(&took, median),
        });
        let exits = of_names(states.map(change::exits));
        panels.push(Panel {
            title: "VM exits of the whole VM meanwhile, its own included".to_string(),
            y: unit(&exits),
            plot: clusters(&exits, median),
        });
    }
    group.draw(directory, &panels)
}

fn command(group: &Group<'_>, directory: &Path) -> Result<()> {
    let mut panels = Vec::new();
    for (document, figures) in &group.hosts {
        let (memory, took): (Vec<&Figure>, Vec<&Figure>) =
            figures.iter().partition(|figure| figure.unit == Unit::Kib);
        for (title, figures) in [("From start to end", took), ("Memory at its end", memory)] {
            // One case each.
            let names = distinct(&figures, |figure| &figure.name);
            let bar = |name: &&str| {
                let figure = figures.iter().find(|figure| figure.name == *name);
                (
                    wrapped(name),
                    vec![figure.and_then(|figure| median(figure))],
                )
            };
            panels.push(Panel {
                title: format!("{title}: {}", host(document)),
                y: unit(&figures),
                plot: Plot::Bars {
                    series: vec![title.to_string()],
                    clusters: names.iter().map(bar).collect(),
                },
            });
        }
    }
    group.draw(directory, &panels)
}

/// A panel for each work: all exits, and those for some reasons.
fn linux(group: &Group<'_>, directory: &Path) -> Result<()> {
    let mut panels = Vec::new();
    for (document, figures) in &group.hosts {
        let cases = distinct(figures, |figure| &figure.case);
        let names = distinct(figures, |figure| &figure.name);
        for work in names.iter().filter(|name| !name.contains(": ")) {
            let prefix = guest::by_reason(work, "");
            let of_work = names.iter().filter_map(|name| {
                let label = match name.strip_prefix(&prefix) {
                    Some(reason) => reason,
                    None => (name == work).then_some("all")?,
                };
                let values = cases
                    .iter()
                    .map(|case| find(figures, name, case).and_then(median));
                Some((label.to_string(), values.collect()))
            });
            panels.push(Panel {
                title: format!("{work}: {}", host(document)),
                y: match work.contains("second") {
                    true => "VM exits per second of the guest".to_string(),
                    false => "VM exits for the work".to_string(),
                },
                plot: Plot::Bars {
                    clusters: of_work.collect(),
                    series: cases.iter().map(ToString::to_string).collect(),
                },
            });
        }
    }
    group.draw(directory, &panels)
}

/// Draws a picture for each group that there is.
pub fn draw_all(documents: &[Document], directory: &Path) -> Result<Vec<&'static str>> {
    let mut drawn = Vec::new();
    for kind in &ALL {
        if let Some(group) = Group::new(kind, documents) {
            (kind.draw)(&group, directory).with_context(|| format!("the group {}", kind.name))?;
            drawn.push(kind.name);
        }
    }
    if drawn.is_empty() {
        bail!("there is nothing to draw");
    }
    Ok(drawn)
}
