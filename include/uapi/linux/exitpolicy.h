/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * The ioctl interface of /dev/exitpolicy.
 *
 * A policy belongs to a cgroup (v2) and has two sets of KVM exits: "disable",
 * what every VM in the cgroup gets whether its VMM asked for it or not, and
 * "allow", the most that any VM in the cgroup may get.  Sets are made of the
 * KVM_X86_DISABLE_EXITS_* bits of <linux/kvm.h>.
 *
 * A VM or one of its vCPUs can have an override, which stands in for the
 * cgroup's "disable"; "allow" holds all the same.
 *
 * Commands that change something apply to VMs that run.  A vCPU changes in its
 * own thread, on its way into the guest; the command makes it leave the guest
 * for that, and returns when every vCPU has changed or cannot execute guest
 * code before it has.  One that does neither in time is counted in "pending",
 * and changes when it can; that is no error.
 *
 * Rules that hold for every command:
 *
 *  - The argument points to a structure whose first member, @size, the caller
 *    sets to sizeof() of the structure it was built with.  A caller that is
 *    older than the module gets the members it knows; one that is newer works
 *    as long as what the module does not know is zero.
 *  - Unknown flags, unknown exits and reserved members that are not zero are
 *    refused; nothing is changed when a command fails.  (The memory of the
 *    argument must stay writable while the command runs.)
 *  - Every command needs CAP_SYS_ADMIN in the initial user namespace, at the
 *    time of the call and whoever opened the device.  Opening it is governed by
 *    its mode, 0600.
 *
 *   EINVAL  @size is too small, a flag or an exit is unknown, a reserved
 *           member is not zero
 *   E2BIG   @size is larger than the module knows and the rest is not zero, or
 *           larger than a page
 *   EBADF   @cgroup_fd is not open, is no directory of a cgroup file system,
 *           or belongs to a cgroup v1 hierarchy
 *   ENODEV  the cgroup is being removed
 *   EOPNOTSUPP  the cgroup is threaded: its processes count as those of its
 *           domain, the nearest ancestor that is not
 *   ENOENT  there is no such policy, VM or vCPU, or no further one
 *   EPERM   the caller lacks CAP_SYS_ADMIN in the initial user namespace
 *   EFAULT  the argument cannot be read or written
 *   ENOMEM  out of memory
 *   ENOTTY  unknown command
 */
#ifndef _UAPI_LINUX_EXITPOLICY_H
#define _UAPI_LINUX_EXITPOLICY_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Free in Documentation/userspace-api/ioctl/ioctl-number.rst of Linux 7.3. */
#define EXITPOLICY_IOC_MAGIC	0xBB

#define EXITPOLICY_VENDOR_NONE	0	/* neither kvm-amd nor kvm-intel is in use */
#define EXITPOLICY_VENDOR_SVM	1
#define EXITPOLICY_VENDOR_VMX	2

/**
 * struct exitpolicy_info - argument of EXITPOLICY_GET_INFO
 * @size: sizeof(struct exitpolicy_info)
 * @flags: must be 0
 * @vendor: out: EXITPOLICY_VENDOR_*
 * @enabled: out: 1 if policies are applied to new VMs, 0 if not
 * @supported: out: the exits that KVM can disable on this host; 0 without a
 *	vendor
 * @floor: out: the exits that KVM itself disables in every VM
 * @missed: out: VMs or vCPUs that the module could not decide on or keep
 *	track of, since it was loaded
 * @clamps: out: decisions in which "allow" took something away that the VMM
 *	had asked for, since the module was loaded
 * @policies: out: number of policies
 * @vms: out: number of VMs that the module knows
 * @pending: out: number of vCPUs that are on their way, those that change at
 *	their next entry included
 * @holding: out: number of VMs that differ from what their VMM asked for.
 *	The module cannot be unloaded while there is one
 */
struct exitpolicy_info {
	__u32 size;
	__u32 flags;
	__u32 vendor;
	__u32 enabled;
	__u64 supported;
	__u64 floor;
	__u64 missed;
	__u64 clamps;
	__u64 policies;
	__u64 vms;
	__u64 pending;
	__u64 holding;
};

/* Flags of the commands that change something. */

/* Leave the VMs that run as they are. */
#define EXITPOLICY_NEW_ONLY		(1 << 2)
/* Do not wait for the vCPUs. */
#define EXITPOLICY_NO_WAIT		(1 << 3)

/**
 * struct exitpolicy_enabled - argument of EXITPOLICY_SET_ENABLED
 * @size: sizeof(struct exitpolicy_enabled)
 * @flags: EXITPOLICY_NEW_ONLY, EXITPOLICY_NO_WAIT
 * @enabled: in: 1 to apply policies and overrides, 0 to give every VM what its
 *	VMM asked for
 * @reserved: must be 0
 * @timeout_ms: in: how long to wait for vCPUs, at most 60000; 0 for a second
 * @pending: out: number of vCPUs that were waited for in vain
 */
struct exitpolicy_enabled {
	__u32 size;
	__u32 flags;
	__u32 enabled;
	__u32 reserved;
	__u32 timeout_ms;
	__u32 pending;
};

/* EXITPOLICY_SET_POLICY: which of the two sets to change. */
#define EXITPOLICY_POLICY_DISABLE	(1 << 0)
#define EXITPOLICY_POLICY_ALLOW		(1 << 1)

/**
 * struct exitpolicy_policy - argument of the EXITPOLICY_*_POLICY commands
 * @size: sizeof(struct exitpolicy_policy)
 * @flags: EXITPOLICY_SET_POLICY: EXITPOLICY_POLICY_*, at least one; the set
 *	that is not named keeps its value, or is "none" (disable) and "all"
 *	(allow) in a new policy.  This one and EXITPOLICY_CLEAR_POLICY:
 *	EXITPOLICY_NEW_ONLY, EXITPOLICY_NO_WAIT.  All others: must be 0
 * @cgroup_fd: in: a directory of the cgroup v2 file system (O_PATH will do).
 *	EXITPOLICY_NEXT_POLICY: must be 0
 * @reserved: must be 0
 * @cgroup_id: EXITPOLICY_NEXT_POLICY: in: where to go on, 0 to begin; out:
 *	the cgroup of the policy.  EXITPOLICY_RESOLVE_POLICY: out: the cgroup
 *	that @disable was inherited from, 0 if from none.  SET, GET and CLEAR:
 *	ignored on input; out: the id of the cgroup
 * @disable: the exits that every VM gets
 * @allow: the most that any VM may get
 * @timeout_ms: EXITPOLICY_SET_POLICY and EXITPOLICY_CLEAR_POLICY: in: how long
 *	to wait for vCPUs, at most 60000; 0 for a second.  All others: ignored
 * @pending: EXITPOLICY_SET_POLICY and EXITPOLICY_CLEAR_POLICY: out: number of
 *	vCPUs that were waited for in vain
 *
 * A cgroup's id is what name_to_handle_at() says of its directory, as in
 * bpf_get_current_cgroup_id().  Ids are never used twice.
 */
struct exitpolicy_policy {
	__u32 size;
	__u32 flags;
	__s32 cgroup_fd;
	__u32 reserved;
	__u64 cgroup_id;
	__u64 disable;
	__u64 allow;
	__u32 timeout_ms;
	__u32 pending;
};

/*
 * Why exits that a VM should get are refused to it, or why it keeps some that
 * it should not have.
 */
#define EXITPOLICY_REFUSAL_NONE		0
/*
 * "hlt", on Intel: a vCPU's guest was told of KVM_FEATURE_PV_UNHALT.  Its kick
 * raises no interrupt, and would not end a native HLT.
 */
#define EXITPOLICY_REFUSAL_PV_UNHALT	1
/* All but "hlt": the guest's state is encrypted. */
#define EXITPOLICY_REFUSAL_PROTECTED	2
/* All: KVM runs on Hyper-V and does not use the CPU's own VMCS. */
#define EXITPOLICY_REFUSAL_HYPERV	3

/**
 * struct exitpolicy_vm - argument of EXITPOLICY_NEXT_VM and EXITPOLICY_GET_VM
 * @size: sizeof(struct exitpolicy_vm)
 * @flags: must be 0
 * @id: EXITPOLICY_NEXT_VM: in: where to go on, 0 to begin; out: the VM's id.
 *	EXITPOLICY_GET_VM: in: the VM's id.  Ids count up from 1 and are not
 *	used twice while the module stays loaded
 * @cgroup_id: out: the domain cgroup of the VMM when its VM was last decided on
 * @pid: out: the VMM's thread group id in the initial pid namespace
 * @vcpus: out: number of vCPUs, one that is being created included
 * @floor: out: what KVM itself had disabled
 * @requested: out: what the VMM asked for with KVM_CAP_X86_DISABLE_EXITS
 * @effective: out: what the VM should have; vCPUs with an override differ
 * @clamped: out: what the VMM asked for and "allow" took away
 * @disable: out: the VM's override, if @has_disable
 * @refused: out: what of @effective, and of what its vCPUs should have, cannot
 *	be given, or is kept in spite of it
 * @refusal: out: EXITPOLICY_REFUSAL_*, why
 * @has_disable: out: 1 if the VM has an override
 * @pending: out: number of its vCPUs that are on their way
 * @adopted: out: 1 if the VM is older than the module
 */
struct exitpolicy_vm {
	__u32 size;
	__u32 flags;
	__u64 id;
	__u64 cgroup_id;
	__u32 pid;
	__u32 vcpus;
	__u64 floor;
	__u64 requested;
	__u64 effective;
	__u64 clamped;
	__u64 disable;
	__u64 refused;
	__u32 refusal;
	__u32 has_disable;
	__u32 pending;
	__u32 adopted;
};

/* The vCPU is as it should be, except for what is refused. */
#define EXITPOLICY_VCPU_IN_FORCE	0
/* It is not in the guest, and will change before it is. */
#define EXITPOLICY_VCPU_NEXT_ENTRY	1
/* It is in the guest, and was asked to leave it. */
#define EXITPOLICY_VCPU_PENDING		2
/* It is in a guest of its guest, and will change when that one exits. */
#define EXITPOLICY_VCPU_IN_L2		3

/**
 * struct exitpolicy_vcpu - argument of EXITPOLICY_NEXT_VCPU and
 *	EXITPOLICY_GET_VCPU
 * @size: sizeof(struct exitpolicy_vcpu)
 * @flags: must be 0
 * @vm: in: the VM's id
 * @vcpu_id: EXITPOLICY_NEXT_VCPU: in: where to go on, 0 to begin; out: the
 *	lowest vCPU id that is not below.  EXITPOLICY_GET_VCPU: in: the id.
 *	Ids are those of KVM_CREATE_VCPU
 * @state: out: EXITPOLICY_VCPU_*
 * @disable: out: the vCPU's override, if @has_disable
 * @wanted: out: what it should have
 * @in_force: out: what it has
 * @refused: out: where it may stay different from @wanted
 * @refusal: out: EXITPOLICY_REFUSAL_*, why
 * @has_disable: out: 1 if the vCPU has an override of its own
 */
struct exitpolicy_vcpu {
	__u32 size;
	__u32 flags;
	__u64 vm;
	__u32 vcpu_id;
	__u32 state;
	__u64 disable;
	__u64 wanted;
	__u64 in_force;
	__u64 refused;
	__u32 refusal;
	__u32 has_disable;
};

/* EXITPOLICY_SET_VM, EXITPOLICY_RESET_VM: one vCPU, not the VM. */
#define EXITPOLICY_VM_VCPU		(1 << 0)

/**
 * struct exitpolicy_override - argument of EXITPOLICY_SET_VM and
 *	EXITPOLICY_RESET_VM
 * @size: sizeof(struct exitpolicy_override)
 * @flags: EXITPOLICY_VM_VCPU, EXITPOLICY_NO_WAIT
 * @vm: in: the VM's id
 * @vcpu_id: in: the vCPU's, with EXITPOLICY_VM_VCPU; otherwise must be 0
 * @timeout_ms: in: how long to wait for vCPUs, at most 60000; 0 for a second
 * @disable: in: what stands in for the cgroup's "disable".
 *	EXITPOLICY_RESET_VM: must be 0
 * @pending: out: number of vCPUs that were waited for in vain
 * @reserved: must be 0
 */
struct exitpolicy_override {
	__u32 size;
	__u32 flags;
	__u64 vm;
	__u32 vcpu_id;
	__u32 timeout_ms;
	__u64 disable;
	__u32 pending;
	__u32 reserved;
};

/*
 * The size is in the structure and not in the number, so that a structure may
 * grow without a new command.
 */

/* Tell what the module found and does. */
#define EXITPOLICY_GET_INFO		_IO(EXITPOLICY_IOC_MAGIC, 0x00)
/* The master switch. */
#define EXITPOLICY_SET_ENABLED		_IO(EXITPOLICY_IOC_MAGIC, 0x01)
/* Make or change the policy of a cgroup. */
#define EXITPOLICY_SET_POLICY		_IO(EXITPOLICY_IOC_MAGIC, 0x10)
/* Read the policy of this very cgroup; ENOENT if it has none. */
#define EXITPOLICY_GET_POLICY		_IO(EXITPOLICY_IOC_MAGIC, 0x11)
/* Remove the policy of this very cgroup; ENOENT if it has none. */
#define EXITPOLICY_CLEAR_POLICY		_IO(EXITPOLICY_IOC_MAGIC, 0x12)
/* The policy with the next higher cgroup id; ENOENT after the last. */
#define EXITPOLICY_NEXT_POLICY		_IO(EXITPOLICY_IOC_MAGIC, 0x13)
/* What a VM in this cgroup is subject to, inheritance included. */
#define EXITPOLICY_RESOLVE_POLICY	_IO(EXITPOLICY_IOC_MAGIC, 0x14)
/* The VM with the next higher id; ENOENT after the last. */
#define EXITPOLICY_NEXT_VM		_IO(EXITPOLICY_IOC_MAGIC, 0x20)
/* One VM by its id; ENOENT if it is gone. */
#define EXITPOLICY_GET_VM		_IO(EXITPOLICY_IOC_MAGIC, 0x21)
/* Give a VM or a vCPU an override, or change it. */
#define EXITPOLICY_SET_VM		_IO(EXITPOLICY_IOC_MAGIC, 0x22)
/* Take an override away: a VM's with those of its vCPUs, or one vCPU's. */
#define EXITPOLICY_RESET_VM		_IO(EXITPOLICY_IOC_MAGIC, 0x23)
/* The VM's vCPU with the next id; ENOENT after the last, and if the VM is gone. */
#define EXITPOLICY_NEXT_VCPU		_IO(EXITPOLICY_IOC_MAGIC, 0x24)
/* One vCPU; ENOENT if there is none, or no such VM. */
#define EXITPOLICY_GET_VCPU		_IO(EXITPOLICY_IOC_MAGIC, 0x25)

#endif /* _UAPI_LINUX_EXITPOLICY_H */
