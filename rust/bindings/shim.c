// SPDX-License-Identifier: GPL-2.0

#include <linux/fprobe.h>

#include <linux/cgroup.h>
#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/nsproxy.h>
#include <linux/sched/task.h>
#include <linux/spinlock.h>
#include <linux/tracepoint.h>

#include "shim.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

void exitpolicy_raw_spin_lock_init(struct raw_spinlock *lock, const char *name,
				   struct lock_class_key *key)
{
#ifdef CONFIG_DEBUG_SPINLOCK
	__raw_spin_lock_init(lock, name, key, LD_WAIT_SPIN);
#else
	raw_spin_lock_init(lock);
#endif
}

void exitpolicy_raw_spin_lock(struct raw_spinlock *lock)
{
	raw_spin_lock(lock);
}

bool exitpolicy_raw_spin_trylock(struct raw_spinlock *lock)
{
	return raw_spin_trylock(lock);
}

void exitpolicy_raw_spin_unlock(struct raw_spinlock *lock)
{
	raw_spin_unlock(lock);
}

void exitpolicy_raw_spin_assert_held(struct raw_spinlock *lock)
{
	lockdep_assert_held(lock);
}

unsigned long exitpolicy_ftrace_regs_argument(struct ftrace_regs *fregs,
					      unsigned int n)
{
	return ftrace_regs_get_argument(fregs, n);
}

struct cgroup *exitpolicy_task_cgroup(struct task_struct *task)
{
	return task_dfl_cgroup(task);
}

struct cgroup *exitpolicy_cgroup_domain(struct cgroup *cgrp)
{
	/* Of a domain cgroup, that cgroup. */
	return cgrp->dom_cgrp;
}

void exitpolicy_cgroup_put(struct cgroup *cgrp)
{
	cgroup_put(cgrp);
}

u64 exitpolicy_cgroup_id(const struct cgroup *cgrp)
{
	return cgroup_id(cgrp);
}

struct cgroup *exitpolicy_cgroup_parent(struct cgroup *cgrp)
{
	return cgroup_parent(cgrp);
}

bool exitpolicy_cgroup_is_dead(const struct cgroup *cgrp)
{
	return cgroup_is_dead(cgrp);
}

bool exitpolicy_in_init_cgroup_ns(void)
{
	return current->nsproxy->cgroup_ns == init_task.nsproxy->cgroup_ns;
}

int exitpolicy_cgroup_path(struct cgroup *cgrp, char *buf, size_t size)
{
	return cgroup_path_ns(cgrp, buf, size, current->nsproxy->cgroup_ns);
}

const char *exitpolicy_tracepoint_name(const struct tracepoint *tp)
{
	return tp->name;
}

void exitpolicy_tracepoint_synchronize(void)
{
	tracepoint_synchronize_unregister();
}

long exitpolicy_file_ioctl(struct file *file, unsigned int cmd,
			   unsigned long arg)
{
	if (!file->f_op->unlocked_ioctl)
		return -ENOTTY;
	return file->f_op->unlocked_ioctl(file, cmd, arg);
}

const struct exitpolicy_layout exitpolicy_layout = {
	.kvm_size = sizeof(struct kvm),
	.kvm_mm = offsetof(struct kvm, mm),
	.kvm_created_vcpus = offsetof(struct kvm, created_vcpus),
	.kvm_online_vcpus = offsetof(struct kvm, online_vcpus),
	.kvm_disabled_exits = offsetof(struct kvm, arch.disabled_exits),
	.kvm_vcpu_kvm = offsetof(struct kvm_vcpu, kvm),
	.fprobe_size = sizeof(struct fprobe),
	.fprobe_entry_handler = offsetof(struct fprobe, entry_handler),
};

void exitpolicy_trace_decision(const struct exitpolicy_decision *decision)
{
	trace_exitpolicy_decision(decision);
}
