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

	STRUCT(enabled);
	MEMBER(enabled, size);
	MEMBER(enabled, flags);
	MEMBER(enabled, enabled);
	MEMBER(enabled, reserved);

	STRUCT(policy);
	MEMBER(policy, size);
	MEMBER(policy, flags);
	MEMBER(policy, cgroup_fd);
	MEMBER(policy, reserved);
	MEMBER(policy, cgroup_id);
	MEMBER(policy, disable);
	MEMBER(policy, allow);

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

	NUMBER(VENDOR_NONE);
	NUMBER(VENDOR_SVM);
	NUMBER(VENDOR_VMX);
	NUMBER(POLICY_DISABLE);
	NUMBER(POLICY_ALLOW);
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
	return 0;
}
