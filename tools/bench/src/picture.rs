// SPDX-License-Identifier: GPL-2.0

//! Pictures, by gnuplot: some panels beside and below each other, as SVG and PNG.

use std::{
    fmt::Write as _,
    io::Write as _,
    path::Path,
    process::{
        Command,
        Stdio, //
    }, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};

/// A value, and between what it spreads.
#[derive(Clone, Copy)]
pub struct Bar {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

impl Bar {
    pub fn exactly(value: f64) -> Self {
        Self {
            value,
            low: value,
            high: value,
        }
    }
}

/// What a panel shows.
pub enum Plot {
    /// Bars side by side: what each cluster is called, and a value for each series in it.
    Bars {
        series: Vec<String>,
        clusters: Vec<(String, Vec<Option<Bar>>)>,
    },
    /// Points with a line through them.
    Line { x: String, points: Vec<(f64, f64)> },
}

/// One of the panels of a picture.
pub struct Panel {
    pub title: String,
    /// What the values are, with their unit.
    pub y: String,
    pub plot: Plot,
}

/// Of a picture with one panel beside the other, and of one with two.
const WIDTHS: [usize; 2] = [1000, 1500];
const HEIGHT: usize = 400;
const COLOURS: [&str; 5] = ["#cf5b3f", "#2b8a57", "#3b6fb6", "#b08d2f", "#6f5aa8"];

/// A string of gnuplot's, in which a line may end.
fn quoted(text: &str) -> String {
    let text = text.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{}\"", text.replace('\n', "\\n"))
}

/// A number for people.
fn label(value: f64) -> String {
    if value == value.trunc() {
        format!("{value:.0}")
    } else if value.abs() < 10.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.1}")
    }
}

impl Panel {
    fn script(&self, number: usize, script: &mut String) -> Result<()> {
        writeln!(script, "set title {} noenhanced", quoted(&self.title))?;
        writeln!(script, "set ylabel {} noenhanced", quoted(&self.y))?;
        match &self.plot {
            Plot::Bars { series, clusters } => bars(number, series, clusters, script),
            Plot::Line { x, points } => line(number, x, points, script),
        }
    }
}

fn bars(
    number: usize,
    series: &[String],
    clusters: &[(String, Vec<Option<Bar>>)],
    script: &mut String,
) -> Result<()> {
    let all = || clusters.iter().flat_map(|(_, bars)| bars).flatten();
    // A few whole things have nothing between them.
    let is_whole = all().all(|bar| bar.value == bar.value.trunc() && bar.high < 8.0);
    writeln!(
        script,
        "set ytics nomirror {}",
        if is_whole { "1" } else { "autofreq" }
    )?;
    writeln!(script, "$data{number} << EOD")?;
    for (_, bars) in clusters {
        let columns = bars.iter().map(|bar| match bar {
            Some(bar) => format!(
                "{} {} {} {}",
                bar.value,
                bar.low,
                bar.high,
                label(bar.value)
            ),
            None => "NaN NaN NaN NaN".to_string(),
        });
        writeln!(script, "{}", columns.collect::<Vec<_>>().join(" "))?;
    }
    writeln!(script, "EOD")?;
    let labels: Vec<String> = clusters
        .iter()
        .enumerate()
        .map(|(at, (label, _))| format!("{} {at}", quoted(label)))
        .collect();
    writeln!(
        script,
        "unset xlabel\nset xrange [-0.7:{}]\nset xtics scale 0 nomirror noenhanced ({})\n\
         set style data histograms\nset style histogram errorbars gap 1 linewidth 1\n\
         set style fill solid 0.6\nset bars 0.4 front",
        clusters.len() as f64 - 0.3,
        labels.join(", ")
    )?;
    // With room for the key above the bars, where there is more than one thing to tell apart.
    let (key, room) = match series.len() {
        1 => ("unset key", 0.2),
        more => ("set key", 0.15 + 0.08 * more as f64),
    };
    writeln!(script, "{key}\nset offsets 0, 0, graph {room}, 0")?;
    let mut plots = Vec::new();
    for (index, title) in series.iter().enumerate() {
        let column = 4 * index + 1;
        plots.push(format!(
            "$data{number} using {column}:{}:{} title {} noenhanced linecolor rgb '{}'",
            column + 1,
            column + 2,
            quoted(title),
            COLOURS[index % COLOURS.len()]
        ));
    }
    for index in 0..series.len() {
        // Where gnuplot puts the bar within its cluster.
        let shift =
            (index as f64 - (series.len() as f64 - 1.0) / 2.0) / (series.len() as f64 + 1.0);
        let column = 4 * index + 1;
        // Above the bar and what it spreads to; where it is below the axis, above that.
        plots.push(format!(
            "$data{number} using ($0 + {shift}):(${high} > 0 ? ${high} : 0):{text} with labels \
             offset 0,0.6 font ',8' notitle",
            high = column + 2,
            text = column + 3,
        ));
    }
    writeln!(script, "plot {}", plots.join(", \\\n  "))?;
    Ok(())
}

fn line(number: usize, x: &str, points: &[(f64, f64)], script: &mut String) -> Result<()> {
    writeln!(script, "set xlabel {} noenhanced\nunset key", quoted(x))?;
    let last = points.iter().map(|(x, _)| *x).fold(0.0, f64::max);
    writeln!(script, "$data{number} << EOD")?;
    // What is said of one point must not be where it is said of another one.
    let mut said = f64::NEG_INFINITY;
    for (x, y) in points {
        let is_free = x - said > last / 12.0;
        if is_free {
            said = *x;
        }
        let text = if is_free {
            label(*y)
        } else {
            "\"\"".to_string()
        };
        writeln!(script, "{x} {y} {text}")?;
    }
    writeln!(script, "EOD")?;
    let ticks: Vec<String> = points.iter().map(|(x, _)| format!("\"{x}\" {x}")).collect();
    writeln!(
        script,
        "set xrange [0:{}]\nset xtics nomirror scale 1 ({})\nset ytics nomirror autofreq\n\
         set offsets 0, 0, graph 0.1, 0",
        last * 1.08,
        ticks.join(", ")
    )?;
    writeln!(
        script,
        "plot $data{number} with linespoints pointtype 7 linewidth 2 linecolor rgb '{}' notitle, \
         $data{number} using 1:2:3 with labels offset 0,0.8 font ',9' notitle",
        COLOURS[0]
    )?;
    Ok(())
}

/// Draws DIRECTORY/NAME.svg and .png, with a line of text below.
pub fn draw(directory: &Path, name: &str, title: &str, note: &str, panels: &[Panel]) -> Result<()> {
    for (extension, terminal) in [
        (
            "svg",
            "svg size W,H dynamic background '#ffffff' font 'DejaVu Sans,12'",
        ),
        (
            "png",
            "pngcairo size W,H background '#ffffff' font 'DejaVu Sans,10'",
        ),
    ] {
        let path = directory.join(format!("{name}.{extension}"));
        let columns = if panels.len() % 2 == 0 { 2 } else { 1 };
        let rows = panels.len() / columns;
        let (width, height) = (WIDTHS[columns - 1], HEIGHT * rows + 130);
        let terminal = terminal
            .replace('W', &width.to_string())
            .replace('H', &height.to_string());
        let (across, up) = (
            |pixels: f64| pixels / width as f64,
            |pixels: f64| pixels / height as f64,
        );
        let mut script = String::new();
        writeln!(script, "set terminal {terminal}")?;
        writeln!(script, "set output {}", quoted(&path.display().to_string()))?;
        writeln!(
            script,
            "set multiplot layout {rows},{columns} title {} noenhanced font ',15' offset 0,-0.3 \
             margins screen {},{},{},{} spacing screen {},{}",
            quoted(title),
            across(95.0),
            across(width as f64 - 25.0),
            up(105.0),
            up(height as f64 - 75.0),
            across(105.0),
            up(125.0)
        )?;
        writeln!(
            script,
            "set label 1 {} at screen 0.5,{} center noenhanced font ',10' textcolor rgb '#59636e'",
            quoted(note),
            up(14.0)
        )?;
        // From 0, but for what is less than that.
        writeln!(
            script,
            "set yrange [*<0:*]\nset border 3\nset grid ytics linecolor rgb '#d0d7de'\n\
             set key inside top right vertical width -1\nset format y '%.12g'"
        )?;
        for (number, panel) in panels.iter().enumerate() {
            panel.script(number, &mut script)?;
        }
        writeln!(script, "unset multiplot")?;
        gnuplot(&script).with_context(|| format!("cannot draw {}", path.display()))?;
    }
    Ok(())
}

fn gnuplot(script: &str) -> Result<()> {
    let mut child = Command::new("gnuplot")
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run gnuplot (Debian: gnuplot-nox)")?;
    let mut stdin = child.stdin.take().context("no pipe")?;
    stdin.write_all(script.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "gnuplot: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
