// SPDX-License-Identifier: GPL-2.0

//! What happens at the same time on different CPUs, many times.

use std::{
    env,
    fs,
    io,
    path::Path,
    process,
    sync::{
        atomic::{
            AtomicBool,
            AtomicU64,
            Ordering, //
        },
        Arc, //
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
    cgroup::Cgroup,
    client::Vmm,
    exits::Vendor,
    interface::{
        self,
        ioctl, //
    },
    modules::{
        self,
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
    matrix::floor,
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
    let races: [(&str, Race); 6] = [
        ("vms_and_policies", vms_and_policies),
        ("vms_and_cgroups", vms_and_cgroups),
        ("vms_and_our_module", vms_and_our_module),
        ("vms_and_vendor_module", vms_and_vendor_module),
        ("changes_and_vcpus", changes_and_vcpus),
        ("all_and_readers", all_and_readers),
    ];
    Ok(races
        .into_iter()
        .map(|(name, race)| Test::new(format!("races::{name}"), move || race(vendor, number, dear)))
        .collect())
}

/// One side of a race.
struct Side<'a> {
    name: &'static str,
    /// At least this often.
    number: u64,
    operation: Box<dyn FnMut(u64) -> Result<()> + Send + 'a>,
}

impl<'a> Side<'a> {
    fn new(
        name: &'static str,
        number: u64,
        operation: impl FnMut(u64) -> Result<()> + Send + 'a,
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
    let results: Vec<Result<(&str, u64)>> = thread::scope(|scope| {
        let sides: Vec<_> = sides
            .into_iter()
            .map(|mut side| {
                let (behind, failed) = (&behind, &failed);
                scope.spawn(move || {
                    let mut done = 0;
                    while behind.load(Ordering::Relaxed) > 0 && !failed.load(Ordering::Relaxed) {
                        (side.operation)(done)
                            .inspect_err(|_| failed.store(true, Ordering::Relaxed))
                            .with_context(|| format!("{}, operation {done}", side.name))?;
                        done += 1;
                        if done % 1000 == 0 && done <= side.number {
                            eprintln!("    {}: {done} of {}", side.name, side.number);
                        }
                        if done == side.number {
                            behind.fetch_sub(1, Ordering::Relaxed);
                        }
                        // Who is done goes on, but lets the others have the CPUs.
                        if done >= side.number {
                            testing::pause();
                        }
                    }
                    Ok((side.name, done))
                })
            })
            .collect();
        let join = |side: thread::ScopedJoinHandle<'_, _>| {
            side.join()
                .unwrap_or_else(|_| Err(anyhow!("a side panicked")))
        };
        sides.into_iter().map(join).collect()
    });
    let done: Vec<(&str, u64)> = results.into_iter().collect::<Result<_>>()?;
    eprintln!("    {done:?}");
    kcsan.as_ref().map_or(Ok(()), Kcsan::ensure_looked)
}

/// This process in a cgroup, for as long as the value lives, with what VMs it makes.
pub struct Here;

impl Here {
    pub fn in_cgroup(cgroup: &Cgroup) -> Result<Self> {
        cgroup.add_process(process::id() as i32)?;
        Ok(Self)
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        let root = "/sys/fs/cgroup/cgroup.procs";
        // A cgroup that cannot be removed fails the test.
        let _ = fs::write(root, process::id().to_string());
    }
}

/// A VM with two vCPUs comes and goes.
pub fn make_vm() -> Result<()> {
    let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
    for index in 0..2 {
        vm.create_vcpu(index).context("KVM_CREATE_VCPU")?;
    }
    Ok(())
}

/// What a loser of a race is told: that what it named is gone, or is there already.
fn or_lost<T>(result: io::Result<T>) -> Result<()> {
    match result {
        Err(error)
            if [libc::ENOENT, libc::ENODEV, libc::EEXIST]
                .map(Some)
                .contains(&error.raw_os_error()) =>
        {
            Ok(())
        }
        other => Ok(other.map(drop)?),
    }
}

/// A policy is made, changed or taken away.
pub fn change_policy(device: &Device, cgroup: &fs::File, turn: u64) -> Result<()> {
    let argument = uapi::Policy {
        flags: uapi::POLICY_DISABLE | uapi::POLICY_ALLOW,
        cgroup_fd: testing::cgroup::fd_of(cgroup),
        disable: (turn / 3) & 3,
        allow: Exits::ALL.bits() & !(turn & 2),
        ..Default::default()
    };
    or_lost(if turn % 3 == 2 {
        let argument = uapi::Policy {
            flags: 0,
            disable: 0,
            allow: 0,
            ..argument
        };
        device.policy(uapi::CLEAR_POLICY, argument)
    } else {
        device.policy(uapi::SET_POLICY, argument)
    })
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
    let cgroup = Cgroup::new("own")?;
    race(vec![
        Side::new("VMs", number, |_| make_vm()),
        Side::new("cgroups", number, |_| {
            let child = cgroup.child("child")?;
            ioctl::set_policy(&child, Exits::HLT, Exits::ALL)?;
            // With its policy.
            child.remove()
        }),
    ])?;
    // The worker takes the policies away.
    ensure!(
        soon(|| Ok(Device::open()?.info()?.policies == 0))?,
        "policies outlive their cgroups"
    );
    ensure_clean(missed)
}

fn vms_and_our_module(vendor: Vendor, number: u64, dear: u64) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let here = Here::in_cgroup(&cgroup)?;
    let mut refused = 0;
    let result = race(vec![
        Side::new("VMs", number, |_| make_vm()),
        Side::new("our module", dear, |_| {
            ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
            // A VM may hold it, until it is gone.
            while let Err(errno) = modules::unload(EXITPOLICY) {
                ensure!(errno == Errno::EWOULDBLOCK, "rmmod: {errno}");
                refused += 1;
                testing::pause();
            }
            modules::load(EXITPOLICY)
        }),
    ]);
    drop(here);
    modules::load_both()?;
    result?;
    eprintln!("    rmmod was refused {refused} times, while VMs were different for us");
    // One that was being made while the module came may be counted as missed.
    interface::ensure_no_vms()?;
    make_vm()?;
    let supported = Device::open()?.info()?.supported;
    ensure!(
        supported & floor(vendor)?.bits() == floor(vendor)?.bits(),
        "{supported:#x}"
    );
    interface::ensure_no_vms()
}

fn vms_and_vendor_module(vendor: Vendor, number: u64, dear: u64) -> Result<()> {
    let without = AtomicU64::new(0);
    let result = race(vec![
        Side::new("VMs", number, |_| {
            match Vm::new(Irqchip::Kernel) {
                Ok(vm) => {
                    let vm = Arc::new(vm);
                    drop(vm.create_vcpu(0).context("KVM_CREATE_VCPU")?);
                    Ok(())
                }
                // There is no KVM just now.
                Err(_) => {
                    without.fetch_add(1, Ordering::Relaxed);
                    Ok(())
                }
            }
            // So that KVM is unused now and then.
            .inspect(|()| testing::pause())
        }),
        Side::new("vendor module", dear, |_| {
            unload_soon(vendor.module())?;
            modules::load(vendor.module())
        }),
        Side::new("policies", dear, |turn| {
            let cgroup = testing::cgroup::root()?;
            change_policy(&Device::open()?, &cgroup, turn)
        }),
    ]);
    modules::load_both()?;
    result?;
    let without = without.load(Ordering::Relaxed);
    eprintln!("    there was no KVM {without} times");
    let root = testing::cgroup::root()?;
    let argument = uapi::Policy {
        cgroup_fd: testing::cgroup::fd_of(&root),
        ..Default::default()
    };
    or_lost(Device::open()?.policy(uapi::CLEAR_POLICY, argument))?;
    interface::ensure_no_vms()?;
    ensure!(
        soon(|| Ok(Device::open()?.info()?.supported != 0))?,
        "KVM is not noticed"
    );
    Ok(())
}

/// VMMs that run guests, reset them, add vCPUs, end or are killed.
pub fn live_and_die(cgroup: &Cgroup, turn: u64) -> Result<()> {
    let mut vmm = Vmm::start(cgroup)?;
    let vm = vmm.create_vm()?;
    vmm.hide_pv_unhalt(vm)?;
    let first = vmm.create_vcpu(vm, 0)?;
    vmm.start_run(first, Work::new(Payload::Hlt, u32::MAX))?;
    for index in 1..=1 + (turn as usize % 3) {
        let vcpu = vmm.create_vcpu(vm, index)?;
        vmm.start_run(vcpu, Work::new(Payload::Hlt, u32::MAX))?;
    }
    if turn % 2 == 0 {
        vmm.leave(first)?;
        vmm.act(first, Action::SetRunnable)?;
        vmm.act(first, Action::SetCpuid)?;
        vmm.go_on(first)?;
    }
    match turn % 3 {
        0 => vmm.kill(),
        1 => {
            vmm.stop(first)?;
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Overrides of whatever there is, and the master switch.
fn change_vms(device: &Device, turn: u64) -> Result<()> {
    if turn % 64 == 63 {
        return or_lost(device.switch(uapi::Enabled {
            enabled: (turn / 64 % 2) as u32,
            timeout_ms: 1,
            ..Default::default()
        }));
    }
    change_others(device, turn, 0).map(drop)
}

/// Overrides of the VMs of all cgroups but one. Says how many there were.
pub fn change_others(device: &Device, turn: u64, spared: u64) -> Result<u64> {
    let (mut last, mut changed) = (0, 0);
    loop {
        let next = uapi::Vm {
            id: last,
            ..Default::default()
        };
        let Ok(vm) = device.vm(uapi::NEXT_VM, next) else {
            return Ok(changed);
        };
        last = vm.id;
        if vm.cgroup_id == spared {
            continue;
        }
        let one = turn % 4 < 2;
        let argument = Override {
            flags: if one { uapi::VM_VCPU } else { 0 },
            vm: vm.id,
            vcpu_id: if one { turn as u32 % 3 } else { 0 },
            disable: (turn / 2) & 3,
            timeout_ms: 1,
            ..Default::default()
        };
        or_lost(if turn % 7 == 6 {
            device.overriding(
                uapi::RESET_VM,
                Override {
                    disable: 0,
                    ..argument
                },
            )
        } else {
            device.overriding(uapi::SET_VM, argument)
        })?;
        changed += 1;
    }
}

fn changes_and_vcpus(_: Vendor, number: u64, dear: u64) -> Result<()> {
    let missed = Device::open()?.info()?.missed;
    let cgroup = Cgroup::new("own")?;
    let device = Device::open()?;
    let own = cgroup.open()?;
    let result = race(vec![
        Side::new("VMMs", dear, |turn| live_and_die(&cgroup, turn)),
        Side::new("overrides", number, |turn| change_vms(&device, turn)),
        Side::new("policies", number, |turn| {
            change_policy(&device, &own, turn)
        }),
    ]);
    device.set_enabled(true)?;
    let _ = ioctl::clear_policy(&cgroup);
    result?;
    ensure_clean(missed)
}

/// Reads all there is.
pub fn read_all(device: &Device) -> Result<()> {
    or_lost(device.policies())?;
    for vm in device.vms()? {
        or_lost(device.vcpus(vm.id))?;
    }
    // Directories go while they are walked.
    walk(Path::new(interface::SYSFS));
    Ok(())
}

fn walk(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            walk(&path);
        } else {
            let _ = fs::read(path);
        }
    }
}

fn all_and_readers(_: Vendor, number: u64, dear: u64) -> Result<()> {
    let missed = Device::open()?.info()?.missed;
    let cgroup = Cgroup::new("own")?;
    let other = Cgroup::new("other")?;
    let device = Device::open()?;
    let own = cgroup.open()?;
    let result = race(vec![
        Side::new("VMMs", dear, |turn| live_and_die(&cgroup, turn)),
        Side::new("VMs", number, |_| make_vm()),
        Side::new("overrides", number, |turn| change_vms(&device, turn)),
        Side::new("policies", number, |turn| {
            change_policy(&device, &own, turn)
        }),
        Side::new("cgroups", number, |_| {
            let child = other.child("child")?;
            ioctl::set_policy(&child, Exits::HLT, Exits::ALL)?;
            child.remove()
        }),
        Side::new("readers", number, |_| read_all(&device)),
    ]);
    device.set_enabled(true)?;
    let _ = ioctl::clear_policy(&cgroup);
    result?;
    ensure!(
        soon(|| Ok(Device::open()?.info()?.policies == 0))?,
        "policies outlive their cgroups"
    );
    ensure_clean(missed)
}
