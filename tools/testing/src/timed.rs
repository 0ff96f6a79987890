// SPDX-License-Identifier: GPL-2.0

//! Guests that measure, by their TSC, what an operation costs them.
//!
//! As in [`crate::payload`], the code is copied into the guest, R15 has the vCPU's page, and it ends
//! with a write to the port. Its own words are in that page at [`WORDS`]. What it measured goes to
//! [`SAMPLES`], one u64 for each operation: the difference of two TSC reads, with LFENCE before
//! each. Nothing else than the operation is between the two, but for the some four instructions
//! that remember the first one.
//!
//! Where two vCPUs work together each sees the other one's page. They never wait for a time.

use std::{
    mem::offset_of,
    slice, //
};

use serde::{
    Deserialize,
    Serialize, //
};

use crate::payload::{
    Params,
    DONE,
    DONE_PORT, //
};

/// What a vCPU of this kind is woken by.
pub const VECTOR: usize = 0x50;
/// Where the code is in the guest's memory.
pub const CODE: usize = 0x18_0000;
/// Where the values of the first vCPU are in the guest's memory.
pub const SAMPLES: usize = 0x19_0000;
/// How many bytes each vCPU has there.
pub const SAMPLES_SIZE: usize = 0x1_0000;
/// How many vCPUs can measure, or have a part in it.
pub const VCPUS: usize = 2;
/// How many operations fit.
pub const MOST: u32 = (SAMPLES_SIZE / size_of::<u64>()) as u32;
/// Where [`Words`] are in the vCPU's page.
pub const WORDS: usize = 0x800;
/// Where, in the page of who waits for it, the word is that others store to; a line of its own.
const STORED: usize = 0x400;

/// What is measured, or what a second vCPU does for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u32)]
pub enum Operation {
    /// Nothing: what the measuring itself takes.
    Nothing = 0,
    /// CPUID, which always exits.
    Cpuid = 1,
    /// RDMSR of [`Work::msr`]. If it faults, the handler is part of it.
    Rdmsr = 2,
    /// An IPI to the vCPU itself, until its handler has returned.
    SelfIpi = 3,
    /// From a TSC deadline to the first instruction of the handler, which ends a HLT.
    Timer = 4,
    /// An IPI to the other vCPU and one back, both vCPUs in HLT meanwhile; until the handler has
    /// returned.
    PingHlt = 5,
    /// What the other one does.
    PongHlt = 6,
    /// The same with both spinning meanwhile.
    PingSpin = 7,
    PongSpin = 8,
    /// From the write of an IPI to the first instruction of the other vCPU's handler. The other one
    /// has been waiting for [`Work::gap_us`] then.
    SendIpi = 9,
    /// From a store to the first instruction of the other vCPU that knows of it, likewise.
    SendStore = 10,
    /// What the other one does: waits for an IPI in HLT, ...
    WaitHlt = 11,
    /// ... for a store in a loop of MONITOR and MWAIT, ...
    WaitMwait = 12,
    /// ... or of PAUSE, as who wants a spin lock that another one has.
    WaitPause = 13,
}

/// What a vCPU measures.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Work {
    pub operation: Operation,
    /// How often; [`MOST`] at most.
    pub count: u32,
    /// How long the other one waits, or the deadline is away, in µs of the TSC.
    pub gap_us: u32,
    /// For [`Operation::Rdmsr`].
    pub msr: u32,
}

impl Work {
    /// `count` times, with a gap that is longer than KVM polls for a vCPU to be woken
    /// (halt_poll_ns: 200 µs), so that it really sleeps.
    pub fn new(operation: Operation, count: u32) -> Self {
        Self {
            operation,
            count,
            gap_us: 400,
            msr: 0,
        }
    }
}

/// What the guest is told, and tells.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Words {
    pub operation: u32,
    pub count: u32,
    /// In ticks of the TSC.
    pub gap: u32,
    pub msr: u32,
    /// Addresses of the values, and of the other vCPU's page.
    pub samples: u64,
    pub peer: u64,
    /// The other vCPU's APIC id.
    pub peer_id: u32,
    /// Interrupts so far.
    pub taken: u32,
    /// The TSC when this vCPU was woken last.
    pub woken: u64,
    /// Rounds that it has begun to wait for, and that it has seen.
    pub ready: u32,
    pub seen: u32,
}

core::arch::global_asm!(
    // The TSC in RAX.
    ".macro exitpolicy_tsc",
    "lfence",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    ".endm",
    ".pushsection .rodata.exitpolicy_timed, \"a\"",
    ".balign 16",
    ".globl exitpolicy_timed_start",
    "exitpolicy_timed_start:",
    "cli",
    "xor edx, edx",
    "mov ecx, 0x80f", // spurious interrupt vector: APIC enabled
    "mov eax, 0x1ff",
    "wrmsr",
    "mov ecx, 0x832", // timer LVT: TSC deadline
    "mov eax, {lvt}",
    "wrmsr",
    "mov r12, [r15 + {samples}]",
    "mov r13d, [r15 + {count}]",
    "mov r14, [r15 + {peer}]",
    "xor r10d, r10d", // the round
    "mov eax, [r15 + {operation}]",
    "cmp eax, {nothing}",
    "je 12f",
    "cmp eax, {cpuid}",
    "je 15f",
    "cmp eax, {rdmsr}",
    "je 20f",
    "cmp eax, {self_ipi}",
    "je 25f",
    "cmp eax, {timer}",
    "je 30f",
    "cmp eax, {ping_hlt}",
    "je 40f",
    "cmp eax, {pong_hlt}",
    "je 45f",
    "cmp eax, {ping_spin}",
    "je 50f",
    "cmp eax, {pong_spin}",
    "je 55f",
    "cmp eax, {wait_hlt}",
    "jae 70f",
    "jmp 60f",
    // One more value, in RAX. The zero flag says whether it is the last one.
    "80:",
    "mov [r12], rax",
    "add r12, 8",
    "82:",
    "inc dword ptr [r15 + {executed}]",
    "dec r13d",
    "ret",
    // Halts until there were as many interrupts as rounds.
    "85:",
    "cmp [r15 + {taken}], r10d",
    "jae 86f",
    "sti",
    "hlt",
    "cli",
    "jmp 85b",
    "86:",
    "ret",
    // An IPI to the other one.
    "88:",
    "mov ecx, 0x830",
    "mov eax, {vector}",
    "mov edx, [r15 + {peer_id}]",
    "wrmsr",
    "ret",
    "12:",
    "exitpolicy_tsc",
    "mov r8, rax",
    "exitpolicy_tsc",
    "sub rax, r8",
    "call 80b",
    "jnz 12b",
    "jmp 9f",
    "15:",
    "exitpolicy_tsc",
    "mov r8, rax",
    "xor eax, eax",
    "xor ecx, ecx",
    "cpuid",
    "exitpolicy_tsc",
    "sub rax, r8",
    "call 80b",
    "jnz 15b",
    "jmp 9f",
    "20:",
    "exitpolicy_tsc",
    "mov r8, rax",
    "mov ecx, [r15 + {msr}]",
    "rdmsr",
    "exitpolicy_tsc",
    "sub rax, r8",
    "call 80b",
    "jnz 20b",
    "jmp 9f",
    "25:",
    "sti",
    "26:",
    "exitpolicy_tsc",
    "mov r8, rax",
    "mov ecx, 0x830",
    "mov eax, {to_self}",
    "xor edx, edx",
    "wrmsr",
    "exitpolicy_tsc",
    "sub rax, r8",
    "call 80b",
    "jnz 26b",
    "cli",
    "jmp 9f",
    "30:",
    "inc r10d",
    "exitpolicy_tsc",
    "mov ecx, [r15 + {gap}]",
    "add rax, rcx",
    "mov r8, rax",
    "mov rdx, rax",
    "shr rdx, 32",
    "mov ecx, 0x6e0", // TSC deadline
    "wrmsr",
    "call 85b",
    "mov rax, [r15 + {woken}]",
    "sub rax, r8",
    "call 80b",
    "jnz 30b",
    "jmp 9f",
    "40:",
    "cmp dword ptr [r14 + {ready}], 0",
    "je 40b",
    "41:",
    "inc r10d",
    "exitpolicy_tsc",
    "mov r8, rax",
    "call 88b",
    "call 85b",
    "exitpolicy_tsc",
    "sub rax, r8",
    "call 80b",
    "jnz 41b",
    "jmp 9f",
    "45:",
    "inc r10d",
    "mov [r15 + {ready}], r10d",
    "call 85b",
    "call 88b",
    "call 82b",
    "jnz 45b",
    "jmp 9f",
    "50:",
    "cmp dword ptr [r14 + {ready}], 0",
    "je 50b",
    "sti",
    "51:",
    "inc r10d",
    "exitpolicy_tsc",
    "mov r8, rax",
    "call 88b",
    "52:",
    "cmp [r15 + {taken}], r10d",
    "jb 52b",
    "exitpolicy_tsc",
    "sub rax, r8",
    "call 80b",
    "jnz 51b",
    "cli",
    "jmp 9f",
    "55:",
    "sti",
    "56:",
    "inc r10d",
    "mov [r15 + {ready}], r10d",
    "57:",
    "cmp [r15 + {taken}], r10d",
    "jb 57b",
    "call 88b",
    "call 82b",
    "jnz 56b",
    "cli",
    "jmp 9f",
    // Who sends.
    "60:",
    "inc r10d",
    "61:",
    "cmp [r14 + {ready}], r10d",
    "jb 61b",
    "exitpolicy_tsc",
    "mov r9d, [r15 + {gap}]",
    "add r9, rax",
    // Never at the same point of what the other one does, whose loop may take thousands.
    "imul ecx, r10d, 977",
    "and ecx, 0x1fff",
    "add r9, rcx",
    "62:",
    "exitpolicy_tsc",
    "cmp rax, r9",
    "jb 62b",
    "cmp dword ptr [r15 + {operation}], {send_ipi}",
    "je 63f",
    "exitpolicy_tsc",
    "mov r8, rax",
    "mov [r14 + {stored}], r10d",
    "jmp 64f",
    "63:",
    "exitpolicy_tsc",
    "mov r8, rax",
    "call 88b",
    "64:",
    "cmp [r14 + {seen}], r10d",
    "jb 64b",
    "mov rax, [r14 + {woken}]",
    "sub rax, r8",
    "call 80b",
    "jnz 60b",
    "jmp 9f",
    // Who waits.
    "70:",
    "inc r10d",
    "mov [r15 + {ready}], r10d",
    "mov eax, [r15 + {operation}]",
    "cmp eax, {wait_mwait}",
    "je 71f",
    "ja 72f",
    "call 85b",
    "jmp 74f",
    "71:",
    "lea rax, [r15 + {stored}]",
    "xor ecx, ecx",
    "xor edx, edx",
    "monitor",
    "cmp [r15 + {stored}], r10d",
    "jae 73f",
    "xor eax, eax",
    "xor ecx, ecx",
    "mwait",
    "jmp 71b",
    "72:",
    "cmp [r15 + {stored}], r10d",
    "jae 73f",
    "pause",
    "jmp 72b",
    "73:",
    "exitpolicy_tsc",
    "mov [r15 + {woken}], rax",
    "74:",
    "mov [r15 + {seen}], r10d",
    "call 82b",
    "jnz 70b",
    "9:",
    "mov dx, {done_port}",
    "mov eax, {done}",
    "out dx, al",
    "jmp 9b",
    ".globl exitpolicy_timed_handler",
    "exitpolicy_timed_handler:",
    "push rax",
    "push rdx",
    "exitpolicy_tsc",
    "mov [r15 + {woken}], rax",
    "inc dword ptr [r15 + {taken}]",
    "push rcx",
    "mov ecx, 0x80b", // EOI
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "pop rcx",
    "pop rdx",
    "pop rax",
    "iretq",
    ".globl exitpolicy_timed_end",
    "exitpolicy_timed_end:",
    ".popsection",
    executed = const offset_of!(Params, executed),
    operation = const WORDS + offset_of!(Words, operation),
    count = const WORDS + offset_of!(Words, count),
    gap = const WORDS + offset_of!(Words, gap),
    msr = const WORDS + offset_of!(Words, msr),
    samples = const WORDS + offset_of!(Words, samples),
    peer = const WORDS + offset_of!(Words, peer),
    peer_id = const WORDS + offset_of!(Words, peer_id),
    taken = const WORDS + offset_of!(Words, taken),
    woken = const WORDS + offset_of!(Words, woken),
    ready = const WORDS + offset_of!(Words, ready),
    seen = const WORDS + offset_of!(Words, seen),
    stored = const STORED,
    nothing = const Operation::Nothing as u32,
    cpuid = const Operation::Cpuid as u32,
    rdmsr = const Operation::Rdmsr as u32,
    self_ipi = const Operation::SelfIpi as u32,
    timer = const Operation::Timer as u32,
    ping_hlt = const Operation::PingHlt as u32,
    pong_hlt = const Operation::PongHlt as u32,
    ping_spin = const Operation::PingSpin as u32,
    pong_spin = const Operation::PongSpin as u32,
    send_ipi = const Operation::SendIpi as u32,
    wait_hlt = const Operation::WaitHlt as u32,
    wait_mwait = const Operation::WaitMwait as u32,
    vector = const VECTOR,
    // Bits 19:18 of the interrupt command register: the sender itself.
    to_self = const 0x40000 | VECTOR,
    // Bits 18:17 of the LVT: TSC deadline mode.
    lvt = const 0x40000 | VECTOR,
    done_port = const DONE_PORT,
    done = const DONE,
);

extern "C" {
    static exitpolicy_timed_start: u8;
    static exitpolicy_timed_handler: u8;
    static exitpolicy_timed_end: u8;
}

/// The guest's code, and where in it the handler of [`VECTOR`] begins.
pub fn code() -> (&'static [u8], usize) {
    let start = &raw const exitpolicy_timed_start;
    let offset = |label: *const u8| label.addr() - start.addr();
    let length = offset(&raw const exitpolicy_timed_end);
    // SAFETY: The labels stand around one piece of read-only data of this program, assembled above.
    let bytes = unsafe { slice::from_raw_parts(start, length) };
    (bytes, offset(&raw const exitpolicy_timed_handler))
}
