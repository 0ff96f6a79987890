// SPDX-License-Identifier: GPL-2.0

//! What others than the administrator can see, change, and cost: users, containers, delegates of a
//! cgroup, VMMs and guests. `Documentation/security.md` has what is promised.

use std::{
    collections::BTreeSet,
    fs::{
        self,
        File, //
    },
    io,
    os::unix::fs::chown,
    path::Path,
    process::{
        Child,
        Command, //
    }, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use nix::{
    sched::{
        sched_getaffinity,
        sched_setaffinity,
        unshare,
        CloneFlags,
        CpuSet, //
    },
    unistd::{
        getpid,
        setgid,
        setgroups,
        setuid,
        Gid,
        Pid,
        Uid, //
    },
};
use testing::{
    cgroup::{
        Cgroup,
        CGROUP2, //
    },
    client::{
        Thread,
        Vmm, //
    },
    exits::{
        Calls,
        Counter,
        Vendor,
        TRACEFS, //
    },
    interface::{
        self,
        ioctl,
        sysfs,
        Snapshot,
        SYSFS, //
    },
    kernel_log::KernelLog,
    payload::Payload,
    soon,
    uapi::{
        self,
        Device, //
    },
    vmm::{
        Action,
        Work, //
    }, //
};

use crate::{
    cgroups::{
        ensure_slab_shrinks_to,
        slab, //
    },
    child::{
        in_child,
        leave_chroot, //
    },
    few_will_do,
    matrix::{
        floor,
        supported, //
    },
    Test, //
};

/// The user `nobody`.
const NOBODY: u32 = 65534;

/// What anybody may know: what this host can do, and whether it is told to.
const PUBLIC: [&str; 4] = ["enabled", "floor", "supported", "vendor"];

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let (rounds, writes) = if few_will_do()? {
        (20, 2_000)
    } else {
        (100, 20_000)
    };
    let no_mwait = !supported(vendor)?.contains(Exits::MWAIT);
    Ok(vec![
        Test::new("isolation::stranger", stranger),
        Test::new("isolation::container", container),
        Test::new(
            "isolation::root_without_capabilities",
            root_without_capabilities,
        ),
        Test::new("isolation::delegate", move || delegate(vendor)),
        Test::new("isolation::quota_ends_native_hlt", move || {
            quota(vendor, Payload::Hlt)
        }),
        Test::new("isolation::quota_ends_native_mwait", move || {
            quota(vendor, Payload::Mwait)
        })
        .ignored(no_mwait),
        Test::new(
            format!("isolation::vmm_is_not_heard_in_{rounds}_rounds"),
            move || vmm_is_not_heard(vendor, rounds),
        ),
        Test::new(
            format!("isolation::guest_is_not_heard_in_{writes}_writes"),
            move || guest_is_not_heard(vendor, writes),
        )
        // There, a guest can have nothing recalculated.
        .ignored(vendor == Vendor::Vmx),
    ])
}

/// A host with tenants: a cgroup with a policy, and a VM in it.
struct Tenant {
    vmm: Vmm,
    device: Device,
    before: Snapshot,
}

impl Tenant {
    fn new(cgroup: &Cgroup) -> Result<Self> {
        // Not every kernel is built so that it begins like this.
        fs::write("/proc/sys/kernel/dmesg_restrict", "1")?;
        ioctl::set_policy(cgroup, Exits::HLT, !Exits::MWAIT)?;
        let mut vmm = Vmm::start(cgroup)?;
        let vm = vmm.create_vm()?;
        vmm.create_vcpu(vm, 0)?;
        interface::only_vm()?;
        Ok(Self {
            before: Snapshot::take()?,
            device: Device::open()?,
            vmm,
        })
    }

    fn end(self) -> Result<()> {
        self.before.ensure_unchanged()?;
        self.vmm.kill()
    }
}

/// Which files below the module's directory in sysfs can be read, and which directories listed.
fn seen() -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    fn walk(
        directory: &Path,
        files: &mut BTreeSet<String>,
        directories: &mut BTreeSet<String>,
    ) -> Result<()> {
        let Ok(entries) = fs::read_dir(directory) else {
            return Ok(());
        };
        let name = |path: &Path| -> Result<String> {
            let path = path.strip_prefix(SYSFS)?.to_str();
            Ok(path.context("not UTF-8")?.to_string())
        };
        directories.insert(name(directory)?);
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                walk(&path, files, directories)?;
            } else if fs::read(&path).is_ok() {
                files.insert(name(&path)?);
            }
        }
        Ok(())
    }
    let (mut files, mut directories) = (BTreeSet::new(), BTreeSet::new());
    walk(Path::new(SYSFS), &mut files, &mut directories)?;
    Ok((files, directories))
}

/// Says what can be learned through the device, by who has it open and should not.
fn tell_by(device: &Device) -> Vec<String> {
    let mut wrong = Vec::new();
    for (command, size, _) in uapi::COMMANDS {
        let mut argument = vec![0; size];
        argument[..4].copy_from_slice(&(size as u32).to_ne_bytes());
        let before = argument.clone();
        let result = device.bytes(command, &mut argument);
        let errno = result.as_ref().err().and_then(io::Error::raw_os_error);
        if errno != Some(libc::EPERM) || argument != before {
            wrong.push(format!("{command:#x}: {result:?}, {argument:x?}"));
        }
    }
    wrong
}

/// Says what can be learned, beside what everybody may know, by who has no business with it.
fn learned(device: &Device) -> Result<Vec<String>> {
    let mut wrong = tell_by(device);
    let (files, directories) = seen()?;
    if !files.iter().eq(PUBLIC.iter()) {
        wrong.push(format!("can be read: {files:?}"));
    }
    if !directories.iter().eq([""].iter()) {
        wrong.push(format!("can be listed: {directories:?}"));
    }
    for closed in [TRACEFS, "/sys/kernel/debug"] {
        if fs::read_dir(closed).is_ok() {
            wrong.push(format!("{closed} can be listed"));
        }
    }
    // A process that looks at its own descriptors does not get around the mode.
    for path in [uapi::DEVICE, "/dev/kmsg"] {
        if File::open(path).is_ok() {
            wrong.push(format!("{path} can be opened"));
        }
    }
    Ok(wrong)
}

/// Becomes another user, for good.
fn become_nobody() -> Result<()> {
    setgroups(&[])?;
    setgid(Gid::from_raw(NOBODY))?;
    Ok(setuid(Uid::from_raw(NOBODY))?)
}

/// An unprivileged user, even one that was handed the device by mistake.
fn stranger() -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let tenant = Tenant::new(&cgroup)?;
    // Root is told all that others are not: it is not that there is nothing to tell.
    let (files, directories) = seen()?;
    ensure!(
        files.len() > PUBLIC.len() && directories.len() > 1,
        "root sees {files:?} and {directories:?}"
    );
    in_child(|| {
        become_nobody()?;
        learned(&tenant.device)
    })?;
    tenant.end()
}

/// The root of a container with a user namespace and a cgroup namespace, whose cgroup is delegated
/// to it, and that has policies and VMs beside it.
fn container() -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let tenant = Tenant::new(&cgroup)?;
    let delegated = Delegated::new("container")?;
    in_child(|| {
        leave_chroot().context("leave_chroot")?;
        delegated.0.add_process(getpid().as_raw())?;
        become_root_of_namespaces()?;
        let mut wrong = learned(&tenant.device)?;
        let inside = Path::new(CGROUP2).join("container/inside");
        fs::create_dir(&inside)?;
        for (path, content) in [
            ("attach", "/inside"),
            ("attach", "/"),
            ("detach", "/"),
            ("enabled", "0"),
        ] {
            let path = Path::new(SYSFS).join(path);
            if fs::write(&path, content).is_ok() {
                wrong.push(format!("{content} can be written to {path:?}"));
            }
        }
        fs::remove_dir(&inside)?;
        Ok(wrong)
    })?;
    tenant.end()
}

/// Becomes root of a user namespace that is nobody outside of it, and of a cgroup namespace.
fn become_root_of_namespaces() -> Result<()> {
    become_nobody()?;
    // Who has changed its user is not let at its own files in /proc.
    nix::sys::prctl::set_dumpable(true)?;
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWCGROUP).context("unshare")?;
    fs::write("/proc/self/uid_map", format!("0 {NOBODY} 1"))?;
    fs::write("/proc/self/setgroups", "deny")?;
    Ok(fs::write("/proc/self/gid_map", format!("0 {NOBODY} 1"))?)
}

/// The root of a container without a user namespace: root's files are its own, and it has no
/// capability. Names of directories are all that it can see of others.
fn root_without_capabilities() -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let tenant = Tenant::new(&cgroup)?;
    in_child(|| {
        drop_capabilities()?;
        // Without them there is no way around a mode, and root's files are root's all the same.
        let mut wrong = tell_by(&Device::open()?);
        let (files, directories) = seen()?;
        if !files.iter().eq(PUBLIC.iter()) {
            wrong.push(format!("can be read: {files:?}"));
        }
        if directories.len() < 4 {
            wrong.push(format!("not as documented, and better: {directories:?}"));
        }
        for name in ["enabled", "attach", "detach"] {
            let path = Path::new(SYSFS).join(name);
            let errno = fs::write(&path, "/own")
                .err()
                .and_then(|e| e.raw_os_error());
            if errno != Some(libc::EPERM) {
                wrong.push(format!("{path:?}: errno {errno:?}"));
            }
        }
        Ok(wrong)
    })?;
    tenant.end()
}

/// capset(2) with nothing.
fn drop_capabilities() -> Result<()> {
    /// _LINUX_CAPABILITY_VERSION_3
    const VERSION: u32 = 0x2008_0522;
    let header = [VERSION, 0];
    let none = [0u32; 6];
    // SAFETY: A header, and the two structures of three words each that this version has.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    ensure!(result == 0, "capset: {}", io::Error::last_os_error());
    Ok(())
}

/// A cgroup that is left to `nobody`.
struct Delegated(Cgroup);

impl Delegated {
    fn new(name: &str) -> Result<Self> {
        let cgroup = Cgroup::new(name)?;
        chown(cgroup.directory(), Some(NOBODY), Some(NOBODY))?;
        // What /sys/kernel/cgroup/delegate has of a cgroup without controllers.
        for file in ["cgroup.procs", "cgroup.threads", "cgroup.subtree_control"] {
            let path = cgroup.directory().join(file);
            chown(&path, Some(NOBODY), Some(NOBODY))?;
        }
        Ok(Self(cgroup))
    }
}

/// What its owner has made in it goes first, and waits for processes that are about to go.
impl Drop for Delegated {
    fn drop(&mut self) {
        for below in ["inside", "threaded", "a/b", "a"] {
            let path = self.0.directory().join(below);
            let gone = soon(|| Ok(!path.exists() || fs::remove_dir(&path).is_ok()));
            if !matches!(gone, Ok(true)) {
                eprintln!("cannot remove {}", path.display());
            }
        }
    }
}

/// Who owns a subtree moves VMMs within it, and gets none of them out of what is allowed above, nor
/// into what others have.
fn delegate(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    let rich = Cgroup::new("rich")?;
    ioctl::set_policy(&rich, Exits::HLT, Exits::ALL)?;
    let tenant = Delegated::new("tenant")?;
    ioctl::set_policy(&tenant.0, Exits::HLT, Exits::NONE)?;
    let mut vmm = Vmm::start(&tenant.0)?;
    let vm = vmm.create_vm()?;
    vmm.disable_exits(vm, Exits::HLT)?;
    vmm.create_vcpu(vm, 0)?;
    let ensure_clamped = |what: &str, cgroup: &str| -> Result<()> {
        ensure!(
            soon(|| Ok(ioctl::vms()?.iter().all(|view| view.cgroup == cgroup)))?,
            "{what}: {:?}",
            ioctl::vms()?
        );
        let view = interface::only_vm()?;
        ensure!(
            view.effective == floor && view.clamped == Exits::HLT & !floor,
            "{what}: {view:?}"
        );
        Ok(())
    };
    ensure_clamped("at first", "/tenant")?;

    let pid = vmm.pid();
    let top = tenant.0.directory().to_path_buf();
    let as_delegate = |steps: &dyn Fn(&mut Vec<String>) -> Result<()>| {
        in_child(|| {
            become_nobody()?;
            let mut wrong = Vec::new();
            steps(&mut wrong)?;
            Ok(wrong)
        })
    };
    as_delegate(&|_| {
        fs::create_dir(top.join("a"))?;
        fs::create_dir(top.join("a/b"))?;
        Ok(fs::write(top.join("a/b/cgroup.procs"), pid.to_string())?)
    })?;
    ensure_clamped("two below", "/tenant/a/b")?;
    as_delegate(&|_| {
        // Processes of a threaded cgroup count as those of the one above.
        fs::write(top.join("cgroup.procs"), pid.to_string())?;
        fs::create_dir(top.join("threaded"))?;
        fs::write(top.join("threaded/cgroup.type"), "threaded")?;
        Ok(fs::write(
            top.join("threaded/cgroup.threads"),
            pid.to_string(),
        )?)
    })?;
    ensure_clamped("in a threaded cgroup", "/tenant")?;
    as_delegate(&|wrong| {
        for way_out in ["rich", "."] {
            let path = Path::new(CGROUP2).join(way_out).join("cgroup.procs");
            if fs::write(&path, pid.to_string()).is_ok() {
                wrong.push(format!("moved to {path:?}"));
            }
        }
        for file in ["cgroup.type", "../rich/cgroup.type"] {
            if fs::write(top.join(file), "threaded").is_ok() {
                wrong.push(format!("{file} can be written"));
            }
        }
        Ok(())
    })?;
    ensure_clamped("after trying to leave", "/tenant")?;
    // So it was the policy that held, not that nothing could be given.
    rich.add_process(pid)?;
    ensure!(
        soon(|| Ok(interface::only_vm()?.effective == floor | Exits::HLT))?,
        "{:?}",
        ioctl::vms()?
    );
    vmm.kill()
}

/// The cpu controller, for the children of the root.
struct CpuController(());

impl CpuController {
    fn new() -> Result<Self> {
        Self::write("+cpu")?;
        Ok(Self(()))
    }

    fn write(what: &str) -> io::Result<()> {
        fs::write(Path::new(CGROUP2).join("cgroup.subtree_control"), what)
    }
}

impl Drop for CpuController {
    fn drop(&mut self) {
        if let Err(error) = Self::write("-cpu") {
            eprintln!("cannot switch the cpu controller off again: {error}");
        }
    }
}

/// Microseconds of a period of the tests' quotas.
const PERIOD: u64 = 100_000;
/// Microseconds of it that a VM may have which has a quota.
const QUOTA: u64 = 20_000;
/// More than there are CPUs: never reached, but its periods are counted.
const NO_QUOTA: u64 = 1024 * PERIOD;
/// How many periods are looked at.
const PERIODS: u64 = 20;

/// What `cpu.stat` says of a cgroup.
#[derive(Clone, Copy, Debug)]
struct Used {
    usage: u64,
    periods: u64,
    throttled: u64,
}

impl Used {
    fn of(cgroup: &Cgroup) -> Result<Self> {
        let text = fs::read_to_string(cgroup.directory().join("cpu.stat"))?;
        let value = |name: &str| -> Result<u64> {
            let mut lines = text.lines();
            let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            Ok(line
                .with_context(|| format!("no {name} in {text}"))?
                .parse()?)
        };
        Ok(Self {
            usage: value("usage_usec")?,
            periods: value("nr_periods")?,
            throttled: value("nr_throttled")?,
        })
    }

    fn since(self, before: Self) -> Self {
        Self {
            usage: self.usage - before.usage,
            periods: self.periods - before.periods,
            throttled: self.throttled - before.throttled,
        }
    }
}

fn set_quota(cgroup: &Cgroup, quota: u64) -> Result<()> {
    let path = cgroup.directory().join("cpu.max");
    fs::write(&path, format!("{quota} {PERIOD}")).with_context(|| format!("{path:?}"))
}

/// What two cgroups use until [`PERIODS`] periods of the first one's are over.
fn measure(clock: &Cgroup, other: &Cgroup) -> Result<(Used, Used)> {
    let before = (Used::of(clock)?, Used::of(other)?);
    let over = || Ok(Used::of(clock)?.periods >= before.0.periods + PERIODS);
    ensure!(soon(over)?, "{clock:?} has no periods: {:?}", before.0);
    Ok((
        Used::of(clock)?.since(before.0),
        Used::of(other)?.since(before.1),
    ))
}

/// A process that wants all of a CPU.
struct Spinner(Child);

impl Spinner {
    fn start(cgroup: &Cgroup, cpu: usize) -> Result<Self> {
        let child = Command::new("/bin/sh")
            .args(["-c", "while :; do :; done"])
            .spawn()?;
        let spinner = Self(child);
        let pid = spinner.0.id() as i32;
        pin(pid, cpu)?;
        cgroup.add_process(pid)?;
        Ok(spinner)
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pin(tid: i32, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(tid), &set)?)
}

/// A guest that halts natively, or waits by MWAIT, and has nothing that wakes it, has the CPU for as
/// long as its cgroup's quota says, and no longer; without a quota it has all that others leave it.
///
/// All by the kernel's own accounting: a quota's periods are the clock.
fn quota(vendor: Vendor, payload: Payload) -> Result<()> {
    let exit = payload.exit();
    let _cpu = CpuController::new()?;
    let tenant = Cgroup::new("tenant")?;
    let neighbour = Cgroup::new("neighbour")?;
    set_quota(&tenant, NO_QUOTA)?;
    set_quota(&neighbour, NO_QUOTA)?;
    ioctl::set_policy(&tenant, exit, Exits::ALL)?;
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let last = (0..CpuSet::count()).rfind(|cpu| allowed.is_set(*cpu) == Ok(true));
    let last = last.context("no CPU")?;

    let mut vmm = Vmm::start(&tenant)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    pin(vcpu.tid, last)?;
    let guest = vmm.guest(vm)?;
    let work = Work {
        ticks: 0,
        ..Work::new(payload, u32::MAX)
    };
    vmm.start_run(vcpu, work)?;
    ensure!(
        soon(|| Ok(guest.params(0).begun > 0))?,
        "the guest is stuck"
    );
    let view = interface::only_vm()?;
    ensure!(view.effective == floor(vendor)? | exit, "{view:?}");

    let exits = Counter::start(vcpu.tid)?;
    let (alone, _) = measure(&tenant, &neighbour)?;
    eprintln!("    alone, no quota: {alone:?}");
    // Where there is one CPU, the test itself is on it, and asks and asks.
    let cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true));
    let several = cpus.count() > 1;
    let part = if several { 2 } else { 4 };
    ensure!(
        alone.usage >= alone.periods * PERIOD / part,
        "a vCPU that idles natively does not count as busy: {alone:?}"
    );
    let spinner = Spinner::start(&neighbour, last)?;
    let (other, shared) = measure(&neighbour, &tenant)?;
    eprintln!("    beside a busy neighbour, no quota: {shared:?}, neighbour {other:?}");
    ensure!(
        shared.usage >= other.usage / 4 && other.usage >= shared.usage / 4,
        "not shared: {shared:?}, neighbour {other:?}"
    );

    set_quota(&tenant, QUOTA)?;
    let (other, limited) = measure(&neighbour, &tenant)?;
    eprintln!("    beside it, 20 %: {limited:?}, neighbour {other:?}");
    ensure_limited(limited)?;
    // There, the test takes half of what the quota leaves.
    let least = limited.usage * if several { 4 } else { 3 } / 2;
    ensure!(
        other.usage >= least,
        "the neighbour waits: {limited:?}, neighbour {other:?}"
    );
    drop(spinner);
    let (limited, _) = measure(&tenant, &neighbour)?;
    eprintln!("    alone, 20 %: {limited:?}");
    ensure_limited(limited)?;

    let exits = exits.finish()?.of(vendor, payload);
    ensure!(
        exits.iter().all(|exits| *exits == 0),
        "{exits:?} exits: the guest did not idle natively"
    );
    set_quota(&tenant, NO_QUOTA)?;
    if payload == Payload::Hlt {
        let spinner = Spinner::start(&neighbour, last)?;
        ioctl::set_policy(&tenant, Exits::NONE, Exits::ALL)?;
        let (other, trapped) = measure(&neighbour, &tenant)?;
        eprintln!("    beside it, no quota, HLT exits: {trapped:?}, neighbour {other:?}");
        ensure!(
            trapped.usage < other.usage / 10,
            "busy though it sleeps: {trapped:?}, neighbour {other:?}"
        );
        drop(spinner);
    }
    vmm.leave(vcpu)?;
    vmm.kill()
}

/// What was used before a quota, or is repaid after it, belongs to another period.
fn ensure_limited(used: Used) -> Result<()> {
    const SLACK: u64 = 5;
    ensure!(
        used.usage <= QUOTA * (used.periods + SLACK) && used.throttled > 0,
        "more than its quota: {used:?}"
    );
    Ok(())
}

/// What a VMM can do again and again: VMs that come and go, vCPUs whose creation fails, the guest's
/// CPUID, MSR filters, moves. It costs the host no line in its log, what is listed is what there is,
/// and all of it is given back.
fn vmm_is_not_heard(vendor: Vendor, rounds: usize) -> Result<()> {
    let homes = [Cgroup::new("one")?, Cgroup::new("other")?];
    ioctl::set_policy(&homes[0], Exits::HLT, Exits::ALL)?;
    ioctl::set_policy(&homes[1], Exits::NONE, Exits::NONE)?;
    let device = Device::open()?;
    let missed = device.info()?.missed;
    let mut vmm = Vmm::start(&homes[0])?;
    let threads = [vmm.thread()?, vmm.thread()?];
    // Caches fill first.
    for round in 0..rounds / 4 {
        noise(vendor, &mut vmm, threads, &homes[round % 2])?;
    }
    interface::ensure_no_vms()?;
    let before = slab()?;
    let mut log = KernelLog::from_now()?;
    let mut most = 0;
    for round in 0..rounds {
        noise(vendor, &mut vmm, threads, &homes[round % 2])?;
        let info = device.info()?;
        ensure!(info.vms == 0, "round {round}: {info:?}");
        // The directory of one that has ended goes a moment later.
        most = most.max(sysfs::vm_ids()?.len());
    }
    eprintln!("    at most {most} directories of VMs at once");
    ensure!(most <= 8, "{most} directories of VMs that are gone");
    interface::ensure_no_vms()?;
    let lines = log.lines()?;
    ensure!(
        lines.len() < rounds && !lines.iter().any(|line| line.contains("exitpolicy")),
        "the log has {lines:#?}"
    );
    let now = device.info()?.missed;
    ensure!(now == missed, "missed went from {missed} to {now}");
    // One object for each VM would be a leak.
    ensure_slab_shrinks_to(&before, rounds as u64 / 2)?;
    vmm.kill()
}

/// What a guest can do again and again on AMD: to have its intercepts recalculated, by switching
/// EFER.SVME, in a VM whose vCPUs are not all as they should be. It costs the host no line in its log
/// and no memory, and the guest gets on.
fn guest_is_not_heard(vendor: Vendor, writes: u32) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    vmm.create_vcpu(vm, 1)?;
    let id = interface::only_vm()?.id;
    // One that does not run stays on its way.
    ioctl::set_override(id, Some(1), Exits::NONE)?;
    let device = Device::open()?;
    let missed = device.info()?.missed;
    // Caches fill first.
    vmm.run(vcpu, Work::new(Payload::Svme, writes / 10))?;
    let before = slab()?;
    let mut log = KernelLog::from_now()?;
    let calls = Calls::of(&format!("{}_recalc_intercepts", vendor.name()), &[vcpu.tid])?;
    let report = vmm.run(vcpu, Work::new(Payload::Svme, writes))?;
    let calls = calls.by(vcpu.tid)?;
    eprintln!("    {calls} times recalculated, {} #GP", report.gp);
    ensure!(
        calls >= u64::from(writes) && report.gp == 0,
        "so nothing was tested: {report:?}"
    );
    let lines = log.lines()?;
    ensure!(
        lines.len() < 10 && !lines.iter().any(|line| line.contains("exitpolicy")),
        "the log has {lines:#?}"
    );
    let info = device.info()?;
    ensure!(
        (info.vms, info.missed, info.pending) == (1, missed, 1),
        "{info:?}"
    );
    ensure_slab_shrinks_to(&before, u64::from(writes) / 10)?;
    // It can be changed as before.
    let pending = ioctl::set_override(id, None, Exits::NONE)?;
    ensure!(pending == 0, "{pending} vCPUs are pending");
    let report = vmm.run(vcpu, Work::new(Payload::Hlt, 2))?;
    ensure!(report.halt_exits == 2, "{report:?}");
    vmm.kill()
}

/// One round of it.
fn noise(vendor: Vendor, vmm: &mut Vmm, threads: [Thread; 2], next: &Cgroup) -> Result<()> {
    const APERF: u32 = 0xe8;
    let vm = vmm.create_vm()?;
    for _ in 0..3 {
        vmm.fail_to_create_vcpu(threads[0], vm, 0)?;
    }
    vmm.create_vcpus(&[(threads[0], vm, 0)])?;
    vmm.fail_to_create_vcpu(threads[1], vm, 7)?;
    vmm.create_vcpus(&[(threads[1], vm, 1)])?;
    for _ in 0..5 {
        vmm.act(threads[0], Action::SetCpuid)?;
        vmm.deny_msr_reads(vm, APERF, 1)?;
    }
    vmm.run(threads[0], Work::new(Payload::Hlt, 2))?;
    next.add_process(vmm.pid())?;
    let view = ioctl::vms()?;
    ensure!(
        view.len() == 1 && view[0].each.len() == 2 && view[0].floor == floor(vendor)?,
        "{view:?}"
    );
    vmm.run(threads[0], Work::new(Payload::Hlt, 2))?;
    vmm.close(vm)
}
