// SPDX-License-Identifier: GPL-2.0

//! The tracepoint `exitpolicy:exitpolicy_decision`; its format is in `bindings/trace.h`.

use crate::{
    bindings,
    vm::Record, //
};

/// Tells tracers of a decision. Any context.
pub(crate) fn decision(record: &Record) {
    let decision = bindings::exitpolicy_decision {
        vm: record.id,
        cgroup: record.cgroup,
        pid: record.pid,
        floor: record.floor.bits(),
        requested: record.requested.bits(),
        effective: record.effective.bits(),
        clamped: record.clamped.bits(),
    };
    // SAFETY: Read during the call only.
    unsafe { bindings::exitpolicy_trace_decision(&decision) };
}
