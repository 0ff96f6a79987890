#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# A policy for VMs that share physical CPUs: nobody keeps a CPU without use.
#
#	shared.sh [CGROUP]
#
# KVM intercepts everything already, unless a VMM asks it not to with
# KVM_CAP_X86_DISABLE_EXITS (QEMU: -overcommit cpu-pm=on). A VMM that does so
# where CPUs are shared takes from its neighbours: the host sees its natively
# halted vCPUs as 100 % busy, and gives them a full share of the CPU while the
# guest idles. "allow" is what says no, to the VMM and to policies below:
#
#   hlt, mwait  When a guest idles, its CPU is for others.
#   pause       A guest that spins on a lock may wait for a vCPU that is not
#               running. Pause-loop exiting and the pause filter notice, and KVM
#               lets another vCPU run.
#   cstate,     Counters of the physical core tell a guest about its neighbours.
#   aperfmperf
#
# What it costs: nothing where no VMM asks. One that asked is told that it got
# what it wanted; "exitpolicy vm list" shows what was taken away as "clamped".
# Where KVM itself disables PAUSE exits (the floor), that stays.
set -eu

cgroup=${1:-/machine.slice}

# 5: done, but some vCPUs of VMs that run are still on their way.
exitpolicy policy set "$cgroup" --disable none --allow none || [ $? -eq 5 ]
exitpolicy policy show --effective "$cgroup"

# "allow" holds for the whole subtree. For a slice of pinned VMs inside a slice
# of shared ones, allow above what is to be given below:
#
#	exitpolicy policy set /machine.slice --disable none --allow hlt,pause
#	exitpolicy policy set /machine.slice/machine-pinned.slice --disable hlt,pause
#
# or, stricter, give the pinned VMs a slice that is not below the shared one.
