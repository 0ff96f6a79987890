/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM exitpolicy

#if !defined(EXITPOLICY_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define EXITPOLICY_TRACE_H

#include <linux/kvm.h>
#include <linux/tracepoint.h>

#include "shim.h"

#define exitpolicy_exits						\
	{ KVM_X86_DISABLE_EXITS_MWAIT,		"mwait" },		\
	{ KVM_X86_DISABLE_EXITS_HLT,		"hlt" },		\
	{ KVM_X86_DISABLE_EXITS_PAUSE,		"pause" },		\
	{ KVM_X86_DISABLE_EXITS_CSTATE,		"cstate" },		\
	{ KVM_X86_DISABLE_EXITS_APERFMPERF,	"aperfmperf" }

#define exitpolicy_show(set) \
	((set) ? __print_flags(set, ",", exitpolicy_exits) : "none")

/*
 * One for each decision.  The first is made in the VMM's thread that creates the
 * first vCPU, and once more if that vCPU could not be created; later ones in the
 * thread of who changes a policy or the VM, or in a worker if its VMM was moved.
 */
TRACE_EVENT(exitpolicy_decision,
	TP_PROTO(const struct exitpolicy_decision *decision),
	TP_ARGS(decision),

	TP_STRUCT__entry(
		__field(u64, vm)
		__field(u64, cgroup)
		__field(u32, pid)
		__field(u64, floor)
		__field(u64, requested)
		__field(u64, effective)
		__field(u64, clamped)
	),

	TP_fast_assign(
		__entry->vm = decision->vm;
		__entry->cgroup = decision->cgroup;
		__entry->pid = decision->pid;
		__entry->floor = decision->floor;
		__entry->requested = decision->requested;
		__entry->effective = decision->effective;
		__entry->clamped = decision->clamped;
	),

	TP_printk("vm=%llu cgroup=%llu pid=%u floor=%s requested=%s effective=%s clamped=%s",
		  __entry->vm, __entry->cgroup, __entry->pid,
		  exitpolicy_show(__entry->floor),
		  exitpolicy_show(__entry->requested),
		  exitpolicy_show(__entry->effective),
		  exitpolicy_show(__entry->clamped))
);

#endif /* EXITPOLICY_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
