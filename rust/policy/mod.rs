// SPDX-License-Identifier: GPL-2.0

//! What a policy is and what follows from it: pure, without the kernel, without allocation.
//!
//! The module compiles this folder as one of its own modules; the command and the host tests
//! compile the same files as the crate `exitpolicy-policy` (`tools/policy`).

mod exits;
pub mod live;
#[allow(clippy::module_inception)]
mod policy;

pub use exits::{Exits, ParseExitsError};
pub use policy::{Decision, Policy, Resolved};
