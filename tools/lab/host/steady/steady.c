// SPDX-License-Identifier: GPL-2.0
/*
 * Keeps the kernel of a QEMU host from patching __schedule() and
 * finish_task_switch() whenever KVM gets its first VM or loses its last one
 * (virt/kvm/kvm_main.c:kvm_create_vm()). QEMU's CPUs go on with code that was
 * written over now and then, see ../../README.md.
 */

#include <linux/module.h>
#include <linux/preempt.h>

static int __init steady_init(void)
{
	preempt_notifier_inc();
	return 0;
}
module_init(steady_init);

static void __exit steady_exit(void)
{
	preempt_notifier_dec();
}
module_exit(steady_exit);

MODULE_DESCRIPTION("Preempt notifiers that stay on");
MODULE_LICENSE("GPL");
