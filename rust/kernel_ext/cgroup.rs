// SPDX-License-Identifier: GPL-2.0

//! Control groups of the default hierarchy (cgroup v2).
//!
//! C header: [`include/linux/cgroup.h`](srctree/include/linux/cgroup.h).

use super::{
    process::Process,
    tracepoint::TracepointProbe, //
};
use crate::bindings as shim;
use core::{
    ops::Deref,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    error::from_err_ptr,
    prelude::*,
    sync::{
        rcu,
        Arc,
        ArcBorrow, //
    },
    task::Task,
    types::{
        ForeignOwnable,
        Opaque, //
    },
};

/// A cgroup of the default hierarchy.
///
/// # Invariants
///
/// The cgroup is pinned for as long as a reference to this type lasts: by a reference count, by
/// RCU, or by a descendant that is pinned.
#[repr(transparent)]
pub(crate) struct Cgroup(Opaque<bindings::cgroup>);

// SAFETY: A cgroup may be used and put from any thread.
unsafe impl Send for Cgroup {}
// SAFETY: The methods of `&Cgroup` may run in parallel.
unsafe impl Sync for Cgroup {}

/// A counted reference to a cgroup.
///
/// There is no way from a `&Cgroup` to one: a cgroup that only RCU pins may have no reference left.
///
/// # Invariants
///
/// The pointer is to a cgroup with a reference that is ours.
pub(crate) struct CgroupRef(NonNull<Cgroup>);

// SAFETY: A cgroup may be used and put from any thread.
unsafe impl Send for CgroupRef {}
// SAFETY: Gives access to a `Cgroup`, which is `Sync`.
unsafe impl Sync for CgroupRef {}

impl Deref for CgroupRef {
    type Target = Cgroup;

    fn deref(&self) -> &Cgroup {
        // SAFETY: Valid, by the type invariant. INVARIANT: Pinned by our reference.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for CgroupRef {
    fn drop(&mut self) {
        // SAFETY: The reference is ours, by the type invariant.
        unsafe { shim::exitpolicy_cgroup_put(self.raw()) };
    }
}

impl Cgroup {
    /// Takes over a counted reference, or the error in place of one.
    ///
    /// # Safety
    ///
    /// `cgroup` must be an error pointer, or point to a cgroup with a reference for us.
    unsafe fn from_raw(cgroup: *mut bindings::cgroup) -> Result<CgroupRef> {
        let cgroup = NonNull::new(from_err_ptr(cgroup)?).ok_or(ENOENT)?;
        // INVARIANT: The caller gives us a reference; `Self` is a transparent wrapper.
        Ok(CgroupRef(cgroup.cast()))
    }

    /// The cgroup of a directory that the current task has open. Fails with [`EBADF`] if the file
    /// is no cgroup directory or belongs to a v1 hierarchy, and with [`ENODEV`] if the cgroup is
    /// being removed.
    pub(crate) fn from_fd(fd: i32) -> Result<CgroupRef> {
        // SAFETY: Returns a counted reference or an error.
        match unsafe { Self::from_raw(bindings::cgroup_get_from_fd(fd)) } {
            // css_tryget_online_from_dir() says ENOENT of a cgroup that is going.
            Err(ENOENT) => Err(ENODEV),
            result => result,
        }
    }

    /// The cgroup with this id, if it is alive and the current task's cgroup namespace shows it.
    pub(crate) fn from_id(id: u64) -> Result<CgroupRef> {
        // SAFETY: Returns a counted reference or an error.
        unsafe { Self::from_raw(bindings::cgroup_get_from_id(id)) }
    }

    /// The cgroup at a path below the root of the current task's cgroup namespace. Fails with
    /// [`EINVAL`] if there is a NUL in it, with [`ENOTDIR`] if it leads to a file, or through one,
    /// and otherwise with [`ENOENT`].
    pub(crate) fn from_path(path: &[u8]) -> Result<CgroupRef> {
        if path.contains(&0) {
            return Err(EINVAL);
        }
        let mut names = KVec::with_capacity(path.len() + 1, GFP_KERNEL)?;
        names.extend_from_slice(path, GFP_KERNEL)?;
        names.push(b'/', GFP_KERNEL)?;
        for byte in names.iter_mut().filter(|byte| **byte == b'/') {
            *byte = 0;
        }
        // SAFETY: Returns a counted reference or an error.
        let root = unsafe { Self::from_raw(bindings::cgroup_get_from_path(c"/".as_char_ptr())) };
        names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| name.len() > 1)
            .try_fold(root?, |cgroup, name| {
                let name = CStr::from_bytes_with_nul(name).map_err(|_| EINVAL)?;
                cgroup.child(name)
            })
    }

    /// The child with this name.
    fn child(&self, name: &CStr) -> Result<CgroupRef> {
        // SAFETY: Pinned, by the type invariant; `name` ends in NUL. Returns a counted reference or
        // an error.
        unsafe {
            Self::from_raw(shim::exitpolicy_cgroup_child(self.raw(), name.as_char_ptr()).cast())
        }
    }

    /// The cgroup of a task.
    pub(crate) fn of_task<'rcu>(task: &Task, _rcu: &'rcu rcu::Guard) -> &'rcu Self {
        // SAFETY: `task` is valid, and we are under RCU. Its css_set, and so that set's cgroup,
        // are freed after a grace period only, that is, not before the guard is dropped.
        // INVARIANT: Pinned by RCU.
        unsafe { &*shim::exitpolicy_task_cgroup(task.as_ptr().cast()).cast() }
    }

    /// The cgroup of a process: that of a thread of it that is alive, if there is one, and has this
    /// memory, the address of a `struct mm_struct` that is not freed meanwhile.
    pub(crate) fn of_process<'rcu>(
        process: &Process,
        mm: usize,
        _rcu: &'rcu rcu::Guard,
    ) -> Option<&'rcu Self> {
        // SAFETY: `process` is valid, and we are under RCU; the result is NULL or as in `of_task`.
        // `mm` is compared only. INVARIANT: Pinned by RCU.
        unsafe {
            shim::exitpolicy_process_cgroup(process.as_ptr(), mm as *const c_void)
                .cast::<Self>()
                .as_ref()
        }
    }

    /// The domain that it belongs to: itself, or, if it is threaded, the nearest ancestor that is
    /// not. All threads of a process are in cgroups of one domain.
    pub(crate) fn domain(&self) -> &Self {
        // SAFETY: Pinned, by the type invariant. INVARIANT: An ancestor or itself, which `self`
        // pins.
        unsafe { &*shim::exitpolicy_cgroup_domain(self.raw()).cast() }
    }

    /// Whether it is threaded, and its processes therefore count as those of its domain.
    pub(crate) fn is_threaded(&self) -> bool {
        !core::ptr::eq(self, self.domain())
    }

    fn raw(&self) -> *mut shim::cgroup {
        self.0.get().cast()
    }

    /// The id, which is never used again for another cgroup.
    pub(crate) fn id(&self) -> u64 {
        // SAFETY: Pinned, by the type invariant.
        unsafe { shim::exitpolicy_cgroup_id(self.raw()) }
    }

    /// The parent, unless this is the root.
    pub(crate) fn parent(&self) -> Option<&Self> {
        // SAFETY: Pinned, by the type invariant.
        let parent = unsafe { shim::exitpolicy_cgroup_parent(self.raw()) };
        // SAFETY: NULL or a cgroup. INVARIANT: `self`, a descendant, pins it.
        unsafe { parent.cast::<Self>().as_ref() }
    }

    /// This cgroup and its ancestors, up to the root.
    pub(crate) fn ancestors_and_self(&self) -> impl Iterator<Item = &Self> {
        core::iter::successors(Some(self), |cgroup| cgroup.parent())
    }

    /// Whether somebody has removed it.
    pub(crate) fn is_dead(&self) -> bool {
        // SAFETY: Pinned, by the type invariant.
        unsafe { shim::exitpolicy_cgroup_is_dead(self.raw()) }
    }

    /// Writes the path below the root of the current task's cgroup namespace, and returns it.
    /// May sleep. Fails with [`ENAMETOOLONG`] if the buffer has no room for one byte more.
    pub(crate) fn path<'buf>(&self, buffer: &'buf mut [u8]) -> Result<&'buf CStr> {
        // SAFETY: Pinned, by the type invariant; `buffer` is valid for writes of its length.
        let length =
            unsafe { shim::exitpolicy_cgroup_path(self.raw(), buffer.as_mut_ptr(), buffer.len()) };
        match length {
            error if error == E2BIG.to_errno() => Err(ENAMETOOLONG),
            error if error < 0 => Err(Error::from_errno(error)),
            // Nothing else tells a path that was cut off from one that fits just so
            // (fs/kernfs/dir.c: kernfs_path_from_node_locked()).
            length if length as usize + 1 >= buffer.len() => Err(ENAMETOOLONG),
            _ => CStr::from_bytes_until_nul(buffer).map_err(|_| ENAMETOOLONG),
        }
    }
}

/// Whether the current task sees all cgroups: it is in the initial cgroup namespace.
pub(crate) fn all_visible() -> bool {
    // SAFETY: An FFI call that asks about `current`, which has a namespace proxy until it exits.
    unsafe { shim::exitpolicy_in_init_cgroup_ns() }
}

/// To be told of what happens to cgroups.
pub(crate) trait CgroupEvents: Send + Sync + Sized + 'static {
    /// A cgroup of some hierarchy was removed: it can be found no more, but may live on for as long
    /// as somebody holds it. Ids are unique within a hierarchy only, so ask [`Cgroup::from_id`]
    /// before you believe it. Called with interrupts disabled; must not sleep.
    fn cgroup_removed(this: ArcBorrow<'_, Self>, id: u64);

    /// A task, and its process with it or not, was moved to another cgroup of some hierarchy. `mm`
    /// is the address of its memory, which other processes may share. Called with interrupts
    /// disabled; must not sleep.
    fn process_moved(this: ArcBorrow<'_, Self>, mm: usize);
}

/// Calls a handler for each cgroup that is removed and each task that is moved, until it is
/// dropped.
pub(crate) struct CgroupWatch<T: CgroupEvents> {
    _removed: TracepointProbe<Arc<T>>,
    _moved: TracepointProbe<Arc<T>>,
}

impl<T: CgroupEvents> CgroupWatch<T> {
    /// Begins to watch. `cgroup_lifetime_notifier` is not exported; the tracepoints are public.
    pub(crate) fn new(handler: Arc<T>) -> Result<Self> {
        /// # Safety
        ///
        /// To be called by the tracepoint `cgroup_rmdir` only, with an `Arc<T>` as foreign data.
        unsafe extern "C" fn removed<T: CgroupEvents>(
            data: *mut c_void,
            cgroup: *mut bindings::cgroup,
            _path: *const c_char,
        ) {
            // SAFETY: `data` came from `into_foreign`; it is dropped only after the last probe.
            let handler = unsafe { <Arc<T> as ForeignOwnable>::borrow(data) };
            // SAFETY: The tracepoint fires with a cgroup that its caller holds. INVARIANT: Pinned
            // by the caller during this call.
            let cgroup = unsafe { &*cgroup.cast::<Cgroup>() };
            T::cgroup_removed(handler, cgroup.id());
        }

        /// # Safety
        ///
        /// To be called by the tracepoint `cgroup_attach_task` only, with an `Arc<T>` as foreign
        /// data.
        unsafe extern "C" fn moved<T: CgroupEvents>(
            data: *mut c_void,
            _cgroup: *mut bindings::cgroup,
            _path: *const c_char,
            task: *mut bindings::task_struct,
            _threadgroup: bool,
        ) {
            // SAFETY: As in `removed`.
            let handler = unsafe { <Arc<T> as ForeignOwnable>::borrow(data) };
            // SAFETY: The tracepoint fires with a task that its caller holds.
            let mm = unsafe { shim::exitpolicy_task_memory(task.cast()) };
            // Neither a kernel thread nor a process that has ended has any.
            if !mm.is_null() {
                T::process_moved(handler, mm.addr());
            }
        }

        Ok(Self {
            // SAFETY: TRACE_CGROUP_PATH(rmdir, ...) of kernel/cgroup/cgroup.c calls its probes with
            // a cgroup and a path (include/trace/events/cgroup.h). `removed` does not sleep, since
            // the handler does not.
            _removed: unsafe {
                TracepointProbe::register(
                    c"cgroup_rmdir",
                    removed::<T> as *mut c_void,
                    handler.clone(),
                )?
            },
            // SAFETY: TRACE_CGROUP_PATH(attach_task, ...), likewise, with a cgroup, a path, a task
            // and whether all its threads were moved with it.
            _moved: unsafe {
                TracepointProbe::register(
                    c"cgroup_attach_task",
                    moved::<T> as *mut c_void,
                    handler,
                )?
            },
        })
    }
}
