// SPDX-License-Identifier: GPL-2.0

//! Command lines, with NUL between the arguments.

#![no_main]

use clap::Parser;
use libfuzzer_sys::fuzz_target;
use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt, //
};

#[allow(dead_code)]
#[path = "../../src/cli.rs"]
mod cli;

fuzz_target!(|line: &[u8]| {
    let arguments = line.split(|byte| *byte == 0).map(OsStr::from_bytes);
    let command = OsStr::new("exitpolicy");
    match cli::Cli::try_parse_from(std::iter::once(command).chain(arguments)) {
        Ok(cli) => drop(format!("{cli:?}")),
        // The message is what people see.
        Err(error) => assert!(!error.render().to_string().is_empty()),
    }
});
