// SPDX-License-Identifier: GPL-2.0

//! A module to try the command on where there is none: a seccomp filter hands the command's
//! ioctls on `/dev/exitpolicy`, and its delete_module(2), to the test, which answers them as the
//! contract says, with the policy algebra and real cgroups. The VMs are as the test says; they
//! do not change by themselves.

use crate::common::{
    command,
    write,
    Run, //
};
use exitpolicy::{
    cgroup::Hierarchy,
    policy::{
        Exits,
        Policy,
        Resolved, //
    },
    uapi,
    Host, //
};
use std::{
    collections::BTreeMap,
    fs::{
        self,
        File, //
    },
    io,
    mem::{
        offset_of,
        zeroed, //
    },
    os::{
        fd::{
            AsRawFd,
            FromRawFd,
            OwnedFd, //
        },
        unix::fs::{
            symlink,
            FileExt,
            MetadataExt, //
        },
    },
    path::{
        Path,
        PathBuf, //
    },
    sync::mpsc,
    thread, //
};

/// The host that the command sees, and the state of its module.
pub struct Fake {
    root: tempfile::TempDir,
    /// A cgroup made for the test.
    pub cgroup: PathBuf,
    mount_point: PathBuf,
    pub policies: BTreeMap<u64, Policy>,
    pub vms: BTreeMap<u64, uapi::Vm>,
    /// By the ids of their VMs and their own.
    pub vcpus: BTreeMap<(u64, u32), uapi::Vcpu>,
    /// What every change says of how many vCPUs were waited for in vain.
    pub in_vain: u32,
    /// The flags and the timeout of the last change.
    pub asked: Option<(u32, u32)>,
    /// How often `info` is asked for until no VM holds the module any more.
    pub holds_for: Option<u32>,
    /// What delete_module(2) says, and how often it was called.
    pub unload: Result<(), i32>,
    pub unloads: u32,
    pub info: uapi::Info,
    /// Answers every command with this errno.
    pub refuse: Option<i32>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.cgroup.join("child"));
        let _ = fs::remove_dir(&self.cgroup);
    }
}

impl Fake {
    /// Nothing where cgroups cannot be made, unless `EXITPOLICY_TEST_ALL` says that they can.
    pub fn new(name: &str) -> Option<Self> {
        let made = Hierarchy::find(&Host::default())
            .map_err(|error| error.to_string())
            .and_then(|hierarchy| {
                let name = format!("exitpolicy-{name}-{}", std::process::id());
                let cgroup = hierarchy.mount_point().join(name);
                fs::create_dir_all(cgroup.join("child"))
                    .map(|()| (hierarchy.mount_point().to_owned(), cgroup))
                    .map_err(|error| error.to_string())
            });
        let (mount_point, cgroup) = match made {
            Ok(made) => made,
            Err(error) => {
                assert!(
                    std::env::var_os("EXITPOLICY_TEST_ALL").is_none(),
                    "no cgroup can be made here: {error}"
                );
                eprintln!("skipped: no cgroup can be made here: {error}");
                return None;
            }
        };
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "dev/exitpolicy", "");
        write(
            root.path(),
            "proc/self/mountinfo",
            "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        );
        fs::create_dir_all(root.path().join("sys/fs")).unwrap();
        symlink(&mount_point, root.path().join("sys/fs/cgroup")).unwrap();
        Some(Self {
            root,
            cgroup,
            mount_point,
            policies: BTreeMap::new(),
            vms: BTreeMap::new(),
            vcpus: BTreeMap::new(),
            in_vain: 0,
            asked: None,
            holds_for: None,
            unload: Ok(()),
            unloads: 0,
            info: uapi::Info {
                vendor: uapi::VENDOR_VMX,
                enabled: 1,
                supported: Exits::ALL.bits(),
                ..uapi::Info::default()
            },
            refuse: None,
        })
    }

    /// The directory that stands for `/`.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The id of a cgroup below the one made for the test.
    pub fn id(&self, below: &str) -> u64 {
        id(&self.cgroup.join(below))
    }

    /// Runs the command. CGROUP in the arguments is the cgroup that was made for the test.
    ///
    /// In what is written, the names and ids of cgroups are replaced, and more than one space by
    /// two, since the ids' width differs from host to host.
    pub fn run(&mut self, arguments: &str) -> Run {
        let name = self
            .cgroup
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let mut run = self.supervise(&arguments.replace("CGROUP", &name));
        let ids = [(self.id("child"), "CHILD_ID"), (self.id(""), "CGROUP_ID")];
        for text in [&mut run.stdout, &mut run.stderr] {
            *text = text
                .replace(&name, "CGROUP")
                .split_inclusive('\n')
                .map(|line| normal(line, &ids))
                .collect();
        }
        run
    }

    fn supervise(&mut self, arguments: &str) -> Run {
        let mut command = command(self.root.path(), arguments);
        let (send, receive) = mpsc::channel();
        // The filter holds for the thread that installs it, and for what that thread starts.
        let runner = thread::spawn(move || {
            send.send(listen()).unwrap();
            command.output().unwrap()
        });
        let listener = receive.recv().unwrap().unwrap();
        while let Some(notification) = next(&listener) {
            let result = if i64::from(notification.data.nr) == libc::SYS_delete_module {
                self.delete_module(&notification)
            } else {
                self.ioctl(&notification)
            };
            answer(&listener, notification.id, result);
        }
        runner.join().unwrap().into()
    }

    fn delete_module(&mut self, notification: &libc::seccomp_notif) -> Result<(), i32> {
        let [name, flags, ..] = notification.data.args;
        let process = PathBuf::from(format!("/proc/{}", notification.pid));
        let mut read = [0; 15];
        let memory = File::open(process.join("mem")).unwrap();
        memory.read_exact_at(&mut read, name).unwrap();
        assert_eq!(&read, b"kvm_exitpolicy\0");
        assert_eq!(flags, libc::O_NONBLOCK as u64);
        // It would be a reference.
        let device = self.root.path().join("dev/exitpolicy");
        for entry in fs::read_dir(process.join("fd")).unwrap() {
            let target = fs::read_link(entry.unwrap().path());
            assert!(!target.is_ok_and(|target| target == device));
        }
        self.unloads += 1;
        self.unload
    }

    /// Answers a command as the contract says, with an errno if it fails.
    fn ioctl(&mut self, notification: &libc::seccomp_notif) -> Result<(), i32> {
        let [fd, number, pointer, ..] = notification.data.args;
        let process = PathBuf::from(format!("/proc/{}", notification.pid));
        let opened = fs::read_link(process.join(format!("fd/{fd}"))).unwrap();
        assert_eq!(opened, self.root.path().join("dev/exitpolicy"));
        if let Some(errno) = self.refuse {
            return Err(errno);
        }

        let memory = File::options()
            .read(true)
            .write(true)
            .open(process.join("mem"))
            .unwrap();
        let mut argument = Argument { memory, pointer };
        let number = number as u32;
        match number {
            uapi::GET_INFO => {
                argument.expect_size(size_of::<uapi::Info>());
                if let Some(left) = &mut self.holds_for {
                    *left = left.saturating_sub(1);
                    self.info.holding = u64::from(*left > 0);
                }
                let info = self.info;
                argument.put32(offset_of!(uapi::Info, vendor), info.vendor);
                argument.put32(offset_of!(uapi::Info, enabled), info.enabled);
                argument.put64(offset_of!(uapi::Info, supported), info.supported);
                argument.put64(offset_of!(uapi::Info, floor), info.floor);
                argument.put64(offset_of!(uapi::Info, missed), info.missed);
                argument.put64(offset_of!(uapi::Info, clamps), info.clamps);
                let policies = self.policies.len() as u64;
                argument.put64(offset_of!(uapi::Info, policies), policies);
                argument.put64(offset_of!(uapi::Info, vms), self.vms.len() as u64);
                argument.put64(offset_of!(uapi::Info, pending), info.pending);
                argument.put64(offset_of!(uapi::Info, holding), info.holding);
            }
            uapi::SET_ENABLED => {
                argument.expect_size(size_of::<uapi::Enabled>());
                let flags = argument.get32(offset_of!(uapi::Enabled, flags));
                let timeout = argument.get32(offset_of!(uapi::Enabled, timeout_ms));
                self.changed(flags, uapi::NEW_ONLY | uapi::NO_WAIT, timeout)?;
                self.info.enabled = argument.get32(offset_of!(uapi::Enabled, enabled));
                argument.put32(offset_of!(uapi::Enabled, pending), self.in_vain);
            }
            uapi::NEXT_POLICY => {
                argument.expect_size(size_of::<uapi::Policy>());
                let from = argument.get64(offset_of!(uapi::Policy, cgroup_id));
                let next = self.policies.range(from + 1..).next();
                let (id, policy) = next.ok_or(libc::ENOENT)?;
                argument.put_policy(*id, *policy);
            }
            uapi::NEXT_VM | uapi::GET_VM => {
                argument.expect_size(size_of::<uapi::Vm>());
                let from = argument.get64(offset_of!(uapi::Vm, id));
                let found = if number == uapi::GET_VM {
                    self.vms.get(&from)
                } else {
                    self.vms.range(from + 1..).next().map(|(_, vm)| vm)
                };
                let vm = found.ok_or(libc::ENOENT)?;
                argument.put64(offset_of!(uapi::Vm, id), vm.id);
                argument.put64(offset_of!(uapi::Vm, cgroup_id), vm.cgroup_id);
                argument.put32(offset_of!(uapi::Vm, pid), vm.pid);
                argument.put32(offset_of!(uapi::Vm, vcpus), vm.vcpus);
                argument.put64(offset_of!(uapi::Vm, floor), vm.floor);
                argument.put64(offset_of!(uapi::Vm, requested), vm.requested);
                argument.put64(offset_of!(uapi::Vm, effective), vm.effective);
                argument.put64(offset_of!(uapi::Vm, clamped), vm.clamped);
                argument.put64(offset_of!(uapi::Vm, disable), vm.disable);
                argument.put64(offset_of!(uapi::Vm, refused), vm.refused);
                argument.put32(offset_of!(uapi::Vm, refusal), vm.refusal);
                argument.put32(offset_of!(uapi::Vm, has_disable), vm.has_disable);
                argument.put32(offset_of!(uapi::Vm, pending), vm.pending);
                argument.put32(offset_of!(uapi::Vm, adopted), vm.adopted);
            }
            uapi::NEXT_VCPU | uapi::GET_VCPU => {
                argument.expect_size(size_of::<uapi::Vcpu>());
                let vm = argument.get64(offset_of!(uapi::Vcpu, vm));
                let from = argument.get32(offset_of!(uapi::Vcpu, vcpu_id));
                let found = if number == uapi::GET_VCPU {
                    self.vcpus.get(&(vm, from))
                } else {
                    let mut from_there = self.vcpus.range((vm, from)..=(vm, u32::MAX));
                    from_there.next().map(|(_, vcpu)| vcpu)
                };
                let vcpu = found.ok_or(libc::ENOENT)?;
                argument.put32(offset_of!(uapi::Vcpu, vcpu_id), vcpu.vcpu_id);
                argument.put32(offset_of!(uapi::Vcpu, state), vcpu.state);
                argument.put64(offset_of!(uapi::Vcpu, disable), vcpu.disable);
                argument.put64(offset_of!(uapi::Vcpu, wanted), vcpu.wanted);
                argument.put64(offset_of!(uapi::Vcpu, in_force), vcpu.in_force);
                argument.put64(offset_of!(uapi::Vcpu, refused), vcpu.refused);
                argument.put32(offset_of!(uapi::Vcpu, refusal), vcpu.refusal);
                argument.put32(offset_of!(uapi::Vcpu, has_disable), vcpu.has_disable);
            }
            uapi::SET_VM | uapi::RESET_VM => {
                argument.expect_size(size_of::<uapi::Override>());
                let flags = argument.get32(offset_of!(uapi::Override, flags));
                let timeout = argument.get32(offset_of!(uapi::Override, timeout_ms));
                self.changed(flags, uapi::VM_VCPU | uapi::NO_WAIT, timeout)?;
                let vm = argument.get64(offset_of!(uapi::Override, vm));
                let vcpu = argument.get32(offset_of!(uapi::Override, vcpu_id));
                let disable = argument.get64(offset_of!(uapi::Override, disable));
                let set = number == uapi::SET_VM;
                assert!(set || disable == 0);
                assert!(flags & uapi::VM_VCPU != 0 || vcpu == 0);
                self.overridden(vm, (flags & uapi::VM_VCPU != 0).then_some(vcpu), {
                    set.then_some(disable)
                })?;
                argument.put32(offset_of!(uapi::Override, pending), self.in_vain);
            }
            _ => {
                argument.expect_size(size_of::<uapi::Policy>());
                let fd = argument.get32(offset_of!(uapi::Policy, cgroup_fd));
                let directory = fs::read_link(process.join(format!("fd/{fd}"))).unwrap();
                self.on_cgroup(number, &directory, &mut argument)?;
            }
        }
        Ok(())
    }

    /// Notes how something was asked for, and refuses what the contract refuses.
    fn changed(&mut self, flags: u32, known: u32, timeout_ms: u32) -> Result<(), i32> {
        if flags & !known != 0 || timeout_ms > 60_000 {
            return Err(libc::EINVAL);
        }
        self.asked = Some((flags, timeout_ms));
        Ok(())
    }

    /// Sets an override, or takes it away, and has it in force at once where no vCPU is on its
    /// way.
    fn overridden(&mut self, vm: u64, one: Option<u32>, disable: Option<u64>) -> Result<(), i32> {
        let whole = self.vms.get_mut(&vm).ok_or(libc::ENOENT)?;
        if let Some(one) = one {
            self.vcpus.get(&(vm, one)).ok_or(libc::ENOENT)?;
        } else {
            whole.has_disable = disable.is_some().into();
            whole.disable = disable.unwrap_or(0);
            whole.effective = whole.floor | whole.requested | whole.disable;
        }
        for ((_, id), vcpu) in self.vcpus.range_mut((vm, 0)..=(vm, u32::MAX)) {
            if one == Some(*id) || (one.is_none() && disable.is_none()) {
                vcpu.has_disable = (one.is_some() && disable.is_some()).into();
                vcpu.disable = disable.filter(|_| one.is_some()).unwrap_or(0);
            }
            vcpu.wanted = if vcpu.has_disable != 0 {
                whole.floor | whole.requested | vcpu.disable
            } else {
                whole.effective
            };
            if vcpu.state == uapi::VCPU_IN_FORCE {
                let differs = vcpu.wanted ^ vcpu.in_force;
                vcpu.in_force ^= differs & !vcpu.refused;
            }
        }
        Ok(())
    }

    /// Adds a VM in the test's cgroup, all of whose vCPUs have what they should.
    pub fn add_vm(&mut self, id: u64, vcpus: u32, effective: u64) {
        let vm = uapi::Vm {
            id,
            cgroup_id: self.id(""),
            pid: 4711,
            vcpus,
            effective,
            ..uapi::Vm::default()
        };
        self.vms.insert(id, vm);
        for vcpu_id in 0..vcpus {
            let vcpu = uapi::Vcpu {
                vm: id,
                vcpu_id,
                wanted: effective,
                in_force: effective,
                ..uapi::Vcpu::default()
            };
            self.vcpus.insert((id, vcpu_id), vcpu);
        }
    }

    /// Puts a vCPU on its way.
    pub fn delay(&mut self, vm: u64, vcpu: u32, state: u32, in_force: u64) {
        let vcpu = self.vcpus.get_mut(&(vm, vcpu)).unwrap();
        vcpu.state = state;
        vcpu.in_force = in_force;
        self.vms.get_mut(&vm).unwrap().pending += 1;
        self.info.pending += 1;
    }

    /// Refuses a VM the change of exits.
    pub fn refuse_change(&mut self, vm: u64, exits: u64, reason: u32) {
        let whole = self.vms.get_mut(&vm).unwrap();
        whole.refused = exits;
        whole.refusal = reason;
        for (_, vcpu) in self.vcpus.range_mut((vm, 0)..=(vm, u32::MAX)) {
            vcpu.refused = exits;
            vcpu.refusal = reason;
            vcpu.in_force ^= exits;
        }
    }

    fn on_cgroup(
        &mut self,
        number: u32,
        directory: &Path,
        argument: &mut Argument,
    ) -> Result<(), i32> {
        let cgroup = id(directory);
        match number {
            uapi::SET_POLICY => {
                let flags = argument.get32(offset_of!(uapi::Policy, flags));
                let sets = uapi::POLICY_DISABLE | uapi::POLICY_ALLOW;
                let timeout = argument.get32(offset_of!(uapi::Policy, timeout_ms));
                self.changed(flags, sets | uapi::NEW_ONLY | uapi::NO_WAIT, timeout)?;
                argument.put32(offset_of!(uapi::Policy, pending), self.in_vain);
                let set = |flag, offset| {
                    let bits = argument.get64(offset);
                    (flags & flag != 0).then(|| Exits::from_bits(bits).unwrap())
                };
                let disable = set(uapi::POLICY_DISABLE, offset_of!(uapi::Policy, disable));
                let allow = set(uapi::POLICY_ALLOW, offset_of!(uapi::Policy, allow));
                let policy = self.policies.entry(cgroup).or_insert(Policy::NEUTRAL);
                *policy = policy.with(disable, allow);
            }
            uapi::GET_POLICY => {
                let policy = *self.policies.get(&cgroup).ok_or(libc::ENOENT)?;
                argument.put_policy(cgroup, policy);
            }
            uapi::CLEAR_POLICY => {
                let flags = argument.get32(offset_of!(uapi::Policy, flags));
                let timeout = argument.get32(offset_of!(uapi::Policy, timeout_ms));
                self.changed(flags, uapi::NEW_ONLY | uapi::NO_WAIT, timeout)?;
                argument.put32(offset_of!(uapi::Policy, pending), self.in_vain);
                self.policies.remove(&cgroup).ok_or(libc::ENOENT)?;
            }
            uapi::RESOLVE_POLICY => {
                let above = directory
                    .ancestors()
                    .take_while(|path| path.starts_with(&self.mount_point))
                    .filter_map(|path| Some((id(path), *self.policies.get(&id(path))?)));
                let Resolved {
                    disable,
                    allow,
                    source,
                } = Resolved::from_nearest_to_root(above);
                argument.put_policy(source.unwrap_or(0), Policy { disable, allow });
            }
            _ => return Err(libc::ENOTTY),
        }
        Ok(())
    }
}

/// One line with the ids named and its columns two spaces apart.
fn normal(line: &str, ids: &[(u64, &str)]) -> String {
    let indent = line.len() - line.trim_start_matches(' ').len();
    let mut normal = line[..indent].to_owned();
    let mut rest = &line[indent..];
    while let Some(first) = rest.chars().next() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let spaces = rest.len() - rest.trim_start_matches(' ').len();
        let taken = digits.max(spaces).max(first.len_utf8());
        // A number is an id at the beginning of a line of a table, or where it is called so.
        let before = normal.trim_end();
        let is_id = before.is_empty() || before == "id" || before.ends_with("\"id\":");
        let known = ids
            .iter()
            .find(|(id, _)| is_id && rest[..taken] == id.to_string());
        normal += match known {
            Some((_, name)) => name,
            None if spaces > 2 => "  ",
            None => &rest[..taken],
        };
        rest = &rest[taken..];
    }
    normal
}

fn id(cgroup: &Path) -> u64 {
    // On 64-bit hosts a cgroup's inode number is its id.
    fs::metadata(cgroup).unwrap().ino()
}

/// The structure in the command's memory.
struct Argument {
    memory: File,
    pointer: u64,
}

impl Argument {
    fn expect_size(&self, size: usize) {
        assert_eq!(self.get32(0) as usize, size);
    }

    fn get32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.memory
            .read_exact_at(&mut bytes, self.pointer + offset as u64)
            .unwrap();
        u32::from_ne_bytes(bytes)
    }

    fn get64(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        self.memory
            .read_exact_at(&mut bytes, self.pointer + offset as u64)
            .unwrap();
        u64::from_ne_bytes(bytes)
    }

    fn put32(&mut self, offset: usize, value: u32) {
        self.memory
            .write_all_at(&value.to_ne_bytes(), self.pointer + offset as u64)
            .unwrap();
    }

    fn put64(&mut self, offset: usize, value: u64) {
        self.memory
            .write_all_at(&value.to_ne_bytes(), self.pointer + offset as u64)
            .unwrap();
    }

    fn put_policy(&mut self, cgroup: u64, policy: Policy) {
        self.put64(offset_of!(uapi::Policy, cgroup_id), cgroup);
        self.put64(offset_of!(uapi::Policy, disable), policy.disable.bits());
        self.put64(offset_of!(uapi::Policy, allow), policy.allow.bits());
    }
}

/// Makes the kernel ask about each ioctl with the magic number of `/dev/exitpolicy`, and about
/// each delete_module, in this thread and in what it starts.
fn listen() -> io::Result<OwnedFd> {
    const IOCTL: u32 = libc::SYS_ioctl as u32;
    const DELETE_MODULE: u32 = libc::SYS_delete_module as u32;
    const MAGIC: u32 = uapi::GET_INFO;

    // Offsets in struct seccomp_data: nr, and the low half of args[1].
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let unless = |value, skip| libc::sock_filter {
        jf: skip,
        ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value)
    };
    let filter = [
        load(0),
        unless(DELETE_MODULE, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF),
        unless(IOCTL, 4),
        load(24),
        statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, !0xff),
        unless(MAGIC, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: Plain numbers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: The program points to a filter of its length; the kernel copies it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &program,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: The kernel just made it, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

/// The next ioctl, or nothing when all that the filter holds for have ended.
fn next(listener: &OwnedFd) -> Option<libc::seccomp_notif> {
    let mut poll = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: One structure, which lives through the call.
    assert_eq!(unsafe { libc::poll(&mut poll, 1, -1) }, 1);
    if poll.revents & libc::POLLIN == 0 {
        return None;
    }
    // SAFETY: Plain numbers, for which zero is valid.
    let mut notification: libc::seccomp_notif = unsafe { zeroed() };
    // SAFETY: The command fills a structure of this type, which has to be zero before.
    let result = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_RECV,
            &mut notification,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    Some(notification)
}

fn answer(listener: &OwnedFd, id: u64, result: Result<(), i32>) {
    let mut response = libc::seccomp_notif_resp {
        id,
        val: 0,
        error: result.err().map_or(0, |errno| -errno),
        flags: 0,
    };
    // SAFETY: The command reads a structure of this type.
    let result = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            &mut response,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}
