// SPDX-License-Identifier: GPL-2.0

//! What the guests do: 64-bit code that executes one kind of instruction a number of times.
//!
//! The code is assembled into this program and copied into the guest. It finds its [`Params`] at
//! the address in R15, which nothing here ever changes, and ends with a write to [`DONE_PORT`].
//!
//! Between two executions a guest may have to wait at a gate ([`Params::until`]) until the next one
//! is allowed. It spins there without an exit of its own making, so what happens between two
//! looks at [`Params::executed`] while the guest stands there can be told exactly.

use std::{
    mem::offset_of,
    slice, //
};

use exitpolicy_policy::Exits;
use serde::{
    Deserialize,
    Serialize, //
};

/// The port that the guest writes to when it is done.
pub const DONE_PORT: u16 = 0xf4;
/// What it writes there in the end.
pub const DONE: u8 = 0;
/// What it writes there when it was begun by INIT and SIPI.
pub const DONE_BY_SIPI: u8 = 1;
/// The interrupt that ends a HLT or MWAIT.
pub const TIMER_VECTOR: usize = 0x40;
/// What vCPUs of [`Payload::Wakeups`] send each other.
pub const IPI_VECTOR: usize = 0x41;
/// The timer in TSC deadline mode.
pub const DEADLINE_VECTOR: usize = 0x42;
/// The timer of a vCPU that has a lock, or waits for it.
pub const BACKSTOP_VECTOR: usize = 0x43;
/// An exception that only a VMM brings about.
pub const DE_VECTOR: usize = 0;
pub const NMI_VECTOR: usize = 2;
/// RDMSR of something that the CPU or KVM does not have.
pub const GP_VECTOR: usize = 13;
/// MONITOR or MWAIT where the CPU or KVM does not have it.
pub const UD_VECTOR: usize = 6;

/// Which instruction the guest executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum Payload {
    /// MONITOR and MWAIT, ended by the LAPIC's timer.
    Mwait = 0,
    /// HLT, ended by the LAPIC's timer, or, with 0 ticks, by what others send.
    Hlt = 1,
    /// PAUSE in a tight loop.
    Pause = 2,
    /// RDMSR of the four residency counters that KVM can pass through, in turn.
    Cstate = 3,
    /// RDMSR of APERF and MPERF, in turn.
    Aperfmperf = 4,
    /// Nothing: the guest only tells what CPUID it sees.
    Nothing = 5,
    /// A loop without exits, ended by the LAPIC's timer.
    Timer = 6,
    /// A write of [`Params::icr`] to the LAPIC's interrupt command register.
    Ipi = 7,
    /// A sleep for each of what can end one: an IPI, the LAPIC's timer, and the same in TSC
    /// deadline mode. vCPUs pass a token around in a ring, by the IPI: only who has it arms a timer
    /// or sends an IPI. So there is one interrupt at a time that can end the sleep of a vCPU.
    ///
    /// If they were told of PV_UNHALT all of them want the same spin lock before that, [`SECTIONS`]
    /// times. As in Linux, who waits for it halts until it is kicked.
    Wakeups = 8,
    /// HLT in a guest of the guest, which does not intercept it ([`crate::nested`]).
    L2Hlt = 9,
    /// HLT in a guest of the guest, which intercepts it, and halts itself.
    L2HltIntercepted = 10,
    /// RDMSR of APERF in a guest of the guest, which does not intercept it.
    L2Aperf = 11,
}

impl Payload {
    /// One for each exit, in the order of [`Exits::NAMES`].
    pub const EXITS: [Self; 5] = [
        Self::Mwait,
        Self::Hlt,
        Self::Pause,
        Self::Cstate,
        Self::Aperfmperf,
    ];

    /// The exit that KVM can disable and this payload provokes.
    pub fn exit(self) -> Exits {
        match self {
            Self::Mwait => Exits::MWAIT,
            Self::Hlt => Exits::HLT,
            Self::Pause => Exits::PAUSE,
            Self::Cstate => Exits::CSTATE,
            Self::Aperfmperf => Exits::APERFMPERF,
            Self::Nothing | Self::Timer | Self::Ipi | Self::Wakeups => Exits::NONE,
            Self::L2Hlt | Self::L2HltIntercepted | Self::L2Aperf => Exits::NONE,
        }
    }
}

/// How often a vCPU has the lock in one execution of [`Payload::Wakeups`].
pub const SECTIONS: u32 = 2;

/// CPUID leaf 1 ECX: the LAPIC's timer has a TSC deadline mode.
pub const CPUID1_ECX_TSC_DEADLINE: u32 = 1 << 24;
/// KVM_CPUID_FEATURES EAX: KVM_FEATURE_PV_UNHALT.
pub const KVM_FEATURE_PV_UNHALT: u32 = 1 << 7;

/// What the guest is told, and what it tells. One page of the guest, its stack at the end.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Params {
    pub payload: u32,
    /// How many executions.
    pub count: u32,
    /// Timer ticks until a HLT or MWAIT ends.
    pub ticks: u32,
    /// Executions so far.
    pub executed: u32,
    /// #GP so far.
    pub gp: u32,
    /// #UD so far.
    pub ud: u32,
    /// Timer interrupts so far.
    pub interrupts: u32,
    /// EAX of KVM_CPUID_FEATURES.
    pub kvm_features: u32,
    /// ECX of CPUID leaf 1.
    pub cpuid1_ecx: u32,
    /// ECX of CPUID leaf 6.
    pub cpuid6_ecx: u32,
    /// Set by the VMM to end the run between two executions, where the LAPIC owes nothing.
    pub stop: u32,
    /// How many executions the guest may end, for now.
    pub until: u32,
    /// Executions that have begun, the one that did not end yet included.
    pub begun: u32,
    /// NMIs so far.
    pub nmis: u32,
    /// #DE so far.
    pub exceptions: u32,
    /// Low and high half of what [`Payload::Ipi`] and [`Payload::Wakeups`] write.
    pub icr: [u32; 2],
    /// The index of this vCPU, whose page is that many behind the first one's.
    pub index: u32,
    /// How many vCPUs there are.
    pub vcpus: u32,
    /// Whether this one has the token at first.
    pub starts: u32,
    /// Whether its LAPIC takes IPIs.
    pub ready: u32,
    /// IPIs so far.
    pub ipis: u32,
    /// Timer interrupts in TSC deadline mode so far.
    pub deadlines: u32,
    /// HLT and MWAIT so far, to sleep until one of these or [`Params::interrupts`] comes.
    pub sleeps: u32,
    /// This vCPU waits for the lock, and wants to be kicked.
    pub waits: u32,
    /// HLT so far, to wait for the lock.
    pub halts: u32,
    /// Others that were kicked so far.
    pub kicks: u32,
    /// Interrupts so far of the timer that ends a HLT with or without the lock.
    pub backstops: u32,
    /// Interrupts so far that only the emulator knows of.
    pub repeated: u32,
    /// The lock. This and the next one are those of the first vCPU.
    pub lock: u32,
    /// How often a vCPU had the lock so far.
    pub sections: u32,
    /// Timer ticks until a HLT ends that waits for the lock, if nothing else ends it; 0 for never.
    pub backstop: u32,
    /// The TSC, before the timer of [`Payload::Hlt`] or [`Payload::Timer`] was armed last and when
    /// the last interrupt of [`TIMER_VECTOR`] came.
    pub armed_at: [u32; 2],
    pub fired_at: [u32; 2],
}

impl Params {
    /// How many ticks of the TSC there were from one to the other.
    pub fn timer_took(&self) -> u64 {
        let tsc = |[low, high]: [u32; 2]| u64::from(low) | (u64::from(high) << 32);
        tsc(self.fired_at).wrapping_sub(tsc(self.armed_at))
    }
}

core::arch::global_asm!(
    ".pushsection .rodata.exitpolicy_guest, \"a\"",
    ".balign 16",
    // Global: the compiler may put what uses them into another object.
    ".globl exitpolicy_guest_start",
    "exitpolicy_guest_start:",
    "cli",
    // What the guest sees of the host.
    "mov eax, 0x40000001",
    "xor ecx, ecx",
    "cpuid",
    "mov [r15 + {kvm_features}], eax",
    "mov eax, 1",
    "xor ecx, ecx",
    "cpuid",
    "mov [r15 + {cpuid1_ecx}], ecx",
    "mov eax, 6",
    "xor ecx, ecx",
    "cpuid",
    "mov [r15 + {cpuid6_ecx}], ecx",
    // The VMM has put the LAPIC into x2APIC mode.
    "xor edx, edx",
    "mov ecx, 0x80f", // spurious interrupt vector: APIC enabled
    "mov eax, 0x1ff",
    "wrmsr",
    "mov ecx, 0x83e", // timer divide configuration: by 1
    "mov eax, 0xb",
    "wrmsr",
    "mov ecx, 0x832", // timer LVT: one-shot
    "mov eax, {timer_vector}",
    "wrmsr",
    "mov ebx, [r15 + {count}]",
    "test ebx, ebx",
    "jz 9f",
    "mov eax, [r15 + {payload}]",
    "cmp eax, {mwait}",
    "je 70f",
    "cmp eax, {hlt}",
    "je 20f",
    "cmp eax, {pause}",
    "je 30f",
    "cmp eax, {cstate}",
    "je 40f",
    "cmp eax, {aperfmperf}",
    "je 50f",
    "cmp eax, {timer}",
    "je 65f",
    "cmp eax, {ipi}",
    "je 75f",
    "cmp eax, {wakeups}",
    "je 200f",
    "jmp 9f",
    // The gate.
    "80:",
    "cmp dword ptr [r15 + {stop}], 0",
    "jne 9f",
    "mov eax, [r15 + {executed}]",
    "cmp eax, [r15 + {until}]",
    "jae 80b",
    "inc dword ptr [r15 + {begun}]",
    "ret",
    "85:",
    "rdtsc",
    "mov [r15 + {armed_at}], eax",
    "mov [r15 + {armed_at} + 4], edx",
    "ret",
    // STI keeps interrupts off for one more instruction, so the timer cannot end a HLT or MWAIT
    // before it began.
    "70:",
    "call 80b",
    "mov ecx, 0x838", // timer initial count
    "mov eax, [r15 + {ticks}]",
    "xor edx, edx",
    "wrmsr",
    "lea rax, [r15 + {monitored}]",
    "xor ecx, ecx",
    "xor edx, edx",
    "monitor",
    "xor eax, eax",
    "xor ecx, ecx",
    "sti",
    "mwait",
    "cli",
    "inc dword ptr [r15 + {executed}]",
    "dec ebx",
    "jnz 70b",
    "jmp 9f",
    "20:",
    "call 80b",
    "call 85b",
    "mov ecx, 0x838",
    "mov eax, [r15 + {ticks}]",
    "xor edx, edx",
    "wrmsr",
    "sti",
    "hlt",
    "cli",
    "inc dword ptr [r15 + {executed}]",
    "dec ebx",
    "jnz 20b",
    "jmp 9f",
    "30:",
    "call 80b",
    "pause",
    "inc dword ptr [r15 + {executed}]",
    "dec ebx",
    "jnz 30b",
    "jmp 9f",
    "40:",
    "mov ecx, 0x660",
    "call 60f",
    "mov ecx, 0x3fc",
    "call 60f",
    "mov ecx, 0x3fd",
    "call 60f",
    "mov ecx, 0x3fe",
    "call 60f",
    "jmp 40b",
    "50:",
    "mov ecx, 0xe8",
    "call 60f",
    "mov ecx, 0xe7",
    "call 60f",
    "jmp 50b",
    // One RDMSR; the last one does not return.
    "60:",
    "call 80b",
    "rdmsr",
    "inc dword ptr [r15 + {executed}]",
    "dec ebx",
    "jz 9f",
    "ret",
    "65:",
    "call 80b",
    "mov esi, [r15 + {interrupts}]",
    "call 85b",
    "mov ecx, 0x838",
    "mov eax, [r15 + {ticks}]",
    "xor edx, edx",
    "wrmsr",
    "sti",
    "66:",
    "cmp esi, [r15 + {interrupts}]",
    "je 66b",
    "cli",
    "inc dword ptr [r15 + {executed}]",
    "dec ebx",
    "jnz 65b",
    "jmp 9f",
    "75:",
    "call 80b",
    "mov ecx, 0x830",
    "mov eax, [r15 + {icr}]",
    "mov edx, [r15 + {icr} + 4]",
    "wrmsr",
    "inc dword ptr [r15 + {executed}]",
    "dec ebx",
    "jnz 75b",
    "jmp 9f",
    "200:",
    "mov eax, [r15 + {index}]",
    "shl rax, 12",
    "mov r14, r15",
    "sub r14, rax", // the first vCPU's page
    "inc dword ptr [r15 + {ready}]",
    "202:",
    "call 80b",
    "test dword ptr [r15 + {kvm_features}], {pv_unhalt}",
    "jz 206f",
    "mov r13d, {sections_each}",
    "203:",
    "call 220f",
    "dec r13d",
    "jnz 203b",
    // A late timer of the lock's shall not end another sleep.
    "sti",
    "nop",
    "cli",
    "206:",
    "pause",
    "mov ecx, 0x3fc",
    "rdmsr",
    "mov ecx, 0xe8",
    "rdmsr",
    "cmp dword ptr [r15 + {starts}], 0",
    "jne 204f",
    "call 240f",
    "204:",
    "call 250f",
    "mov ecx, 0x830",
    "mov eax, [r15 + {icr}]",
    "mov edx, [r15 + {icr} + 4]",
    "wrmsr",
    "cmp dword ptr [r15 + {starts}], 0",
    "je 205f",
    "call 240f",
    "205:",
    "inc dword ptr [r15 + {executed}]",
    "dec ebx",
    "jnz 202b",
    "jmp 9f",
    // Takes the lock, counts, and gives it back.
    "220:",
    "mov eax, 1",
    "xchg [r14 + {lock}], eax",
    "test eax, eax",
    "jz 222f",
    "call 230f",
    "jmp 220b",
    "222:",
    "mov edi, [r14 + {sections}]",
    // Sleeps meanwhile, so that others want it.
    "mov esi, [r15 + {ticks}]",
    "call 260f",
    "sti",
    "hlt",
    "cli",
    "xor esi, esi",
    "call 260f",
    "inc edi",
    "mov [r14 + {sections}], edi",
    "xor eax, eax",
    "xchg [r14 + {lock}], eax",
    // Kicks the next one that waits.
    "mov ecx, [r15 + {index}]",
    "224:",
    "inc ecx",
    "cmp ecx, [r15 + {vcpus}]",
    "jb 225f",
    "xor ecx, ecx",
    "225:",
    "cmp ecx, [r15 + {index}]",
    "je 228f",
    "mov eax, ecx",
    "shl rax, 12",
    "cmp dword ptr [r14 + rax + {waits}], 0",
    "je 224b",
    "inc dword ptr [r15 + {kicks}]",
    "push rbx",
    "mov eax, 5", // KVM_HC_KICK_CPU
    "xor ebx, ebx",
    "vmcall", // on SVM, KVM makes a VMMCALL of it
    "pop rbx",
    "228:",
    "ret",
    // Halts until it is kicked, with interrupts off and on in turn. There may be a timer, too: see
    // the test.
    "230:",
    "mov esi, [r15 + {backstop}]",
    "call 260f",
    "mov eax, 1",
    "xchg [r15 + {waits}], eax",
    "cmp dword ptr [r14 + {lock}], 0",
    "je 234f",
    "inc dword ptr [r15 + {halts}]",
    "test dword ptr [r15 + {halts}], 1",
    "jz 232f",
    "sti",
    "232:",
    "hlt",
    "cli",
    "234:",
    "mov dword ptr [r15 + {waits}], 0",
    "xor esi, esi",
    // Arms the lock's timer, with ESI ns.
    "260:",
    "mov ecx, 0x832",
    "mov eax, {backstop_vector}",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0x838",
    "mov eax, esi",
    "wrmsr",
    "ret",
    // Sleeps until the token comes.
    "240:",
    "lea rdi, [r15 + {ipis}]",
    // Sleeps until there were as many of what RDI points to as rounds, by HLT and MWAIT in turn.
    "242:",
    "mov eax, [rdi]",
    "cmp eax, [r15 + {begun}]",
    "jae 246f",
    "inc dword ptr [r15 + {sleeps}]",
    "test dword ptr [r15 + {sleeps}], 1",
    "jz 244f",
    "lea rax, [r15 + {monitored}]",
    "xor ecx, ecx",
    "xor edx, edx",
    "monitor",
    "xor eax, eax",
    "xor ecx, ecx",
    "sti",
    "mwait",
    "cli",
    "jmp 242b",
    "244:",
    "sti",
    "hlt",
    "cli",
    "jmp 242b",
    "246:",
    "ret",
    // Sleeps on the timer, in one-shot and in TSC deadline mode.
    "250:",
    "mov ecx, 0x832",
    "mov eax, {timer_vector}",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0x838",
    "mov eax, [r15 + {ticks}]",
    "wrmsr",
    "lea rdi, [r15 + {interrupts}]",
    "call 242b",
    "test dword ptr [r15 + {cpuid1_ecx}], {tsc_deadline}",
    "jz 246b",
    "mov ecx, 0x832",
    "mov eax, {deadline_lvt}",
    "xor edx, edx",
    "wrmsr",
    "rdtsc",
    "add eax, {cycles}",
    "adc edx, 0",
    "mov ecx, 0x6e0",
    "wrmsr",
    "lea rdi, [r15 + {deadlines}]",
    "jmp 242b",
    "9:",
    "mov dx, {done_port}",
    "mov eax, {done}",
    "out dx, al",
    "jmp 9b",
    ".globl exitpolicy_guest_timer",
    "exitpolicy_guest_timer:",
    "push rax",
    "push rdx",
    "rdtsc",
    "mov [r15 + {fired_at}], eax",
    "mov [r15 + {fired_at} + 4], edx",
    "pop rdx",
    "pop rax",
    "push rcx",
    "lea rcx, [r15 + {interrupts}]",
    // Counts, unless this interrupts the same handler, with interrupts off: QEMU may deliver what
    // KVM injected once more when it looks at its own clock before the guest exits.
    "2:",
    "push rax",
    "push rdx",
    "lea rax, [rip + exitpolicy_guest_timer]",
    "cmp [rsp + 24], rax",
    "jb 5f",
    "lea rax, [rip + exitpolicy_guest_end]",
    "cmp [rsp + 24], rax",
    "jb 3f",
    "5:",
    "inc dword ptr [rcx]",
    "mov ecx, 0x80b", // EOI
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "jmp 4f",
    "3:",
    "inc dword ptr [r15 + {repeated}]",
    "4:",
    "pop rdx",
    "pop rax",
    "pop rcx",
    "iretq",
    ".globl exitpolicy_guest_ipi",
    "exitpolicy_guest_ipi:",
    "push rcx",
    "lea rcx, [r15 + {ipis}]",
    "jmp 2b",
    ".globl exitpolicy_guest_deadline",
    "exitpolicy_guest_deadline:",
    "push rcx",
    "lea rcx, [r15 + {deadlines}]",
    "jmp 2b",
    ".globl exitpolicy_guest_backstop",
    "exitpolicy_guest_backstop:",
    "push rcx",
    "lea rcx, [r15 + {backstops}]",
    "jmp 2b",
    ".globl exitpolicy_guest_gp",
    "exitpolicy_guest_gp:",
    "inc dword ptr [r15 + {gp}]",
    "add qword ptr [rsp + 8], 2", // past RDMSR
    "add rsp, 8",                 // the error code
    "iretq",
    ".globl exitpolicy_guest_ud",
    "exitpolicy_guest_ud:",
    "inc dword ptr [r15 + {ud}]",
    "add qword ptr [rsp], 3", // past MONITOR or MWAIT
    "iretq",
    ".globl exitpolicy_guest_nmi",
    "exitpolicy_guest_nmi:",
    "inc dword ptr [r15 + {nmis}]",
    "iretq",
    ".globl exitpolicy_guest_de",
    "exitpolicy_guest_de:",
    "inc dword ptr [r15 + {exceptions}]",
    "iretq",
    // Where a vCPU begins after SIPI, in real mode, so in bytes that mean the same there.
    ".globl exitpolicy_guest_sipi",
    "exitpolicy_guest_sipi:",
    "mov al, {done_by_sipi}",
    "out {done_port}, al",
    "2:",
    "jmp 2b",
    ".globl exitpolicy_guest_end",
    "exitpolicy_guest_end:",
    ".popsection",
    payload = const offset_of!(Params, payload),
    count = const offset_of!(Params, count),
    ticks = const offset_of!(Params, ticks),
    executed = const offset_of!(Params, executed),
    gp = const offset_of!(Params, gp),
    ud = const offset_of!(Params, ud),
    interrupts = const offset_of!(Params, interrupts),
    kvm_features = const offset_of!(Params, kvm_features),
    cpuid1_ecx = const offset_of!(Params, cpuid1_ecx),
    cpuid6_ecx = const offset_of!(Params, cpuid6_ecx),
    stop = const offset_of!(Params, stop),
    until = const offset_of!(Params, until),
    begun = const offset_of!(Params, begun),
    nmis = const offset_of!(Params, nmis),
    exceptions = const offset_of!(Params, exceptions),
    icr = const offset_of!(Params, icr),
    index = const offset_of!(Params, index),
    vcpus = const offset_of!(Params, vcpus),
    starts = const offset_of!(Params, starts),
    ready = const offset_of!(Params, ready),
    ipis = const offset_of!(Params, ipis),
    deadlines = const offset_of!(Params, deadlines),
    sleeps = const offset_of!(Params, sleeps),
    waits = const offset_of!(Params, waits),
    halts = const offset_of!(Params, halts),
    kicks = const offset_of!(Params, kicks),
    backstops = const offset_of!(Params, backstops),
    repeated = const offset_of!(Params, repeated),
    lock = const offset_of!(Params, lock),
    sections = const offset_of!(Params, sections),
    backstop = const offset_of!(Params, backstop),
    armed_at = const offset_of!(Params, armed_at),
    fired_at = const offset_of!(Params, fired_at),
    // A cache line of its own, so that nothing but an interrupt ends the MWAIT.
    monitored = const 0x400,
    mwait = const Payload::Mwait as u32,
    hlt = const Payload::Hlt as u32,
    pause = const Payload::Pause as u32,
    cstate = const Payload::Cstate as u32,
    aperfmperf = const Payload::Aperfmperf as u32,
    timer = const Payload::Timer as u32,
    ipi = const Payload::Ipi as u32,
    wakeups = const Payload::Wakeups as u32,
    timer_vector = const TIMER_VECTOR,
    backstop_vector = const BACKSTOP_VECTOR,
    // Bits 18:17 of the LVT: TSC deadline mode.
    deadline_lvt = const 0x40000 | DEADLINE_VECTOR,
    // Some 10 us on a real CPU, and 400 us in Bochs.
    cycles = const 20_000,
    sections_each = const SECTIONS,
    tsc_deadline = const CPUID1_ECX_TSC_DEADLINE,
    pv_unhalt = const KVM_FEATURE_PV_UNHALT,
    done_port = const DONE_PORT,
    done = const DONE,
    done_by_sipi = const DONE_BY_SIPI,
);

extern "C" {
    static exitpolicy_guest_start: u8;
    static exitpolicy_guest_timer: u8;
    static exitpolicy_guest_ipi: u8;
    static exitpolicy_guest_deadline: u8;
    static exitpolicy_guest_backstop: u8;
    static exitpolicy_guest_gp: u8;
    static exitpolicy_guest_ud: u8;
    static exitpolicy_guest_nmi: u8;
    static exitpolicy_guest_de: u8;
    static exitpolicy_guest_sipi: u8;
    static exitpolicy_guest_end: u8;
}

/// The guest's code, and where in it the interrupt handlers begin.
pub struct Code {
    pub bytes: &'static [u8],
    /// Vector, and offset of its handler in `bytes`.
    pub handlers: [(usize, usize); 8],
    /// What a vCPU executes after SIPI.
    pub sipi: &'static [u8],
}

/// The code that every guest runs.
pub fn code() -> Code {
    let start = &raw const exitpolicy_guest_start;
    let offset = |label: *const u8| label.addr() - start.addr();
    let length = offset(&raw const exitpolicy_guest_end);
    // SAFETY: The labels stand in this order around one piece of read-only data of this program,
    // assembled above.
    let bytes = unsafe { slice::from_raw_parts(start, length) };
    Code {
        bytes,
        sipi: &bytes[offset(&raw const exitpolicy_guest_sipi)..],
        handlers: [
            (TIMER_VECTOR, offset(&raw const exitpolicy_guest_timer)),
            (IPI_VECTOR, offset(&raw const exitpolicy_guest_ipi)),
            (
                DEADLINE_VECTOR,
                offset(&raw const exitpolicy_guest_deadline),
            ),
            (
                BACKSTOP_VECTOR,
                offset(&raw const exitpolicy_guest_backstop),
            ),
            (GP_VECTOR, offset(&raw const exitpolicy_guest_gp)),
            (UD_VECTOR, offset(&raw const exitpolicy_guest_ud)),
            (NMI_VECTOR, offset(&raw const exitpolicy_guest_nmi)),
            (DE_VECTOR, offset(&raw const exitpolicy_guest_de)),
        ],
    }
}
