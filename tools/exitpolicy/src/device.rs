// SPDX-License-Identifier: GPL-2.0

//! The module, through `/dev/exitpolicy`.

use crate::{
    cgroup::Cgroup,
    uapi::{
        self,
        Argument, //
    },
    Error,
    Host, //
};
use exitpolicy_policy::{
    Exits,
    Policy,
    Resolved, //
};
use rustix::{
    fs::{
        open,
        Mode,
        OFlags, //
    },
    io::Errno,
    ioctl::{
        ioctl,
        Opcode,
        Updater, //
    },
};
use std::{
    iter,
    os::fd::{
        AsRawFd,
        OwnedFd, //
    },
};

/// Which CPUs the module found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// kvm-amd.
    Svm,
    /// kvm-intel.
    Vmx,
}

impl Vendor {
    /// `svm` or `vmx`, as in sysfs and in /proc/cpuinfo.
    pub fn name(self) -> &'static str {
        match self {
            Self::Svm => "svm",
            Self::Vmx => "vmx",
        }
    }
}

/// What the module found and does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// The vendor module of KVM that is in use, if one is.
    pub vendor: Option<Vendor>,
    /// Whether policies are applied to new VMs.
    pub enabled: bool,
    /// What KVM can disable on this host; nothing without a vendor.
    pub supported: Exits,
    /// What KVM itself disables in every VM.
    pub floor: Exits,
    /// VMs or vCPUs that the module could not decide on or keep track of, since it was loaded.
    pub missed: u64,
    /// Decisions in which `allow` took away what the VMM had asked for, since it was loaded.
    pub clamps: u64,
    /// Number of policies.
    pub policies: u64,
    /// Number of VMs with a decision.
    pub vms: u64,
}

/// A VM and what was decided for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Counts up from 1, and is not used twice while the module stays loaded.
    pub id: u64,
    /// The domain cgroup of the VMM at the time of the decision.
    pub cgroup: u64,
    /// The VMM's thread group id in the initial pid namespace.
    pub pid: u32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// What KVM itself had disabled.
    pub floor: Exits,
    /// What the VMM asked for.
    pub requested: Exits,
    /// What the VM got.
    pub effective: Exits,
    /// What the VMM asked for and `allow` took away.
    pub clamped: Exits,
}

/// An open `/dev/exitpolicy`.
#[derive(Debug)]
pub struct Device {
    fd: OwnedFd,
}

impl Device {
    /// Opens the device.
    ///
    /// # Errors
    ///
    /// [`Error::NotLoaded`], [`Error::NotPermitted`].
    pub fn open(host: &Host) -> Result<Self, Error> {
        let device = host.path("/dev/exitpolicy");
        match open(&device, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => Ok(Self { fd }),
            Err(errno @ (Errno::NOENT | Errno::NODEV | Errno::NXIO)) => {
                Err(Error::NotLoaded { device, errno })
            }
            Err(errno) => Err(Error::new(format!("open {}", device.display()), errno)),
        }
    }

    /// Tells what the module found and does.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`].
    pub fn info(&self) -> Result<Info, Error> {
        let mut info = uapi::Info::new();
        self.call::<{ uapi::GET_INFO }, _>(&mut info)
            .map_err(|errno| refused("ask the module what it does", errno))?;
        Ok(Info {
            vendor: match info.vendor {
                uapi::VENDOR_SVM => Some(Vendor::Svm),
                uapi::VENDOR_VMX => Some(Vendor::Vmx),
                _ => None,
            },
            enabled: info.enabled != 0,
            supported: Exits::from_bits_truncate(info.supported),
            floor: Exits::from_bits_truncate(info.floor),
            missed: info.missed,
            clamps: info.clamps,
            policies: info.policies,
            vms: info.vms,
        })
    }

    /// Switches the application of policies to new VMs on or off. VMs that have their decision
    /// keep it.
    ///
    /// # Errors
    ///
    /// [`Error::NotPermitted`].
    pub fn set_enabled(&self, enabled: bool) -> Result<(), Error> {
        let mut argument = uapi::Enabled {
            enabled: enabled.into(),
            ..uapi::Enabled::new()
        };
        self.call::<{ uapi::SET_ENABLED }, _>(&mut argument)
            .map_err(|errno| {
                let switch = if enabled { "on" } else { "off" };
                refused(format!("switch policies {switch}"), errno)
            })
    }

    /// Makes or changes the policy of a cgroup.
    ///
    /// A set that is not given keeps its value; in a new policy it is that of
    /// [`Policy::NEUTRAL`].
    ///
    /// # Errors
    ///
    /// [`Error::NotPermitted`], [`Error::CgroupRemoved`]; [`Error::Mismatch`] also when neither
    /// set is given.
    pub fn set_policy(
        &self,
        cgroup: &Cgroup,
        disable: Option<Exits>,
        allow: Option<Exits>,
    ) -> Result<(), Error> {
        let mut argument = uapi::Policy::new();
        if let Some(disable) = disable {
            argument.flags |= uapi::POLICY_DISABLE;
            argument.disable = disable.bits();
        }
        if let Some(allow) = allow {
            argument.flags |= uapi::POLICY_ALLOW;
            argument.allow = allow.bits();
        }
        self.call_on::<{ uapi::SET_POLICY }>(cgroup, &mut argument)
            .map_err(|errno| refused_on("set the policy", cgroup, errno))
    }

    /// Reads the policy of this very cgroup.
    ///
    /// # Errors
    ///
    /// [`Error::NoPolicy`], [`Error::CgroupRemoved`].
    pub fn policy(&self, cgroup: &Cgroup) -> Result<Policy, Error> {
        let mut argument = uapi::Policy::new();
        self.call_on::<{ uapi::GET_POLICY }>(cgroup, &mut argument)
            .map_err(|errno| refused_on("read the policy", cgroup, errno))?;
        Ok(sets(&argument))
    }

    /// Removes the policy of this very cgroup.
    ///
    /// # Errors
    ///
    /// [`Error::NotPermitted`], [`Error::NoPolicy`], [`Error::CgroupRemoved`].
    pub fn clear_policy(&self, cgroup: &Cgroup) -> Result<(), Error> {
        self.call_on::<{ uapi::CLEAR_POLICY }>(cgroup, &mut uapi::Policy::new())
            .map_err(|errno| refused_on("clear the policy", cgroup, errno))
    }

    /// Asks the module what a VM in this cgroup is subject to, inheritance included.
    ///
    /// # Errors
    ///
    /// [`Error::CgroupRemoved`].
    pub fn resolve_policy(&self, cgroup: &Cgroup) -> Result<Resolved, Error> {
        let mut argument = uapi::Policy::new();
        self.call_on::<{ uapi::RESOLVE_POLICY }>(cgroup, &mut argument)
            .map_err(|errno| refused_on("resolve the policy", cgroup, errno))?;
        let Policy { disable, allow } = sets(&argument);
        Ok(Resolved {
            disable,
            allow,
            source: (argument.cgroup_id != 0).then_some(argument.cgroup_id),
        })
    }

    /// All policies, each with the id of its cgroup, in the order of the ids. Ends after an error.
    pub fn policies(&self) -> impl Iterator<Item = Result<(u64, Policy), Error>> + use<'_> {
        self.walk::<{ uapi::NEXT_POLICY }, uapi::Policy, _>("list the policies", |policy| {
            (policy.cgroup_id, sets(policy))
        })
    }

    /// All VMs that have a decision, in the order of their ids. Ends after an error.
    pub fn vms(&self) -> impl Iterator<Item = Result<Vm, Error>> + use<'_> {
        self.walk::<{ uapi::NEXT_VM }, _, _>("list the VMs", vm)
    }

    /// One VM.
    ///
    /// # Errors
    ///
    /// [`Error::NoVm`].
    pub fn vm(&self, id: u64) -> Result<Vm, Error> {
        let mut argument = uapi::Vm {
            id,
            ..uapi::Vm::new()
        };
        match self.call::<{ uapi::GET_VM }, _>(&mut argument) {
            Ok(()) => Ok(vm(&argument)),
            Err(Errno::NOENT) => Err(Error::NoVm { id }),
            Err(errno) => Err(refused(format!("ask for VM {id}"), errno)),
        }
    }

    /// Repeats a NEXT command, whose argument says by its id where to go on, until ENOENT.
    fn walk<const COMMAND: Opcode, T: Argument, Item>(
        &self,
        tried: &'static str,
        convert: fn(&T) -> Item,
    ) -> impl Iterator<Item = Result<Item, Error>> + use<'_, COMMAND, T, Item> {
        let mut place = Some(T::new());
        iter::from_fn(move || {
            let mut argument = place.take()?;
            match self.call::<COMMAND, T>(&mut argument) {
                Ok(()) => {
                    place = Some(argument);
                    Some(Ok(convert(&argument)))
                }
                Err(Errno::NOENT) => None,
                Err(errno) => Some(Err(refused(tried, errno))),
            }
        })
    }

    fn call_on<const COMMAND: Opcode>(
        &self,
        cgroup: &Cgroup,
        argument: &mut uapi::Policy,
    ) -> Result<(), Errno> {
        argument.cgroup_fd = cgroup.fd().as_raw_fd();
        self.call::<COMMAND, _>(argument)
    }

    fn call<const COMMAND: Opcode, T: Argument>(&self, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: The module accesses no more than the size that the argument begins with.
        // `Argument::new`, where all arguments come from, set it to that of `T`, and nothing here
        // changes it. `Argument` promises that any bytes are a valid `T`.
        unsafe { ioctl(&self.fd, Updater::<COMMAND, T>::new(argument)) }
    }
}

fn sets(policy: &uapi::Policy) -> Policy {
    Policy {
        disable: Exits::from_bits_truncate(policy.disable),
        allow: Exits::from_bits_truncate(policy.allow),
    }
}

fn vm(vm: &uapi::Vm) -> Vm {
    Vm {
        id: vm.id,
        cgroup: vm.cgroup_id,
        pid: vm.pid,
        vcpus: vm.vcpus,
        floor: Exits::from_bits_truncate(vm.floor),
        requested: Exits::from_bits_truncate(vm.requested),
        effective: Exits::from_bits_truncate(vm.effective),
        clamped: Exits::from_bits_truncate(vm.clamped),
    }
}

/// What an errno of the module means for a command that has no cgroup.
fn refused(tried: impl Into<String>, errno: Errno) -> Error {
    let tried = tried.into();
    match errno {
        Errno::INVAL | Errno::TOOBIG | Errno::NOTTY => Error::Mismatch { tried, errno },
        _ => Error::new(tried, errno),
    }
}

/// What an errno of the module means for a command on a cgroup.
fn refused_on(tried: &str, cgroup: &Cgroup, errno: Errno) -> Error {
    let tried = format!("{tried} of cgroup {}", cgroup.path().display());
    match errno {
        Errno::NOENT => Error::NoPolicy {
            cgroup: cgroup.path().to_owned(),
        },
        Errno::NODEV => Error::CgroupRemoved { tried },
        Errno::OPNOTSUPP => Error::Threaded { tried },
        Errno::BADF => Error::NotACgroup {
            name: cgroup.path().to_owned(),
            found: "the module does not take its directory for one of cgroup v2".into(),
        },
        _ => refused(tried, errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn host_with_device(content: &str) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("dev")).unwrap();
        fs::write(root.path().join("dev/exitpolicy"), content).unwrap();
        let host = Host::new(root.path());
        (root, host)
    }

    #[test]
    fn without_a_device_the_module_is_not_loaded() {
        let root = tempfile::tempdir().unwrap();
        let error = Device::open(&Host::new(root.path())).unwrap_err();
        assert_eq!(error.code(), "not_loaded");
        assert!(error.hint().unwrap().contains("modprobe kvm_exitpolicy"));
    }

    #[test]
    fn what_is_no_device_does_not_understand() {
        let (_root, host) = host_with_device("");
        let error = Device::open(&host).unwrap().info().unwrap_err();
        assert_eq!(
            error,
            Error::Mismatch {
                tried: "ask the module what it does".into(),
                errno: Errno::NOTTY,
            },
        );
    }

    #[test]
    fn each_errno_has_its_meaning() {
        for (errno, code) in [
            (Errno::PERM, "not_permitted"),
            (Errno::INVAL, "version_mismatch"),
            (Errno::TOOBIG, "version_mismatch"),
            (Errno::NOTTY, "version_mismatch"),
            (Errno::NOMEM, "os"),
            (Errno::FAULT, "os"),
        ] {
            assert_eq!(refused("try", errno).code(), code, "{errno}");
        }
    }
}
