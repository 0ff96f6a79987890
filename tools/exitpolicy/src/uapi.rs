// SPDX-License-Identifier: GPL-2.0

//! The ioctl interface of `/dev/exitpolicy`: `include/uapi/linux/exitpolicy.h` in Rust.
//!
//! The header says what the members mean. A test compiles it and compares every offset, size and
//! number with those of this file.

use rustix::ioctl::{
    opcode,
    Opcode, //
};

const MAGIC: u8 = 0xBB;

/// Neither kvm-amd nor kvm-intel is in use.
pub const VENDOR_NONE: u32 = 0;
/// kvm-amd.
pub const VENDOR_SVM: u32 = 1;
/// kvm-intel.
pub const VENDOR_VMX: u32 = 2;

/// [`SET_POLICY`] changes `disable`.
pub const POLICY_DISABLE: u32 = 1 << 0;
/// [`SET_POLICY`] changes `allow`.
pub const POLICY_ALLOW: u32 = 1 << 1;

/// The VMs that run stay as they are.
pub const NEW_ONLY: u32 = 1 << 2;
/// The command does not wait for vCPUs.
pub const NO_WAIT: u32 = 1 << 3;

/// Nothing is refused.
pub const REFUSAL_NONE: u32 = 0;
/// `hlt`, on Intel: the guest was told of KVM_FEATURE_PV_UNHALT.
pub const REFUSAL_PV_UNHALT: u32 = 1;
/// All but `hlt`: the guest's state is encrypted.
pub const REFUSAL_PROTECTED: u32 = 2;
/// All: KVM runs on Hyper-V and does not use the CPU's own VMCS.
pub const REFUSAL_HYPERV: u32 = 3;

/// The vCPU is as it should be, except for what is refused.
pub const VCPU_IN_FORCE: u32 = 0;
/// It is not in the guest, and will change before it is.
pub const VCPU_NEXT_ENTRY: u32 = 1;
/// It is in the guest, and was asked to leave it.
pub const VCPU_PENDING: u32 = 2;
/// It is in a guest of its guest, and will change when that one exits.
pub const VCPU_IN_L2: u32 = 3;

/// [`SET_VM`] and [`RESET_VM`] are for one vCPU, not the VM.
pub const VM_VCPU: u32 = 1 << 0;

/// Takes an [`Info`].
pub const GET_INFO: Opcode = opcode::none(MAGIC, 0x00);
/// Takes an [`Enabled`].
pub const SET_ENABLED: Opcode = opcode::none(MAGIC, 0x01);
/// Takes a [`Policy`].
pub const SET_POLICY: Opcode = opcode::none(MAGIC, 0x10);
/// Takes a [`Policy`].
pub const GET_POLICY: Opcode = opcode::none(MAGIC, 0x11);
/// Takes a [`Policy`].
pub const CLEAR_POLICY: Opcode = opcode::none(MAGIC, 0x12);
/// Takes a [`Policy`].
pub const NEXT_POLICY: Opcode = opcode::none(MAGIC, 0x13);
/// Takes a [`Policy`].
pub const RESOLVE_POLICY: Opcode = opcode::none(MAGIC, 0x14);
/// Takes a [`Vm`].
pub const NEXT_VM: Opcode = opcode::none(MAGIC, 0x20);
/// Takes a [`Vm`].
pub const GET_VM: Opcode = opcode::none(MAGIC, 0x21);
/// Takes an [`Override`].
pub const SET_VM: Opcode = opcode::none(MAGIC, 0x22);
/// Takes an [`Override`].
pub const RESET_VM: Opcode = opcode::none(MAGIC, 0x23);
/// Takes a [`Vcpu`].
pub const NEXT_VCPU: Opcode = opcode::none(MAGIC, 0x24);
/// Takes a [`Vcpu`].
pub const GET_VCPU: Opcode = opcode::none(MAGIC, 0x25);

/// The argument of a command: a structure that begins with its own size.
///
/// # Safety
///
/// The structure is `repr(C)`, has integer members only and no implicit padding, and begins with a
/// `u32` that [`Argument::new`] sets to the size of the structure. So the module, which reads and
/// writes no more than that size, may see every byte and write any.
pub unsafe trait Argument: Copy {
    /// The structure with its size set and the rest zero.
    fn new() -> Self;
}

macro_rules! argument {
    (
        $(#[$attribute:meta])*
        $name:ident {
            $($member:ident: $type:ty,)*
        }
    ) => {
        $(#[$attribute])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default)]
        #[expect(missing_docs, reason = "the C header documents the members")]
        pub struct $name {
            pub size: u32,
            $(pub $member: $type,)*
        }

        const _: () = assert!(
            size_of::<$name>() == size_of::<u32>() $(+ size_of::<$type>())*,
            "implicit padding",
        );

        // SAFETY: Declared above, with integers only; the assertion excludes padding.
        unsafe impl Argument for $name {
            fn new() -> Self {
                Self {
                    size: size_of::<Self>() as u32,
                    ..Self::default()
                }
            }
        }

        #[cfg(test)]
        impl $name {
            /// One line for the structure and one for each member, as `tests/uapi.c` prints them.
            fn layout() -> String {
                let name = stringify!($name).to_lowercase();
                let mut lines = format!("{name} {}\n", size_of::<Self>());
                lines += &format!("{name}.size {} 4\n", std::mem::offset_of!(Self, size));
                $(
                    lines += &format!(
                        concat!("{}.", stringify!($member), " {} {}\n"),
                        name,
                        std::mem::offset_of!(Self, $member),
                        size_of::<$type>(),
                    );
                )*
                lines
            }
        }
    };
}

argument! {
    /// `struct exitpolicy_info`.
    Info {
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
    /// `struct exitpolicy_enabled`.
    Enabled {
        flags: u32,
        enabled: u32,
        reserved: u32,
        timeout_ms: u32,
        pending: u32,
    }
}

argument! {
    /// `struct exitpolicy_policy`.
    Policy {
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
    /// `struct exitpolicy_vm`.
    Vm {
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
    /// `struct exitpolicy_vcpu`.
    Vcpu {
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
    /// `struct exitpolicy_override`.
    Override {
        flags: u32,
        vm: u64,
        vcpu_id: u32,
        timeout_ms: u32,
        disable: u64,
        pending: u32,
        reserved: u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        env,
        path::Path,
        process::Command, //
    };

    /// What `tests/uapi.c` prints, from the Rust side.
    fn rust_layout() -> String {
        let mut lines = [
            Info::layout(),
            Enabled::layout(),
            Policy::layout(),
            Vm::layout(),
            Vcpu::layout(),
            Override::layout(),
        ]
        .concat();
        for (name, value) in [
            ("VENDOR_NONE", VENDOR_NONE),
            ("VENDOR_SVM", VENDOR_SVM),
            ("VENDOR_VMX", VENDOR_VMX),
            ("POLICY_DISABLE", POLICY_DISABLE),
            ("POLICY_ALLOW", POLICY_ALLOW),
            ("NEW_ONLY", NEW_ONLY),
            ("NO_WAIT", NO_WAIT),
            ("REFUSAL_NONE", REFUSAL_NONE),
            ("REFUSAL_PV_UNHALT", REFUSAL_PV_UNHALT),
            ("REFUSAL_PROTECTED", REFUSAL_PROTECTED),
            ("REFUSAL_HYPERV", REFUSAL_HYPERV),
            ("VCPU_IN_FORCE", VCPU_IN_FORCE),
            ("VCPU_NEXT_ENTRY", VCPU_NEXT_ENTRY),
            ("VCPU_PENDING", VCPU_PENDING),
            ("VCPU_IN_L2", VCPU_IN_L2),
            ("VM_VCPU", VM_VCPU),
            ("GET_INFO", GET_INFO),
            ("SET_ENABLED", SET_ENABLED),
            ("SET_POLICY", SET_POLICY),
            ("GET_POLICY", GET_POLICY),
            ("CLEAR_POLICY", CLEAR_POLICY),
            ("NEXT_POLICY", NEXT_POLICY),
            ("RESOLVE_POLICY", RESOLVE_POLICY),
            ("NEXT_VM", NEXT_VM),
            ("GET_VM", GET_VM),
            ("SET_VM", SET_VM),
            ("RESET_VM", RESET_VM),
            ("NEXT_VCPU", NEXT_VCPU),
            ("GET_VCPU", GET_VCPU),
        ] {
            lines += &format!("{name} {value}\n");
        }
        lines
    }

    #[test]
    fn rust_and_c_agree() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("uapi");
        let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
        let compiled = Command::new(&compiler)
            .args(["-Wall", "-Wextra", "-Werror", "-Wpadded", "-I"])
            .arg(source.join("../../include/uapi"))
            .arg("-o")
            .args([&program, &source.join("tests/uapi.c")])
            .status()
            .unwrap_or_else(|error| panic!("cannot run {compiler:?}: {error}"));
        assert!(compiled.success());
        let printed = Command::new(&program).output().unwrap();
        assert_eq!(String::from_utf8(printed.stdout).unwrap(), rust_layout());
    }

    #[test]
    fn an_argument_knows_its_size() {
        assert_eq!(Info::new().size as usize, size_of::<Info>());
        assert_eq!(Policy::new().size as usize, size_of::<Policy>());
        assert_eq!(Policy::new().cgroup_fd, 0);
        assert_eq!(Vcpu::new().size as usize, size_of::<Vcpu>());
        assert_eq!(Override::new().size as usize, size_of::<Override>());
    }
}
