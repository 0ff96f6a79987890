// SPDX-License-Identifier: GPL-2.0

//! QEMU, unmodified, with a Linux guest whose exits change all the time.

use std::{
    fs,
    io::{
        self,
        BufRead,
        BufReader, //
    },
    path::Path,
    process::{
        Child,
        ChildStdout,
        Command,
        Stdio, //
    },
    sync::mpsc::{
        channel,
        Receiver,
        TryRecvError, //
    },
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
    interface,
    kernel_log::bad_lines,
    uapi::{
        self,
        Device, //
    },
    POLLS, //
};

use crate::{
    few_will_do,
    guest::kernel,
    matrix::{
        floor,
        supported, //
    },
    Test, //
};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Where `tools/testing/run` puts what `tools/lab/guest` makes.
const GUEST: &str = "/usr/local/share/exitpolicy/guest.img";

/// Rounds of the guest's load, each of which takes 15 ms at least; and on a slow host.
const ROUNDS: u32 = 20;
const FEW_ROUNDS: u32 = 4;
/// What each of its four workers makes in a round: that many lines, the first one the number of its
/// file.
const LINES: u32 = 100;

const VCPUS: usize = 2;
/// Between two changes.
const PERIOD: Duration = Duration::from_millis(10);
/// Fewer have not disturbed the guest.
const LEAST_CHANGES: u32 = 200;

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let missing = !Path::new(QEMU).exists() || !Path::new(GUEST).exists();
    let changeable = supported(vendor)? & !floor(vendor)?;
    let test = Test::new("guest_live::boot_load_and_shutdown", move || {
        linux(vendor, changeable)
    });
    Ok(vec![test.ignored(missing)])
}

/// Boots, works and shuts down, while its exits change every [`PERIOD`].
fn linux(vendor: Vendor, changeable: Exits) -> Result<()> {
    let rounds = if few_will_do()? { FEW_ROUNDS } else { ROUNDS };
    let expected = checksum(rounds)?;
    let cgroup = Cgroup::new("machine")?;
    let mut qemu = Qemu::start(&cgroup, cpu(vendor), rounds)?;
    let device = Device::open()?;
    let missed = device.info()?.missed;
    let mut changes: Option<Changes<'_>> = None;
    let mut phase = Phase::Boot;
    let mut seen: Vec<String> = Vec::new();
    // How many changes of each phase, and since the last line of the guest's.
    let mut made = [0; 3];
    let mut silent = 0;
    loop {
        match qemu.console.try_recv() {
            Ok(line) => {
                silent = 0;
                if line.contains("guest: up") {
                    phase = Phase::Load;
                } else if line.contains("guest: load done") {
                    phase = Phase::Shutdown;
                }
                seen.push(line);
                continue;
            }
            Err(TryRecvError::Empty) => (),
            Err(TryRecvError::Disconnected) => break,
        }
        silent += 1;
        let result = match &mut changes {
            Some(changes) => changes.next().map(|is_made| {
                made[phase as usize] += u32::from(is_made);
            }),
            None => {
                changes = Changes::of(&device, &qemu, changeable)?;
                Ok(())
            }
        };
        result.with_context(|| format!("the guest's console:\n{}", seen.join("\n")))?;
        ensure!(
            silent < POLLS,
            "the guest does nothing any more; {:?}, its console:\n{}",
            interface::only_vm(),
            seen.join("\n")
        );
        thread::sleep(PERIOD);
    }
    let console = seen.join("\n");
    let status = qemu.child.wait()?;
    ensure!(status.success(), "QEMU: {status}, its console:\n{console}");
    let bad = bad_lines(&seen);
    ensure!(bad.is_empty(), "the guest complained: {bad:#?}\n{console}");
    let has = |what: &str| seen.iter().any(|line| line.contains(what));
    ensure!(
        has(&format!("guest: load done, {expected}")),
        "the guest's load should end with {expected}, and it ended after {made:?} changes with:\n\
         {console}"
    );
    ensure!(has("guest: done"), "no end of the guest:\n{console}");

    let changes = changes.context("there was no VM")?;
    eprintln!(
        "    {made:?} changes in boot, load and shutdown; {}",
        changes.told()
    );
    ensure!(
        made.iter().sum::<u32>() >= LEAST_CHANGES && made.iter().all(|changes| *changes > 0),
        "{made:?} changes only"
    );
    changes.ensure_seen()?;
    ensure!(
        device.info()?.missed == missed,
        "the module lost track of something"
    );
    interface::ensure_no_vms()
}

/// What the guest is at.
#[derive(Clone, Copy)]
enum Phase {
    Boot,
    Load,
    Shutdown,
}

/// What the guest's load should come to, from the host's own programs.
fn checksum(rounds: u32) -> Result<String> {
    let files = rounds * 4 - 1;
    let more = LINES - 1;
    let script = format!(
        "for n in $(seq 0 {files}); do seq $n $((n + {more})) | sha256sum; done | sha256sum"
    );
    let output = Command::new("/bin/sh").args(["-c", &script]).output()?;
    ensure!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout)?;
    Ok(text
        .split_whitespace()
        .next()
        .context("no checksum")?
        .to_string())
}

/// A guest that uses PV_UNHALT is refused `hlt` on Intel, which other tests see to.
fn cpu(vendor: Vendor) -> &'static str {
    match vendor {
        Vendor::Vmx => "host,-kvm-pv-unhalt",
        Vendor::Svm => "host",
    }
}

/// A QEMU that dies with the value.
struct Qemu {
    child: Child,
    console: Receiver<String>,
}

impl Qemu {
    fn start(cgroup: &Cgroup, cpu: &str, rounds: u32) -> Result<Self> {
        let kernel = kernel()?;
        let mut child = Command::new("/bin/sh")
            // The shell moves itself, and becomes QEMU there.
            .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\""])
            .arg(cgroup.directory())
            .arg(QEMU)
            .args(["-machine", "microvm,isa-serial=on,rtc=on,acpi=on"])
            .args(["-accel", "kvm", "-cpu", cpu, "-m", "256"])
            .args(["-smp", &VCPUS.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-no-reboot", "-serial", "stdio"])
            .args(["-kernel", &kernel, "-initrd", GUEST, "-append"])
            // Warnings are among what it must not say.
            .arg(format!(
                "console=ttyS0 loglevel=5 panic=-1 guest.load={rounds} guest.seconds=1"
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let console = lines(child.stdout.take().context("no pipe")?);
        Ok(Self { child, console })
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Its lines, as they come, until it ends.
fn lines(pipe: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe
            .read_until(b'\n', &mut line)
            .is_ok_and(|length| length > 0)
        {
            let text = String::from_utf8_lossy(&line).trim_end().to_string();
            if sender.send(text).is_err() {
                break;
            }
            line.clear();
        }
    });
    receiver
}

/// HLT exits between two changes, while all vCPUs were alike.
#[derive(Debug, Default)]
struct Windows {
    windows: u64,
    exits: u64,
    most: u64,
}

impl Windows {
    fn add(&mut self, exits: u64) {
        self.windows += 1;
        self.exits += exits;
        self.most = self.most.max(exits);
    }
}

/// Changes of a VM, one after the other: of the VM and of a vCPU by turns.
struct Changes<'a> {
    device: &'a Device,
    id: u64,
    /// KVM's statistics of the VM, and HLT exits after the last change.
    statistics: String,
    before: u64,
    changeable: Exits,
    random: u64,
    turn: u32,
    /// Overrides as they should be.
    of_vm: Option<Exits>,
    of_vcpus: [Option<Exits>; VCPUS],
    gone: bool,
    /// Without HLT exits, and with them.
    passed_through: Windows,
    trapped: Windows,
}

impl<'a> Changes<'a> {
    /// None as long as there is no VM.
    fn of(device: &'a Device, qemu: &Qemu, changeable: Exits) -> Result<Option<Self>> {
        let pid = qemu.child.id();
        let vms = device.vms()?;
        let Some(vm) = vms.iter().find(|vm| vm.pid == pid) else {
            return Ok(None);
        };
        let prefix = format!("{pid}-");
        for entry in fs::read_dir("/sys/kernel/debug/kvm")? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with(&prefix) {
                return Ok(Some(Self {
                    device,
                    id: vm.id,
                    statistics: format!("/sys/kernel/debug/kvm/{name}/halt_exits"),
                    before: 0,
                    changeable,
                    random: 1,
                    turn: 0,
                    of_vm: None,
                    of_vcpus: [None; VCPUS],
                    gone: false,
                    passed_through: Windows::default(),
                    trapped: Windows::default(),
                }));
            }
        }
        Ok(None)
    }

    /// What follows on a number, the same in every run: xorshift64.
    fn number(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// One that is not `than`.
    fn other_set(&mut self, than: Exits) -> Exits {
        loop {
            let set = Exits::from_bits_truncate(self.number() >> 20) & self.changeable;
            if set != than {
                return set;
            }
        }
    }

    /// What a vCPU should have of what can be changed.
    fn wanted(&self, vcpu: usize) -> Exits {
        let disable = self.of_vcpus[vcpu].or(self.of_vm);
        disable.unwrap_or(Exits::NONE)
    }

    /// Looks at what the last change did, and makes the next one. Says whether it could: the VM
    /// may not be there any more, or the vCPU not yet.
    fn next(&mut self) -> Result<bool> {
        if self.gone {
            return Ok(false);
        }
        self.look()?;
        self.turn += 1;
        let number = self.number();
        let vcpu = (self.turn % 2 == 1).then_some((number >> 32) as usize % VCPUS);
        // An override goes in the middle of others, and with the VM's those of its vCPUs.
        let reset = (number >> 40) % 4 == 0;
        let argument = uapi::Override {
            vm: self.id,
            flags: if vcpu.is_some() { uapi::VM_VCPU } else { 0 },
            vcpu_id: vcpu.unwrap_or(0) as u32,
            timeout_ms: uapi::MAX_TIMEOUT,
            ..Default::default()
        };
        let (result, disable) = if reset {
            (self.device.overriding(uapi::RESET_VM, argument), None)
        } else {
            let present = vcpu.map_or(self.of_vm, |vcpu| self.of_vcpus[vcpu]);
            let set = self.other_set(present.unwrap_or(Exits::NONE));
            let argument = uapi::Override {
                disable: set.bits(),
                ..argument
            };
            (self.device.overriding(uapi::SET_VM, argument), Some(set))
        };
        match result {
            Ok(done) => ensure!(done.pending == 0, "{} vCPUs are pending", done.pending),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                let vm = uapi::Vm {
                    id: self.id,
                    ..Default::default()
                };
                self.gone = self.device.vm(uapi::GET_VM, vm).is_err();
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        }
        match vcpu {
            Some(vcpu) => self.of_vcpus[vcpu] = disable,
            None => {
                self.of_vm = disable;
                if reset {
                    self.of_vcpus = [None; VCPUS];
                }
            }
        }
        self.before = self.halt_exits()?.unwrap_or(self.before);
        Ok(true)
    }

    /// Whether HLT exited since the last change as it should.
    fn look(&mut self) -> Result<()> {
        // Not before the first change, and not after the VM's end.
        let (Some(exits), true) = (self.halt_exits()?, self.turn > 0) else {
            return Ok(());
        };
        let exits = exits - self.before;
        let passes = |vcpu| self.wanted(vcpu).contains(Exits::HLT);
        if (0..VCPUS).all(passes) {
            self.passed_through.add(exits);
            // KVM may have been about to count one of each vCPU when it changed.
            ensure!(
                exits <= VCPUS as u64,
                "{exits} HLT exits after change {}, with hlt disabled",
                self.turn
            );
        } else if !(0..VCPUS).any(passes) {
            self.trapped.add(exits);
        }
        for vcpu in self.device.vcpus(self.id)? {
            let wanted = self.wanted(vcpu.vcpu_id as usize);
            ensure!(
                Exits::from_bits_truncate(vcpu.wanted) & self.changeable == wanted,
                "after change {} {wanted} should be wanted: {vcpu:?}",
                self.turn
            );
        }
        Ok(())
    }

    /// None if the VM is gone.
    fn halt_exits(&self) -> Result<Option<u64>> {
        match fs::read_to_string(&self.statistics) {
            Ok(text) => Ok(Some(text.trim().parse()?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context(self.statistics.clone()),
        }
    }

    fn told(&self) -> String {
        format!(
            "HLT exits with hlt disabled {:?}, without {:?}",
            self.passed_through, self.trapped
        )
    }

    /// Fails unless the changes were to be seen by the exits.
    fn ensure_seen(&self) -> Result<()> {
        let (without, with) = (&self.passed_through, &self.trapped);
        ensure!(
            without.windows > 0 && with.windows > 0 && with.most > VCPUS as u64,
            "{}",
            self.told()
        );
        // As many windows of one kind as of the other have many times the exits.
        ensure!(
            with.exits * without.windows > 10 * without.exits * with.windows,
            "{}",
            self.told()
        );
        Ok(())
    }
}
