// SPDX-License-Identifier: GPL-2.0

//! VMs in KVM's debugfs, whose threads and files come and go, beside those that the module knows.

#![no_main]

use arbitrary::Arbitrary;
use exitpolicy::{
    device::Vendor,
    unmanaged::{
        Known,
        Kvm,
        DEBUGFS, //
    },
    Host, //
};
use libfuzzer_sys::fuzz_target;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink, //
};

#[derive(Arbitrary, Debug)]
struct Vm {
    name: Name,
    vcpus: Vec<Name>,
    /// What the thread of a vCPU is said to be.
    thread: Name,
}

/// A few small numbers, so that things meet.
#[derive(Arbitrary, Debug)]
enum Name {
    Numbers(u8, u8),
    Vcpu(u8),
    Number(u8),
    Text(String),
}

#[derive(Arbitrary, Debug)]
struct Thread {
    id: u8,
    file: u8,
    is_vm: bool,
    status: Vec<u8>,
    process: Option<u8>,
}

#[derive(Arbitrary, Debug)]
struct Input {
    vms: Vec<Vm>,
    threads: Vec<Thread>,
    known: Vec<(u8, Vec<u8>)>,
    vendor: Option<bool>,
}

impl Name {
    /// As a name in a directory, if it can be one.
    fn text(&self) -> Option<String> {
        let text = match self {
            Self::Numbers(one, other) => format!("{}-{}", one % 8, other % 8),
            Self::Vcpu(number) => format!("vcpu{}", number % 8),
            Self::Number(number) => (number % 8).to_string(),
            Self::Text(text) => text.clone(),
        };
        let good = !text.is_empty()
            && text.len() < 64
            && !text.contains(['/', '\0'])
            && ![".", ".."].contains(&text.as_str());
        good.then_some(text)
    }
}

fuzz_target!(|input: Input| {
    let root = tempfile::tempdir().expect("a directory");
    let host = Host::new(root.path());
    let debugfs = host.path(DEBUGFS);
    fs::create_dir_all(&debugfs).expect("a directory");
    let mut places = BTreeSet::new();
    for vm in input.vms.iter().take(8) {
        let Some(name) = vm.name.text() else { continue };
        for vcpu in vm.vcpus.iter().take(4).filter_map(Name::text) {
            let vcpu = debugfs.join(&name).join(vcpu);
            // One that has the name of another one's file.
            if fs::create_dir_all(&vcpu).is_ok() {
                let _ = fs::write(vcpu.join("pid"), vm.thread.text().unwrap_or_default());
            }
        }
        if fs::create_dir_all(debugfs.join(&name)).is_ok() {
            places.insert(name);
        }
    }
    for thread in input.threads.iter().take(8) {
        let directory = host.path(format!("/proc/{}", thread.id % 8));
        fs::create_dir_all(directory.join("fd")).expect("a directory");
        let target = if thread.is_vm {
            "anon_inode:kvm-vm"
        } else {
            "/dev/null"
        };
        let _ = symlink(target, directory.join(format!("fd/{}", thread.file % 8)));
        let status = match thread.process {
            Some(process) => format!("Name:\tx\nTgid:\t{}\n", process % 8).into_bytes(),
            None => thread.status.clone(),
        };
        fs::write(directory.join("status"), status).expect("a file");
    }
    let known: Vec<_> = input
        .known
        .iter()
        .take(8)
        .map(|(pid, vcpus)| Known {
            pid: (pid % 8).into(),
            vcpus: vcpus.iter().map(|id| (id % 8).into()).collect(),
        })
        .collect();
    let vendor = input
        .vendor
        .map(|svm| if svm { Vendor::Svm } else { Vendor::Vmx });

    let mut kvm = Kvm::look(&host).expect("it can be read");
    let unmanaged = kvm.unmanaged(&known, vendor);
    // None is made up, and none said twice.
    assert!(
        unmanaged.len() <= places.len(),
        "{unmanaged:?} of {places:?}"
    );
    let said: Vec<_> = unmanaged.iter().filter_map(|vm| vm.place).collect();
    assert_eq!(
        said.iter().collect::<BTreeSet<_>>().len(),
        said.len(),
        "{unmanaged:?}"
    );
    // Nothing has ended meanwhile.
    kvm.forget_ended().expect("it can be read");
    assert_eq!(kvm.unmanaged(&known, vendor), unmanaged);
});
