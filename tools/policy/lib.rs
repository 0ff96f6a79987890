// SPDX-License-Identifier: GPL-2.0

//! The policy algebra, compiled for user space from the files that the kernel module compiles.

#![no_std]

#[path = "../../rust/policy/mod.rs"]
mod policy;

pub use policy::*;
