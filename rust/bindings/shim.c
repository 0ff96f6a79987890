// SPDX-License-Identifier: GPL-2.0

#include <linux/fprobe.h>

#include <linux/cgroup.h>
#include <linux/fdtable.h>
#include <linux/fs.h>
#include <linux/kprobes.h>
#include <linux/kvm_host.h>
#include <linux/mmu_notifier.h>
#include <linux/nsproxy.h>
#include <linux/pid.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/spinlock.h>
#include <linux/static_call.h>
#include <linux/stop_machine.h>
#include <linux/tracepoint.h>
#include <asm/hypervisor.h>
#include <asm/smp.h>

/* KVM's private headers: arch/x86/kvm. */
#include "lapic.h"
#include "regs.h"
#include "svm/svm.h"
#include "vmx/vmx.h"

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

unsigned long exitpolicy_raw_spin_lock_irqsave(struct raw_spinlock *lock)
{
	unsigned long flags;

	raw_spin_lock_irqsave(lock, flags);
	return flags;
}

bool exitpolicy_raw_spin_trylock_irqsave(struct raw_spinlock *lock,
					 unsigned long *flags)
{
	return raw_spin_trylock_irqsave(lock, *flags);
}

void exitpolicy_raw_spin_unlock_irqrestore(struct raw_spinlock *lock,
					   unsigned long flags)
{
	raw_spin_unlock_irqrestore(lock, flags);
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

struct cgroup *exitpolicy_process_cgroup(struct pid *process, const void *mm)
{
	struct task_struct *leader = pid_task(process, PIDTYPE_TGID);
	struct task_struct *task;

	if (!leader)
		return NULL;
	/*
	 * A thread that has exited stays in the cgroup that it had. One that has
	 * called execve() has other memory (fs/exec.c:exec_mmap()).
	 */
	for_each_thread(leader, task) {
		if (READ_ONCE(task->mm) == mm &&
		    !(READ_ONCE(task->flags) & PF_EXITING))
			return task_dfl_cgroup(task);
	}
	return NULL;
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

/*
 * cgroup_get_from_path() does not look whether what it passes is a directory,
 * and takes the memory of an open file for names below it.
 */
struct cgroup *exitpolicy_cgroup_child(struct cgroup *cgrp, const char *name)
{
	struct kernfs_node *kn = kernfs_find_and_get(cgrp->kn, name);
	struct cgroup *child;

	if (!kn)
		return ERR_PTR(-ENOENT);
	if (kernfs_type(kn) == KERNFS_DIR) {
		rcu_read_lock();
		/* As cgroup_get_from_path() does it. */
		child = rcu_dereference(*(void __rcu __force **)&kn->priv);
		if (!child || !cgroup_tryget(child))
			child = ERR_PTR(-ENOENT);
		rcu_read_unlock();
	} else {
		child = ERR_PTR(-ENOTDIR);
	}
	kernfs_put(kn);
	return child;
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

bool exitpolicy_ftrace_is_dead(void)
{
	static struct ftrace_ops ops;

	/* ftrace_is_dead() is not exported.  No function is at 0: ops stays empty. */
	return ftrace_set_filter_ip(&ops, 0, 0, 0) == -ENODEV;
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

const void *exitpolicy_file_operations(const struct file *file)
{
	return file->f_op;
}

void *exitpolicy_file_data(const struct file *file)
{
	return file->private_data;
}

struct pid *exitpolicy_task_process(struct task_struct *task)
{
	struct pid *process;

	rcu_read_lock();
	process = get_pid(task_tgid(task));
	rcu_read_unlock();
	return process;
}

const void *exitpolicy_task_memory(struct task_struct *task)
{
	struct task_struct *thread;
	const void *mm = NULL;

	rcu_read_lock();
	for_each_thread(task, thread) {
		mm = READ_ONCE(thread->mm);
		if (mm)
			break;
	}
	rcu_read_unlock();
	return mm;
}

bool exitpolicy_vm_memory_is_used(struct kvm *kvm)
{
	/* kvm_create_vm() holds the structure, and not what it describes. */
	return atomic_read(&kvm->mm->mm_users) > 0;
}

struct pid *exitpolicy_memory_process(const void *mm, struct cgroup **cgrp)
{
	struct task_struct *process, *thread;
	struct pid *found;

	for_each_process_thread(process, thread) {
		/* A kernel thread has borrowed it. */
		if (READ_ONCE(thread->mm) != mm ||
		    READ_ONCE(thread->flags) & (PF_EXITING | PF_KTHREAD))
			continue;
		found = get_pid(task_tgid(thread));
		/* These are two loops: "break" would go on with the outer one. */
		if (found) {
			*cgrp = task_dfl_cgroup(thread);
			return found;
		}
	}
	return NULL;
}

struct pid *exitpolicy_pid_get(struct pid *pid)
{
	return get_pid(pid);
}

u32 exitpolicy_pid_number(struct pid *pid)
{
	return pid_nr(pid);
}

struct open_file_walk {
	exitpolicy_file_fn fn;
	void *data;
	struct task_struct *task;
};

static int walk_file(const void *data, struct file *file, unsigned int fd)
{
	const struct open_file_walk *walk = data;

	return walk->fn(walk->data, file, walk->task);
}

void exitpolicy_walk_open_files(exitpolicy_file_fn fn, void *data)
{
	struct open_file_walk walk = { .fn = fn, .data = data };
	const struct files_struct *last_files = NULL;
	const struct mm_struct *last_mm = NULL;
	struct task_struct *process, *thread;
	int stop = 0;

	rcu_read_lock();
	for_each_process_thread(process, thread) {
		const struct files_struct *files = READ_ONCE(thread->files);

		/*
		 * Most threads have those of the one before, and the kernel's,
		 * for a VM, have none.  Of no use is the leader's pointer, as it
		 * may have exited before the others.  VMs in files that are shared
		 * by processes are each found in their own one's.
		 */
		if (!files || (files == last_files &&
			       READ_ONCE(thread->mm) == last_mm))
			continue;
		walk.task = thread;
		/* Keeps the memory and the table of a task that exits. */
		task_lock(thread);
		/*
		 * KVM has a notifier in the memory of whoever has made a VM
		 * (kvm_main.c: kvm_init_mmu_notifier()). The tables of all
		 * others, who may have many large ones, are of no interest.
		 */
		if (thread->mm && mm_has_notifiers(thread->mm)) {
			last_files = thread->files;
			last_mm = thread->mm;
			stop = iterate_fd(thread->files, 0, walk_file, &walk);
		}
		task_unlock(thread);
		/* These are two loops: "break" would go on with the outer one. */
		if (stop)
			goto out;
	}
out:
	rcu_read_unlock();
}

void exitpolicy_svm_exit_in_l2(struct kvm_vcpu *vcpu, u32 msr)
{
	/* KVM has allocated this one before it entered L2. */
	if (is_guest_mode(vcpu))
		svm_set_msr_bitmap_read(to_svm(vcpu)->nested.msrpm, msr);
}

bool exitpolicy_svm_is_encrypted(struct kvm *kvm)
{
#ifdef CONFIG_KVM_AMD_SEV
	return to_kvm_sev_info(kvm)->es_active;
#else
	return false;
#endif
}

u64 exitpolicy_vmread(u32 field)
{
	u64 value = 0;

	asm volatile("1: vmread %[field], %[value]\n\t"
		     "2:\n\t"
		     _ASM_EXTABLE(1b, 2b)
		     : [value] "+r" (value)
		     : [field] "r" ((u64)field)
		     : "cc", "memory");
	return value;
}

bool exitpolicy_vmwrite(u32 field, u64 value)
{
	bool failed = false;

	asm volatile("1: vmwrite %[value], %[field]\n\t"
		     "setna %[failed]\n\t"
		     "2:\n\t"
		     _ASM_EXTABLE(1b, 2b)
		     : [failed] "+q" (failed)
		     : [field] "r" ((u64)field), [value] "r" (value)
		     : "cc", "memory");
	return !failed;
}

struct kvm_vcpu *exitpolicy_vcpu(struct kvm *kvm, unsigned int index)
{
	return kvm_get_vcpu(kvm, index);
}

bool exitpolicy_vcpu_in_guest(struct kvm_vcpu *vcpu)
{
	int mode = READ_ONCE(vcpu->mode);

	return mode == IN_GUEST_MODE || mode == EXITING_GUEST_MODE;
}

void exitpolicy_vcpu_ask(struct kvm_vcpu *vcpu)
{
	kvm_make_request(KVM_REQ_RECALC_INTERCEPTS, vcpu);
	/* As kvm_vcpu_kick(), which KVM keeps to itself, without its wake-up. */
	if (kvm_vcpu_exiting_guest_mode(vcpu) == IN_GUEST_MODE) {
		int cpu = READ_ONCE(vcpu->cpu);

		if ((unsigned int)cpu < nr_cpu_ids && cpu_online(cpu))
			arch_smp_send_reschedule(cpu);
	}
}

bool exitpolicy_vcpu_is_asked(struct kvm_vcpu *vcpu)
{
	return kvm_test_request(KVM_REQ_RECALC_INTERCEPTS, vcpu);
}

bool exitpolicy_vcpu_in_l2(struct kvm_vcpu *vcpu)
{
	return is_guest_mode(vcpu);
}

bool exitpolicy_vcpu_may_enter_l2(struct kvm_vcpu *vcpu)
{
	/*
	 * VMX. Between an exit and its handling, which may be that of VMLAUNCH
	 * or VMRESUME. One that sleeps, or is in no ioctl, is past that.
	 */
	return (READ_ONCE(vcpu->arch.cr4) & X86_CR4_VMXE) &&
	       mutex_is_locked(&vcpu->mutex) && !kvm_vcpu_is_blocking(vcpu);
}

unsigned long exitpolicy_find_function(const char *symbol)
{
	/* Registered but not armed: nothing is written into the function. */
	struct kprobe probe = {
		.symbol_name = symbol,
		.flags = KPROBE_FLAG_DISABLED,
	};
	unsigned long address;

	if (register_kprobe(&probe))
		return 0;
	address = (unsigned long)probe.addr;
	unregister_kprobe(&probe);
	return address;
}

/* For their types only: KVM does not export them. */
static_assert(__same_type(svm_set_intercept_for_msr, vmx_set_intercept_for_msr));
DEFINE_STATIC_CALL_NULL(set_intercept_for_msr, svm_set_intercept_for_msr);
DEFINE_STATIC_CALL_NULL(switch_to_sw_timer, kvm_lapic_switch_to_sw_timer);

void exitpolicy_use_set_intercept_for_msr(unsigned long function)
{
	static_call_update(set_intercept_for_msr,
			   (typeof(&svm_set_intercept_for_msr))function);
}

void exitpolicy_use_switch_to_sw_timer(unsigned long function)
{
	static_call_update(switch_to_sw_timer,
			   (typeof(&kvm_lapic_switch_to_sw_timer))function);
}

void exitpolicy_set_intercept_for_msr(struct kvm_vcpu *vcpu, u32 msr,
				      bool intercept)
{
	static_call_cond(set_intercept_for_msr)(vcpu, msr, MSR_TYPE_R, intercept);
}

void exitpolicy_switch_to_sw_timer(struct kvm_vcpu *vcpu)
{
	static_call_cond(switch_to_sw_timer)(vcpu);
}

bool exitpolicy_cpu_has_idle_hlt(void)
{
	return cpu_feature_enabled(X86_FEATURE_IDLE_HLT);
}

bool exitpolicy_on_hyperv(void)
{
	return hypervisor_is_type(X86_HYPER_MS_HYPERV);
}

int exitpolicy_stop_machine(int (*fn)(void *data), void *data)
{
	return stop_machine(fn, data, NULL);
}

const struct exitpolicy_layout exitpolicy_layout = {
	.kvm_size = sizeof(struct kvm),
	.kvm_mm = offsetof(struct kvm, mm),
	.kvm_created_vcpus = offsetof(struct kvm, created_vcpus),
	.kvm_online_vcpus = offsetof(struct kvm, online_vcpus),
	.kvm_disabled_exits = offsetof(struct kvm, arch.disabled_exits),
	.kvm_has_protected_state = offsetof(struct kvm, arch.has_protected_state),
	.kvm_vm_type = offsetof(struct kvm, arch.vm_type),
	.kvm_vcpu_kvm = offsetof(struct kvm_vcpu, kvm),
	.kvm_vcpu_id = offsetof(struct kvm_vcpu, vcpu_id),
	.kvm_vcpu_idx = offsetof(struct kvm_vcpu, vcpu_idx),
	.kvm_vcpu_apic = offsetof(struct kvm_vcpu, arch.apic),
	.kvm_vcpu_cpuid_entries = offsetof(struct kvm_vcpu, arch.cpuid_entries),
	.kvm_vcpu_cpuid_nent = offsetof(struct kvm_vcpu, arch.cpuid_nent),
	.kvm_vcpu_pv_cpuid = offsetof(struct kvm_vcpu, arch.pv_cpuid.features),
	.kvm_vcpu_last_vmentry_cpu =
		offsetof(struct kvm_vcpu, arch.last_vmentry_cpu),
	.vcpu_svm_vcpu = offsetof(struct vcpu_svm, vcpu),
	.vcpu_svm_vmcb01 = offsetof(struct vcpu_svm, vmcb01.ptr),
	.vmcb_intercepts = offsetof(struct vmcb, control.intercepts),
	.vmcb_pause_filter_thresh =
		offsetof(struct vmcb, control.pause_filter_thresh),
	.vmcb_pause_filter_count =
		offsetof(struct vmcb, control.pause_filter_count),
	.vcpu_vmx_vcpu = offsetof(struct vcpu_vmx, vcpu),
	.vcpu_vmx_vmcs01 = offsetof(struct vcpu_vmx, vmcs01),
	.vcpu_vmx_loaded_vmcs = offsetof(struct vcpu_vmx, loaded_vmcs),
	.vcpu_vmx_ple_window = offsetof(struct vcpu_vmx, ple_window),
	.vcpu_vmx_ple_window_dirty = offsetof(struct vcpu_vmx, ple_window_dirty),
	.loaded_vmcs_exec = offsetof(struct loaded_vmcs, controls_shadow.exec),
	.loaded_vmcs_secondary_exec =
		offsetof(struct loaded_vmcs, controls_shadow.secondary_exec),
	.fprobe_size = sizeof(struct fprobe),
	.fprobe_entry_handler = offsetof(struct fprobe, entry_handler),
};

void exitpolicy_trace_decision(const struct exitpolicy_decision *decision)
{
	trace_exitpolicy_decision(decision);
}
