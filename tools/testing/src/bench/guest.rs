// SPDX-License-Identifier: GPL-2.0

//! What a Linux guest exits for while it works, and while it does not: an unmodified QEMU, and
//! programs that others have written.
//!
//! Exits are counted, and no time is taken: each work is a fixed amount of it, and the idle second
//! is one of the guest's clock, so that its exits are exits per second.

use std::{
    collections::BTreeMap,
    fs,
    io::{
        BufRead,
        BufReader,
        Write, //
    },
    path::Path,
    process::{
        Child,
        ChildStdin,
        ChildStdout,
        Command,
        Stdio, //
    }, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use figures::{
    guest::{
        by_reason,
        ALL,
        GROUP,
        HLT,
        KICKS,
        LOCKS,
        NO_PV,
        REASON_HLT,
        TRAPPED, //
    },
    Figure,
    Unit, //
};
use nix::{
    sched::{
        sched_setaffinity,
        CpuSet, //
    },
    unistd::Pid, //
};

use super::cpus;
use crate::{
    cgroup::Cgroup,
    exits::{
        Counter,
        Counts,
        Histogram,
        Vendor, //
    },
    interface::{
        self,
        ioctl, //
    }, //
};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Where `tools/bench/run` puts it.
const IMAGE: &str = "/usr/local/share/exitpolicy/bench-guest.img";

/// What the guest does (`tools/lab/host/bench-init`), what that is, and by how many vCPUs. Two have
/// CPUs of their own, as far as there are any; four share one: who waits for a lock waits long where
/// its holder is without a CPU.
const WORKS: [(&str, &str, usize); 3] = [
    ("messages", "16,000 messages through pipes, 2 vCPUs", 2),
    ("idle", "an idle second, 2 vCPUs", 2),
    ("locks", LOCKS, 4),
];

/// A way to run the guest: what it is called, QEMU's -cpu, and what a policy gives.
const CASES: [(&str, &str, Option<Exits>); 4] = [
    (TRAPPED, "host", None),
    (NO_PV, "host,-kvm-pv-unhalt", None),
    (HLT, "host", Some(Exits::HLT)),
    (ALL, "host", Some(Exits::ALL)),
];

/// The reasons that have figures of their own: what may be passed through, what comes instead, and
/// what sends IPIs and arms timers.
const REASONS: [&str; 3] = [REASON_HLT, "interrupt", "MSR"];

/// The hypercall of who releases a lock, of include/uapi/linux/kvm_para.h.
const KVM_HC_KICK_CPU: u64 = 5;

/// What a work took.
struct Run {
    exits: Counts,
    /// Hypercalls that wake who has halted for a lock.
    kicks: u64,
}

/// All works in all cases, each `repeats` times in one guest.
pub fn measure(repeats: usize) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (case, cpu, disable) in CASES {
        for vcpus in [2, 4] {
            let cgroup = Cgroup::new("bench-guest")?;
            if let Some(disable) = disable {
                ioctl::set_policy(&cgroup, disable, Exits::ALL)?;
            }
            let mut guest = Guest::boot(&cgroup, cpu, vcpus)?;
            for (work, name, _) in WORKS.iter().filter(|(_, _, count)| *count == vcpus) {
                let runs = (0..repeats)
                    .map(|_| guest.work(work))
                    .collect::<Result<Vec<_>>>()
                    .with_context(|| format!("{case}: {work}"))?;
                let exits: Vec<_> = runs
                    .iter()
                    .map(|run| (run.exits.total(), run.kicks))
                    .collect();
                eprintln!("exitpolicy-bench: {case}: {work}: {exits:?} exits and kicks");
                figures.extend(of_runs(name, case, &runs)?);
            }
            guest.end()?;
            interface::ensure_no_vms()?;
        }
    }
    Ok(figures)
}

/// All exits, with the median for each reason, and those for some reasons.
fn of_runs(name: &str, case: &str, runs: &[Run]) -> Result<Vec<Figure>> {
    let vendor = Vendor::of_host()?;
    let figure = |name: &str, values: Vec<i64>| Figure::new(GROUP, name, case, Unit::Exits, values);
    let by_name: Vec<_> = runs.iter().map(|run| run.exits.by_name(vendor)).collect();
    let of_reason = |reason: &str| {
        let counts = by_name
            .iter()
            .map(|run| run.get(reason).copied().unwrap_or(0) as i64);
        figure(&by_reason(name, reason), counts.collect())
    };
    let totals = runs.iter().map(|run| run.exits.total() as i64).collect();
    let kicks = runs.iter().map(|run| run.kicks as i64).collect();
    let mut all = vec![figure(name, totals)?];
    for reason in by_name.iter().flat_map(BTreeMap::keys) {
        let median = of_reason(reason)?.median as f64;
        all[0].reasons.insert(reason.clone(), median);
    }
    for reason in REASONS {
        all.push(of_reason(reason)?);
    }
    all.push(figure(&by_reason(name, KICKS), kicks)?);
    Ok(all)
}

/// Keeps threads on the host's last CPU.
fn pin(tids: &[i32]) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(*cpus()?.last().context("no CPU")?)?;
    for tid in tids {
        sched_setaffinity(Pid::from_raw(*tid), &set)?;
    }
    Ok(())
}

/// QEMU with a guest that does as it is told, and dies with the value.
struct Guest {
    qemu: Child,
    orders: ChildStdin,
    console: BufReader<ChildStdout>,
    seen: String,
    counter: Counter,
    hypercalls: Histogram,
}

impl Guest {
    fn boot(cgroup: &Cgroup, cpu: &str, vcpus: usize) -> Result<Self> {
        for file in [QEMU, IMAGE] {
            ensure!(Path::new(file).exists(), "there is no {file}");
        }
        let mut qemu = Command::new("/bin/sh")
            // The shell moves itself, and becomes QEMU there.
            .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\""])
            .arg(cgroup.directory())
            .arg(QEMU)
            .args(["-machine", "microvm,isa-serial=on,rtc=on,acpi=on"])
            // Threads with names: the vCPUs are to be found.
            .args(["-name", "bench,debug-threads=on"])
            .args(["-accel", "kvm", "-m", "384", "-cpu", cpu])
            .args(["-smp", &vcpus.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-no-reboot", "-serial", "stdio"])
            .args(["-kernel", &kernel()?, "-initrd", IMAGE])
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let orders = qemu.stdin.take().context("no pipe")?;
        let mut console = BufReader::new(qemu.stdout.take().context("no pipe")?);
        let mut seen = String::new();
        let ready = wait_for(&mut console, &mut seen, "guest: ready");
        let counters = ready.and_then(|()| {
            let tids = vcpu_threads(qemu.id(), vcpus)?;
            if vcpus > 2 {
                pin(&tids)?;
            }
            let mine: Vec<String> = tids
                .iter()
                .map(|tid| format!("common_pid=={tid}"))
                .collect();
            let hypercalls =
                Histogram::start("kvm/kvm_hypercall", &["common_pid", "nr"], &mine.join("||"))?;
            Ok((Counter::of_all(&tids)?, hypercalls))
        });
        match counters {
            Ok((counter, hypercalls)) => Ok(Self {
                qemu,
                orders,
                console,
                seen,
                counter,
                hypercalls,
            }),
            Err(error) => {
                qemu.kill()?;
                qemu.wait()?;
                Err(error)
            }
        }
    }

    /// All exits of all vCPUs so far.
    fn exits(&self) -> Result<Counts> {
        Ok(Counts::sum(&self.counter.read()?))
    }

    /// All kicks so far.
    fn kicks(&self) -> Result<u64> {
        let hypercalls = self.hypercalls.read()?;
        let kicks = hypercalls
            .iter()
            .filter(|(keys, _)| keys[1] == KVM_HC_KICK_CPU);
        Ok(kicks.map(|(_, count)| count).sum())
    }

    /// What a work costs in exits, with the few for being told of it.
    fn work(&mut self, name: &str) -> Result<Run> {
        let (before, kicks) = (self.exits()?, self.kicks()?);
        writeln!(self.orders, "{name}")?;
        let done = format!("guest: done {name}");
        wait_for(&mut self.console, &mut self.seen, &done)?;
        Ok(Run {
            exits: before.until(&self.exits()?),
            kicks: self.kicks()? - kicks,
        })
    }

    fn end(mut self) -> Result<()> {
        writeln!(self.orders, "end")?;
        let status = self.qemu.wait()?;
        ensure!(status.success(), "QEMU: {status}");
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The kernel of guests: the distribution's, of which the lab has one.
fn kernel() -> Result<String> {
    for entry in fs::read_dir("/boot")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("vmlinuz-") {
            return Ok(format!("/boot/{name}"));
        }
    }
    bail!("there is no kernel in /boot")
}

/// Reads on until there is a line with this in it.
fn wait_for(console: &mut impl BufRead, seen: &mut String, what: &str) -> Result<()> {
    loop {
        let mut line = Vec::new();
        let length = console.read_until(b'\n', &mut line)?;
        ensure!(
            length > 0,
            "QEMU ended before '{what}', its console:\n{seen}"
        );
        let line = String::from_utf8_lossy(&line);
        seen.push_str(&line);
        ensure!(!line.contains("guest: failed"), "{seen}");
        if line.contains(what) {
            return Ok(());
        }
    }
}

/// The threads of a process that run vCPUs.
fn vcpu_threads(pid: u32, vcpus: usize) -> Result<Vec<i32>> {
    let mut tids = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("comm"))?;
        if name.trim().ends_with("/KVM") {
            tids.push(entry.file_name().to_string_lossy().parse()?);
        }
    }
    ensure!(
        tids.len() == vcpus,
        "{} threads run {vcpus} vCPUs",
        tids.len()
    );
    Ok(tids)
}
