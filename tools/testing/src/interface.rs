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
    anyhow,
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
    /// The override.
    pub disable: Option<Exits>,
    pub refused: Exits,
    pub refusal: String,
    pub pending: u32,
    pub adopted: bool,
    /// In the order of their ids.
    pub each: Vec<VcpuView>,
}

/// A vCPU as the module shows it, in all interfaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuView {
    /// The one of KVM_CREATE_VCPU.
    pub id: u32,
    /// Its own override.
    pub disable: Option<Exits>,
    pub wanted: Exits,
    pub in_force: Exits,
    pub state: String,
}

/// The state of a vCPU that is as it should be.
pub const IN_FORCE: &str = "in force";
/// The state of a vCPU that is not in the guest, and changes before it is.
pub const NEXT_ENTRY: &str = "at next entry";
/// The state of a vCPU that may execute guest code as it was before.
pub const PENDING: &str = "pending";

impl VcpuView {
    /// A vCPU that has what it should have, and no override.
    pub fn settled(id: u32, wanted: Exits) -> Self {
        Self {
            id,
            disable: None,
            wanted,
            in_force: wanted,
            state: IN_FORCE.to_string(),
        }
    }
}

impl VmView {
    /// One of its vCPUs.
    pub fn vcpu(&self, id: u32) -> Result<&VcpuView> {
        let vcpu = self.each.iter().find(|vcpu| vcpu.id == id);
        vcpu.with_context(|| format!("no vCPU {id} in {self:?}"))
    }
}

fn refusal(number: u32) -> Result<String> {
    const NAMES: [&str; 4] = ["none", "pv_unhalt", "protected", "hyperv"];
    let name = NAMES.get(number as usize);
    Ok(name.context("unknown refusal")?.to_string())
}

fn state(number: u32) -> Result<String> {
    const NAMES: [&str; 4] = [IN_FORCE, NEXT_ENTRY, PENDING, "pending: in L2"];
    let name = NAMES.get(number as usize);
    Ok(name.context("unknown state")?.to_string())
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
        let directory = vm_directory(id);
        let file = |name: &str| read(directory.join(name));
        let mut each = Vec::new();
        for entry in fs::read_dir(&directory)? {
            let name = entry?.file_name();
            let name = name.to_str().context("not UTF-8")?;
            // There is the file "vcpus", too.
            let Some(id) = name.strip_prefix("vcpu").and_then(|id| id.parse().ok()) else {
                continue;
            };
            let file = |file: &str| read(directory.join(name).join(file));
            each.push(VcpuView {
                id,
                disable: override_in(&file("disable")?)?,
                wanted: file("wanted")?.parse()?,
                in_force: file("in_force")?.parse()?,
                state: file("state")?,
            });
        }
        each.sort_unstable_by_key(|vcpu| vcpu.id);
        Ok(VmView {
            id,
            pid: file("pid")?.parse()?,
            cgroup: file("cgroup")?,
            vcpus: file("vcpus")?.parse()?,
            floor: file("floor")?.parse()?,
            requested: file("requested")?.parse()?,
            effective: file("effective")?.parse()?,
            clamped: file("clamped")?.parse()?,
            disable: override_in(&file("disable")?)?,
            refused: file("refused")?.parse()?,
            refusal: file("refusal")?,
            pending: file("pending")?.parse()?,
            adopted: match file("adopted")?.as_str() {
                "0" => false,
                "1" => true,
                other => bail!("adopted is {other}"),
            },
            each,
        })
    }

    /// A set, or "inherit" for no override.
    fn override_in(text: &str) -> Result<Option<Exits>> {
        Ok(match text {
            "inherit" => None,
            set => Some(set.parse()?),
        })
    }

    /// Where a VM is.
    pub fn vm_directory(id: u64) -> PathBuf {
        Path::new(SYSFS).join("vms").join(id.to_string())
    }

    /// Gives a VM, or one vCPU of it, an override, or takes it away.
    pub fn set_override(vm: u64, vcpu: Option<u32>, disable: Option<Exits>) -> Result<()> {
        let mut path = vm_directory(vm);
        if let Some(vcpu) = vcpu {
            path.push(format!("vcpu{vcpu}"));
        }
        let text = disable.map_or("inherit".to_string(), |set| set.to_string());
        let path = path.join("disable");
        fs::write(&path, text).with_context(|| format!("{path:?}"))
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

    fn view(device: &Device, vm: &uapi::Vm) -> Result<VmView> {
        let each = device.vcpus(vm.id)?;
        let disable = |has: u32, set: u64| match has {
            0 => Ok(None),
            1 => exits(set).map(Some),
            other => bail!("has_disable is {other}"),
        };
        Ok(VmView {
            id: vm.id,
            pid: vm.pid.try_into()?,
            cgroup: cgroup_path(vm.cgroup_id)?,
            vcpus: vm.vcpus,
            floor: exits(vm.floor)?,
            requested: exits(vm.requested)?,
            effective: exits(vm.effective)?,
            clamped: exits(vm.clamped)?,
            disable: disable(vm.has_disable, vm.disable)?,
            refused: exits(vm.refused)?,
            refusal: refusal(vm.refusal)?,
            pending: vm.pending,
            adopted: match vm.adopted {
                0 => false,
                1 => true,
                other => bail!("adopted is {other}"),
            },
            each: each
                .iter()
                .map(|vcpu| {
                    Ok(VcpuView {
                        id: vcpu.vcpu_id,
                        disable: disable(vcpu.has_disable, vcpu.disable)?,
                        wanted: exits(vcpu.wanted)?,
                        in_force: exits(vcpu.in_force)?,
                        state: state(vcpu.state)?,
                    })
                })
                .collect::<Result<_>>()?,
        })
    }

    /// Every VM.
    pub fn vms() -> Result<Vec<VmView>> {
        let device = Device::open()?;
        device.vms()?.iter().map(|vm| view(&device, vm)).collect()
    }

    /// One VM.
    pub fn vm(id: u64) -> Result<VmView> {
        let argument = uapi::Vm {
            id,
            ..Default::default()
        };
        let device = Device::open()?;
        let vm = device.vm(uapi::GET_VM, argument)?;
        view(&device, &vm)
    }

    /// Gives a VM, or one vCPU of it, an override, and says how many vCPUs were waited for in vain.
    pub fn set_override(vm: u64, vcpu: Option<u32>, disable: Exits) -> io::Result<u32> {
        let argument = uapi::Override {
            disable: disable.bits(),
            ..override_of(vm, vcpu)
        };
        let device = Device::open().map_err(io::Error::other)?;
        Ok(device.overriding(uapi::SET_VM, argument)?.pending)
    }

    /// Takes an override away, as [`set_override`] gives it.
    pub fn reset_override(vm: u64, vcpu: Option<u32>) -> io::Result<u32> {
        let device = Device::open().map_err(io::Error::other)?;
        let argument = override_of(vm, vcpu);
        Ok(device.overriding(uapi::RESET_VM, argument)?.pending)
    }

    fn override_of(vm: u64, vcpu: Option<u32>) -> uapi::Override {
        uapi::Override {
            vm,
            flags: if vcpu.is_some() { uapi::VM_VCPU } else { 0 },
            vcpu_id: vcpu.unwrap_or(0),
            timeout_ms: uapi::MAX_TIMEOUT,
            ..Default::default()
        }
    }

    /// Both sets at once.
    pub fn set_policy(cgroup: &Cgroup, disable: Exits, allow: Exits) -> Result<()> {
        let directory = cgroup.open()?;
        let argument = uapi::Policy {
            flags: uapi::POLICY_DISABLE | uapi::POLICY_ALLOW,
            cgroup_fd: directory.as_raw_fd(),
            disable: disable.bits(),
            allow: allow.bits(),
            timeout_ms: uapi::MAX_TIMEOUT,
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
            timeout_ms: uapi::MAX_TIMEOUT,
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

    fn number(object: &Value, key: &str) -> Result<u64> {
        let number = object[key].as_u64();
        number.with_context(|| format!("no number {key} in {object}"))
    }

    fn set(object: &Value, key: &str) -> Result<Exits> {
        exits(&object[key]).with_context(|| format!("{key} in {object}"))
    }

    /// A set, or null for no override.
    fn override_in(object: &Value) -> Result<Option<Exits>> {
        match object.get("override").context("no override")? {
            Value::Null => Ok(None),
            _ => set(object, "override").map(Some),
        }
    }

    fn vcpu(vcpu: &Value) -> Result<VcpuView> {
        // What is for people is written there in other words.
        let state = vcpu["state"].as_str().context("no state")?;
        Ok(VcpuView {
            id: number(vcpu, "vcpu")?.try_into()?,
            disable: override_in(vcpu)?,
            wanted: set(vcpu, "wanted")?,
            in_force: set(vcpu, "in_force")?,
            state: match state {
                "in_force" => IN_FORCE,
                "at_next_entry" => NEXT_ENTRY,
                "in_l2" => "pending: in L2",
                other => other,
            }
            .to_string(),
        })
    }

    /// One VM.
    pub fn vm(id: u64) -> Result<VmView> {
        let vm = json(&["vm", "show", &id.to_string()])?;
        let number = |key| number(&vm, key);
        let set = |key| set(&vm, key);
        let each = vm["vcpu_list"].as_array().context("vcpu_list")?;
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
            disable: override_in(&vm)?,
            refused: set("refused")?,
            refusal: match &vm["refusal"] {
                Value::Null => "none".to_string(),
                refusal => refusal.as_str().context("refusal")?.to_string(),
            },
            pending: number("pending")?.try_into()?,
            adopted: vm["adopted"].as_bool().context("adopted")?,
            each: each.iter().map(vcpu).collect::<Result<_>>()?,
        })
    }

    /// The VMs that KVM has and the module does not know: the VMM of each, and the reason.
    pub fn unmanaged() -> Result<Vec<(i32, String)>> {
        let list = json(&["vm", "list"])?;
        // It is null where it is not known.
        let unmanaged = list["unmanaged"].as_array();
        let unmanaged = unmanaged.with_context(|| format!("no unmanaged in {list}"))?;
        unmanaged
            .iter()
            .map(|vm| {
                let reason = vm["reason"].as_str();
                let reason = reason.with_context(|| format!("no reason in {vm}"))?;
                Ok((number(vm, "pid")?.try_into()?, reason.to_string()))
            })
            .collect()
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
    let id = vms[0].id;
    // Directories are made by a worker, and are there before their files are; and a vCPU that is on
    // its way may get there between two looks.
    let mut look = Err(anyhow!("not looked at"));
    soon(|| {
        look = same_in_all(id);
        Ok(look.is_ok())
    })?;
    look
}

/// The VM, if it is the only one and all interfaces say the same of it.
fn same_in_all(id: u64) -> Result<VmView> {
    let ids = sysfs::vm_ids()?;
    ensure!(ids == [id], "sysfs has the VMs {ids:?}, not just {id}");
    let by_ioctl = ioctl::vm(id)?;
    let others = [
        ("sysfs", sysfs::vm(id)?),
        ("command", command::vm(id)?),
        ("NEXT_VM", ioctl::vms()?.remove(0)),
    ];
    for (name, other) in others {
        ensure!(
            by_ioctl == other,
            "GET_VM and {name} differ:\n{by_ioctl:?}\n{other:?}"
        );
    }
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

/// Fails unless there is neither VM nor policy, in any interface, a moment from now at the latest, or
/// if policies are switched off.
pub fn ensure_empty() -> Result<()> {
    let device = Device::open()?;
    let empty = soon(|| {
        let info = device.info()?;
        let sysfs = sysfs::vm_ids()?.is_empty() && sysfs::policy_ids()?.is_empty();
        let counts = (info.vms, info.policies, info.pending, info.holding);
        Ok(sysfs && counts == (0, 0, 0, 0) && info.enabled == 1)
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
    vcpus: Vec<Vec<uapi::Vcpu>>,
}

impl Snapshot {
    /// As it is now.
    pub fn take() -> Result<Self> {
        let device = Device::open()?;
        let vms = device.vms()?;
        Ok(Self {
            sysfs: sysfs::snapshot()?,
            info: device.info()?,
            policies: device.policies()?,
            vcpus: vms
                .iter()
                .map(|vm| device.vcpus(vm.id))
                .collect::<io::Result<_>>()?,
            vms,
        })
    }

    /// The id of the first VM there was, or 0.
    pub fn first_vm(&self) -> u64 {
        self.vms.first().map_or(0, |vm| vm.id)
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

/// Gives every VM what its VMM asked for, and fails unless all of them have it, a moment from now
/// at the latest. What was changed keeps the module from being unloaded.
pub fn drain() -> Result<()> {
    let device = Device::open()?;
    device.set_enabled(false)?;
    ensure!(
        soon(|| Ok(device.info()?.holding == 0))?,
        "VMs do not get what they had: {:?}",
        ioctl::vms()?
    );
    Ok(())
}

/// Sets the master switch back to on when dropped.
pub struct SwitchedOff(());

impl SwitchedOff {
    /// Policies are applied to no VM.
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
