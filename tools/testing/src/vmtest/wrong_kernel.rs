// SPDX-License-Identifier: GPL-2.0

//! The module in kernels that it was not made for: refused, with the reason in one line of the log,
//! and nothing left behind.
//!
//! The kernel is always the same. It is the module's file that is doctored, so that it looks for
//! what this kernel has not.

use std::{
    collections::BTreeSet,
    fs,
    ops::Range,
    path::Path, //
};

use anyhow::{
    anyhow,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use nix::{
    errno::Errno,
    mount::{
        mount,
        MsFlags, //
    },
    sched::{
        unshare,
        CloneFlags, //
    },
};
use testing::{
    cgroup::Cgroup,
    client::Vmm,
    exits::Vendor,
    interface::{
        self,
        ioctl, //
    },
    kernel_log::KernelLog,
    modules::{
        self,
        EXITPOLICY, //
    },
    payload::Payload,
    uapi::Device, //
};

use crate::{
    is_slow_host,
    lifecycle::nothing_hooked,
    matrix::{
        check_guest,
        floor, //
    },
    Test, //
};

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    // Each load takes Bochs seconds.
    let step = if is_slow_host()? { 6 } else { 1 };
    Ok(vec![
        Test::new("wrong_kernel::another_release", another_release),
        Test::new("wrong_kernel::other_layouts", move || other_layouts(step)),
        Test::new("wrong_kernel::no_function_to_hook", move || {
            no_function_to_hook(vendor)
        }),
        Test::new("wrong_kernel::no_function_to_call", move || {
            no_function_to_call(vendor)
        }),
        Test::new("wrong_kernel::hooks_that_are_not_called", move || {
            hooks_that_are_not_called(vendor)
        }),
        Test::new("wrong_kernel::vm_in_another_state", move || {
            vm_in_another_state(vendor)
        }),
        Test::new("wrong_kernel::no_parameter", move || no_parameter(vendor)),
        Test::new("wrong_kernel::no_tracepoint", no_tracepoint),
        Test::new("wrong_kernel::no_dev_kvm", move || no_dev_kvm(vendor)),
        Test::new("wrong_kernel::ftrace_and_kprobes_switched_off", move || {
            switched_off(vendor)
        }),
    ])
}

/// Fails unless a module is refused like this, with one line in the log that has all of `reasons`,
/// and leaves nothing. Returns that line.
fn refused(image: &[u8], errno: Errno, reasons: &[&str]) -> Result<String> {
    let mut log = KernelLog::from_now()?;
    let result = modules::load_image(image);
    ensure_refused(result, &mut log, errno, reasons)
}

fn ensure_refused(
    result: nix::Result<()>,
    log: &mut KernelLog,
    errno: Errno,
    reasons: &[&str],
) -> Result<String> {
    ensure!(result == Err(errno), "{reasons:?}: {result:?}");
    let mut lines = log.lines()?;
    lines.retain(|line| line.starts_with(EXITPOLICY));
    ensure!(
        lines.len() == 1 && reasons.iter().all(|reason| lines[0].contains(reason)),
        "the log has {lines:?}, should have {reasons:?}"
    );
    nothing_hooked().context(lines[0].clone())?;
    Ok(lines.swap_remove(0))
}

/// Does something while the module is not loaded, and loads the right one afterwards.
fn unloaded(work: impl FnOnce(&[u8]) -> Result<()>) -> Result<()> {
    modules::unload(EXITPOLICY)?;
    let result = work(&modules::image()?);
    let loaded = modules::load(EXITPOLICY).context("the right module");
    result.and(loaded)?;
    let info = Device::open()?.info()?;
    ensure!(info.vendor != 0, "the right module found no KVM: {info:?}");
    Ok(())
}

/// The module with another name in all places where this one is, as C has it, with a NUL behind.
pub fn renamed(image: &[u8], from: &str, to: &str) -> Result<Vec<u8>> {
    ensure!(to.len() <= from.len(), "there is no room for {to}");
    let mut wanted = from.as_bytes().to_vec();
    wanted.push(0);
    let places: Vec<usize> = image
        .windows(wanted.len())
        .enumerate()
        .filter_map(|(at, window)| (window == wanted).then_some(at))
        .collect();
    ensure!(!places.is_empty(), "the module has no {from}");
    let mut image = image.to_vec();
    for at in places {
        image[at..at + from.len()].fill(0);
        image[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
    Ok(image)
}

/// A name that nothing has.
pub fn misspelt(name: &str) -> String {
    let mut name = name.to_string();
    name.pop();
    name.push('X');
    name
}

/// What it says of the kernel that it was made for. The other things that `vermagic` has are those
/// that change structures everywhere.
fn another_release() -> Result<()> {
    unloaded(|image| {
        let release = nix::sys::utsname::uname()?;
        let release = release.release().to_string_lossy().into_owned();
        for (from, to) in [
            (release.as_str(), misspelt(&release)),
            ("SMP preempt", "UMP preempt".to_string()),
            ("mod_unload", "mod_unluck".to_string()),
        ] {
            let mut image = image.to_vec();
            let vermagic = position(&image, b"vermagic=").context("no vermagic")?;
            let at = position(&image[vermagic..], from.as_bytes());
            let at = vermagic + at.with_context(|| format!("no {from} in vermagic"))?;
            image[at..at + from.len()].copy_from_slice(to.as_bytes());
            refused(&image, Errno::ENOEXEC, &["version magic", &to])?;
        }
        Ok(())
    })
}

fn position(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|it| it == wanted)
}

/// The layouts that the C compiler saw, each of them in turn another one than bindgen saw.
fn other_layouts(step: usize) -> Result<()> {
    unloaded(|image| {
        let table = symbol(image, "exitpolicy_layout")?;
        let words = table.len() / 8;
        ensure!(words >= 29, "only {words} are compared");
        let mut named = BTreeSet::new();
        for word in (0..words).step_by(step) {
            let mut image = image.to_vec();
            image[table.start + word * 8] ^= 8;
            let line = refused(&image, Errno::ENOEXEC, &[" in the bindings and ", " in C"])?;
            let what = line.split(" is ").next().unwrap_or("").to_string();
            ensure!(named.insert(what), "twice: {line}");
        }
        eprintln!("    {} of {words} layouts, each was named", named.len());
        Ok(())
    })
}

/// Where the value of a symbol is in a module's file.
fn symbol(image: &[u8], name: &str) -> Result<Range<usize>> {
    /// The sizes and offsets of ELF64.
    const SECTION: usize = 64;
    const SYMBOL: usize = 24;
    const SYMBOL_TABLE: usize = 2;
    let number = |at: usize, size: usize| -> Result<usize> {
        let bytes = image.get(at..at + size).context("a short file")?;
        let mut number = [0; 8];
        number[..size].copy_from_slice(bytes);
        Ok(u64::from_le_bytes(number).try_into()?)
    };
    let sections = number(0x28, 8)?;
    let section = |index: usize| sections + index * SECTION;
    for index in 0..number(0x3c, 2)? {
        if number(section(index) + 4, 4)? != SYMBOL_TABLE {
            continue;
        }
        let (symbols, size) = (
            number(section(index) + 0x18, 8)?,
            number(section(index) + 0x20, 8)?,
        );
        let names = number(section(number(section(index) + 0x28, 4)?) + 0x18, 8)?;
        for at in (symbols..symbols + size).step_by(SYMBOL) {
            let text = names + number(at, 4)?;
            let text = image.get(text..text + name.len() + 1);
            if text.is_some_and(|text| text.strip_suffix(&[0]) == Some(name.as_bytes())) {
                let home = section(number(at + 6, 2)?);
                let start = number(home + 0x18, 8)? + number(at + 8, 8)?;
                return Ok(start..start + number(at + 16, 8)?);
            }
        }
    }
    Err(anyhow!("the module has no {name}"))
}

/// A function of the vendor module.
fn function(vendor: Vendor, name: &str) -> String {
    format!("{}_{name}", vendor.name())
}

/// Each of the functions that are hooked, as if KVM had none of that name.
fn no_function_to_hook(vendor: Vendor) -> Result<()> {
    unloaded(|image| {
        for name in [
            "vcpu_create",
            "recalc_intercepts",
            "vcpu_free",
            "vm_destroy",
        ] {
            let name = function(vendor, name);
            let other = misspelt(&name);
            let image = renamed(image, &name, &other)?;
            refused(&image, Errno::ENOENT, &["cannot hook", &other, "ENOENT"])?;
        }
        let other = renamed(image, "kvm_set_cpuid", "kvm_set_cpuiX")?;
        let reasons = ["cannot hook", "kvm_set_cpuiX", "ENOENT"];
        refused(&other, Errno::ENOENT, &reasons)?;
        // There is one of that name, where no probe may be.
        let name = function(vendor, "vcpu_create");
        let image = renamed(image, &name, "exc_nmi")?;
        refused(&image, Errno::ENOENT, &["cannot hook", "exc_nmi"]).map(drop)
    })
}

/// Each of the functions that are called.
fn no_function_to_call(vendor: Vendor) -> Result<()> {
    unloaded(|image| {
        let mut names = vec![function(vendor, "set_intercept_for_msr")];
        if vendor == Vendor::Vmx {
            names.push("kvm_lapic_switch_to_sw_timer".to_string());
        }
        for name in names {
            let other = misspelt(&name);
            let image = renamed(image, &name, &other)?;
            refused(&image, Errno::ENOENT, &["cannot find", &other])?;
        }
        Ok(())
    })
}

/// Functions that are there, and that KVM does not call when it should.
fn hooks_that_are_not_called(vendor: Vendor) -> Result<()> {
    unloaded(|image| {
        // It is called when a vCPU runs, and that of the module's own VM does not.
        let other = function(vendor, "vcpu_run");
        for name in ["vcpu_create", "vcpu_free", "vm_destroy"] {
            let name = function(vendor, name);
            let image = renamed(image, &name, &other)?;
            refused(&image, Errno::ENOEXEC, &[&other, "was not called"])?;
        }
        Ok(())
    })
}

/// A hook that is called, and finds another state than the module knows: this one comes when the VM
/// is taken down.
fn vm_in_another_state(vendor: Vendor) -> Result<()> {
    unloaded(|image| {
        let name = function(vendor, "vcpu_create");
        let image = renamed(image, &name, &function(vendor, "vcpu_free"))?;
        let module = vendor.module().replace('-', "_");
        let reason = "has flags or a state that we do not know";
        refused(&image, Errno::EUCLEAN, &[&module, reason]).map(drop)
    })
}

/// A parameter of the vendor module.
fn no_parameter(vendor: Vendor) -> Result<()> {
    let name = match vendor {
        Vendor::Svm => "pause_filter_count",
        Vendor::Vmx => "ple_window",
    };
    unloaded(|image| {
        let other = misspelt(name);
        let image = renamed(image, name, &other)?;
        refused(&image, Errno::ENOENT, &["cannot read", &other, "ENOENT"]).map(drop)
    })
}

/// The tracepoints that tell of cgroups.
fn no_tracepoint() -> Result<()> {
    unloaded(|image| {
        for name in ["cgroup_rmdir", "cgroup_attach_task"] {
            let image = renamed(image, name, &misspelt(name))?;
            let reasons = ["cannot watch the tracepoints of cgroups", "ENOENT"];
            refused(&image, Errno::ENOENT, &reasons)?;
        }
        Ok(())
    })
}

/// Loaded where there is no /dev/kvm, as in a container.
fn no_dev_kvm(vendor: Vendor) -> Result<()> {
    unloaded(|image| {
        let image = image.to_vec();
        let mut log = KernelLog::from_now()?;
        // In a mount namespace of its own, which is gone with the thread.
        let result = std::thread::spawn(move || -> Result<nix::Result<()>> {
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            mount(Some("none"), "/dev", Some("tmpfs"), MsFlags::empty(), none)?;
            Ok(modules::load_image(&image))
        })
        .join()
        .map_err(|_| anyhow!("the thread panicked"))??;
        let module = vendor.module().replace('-', "_");
        let reasons = [module.as_str(), "/dev/kvm cannot be opened: ENOENT"];
        ensure_refused(result, &mut log, Errno::ENOENT, &reasons).map(drop)
    })
}

/// A file that has another content for as long as the value lives.
struct Switched {
    path: &'static str,
    before: String,
}

impl Switched {
    fn new(path: &'static str, value: &str) -> Result<Self> {
        let before = fs::read_to_string(path).with_context(|| path)?;
        fs::write(path, value).with_context(|| path)?;
        Ok(Self { path, before })
    }
}

impl Drop for Switched {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.path, self.before.trim()) {
            eprintln!("cannot put {} back: {error}", self.path);
        }
    }
}

/// ftrace cannot be switched off any more, so that no hook is ever missed for that; and kprobes,
/// which can, and tracing, are nothing that a hook stands on. Neither while the module is loaded,
/// nor when it is.
fn switched_off(vendor: Vendor) -> Result<()> {
    let effective = floor(vendor)? | Exits::HLT;
    let cgroup = Cgroup::new("own")?;
    for loaded_before in [true, false] {
        if !loaded_before {
            modules::unload(EXITPOLICY)?;
        }
        let ftrace = Path::new("/proc/sys/kernel/ftrace_enabled");
        let errno = fs::write(ftrace, "0").err().and_then(|e| e.raw_os_error());
        ensure!(
            errno == Some(libc::EOPNOTSUPP) && fs::read_to_string(ftrace)?.trim() == "1",
            "ftrace can be switched off: {errno:?}"
        );
        let off = [
            Switched::new("/sys/kernel/debug/kprobes/enabled", "0")?,
            Switched::new("/sys/kernel/tracing/tracing_on", "0")?,
        ];
        if !loaded_before {
            modules::load(EXITPOLICY)?;
        }
        ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
        let mut vmm = Vmm::start(&cgroup)?;
        let vm = vmm.create_vm()?;
        let vcpu = vmm.create_vcpu(vm, 0)?;
        let view = interface::only_vm()?;
        ensure!(view.effective == effective, "{view:?}");
        let report = vmm.run(vcpu, testing::vmm::Work::new(Payload::Hlt, 2))?;
        ensure!(report.halt_exits == 0, "{report:?}");
        // A change is seen by the same hooks.
        ioctl::set_policy(&cgroup, Exits::NONE, Exits::ALL)?;
        let report = vmm.run(vcpu, testing::vmm::Work::new(Payload::Hlt, 2))?;
        ensure!(report.halt_exits == 2, "{report:?}");
        ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
        drop(off);
        check_guest(vendor, &mut vmm, vcpu, Payload::Hlt, effective)?;
        ensure!(Device::open()?.info()?.missed == 0, "missed");
        vmm.kill()?;
        interface::ensure_no_vms()?;
    }
    Ok(())
}
