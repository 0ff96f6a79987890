// SPDX-License-Identifier: GPL-2.0

//! What passing an exit through saves the guest.

use anyhow::{
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use figures::{
    Absent,
    Figure, //
};

use super::{
    ensure_comparable_tscs,
    is_for_this_host,
    Rig, //
};
use crate::{
    cgroup::Cgroup,
    interface::ioctl,
    timed::{
        Operation,
        Work, //
    },
    uapi::Device, //
};

pub const GROUP: &str = "gain";
const MSR_CORE_C6_RESIDENCY: u32 = 0x3fd;
const MSR_IA32_APERF: u32 = 0xe8;

/// Something that an exit costs.
struct Case {
    name: &'static str,
    exit: Exits,
    works: Vec<Work>,
}

fn cases(count: u32) -> Vec<Case> {
    let one = |operation| vec![Work::new(operation, count)];
    let two = |first, second| vec![Work::new(first, count), Work::new(second, count)];
    let rdmsr = |msr| {
        vec![Work {
            msr,
            ..Work::new(Operation::Rdmsr, count)
        }]
    };
    vec![
        Case {
            name: "HLT, woken by an IPI",
            exit: Exits::HLT,
            works: two(Operation::SendIpi, Operation::WaitHlt),
        },
        Case {
            name: "HLT, woken by its timer",
            exit: Exits::HLT,
            works: one(Operation::Timer),
        },
        Case {
            name: "MWAIT, woken by a store",
            exit: Exits::MWAIT,
            works: two(Operation::SendStore, Operation::WaitMwait),
        },
        Case {
            name: "spin lock handed over, PAUSE",
            exit: Exits::PAUSE,
            works: two(Operation::SendStore, Operation::WaitPause),
        },
        Case {
            name: "read of a C-state counter",
            exit: Exits::CSTATE,
            works: rdmsr(MSR_CORE_C6_RESIDENCY),
        },
        Case {
            name: "read of APERF",
            exit: Exits::APERFMPERF,
            works: rdmsr(MSR_IA32_APERF),
        },
    ]
}

/// Each operation that is to be measured on this host, trapped and native.
pub fn measure(count: u32) -> Result<(Vec<Figure>, Vec<Absent>)> {
    ensure_comparable_tscs()?;
    let info = Device::open()?.info()?;
    let possible = Exits::from_bits_truncate(info.supported & !info.floor);
    let (mut figures, mut absent) = (Vec::new(), Vec::new());
    for Case { name, exit, works } in cases(count) {
        if !is_for_this_host(works.len())? {
            continue;
        }
        if !possible.contains(exit) {
            absent.push(Absent {
                group: GROUP.to_string(),
                name: name.to_string(),
                reason: format!("{exit} cannot be changed on this host"),
            });
            continue;
        }
        let mut pair = Vec::new();
        let mut faults = false;
        for (case, disable) in [("trapped", Exits::NONE), ("native", exit)] {
            let cgroup = Cgroup::new("bench-gain")?;
            ioctl::set_policy(&cgroup, disable, Exits::ALL)?;
            let mut rig = Rig::new(&cgroup, works.len())?;
            let what = || format!("{name}, {case}");
            let mut figure = rig
                .measure(&works)
                .with_context(what)?
                .figure(GROUP, name, case)?;
            // Trapped, it may be KVM that knows nothing of the MSR.
            if disable == exit && rig.faults() > 0 {
                faults = true;
            }
            figure.reasons = rig.reasons(&works).with_context(what)?;
            pair.push(figure);
        }
        for figure in &mut pair {
            if faults {
                figure.name = format!("{name} that this CPU lacks: #GP");
            }
        }
        figures.extend(pair);
    }
    Ok((figures, absent))
}
