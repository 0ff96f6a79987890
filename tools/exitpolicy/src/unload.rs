// SPDX-License-Identifier: GPL-2.0

//! Removing the module from the kernel.

use crate::{
    Error,
    Host, //
};
use rustix::{
    io::Errno,
    system::delete_module, //
};
use std::{
    fmt,
    fs,
    path::{
        Path,
        PathBuf, //
    }, //
};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its name, as in /proc/PID/comm.
    pub name: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.pid)
    }
}

/// Says whether the kernel lets modules go at all, before anything is done for it.
///
/// # Errors
///
/// [`Error::NotRemovable`].
pub fn is_possible(host: &Host) -> Result<(), Error> {
    match host.read("/proc/sys/kernel/modules_disabled").as_deref() {
        Ok("1") => Err(Error::NotRemovable {
            found: "the kernel takes no module in or out any more (kernel.modules_disabled is 1)",
        }),
        _ => Ok(()),
    }
}

/// Removes the module, if nobody uses it. A [`Device`](crate::Device) that is open is a use. That
/// it is gone already is as good.
///
/// # Errors
///
/// [`Error::InUse`], [`Error::NotPermitted`], [`Error::NotRemovable`].
pub fn remove(host: &Host) -> Result<(), Error> {
    // What `rmmod` passes: the kernel is not to wait.
    match delete_module(c"kvm_exitpolicy", libc::O_NONBLOCK) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::AGAIN) => Err(Error::InUse {
            processes: users(host),
            references: references(host),
        }),
        Err(Errno::BUSY) => Err(Error::NotRemovable {
            found: "the kernel says that it is being loaded or removed, or stays for ever",
        }),
        Err(errno) => Err(Error::new("unload kvm_exitpolicy".into(), errno)),
    }
}

fn references(host: &Host) -> Option<u64> {
    let count = host.read("/sys/module/kvm_exitpolicy/refcnt").ok()?;
    count.parse().ok()
}

/// Those that have the device open, as far as may be seen, without this process: it may have been
/// handed the device by one of them, and ends anyway.
fn users(host: &Host) -> Vec<Process> {
    let mut users: Vec<_> = entries(&host.path("/proc"))
        .into_iter()
        .filter_map(|directory| {
            let pid = directory.file_name()?.to_str()?.parse().ok()?;
            let is_other = pid != std::process::id();
            (is_other && has_open(&directory.join("fd"))).then(|| Process {
                pid,
                name: host
                    .read(Path::new("/proc").join(pid.to_string()).join("comm"))
                    .unwrap_or_else(|_| "?".into()),
            })
        })
        .collect();
    users.sort_by_key(|process| process.pid);
    users
}

fn has_open(descriptors: &Path) -> bool {
    entries(descriptors).iter().any(|descriptor| {
        fs::read_link(descriptor).is_ok_and(|target| target == Path::new("/dev/exitpolicy"))
    })
}

/// What is in a directory that may go at any time.
fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn who_has_the_device_open_is_found() {
        let root = tempfile::tempdir().unwrap();
        let proc = root.path().join("proc");
        for (pid, name, opened) in [
            ("412", "tracer\n", "/dev/exitpolicy"),
            ("77", "qemu\n", "/dev/kvm"),
            ("99", "watch\n", "/dev/exitpolicy"),
            ("self", "watch\n", "/dev/exitpolicy"),
        ] {
            fs::create_dir_all(proc.join(pid).join("fd")).unwrap();
            fs::write(proc.join(pid).join("comm"), name).unwrap();
            symlink("/dev/null", proc.join(pid).join("fd/0")).unwrap();
            symlink(opened, proc.join(pid).join("fd/3")).unwrap();
        }
        let users = users(&Host::new(root.path()));
        let users: Vec<_> = users.iter().map(ToString::to_string).collect();
        assert_eq!(users, ["watch (99)", "tracer (412)"]);
    }

    #[test]
    fn a_kernel_that_keeps_its_modules_is_seen() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path());
        assert_eq!(is_possible(&host), Ok(()));
        let folder = root.path().join("proc/sys/kernel");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("modules_disabled"), "1\n").unwrap();
        assert_eq!(is_possible(&host).unwrap_err().code(), "not_removable");
    }
}
