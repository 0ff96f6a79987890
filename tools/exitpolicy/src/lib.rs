// SPDX-License-Identifier: GPL-2.0

//! A client of the kernel module `kvm_exitpolicy`, and what the command `exitpolicy` is made of.
//!
//! [`Device`] speaks to the module, [`cgroup`] finds the cgroups that policies sit on, [`live`] says
//! how VMs that run change, [`explain`] where a decision comes from, [`doctor`] whether a host can
//! do it at all, [`unload`] removes the module, and [`unmanaged`] finds the VMs that it does not
//! know. What a set of exits and a policy are is said in one place, the crate `exitpolicy_policy`,
//! which the module compiles too; it is [re-exported](policy) here.

#![deny(unsafe_op_in_unsafe_fn)]
#![deny(clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs)]

pub mod cgroup;
pub mod device;
pub mod doctor;
pub mod error;
pub mod explain;
pub mod host;
pub mod live;
pub mod uapi;
pub mod unload;
pub mod unmanaged;

pub use device::Device;
pub use error::Error;
pub use exitpolicy_policy as policy;
pub use host::Host;
