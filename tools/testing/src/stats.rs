// SPDX-License-Identifier: GPL-2.0

//! KVM's binary statistics of a vCPU.

use std::{
    fs::File,
    os::{
        fd::{
            AsRawFd,
            FromRawFd,
            RawFd, //
        },
        unix::fs::FileExt, //
    }, //
};

use anyhow::{
    Context,
    Result, //
};

nix::ioctl_none!(kvm_get_stats_fd, 0xAE, 0xce);

/// Exits of a vCPU so far.
pub struct Exits {
    /// Of every kind.
    pub all: u64,
    /// How often its guest halted and KVM saw it.
    pub halt: u64,
}

impl Exits {
    pub fn of(vcpu: RawFd) -> Result<Self> {
        Ok(Self {
            all: read(vcpu, "exits")?,
            halt: read(vcpu, "halt_exits")?,
        })
    }
}

/// `struct kvm_stats_header` and `struct kvm_stats_desc` of include/uapi/linux/kvm.h.
fn read(vcpu: RawFd, name: &str) -> Result<u64> {
    const DESCRIPTOR: usize = 16;
    // SAFETY: The command takes no argument.
    let fd = unsafe { kvm_get_stats_fd(vcpu.as_raw_fd()) }.context("KVM_GET_STATS_FD")?;
    // SAFETY: A new file descriptor, which nobody else knows.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut header = [0; 24];
    file.read_exact_at(&mut header, 0)?;
    let field = |index: usize| -> usize {
        let bytes = &header[index * 4..][..4];
        u32::from_ne_bytes(bytes.try_into().expect("four bytes")) as usize
    };
    let (name_size, count, descriptors, data) = (field(1), field(2), field(4), field(5));
    for index in 0..count {
        let mut descriptor = vec![0; DESCRIPTOR + name_size];
        let at = descriptors + index * descriptor.len();
        file.read_exact_at(&mut descriptor, at as u64)?;
        let its_name = descriptor[DESCRIPTOR..].split(|byte| *byte == 0).next();
        if its_name == Some(name.as_bytes()) {
            let offset = u32::from_ne_bytes(descriptor[8..12].try_into()?);
            let mut value = [0; 8];
            file.read_exact_at(&mut value, (data + offset as usize) as u64)?;
            return Ok(u64::from_ne_bytes(value));
        }
    }
    anyhow::bail!("KVM has no statistic {name}")
}
