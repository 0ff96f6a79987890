// SPDX-License-Identifier: GPL-2.0

//! Cgroups of the default hierarchy, made for a test and removed with it.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{
        self,
        File, //
    },
    io,
    os::{
        fd::{
            AsFd,
            AsRawFd, //
        },
        unix::fs::MetadataExt, //
    },
    path::{
        Path,
        PathBuf, //
    }, //
};

use anyhow::{
    Context,
    Result, //
};

/// Where cgroup2 is mounted.
pub const CGROUP2: &str = "/sys/fs/cgroup";

/// A cgroup that is removed with the value.
#[derive(Debug)]
pub struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    /// A new child of the root.
    pub fn new(name: &str) -> Result<Self> {
        Self::at(Path::new(CGROUP2).join(name))
    }

    /// A new child of this one.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::at(self.directory.join(name))
    }

    /// A new child of one that is open, for as long as that is: paths may be longer than programs
    /// can name.
    pub fn below(parent: &File, name: &str) -> Result<Self> {
        Self::at(Path::new("/proc/self/fd").join(format!("{}/{name}", parent.as_raw_fd())))
    }

    fn at(directory: PathBuf) -> Result<Self> {
        fs::create_dir(&directory)
            .with_context(|| format!("cannot make the cgroup {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its path as /proc/PID/cgroup has it.
    pub fn path(&self) -> String {
        let relative = self
            .directory
            .strip_prefix(CGROUP2)
            .expect("made below the mount point");
        format!("/{}", relative.display())
    }

    /// Its id: with 64-bit inode numbers, what name_to_handle_at() says.
    pub fn id(&self) -> Result<u64> {
        id(&self.directory)
    }

    /// An open file of its directory.
    pub fn open(&self) -> Result<File> {
        Ok(File::open(&self.directory)?)
    }

    /// Moves a process here, with all its threads.
    pub fn add_process(&self, pid: i32) -> Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// Moves one thread here.
    pub fn add_thread(&self, tid: i32) -> Result<()> {
        self.write("cgroup.threads", &tid.to_string())
    }

    /// Makes it a threaded one.
    pub fn make_threaded(&self) -> Result<()> {
        self.write("cgroup.type", "threaded")
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.directory.join(file);
        fs::write(&path, value).with_context(|| format!("cannot write {value} to {path:?}"))
    }

    /// Removes it now.
    pub fn remove(self) -> Result<()> {
        remove(&self.directory).with_context(|| format!("cannot remove {:?}", self.directory))?;
        // Nothing is left to drop but the name.
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.directory) {
            eprintln!("cannot remove {}: {error}", self.directory.display());
        }
    }
}

/// The names of the cgroups below the root.
pub fn children_of_root() -> Result<BTreeSet<OsString>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(CGROUP2)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.insert(entry.file_name());
        }
    }
    Ok(names)
}

/// Removes a cgroup, and waits for the last of its processes: a killed one leaves its cgroup a
/// moment after its parent has heard of its death.
fn remove(directory: &Path) -> io::Result<()> {
    let mut result = fs::remove_dir(directory);
    for _ in 0..crate::POLLS {
        match &result {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                crate::pause();
                result = fs::remove_dir(directory);
            }
            _ => break,
        }
    }
    result
}

/// The id of the cgroup at a directory.
pub fn id(directory: &Path) -> Result<u64> {
    Ok(fs::metadata(directory)?.ino())
}

/// The root cgroup's directory.
pub fn root() -> Result<File> {
    Ok(File::open(CGROUP2)?)
}

/// Mounts a cgroup v1 hierarchy without controllers, for as long as the value lives.
pub struct V1 {
    directory: PathBuf,
}

impl V1 {
    /// A hierarchy of this name.
    pub fn mount(name: &str) -> Result<Self> {
        let directory = PathBuf::from(format!("/tmp/cgroup-v1-{name}"));
        fs::create_dir_all(&directory)?;
        let options = format!("none,name={name}");
        nix::mount::mount(
            Some("none"),
            &directory,
            Some("cgroup"),
            nix::mount::MsFlags::empty(),
            Some(options.as_str()),
        )
        .context("cannot mount a cgroup v1 hierarchy")?;
        Ok(Self { directory })
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for V1 {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.directory);
        let _ = fs::remove_dir(&self.directory);
    }
}

/// How many descendants of the root are removed and yet not gone.
pub fn dying() -> Result<u64> {
    let stat = fs::read_to_string(Path::new(CGROUP2).join("cgroup.stat"))?;
    stat.lines()
        .find_map(|line| line.strip_prefix("nr_dying_descendants "))
        .and_then(|count| count.parse().ok())
        .context("no nr_dying_descendants in cgroup.stat")
}

/// Something to hand to an ioctl.
pub fn fd_of(file: &impl AsFd) -> i32 {
    use std::os::fd::AsRawFd;
    file.as_fd().as_raw_fd()
}
