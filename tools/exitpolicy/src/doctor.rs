// SPDX-License-Identifier: GPL-2.0

//! Whether a host can run the module, and what is missing if not.
//!
//! Needs neither the module nor privileges: what cannot be read is said to be unknown.

use crate::{
    cgroup::Hierarchy,
    device::Vendor,
    error::reason,
    Device,
    Error,
    Host, //
};
use exitpolicy_policy::Exits;
use flate2::read::GzDecoder;
use rustix::{
    fs::{
        open,
        Mode,
        OFlags, //
    },
    io::Errno,
    ioctl::{
        ioctl,
        opcode,
        Ioctl,
        IoctlOutput,
        Opcode, //
    },
};
use std::{
    ffi::c_void,
    fs,
    io::Read,
    path::{
        Path,
        PathBuf, //
    },
    ptr, //
};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing is to be done.
    Ok,
    /// It works, with a restriction; or whether it does could not be seen.
    Warning,
    /// It cannot work like this.
    Missing,
}

impl State {
    /// A name that stays the same, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Missing => "missing",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// A name that stays the same, for programs.
    pub id: &'static str,
    /// How it came out.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub todo: Option<String>,
}

/// What was found, before it is known for which check.
struct Finding {
    state: State,
    found: String,
    todo: Option<String>,
}

fn ok(found: impl Into<String>) -> Finding {
    Finding {
        state: State::Ok,
        found: found.into(),
        todo: None,
    }
}

fn warning(found: impl Into<String>, todo: impl Into<String>) -> Finding {
    Finding {
        state: State::Warning,
        found: found.into(),
        todo: Some(todo.into()),
    }
}

fn missing(found: impl Into<String>, todo: impl Into<String>) -> Finding {
    Finding {
        state: State::Missing,
        found: found.into(),
        todo: Some(todo.into()),
    }
}

/// Whether the module can work on a host where these checks were made.
pub fn can_work(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.state != State::Missing)
}

/// Looks at everything that the module needs.
pub fn examine(host: &Host) -> Vec<Check> {
    let cpu = Cpu::of(host);
    let release = host
        .read("/proc/sys/kernel/osrelease")
        .unwrap_or_else(|_| "unknown".into());
    let answer = ask_kvm(host);
    let vendor = loaded_vendor(host).or(cpu.vendor());
    let supported = answer.unwrap_or(Exits::NONE);

    let mut checks = Vec::new();
    let mut add = |id, finding: Finding| {
        checks.push(Check {
            id,
            state: finding.state,
            found: finding.found,
            todo: finding.todo,
        });
    };
    add("cpu", check_cpu(&cpu));
    add("kvm", check_kvm(host, cpu.vendor()));
    add("kvm_device", check_kvm_device(answer, vendor));
    if answer.is_ok() {
        add("supported", check_supported(host, supported));
    }
    if let Some(vendor) = loaded_vendor(host) {
        add("floor", check_floor(host, &cpu, vendor));
    }
    add("smt", check_smt(host));
    add("kernel_config", check_kernel_config(host, &release, vendor));
    add("ftrace", check_ftrace(host));
    add("cgroup", check_cgroup(host));
    let installed = find_module(host, &release);
    add(
        "module_signature",
        check_signature(host, installed.as_deref()),
    );
    add("module", check_module(host, &release, installed.as_deref()));
    checks
}

/// Whether the CPU has the cross-thread return address bug, SMT can be on, and KVM was not told
/// to mitigate it: a guest thread that leaves C0 natively can then be steered by its sibling.
/// KVM itself warns of it, once.
pub fn is_exposed_to_smt_rsb(host: &Host) -> bool {
    let smt = host.read("/sys/devices/system/cpu/smt/control");
    Cpu::of(host).has_bug("smt_rsb")
        && !matches!(smt.as_deref(), Ok("forceoff" | "notsupported"))
        && !mitigates_smt_rsb(host)
}

/// Whether pages of guests may have to be fetched from a disk.
pub fn swaps(host: &Host) -> bool {
    // One line for people, and one for each area.
    host.read("/proc/swaps")
        .is_ok_and(|text| text.lines().count() > 1)
}

fn mitigates_smt_rsb(host: &Host) -> bool {
    host.read("/sys/module/kvm/parameters/mitigate_smt_rsb")
        .is_ok_and(|value| value == "Y")
}

/// /proc/cpuinfo of the first CPU.
struct Cpu {
    flags: String,
    bugs: String,
}

impl Cpu {
    fn of(host: &Host) -> Self {
        let text = host.read("/proc/cpuinfo").unwrap_or_default();
        let field = |name| {
            text.lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(key, _)| key.trim() == name)
                .map(|(_, value)| value.to_owned())
                .unwrap_or_default()
        };
        Self {
            flags: field("flags"),
            bugs: field("bugs"),
        }
    }

    fn has(&self, flag: &str) -> bool {
        self.flags.split_whitespace().any(|word| word == flag)
    }

    fn has_bug(&self, bug: &str) -> bool {
        self.bugs.split_whitespace().any(|word| word == bug)
    }

    fn vendor(&self) -> Option<Vendor> {
        [Vendor::Svm, Vendor::Vmx]
            .into_iter()
            .find(|vendor| self.has(vendor.name()))
    }
}

fn kvm_module(vendor: Vendor) -> &'static str {
    match vendor {
        Vendor::Svm => "kvm_amd",
        Vendor::Vmx => "kvm_intel",
    }
}

/// The vendor module of KVM that is loaded, if one is.
pub(crate) fn loaded_vendor(host: &Host) -> Option<Vendor> {
    [Vendor::Svm, Vendor::Vmx]
        .into_iter()
        .find(|vendor| host.has(Path::new("/sys/module").join(kvm_module(*vendor))))
}

fn check_cpu(cpu: &Cpu) -> Finding {
    match cpu.vendor() {
        Some(vendor) => ok(format!("the CPU has {}", vendor.name())),
        None => missing(
            "the CPU shows neither svm nor vmx in /proc/cpuinfo",
            "switch virtualization on in the firmware; in a VM, let its host pass it through",
        ),
    }
}

fn check_kvm(host: &Host, vendor: Option<Vendor>) -> Finding {
    if let Some(loaded) = loaded_vendor(host) {
        return ok(format!("{} is loaded", kvm_module(loaded)));
    }
    let module = vendor.map_or("kvm_amd or kvm_intel", kvm_module);
    missing(
        format!("{module} is not loaded"),
        match vendor {
            Some(_) => format!("load it with 'modprobe {module}'"),
            None => "it needs a CPU that shows svm or vmx".into(),
        },
    )
}

/// KVM_CHECK_EXTENSION of <linux/kvm.h>, for KVM_CAP_X86_DISABLE_EXITS.
struct CheckDisableExits;

impl CheckDisableExits {
    const CAPABILITY: usize = 143;
}

// SAFETY: The number is that of KVM_CHECK_EXTENSION, whose argument is a plain number and whose
// answer is what the call returns.
unsafe impl Ioctl for CheckDisableExits {
    type Output = u64;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xAE, 0x03)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::without_provenance_mut(Self::CAPABILITY)
    }

    unsafe fn output_from_ptr(answer: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u64> {
        u64::try_from(answer).map_err(|_| Errno::RANGE)
    }
}

/// What KVM says that it can disable, or why it cannot be asked.
fn ask_kvm(host: &Host) -> Result<Exits, Errno> {
    let kvm = open(
        host.path("/dev/kvm"),
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    // SAFETY: `CheckDisableExits` passes no pointer, so nothing of ours is read or written.
    unsafe { ioctl(kvm, CheckDisableExits) }.map(Exits::from_bits_truncate)
}

fn check_kvm_device(answer: Result<Exits, Errno>, vendor: Option<Vendor>) -> Finding {
    match answer {
        Ok(Exits::NONE) => missing(
            "/dev/kvm works, and KVM can disable no exit (KVM_CAP_X86_DISABLE_EXITS)",
            "this KVM is too old, or of another architecture: boot a newer kernel",
        ),
        // KVM accepts it there, and has no code for it.
        Ok(exits) if vendor == Some(Vendor::Svm) && exits.contains(Exits::CSTATE) => ok(format!(
            "/dev/kvm works; KVM offers to disable {exits}, cstate without effect on AMD",
        )),
        Ok(exits) => ok(format!("/dev/kvm works; KVM offers to disable {exits}")),
        Err(Errno::ACCESS | Errno::PERM) => warning(
            "/dev/kvm is there, and may not be opened",
            "run this as root, or as a member of the group that /dev/kvm belongs to, to see more",
        ),
        Err(errno) => missing(
            format!("/dev/kvm does not work: {}", reason(errno)),
            "load kvm_amd or kvm_intel, and see what the kernel log says of it",
        ),
    }
}

fn check_supported(host: &Host, supported: Exits) -> Finding {
    let lacking = !supported;
    if lacking.is_empty() {
        ok("KVM can disable every exit that there is")
    } else if lacking.contains(Exits::HLT) && mitigates_smt_rsb(host) {
        warning(
            format!("KVM does not disable {lacking}: kvm.mitigate_smt_rsb is set"),
            "leave it set where guests do not trust each other; else boot with \
             kvm.mitigate_smt_rsb=0",
        )
    } else {
        warning(
            format!("KVM cannot disable {lacking} on this host"),
            "nothing, if they are not needed: mwait needs a CPU with MWAIT, an APIC timer that \
             runs in every C-state (ARAT) and no MONITOR bug, aperfmperf one with APERF and MPERF",
        )
    }
}

/// KVM disables PAUSE exits by itself where they could not be rationed: each PAUSE would exit.
fn check_floor(host: &Host, cpu: &Cpu, vendor: Vendor) -> Finding {
    let (parameters, lacking): (&[&str], _) = match vendor {
        Vendor::Svm => (
            &["pause_filter_count", "pause_filter_thresh"],
            !(cpu.has("pausefilter") && cpu.has("pfthreshold")),
        ),
        Vendor::Vmx => (&["ple_gap"], false),
    };
    let module = kvm_module(vendor);
    let mut values = Vec::new();
    for parameter in parameters {
        match host.read(format!("/sys/module/{module}/parameters/{parameter}")) {
            Ok(value) => values.push((parameter, value)),
            Err(_) => {
                return warning(
                    format!("cannot read the parameter {parameter} of {module}"),
                    "see 'exitpolicy status' for the floor",
                )
            }
        }
    }
    match values.iter().find(|(_, value)| value == "0") {
        None => ok("KVM rations PAUSE exits: the floor is none"),
        Some(_) if lacking => ok(
            "the CPU lacks pausefilter or pfthreshold, so KVM disables PAUSE exits in every VM: \
             the floor is pause",
        ),
        Some((parameter, _)) => ok(format!(
            "{parameter} of {module} is 0, by option or because the CPU lacks it, so KVM disables \
             PAUSE exits in every VM: the floor is pause",
        )),
    }
}

fn check_smt(host: &Host) -> Finding {
    let active = host
        .read("/sys/devices/system/cpu/smt/active")
        .is_ok_and(|value| value == "1");
    let smt = if active { "SMT is on" } else { "SMT is off" };
    if is_exposed_to_smt_rsb(host) {
        return warning(
            format!(
                "{smt}, and the CPU has the cross-thread return address bug (smt_rsb): native \
                 hlt, mwait and cstate expose the sibling thread",
            ),
            "boot with nosmt=force, give whole cores to a guest, or set kvm.mitigate_smt_rsb=1, \
             after which KVM does not disable these exits",
        );
    }
    // Idle siblings that the scheduler does not see are a matter of these, too.
    let leaky: Vec<_> = ["l1tf", "mds", "mmio_stale_data", "tsa", "vmscape"]
        .into_iter()
        .filter(|name| {
            host.read(Path::new("/sys/devices/system/cpu/vulnerabilities").join(name))
                .is_ok_and(|text| text.contains("SMT vulnerable"))
        })
        .collect();
    if active && !leaky.is_empty() {
        return warning(
            format!("{smt}, and sibling threads can spy by {}", leaky.join(", ")),
            "give whole cores to a guest, or boot with nosmt; policies change nothing about it",
        );
    }
    ok(smt)
}

fn check_kernel_config(host: &Host, release: &str, vendor: Option<Vendor>) -> Finding {
    let Some((config, source)) = kernel_config(host, release) else {
        return warning(
            format!("the configuration of kernel {release} cannot be read"),
            format!(
                "put it at /boot/config-{release}, or look there for CONFIG_RUST and CONFIG_FPROBE"
            ),
        );
    };
    let kvm = match vendor {
        Some(Vendor::Svm) => &["CONFIG_KVM_AMD"][..],
        Some(Vendor::Vmx) => &["CONFIG_KVM_INTEL"],
        None => &[],
    };
    let lacking: Vec<_> = [
        "CONFIG_MODULES",
        "CONFIG_RUST",
        "CONFIG_FPROBE",
        "CONFIG_DYNAMIC_FTRACE_WITH_ARGS",
        "CONFIG_KPROBES",
        "CONFIG_CGROUPS",
    ]
    .iter()
    .chain(kvm)
    .filter(|option| {
        !config.lines().any(|line| {
            line.split_once('=')
                .is_some_and(|(name, value)| name == **option && matches!(value, "y" | "m"))
        })
    })
    .copied()
    .collect();
    if config.lines().any(|line| line == "CONFIG_PREEMPT_RT=y") {
        missing(
            format!("{} has CONFIG_PREEMPT_RT", source.display()),
            "boot a kernel without: hooks allocate memory with preemption disabled, which it forbids",
        )
    } else if lacking.is_empty() {
        ok(format!("{} has all that is needed", source.display()))
    } else {
        missing(
            format!("{} lacks {}", source.display(), lacking.join(", ")),
            "boot a kernel that has it; Debian's from backports does",
        )
    }
}

/// The configuration of the running kernel, and where it was found.
fn kernel_config(host: &Host, release: &str) -> Option<(String, PathBuf)> {
    let built_in = PathBuf::from("/proc/config.gz");
    if let Ok(file) = fs::File::open(host.path(&built_in)) {
        let mut config = String::new();
        if GzDecoder::new(file).read_to_string(&mut config).is_ok() {
            return Some((config, built_in));
        }
    }
    [
        format!("/boot/config-{release}"),
        format!("/lib/modules/{release}/config"),
    ]
    .into_iter()
    .find_map(|path| Some((host.read(&path).ok()?, path.into())))
}

fn check_ftrace(host: &Host) -> Finding {
    match host.read("/proc/sys/kernel/ftrace_enabled") {
        // Nobody can write that to it any more: it is what is left after a bug in ftrace.
        Ok(value) if value == "0" => missing(
            "ftrace has switched itself off (kernel.ftrace_enabled is 0): hooks would never run",
            "the kernel's log says why; boot again",
        ),
        Err(_) => missing(
            "the kernel has no function tracing (no kernel.ftrace_enabled)",
            "boot a kernel with CONFIG_FUNCTION_TRACER and CONFIG_FPROBE",
        ),
        Ok(_) => ok("ftrace is on"),
    }
}

fn check_cgroup(host: &Host) -> Finding {
    match Hierarchy::find(host) {
        Ok(hierarchy) => ok(format!(
            "cgroup v2 is at {}",
            hierarchy.mount_point().display()
        )),
        Err(error) => missing(
            error.to_string(),
            error.hint().unwrap_or_else(|| "mount /proc".into()),
        ),
    }
}

/// The file that modprobe would load, or one that depmod has not seen yet.
fn find_module(host: &Host, release: &str) -> Option<PathBuf> {
    let modules = Path::new("/lib/modules").join(release);
    let known = host
        .read(modules.join("modules.dep"))
        .ok()
        .and_then(|text| {
            text.lines()
                .filter_map(|line| line.split_once(':'))
                .map(|(file, _)| modules.join(file))
                .find(|file| is_module(file))
        });
    known.or_else(|| {
        ["updates/dkms", "updates", "extra"]
            .into_iter()
            .filter_map(|folder| fs::read_dir(host.path(modules.join(folder))).ok())
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|file| is_module(file))
    })
}

fn is_module(file: &Path) -> bool {
    file.file_name()
        .and_then(|name| name.to_str()?.split_once('.'))
        .is_some_and(|(stem, suffix)| {
            stem.replace('-', "_") == "kvm_exitpolicy"
                && matches!(suffix, "ko" | "ko.xz" | "ko.zst" | "ko.gz")
        })
}

fn is_loaded(host: &Host) -> bool {
    host.has("/sys/module/kvm_exitpolicy")
}

fn check_signature(host: &Host, installed: Option<&Path>) -> Finding {
    // "none [integrity] confidentiality"
    let lockdown = host
        .read("/sys/kernel/security/lockdown")
        .is_ok_and(|text| !text.contains("[none]"));
    let enforced = host
        .read("/sys/module/module/parameters/sig_enforce")
        .is_ok_and(|value| value == "Y");
    // Four bytes of attributes, then the value.
    let secure_boot = fs::read(
        host.path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"),
    )
    .is_ok_and(|variable| variable.get(4) == Some(&1));
    let why = match (lockdown, enforced, secure_boot) {
        (true, _, _) => "the kernel is locked down",
        (_, true, _) => "module.sig_enforce is set",
        (_, _, true) => "Secure Boot is on",
        _ => return ok("the kernel takes modules without a signature"),
    };
    if is_loaded(host) {
        return ok(format!("{why}; the module is loaded all the same"));
    }
    let sign = "sign it with a key that the kernel trusts: enroll one with 'mokutil --import', \
                and sign with the kernel's scripts/sign-file, which DKMS does by itself";
    match installed.map(|file| (file, fs::read(host.path(file)))) {
        Some((file, Ok(content))) if file.extension().is_some_and(|suffix| suffix == "ko") => {
            if content.ends_with(b"~Module signature appended~\n") {
                warning(
                    format!("{why}; the module is signed"),
                    "see in 'mokutil --list-enrolled' that the kernel trusts the key",
                )
            } else {
                missing(format!("{why}; the module has no signature"), sign)
            }
        }
        _ => warning(format!("{why}: the module needs a signature"), sign),
    }
}

fn check_module(host: &Host, release: &str, installed: Option<&Path>) -> Finding {
    if !is_loaded(host) {
        return match installed {
            Some(file) => warning(
                format!("not loaded; installed as {}", file.display()),
                "load it with 'modprobe kvm_exitpolicy'; if it is not found, run 'depmod' first",
            ),
            None => missing(
                format!("kvm_exitpolicy.ko is not installed for kernel {release}"),
                "build and install it with 'make' and 'make install' in its source tree",
            ),
        };
    }
    if !host.has("/sys/kernel/exitpolicy") {
        return missing(
            "loaded, and /sys/kernel/exitpolicy is not there",
            "see what the kernel log says of exitpolicy, and load the module again",
        );
    }
    match Device::open(host).and_then(|device| device.info()) {
        Ok(info) if info.missed > 0 => warning(
            format!("loaded; it missed {} VMs or vCPUs", info.missed),
            "see what the kernel log says of exitpolicy",
        ),
        Ok(info) => ok(match info.vendor {
            Some(vendor) => format!("loaded, and works with {}", kvm_module(vendor)),
            None => "loaded, and waits for kvm_amd or kvm_intel".into(),
        }),
        Err(error @ Error::NotPermitted { .. }) => {
            warning(format!("loaded; {error}"), error.hint().unwrap_or_default())
        }
        Err(error) => missing(format!("loaded; {error}"), error.hint().unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{
        write::GzEncoder,
        Compression, //
    };
    use std::io::Write;

    const RELEASE: &str = "7.3.4+deb13-amd64";
    const CONFIG: &str = "\
        # a comment\n\
        CONFIG_MODULES=y\n\
        CONFIG_RUST=y\n\
        CONFIG_FPROBE=y\n\
        CONFIG_DYNAMIC_FTRACE_WITH_ARGS=y\n\
        CONFIG_KPROBES=y\n\
        CONFIG_CGROUPS=y\n\
        CONFIG_KVM_AMD=m\n\
        # CONFIG_KVM_INTEL is not set\n";
    const EFI: &str = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

    struct Fixture {
        /// Removed when dropped.
        _root: tempfile::TempDir,
        host: Host,
    }

    impl Fixture {
        fn empty() -> Self {
            let root = tempfile::tempdir().unwrap();
            let host = Host::new(root.path());
            Self { _root: root, host }
        }

        /// An AMD host without anything to complain about, as far as files can tell.
        fn amd() -> Self {
            let fixture = Self::empty();
            for (path, content) in [
                (
                    "/proc/cpuinfo",
                    "processor\t: 0\n\
                     flags\t\t: fpu svm pausefilter pfthreshold\n\
                     bugs\t\t: sysret_ss_attrs spectre_v1\n\n\
                     processor\t: 1\n",
                ),
                ("/proc/sys/kernel/osrelease", RELEASE),
                ("/proc/sys/kernel/ftrace_enabled", "1\n"),
                ("/sys/module/kvm/parameters/mitigate_smt_rsb", "N\n"),
                (
                    "/sys/module/kvm_amd/parameters/pause_filter_count",
                    "3000\n",
                ),
                (
                    "/sys/module/kvm_amd/parameters/pause_filter_thresh",
                    "128\n",
                ),
                ("/sys/devices/system/cpu/smt/active", "0\n"),
                ("/sys/devices/system/cpu/smt/control", "on\n"),
                ("/sys/module/module/parameters/sig_enforce", "N\n"),
                (
                    "/sys/kernel/security/lockdown",
                    "[none] integrity confidentiality\n",
                ),
            ] {
                fixture.write(path, content);
            }
            fixture.write(&format!("/boot/config-{RELEASE}"), CONFIG);
            fixture.write(
                &format!("/lib/modules/{RELEASE}/modules.dep"),
                "kernel/fs/fat.ko:\nupdates/dkms/kvm_exitpolicy.ko: kernel/arch/x86/kvm/kvm.ko\n",
            );
            fixture.write(
                &format!("/lib/modules/{RELEASE}/updates/dkms/kvm_exitpolicy.ko"),
                "ELF",
            );
            fixture
        }

        fn write(&self, path: &str, content: impl AsRef<[u8]>) {
            let path = self.host.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        fn remove(&self, path: &str) {
            let path = self.host.path(path);
            if path.is_dir() {
                fs::remove_dir_all(path).unwrap();
            } else {
                fs::remove_file(path).unwrap();
            }
        }

        fn check(&self, id: &str) -> Check {
            examine(&self.host)
                .into_iter()
                .find(|check| check.id == id)
                .unwrap_or_else(|| panic!("no check {id}"))
        }

        #[track_caller]
        fn expect(&self, id: &str, state: State, found: &str) {
            let check = self.check(id);
            assert_eq!(check.state, state, "{check:?}");
            assert!(check.found.contains(found), "{check:?}");
            assert_eq!(check.todo.is_some(), state != State::Ok, "{check:?}");
            assert_ne!(check.todo.as_deref(), Some(""), "{check:?}");
        }
    }

    fn set(text: &str) -> Exits {
        text.parse().unwrap()
    }

    #[test]
    fn a_host_without_anything_is_told_so() {
        let checks = examine(&Fixture::empty().host);
        assert!(!can_work(&checks));
        let missing: Vec<_> = checks
            .iter()
            .filter(|check| check.state == State::Missing)
            .map(|check| check.id)
            .collect();
        assert_eq!(
            missing,
            ["cpu", "kvm", "kvm_device", "ftrace", "cgroup", "module"]
        );
    }

    #[test]
    fn cpu() {
        let fixture = Fixture::amd();
        fixture.expect("cpu", State::Ok, "svm");
        fixture.write("/proc/cpuinfo", "flags : fpu vmx\n");
        fixture.expect("cpu", State::Ok, "vmx");
        fixture.write("/proc/cpuinfo", "flags : fpu vmxish\n");
        fixture.expect("cpu", State::Missing, "neither svm nor vmx");
    }

    #[test]
    fn kvm() {
        let fixture = Fixture::amd();
        fixture.expect("kvm", State::Ok, "kvm_amd is loaded");
        fixture.remove("/sys/module/kvm_amd");
        fixture.expect("kvm", State::Missing, "kvm_amd is not loaded");
        fixture.write("/proc/cpuinfo", "flags : vmx\n");
        fixture.expect("kvm", State::Missing, "kvm_intel is not loaded");
    }

    #[test]
    fn kvm_device() {
        let fixture = Fixture::amd();
        fixture.expect("kvm_device", State::Missing, "No such file");
        fixture.write("/dev/kvm", "");
        fixture.expect("kvm_device", State::Missing, "Inappropriate ioctl");

        let found = |answer, vendor| check_kvm_device(answer, vendor).found;
        assert!(found(Ok(set("hlt,pause")), None).contains("disable hlt,pause"));
        assert!(found(Ok(Exits::ALL), Some(Vendor::Vmx)).ends_with("disable all"));
        assert!(found(Ok(Exits::ALL), Some(Vendor::Svm)).contains("cstate without effect"));
        assert!(found(Err(Errno::ACCESS), None).contains("may not be opened"));
        assert_eq!(
            check_kvm_device(Err(Errno::ACCESS), None).state,
            State::Warning
        );
        assert_eq!(
            check_kvm_device(Ok(Exits::NONE), None).state,
            State::Missing
        );
    }

    #[test]
    fn supported() {
        let fixture = Fixture::amd();
        let check = |exits| check_supported(&fixture.host, set(exits));
        assert_eq!(check("all").state, State::Ok);
        let finding = check("hlt,pause,cstate,aperfmperf");
        assert_eq!(finding.state, State::Warning);
        assert!(finding.found.contains("cannot disable mwait"));
        fixture.write("/sys/module/kvm/parameters/mitigate_smt_rsb", "Y\n");
        assert!(check("pause").found.contains("mitigate_smt_rsb is set"));
        assert!(!check("hlt,pause").found.contains("mitigate_smt_rsb"));
    }

    #[test]
    fn floor() {
        let fixture = Fixture::amd();
        fixture.expect("floor", State::Ok, "floor is none");
        fixture.write("/sys/module/kvm_amd/parameters/pause_filter_thresh", "0\n");
        fixture.expect("floor", State::Ok, "pause_filter_thresh of kvm_amd is 0");
        fixture.write("/proc/cpuinfo", "flags : svm pausefilter\n");
        fixture.expect(
            "floor",
            State::Ok,
            "the CPU lacks pausefilter or pfthreshold",
        );
        fixture.remove("/sys/module/kvm_amd/parameters/pause_filter_thresh");
        fixture.expect("floor", State::Warning, "cannot read");

        fixture.remove("/sys/module/kvm_amd");
        fixture.write("/sys/module/kvm_intel/parameters/ple_gap", "128\n");
        fixture.expect("floor", State::Ok, "floor is none");
        fixture.write("/sys/module/kvm_intel/parameters/ple_gap", "0\n");
        fixture.expect("floor", State::Ok, "ple_gap of kvm_intel is 0");
    }

    #[test]
    fn smt() {
        let fixture = Fixture::amd();
        fixture.expect("smt", State::Ok, "SMT is off");
        fixture.write("/sys/devices/system/cpu/smt/active", "1\n");
        fixture.expect("smt", State::Ok, "SMT is on");
        fixture.write(
            "/sys/devices/system/cpu/vulnerabilities/mds",
            "Mitigation: Clear CPU buffers; SMT vulnerable\n",
        );
        fixture.expect("smt", State::Warning, "spy by mds");
        fixture.write("/proc/cpuinfo", "flags : svm\nbugs : smt_rsb\n");
        fixture.expect("smt", State::Warning, "smt_rsb");
        assert!(is_exposed_to_smt_rsb(&fixture.host));

        fixture.write("/sys/module/kvm/parameters/mitigate_smt_rsb", "Y\n");
        assert!(!is_exposed_to_smt_rsb(&fixture.host));
        fixture.write("/sys/module/kvm/parameters/mitigate_smt_rsb", "N\n");
        fixture.write("/sys/devices/system/cpu/smt/control", "forceoff\n");
        assert!(!is_exposed_to_smt_rsb(&fixture.host));
    }

    #[test]
    fn kernel_config() {
        let fixture = Fixture::amd();
        fixture.expect("kernel_config", State::Ok, "/boot/config-7.3.4");

        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(
            CONFIG
                .replace("CONFIG_RUST=y", "# CONFIG_RUST is not set")
                .as_bytes(),
        )
        .unwrap();
        fixture.write("/proc/config.gz", gzip.finish().unwrap());
        fixture.expect(
            "kernel_config",
            State::Missing,
            "/proc/config.gz lacks CONFIG_RUST",
        );

        fixture.write("/proc/config.gz", "broken");
        fixture.expect("kernel_config", State::Ok, "/boot/config-7.3.4");

        fixture.remove(&format!("/boot/config-{RELEASE}"));
        fixture.expect("kernel_config", State::Warning, "cannot be read");
        fixture.write(
            &format!("/lib/modules/{RELEASE}/config"),
            CONFIG.replace("CONFIG_KVM_AMD=m", ""),
        );
        fixture.expect(
            "kernel_config",
            State::Missing,
            "config lacks CONFIG_KVM_AMD",
        );
    }

    #[test]
    fn ftrace() {
        let fixture = Fixture::amd();
        fixture.expect("ftrace", State::Ok, "ftrace is on");
        fixture.write("/proc/sys/kernel/ftrace_enabled", "0\n");
        fixture.expect("ftrace", State::Missing, "ftrace_enabled is 0");
        fixture.remove("/proc/sys/kernel/ftrace_enabled");
        fixture.expect("ftrace", State::Missing, "no function tracing");
    }

    #[test]
    fn signature() {
        let fixture = Fixture::amd();
        let module = format!("/lib/modules/{RELEASE}/updates/dkms/kvm_exitpolicy.ko");
        fixture.expect("module_signature", State::Ok, "without a signature");
        fixture.write(EFI, [6, 0, 0, 0, 0]);
        fixture.expect("module_signature", State::Ok, "without a signature");
        fixture.write(EFI, [6, 0, 0, 0, 1]);
        fixture.expect("module_signature", State::Missing, "Secure Boot is on");
        fixture.write("/sys/module/module/parameters/sig_enforce", "Y\n");
        fixture.expect("module_signature", State::Missing, "sig_enforce is set");
        fixture.write(
            "/sys/kernel/security/lockdown",
            "none [integrity] confidentiality\n",
        );
        fixture.expect("module_signature", State::Missing, "locked down");
        fixture.write(&module, "ELF~Module signature appended~\n");
        fixture.expect("module_signature", State::Warning, "the module is signed");
        fixture.remove(&format!("/lib/modules/{RELEASE}"));
        fixture.expect("module_signature", State::Warning, "needs a signature");
        fixture.write("/sys/module/kvm_exitpolicy/refcnt", "0\n");
        fixture.expect("module_signature", State::Ok, "loaded all the same");
    }

    #[test]
    fn module() {
        let fixture = Fixture::amd();
        fixture.expect("module", State::Warning, "updates/dkms/kvm_exitpolicy.ko");
        fixture.remove(&format!("/lib/modules/{RELEASE}"));
        fixture.expect("module", State::Missing, "not installed for kernel 7.3.4");
        // depmod has not run yet.
        fixture.write(
            &format!("/lib/modules/{RELEASE}/extra/kvm-exitpolicy.ko.zst"),
            "",
        );
        fixture.expect("module", State::Warning, "extra/kvm-exitpolicy.ko.zst");

        fixture.write("/sys/module/kvm_exitpolicy/refcnt", "0\n");
        fixture.expect(
            "module",
            State::Missing,
            "/sys/kernel/exitpolicy is not there",
        );
        fixture.write("/sys/kernel/exitpolicy/vendor", "svm\n");
        fixture.expect("module", State::Missing, "cannot open");
        fixture.write("/dev/exitpolicy", "");
        fixture.expect("module", State::Missing, "malformed or unknown");
    }

    #[test]
    fn warnings_do_not_stop_anyone() {
        let check = |state| Check {
            id: "any",
            state,
            found: String::new(),
            todo: None,
        };
        assert!(can_work(&[check(State::Ok), check(State::Warning)]));
        assert!(!can_work(&[check(State::Ok), check(State::Missing)]));
    }
}
