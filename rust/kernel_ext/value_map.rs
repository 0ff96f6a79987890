// SPDX-License-Identifier: GPL-2.0

//! A map from integers to small integers.
//!
//! C header: [`include/linux/xarray.h`](srctree/include/linux/xarray.h).

use core::ptr;
use kernel::{
    bindings,
    error::to_result,
    prelude::*,
    types::Opaque, //
};

/// An XArray whose entries are values rather than pointers.
///
/// As an entry is one word, readers need no lock and no lifetime: they see the old value or the
/// new one. [`ValueMap::get`] may therefore be called from any context; methods that change
/// something take the XArray's spinlock and belong in process context.
///
/// # Invariants
///
/// Every entry of `xa` was made by [`to_entry`].
#[pin_data(PinnedDrop)]
pub(crate) struct ValueMap {
    #[pin]
    xa: Opaque<bindings::xarray>,
}

// SAFETY: An XArray does its own locking and is bound to no thread.
unsafe impl Send for ValueMap {}
// SAFETY: As above.
unsafe impl Sync for ValueMap {}

/// `xa_mk_value()`. The top bit of `value` is lost.
fn to_entry(value: usize) -> *mut c_void {
    ptr::without_provenance_mut((value << 1) | 1)
}

/// `xa_to_value()`, for entries that may be missing.
fn from_entry(entry: *mut c_void) -> Option<usize> {
    (!entry.is_null()).then(|| entry.addr() >> 1)
}

impl ValueMap {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes; `xa_init_flags` initialises all of it. There is
            // no entry yet, which establishes the invariant.
            xa <- Opaque::ffi_init(|slot| unsafe { bindings::xa_init_flags(slot, 0) }),
        })
    }

    /// The value of `key`.
    pub(crate) fn get(&self, key: usize) -> Option<usize> {
        // SAFETY: `xa` is initialised. `xa_load` takes the RCU read lock itself.
        from_entry(unsafe { bindings::xa_load(self.xa.get(), key) })
    }

    /// Gives `key` a value, and returns the one that it had. Nothing changes on an error.
    pub(crate) fn insert(&self, key: usize, value: usize) -> Result<Option<usize>> {
        // SAFETY: `xa` is initialised, and we may sleep.
        let old = unsafe {
            bindings::xa_store(self.xa.get(), key, to_entry(value), bindings::GFP_KERNEL)
        };
        // SAFETY: `old` was returned by `xa_store`.
        to_result(unsafe { bindings::xa_err(old) })?;
        Ok(from_entry(old))
    }

    /// Replaces the value of `key` by what `f` makes of it, unless there is none, and returns the
    /// new value. `f` is called again if somebody else changed the value meanwhile.
    pub(crate) fn update(&self, key: usize, f: impl Fn(usize) -> usize) -> Option<usize> {
        let mut old = self.get(key)?;
        loop {
            let new = f(old);
            // SAFETY: `xa` is initialised. The XArray's lock is held around the call, as it must
            // be; the key has an entry or keeps having none, so that nothing is allocated.
            let seen = unsafe {
                bindings::xa_lock(self.xa.get());
                let seen =
                    bindings::__xa_cmpxchg(self.xa.get(), key, to_entry(old), to_entry(new), 0);
                bindings::xa_unlock(self.xa.get());
                seen
            };
            match from_entry(seen)? {
                value if value == old => return Some(new),
                value => old = value,
            }
        }
    }

    /// Removes `key`, and returns the value that it had.
    pub(crate) fn remove(&self, key: usize) -> Option<usize> {
        // SAFETY: `xa` is initialised.
        from_entry(unsafe { bindings::xa_erase(self.xa.get(), key) })
    }

    /// The first entry with a key above `key`.
    pub(crate) fn next_after(&self, key: usize) -> Option<(usize, usize)> {
        let mut index = key;
        // SAFETY: `xa` is initialised, `index` is valid for reads and writes.
        let entry = unsafe {
            bindings::xa_find_after(self.xa.get(), &mut index, usize::MAX, bindings::XA_PRESENT)
        };
        Some((index, from_entry(entry)?))
    }
}

#[pinned_drop]
impl PinnedDrop for ValueMap {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: `xa` is initialised, and nobody uses it any more. By the invariant its entries
        // own nothing.
        unsafe { bindings::xa_destroy(self.xa.get()) };
    }
}

#[kunit_tests(exitpolicy_value_map)]
mod tests {
    use super::*;

    fn map() -> Pin<KBox<ValueMap>> {
        KBox::pin_init(ValueMap::new(), GFP_KERNEL).expect("no memory")
    }

    #[test]
    fn insert_and_remove() {
        let map = map();
        assert_eq!(map.get(7), None);
        assert_eq!(map.insert(7, 0), Ok(None));
        assert_eq!(map.insert(7, 1), Ok(Some(0)));
        assert_eq!(map.get(7), Some(1));
        assert_eq!(map.remove(7), Some(1));
        assert_eq!(map.remove(7), None);
    }

    #[test]
    fn update_makes_nothing() {
        let map = map();
        assert_eq!(map.update(7, |value| value + 1), None);
        assert_eq!(map.get(7), None);
        assert_eq!(map.insert(7, 1), Ok(None));
        assert_eq!(map.update(7, |value| value + 1), Some(2));
        assert_eq!(map.get(7), Some(2));
    }

    #[test]
    fn walk_in_order() {
        let map = map();
        let far = usize::MAX >> 1;
        for key in [far, 1, 70_000, 64] {
            assert_eq!(map.insert(key, key & 0xff), Ok(None));
        }
        let mut last = 0;
        for key in [1, 64, 70_000, far] {
            assert_eq!(map.next_after(last), Some((key, key & 0xff)));
            last = key;
        }
        assert_eq!(map.next_after(last), None);
    }
}
