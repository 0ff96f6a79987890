// SPDX-License-Identifier: GPL-2.0

//! What the module says, by each of its three interfaces.

use std::{
    collections::BTreeMap,
    fs,
    io,
    os::fd::AsRawFd,
    path::{
        Path,
        PathBuf, //
    },
    process::{
        Command,
        Output, //
    }, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use serde_json::Value;

use crate::{
    cgroup::{
        self,
        Cgroup,
        CGROUP2, //
    },
    soon,
    uapi::{
        self,
        Device, //
    }, //
};

/// The module's directory in sysfs.
pub const SYSFS: &str = "/sys/kernel/exitpolicy";
/// The command.
pub const COMMAND: &str = "exitpolicy";

/// A VM as the module shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmView {
    pub id: u64,
    pub pid: i32,
    pub cgroup: String,
    pub vcpus: u32,
    pub floor: Exits,
    pub requested: Exits,
    pub effective: Exits,
    pub clamped: Exits,
}

fn exits(bits: u64) -> Result<Exits> {
    Exits::from_bits(bits).with_context(|| format!("unknown exits in {bits:#x}"))
}

/// Reads a file of one value.
pub fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path:?}"))?;
    let value = text
        .strip_suffix('\n')
        .with_context(|| format!("{path:?} does not end with a newline"))?;
    ensure!(
        !value.contains('\n'),
        "{path:?} has more than one line: {text:?}"
    );
    Ok(value.to_string())
}

/// The VMs in sysfs.
pub mod sysfs {
    use super::*;

    /// The ids there.
    pub fn vm_ids() -> Result<Vec<u64>> {
        ids("vms")
    }

    /// The ids of the cgroups that have a policy there.
    pub fn policy_ids() -> Result<Vec<u64>> {
        ids("cgroups")
    }

    fn ids(directory: &str) -> Result<Vec<u64>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(Path::new(SYSFS).join(directory))? {
            let name = entry?.file_name();
            let name = name.to_str().context("not UTF-8")?;
            ids.push(name.parse().with_context(|| format!("no id: {name}"))?);
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// One VM.
    pub fn vm(id: u64) -> Result<VmView> {
        let directory = Path::new(SYSFS).join("vms").join(id.to_string());
        let file = |name: &str| read(directory.join(name));
        Ok(VmView {
            id,
            pid: file("pid")?.parse()?,
            cgroup: file("cgroup")?,
            vcpus: file("vcpus")?.parse()?,
            floor: file("floor")?.parse()?,
            requested: file("requested")?.parse()?,
            effective: file("effective")?.parse()?,
            clamped: file("clamped")?.parse()?,
        })
    }

    /// `attach`, then the two sets, as a shell script would.
    pub fn set_policy(cgroup: &Cgroup, disable: Exits, allow: Exits) -> Result<()> {
        let directory = policy_directory(cgroup)?;
        fs::write(Path::new(SYSFS).join("attach"), cgroup.path()).context("attach")?;
        fs::write(directory.join("disable"), format!("{disable}\n")).context("disable")?;
        fs::write(directory.join("allow"), format!("{allow}\n")).context("allow")
    }

    /// Where the policy of a cgroup is.
    pub fn policy_directory(cgroup: &Cgroup) -> Result<PathBuf> {
        let id = cgroup.id()?.to_string();
        Ok(Path::new(SYSFS).join("cgroups").join(id))
    }

    /// A file of the module's directory.
    pub fn top(file: &str) -> Result<String> {
        read(Path::new(SYSFS).join(file))
    }

    /// Every file and its content, but those that can only be written.
    pub fn snapshot() -> Result<BTreeMap<PathBuf, String>> {
        fn walk(directory: &Path, files: &mut BTreeMap<PathBuf, String>) -> Result<()> {
            for entry in fs::read_dir(directory)? {
                let path = entry?.path();
                if path.is_dir() {
                    files.insert(path.clone(), String::new());
                    walk(&path, files)?;
                } else if !path.ends_with("attach") && !path.ends_with("detach") {
                    let content = fs::read_to_string(&path);
                    files.insert(path.clone(), content.context(format!("{path:?}"))?);
                }
            }
            Ok(())
        }
        let mut files = BTreeMap::new();
        walk(Path::new(SYSFS), &mut files)?;
        Ok(files)
    }
}

/// The VMs by ioctl.
pub mod ioctl {
    use super::*;

    fn view(vm: &uapi::Vm) -> Result<VmView> {
        Ok(VmView {
            id: vm.id,
            pid: vm.pid.try_into()?,
            cgroup: cgroup_path(vm.cgroup_id)?,
            vcpus: vm.vcpus,
            floor: exits(vm.floor)?,
            requested: exits(vm.requested)?,
            effective: exits(vm.effective)?,
            clamped: exits(vm.clamped)?,
        })
    }

    /// Every VM.
    pub fn vms() -> Result<Vec<VmView>> {
        Device::open()?.vms()?.iter().map(view).collect()
    }

    /// One VM.
    pub fn vm(id: u64) -> Result<VmView> {
        let argument = uapi::Vm {
            id,
            ..Default::default()
        };
        view(&Device::open()?.vm(uapi::GET_VM, argument)?)
    }

    /// Both sets at once.
    pub fn set_policy(cgroup: &Cgroup, disable: Exits, allow: Exits) -> Result<()> {
        let directory = cgroup.open()?;
        let argument = uapi::Policy {
            flags: uapi::POLICY_DISABLE | uapi::POLICY_ALLOW,
            cgroup_fd: directory.as_raw_fd(),
            disable: disable.bits(),
            allow: allow.bits(),
            ..Default::default()
        };
        Device::open()?.policy(uapi::SET_POLICY, argument)?;
        Ok(())
    }

    /// The policy of a cgroup, if it has one.
    pub fn policy(cgroup: &Cgroup) -> Result<Option<(Exits, Exits)>> {
        let directory = cgroup.open()?;
        let argument = uapi::Policy {
            cgroup_fd: directory.as_raw_fd(),
            ..Default::default()
        };
        match Device::open()?.policy(uapi::GET_POLICY, argument) {
            Ok(policy) => Ok(Some((exits(policy.disable)?, exits(policy.allow)?))),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the policy of a cgroup.
    pub fn clear_policy(cgroup: &Cgroup) -> Result<()> {
        let directory = cgroup.open()?;
        let argument = uapi::Policy {
            cgroup_fd: directory.as_raw_fd(),
            ..Default::default()
        };
        Device::open()?.policy(uapi::CLEAR_POLICY, argument)?;
        Ok(())
    }
}

/// The path of a cgroup by its id.
fn cgroup_path(wanted: u64) -> Result<String> {
    fn find(directory: &Path, wanted: u64) -> Result<Option<PathBuf>> {
        if cgroup::id(directory)? == wanted {
            return Ok(Some(directory.to_path_buf()));
        }
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                if let Some(found) = find(&path, wanted)? {
                    return Ok(Some(found));
                }
            }
        }
        Ok(None)
    }
    let directory = find(Path::new(CGROUP2), wanted)?;
    Ok(directory.map_or("removed".to_string(), |directory| {
        let relative = directory
            .strip_prefix(CGROUP2)
            .expect("found below the mount point");
        format!("/{}", relative.display())
    }))
}

/// What the command says.
pub mod command {
    use super::*;

    /// Runs the command.
    pub fn run(arguments: &[&str]) -> Result<Output> {
        Command::new(COMMAND)
            .args(arguments)
            .output()
            .context("cannot run the command exitpolicy")
    }

    /// Runs the command, which must succeed, and takes its output.
    pub fn text(arguments: &[&str]) -> Result<String> {
        let output = run(arguments)?;
        ensure!(
            output.status.success(),
            "exitpolicy {}: {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs the command with `-j`.
    pub fn json(arguments: &[&str]) -> Result<Value> {
        let text = text(&[arguments, &["-j"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))
    }

    /// A set in JSON: its members' names.
    pub fn exits(value: &Value) -> Result<Exits> {
        let names = value.as_array().context("a set of exits is an array")?;
        let mut set = Exits::NONE;
        for name in names {
            let name = name.as_str().context("an exit's name is a string")?;
            set = set | name.parse().map_err(anyhow::Error::from)?;
        }
        Ok(set)
    }

    /// One VM.
    pub fn vm(id: u64) -> Result<VmView> {
        let vm = json(&["vm", "show", &id.to_string()])?;
        let number = |key: &str| {
            let number = vm[key].as_u64();
            number.with_context(|| format!("no number {key} in {vm}"))
        };
        let set = |key: &str| exits(&vm[key]).with_context(|| format!("{key} in {vm}"));
        let cgroup = if vm["cgroup"]["removed"] == true {
            Some("removed")
        } else {
            vm["cgroup"]["path"].as_str()
        };
        Ok(VmView {
            id: number("id")?,
            pid: number("pid")?.try_into()?,
            cgroup: cgroup.context("no cgroup")?.to_string(),
            vcpus: number("vcpus")?.try_into()?,
            floor: set("floor")?,
            requested: set("requested")?,
            effective: set("effective")?,
            clamped: set("clamped")?,
        })
    }

    /// Sets a policy.
    pub fn set_policy(cgroup: &Cgroup, disable: Exits, allow: Exits) -> Result<()> {
        let path = cgroup.path();
        let (disable, allow) = (disable.to_string(), allow.to_string());
        let options = ["--disable", &disable, "--allow", &allow];
        text(&[&["policy", "set", &path], &options[..]].concat()).map(drop)
    }
}

/// The one VM there is, once all interfaces agree about it.
pub fn only_vm() -> Result<VmView> {
    let vms = ioctl::vms()?;
    ensure!(vms.len() == 1, "there should be one VM: {vms:?}");
    let by_ioctl = vms[0].clone();
    let id = by_ioctl.id;
    // Directories are made by a worker, and are there before their files are.
    if !soon(|| Ok(sysfs::vm_ids()? == [id] && sysfs::vm(id).is_ok()))? {
        bail!(
            "sysfs has the VMs {:?}, not just {id}",
            sysfs::vm_ids().unwrap_or_default()
        );
    }
    let by_sysfs = sysfs::vm(id)?;
    ensure!(
        by_ioctl == by_sysfs,
        "ioctl and sysfs differ:\n{by_ioctl:?}\n{by_sysfs:?}"
    );
    let again = ioctl::vm(id)?;
    ensure!(
        by_ioctl == again,
        "NEXT_VM and GET_VM differ:\n{by_ioctl:?}\n{again:?}"
    );
    let by_command = command::vm(id)?;
    ensure!(
        by_ioctl == by_command,
        "ioctl and command differ:\n{by_ioctl:?}\n{by_command:?}"
    );
    Ok(by_ioctl)
}

/// Fails unless no interface shows a VM, a moment from now at the latest.
pub fn ensure_no_vms() -> Result<()> {
    let device = Device::open()?;
    let empty = soon(|| Ok(sysfs::vm_ids()?.is_empty() && device.info()?.vms == 0))?;
    ensure!(
        empty && device.vms()?.is_empty(),
        "VMs are left: {:?} and in sysfs {:?}",
        device.vms()?,
        sysfs::vm_ids()?
    );
    Ok(())
}

/// Fails unless there is neither VM nor policy, in any interface, a moment from now at the latest.
pub fn ensure_empty() -> Result<()> {
    let device = Device::open()?;
    let empty = soon(|| {
        let info = device.info()?;
        let sysfs = sysfs::vm_ids()?.is_empty() && sysfs::policy_ids()?.is_empty();
        Ok(sysfs && info.vms == 0 && info.policies == 0)
    })?;
    ensure!(
        empty,
        "something is left: {:?}, sysfs has VMs {:?} and policies {:?}",
        device.info()?,
        sysfs::vm_ids()?,
        sysfs::policy_ids()?
    );
    Ok(())
}

/// All that can be seen of the module's state.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    sysfs: BTreeMap<PathBuf, String>,
    info: uapi::Info,
    policies: Vec<uapi::Policy>,
    vms: Vec<uapi::Vm>,
}

impl Snapshot {
    /// As it is now.
    pub fn take() -> Result<Self> {
        let device = Device::open()?;
        Ok(Self {
            sysfs: sysfs::snapshot()?,
            info: device.info()?,
            policies: device.policies()?,
            vms: device.vms()?,
        })
    }

    /// Fails if something is not as it was.
    pub fn ensure_unchanged(&self) -> Result<()> {
        let now = Self::take()?;
        ensure!(
            *self == now,
            "the state has changed:\nbefore: {self:?}\nafter: {now:?}"
        );
        Ok(())
    }
}

/// Sets the master switch back to on when dropped.
pub struct SwitchedOff(());

impl SwitchedOff {
    /// Policies are applied to no new VM.
    pub fn new() -> Result<Self> {
        Device::open()?.set_enabled(false)?;
        Ok(Self(()))
    }
}

impl Drop for SwitchedOff {
    fn drop(&mut self) {
        if let Err(error) = fs::write(Path::new(SYSFS).join("enabled"), "1") {
            eprintln!("cannot switch policies on again: {error}");
        }
    }
}

/// Fails unless `result` is an error with this errno.
pub fn ensure_errno<T>(what: &str, result: io::Result<T>, errno: i32) -> Result<()> {
    let expected = io::Error::from_raw_os_error(errno);
    match result {
        Ok(_) => bail!("{what}: should have failed with {expected}"),
        Err(error) => ensure!(
            error.raw_os_error() == Some(errno),
            "{what}: {error}, should have been: {expected}"
        ),
    }
    Ok(())
}
