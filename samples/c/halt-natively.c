/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The smallest client in C: lets the VMs of a cgroup halt natively, and says
 * what then holds for them, inheritance included.
 *
 *	make && sudo ./halt-natively /sys/fs/cgroup/machine.slice
 */
#define _GNU_SOURCE /* O_PATH */
#include <err.h>
#include <fcntl.h>
#include <linux/exitpolicy.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>

int main(int argc, char **argv)
{
	struct exitpolicy_policy policy = {
		.size = sizeof(policy),
		.flags = EXITPOLICY_POLICY_DISABLE,
		.disable = KVM_X86_DISABLE_EXITS_HLT,
	};
	int module;

	if (argc != 2)
		errx(2, "usage: %s CGROUP-DIRECTORY", argv[0]);
	module = open("/dev/exitpolicy", O_RDWR | O_CLOEXEC);
	if (module < 0)
		err(1, "cannot open /dev/exitpolicy");
	policy.cgroup_fd = open(argv[1], O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (policy.cgroup_fd < 0)
		err(1, "cannot open %s", argv[1]);

	if (ioctl(module, EXITPOLICY_SET_POLICY, &policy))
		err(1, "cannot set the policy of %s", argv[1]);

	/* The flags were for SET_POLICY; all other commands want 0. */
	policy.flags = 0;
	if (ioctl(module, EXITPOLICY_RESOLVE_POLICY, &policy))
		err(1, "cannot resolve the policy of %s", argv[1]);
	printf("disable %#llx, allow %#llx\n",
	       (unsigned long long)policy.disable,
	       (unsigned long long)policy.allow);
	return 0;
}
