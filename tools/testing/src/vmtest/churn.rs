// SPDX-License-Identifier: GPL-2.0

//! A process that makes VMs and lets them go, whatever else happens to the host.

use std::{
    io::{
        self,
        ErrorKind, //
    },
    sync::{
        atomic::{
            AtomicBool,
            Ordering, //
        },
        Arc, //
    },
    thread, //
};

use anyhow::Result;
use serde::{
    Deserialize,
    Serialize, //
};
use testing::{
    pause,
    payload::Payload,
    vmm::{
        ensure_complete,
        Irqchip,
        Vm,
        Work, //
    }, //
};

/// The argument that makes the test program such a process.
pub const CHURN: &str = "--churn-vms";

/// What it did.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Churned {
    pub vms: usize,
    /// How often there was no KVM.
    pub without_kvm: usize,
}

/// Makes VMs until standard input ends.
pub fn churn() -> Result<()> {
    let ended = Arc::new(AtomicBool::new(false));
    let watch = ended.clone();
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        watch.store(true, Ordering::Release);
    });
    let mut churned = Churned::default();
    while !ended.load(Ordering::Acquire) {
        match one() {
            Ok(()) => churned.vms += 1,
            Err(error) if is_without_kvm(&error) => churned.without_kvm += 1,
            Err(error) => return Err(error),
        }
        // So that KVM's vendor module is unused now and then.
        pause();
    }
    println!("{}", serde_json::to_string(&churned)?);
    Ok(())
}

/// One VM with one vCPU that does a little.
fn one() -> Result<()> {
    let vm = Arc::new(Vm::new(Irqchip::Kernel)?);
    let mut vcpu = vm.create_vcpu(0)?;
    let work = Work::new(Payload::Hlt, 3);
    let report = vcpu.run(work, &AtomicBool::new(false))?;
    ensure_complete(work, &report)
}

/// Whether the vendor module is away, or on its way.
fn is_without_kvm(error: &anyhow::Error) -> bool {
    let errno = error
        .downcast_ref::<kvm_ioctls::Error>()
        .map(|error| io::Error::from_raw_os_error(error.errno()));
    errno.is_some_and(|error| {
        error.kind() == ErrorKind::NotFound
            || [libc::ENODEV, libc::ENXIO]
                .map(Some)
                .contains(&error.raw_os_error())
    })
}
