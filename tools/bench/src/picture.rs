// SPDX-License-Identifier: GPL-2.0

//! Pictures, by gnuplot: some panels below each other, as SVG and PNG.

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

/// What a panel shows.
pub enum Plot {
    /// Bars side by side: what each cluster is called, and a value for each series in it.
    Bars {
        series: Vec<String>,
        clusters: Vec<(String, Vec<Option<f64>>)>,
    },
    /// Points with lines: each series with its points.
    Lines {
        x: String,
        /// A logarithmic x axis that has 0, too.
        logarithmic: bool,
        series: Vec<(String, Vec<(f64, f64)>)>,
    },
}

/// One of the panels of a picture.
pub struct Panel {
    pub title: String,
    /// What the values are, with their unit.
    pub y: String,
    pub plot: Plot,
}

const WIDTH: usize = 960;
const HEIGHT: usize = 380;
const COLOURS: [&str; 5] = ["#cf5b3f", "#2b8a57", "#3b6fb6", "#b08d2f", "#6f5aa8"];

/// A string of gnuplot's, in which a line may end.
fn quoted(text: &str) -> String {
    let text = text.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{}\"", text.replace('\n', "\\n"))
}

impl Panel {
    fn script(&self, number: usize, script: &mut String) -> Result<()> {
        writeln!(script, "set title {} noenhanced", quoted(&self.title))?;
        writeln!(script, "set ylabel {} noenhanced", quoted(&self.y))?;
        match &self.plot {
            Plot::Bars { series, clusters } => bars(number, series, clusters, script),
            Plot::Lines {
                x,
                logarithmic,
                series,
            } => lines(number, x, *logarithmic, series, script),
        }
    }
}

fn bars(
    number: usize,
    series: &[String],
    clusters: &[(String, Vec<Option<f64>>)],
    script: &mut String,
) -> Result<()> {
    writeln!(script, "$data{number} << EOD")?;
    for (_, values) in clusters {
        let values = values.iter().map(|value| match value {
            Some(value) => value.to_string(),
            None => "NaN".to_string(),
        });
        writeln!(script, "{}", values.collect::<Vec<_>>().join(" "))?;
    }
    writeln!(script, "EOD")?;
    let labels: Vec<String> = clusters
        .iter()
        .enumerate()
        .map(|(at, (label, _))| format!("{} {at}", quoted(label)))
        .collect();
    writeln!(
        script,
        "unset logscale x\nunset xlabel\nset xrange [*:*]\nset xtics nomirror noenhanced ({})\n\
         set style data histograms\nset style histogram clustered gap 1\nset style fill solid",
        labels.join(", ")
    )?;
    let mut plots = Vec::new();
    for (index, title) in series.iter().enumerate() {
        plots.push(format!(
            "$data{number} using {} title {} noenhanced linecolor rgb '{}'",
            index + 1,
            quoted(title),
            COLOURS[index % COLOURS.len()]
        ));
    }
    for index in 0..series.len() {
        // Where gnuplot puts the bar within its cluster.
        let shift =
            (index as f64 - (series.len() as f64 - 1.0) / 2.0) / (series.len() as f64 + 1.0);
        let column = index + 1;
        plots.push(format!(
            "$data{number} using ($0 + {shift}):{column}:(sprintf(${column} < 10 && ${column} != \
             int(${column}) ? \"%.2f\" : \"%.0f\", ${column})) with labels offset 0,0.6 \
             font ',9' notitle"
        ));
    }
    writeln!(script, "plot {}", plots.join(", \\\n  "))?;
    Ok(())
}

fn lines(
    number: usize,
    x: &str,
    logarithmic: bool,
    series: &[(String, Vec<(f64, f64)>)],
    script: &mut String,
) -> Result<()> {
    writeln!(script, "set xlabel {} noenhanced", quoted(x))?;
    let mut ticks: Vec<f64> = Vec::new();
    // 0 has no logarithm, and stands where a tenth of the least other one would.
    let all = series.iter().flat_map(|(_, points)| points);
    let least = all
        .clone()
        .map(|(x, _)| *x)
        .filter(|x| *x > 0.0)
        .fold(f64::INFINITY, f64::min);
    let place = |x: f64| {
        if logarithmic && x == 0.0 {
            least / 10.0
        } else {
            x
        }
    };
    for (index, (_, points)) in series.iter().enumerate() {
        writeln!(script, "$data{number}_{index} << EOD")?;
        for (x, y) in points {
            writeln!(script, "{} {y}", place(*x))?;
            if !ticks.contains(x) {
                ticks.push(*x);
            }
        }
        writeln!(script, "EOD")?;
    }
    let ticks: Vec<String> = ticks
        .iter()
        .map(|x| format!("\"{x}\" {}", place(*x)))
        .collect();
    writeln!(
        script,
        "{}\nset xtics nomirror ({})\nset offsets graph 0.08, graph 0.08, graph 0.5, 0",
        if logarithmic {
            "set logscale x"
        } else {
            "unset logscale x"
        },
        ticks.join(", ")
    )?;
    let plots: Vec<String> = series
        .iter()
        .enumerate()
        .map(|(index, (title, points))| {
            // Of a straight line, one value says all.
            let is_flat = points.iter().all(|(_, y)| *y == points[0].1);
            let first = if is_flat { points.len() - 1 } else { 0 };
            format!(
                "$data{number}_{index} with linespoints pointtype 7 linewidth 2 linecolor rgb '{}' \
                 title {} noenhanced, $data{number}_{index} every ::{first} \
                 using 1:2:(sprintf(\"%.0f\", $2)) with labels offset 0,0.8 font ',9' notitle",
                COLOURS[index % COLOURS.len()],
                quoted(title)
            )
        })
        .collect();
    writeln!(script, "plot {}", plots.join(", \\\n  "))?;
    writeln!(script, "set offsets 0, 0, graph 0.3, 0")?;
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
        let height = HEIGHT * panels.len() + 110;
        let terminal = terminal
            .replace('W', &WIDTH.to_string())
            .replace('H', &height.to_string());
        let mut script = String::new();
        writeln!(script, "set terminal {terminal}")?;
        writeln!(script, "set output {}", quoted(&path.display().to_string()))?;
        writeln!(script, "set multiplot layout {},1 title {} noenhanced font ',15' offset 0,-0.3 margins screen 0.11,0.97,{},{} spacing screen 0,{}",
            panels.len(), quoted(title), 85.0 / height as f64, 1.0 - 75.0 / height as f64, 100.0 / height as f64)?;
        writeln!(
            script,
            "set label 1 {} at screen 0.5,{} center noenhanced font ',10' textcolor rgb '#59636e'",
            quoted(note),
            14.0 / height as f64
        )?;
        writeln!(
            script,
            "set yrange [0:*]\nset border 3\nset ytics nomirror\nset grid ytics linecolor rgb '#d0d7de'\n\
             set key inside top right vertical width -1\nset format y '%.12g'\nset offsets 0, 0, graph 0.3, 0"
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
