// SPDX-License-Identifier: GPL-2.0

//! VMs that KVM has and the module does not know.

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

/// The VMM of all VMs that a [`Fake`] has.
const VMM: u32 = 4711;

/// The file of a thread of a process is a VM.
fn add_file(fake: &Fake, process: u32, thread: u32, fd: u32) {
    let proc = format!("proc/{thread}");
    let status = format!("Name:\tvmm\nTgid:\t{process}\nPid:\t{thread}\n");
    write(fake.root(), &format!("{proc}/status"), &status);
    write(fake.root(), &format!("{proc}/fd/0"), "");
    let file = fake.root().join(format!("{proc}/fd/{fd}"));
    symlink("anon_inode:kvm-vm", file).unwrap();
}

/// KVM has a VM, which a thread made. The vCPUs are given with the threads that run them.
fn add_kvm_vm(fake: &Fake, thread: u32, fd: u32, vcpus: &[(u32, u32)]) {
    let vm = format!("sys/kernel/debug/kvm/{thread}-{fd}");
    write(fake.root(), &format!("{vm}/halt_exits"), "0\n");
    for (id, thread) in vcpus {
        let pid = format!("{vm}/vcpu{id}/pid");
        write(fake.root(), &pid, &format!("{thread}\n"));
    }
}

/// One that the process's first thread made.
fn add_plain(fake: &Fake, process: u32, fd: u32, vcpus: u32) {
    let vcpus: Vec<_> = (0..vcpus).map(|id| (id, process + 1 + id)).collect();
    add_kvm_vm(fake, process, fd, &vcpus);
    add_file(fake, process, process, fd);
}

/// What the list says after the VMs that the module knows.
#[track_caller]
fn unmanaged(fake: &mut Fake) -> String {
    let text = quiet(fake.run("vm list"));
    let after = text.split_once("\n\n").map(|(_, after)| after);
    after.unwrap_or_default().to_owned()
}

fn host(name: &str) -> Option<Fake> {
    let fake = Fake::new(name)?;
    write(
        fake.root(),
        "sys/module/kvm_intel/parameters/ple_gap",
        "128\n",
    );
    // KVM's own files.
    write(fake.root(), "sys/kernel/debug/kvm/halt_exits", "0\n");
    write(
        fake.root(),
        "sys/kernel/debug/kvm/not-a-vm/vcpu0/pid",
        "1\n",
    );
    Some(fake)
}

#[test]
fn vms_that_the_module_knows_are_not_unmanaged() {
    let Some(mut fake) = host("none") else {
        return;
    };
    assert_eq!(unmanaged(&mut fake), "");
    fake.add_vm(1, 2, 0);
    fake.add_vm(2, 1, 0);
    add_plain(&fake, VMM, 12, 2);
    add_plain(&fake, VMM, 13, 1);
    assert_eq!(unmanaged(&mut fake), "");
    // One that is new to the module gets its directory later.
    fake.add_vm(3, 1, 0);
    assert_eq!(unmanaged(&mut fake), "");
    assert!(quiet(fake.run("vm list -j")).ends_with("\"unmanaged\":[],\"notes\":[]}\n"));
}

#[test]
fn one_without_a_vcpu_is_decided_on_later() {
    let Some(mut fake) = host("no-vcpu") else {
        return;
    };
    add_plain(&fake, 100, 12, 0);
    assert_data_eq!(
        quiet(fake.run("vm list")),
        str![[r#"
ID  PID  VCPUS  FLOOR  REQUESTED  EFFECTIVE  CLAMPED  OVERRIDE  STATE  CGROUP

unmanaged: pid 100 (fd 12): no vCPU yet

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("vm list -j")),
        str![[r#"
{"schema_version":1,"vms":[],"unmanaged":[{"pid":100,"fd":12,"debugfs":"100-12","reason":"no_vcpu","explanation":"no vCPU yet"}],"notes":[]}

"#]]
        .raw()
    );
}

#[test]
fn one_with_vcpus_was_missed_or_is_tdx() {
    let Some(mut fake) = host("missed") else {
        return;
    };
    let tdx = "sys/module/kvm_intel/parameters/tdx";
    add_plain(&fake, 100, 12, 1);
    add_plain(&fake, 100, 9, 0);
    let missed = "unmanaged: pid 100 (fd 9): no vCPU yet\nunmanaged: pid 100 (fd 12): missed\n";
    assert_eq!(unmanaged(&mut fake), missed);
    write(fake.root(), tdx, "N\n");
    assert_eq!(unmanaged(&mut fake), missed);
    write(fake.root(), tdx, "Y\n");
    assert_data_eq!(
        unmanaged(&mut fake),
        str![[r#"
unmanaged: pid 100 (fd 9): no vCPU yet
unmanaged: pid 100 (fd 12): TDX, or missed

"#]]
        .raw()
    );
    assert!(quiet(fake.run("vm list -j")).contains("\"reason\":\"tdx_or_missed\""));
    fake.info.vendor = uapi::VENDOR_SVM;
    assert_eq!(unmanaged(&mut fake), missed);
    fake.info.vendor = uapi::VENDOR_NONE;
    assert_data_eq!(
        unmanaged(&mut fake),
        str![[r#"
unmanaged: pid 100 (fd 9): the module works with no vendor module
unmanaged: pid 100 (fd 12): the module works with no vendor module

"#]]
        .raw()
    );
}

#[test]
fn of_several_vms_of_a_process_some_are_unmanaged() {
    let Some(mut fake) = host("several") else {
        return;
    };
    fake.add_vm(1, 2, 0);
    add_plain(&fake, VMM, 12, 1);
    add_plain(&fake, VMM, 13, 2);
    add_plain(&fake, VMM, 14, 0);
    // Its vCPUs tell which one the module knows.
    assert_data_eq!(
        unmanaged(&mut fake),
        str![[r#"
unmanaged: pid 4711 (fd 12): missed
unmanaged: pid 4711 (fd 14): no vCPU yet

"#]]
        .raw()
    );
    // They do not.
    add_plain(&fake, VMM, 15, 2);
    assert_data_eq!(
        unmanaged(&mut fake),
        str![[r#"
unmanaged: pid 4711 (fd 14): no vCPU yet
unmanaged: pid 4711 (one of several VMs): missed
unmanaged: pid 4711 (one of several VMs): missed

"#]]
        .raw()
    );
    assert!(quiet(fake.run("vm list -j")).contains(
        "{\"pid\":4711,\"fd\":null,\"debugfs\":null,\"reason\":\"missed\",\
         \"explanation\":\"missed\"}"
    ));
    fake.add_vm(2, 2, 0);
    fake.add_vm(3, 1, 0);
    assert_eq!(
        unmanaged(&mut fake),
        "unmanaged: pid 4711 (fd 14): no vCPU yet\n"
    );
}

#[test]
fn a_thread_is_one_of_a_process() {
    let Some(mut fake) = host("thread") else {
        return;
    };
    fake.add_vm(1, 1, 0);
    add_kvm_vm(&fake, 4720, 12, &[(0, 4721)]);
    add_file(&fake, VMM, 4720, 12);
    assert_eq!(unmanaged(&mut fake), "");
    add_kvm_vm(&fake, 4720, 13, &[]);
    add_file(&fake, VMM, 4720, 13);
    add_kvm_vm(&fake, 4722, 14, &[(0, 4721), (1, 4724)]);
    add_file(&fake, VMM, 4722, 14);
    assert_data_eq!(
        unmanaged(&mut fake),
        str![[r#"
unmanaged: pid 4711 (fd 13): no vCPU yet
unmanaged: pid 4711 (fd 14): missed

"#]]
        .raw()
    );
    assert!(quiet(fake.run("vm list -j")).contains("\"fd\":14,\"debugfs\":\"4722-14\""));
}

#[test]
fn of_a_thread_that_ended_nothing_is_made_up() {
    let Some(mut fake) = host("ended") else {
        return;
    };
    // Its vCPUs' threads are there. One has not run yet.
    add_kvm_vm(&fake, 4720, 12, &[(0, 0), (1, 4721)]);
    add_file(&fake, VMM, 4721, 12);
    assert_eq!(
        unmanaged(&mut fake),
        "unmanaged: pid 4711 (fd 12): missed\n"
    );
    fake.add_vm(1, 2, 0);
    assert_eq!(unmanaged(&mut fake), "");

    // There is none; and another process has the number of the one that made the VM.
    add_kvm_vm(&fake, 200, 12, &[(0, 0)]);
    add_kvm_vm(&fake, 200, 13, &[]);
    add_plain(&fake, 200, 30, 0);
    assert_data_eq!(
        unmanaged(&mut fake),
        str![[r#"
unmanaged: pid 200 (fd 30): no vCPU yet
unmanaged: pid unknown (200-12 in debugfs): missed
unmanaged: pid unknown (200-13 in debugfs): no vCPU yet

"#]]
        .raw()
    );
    assert!(quiet(fake.run("vm list -j")).contains("{\"pid\":null,\"fd\":12,"));
    // That process is one that the module knows, too.
    let vm = fake.vms[&1];
    fake.add_vm(2, 1, 0);
    fake.vms.get_mut(&2).unwrap().pid = 200;
    add_plain(&fake, 200, 31, 1);
    assert_data_eq!(
        unmanaged(&mut fake),
        str![[r#"
unmanaged: pid 200 (fd 30): no vCPU yet
unmanaged: pid unknown (200-12 in debugfs): missed
unmanaged: pid unknown (200-13 in debugfs): no vCPU yet

"#]]
        .raw()
    );
    // A VM that the module has, and that is not found elsewhere, may be it.
    fake.vms.insert(
        3,
        uapi::Vm {
            id: 3,
            pid: 300,
            ..vm
        },
    );
    assert_data_eq!(
        unmanaged(&mut fake),
        str![[r#"
unmanaged: pid 200 (fd 30): no vCPU yet
unmanaged: pid unknown (200-13 in debugfs): no vCPU yet

"#]]
        .raw()
    );
}

#[test]
fn without_debugfs_it_is_not_known() {
    let Some(mut fake) = host("debugfs") else {
        return;
    };
    fs::remove_dir_all(fake.root().join("sys/kernel/debug")).unwrap();
    let run = fake.run("vm list");
    assert_eq!(run.code, Some(0));
    assert_data_eq!(
        run.stdout,
        str![[r#"
ID  PID  VCPUS  FLOOR  REQUESTED  EFFECTIVE  CLAMPED  OVERRIDE  STATE  CGROUP

"#]]
        .raw()
    );
    assert_data_eq!(
        run.stderr,
        str![[r#"
note: cannot read /sys/kernel/debug/kvm: No such file or directory: VMs that the module does not know are not shown; mount it with 'mount -t debugfs none /sys/kernel/debug'

"#]]
        .raw()
    );
    assert_data_eq!(
        quiet(fake.run("vm list -j")),
        str![[r#"
{"schema_version":1,"vms":[],"unmanaged":null,"notes":[{"code":"unmanaged_unknown","message":"cannot read /sys/kernel/debug/kvm: No such file or directory: VMs that the module does not know are not shown; mount it with 'mount -t debugfs none /sys/kernel/debug'"}]}

"#]]
        .raw()
    );

    // What cannot be read for another reason is not to be mounted.
    write(fake.root(), "sys/kernel/debug/kvm", "");
    let run = fake.run("vm list");
    assert_eq!(
        run.stderr,
        "note: cannot read /sys/kernel/debug/kvm: Not a directory: VMs that the module does not \
         know are not shown\n"
    );

    // Without a vendor module there are no VMs.
    fs::remove_dir_all(fake.root().join("sys/kernel/debug")).unwrap();
    fs::remove_dir_all(fake.root().join("sys/module")).unwrap();
    assert_eq!(unmanaged(&mut fake), "");
}
