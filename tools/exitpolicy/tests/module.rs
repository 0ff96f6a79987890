// SPDX-License-Identifier: GPL-2.0

//! What the command says and does where the module is, which is played by the test.

mod common;
#[path = "common/fake.rs"]
mod fake;
#[path = "module/live.rs"]
mod live;
#[path = "module/unmanaged.rs"]
mod unmanaged;

use common::Run;
use exitpolicy::uapi;
use fake::Fake;
use snapbox::{
    assert_data_eq,
    str,
    IntoData, //
};

/// What was written to stdout by a command that worked without a note.
#[track_caller]
fn quiet(run: Run) -> String {
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{run:?}");
    run.stdout
}

#[test]
fn status() {
    let Some(mut fake) = Fake::new("status") else {
        return;
    };
    assert_data_eq!(
        quiet(fake.run("status")),
        str![[r#"
vendor  vmx
enabled  yes
supported  all
floor  none
policies  0
vms  0
pending  0
holding  0
clamps  0
missed  0

"#]]
        .raw()
    );
    fake.info.vendor = uapi::VENDOR_NONE;
    fake.info.supported = 0;
    fake.info.floor = 4;
    fake.info.clamps = 3;
    fake.info.missed = 2;
    let run = fake.run("status");
    assert_data_eq!(
        run.stdout,
        str![[r#"
vendor  none
enabled  yes
supported  none
floor  pause
policies  0
vms  0
pending  0
holding  0
clamps  3
missed  2

"#]]
        .raw()
    );
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: 2 VMs or vCPUs had no decision, or were lost sight of: see what the kernel log says of exitpolicy

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("status -j")),
        str![[r#"
{"schema_version":1,"vendor":null,"enabled":true,"supported":[],"floor":["pause"],"policies":0,"vms":0,"pending":0,"holding":0,"clamps":3,"missed":2,"notes":[{"code":"missed","message":"2 VMs or vCPUs had no decision, or were lost sight of: see what the kernel log says of exitpolicy"}]}

"#]]
        .raw()
    );
}

#[test]
fn the_master_switch() {
    let Some(mut fake) = Fake::new("switch") else {
        return;
    };
    assert_data_eq!(
        quiet(fake.run("off")),
        str![[r#"
enabled  no

"#]]
        .raw()
    );
    assert_eq!(fake.info.enabled, 0);
    assert_data_eq!(
        quiet(fake.run("on -j")),
        str![[r#"
{"schema_version":1,"enabled":true,"stragglers":[],"notes":[]}

"#]]
        .raw()
    );
    assert_eq!(fake.info.enabled, 1);
}

#[test]
fn a_policy_is_set_shown_and_cleared() {
    let Some(mut fake) = Fake::new("policy") else {
        return;
    };
    let text = quiet(fake.run("policy set CGROUP --disable pause"));
    assert_data_eq!(
        text.clone(),
        str![[r#"
cgroup  /CGROUP
id  CGROUP_ID
disable  pause
allow  all

"#]]
        .raw()
    );
    assert_eq!(quiet(fake.run("policy show /CGROUP")), text);
    assert_eq!(quiet(fake.run("policy show /sys/fs/cgroup/CGROUP")), text);

    // What is not given stays.
    assert_data_eq!(
        quiet(fake.run("policy set CGROUP --allow pause,hlt -j")),
        str![[r#"
{"schema_version":1,"cgroup":{"id":CGROUP_ID,"path":"/CGROUP","removed":false},"disable":["pause"],"allow":["hlt","pause"],"stragglers":[],"notes":[]}

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("policy clear CGROUP")),
        str![[r#"
cgroup  /CGROUP
id  CGROUP_ID
policy  none

"#]]
        .raw()
    );
    assert!(fake.policies.is_empty());

    let run = fake.run("policy show CGROUP");
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stderr,
        str![[r#"
error: cgroup /CGROUP has no policy of its own
  hint: 'exitpolicy policy show --effective /CGROUP' says what it inherits, 'exitpolicy policy list' which cgroups have a policy

"#]]
        .raw()
    );
    let run = fake.run("policy clear CGROUP/child --json");
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stderr,
        str![[r#"
{"schema_version":1,"error":{"code":"no_policy","message":"cgroup /CGROUP/child has no policy of its own","hint":"'exitpolicy policy show --effective /CGROUP/child' says what it inherits, 'exitpolicy policy list' which cgroups have a policy"}}

"#]]
        .raw()
    );
    quiet(fake.run("policy set CGROUP --disable none"));
    assert_data_eq!(
        quiet(fake.run("policy clear CGROUP -j")),
        str![[r#"
{"schema_version":1,"cgroup":{"id":CGROUP_ID,"path":"/CGROUP","removed":false},"cleared":true,"stragglers":[],"notes":[]}

"#]]
        .raw()
    );
}

#[test]
fn notes_say_what_to_expect() {
    let Some(mut fake) = Fake::new("notes") else {
        return;
    };
    let run = fake.run("policy set CGROUP --disable all");
    assert_eq!(run.code, Some(0));
    assert_data_eq!(
        run.stdout,
        str![[r#"
cgroup  /CGROUP
id  CGROUP_ID
disable  all
allow  all

"#]]
        .raw()
    );
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: with mwait,hlt, the host sees an idle vCPU as 100 % busy
note: only guests whose VMM exposes it use mwait,aperfmperf: KVM never advertises MWAIT, and clears CPUID leaf 6 ECX
note: with mwait, VMs do without the VMX preemption timer: their timers are the host's hrtimers, which cost more, whether they use MWAIT or not

"#]]
        .raw()
    );
    fake.info.supported = 4;
    fake.info.enabled = 0;
    assert_data_eq!(
        quiet(fake.run("policy set CGROUP/child --disable hlt -p")),
        str![[r#"
{
  "schema_version": 1,
  "cgroup": {
    "id": CHILD_ID,
    "path": "/CGROUP/child",
    "removed": false
  },
  "disable": [
    "hlt"
  ],
  "allow": [
    "mwait",
    "hlt",
    "pause",
    "cstate",
    "aperfmperf"
  ],
  "stragglers": [],
  "notes": [
    {
      "code": "off",
      "message": "policies are switched off: VMs are as their VMMs made them until 'exitpolicy on'"
    },
    {
      "code": "unsupported",
      "message": "KVM cannot disable hlt on this host: VMs do not get it; 'exitpolicy doctor' says more"
    }
  ]
}

"#]]
        .raw()
    );
}

#[test]
fn policies_are_listed() {
    let Some(mut fake) = Fake::new("list") else {
        return;
    };
    assert_data_eq!(
        quiet(fake.run("policy list")),
        str![[r#"
ID  DISABLE  ALLOW  CGROUP

"#]]
        .raw()
    );
    quiet(fake.run("policy set CGROUP --disable pause"));
    quiet(fake.run("policy set CGROUP/child --allow pause"));
    // A cgroup that was there once.
    let policy = *fake.policies.values().next().unwrap();
    fake.policies.insert(u64::MAX - 1, policy);
    assert_data_eq!(
        quiet(fake.run("policy list")),
        str![[r#"
ID  DISABLE  ALLOW  CGROUP
CGROUP_ID  pause  all  /CGROUP
CHILD_ID  none  pause  /CGROUP/child
18446744073709551614  pause  all  (removed)

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("policy list -j")),
        str![[r#"
{"schema_version":1,"policies":[{"cgroup":{"id":CGROUP_ID,"path":"/CGROUP","removed":false},"disable":["pause"],"allow":["mwait","hlt","pause","cstate","aperfmperf"]},{"cgroup":{"id":CHILD_ID,"path":"/CGROUP/child","removed":false},"disable":[],"allow":["pause"]},{"cgroup":{"id":18446744073709551614,"path":null,"removed":true},"disable":["pause"],"allow":["mwait","hlt","pause","cstate","aperfmperf"]}],"notes":[]}

"#]]
        .raw()
    );
}

#[test]
fn what_holds_is_explained() {
    let Some(mut fake) = Fake::new("effective") else {
        return;
    };
    assert_data_eq!(
        quiet(fake.run("policy show --effective CGROUP/child")),
        str![[r#"
cgroup  /CGROUP/child
id  CHILD_ID
enabled  yes
disable  none
allow  all

EXIT  STATE  WHY
mwait  on request  no "disable" names it, and nothing withholds it from a VMM that asks
hlt  on request  no "disable" names it, and nothing withholds it from a VMM that asks
pause  on request  no "disable" names it, and nothing withholds it from a VMM that asks
cstate  on request  no "disable" names it, and nothing withholds it from a VMM that asks
aperfmperf  on request  no "disable" names it, and nothing withholds it from a VMM that asks

"#]]
        .raw()
    );

    fake.info.supported = 0b10111;
    fake.info.floor = 0b00100;
    fake.run("policy set CGROUP --disable hlt,mwait,cstate --allow hlt,pause,cstate,aperfmperf");
    fake.run("policy set CGROUP/child --allow mwait,hlt,cstate");
    assert_data_eq!(
        quiet(fake.run("policy show --effective CGROUP/child")),
        str![[r#"
cgroup  /CGROUP/child
id  CHILD_ID
enabled  yes
disable  none (from /CGROUP/child)
allow  hlt,cstate

EXIT  STATE  WHY
mwait  withheld  "allow" of /CGROUP leaves it out
hlt  on request  no "disable" names it, and nothing withholds it from a VMM that asks
pause  floor  KVM itself disables it in every VM, whatever policies say
cstate  unsupported  KVM cannot disable it on this host
aperfmperf  withheld  "allow" of /CGROUP/child leaves it out

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("policy show --effective CGROUP")),
        str![[r#"
cgroup  /CGROUP
id  CGROUP_ID
enabled  yes
disable  mwait,hlt,cstate (from /CGROUP)
allow  hlt,pause,cstate,aperfmperf

EXIT  STATE  WHY
mwait  withheld  "disable" of /CGROUP names it, but "allow" of /CGROUP leaves it out
hlt  given  "disable" of /CGROUP names it
pause  floor  KVM itself disables it in every VM, whatever policies say
cstate  unsupported  "disable" of /CGROUP names it, but KVM cannot disable it on this host
aperfmperf  on request  no "disable" names it, and nothing withholds it from a VMM that asks

"#]]
        .raw()
    );
    fake.info.enabled = 0;
    assert_data_eq!(
        quiet(fake.run("policy show --effective CGROUP -p")),
        str![[r#"
{
  "schema_version": 1,
  "cgroup": {
    "id": CGROUP_ID,
    "path": "/CGROUP",
    "removed": false
  },
  "enabled": false,
  "disable": [
    "mwait",
    "hlt",
    "cstate"
  ],
  "allow": [
    "hlt",
    "pause",
    "cstate",
    "aperfmperf"
  ],
  "source": {
    "id": CGROUP_ID,
    "path": "/CGROUP",
    "removed": false
  },
  "policies": [
    {
      "cgroup": {
        "id": CGROUP_ID,
        "path": "/CGROUP",
        "removed": false
      },
      "disable": [
        "mwait",
        "hlt",
        "cstate"
      ],
      "allow": [
        "hlt",
        "pause",
        "cstate",
        "aperfmperf"
      ]
    }
  ],
  "exits": [
    {
      "exit": "mwait",
      "state": "withheld",
      "disabled_by": {
        "id": CGROUP_ID,
        "path": "/CGROUP",
        "removed": false
      },
      "withheld_by": [
        {
          "id": CGROUP_ID,
          "path": "/CGROUP",
          "removed": false
        }
      ],
      "explanation": "\"disable\" of /CGROUP names it, but \"allow\" of /CGROUP leaves it out"
    },
    {
      "exit": "hlt",
      "state": "given",
      "disabled_by": {
        "id": CGROUP_ID,
        "path": "/CGROUP",
        "removed": false
      },
      "withheld_by": [],
      "explanation": "\"disable\" of /CGROUP names it"
    },
    {
      "exit": "pause",
      "state": "floor",
      "disabled_by": null,
      "withheld_by": [],
      "explanation": "KVM itself disables it in every VM, whatever policies say"
    },
    {
      "exit": "cstate",
      "state": "unsupported",
      "disabled_by": {
        "id": CGROUP_ID,
        "path": "/CGROUP",
        "removed": false
      },
      "withheld_by": [],
      "explanation": "\"disable\" of /CGROUP names it, but KVM cannot disable it on this host"
    },
    {
      "exit": "aperfmperf",
      "state": "on_request",
      "disabled_by": null,
      "withheld_by": [],
      "explanation": "no \"disable\" names it, and nothing withholds it from a VMM that asks"
    }
  ],
  "notes": [
    {
      "code": "off",
      "message": "policies are switched off: VMs are as their VMMs made them until 'exitpolicy on'"
    }
  ]
}

"#]]
        .raw()
    );
}

#[test]
fn vms_are_listed_and_shown() {
    let Some(mut fake) = Fake::new("vms") else {
        return;
    };
    assert_data_eq!(
        quiet(fake.run("vm list")),
        str![[r#"
ID  PID  VCPUS  FLOOR  REQUESTED  EFFECTIVE  CLAMPED  OVERRIDE  STATE  CGROUP

"#]]
        .raw()
    );
    let vm = uapi::Vm {
        id: 1,
        cgroup_id: fake.id("child"),
        pid: 4711,
        vcpus: 2,
        floor: 0b00100,
        requested: 0b00011,
        effective: 0b00110,
        clamped: 0b00001,
        ..uapi::Vm::default()
    };
    let other = uapi::Vm {
        id: 12,
        cgroup_id: u64::MAX - 1,
        ..vm
    };
    fake.vms.extend([(1, vm), (12, other)]);
    assert_data_eq!(
        quiet(fake.run("vm list")),
        str![[r#"
ID  PID  VCPUS  FLOOR  REQUESTED  EFFECTIVE  CLAMPED  OVERRIDE  STATE  CGROUP
1  4711  2  pause  mwait,hlt  hlt,pause  mwait  -  in force  /CGROUP/child
12  4711  2  pause  mwait,hlt  hlt,pause  mwait  -  in force  (removed)

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("vm list -j")),
        str![[r#"
{"schema_version":1,"vms":[{"id":1,"pid":4711,"vcpus":2,"cgroup":{"id":CHILD_ID,"path":"/CGROUP/child","removed":false},"floor":["pause"],"requested":["mwait","hlt"],"effective":["hlt","pause"],"clamped":["mwait"],"override":null,"refused":[],"refusal":null,"pending":0,"adopted":false,"vcpu_list":[]},{"id":12,"pid":4711,"vcpus":2,"cgroup":{"id":18446744073709551614,"path":null,"removed":true},"floor":["pause"],"requested":["mwait","hlt"],"effective":["hlt","pause"],"clamped":["mwait"],"override":null,"refused":[],"refusal":null,"pending":0,"adopted":false,"vcpu_list":[]}],"unmanaged":[],"notes":[]}

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("vm show 1")),
        str![[r#"
id  1
pid  4711
vcpus  2
cgroup  /CGROUP/child
floor  pause
requested  mwait,hlt
effective  hlt,pause
clamped  mwait
override  -
adopted  no
state  in force

VCPU  OVERRIDE  WANTED  IN FORCE  STATE

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("vm show 12 -j")),
        str![[r#"
{"schema_version":1,"id":12,"pid":4711,"vcpus":2,"cgroup":{"id":18446744073709551614,"path":null,"removed":true},"floor":["pause"],"requested":["mwait","hlt"],"effective":["hlt","pause"],"clamped":["mwait"],"override":null,"refused":[],"refusal":null,"pending":0,"adopted":false,"vcpu_list":[],"notes":[]}

"#]]
        .raw()
    );

    let run = fake.run("vm show 2");
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stderr,
        str![[r#"
error: there is no VM 2: it ended, or never was
  hint: 'exitpolicy vm list' says which there are

"#]]
        .raw()
    );
}

#[test]
fn what_the_module_refuses_is_explained() {
    let Some(mut fake) = Fake::new("refused") else {
        return;
    };
    for (errno, code, kind) in [
        (libc::EPERM, 4, "not_permitted"),
        (libc::ENODEV, 1, "cgroup_removed"),
        (libc::EINVAL, 1, "version_mismatch"),
        (libc::E2BIG, 1, "version_mismatch"),
        (libc::ENOTTY, 1, "version_mismatch"),
        (libc::EBADF, 1, "not_a_cgroup"),
        (libc::EFAULT, 1, "os"),
        (libc::ENOMEM, 1, "os"),
    ] {
        fake.refuse = Some(errno);
        let run = fake.run("-j policy set CGROUP --disable hlt");
        assert_eq!((run.code, run.stdout.as_str()), (Some(code), ""), "{errno}");
        assert!(
            run.stderr.contains(&format!("\"code\":\"{kind}\"")),
            "{run:?}"
        );
    }
    assert!(fake.policies.is_empty());

    fake.refuse = Some(libc::EPERM);
    assert_data_eq!(
        fake.run("policy set CGROUP --disable hlt").stderr,
        str![[r#"
error: cannot set the policy of cgroup /CGROUP: Operation not permitted
  hint: run it as root: /dev/exitpolicy belongs to root, and needs CAP_SYS_ADMIN in the initial user namespace, which a container does not have

"#]]
        .raw()
    );
    fake.refuse = Some(libc::ENODEV);
    assert_data_eq!(
        fake.run("policy clear CGROUP").stderr,
        str![[r#"
error: cannot clear the policy of cgroup /CGROUP: the cgroup is being removed
  hint: nothing is to be done: its policy goes away with it

"#]]
        .raw()
    );
}

#[test]
fn what_is_no_cgroup_is_refused_before_the_module_is_asked() {
    let Some(mut fake) = Fake::new("bad") else {
        return;
    };
    // Whoever asked would be told something else.
    fake.refuse = Some(libc::EIO);
    let run = fake.run("policy show CGROUP/nothing");
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stderr.replace(fake.root().to_str().unwrap(), ""),
        str![[r#"
error: there is no cgroup CGROUP/nothing: looked for /sys/fs/cgroup/CGROUP/nothing
  hint: name it by its path below the root of the hierarchy (/machine.slice), by that of its directory, or relative to the current directory (./machine.slice); 'systemd-cgls' lists those that exist

"#]]
        .raw()
    );
    let run = fake.run("policy set /dev/exitpolicy --allow none");
    assert_data_eq!(
        run.stderr,
        str![[r#"
error: /dev/exitpolicy is no cgroup: it is not a directory; cgroup v2 is at /sys/fs/cgroup
  hint: name a directory of the cgroup v2 file system, or a path below its root (/machine.slice)

"#]]
        .raw()
    );
    let run = fake.run("policy set /proc --allow none");
    assert_data_eq!(
        run.stderr,
        str![[r#"
error: /proc is no cgroup: it is in another file system; cgroup v2 is at /sys/fs/cgroup
  hint: name a directory of the cgroup v2 file system, or a path below its root (/machine.slice)

"#]]
        .raw()
    );
    let run = fake.run("policy set CGROUP/cgroup.procs --allow none -j");
    assert_data_eq!(
        run.stderr,
        str![[r#"
{"schema_version":1,"error":{"code":"not_a_cgroup","message":"CGROUP/cgroup.procs is no cgroup: it is not a directory; cgroup v2 is at /sys/fs/cgroup","hint":"name a directory of the cgroup v2 file system, or a path below its root (/machine.slice)"}}

"#]]
        .raw()
    );
}
