// SPDX-License-Identifier: GPL-2.0

//! To be told of modules that come and go.
//!
//! C header: [`include/linux/module.h`](srctree/include/linux/module.h).

use core::ptr;
use kernel::{
    bindings,
    error::to_result,
    prelude::*,
    types::Opaque, //
};

/// What is to happen when another module comes or goes. Both may sleep, and must not load or
/// unload a module.
pub(crate) trait ModuleEvents: Send + Sync {
    /// The module's init function has succeeded. Called in the task that loads it.
    fn module_live(&self, name: &CStr);

    /// The module's exit function has returned, or its init function has failed; its code is still
    /// there.
    fn module_going(&self, name: &CStr);
}

/// A registered module notifier.
///
/// # Invariants
///
/// `inner` is registered from initialisation to drop.
#[pin_data(PinnedDrop)]
pub(crate) struct ModuleNotifier<T: ModuleEvents> {
    events: T,
    #[pin]
    inner: Opaque<bindings::notifier_block>,
}

// SAFETY: A registration is bound to no thread, and `T` is `Send`.
unsafe impl<T: ModuleEvents> Send for ModuleNotifier<T> {}
// SAFETY: Only `T`, which is `Sync`, can be reached through a shared reference.
unsafe impl<T: ModuleEvents> Sync for ModuleNotifier<T> {}

impl<T: ModuleEvents> ModuleNotifier<T> {
    pub(crate) fn register(events: T) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // First, because the notifier may be called before its registration has returned.
            events,
            inner <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                // SAFETY: `slot` is valid for writes, and all zeroes is a valid notifier block. It
                // stays where it is, since `Self` is pinned, and `drop` unregisters it.
                to_result(unsafe {
                    ptr::write_bytes(slot, 0, 1);
                    (*slot).notifier_call = Some(Self::notify);
                    bindings::register_module_notifier(slot)
                })
            }),
        })
    }

    /// # Safety
    ///
    /// To be called by the module notifier chain only: `block` is the `inner` of a `Self`, and
    /// `module` points to a `struct module`.
    unsafe extern "C" fn notify(
        block: *mut bindings::notifier_block,
        state: c_ulong,
        module: *mut c_void,
    ) -> c_int {
        // SAFETY: `block` is the field of a pinned `Self`, which lives until we return, since
        // unregistering waits for running calls; `events` was initialised before the registration
        // and is never borrowed mutably.
        let events = unsafe {
            &(*kernel::container_of!(Opaque::cast_from(block).cast_mut(), Self, inner)).events
        };
        // SAFETY: A module's name is a string that ends in NUL and lasts as long as the module,
        // which is beyond this call.
        let name = unsafe {
            CStr::from_char_ptr(
                (&raw const (*module.cast::<bindings::module>()).name).cast::<c_char>(),
            )
        };
        match state as bindings::module_state {
            bindings::module_state_MODULE_STATE_LIVE => events.module_live(name),
            bindings::module_state_MODULE_STATE_GOING => events.module_going(name),
            _ => (),
        }
        bindings::NOTIFY_DONE as c_int
    }
}

#[pinned_drop]
impl<T: ModuleEvents> PinnedDrop for ModuleNotifier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered, by the invariant. The only error is ENOENT, for a block that is not.
        unsafe { bindings::unregister_module_notifier(self.inner.get()) };
    }
}
