// SPDX-License-Identifier: GPL-2.0

//! References on a module.
//!
//! C header: [`include/linux/module.h`](srctree/include/linux/module.h).

use kernel::{
    bindings,
    ThisModule, //
};

/// Keeps a module from being unloaded.
///
/// Whoever drops the last one while its code runs needs another reason for which the code stays.
///
/// # Invariants
///
/// We have a reference on the module.
pub(crate) struct ModuleRef(&'static ThisModule);

impl ModuleRef {
    /// Fails if the module is being unloaded. Any context.
    pub(crate) fn get(module: &'static ThisModule) -> Option<Self> {
        // SAFETY: A module that has this exists.
        let got = unsafe { bindings::try_module_get(module.as_ptr()) };
        // INVARIANT: Just got. Not made before that is known: dropping it puts the reference.
        got.then(|| Self(module))
    }
}

impl Drop for ModuleRef {
    fn drop(&mut self) {
        // SAFETY: The reference is ours, by the type invariant.
        unsafe { bindings::module_put(self.0.as_ptr()) };
    }
}
