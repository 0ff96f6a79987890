/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the kernel offers only as macros and inline functions, as functions.
 * Each does what its name says and nothing else; the safe face of each is in
 * rust/kernel_ext.
 */
#ifndef EXITPOLICY_SHIM_H
#define EXITPOLICY_SHIM_H

#include <linux/types.h>

struct cgroup;
struct exitpolicy_decision;
struct file;
struct ftrace_regs;
struct lock_class_key;
struct raw_spinlock;
struct task_struct;
struct tracepoint;

void exitpolicy_raw_spin_lock_init(struct raw_spinlock *lock, const char *name,
				   struct lock_class_key *key);
void exitpolicy_raw_spin_lock(struct raw_spinlock *lock);
bool exitpolicy_raw_spin_trylock(struct raw_spinlock *lock);
void exitpolicy_raw_spin_unlock(struct raw_spinlock *lock);
void exitpolicy_raw_spin_assert_held(struct raw_spinlock *lock);

unsigned long exitpolicy_ftrace_regs_argument(struct ftrace_regs *fregs,
					      unsigned int n);

/* Under rcu_read_lock(), which also bounds the use of the result. */
struct cgroup *exitpolicy_task_cgroup(struct task_struct *task);
struct cgroup *exitpolicy_cgroup_domain(struct cgroup *cgrp);
void exitpolicy_cgroup_put(struct cgroup *cgrp);
u64 exitpolicy_cgroup_id(const struct cgroup *cgrp);
struct cgroup *exitpolicy_cgroup_parent(struct cgroup *cgrp);
bool exitpolicy_cgroup_is_dead(const struct cgroup *cgrp);
bool exitpolicy_in_init_cgroup_ns(void);
int exitpolicy_cgroup_path(struct cgroup *cgrp, char *buf, size_t size);

const char *exitpolicy_tracepoint_name(const struct tracepoint *tp);
void exitpolicy_tracepoint_synchronize(void);

/* An indirect call, made here so that it carries C's CFI type. */
long exitpolicy_file_ioctl(struct file *file, unsigned int cmd,
			   unsigned long arg);

/* Layouts as the compiler sees them that compiles this, KVM's own. */
struct exitpolicy_layout {
	size_t kvm_size;
	size_t kvm_mm;
	size_t kvm_created_vcpus;
	size_t kvm_online_vcpus;
	size_t kvm_disabled_exits;
	size_t kvm_vcpu_kvm;
	size_t fprobe_size;
	size_t fprobe_entry_handler;
};

extern const struct exitpolicy_layout exitpolicy_layout;

struct exitpolicy_decision {
	u64 vm;
	u64 cgroup;
	u32 pid;
	u64 floor;
	u64 requested;
	u64 effective;
	u64 clamped;
};

void exitpolicy_trace_decision(const struct exitpolicy_decision *decision);

#endif /* EXITPOLICY_SHIM_H */
