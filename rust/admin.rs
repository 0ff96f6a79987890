// SPDX-License-Identifier: GPL-2.0

//! What the administrator can do, whichever way it is asked for: each command succeeds as a whole
//! or changes nothing, and sysfs shows the result before it returns.

use crate::{
    bindings as shim,
    engine::Engine,
    hooks::{
        hook_nested_vmexit,
        Hook,
        NestedVmexit, //
    },
    interface::sysfs::entries::{
        PolicyFiles,
        VcpuFiles,
        VmFiles, //
    },
    kernel_ext::{
        cgroup::{
            Cgroup,
            CgroupEvents, //
        },
        kobject::{
            Directory,
            Parent, //
        },
        raw_spinlock::{
            new_raw_spinlock,
            RawSpinLock, //
        },
    },
    live::Scope,
    policy::{
        Exits,
        Policy, //
    },
};
use kernel::{
    bindings, impl_has_delayed_work, new_delayed_work, new_mutex,
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNode, //
    },
    sync::{
        atomic::Full,
        barrier::smp_mb,
        Arc,
        ArcBorrow,
        Mutex, //
    },
    time::Delta,
    workqueue::{
        DelayedWork,
        Queue,
        WorkItem, //
    },
};

/// Changes policies, and keeps what sysfs shows in step.
#[pin_data]
pub(crate) struct Admin {
    engine: Arc<Engine>,
    /// Held while a policy is added or removed, and while directories are. Files below those
    /// directories must not take it: removing a directory waits for them.
    #[pin]
    directories: Mutex<Option<Directories>>,
    /// Held while VMs that run are decided on again, so that an older decision does not overtake a
    /// newer one. Not while vCPUs are waited for, nor while directories are removed.
    #[pin]
    changes: Mutex<()>,
    /// The hook that is there while a vCPU waits for the end of L2.
    #[pin]
    l2: Mutex<Option<Hook<NestedVmexit>>>,
    /// Left by the watch on removed cgroups for the worker.
    #[pin]
    removed: RawSpinLock<Removed>,
    #[pin]
    work: DelayedWork<Self>,
}

/// `cgroups` and `vms`, with what is below them. Field order is drop order: children first.
struct Directories {
    policies: RBTree<u64, Pin<KBox<Directory<PolicyFiles>>>>,
    vms: RBTree<u64, VmDirectory>,
    cgroups_parent: Pin<KBox<Directory<()>>>,
    vms_parent: Pin<KBox<Directory<()>>>,
}

/// `vms/<id>`. Field order is drop order.
struct VmDirectory {
    /// `vcpu<N>`, in the order of the vCPUs' indices. Some may be missing, for lack of memory.
    vcpus: KVec<VcpuDirectory>,
    directory: Pin<KBox<Directory<VmFiles>>>,
}

/// `vms/<id>/vcpu<N>`.
struct VcpuDirectory {
    index: usize,
    _directory: Pin<KBox<Directory<VcpuFiles>>>,
}

/// How a change is carried out.
#[derive(Clone, Copy)]
pub(crate) struct How {
    /// Leave the VMs that run as they are.
    pub(crate) new_only: bool,
    /// How long to wait for their vCPUs.
    pub(crate) wait: Option<Delta>,
}

impl How {
    /// How long who does not say is made to wait.
    pub(crate) const DEFAULT_WAIT: Delta = Delta::from_millis(1000);

    /// At once, and wait for it.
    pub(crate) const LIVE: Self = Self {
        new_only: false,
        wait: Some(Self::DEFAULT_WAIT),
    };
}

/// Cgroups that had a policy when they were removed.
struct Removed {
    ids: [u64; Removed::CAPACITY],
    count: usize,
    /// There were more than fit: look at every policy.
    overflow: bool,
}

impl Removed {
    const CAPACITY: usize = 64;
    const NONE: Self = Self {
        ids: [0; Self::CAPACITY],
        count: 0,
        overflow: false,
    };
}

impl_has_delayed_work! {
    impl HasDelayedWork<Self> for Admin { self.work }
}

impl Admin {
    /// How many directories are made without letting others have the lock.
    const AT_ONCE: usize = 64;

    pub(crate) fn new(engine: Arc<Engine>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                engine,
                directories <- new_mutex!(None, "exitpolicy_directories"),
                changes <- new_mutex!((), "exitpolicy_changes"),
                l2 <- new_mutex!(None, "exitpolicy_l2"),
                removed <- new_raw_spinlock!(Removed::NONE, "exitpolicy_removed"),
                work <- new_delayed_work!("exitpolicy_work"),
            }),
            GFP_KERNEL,
        )
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Begins to show policies and VMs below two directories.
    pub(crate) fn publish(
        this: &Arc<Self>,
        cgroups: Pin<KBox<Directory<()>>>,
        vms: Pin<KBox<Directory<()>>>,
    ) {
        *this.directories.lock() = Some(Directories {
            policies: RBTree::new(),
            vms: RBTree::new(),
            cgroups_parent: cgroups,
            vms_parent: vms,
        });
        Self::wake(this);
    }

    /// Removes all directories. Policies can be added no more.
    pub(crate) fn unpublish(&self) {
        let directories = self.directories.lock().take();
        drop(directories);
    }

    /// Lets the worker bring sysfs up to date. Any context but NMI.
    pub(crate) fn wake(this: &Arc<Self>) {
        // SAFETY: Always there. `kernel` offers only its deprecated predecessor.
        let queue = unsafe { Queue::from_raw(bindings::system_dfl_wq) };
        // At the next tick: to wake a thread takes a VMM longer than a decision does, and its other
        // vCPUs come at once. Not bound to its CPU, as it may be alone there. An error says that it
        // is queued already.
        let _ = queue.enqueue_delayed(this.clone(), 1);
    }

    /// Waits until the worker has done what it was woken for so far, without waiting for the tick.
    /// Whoever needs it to stay idle has to see to it that nobody wakes it meanwhile.
    pub(crate) fn settle(&self) {
        let work: *const DelayedWork<Self> = &self.work;
        // SAFETY: The work is initialised, and pinned in `self`; a `DelayedWork` is a `delayed_work`.
        unsafe { bindings::flush_delayed_work(work.cast_mut().cast()) };
    }

    /// Changes those sets of a cgroup's policy that are given, makes the policy if there is none,
    /// and returns the result, with the number of vCPUs that were waited for in vain. Fails with
    /// [`ENODEV`] if the cgroup is being removed, and with [`EOPNOTSUPP`] if it is threaded: its
    /// processes are those of its domain.
    pub(crate) fn set_policy(
        this: &Arc<Self>,
        cgroup: &Cgroup,
        disable: Option<Exits>,
        allow: Option<Exits>,
        how: How,
    ) -> Result<(Policy, u32)> {
        refuse_threaded(cgroup)?;
        let policy = {
            let mut directories = this.directories.lock();
            match this.engine.store.change(cgroup.id(), disable, allow) {
                Some(policy) => policy,
                None => {
                    let policy = Policy::NEUTRAL.with(disable, allow);
                    Self::add_policy(this, &mut directories, cgroup, policy)?;
                    policy
                }
            }
        };
        Ok((
            policy,
            this.policies_changed(Scope::Below(cgroup.id()), how),
        ))
    }

    /// Changes those sets of an existing policy that are given. Fails with [`ENODEV`] if there is
    /// none.
    pub(crate) fn change_policy(
        &self,
        cgroup: u64,
        disable: Option<Exits>,
        allow: Option<Exits>,
        how: How,
    ) -> Result {
        let changed = self.engine.store.change(cgroup, disable, allow);
        changed.ok_or(ENODEV)?;
        self.policies_changed(Scope::Below(cgroup), how);
        Ok(())
    }

    /// Turns the master switch, and returns the number of vCPUs that were waited for in vain.
    pub(crate) fn set_enabled(&self, enabled: bool, how: How) -> u32 {
        self.engine.set_enabled(enabled);
        self.policies_changed(Scope::All, how)
    }

    /// Lets VMs that run, or are just being decided on, follow a change of policies.
    fn policies_changed(&self, scope: Scope, how: How) -> u32 {
        self.engine.policies_changed();
        if how.new_only {
            0
        } else {
            self.change(scope, how)
        }
    }

    fn change(&self, scope: Scope, how: How) -> u32 {
        let stamp = {
            let _changes = self.changes.lock();
            self.engine.change(scope)
        };
        let pending = how.wait.map_or(0, |limit| {
            self.engine.wait_for(stamp, limit, |_| self.watch_l2())
        });
        self.stop_watching_idle_l2();
        self.set_quiet_flags();
        pending
    }

    /// Gives a VM, or one of its vCPUs, an override, or takes it away, from a VM with those of its
    /// vCPUs. Returns the number of vCPUs that were waited for in vain. Fails with [`ENOENT`].
    pub(crate) fn set_override(
        &self,
        vm: u64,
        vcpu: Option<u32>,
        disable: Option<Exits>,
        how: How,
    ) -> Result<u32> {
        let set = self.engine.vms.with(vm, |vm, _| {
            match vcpu {
                Some(id) => {
                    let mut vcpus = vm.vcpus.iter_mut();
                    let vcpu = vcpus.find(|vcpu| vcpu.id == id).ok_or(ENOENT)?;
                    vcpu.disable = disable;
                }
                None => {
                    vm.disable = disable;
                    if disable.is_none() {
                        for vcpu in vm.vcpus.iter_mut() {
                            vcpu.disable = None;
                        }
                    }
                }
            }
            Ok::<(), Error>(())
        });
        set.ok_or(ENOENT)??;
        Ok(self.change(Scope::One(vm), how))
    }

    /// Sets flags that can be set only while no CPU looks at a vCPU, if there are any.
    fn set_quiet_flags(&self) {
        /// # Safety
        ///
        /// `engine` must point to an `Engine`.
        unsafe extern "C" fn set(engine: *mut c_void) -> c_int {
            // SAFETY: By the safety requirements.
            unsafe { &*engine.cast::<Engine>() }.set_quiet_flags();
            0
        }

        if self.engine.wants_quiet() {
            let engine: *const Engine = &*self.engine;
            // SAFETY: `set` is called during this call only, with an `Engine`. It takes a raw
            // spinlock: nobody is stopped who holds one.
            unsafe { shim::exitpolicy_stop_machine(Some(set), engine.cast_mut().cast()) };
        }
    }

    /// Makes sure that vCPUs in L2 are asked again when they leave it.
    fn watch_l2(&self) {
        let mut l2 = self.l2.lock();
        if l2.is_some() {
            return;
        }
        // Under the lock: who lets go of the vendor module takes the facts away, then the hook.
        let Some(facts) = self.engine.facts() else {
            return;
        };
        let Some(symbol) = facts.vendor.functions().nested_vmexit else {
            return;
        };
        // The log has the reason if it fails. To ask who is still in L2 would be in vain then, and
        // have them wake the worker again. They change when somebody asks them again.
        let Ok(hook) = hook_nested_vmexit(symbol, self.engine.clone()) else {
            self.engine.ask_who_left_l2();
            return;
        };
        *l2 = Some(hook);
        // One may have left before the hook was there.
        self.engine.ask_in_l2();
    }

    /// Removes the hook on the end of L2, unless a vCPU waits for that.
    fn stop_watching_idle_l2(&self) {
        let hook = {
            let mut l2 = self.l2.lock();
            // Under the lock: a vCPU is known to be in L2 before the hook is looked for.
            if self.engine.any_in_l2() {
                None
            } else {
                l2.take()
            }
        };
        drop(hook);
    }

    /// Removes the hook on the end of L2.
    pub(crate) fn stop_watching_l2(&self) {
        let hook = self.l2.lock().take();
        drop(hook);
    }

    /// Gives a cgroup a policy that changes nothing yet. Fails with [`EEXIST`] if it has one,
    /// and otherwise as [`Admin::set_policy`].
    ///
    /// "Nothing yet" is said of the policy: it ends the inheritance of `disable`.
    pub(crate) fn attach(this: &Arc<Self>, cgroup: &Cgroup, how: How) -> Result {
        refuse_threaded(cgroup)?;
        {
            let mut directories = this.directories.lock();
            if this.engine.store.get(cgroup.id()).is_some() {
                return Err(EEXIST);
            }
            Self::add_policy(this, &mut directories, cgroup, Policy::NEUTRAL)?;
        }
        this.policies_changed(Scope::Below(cgroup.id()), how);
        Ok(())
    }

    fn add_policy(
        this: &Arc<Self>,
        directories: &mut Option<Directories>,
        cgroup: &Cgroup,
        policy: Policy,
    ) -> Result {
        let id = cgroup.id();
        let directories = directories.as_mut().ok_or(ENODEV)?;
        let directory = Directory::new(
            fmt!("{}", id),
            Parent::Directory(&directories.cgroups_parent),
            PolicyFiles::new(this.clone(), id),
        )?;
        let node = RBTreeNode::new(id, directory, GFP_KERNEL)?;
        this.engine.store.add(id, policy)?;
        directories.policies.insert(node);

        // Pairs with cgroup_rmdir(), which marks the cgroup dead before our watch looks for its
        // policy: either the watch sees the policy, or we see the mark.
        smp_mb(Full);
        if cgroup.is_dead() {
            this.remove_policy(directories, id);
            return Err(ENODEV);
        }
        Ok(())
    }

    /// Takes a cgroup's policy away, and returns the number of vCPUs that were waited for in vain.
    /// Fails with [`ENOENT`] if it has none.
    pub(crate) fn clear_policy(&self, cgroup: u64, how: How) -> Result<u32> {
        {
            let mut directories = self.directories.lock();
            let directories = (*directories).as_mut().ok_or(ENODEV)?;
            if !self.remove_policy(directories, cgroup) {
                return Err(ENOENT);
            }
        }
        Ok(self.policies_changed(Scope::Below(cgroup), how))
    }

    fn remove_policy(&self, directories: &mut Directories, cgroup: u64) -> bool {
        let removed = self.engine.store.remove(cgroup);
        drop(directories.policies.remove(&cgroup));
        removed
    }

    /// The worker: does what hooks cannot do.
    fn work(this: &Arc<Self>) {
        {
            let _changes = this.changes.lock();
            this.engine.change(Scope::Stale);
        }
        // After that, which may find vCPUs that are to have a directory.
        this.tidy(this);
        this.set_quiet_flags();
        if this.engine.any_in_l2() {
            this.watch_l2();
        } else {
            this.stop_watching_idle_l2();
        }
    }

    /// Takes policies of removed cgroups away, and makes and removes `vms/<id>`.
    ///
    /// What was made is removed first, and no more than [`Admin::AT_ONCE`] is made: VMMs that make VMs
    /// faster than we make directories shall neither keep administrators from the lock, nor fill
    /// memory with directories of VMs that are gone.
    fn tidy(&self, this: &Arc<Self>) {
        let mut directories = self.directories.lock();
        let Some(directories) = (*directories).as_mut() else {
            return;
        };
        let removed = core::mem::replace(&mut *self.removed.lock(), Removed::NONE);
        for &cgroup in removed.ids.iter().take(removed.count) {
            self.remove_if_gone(directories, cgroup);
        }
        if removed.overflow {
            let mut last = 0;
            while let Some((cgroup, _)) = self.engine.store.next_after(last) {
                self.remove_if_gone(directories, cgroup);
                last = cgroup;
            }
        }

        while let Some(vm) = self.engine.vms.next_to_unpublish() {
            drop(directories.vms.remove(&vm));
        }
        for _ in 0..Self::AT_ONCE {
            let published = if let Some(vm) = self.engine.vms.next_to_publish() {
                Self::publish_vm(this, directories, vm)
            } else if let Some((vm, index, vcpu)) = self.engine.vms.next_vcpu_to_publish() {
                Self::publish_vcpu(this, directories, vm, index, vcpu)
            } else {
                return;
            };
            if published.is_err() {
                // Decided on and in the ioctl's list, but not in sysfs.
                self.engine.count_missed();
            }
        }
        // Under the lock: after `unpublish`, which takes it, the worker does not queue itself any
        // more, so that to settle then is to settle for good.
        Self::wake(this);
    }

    fn remove_if_gone(&self, directories: &mut Directories, cgroup: u64) {
        // The worker sees all cgroups, as it is in the initial cgroup namespace.
        if Cgroup::from_id(cgroup).is_err() {
            self.remove_policy(directories, cgroup);
        }
    }

    fn publish_vm(this: &Arc<Self>, directories: &mut Directories, vm: u64) -> Result {
        let directory = Directory::new(
            fmt!("{}", vm),
            Parent::Directory(&directories.vms_parent),
            VmFiles::new(this.clone(), vm),
        )?;
        let vcpus = KVec::new();
        let directory = VmDirectory { vcpus, directory };
        directories
            .vms
            .try_create_and_insert(vm, directory, GFP_KERNEL)?;
        Ok(())
    }

    fn publish_vcpu(
        this: &Arc<Self>,
        directories: &mut Directories,
        vm: u64,
        index: usize,
        vcpu: u32,
    ) -> Result {
        let vm_directory = directories.vms.get_mut(&vm).ok_or(ENOENT)?;
        // Those of vCPUs whose creation has failed.
        let vcpus = &mut vm_directory.vcpus;
        while vcpus.last().is_some_and(|last| last.index >= index) {
            vcpus.pop();
        }
        let directory = Directory::new(
            fmt!("vcpu{}", vcpu),
            Parent::Directory(&vm_directory.directory),
            VcpuFiles::new(this.clone(), vm, vcpu),
        )?;
        let directory = VcpuDirectory {
            index,
            _directory: directory,
        };
        vcpus.push(directory, GFP_KERNEL)?;
        Ok(())
    }
}

/// A policy on a threaded cgroup would apply to nobody.
fn refuse_threaded(cgroup: &Cgroup) -> Result {
    if cgroup.is_threaded() {
        Err(EOPNOTSUPP)
    } else {
        Ok(())
    }
}

impl WorkItem for Admin {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        Self::work(&this);
    }
}

impl CgroupEvents for Admin {
    fn cgroup_removed(this: ArcBorrow<'_, Self>, id: u64) {
        if this.engine.store.get(id).is_none() {
            return;
        }
        {
            let mut removed = this.removed.lock();
            let count = removed.count;
            match removed.ids.get_mut(count) {
                Some(slot) => {
                    *slot = id;
                    removed.count += 1;
                }
                None => removed.overflow = true,
            }
        }
        Self::wake(&this.into());
    }

    fn process_moved(this: ArcBorrow<'_, Self>, mm: usize) {
        if this.engine.vms.process_moved(mm) {
            Self::wake(&this.into());
        }
    }
}
