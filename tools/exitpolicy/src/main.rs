// SPDX-License-Identifier: GPL-2.0

//! The command `exitpolicy`.

#![deny(unsafe_op_in_unsafe_fn)]
#![deny(clippy::undocumented_unsafe_blocks)]

mod cli;
mod commands;
mod notes;
mod output;

use anyhow::Context;
use clap::{
    error::ErrorKind,
    Parser, //
};
use cli::Cli;
use commands::LeftOff;
use exitpolicy::Error;
use output::Format;
use std::{
    env,
    ffi::OsString,
    io::{
        self,
        Write, //
    },
    process::ExitCode, //
};

const FAILURE: u8 = 1;
const USAGE: u8 = 2;
const NOT_LOADED: u8 = 3;
const NOT_PERMITTED: u8 = 4;
const ON_THEIR_WAY: u8 = 5;

fn main() -> ExitCode {
    // Someone who reads the first lines and closes the pipe is not an error to report.
    // SAFETY: There is one thread, and the default action needs no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };

    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let format = match (cli.json, cli.pretty) {
        (_, true) => Format::PrettyJson,
        (true, false) => Format::Json,
        (false, false) => Format::Text,
    };
    let written = commands::run(&cli, format).and_then(|answer| {
        if format == Format::Text {
            for note in &answer.notes {
                say(&harmless(&format!("note: {}\n", note.message)));
            }
        }
        let text = match format {
            Format::Text => harmless(&answer.text),
            Format::Json | Format::PrettyJson => answer.text,
        };
        io::stdout()
            .write_all(text.as_bytes())
            .context("cannot write the answer")?;
        Ok(answer.status)
    });
    match written {
        Ok(status) => status,
        Err(error) => report(format, &error),
    }
}

/// Writes to stderr. If that fails, there is nowhere to say so.
fn say(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Text for a terminal, in which a name is nothing but a name: whoever has a cgroup or a process makes
/// names, and a terminal obeys some characters. JSON has its own way for these.
fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            // A path that is copied from here is still one.
            '\n' | '\t' | '\\' | '\'' | '"' => shown.push(letter),
            _ => shown.extend(letter.escape_debug()),
        }
    }
    shown
}

fn report(format: Format, error: &anyhow::Error) -> ExitCode {
    let left_off = error.downcast_ref::<LeftOff>();
    let known = match left_off {
        Some(left_off) => left_off.cause(),
        None => error.downcast_ref::<Error>(),
    };
    let hint = match left_off {
        Some(left_off) => Some(left_off.hint()),
        None => known.and_then(Error::hint),
    };
    let code = match (left_off, known) {
        (_, Some(known)) => known.code(),
        (Some(_), None) => "held",
        (None, None) => "failure",
    };
    let text = format.render_error(
        code,
        &format!("{error:#}"),
        hint.as_deref(),
        left_off.and_then(LeftOff::remaining),
    );
    match format {
        Format::Text => say(&harmless(&text)),
        Format::Json | Format::PrettyJson => say(&text),
    }
    match known {
        Some(Error::NotLoaded { .. }) => NOT_LOADED,
        Some(Error::NotPermitted { .. }) => NOT_PERMITTED,
        _ => FAILURE,
    }
    .into()
}

/// What to do where the command line is no command: help was asked for, or it is wrong.
fn usage(error: &clap::Error) -> ExitCode {
    let wrong = error.use_stderr();
    let missing_command = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    match wanted_json(env::args_os().skip(1)) {
        Some(format) if wrong && !missing_command => {
            let message = error.render().to_string();
            let message = message.trim_end();
            let message = message.strip_prefix("error: ").unwrap_or(message);
            say(&format.render_error("usage", message, None, None));
        }
        _ => drop(error.print()),
    }
    if wrong {
        ExitCode::from(USAGE)
    } else {
        ExitCode::SUCCESS
    }
}

/// Whether a command line that could not be parsed asks for JSON.
fn wanted_json(arguments: impl Iterator<Item = OsString>) -> Option<Format> {
    let mut json = None;
    for argument in arguments.take_while(|argument| argument != "--") {
        let Some(argument) = argument.to_str() else {
            continue;
        };
        let letters = argument
            .strip_prefix('-')
            .filter(|letters| letters.chars().all(|letter| "jp".contains(letter)))
            .unwrap_or_default();
        if argument == "--pretty" || letters.contains('p') {
            return Some(Format::PrettyJson);
        }
        if argument == "--json" || letters.contains('j') {
            json = Some(Format::Json);
        }
    }
    json
}

#[cfg(test)]
mod tests {
    use super::harmless;

    #[test]
    fn names_do_nothing_to_a_terminal() {
        let plain = "/a b/c\\x2dd's\t\"é\"\n";
        assert_eq!(harmless(plain), plain);
        assert_eq!(
            harmless("\u{1b}[2J \u{9b}m \r \u{7f} \u{202e}"),
            r"\u{1b}[2J \u{9b}m \r \u{7f} \u{202e}"
        );
    }
}
