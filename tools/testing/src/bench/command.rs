// SPDX-License-Identifier: GPL-2.0

//! What the command costs that starts, says that there is nothing, and ends; beside bpftool, which
//! does the same.

use std::{
    fs,
    io,
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

const OURS: &str = "exitpolicy";

/// What is run.
const COMMANDS: [&[&str]; 4] = [
    &[OURS, "policy", "list"],
    &[OURS, "--version"],
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

/// The memory that it has at its end, in KiB, page by page: what the kernel counts meanwhile, and
/// tells the parent, is some tens of pages off.
fn memory(words: &[&str]) -> Result<i64> {
    let mut command = command(words);
    // SAFETY: Plain system calls, in the child.
    unsafe {
        command.pre_exec(|| {
            ptrace::traceme()?;
            // Where things are in memory decides how many pages are needed for them, and is chance.
            match libc::personality(libc::ADDR_NO_RANDOMIZE as _) {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        })
    };
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
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    ptrace::cont(pid, None)?;
    let end = waitpid(pid, None)?;
    ensure!(matches!(end, WaitStatus::Exited(_, 0)), "{end:?}");
    let resident = maps
        .lines()
        .find_map(|line| line.strip_prefix("Rss:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    resident.with_context(|| format!("no Rss in {maps}"))
}

/// Each command `count` times.
pub fn measure(count: usize) -> Result<(Vec<Figure>, Vec<Absent>)> {
    let (mut figures, mut absent) = (Vec::new(), Vec::new());
    for words in COMMANDS {
        let name = words.join(" ");
        // What is held against it may not be there, but not what it is about.
        if words[0] != OURS && took(words).is_err_and(|error| is_missing(&error)) {
            let reason = "it is not installed here".to_string();
            absent.push(Absent::new(GROUP, &name, reason));
            continue;
        }
        let took = (0..count).map(|_| took(words)).collect::<Result<_>>();
        let took = took.with_context(|| name.clone())?;
        figures.push(Figure::new(GROUP, &name, "start to end", unit()?, took)?);
        let memory = (0..count).map(|_| memory(words)).collect::<Result<_>>();
        let memory = memory.with_context(|| name.clone())?;
        figures.push(Figure::new(
            GROUP,
            &name,
            "memory at its end",
            Unit::Kib,
            memory,
        )?);
    }
    Ok((figures, absent))
}

fn is_missing(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}
