// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/exitpolicy`. Each file is described in
//! `Documentation/ABI/testing/sysfs-kernel-exitpolicy`.

pub(crate) mod entries;
pub(crate) mod root;

use crate::{
    kernel_ext::{
        cgroup::{
            all_visible,
            Cgroup, //
        },
        kobject::Output, //
    },
    policy::Exits, //
};
use kernel::{
    bindings,
    fmt::Write,
    prelude::*, //
};

/// Writes what [`Display`](kernel::fmt::Display) makes of a value.
fn show(out: &mut Output<'_>, value: impl kernel::fmt::Display) -> Result {
    out.write_fmt(fmt!("{}", value)).map_err(|_| ENOSPC)
}

fn parse(text: &[u8]) -> Result<Exits> {
    let text = core::str::from_utf8(text).map_err(|_| EINVAL)?;
    text.parse().map_err(|_| EINVAL)
}

/// Writes a cgroup's path as the reader's cgroup namespace has it, or `removed`, or `hidden` if it
/// is outside of that namespace or removed.
fn show_path(out: &mut Output<'_>, cgroup: u64) -> Result {
    match Cgroup::from_id(cgroup) {
        Ok(cgroup) => {
            let mut buffer = KVec::from_elem(0, bindings::PATH_MAX as usize, GFP_KERNEL)?;
            out.write_bytes(cgroup.path(&mut buffer)?.to_bytes())
        }
        Err(ENOENT) if all_visible() => out.write_bytes(b"removed"),
        Err(ENOENT) => out.write_bytes(b"hidden"),
        Err(error) => Err(error),
    }
}
