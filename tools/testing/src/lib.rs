// SPDX-License-Identifier: GPL-2.0

//! A small VMM, and what the tests need around it.

pub mod bench;
pub mod cgroup;
pub mod client;
pub mod exits;
pub mod faults;
pub mod fuzz;
pub mod interface;
pub mod kernel_log;
pub mod modules;
pub mod nested;
pub mod payload;
pub mod selftests;
pub mod server;
pub mod stats;
pub mod timed;
pub mod uapi;
pub mod vmm;

use std::{
    thread,
    time::Duration, //
};

/// How often something that happens soon is looked for, with a [`pause`] between. Counted, as time
/// in an emulated host says little.
pub const POLLS: usize = 20_000;

/// A moment for others to do their work.
pub fn pause() {
    thread::sleep(Duration::from_millis(5));
}

/// Waits until something is so, and says whether it became so.
pub fn soon(mut is_so: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<bool> {
    for _ in 0..POLLS {
        if is_so()? {
            return Ok(true);
        }
        pause();
    }
    Ok(false)
}
