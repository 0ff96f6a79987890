// SPDX-License-Identifier: GPL-2.0

//! Names of cgroups, in the hierarchy of the host that this runs on. Cgroups are opened and no more.

#![no_main]

use exitpolicy::{
    cgroup::Hierarchy,
    Host, //
};
use libfuzzer_sys::fuzz_target;
use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::LazyLock, //
};

static HIERARCHY: LazyLock<Hierarchy> =
    LazyLock::new(|| Hierarchy::find(&Host::default()).expect("this needs cgroup v2"));

fuzz_target!(|name: &[u8]| {
    let name = Path::new(OsStr::from_bytes(name));
    match HIERARCHY.open(name) {
        Ok(cgroup) => {
            assert!(cgroup.path().is_absolute(), "{name:?}: {cgroup:?}");
            // Whatever it was called, its path names it.
            if let Ok(again) = HIERARCHY.open(cgroup.path()) {
                assert_eq!(again.id(), cgroup.id(), "{name:?}: {cgroup:?}");
            }
        }
        Err(error) => {
            assert!(!error.to_string().is_empty() && !error.code().is_empty());
            let _ = error.hint();
        }
    }
});
