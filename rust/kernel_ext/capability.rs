// SPDX-License-Identifier: GPL-2.0

//! Capabilities of the current task.
//!
//! C header: [`include/linux/capability.h`](srctree/include/linux/capability.h).

use kernel::{
    bindings,
    prelude::*, //
};

/// Succeeds if the current task has CAP_SYS_ADMIN in the initial user namespace, and fails with
/// [`EPERM`] if not. May be called from process context only.
pub(crate) fn require_sys_admin() -> Result {
    // SAFETY: An FFI call without requirements beyond process context: it asks about `current`.
    if unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as c_int) } {
        Ok(())
    } else {
        Err(EPERM)
    }
}
