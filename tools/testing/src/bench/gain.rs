// SPDX-License-Identifier: GPL-2.0

//! What passing an exit through saves the guest.

use anyhow::{
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use figures::{
    gain::{
        GROUP,
        PASSED,
        TRAPPED, //
    },
    Absent,
    Figure, //
};

use super::{
    ensure_comparable_tscs,
    why_not_here,
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

const MSR_CORE_C6_RESIDENCY: u32 = 0x3fd;
const MSR_IA32_APERF: u32 = 0xe8;

/// Something that an exit costs.
struct Case {
    name: &'static str,
    exit: Exits,
    works: Vec<Work>,
}

impl Case {
    /// The reasons that exits by the instruction itself have, and not those that arm a timer or end
    /// an interrupt.
    fn reasons(&self) -> &'static [&'static str] {
        match self.exit {
            Exits::HLT => &["HLT"],
            Exits::MWAIT => &["MONITOR", "MWAIT"],
            Exits::PAUSE => &["PAUSE"],
            // SVM has one for reads and writes.
            _ => &["RDMSR", "MSR"],
        }
    }
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
            name: "spin lock: release to the waiter, who loops with PAUSE",
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
    for case in cases(count) {
        let (own, Case { name, exit, works }) = (case.reasons(), case);
        let why_not = match why_not_here(works.len())? {
            None if !possible.contains(exit) => {
                Some(format!("{exit} cannot be changed on this host"))
            }
            why => why,
        };
        if let Some(reason) = why_not {
            absent.push(Absent::new(GROUP, name, reason));
            continue;
        }
        let mut pair = Vec::new();
        let mut what_else = "";
        for (case, disable) in [(TRAPPED, Exits::NONE), (PASSED, exit)] {
            let cgroup = Cgroup::new("bench-gain")?;
            ioctl::set_policy(&cgroup, disable, Exits::ALL)?;
            let mut rig = Rig::new(&cgroup, works.len())?;
            let what = || format!("{name}, {case}");
            let mut figure = rig
                .measure(&works)
                .with_context(what)?
                .figure(GROUP, name, case)?;
            if rig.faults() > 0 {
                // Trapped, it is KVM that knows nothing of the MSR.
                what_else = match disable == exit {
                    false => "; trapped, #GP and its handler, too",
                    true => " that this CPU lacks: #GP and its handler",
                };
            }
            let reasons = rig.reasons(&works).with_context(what)?;
            let own = own.iter().filter_map(|reason| reasons.get(*reason));
            // A sum of none would be -0.
            figure.own = Some(own.fold(0.0, |sum, count| sum + count));
            figure.reasons = reasons;
            pair.push(figure);
        }
        for figure in &mut pair {
            figure.name += what_else;
        }
        figures.extend(pair);
    }
    Ok((figures, absent))
}
