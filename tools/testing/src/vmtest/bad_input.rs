// SPDX-License-Identifier: GPL-2.0

//! What is refused, with which errno, and that nothing changes by it.

use std::{
    fs::{
        self,
        File,
        OpenOptions, //
    },
    io::{
        self,
        Write, //
    },
    mem::offset_of,
    os::fd::AsRawFd,
    os::unix::fs::OpenOptionsExt,
    path::{
        Path,
        PathBuf, //
    },
    ptr, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use nix::{
    sched::{
        unshare,
        CloneFlags, //
    },
    unistd::{
        setgid,
        setuid,
        Gid,
        Uid, //
    }, //
};
use testing::{
    cgroup::{
        self,
        Cgroup,
        V1, //
    },
    client::Vmm,
    interface::{
        self,
        ensure_errno,
        ioctl,
        sysfs,
        Snapshot,
        SYSFS, //
    },
    uapi::{
        self,
        Device,
        Policy, //
    }, //
};

use crate::{
    child::{
        in_child,
        leave_chroot, //
    },
    Test, //
};

pub fn tests() -> Vec<Test> {
    vec![
        Test::new("bad_input::ioctl_sizes", ioctl_sizes),
        Test::new("bad_input::ioctl_members", ioctl_members),
        Test::new("bad_input::ioctl_numbers", ioctl_numbers),
        Test::new("bad_input::ioctl_pointers", ioctl_pointers),
        Test::new("bad_input::cgroup_fds", cgroup_fds),
        Test::new("bad_input::threaded_cgroup", threaded_cgroup),
        Test::new("bad_input::not_there", not_there),
        Test::new("bad_input::sysfs_sets", sysfs_sets),
        Test::new("bad_input::sysfs_paths", sysfs_paths),
        Test::new("bad_input::sysfs_enabled", sysfs_enabled),
        Test::new("bad_input::sysfs_modes", sysfs_modes),
        Test::new("bad_input::unprivileged", unprivileged),
        Test::new("bad_input::user_namespace_root", user_namespace_root),
        Test::new("bad_input::command", command),
    ]
}

/// A host with something to lose: a policy, and a VM.
struct State {
    vmm: Vmm,
    cgroup: Cgroup,
    device: Device,
    before: Snapshot,
}

impl State {
    fn new() -> Result<Self> {
        let cgroup = Cgroup::new("own")?;
        ioctl::set_policy(&cgroup, Exits::HLT, !Exits::MWAIT)?;
        let mut vmm = Vmm::start(&cgroup)?;
        let vm = vmm.create_vm()?;
        vmm.create_vcpu(vm, 0)?;
        interface::only_vm()?;
        Ok(Self {
            before: Snapshot::take()?,
            device: Device::open()?,
            cgroup,
            vmm,
        })
    }

    /// Fails unless the call failed with `errno` and changed nothing.
    fn refused<T>(&self, what: &str, result: io::Result<T>, errno: i32) -> Result<()> {
        ensure_errno(what, result, errno)?;
        self.before.ensure_unchanged().context(what.to_string())
    }

    /// An argument of SET_POLICY that would be taken, and would change something.
    fn good(&self, directory: &File) -> Policy {
        Policy {
            flags: uapi::POLICY_DISABLE | uapi::POLICY_ALLOW,
            cgroup_fd: directory.as_raw_fd(),
            disable: Exits::PAUSE.bits(),
            allow: Exits::PAUSE.bits(),
            ..Default::default()
        }
    }

    fn end(self) -> Result<()> {
        self.vmm.kill()
    }
}

/// The bytes of an argument of the command.
fn bytes(size: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length.max(4)];
    let size = u32::try_from(size).expect("small");
    bytes[..4].copy_from_slice(&size.to_ne_bytes());
    bytes
}

fn ioctl_sizes() -> Result<()> {
    let state = State::new()?;
    for (command, size, first) in uapi::COMMANDS {
        for bad in [0, 1, 3, 4, first - 8, first - 1] {
            let what = format!("{command:#x} with size {bad}");
            let result = state.device.bytes(command, &mut bytes(bad, size));
            state.refused(&what, result, libc::EINVAL)?;
        }
        // What a caller that is older does not know is not written.
        for older in (first..size).step_by(8) {
            let mut argument = bytes(older, size);
            argument[older..].fill(0xaa);
            if command == uapi::SET_ENABLED {
                let enabled = offset_of!(uapi::Enabled, enabled);
                argument[enabled..enabled + 4].copy_from_slice(&1u32.to_ne_bytes());
            }
            // Some fail, for want of a flag, of a cgroup or of a VM. None does for the size.
            let result = state.device.bytes(command, &mut argument);
            let errno = result.as_ref().err().and_then(io::Error::raw_os_error);
            let expected = match command {
                uapi::GET_INFO | uapi::NEXT_VM | uapi::NEXT_POLICY | uapi::SET_ENABLED => None,
                uapi::SET_POLICY => Some(libc::EINVAL),
                uapi::GET_VM | uapi::SET_VM | uapi::RESET_VM | uapi::NEXT_VCPU | uapi::GET_VCPU => {
                    Some(libc::ENOENT)
                }
                _ => Some(libc::EBADF),
            };
            ensure!(
                errno == expected && argument[older..].iter().all(|byte| *byte == 0xaa),
                "{command:#x} with size {older}: {result:?}, {argument:x?}"
            );
        }
        // From a future in which the structure is larger, and the rest is not zero.
        for larger in [size + 1, size + 8, 4096] {
            let mut argument = bytes(larger, larger);
            *argument.last_mut().expect("not empty") = 1;
            let what = format!("{command:#x} with size {larger} and something there");
            let result = state.device.bytes(command, &mut argument);
            state.refused(&what, result, libc::E2BIG)?;
        }
        // More than a page is not even looked at.
        for huge in [4097, 1 << 20, u32::MAX as usize] {
            let what = format!("{command:#x} with size {huge:#x}");
            let result = state.device.bytes(command, &mut bytes(huge, size));
            state.refused(&what, result, libc::E2BIG)?;
        }
    }
    // Larger, and zero: fine.
    for extra in [4, 8, 256] {
        let size = size_of::<uapi::Info>() + extra;
        state.device.bytes(uapi::GET_INFO, &mut bytes(size, size))?;
    }
    state.before.ensure_unchanged()?;
    state.end()
}

fn ioctl_members() -> Result<()> {
    let state = State::new()?;
    let directory = state.cgroup.open()?;
    let good = state.good(&directory);
    let unknown_exits = [1 << 5, 1 << 31, 1 << 32, 1 << 63, u64::MAX];

    let mut bad = vec![
        ("no flag", Policy { flags: 0, ..good }),
        (
            "unknown flag",
            Policy {
                flags: good.flags | (1 << 4),
                ..good
            },
        ),
        (
            "no set named",
            Policy {
                flags: uapi::NEW_ONLY | uapi::NO_WAIT,
                ..good
            },
        ),
        (
            "waiting too long",
            Policy {
                timeout_ms: uapi::MAX_TIMEOUT + 1,
                ..good
            },
        ),
        (
            "highest flag",
            Policy {
                flags: good.flags | (1 << 31),
                ..good
            },
        ),
        (
            "reserved",
            Policy {
                reserved: 1,
                ..good
            },
        ),
    ];
    for exits in unknown_exits {
        bad.push((
            "unknown exit to disable",
            Policy {
                disable: exits,
                ..good
            },
        ));
        bad.push((
            "unknown exit to allow",
            Policy {
                allow: exits,
                ..good
            },
        ));
    }
    for (what, argument) in bad {
        let result = state.device.policy(uapi::SET_POLICY, argument);
        state.refused(what, result, libc::EINVAL)?;
    }

    let reading = Policy {
        cgroup_fd: directory.as_raw_fd(),
        ..Default::default()
    };
    for command in [
        uapi::GET_POLICY,
        uapi::CLEAR_POLICY,
        uapi::RESOLVE_POLICY,
        uapi::NEXT_POLICY,
    ] {
        let cgroup_fd = if command == uapi::NEXT_POLICY {
            0
        } else {
            reading.cgroup_fd
        };
        let mut flags = vec![(1, 0), (2, 0), (1 << 4, 0), (1 << 31, 0), (0, 1)];
        if command != uapi::CLEAR_POLICY {
            flags.extend([(uapi::NEW_ONLY, 0), (uapi::NO_WAIT, 0)]);
        }
        for (flags, reserved) in flags {
            let argument = Policy {
                flags,
                reserved,
                cgroup_fd,
                ..Default::default()
            };
            let result = state.device.policy(command, argument);
            let what = format!("{command:#x} with flags {flags:#x}, reserved {reserved}");
            state.refused(&what, result, libc::EINVAL)?;
        }
    }
    let result = state.device.policy(uapi::NEXT_POLICY, reading);
    state.refused("NEXT_POLICY with a cgroup", result, libc::EINVAL)?;

    for (flags, enabled, reserved, timeout_ms) in [
        (1, 0, 0, 0),
        (1 << 1, 0, 0, 0),
        (1 << 4, 0, 0, 0),
        (1 << 31, 0, 0, 0),
        (0, 2, 0, 0),
        (0, u32::MAX, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, uapi::MAX_TIMEOUT + 1),
        (0, 0, 0, u32::MAX),
    ] {
        let argument = uapi::Enabled {
            flags,
            enabled,
            reserved,
            timeout_ms,
            ..Default::default()
        };
        let result = state.device.switch(argument);
        state.refused(&format!("SET_ENABLED {argument:?}"), result, libc::EINVAL)?;
    }
    overrides(&state)?;
    for (command, size) in [
        (uapi::GET_INFO, size_of::<uapi::Info>()),
        (uapi::NEXT_VM, size_of::<uapi::Vm>()),
        (uapi::GET_VM, size_of::<uapi::Vm>()),
        (uapi::NEXT_VCPU, size_of::<uapi::Vcpu>()),
        (uapi::GET_VCPU, size_of::<uapi::Vcpu>()),
    ] {
        let mut argument = bytes(size, size);
        argument[4] = 1;
        let what = format!("{command:#x} with a flag");
        let result = state.device.bytes(command, &mut argument);
        state.refused(&what, result, libc::EINVAL)?;
    }
    // One set alone leaves the other as it is, whatever is in its place.
    let argument = Policy {
        flags: uapi::POLICY_DISABLE,
        disable: Exits::HLT.bits(),
        allow: 0,
        ..good
    };
    state.device.policy(uapi::SET_POLICY, argument)?;
    state.before.ensure_unchanged()?;
    state.end()
}

/// SET_VM and RESET_VM, with one thing wrong at a time.
fn overrides(state: &State) -> Result<()> {
    let vm = interface::only_vm()?.id;
    let good = uapi::Override {
        vm,
        disable: Exits::PAUSE.bits(),
        ..Default::default()
    };
    let mut bad = Vec::new();
    for flags in [1 << 1, uapi::NEW_ONLY, 1 << 4, 1 << 31] {
        bad.push(uapi::Override { flags, ..good });
    }
    for disable in [1 << 5, 1 << 32, u64::MAX] {
        bad.push(uapi::Override { disable, ..good });
    }
    for timeout_ms in [uapi::MAX_TIMEOUT + 1, u32::MAX] {
        bad.push(uapi::Override { timeout_ms, ..good });
    }
    bad.push(uapi::Override {
        reserved: 1,
        ..good
    });
    // A vCPU is only for those that say so.
    bad.push(uapi::Override { vcpu_id: 1, ..good });
    for argument in bad {
        let result = state.device.overriding(uapi::SET_VM, argument);
        state.refused(&format!("SET_VM {argument:?}"), result, libc::EINVAL)?;
        let argument = uapi::Override {
            disable: if argument.disable == good.disable {
                0
            } else {
                argument.disable
            },
            ..argument
        };
        let result = state.device.overriding(uapi::RESET_VM, argument);
        state.refused(&format!("RESET_VM {argument:?}"), result, libc::EINVAL)?;
    }
    let result = state.device.overriding(uapi::RESET_VM, good);
    state.refused("RESET_VM with a set", result, libc::EINVAL)?;
    // The longest wait is fine, and what is there already is no change.
    let argument = uapi::Override {
        timeout_ms: uapi::MAX_TIMEOUT,
        disable: 0,
        ..good
    };
    state.device.overriding(uapi::RESET_VM, argument)?;
    state.before.ensure_unchanged()
}

fn ioctl_numbers() -> Result<()> {
    let state = State::new()?;
    let unknown = (0..=0xff)
        .map(|number| 0xbb00 | number)
        .filter(|number| uapi::COMMANDS.iter().all(|(known, ..)| known != number));
    // And with another magic, a direction, a size.
    for command in unknown.chain([
        0,
        0xae00,
        0x8040_bb00,
        0xc040_bb00,
        0x4010_bb01,
        0xffff_ffff,
    ]) {
        let what = format!("command {command:#x}");
        let result = state.device.bytes(command, &mut bytes(64, 64));
        ensure_errno(&what, result, libc::ENOTTY)?;
    }
    state.before.ensure_unchanged()?;
    state.end()
}

fn ioctl_pointers() -> Result<()> {
    let state = State::new()?;
    // SAFETY: A new mapping, at an address that the kernel chooses.
    let page = unsafe {
        nix::sys::mman::mmap_anonymous(
            None,
            4096.try_into()?,
            nix::sys::mman::ProtFlags::PROT_READ,
            nix::sys::mman::MapFlags::MAP_PRIVATE,
        )
    }?;
    let read_only: *mut u8 = page.as_ptr().cast();
    let pointers = [
        ("null", ptr::null_mut()),
        ("near the end", ptr::without_provenance_mut(usize::MAX - 3)),
        (
            "in the kernel",
            ptr::without_provenance_mut(0xffff_8880_0000_0000),
        ),
        ("across the end of a mapping", read_only.wrapping_add(4094)),
    ];
    for (command, ..) in uapi::COMMANDS {
        for (place, pointer) in pointers {
            let what = format!("{command:#x} with a pointer {place}");
            // SAFETY: No memory of this program is there, or none that can be written.
            let result = unsafe { state.device.raw(command, pointer) };
            state.refused(&what, result, libc::EFAULT)?;
        }
    }
    // What can be read and not written, and would change something.
    let vm = interface::only_vm()?.id;
    let directory = state.cgroup.open()?;
    let protect = |protection| {
        // SAFETY: Mapped above, and nobody holds a reference to what is in it.
        unsafe { nix::sys::mman::mprotect(page, 4096, protection) }
    };
    let (readable, writable) = (
        nix::sys::mman::ProtFlags::PROT_READ,
        nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE,
    );
    let policy = state.good(&directory);
    let switch = uapi::Enabled::default();
    let change = uapi::Override {
        vm,
        disable: Exits::PAUSE.bits(),
        ..Default::default()
    };
    let next = uapi::Vm::default();
    for (command, argument) in [
        (uapi::SET_POLICY, (&raw const policy).cast::<u8>()),
        (uapi::SET_ENABLED, (&raw const switch).cast()),
        (uapi::SET_VM, (&raw const change).cast()),
        (uapi::NEXT_VM, (&raw const next).cast()),
    ] {
        let size = uapi::COMMANDS.iter().find(|(known, ..)| *known == command);
        let (_, size, _) = size.context("unknown command")?;
        protect(writable)?;
        // SAFETY: `argument` is of the command's type, hence of this size; the page is larger.
        unsafe { ptr::copy_nonoverlapping(argument, read_only, *size) };
        protect(readable)?;
        // SAFETY: The kernel finds that it cannot write there.
        let result = unsafe { state.device.raw(command, read_only) };
        let what = format!("{command:#x} with an argument that cannot be written");
        state.refused(&what, result, libc::EFAULT)?;
    }
    // SAFETY: Mapped above, and ours.
    unsafe { nix::sys::mman::munmap(page, 4096) }?;
    state.end()
}

fn cgroup_fds() -> Result<()> {
    let state = State::new()?;
    let v1 = V1::mount("exitpolicy")?;
    let file = File::open("/proc/self/exe")?;
    let root = File::open("/")?;
    let inside = File::open(state.cgroup.directory().join("cgroup.procs"))?;
    let v1_directory = File::open(v1.directory())?;
    let sysfs = File::open(SYSFS)?;
    let directory = state.cgroup.open()?;
    let commands = [
        uapi::SET_POLICY,
        uapi::GET_POLICY,
        uapi::CLEAR_POLICY,
        uapi::RESOLVE_POLICY,
    ];
    for command in commands {
        for (what, fd) in [
            ("-1", -1),
            ("not open", 999),
            ("lowest", i32::MIN),
            ("a file", file.as_raw_fd()),
            ("another directory", root.as_raw_fd()),
            ("a file of a cgroup", inside.as_raw_fd()),
            ("a directory of sysfs", sysfs.as_raw_fd()),
            ("the device", state.device.0.as_raw_fd()),
            ("a cgroup v1", v1_directory.as_raw_fd()),
        ] {
            let flags = if command == uapi::SET_POLICY {
                uapi::POLICY_DISABLE
            } else {
                0
            };
            let argument = Policy {
                flags,
                cgroup_fd: fd,
                ..Default::default()
            };
            let result = state.device.policy(command, argument);
            let what = format!("{command:#x} with {what} as cgroup_fd");
            state.refused(&what, result, libc::EBADF)?;
        }
    }
    // O_PATH will do.
    let path = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(state.cgroup.directory())?;
    let argument = Policy {
        cgroup_fd: path.as_raw_fd(),
        ..Default::default()
    };
    state.device.policy(uapi::GET_POLICY, argument)?;
    drop(directory);
    state.before.ensure_unchanged()?;
    state.end()
}

/// A threaded cgroup has no processes of its own, so a policy for it would be for nobody.
fn threaded_cgroup() -> Result<()> {
    let parent = Cgroup::new("parent")?;
    let child = parent.child("threaded")?;
    child.make_threaded()?;
    let state = State::new()?;
    let directory = child.open()?;
    let result = state
        .device
        .policy(uapi::SET_POLICY, state.good(&directory));
    state.refused("SET_POLICY, threaded", result, libc::EOPNOTSUPP)?;
    let attach = Path::new(SYSFS).join("attach");
    let result = write(&attach, child.path().as_bytes());
    state.refused("attach, threaded", result, libc::EOPNOTSUPP)?;
    state.end()
}

/// Policies, VMs and cgroups that do not exist, or not any more.
fn not_there() -> Result<()> {
    let state = State::new()?;
    let bare = Cgroup::new("bare")?;
    let directory = bare.open()?;
    let argument = Policy {
        cgroup_fd: directory.as_raw_fd(),
        ..Default::default()
    };
    for command in [uapi::GET_POLICY, uapi::CLEAR_POLICY] {
        let what = format!("{command:#x} without a policy");
        let result = state.device.policy(command, argument);
        state.refused(&what, result, libc::ENOENT)?;
    }
    for id in [0, 999_999, u64::MAX] {
        let argument = uapi::Vm {
            id,
            ..Default::default()
        };
        let result = state.device.vm(uapi::GET_VM, argument);
        state.refused(&format!("GET_VM {id}"), result, libc::ENOENT)?;
    }
    let vm = interface::only_vm()?.id;
    // The VM's only vCPU has the id 0.
    for (vm, vcpu_id) in [(0, 0), (vm + 1, 0), (u64::MAX, 0), (vm, 1), (vm, u32::MAX)] {
        let argument = uapi::Vcpu {
            vm,
            vcpu_id,
            ..Default::default()
        };
        for command in [uapi::GET_VCPU, uapi::NEXT_VCPU] {
            let result = state.device.vcpu(command, argument);
            let what = format!("{command:#x} of VM {vm}, vCPU {vcpu_id}");
            state.refused(&what, result, libc::ENOENT)?;
        }
        let argument = uapi::Override {
            flags: uapi::VM_VCPU,
            vm,
            vcpu_id,
            ..Default::default()
        };
        for command in [uapi::SET_VM, uapi::RESET_VM] {
            let result = state.device.overriding(command, argument);
            let what = format!("{command:#x} of VM {vm}, vCPU {vcpu_id}");
            state.refused(&what, result, libc::ENOENT)?;
        }
    }
    for vm in [0, vm + 1, u64::MAX] {
        let argument = uapi::Override {
            vm,
            ..Default::default()
        };
        for command in [uapi::SET_VM, uapi::RESET_VM] {
            let result = state.device.overriding(command, argument);
            state.refused(&format!("{command:#x} of VM {vm}"), result, libc::ENOENT)?;
        }
    }
    for last in [u64::MAX, u64::MAX - 1] {
        let argument = uapi::Vm {
            id: last,
            ..Default::default()
        };
        let result = state.device.vm(uapi::NEXT_VM, argument);
        state.refused(&format!("NEXT_VM {last}"), result, libc::ENOENT)?;
        let argument = Policy {
            cgroup_id: last,
            ..Default::default()
        };
        let result = state.device.policy(uapi::NEXT_POLICY, argument);
        state.refused(&format!("NEXT_POLICY {last}"), result, libc::ENOENT)?;
    }

    bare.remove()?;
    let set = state.good(&directory);
    let result = state.device.policy(uapi::SET_POLICY, set);
    state.refused("SET_POLICY of a removed cgroup", result, libc::ENODEV)?;
    // A child of it was never made, and a policy for it would never go.
    for command in [uapi::GET_POLICY, uapi::CLEAR_POLICY, uapi::RESOLVE_POLICY] {
        let result = state.device.policy(command, argument);
        let errno = result.as_ref().err().and_then(io::Error::raw_os_error);
        ensure!(
            [Some(libc::ENODEV), Some(libc::ENOENT)].contains(&errno),
            "{command:#x} of a removed cgroup: {result:?}"
        );
        state.before.ensure_unchanged()?;
    }
    state.end()
}

/// Writes in one system call.
fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    let written = file.write(content)?;
    if written == content.len() {
        Ok(())
    } else {
        Err(io::Error::other(format!("took {written} bytes")))
    }
}

/// Contents that no file of the module takes.
fn garbage() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("only a newline", b"\n".to_vec()),
        ("only spaces", b"   ".to_vec()),
        ("binary", (1..=255).rev().collect()),
        ("NULs", vec![0; 16]),
        ("no UTF-8", b"\xff\xfe".to_vec()),
        ("4095 bytes", vec![b'a'; 4095]),
        ("4096 bytes", vec![b'a'; 4096]),
        ("a megabyte", vec![b'a'; 1 << 20]),
    ]
}

fn sysfs_sets() -> Result<()> {
    let state = State::new()?;
    let directory = sysfs::policy_directory(&state.cgroup)?;
    let mut contents = garbage();
    for text in [
        "hlt,",
        ",hlt",
        "hlt,,pause",
        "hlt pause",
        "hl",
        "hltx",
        "HLT",
        "all,hlt",
        "none,hlt",
        "0",
        "0x2",
        "-1",
        "hlt\npause",
        "hlt\0",
    ] {
        contents.push((text, text.as_bytes().to_vec()));
    }
    for file in ["inherit,hlt", "Inherit", "inherited"] {
        contents.push((file, file.as_bytes().to_vec()));
    }
    let vm = sysfs::vm_directory(interface::only_vm()?.id);
    for path in [
        directory.join("disable"),
        directory.join("allow"),
        vm.join("disable"),
        vm.join("vcpu0/disable"),
    ] {
        for (what, content) in &contents {
            let what = format!("{path:?}: {what}");
            state.refused(&what, write(&path, content), libc::EINVAL)?;
        }
        // What a read gives, a write takes.
        let value = fs::read(&path)?;
        write(&path, &value)?;
    }
    // Policies inherit by being none.
    for file in ["disable", "allow"] {
        let result = write(&directory.join(file), b"inherit");
        state.refused("a policy that inherits", result, libc::EINVAL)?;
    }
    state.before.ensure_unchanged()?;
    state.end()
}

fn sysfs_paths() -> Result<()> {
    let state = State::new()?;
    let attach = PathBuf::from(SYSFS).join("attach");
    let detach = PathBuf::from(SYSFS).join("detach");
    let own = state.cgroup.path();

    for path in [&attach, &detach] {
        for (what, content) in garbage() {
            let what = format!("{path:?}: {what}");
            state.refused(&what, write(path, &content), libc::EINVAL)?;
        }
        for (cgroup, errno) in [
            ("/nowhere", libc::ENOENT),
            ("/own/nowhere", libc::ENOENT),
            ("/own/cgroup.procs", libc::ENOTDIR),
            ("own", libc::EINVAL),
            ("../own", libc::EINVAL),
            ("/own\0", libc::EINVAL),
        ] {
            let what = format!("{path:?}: {cgroup:?}");
            state.refused(&what, write(path, cgroup.as_bytes()), errno)?;
        }
        let long = format!("/{}", "a".repeat(4000));
        let result = write(path, long.as_bytes());
        state.refused("a long name", result, libc::ENOENT)?;
        // The kernel's own walk looks for names in the memory of a file that is open. Many names,
        // as it depends on their hashes what it finds there.
        let _open = File::open(state.cgroup.directory().join("cgroup.procs"))?;
        for number in 0..100 {
            let below = format!("/own/cgroup.procs/{number}");
            let result = write(path, below.as_bytes());
            state.refused("below a file", result, libc::ENOTDIR)?;
        }
    }
    let result = write(&attach, own.as_bytes());
    state.refused("attach where there is a policy", result, libc::EEXIST)?;
    let bare = Cgroup::new("bare")?;
    let result = write(&detach, bare.path().as_bytes());
    state.refused("detach where there is none", result, libc::ENOENT)?;

    // The other way round it works, with a newline and without, and the root is a cgroup too.
    for path in [bare.path(), format!("{}\n", bare.path()), "/\n".to_string()] {
        write(&attach, path.as_bytes()).with_context(|| format!("attach {path:?}"))?;
        write(&detach, path.as_bytes()).with_context(|| format!("detach {path:?}"))?;
    }
    ensure!(
        testing::soon(|| Ok(state.before.ensure_unchanged().is_ok()))?,
        "attach and detach left something"
    );
    state.end()
}

fn sysfs_enabled() -> Result<()> {
    let state = State::new()?;
    let path = Path::new(SYSFS).join("enabled");
    let mut contents = garbage();
    for text in ["2", "-1", "10", "x", "1 0", "enabled"] {
        contents.push((text, text.as_bytes().to_vec()));
    }
    for (what, content) in contents {
        let what = format!("enabled: {what}");
        state.refused(&what, write(&path, &content), libc::EINVAL)?;
    }
    for good in ["0", "1\n", "0\n", "1"] {
        write(&path, good.as_bytes()).context(good)?;
        ensure!(sysfs::top("enabled")? == good.trim(), "after {good:?}");
    }
    state.before.ensure_unchanged()?;
    state.end()
}

/// Nothing that can be written is anyone's but root's, and the rest is read-only.
fn sysfs_modes() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;

    fn walk(directory: &Path, check: &mut impl FnMut(&Path, u32) -> Result<()>) -> Result<()> {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let metadata = fs::metadata(&path)?;
            check(&path, metadata.permissions().mode() & 0o777)?;
            if metadata.is_dir() {
                walk(&path, check)?;
            }
        }
        Ok(())
    }
    let state = State::new()?;
    walk(Path::new(SYSFS), &mut |path, mode| {
        // What is said of a cgroup or a VM, or counts them, is for root only.
        let at_top = path.parent() == Some(Path::new(SYSFS));
        let name = path.file_name().and_then(|name| name.to_str());
        let expected = match name.context("not UTF-8")? {
            "attach" | "detach" => 0o200,
            "enabled" => 0o644,
            "disable" | "allow" => 0o600,
            "vendor" | "supported" | "floor" if at_top => 0o444,
            "cgroups" | "vms" if at_top => 0o700,
            _ if path.is_dir() => 0o755,
            _ => 0o400,
        };
        ensure!(mode == expected, "{path:?} has mode {mode:o}");
        Ok(())
    })?;
    let device = fs::metadata(uapi::DEVICE)?.permissions().mode() & 0o777;
    ensure!(device == 0o600, "{} has mode {device:o}", uapi::DEVICE);
    state.end()
}

/// Tries to change everything that can be changed, and says which tries did not fail as they must.
///
/// `device` was opened by root; only a leak or a mistake hands it to others.
fn try_everything(state: &State, directory: &File) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut note = |what: &str, result: io::Result<()>, expected: &[i32]| {
        let errno = result.as_ref().err().and_then(io::Error::raw_os_error);
        if !errno.is_some_and(|errno| expected.contains(&errno)) {
            wrong.push(format!("{what}: {result:?}"));
        }
    };
    let denied = [libc::EPERM, libc::EACCES];
    let set = state.good(directory);
    let result = state.device.policy(uapi::SET_POLICY, set).map(drop);
    note("SET_POLICY", result, &[libc::EPERM]);
    let clear = Policy {
        cgroup_fd: directory.as_raw_fd(),
        ..Default::default()
    };
    let result = state.device.policy(uapi::CLEAR_POLICY, clear).map(drop);
    note("CLEAR_POLICY", result, &[libc::EPERM]);
    note(
        "SET_ENABLED",
        state.device.set_enabled(false),
        &[libc::EPERM],
    );
    let vm = state.before.first_vm();
    let argument = uapi::Override {
        vm,
        ..Default::default()
    };
    for (name, command) in [("SET_VM", uapi::SET_VM), ("RESET_VM", uapi::RESET_VM)] {
        let result = state.device.overriding(command, argument).map(drop);
        note(name, result, &[libc::EPERM]);
    }
    let opened = OpenOptions::new().read(true).open(uapi::DEVICE).map(drop);
    note("open", opened, &denied);

    let policy = match sysfs::policy_directory(&state.cgroup) {
        Ok(directory) => directory,
        Err(error) => return vec![format!("{error:?}")],
    };
    let top = Path::new(SYSFS);
    for (path, content) in [
        (top.join("enabled"), "0"),
        (top.join("attach"), "/"),
        (top.join("detach"), "/own"),
        (policy.join("disable"), "pause"),
        (policy.join("allow"), "none"),
        (sysfs::vm_directory(vm).join("disable"), "pause"),
        (sysfs::vm_directory(vm).join("vcpu0/disable"), "pause"),
    ] {
        let result = write(&path, content.as_bytes());
        note(&format!("{path:?}"), result, &denied);
    }
    wrong
}

fn unprivileged() -> Result<()> {
    let state = State::new()?;
    let directory = state.cgroup.open()?;
    in_child(|| {
        setgid(Gid::from_raw(65534))?;
        setuid(Uid::from_raw(65534))?;
        Ok(try_everything(&state, &directory))
    })?;
    state.before.ensure_unchanged()?;
    // Root itself may, so it was the user that was refused.
    state
        .device
        .policy(uapi::SET_POLICY, state.good(&directory))?;
    state.end()
}

/// Root of a user namespace of its own: all capabilities there, and files owned by the real root
/// are its own.
fn user_namespace_root() -> Result<()> {
    let state = State::new()?;
    let directory = state.cgroup.open()?;
    in_child(|| {
        leave_chroot().context("leave_chroot")?;
        unshare(CloneFlags::CLONE_NEWUSER).context("unshare")?;
        fs::write("/proc/self/uid_map", "0 0 1")?;
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/gid_map", "0 0 1")?;
        let mut wrong = try_everything(&state, &directory);
        // The mode of the device lets it in; that is no right to change anything.
        wrong.retain(|line| !line.starts_with("open: Ok"));
        Ok(wrong)
    })?;
    state.before.ensure_unchanged()?;
    state.end()
}

/// The command refuses by itself what the module would, and says why.
fn command() -> Result<()> {
    let state = State::new()?;
    let own = state.cgroup.path();
    let outside = cgroup::CGROUP2.to_string() + "/../../../etc";
    for (arguments, status) in [
        (vec![], 2),
        (vec!["nonsense"], 2),
        (vec!["policy", "set", &own], 2),
        (vec!["policy", "set", &own, "--disable", "hlt,bogus"], 2),
        (vec!["policy", "set", &own, "--allow", ""], 2),
        (vec!["policy", "set", "/nowhere", "--disable", "hlt"], 1),
        (vec!["policy", "set", &outside, "--disable", "hlt"], 1),
        (vec!["policy", "clear", "/nowhere"], 1),
        (vec!["vm", "show", "999999"], 1),
        (vec!["vm", "show", "x"], 2),
    ] {
        let what = format!("exitpolicy {}", arguments.join(" "));
        let output = interface::command::run(&arguments)?;
        ensure!(
            output.status.code() == Some(status),
            "{what}: {}, should be {status}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        ensure!(output.stdout.is_empty(), "{what}: an error on stdout");
        ensure!(!output.stderr.is_empty(), "{what}: no message");
        state.before.ensure_unchanged().context(what)?;
    }
    state.end()
}
