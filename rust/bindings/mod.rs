// SPDX-License-Identifier: GPL-2.0

//! Generated bindings. Not used directly: `kernel_ext`, `kvm` and `interface` are the safe faces.

#![allow(
    clippy::all,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    improper_ctypes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    unused_imports
)]

use kernel::ffi;

include!(concat!(
    env!("EXITPOLICY_BINDINGS"),
    "/bindings_generated.rs"
));
