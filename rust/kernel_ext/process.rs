// SPDX-License-Identifier: GPL-2.0

//! Processes by a reference that does not keep them.
//!
//! C header: [`include/linux/pid.h`](srctree/include/linux/pid.h).

use super::cgroup::Cgroup;
use crate::bindings as shim;
use core::{
    ffi::c_void,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    bindings,
    sync::rcu,
    task::Task, //
};

/// A thread group, that may have ended. Then its number can be another one's.
///
/// # Invariants
///
/// Points to a `struct pid` with a reference that is ours.
pub(crate) struct Process(NonNull<bindings::pid>);

// SAFETY: A `struct pid` may be used and put from any thread.
unsafe impl Send for Process {}
// SAFETY: The methods of `&Process` may run in parallel.
unsafe impl Sync for Process {}

impl Process {
    /// The process of a task. Any context.
    pub(crate) fn of(task: &Task) -> Option<Self> {
        // SAFETY: The task is valid.
        let pid = unsafe { shim::exitpolicy_task_process(task.as_ptr().cast()) };
        // INVARIANT: Returned with a reference.
        NonNull::new(pid.cast()).map(Self)
    }

    /// One that has this memory, the address of a `struct mm_struct` that is not freed meanwhile, and
    /// its cgroup. There are several if clone(2) has made them with CLONE_VM. Looks at all threads of
    /// the host. Any context.
    pub(crate) fn with_memory<'rcu>(
        mm: usize,
        _rcu: &'rcu rcu::Guard,
    ) -> Option<(Self, &'rcu Cgroup)> {
        let mut cgroup = ptr::null_mut();
        // SAFETY: We are under RCU, and `cgroup` can be written. The address is compared only.
        let pid = unsafe { shim::exitpolicy_memory_process(mm as *const c_void, &mut cgroup) };
        // INVARIANT: Returned with a reference.
        let process = NonNull::new(pid.cast()).map(Self)?;
        // SAFETY: Written, as there is a process: a cgroup that RCU keeps, as in `Cgroup::of_task`.
        // INVARIANT: Pinned by RCU.
        Some((process, unsafe { &*cgroup.cast() }))
    }

    /// Its number in the initial pid namespace, which it had if it has ended.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: Valid, by the type invariant.
        unsafe { shim::exitpolicy_pid_number(self.as_ptr()) }
    }

    pub(super) fn as_ptr(&self) -> *mut shim::pid {
        self.0.as_ptr().cast()
    }
}

impl Clone for Process {
    fn clone(&self) -> Self {
        // SAFETY: Valid, by the type invariant.
        unsafe { shim::exitpolicy_pid_get(self.as_ptr()) };
        // INVARIANT: With the reference from above.
        Self(self.0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SAFETY: The reference is ours, by the type invariant.
        unsafe { bindings::put_pid(self.0.as_ptr()) };
    }
}
