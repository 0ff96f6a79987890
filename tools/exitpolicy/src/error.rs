// SPDX-License-Identifier: GPL-2.0

//! What can go wrong: what was tried, on what, why not, and what to do about it.

use crate::unload::Process;
use rustix::io::Errno;
use std::path::PathBuf;

/// The text of an errno, without the number that Rust puts behind it.
pub(crate) fn reason(errno: Errno) -> String {
    let text = errno.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// Who uses the module, for [`Error::InUse`].
fn in_use(processes: &[Process], references: &Option<u64>) -> String {
    let count = match references {
        Some(count) => format!("it is in use (reference count {count})"),
        None => "it is in use".into(),
    };
    if processes.is_empty() {
        return count;
    }
    let names: Vec<_> = processes.iter().map(ToString::to_string).collect();
    format!("{count}; /dev/exitpolicy is open in {}", names.join(", "))
}

/// An error of this library.
///
/// Its text says what was tried and why it was not done; [`Error::hint`] what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no device, so there is no module.
    #[error("cannot open {}: the module kvm_exitpolicy is not loaded ({})", .device.display(), reason(*.errno))]
    NotLoaded {
        /// The device that was opened.
        device: PathBuf,
        /// ENOENT, ENODEV or ENXIO.
        errno: Errno,
    },

    /// The caller may not do this.
    #[error("cannot {tried}: {}", reason(*.errno))]
    NotPermitted {
        /// What was tried.
        tried: String,
        /// EPERM or EACCES.
        errno: Errno,
    },

    /// The cgroup has no policy of its own.
    #[error("cgroup {} has no policy of its own", .cgroup.display())]
    NoPolicy {
        /// The cgroup, from the root of the hierarchy.
        cgroup: PathBuf,
    },

    /// There is no such VM.
    #[error("there is no VM {id}: it ended, or never was")]
    NoVm {
        /// Its id.
        id: u64,
    },

    /// The VM has no such vCPU.
    #[error("VM {vm} has no vCPU {vcpu}")]
    NoVcpu {
        /// The VM's id.
        vm: u64,
        /// The id that none of its vCPUs has.
        vcpu: u32,
    },

    /// The module cannot be unloaded while somebody uses it.
    #[error("cannot unload kvm_exitpolicy: {}", in_use(.processes, .references))]
    InUse {
        /// Those that have its device open, as far as can be seen.
        processes: Vec<Process>,
        /// How many uses the kernel counts, if that can be read.
        references: Option<u64>,
    },

    /// The kernel does not let modules go any more.
    #[error("cannot unload kvm_exitpolicy: {found}")]
    NotRemovable {
        /// What stands against it.
        found: &'static str,
    },

    /// The cgroup was removed meanwhile.
    #[error("cannot {tried}: the cgroup is being removed")]
    CgroupRemoved {
        /// What was tried.
        tried: String,
    },

    /// The cgroup is threaded.
    #[error("cannot {tried}: the cgroup is threaded, its processes count as those of its domain")]
    Threaded {
        /// What was tried.
        tried: String,
    },

    /// The cgroup v2 file system is not mounted.
    #[error("cannot find the cgroup v2 file system: {found}")]
    NoHierarchy {
        /// What is mounted instead.
        found: &'static str,
    },

    /// There is no such cgroup.
    #[error("there is no cgroup {}: looked for {}", .name.display(), .looked_for.display())]
    NoSuchCgroup {
        /// The cgroup as the caller named it.
        name: PathBuf,
        /// The directory that it would be.
        looked_for: PathBuf,
    },

    /// Something that is no cgroup of the v2 hierarchy was named.
    #[error("{} is no cgroup: {found}", .name.display())]
    NotACgroup {
        /// The cgroup as the caller named it.
        name: PathBuf,
        /// What it is, and where the cgroups are.
        found: String,
    },

    /// The module does not understand what this library says.
    #[error("cannot {tried}: the module refused the request as malformed or unknown ({})", reason(*.errno))]
    Mismatch {
        /// What was tried.
        tried: String,
        /// EINVAL, E2BIG or ENOTTY.
        errno: Errno,
    },

    /// Anything else.
    #[error("cannot {tried}: {}", reason(*.errno))]
    Os {
        /// What was tried.
        tried: String,
        /// Why not.
        errno: Errno,
    },
}

impl Error {
    /// Sorts an errno that has the same meaning wherever it comes from.
    pub(crate) fn new(tried: String, errno: Errno) -> Self {
        match errno {
            Errno::PERM | Errno::ACCESS => Self::NotPermitted { tried, errno },
            _ => Self::Os { tried, errno },
        }
    }

    /// A name for the kind of the error that stays the same, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotLoaded { .. } => "not_loaded",
            Self::NotPermitted { .. } => "not_permitted",
            Self::NoPolicy { .. } => "no_policy",
            Self::NoVm { .. } => "no_vm",
            Self::NoVcpu { .. } => "no_vcpu",
            Self::InUse { .. } => "in_use",
            Self::NotRemovable { .. } => "not_removable",
            Self::CgroupRemoved { .. } => "cgroup_removed",
            Self::Threaded { .. } => "threaded",
            Self::NoHierarchy { .. } => "no_cgroup2",
            Self::NoSuchCgroup { .. } => "no_such_cgroup",
            Self::NotACgroup { .. } => "not_a_cgroup",
            Self::Mismatch { .. } => "version_mismatch",
            Self::Os { .. } => "os",
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotLoaded { .. } => {
                "load it with 'modprobe kvm_exitpolicy'; 'exitpolicy doctor' says whether this \
                 host can, and what is missing"
                    .into()
            }
            Self::NotPermitted { .. } => {
                "run it as root: /dev/exitpolicy belongs to root, and needs CAP_SYS_ADMIN \
                 in the initial user namespace, which a container does not have"
                    .into()
            }
            Self::NoPolicy { cgroup } => format!(
                "'exitpolicy policy show --effective {}' says what it inherits, 'exitpolicy \
                 policy list' which cgroups have a policy",
                cgroup.display(),
            ),
            Self::NoVm { .. } => "'exitpolicy vm list' says which there are".into(),
            Self::NoVcpu { vm, .. } => {
                format!(
                    "'exitpolicy vm show {vm}' lists its vCPUs, by their ids in KVM_CREATE_VCPU"
                )
            }
            Self::InUse { processes, .. } if processes.is_empty() => {
                "'lsmod' and /sys/module/kvm_exitpolicy/holders say whether another module uses it, \
                 'fuser /dev/exitpolicy' as root who has the device open; then try again"
                    .into()
            }
            Self::InUse { .. } => "end what has it open, and try again".into(),
            Self::NotRemovable { .. } => {
                "it goes with the next boot; until then 'exitpolicy off' is as good".into()
            }
            Self::CgroupRemoved { .. } => {
                "nothing is to be done: its policy goes away with it".into()
            }
            Self::Threaded { .. } => {
                "name its domain: the nearest cgroup above it whose cgroup.type does not say \
                 'threaded'"
                    .into()
            }
            Self::NoHierarchy { .. } => {
                "the kernel has the v2 hierarchy all the same; mount it with 'mount -t cgroup2 \
                 none DIRECTORY', or boot with systemd.unified_cgroup_hierarchy=1"
                    .into()
            }
            Self::NoSuchCgroup { .. } => {
                "name it by its path below the root of the hierarchy (/machine.slice), by that of \
                 its directory, or relative to the current directory (./machine.slice); \
                 'systemd-cgls' lists those that exist"
                    .into()
            }
            Self::NotACgroup { .. } => {
                "name a directory of the cgroup v2 file system, or a path below its root \
                 (/machine.slice)"
                    .into()
            }
            Self::Mismatch { .. } => {
                "the command and the module are of different versions: install both from the same \
                 one, and load the module again"
                    .into()
            }
            Self::Os { .. } => return None,
        })
    }
}
