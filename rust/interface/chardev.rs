// SPDX-License-Identifier: GPL-2.0

//! The ioctls of `/dev/exitpolicy`; the contract is `include/uapi/linux/exitpolicy.h`.

use crate::{
    admin::{
        Admin,
        How, //
    },
    bindings as uapi,
    kernel_ext::{
        capability::require_sys_admin,
        cgroup::Cgroup, //
    },
    kvm,
    policy::Exits,
    vendor::Refusal,
    vm::Vm, //
};
use core::mem::{
    size_of,
    MaybeUninit, //
};
use kernel::{
    fs::File,
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions,
        MiscDeviceRegistration, //
    },
    prelude::*,
    sync::Arc,
    time::Delta,
    uaccess::{
        UserPtr,
        UserSlice, //
    },
};

/// The device. It can be opened until it is dropped.
#[pin_data]
pub(crate) struct Chardev {
    admin: Arc<Admin>,
    #[pin]
    device: MiscDeviceRegistration<Session>,
}

impl Chardev {
    /// Registers the device, with misc's default mode, 0600.
    pub(crate) fn new(admin: Arc<Admin>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // First, because the device may be opened before its registration has returned.
            admin,
            device <- MiscDeviceRegistration::register(MiscDeviceOptions {
                name: c"exitpolicy",
            }),
        })
    }
}

/// The device as somebody has it open.
struct Session {
    admin: Arc<Admin>,
}

/// A structure of the uapi header.
///
/// # Safety
///
/// The type must be `repr(C)`, have no padding, be valid for every bit pattern, and begin with the
/// `__u32` that the header calls `size`.
unsafe trait Argument: Copy + Default {
    /// The size that the first version of the structure had.
    const OLDEST_SIZE: usize = size_of::<Self>();
}

// SAFETY: Integers only; bindgen's layout tests hold, and the assertions below.
unsafe impl Argument for uapi::exitpolicy_info {
    const OLDEST_SIZE: usize = 64;
}
// SAFETY: As above.
unsafe impl Argument for uapi::exitpolicy_enabled {
    const OLDEST_SIZE: usize = 16;
}
// SAFETY: As above.
unsafe impl Argument for uapi::exitpolicy_policy {
    const OLDEST_SIZE: usize = 40;
}
// SAFETY: As above.
unsafe impl Argument for uapi::exitpolicy_vm {
    const OLDEST_SIZE: usize = 64;
}
// SAFETY: As above.
unsafe impl Argument for uapi::exitpolicy_vcpu {}
// SAFETY: As above.
unsafe impl Argument for uapi::exitpolicy_override {}

// The sums of the members' sizes: there is no padding.
const _: () = {
    assert!(size_of::<uapi::exitpolicy_info>() == 4 * 4 + 8 * 8);
    assert!(size_of::<uapi::exitpolicy_enabled>() == 6 * 4);
    assert!(size_of::<uapi::exitpolicy_policy>() == 4 * 4 + 3 * 8 + 2 * 4);
    assert!(size_of::<uapi::exitpolicy_vm>() == 2 * 4 + 2 * 8 + 2 * 4 + 6 * 8 + 4 * 4);
    assert!(size_of::<uapi::exitpolicy_vcpu>() == 2 * 4 + 8 + 2 * 4 + 4 * 8 + 2 * 4);
    assert!(size_of::<uapi::exitpolicy_override>() == 2 * 4 + 8 + 2 * 4 + 8 + 2 * 4);
};

/// The longest that anybody can be made to wait.
const LONGEST_WAIT_MS: u32 = 60_000;

/// Takes the flags that say how a change is carried out out of `flags`, and refuses what is left
/// that is not in `others`.
fn how(flags: u32, others: u32, timeout_ms: u32) -> Result<How> {
    let known = uapi::EXITPOLICY_NEW_ONLY | uapi::EXITPOLICY_NO_WAIT | others;
    if flags & !known != 0 || timeout_ms > LONGEST_WAIT_MS {
        return Err(EINVAL);
    }
    let limit = match timeout_ms {
        0 => How::DEFAULT_WAIT,
        limit => Delta::from_millis(limit.into()),
    };
    Ok(How {
        new_only: flags & uapi::EXITPOLICY_NEW_ONLY != 0,
        wait: (flags & uapi::EXITPOLICY_NO_WAIT == 0).then_some(limit),
    })
}

/// An [`Argument`] in user space, with the size that the caller knows.
struct UserArgument {
    address: UserPtr,
    size: usize,
}

impl UserArgument {
    /// Copies it in, as copy_struct_from_user() does: what an older caller does not know is zero,
    /// and what we do not know must be.
    fn read<T: Argument>(&self) -> Result<T> {
        let mut argument = T::default();
        let known = self.size.min(size_of::<T>());
        // SAFETY: `T` is valid for every bit pattern, and `known` is not beyond its end.
        let bytes = unsafe {
            core::slice::from_raw_parts_mut((&raw mut argument).cast::<MaybeUninit<u8>>(), known)
        };
        let mut reader = UserSlice::new(self.address, self.size).reader();
        reader.read_raw(bytes)?;
        let mut chunk = [0u8; 64];
        while !reader.is_empty() {
            let length = reader.len().min(chunk.len());
            let chunk = chunk.get_mut(..length).ok_or(EINVAL)?;
            reader.read_slice(chunk)?;
            if chunk.iter().any(|byte| *byte != 0) {
                return Err(E2BIG);
            }
        }
        Ok(argument)
    }

    /// Copies it out, as far as the caller knows it.
    fn write<T: Argument>(&self, argument: &T) -> Result {
        let known = self.size.min(size_of::<T>());
        // SAFETY: `T` has no padding, and `known` is not beyond its end.
        let bytes =
            unsafe { core::slice::from_raw_parts((&raw const *argument).cast::<u8>(), known) };
        UserSlice::new(self.address, known)
            .writer()
            .write_slice(bytes)
    }

    /// Reads it, lets `command` work on it, and writes it back if that succeeds.
    fn exchange<T: Argument>(
        address: UserPtr,
        command: impl FnOnce(&mut T) -> Result,
    ) -> Result<isize> {
        let size = UserSlice::new(address, size_of::<u32>())
            .reader()
            .read::<u32>()? as usize;
        // A page is more than any structure will need, and bounds our work.
        if size < T::OLDEST_SIZE {
            return Err(EINVAL);
        }
        if size > kernel::page::PAGE_SIZE {
            return Err(E2BIG);
        }
        let this = Self { address, size };
        let mut argument = this.read::<T>()?;
        // What cannot be answered is not done.
        this.write(&argument)?;
        command(&mut argument)?;
        this.write(&argument)?;
        Ok(0)
    }
}

fn must_be_zero(reserved: u32) -> Result {
    if reserved == 0 {
        Ok(())
    } else {
        Err(EINVAL)
    }
}

fn exits(bits: u64) -> Result<Exits> {
    Exits::from_bits(bits).ok_or(EINVAL)
}

#[vtable]
impl MiscDevice for Session {
    type Ptr = KBox<Self>;

    fn open(_file: &File, device: &MiscDeviceRegistration<Self>) -> Result<KBox<Self>> {
        // SAFETY: `Session`s are registered by `Chardev::new` only, so that `device` is the field
        // of a `Chardev`; deregistration waits for this call, and `admin` was initialised first.
        let chardev = unsafe {
            &*kernel::container_of!(core::ptr::from_ref(device).cast_mut(), Chardev, device)
        };
        Ok(KBox::new(
            Self {
                admin: chardev.admin.clone(),
            },
            GFP_KERNEL,
        )?)
    }

    fn ioctl(session: &Self, _file: &File, command: u32, argument: usize) -> Result<isize> {
        // Whoever opened the device: it may have been handed on. What is told is of all tenants of
        // the host, and what is changed as well.
        require_sys_admin()?;
        let address = UserPtr::from_addr(argument);
        session.admin.engine().check_hooks();
        match command {
            uapi::CONST_GET_INFO => UserArgument::exchange(address, |it| session.info(it)),
            uapi::CONST_SET_ENABLED => {
                UserArgument::exchange(address, |it| session.set_enabled(it))
            }
            uapi::CONST_SET_POLICY => UserArgument::exchange(address, |it| session.set_policy(it)),
            uapi::CONST_GET_POLICY => UserArgument::exchange(address, |it| session.get_policy(it)),
            uapi::CONST_CLEAR_POLICY => {
                UserArgument::exchange(address, |it| session.clear_policy(it))
            }
            uapi::CONST_NEXT_POLICY => {
                UserArgument::exchange(address, |it| session.next_policy(it))
            }
            uapi::CONST_RESOLVE_POLICY => {
                UserArgument::exchange(address, |it| session.resolve_policy(it))
            }
            uapi::CONST_NEXT_VM => UserArgument::exchange(address, |it| session.next_vm(it)),
            uapi::CONST_GET_VM => UserArgument::exchange(address, |it| session.get_vm(it)),
            uapi::CONST_SET_VM => UserArgument::exchange(address, |it| session.set_vm(it)),
            uapi::CONST_RESET_VM => UserArgument::exchange(address, |it| session.reset_vm(it)),
            uapi::CONST_NEXT_VCPU => UserArgument::exchange(address, |it| session.next_vcpu(it)),
            uapi::CONST_GET_VCPU => UserArgument::exchange(address, |it| session.get_vcpu(it)),
            _ => Err(ENOTTY),
        }
    }
}

impl Session {
    fn info(&self, info: &mut uapi::exitpolicy_info) -> Result {
        must_be_zero(info.flags)?;
        let engine = self.admin.engine();
        let facts = engine.facts();
        info.vendor = facts.map_or(uapi::EXITPOLICY_VENDOR_NONE, |it| it.vendor.id());
        info.enabled = engine.enabled().into();
        info.supported = facts.map_or(0, |it| it.supported.bits());
        info.floor = facts.map_or(0, |it| it.floor.bits());
        info.missed = engine.missed();
        info.clamps = engine.clamps();
        info.policies = engine.store.count();
        info.vms = engine.vms.count();
        (info.pending, info.holding) = engine.on_their_way();
        Ok(())
    }

    fn set_enabled(&self, argument: &mut uapi::exitpolicy_enabled) -> Result {
        must_be_zero(argument.reserved)?;
        let how = how(argument.flags, 0, argument.timeout_ms)?;
        let enabled = match argument.enabled {
            0 => false,
            1 => true,
            _ => return Err(EINVAL),
        };
        argument.pending = self.admin.set_enabled(enabled, how);
        Ok(())
    }

    fn set_policy(&self, argument: &mut uapi::exitpolicy_policy) -> Result {
        must_be_zero(argument.reserved)?;
        let sets = uapi::EXITPOLICY_POLICY_DISABLE | uapi::EXITPOLICY_POLICY_ALLOW;
        let how = how(argument.flags, sets, argument.timeout_ms)?;
        let wanted = argument.flags & sets;
        if wanted == 0 {
            return Err(EINVAL);
        }
        // A set that is not asked to be changed must not be nonsense either.
        let (disable, allow) = (exits(argument.disable)?, exits(argument.allow)?);
        let cgroup = Cgroup::from_fd(argument.cgroup_fd)?;
        let (policy, pending) = Admin::set_policy(
            &self.admin,
            &cgroup,
            (wanted & uapi::EXITPOLICY_POLICY_DISABLE != 0).then_some(disable),
            (wanted & uapi::EXITPOLICY_POLICY_ALLOW != 0).then_some(allow),
            how,
        )?;
        argument.pending = pending;
        argument.cgroup_id = cgroup.id();
        argument.disable = policy.disable.bits();
        argument.allow = policy.allow.bits();
        Ok(())
    }

    fn get_policy(&self, argument: &mut uapi::exitpolicy_policy) -> Result {
        must_be_zero(argument.flags | argument.reserved)?;
        let cgroup = Cgroup::from_fd(argument.cgroup_fd)?;
        let policy = self.admin.engine().store.get(cgroup.id()).ok_or(ENOENT)?;
        argument.cgroup_id = cgroup.id();
        argument.disable = policy.disable.bits();
        argument.allow = policy.allow.bits();
        Ok(())
    }

    fn clear_policy(&self, argument: &mut uapi::exitpolicy_policy) -> Result {
        must_be_zero(argument.reserved)?;
        let how = how(argument.flags, 0, argument.timeout_ms)?;
        let cgroup = Cgroup::from_fd(argument.cgroup_fd)?;
        argument.pending = self.admin.clear_policy(cgroup.id(), how)?;
        argument.cgroup_id = cgroup.id();
        Ok(())
    }

    fn next_policy(&self, argument: &mut uapi::exitpolicy_policy) -> Result {
        must_be_zero(argument.flags | argument.reserved | argument.cgroup_fd as u32)?;
        let (cgroup, policy) = self
            .admin
            .engine()
            .store
            .next_after(argument.cgroup_id)
            .ok_or(ENOENT)?;
        argument.cgroup_id = cgroup;
        argument.disable = policy.disable.bits();
        argument.allow = policy.allow.bits();
        Ok(())
    }

    fn resolve_policy(&self, argument: &mut uapi::exitpolicy_policy) -> Result {
        must_be_zero(argument.flags | argument.reserved)?;
        let cgroup = Cgroup::from_fd(argument.cgroup_fd)?;
        let resolved = self.admin.engine().store.resolve(&cgroup);
        argument.cgroup_id = resolved.source.unwrap_or(0);
        argument.disable = resolved.disable.bits();
        argument.allow = resolved.allow.bits();
        Ok(())
    }

    fn next_vm(&self, argument: &mut uapi::exitpolicy_vm) -> Result {
        must_be_zero(argument.flags)?;
        // One that is found may be gone before it is looked at.
        while let Some(id) = self.admin.engine().vms.next_after(argument.id) {
            argument.id = id;
            if self.fill_vm(argument).is_ok() {
                return Ok(());
            }
        }
        Err(ENOENT)
    }

    fn get_vm(&self, argument: &mut uapi::exitpolicy_vm) -> Result {
        must_be_zero(argument.flags)?;
        self.fill_vm(argument)
    }

    fn fill_vm(&self, argument: &mut uapi::exitpolicy_vm) -> Result {
        let vms = &self.admin.engine().vms;
        vms.with(argument.id, |vm, kvm| {
            argument.cgroup_id = vm.cgroup;
            argument.pid = vm.pid;
            argument.vcpus = vm.vcpus.len() as u32;
            argument.floor = vm.floor.bits();
            argument.requested = vm.requested.bits();
            argument.effective = vm.decision.effective.bits();
            argument.clamped = vm.decision.clamped.bits();
            argument.disable = vm.disable.unwrap_or_default().bits();
            argument.has_disable = vm.disable.is_some().into();
            argument.refused = vm.refused().bits();
            argument.refusal = vm.shown_refusal().id();
            argument.pending = vm.pending(kvm) as u32;
            argument.adopted = vm.adopted.into();
        })
        .ok_or(ENOENT)
    }

    fn set_vm(&self, argument: &mut uapi::exitpolicy_override) -> Result {
        let disable = exits(argument.disable)?;
        self.set_override(argument, Some(disable))
    }

    fn reset_vm(&self, argument: &mut uapi::exitpolicy_override) -> Result {
        if argument.disable != 0 {
            return Err(EINVAL);
        }
        self.set_override(argument, None)
    }

    fn set_override(
        &self,
        argument: &mut uapi::exitpolicy_override,
        disable: Option<Exits>,
    ) -> Result {
        must_be_zero(argument.reserved)?;
        let how = how(
            argument.flags,
            uapi::EXITPOLICY_VM_VCPU,
            argument.timeout_ms,
        )?;
        if how.new_only {
            return Err(EINVAL);
        }
        let vcpu = if argument.flags & uapi::EXITPOLICY_VM_VCPU != 0 {
            Some(argument.vcpu_id)
        } else {
            must_be_zero(argument.vcpu_id)?;
            None
        };
        argument.pending = self.admin.set_override(argument.vm, vcpu, disable, how)?;
        Ok(())
    }

    fn next_vcpu(&self, argument: &mut uapi::exitpolicy_vcpu) -> Result {
        must_be_zero(argument.flags)?;
        let from = argument.vcpu_id;
        self.fill_vcpu(argument, |vm| {
            let ids = vm.vcpus.iter().map(|vcpu| vcpu.id);
            ids.filter(|id| *id >= from).min()
        })
    }

    fn get_vcpu(&self, argument: &mut uapi::exitpolicy_vcpu) -> Result {
        must_be_zero(argument.flags)?;
        let id = argument.vcpu_id;
        self.fill_vcpu(argument, |_| Some(id))
    }

    fn fill_vcpu(
        &self,
        argument: &mut uapi::exitpolicy_vcpu,
        choose: impl FnOnce(&Vm) -> Option<u32>,
    ) -> Result {
        let vms = &self.admin.engine().vms;
        let id = argument.vm;
        let fill = |vm: &mut Vm, kvm: Option<kvm::Vm<'_>>| {
            let id = choose(vm)?;
            let index = vm.vcpus.iter().position(|vcpu| vcpu.id == id)?;
            let vcpu = vm.vcpus.get(index)?;
            let refused = vm.refused_of(vcpu.wanted, vcpu.in_force);
            let refusal = if refused.is_empty() {
                Refusal::None
            } else {
                vm.refusal
            };
            argument.vcpu_id = id;
            argument.state = vm.progress(kvm, index).id();
            argument.disable = vcpu.disable.unwrap_or_default().bits();
            argument.has_disable = vcpu.disable.is_some().into();
            argument.wanted = vcpu.wanted.bits();
            argument.in_force = vcpu.in_force.bits();
            argument.refused = refused.bits();
            argument.refusal = refusal.id();
            Some(())
        };
        vms.with(id, fill).flatten().ok_or(ENOENT)
    }
}
