// SPDX-License-Identifier: GPL-2.0

//! A host whose files say anything: `exitpolicy doctor` says something of it.

#![no_main]

use arbitrary::Arbitrary;
use exitpolicy::{
    doctor::{
        can_work,
        examine, //
    },
    Host, //
};
use libfuzzer_sys::fuzz_target;
use std::fs;

/// What it reads.
const FILES: [&str; 19] = [
    "/boot/config-7.3",
    "/dev/kvm",
    "/lib/modules/7.3/modules.dep",
    "/lib/modules/7.3/updates/kvm_exitpolicy.ko",
    "/proc/config.gz",
    "/proc/cpuinfo",
    "/proc/self/mountinfo",
    "/proc/sys/kernel/ftrace_enabled",
    "/sys/devices/system/cpu/smt/active",
    "/sys/devices/system/cpu/smt/control",
    "/sys/devices/system/cpu/vulnerabilities/mds",
    "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c",
    "/sys/kernel/security/lockdown",
    "/sys/module/kvm/parameters/mitigate_smt_rsb",
    "/sys/module/kvm_amd/parameters/pause_filter_count",
    "/sys/module/kvm_exitpolicy/version",
    "/sys/module/kvm_intel/parameters/ple_gap",
    "/sys/module/module/parameters/sig_enforce",
    "/proc/sys/kernel/osrelease",
];

#[derive(Arbitrary, Debug)]
struct Input {
    files: Vec<(u8, Content)>,
}

#[derive(Arbitrary, Debug)]
enum Content {
    Yes,
    Zero,
    Flags { svm: bool, vmx: bool },
    Config(u8),
    Bytes(Vec<u8>),
}

impl Content {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Yes => b"Y\n".to_vec(),
            Self::Zero => b"0\n".to_vec(),
            Self::Flags { svm, vmx } => {
                let flag = |has: &bool, name| if *has { name } else { "" };
                let (svm, vmx) = (flag(svm, " svm"), flag(vmx, " vmx"));
                format!("flags\t\t: fpu{svm}{vmx}\nbugs\t\t: smt_rsb\n").into_bytes()
            }
            Self::Config(which) => [
                "CONFIG_MODULES",
                "CONFIG_RUST",
                "CONFIG_FPROBE",
                "CONFIG_DYNAMIC_FTRACE_WITH_ARGS",
                "CONFIG_KPROBES",
                "CONFIG_CGROUPS",
                "CONFIG_KVM_AMD",
                "CONFIG_PREEMPT_RT",
            ]
            .iter()
            .enumerate()
            .filter(|(bit, _)| which & (1 << bit) != 0)
            .map(|(_, option)| format!("{option}=y\n"))
            .collect::<Vec<_>>()
            .concat()
            .into_bytes(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

fuzz_target!(|input: Input| {
    let root = tempfile::tempdir().expect("a directory");
    let host = Host::new(root.path());
    let write = |path: &str, content: &[u8]| {
        let path = host.path(path);
        fs::create_dir_all(path.parent().expect("a file's")).expect("a directory");
        fs::write(path, content).expect("a file");
    };
    write("/proc/sys/kernel/osrelease", b"7.3\n");
    for (file, content) in input.files.iter().take(FILES.len()) {
        write(FILES[usize::from(*file) % FILES.len()], &content.bytes());
    }
    let checks = examine(&host);
    assert!(!checks.is_empty());
    for check in &checks {
        assert!(!check.id.is_empty() && !check.found.is_empty(), "{check:?}");
        assert!(
            check.todo.as_ref().is_none_or(|todo| !todo.is_empty()),
            "{check:?}"
        );
    }
    let _ = can_work(&checks);
});
