// SPDX-License-Identifier: GPL-2.0

//! What it costs that a VM is decided on: once, when it is made.

use std::{
    fs,
    path::Path,
    process,
    sync::Arc, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use figures::{
    decision::{
        ABSENT,
        DEPTH,
        GROUP,
        HOOKED,
        POLICIES,
        RESOLVE,
        WHOLE,
        WORKERS, //
    },
    Figure, //
};
use nix::time::{
    clock_gettime,
    ClockId, //
};

use super::{
    tsc,
    unit,
    Policies, //
};
use crate::{
    cgroup::{
        fd_of,
        Cgroup,
        CGROUP2, //
    },
    interface::{
        self,
        ioctl, //
    },
    modules::{
        self,
        is_loaded,
        Unloaded,
        EXITPOLICY, //
    },
    pause,
    payload::Payload,
    uapi::{
        self,
        Device, //
    },
    vmm::{
        Irqchip,
        Vm,
        Work, //
    }, //
};

/// This process in another cgroup for as long as the value lives.
struct Here<'a>(&'a Cgroup);

impl<'a> Here<'a> {
    fn new(cgroup: &'a Cgroup) -> Result<Self> {
        cgroup.add_process(process::id().try_into()?)?;
        Ok(Self(cgroup))
    }
}

impl Drop for Here<'_> {
    fn drop(&mut self) {
        let root = Path::new(CGROUP2).join("cgroup.procs");
        if let Err(error) = fs::write(root, process::id().to_string()) {
            eprintln!("cannot leave {}: {error}", self.0.path());
        }
    }
}

/// What it took to create a VM.
struct Creation {
    whole: i64,
    hooked: [i64; HOOKED.len()],
    /// From before it was made until it was gone.
    workers: i64,
}

/// Ticks of the TSC that this thread has had the CPU.
fn own_tsc(khz: u32) -> Result<i64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    let ns = i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec());
    Ok((ns * i128::from(khz) / 1_000_000).try_into()?)
}

/// Waits until the host's timer interrupt has just been there, so that none is in what comes next:
/// whether one is would depend on the phase alone, and be the same each time.
fn wait_for_tick(khz: u32) -> Result<()> {
    /// Longer than two reads of the TSC, and shorter than an interrupt.
    const GAP: i64 = 1000;
    let second = i64::from(khz) * 1000;
    let begin = tsc();
    let mut last = begin;
    while last - begin < second {
        let now = tsc();
        if now - last > GAP {
            return Ok(());
        }
        last = now;
    }
    bail!("no tick in a second: choose CPUs that are not nohz_full (taskset)");
}

/// Lets the worker, which begins with a tick, and RCU after it do what there is to do, so that
/// nobody takes the CPU from what comes next.
fn settle(khz: u32) -> Result<()> {
    for _ in 0..8 {
        pause();
    }
    wait_for_tick(khz)
}

/// What is done before an operation that is measured.
type Wait = fn(u32) -> Result<()>;

/// Ticks of the TSC that the kernel's workers have had CPUs.
fn workers_tsc(khz: u32) -> Result<i64> {
    let mut ns = 0;
    for entry in fs::read_dir("/proc")? {
        let task = entry?.path();
        // Anything but a task, or one that has ended.
        let read = |file: &str| fs::read_to_string(task.join(file)).unwrap_or_default();
        if read("comm").starts_with("kworker") {
            let times = read("schedstat");
            ns += times
                .split(' ')
                .next()
                .map_or(0, |time| time.parse().unwrap_or(0));
        }
    }
    ensure!(ns > 0, "/proc/PID/schedstat says nothing of workers");
    Ok((ns * i128::from(khz) / 1_000_000).try_into()?)
}

/// Creates a VM that has the memory of `template`, so that nothing but KVM is measured.
fn create(template: &Vm, khz: u32) -> Result<Creation> {
    settle(khz)?;
    let idle = workers_tsc(khz)?;
    let mut whole = 0;
    let mut timed = |wait: Wait, operation: &mut dyn FnMut() -> Result<()>| -> Result<i64> {
        wait(khz)?;
        let before = own_tsc(khz)?;
        operation()?;
        let took = own_tsc(khz)? - before;
        whole += took;
        Ok(took)
    };
    let mut vm = None;
    timed(settle, &mut || {
        vm = Some(Arc::new(template.twin()?));
        Ok(())
    })?;
    let vm = vm.context("no VM")?;
    let cpuid = vm.cpuid();
    let mut vcpu = None;
    // A moment later the allocator would have given back what it has at hand, and some of these
    // would begin with getting it again, which is more than half as much as all the rest.
    let created = timed(wait_for_tick, &mut || {
        vcpu = Some(vm.create_vcpu(0).context("KVM_CREATE_VCPU")?);
        Ok(())
    })?;
    let mut vcpu = vcpu.context("no vCPU")?;
    let told = timed(settle, &mut || vcpu.set_cpuid(&cpuid))?;
    timed(settle, &mut || vcpu.prepare(Work::new(Payload::Nothing, 0)))?;
    let run = timed(settle, &mut || vcpu.enter())?;
    drop((vcpu, vm));
    settle(khz)?;
    if is_loaded(EXITPOLICY)? {
        interface::ensure_no_vms()?;
    }
    Ok(Creation {
        whole,
        hooked: [created, told, run],
        workers: workers_tsc(khz)? - idle,
    })
}

/// All figures, of `count` VMs of a cgroup.
fn figures(cgroup: &Cgroup, case: &str, at: Option<u64>, count: usize) -> Result<Vec<Figure>> {
    let template = Vm::new(Irqchip::Kernel)?;
    let khz = Arc::new(template.twin()?).create_vcpu(0)?.tsc_khz()?;
    let here = Here::new(cgroup)?;
    // The first ones fill caches.
    const WARM_UP: usize = 4;
    let created: Result<Vec<Creation>> = (0..count + WARM_UP)
        .map(|_| create(&template, khz))
        .collect();
    drop(here);
    let created = created.with_context(|| case.to_string())?;
    let figure = |name, value: &dyn Fn(&Creation) -> i64| -> Result<Figure> {
        let values = created.iter().skip(WARM_UP).map(value).collect();
        let mut figure = Figure::new(GROUP, name, case, unit()?, values)?;
        figure.at = at;
        Ok(figure)
    };
    let mut all = vec![
        figure(WHOLE, &|creation| creation.whole)?,
        figure(WORKERS, &|creation| creation.workers)?,
    ];
    for (index, [name, _]) in HOOKED.iter().enumerate() {
        all.push(figure(name, &|creation| creation.hooked[index])?);
    }
    Ok(all)
}

/// What the module adds to each of the ioctls that are hooked. Both may be anywhere in what they
/// spread over, and so may the difference.
fn added(absent: &[Figure], loaded: &[Figure]) -> Result<Vec<Figure>> {
    let added = HOOKED.iter().map(|[name, added]| {
        let of = |figures: &[Figure]| {
            let mut figures = figures.iter();
            figures.find(|figure| figure.name == *name).cloned()
        };
        let (absent, loaded) = of(absent).zip(of(loaded)).context(*name)?;
        Ok(Figure {
            name: added.to_string(),
            min: loaded.min - absent.max,
            low: loaded.low - absent.high,
            median: loaded.median - absent.median,
            high: loaded.high - absent.low,
            max: loaded.max - absent.min,
            ..loaded
        })
    });
    added.collect()
}

/// Without the module, and for so many policies, of which one is the VM's; each of `count` VMs.
pub fn by_policies(count: usize, policies: &[usize]) -> Result<Vec<Figure>> {
    let mut all = Vec::new();
    let cgroup = Cgroup::new("bench-decision")?;
    let unloaded = Unloaded::new()?;
    let absent = figures(&cgroup, ABSENT, None, count)?;
    drop(unloaded);
    all.extend(absent.iter().cloned());
    modules::load_both()?;
    interface::ensure_empty()?;
    let mut many: Option<Policies> = None;
    for policies in policies {
        if let Some(others) = policies.checked_sub(1) {
            if others > 0 {
                match &mut many {
                    Some(many) => many.grow(others)?,
                    None => many = Some(Policies::new(others)?),
                }
            }
            // Last, so that it is not the first one that is found.
            ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
        }
        let case = format!("{policies} {POLICIES}");
        let loaded = figures(&cgroup, &case, Some(*policies as u64), count)?;
        all.extend(added(&absent, &loaded)?);
        all.extend(loaded);
        if *policies > 0 {
            ioctl::clear_policy(&cgroup)?;
        }
    }
    Ok(all)
}

/// For cgroups at these depths below the root, with a policy on each level: of a call that looks
/// policies up. What the allocators need for a VM in a deep cgroup goes up and down by far more than
/// that, with the module and without it.
pub fn by_depth(count: usize, depths: &[usize]) -> Result<Vec<Figure>> {
    ensure!(!depths.contains(&0), "depths must be 1 or more");
    let mut chain: Vec<Cgroup> = Vec::new();
    for _ in 0..depths.iter().copied().max().unwrap_or(0) {
        let cgroup = match chain.last() {
            Some(parent) => parent.child("d")?,
            None => Cgroup::new("bench-depth")?,
        };
        ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
        chain.push(cgroup);
    }
    let device = Device::open()?;
    let mut all = Vec::new();
    for depth in depths {
        let directory = chain[depth - 1].open()?;
        let argument = uapi::Policy {
            cgroup_fd: fd_of(&directory),
            ..Default::default()
        };
        let mut values = Vec::new();
        for _ in 0..count {
            let before = tsc();
            device.policy(uapi::RESOLVE_POLICY, argument)?;
            values.push(tsc() - before);
        }
        let mut figure = Figure::new(GROUP, RESOLVE, &format!("{DEPTH} {depth}"), unit()?, values)?;
        figure.at = Some(*depth as u64);
        all.push(figure);
    }
    // From the inside to the outside.
    while chain.pop().is_some() {}
    Ok(all)
}
