// SPDX-License-Identifier: GPL-2.0

//! Loading and unloading kernel modules.

use std::{
    fs,
    process::Command, //
};

use anyhow::{
    bail,
    Context,
    Result, //
};
use nix::kmod::{
    delete_module,
    init_module,
    DeleteModuleFlags, //
};

use crate::exits::Vendor;

/// Ours, as in /proc/modules.
pub const EXITPOLICY: &str = "kvm_exitpolicy";

/// Loads a module and what it depends on.
pub fn load(name: &str) -> Result<()> {
    let output = Command::new("modprobe").arg(name).output()?;
    if !output.status.success() {
        bail!(
            "modprobe {name}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Unloads one module, or says why not.
pub fn unload(name: &str) -> nix::Result<()> {
    let name = std::ffi::CString::new(name).expect("module names have no NUL");
    delete_module(&name, DeleteModuleFlags::O_NONBLOCK)
}

/// Our module's file, as `modprobe` finds it.
pub fn image() -> Result<Vec<u8>> {
    image_in(&format!("updates/{EXITPOLICY}.ko"))
}

/// The file of one of KVM's modules, where the lab has built the kernel, and not compressed it.
pub fn image_of(module: &str) -> Result<Vec<u8>> {
    let name = module.replace('_', "-");
    image_in(&format!("kernel/arch/x86/kvm/{name}.ko"))
}

fn image_in(path: &str) -> Result<Vec<u8>> {
    let release = nix::sys::utsname::uname()?;
    let release = release.release().to_string_lossy();
    let path = format!("/lib/modules/{release}/{path}");
    fs::read(&path).with_context(|| path)
}

/// Loads a module from memory.
pub fn load_image(image: &[u8]) -> nix::Result<()> {
    init_module(image, c"")
}

/// Whether a module is loaded.
pub fn is_loaded(name: &str) -> Result<bool> {
    let modules = fs::read_to_string("/proc/modules")?;
    Ok(modules
        .lines()
        .any(|line| line.split(' ').next() == Some(name)))
}

/// Loads ours, and the vendor's.
pub fn load_both() -> Result<()> {
    load(Vendor::of_host()?.module())?;
    load(EXITPOLICY)
}

/// Unloads ours for as long as the value lives.
pub struct Unloaded {
    was_loaded: bool,
}

impl Unloaded {
    /// Unloads ours if it is loaded.
    pub fn new() -> Result<Self> {
        let was_loaded = is_loaded(EXITPOLICY)?;
        if was_loaded {
            unload(EXITPOLICY).context("cannot unload kvm_exitpolicy")?;
        }
        Ok(Self { was_loaded })
    }
}

impl Drop for Unloaded {
    fn drop(&mut self) {
        if self.was_loaded {
            if let Err(error) = load_both() {
                // The tests that follow will say so too, each for itself.
                eprintln!("{error:#}");
            }
        }
    }
}
