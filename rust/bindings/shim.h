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
struct files_struct;
struct ftrace_regs;
struct kvm;
struct kvm_vcpu;
struct lock_class_key;
struct pid;
struct raw_spinlock;
struct task_struct;
struct tracepoint;

void exitpolicy_raw_spin_lock_init(struct raw_spinlock *lock, const char *name,
				   struct lock_class_key *key);
unsigned long exitpolicy_raw_spin_lock_irqsave(struct raw_spinlock *lock);
bool exitpolicy_raw_spin_trylock_irqsave(struct raw_spinlock *lock,
					 unsigned long *flags);
void exitpolicy_raw_spin_unlock_irqrestore(struct raw_spinlock *lock,
					   unsigned long flags);
void exitpolicy_raw_spin_assert_held(struct raw_spinlock *lock);

unsigned long exitpolicy_ftrace_regs_argument(struct ftrace_regs *fregs,
					      unsigned int n);

/* Under rcu_read_lock(), which also bounds the use of the result. */
struct cgroup *exitpolicy_task_cgroup(struct task_struct *task);
struct cgroup *exitpolicy_process_cgroup(struct pid *process, const void *mm);
struct cgroup *exitpolicy_cgroup_domain(struct cgroup *cgrp);
void exitpolicy_cgroup_put(struct cgroup *cgrp);
u64 exitpolicy_cgroup_id(const struct cgroup *cgrp);
struct cgroup *exitpolicy_cgroup_parent(struct cgroup *cgrp);
struct cgroup *exitpolicy_cgroup_child(struct cgroup *cgrp, const char *name);
bool exitpolicy_cgroup_is_dead(const struct cgroup *cgrp);
bool exitpolicy_in_init_cgroup_ns(void);
int exitpolicy_cgroup_path(struct cgroup *cgrp, char *buf, size_t size);

bool exitpolicy_ftrace_is_dead(void);

const char *exitpolicy_tracepoint_name(const struct tracepoint *tp);
void exitpolicy_tracepoint_synchronize(void);

/* An indirect call, made here so that it carries C's CFI type. */
long exitpolicy_file_ioctl(struct file *file, unsigned int cmd,
			   unsigned long arg);

const void *exitpolicy_file_operations(const struct file *file);
void *exitpolicy_file_data(const struct file *file);

/* The thread group of a task, with a reference. */
struct pid *exitpolicy_task_process(struct task_struct *task);
struct pid *exitpolicy_pid_get(struct pid *pid);
/*
 * The memory of a task's process, as an identity, or NULL; and a process that has
 * this memory, with a reference, and its cgroup, or NULL.  Processes share it that
 * clone(2) has made with CLONE_VM.  The latter looks at all threads that there are;
 * its caller is under RCU, which keeps the cgroup.
 */
const void *exitpolicy_task_memory(struct task_struct *task);
struct pid *exitpolicy_memory_process(const void *mm, struct cgroup **cgrp);
/* Whether there may be such a process for a VM. */
bool exitpolicy_vm_memory_is_used(struct kvm *kvm);
u32 exitpolicy_pid_number(struct pid *pid);

/*
 * Calls back for each file that some process has open, until told to stop by
 * something else than 0.  Locks are held: must not sleep.  A file may come more
 * than once.
 */
typedef int (*exitpolicy_file_fn)(void *data, struct file *file,
				  struct task_struct *task);
void exitpolicy_walk_open_files(exitpolicy_file_fn fn, void *data);

/* KVM's own inline functions: see virt/kvm/vcpu-requests of its documentation. */
struct kvm_vcpu *exitpolicy_vcpu(struct kvm *kvm, unsigned int index);
bool exitpolicy_vcpu_in_guest(struct kvm_vcpu *vcpu);
void exitpolicy_vcpu_ask(struct kvm_vcpu *vcpu);
bool exitpolicy_vcpu_is_asked(struct kvm_vcpu *vcpu);
bool exitpolicy_vcpu_in_l2(struct kvm_vcpu *vcpu);
bool exitpolicy_vcpu_may_enter_l2(struct kvm_vcpu *vcpu);

/*
 * Functions of KVM's that it does not export to others.  They are called by
 * static calls, which are direct: IBT kills who calls a function indirectly
 * whose ENDBR was sealed.  Without an address, which exitpolicy_find_function()
 * has, a call does nothing.
 */
unsigned long exitpolicy_find_function(const char *symbol);
void exitpolicy_use_set_intercept_for_msr(unsigned long function);
void exitpolicy_use_switch_to_sw_timer(unsigned long function);
void exitpolicy_set_intercept_for_msr(struct kvm_vcpu *vcpu, u32 msr,
				      bool intercept);
void exitpolicy_switch_to_sw_timer(struct kvm_vcpu *vcpu);

bool exitpolicy_cpu_has_idle_hlt(void);
/* Of a vCPU of kvm-amd's: if it is in L2, reads of the MSR there exit from now on. */
void exitpolicy_svm_exit_in_l2(struct kvm_vcpu *vcpu, u32 msr);
/* Of a VM of kvm-amd's: SEV-ES or SEV-SNP. */
bool exitpolicy_svm_is_encrypted(struct kvm *kvm);
/*
 * As KVM's own (vmx_ops.h), these do nothing when VMX is off, as it is on all CPUs
 * from kvm_shutdown() on, while tasks still run.  vmwrite says whether the VMCS took
 * it, or would have.
 */
u64 exitpolicy_vmread(u32 field);
bool exitpolicy_vmwrite(u32 field, u64 value);
bool exitpolicy_on_hyperv(void);

/* Calls fn while no other CPU does anything that preemption is disabled for. */
int exitpolicy_stop_machine(int (*fn)(void *data), void *data);

/* Layouts as the compiler sees them that compiles this, KVM's own. */
struct exitpolicy_layout {
	size_t kvm_size;
	size_t kvm_mm;
	size_t kvm_created_vcpus;
	size_t kvm_online_vcpus;
	size_t kvm_disabled_exits;
	size_t kvm_has_protected_state;
	size_t kvm_vm_type;
	size_t kvm_vcpu_kvm;
	size_t kvm_vcpu_id;
	size_t kvm_vcpu_idx;
	size_t kvm_vcpu_apic;
	size_t kvm_vcpu_cpuid_entries;
	size_t kvm_vcpu_cpuid_nent;
	size_t kvm_vcpu_pv_cpuid;
	size_t kvm_vcpu_last_vmentry_cpu;
	size_t vcpu_svm_vcpu;
	size_t vcpu_svm_vmcb01;
	size_t vmcb_intercepts;
	size_t vmcb_pause_filter_thresh;
	size_t vmcb_pause_filter_count;
	size_t vcpu_vmx_vcpu;
	size_t vcpu_vmx_vmcs01;
	size_t vcpu_vmx_loaded_vmcs;
	size_t vcpu_vmx_ple_window;
	size_t vcpu_vmx_ple_window_dirty;
	size_t loaded_vmcs_exec;
	size_t loaded_vmcs_secondary_exec;
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
