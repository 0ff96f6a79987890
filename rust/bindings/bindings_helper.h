/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen reads.  <linux/ftrace_regs.h> does not stand on its own and
 * comes with <linux/fprobe.h>.
 */
#include <linux/fprobe.h>

#include <linux/exitpolicy.h>
#include <linux/kvm_host.h>
#include <linux/kvm_para.h>

/* KVM's private headers: arch/x86/kvm. */
#include "svm/svm.h"
#include "vmx/vmx.h"

#include "shim.h"

/* bindgen does not evaluate macros with casts or parameters. */
const __u32 CONST_GET_INFO = EXITPOLICY_GET_INFO;
const __u32 CONST_SET_ENABLED = EXITPOLICY_SET_ENABLED;
const __u32 CONST_SET_POLICY = EXITPOLICY_SET_POLICY;
const __u32 CONST_GET_POLICY = EXITPOLICY_GET_POLICY;
const __u32 CONST_CLEAR_POLICY = EXITPOLICY_CLEAR_POLICY;
const __u32 CONST_NEXT_POLICY = EXITPOLICY_NEXT_POLICY;
const __u32 CONST_RESOLVE_POLICY = EXITPOLICY_RESOLVE_POLICY;
const __u32 CONST_NEXT_VM = EXITPOLICY_NEXT_VM;
const __u32 CONST_GET_VM = EXITPOLICY_GET_VM;
const __u32 CONST_SET_VM = EXITPOLICY_SET_VM;
const __u32 CONST_RESET_VM = EXITPOLICY_RESET_VM;
const __u32 CONST_NEXT_VCPU = EXITPOLICY_NEXT_VCPU;
const __u32 CONST_GET_VCPU = EXITPOLICY_GET_VCPU;

const __u32 CONST_CPU_BASED_HLT_EXITING = CPU_BASED_HLT_EXITING;
const __u32 CONST_CPU_BASED_MWAIT_EXITING = CPU_BASED_MWAIT_EXITING;
const __u32 CONST_CPU_BASED_MONITOR_EXITING = CPU_BASED_MONITOR_EXITING;
const __u32 CONST_SECONDARY_EXEC_PAUSE_LOOP_EXITING =
	SECONDARY_EXEC_PAUSE_LOOP_EXITING;

const __u32 CONST_KVM_CREATE_VM = KVM_CREATE_VM;
const __u32 CONST_KVM_CREATE_VCPU = KVM_CREATE_VCPU;
const __u32 CONST_KVM_CHECK_EXTENSION = KVM_CHECK_EXTENSION;
