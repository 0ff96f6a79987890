// SPDX-License-Identifier: GPL-2.0

//! QEMU, unmodified, with a Linux guest.

use std::{
    fs,
    io::{
        BufRead,
        BufReader, //
    },
    path::{
        Path,
        PathBuf, //
    },
    process::{
        Child,
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
use testing::{
    cgroup::Cgroup,
    exits::Vendor,
    interface::{
        self,
        ioctl, //
    }, //
};

use crate::{
    matrix::{
        floor,
        supported, //
    },
    Test, //
};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Where `tools/testing/run` puts what `tools/lab/guest` makes.
const GUEST: &str = "/usr/local/share/exitpolicy/guest.img";

/// KVM's statistics of each VM.
const STATISTICS: &str = "/sys/kernel/debug/kvm";

/// Seconds that the guest does nothing.
const IDLE: u32 = 3;

pub fn tests(vendor: Vendor) -> Vec<Test> {
    let missing = !Path::new(QEMU).exists() || !Path::new(GUEST).exists();
    let policies = [
        ("no_policy", None),
        ("none", Some((Exits::NONE, Exits::NONE))),
        ("hlt", Some((Exits::HLT, Exits::ALL))),
        ("all", Some((Exits::ALL, Exits::ALL))),
        ("all_but_hlt", Some((Exits::ALL, !Exits::HLT))),
    ];
    policies
        .into_iter()
        .map(|(name, policy)| {
            Test::new(format!("guest::linux_with_policy_{name}"), move || {
                linux(vendor, policy)
            })
            .ignored(missing)
        })
        .collect()
}

/// A QEMU that dies with the value.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The kernel of guests: the distribution's, of which the lab has one, whatever the host boots.
pub fn kernel() -> Result<String> {
    for entry in fs::read_dir("/boot")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("vmlinuz-") {
            return Ok(format!("/boot/{name}"));
        }
    }
    bail!("there is no kernel in /boot")
}

/// Boots, idles and shuts down.
fn linux(vendor: Vendor, policy: Option<(Exits, Exits)>) -> Result<()> {
    let cgroup = Cgroup::new("machine")?;
    let mut effective = floor(vendor)?;
    if let Some((disable, allow)) = policy {
        ioctl::set_policy(&cgroup, disable, allow)?;
        effective = effective | (disable & allow & supported(vendor)?);
    }
    let kernel = kernel()?;
    let child = Command::new("/bin/sh")
        // The shell moves itself, and becomes QEMU there.
        .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\""])
        .arg(cgroup.directory())
        .arg(QEMU)
        .args(["-machine", "microvm,isa-serial=on,rtc=on,acpi=on"])
        .args(["-accel", "kvm", "-cpu", "host", "-m", "256"])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-serial", "stdio"])
        .args(["-kernel", &kernel, "-initrd", GUEST, "-append"])
        .arg(format!("console=ttyS0 quiet panic=-1 guest.seconds={IDLE}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut qemu = Qemu(child);
    let mut console = BufReader::new(qemu.0.stdout.take().context("no pipe")?);
    let mut seen = String::new();
    let mut wait_for = |what: &str| -> Result<()> {
        loop {
            let mut line = Vec::new();
            ensure!(
                console.read_until(b'\n', &mut line)? > 0,
                "QEMU ended before '{what}', its console:\n{seen}"
            );
            let line = String::from_utf8_lossy(&line).into_owned();
            seen.push_str(&line);
            if line.contains(what) {
                return Ok(());
            }
        }
    };
    wait_for("guest: up")?;
    let view = interface::only_vm()?;
    ensure!(
        view.effective == effective && view.cgroup == cgroup.path(),
        "{view:?}"
    );
    wait_for("guest: idle for 1 s")?;
    let before = halt_exits(view.pid)?;
    wait_for(&format!("guest: idle for {IDLE} s"))?;
    let halts = halt_exits(view.pid)? - before;
    wait_for("guest: done")?;
    ensure!(qemu.0.wait()?.success(), "QEMU failed");

    eprintln!("    {halts} HLT exits in {} idle seconds", IDLE - 1);
    if effective.contains(Exits::HLT) {
        ensure!(halts == 0, "{halts} HLT exits with {effective} disabled");
    } else {
        ensure!(
            halts > 0,
            "an idle guest does not halt, {effective} disabled"
        );
    }
    interface::ensure_no_vms()
}

/// HLT exits of all VMs of a process.
fn halt_exits(pid: i32) -> Result<u64> {
    let prefix = format!("{pid}-");
    let (mut sum, mut found) = (0, false);
    for entry in fs::read_dir(STATISTICS)? {
        let path: PathBuf = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with(&prefix)) {
            found = true;
            sum += fs::read_to_string(path.join("halt_exits"))?
                .trim()
                .parse::<u64>()?;
        }
    }
    ensure!(found, "KVM has no statistics of process {pid}");
    Ok(sum)
}
