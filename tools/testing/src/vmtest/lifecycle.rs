// SPDX-License-Identifier: GPL-2.0

//! The module and KVM's vendor module come and go, VMs or not.

use std::{
    fs,
    io::{
        BufRead,
        BufReader,
        Write, //
    },
    path::Path,
    process::{
        Child,
        Command,
        Stdio, //
    }, //
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
    exits::{
        hooked_functions,
        Vendor, //
    },
    interface::{
        self,
        ioctl,
        sysfs, //
    },
    kernel_log::KernelLog,
    modules::{
        self,
        EXITPOLICY, //
    },
    pause,
    payload::Payload,
    soon,
    uapi::Device,
    vmm::Work, //
};

use crate::{
    churn::{
        Churned,
        CHURN, //
    },
    few_will_do,
    matrix::{
        check_exits_of,
        check_guest,
        floor, //
    },
    Test, //
};

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let rounds = if few_will_do()? { 25 } else { 100 };
    Ok(vec![
        Test::new("lifecycle::running_vm", move || running_vm(vendor)),
        Test::new("lifecycle::device_in_use", device_in_use),
        Test::new("lifecycle::made_for_another_build", made_for_another_build),
        Test::new("lifecycle::no_sysfs_to_read_build_ids_from", no_sysfs),
        Test::new("lifecycle::nothing_is_left_after_unload", move || {
            nothing_is_left_after_unload(vendor)
        }),
        Test::new("lifecycle::vendor_comes_and_goes", move || {
            vendor_comes_and_goes(vendor)
        }),
        Test::new(
            format!("lifecycle::every_order_{rounds}_times"),
            move || every_order(vendor, rounds),
        ),
    ])
}

/// Fails unless the module is in use, and so stays.
pub fn ensure_not_unloadable() -> Result<()> {
    let result = modules::unload(EXITPOLICY);
    ensure!(
        result == Err(Errno::EWOULDBLOCK),
        "unloading the module while a VM needs it: {result:?}"
    );
    Ok(())
}

/// rmmod while a guest runs: refused if the VM was given something, and once all is given back, or
/// nothing was given, the guest runs on without the module.
fn running_vm(vendor: Vendor) -> Result<()> {
    let floor = floor(vendor)?;
    for disable in [Exits::HLT, Exits::NONE] {
        let cgroup = Cgroup::new("own")?;
        ioctl::set_policy(&cgroup, disable, Exits::ALL)?;
        let mut vmm = Vmm::start(&cgroup)?;
        let vm = vmm.create_vm()?;
        let vcpu = vmm.create_vcpu(vm, 0)?;
        vmm.start_run(vcpu, Work::new(Payload::Hlt, u32::MAX))?;
        ensure!(soon(|| Ok(vmm.progress(vcpu)? > 10))?, "the guest is stuck");

        let holding = Device::open()?.info()?.holding;
        ensure!(
            holding == u64::from(!disable.is_empty()),
            "{holding} VMs are held"
        );
        if !disable.is_empty() {
            ensure_not_unloadable()?;
            interface::drain()?;
        }
        modules::unload(EXITPOLICY)?;
        let progress = vmm.progress(vcpu)?;
        ensure!(
            soon(|| Ok(vmm.progress(vcpu)? > progress + 10))?,
            "the guest is stuck since the module is gone"
        );
        vmm.stop(vcpu)?;
        check_exits_of(vendor, &mut vmm, vcpu, Payload::Hlt, floor)
            .context("after the module was unloaded")?;

        modules::load(EXITPOLICY)?;
        // The policies went with the module, and so did the VM's being known since its beginning.
        ensure!(
            sysfs::policy_ids()?.is_empty(),
            "a policy outlived the module"
        );
        let view = interface::only_vm()?;
        ensure!(
            view.adopted && view.requested.is_empty() && view.effective == floor,
            "{view:?}"
        );
        let second = vmm.create_vcpu(vm, 1)?;
        for vcpu in [vcpu, second] {
            check_exits_of(vendor, &mut vmm, vcpu, Payload::Hlt, floor)
                .context("after the module was loaded again")?;
        }
        vmm.kill()?;
        interface::ensure_no_vms()?;
    }
    Ok(())
}

/// Who has the device open keeps the module, and nobody else does.
fn device_in_use() -> Result<()> {
    let device = Device::open()?;
    ensure!(
        modules::unload(EXITPOLICY) == Err(Errno::EWOULDBLOCK),
        "the module was unloaded from under an open file"
    );
    device.info()?;
    drop(device);
    modules::unload(EXITPOLICY)?;
    modules::load(EXITPOLICY)
}

/// A module that was built for another KVM says so and does nothing.
fn made_for_another_build() -> Result<()> {
    let vendor = Vendor::of_host()?;
    modules::unload(EXITPOLICY)?;
    for name in ["kvm", vendor.module()] {
        let name = name.replace('-', "_");
        let note = fs::read(format!("/sys/module/{name}/notes/.note.gnu.build-id"))?;
        // The note ends with the id, a SHA-1.
        let id = note.len().checked_sub(20).map(|at| &note[at..]);
        let id = id.context("a short note")?;
        let mut image = modules::image()?;
        let at: Vec<usize> = image
            .windows(id.len())
            .enumerate()
            .filter_map(|(at, window)| (window == id).then_some(at))
            .collect();
        ensure!(!at.is_empty(), "the module has no build id of {name}");
        for at in at {
            image[at] ^= 0xff;
        }
        let mut log = KernelLog::from_now()?;
        let result = modules::load_image(&image);
        ensure!(result == Err(Errno::ENOEXEC), "{name}: {result:?}");
        let wanted = format!("{name} has build id ");
        let lines = log.lines()?;
        ensure!(
            lines.iter().any(|line| line.contains(&wanted)),
            "the log does not say why: {lines:?}"
        );
        nothing_hooked()?;
    }
    modules::load(EXITPOLICY)
}

/// Where nobody can tell which KVM runs, the module does not load.
fn no_sysfs() -> Result<()> {
    modules::unload(EXITPOLICY)?;
    let image = modules::image()?;
    let mut log = KernelLog::from_now()?;
    // In a mount namespace of its own, which is gone with the thread.
    let result = std::thread::spawn(move || -> Result<nix::Result<()>> {
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("none"), "/sys", Some("tmpfs"), MsFlags::empty(), none)?;
        Ok(modules::load_image(&image))
    })
    .join()
    .map_err(|_| anyhow!("the thread panicked"))??;
    ensure!(result == Err(Errno::ENOENT), "{result:?}");
    let mut lines = log.lines()?;
    lines.retain(|line| line.starts_with(EXITPOLICY));
    ensure!(lines.len() == 1, "the log does not say why: {lines:?}");
    nothing_hooked()?;
    modules::load(EXITPOLICY)
}

/// There is nothing of the module.
pub fn nothing_hooked() -> Result<()> {
    let hooked = hooked_functions()?;
    ensure!(hooked.is_empty(), "hooks are left: {hooked:?}");
    let kprobes = fs::read_to_string("/sys/kernel/debug/kprobes/list")?;
    ensure!(kprobes.is_empty(), "kprobes are left: {kprobes}");
    ensure!(!modules::is_loaded(EXITPOLICY)?, "the module is loaded");
    for path in [interface::SYSFS, testing::uapi::DEVICE] {
        ensure!(!Path::new(path).exists(), "{path} is left");
    }
    Ok(())
}

/// After rmmod the host is as it was: no hook, no device, no directory, no effect.
fn nothing_is_left_after_unload(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::NONE)?;
    modules::unload(EXITPOLICY)?;
    for path in [interface::SYSFS, testing::uapi::DEVICE] {
        ensure!(!Path::new(path).exists(), "{path} is left");
    }
    let hooked = hooked_functions()?;
    ensure!(hooked.is_empty(), "hooks are left: {hooked:?}");
    for requested in [Exits::NONE, Exits::HLT] {
        let mut vmm = Vmm::start(&cgroup)?;
        let vm = vmm.create_vm()?;
        if !requested.is_empty() {
            vmm.disable_exits(vm, requested)?;
        }
        let vcpu = vmm.create_vcpu(vm, 0)?;
        let effective = floor(vendor)? | requested;
        check_guest(vendor, &mut vmm, vcpu, Payload::Hlt, effective)?;
    }
    modules::load(EXITPOLICY)
}

/// The module notices that its vendor goes and comes, and says so.
fn vendor_comes_and_goes(vendor: Vendor) -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let before = Device::open()?.info()?;
    unload_soon(vendor.module())?;
    let info = Device::open()?.info()?;
    ensure!(
        (info.vendor, info.supported) == (0, 0),
        "without a vendor: {info:?}"
    );
    ensure!(sysfs::top("vendor")? == "none", "sysfs names a vendor");
    ensure!(sysfs::top("supported")? == "none", "sysfs: supported");
    // Policies are about cgroups, not about a vendor.
    ensure!(
        ioctl::policy(&cgroup)? == Some((Exits::HLT, Exits::ALL)),
        "the policy is lost"
    );

    modules::load(vendor.module())?;
    ensure!(
        soon(|| Ok(Device::open()?.info()?.vendor == before.vendor))?,
        "the vendor is not noticed"
    );
    ensure!(Device::open()?.info()? == before, "not as before");
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    let effective = floor(vendor)? | Exits::HLT;
    ensure!(interface::only_vm()?.effective == effective, "effective");
    check_guest(vendor, &mut vmm, vcpu, Payload::Hlt, effective)
}

/// Unloads a module that others use for a moment now and then.
pub fn unload_soon(name: &str) -> Result<()> {
    let mut result = modules::unload(name);
    for _ in 0..testing::POLLS {
        match result {
            Err(Errno::EWOULDBLOCK) => {
                pause();
                result = modules::unload(name);
            }
            _ => break,
        }
    }
    result.with_context(|| format!("cannot unload {name}"))
}

/// Another process that makes VMs all the time.
struct Churn {
    child: Child,
}

impl Churn {
    fn start(cgroup: &Cgroup) -> Result<Self> {
        let child = Command::new("/proc/self/exe")
            .arg(CHURN)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let churn = Self { child };
        cgroup.add_process(churn.child.id() as i32)?;
        Ok(churn)
    }

    fn stop(mut self) -> Result<Churned> {
        let mut stdin = self.child.stdin.take().context("no pipe")?;
        // It stops at the end of its input.
        stdin.flush()?;
        drop(stdin);
        let mut line = String::new();
        BufReader::new(self.child.stdout.take().context("no pipe")?).read_line(&mut line)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the maker of VMs failed: {status}");
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Clone, Copy)]
enum Step {
    LoadOurs,
    LoadVendor,
    UnloadOurs,
    UnloadVendor,
}

/// The four orders in which two modules can come and go.
const ORDERS: [[Step; 4]; 4] = {
    use Step::{
        LoadOurs,
        LoadVendor,
        UnloadOurs,
        UnloadVendor, //
    };
    [
        [LoadVendor, LoadOurs, UnloadOurs, UnloadVendor],
        [LoadVendor, LoadOurs, UnloadVendor, UnloadOurs],
        [LoadOurs, LoadVendor, UnloadOurs, UnloadVendor],
        [LoadOurs, LoadVendor, UnloadVendor, UnloadOurs],
    ]
};

fn every_order(vendor: Vendor, rounds: usize) -> Result<()> {
    let cgroup = Cgroup::new("churn")?;
    modules::unload(EXITPOLICY)?;
    unload_soon(vendor.module())?;
    let churn = Churn::start(&cgroup)?;
    let mut decided = 0;
    for round in 0..4 * rounds {
        // Until a VM has met the module, too.
        if round >= rounds && decided > 0 {
            break;
        }
        for step in ORDERS[round % ORDERS.len()] {
            let result = match step {
                Step::LoadVendor => modules::load(vendor.module()),
                Step::UnloadVendor => unload_soon(vendor.module()),
                Step::LoadOurs => modules::load(EXITPOLICY).and_then(|()| {
                    // Its name has a policy for a moment, so that there is something to do.
                    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)
                }),
                Step::UnloadOurs => {
                    decided += ioctl::vms()?.len();
                    interface::drain()?;
                    // A VM that was being decided on then holds it for a moment, unseen.
                    unload_soon(EXITPOLICY)
                }
            };
            result.with_context(|| format!("round {round}"))?;
        }
    }
    let churned = churn.stop()?;
    modules::load_both()?;
    eprintln!("    {churned:?}; {decided} of them listed when the module went");
    ensure!(churned.vms >= rounds, "too few VMs were made meanwhile");
    ensure!(decided > 0, "no VM met the module");
    // The host still works.
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    let vcpu = vmm.create_vcpu(vm, 0)?;
    let effective = floor(vendor)? | Exits::HLT;
    ensure!(interface::only_vm()?.effective == effective, "effective");
    check_guest(vendor, &mut vmm, vcpu, Payload::Hlt, effective)
}
