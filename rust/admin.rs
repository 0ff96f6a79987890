// SPDX-License-Identifier: GPL-2.0

//! What the administrator can do, whichever way it is asked for: each command succeeds as a whole
//! or changes nothing, and sysfs shows the result before it returns.

use crate::{
    engine::Engine,
    interface::sysfs::entries::{
        PolicyFiles,
        VmFiles, //
    },
    kernel_ext::{
        cgroup::{
            Cgroup,
            RemovalHandler, //
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
    policy::{
        Exits,
        Policy, //
    },
};
use kernel::{
    bindings, impl_has_work, new_mutex, new_work,
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
    workqueue::{
        self,
        Work,
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
    /// Left by the watch on removed cgroups for the worker.
    #[pin]
    removed: RawSpinLock<Removed>,
    #[pin]
    work: Work<Self>,
}

/// `cgroups` and `vms`, with what is below them. Field order is drop order: children first.
struct Directories {
    policies: RBTree<u64, Pin<KBox<Directory<PolicyFiles>>>>,
    vms: RBTree<u64, Pin<KBox<Directory<VmFiles>>>>,
    cgroups_parent: Pin<KBox<Directory<()>>>,
    vms_parent: Pin<KBox<Directory<()>>>,
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

impl_has_work! {
    impl HasWork<Self> for Admin { self.work }
}

impl Admin {
    pub(crate) fn new(engine: Arc<Engine>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                engine,
                directories <- new_mutex!(None, "exitpolicy_directories"),
                removed <- new_raw_spinlock!(Removed::NONE, "exitpolicy_removed"),
                work <- new_work!("exitpolicy_work"),
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
        // An error says that it is queued already.
        let _ = workqueue::system_long().enqueue(this.clone());
    }

    /// Waits until the worker is idle.
    pub(crate) fn settle(&self) {
        // SAFETY: The work is initialised, and pinned in `self`.
        unsafe { bindings::flush_work(Work::raw_get(&self.work)) };
    }

    /// Changes those sets of a cgroup's policy that are given, makes the policy if there is none,
    /// and returns the result. Fails with [`ENODEV`] if the cgroup is being removed, and with
    /// [`EOPNOTSUPP`] if it is threaded: its processes are those of its domain.
    pub(crate) fn set_policy(
        &self,
        cgroup: &Cgroup,
        disable: Option<Exits>,
        allow: Option<Exits>,
    ) -> Result<Policy> {
        refuse_threaded(cgroup)?;
        let store = &self.engine.store;
        let mut directories = self.directories.lock();
        match store.change(cgroup.id(), disable, allow) {
            Some(policy) => Ok(policy),
            None => {
                let policy = Policy::NEUTRAL.with(disable, allow);
                self.add_policy(&mut directories, cgroup, policy)?;
                Ok(policy)
            }
        }
    }

    /// Gives a cgroup a policy that changes nothing yet. Fails with [`EEXIST`] if it has one,
    /// and otherwise as [`Admin::set_policy`].
    pub(crate) fn attach(&self, cgroup: &Cgroup) -> Result {
        refuse_threaded(cgroup)?;
        let mut directories = self.directories.lock();
        if self.engine.store.get(cgroup.id()).is_some() {
            return Err(EEXIST);
        }
        self.add_policy(&mut directories, cgroup, Policy::NEUTRAL)
    }

    fn add_policy(
        &self,
        directories: &mut Option<Directories>,
        cgroup: &Cgroup,
        policy: Policy,
    ) -> Result {
        let id = cgroup.id();
        let directories = directories.as_mut().ok_or(ENODEV)?;
        let directory = Directory::new(
            fmt!("{}", id),
            Parent::Directory(&directories.cgroups_parent),
            PolicyFiles::new(self.engine.clone(), id),
        )?;
        let node = RBTreeNode::new(id, directory, GFP_KERNEL)?;
        self.engine.store.add(id, policy)?;
        directories.policies.insert(node);

        // Pairs with cgroup_rmdir(), which marks the cgroup dead before our watch looks for its
        // policy: either the watch sees the policy, or we see the mark.
        smp_mb(Full);
        if cgroup.is_dead() {
            self.remove_policy(directories, id);
            return Err(ENODEV);
        }
        Ok(())
    }

    /// Takes a cgroup's policy away. Fails with [`ENOENT`] if it has none.
    pub(crate) fn clear_policy(&self, cgroup: u64) -> Result {
        let mut directories = self.directories.lock();
        let directories = (*directories).as_mut().ok_or(ENODEV)?;
        self.remove_policy(directories, cgroup)
            .then_some(())
            .ok_or(ENOENT)
    }

    fn remove_policy(&self, directories: &mut Directories, cgroup: u64) -> bool {
        let removed = self.engine.store.remove(cgroup);
        drop(directories.policies.remove(&cgroup));
        removed
    }

    /// The worker: takes policies of removed cgroups away, and makes and removes `vms/<id>`.
    fn tidy(&self) {
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

        while let Some(vm) = self.engine.vms.next_to_publish() {
            if self.publish_vm(directories, vm).is_err() {
                // Decided on and in the ioctl's list, but not in sysfs.
                self.engine.count_missed();
            }
        }
        while let Some(vm) = self.engine.vms.next_to_unpublish() {
            drop(directories.vms.remove(&vm));
        }
    }

    fn remove_if_gone(&self, directories: &mut Directories, cgroup: u64) {
        // The worker sees all cgroups, as it is in the initial cgroup namespace.
        if Cgroup::from_id(cgroup).is_err() {
            self.remove_policy(directories, cgroup);
        }
    }

    fn publish_vm(&self, directories: &mut Directories, vm: u64) -> Result {
        let directory = Directory::new(
            fmt!("{}", vm),
            Parent::Directory(&directories.vms_parent),
            VmFiles::new(self.engine.clone(), vm),
        )?;
        directories
            .vms
            .try_create_and_insert(vm, directory, GFP_KERNEL)?;
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
        this.tidy();
    }
}

impl RemovalHandler for Admin {
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
}
