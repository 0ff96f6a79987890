// SPDX-License-Identifier: GPL-2.0

//! Safe wrappers that the `kernel` crate does not have yet.
//!
//! They know nothing of exit policies and are written as if they were in the `kernel` crate
//! already, where they belong one day.

pub(crate) mod capability;
pub(crate) mod cgroup;
pub(crate) mod file;
pub(crate) mod fprobe;
pub(crate) mod ftrace;
pub(crate) mod function;
pub(crate) mod kobject;
pub(crate) mod module_notifier;
pub(crate) mod module_ref;
pub(crate) mod process;
pub(crate) mod raw_spinlock;
pub(crate) mod tracepoint;
pub(crate) mod value_map;
