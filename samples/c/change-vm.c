/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The smallest change of a VM that runs: lets it halt natively from now on,
 * whatever its cgroup's policy says, and tells what came of it.
 *
 *	make && sudo ./change-vm 3
 *
 * "exitpolicy vm list" has the ids, "exitpolicy vm reset 3" undoes it.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/exitpolicy.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>

static const char *const states[] = {
	[EXITPOLICY_VCPU_IN_FORCE] = "in force",
	[EXITPOLICY_VCPU_NEXT_ENTRY] = "at next entry",
	[EXITPOLICY_VCPU_PENDING] = "pending",
	[EXITPOLICY_VCPU_IN_L2] = "pending: in L2",
};

int main(int argc, char **argv)
{
	struct exitpolicy_override override = {
		.size = sizeof(override),
		.disable = KVM_X86_DISABLE_EXITS_HLT,
	};
	struct exitpolicy_vcpu vcpu = {
		.size = sizeof(vcpu),
	};
	int module;

	if (argc != 2)
		errx(2, "usage: %s VM", argv[0]);
	module = open("/dev/exitpolicy", O_RDWR | O_CLOEXEC);
	if (module < 0)
		err(1, "cannot open /dev/exitpolicy");

	/* It waits a second for vCPUs that are in the guest. */
	override.vm = strtoull(argv[1], NULL, 10);
	if (ioctl(module, EXITPOLICY_SET_VM, &override))
		err(1, "cannot change VM %s", argv[1]);
	printf("vCPUs that were waited for in vain: %u\n", override.pending);

	for (vcpu.vm = override.vm; !ioctl(module, EXITPOLICY_NEXT_VCPU, &vcpu);
	     vcpu.vcpu_id++) {
		printf("vCPU %u: wanted %#llx, has %#llx", vcpu.vcpu_id,
		       (unsigned long long)vcpu.wanted,
		       (unsigned long long)vcpu.in_force);
		/* What is refused stays as it is. */
		printf(", refused %#llx, %s\n",
		       (unsigned long long)vcpu.refused,
		       vcpu.state < sizeof(states) / sizeof(*states) ?
			       states[vcpu.state] : "?");
	}
	if (errno != ENOENT)
		err(1, "cannot list the vCPUs of VM %s", argv[1]);
	return 0;
}
