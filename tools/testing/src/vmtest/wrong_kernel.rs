// SPDX-License-Identifier: GPL-2.0

//! The module in kernels that it was not made for: refused, with the reason in one line of the log,
//! and nothing left behind.
//!
//! The kernel is always the same. It is the module that is another one: its file is doctored, so that
//! it looks for what this kernel has not, or it was built for another kernel, or from other headers.

use std::{
    collections::BTreeSet,
    fs,
    ops::Range,
    path::{
        Path,
        PathBuf, //
    },
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
        sched_getaffinity,
        sched_setaffinity,
        unshare,
        CloneFlags,
        CpuSet, //
    },
    unistd::gettid,
};
use testing::{
    cgroup::Cgroup,
    client::Vmm,
    exits::{
        Calls,
        Vendor, //
    },
    interface::{
        self,
        ioctl,
        NEXT_ENTRY,
        PENDING, //
    },
    kernel_log::KernelLog,
    modules::{
        self,
        EXITPOLICY, //
    },
    payload::Payload,
    soon,
    uapi::{
        self,
        Device, //
    },
    vmm::{
        Action,
        Work, //
    }, //
};

use crate::{
    few_will_do,
    lifecycle::{
        ensure_not_unloadable,
        nothing_hooked,
        unload_soon, //
    },
    matrix::{
        check_guest,
        floor, //
    },
    Test, //
};

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    // Each load takes Bochs seconds.
    let step = if few_will_do()? { 6 } else { 1 };
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
        Test::new("wrong_kernel::missed_probe", move || missed_probe(vendor)),
        Test::new("wrong_kernel::missed_cpuid", move || missed_cpuid(vendor)),
        Test::new("wrong_kernel::vm_in_another_state", move || {
            vm_in_another_state(vendor)
        }),
        Test::new("wrong_kernel::other_headers", move || other_headers(vendor))
            .ignored(!OTHER_HEADERS.iter().all(|(name, _)| built(name).exists())),
        Test::new(
            "wrong_kernel::another_kernels_module",
            another_kernels_module,
        )
        .ignored(!built(OTHER_KERNEL).exists()),
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
    // A kernel without CONFIG_SYMBOLIC_ERRNAME says the number.
    let number = format!("Error({})", errno as i32);
    for line in &mut lines {
        *line = line.replace(&number, &format!("{errno:?}"));
    }
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
    if modules::is_loaded(EXITPOLICY)? {
        // A wrong one that is left by a test that has failed.
        unload_soon(EXITPOLICY)?;
    }
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
        let mut table = Elf(image).symbol("exitpolicy_layout")?;
        // KASAN keeps a zone behind it that is a part of the symbol. The last layout is not 0.
        while image[table.clone()].ends_with(&[0; 8]) {
            table.end -= 8;
        }
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

/// A module's file, in so far as it is an object file.
struct Elf<'a>(&'a [u8]);

impl Elf<'_> {
    /// The sizes and offsets of ELF64.
    const SECTION: usize = 64;
    const SYMBOL: usize = 24;
    const SYMBOL_TABLE: usize = 2;

    fn number(&self, at: usize, size: usize) -> Result<usize> {
        let bytes = self.0.get(at..at + size).context("a short file")?;
        let mut number = [0; 8];
        number[..size].copy_from_slice(bytes);
        Ok(u64::from_le_bytes(number).try_into()?)
    }

    /// The header of a section.
    fn header(&self, index: usize) -> Result<usize> {
        Ok(self.number(0x28, 8)? + index * Self::SECTION)
    }

    /// Where a section is in the file.
    fn section(&self, index: usize) -> Result<Range<usize>> {
        let header = self.header(index)?;
        let start = self.number(header + 0x18, 8)?;
        Ok(start..start + self.number(header + 0x20, 8)?)
    }

    fn sections(&self) -> Result<Range<usize>> {
        Ok(0..self.number(0x3c, 2)?)
    }

    fn is_name(&self, at: usize, name: &str) -> bool {
        let text = self.0.get(at..at + name.len() + 1);
        text.is_some_and(|text| text.strip_suffix(&[0]) == Some(name.as_bytes()))
    }

    /// Where the section of this name is.
    fn section_named(&self, name: &str) -> Result<Range<usize>> {
        let names = self.section(self.number(0x3e, 2)?)?.start;
        for index in self.sections()? {
            if self.is_name(names + self.number(self.header(index)?, 4)?, name) {
                return self.section(index);
            }
        }
        Err(anyhow!("the module has no section {name}"))
    }

    /// Where the value of a symbol is.
    fn symbol(&self, name: &str) -> Result<Range<usize>> {
        for index in self.sections()? {
            let header = self.header(index)?;
            if self.number(header + 4, 4)? != Self::SYMBOL_TABLE {
                continue;
            }
            let names = self.section(self.number(header + 0x28, 4)?)?.start;
            for at in self.section(index)?.step_by(Self::SYMBOL) {
                if self.is_name(names + self.number(at, 4)?, name) {
                    let home = self.section(self.number(at + 6, 2)?)?;
                    let start = home.start + self.number(at + 8, 8)?;
                    return Ok(start..start + self.number(at + 16, 8)?);
                }
            }
        }
        Err(anyhow!("the module has no {name}"))
    }
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

/// A hook that KVM passes by. The module's own VM does not show it, as a vCPU does not recalculate
/// its intercepts before it runs. So the module is loaded, and its changes are never made: vCPUs are
/// asked so often and no more, all interfaces say that they have not changed, the guest gets on,
/// and the module stays until the VM is gone.
fn missed_probe(vendor: Vendor) -> Result<()> {
    let name = function(vendor, "recalc_intercepts");
    // For NMIs, of which there are none.
    let other = function(vendor, "inject_nmi");
    let test = gettid();
    let all = sched_getaffinity(test)?;
    let result = unloaded(|image| {
        modules::load_image(&renamed(image, &name, &other)?)?;
        never_changed(vendor, &name, &all)?;
        modules::unload(EXITPOLICY)?;
        nothing_hooked()
    });
    sched_setaffinity(test, &all)?;
    result
}

/// A VM that is to change, and whose vCPUs recalculate unseen.
fn never_changed(vendor: Vendor, recalc_intercepts: &str, all: &CpuSet) -> Result<()> {
    /// How often a vCPU is asked at most (rust/live.rs: wait_for()), at first and again.
    const MOST: u64 = 1 + 100;

    let mut cpus = (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu) == Ok(true));
    let first = cpus.next().context("no CPU")?;
    let last = cpus.last();
    let floor = floor(vendor)?;
    let cgroup = Cgroup::new("own")?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    vmm.hide_pv_unhalt(vm)?;
    let guest = vmm.guest(vm)?;
    let vcpus = [vmm.create_vcpu(vm, 0)?, vmm.create_vcpu(vm, 1)?];
    let id = interface::only_vm()?.id;
    // Whoever waits finds the first vCPU out of the guest, where it has taken the request, as it has
    // the same CPU. The other one sees to it that there is somebody to wait for, and these VMs that
    // it is back in its guest by then.
    let mut here = CpuSet::new();
    here.set(first)?;
    sched_setaffinity(gettid(), &here)?;
    for (vcpu, cpu) in vcpus.into_iter().zip([first, last.unwrap_or(first)]) {
        vmm.pin(vcpu, cpu)?;
        vmm.start_run(vcpu, Work::gated(Payload::Hlt))?;
    }
    for _ in 0..8 {
        let idle = vmm.create_vm()?;
        vmm.create_vcpu(idle, 0)?;
    }
    let gets_on = || -> Result<()> {
        for index in 0..vcpus.len() {
            let goal = guest.open_gate(index, 5);
            let done = soon(|| Ok(guest.params(index).executed >= goal))?;
            ensure!(done, "the guest is stuck: {:?}", guest.params(index));
        }
        Ok(())
    };
    gets_on()?;
    let tids = vcpus.map(|vcpu| vcpu.tid);
    let calls = Calls::of(recalc_intercepts, &tids)?;
    let directory = cgroup.open()?;
    let argument = uapi::Policy {
        flags: uapi::POLICY_DISABLE,
        cgroup_fd: testing::cgroup::fd_of(&directory),
        disable: Exits::HLT.bits(),
        ..Default::default()
    };
    let (mut most, mut named) = (0, 0);
    for round in 0..5 {
        // Long enough for many more tries than there may be, sooner or later: a busy machine makes few.
        let argument = uapi::Policy {
            timeout_ms: (5_000 << round).min(uapi::MAX_TIMEOUT),
            ..argument
        };
        let count = || -> Result<[u64; 2]> { Ok([calls.by(tids[0])?, calls.by(tids[1])?]) };
        let before = count()?;
        named += Device::open()?.policy(uapi::SET_POLICY, argument)?.pending;
        let after = count()?;
        for (before, after) in before.into_iter().zip(after) {
            let asked = after - before;
            ensure!(asked <= MOST, "a vCPU was asked {asked} times");
            most = most.max(asked);
        }
        let view = ioctl::vm(id)?;
        ensure!(view.pending == 2, "nobody says so: {view:?}");
        for vcpu in &view.each {
            ensure!(
                vcpu.in_force == floor && [PENDING, NEXT_ENTRY].contains(&vcpu.state.as_str()),
                "nobody says that it has not changed: {vcpu:?}"
            );
        }
        gets_on()?;
        if most > MOST / 2 {
            break;
        }
    }
    eprintln!("    asked {most} times at most; {named} pending when the time was over");
    ensure!(
        last.is_none() || most > MOST / 2,
        "asked only {most} times, so that nothing was tested"
    );
    drop(calls);
    ensure_not_unloadable()?;
    vmm.kill()?;
    interface::ensure_no_vms()?;
    ioctl::clear_policy(&cgroup)
}

/// The same of the hook on KVM_SET_CPUID2: a VMM that repeats its guest's CPUID after a change of
/// `hlt` is told EINVAL by KVM, and that is all.
fn missed_cpuid(vendor: Vendor) -> Result<()> {
    // For debug registers, which no guest of ours writes: its arguments are others.
    let other = "kvm_set_dr";
    let effective = floor(vendor)? | Exits::HLT;
    let cgroup = Cgroup::new("own")?;
    unloaded(|image| {
        modules::load_image(&renamed(image, "kvm_set_cpuid", other)?)?;
        // On Intel, a guest that knows of PV_UNHALT is not given `hlt` later, but may lose it.
        ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
        let mut vmm = Vmm::start(&cgroup)?;
        let vm = vmm.create_vm()?;
        let vcpu = vmm.create_vcpu(vm, 0)?;
        vmm.run(vcpu, Work::new(Payload::Hlt, 2))?;
        vmm.act(vcpu, Action::SetCpuid).context("before a change")?;
        let id = interface::only_vm()?.id;
        let change = |vmm: &mut Vmm, disable| -> Result<()> {
            let pending = ioctl::set_override(id, None, disable)?;
            ensure!(pending == 0, "{pending} vCPUs are pending");
            vmm.run(vcpu, Work::new(Payload::Hlt, 2)).map(drop)
        };
        change(&mut vmm, Exits::NONE)?;
        let refused = vmm.act(vcpu, Action::SetCpuid);
        let errno = refused.as_ref().err().and_then(|error| {
            let mut causes = error.chain();
            causes.find_map(|cause| cause.downcast_ref::<std::io::Error>()?.raw_os_error())
        });
        ensure!(errno == Some(libc::EINVAL), "KVM_SET_CPUID2: {refused:?}");
        change(&mut vmm, Exits::HLT)?;
        vmm.act(vcpu, Action::SetCpuid).context("after all")?;
        check_guest(vendor, &mut vmm, vcpu, Payload::Hlt, effective)?;
        vmm.kill()?;
        interface::ensure_no_vms()?;
        ioctl::clear_policy(&cgroup)?;
        modules::unload(EXITPOLICY)?;
        nothing_hooked()
    })
}

/// A hook that is called, and finds another state than the module knows: this one comes when the VM
/// is taken down.
fn vm_in_another_state(vendor: Vendor) -> Result<()> {
    unloaded(|image| {
        let name = function(vendor, "vcpu_create");
        let image = renamed(image, &name, &function(vendor, "vcpu_free"))?;
        let module = vendor.module().replace('-', "_");
        let reason = "something else where kvm.online_vcpus should be";
        refused(&image, Errno::EUCLEAN, &[&module, reason]).map(drop)
    })
}

/// Modules that are right but for the headers that they were built from (`make doctored`), and the
/// field in which it shows first.
const OTHER_HEADERS: [(&str, &str); 2] = [
    // A field less in the VM.
    ("doctored-vm", "kvm.arch.kvmclock_offset"),
    // One more at the end of the vCPU, so that the vendor's part of it is elsewhere.
    ("doctored-vcpu", "vmcb01 or vmcs01"),
];

/// The module as it was built for a kernel of another configuration, by another compiler.
const OTHER_KERNEL: &str = "other-kernel";

/// Where the lab puts a module that is not for this kernel.
fn built(name: &str) -> PathBuf {
    Path::new("/usr/local/share/exitpolicy").join(format!("{name}.ko"))
}

/// The build ids are those of this KVM, and the structures are not.
fn other_headers(vendor: Vendor) -> Result<()> {
    unloaded(|_| {
        let module = vendor.module().replace('-', "_");
        for (name, field) in OTHER_HEADERS {
            let field = match (field, vendor) {
                ("vmcb01 or vmcs01", Vendor::Svm) => "vcpu_svm.vmcb01",
                ("vmcb01 or vmcs01", Vendor::Vmx) => "vcpu_vmx.vmcs01",
                (field, _) => field,
            };
            let image = fs::read(built(name))?;
            let reason = format!("something else where {field} should be");
            refused(&image, Errno::EUCLEAN, &[&module, &reason])?;
        }
        Ok(())
    })
}

/// What a module says of itself.
fn modinfo(image: &[u8]) -> Result<Vec<String>> {
    let section = Elf(image).section_named(".modinfo")?;
    let words = image[section].split(|byte| *byte == 0);
    let words = words.filter(|word| !word.is_empty());
    Ok(words
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect())
}

/// A module that was built for another kernel, as it is, and as if it had been built for this one.
fn another_kernels_module() -> Result<()> {
    unloaded(|right| {
        let image = fs::read(built(OTHER_KERNEL))?;
        let errno = refused_by_loader(&image)?;
        ensure!(errno == Errno::ENOEXEC, "as it is: {errno}");

        let is_vermagic = |word: &String| word.starts_with("vermagic=");
        let mut words = modinfo(&image)?;
        words.retain(|word| !is_vermagic(word) && !word.starts_with("description="));
        words.extend(modinfo(right)?.into_iter().filter(is_vermagic));
        let mut text = words.join("\0").into_bytes();
        let section = Elf(&image).section_named(".modinfo")?;
        ensure!(text.len() < section.len(), "there is no room for vermagic");
        text.resize(section.len(), 0);
        let mut image = image;
        image[section].copy_from_slice(&text);
        refused_by_loader(&image).map(drop)
    })
}

/// Fails unless the kernel does not even call the module's init function, and says why.
fn refused_by_loader(image: &[u8]) -> Result<Errno> {
    let mut log = KernelLog::from_now()?;
    let errno = modules::load_image(image).err();
    let errno = errno.context("it was loaded")?;
    let mut lines = log.lines()?;
    lines.retain(|line| line.contains(EXITPOLICY));
    eprintln!("    {errno}: {}", lines.first().map_or("", String::as_str));
    ensure!(!lines.is_empty(), "{errno}, and the log does not say why");
    // What the module itself would say.
    let module = lines.iter().find(|line| line.contains(" has build id "));
    ensure!(module.is_none(), "the loader has taken it: {lines:?}");
    nothing_hooked()?;
    Ok(errno)
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
        let report = vmm.run(vcpu, Work::new(Payload::Hlt, 2))?;
        ensure!(report.halt_exits == 0, "{report:?}");
        // A change is seen by the same hooks.
        ioctl::set_policy(&cgroup, Exits::NONE, Exits::ALL)?;
        let report = vmm.run(vcpu, Work::new(Payload::Hlt, 2))?;
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
