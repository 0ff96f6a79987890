// SPDX-License-Identifier: GPL-2.0

//! The module, through `/dev/exitpolicy`.

use crate::{
    cgroup::Cgroup,
    live::{
        differing,
        Apply,
        Refusal,
        State,
        Vcpu,
        Wait, //
    },
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
    /// Whether policies and overrides are applied.
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
    /// Number of VMs that the module knows.
    pub vms: u64,
    /// Number of vCPUs that are on their way, those that change at their next entry included.
    pub pending: u64,
    /// Number of VMs that differ from what their VMM asked for. While there is one, the module
    /// cannot be unloaded.
    pub holding: u64,
}

/// A VM, what was decided for it and how far that has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Counts up from 1, and is not used twice while the module stays loaded.
    pub id: u64,
    /// The domain cgroup of the VMM when its VM was last decided on.
    pub cgroup: u64,
    /// The VMM's thread group id in the initial pid namespace.
    pub pid: u32,
    /// Number of vCPUs, one that is being created included.
    pub vcpus: u32,
    /// What KVM itself had disabled.
    pub floor: Exits,
    /// What the VMM asked for.
    pub requested: Exits,
    /// What the VM should have; vCPUs with an override differ.
    pub effective: Exits,
    /// What the VMM asked for and `allow` took away.
    pub clamped: Exits,
    /// Its override, which stands in for the cgroup's `disable`.
    pub disable: Option<Exits>,
    /// What of `effective` it cannot be given, or what it keeps in spite of it.
    pub refused: Exits,
    /// Why.
    pub refusal: Option<Refusal>,
    /// Number of its vCPUs that are on their way.
    pub pending: u32,
    /// Whether it is older than the module.
    pub adopted: bool,
}

impl Vm {
    /// What the VM has where the module does nothing.
    pub fn of_its_vmm(&self) -> Exits {
        self.floor | self.requested
    }

    /// Whether the VM, whose vCPUs are given, has something else than that, and can change. Then
    /// it holds the module.
    pub fn holds(&self, vcpus: &[Vcpu]) -> bool {
        let plain = self.of_its_vmm();
        if vcpus.is_empty() {
            return self.effective != plain;
        }
        vcpus.iter().any(|vcpu| {
            let differing = differing(vcpu.in_force, plain) & !vcpu.refused;
            !differing.is_empty() || vcpu.state != State::InForce
        })
    }

    /// What of `refused` makes a difference, if the VM's vCPUs, which are given, say so.
    pub fn withheld(&self, vcpus: &[Vcpu]) -> Exits {
        vcpus
            .iter()
            .fold(self.refused, |refused, vcpu| refused | vcpu.withheld())
    }
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
            pending: info.pending,
            holding: info.holding,
        })
    }

    /// Switches the application of policies and overrides on or off. Off gives every VM what its
    /// VMM asked for.
    ///
    /// Returns the number of vCPUs that were waited for in vain.
    ///
    /// # Errors
    ///
    /// [`Error::NotPermitted`].
    pub fn set_enabled(&self, enabled: bool, apply: Apply) -> Result<u32, Error> {
        let mut argument = uapi::Enabled {
            flags: apply.flags(),
            enabled: enabled.into(),
            timeout_ms: apply.wait.timeout_ms(),
            ..uapi::Enabled::new()
        };
        self.call::<{ uapi::SET_ENABLED }, _>(&mut argument)
            .map_err(|errno| {
                let switch = if enabled { "on" } else { "off" };
                refused(format!("switch policies {switch}"), errno)
            })?;
        Ok(argument.pending)
    }

    /// Makes or changes the policy of a cgroup.
    ///
    /// A set that is not given keeps its value; in a new policy it is that of
    /// [`Policy::NEUTRAL`]. Returns the number of vCPUs that were waited for in vain.
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
        apply: Apply,
    ) -> Result<u32, Error> {
        let mut argument = applied(apply);
        if let Some(disable) = disable {
            argument.flags |= uapi::POLICY_DISABLE;
            argument.disable = disable.bits();
        }
        if let Some(allow) = allow {
            argument.flags |= uapi::POLICY_ALLOW;
            argument.allow = allow.bits();
        }
        self.call_on::<{ uapi::SET_POLICY }>(cgroup, &mut argument)
            .map_err(|errno| refused_on("set the policy", cgroup, errno))?;
        Ok(argument.pending)
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

    /// Removes the policy of this very cgroup. Returns the number of vCPUs that were waited for in
    /// vain.
    ///
    /// # Errors
    ///
    /// [`Error::NotPermitted`], [`Error::NoPolicy`], [`Error::CgroupRemoved`].
    pub fn clear_policy(&self, cgroup: &Cgroup, apply: Apply) -> Result<u32, Error> {
        let mut argument = applied(apply);
        self.call_on::<{ uapi::CLEAR_POLICY }>(cgroup, &mut argument)
            .map_err(|errno| refused_on("clear the policy", cgroup, errno))?;
        Ok(argument.pending)
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
        self.walk::<{ uapi::NEXT_POLICY }, uapi::Policy, _>(
            "list the policies",
            uapi::Policy::new(),
            |policy| ((policy.cgroup_id, sets(policy)), Some(*policy)),
        )
    }

    /// All VMs that the module knows, in the order of their ids. Ends after an error.
    pub fn vms(&self) -> impl Iterator<Item = Result<Vm, Error>> + use<'_> {
        self.walk::<{ uapi::NEXT_VM }, uapi::Vm, _>("list the VMs", uapi::Vm::new(), |found| {
            (vm(found), Some(*found))
        })
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

    /// The vCPUs of a VM, in the order of their ids; none if the VM is gone. Ends after an error.
    pub fn vcpus(&self, vm: u64) -> impl Iterator<Item = Result<Vcpu, Error>> + use<'_> {
        let from = uapi::Vcpu {
            vm,
            ..uapi::Vcpu::new()
        };
        self.walk::<{ uapi::NEXT_VCPU }, uapi::Vcpu, _>("list the vCPUs", from, |found| {
            let next = found.vcpu_id.checked_add(1).map(|vcpu_id| uapi::Vcpu {
                vm: found.vm,
                vcpu_id,
                ..uapi::Vcpu::new()
            });
            (vcpu(found), next)
        })
    }

    /// One vCPU.
    ///
    /// # Errors
    ///
    /// [`Error::NoVm`], [`Error::NoVcpu`].
    pub fn vcpu(&self, vm: u64, id: u32) -> Result<Vcpu, Error> {
        let mut argument = uapi::Vcpu {
            vm,
            vcpu_id: id,
            ..uapi::Vcpu::new()
        };
        self.call::<{ uapi::GET_VCPU }, _>(&mut argument)
            .map_err(|errno| self.refused_vm("ask for", vm, Some(id), errno))?;
        Ok(vcpu(&argument))
    }

    /// Gives a VM or one of its vCPUs an override: `disable` stands in for that of the cgroup.
    ///
    /// Returns the number of vCPUs that were waited for in vain.
    ///
    /// # Errors
    ///
    /// [`Error::NotPermitted`], [`Error::NoVm`], [`Error::NoVcpu`].
    pub fn set_vm(
        &self,
        vm: u64,
        vcpu: Option<u32>,
        disable: Exits,
        wait: Wait,
    ) -> Result<u32, Error> {
        let mut argument = uapi::Override {
            disable: disable.bits(),
            ..overriding(vm, vcpu, wait)
        };
        self.call::<{ uapi::SET_VM }, _>(&mut argument)
            .map_err(|errno| self.refused_vm("set the override of", vm, vcpu, errno))?;
        Ok(argument.pending)
    }

    /// Takes an override away: that of a VM with those of its vCPUs, or that of one vCPU.
    ///
    /// Returns the number of vCPUs that were waited for in vain.
    ///
    /// # Errors
    ///
    /// [`Error::NotPermitted`], [`Error::NoVm`], [`Error::NoVcpu`].
    pub fn reset_vm(&self, vm: u64, vcpu: Option<u32>, wait: Wait) -> Result<u32, Error> {
        let mut argument = overriding(vm, vcpu, wait);
        self.call::<{ uapi::RESET_VM }, _>(&mut argument)
            .map_err(|errno| self.refused_vm("reset the override of", vm, vcpu, errno))?;
        Ok(argument.pending)
    }

    /// What an errno of the module means for a command on a VM or a vCPU.
    fn refused_vm(&self, tried: &str, vm: u64, vcpu: Option<u32>, errno: Errno) -> Error {
        match (errno, vcpu) {
            // The module says the same of both.
            (Errno::NOENT, Some(vcpu)) => match self.vm(vm) {
                Ok(_) => Error::NoVcpu { vm, vcpu },
                Err(error) => error,
            },
            (Errno::NOENT, None) => Error::NoVm { id: vm },
            (_, Some(vcpu)) => refused(format!("{tried} vCPU {vcpu} of VM {vm}"), errno),
            (_, None) => refused(format!("{tried} VM {vm}"), errno),
        }
    }

    /// Repeats a NEXT command until ENOENT. `convert` makes of an answer what is asked for, and
    /// the argument that goes on from there.
    fn walk<const COMMAND: Opcode, T: Argument, Item>(
        &self,
        tried: &'static str,
        from: T,
        convert: fn(&T) -> (Item, Option<T>),
    ) -> impl Iterator<Item = Result<Item, Error>> + use<'_, COMMAND, T, Item> {
        let mut place = Some(from);
        iter::from_fn(move || {
            let mut argument = place.take()?;
            match self.call::<COMMAND, T>(&mut argument) {
                Ok(()) => {
                    let (item, next) = convert(&argument);
                    place = next;
                    Some(Ok(item))
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
        disable: own_disable(vm.has_disable, vm.disable),
        refused: Exits::from_bits_truncate(vm.refused),
        refusal: Refusal::from_number(vm.refusal),
        pending: vm.pending,
        adopted: vm.adopted != 0,
    }
}

fn vcpu(vcpu: &uapi::Vcpu) -> Vcpu {
    Vcpu {
        vm: vcpu.vm,
        id: vcpu.vcpu_id,
        disable: own_disable(vcpu.has_disable, vcpu.disable),
        wanted: Exits::from_bits_truncate(vcpu.wanted),
        in_force: Exits::from_bits_truncate(vcpu.in_force),
        state: State::from_number(vcpu.state),
        refused: Exits::from_bits_truncate(vcpu.refused),
        refusal: Refusal::from_number(vcpu.refusal),
    }
}

fn own_disable(has: u32, disable: u64) -> Option<Exits> {
    (has != 0).then(|| Exits::from_bits_truncate(disable))
}

fn applied(apply: Apply) -> uapi::Policy {
    uapi::Policy {
        flags: apply.flags(),
        timeout_ms: apply.wait.timeout_ms(),
        ..uapi::Policy::new()
    }
}

fn overriding(vm: u64, vcpu: Option<u32>, wait: Wait) -> uapi::Override {
    let one = if vcpu.is_some() { uapi::VM_VCPU } else { 0 };
    uapi::Override {
        flags: one | wait.flags(),
        vm,
        vcpu_id: vcpu.unwrap_or(0),
        timeout_ms: wait.timeout_ms(),
        ..uapi::Override::new()
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
