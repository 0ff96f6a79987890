// SPDX-License-Identifier: GPL-2.0

//! Removing the module from the kernel.

use crate::{
    Error,
    Host, //
};
use rustix::{
    fs::{
        statx,
        AtFlags,
        FileType,
        StatxFlags,
        CWD, //
    },
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

/// Removes the module, and says whether it is gone: not if somebody uses it. A
/// [`Device`](crate::Device) that is open is a use. That it was gone already is as good.
///
/// # Errors
///
/// [`Error::NotPermitted`], [`Error::NotRemovable`].
pub fn remove() -> Result<bool, Error> {
    // What `rmmod` passes: the kernel is not to wait.
    match delete_module(c"kvm_exitpolicy", libc::O_NONBLOCK) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::AGAIN) => Ok(false),
        Err(Errno::BUSY) => Err(Error::NotRemovable {
            found: "the kernel says that it is being loaded or removed, or stays for ever",
        }),
        Err(errno) => Err(Error::new("unload kvm_exitpolicy".into(), errno)),
    }
}

/// Who uses the module. Looks at all files of all processes.
pub fn in_use(host: &Host) -> Error {
    Error::InUse {
        processes: users(host),
        references: references(host),
    }
}

fn references(host: &Host) -> Option<u64> {
    let count = host.read("/sys/module/kvm_exitpolicy/refcnt").ok()?;
    count.parse().ok()
}

/// Those that have the device open, as far as may be seen, without this process: it may have been
/// handed the device by one of them, and ends anyway.
fn users(host: &Host) -> Vec<Process> {
    let Some(device) = Identity::of(&host.path("/dev/exitpolicy")) else {
        return Vec::new();
    };
    let mut users: Vec<_> = entries(&host.path("/proc"))
        .into_iter()
        .filter_map(|directory| {
            let pid = directory.file_name()?.to_str()?.parse().ok()?;
            let is_other = pid != std::process::id();
            (is_other && has_open(&directory.join("fd"), &device)).then(|| Process {
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

fn has_open(descriptors: &Path, device: &Identity) -> bool {
    entries(descriptors)
        .iter()
        .any(|descriptor| Identity::of(descriptor).as_ref() == Some(device))
}

/// What a file is, whatever its name: others may have files of any name, in a mount namespace of their
/// own.
#[derive(PartialEq, Eq)]
enum Identity {
    /// A character device, by its numbers.
    Device(u32, u32),
    /// Something else, by its file system's numbers and its own.
    File(u32, u32, u64),
}

impl Identity {
    fn of(path: &Path) -> Option<Self> {
        // Others may have file systems, too, which need not answer.
        let found = statx(
            CWD,
            path,
            AtFlags::STATX_DONT_SYNC,
            StatxFlags::TYPE | StatxFlags::INO,
        );
        let found = found.ok()?;
        Some(match FileType::from_raw_mode(found.stx_mode.into()) {
            FileType::CharacterDevice => Self::Device(found.stx_rdev_major, found.stx_rdev_minor),
            _ => Self::File(found.stx_dev_major, found.stx_dev_minor, found.stx_ino),
        })
    }
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
        let device = root.path().join("dev/exitpolicy");
        fs::create_dir_all(device.parent().unwrap()).unwrap();
        fs::write(&device, "").unwrap();
        let device = device.to_str().unwrap();
        for (pid, name, opened) in [
            ("412", "tracer\n", device),
            ("77", "qemu\n", "/dev/zero"),
            ("99", "watch\n", device),
            ("self", "watch\n", device),
            // What it has so called is somewhere else.
            ("500", "liar\n", "/dev/exitpolicy"),
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
