// SPDX-License-Identifier: GPL-2.0

//! What the command costs that starts, says that there is nothing, and ends; beside bpftool, which
//! does the same.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{
        Command,
        Stdio, //
    }, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use figures::{
    Absent,
    Figure,
    Unit, //
};
use nix::{
    sys::{
        ptrace,
        wait::{
            waitpid,
            WaitStatus, //
        }, //
    },
    unistd::Pid, //
};

use super::{
    tsc,
    unit, //
};

pub const GROUP: &str = "command";

/// What is run. The first one is ours.
const COMMANDS: [&[&str]; 4] = [
    &["exitpolicy", "policy", "list"],
    &["exitpolicy", "--version"],
    &["bpftool", "prog", "list"],
    &["bpftool", "version"],
];

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// From before the process is made until its end is known.
fn took(words: &[&str]) -> Result<i64> {
    let mut command = command(words);
    let start = tsc();
    let status = command.status()?;
    let end = tsc();
    ensure!(status.success(), "{status}");
    Ok(end - start)
}

/// The most memory that it had at once, in KiB. Asked at its end, as what the parent of a process is
/// told is not less than the parent's own.
fn memory(words: &[&str]) -> Result<i64> {
    let mut command = command(words);
    // SAFETY: A plain system call, in the child.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    let child = command.spawn()?;
    let pid = Pid::from_raw(child.id().try_into()?);
    ensure!(
        matches!(waitpid(pid, None)?, WaitStatus::Stopped(..)),
        "it does not stop at its beginning"
    );
    ptrace::setoptions(pid, ptrace::Options::PTRACE_O_TRACEEXIT)?;
    ptrace::cont(pid, None)?;
    loop {
        match waitpid(pid, None)? {
            WaitStatus::PtraceEvent(..) => break,
            WaitStatus::Stopped(_, signal) => ptrace::cont(pid, signal)?,
            other => bail!("it ended unseen: {other:?}"),
        }
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    ptrace::cont(pid, None)?;
    let end = waitpid(pid, None)?;
    ensure!(matches!(end, WaitStatus::Exited(_, 0)), "{end:?}");
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    peak.with_context(|| format!("no VmHWM in {status}"))
}

/// Each command `count` times.
pub fn measure(count: usize) -> Result<(Vec<Figure>, Vec<Absent>)> {
    let (mut figures, mut absent) = (Vec::new(), Vec::new());
    for words in COMMANDS {
        let name = words.join(" ");
        if took(words).is_err_and(|error| is_missing(&error)) {
            absent.push(Absent {
                group: GROUP.to_string(),
                name,
                reason: "it is not installed here".to_string(),
            });
            continue;
        }
        let took = (0..count).map(|_| took(words)).collect::<Result<_>>();
        let took = took.with_context(|| name.clone())?;
        figures.push(Figure::new(GROUP, &name, "start to end", unit()?, took)?);
        let memory = vec![memory(words).with_context(|| name.clone())?];
        figures.push(Figure::new(GROUP, &name, "memory", Unit::Kib, memory)?);
    }
    Ok((figures, absent))
}

fn is_missing(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}
