// SPDX-License-Identifier: GPL-2.0

//! Changes of VMs that run.

use crate::{
    common::write,
    fake::Fake,
    quiet, //
};
use exitpolicy::uapi;
use snapbox::{
    assert_data_eq,
    str,
    IntoData, //
};
use std::{
    fs,
    os::unix::fs::symlink, //
};

const HLT: u64 = 0b00010;
const PAUSE: u64 = 0b00100;

/// Two VMs: one with three vCPUs, two of which are on their way to `hlt`, and one elsewhere.
fn delayed(name: &str) -> Option<Fake> {
    let mut fake = Fake::new(name)?;
    fake.add_vm(3, 3, HLT);
    fake.delay(3, 0, uapi::VCPU_PENDING, 0);
    fake.delay(3, 2, uapi::VCPU_IN_L2, 0);
    fake.add_vm(7, 1, 0);
    fake.delay(7, 0, uapi::VCPU_PENDING, PAUSE);
    // One that this test has no part in.
    fake.vms.get_mut(&7).unwrap().cgroup_id = 1;
    fake.in_vain = 2;
    Some(fake)
}

#[test]
fn the_module_is_told_whom_to_change_and_how_long_to_wait() {
    let Some(mut fake) = Fake::new("told") else {
        return;
    };
    fake.add_vm(1, 1, 0);
    for command in [
        "off",
        "on",
        "policy set CGROUP --disable pause",
        "policy clear CGROUP",
    ] {
        let own = match command {
            "policy set CGROUP --disable pause" => uapi::POLICY_DISABLE,
            _ => 0,
        };
        for (options, flags, timeout) in [
            ("", 0, 1_000),
            ("--timeout 5s", 0, 5_000),
            ("-t 1m", 0, 60_000),
            ("--timeout=1ms", 0, 1),
            ("--no-wait", uapi::NO_WAIT, 0),
            ("--new-only", uapi::NEW_ONLY, 1_000),
            ("-n --no-wait", uapi::NEW_ONLY | uapi::NO_WAIT, 0),
        ] {
            if command.starts_with("policy clear") {
                fake.run("policy set CGROUP --disable pause");
            }
            let run = fake.run(&format!("{command} {options}"));
            assert_eq!(run.code, Some(0), "{command} {options}: {run:?}");
            assert_eq!(
                fake.asked,
                Some((flags | own, timeout)),
                "{command} {options}"
            );
            let new_only = flags & uapi::NEW_ONLY != 0;
            let note =
                "note: this is for VMs that start from now on; those that run keep what they \
                        have\n";
            assert_eq!(
                run.stderr,
                if new_only { note } else { "" },
                "{command} {options}"
            );
        }
    }
    for command in ["vm set 1 --disable pause", "vm reset 1"] {
        for (options, flags, timeout) in [
            ("", 0, 1_000),
            ("--timeout 500ms", 0, 500),
            ("--no-wait", uapi::NO_WAIT, 0),
            ("--vcpu 0", uapi::VM_VCPU, 1_000),
            ("--vcpu 0 --no-wait", uapi::VM_VCPU | uapi::NO_WAIT, 0),
        ] {
            quiet(fake.run(&format!("{command} {options}")));
            assert_eq!(fake.asked, Some((flags, timeout)), "{command} {options}");
        }
    }
}

#[test]
fn stragglers_of_a_policy_are_named() {
    let Some(mut fake) = delayed("stragglers") else {
        return;
    };
    let run = fake.run("policy set CGROUP --disable pause");
    assert_eq!(run.code, Some(5));
    assert_data_eq!(
        run.stdout,
        str![[r#"
cgroup  /CGROUP
id  CGROUP_ID
disable  pause
allow  all

"#]]
        .raw()
    );
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: still on their way in VM 3: vCPU 0 (pending), vCPU 2 (pending: in L2); 'exitpolicy vm show 3' says when they have arrived

"#]]
        .raw()
    );
    let run = fake.run("policy clear CGROUP -j");
    assert_eq!((run.code, run.stderr.as_str()), (Some(5), ""));
    assert_data_eq!(
        run.stdout,
        str![[r#"
{"schema_version":1,"cgroup":{"id":CGROUP_ID,"path":"/CGROUP","removed":false},"cleared":true,"stragglers":[{"vm":3,"vcpu":0,"wanted":["hlt"],"in_force":[],"state":"pending"},{"vm":3,"vcpu":2,"wanted":["hlt"],"in_force":[],"state":"in_l2"}],"notes":[{"code":"on_their_way","message":"still on their way in VM 3: vCPU 0 (pending), vCPU 2 (pending: in L2); 'exitpolicy vm show 3' says when they have arrived"}]}

"#]]
        .raw()
    );

    // Who does not wait is told, too, and it is no failure.
    let run = fake.run("policy set CGROUP --disable pause --no-wait");
    assert_eq!(run.code, Some(0));
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: still on their way in VM 3: vCPU 0 (pending), vCPU 2 (pending: in L2); 'exitpolicy vm show 3' says when they have arrived

"#]]
        .raw()
    );

    // They may have arrived while they were looked for.
    for vcpu in fake.vcpus.values_mut() {
        vcpu.state = uapi::VCPU_NEXT_ENTRY;
    }
    quiet(fake.run("policy set CGROUP --disable pause"));
    // Those of somebody else's change are not spoken of.
    fake.vcpus.get_mut(&(3, 0)).unwrap().state = uapi::VCPU_PENDING;
    fake.in_vain = 0;
    quiet(fake.run("policy set CGROUP --disable pause"));
    fake.in_vain = 1;
    quiet(fake.run("policy set CGROUP/child --disable pause"));
}

#[test]
fn off_names_all_that_is_left() {
    let Some(mut fake) = delayed("off") else {
        return;
    };
    // It has what its VMM asked for.
    fake.add_vm(8, 1, HLT);
    fake.vms.get_mut(&8).unwrap().requested = HLT;
    fake.vms.get_mut(&3).unwrap().effective = 0;
    for vcpu in fake.vcpus.range_mut((3, 0)..(4, 0)) {
        vcpu.1.wanted = 0;
        vcpu.1.in_force = HLT;
    }
    fake.vcpus.get_mut(&(3, 1)).unwrap().state = uapi::VCPU_NEXT_ENTRY;
    fake.info.holding = 2;
    let run = fake.run("off");
    assert_eq!((run.code, fake.info.enabled), (Some(5), 0));
    assert_data_eq!(
        run.stdout,
        str![[r#"
enabled  no

"#]]
        .raw()
    );
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: still on their way in VM 3: vCPU 0 (pending), vCPU 1 (at next entry), vCPU 2 (pending: in L2); 'exitpolicy vm show 3' says when they have arrived
note: still on their way in VM 7: vCPU 0 (pending); 'exitpolicy vm show 7' says when they have arrived
note: not yet as the VMM asked for: 2 VMs (3, 7); until then the module cannot be unloaded

"#]]
        .raw()
    );
    let run = fake.run("off -p");
    assert_eq!((run.code, run.stderr.as_str()), (Some(5), ""));
    assert_data_eq!(
        run.stdout,
        str![[r#"
{
  "schema_version": 1,
  "enabled": false,
  "stragglers": [
    {
      "vm": 3,
      "vcpu": 0,
      "wanted": [],
      "in_force": [
        "hlt"
      ],
      "state": "pending"
    },
    {
      "vm": 3,
      "vcpu": 1,
      "wanted": [],
      "in_force": [
        "hlt"
      ],
      "state": "at_next_entry"
    },
    {
      "vm": 3,
      "vcpu": 2,
      "wanted": [],
      "in_force": [
        "hlt"
      ],
      "state": "in_l2"
    },
    {
      "vm": 7,
      "vcpu": 0,
      "wanted": [],
      "in_force": [
        "pause"
      ],
      "state": "pending"
    }
  ],
  "holders": [
    3,
    7
  ],
  "notes": [
    {
      "code": "on_their_way",
      "message": "still on their way in VM 3: vCPU 0 (pending), vCPU 1 (at next entry), vCPU 2 (pending: in L2); 'exitpolicy vm show 3' says when they have arrived"
    },
    {
      "code": "on_their_way",
      "message": "still on their way in VM 7: vCPU 0 (pending); 'exitpolicy vm show 7' says when they have arrived"
    },
    {
      "code": "holding",
      "message": "not yet as the VMM asked for: 2 VMs (3, 7); until then the module cannot be unloaded"
    }
  ]
}

"#]]
        .raw()
    );

    // What changes at the next entry is named, and was not waited for in vain.
    for vcpu in fake.vcpus.values_mut() {
        vcpu.state = uapi::VCPU_NEXT_ENTRY;
    }
    fake.in_vain = 0;
    fake.vms.retain(|id, _| *id == 3);
    fake.info.holding = 1;
    let run = fake.run("off");
    assert_eq!(run.code, Some(0));
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: still on their way in VM 3: vCPU 0 (at next entry), vCPU 1 (at next entry), vCPU 2 (at next entry); 'exitpolicy vm show 3' says when they have arrived
note: not yet as the VMM asked for: 1 VM (3); until then the module cannot be unloaded

"#]]
        .raw()
    );

    let run = fake.run("status");
    assert_data_eq!(
        run.stdout,
        str![[r#"
vendor  vmx
enabled  no
supported  all
floor  none
policies  0
vms  1
pending  3
holding  1
clamps  0
missed  0

"#]]
        .raw()
    );
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: not yet as the VMM asked for: 1 VM; until then the module cannot be unloaded

"#]]
        .raw()
    );

    let run = fake.run("off --new-only");
    assert_eq!(run.code, Some(0));
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: this is for VMs that start from now on; those that run keep what they have
note: not yet as the VMM asked for: 1 VM (3); until then the module cannot be unloaded

"#]]
        .raw()
    );

    // Nothing is left.
    for vcpu in fake.vcpus.values_mut() {
        vcpu.state = uapi::VCPU_IN_FORCE;
        vcpu.in_force = vcpu.wanted;
    }
    fake.info.holding = 0;
    assert_data_eq!(
        quiet(fake.run("off -j")),
        str![[r#"
{"schema_version":1,"enabled":false,"stragglers":[],"holders":[],"notes":[]}

"#]]
        .raw()
    );
}

#[test]
fn on_reaches_all() {
    let Some(mut fake) = delayed("on") else {
        return;
    };
    let run = fake.run("on -j");
    assert_eq!((run.code, run.stderr.as_str()), (Some(5), ""));
    assert_data_eq!(
        run.stdout,
        str![[r#"
{"schema_version":1,"enabled":true,"stragglers":[{"vm":3,"vcpu":0,"wanted":["hlt"],"in_force":[],"state":"pending"},{"vm":3,"vcpu":2,"wanted":["hlt"],"in_force":[],"state":"in_l2"},{"vm":7,"vcpu":0,"wanted":[],"in_force":["pause"],"state":"pending"}],"notes":[{"code":"on_their_way","message":"still on their way in VM 3: vCPU 0 (pending), vCPU 2 (pending: in L2); 'exitpolicy vm show 3' says when they have arrived"},{"code":"on_their_way","message":"still on their way in VM 7: vCPU 0 (pending); 'exitpolicy vm show 7' says when they have arrived"}]}

"#]]
        .raw()
    );
}

#[test]
fn a_vm_gets_an_override_and_loses_it() {
    let Some(mut fake) = Fake::new("override") else {
        return;
    };
    fake.add_vm(3, 2, 0);
    assert_data_eq!(
        quiet(fake.run("vm set 3 --disable pause")),
        str![[r#"
id  3
pid  4711
vcpus  2
cgroup  /CGROUP
floor  none
requested  none
effective  pause
clamped  none
override  pause
adopted  no
state  in force

VCPU  OVERRIDE  WANTED  IN FORCE  STATE
0  -  pause  pause  in force
1  -  pause  pause  in force

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("vm set 3 -d none --vcpu 1 -j")),
        str![[r#"
{"schema_version":1,"id":3,"pid":4711,"vcpus":2,"cgroup":{"id":CGROUP_ID,"path":"/CGROUP","removed":false},"floor":[],"requested":[],"effective":["pause"],"clamped":[],"override":["pause"],"refused":[],"refusal":null,"pending":0,"adopted":false,"vcpu_list":[{"vcpu":0,"override":null,"wanted":["pause"],"in_force":["pause"],"state":"in_force","refused":[],"refusal":null,"explanation":"in force"},{"vcpu":1,"override":[],"wanted":[],"in_force":[],"state":"in_force","refused":[],"refusal":null,"explanation":"in force"}],"stragglers":[],"notes":[]}

"#]]
        .raw()
    );
    quiet(fake.run("vm reset 3 --vcpu 1"));
    assert_eq!(fake.vcpus[&(3, 1)].has_disable, 0);
    assert_eq!(fake.vms[&3].has_disable, 1);
    quiet(fake.run("vm set 3 -d none --vcpu 1"));
    assert_data_eq!(
        quiet(fake.run("vm reset 3")),
        str![[r#"
id  3
pid  4711
vcpus  2
cgroup  /CGROUP
floor  none
requested  none
effective  none
clamped  none
override  -
adopted  no
state  in force

VCPU  OVERRIDE  WANTED  IN FORCE  STATE
0  -  none  none  in force
1  -  none  none  in force

"#]]
        .raw()
    );
    assert_eq!(fake.vcpus[&(3, 1)].has_disable, 0);

    // As of a policy, it is said what it means.
    let run = fake.run("vm set 3 --disable hlt");
    assert_eq!(run.code, Some(0));
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: with hlt, the host sees an idle vCPU as 100 % busy

"#]]
        .raw()
    );
    fake.info.enabled = 0;
    let run = fake.run("vm set 3 --disable hlt");
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: policies are switched off: VMs are as their VMMs made them until 'exitpolicy on'

"#]]
        .raw()
    );
}

#[test]
fn stragglers_of_an_override_are_named() {
    let Some(mut fake) = delayed("late") else {
        return;
    };
    let run = fake.run("vm set 3 --disable none");
    assert_eq!(run.code, Some(5));
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: still on their way in VM 3: vCPU 0 (pending), vCPU 2 (pending: in L2); 'exitpolicy vm show 3' says when they have arrived

"#]]
        .raw()
    );
    let run = fake.run("vm reset 3 --vcpu 2 -j");
    assert_eq!((run.code, run.stderr.as_str()), (Some(5), ""));
    assert_data_eq!(
        run.stdout,
        str![[r#"
{"schema_version":1,"id":3,"pid":4711,"vcpus":3,"cgroup":{"id":CGROUP_ID,"path":"/CGROUP","removed":false},"floor":[],"requested":[],"effective":[],"clamped":[],"override":[],"refused":[],"refusal":null,"pending":2,"adopted":false,"vcpu_list":[{"vcpu":0,"override":null,"wanted":[],"in_force":[],"state":"pending","refused":[],"refusal":null,"explanation":"pending"},{"vcpu":1,"override":null,"wanted":[],"in_force":[],"state":"in_force","refused":[],"refusal":null,"explanation":"in force"},{"vcpu":2,"override":null,"wanted":[],"in_force":[],"state":"in_l2","refused":[],"refusal":null,"explanation":"pending: in L2"}],"stragglers":[{"vm":3,"vcpu":2,"wanted":[],"in_force":[],"state":"in_l2"}],"notes":[{"code":"on_their_way","message":"still on their way in VM 3: vCPU 2 (pending: in L2); 'exitpolicy vm show 3' says when they have arrived"}]}

"#]]
        .raw()
    );
    // Another one's delay is not that of this one.
    quiet(fake.run("vm reset 3 --vcpu 1"));
}

#[test]
fn a_vm_shows_what_is_wanted_in_force_and_why() {
    let Some(mut fake) = Fake::new("show") else {
        return;
    };
    fake.add_vm(3, 5, HLT | PAUSE);
    fake.vms.get_mut(&3).unwrap().adopted = 1;
    fake.delay(3, 1, uapi::VCPU_NEXT_ENTRY, 0);
    fake.delay(3, 2, uapi::VCPU_PENDING, PAUSE);
    fake.delay(3, 3, uapi::VCPU_IN_L2, 0);
    let vcpu = fake.vcpus.get_mut(&(3, 4)).unwrap();
    vcpu.has_disable = 1;
    vcpu.wanted = 0;
    vcpu.in_force = 0;
    for (id, exits, reason) in [
        (4, HLT, uapi::REFUSAL_PV_UNHALT),
        (5, PAUSE, uapi::REFUSAL_PROTECTED),
        (6, HLT | PAUSE, uapi::REFUSAL_HYPERV),
    ] {
        fake.add_vm(id, 1, HLT | PAUSE);
        fake.refuse_change(id, exits, reason);
    }
    // On its way with one, and refused the other.
    fake.delay(6, 0, uapi::VCPU_PENDING, 0);
    assert_data_eq!(
        quiet(fake.run("vm list")),
        str![[r#"
ID  PID  VCPUS  FLOOR  REQUESTED  EFFECTIVE  CLAMPED  OVERRIDE  STATE  CGROUP
3  4711  5  none  none  hlt,pause  none  -  2 pending, 1 at next entry  /CGROUP
4  4711  1  none  none  hlt,pause  none  -  hlt refused  /CGROUP
5  4711  1  none  none  hlt,pause  none  -  pause refused  /CGROUP
6  4711  1  none  none  hlt,pause  none  -  1 pending, hlt,pause refused  /CGROUP

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("vm show 3")),
        str![[r#"
id  3
pid  4711
vcpus  5
cgroup  /CGROUP
floor  none
requested  none
effective  hlt,pause
clamped  none
override  -
adopted  yes
state  2 pending, 1 at next entry

VCPU  OVERRIDE  WANTED  IN FORCE  STATE
0  -  hlt,pause  hlt,pause  in force
1  -  hlt,pause  none  at next entry
2  -  hlt,pause  pause  pending
3  -  hlt,pause  none  pending: in L2
4  none  none  none  in force

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("vm show 4")),
        str![[r#"
id  4
pid  4711
vcpus  1
cgroup  /CGROUP
floor  none
requested  none
effective  hlt,pause
clamped  none
override  -
adopted  no
state  hlt refused: guest uses PV_UNHALT

VCPU  OVERRIDE  WANTED  IN FORCE  STATE
0  -  hlt,pause  pause  refused: guest uses PV_UNHALT

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("vm show 5")),
        str![[r#"
id  5
pid  4711
vcpus  1
cgroup  /CGROUP
floor  none
requested  none
effective  hlt,pause
clamped  none
override  -
adopted  no
state  pause refused: guest state is encrypted

VCPU  OVERRIDE  WANTED  IN FORCE  STATE
0  -  hlt,pause  hlt  refused: guest state is encrypted

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("vm show 6")),
        str![[r#"
id  6
pid  4711
vcpus  1
cgroup  /CGROUP
floor  none
requested  none
effective  hlt,pause
clamped  none
override  -
adopted  no
state  1 pending, hlt,pause refused: KVM runs on Hyper-V

VCPU  OVERRIDE  WANTED  IN FORCE  STATE
0  -  hlt,pause  none  pending; refused: KVM runs on Hyper-V

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("vm show 6 -p")),
        str![[r#"
{
  "schema_version": 1,
  "id": 6,
  "pid": 4711,
  "vcpus": 1,
  "cgroup": {
    "id": CGROUP_ID,
    "path": "/CGROUP",
    "removed": false
  },
  "floor": [],
  "requested": [],
  "effective": [
    "hlt",
    "pause"
  ],
  "clamped": [],
  "override": null,
  "refused": [
    "hlt",
    "pause"
  ],
  "refusal": "hyperv",
  "pending": 1,
  "adopted": false,
  "vcpu_list": [
    {
      "vcpu": 0,
      "override": null,
      "wanted": [
        "hlt",
        "pause"
      ],
      "in_force": [],
      "state": "pending",
      "refused": [
        "hlt",
        "pause"
      ],
      "refusal": "hyperv",
      "explanation": "pending; refused: KVM runs on Hyper-V"
    }
  ],
  "notes": []
}

"#]]
        .raw()
    );
}

#[test]
fn who_is_refused_a_change_is_told() {
    let Some(mut fake) = Fake::new("unhalt") else {
        return;
    };
    fake.add_vm(3, 1, HLT);
    fake.refuse_change(3, HLT, uapi::REFUSAL_PV_UNHALT);
    let run = fake.run("policy set CGROUP --disable hlt");
    assert_eq!(run.code, Some(0));
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: with hlt, the host sees an idle vCPU as 100 % busy
note: a change of hlt in VM 3 is refused (guest uses PV_UNHALT): stop the VM and start it again to have it

"#]]
        .raw()
    );
    let run = fake.run("vm set 3 --disable hlt -j");
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    assert_data_eq!(
        run.stdout,
        str![[r#"
{"schema_version":1,"id":3,"pid":4711,"vcpus":1,"cgroup":{"id":CGROUP_ID,"path":"/CGROUP","removed":false},"floor":[],"requested":[],"effective":["hlt"],"clamped":[],"override":["hlt"],"refused":["hlt"],"refusal":"pv_unhalt","pending":0,"adopted":false,"vcpu_list":[{"vcpu":0,"override":null,"wanted":["hlt"],"in_force":[],"state":"in_force","refused":["hlt"],"refusal":"pv_unhalt","explanation":"refused: guest uses PV_UNHALT"}],"stragglers":[],"notes":[{"code":"busy","message":"with hlt, the host sees an idle vCPU as 100 % busy"},{"code":"refused","message":"a change of hlt in VM 3 is refused (guest uses PV_UNHALT): stop the VM and start it again to have it"}]}

"#]]
        .raw()
    );
    // It is in another cgroup.
    let run = fake.run("policy set CGROUP/child --disable pause");
    assert_eq!(quiet(run).lines().count(), 4);
}

#[test]
fn who_is_not_there_cannot_be_changed() {
    let Some(mut fake) = Fake::new("absent") else {
        return;
    };
    fake.add_vm(3, 1, 0);
    for (arguments, code) in [
        ("-j vm set 2 --disable hlt", "no_vm"),
        ("-j vm set 2 --disable hlt --vcpu 0", "no_vm"),
        ("-j vm set 3 --disable hlt --vcpu 1", "no_vcpu"),
        ("-j vm reset 2", "no_vm"),
        ("-j vm reset 2 --vcpu 0", "no_vm"),
        ("-j vm reset 3 --vcpu 4294967295", "no_vcpu"),
    ] {
        let run = fake.run(arguments);
        assert_eq!(
            (run.code, run.stdout.as_str()),
            (Some(1), ""),
            "{arguments}"
        );
        assert!(
            run.stderr.contains(&format!("\"code\":\"{code}\"")),
            "{arguments}: {run:?}"
        );
    }
    assert_data_eq!(
        fake.run("vm reset 2").stderr,
        str![[r#"
error: there is no VM 2: it ended, or never was
  hint: 'exitpolicy vm list' says which there are

"#]]
        .raw()
    );
    assert_data_eq!(
        fake.run("vm set 3 --disable hlt --vcpu 9").stderr,
        str![[r#"
error: VM 3 has no vCPU 9
  hint: 'exitpolicy vm show 3' lists its vCPUs, by their ids in KVM_CREATE_VCPU

"#]]
        .raw()
    );
    fake.refuse = Some(libc::EPERM);
    let run = fake.run("vm set 3 --disable hlt --vcpu 0");
    assert_eq!(run.code, Some(4));
    assert_data_eq!(
        run.stderr,
        str![[r#"
error: cannot set the override of vCPU 0 of VM 3: Operation not permitted
  hint: run it as root: /dev/exitpolicy belongs to root, and needs CAP_SYS_ADMIN in the initial user namespace, which a container does not have

"#]]
        .raw()
    );
    fake.refuse = Some(libc::EINVAL);
    let run = fake.run("vm reset 3");
    assert_eq!(run.code, Some(1));
    assert_data_eq!(
        run.stderr,
        str![[r#"
error: cannot reset the override of VM 3: the module refused the request as malformed or unknown (Invalid argument)
  hint: the command and the module are of different versions: install both from the same one, and load the module again

"#]]
        .raw()
    );
}

#[test]
fn the_module_is_unloaded_when_no_vm_holds_it() {
    let Some(mut fake) = Fake::new("unload") else {
        return;
    };
    assert_data_eq!(
        quiet(fake.run("unload")),
        str![[r#"
unloaded  yes

"#]]
        .raw()
    );
    assert_eq!((fake.info.enabled, fake.unloads), (0, 1));
    assert_eq!(fake.asked, Some((0, 1_000)));
    assert_data_eq!(
        quiet(fake.run("unload -j")),
        str![[r#"
{"schema_version":1,"unloaded":true,"notes":[]}

"#]]
        .raw()
    );

    // What it waits for is said once.
    fake.holds_for = Some(4);
    fake.info.pending = 1;
    let run = fake.run("unload");
    assert_eq!(run.code, Some(0));
    assert_data_eq!(
        run.stderr,
        str![[r#"
waiting for 1 VM; vCPUs on their way: 1

"#]]
        .raw()
    );
    fake.holds_for = Some(4);
    quiet(fake.run("unload -p"));
    assert_eq!(fake.unloads, 4);
}

#[test]
fn who_holds_the_module_is_named() {
    let Some(mut fake) = delayed("held") else {
        return;
    };
    fake.info.holding = 2;
    let run = fake.run("unload --timeout 200ms");
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert_eq!(fake.asked, Some((0, 200)));
    assert_data_eq!(
        run.stderr,
        str![[r#"
waiting for 2 VMs; vCPUs on their way: 3
error: cannot unload kvm_exitpolicy: 2 VMs (3, 7) were not given back in 200ms what the VMM asked for; VM 3: vCPU 0 (pending), vCPU 2 (pending: in L2); VM 7: vCPU 0 (pending)
  hint: a vCPU changes on its way into the guest: let these VMs run, or end them, and try again; policies stay switched off until 'exitpolicy on'

"#]]
        .raw()
    );
    let run = fake.run("unload -t 1ms -j");
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stderr,
        str![[r#"
{"schema_version":1,"error":{"code":"held","message":"cannot unload kvm_exitpolicy: 2 VMs (3, 7) were not given back in 1ms what the VMM asked for; VM 3: vCPU 0 (pending), vCPU 2 (pending: in L2); VM 7: vCPU 0 (pending)","hint":"a vCPU changes on its way into the guest: let these VMs run, or end them, and try again; policies stay switched off until 'exitpolicy on'","stragglers":[{"vm":3,"vcpu":0,"wanted":["hlt"],"in_force":[],"state":"pending"},{"vm":3,"vcpu":2,"wanted":["hlt"],"in_force":[],"state":"in_l2"},{"vm":7,"vcpu":0,"wanted":[],"in_force":["pause"],"state":"pending"}],"holders":[3,7]}}

"#]]
        .raw()
    );
    assert_eq!((fake.info.enabled, fake.unloads), (0, 0));

    // Who cannot be given back what it asked for does not hold it, and is named.
    fake.vms.remove(&7);
    for vcpu in fake.vcpus.values_mut() {
        vcpu.state = uapi::VCPU_IN_FORCE;
        vcpu.in_force = 0;
        vcpu.wanted = 0;
    }
    let vm = fake.vms.get_mut(&3).unwrap();
    vm.effective = 0;
    vm.pending = 0;
    fake.refuse_change(3, PAUSE, uapi::REFUSAL_PROTECTED);
    fake.info.holding = 0;
    let run = fake.run("off -j");
    assert_eq!(run.code, Some(0));
    assert_data_eq!(
        run.stdout,
        str![[r#"
{"schema_version":1,"enabled":false,"stragglers":[],"holders":[],"notes":[{"code":"refused","message":"a change of pause in VM 3 is refused (guest state is encrypted): stop the VM and start it again to have it"}]}

"#]]
        .raw()
    );
    let run = fake.run("unload");
    assert_eq!((run.code, fake.unloads), (Some(0), 1));
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: a change of pause in VM 3 is refused (guest state is encrypted): stop the VM and start it again to have it

"#]]
        .raw()
    );
}

#[test]
fn a_module_that_stays_is_explained() {
    let Some(mut fake) = Fake::new("busy") else {
        return;
    };
    fake.unload = Err(libc::EAGAIN);
    let run = fake.run("unload -t 1ms -j");
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stderr,
        str![[r#"
{"schema_version":1,"error":{"code":"in_use","message":"cannot unload kvm_exitpolicy: it is in use","hint":"'lsmod' and /sys/module/kvm_exitpolicy/holders say whether another module uses it, 'fuser /dev/exitpolicy' as root who has the device open; then try again; policies stay switched off until 'exitpolicy on'"}}

"#]]
        .raw()
    );
    write(fake.root(), "sys/module/kvm_exitpolicy/refcnt", "1\n");
    write(fake.root(), "proc/412/comm", "watch\n");
    fs::create_dir(fake.root().join("proc/412/fd")).unwrap();
    let device = fake.root().join("dev/exitpolicy");
    symlink(device, fake.root().join("proc/412/fd/3")).unwrap();
    let run = fake.run("unload -t 200ms");
    assert!(fake.unloads > 2);
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stderr,
        str![[r#"
waiting for those who have the device open
error: cannot unload kvm_exitpolicy: it is in use (reference count 1); /dev/exitpolicy is open in watch (412)
  hint: end what has it open, and try again; policies stay switched off until 'exitpolicy on'

"#]]
        .raw()
    );

    for (errno, status, code) in [
        (libc::EPERM, 4, "not_permitted"),
        (libc::EBUSY, 1, "not_removable"),
        (libc::EFAULT, 1, "os"),
    ] {
        fake.unload = Err(errno);
        let run = fake.run("unload -j");
        assert_eq!((run.code, run.stdout.as_str()), (Some(status), ""));
        assert!(
            run.stderr.contains(&format!("\"code\":\"{code}\"")),
            "{run:?}"
        );
        assert!(
            run.stderr
                .contains("policies stay switched off until 'exitpolicy on'\""),
            "{run:?}"
        );
    }
    // Somebody was faster.
    fake.unload = Err(libc::ENOENT);
    quiet(fake.run("unload"));
    fake.unload = Err(libc::EPERM);
    assert_data_eq!(
        fake.run("unload").stderr,
        str![[r#"
error: cannot unload kvm_exitpolicy: Operation not permitted
  hint: run it as root, outside of containers: to unload a module takes CAP_SYS_MODULE; policies stay switched off until 'exitpolicy on'

"#]]
        .raw()
    );

    // Nothing is switched off for what cannot be.
    fake.info.enabled = 1;
    fake.unloads = 0;
    write(fake.root(), "proc/sys/kernel/modules_disabled", "1\n");
    let run = fake.run("unload");
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stderr,
        str![[r#"
error: cannot unload kvm_exitpolicy: the kernel takes no module in or out any more (kernel.modules_disabled is 1)
  hint: it goes with the next boot; until then 'exitpolicy off' is as good

"#]]
        .raw()
    );
    write(fake.root(), "proc/sys/kernel/modules_disabled", "0\n");
    fake.refuse = Some(libc::EPERM);
    let run = fake.run("unload");
    assert_eq!((run.code, run.stdout.as_str()), (Some(4), ""));
    assert_data_eq!(
        run.stderr,
        str![[r#"
error: cannot switch policies off: Operation not permitted
  hint: run it as root: /dev/exitpolicy belongs to root, and needs CAP_SYS_ADMIN in the initial user namespace, which a container does not have

"#]]
        .raw()
    );
    assert_eq!((fake.info.enabled, fake.unloads), (1, 0));
}
