// SPDX-License-Identifier: GPL-2.0

//! The tracepoint `exitpolicy:exitpolicy_decision`; its format is in `bindings/trace.h`.

use crate::{
    bindings,
    policy::{
        Decision,
        Exits, //
    }, //
};

/// A decision on a VM.
pub(crate) struct Decided {
    /// The VM's id, or 0 if there was no memory to remember it.
    pub(crate) vm: u64,
    pub(crate) cgroup: u64,
    pub(crate) pid: u32,
    pub(crate) floor: Exits,
    pub(crate) requested: Exits,
    pub(crate) decision: Decision,
}

/// Tells tracers of a decision. Any context.
pub(crate) fn decision(decided: &Decided) {
    let decision = bindings::exitpolicy_decision {
        vm: decided.vm,
        cgroup: decided.cgroup,
        pid: decided.pid,
        floor: decided.floor.bits(),
        requested: decided.requested.bits(),
        effective: decided.decision.effective.bits(),
        clamped: decided.decision.clamped.bits(),
    };
    // SAFETY: Read during the call only.
    unsafe { bindings::exitpolicy_trace_decision(&decision) };
}
