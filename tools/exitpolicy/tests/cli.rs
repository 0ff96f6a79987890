// SPDX-License-Identifier: GPL-2.0

//! The command where there is no module: it runs anywhere.

mod common;

use common::{
    command,
    write,
    Run, //
};
use snapbox::{
    assert_data_eq,
    str,
    IntoData, //
};
use std::{
    fs,
    os::unix::{
        fs::PermissionsExt,
        process::CommandExt, //
    },
    path::Path,
    process::{
        Command,
        Stdio, //
    },
};

fn run(root: &Path, arguments: &str) -> Run {
    output(root, &mut command(root, arguments))
}

fn output(root: &Path, command: &mut Command) -> Run {
    let run = Run::from(command.output().unwrap());
    Run {
        // The directory that stands for `/` has another name each time.
        stdout: run.stdout.replace(root.to_str().unwrap(), ""),
        stderr: run.stderr.replace(root.to_str().unwrap(), ""),
        ..run
    }
}

/// Everything that speaks to the module.
const NEED_THE_MODULE: [&str; 13] = [
    "status",
    "on",
    "off",
    "policy set / --disable hlt",
    "policy show /",
    "policy show / --effective",
    "policy list",
    "policy clear /",
    "vm list",
    "vm show 1",
    "vm set 1 --disable hlt",
    "vm reset 1",
    "unload",
];

#[test]
fn without_the_module_all_say_so() {
    let root = tempfile::tempdir().unwrap();
    for arguments in NEED_THE_MODULE {
        let run = run(root.path(), arguments);
        assert_eq!(
            (run.code, run.stdout.as_str()),
            (Some(3), ""),
            "{arguments}"
        );
        assert_data_eq!(
            run.stderr,
            str![[r#"
error: cannot open /dev/exitpolicy: the module kvm_exitpolicy is not loaded (No such file or directory)
  hint: load it with 'modprobe kvm_exitpolicy'; 'exitpolicy doctor' says whether this host can, and what is missing

"#]]
            .raw(),
        );
    }
}

#[test]
fn errors_are_json_where_asked() {
    let root = tempfile::tempdir().unwrap();
    for arguments in NEED_THE_MODULE {
        let run = run(root.path(), &format!("--json {arguments}"));
        assert_eq!(
            (run.code, run.stdout.as_str()),
            (Some(3), ""),
            "{arguments}"
        );
        assert_data_eq!(
            run.stderr,
            str![[r#"
{"schema_version":1,"error":{"code":"not_loaded","message":"cannot open /dev/exitpolicy: the module kvm_exitpolicy is not loaded (No such file or directory)","hint":"load it with 'modprobe kvm_exitpolicy'; 'exitpolicy doctor' says whether this host can, and what is missing"}}

"#]]
            .raw(),
        );
    }
}

#[test]
fn who_may_not_open_the_device_is_told() {
    let root = tempfile::tempdir().unwrap();
    write(root.path(), "dev/exitpolicy", "");
    fs::set_permissions(
        root.path().join("dev/exitpolicy"),
        fs::Permissions::from_mode(0o000),
    )
    .unwrap();
    let mut command = command(root.path(), "status");
    // SAFETY: An FFI call without requirements.
    if unsafe { libc::geteuid() } == 0 {
        // Root may open anything.
        command.uid(65534);
    }
    let run = output(root.path(), &mut command);
    assert_eq!((run.code, run.stdout.as_str()), (Some(4), ""));
    assert_data_eq!(
        run.stderr,
        str![[r#"
error: cannot open /dev/exitpolicy: Permission denied
  hint: run it as root: /dev/exitpolicy belongs to root, and needs CAP_SYS_ADMIN in the initial user namespace, which a container does not have

"#]]
        .raw(),
    );
}

#[test]
fn what_is_no_device_fails() {
    let root = tempfile::tempdir().unwrap();
    write(root.path(), "dev/exitpolicy", "");
    let run = run(root.path(), "status");
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stderr,
        str![[r#"
error: cannot ask the module what it does: the module refused the request as malformed or unknown (Inappropriate ioctl for device)
  hint: the command and the module are of different versions: install both from the same one, and load the module again

"#]]
        .raw(),
    );
}

#[test]
fn without_cgroup_v2_there_is_no_policy() {
    let root = tempfile::tempdir().unwrap();
    write(root.path(), "dev/exitpolicy", "");
    write(
        root.path(),
        "proc/self/mountinfo",
        "32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n",
    );
    let run = run(root.path(), "policy set machine.slice --disable hlt");
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stderr,
        str![[r#"
error: cannot find the cgroup v2 file system: only cgroup v1 is mounted
  hint: the kernel has the v2 hierarchy all the same; mount it with 'mount -t cgroup2 none DIRECTORY', or boot with systemd.unified_cgroup_hierarchy=1

"#]]
        .raw(),
    );
}

#[test]
fn wrong_command_lines_are_refused() {
    let root = tempfile::tempdir().unwrap();
    for (arguments, said) in [
        ("", "Usage: exitpolicy"),
        ("frobnicate", "unrecognized subcommand 'frobnicate'"),
        ("status --frobnicate", "unexpected argument '--frobnicate'"),
        ("policy", "Usage: exitpolicy policy"),
        ("policy set /", "<--disable <SET>|--allow <SET>>"),
        ("policy set --disable hlt", "<CGROUP>"),
        ("policy set / --disable", "a value is required"),
        ("policy set / --disable halt", "not a set of exits"),
        ("policy set / --disable hlt,", "not a set of exits"),
        ("policy set / --allow all,hlt", "not a set of exits"),
        ("policy set / --allow=", "write 'none'"),
        (
            "policy set / --allow hlt --allow hlt",
            "cannot be used multiple",
        ),
        ("policy show", "<CGROUP>"),
        ("vm show", "<ID>"),
        ("vm show 0", "invalid value '0'"),
        ("vm show -1", "unexpected argument '-1'"),
        ("vm show 18446744073709551616", "invalid value"),
        ("policy set / --new-only", "<--disable <SET>|--allow <SET>>"),
        (
            "policy show / --new-only",
            "unexpected argument '--new-only'",
        ),
        ("off --timeout", "a value is required"),
        ("off --timeout 0s", "no time at all"),
        ("off --timeout 60001ms", "too long"),
        ("off --timeout 5", "time unit needed"),
        ("off --timeout -5s", "write a number and a unit"),
        ("off --timeout 5s --no-wait", "cannot be used with"),
        ("unload --timeout 61s", "from '1ms' to '60s'"),
        ("unload --no-wait", "unexpected argument '--no-wait'"),
        ("unload --new-only", "unexpected argument '--new-only'"),
        ("vm set", "<ID>"),
        ("vm set 1", "--disable <SET>"),
        ("vm set 0 --disable hlt", "invalid value '0'"),
        ("vm set 1 --disable halt", "not a set of exits"),
        ("vm set 1 --disable inherit", "not a set of exits"),
        ("vm set 1 --disable hlt --vcpu x", "invalid value 'x'"),
        ("vm set 1 --disable hlt --vcpu 4294967296", "invalid value"),
        ("vm set 1 --disable hlt --new-only", "unexpected argument"),
        ("vm set 1 --disable hlt --timeout soon", "invalid value"),
        ("vm reset", "<ID>"),
        ("vm reset x", "invalid value 'x'"),
        (
            "vm reset 1 --disable hlt",
            "unexpected argument '--disable'",
        ),
        ("vm reset 1 --vcpu", "a value is required"),
        ("completions tcsh", "possible values: bash, zsh, fish"),
    ] {
        let run = run(root.path(), arguments);
        assert_eq!(
            (run.code, run.stdout.as_str()),
            (Some(2), ""),
            "{arguments}"
        );
        assert!(run.stderr.contains(said), "{arguments}: {}", run.stderr);
    }
}

#[test]
fn wrong_command_lines_are_json_where_asked() {
    let root = tempfile::tempdir().unwrap();
    for arguments in [
        "-j policy set / --disable halt",
        "policy set / --disable halt --json",
    ] {
        let run = run(root.path(), arguments);
        assert_eq!(
            (run.code, run.stdout.as_str()),
            (Some(2), ""),
            "{arguments}"
        );
        assert_data_eq!(
            run.stderr,
            str![[r#"
{"schema_version":1,"error":{"code":"usage","message":"invalid value 'halt' for '--disable <SET>': not a set of exits; write 'all', 'none', or some of mwait, hlt, pause, cstate, aperfmperf with commas between\n\nFor more information, try '--help'.","hint":null}}

"#]]
            .raw(),
        );
    }
    let pretty = run(root.path(), "frobnicate -jp");
    assert!(pretty.stderr.starts_with("{\n  \"schema_version\": 1,\n"));
    let after_dashes = run(root.path(), "policy show -- --json x");
    assert!(after_dashes.stderr.starts_with("error: "));
}

#[test]
fn help_names_the_exit_codes() {
    let root = tempfile::tempdir().unwrap();
    for arguments in NEED_THE_MODULE {
        let words: Vec<_> = arguments
            .split(' ')
            .take_while(|word| word.chars().all(char::is_alphabetic))
            .collect();
        let run = run(root.path(), &format!("{} --help", words.join(" ")));
        assert_eq!(
            (run.code, run.stderr.as_str()),
            (Some(0), ""),
            "{arguments}"
        );
        assert!(run.stdout.contains("\nEXIT STATUS\n"), "{arguments}");
        assert!(
            run.stdout
                .contains("  3  the module kvm_exitpolicy is not loaded\n"),
            "{arguments}",
        );
    }
    for arguments in [
        "on",
        "off",
        "policy set",
        "policy clear",
        "vm set",
        "vm reset",
    ] {
        let run = run(root.path(), &format!("{arguments} --help"));
        assert!(
            run.stdout
                .contains("  5  done, but some vCPUs are still on their way"),
            "{arguments}",
        );
    }
    assert_data_eq!(run(root.path(), "--version").stdout, "exitpolicy 0.1.0\n");
}

#[test]
fn completions_know_exits_and_directories() {
    let root = tempfile::tempdir().unwrap();
    for (shell, exits, directories) in [
        (
            "bash",
            "mwait hlt pause cstate aperfmperf all none",
            "compgen",
        ),
        (
            "zsh",
            "(mwait hlt pause cstate aperfmperf all none)",
            ":_files -/",
        ),
        ("fish", "aperfmperf\\t''", "complete -c exitpolicy"),
    ] {
        let run = run(root.path(), &format!("completions {shell}"));
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{shell}");
        assert!(run.stdout.contains(exits), "{shell}");
        assert!(run.stdout.contains(directories), "{shell}");
    }
}

/// A host as Debian makes it, on which all but the module itself is there.
fn host(root: &Path) {
    write(root, "proc/self/mountinfo", "");
    write(
        root,
        "proc/cpuinfo",
        "flags\t\t: fpu vmx\nbugs\t\t: spectre_v1\n",
    );
    write(root, "proc/sys/kernel/osrelease", "7.3.4+deb13-amd64\n");
    write(root, "proc/sys/kernel/ftrace_enabled", "1\n");
    write(root, "sys/module/kvm_intel/parameters/ple_gap", "128\n");
    write(root, "sys/devices/system/cpu/smt/active", "1\n");
    write(
        root,
        "boot/config-7.3.4+deb13-amd64",
        "CONFIG_MODULES=y\nCONFIG_RUST=y\nCONFIG_FPROBE=y\nCONFIG_DYNAMIC_FTRACE_WITH_ARGS=y\n\
         CONFIG_KPROBES=y\nCONFIG_CGROUPS=y\nCONFIG_KVM_INTEL=m\n",
    );
}

#[test]
fn doctor_says_what_is_missing() {
    let root = tempfile::tempdir().unwrap();
    host(root.path());
    let run = run(root.path(), "doctor");
    assert_eq!((run.code, run.stderr.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stdout,
        str![[r#"
ok       cpu: the CPU has vmx
ok       kvm: kvm_intel is loaded
missing  kvm device: /dev/kvm does not work: No such file or directory
         -> load kvm_amd or kvm_intel, and see what the kernel log says of it
ok       floor: KVM rations PAUSE exits: the floor is none
ok       smt: SMT is on
ok       kernel config: /boot/config-7.3.4+deb13-amd64 has all that is needed
ok       ftrace: ftrace is on
missing  cgroup: cannot find the cgroup v2 file system: no cgroup file system is mounted
         -> the kernel has the v2 hierarchy all the same; mount it with 'mount -t cgroup2 none DIRECTORY', or boot with systemd.unified_cgroup_hierarchy=1
ok       module signature: the kernel takes modules without a signature
missing  module: kvm_exitpolicy.ko is not installed for kernel 7.3.4+deb13-amd64
         -> build and install it with 'make' and 'make install' in its source tree

Something is missing: this host cannot run kvm_exitpolicy as it is.

"#]]
        .raw(),
    );
}

#[test]
fn doctor_speaks_json() {
    let root = tempfile::tempdir().unwrap();
    host(root.path());
    let run = run(root.path(), "doctor -p");
    assert_eq!((run.code, run.stderr.as_str()), (Some(1), ""));
    assert_data_eq!(
        run.stdout,
        str![[r#"
{
  "schema_version": 1,
  "can_work": false,
  "checks": [
    {
      "id": "cpu",
      "state": "ok",
      "found": "the CPU has vmx",
      "todo": null
    },
    {
      "id": "kvm",
      "state": "ok",
      "found": "kvm_intel is loaded",
      "todo": null
    },
    {
      "id": "kvm_device",
      "state": "missing",
      "found": "/dev/kvm does not work: No such file or directory",
      "todo": "load kvm_amd or kvm_intel, and see what the kernel log says of it"
    },
    {
      "id": "floor",
      "state": "ok",
      "found": "KVM rations PAUSE exits: the floor is none",
      "todo": null
    },
    {
      "id": "smt",
      "state": "ok",
      "found": "SMT is on",
      "todo": null
    },
    {
      "id": "kernel_config",
      "state": "ok",
      "found": "/boot/config-7.3.4+deb13-amd64 has all that is needed",
      "todo": null
    },
    {
      "id": "ftrace",
      "state": "ok",
      "found": "ftrace is on",
      "todo": null
    },
    {
      "id": "cgroup",
      "state": "missing",
      "found": "cannot find the cgroup v2 file system: no cgroup file system is mounted",
      "todo": "the kernel has the v2 hierarchy all the same; mount it with 'mount -t cgroup2 none DIRECTORY', or boot with systemd.unified_cgroup_hierarchy=1"
    },
    {
      "id": "module_signature",
      "state": "ok",
      "found": "the kernel takes modules without a signature",
      "todo": null
    },
    {
      "id": "module",
      "state": "missing",
      "found": "kvm_exitpolicy.ko is not installed for kernel 7.3.4+deb13-amd64",
      "todo": "build and install it with 'make' and 'make install' in its source tree"
    }
  ],
  "notes": []
}

"#]]
        .raw(),
    );
}

/// `exitpolicy completions bash | head -1` ends by the signal, without a word.
#[test]
fn a_closed_pipe_is_no_error_to_report() {
    use std::os::unix::process::ExitStatusExt;

    let root = tempfile::tempdir().unwrap();
    let mut child = command(root.path(), "completions bash")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    // It may have been faster.
    if output.status.signal().is_none() {
        assert_eq!(output.status.code(), Some(0));
    }
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}
