// SPDX-License-Identifier: GPL-2.0

//! Cgroups of the v2 hierarchy: from a name to a directory and its id, and back.

use crate::{
    Error,
    Host, //
};
use rustix::{
    fs::{
        fstatfs,
        open,
        readlink,
        Mode,
        OFlags, //
    },
    io::{
        Errno, //
    },
};
use std::{
    ffi::{
        OsStr,
        OsString, //
    },
    fs,
    os::{
        fd::{
            AsFd,
            AsRawFd,
            BorrowedFd,
            FromRawFd,
            OwnedFd, //
        },
        unix::ffi::{
            OsStrExt,
            OsStringExt, //
        },
    },
    path::{
        Path,
        PathBuf, //
    },
    str::from_utf8, //
};

/// CGROUP_SUPER_MAGIC and CGROUP2_SUPER_MAGIC of <linux/magic.h>.
const CGROUP1_MAGIC: u64 = 0x0027_e0eb;
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// Where the v2 hierarchy is mounted.
#[derive(Debug)]
pub struct Hierarchy {
    host: Host,
    /// As mountinfo has it.
    mount_point: PathBuf,
    /// As the kernel spells the paths of its directories.
    prefix: PathBuf,
    root: OwnedFd,
}

/// A cgroup, open.
#[derive(Debug)]
pub struct Cgroup {
    directory: OwnedFd,
    path: PathBuf,
    id: u64,
}

impl Cgroup {
    /// Its directory, to name it in an ioctl.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Its path from the root of the mounted hierarchy, which is `/`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id, as in `bpf_get_current_cgroup_id()`.
    pub fn id(&self) -> u64 {
        self.id
    }
}

impl Hierarchy {
    /// Finds the mount, in a host that has v2 only or v1 beside it.
    ///
    /// # Errors
    ///
    /// [`Error::NoHierarchy`]; [`Error::Os`] if the mounts cannot be read.
    pub fn find(host: &Host) -> Result<Self, Error> {
        let mountinfo = host.path("/proc/self/mountinfo");
        let mounts = fs::read(&mountinfo).map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            Error::new(format!("read {}", mountinfo.display()), errno)
        })?;
        // A mount may be hidden by another one on top of it: what is there counts.
        let hierarchy = mounts_of(&mounts, b"cgroup2").find_map(|mount_point| {
            // No O_PATH: open_by_handle_at() does not take it.
            let root = open(host.path(&mount_point), DIRECTORY, Mode::empty()).ok()?;
            (magic(&root).ok()? == CGROUP2_MAGIC).then_some(())?;
            Some(Self {
                host: host.clone(),
                prefix: path_of_fd(&root).ok()?,
                mount_point,
                root,
            })
        });
        hierarchy.ok_or_else(|| Error::NoHierarchy {
            found: if mounts_of(&mounts, b"cgroup").next().is_some() {
                "only cgroup v1 is mounted"
            } else {
                "no cgroup file system is mounted"
            },
        })
    }

    /// Where it is mounted.
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    /// Opens the cgroup that a user names: by its directory (`/sys/fs/cgroup/machine.slice`), by
    /// its path from the root of the hierarchy (`/machine.slice`, `machine.slice`), or by a path
    /// that begins with `.` or `..` and goes out from the current directory.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchCgroup`], [`Error::NotACgroup`] with what it is instead,
    /// [`Error::NotPermitted`].
    pub fn open(&self, name: impl AsRef<Path>) -> Result<Cgroup, Error> {
        let name = name.as_ref();
        if name.starts_with(".") || name.starts_with("..") {
            return self.open_directory(name, name);
        }
        if name.starts_with(&self.mount_point) {
            return self.open_directory(name, &self.host.path(name));
        }
        let below = name.strip_prefix("/").unwrap_or(name);
        let directory = self.host.path(&self.mount_point).join(below);
        match self.open_directory(name, &directory) {
            // Say what it is, if it is the path of something else.
            Err(missing @ Error::NoSuchCgroup { .. }) if name.is_absolute() => {
                match self.open_directory(name, &self.host.path(name)) {
                    Err(Error::NoSuchCgroup { .. }) => Err(missing),
                    other => other,
                }
            }
            other => other,
        }
    }

    /// The cgroup and those above it, up to the root of the mounted hierarchy.
    ///
    /// # Errors
    ///
    /// As [`Hierarchy::open`].
    pub fn self_and_ancestors(&self, cgroup: &Cgroup) -> Result<Vec<Cgroup>, Error> {
        cgroup
            .path()
            .ancestors()
            .map(|path| {
                let below = path.strip_prefix("/").unwrap_or(path);
                self.open_directory(path, &self.prefix.join(below))
            })
            .collect()
    }

    /// The path of the cgroup with this id, from the root of the mounted hierarchy; `None` if it
    /// was removed.
    ///
    /// # Errors
    ///
    /// Without CAP_DAC_READ_SEARCH [`Error::NotPermitted`]; [`Error::Os`] also for a cgroup
    /// outside of what is mounted, as in a cgroup namespace.
    pub fn path_of(&self, id: u64) -> Result<Option<PathBuf>, Error> {
        let found = open_by_id(&self.root, id)
            .and_then(|directory| self.path_below(&directory).map(Some))
            .or_else(|errno| match errno {
                Errno::STALE | Errno::NOENT => Ok(None),
                errno => Err(errno),
            });
        found.map_err(|errno| Error::new(format!("find the path of cgroup {id}"), errno))
    }

    fn open_directory(&self, name: &Path, directory: &Path) -> Result<Cgroup, Error> {
        let no_cgroup = |found| Error::NotACgroup {
            name: name.to_owned(),
            found: format!("{found}; cgroup v2 is at {}", self.mount_point.display()),
        };
        let trying = |errno| Error::new(format!("open cgroup {}", name.display()), errno);

        // O_PATH: a cgroup that may be passed through may be named.
        let fd = match open(directory, DIRECTORY | OFlags::PATH, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => {
                return Err(Error::NoSuchCgroup {
                    name: name.to_owned(),
                    looked_for: directory.to_owned(),
                })
            }
            Err(Errno::NOTDIR) => return Err(no_cgroup("it is not a directory")),
            Err(errno) => return Err(trying(errno)),
        };
        match magic(&fd).map_err(trying)? {
            CGROUP2_MAGIC => {}
            CGROUP1_MAGIC => return Err(no_cgroup("it belongs to cgroup v1")),
            _ => return Err(no_cgroup("it is in another file system")),
        }
        let path = self.path_below(&fd).map_err(|errno| match errno {
            Errno::XDEV => no_cgroup("it is in another mount of the hierarchy"),
            errno => trying(errno),
        })?;
        let id = id_of(&fd).map_err(trying)?;
        Ok(Cgroup {
            directory: fd,
            path,
            id,
        })
    }

    /// The path of a directory from the root of the mount, or XDEV.
    fn path_below(&self, directory: &OwnedFd) -> Result<PathBuf, Errno> {
        path_of_fd(directory)?
            .strip_prefix(&self.prefix)
            .map(|below| Path::new("/").join(below))
            .map_err(|_| Errno::XDEV)
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

fn magic(fd: &OwnedFd) -> Result<u64, Errno> {
    Ok(fstatfs(fd)?.f_type as u64)
}

fn path_of_fd(fd: &OwnedFd) -> Result<PathBuf, Errno> {
    let link = readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
    Ok(OsString::from_vec(link.into_bytes()).into())
}

/// The mount points of one type, in the order of /proc/self/mountinfo, proc_pid_mountinfo(5).
fn mounts_of<'a>(mountinfo: &'a [u8], fs_type: &'a [u8]) -> impl Iterator<Item = PathBuf> + 'a {
    mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(move |line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let mount_point = fields.nth(4)?;
            // Optional fields end with a dash.
            fields.find(|field| *field == b"-")?;
            (fields.next()? == fs_type).then(|| unescape(mount_point))
        })
}

/// Undoes the `\040` of mountinfo.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, after)) = rest.split_first() {
        let code = rest
            .get(1..4)
            .filter(|_| *byte == b'\\')
            .and_then(|digits| u8::from_str_radix(from_utf8(digits).ok()?, 8).ok());
        path.push(code.unwrap_or(*byte));
        rest = if code.is_some() { &rest[4..] } else { after };
    }
    OsStr::from_bytes(&path).into()
}

/// `struct file_handle` with the handle of a cgroup in it: the id, FILEID_KERNFS of
/// `include/linux/exportfs.h`.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    id: u64,
}

impl Handle {
    const KERNFS: i32 = 0xfe;

    fn new(id: u64) -> Self {
        Self {
            bytes: size_of::<u64>() as u32,
            kind: Self::KERNFS,
            id,
        }
    }
}

fn id_of(directory: &OwnedFd) -> Result<u64, Errno> {
    let mut handle = Handle::new(0);
    let mut mount_id = 0;
    // SAFETY: The path is a C string. `handle` is laid out as `struct file_handle` followed by as
    // many bytes as it says, and the kernel writes no more than these.
    let result = unsafe {
        libc::name_to_handle_at(
            directory.as_raw_fd(),
            c"".as_ptr(),
            (&raw mut handle).cast(),
            &mut mount_id,
            libc::AT_EMPTY_PATH,
        )
    };
    match result {
        0 if handle.kind == Handle::KERNFS => Ok(handle.id),
        0 => Err(Errno::OPNOTSUPP),
        _ => Err(last_errno()),
    }
}

fn open_by_id(mount: &OwnedFd, id: u64) -> Result<OwnedFd, Errno> {
    let mut handle = Handle::new(id);
    // SAFETY: `handle` is laid out as `struct file_handle` followed by as many bytes as it says;
    // the kernel only reads it.
    let fd = unsafe {
        libc::open_by_handle_at(
            mount.as_raw_fd(),
            (&raw mut handle).cast(),
            libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: The kernel just made it, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &[u8] = b"\
        25 1 8:1 / / rw - ext4 /dev/sda rw\n\
        30 25 0:26 / /sys/fs/cgroup rw shared:9 - tmpfs tmpfs rw\n\
        31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 master:3 - cgroup2 cgroup2 rw\n\
        32 30 0:28 / /sys/fs/cgroup/cpu\\040set rw - cgroup cgroup rw,cpuset\n";

    fn fixture(mountinfo: &[u8]) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc/self")).unwrap();
        fs::write(root.path().join("proc/self/mountinfo"), mountinfo).unwrap();
        let host = Host::new(root.path());
        (root, host)
    }

    #[test]
    fn mounts_are_found_by_type() {
        assert_eq!(
            mounts_of(HYBRID, b"cgroup2").collect::<Vec<_>>(),
            [PathBuf::from("/sys/fs/cgroup/unified")],
        );
        assert_eq!(
            mounts_of(HYBRID, b"cgroup").collect::<Vec<_>>(),
            [PathBuf::from("/sys/fs/cgroup/cpu set")],
        );
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape(b"/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescape(b"/a\\04"), Path::new("/a\\04"));
        assert_eq!(unescape(b"/a\\"), Path::new("/a\\"));
    }

    #[test]
    fn a_host_with_v1_only_is_told_what_to_do() {
        let (_root, host) = fixture(b"32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n");
        let error = Hierarchy::find(&host).unwrap_err();
        assert_eq!(error.code(), "no_cgroup2");
        assert!(error.to_string().contains("only cgroup v1"));
        assert!(error
            .hint()
            .unwrap()
            .contains("systemd.unified_cgroup_hierarchy=1"));
    }

    #[test]
    fn a_mount_that_is_not_there_does_not_count() {
        let (_root, host) = fixture(HYBRID);
        assert_eq!(Hierarchy::find(&host).unwrap_err().code(), "no_cgroup2");
    }

    /// The hierarchy of the host that the tests run on, where there is one.
    fn real() -> Option<Hierarchy> {
        let found = Hierarchy::find(&Host::default()).ok();
        if found.is_none() {
            assert!(
                std::env::var_os("EXITPOLICY_TEST_ALL").is_none(),
                "no cgroup v2 here"
            );
            eprintln!("skipped: no cgroup v2 here");
        }
        found
    }

    #[test]
    fn the_root_is_named_in_many_ways() {
        let Some(hierarchy) = real() else { return };
        let root = hierarchy.open("/").unwrap();
        assert_eq!(root.path(), Path::new("/"));
        for name in [hierarchy.mount_point(), "".as_ref(), "//".as_ref()] {
            assert_eq!(hierarchy.open(name).unwrap().id(), root.id(), "{name:?}");
        }
        assert_eq!(hierarchy.self_and_ancestors(&root).unwrap().len(), 1);
        match hierarchy.path_of(root.id()) {
            Ok(path) => assert_eq!(path.as_deref(), Some(Path::new("/"))),
            Err(error) => assert_eq!(error.code(), "not_permitted"),
        }
    }

    #[test]
    fn what_is_no_cgroup_is_refused() {
        let Some(hierarchy) = real() else { return };
        for (name, code) in [
            ("no such cgroup", "no_such_cgroup"),
            ("/no such cgroup", "no_such_cgroup"),
            ("/proc/self", "not_a_cgroup"),
            ("/proc/version", "not_a_cgroup"),
            (".", "not_a_cgroup"),
            ("/cgroup.procs", "not_a_cgroup"),
        ] {
            assert_eq!(hierarchy.open(name).unwrap_err().code(), code, "{name}");
        }
    }

    #[test]
    fn ids_lead_to_paths_and_back() {
        let Some(hierarchy) = real() else { return };
        let name = format!("/exitpolicy-test-{}", std::process::id());
        let below = Path::new(&name).strip_prefix("/").unwrap();
        let directory = hierarchy.mount_point().join(below);
        if fs::create_dir(&directory).is_err() {
            eprintln!("skipped: no cgroup can be made here");
            return;
        }
        let child = directory.join("a b");
        let seen = fs::create_dir(&child).map(|()| {
            let cgroup = hierarchy.open(&child).unwrap();
            let found = hierarchy.path_of(cgroup.id());
            let above = hierarchy.self_and_ancestors(&cgroup).unwrap();
            (cgroup, found, above)
        });
        fs::remove_dir(&child).unwrap();
        fs::remove_dir(&directory).unwrap();
        let (cgroup, found, above) = seen.unwrap();

        assert_eq!(cgroup.path(), Path::new(&name).join("a b"));
        assert_eq!(found.unwrap().as_deref(), Some(cgroup.path()));
        assert_eq!(
            above.iter().map(Cgroup::path).collect::<Vec<_>>(),
            [cgroup.path(), Path::new(&name), Path::new("/")],
        );
        assert_eq!(hierarchy.path_of(cgroup.id()), Ok(None));
    }
}
