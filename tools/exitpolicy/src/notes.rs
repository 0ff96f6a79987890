// SPDX-License-Identifier: GPL-2.0

//! What to tell someone whose request was carried out, and may not do what was expected.

use crate::output::Note;
use exitpolicy::{
    device::{
        Info,
        Vendor,
        Vm, //
    },
    doctor,
    live::{
        Refusal,
        Vcpu, //
    },
    policy::{
        Exits,
        Policy,
        Resolved, //
    },
    Error,
    Host, //
};
use rustix::io::Errno;

/// What is known when a policy was just set.
pub struct Situation {
    pub info: Info,
    pub policy: Policy,
    pub resolved: Resolved,
    pub surroundings: Surroundings,
}

/// What of the host makes native idling mean more than that.
#[derive(Clone, Copy, Default)]
pub struct Surroundings {
    /// See [`doctor::is_exposed_to_smt_rsb`].
    pub exposed_to_smt_rsb: bool,
    /// See [`doctor::swaps`].
    pub swaps: bool,
}

impl Surroundings {
    pub fn of(host: &Host) -> Self {
        Self {
            exposed_to_smt_rsb: doctor::is_exposed_to_smt_rsb(host),
            swaps: doctor::swaps(host),
        }
    }
}

fn note(code: &'static str, message: impl Into<String>) -> Note {
    Note {
        code,
        message: message.into(),
    }
}

/// Notes on a policy that was just set.
pub fn on_policy(situation: &Situation) -> Vec<Note> {
    let Situation {
        info,
        policy,
        resolved,
        ..
    } = situation;
    let mut notes = Vec::new();

    if !info.enabled {
        notes.push(off());
    }
    if info.vendor.is_none() {
        notes.push(note(
            "no_vendor",
            "neither kvm_amd nor kvm_intel is in use: which of these exits KVM can disable is \
             not known yet",
        ));
    }
    let unsupported = policy.disable & !info.supported & !info.floor;
    if info.vendor.is_some() && !unsupported.is_empty() {
        notes.push(unsupported_note(unsupported));
    }
    let own = policy.disable & !policy.allow;
    if !own.is_empty() {
        notes.push(note(
            "not_allowed",
            format!("{own} is in \"disable\" but not in \"allow\": VMs do not get it"),
        ));
    }
    let above = policy.disable & policy.allow & !resolved.allow;
    if !above.is_empty() {
        notes.push(note(
            "not_allowed_above",
            format!(
                "a cgroup above does not allow {above}: VMs do not get it; 'exitpolicy policy \
                 show --effective' says which",
            ),
        ));
    }

    let given = policy.disable & resolved.allow & info.supported;
    notes.extend(on_given(info, given, situation.surroundings));
    notes
}

/// Notes on an override that was just set, to `disable`. `wanted` is what came of it.
pub fn on_override(
    info: &Info,
    disable: Exits,
    wanted: Exits,
    surroundings: Surroundings,
) -> Vec<Note> {
    if !info.enabled {
        return vec![off()];
    }
    let mut notes = Vec::new();
    let unsupported = disable & !wanted & !info.supported;
    if !unsupported.is_empty() {
        notes.push(unsupported_note(unsupported));
    }
    let not_allowed = disable & !wanted & info.supported;
    if !not_allowed.is_empty() {
        notes.push(note(
            "not_allowed_above",
            format!(
                "a cgroup of the VM does not allow {not_allowed}: it is not given; 'exitpolicy \
                 policy show --effective' says which",
            ),
        ));
    }
    let given = disable & wanted & info.supported;
    notes.extend(on_given(info, given, surroundings));
    notes
}

fn unsupported_note(unsupported: Exits) -> Note {
    note(
        "unsupported",
        format!(
            "KVM cannot disable {unsupported} on this host: VMs do not get it; 'exitpolicy \
             doctor' says more",
        ),
    )
}

/// What it means to be given these exits.
fn on_given(info: &Info, given: Exits, surroundings: Surroundings) -> Vec<Note> {
    let mut notes = Vec::new();
    let idle = given & (Exits::HLT | Exits::MWAIT);
    if !idle.is_empty() {
        notes.push(note(
            "busy",
            format!("with {idle}, the host sees an idle vCPU as 100 % busy"),
        ));
    }
    let hidden = given & (Exits::MWAIT | Exits::APERFMPERF);
    if !hidden.is_empty() {
        notes.push(note(
            "needs_vmm",
            format!(
                "only guests whose VMM exposes it use {hidden}: KVM never advertises MWAIT, and \
                 clears CPUID leaf 6 ECX",
            ),
        ));
    }
    if given.contains(Exits::MWAIT) && info.vendor == Some(Vendor::Vmx) {
        notes.push(note(
            "preemption_timer",
            "with mwait, VMs do without the VMX preemption timer: their timers are the host's \
             hrtimers, which cost more, whether they use MWAIT or not",
        ));
    }
    notes.extend(on_surroundings(given, surroundings));
    notes
}

/// What it means on this host that VMs have, or can have, these exits.
fn on_surroundings(exits: Exits, surroundings: Surroundings) -> Vec<Note> {
    let smt_rsb = surroundings.exposed_to_smt_rsb.then(|| smt_rsb(exits));
    let async_pf = surroundings.swaps.then(|| async_pf(exits));
    [smt_rsb, async_pf]
        .into_iter()
        .flatten()
        .flatten()
        .collect()
}

/// Notes on the state of the module.
pub fn on_status(info: &Info, surroundings: Surroundings) -> Vec<Note> {
    let mut notes = Vec::new();
    if info.missed > 0 {
        notes.push(note(
            "missed",
            format!(
                "{} VMs or vCPUs had no decision, or were lost sight of: see what the kernel log \
                 says of exitpolicy",
                info.missed,
            ),
        ));
    }
    if !info.enabled && info.holding > 0 {
        notes.push(on_holders(&[], info.holding));
    }
    notes.extend(on_surroundings(info.supported, surroundings));
    notes
}

/// The note on a change that is not for VMs that run.
pub fn on_new_only() -> Note {
    note(
        "running_vms",
        "this is for VMs that start from now on; those that run keep what they have",
    )
}

/// What to say of vCPUs that are on their way: of each VM a note.
pub fn on_stragglers(stragglers: &[Vcpu]) -> Vec<Note> {
    stragglers
        .chunk_by(|one, next| one.vm == next.vm)
        .map(|vcpus| {
            let vm = vcpus[0].vm;
            note(
                "on_their_way",
                format!(
                    "still on their way in VM {vm}: {}; 'exitpolicy vm show {vm}' says when they \
                     have arrived",
                    vcpus_in_words(vcpus),
                ),
            )
        })
        .collect()
}

/// As in "vCPU 0 (pending), vCPU 3 (at next entry)".
pub fn vcpus_in_words(vcpus: &[Vcpu]) -> String {
    let words: Vec<_> = vcpus
        .iter()
        .map(|vcpu| format!("vCPU {} ({vcpu})", vcpu.id))
        .collect();
    words.join(", ")
}

/// The note on a VM that is refused what it should have, if it is.
pub fn on_refused(vm: &Vm, vcpus: &[Vcpu]) -> Option<Note> {
    let withheld = vm.withheld(vcpus);
    let reason = vm
        .refusal
        .or_else(|| vcpus.iter().find_map(|vcpu| vcpu.refusal))
        .unwrap_or(Refusal::Unknown);
    (!withheld.is_empty()).then(|| {
        note(
            "refused",
            format!(
                "a change of {withheld} in VM {} is refused ({reason}): stop the VM and start it \
                 again to have it",
                vm.id,
            ),
        )
    })
}

/// The note that VMs keep the module in the kernel. They are all known, or only their number is.
pub fn on_holders(holders: &[u64], number: u64) -> Note {
    note(
        "holding",
        format!(
            "not yet as the VMM asked for: {}; until then the module cannot be unloaded",
            vms_in_words(holders, number),
        ),
    )
}

/// As in "2 VMs (3, 7)".
pub fn vms_in_words(vms: &[u64], number: u64) -> String {
    let number = number.max(vms.len() as u64);
    let noun = if number == 1 { "VM" } else { "VMs" };
    if vms.is_empty() {
        return format!("{number} {noun}");
    }
    let ids: Vec<_> = vms.iter().map(ToString::to_string).collect();
    format!("{number} {noun} ({})", ids.join(", "))
}

/// The note that VMs which the module does not know cannot be seen.
pub fn on_unmanaged_unknown(error: &Error) -> Note {
    let todo = match error {
        Error::Os {
            errno: Errno::NOENT,
            ..
        } => "; mount it with 'mount -t debugfs none /sys/kernel/debug'",
        _ => "",
    };
    note(
        "unmanaged_unknown",
        format!("{error}: VMs that the module does not know are not shown{todo}"),
    )
}

/// The note that nothing is applied.
pub fn off() -> Note {
    note(
        "off",
        "policies are switched off: VMs are as their VMMs made them until 'exitpolicy on'",
    )
}

/// The note that the module sees other policies than this process.
pub fn differs(disable: Exits, allow: Exits) -> Note {
    note(
        "differs",
        format!(
            "the module says disable {disable}, allow {allow}: a policy changed meanwhile, or one \
             above the root of this cgroup namespace, which cannot be seen from here, adds to it",
        ),
    )
}

fn smt_rsb(exits: Exits) -> Option<Note> {
    let exits = exits & (Exits::HLT | Exits::MWAIT | Exits::CSTATE);
    (!exits.is_empty()).then(|| {
        note(
            "smt_rsb",
            format!(
                "this CPU has the cross-thread return address bug, and SMT: with {exits}, a guest \
                 can attack its sibling thread; 'exitpolicy doctor' says what to do",
            ),
        )
    })
}

/// x86.c: kvm_can_do_async_pf().
fn async_pf(exits: Exits) -> Option<Note> {
    exits.contains(Exits::HLT).then(|| {
        note(
            "async_pf",
            "this host swaps: with hlt, KVM never halts a vCPU while one of its pages is fetched; \
             where the guest cannot be told of that, the vCPU's thread waits for the page, and the \
             vCPU takes no interrupt meanwhile",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> Exits {
        text.parse().unwrap()
    }

    fn situation(disable: &str, allow: &str) -> Situation {
        let policy = Policy {
            disable: set(disable),
            allow: set(allow),
        };
        Situation {
            info: Info {
                vendor: Some(Vendor::Vmx),
                enabled: true,
                supported: Exits::ALL,
                floor: Exits::NONE,
                missed: 0,
                clamps: 0,
                policies: 1,
                vms: 0,
                pending: 0,
                holding: 0,
            },
            policy,
            resolved: Resolved::from_nearest_to_root([(1, policy)]),
            surroundings: Surroundings::default(),
        }
    }

    fn codes(situation: &Situation) -> Vec<&'static str> {
        on_policy(situation)
            .into_iter()
            .map(|note| note.code)
            .collect()
    }

    #[test]
    fn what_just_works_is_not_remarked_on() {
        assert!(codes(&situation("pause", "all")).is_empty());
        assert!(codes(&situation("none", "none")).is_empty());
    }

    #[test]
    fn who_asks_for_all_is_told_what_it_means() {
        let mut all = situation("all", "all");
        assert_eq!(codes(&all), ["busy", "needs_vmm", "preemption_timer"]);
        all.info.vendor = Some(Vendor::Svm);
        all.info.supported = set("mwait,hlt,pause,aperfmperf");
        assert_eq!(codes(&all), ["unsupported", "busy", "needs_vmm"]);
        all.surroundings.exposed_to_smt_rsb = true;
        assert_eq!(codes(&all)[3..], ["smt_rsb"]);
        all.surroundings.swaps = true;
        assert_eq!(codes(&all)[3..], ["smt_rsb", "async_pf"]);
        // Only "cstate" is left out of what KVM supports.
        assert!(on_policy(&all)[0].message.contains("disable cstate on"));
    }

    #[test]
    fn what_is_given_by_the_floor_needs_no_support() {
        let mut pause = situation("pause", "all");
        pause.info.supported = Exits::NONE;
        pause.info.floor = Exits::PAUSE;
        assert!(codes(&pause).is_empty());
    }

    #[test]
    fn what_has_no_effect_is_said() {
        let mut hlt = situation("hlt", "all");
        hlt.resolved.allow = Exits::PAUSE;
        assert_eq!(codes(&hlt), ["not_allowed_above"]);
        assert_eq!(codes(&situation("hlt", "pause")), ["not_allowed"]);

        let mut nowhere = situation("pause", "all");
        nowhere.info.vendor = None;
        nowhere.info.supported = Exits::NONE;
        nowhere.info.enabled = false;
        assert_eq!(codes(&nowhere), ["off", "no_vendor"]);
    }

    #[test]
    fn overrides_have_notes_too() {
        let codes = |info: &Info, disable, wanted| -> Vec<_> {
            on_override(info, set(disable), set(wanted), Surroundings::default())
                .into_iter()
                .map(|note| note.code)
                .collect()
        };
        let mut info = situation("none", "all").info;
        assert!(codes(&info, "pause", "pause").is_empty());
        assert!(codes(&info, "none", "hlt").is_empty());
        assert_eq!(codes(&info, "hlt", "hlt"), ["busy"]);
        assert_eq!(codes(&info, "hlt,pause", "pause"), ["not_allowed_above"]);
        info.supported = Exits::NONE;
        assert_eq!(codes(&info, "hlt", "none"), ["unsupported"]);
        // By the floor.
        assert!(codes(&info, "pause", "pause").is_empty());
        info.enabled = false;
        assert_eq!(codes(&info, "hlt", "none"), ["off"]);
    }

    #[test]
    fn who_gets_hlt_where_the_host_swaps_is_told_of_async_page_faults() {
        let swaps = Surroundings {
            swaps: true,
            ..Surroundings::default()
        };
        let info = situation("none", "all").info;
        let codes = |disable| -> Vec<_> {
            on_override(&info, set(disable), set(disable), swaps)
                .into_iter()
                .map(|note| note.code)
                .collect()
        };
        assert_eq!(codes("hlt"), ["busy", "async_pf"]);
        assert!(codes("pause").is_empty());
    }

    #[test]
    fn vms_are_named_or_counted() {
        assert_eq!(vms_in_words(&[3], 1), "1 VM (3)");
        assert_eq!(vms_in_words(&[3, 7], 1), "2 VMs (3, 7)");
        assert_eq!(vms_in_words(&[], 1), "1 VM");
        assert_eq!(vms_in_words(&[], 4), "4 VMs");
    }

    #[test]
    fn status_has_notes_too() {
        let mut info = situation("none", "all").info;
        let plain = Surroundings::default();
        assert!(on_status(&info, plain).is_empty());
        let all = Surroundings {
            exposed_to_smt_rsb: true,
            swaps: true,
        };
        let codes: Vec<_> = on_status(&info, all)
            .into_iter()
            .map(|note| note.code)
            .collect();
        assert_eq!(codes, ["smt_rsb", "async_pf"]);
        info.missed = 2;
        assert_eq!(on_status(&info, plain)[0].code, "missed");
        info.missed = 0;
        info.holding = 2;
        assert!(on_status(&info, plain).is_empty());
        info.enabled = false;
        assert_eq!(on_status(&info, plain)[0].code, "holding");
    }
}
