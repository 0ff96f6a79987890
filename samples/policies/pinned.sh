#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# A policy for VMs whose vCPUs have physical CPUs of their own: latency first.
#
#	pinned.sh [CGROUP]
#
# What it gives:
#
#   hlt    A guest that has nothing to do halts on its CPU. An interrupt wakes it
#          there; KVM and the host's scheduler have no part in it.
#   pause  A guest that spins is not interrupted. KVM's pause-loop exiting and
#          pause filter look for another vCPU to run instead, and here there is
#          none that wants this CPU.
#
# What it costs:
#
#   The host sees a natively halted vCPU as 100 % busy, because its thread does
#   not sleep. Whatever else wants that CPU waits for the end of a time slice;
#   top, the load and the CPU time that is accounted to the cgroup say nothing of
#   what the guest does; "cpu.max" throttles a guest that idles; the host's own
#   idle states are not entered, and HLT gives C1 only.
#
# So: one vCPU to a CPU, nothing else there, and no "cpu.max".
#
# What it leaves out:
#
#   mwait       Only for guests whose VMM exposes MWAIT. On Intel it takes the VMX
#               preemption timer away from every VM that gets it.
#   cstate,     Only for guests whose VMM exposes them, and that want to see what
#   aperfmperf  their physical core does.
set -eu

cgroup=${1:-/machine.slice/machine-pinned.slice}

# Guests that are not to be trusted with whole cores: see "smt" in what doctor says.
exitpolicy doctor >&2 || exit 1
# 5: done, but some vCPUs of VMs that run are still on their way.
exitpolicy policy set "$cgroup" --disable hlt,pause || [ $? -eq 5 ]
exitpolicy policy show --effective "$cgroup"
