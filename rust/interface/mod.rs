// SPDX-License-Identifier: GPL-2.0

//! What is seen from outside: the ioctls, sysfs, and the tracepoint. All show the same state.

pub(crate) mod chardev;
pub(crate) mod sysfs;
pub(crate) mod trace;
