// SPDX-License-Identifier: GPL-2.0

//! What happens at the same time on different CPUs, many times.

use std::{
    env,
    fs,
    io,
    path::{
        Path,
        PathBuf, //
    },
    process,
    sync::{
        atomic::{
            AtomicBool,
            AtomicU64,
            Ordering, //
        },
        Arc,
        Mutex, //
    },
    thread, //
};

use anyhow::{
    anyhow,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use nix::errno::Errno;
use testing::{
    cgroup::{
        Cgroup,
        CGROUP2, //
    },
    client::{
        Thread,
        Vmm, //
    },
    exits::Vendor,
    interface::{
        self,
        ioctl, //
    },
    modules::{
        self,
        Unloaded,
        EXITPOLICY, //
    },
    payload::Payload,
    soon,
    uapi::{
        self,
        Device,
        Override, //
    },
    vmm::{
        Action,
        Irqchip,
        Vm,
        Work, //
    }, //
};

use crate::{
    is_slow_host,
    lifecycle::unload_soon,
    Test, //
};

/// How many operations each side makes at least; another number can be asked for.
const ASKED: &str = "EXITPOLICY_RACES";
/// Set where the kernel is meant to have KCSAN: without it, nothing would be found.
const WITH_KCSAN: &str = "EXITPOLICY_KCSAN";

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let few = is_slow_host()?;
    let asked = env::var(ASKED).ok();
    let asked = asked.map(|asked| asked.parse()).transpose();
    let asked: Option<u64> = asked.with_context(|| format!("{ASKED} is not a number"))?;
    let number = asked.unwrap_or(if few { 10 } else { 50 });
    // What takes a process, or a module, is made fewer times by default: it takes longer.
    let dear = asked.unwrap_or(if few { 3 } else { 25 });
    type Race = fn(Vendor, u64, u64) -> Result<()>;
    let races: [(&str, Race); 7] = [
        ("vms_and_policies", vms_and_policies),
        ("vms_and_cgroups", vms_and_cgroups),
        ("vms_and_our_module", vms_and_our_module),
        ("vms_and_vendor_module", vms_and_vendor_module),
        ("changes_and_vcpus", changes_and_vcpus),
        ("all_and_readers", all_and_readers),
        ("vmms_without_us", vmms_without_us),
    ];
    Ok(races
        .into_iter()
        .map(|(name, race)| Test::new(format!("races::{name}"), move || race(vendor, number, dear)))
        .collect())
}

/// One side of a race.
struct Side<'a> {
    name: &'static str,
    /// At least so many are done.
    number: u64,
    /// Says how many it has done; none if the others were faster.
    operation: Box<dyn FnMut(u64) -> Result<u64> + Send + 'a>,
}

impl<'a> Side<'a> {
    fn new(
        name: &'static str,
        number: u64,
        operation: impl FnMut(u64) -> Result<u64> + Send + 'a,
    ) -> Self {
        Self {
            name,
            number,
            operation: Box::new(operation),
        }
    }
}

/// The kernel's own search for data races, in kernels that have it, for as long as the value lives.
///
/// It is off at other times: a host would take minutes to boot, and what has no races to find waits
/// for it, too.
struct Kcsan {
    watched: u64,
}

impl Kcsan {
    /// `Documentation/dev-tools/kcsan.rst`: "on" and "off", and counters to read.
    const FILE: &'static str = "/sys/kernel/debug/kcsan";
    /// How many microseconds an access is watched for, and after how many the next one is. Longer
    /// and more often than by default: an emulated CPU is one thread among others.
    const PARAMETERS: [(&'static str, u32); 3] = [
        ("udelay_task", 1000),
        ("udelay_interrupt", 300),
        ("skip_watch", 1000),
    ];

    fn on() -> Result<Option<Self>> {
        if !Path::new(Self::FILE).exists() {
            ensure!(env::var_os(WITH_KCSAN).is_none(), "there is no KCSAN");
            return Ok(None);
        }
        for (name, value) in Self::PARAMETERS {
            let file = format!("/sys/module/kcsan/parameters/{name}");
            fs::write(&file, value.to_string()).context(file)?;
        }
        fs::write(Self::FILE, "on").context("KCSAN")?;
        let watched = Self::watched()?;
        Ok(Some(Self { watched }))
    }

    /// How many accesses it has looked at.
    fn watched() -> Result<u64> {
        let counters = fs::read_to_string(Self::FILE)?;
        let watched = counters
            .lines()
            .find_map(|line| line.strip_prefix("setup_watchpoints: "));
        Ok(watched.context("KCSAN does not count")?.trim().parse()?)
    }

    /// What it found is in the kernel's log, where it fails the test.
    fn ensure_looked(&self) -> Result<()> {
        let watched = Self::watched()? - self.watched;
        ensure!(watched > 0, "KCSAN looked at nothing");
        eprintln!("    KCSAN looked at {watched} accesses");
        Ok(())
    }
}

impl Drop for Kcsan {
    fn drop(&mut self) {
        let _ = fs::write(Self::FILE, "off");
    }
}

/// Runs all sides at once, each until all have done their number, and says what they did.
fn race(sides: Vec<Side<'_>>) -> Result<()> {
    let kcsan = Kcsan::on()?;
    let behind = AtomicU64::new(sides.len() as u64);
    let failed = AtomicBool::new(false);
    let results: Vec<Result<(&str, u64, u64)>> = thread::scope(|scope| {
        let sides: Vec<_> = sides
            .into_iter()
            .map(|mut side| {
                let (behind, failed) = (&behind, &failed);
                scope.spawn(move || {
                    // The others must not wait for one that panics.
                    let _told = OnPanic(failed);
                    let (mut done, mut turn) = (0, 0);
                    while behind.load(Ordering::Relaxed) > 0 && !failed.load(Ordering::Relaxed) {
                        let before = done;
                        done += (side.operation)(turn)
                            .inspect_err(|_| failed.store(true, Ordering::Relaxed))
                            .with_context(|| format!("{}, turn {turn}", side.name))?;
                        turn += 1;
                        if before / 1000 != done / 1000 && before < side.number {
                            eprintln!("    {}: {done} of {}", side.name, side.number);
                        }
                        if before < side.number && done >= side.number {
                            behind.fetch_sub(1, Ordering::Relaxed);
                        }
                        // Who is done goes on, but lets the others have the CPUs.
                        if done >= side.number {
                            testing::pause();
                        }
                    }
                    Ok((side.name, done, turn))
                })
            })
            .collect();
        let join = |side: thread::ScopedJoinHandle<'_, _>| {
            side.join()
                .unwrap_or_else(|_| Err(anyhow!("a side panicked")))
        };
        sides.into_iter().map(join).collect()
    });
    for (name, done, turns) in results.into_iter().collect::<Result<Vec<_>>>()? {
        tell(name, done);
        if done != turns {
            eprintln!("    ... in {turns} turns");
        }
    }
    kcsan.as_ref().map_or(Ok(()), Kcsan::ensure_looked)
}

/// Tells of a thread that panics.
struct OnPanic<'a>(&'a AtomicBool);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// How many were done: `tools/testing/races` adds them up.
fn tell(name: &str, done: u64) {
    eprintln!("    did {done} {name}");
}

/// This process in a cgroup, for as long as the value lives, with what VMs it makes.
pub struct Here {
    /// Where it goes then.
    back: PathBuf,
}

impl Here {
    pub fn in_cgroup(cgroup: &Cgroup) -> Result<Self> {
        Self::from_to(Path::new(CGROUP2), cgroup)
    }

    fn from_to(back: &Path, cgroup: &Cgroup) -> Result<Self> {
        let back = back.join("cgroup.procs");
        cgroup.add_process(process::id() as i32)?;
        Ok(Self { back })
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        // A cgroup that cannot be removed fails the test.
        let _ = fs::write(&self.back, process::id().to_string());
    }
}

/// A VM with two vCPUs comes and goes.
pub fn make_vm() -> Result<u64> {
    let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
    for index in 0..2 {
        vm.create_vcpu(index).context("KVM_CREATE_VCPU")?;
    }
    Ok(1)
}

/// One thing was done, or none if somebody was faster, of which one of these errors tells.
fn done_unless<T, E>(result: Result<T, E>, faster: &[Errno]) -> Result<u64>
where
    E: Into<anyhow::Error>,
{
    let Err(error) = result else {
        return Ok(1);
    };
    let error = error.into();
    match errno_of(&error) {
        Some(errno) if faster.contains(&errno) => Ok(0),
        _ => Err(error),
    }
}

/// What the kernel said.
fn errno_of(error: &anyhow::Error) -> Option<Errno> {
    let io: Option<&io::Error> = error.downcast_ref();
    let kvm: Option<&kvm_ioctls::Error> = error.downcast_ref();
    let errno = io.and_then(io::Error::raw_os_error);
    errno.or(kvm.map(|kvm| kvm.errno())).map(Errno::from_raw)
}

/// A policy is made, changed or taken away.
pub fn change_policy(device: &Device, cgroup: &fs::File, turn: u64) -> Result<u64> {
    let argument = uapi::Policy {
        flags: uapi::POLICY_DISABLE | uapi::POLICY_ALLOW,
        cgroup_fd: testing::cgroup::fd_of(cgroup),
        disable: (turn / 3) & 3,
        allow: Exits::ALL.bits() & !(turn & 2),
        ..Default::default()
    };
    if turn % 3 != 2 {
        // The cgroup may be on its way.
        let result = device.policy(uapi::SET_POLICY, argument);
        return done_unless(result, &[Errno::ENODEV]);
    }
    let argument = uapi::Policy {
        flags: 0,
        disable: 0,
        allow: 0,
        ..argument
    };
    let result = device.policy(uapi::CLEAR_POLICY, argument);
    done_unless(result, &[Errno::ENOENT, Errno::ENODEV])
}

/// Nothing was overlooked, and nothing stays.
fn ensure_clean(missed: u64) -> Result<()> {
    interface::ensure_no_vms()?;
    let info = Device::open()?.info()?;
    ensure!(
        (info.missed, info.holding, info.pending) == (missed, 0, 0),
        "{info:?}, missed {missed} before"
    );
    Ok(())
}

fn vms_and_policies(_: Vendor, number: u64, _: u64) -> Result<()> {
    let missed = Device::open()?.info()?.missed;
    let above = Cgroup::new("above")?;
    let cgroup = above.child("own")?;
    let here = Here::in_cgroup(&cgroup)?;
    let device = Device::open()?;
    let (above_fd, own_fd) = (above.open()?, cgroup.open()?);
    race(vec![
        Side::new("VMs", number, |_| make_vm()),
        Side::new("policies", number, |turn| {
            let cgroup = if turn % 2 == 0 { &above_fd } else { &own_fd };
            change_policy(&device, cgroup, turn / 2)
        }),
    ])?;
    drop(here);
    for cgroup in [&above, &cgroup] {
        let _ = ioctl::clear_policy(cgroup);
    }
    ensure_clean(missed)
}

fn vms_and_cgroups(_: Vendor, number: u64, _: u64) -> Result<()> {
    let missed = Device::open()?.info()?.missed;
    let parent = Cgroup::new("own")?;
    let here = Here::in_cgroup(&parent)?;
    let device = Device::open()?;
    let parent_fd = parent.open()?;
    let child = Mutex::new(None);
    race(vec![
        // Wherever this process is, or is on its way to.
        Side::new("VMs", number, |_| make_vm()),
        Side::new("cgroups with a VM", number, |turn| {
            live_in_child(&device, &parent, &child, turn)
        }),
        Side::new("policies", number, |turn| {
            let child: Option<Arc<fs::File>> = child.lock().expect("no panic").clone();
            let cgroup = child.as_deref().filter(|_| turn % 4 != 0);
            change_policy(&device, cgroup.unwrap_or(&parent_fd), turn)
        }),
    ])?;
    drop(here);
    // It may have none.
    let _ = ioctl::clear_policy(&parent);
    // The worker takes the others away.
    ensure!(
        soon(|| Ok(Device::open()?.info()?.policies == 0))?,
        "policies outlive their cgroups"
    );
    ensure_clean(missed)
}

/// A cgroup with a policy and a VM, which ends there or is taken along when the VMM leaves, and is
/// removed. What it is at the moment, others can see in `now`.
fn live_in_child(
    device: &Device,
    parent: &Cgroup,
    now: &Mutex<Option<Arc<fs::File>>>,
    turn: u64,
) -> Result<u64> {
    let child = parent.child("child")?;
    let id = child.id()?;
    let is_home = || -> Result<bool> { Ok(device.vms()?.iter().any(|vm| vm.cgroup_id == id)) };
    *now.lock().expect("no panic") = Some(Arc::new(child.open()?));
    ioctl::set_policy(&child, Exits::HLT, Exits::ALL)?;
    let here = Here::from_to(parent.directory(), &child)?;
    let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
    vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    ensure!(is_home()?, "no VM is in the cgroup");
    let taken_along = (turn % 2 == 0).then_some(vm);
    drop(here);
    // With its policy.
    child.remove()?;
    ensure!(
        soon(|| Ok(!is_home()?))?,
        "a VM is in a cgroup that was removed"
    );
    drop(taken_along);
    Ok(1)
}

fn vms_and_our_module(_: Vendor, number: u64, dear: u64) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let here = Here::in_cgroup(&cgroup)?;
    // Not by modprobe, which takes longer than the module.
    let image = modules::image()?;
    let mut refused = 0;
    let result = race(vec![
        Side::new("VMs", number, |_| make_vm()),
        Side::new("loads of our module", dear, |turn| {
            // Every other time, VMs hold it until they are gone.
            if turn % 2 == 0 {
                ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
            }
            while let Err(errno) = modules::unload(EXITPOLICY) {
                ensure!(errno == Errno::EWOULDBLOCK, "rmmod: {errno}");
                refused += 1;
                testing::pause();
            }
            modules::load_image(&image)?;
            // So that there is time to read something, too.
            testing::pause();
            Ok(1)
        }),
        Side::new("readings", dear, |_| read_if_there()),
    ]);
    drop(here);
    modules::load_both()?;
    result?;
    eprintln!("    rmmod was refused {refused} times, while VMs were different for us");
    // One that was being made while the module came may be counted as missed.
    interface::ensure_no_vms()?;
    let supported = Device::open()?.info()?.supported;
    ensure!(supported != 0, "KVM is not noticed");
    ensure_noticed()
}

/// A VM is.
fn ensure_noticed() -> Result<()> {
    let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
    vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let vms = Device::open()?.vms()?;
    ensure!(vms.len() == 1, "{} VMs are known, not one", vms.len());
    drop(vm);
    interface::ensure_no_vms()
}

fn vms_and_vendor_module(vendor: Vendor, number: u64, dear: u64) -> Result<()> {
    // There is no KVM, or it comes or goes just now.
    const WITHOUT_KVM: [Errno; 3] = [Errno::ENOENT, Errno::ENODEV, Errno::ENXIO];
    let image = modules::image_of(vendor)?;
    let result = race(vec![
        Side::new("VMs", number, |_| {
            // So that KVM is unused now and then.
            testing::pause();
            done_unless(make_vm(), &WITHOUT_KVM)
        }),
        Side::new("loads of KVM's module", dear, |_| {
            unload_soon(vendor.module())?;
            modules::load_image(&image)?;
            Ok(1)
        }),
        Side::new("policies", number, |turn| {
            let cgroup = testing::cgroup::root()?;
            change_policy(&Device::open()?, &cgroup, turn)
        }),
        Side::new("readings", dear, |_| read_if_there()),
    ]);
    modules::load_both()?;
    result?;
    let root = testing::cgroup::root()?;
    let argument = uapi::Policy {
        cgroup_fd: testing::cgroup::fd_of(&root),
        ..Default::default()
    };
    let cleared = Device::open()?.policy(uapi::CLEAR_POLICY, argument);
    done_unless(cleared, &[Errno::ENOENT])?;
    interface::ensure_no_vms()?;
    ensure!(
        soon(|| Ok(Device::open()?.info()?.supported != 0))?,
        "KVM is not noticed"
    );
    ensure_noticed()
}

/// What VMMs did.
#[derive(Default)]
pub struct Lives {
    resets: AtomicU64,
    hot_added: AtomicU64,
    closed: AtomicU64,
    exited: AtomicU64,
    killed: AtomicU64,
}

impl Lives {
    /// A VMM that runs a guest, adds vCPUs to it, resets it, and then closes it, exits or is killed.
    pub fn one(&self, cgroup: &Cgroup, turn: u64) -> Result<u64> {
        self.one_that_asks(cgroup, turn, Exits::NONE)
    }

    /// One that has these exits disabled itself.
    fn one_that_asks(&self, cgroup: &Cgroup, turn: u64, disabled: Exits) -> Result<u64> {
        let count = |counter: &AtomicU64, number| counter.fetch_add(number, Ordering::Relaxed);
        let halts = Work::new(Payload::Hlt, u32::MAX);
        let mut vmm = Vmm::start(cgroup)?;
        let vm = vmm.create_vm()?;
        // Or else KVM_SET_CPUID2 after a reset fails now and then (Documentation/live.md, "CPUID again").
        vmm.hide_pv_unhalt(vm)?;
        if disabled != Exits::NONE {
            vmm.disable_exits(vm, disabled)?;
        }
        let added = 1 + turn as usize % 3;
        let mut vcpus = Vec::new();
        for index in 0..1 + added {
            let vcpu = vmm.create_vcpu(vm, index)?;
            vmm.start_run(vcpu, halts)?;
            vcpus.push(vcpu);
        }
        count(&self.hot_added, added as u64);
        ensure_progress(&mut vmm, &vcpus).context("before the reset")?;
        reset(&mut vmm, &vcpus, halts)?;
        ensure_progress(&mut vmm, &vcpus).context("after the reset")?;
        count(&self.resets, 1);
        match turn % 3 {
            0 => {
                for vcpu in vcpus {
                    vmm.stop(vcpu)?;
                }
                vmm.close(vm)?;
                vmm.end()?;
                count(&self.closed, 1);
            }
            1 => {
                vmm.end()?;
                count(&self.exited, 1);
            }
            _ => {
                vmm.kill()?;
                count(&self.killed, 1);
            }
        }
        Ok(1)
    }

    /// Says what they did.
    pub fn tell(&self) {
        let Self {
            resets,
            hot_added,
            closed,
            exited,
            killed,
        } = self;
        for (name, counter) in [
            ("resets", resets),
            ("vCPUs added while others ran", hot_added),
            ("VMs closed by a VMM that stays", closed),
            ("VMMs that exited with vCPUs that ran", exited),
            ("VMMs killed", killed),
        ] {
            eprintln!("    of them {} {name}", counter.load(Ordering::Relaxed));
        }
    }
}

/// A reset of the machine: each vCPU is put back to where it began, the first one is set up again,
/// and the others wait for its INIT and SIPI.
fn reset(vmm: &mut Vmm, vcpus: &[Thread], work: Work) -> Result<()> {
    for &vcpu in vcpus {
        vmm.leave(vcpu)?;
    }
    for &vcpu in vcpus {
        vmm.act(vcpu, Action::Reset)?;
    }
    let (first, others) = vcpus.split_first().context("no vCPU")?;
    vmm.start_run(*first, work)?;
    for &vcpu in others {
        vmm.act(vcpu, Action::InitAndSipi)?;
        vmm.go_on(vcpu)?;
        let report = vmm.wait(vcpu)?;
        ensure!(report.by_sipi, "not where SIPI leads: {report:?}");
        vmm.start_run(vcpu, work)?;
    }
    Ok(())
}

/// Fails unless each guest goes on.
fn ensure_progress(vmm: &mut Vmm, vcpus: &[Thread]) -> Result<()> {
    for &vcpu in vcpus {
        let before = vmm.progress(vcpu)?;
        ensure!(
            soon(|| Ok(vmm.progress(vcpu)? != before))?,
            "a guest is stuck: {:?}",
            vmm.look_at(vcpu)
        );
    }
    Ok(())
}

/// Overrides of whatever there is, and the master switch, which is off for one turn of 64.
fn change_vms(device: &Device, turn: u64) -> Result<u64> {
    if turn % 64 >= 62 {
        device.switch(uapi::Enabled {
            enabled: (turn % 64 == 63) as u32,
            timeout_ms: 1,
            ..Default::default()
        })?;
        return Ok(1);
    }
    change_others(device, turn, 0)
}

/// Overrides of the VMs of all cgroups but one. Says how many were changed.
pub fn change_others(device: &Device, turn: u64, spared: u64) -> Result<u64> {
    let mut changed = 0;
    for vm in device.vms()? {
        if vm.cgroup_id == spared {
            continue;
        }
        let one = turn % 4 < 2;
        let argument = Override {
            flags: if one { uapi::VM_VCPU } else { 0 },
            vm: vm.id,
            vcpu_id: if one { turn as u32 % 3 } else { 0 },
            timeout_ms: 1,
            ..Default::default()
        };
        let result = if turn % 7 == 6 {
            device.overriding(uapi::RESET_VM, argument)
        } else {
            let disable = (turn / 2) & 3;
            let argument = Override {
                disable,
                ..argument
            };
            device.overriding(uapi::SET_VM, argument)
        };
        // The VM is gone, or has no such vCPU.
        changed += done_unless(result, &[Errno::ENOENT])?;
    }
    Ok(changed)
}

fn changes_and_vcpus(_: Vendor, number: u64, dear: u64) -> Result<()> {
    let missed = Device::open()?.info()?.missed;
    let cgroup = Cgroup::new("own")?;
    let device = Device::open()?;
    let own = cgroup.open()?;
    let lives = Lives::default();
    let result = race(vec![
        Side::new("VMMs", dear, |turn| lives.one(&cgroup, turn)),
        Side::new("overrides", number, |turn| change_vms(&device, turn)),
        Side::new("policies", number, |turn| {
            change_policy(&device, &own, turn)
        }),
    ]);
    device.set_enabled(true)?;
    let _ = ioctl::clear_policy(&cgroup);
    result?;
    lives.tell();
    ensure_clean(missed)
}

/// Reads all there is. Says how many files there were.
pub fn read_all(device: &Device) -> Result<u64> {
    device.policies()?;
    for vm in device.vms()? {
        device.vcpus(vm.id)?;
    }
    walk(Path::new(interface::SYSFS))
}

/// Reads all there is, of a module that may be gone.
fn read_if_there() -> Result<u64> {
    // So that the module is unused now and then.
    testing::pause();
    let there = match Device::open() {
        Ok(device) => {
            device.info()?;
            read_all(&device)?;
            1
        }
        error => done_unless(error, &[Errno::ENOENT, Errno::ENODEV])?,
    };
    // Nothing keeps the module here.
    walk(Path::new(interface::SYSFS))?;
    Ok(there)
}

/// Reads what is in a directory, and says how many files there were. Directories and files go while
/// they are looked at: then they cannot be found any more, or not be read.
fn walk(directory: &Path) -> Result<u64> {
    const GONE: [Errno; 2] = [Errno::ENOENT, Errno::ENODEV];
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        gone => return done_unless(gone, &GONE),
    };
    let mut files = 0;
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            gone => {
                done_unless(gone, &GONE)?;
                break;
            }
        };
        let path = entry.path();
        let name = path.file_name().unwrap_or_default();
        files += if entry.file_type()?.is_dir() {
            walk(&path)?
        } else if name == "attach" || name == "detach" {
            // They can only be written.
            0
        } else {
            done_unless(fs::read(&path), &GONE).with_context(|| format!("{path:?}"))?
        };
    }
    Ok(files)
}

fn all_and_readers(_: Vendor, number: u64, dear: u64) -> Result<()> {
    let missed = Device::open()?.info()?.missed;
    let cgroup = Cgroup::new("own")?;
    let other = Cgroup::new("other")?;
    let device = Device::open()?;
    let own = cgroup.open()?;
    let lives = Lives::default();
    let result = race(vec![
        Side::new("VMMs", dear, |turn| lives.one(&cgroup, turn)),
        Side::new("VMs", number, |_| make_vm()),
        Side::new("overrides", number, |turn| change_vms(&device, turn)),
        Side::new("policies", number, |turn| {
            change_policy(&device, &own, turn)
        }),
        Side::new("cgroups", number, |_| {
            let child = other.child("child")?;
            ioctl::set_policy(&child, Exits::HLT, Exits::ALL)?;
            child.remove()?;
            Ok(1)
        }),
        Side::new("readings", number, |_| read_all(&device).map(|_| 1)),
    ]);
    device.set_enabled(true)?;
    let _ = ioctl::clear_policy(&cgroup);
    result?;
    lives.tell();
    ensure!(
        soon(|| Ok(Device::open()?.info()?.policies == 0))?,
        "policies outlive their cgroups"
    );
    ensure_clean(missed)
}

/// The VMMs of the others, every other one with native HLT, and nobody who changes anything: which of
/// their guests an emulator loses by itself.
fn vmms_without_us(_: Vendor, number: u64, dear: u64) -> Result<()> {
    let _unloaded = Unloaded::new()?;
    let cgroup = Cgroup::new("own")?;
    let lives = Lives::default();
    race(vec![
        Side::new("VMMs", dear, |turn| {
            let native = if turn % 2 == 0 {
                Exits::NONE
            } else {
                Exits::HLT
            };
            lives.one_that_asks(&cgroup, turn, native)
        }),
        Side::new("VMs", number, |_| make_vm()),
    ])?;
    lives.tell();
    Ok(())
}
