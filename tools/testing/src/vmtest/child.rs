// SPDX-License-Identifier: GPL-2.0

//! A child process that is someone else than the test.

use std::{
    ffi::{
        c_int,
        c_void, //
    },
    fs,
    io,
    os::unix::process::CommandExt,
    process::Command,
    ptr, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};
use nix::{
    mount::{
        mount,
        MsFlags, //
    },
    sched::{
        clone,
        unshare,
        CloneFlags, //
    },
    sys::{
        signal::{
            kill,
            Signal, //
        },
        wait::{
            waitpid,
            WaitStatus, //
        },
    },
    unistd::{
        chroot,
        fork,
        ForkResult,
        Pid, //
    }, //
};

/// A child process that does something at the same time.
pub struct Running(Pid);

impl Running {
    /// Runs `body` in a child process, which says what it found wrong.
    pub fn start(body: impl FnOnce() -> Result<Vec<String>>) -> Result<Self> {
        // SAFETY: This process has one thread: the tests run in the main thread, one at a time.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self(child)),
            ForkResult::Child => {
                let wrong = body().unwrap_or_else(|error| vec![format!("{error:?}")]);
                for line in &wrong {
                    eprintln!("    {line}");
                }
                // SAFETY: Ends the process without running what belongs to the parent, such as
                // the destructors of its cgroups.
                unsafe { libc::_exit(i32::from(!wrong.is_empty())) }
            }
        }
    }

    /// Waits for its end, and fails with what it found wrong.
    pub fn wait(self) -> Result<()> {
        let status = waitpid(self.0, None)?;
        ensure!(
            matches!(status, WaitStatus::Exited(_, 0)),
            "the child found something wrong, see above: {status:?}"
        );
        Ok(())
    }
}

/// Runs `body` in a child process and fails with what it found wrong.
pub fn in_child(body: impl FnOnce() -> Result<Vec<String>>) -> Result<()> {
    Running::start(body)?.wait()
}

/// Runs `body` in a process of its own that has this one's memory and files, and is gone afterwards.
pub fn in_same_memory<T>(body: impl FnOnce() -> T) -> Result<T> {
    let (result, child) = share_memory(body, || {})?;
    waitpid(child, None)?;
    result.context("the process ended before its work")
}

/// A process that executes a program, which is killed when the value goes.
pub struct Program(Pid);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// As [`in_same_memory`], but the process executes a program afterwards.
pub fn in_same_memory_until_exec<T>(
    body: impl FnOnce() -> T,
    program: &mut Command,
) -> Result<(T, Program)> {
    let mut error = None;
    let (result, child) = share_memory(body, || error = Some(program.exec()))?;
    let program = Program(child);
    error.map_or(Ok(()), Err).context("execve")?;
    Ok((
        result.context("the process ended before its work")?,
        program,
    ))
}

/// Runs `body` in a process of its own that has this one's memory and files, and then `end`. Comes
/// back when the process has ended or executes a program.
fn share_memory<T>(body: impl FnOnce() -> T, mut end: impl FnMut()) -> Result<(Option<T>, Pid)> {
    let (mut result, mut body) = (None, Some(body));
    let mut stack = vec![0; 256 << 10];
    let work = Box::new(|| {
        result = body.take().map(|body| body());
        end();
        0
    });
    let flags = CloneFlags::CLONE_VM | CloneFlags::CLONE_FILES | CloneFlags::CLONE_VFORK;
    // SAFETY: This thread, whose thread-local storage it uses, waits until it has ended or has memory
    // of its own.
    let child = unsafe { clone(work, &mut stack, flags, Some(libc::SIGCHLD)) }?;
    Ok((result, child))
}

/// A process that has this one's memory and does nothing, until the value goes.
pub struct Heir {
    process: Pid,
    _stack: Vec<u8>,
}

impl Heir {
    pub fn start() -> Result<Self> {
        /// Needs no thread-local storage, which is this process': no signal is handled, so that there
        /// is no errno to be written.
        extern "C" fn wait(_: *mut c_void) -> c_int {
            loop {
                // SAFETY: Takes no pointer.
                unsafe { libc::syscall(libc::SYS_pause) };
            }
        }

        let mut stack = vec![0; 16 << 10];
        let top = stack.as_mut_ptr_range().end;
        let flags = libc::CLONE_VM | libc::SIGCHLD;
        // SAFETY: The stack is there until the process has ended. `vec!` aligns what is this large.
        let process = unsafe { libc::clone(wait, top.cast(), flags, ptr::null_mut()) };
        ensure!(process > 0, "clone: {}", io::Error::last_os_error());
        Ok(Self {
            process: Pid::from_raw(process),
            _stack: stack,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.process.as_raw()
    }
}

impl Drop for Heir {
    fn drop(&mut self) {
        let _ = kill(self.process, Signal::SIGKILL);
        let _ = waitpid(self.process, None);
    }
}

/// Nobody may make a user namespace whose root directory is not that of the mount namespace, and
/// the amd host runs commands in a chroot. Moves that root to where the real one is.
pub fn leave_chroot() -> Result<()> {
    let identity = |path: &str| -> Result<(u64, u64)> {
        use std::os::unix::fs::MetadataExt;
        let metadata = fs::metadata(path)?;
        Ok((metadata.dev(), metadata.ino()))
    };
    if identity("/")? == identity("/proc/1/root/")? {
        return Ok(());
    }
    std::env::set_current_dir("/")?;
    chroot("/proc/1/root")?;
    // Only now: the root directory and the current one go along into the new namespace.
    unshare(CloneFlags::CLONE_NEWNS)?;
    let flags = MsFlags::MS_MOVE;
    mount(Some("."), "/", None::<&str>, flags, None::<&str>)?;
    Ok(chroot(".")?)
}
