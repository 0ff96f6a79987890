// SPDX-License-Identifier: GPL-2.0

//! /proc/self/mountinfo, which has paths that anybody may have chosen.

#![no_main]

use exitpolicy::{
    cgroup::Hierarchy,
    Host, //
};
use libfuzzer_sys::fuzz_target;
use std::{
    fs,
    sync::LazyLock, //
};

static ROOT: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let root = tempfile::tempdir().expect("a directory");
    fs::create_dir_all(root.path().join("proc/self")).expect("a directory");
    root
});

fuzz_target!(|mounts: &[u8]| {
    fs::write(ROOT.path().join("proc/self/mountinfo"), mounts).expect("a file");
    // Nothing is mounted below that root; what is said about it must be said.
    if let Err(error) = Hierarchy::find(&Host::new(ROOT.path())) {
        assert!(!error.to_string().is_empty() && error.hint().is_some());
    }
});
