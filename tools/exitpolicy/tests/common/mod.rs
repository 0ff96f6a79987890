// SPDX-License-Identifier: GPL-2.0

//! Runs the command in a directory that stands for `/`.

use std::{
    fs,
    path::Path,
    process::{
        Command,
        Output, //
    },
};

/// What a run came out with.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// The command, with its arguments in one string.
pub fn command(root: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitpolicy"));
    command
        .args(arguments.split_whitespace())
        .env("EXITPOLICY_TEST_ROOT", root);
    command
}

/// Writes a file below `root`, and the directories that it needs.
pub fn write(root: &Path, path: &str, content: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}
