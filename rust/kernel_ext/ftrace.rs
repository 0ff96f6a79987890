// SPDX-License-Identifier: GPL-2.0

//! Whether ftrace works.
//!
//! C header: [`include/linux/ftrace.h`](srctree/include/linux/ftrace.h).

use crate::bindings as shim;

/// Whether the kernel has given ftrace up after a fault in it, for good: no probe that stands on it
/// is called any more. May sleep.
pub(crate) fn is_dead() -> bool {
    // SAFETY: No requirements but that it may sleep.
    unsafe { shim::exitpolicy_ftrace_is_dead() }
}
