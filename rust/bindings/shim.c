// SPDX-License-Identifier: GPL-2.0

#include <linux/fprobe.h>

#include <linux/cgroup.h>
#include <linux/fs.h>
#include <linux/nsproxy.h>
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

struct cgroup *exitpolicy_task_domain_cgroup(struct task_struct *task)
{
	/* dom_cgrp of a domain cgroup is that cgroup. */
	return task_dfl_cgroup(task)->dom_cgrp;
}

void exitpolicy_cgroup_get(struct cgroup *cgrp)
{
	cgroup_get(cgrp);
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

void exitpolicy_trace_decision(const struct exitpolicy_decision *decision)
{
	trace_exitpolicy_decision(decision);
}
