// SPDX-License-Identifier: GPL-2.0

//! Writes the man pages: `cargo run --example man -- DIRECTORY`.
//!
//! They are made of the help texts. In what comes after the options, a line of capitals begins a
//! section and indented lines are kept as they are.

#[path = "../src/cli.rs"]
mod cli;

use clap::CommandFactory;
use clap_mangen::{
    roff::{
        roman,
        Roff, //
    },
    Man, //
};
use std::{
    env,
    fs,
    io,
    path::Path, //
};

const JSON: &str = include_str!("../man/json.txt");

fn main() -> io::Result<()> {
    let Some(directory) = env::args_os().nth(1) else {
        eprintln!("usage: man DIRECTORY");
        std::process::exit(2);
    };
    let directory = Path::new(&directory);
    fs::create_dir_all(directory)?;
    let mut root = cli::Cli::command().disable_help_subcommand(true);
    root.build();
    write(directory, &root)
}

/// Writes the page of a command and those of its subcommands.
fn write(directory: &Path, command: &clap::Command) -> io::Result<()> {
    // With dashes, as in "exitpolicy-policy-set".
    let name = command.get_display_name().unwrap_or(command.get_name());
    let title = name.to_uppercase();
    let version = format!("exitpolicy {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone())
        .title(&title)
        .section("1")
        .source(&version)
        .manual("exitpolicy");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(text) = command.get_after_long_help() {
        let text = text.to_string();
        let (before, see_also) = text
            .split_once("SEE ALSO\n")
            .unwrap_or((&text, "  exitpolicy(1)"));
        let mut roff = Roff::new();
        sections(&mut roff, before);
        if name == "exitpolicy" {
            // Its first line is about the licence.
            sections(
                &mut roff,
                JSON.split_once('\n').map_or(JSON, |(_, text)| text),
            );
        }
        roff.control("SH", ["SEE ALSO"]);
        roff.text([roman(
            see_also.split_whitespace().collect::<Vec<_>>().join(" "),
        )]);
        roff.to_writer(&mut page)?;
    }
    fs::write(directory.join(format!("{name}.1")), page)?;

    for subcommand in command.get_subcommands() {
        write(directory, subcommand)?;
    }
    Ok(())
}

fn sections(roff: &mut Roff, text: &str) {
    let mut literal = false;
    for line in text.lines() {
        let indented = line.starts_with(' ');
        if indented != literal && !line.is_empty() {
            roff.control(if indented { "nf" } else { "fi" }, []);
            literal = indented;
        }
        if line.is_empty() {
            roff.control("sp", []);
        } else if !indented
            && line
                .chars()
                .all(|letter| letter.is_uppercase() || letter == ' ')
        {
            roff.control("SH", [line]);
        } else {
            roff.text([roman(line)]);
        }
    }
    if literal {
        roff.control("fi", []);
    }
}
