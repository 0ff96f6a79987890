// SPDX-License-Identifier: GPL-2.0

//! Probes on the entry of kernel functions.
//!
//! C header: [`include/linux/fprobe.h`](srctree/include/linux/fprobe.h).
//! Reference: <https://docs.kernel.org/trace/fprobe.html>

use crate::bindings;
use core::{
    marker::PhantomData,
    ptr, //
};
use kernel::{
    error::to_result,
    prelude::*,
    types::{
        NotThreadSafe,
        Opaque, //
    },
};

/// What happens when a probed function is entered.
pub(crate) trait Handler: Send + Sync {
    /// Called in the thread that calls the function, before the function's first instruction.
    /// Must not sleep.
    fn entered(&self, call: &Call<'_>);
}

/// The call of a probed function.
///
/// A value of this type is evidence that the function is being entered, in this thread, and that
/// preemption is disabled until the handler returns (kernel/trace/fprobe.c:
/// `fprobe_ftrace_entry()`).
pub(crate) struct Call<'a> {
    fregs: *mut bindings::ftrace_regs,
    _lifetime: PhantomData<&'a ()>,
    _not_send: NotThreadSafe,
}

impl Call<'_> {
    /// The function's argument `n`, counted from 0, as it stands in its register.
    pub(crate) fn argument(&self, n: u32) -> usize {
        // SAFETY: `fregs` is what ftrace gave to the handler, which has not returned yet.
        unsafe { bindings::exitpolicy_ftrace_regs_argument(self.fregs, n) }
    }
}

/// A registered probe on the entry of one function.
///
/// `nmissed` is not shown: fprobe counts there what kprobes and function-graph tracing keep from
/// it, and a probe like this one depends on neither.
///
/// There is never an exit handler: that would switch on function-graph tracing, with a shadow
/// stack for every thread of the host.
///
/// # Invariants
///
/// `inner` is registered from initialisation to drop.
#[pin_data(PinnedDrop)]
pub(crate) struct Fprobe<H: Handler> {
    handler: H,
    #[pin]
    inner: Opaque<bindings::fprobe>,
}

// SAFETY: A registration is bound to no thread, and `H` is `Send`.
unsafe impl<H: Handler> Send for Fprobe<H> {}
// SAFETY: `&Fprobe` gives access, through the trampoline, to `H` only, which is `Sync`.
unsafe impl<H: Handler> Sync for Fprobe<H> {}

impl<H: Handler> Fprobe<H> {
    /// Registers `handler` on the function `symbol`, of the kernel or of a module that is loaded
    /// now. Once that module is gone the probe is dead; it must be dropped and made again.
    ///
    /// Fails with [`ENOENT`] if there is no such function or ftrace cannot trace it.
    pub(crate) fn register(symbol: &'static CStr, handler: H) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // First, because the probe may fire before its registration has returned.
            handler,
            inner <- Opaque::try_ffi_init(move |slot: *mut bindings::fprobe| {
                let mut symbol = symbol.as_char_ptr();
                // SAFETY: `slot` is valid for writes, and all zeroes is a valid `struct fprobe`
                // without handlers. It stays where it is, since `Self` is pinned, and `drop`
                // unregisters it. `symbol` is one name, which is read during the call only.
                to_result(unsafe {
                    ptr::write_bytes(slot, 0, 1);
                    (*slot).entry_handler = Some(Self::entry);
                    bindings::register_fprobe_syms(slot, &mut symbol, 1)
                })
            }),
        })
    }

    /// # Safety
    ///
    /// To be called by fprobe only: `fprobe` is the `inner` of a `Self`, and `fregs` is valid
    /// until this returns.
    unsafe extern "C" fn entry(
        fprobe: *mut bindings::fprobe,
        _entry_ip: c_ulong,
        _return_ip: c_ulong,
        fregs: *mut bindings::ftrace_regs,
        _data: *mut c_void,
    ) -> c_int {
        // SAFETY: By the safety requirements, `fprobe` is the field of a pinned `Self`.
        // `unregister_fprobe()` waits for running handlers, so that `Self` lives until we return,
        // and `handler` was initialised before `inner` was registered. It is never borrowed
        // mutably.
        let handler = unsafe {
            &(*kernel::container_of!(Opaque::cast_from(fprobe).cast_mut(), Self, inner)).handler
        };
        handler.entered(&Call {
            fregs,
            _lifetime: PhantomData,
            _not_send: NotThreadSafe,
        });
        0
    }
}

#[pinned_drop]
impl<H: Handler> PinnedDrop for Fprobe<H> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered, by the invariant. Waits until no handler runs any more. The only
        // error is EINVAL for a probe that is not registered.
        unsafe { bindings::unregister_fprobe(self.inner.get()) };
    }
}
