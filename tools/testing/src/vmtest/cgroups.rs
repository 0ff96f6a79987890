// SPDX-License-Identifier: GPL-2.0

//! Cgroups and their policies in great numbers.

use std::{
    collections::BTreeMap,
    fs::{
        self,
        File, //
    },
    path::Path,
    sync::Arc, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use nix::{
    sched::{
        unshare,
        CloneFlags, //
    },
    unistd::getpid, //
};
use testing::{
    cgroup::{
        self,
        Cgroup, //
    },
    client::Vmm,
    interface::{
        self,
        command,
        ensure_errno,
        ioctl,
        sysfs,
        Snapshot, //
    },
    soon,
    uapi::Device,
    vmm::{
        Irqchip,
        Vm, //
    }, //
};

use crate::{
    child::in_child,
    few_will_do,
    races::Here,
    Test, //
};

/// Policies that fit.
const MANY: usize = 100_000;
/// The same where few will do.
const FEWER: usize = 5_000;

pub fn tests() -> Result<Vec<Test>> {
    let many = if few_will_do()? { FEWER } else { MANY };
    let come_and_go = if few_will_do()? { 1_000 } else { 10_000 };
    Ok(vec![
        Test::new("cgroups::name_used_again", name_used_again),
        Test::new("cgroups::policy_and_children", policy_and_children),
        Test::new("cgroups::namespaces", namespaces),
        Test::new("cgroups::longest_path", longest_path),
        Test::new(
            format!("cgroups::{come_and_go}_policies_come_and_go"),
            move || come_and_go_without_leak(come_and_go),
        ),
        Test::new(format!("cgroups::{many}_policies_fit"), move || fit(many)),
    ])
}

/// A cgroup that bears the name of a removed one has no policy.
fn name_used_again() -> Result<()> {
    let first = Cgroup::new("again")?;
    let first_id = first.id()?;
    ioctl::set_policy(&first, Exits::ALL, Exits::NONE)?;
    first.remove()?;
    let second = Cgroup::new("again")?;
    ensure!(second.id()? != first_id, "the id was used again");
    ensure!(
        ioctl::policy(&second)?.is_none(),
        "the policy was inherited from the dead"
    );
    interface::ensure_empty()
}

/// A policy neither keeps its cgroup from being removed, nor goes with a child.
fn policy_and_children() -> Result<()> {
    let parent = Cgroup::new("parent")?;
    let child = parent.child("child")?;
    ioctl::set_policy(&parent, Exits::HLT, Exits::ALL)?;
    let before = Snapshot::take()?;
    ioctl::set_policy(&child, Exits::NONE, Exits::ALL)?;
    ensure!(
        sysfs::policy_ids()?.len() == 2,
        "{:?}",
        sysfs::policy_ids()?
    );
    child.remove()?;
    ensure!(
        soon(|| Ok(sysfs::policy_ids()? == [parent.id()?]))?,
        "{:?}",
        sysfs::policy_ids()?
    );
    before.ensure_unchanged()
}

/// Cgroups, each the parent of the next one, removed in the right order.
struct Nest(Vec<(Cgroup, File)>);

impl Nest {
    fn deepest(&self) -> &File {
        &self.0.last().expect("the first one stays").1
    }

    fn push(&mut self, cgroup: Cgroup) -> Result<()> {
        let directory = cgroup.open()?;
        self.0.push((cgroup, directory));
        Ok(())
    }
}

impl Drop for Nest {
    fn drop(&mut self) {
        while self.0.pop().is_some() {}
    }
}

/// Anybody who has a cgroup can make some of which the path is longer than what sysfs has room for.
/// It is not shown cut off, and the kernel has nothing to warn of.
fn longest_path() -> Result<()> {
    /// A page, and a newline and a NUL in it (fs/sysfs/file.c: sysfs_kf_seq_show()).
    const MOST: usize = 4096 - 2;
    let device = Device::open()?;
    let top = Cgroup::new("long")?;
    let mut length = top.path().len();
    let mut nest = Nest(Vec::new());
    nest.push(top)?;
    while length + 300 < MOST {
        let name = "x".repeat(250);
        length += 1 + name.len();
        nest.push(Cgroup::below(nest.deepest(), &name)?)?;
    }
    for total in [MOST - 1, MOST, MOST + 1, MOST + 2, MOST + 100] {
        let cgroup = Cgroup::below(nest.deepest(), &"y".repeat(total - length - 1))?;
        ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
        let here = Here::in_cgroup(&cgroup)?;
        let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
        vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        let id = device.vms()?.first().context("no VM is known")?.id;
        ensure!(soon(|| Ok(sysfs::vm_ids()? == [id]))?, "no directory");
        for file in [
            sysfs::vm_directory(id).join("cgroup"),
            sysfs::policy_directory(&cgroup)?.join("path"),
        ] {
            let path = fs::read(&file);
            if total <= MOST {
                let path = path.with_context(|| format!("{file:?}, {total} characters"))?;
                ensure!(
                    path.len() == total + 1 && path.ends_with(b"y\n"),
                    "{file:?}: {total} characters are {}",
                    path.len()
                );
            } else {
                let what = format!("{file:?}, {total} characters");
                ensure_errno(&what, path, libc::ENAMETOOLONG)?;
            }
        }
        // Whoever looks at all sees the others, and this one without its path.
        command::text(&["vm", "list"])?;
        command::text(&["policy", "list"])?;
        drop((vm, here));
        interface::ensure_no_vms()?;
    }
    drop(nest);
    ensure!(
        soon(|| Ok(device.info()?.policies == 0))?,
        "policies outlive their cgroups"
    );
    interface::ensure_empty()
}

/// Paths in sysfs are those of the reader's and writer's cgroup namespace.
fn namespaces() -> Result<()> {
    let inside = Cgroup::new("inside")?;
    let child = inside.child("child")?;
    let outside = Cgroup::new("outside")?;
    ioctl::set_policy(&outside, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&outside)?;
    let vm = vmm.create_vm()?;
    vmm.create_vcpu(vm, 0)?;
    let cgroup_of_vm = sysfs::vm_directory(interface::only_vm()?.id).join("cgroup");
    let path_of = |cgroup: &Cgroup| interface::read(sysfs::policy_directory(cgroup)?.join("path"));
    in_child(|| {
        inside.add_process(getpid().as_raw())?;
        unshare(CloneFlags::CLONE_NEWCGROUP)?;
        fs::write(Path::new(interface::SYSFS).join("attach"), "/child")?;
        let mut wrong = Vec::new();
        for (cgroup, expected) in [(&child, "/child"), (&outside, "hidden")] {
            let path = path_of(cgroup)?;
            if path != expected {
                wrong.push(format!("{path}, should be {expected}"));
            }
        }
        let path = interface::read(&cgroup_of_vm)?;
        if path != "hidden" {
            wrong.push(format!("the VM's {path}, should be hidden"));
        }
        Ok(wrong)
    })?;
    let path = path_of(&child)?;
    ensure!(path == child.path(), "outside of it: {path}");
    vmm.kill()?;
    interface::ensure_no_vms()?;
    Ok(())
}

/// Objects in use in those slab caches that the module allocates from, directly or not. What CPUs
/// keep at hand, 60 objects at a time, would count as in use, and is given back first.
pub fn slab() -> Result<BTreeMap<String, u64>> {
    let is_ours = |name: &str| {
        name == "kernfs_node_cache"
            || name == "kernfs_iattrs_cache"
            || name == "radix_tree_node"
            || name == "maple_node"
            || name == "pid"
            // Not what is charged to cgroups, which the module's are not.
            || (name.starts_with("kmalloc-") && !name.starts_with("kmalloc-cg-"))
    };
    let count = || -> Result<BTreeMap<String, u64>> {
        let mut objects = BTreeMap::new();
        for line in fs::read_to_string("/proc/slabinfo")?.lines().skip(2) {
            let mut words = line.split_whitespace();
            if let (Some(name), Some(active)) = (words.next(), words.next()) {
                if is_ours(name) {
                    objects.insert(name.to_string(), active.parse()?);
                }
            }
        }
        Ok(objects)
    };
    for name in count()?.keys() {
        let file = format!("/sys/kernel/slab/{name}/shrink");
        fs::write(&file, "1").context(file)?;
    }
    let objects = count()?;
    ensure!(!objects.is_empty(), "no slab cache is known");
    Ok(objects)
}

/// Makes `count` cgroups with policies and removes them again, `at_once` at a time.
fn come_and_go(count: usize, at_once: usize) -> Result<()> {
    let device = Device::open()?;
    let parent = Cgroup::new("many")?;
    for _ in 0..count / at_once {
        let cgroups = (0..at_once)
            .map(|number| {
                let cgroup = parent.child(&number.to_string())?;
                ioctl::set_policy(&cgroup, Exits::HLT, !Exits::PAUSE)?;
                Ok(cgroup)
            })
            .collect::<Result<Vec<_>>>()?;
        let info = device.info()?;
        ensure!(
            info.policies >= at_once as u64,
            "only {} policies",
            info.policies
        );
        drop(cgroups);
    }
    drop(parent);
    interface::ensure_empty()?;
    ensure!(
        soon(|| Ok(cgroup::dying()? == 0))?,
        "{} cgroups are removed and do not go",
        cgroup::dying()?
    );
    Ok(())
}

/// What a policy costs is given back when its cgroup goes, without anyone asking for it.
fn come_and_go_without_leak(count: usize) -> Result<()> {
    // So few that what waits to be freed is little beside what a leak would be.
    let at_once = count / 20;
    // Caches, per CPU and of names, fill first.
    come_and_go(count / 5, at_once)?;
    let before = slab()?;
    come_and_go(count, at_once)?;
    // Freed objects are counted as active while they wait for RCU or in a CPU's cache. One object
    // leaked for each cgroup would be `count`; half of it is far more than waits there.
    ensure_slab_shrinks_to(&before, count as u64 / 2)
}

/// Fails unless there are no more than `limit` objects of each kind beyond what there were before, a
/// moment from now at the latest.
pub fn ensure_slab_shrinks_to(before: &BTreeMap<String, u64>, limit: u64) -> Result<()> {
    let grown = || -> Result<Vec<String>> {
        let now = slab()?;
        let grown = now.iter().filter(|(name, objects)| {
            let before = before.get(*name).copied().unwrap_or(0);
            **objects > before + limit
        });
        Ok(grown
            .map(|(name, objects)| format!("{name}: {:?} to {objects}", before.get(name)))
            .collect())
    };
    ensure!(
        soon(|| Ok(grown()?.is_empty()))?,
        "grown by more than {limit} objects: {:?}",
        grown()?
    );
    Ok(())
}

/// So many policies at once, each of them found again.
fn fit(count: usize) -> Result<()> {
    let device = Device::open()?;
    let parent = Cgroup::new("fit")?;
    let mut cgroups = Vec::with_capacity(count);
    for number in 0..count {
        let cgroup = parent.child(&number.to_string())?;
        let disable = Exits::from_bits_truncate(number as u64);
        ioctl::set_policy(&cgroup, disable, Exits::ALL)
            .with_context(|| format!("policy {number}"))?;
        cgroups.push(cgroup);
    }
    ensure!(
        device.info()?.policies == count as u64,
        "{:?}",
        device.info()?
    );
    let by_iteration = device.policies()?;
    ensure!(
        by_iteration.len() == count,
        "{} by iteration",
        by_iteration.len()
    );
    ensure!(
        by_iteration
            .windows(2)
            .all(|pair| pair[0].cgroup_id < pair[1].cgroup_id),
        "not in the order of their ids"
    );
    for (number, cgroup) in cgroups.iter().enumerate().step_by(97) {
        let disable = Exits::from_bits_truncate(number as u64);
        ensure!(
            ioctl::policy(cgroup)? == Some((disable, Exits::ALL)),
            "policy {number}"
        );
    }
    ensure!(
        soon(|| Ok(sysfs::policy_ids()?.len() == count))?,
        "{} in sysfs",
        sysfs::policy_ids()?.len()
    );
    drop(cgroups);
    Ok(())
}
