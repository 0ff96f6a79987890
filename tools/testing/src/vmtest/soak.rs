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
        }, //
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
    cgroup::Cgroup,
    exits::Vendor,
    interface::{
        self,
        ioctl, //
    },
    kernel_log::{
        bad_lines,
        KernelLog, //
    },
    modules::{
        self,
        EXITPOLICY, //
    },
    pause,
    resets,
    uapi::Device, //
};

use crate::{
    cgroups::{
        ensure_slab_shrinks_to,
        slab, //
    },
    emulators_reset,
    live::torture::{
        self,
        Shape,
        Torture, //
    },
    races::{
        change_others,
        change_policy,
        live_and_die,
        make_vm,
        read_all,
        Here, //
    },
};

/// The argument that makes the test program do this, for the minutes that come next.
pub const SOAK: &str = "--soak";

const MINUTE: Duration = Duration::from_secs(60);

/// Rounds of the guest that sleeps and wakes, between two looks at it.
const ROUNDS: u32 = 10;

/// What all have done so far.
#[derive(Default)]
struct Done {
    vms: AtomicU64,
    changes: AtomicU64,
    wakeups: AtomicU64,
    cgroups: AtomicU64,
    reads: AtomicU64,
    /// Guests that the emulator has reset.
    resets: AtomicU64,
}

/// What those who do it share.
#[derive(Default)]
struct Shared {
    done: Done,
    ended: AtomicBool,
}

impl Shared {
    /// Does something again and again until the end, or until it fails.
    fn repeat(&self, name: &str, mut operation: impl FnMut(u64) -> Result<()>) -> Result<()> {
        for turn in 0.. {
            if self.ended.load(Relaxed) {
                break;
            }
            let result = operation(turn);
            // Whose guest it was does not matter: it comes as an error to who has it.
            if result.is_err() && emulators_reset().is_some() {
                self.done.resets.fetch_add(1, Relaxed);
            } else {
                result
                    .inspect_err(|_| self.ended.store(true, Relaxed))
                    .with_context(|| format!("{name}, operation {turn}"))?;
            }
            pause();
        }
        Ok(())
    }

    /// A guest that sleeps and wakes under changes; another one when the emulator has reset it.
    fn sleep_and_wake(&self, vendor: Vendor, cgroup: &Cgroup) -> Result<()> {
        self.repeat("wake-ups", |_| {
            let mut rig = torture::rig(vendor, cgroup, Shape::PAIRS, false)?;
            let mut torture = Torture::new(&rig, false)?;
            while !self.ended.load(Relaxed) {
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
    resets::note_in(Path::new("/run/exitpolicy-resets"));
    modules::load_both()?;
    interface::ensure_empty().context("before the soak")?;
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
    let add = |counter: &AtomicU64, number| {
        counter.fetch_add(number, Relaxed);
    };
    let result = thread::scope(|scope| {
        let shared = &shared;
        let sides = [
            scope.spawn(|| shared.sleep_and_wake(vendor, &wakes)),
            scope.spawn(|| {
                shared.repeat("VMs", |_| {
                    add(&done.vms, 1);
                    make_vm()
                })
            }),
            scope.spawn(|| {
                shared.repeat("VMMs", |turn| {
                    add(&done.vms, 1);
                    live_and_die(&run, turn)
                })
            }),
            scope.spawn(|| {
                shared.repeat("overrides", |turn| {
                    let changes = change_others(&device, turn, spared)?;
                    add(&done.changes, changes);
                    Ok(())
                })
            }),
            scope.spawn(|| {
                shared.repeat("policies", |turn| {
                    add(&done.changes, 1);
                    let cgroup = if turn % 2 == 0 { &made_fd } else { &run_fd };
                    change_policy(&device, cgroup, turn / 2)
                })
            }),
            scope.spawn(|| {
                shared.repeat("cgroups", |_| {
                    add(&done.cgroups, 1);
                    let child = parent.child("child")?;
                    ioctl::set_policy(&child, Exits::HLT, Exits::ALL)?;
                    child.remove()
                })
            }),
            scope.spawn(|| {
                shared.repeat("readers", |_| {
                    add(&done.reads, 1);
                    read_all(&device)
                })
            }),
        ];
        let told = tell(shared, &device, minutes, missed);
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
    // One object for each VM, or for each cgroup, would be a leak.
    forget_files()?;
    let vms = done.vms.load(Relaxed).min(done.cgroups.load(Relaxed));
    ensure_slab_shrinks_to(&before, vms / 2)?;
    drop(device);
    modules::unload(EXITPOLICY).context("rmmod")?;
    modules::load(EXITPOLICY)?;
    interface::ensure_empty().context("loaded again")?;
    println!("soak: {minutes} minutes, nothing was lost and nothing is left");
    Ok(())
}

/// Who reads a file in sysfs makes the kernel remember it, until memory is short, also when it is
/// long gone: a dentry holds the kernfs node.
fn forget_files() -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")
}

/// A line a minute. Fails as soon as there is something that must not be. Says what memory there was
/// after the first one, when caches are filled.
fn tell(
    shared: &Shared,
    device: &Device,
    minutes: u64,
    missed: u64,
) -> Result<BTreeMap<String, u64>> {
    let mut before = BTreeMap::new();
    let mut log = KernelLog::from_now()?;
    let heads = [
        "minute", "VMs", "changes", "wake-ups", "cgroups", "reads", "missed", "objects", "resets",
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
        forget_files()?;
        let objects = slab()?;
        let numbers = [
            minute,
            done.vms.load(Relaxed),
            done.changes.load(Relaxed),
            done.wakeups.load(Relaxed),
            done.cgroups.load(Relaxed),
            done.reads.load(Relaxed),
            info.missed - missed,
            objects.values().sum(),
            done.resets.load(Relaxed),
        ];
        println!("{}", numbers.map(|number| format!("{number:>9}")).concat());
        if minute == 1 {
            before = objects;
        }
        let lines = log.lines()?;
        let bad = bad_lines(&lines);
        ensure!(bad.is_empty(), "the kernel complained: {bad:#?}");
        ensure!(
            info.missed == missed,
            "{} were missed",
            info.missed - missed
        );
    }
    Ok(before)
}
