// SPDX-License-Identifier: GPL-2.0

//! Functions of the kernel that are not exported.

use crate::bindings as shim;
use core::num::NonZeroUsize;
use kernel::prelude::*;

/// Where a function of the kernel, or of a module that is loaded, is. Process context, may sleep.
///
/// Fails with [`ENOENT`] if there is no function with that name, or more than one.
pub(crate) fn find(symbol: &'static CStr) -> Result<NonZeroUsize> {
    // SAFETY: A NUL-terminated constant.
    let address = unsafe { shim::exitpolicy_find_function(symbol.as_char_ptr()) };
    NonZeroUsize::new(address).ok_or(ENOENT)
}
