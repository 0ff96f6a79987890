// SPDX-License-Identifier: GPL-2.0

//! The module's unit tests, which run when it is loaded into a kernel with KUnit. That none fails
//! is looked at in every test, by the kernel's log.

use std::path::Path;

use anyhow::{
    ensure,
    Result, //
};
use testing::{
    kernel_log::KernelLog,
    modules::{
        self,
        EXITPOLICY, //
    }, //
};

use crate::Test;

/// All of them, and how many tests each has.
const SUITES: [(&str, u32); 2] = [("exitpolicy_build_id", 3), ("exitpolicy_value_map", 3)];

pub fn tests() -> Vec<Test> {
    let has_kunit = Path::new("/sys/module/kunit").exists();
    vec![Test::new("kunit::all_suites_run", all_suites_run).ignored(!has_kunit)]
}

fn all_suites_run() -> Result<()> {
    modules::unload(EXITPOLICY)?;
    let mut log = KernelLog::from_now()?;
    modules::load(EXITPOLICY)?;
    let lines = log.lines()?;
    for (suite, count) in SUITES {
        // "ok 1 name", and before that "# name: pass:3 fail:0 skip:0 total:3".
        let ended = |line: &String| line.starts_with("ok ") && line.ends_with(&format!(" {suite}"));
        let passed = format!("# {suite}: pass:{count} fail:0 skip:0 total:{count}");
        ensure!(
            lines.iter().any(ended) && lines.contains(&passed),
            "{suite} did not pass, or not all of it ran:\n{}",
            lines.join("\n")
        );
    }
    Ok(())
}
