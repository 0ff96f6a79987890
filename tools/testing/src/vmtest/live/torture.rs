// SPDX-License-Identifier: GPL-2.0

//! No wake-up is lost while everything changes as fast as it can.
//!
//! The guest ([`Payload::Wakeups`]) sleeps on one thing at a time, and nothing else would end that
//! sleep: after a wake-up that is lost it does nothing any more. Changes could rescue it, as they
//! make vCPUs leave the guest; so they stop again and again until each vCPU has got to the end of
//! its round. After some rounds each has had exactly one interrupt for each that was sent or armed.
//!
//! What ends a native HLT by an interrupt ends it with or without the module's help on Intel, where
//! VM entry with an event to inject wakes the CPU; `halted` has what ends it otherwise.
//!
//! With PV_UNHALT, a kick can be late on SVM. One that comes just before a *native* HLT makes the
//! vCPU leave the guest, and is remembered by KVM, of which the HLT that comes next knows nothing:
//! that one lasts until the next interrupt of its CPU. So who waits for a lock has a timer, too, as
//! a Linux guest has in practice. What must hold is that only one has the lock at a time, and that
//! everybody gets it. Where nothing changes and HLT exits, before and after, it must hold without
//! that timer.

use std::{
    thread,
    time::Duration, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use testing::{
    cgroup::Cgroup,
    exits::Vendor,
    payload::{
        Params,
        Payload,
        CPUID1_ECX_TSC_DEADLINE,
        IPI_VECTOR,
        KVM_FEATURE_PV_UNHALT,
        SECTIONS, //
    },
    soon,
    uapi::{
        self,
        Device, //
    },
    vmm::Work, //
};

use super::{
    changeable,
    Make,
    Rig, //
};
use crate::{
    is_slow_host,
    is_slow_kernel,
    Test, //
};

/// What the guest does until everything is looked at.
const ROUNDS: u32 = 50;
/// What it does without changes.
const QUIET_ROUNDS: u32 = 10;
/// How long who waits for the lock waits for a kick, in ns of the guest.
const BACKSTOP: u32 = 1_000_000;
/// At most that many flips until it has to go on without.
const BURST: u64 = 512;

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let (flips, shape) = match (is_slow_host()?, vendor) {
        (false, _) => (100_000, Shape::PAIRS),
        (true, Vendor::Vmx) => (10_000, Shape::RING),
        (true, Vendor::Svm) => (2_000, Shape::RING),
    };
    let flips = if is_slow_kernel() {
        flips.min(2_000)
    } else {
        flips
    };
    let tests = [("without", false), ("with", true)].map(|(with, pv_unhalt)| {
        let name = format!("live::torture::{with}_pv_unhalt_{flips}_times");
        Test::new(name, move || torture(vendor, flips, shape, pv_unhalt))
    });
    Ok(tests.into())
}

/// More vCPUs than the host has CPUs, by two, and how many of them pass one token around.
#[derive(Clone, Copy)]
pub struct Shape {
    vcpus: usize,
    ring: usize,
}

impl Shape {
    pub const PAIRS: Self = Self { vcpus: 4, ring: 2 };
    const RING: Self = Self { vcpus: 3, ring: 3 };

    fn work(self, vcpu: usize) -> Work {
        let place = vcpu % self.ring;
        let next = vcpu - place + (place + 1) % self.ring;
        Work {
            // LAPIC: an interrupt for the x2APIC id that is the index of the next one.
            icr: [0x4000 | IPI_VECTOR as u32, next as u32],
            vcpus: self.vcpus as u32,
            starts: place == 0,
            ..Work::gated(Payload::Wakeups)
        }
    }
}

fn torture(vendor: Vendor, flips: u64, shape: Shape, pv_unhalt: bool) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let mut rig = rig(vendor, &cgroup, shape, pv_unhalt)?;
    let mut torture = Torture::new(&rig, pv_unhalt)?;
    while torture.flips < flips || torture.meanwhile < flips / 50 {
        torture.some(ROUNDS)?;
    }
    torture.tell();
    torture.ensure_enough()?;
    rig.reset(None)?;
    torture.quiet().context("after all changes")?;
    rig.stop()?;
    rig.end()
}

/// A VM that runs, and sleeps and wakes as soon as it is let.
pub fn rig(vendor: Vendor, cgroup: &Cgroup, shape: Shape, pv_unhalt: bool) -> Result<Rig> {
    let make = Make {
        vcpus: shape.vcpus,
        pv_unhalt,
        ..Make::default()
    };
    let mut rig = Rig::new(vendor, cgroup, make)?;
    for vcpu in 0..shape.vcpus {
        rig.start_one(vcpu, shape.work(vcpu))?;
    }
    Ok(rig)
}

/// Sleeps of a vCPU that came to their end.
fn wakeups(params: &Params) -> u64 {
    [params.ipis, params.interrupts, params.deadlines]
        .map(u64::from)
        .iter()
        .sum()
}

/// Changes of a VM that sleeps and wakes, one after the other: of the VM and of a vCPU by turns.
pub struct Torture<'a> {
    rig: &'a Rig,
    device: Device,
    slow: bool,
    pv_unhalt: bool,
    changeable: Exits,
    /// What nobody is given.
    refused: Exits,
    random: u64,
    turn: u64,
    /// Overrides as they should be.
    of_vm: Option<Exits>,
    of_vcpus: Vec<Option<Exits>>,
    /// Changes of what at least one vCPU should have, and how many of them were waited for.
    flips: u64,
    waited: u64,
    /// What each vCPU was let do, and has done.
    rounds: u32,
    /// Wake-ups of each vCPU up to the last look.
    before: Vec<u64>,
    /// Wake-ups between two changes of the same burst.
    meanwhile: u64,
    /// Wake-ups without and with each exit disabled, in the order of [`Exits::NAMES`].
    seen: [[u64; 2]; Exits::NAMES.len()],
}

impl<'a> Torture<'a> {
    pub fn new(rig: &'a Rig, pv_unhalt: bool) -> Result<Self> {
        let mut torture = Self {
            rig,
            device: Device::open()?,
            slow: is_slow_host()?,
            pv_unhalt,
            changeable: changeable(rig.vendor)?,
            refused: if pv_unhalt && rig.vendor == Vendor::Vmx {
                Exits::HLT
            } else {
                Exits::NONE
            },
            random: 1,
            turn: 0,
            of_vm: None,
            of_vcpus: vec![None; rig.vcpus.len()],
            flips: 0,
            waited: 0,
            rounds: 0,
            before: vec![0; rig.vcpus.len()],
            meanwhile: 0,
            seen: Default::default(),
        };
        // Before that, IPIs are dropped.
        rig.wait(|| torture.params().all(|params| params.ready != 0))?;
        // Without changes at first: who has `hlt` is not told of PV_UNHALT.
        torture.quiet()?;
        for params in torture.params() {
            let told = params.kvm_features & KVM_FEATURE_PV_UNHALT != 0;
            ensure!(told == pv_unhalt, "{params:?}");
        }
        Ok(torture)
    }

    /// Some rounds under changes, after which nothing is lost and everything is as it should be.
    /// Says how many changes and wake-ups there were.
    pub fn some(&mut self, rounds: u32) -> Result<(u64, u64)> {
        let before = (self.flips, self.before.iter().sum::<u64>());
        self.rounds(rounds, true)?;
        self.ensure_settled()?;
        let wakeups = self.before.iter().sum::<u64>();
        Ok((self.flips - before.0, wakeups - before.1))
    }

    /// Rounds without changes, with HLT's exits, in which nothing but a kick ends the wait for the lock.
    fn quiet(&mut self) -> Result<()> {
        self.set_backstops(0);
        self.rounds(QUIET_ROUNDS, false)?;
        self.set_backstops(BACKSTOP);
        Ok(())
    }

    /// To be called when each has got to the end of its round.
    fn set_backstops(&self, ticks: u32) {
        for vcpu in 0..self.of_vcpus.len() {
            self.rig.guest.set_backstop(vcpu, ticks);
        }
    }

    /// What follows on a number, the same in every run: xorshift64.
    fn number(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn params(&self) -> impl Iterator<Item = Params> + '_ {
        (0..self.of_vcpus.len()).map(|vcpu| self.rig.guest.params(vcpu))
    }

    /// What each vCPU should have of what can be changed.
    fn wanted(&self) -> Vec<Exits> {
        let wanted = |of_vcpu: &Option<Exits>| of_vcpu.or(self.of_vm).unwrap_or(Exits::NONE);
        self.of_vcpus.iter().map(wanted).collect()
    }

    /// Lets the guest do some rounds while it is changed, and waits for the end of them.
    fn rounds(&mut self, count: u32, with_changes: bool) -> Result<()> {
        self.rounds += count;
        for vcpu in 0..self.of_vcpus.len() {
            self.rig.guest.open_gate(vcpu, count);
        }
        let all = vec![self.rounds; self.of_vcpus.len()];
        while with_changes && !self.have_done(&all) {
            for _ in 0..self.number() % BURST + 1 {
                self.meanwhile += self.look();
                self.change()?;
            }
            // Each gets to the end of its round without changes.
            let ends: Vec<u32> = self
                .params()
                .map(|params| self.rounds.min(params.executed + 1))
                .collect();
            self.wait(&ends)?;
        }
        self.wait(&all)?;
        self.ensure_none_lost().with_context(|| self.state())
    }

    fn have_done(&self, rounds: &[u32]) -> bool {
        self.params()
            .zip(rounds)
            .all(|(params, rounds)| params.executed >= *rounds)
    }

    fn wait(&mut self, rounds: &[u32]) -> Result<()> {
        self.rig
            .wait(|| self.have_done(rounds))
            .with_context(|| format!("rounds {rounds:?}, {}", self.state()))?;
        self.look();
        Ok(())
    }

    fn state(&self) -> String {
        let params: Vec<Params> = self.params().collect();
        format!("flip {}: {:?}\n{params:?}", self.flips, self.rig.view())
    }

    /// Makes the next change.
    fn change(&mut self) -> Result<()> {
        let before = self.wanted();
        self.turn += 1;
        let number = self.number();
        let vcpu = (self.turn % 2 == 1).then_some((number >> 32) as usize % before.len());
        let disable = Exits::from_bits_truncate(number >> 20) & self.changeable;
        // An override goes in the middle of others, and with the VM's those of its vCPUs.
        let reset = (number >> 40) % 4 == 0;
        let wait = (number >> 44) % 4 == 0;
        let mut argument = uapi::Override {
            vm: self.rig.id,
            vcpu_id: vcpu.unwrap_or(0) as u32,
            timeout_ms: uapi::MAX_TIMEOUT,
            ..Default::default()
        };
        if vcpu.is_some() {
            argument.flags |= uapi::VM_VCPU;
        }
        if !wait {
            argument.flags |= uapi::NO_WAIT;
        }
        let command = if reset {
            uapi::RESET_VM
        } else {
            argument.disable = disable.bits();
            uapi::SET_VM
        };
        let done = self.device.overriding(command, argument)?;
        ensure!(done.pending == 0, "{} vCPUs are pending", done.pending);
        let disable = (!reset).then_some(disable);
        match vcpu {
            Some(vcpu) => self.of_vcpus[vcpu] = disable,
            None => {
                self.of_vm = disable;
                if reset {
                    self.of_vcpus.fill(None);
                }
            }
        }
        if self.wanted() != before {
            self.flips += 1;
            self.waited += u64::from(wait);
        }
        if self.slow {
            // The guest has its turns on this one CPU while others sleep.
            thread::sleep(Duration::from_micros((number >> 48) & 63));
        }
        Ok(())
    }

    /// Counts the wake-ups since the last look, when what is wanted now was wanted already.
    fn look(&mut self) -> u64 {
        let now: Vec<u64> = self.params().map(|params| wakeups(&params)).collect();
        let mut sum = 0;
        for (vcpu, wanted) in self.wanted().into_iter().enumerate() {
            let new = now[vcpu] - self.before[vcpu];
            sum += new;
            for (seen, (exit, _)) in self.seen.iter_mut().zip(Exits::NAMES) {
                seen[usize::from((wanted & !self.refused).contains(exit))] += new;
            }
        }
        self.before = now;
        sum
    }

    /// Fails unless there was one of each interrupt in each round, and the lock is one.
    fn ensure_none_lost(&self) -> Result<()> {
        let mut sections = 0;
        for (vcpu, params) in self.params().enumerate() {
            ensure!(
                params.cpuid1_ecx & CPUID1_ECX_TSC_DEADLINE != 0,
                "vCPU {vcpu} has no TSC deadlines"
            );
            ensure!(
                (params.ipis, params.interrupts, params.deadlines)
                    == (self.rounds, self.rounds, self.rounds),
                "vCPU {vcpu}"
            );
            if params.kvm_features & KVM_FEATURE_PV_UNHALT != 0 {
                sections += self.rounds * SECTIONS;
            }
        }
        let counted = self.rig.guest.params(0).sections;
        ensure!(counted == sections, "{counted} of {sections} sections");
        Ok(())
    }

    /// Fails unless everyone gets what should have been changed, and nobody what is refused.
    fn ensure_settled(&self) -> Result<()> {
        let mut vcpus = Vec::new();
        let is_settled = soon(|| {
            vcpus = self.device.vcpus(self.rig.id)?;
            Ok(vcpus.iter().all(|vcpu| vcpu.state == uapi::VCPU_IN_FORCE))
        })?;
        ensure!(is_settled, "{vcpus:?}");
        for (vcpu, wanted) in vcpus.iter().zip(self.wanted()) {
            let refused = wanted & self.refused;
            let refusal = if refused.is_empty() {
                uapi::REFUSAL_NONE
            } else {
                uapi::REFUSAL_PV_UNHALT
            };
            let changeable = |bits| Exits::from_bits_truncate(bits) & self.changeable;
            ensure!(
                changeable(vcpu.wanted) == wanted
                    && changeable(vcpu.in_force) == wanted & !refused
                    && vcpu.refused == refused.bits()
                    && vcpu.refusal == refusal,
                "flip {}, {wanted} should be wanted: {vcpu:?}",
                self.flips
            );
        }
        let vm = uapi::Vm {
            id: self.rig.id,
            ..Default::default()
        };
        let vm = self.device.vm(uapi::GET_VM, vm)?;
        // The VM's own, and those of its vCPUs.
        let of_vm = self.of_vm.unwrap_or(Exits::NONE);
        let wanted = self.wanted().into_iter().fold(of_vm, Exits::union);
        let refused = wanted & self.refused;
        ensure!(
            vm.refused == refused.bits(),
            "{refused} should be refused: {vm:?}"
        );
        Ok(())
    }

    fn tell(&self) {
        let sum = |what: fn(&Params) -> u32| -> u64 {
            self.params().map(|params| u64::from(what(&params))).sum()
        };
        eprintln!(
            "    {} flips, {} of them waited for, in {} rounds of {} vCPUs; wake-ups: {} by IPI, {} \
             by timer, {} by TSC deadline, {} of all while flips went on; {} sleeps, {} interrupts \
             made up by the emulator",
            self.flips,
            self.waited,
            self.rounds,
            self.of_vcpus.len(),
            sum(|params| params.ipis),
            sum(|params| params.interrupts),
            sum(|params| params.deadlines),
            self.meanwhile,
            sum(|params| params.sleeps),
            sum(|params| params.repeated),
        );
        eprintln!(
            "    the lock: {} sections, {} halts, {} kicks, {} timers",
            self.rig.guest.params(0).sections,
            sum(|params| params.halts),
            sum(|params| params.kicks),
            sum(|params| params.backstops),
        );
        for ((exit, name), [without, with]) in Exits::NAMES.into_iter().zip(self.seen) {
            if self.changeable.contains(exit) {
                eprintln!("    {name}: {with} wake-ups with it disabled, {without} without");
            }
        }
    }

    /// Fails unless it slept with each exit and without it, and waited for the lock.
    fn ensure_enough(&self) -> Result<()> {
        let least = self.flips / 50;
        for ((exit, name), [without, with]) in Exits::NAMES.into_iter().zip(self.seen) {
            let given = (self.changeable & !self.refused).contains(exit);
            ensure!(
                without >= least && (with >= least || !given),
                "{name}: {with} wake-ups with it disabled, {without} without"
            );
        }
        let kicks: u32 = self.params().map(|params| params.kicks).sum();
        ensure!(
            u64::from(kicks) >= least / 10 || !self.pv_unhalt,
            "{kicks} kicks only"
        );
        Ok(())
    }
}
