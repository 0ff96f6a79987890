// SPDX-License-Identifier: GPL-2.0
/*
 * Prints what the C compiler makes of <linux/exitpolicy.h>; src/uapi.rs has the
 * Rust side of it, and compares.
 */
#include <stddef.h>
#include <stdio.h>

#include <linux/exitpolicy.h>

#define STRUCT(name) \
	printf(#name " %zu\n", sizeof(struct exitpolicy_##name))
#define MEMBER(name, member) \
	printf(#name "." #member " %zu %zu\n", \
	       offsetof(struct exitpolicy_##name, member), \
	       sizeof(((struct exitpolicy_##name *)0)->member))
#define NUMBER(name) \
	printf(#name " %lu\n", (unsigned long)EXITPOLICY_##name)

int main(void)
{
	STRUCT(info);
	MEMBER(info, size);
	MEMBER(info, flags);
	MEMBER(info, vendor);
	MEMBER(info, enabled);
	MEMBER(info, supported);
	MEMBER(info, floor);
	MEMBER(info, missed);
	MEMBER(info, clamps);
	MEMBER(info, policies);
	MEMBER(info, vms);
	MEMBER(info, pending);
	MEMBER(info, holding);

	STRUCT(enabled);
	MEMBER(enabled, size);
	MEMBER(enabled, flags);
	MEMBER(enabled, enabled);
	MEMBER(enabled, reserved);
	MEMBER(enabled, timeout_ms);
	MEMBER(enabled, pending);

	STRUCT(policy);
	MEMBER(policy, size);
	MEMBER(policy, flags);
	MEMBER(policy, cgroup_fd);
	MEMBER(policy, reserved);
	MEMBER(policy, cgroup_id);
	MEMBER(policy, disable);
	MEMBER(policy, allow);
	MEMBER(policy, timeout_ms);
	MEMBER(policy, pending);

	STRUCT(vm);
	MEMBER(vm, size);
	MEMBER(vm, flags);
	MEMBER(vm, id);
	MEMBER(vm, cgroup_id);
	MEMBER(vm, pid);
	MEMBER(vm, vcpus);
	MEMBER(vm, floor);
	MEMBER(vm, requested);
	MEMBER(vm, effective);
	MEMBER(vm, clamped);
	MEMBER(vm, disable);
	MEMBER(vm, refused);
	MEMBER(vm, refusal);
	MEMBER(vm, has_disable);
	MEMBER(vm, pending);
	MEMBER(vm, adopted);

	STRUCT(vcpu);
	MEMBER(vcpu, size);
	MEMBER(vcpu, flags);
	MEMBER(vcpu, vm);
	MEMBER(vcpu, vcpu_id);
	MEMBER(vcpu, state);
	MEMBER(vcpu, disable);
	MEMBER(vcpu, wanted);
	MEMBER(vcpu, in_force);
	MEMBER(vcpu, refused);
	MEMBER(vcpu, refusal);
	MEMBER(vcpu, has_disable);

	STRUCT(override);
	MEMBER(override, size);
	MEMBER(override, flags);
	MEMBER(override, vm);
	MEMBER(override, vcpu_id);
	MEMBER(override, timeout_ms);
	MEMBER(override, disable);
	MEMBER(override, pending);
	MEMBER(override, reserved);

	NUMBER(VENDOR_NONE);
	NUMBER(VENDOR_SVM);
	NUMBER(VENDOR_VMX);
	NUMBER(POLICY_DISABLE);
	NUMBER(POLICY_ALLOW);
	NUMBER(NEW_ONLY);
	NUMBER(NO_WAIT);
	NUMBER(REFUSAL_NONE);
	NUMBER(REFUSAL_PV_UNHALT);
	NUMBER(REFUSAL_PROTECTED);
	NUMBER(REFUSAL_HYPERV);
	NUMBER(VCPU_IN_FORCE);
	NUMBER(VCPU_NEXT_ENTRY);
	NUMBER(VCPU_PENDING);
	NUMBER(VCPU_IN_L2);
	NUMBER(VM_VCPU);
	/* _IO(): EXITPOLICY_GET_INFO and the rest. */
	NUMBER(GET_INFO);
	NUMBER(SET_ENABLED);
	NUMBER(SET_POLICY);
	NUMBER(GET_POLICY);
	NUMBER(CLEAR_POLICY);
	NUMBER(NEXT_POLICY);
	NUMBER(RESOLVE_POLICY);
	NUMBER(NEXT_VM);
	NUMBER(GET_VM);
	NUMBER(SET_VM);
	NUMBER(RESET_VM);
	NUMBER(NEXT_VCPU);
	NUMBER(GET_VCPU);
	return 0;
}
