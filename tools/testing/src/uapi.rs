// SPDX-License-Identifier: GPL-2.0

//! `include/uapi/linux/exitpolicy.h`, written down a second time on purpose: the tests shall
//! notice when the header, the module and the library change together by mistake.

use std::{
    fs::{
        File,
        OpenOptions, //
    },
    io,
    os::fd::AsRawFd, //
};

use anyhow::{
    Context,
    Result, //
};

pub const DEVICE: &str = "/dev/exitpolicy";

pub const GET_INFO: u64 = 0xbb00;
pub const SET_ENABLED: u64 = 0xbb01;
pub const SET_POLICY: u64 = 0xbb10;
pub const GET_POLICY: u64 = 0xbb11;
pub const CLEAR_POLICY: u64 = 0xbb12;
pub const NEXT_POLICY: u64 = 0xbb13;
pub const RESOLVE_POLICY: u64 = 0xbb14;
pub const NEXT_VM: u64 = 0xbb20;
pub const GET_VM: u64 = 0xbb21;
pub const SET_VM: u64 = 0xbb22;
pub const RESET_VM: u64 = 0xbb23;
pub const NEXT_VCPU: u64 = 0xbb24;
pub const GET_VCPU: u64 = 0xbb25;

/// Every command, the size of its argument, and the least size that it takes: that of the first
/// version of the structure.
pub const COMMANDS: [(u64, usize, usize); 13] = [
    (GET_INFO, size_of::<Info>(), 64),
    (SET_ENABLED, size_of::<Enabled>(), 16),
    (SET_POLICY, size_of::<Policy>(), 40),
    (GET_POLICY, size_of::<Policy>(), 40),
    (CLEAR_POLICY, size_of::<Policy>(), 40),
    (NEXT_POLICY, size_of::<Policy>(), 40),
    (RESOLVE_POLICY, size_of::<Policy>(), 40),
    (NEXT_VM, size_of::<Vm>(), 64),
    (GET_VM, size_of::<Vm>(), 64),
    (SET_VM, size_of::<Override>(), 40),
    (RESET_VM, size_of::<Override>(), 40),
    (NEXT_VCPU, size_of::<Vcpu>(), 64),
    (GET_VCPU, size_of::<Vcpu>(), 64),
];

pub const POLICY_DISABLE: u32 = 1 << 0;
pub const POLICY_ALLOW: u32 = 1 << 1;
pub const NEW_ONLY: u32 = 1 << 2;
pub const NO_WAIT: u32 = 1 << 3;
pub const VM_VCPU: u32 = 1 << 0;

pub const REFUSAL_NONE: u32 = 0;
pub const REFUSAL_PV_UNHALT: u32 = 1;

pub const VCPU_IN_FORCE: u32 = 0;
pub const VCPU_NEXT_ENTRY: u32 = 1;
pub const VCPU_PENDING: u32 = 2;

/// The longest that a command may wait, in ms. Most tests do: how long a second is, is for the
/// emulator to say, and for who else uses the machine.
pub const MAX_TIMEOUT: u32 = 60_000;

macro_rules! argument {
    ($(#[$meta:meta])* $name:ident, $size:literal { $($field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(C)]
        pub struct $name {
            pub size: u32,
            $(pub $field: $type,)*
        }

        const _: () = assert!(size_of::<$name>() == $size);

        impl Default for $name {
            fn default() -> Self {
                Self { size: $size, $($field: Default::default(),)* }
            }
        }
    };
}

argument! {
    /// `struct exitpolicy_info`
    Info, 80 {
        flags: u32,
        vendor: u32,
        enabled: u32,
        supported: u64,
        floor: u64,
        missed: u64,
        clamps: u64,
        policies: u64,
        vms: u64,
        pending: u64,
        holding: u64,
    }
}

argument! {
    /// `struct exitpolicy_enabled`
    Enabled, 24 {
        flags: u32,
        enabled: u32,
        reserved: u32,
        timeout_ms: u32,
        pending: u32,
    }
}

argument! {
    /// `struct exitpolicy_policy`
    Policy, 48 {
        flags: u32,
        cgroup_fd: i32,
        reserved: u32,
        cgroup_id: u64,
        disable: u64,
        allow: u64,
        timeout_ms: u32,
        pending: u32,
    }
}

argument! {
    /// `struct exitpolicy_vm`
    Vm, 96 {
        flags: u32,
        id: u64,
        cgroup_id: u64,
        pid: u32,
        vcpus: u32,
        floor: u64,
        requested: u64,
        effective: u64,
        clamped: u64,
        disable: u64,
        refused: u64,
        refusal: u32,
        has_disable: u32,
        pending: u32,
        adopted: u32,
    }
}

argument! {
    /// `struct exitpolicy_vcpu`
    Vcpu, 64 {
        flags: u32,
        vm: u64,
        vcpu_id: u32,
        state: u32,
        disable: u64,
        wanted: u64,
        in_force: u64,
        refused: u64,
        refusal: u32,
        has_disable: u32,
    }
}

argument! {
    /// `struct exitpolicy_override`
    Override, 40 {
        flags: u32,
        vm: u64,
        vcpu_id: u32,
        timeout_ms: u32,
        disable: u64,
        pending: u32,
        reserved: u32,
    }
}

/// The open device.
#[derive(Debug)]
pub struct Device(pub File);

impl Device {
    /// Opens it.
    pub fn open() -> Result<Self> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(DEVICE)
            .map(Self)
            .with_context(|| format!("cannot open {DEVICE}"))
    }

    /// Any command with any pointer.
    ///
    /// # Safety
    ///
    /// `argument` may point to anything that the command may overwrite, or to nothing at all.
    pub unsafe fn raw(&self, command: u64, argument: *mut u8) -> io::Result<()> {
        // SAFETY: By this function's own contract; a bad pointer is the kernel's to refuse.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), command, argument) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// Any command, with an argument of any size.
    pub fn bytes(&self, command: u64, argument: &mut [u8]) -> io::Result<()> {
        // The module trusts the size within, so the memory behind must be there, whatever it says.
        let mut page = [0; 8192];
        page[..argument.len()].copy_from_slice(argument);
        // SAFETY: No command writes more than the size of its structure.
        let result = unsafe { self.raw(command, page.as_mut_ptr()) };
        argument.copy_from_slice(&page[..argument.len()]);
        result
    }

    fn call<T: Copy>(&self, command: u64, mut argument: T) -> io::Result<T> {
        // SAFETY: `argument` is of the command's own type, and says so in its size.
        unsafe { self.raw(command, (&raw mut argument).cast()) }?;
        Ok(argument)
    }

    pub fn info(&self) -> io::Result<Info> {
        self.call(GET_INFO, Info::default())
    }

    /// The master switch, without a wish about it.
    pub fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        let argument = Enabled {
            enabled: enabled.into(),
            timeout_ms: MAX_TIMEOUT,
            ..Default::default()
        };
        self.switch(argument).map(drop)
    }

    /// The master switch.
    pub fn switch(&self, argument: Enabled) -> io::Result<Enabled> {
        self.call(SET_ENABLED, argument)
    }

    /// One of the commands about a policy.
    pub fn policy(&self, command: u64, argument: Policy) -> io::Result<Policy> {
        self.call(command, argument)
    }

    /// One of the commands about a VM.
    pub fn vm(&self, command: u64, argument: Vm) -> io::Result<Vm> {
        self.call(command, argument)
    }

    /// One of the commands about an override.
    pub fn overriding(&self, command: u64, argument: Override) -> io::Result<Override> {
        self.call(command, argument)
    }

    /// One of the commands about a vCPU.
    pub fn vcpu(&self, command: u64, argument: Vcpu) -> io::Result<Vcpu> {
        self.call(command, argument)
    }

    /// Every vCPU of a VM.
    pub fn vcpus(&self, vm: u64) -> io::Result<Vec<Vcpu>> {
        let mut vcpu_id = 0;
        let next = || {
            let argument = Vcpu {
                vm,
                vcpu_id,
                ..Default::default()
            };
            let next = self.vcpu(NEXT_VCPU, argument);
            if let Ok(vcpu) = &next {
                vcpu_id = vcpu.vcpu_id + 1;
            }
            until_enoent(next)
        };
        std::iter::from_fn(next).collect()
    }

    /// Every policy.
    pub fn policies(&self) -> io::Result<Vec<Policy>> {
        let mut cgroup_id = 0;
        let next = || {
            let argument = Policy {
                cgroup_id,
                ..Default::default()
            };
            let next = self.policy(NEXT_POLICY, argument);
            if let Ok(policy) = &next {
                cgroup_id = policy.cgroup_id;
            }
            until_enoent(next)
        };
        std::iter::from_fn(next).collect()
    }

    /// Every VM.
    pub fn vms(&self) -> io::Result<Vec<Vm>> {
        let mut id = 0;
        let next = || {
            let argument = Vm {
                id,
                ..Default::default()
            };
            let next = self.vm(NEXT_VM, argument);
            if let Ok(vm) = &next {
                id = vm.id;
            }
            until_enoent(next)
        };
        std::iter::from_fn(next).collect()
    }
}

fn until_enoent<T>(next: io::Result<T>) -> Option<io::Result<T>> {
    match next {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
        other => Some(other),
    }
}
