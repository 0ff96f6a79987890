// SPDX-License-Identifier: GPL-2.0

//! Everything at once, for a long time, with one line a minute, and what is left of it.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        atomic::{
            AtomicBool,
            AtomicU64,
            Ordering::Relaxed, //
        },
        RwLock, //
    },
    thread,
    time::{
        Duration,
        Instant, //
    },
};

use anyhow::{
    anyhow,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use testing::{
    cgroup::{
        self,
        Cgroup, //
    },
    exits::Vendor,
    faults::{
        Leaks,
        KMEMLEAK, //
    },
    interface::{
        self,
        ioctl, //
    },
    kernel_log::{
        bad_lines,
        ensure_lockdep_looks,
        KernelLog, //
    },
    modules::{
        self,
        EXITPOLICY, //
    },
    pause,
    uapi::Device, //
};

use crate::{
    cgroups::{
        ensure_slab_shrinks_to,
        slab, //
    },
    live::torture::{
        self,
        Shape,
        Torture, //
    },
    races::{
        change_others,
        change_policy,
        make_vm,
        read_all,
        Here,
        Lives, //
    },
};

/// The argument that makes the test program do this, for the minutes that come next.
pub const SOAK: &str = "--soak";

const MINUTE: Duration = Duration::from_secs(60);

/// Rounds of the guest that sleeps and wakes, between two looks at it.
const ROUNDS: u32 = 10;

/// By how many objects a slab cache may have grown. Of what is made, a VM, a vCPU, a cgroup and a
/// policy, there are thousands, so that one object lost for each is more; what waits to be freed, or in
/// a CPU's cache, is a few hundred.
const MOST_GROWN: u64 = 1_000;

/// How often memory is looked at, once a minute: so many times at least, and at most.
const LOOKS: usize = 10;
const MOST_LOOKS: usize = 200;

/// What all have done so far.
#[derive(Default)]
struct Done {
    vms: AtomicU64,
    changes: AtomicU64,
    wakeups: AtomicU64,
    cgroups: AtomicU64,
    reads: AtomicU64,
}

/// What those who do it share.
#[derive(Default)]
struct Shared {
    done: Done,
    ended: AtomicBool,
    /// Shared by those who do something, for as long as there is something of it. Who has it alone
    /// finds none but the VM that sleeps and wakes.
    at_work: RwLock<()>,
}

impl Shared {
    /// Does something again and again until the end, or until it fails.
    fn repeat(&self, name: &str, mut operation: impl FnMut(u64) -> Result<()>) -> Result<()> {
        for turn in 0.. {
            if self.ended.load(Relaxed) {
                break;
            }
            operation(turn)
                .inspect_err(|_| self.ended.store(true, Relaxed))
                .with_context(|| format!("{name}, operation {turn}"))?;
            pause();
        }
        Ok(())
    }

    /// The same, for who is done with it before the next one.
    fn repeat_at_work(
        &self,
        name: &str,
        mut operation: impl FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        self.repeat(name, |turn| {
            let _at_work = self.at_work.read().expect("no panic");
            operation(turn)
        })
    }

    /// A guest that sleeps and wakes under changes.
    fn sleep_and_wake(&self, vendor: Vendor, cgroup: &Cgroup) -> Result<()> {
        self.repeat("wake-ups", |_| {
            let mut rig = torture::rig(vendor, cgroup, Shape::PAIRS, false)?;
            let mut torture = Torture::new(&rig, false)?;
            while !self.ended.load(Relaxed) {
                let _at_work = self.at_work.read().expect("no panic");
                let (changes, wakeups) = torture.some(ROUNDS)?;
                self.done.changes.fetch_add(changes, Relaxed);
                self.done.wakeups.fetch_add(wakeups, Relaxed);
            }
            rig.stop()
        })
    }
}

/// Does so for some minutes.
pub fn soak(minutes: u64) -> Result<()> {
    let vendor = Vendor::of_host()?;
    modules::load_both()?;
    interface::ensure_empty().context("before the soak")?;
    let leaks = Path::new(KMEMLEAK).exists();
    let leaks = leaks.then(|| Leaks::from_now(EXITPOLICY));
    let leaks = leaks.transpose().context("kmemleak")?;
    let mut log = KernelLog::from_now()?;
    let shared = Shared::default();
    let device = Device::open()?;
    let missed = device.info()?.missed;
    let cgroups = ["made", "run", "parent", "wakes"].map(Cgroup::new);
    let [made, run, parent, wakes] = cgroups;
    let (made, run, parent, wakes) = (made?, run?, parent?, wakes?);
    // The VM there has its changes from one side only.
    let spared = wakes.id()?;
    let (made_fd, run_fd) = (made.open()?, run.open()?);
    let here = Here::in_cgroup(&made)?;
    let done = &shared.done;
    let lives = Lives::default();
    let add = |counter: &AtomicU64, number| {
        counter.fetch_add(number, Relaxed);
    };
    let result = thread::scope(|scope| {
        let shared = &shared;
        let sides = [
            scope.spawn(|| shared.sleep_and_wake(vendor, &wakes)),
            scope.spawn(|| {
                shared.repeat_at_work("VMs", |_| {
                    add(&done.vms, make_vm()?);
                    Ok(())
                })
            }),
            scope.spawn(|| {
                shared.repeat_at_work("VMMs", |turn| {
                    add(&done.vms, lives.one(&run, turn)?);
                    Ok(())
                })
            }),
            scope.spawn(|| {
                shared.repeat_at_work("overrides", |turn| {
                    add(&done.changes, change_others(&device, turn, spared)?);
                    Ok(())
                })
            }),
            scope.spawn(|| {
                shared.repeat_at_work("policies", |turn| {
                    let cgroup = if turn % 2 == 0 { &made_fd } else { &run_fd };
                    add(&done.changes, change_policy(&device, cgroup, turn / 2)?);
                    Ok(())
                })
            }),
            scope.spawn(|| {
                shared.repeat_at_work("cgroups", |_| {
                    let child = parent.child("child")?;
                    ioctl::set_policy(&child, Exits::HLT, Exits::ALL)?;
                    child.remove()?;
                    add(&done.cgroups, 1);
                    Ok(())
                })
            }),
            scope.spawn(|| {
                shared.repeat_at_work("readers", |_| {
                    read_all(&device)?;
                    add(&done.reads, 1);
                    Ok(())
                })
            }),
        ];
        let told = tell(shared, &device, &mut log, minutes, missed);
        shared.ended.store(true, Relaxed);
        let join = |side: thread::ScopedJoinHandle<'_, Result<()>>| {
            side.join()
                .unwrap_or_else(|_| Err(anyhow!("a side panicked")))
        };
        // Why a side has ended says more than that it has.
        let sides: Vec<Result<()>> = sides.into_iter().map(join).collect();
        sides.into_iter().collect::<Result<()>>().and(told)
    });
    drop(here);
    for cgroup in [&made, &run] {
        // It may have none.
        let _ = ioctl::clear_policy(cgroup);
    }
    let before = result?;
    interface::ensure_empty().context("after the soak")?;
    objects_at_rest(&shared, Some(&before))?;
    ensure_slab_shrinks_to(&before, MOST_GROWN)?;
    leaks.map_or(Ok(()), |leaks| leaks.ensure_none(EXITPOLICY))?;
    lives.tell();
    let made = done.vms.load(Relaxed).min(done.cgroups.load(Relaxed));
    if made <= MOST_GROWN {
        println!("soak: too short: of {made} objects lost nobody would know");
    }
    drop(device);
    modules::unload(EXITPOLICY).context("rmmod")?;
    modules::load(EXITPOLICY)?;
    interface::ensure_empty().context("loaded again")?;
    ensure_quiet(&mut log)?;
    println!("soak: {minutes} minutes, nothing was lost and nothing is left");
    Ok(())
}

/// Objects in use of each slab cache.
type Objects = BTreeMap<String, u64>;

/// Objects in use while nobody does anything, when what was removed is gone: workers and RCU have
/// some looks' time, and more if there are too many.
///
/// Who reads a file in sysfs makes the kernel remember that one, also when it is long gone: a dentry
/// holds the kernfs node. And each CPU keeps objects, which count as in use.
fn objects_at_rest(shared: &Shared, first: Option<&Objects>) -> Result<Objects> {
    let _nobody = shared.at_work.write().expect("no panic");
    let mut objects = slab()?;
    for look in 0..MOST_LOOKS {
        pause();
        fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
        for cache in objects.keys() {
            let path = format!("/sys/kernel/slab/{cache}/shrink");
            fs::write(&path, "1").context(path)?;
        }
        objects = slab()?;
        let are_few = first.is_none_or(|first| growth(first, &objects).0 <= MOST_GROWN);
        if look >= LOOKS && are_few && cgroup::dying()? == 0 {
            break;
        }
    }
    Ok(objects)
}

/// By how much the cache has grown that has grown most, and which one it is.
fn growth(before: &Objects, now: &Objects) -> (u64, String) {
    let grown = now.iter().map(|(name, objects)| {
        let before = before.get(name).copied().unwrap_or(0);
        (objects.saturating_sub(before), name.clone())
    });
    grown.max().unwrap_or_default()
}

/// A line a minute. Fails as soon as there is something that must not be. Says what memory there was
/// after the first one, when caches are filled.
fn tell(
    shared: &Shared,
    device: &Device,
    log: &mut KernelLog,
    minutes: u64,
    missed: u64,
) -> Result<Objects> {
    let mut first = None;
    let heads = [
        "minute", "VMs", "changes", "wake-ups", "cgroups", "reads", "missed", "objects", "leaks",
    ];
    println!("{}", heads.map(|head| format!("{head:>9}")).concat());
    let start = Instant::now();
    for minute in 1..=minutes {
        while start.elapsed() < MINUTE * minute as u32 {
            ensure!(!shared.ended.load(Relaxed), "a side has ended");
            thread::sleep(Duration::from_millis(200));
        }
        let done = &shared.done;
        let info = device.info()?;
        let objects = objects_at_rest(shared, first.as_ref())?;
        let (grown, cache) = growth(first.get_or_insert_with(|| objects.clone()), &objects);
        let numbers = [
            minute,
            done.vms.load(Relaxed),
            done.changes.load(Relaxed),
            done.wakeups.load(Relaxed),
            done.cgroups.load(Relaxed),
            done.reads.load(Relaxed),
            info.missed - missed,
            objects.values().sum(),
            grown,
        ];
        println!("{}", numbers.map(|number| format!("{number:>9}")).concat());
        ensure_quiet(log)?;
        ensure!(
            info.missed == missed,
            "{} were missed",
            info.missed - missed
        );
        ensure!(grown <= MOST_GROWN, "memory is lost, most of it in {cache}");
    }
    first.context("no time at all")
}

/// Fails if the kernel has complained.
fn ensure_quiet(log: &mut KernelLog) -> Result<()> {
    let lines = log.lines()?;
    let bad = bad_lines(&lines);
    ensure!(bad.is_empty(), "the kernel complained: {bad:#?}");
    ensure_lockdep_looks()
}
