// SPDX-License-Identifier: GPL-2.0

//! Finds the VMs that are older than the module.
//!
//! KVM's list of VMs is not exported. But a VM is a file, that some process has open, or its vCPUs
//! are. One that no process has open, as it is on its way from one to another, is found when a vCPU
//! of it recalculates its intercepts, or when it gets another.

use crate::{
    bindings,
    engine::Engine,
    kvm::{
        self,
        Identity, //
    },
};
use kernel::{
    prelude::*,
    task::Task, //
};

struct Search<'a> {
    engine: &'a Engine,
    identity: &'a Identity,
    found: u32,
}

/// Takes on the VMs that there are, and returns how many of their files, and of their vCPUs', were found.
/// `identity` is what tells such a file.
pub(crate) fn adopt_open_vms(engine: &Engine, identity: &Identity) -> u32 {
    let mut search = Search {
        engine,
        identity,
        found: 0,
    };
    // SAFETY: `look_at` is called during this call only, in this thread, with `search`.
    unsafe {
        bindings::exitpolicy_walk_open_files(Some(look_at), (&raw mut search).cast());
    }
    search.found
}

/// # Safety
///
/// `search` must point to a `Search` that nobody else uses; `file` and `task` must be valid, and
/// stay so until this returns, with the task's lock held.
unsafe extern "C" fn look_at(
    search: *mut c_void,
    file: *mut bindings::file,
    task: *mut bindings::task_struct,
) -> c_int {
    // SAFETY: By the safety requirements.
    let search = unsafe { &mut *search.cast::<Search<'_>>() };
    // SAFETY: By the safety requirements. The file's table is locked, so that the file, and with it
    // the VM, stays.
    if let Some(vm) = unsafe { kvm::Vm::of_file(file, search.identity) } {
        // Others may have it open too; KVM lets nobody use it who has another address space.
        // SAFETY: By the safety requirements; the task's lock, which is held, keeps its `mm`.
        let owner = unsafe { (*task.cast::<kernel::bindings::task_struct>()).mm }.addr() == vm.mm();
        if owner && vm.online_vcpus() != 0 {
            search.found += 1;
            // SAFETY: By the safety requirements; `Task` is a transparent wrapper. The VM stays,
            // as above, and a vCPU is online.
            unsafe { search.engine.adopt(vm, &*task.cast::<Task>()) };
        }
    }
    0
}
