// SPDX-License-Identifier: GPL-2.0

//! What ftrace says: which functions are hooked and how, and the tracepoint of a decision.

use std::{
    fs,
    path::Path, //
};

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use testing::{
    cgroup::Cgroup,
    client::Vmm,
    exits::{
        hooked_functions,
        Vendor,
        TRACEFS, //
    },
    interface::{
        self,
        ioctl,
        VmView, //
    }, //
};

use crate::Test;

pub fn tests(vendor: Vendor) -> Vec<Test> {
    vec![
        Test::new("tracing::hooks", move || hooks(vendor)),
        Test::new("tracing::decision", decision),
    ]
}

/// Five functions are hooked, none of them on the entry/exit path, and not by function-graph,
/// which would cost every thread of the host a shadow stack.
fn hooks(vendor: Vendor) -> Result<()> {
    let vmx_or_svm = vendor.name();
    let expected = [
        "kvm_set_cpuid".to_string(),
        format!("{vmx_or_svm}_recalc_intercepts"),
        format!("{vmx_or_svm}_vcpu_create"),
        format!("{vmx_or_svm}_vcpu_free"),
        format!("{vmx_or_svm}_vm_destroy"),
    ];
    let hooked = hooked_functions()?;
    let mut names: Vec<&str> = hooked
        .iter()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    names.sort_unstable();
    ensure!(names == expected, "hooked are {hooked:#?}");
    for line in &hooked {
        ensure!(
            line.contains("fprobe_ftrace_entry"),
            "not an entry handler: {line}"
        );
        ensure!(!line.contains("graph"), "function-graph: {line}");
    }
    Ok(())
}

/// One event for each decision, with what the interfaces show.
fn decision() -> Result<()> {
    let event = Path::new(TRACEFS).join("events/exitpolicy/exitpolicy_decision");
    let format = fs::read_to_string(event.join("format")).context("there is no such event")?;
    for field in [
        "vm",
        "cgroup",
        "pid",
        "floor",
        "requested",
        "effective",
        "clamped",
    ] {
        ensure!(
            format.lines().any(|line| line
                .split(';')
                .next()
                .is_some_and(|field_line| field_line.ends_with(&format!(" {field}")))),
            "no field {field} in {format}"
        );
    }
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, !Exits::PAUSE)?;

    let (view, lines) = decisions_in(|| {
        let mut vmm = Vmm::start(&cgroup)?;
        let vm = vmm.create_vm()?;
        vmm.disable_exits(vm, Exits::PAUSE)?;
        // Two vCPUs, one decision.
        vmm.create_vcpu(vm, 0)?;
        vmm.create_vcpu(vm, 1)?;
        let view = interface::only_vm()?;
        vmm.kill()?;
        Ok::<VmView, anyhow::Error>(view)
    })?;

    let view = view?;
    ensure!(view.effective.contains(Exits::HLT), "{view:?}");
    ensure!(view.requested == view.clamped, "{view:?}");
    ensure!(lines.len() == 1, "not one event: {lines:#?}");
    let expected = [
        format!("vm={}", view.id),
        format!("cgroup={}", cgroup.id()?),
        format!("pid={}", view.pid),
        format!("floor={}", view.floor),
        format!("requested={}", view.requested),
        format!("effective={}", view.effective),
        format!("clamped={}", view.clamped),
    ];
    for expected in expected {
        ensure!(has(&lines[0], &expected), "no {expected} in {}", lines[0]);
    }
    Ok(())
}

/// The events of decisions that there are while something is done.
pub fn decisions_in<T>(body: impl FnOnce() -> T) -> Result<(T, Vec<String>)> {
    let enable = Path::new(TRACEFS).join("events/exitpolicy/exitpolicy_decision/enable");
    let trace = Path::new(TRACEFS).join("trace");
    fs::write(&trace, "")?;
    fs::write(&enable, "1")?;
    let result = body();
    fs::write(&enable, "0")?;
    let text = fs::read_to_string(&trace)?;
    fs::write(&trace, "")?;
    let lines = text.lines().map(str::to_string);
    let events = lines.filter(|line| line.contains("exitpolicy_decision:"));
    Ok((result, events.collect()))
}

/// Whether an event says this, as "field=value". It has the same names of exits as everybody, with
/// '|' or ',' between them.
pub fn has(event: &str, what: &str) -> bool {
    let mut words = event.split_whitespace();
    words.any(|word| word.replace('|', ",") == what)
}
