// SPDX-License-Identifier: GPL-2.0

//! Probes on tracepoints of the kernel, which are not exported but can be found by name.
//!
//! C header: [`include/linux/tracepoint.h`](srctree/include/linux/tracepoint.h).

use crate::bindings as shim;
use core::{
    marker::PhantomData,
    ptr, //
};
use kernel::{
    bindings,
    error::to_result,
    prelude::*,
    types::ForeignOwnable, //
};

/// A probe that is attached to a tracepoint and owns the data that it is called with.
///
/// # Invariants
///
/// `probe` is registered on `tracepoint` with `data`, which came from `P::into_foreign`.
pub(crate) struct TracepointProbe<P: ForeignOwnable + Send + Sync> {
    tracepoint: *mut bindings::tracepoint,
    probe: *mut c_void,
    data: *mut c_void,
    _owns: PhantomData<P>,
}

// SAFETY: A registration is bound to no thread, and `P` is `Send`.
unsafe impl<P: ForeignOwnable + Send + Sync> Send for TracepointProbe<P> {}
// SAFETY: Nothing can be reached through a shared reference.
unsafe impl<P: ForeignOwnable + Send + Sync> Sync for TracepointProbe<P> {}

impl<P: ForeignOwnable + Send + Sync> TracepointProbe<P> {
    /// Attaches `probe` to the tracepoint `name` of the kernel proper; fails with [`ENOENT`] if
    /// there is none.
    ///
    /// # Safety
    ///
    /// `probe` must be an `extern "C"` function that takes a `*mut c_void` - what `data` turns into
    /// as foreign - followed by the arguments of that tracepoint, and that borrows the former at
    /// most. It must not sleep.
    pub(crate) unsafe fn register(name: &CStr, probe: *mut c_void, data: P) -> Result<Self> {
        struct Search<'a> {
            name: &'a CStr,
            found: *mut bindings::tracepoint,
        }

        /// # Safety
        ///
        /// `tracepoint` must be valid, and `search` point to a `Search` that nobody else uses.
        unsafe extern "C" fn compare(tracepoint: *mut bindings::tracepoint, search: *mut c_void) {
            // SAFETY: By the safety requirements.
            let search = unsafe { &mut *search.cast::<Search<'_>>() };
            // SAFETY: A tracepoint has a name, a constant string.
            let name =
                unsafe { CStr::from_char_ptr(shim::exitpolicy_tracepoint_name(tracepoint.cast())) };
            if name == search.name {
                search.found = tracepoint;
            }
        }

        let mut search = Search {
            name,
            found: ptr::null_mut(),
        };
        // SAFETY: `compare` is called during this call only, with `search`, in this thread.
        unsafe {
            bindings::for_each_kernel_tracepoint(Some(compare), (&raw mut search).cast());
        }
        if search.found.is_null() {
            return Err(ENOENT);
        }

        let data = data.into_foreign();
        // SAFETY: Tracepoints of the kernel proper are there for ever. `probe` fits, as the caller
        // promises.
        let result = unsafe { bindings::tracepoint_probe_register(search.found, probe, data) };
        if let Err(error) = to_result(result) {
            // SAFETY: `data` came from `into_foreign` above, and was not given away.
            drop(unsafe { P::from_foreign(data) });
            return Err(error);
        }
        // INVARIANT: Just registered.
        Ok(Self {
            tracepoint: search.found,
            probe,
            data,
            _owns: PhantomData,
        })
    }
}

impl<P: ForeignOwnable + Send + Sync> Drop for TracepointProbe<P> {
    fn drop(&mut self) {
        // SAFETY: Registered like this, by the invariant. After the second call no probe is
        // running any more, so that `data` is ours alone again.
        unsafe {
            bindings::tracepoint_probe_unregister(self.tracepoint, self.probe, self.data);
            shim::exitpolicy_tracepoint_synchronize();
            drop(P::from_foreign(self.data));
        }
    }
}
