// SPDX-License-Identifier: GPL-2.0

//! VMs that KVM has and the module does not know.
//!
//! KVM's debugfs has a directory for each VM, `THREAD-FD`: the thread that made it, by its id in
//! the initial pid namespace, and the number of the file that the thread got. In it is a directory
//! for each vCPU. Which of them the module knows is not said there. So the VMs of each process are
//! counted on both sides, and what KVM has more is what the module does not know.

use crate::{
    device::Vendor,
    doctor::loaded_vendor,
    Error,
    Host, //
};
use rustix::io::Errno;
use std::{
    cell::OnceCell,
    collections::{
        BTreeMap,
        BTreeSet,
        HashSet, //
    },
    fmt, fs,
    io::{
        self,
        ErrorKind::NotFound, //
    },
    os::unix::fs::DirEntryExt,
    path::{
        Path,
        PathBuf, //
    },
};

/// KVM's directory in debugfs.
pub const DEBUGFS: &str = "/sys/kernel/debug/kvm";

/// Why the module does not know a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It is decided on when it gets its first vCPU: all is well.
    NoVcpu,
    /// The module did not get to know it, which it should have.
    Missed,
    /// The same, or it is a TDX VM, which the module leaves alone: it cannot be told from outside.
    TdxOrMissed,
    /// The module works with neither kvm_amd nor kvm_intel.
    NoVendor,
}

impl Reason {
    /// A name that stays the same, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoVcpu => "no_vcpu",
            Self::Missed => "missed",
            Self::TdxOrMissed => "tdx_or_missed",
            Self::NoVendor => "no_vendor",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoVcpu => "no vCPU yet",
            Self::Missed => "missed",
            Self::TdxOrMissed => "TDX, or missed",
            Self::NoVendor => "the module works with no vendor module",
        })
    }
}

/// Where KVM shows a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The thread that made it, which may have ended.
    pub thread: u32,
    /// The file that the thread got.
    pub fd: u32,
}

impl Place {
    /// Of a name that KVM gives, and no other that has the same numbers, like `01-+2`.
    fn parse(name: &str) -> Option<Self> {
        let (thread, fd) = name.split_once('-')?;
        let place = Self {
            thread: thread.parse().ok()?,
            fd: fd.parse().ok()?,
        };
        (place.to_string() == name).then_some(place)
    }

    fn path(self) -> PathBuf {
        Path::new(DEBUGFS).join(self.to_string())
    }
}

/// As in debugfs.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.thread, self.fd)
    }
}

/// A VM that the module does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmanaged {
    /// The VMM's thread group id in the initial pid namespace. Nothing if it cannot be found: the
    /// thread that made the VM has ended, or has the VM's file elsewhere.
    pub pid: Option<u32>,
    /// Nothing if it is one of several VMs, and which is not known.
    pub place: Option<Place>,
    /// Why.
    pub reason: Reason,
}

/// A VM that the module knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// The VMM's thread group id in the initial pid namespace.
    pub pid: u32,
    /// The ids of its vCPUs.
    pub vcpus: BTreeSet<u32>,
}

/// A VM in debugfs. What is not always needed is looked at once.
#[derive(Debug)]
struct Found {
    place: Place,
    /// A directory that is removed and made again has another.
    inode: u64,
    vcpus: OnceCell<Option<BTreeSet<u32>>>,
    process: OnceCell<Option<u32>>,
}

impl Found {
    /// The ids of its vCPUs; nothing if it has ended.
    fn vcpus(&self, host: &Host) -> Option<&BTreeSet<u32>> {
        let vcpus = self.vcpus.get_or_init(|| {
            let entries = fs::read_dir(host.path(self.place.path())).ok()?;
            let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            Some(
                names
                    .filter_map(|name| name.strip_prefix("vcpu")?.parse().ok())
                    .collect(),
            )
        });
        vcpus.as_ref()
    }

    /// The process that has it, if it can be found.
    fn process(&self, host: &Host) -> Option<u32> {
        *self.process.get_or_init(|| {
            self.process_of(host, self.place.thread).or_else(|| {
                // The thread has ended. Those that run the vCPUs are of the same process.
                let vcpus = self.vcpus(host)?.iter();
                vcpus
                    .filter_map(|id| {
                        let pid = self.place.path().join(format!("vcpu{id}/pid"));
                        host.read(pid).ok()?.parse().ok()
                    })
                    .find_map(|thread| self.process_of(host, thread))
            })
        })
    }

    /// The process of a thread. The number of a thread that has ended may be another's by now, so
    /// it has to have the VM's file.
    fn process_of(&self, host: &Host, thread: u32) -> Option<u32> {
        let of_thread = Path::new("/proc").join(thread.to_string());
        let file = of_thread.join(format!("fd/{}", self.place.fd));
        let file = fs::read_link(host.path(file)).ok()?;
        if file != Path::new("anon_inode:kvm-vm") {
            return None;
        }
        // The thread's name may be anything.
        let status = fs::read(host.path(of_thread.join("status"))).ok()?;
        let status = String::from_utf8_lossy(&status);
        let process = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
        process?.trim().parse().ok()
    }
}

/// The VMs that KVM has.
#[derive(Debug)]
pub struct Kvm<'a> {
    host: &'a Host,
    vms: Vec<Found>,
}

impl<'a> Kvm<'a> {
    /// Looks which VMs there are.
    ///
    /// # Errors
    ///
    /// [`Error::Os`], [`Error::NotPermitted`]: debugfs is not mounted, or closed to the caller.
    pub fn look(host: &'a Host) -> Result<Self, Error> {
        let vms = match find(host) {
            // KVM makes the directory for its vendor module, without which there are no VMs.
            Err(error) if error.kind() == NotFound && loaded_vendor(host).is_none() => Vec::new(),
            found => found.map_err(|error| {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                Error::new(format!("read {DEBUGFS}"), errno)
            })?,
        };
        Ok(Self { host, vms })
    }

    /// Forgets those that have ended since.
    ///
    /// # Errors
    ///
    /// As of [`Kvm::look`].
    pub fn forget_ended(&mut self) -> Result<(), Error> {
        let now = Self::look(self.host)?.vms;
        let now: BTreeSet<_> = now.iter().map(|vm| (vm.place, vm.inode)).collect();
        self.vms.retain(|vm| now.contains(&(vm.place, vm.inode)));
        Ok(())
    }

    /// Those that are not among `known`. `vendor` is the one that the module works with.
    ///
    /// VMs come, get vCPUs, and go meanwhile. That one was missed is certain if this has said so
    /// before, and says so again after [`Kvm::forget_ended`], of VMs that were `known` in between.
    pub fn unmanaged(&self, known: &[Known], vendor: Option<Vendor>) -> Vec<Unmanaged> {
        let mut known_of = BTreeMap::<_, Vec<_>>::new();
        for vm in known {
            known_of.entry(vm.pid).or_default().push(vm);
        }
        let mut vms_of = BTreeMap::<_, Vec<_>>::new();
        for vm in &self.vms {
            // Most are made by the first thread of a VMM that the module knows.
            let process = if known_of.contains_key(&vm.place.thread) {
                Some(vm.place.thread)
            } else {
                vm.process(self.host)
            };
            vms_of.entry(process).or_default().push(vm);
        }

        let mut comparison = Comparison::new(self.host, vendor);
        // Those that are left, of whatever process, on both sides.
        let mut stray = vms_of.remove(&None).unwrap_or_default();
        let mut known_stray = Vec::new();
        for (process, vms) in vms_of {
            let known = process
                .and_then(|process| known_of.remove(&process))
                .unwrap_or_default();
            let matched = if known.len() >= vms.len() {
                vms.len()
            } else {
                let (own, others): (Vec<_>, Vec<_>) = vms
                    .into_iter()
                    .partition(|vm| vm.process(self.host) == process);
                stray.extend(others);
                comparison.compare(process, &own, &known)
            };
            known_stray.extend(known.into_iter().skip(matched));
        }
        known_stray.extend(known_of.into_values().flatten());
        comparison.compare(None, &stray, &known_stray);

        let mut unmanaged = comparison.unmanaged;
        unmanaged.sort_by_key(|vm| (vm.pid.is_none(), vm.pid, vm.place.is_none(), vm.place));
        unmanaged
    }
}

fn find(host: &Host) -> io::Result<Vec<Found>> {
    let mut vms = Vec::new();
    for entry in fs::read_dir(host.path(DEBUGFS))? {
        let entry = entry?;
        // KVM's own files are there, too.
        if let Some(place) = entry.file_name().to_str().and_then(Place::parse) {
            vms.push(Found {
                place,
                inode: entry.ino(),
                vcpus: OnceCell::new(),
                process: OnceCell::new(),
            });
        }
    }
    Ok(vms)
}

struct Comparison<'a> {
    host: &'a Host,
    /// Why one without vCPUs is not known, and one with.
    reasons: (Reason, Reason),
    unmanaged: Vec<Unmanaged>,
}

impl<'a> Comparison<'a> {
    fn new(host: &'a Host, vendor: Option<Vendor>) -> Self {
        let has_tdx = || {
            let tdx = host.read("/sys/module/kvm_intel/parameters/tdx");
            tdx.is_ok_and(|tdx| tdx == "Y")
        };
        let reasons = match vendor {
            None => (Reason::NoVendor, Reason::NoVendor),
            Some(Vendor::Vmx) if has_tdx() => (Reason::NoVcpu, Reason::TdxOrMissed),
            Some(_) => (Reason::NoVcpu, Reason::Missed),
        };
        Self {
            host,
            reasons,
            unmanaged: Vec::new(),
        }
    }

    /// Finds those of a process that are not known. Returns how many may be.
    fn compare(&mut self, pid: Option<u32>, vms: &[&Found], known: &[&Known]) -> usize {
        let mut with_vcpus = Vec::new();
        for vm in vms {
            match vm.vcpus(self.host) {
                Some(vcpus) if vcpus.is_empty() => self.add(pid, Some(vm.place), self.reasons.0),
                Some(vcpus) => with_vcpus.push((vm.place, vcpus)),
                None => {}
            }
        }
        let number = with_vcpus.len().saturating_sub(known.len());
        // The vCPUs may tell which ones they are.
        let known: HashSet<_> = known.iter().map(|known| &known.vcpus).collect();
        let different: Vec<_> = with_vcpus
            .iter()
            .filter(|(_, vcpus)| !known.contains(vcpus))
            .map(|(place, _)| *place)
            .collect();
        for index in 0..number {
            let place = (different.len() == number).then(|| different[index]);
            self.add(pid, place, self.reasons.1);
        }
        with_vcpus.len()
    }

    fn add(&mut self, pid: Option<u32>, place: Option<Place>, reason: Reason) {
        self.unmanaged.push(Unmanaged { pid, place, reason });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_like_a_vm_is_one() {
        let place = Place {
            thread: 4711,
            fd: 12,
        };
        assert_eq!(Place::parse("4711-12"), Some(place));
        assert_eq!(place.to_string(), "4711-12");
        for other in [
            "halt_exits",
            "4711",
            "4711-",
            "-12",
            "4711-12-1",
            "4711-x",
            "04711-12",
            "4711-+12",
        ] {
            assert_eq!(Place::parse(other), None, "{other}");
        }
    }

    #[test]
    fn what_ended_while_it_was_looked_at_was_not_missed() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path());
        let [stays, ends] = ["100-12", "200-12"].map(|vm| host.path(DEBUGFS).join(vm));
        for vm in [&stays, &ends] {
            fs::create_dir_all(vm.join("vcpu0")).unwrap();
        }
        let mut kvm = Kvm::look(&host).unwrap();
        let places = |kvm: &Kvm<'_>| -> Vec<_> {
            let unmanaged = kvm.unmanaged(&[], Some(Vendor::Svm)).into_iter();
            unmanaged
                .map(|vm| (vm.place.unwrap().thread, vm.reason))
                .collect()
        };
        let missed = Reason::Missed;
        assert_eq!(places(&kvm), [(100, missed), (200, missed)]);
        fs::remove_dir_all(&ends).unwrap();
        kvm.forget_ended().unwrap();
        assert_eq!(places(&kvm), [(100, missed)]);
        // One with its name has come.
        fs::create_dir_all(ends).unwrap();
        kvm.forget_ended().unwrap();
        assert_eq!(places(&kvm), [(100, missed)]);
    }
}
