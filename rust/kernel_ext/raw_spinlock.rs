// SPDX-License-Identifier: GPL-2.0

//! A kernel raw spinlock, for sections that must not sleep on PREEMPT_RT either.
//!
//! C header: [`include/linux/spinlock.h`](srctree/include/linux/spinlock.h).

use crate::bindings;
use kernel::{
    ffi::{
        c_char,
        c_ulong, //
    },
    sync::lock, //
};

/// A `raw_spinlock_t` that protects a value. Interrupts are disabled while it is held: who takes it
/// in process context only may still do so with another lock held that interrupts take.
pub(crate) type RawSpinLock<T> = lock::Lock<T, RawSpinLockBackend>;

/// Creates a [`RawSpinLock`] initialiser with the given name and a newly-created lock class.
macro_rules! new_raw_spinlock {
    ($inner:expr, $name:literal) => {
        $crate::kernel_ext::raw_spinlock::RawSpinLock::new(
            $inner,
            kernel::optional_name!($name),
            kernel::static_lock_class!(),
        )
    };
}
pub(crate) use new_raw_spinlock;

/// A kernel `raw_spinlock_t` lock backend.
pub(crate) struct RawSpinLockBackend;

// SAFETY: A raw spinlock gives mutual exclusion and disables preemption while it is held. `relock`
// is the default, which locks in the same way. What interrupts were like is in the guard's state.
unsafe impl lock::Backend for RawSpinLockBackend {
    type State = bindings::raw_spinlock;
    type GuardState = c_ulong;

    unsafe fn init(
        ptr: *mut Self::State,
        name: *const c_char,
        key: *mut kernel::bindings::lock_class_key,
    ) {
        // SAFETY: The caller promises that `ptr` is valid for writes, and that `name` and `key`
        // stay valid for ever.
        unsafe { bindings::exitpolicy_raw_spin_lock_init(ptr, name, key.cast()) }
    }

    unsafe fn lock(ptr: *mut Self::State) -> Self::GuardState {
        // SAFETY: The caller promises that the lock has been initialised.
        unsafe { bindings::exitpolicy_raw_spin_lock_irqsave(ptr) }
    }

    unsafe fn try_lock(ptr: *mut Self::State) -> Option<Self::GuardState> {
        let mut flags = 0;
        // SAFETY: The caller promises that the lock has been initialised.
        unsafe { bindings::exitpolicy_raw_spin_trylock_irqsave(ptr, &mut flags) }.then_some(flags)
    }

    unsafe fn unlock(ptr: *mut Self::State, flags: &Self::GuardState) {
        // SAFETY: The caller promises that it owns the lock.
        unsafe { bindings::exitpolicy_raw_spin_unlock_irqrestore(ptr, *flags) }
    }

    unsafe fn assert_is_held(ptr: *mut Self::State) {
        // SAFETY: The caller promises that the lock has been initialised.
        unsafe { bindings::exitpolicy_raw_spin_assert_held(ptr) }
    }
}
