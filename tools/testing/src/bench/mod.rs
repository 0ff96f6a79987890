// SPDX-License-Identifier: GPL-2.0

//! What passing an exit through saves, and what the module costs, in numbers.
//!
//! One file for each group of figures. Each function here measures and says what came of it; what
//! could not be measured is an error.

pub mod change;
pub mod command;
pub mod decision;
pub mod gain;
pub mod guest;
pub mod idle;

use std::{
    arch::x86_64::{
        __cpuid,
        _mm_lfence,
        _rdtsc, //
    },
    collections::BTreeMap,
    fmt::Write,
    fs,
    path::Path,
    sync::OnceLock, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use figures::{
    Figure,
    Machine,
    Unit, //
};
use nix::{
    sched::{
        sched_getaffinity,
        CpuSet, //
    },
    unistd::Pid, //
};

use crate::{
    cgroup::Cgroup,
    client::{
        Thread,
        Vmm, //
    },
    exits::{
        Counter,
        Counts,
        Vendor, //
    },
    interface::{
        ioctl,
        sysfs, //
    },
    modules::{
        is_loaded,
        EXITPOLICY, //
    },
    soon,
    timed::{
        Operation,
        Work, //
    },
    vmm::Guest, //
};

/// Values before these are thrown away: caches are filled, and KVM and the guest find their pace.
const WARM_UP: usize = 16;

/// The host's own TSC.
pub fn tsc() -> i64 {
    // SAFETY: Every CPU with VMX or SVM has both.
    unsafe {
        _mm_lfence();
        _rdtsc() as i64
    }
}

/// What this machine's TSC counts.
pub fn unit() -> Result<Unit> {
    let dmi = |file: &str| fs::read_to_string(Path::new("/sys/class/dmi/id").join(file));
    if dmi("bios_vendor").is_ok_and(|vendor| vendor.to_lowercase().contains("bochs")) {
        return Ok(if cpus()?.len() == 1 {
            Unit::Instructions
        } else {
            Unit::Ticks
        });
    }
    ensure!(
        !is_qemus_emulator(),
        "QEMU's emulator keeps no count of instructions, and its TSC is that of the machine it runs \
         on: nothing here would mean anything"
    );
    Ok(Unit::Cycles)
}

/// Whether the CPUs are what QEMU makes of a machine without KVM.
fn is_qemus_emulator() -> bool {
    // SAFETY: Every CPU with VMX or SVM has CPUID.
    let leaf = unsafe { __cpuid(0x4000_0000) };
    let signature = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes);
    signature.concat().starts_with(b"TCGTCGTCGTCG")
}

/// The CPUs that this thread may use, or might when it asked first: it may have chosen among them.
pub fn cpus() -> Result<&'static [usize]> {
    static CPUS: OnceLock<Vec<usize>> = OnceLock::new();
    if let Some(cpus) = CPUS.get() {
        return Ok(cpus);
    }
    let set = sched_getaffinity(Pid::from_raw(0))?;
    let cpus = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu) == Ok(true));
    Ok(CPUS.get_or_init(|| cpus.collect()))
}

/// Why something that takes so many vCPUs at a time is not to be measured here, if it is not.
fn why_not_here(vcpus: usize) -> Result<Option<String>> {
    Ok(if vcpus > cpus()?.len() {
        Some(format!("it takes {vcpus} CPUs"))
    } else if vcpus == 1 && unit()? == Unit::Ticks {
        Some("a host with one CPU counts it exactly".to_string())
    } else {
        None
    })
}

/// On what is measured. `emulator` is for who started it to know, if this is one.
pub fn machine(emulator: &str) -> Result<Machine> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cgroup = Cgroup::new("bench-machine")?;
    let mut rig = Rig::new(&cgroup, 1)?;
    Ok(Machine {
        kernel: nix::sys::utsname::uname()?
            .release()
            .to_string_lossy()
            .into_owned(),
        emulator: if is_qemus_emulator() || unit()? != Unit::Cycles {
            emulator.to_string()
        } else {
            "none".to_string()
        },
        cpu: cpu.context("no model name in /proc/cpuinfo")?.1.to_string(),
        cpus: cpus()?.len(),
        vendor: Vendor::of_host()?.name().to_string(),
        tsc_khz: rig.tsc_khz()?,
        module: module()?,
    })
}

/// Build id of the module that is loaded.
fn module() -> Result<String> {
    ensure!(is_loaded(EXITPOLICY)?, "{EXITPOLICY} is not loaded");
    let note = format!("/sys/module/{EXITPOLICY}/notes/.note.gnu.build-id");
    let note = fs::read(&note).with_context(|| note)?;
    // The note ends with the id, a SHA-1.
    let id = note.len().checked_sub(20).map(|at| &note[at..]);
    let mut digits = String::new();
    for byte in id.context("a short note")? {
        write!(digits, "{byte:02x}")?;
    }
    Ok(digits)
}

/// Cgroups with a policy, in great numbers, that have nothing to do with what is measured.
pub struct Policies {
    cgroups: Vec<Cgroup>,
    parent: Cgroup,
}

impl Policies {
    /// So many.
    pub fn new(count: usize) -> Result<Self> {
        let mut policies = Self {
            cgroups: Vec::new(),
            parent: Cgroup::new("bench-policies")?,
        };
        policies.grow(count)?;
        Ok(policies)
    }

    /// Adds to them until there are so many, and waits until all of them are in sysfs.
    pub fn grow(&mut self, count: usize) -> Result<()> {
        for number in self.cgroups.len()..count {
            let cgroup = self.parent.child(&number.to_string())?;
            ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)
                .with_context(|| format!("policy {number}"))?;
            self.cgroups.push(cgroup);
        }
        ensure!(
            soon(|| Ok(sysfs::policy_ids()?.len() >= count))?,
            "policies do not appear in sysfs"
        );
        Ok(())
    }
}

/// A VM that measures.
pub struct Rig {
    vmm: Vmm,
    guest: Guest,
    vcpus: Vec<Thread>,
}

/// What an operation took, again and again.
pub struct Measured {
    pub values: Vec<i64>,
    /// Exits for each of them, those of all vCPUs.
    pub exits: f64,
}

impl Measured {
    /// As a figure.
    pub fn figure(self, group: &str, name: &str, case: &str) -> Result<Figure> {
        let figure = Figure::new(group, name, case, unit()?, self.values)?;
        Ok(figure.exits(self.exits))
    }
}

impl Rig {
    /// A VM with vCPUs on CPUs of their own, as far as there are enough.
    pub fn new(cgroup: &Cgroup, vcpus: usize) -> Result<Self> {
        let mut vmm = Vmm::start(cgroup)?;
        let vm = vmm.create_vm()?;
        // Else `hlt` would be refused on Intel; who creates VMs under a policy need not care.
        vmm.hide_pv_unhalt(vm)?;
        let guest = vmm.guest(vm)?;
        let cpus = cpus()?;
        let vcpus = (0..vcpus)
            .map(|index| {
                let vcpu = vmm.create_vcpu(vm, index)?;
                vmm.pin(vcpu, cpus[(index + 1) % cpus.len()])?;
                Ok(vcpu)
            })
            .collect::<Result<_>>()?;
        Ok(Self { vmm, guest, vcpus })
    }

    /// How fast its TSC is.
    pub fn tsc_khz(&mut self) -> Result<u32> {
        self.vmm.tsc_khz(self.vcpus[0])
    }

    /// Runs one operation for each vCPU. Gives the exits that this took.
    fn run(&mut self, works: &[Work]) -> Result<u64> {
        ensure!(works.len() == self.vcpus.len(), "a work for each vCPU");
        for (index, work) in works.iter().enumerate() {
            let peer = works.len() - 1 - index;
            self.vmm.prepare_timed(self.vcpus[index], *work, peer)?;
        }
        for vcpu in &self.vcpus {
            self.vmm.go_on(*vcpu)?;
        }
        let mut exits = 0;
        for (vcpu, work) in self.vcpus.clone().into_iter().zip(works) {
            let report = self.vmm.wait(vcpu)?;
            ensure!(report.executed == work.count, "{work:?}: {report:?}");
            exits += report.exits;
        }
        Ok(exits)
    }

    /// What comes before and after the operations, without any.
    fn run_none(&mut self) -> Result<u64> {
        let none = vec![Work::new(Operation::Nothing, 1); self.vcpus.len()];
        self.run(&none)
    }

    /// Measures the first one of these, of which the second one is the other vCPU's part.
    pub fn measure(&mut self, works: &[Work]) -> Result<Measured> {
        let before_and_after = self.run_none()?;
        let exits = self.run(works)?;
        let count = works[0].count;
        let values = self.guest.samples(0, count);
        ensure!(
            values.len() > WARM_UP && values.iter().all(|value| *value > 0),
            "{:?}: {values:?}",
            works[0]
        );
        Ok(Measured {
            values: values[WARM_UP..].to_vec(),
            exits: exits.saturating_sub(before_and_after) as f64 / f64::from(count),
        })
    }

    /// The exits of each operation by reason. To count them costs, so nothing is measured meanwhile.
    pub fn reasons(&mut self, works: &[Work]) -> Result<BTreeMap<String, f64>> {
        let vendor = Vendor::of_host()?;
        let tids: Vec<i32> = self.vcpus.iter().map(|vcpu| vcpu.tid).collect();
        let counter = Counter::of_all(&tids)?;
        self.run_none()?;
        let before_and_after = Counts::sum(&counter.read()?);
        self.run(works)?;
        let all = before_and_after.until(&Counts::sum(&counter.read()?));
        let before_and_after = before_and_after.by_name(vendor);
        let of_operations = all.by_name(vendor).into_iter().filter_map(|(name, count)| {
            let others = before_and_after.get(&name).copied().unwrap_or(0);
            let count = count.saturating_sub(others);
            (count > 0).then(|| (name, count as f64 / f64::from(works[0].count)))
        });
        Ok(of_operations.collect())
    }

    /// #GP faults that the first vCPU's guest survived in the last run.
    pub fn faults(&self) -> u32 {
        self.guest.params(0).gp
    }

    /// Interrupts that a vCPU took in the last run.
    pub fn taken(&self, index: usize) -> u32 {
        self.guest.taken(index)
    }
}

/// Fails where the TSCs of two CPUs cannot be compared.
fn ensure_comparable_tscs() -> Result<()> {
    let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let clock = fs::read_to_string(clock)?;
    if clock.trim() != "tsc" {
        bail!(
            "the host's TSC is not stable: its clock is {}",
            clock.trim()
        );
    }
    Ok(())
}
