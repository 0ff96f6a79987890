// SPDX-License-Identifier: GPL-2.0

//! A guest that is a hypervisor. "L1" is the guest, "L2" the guest that it runs, and "L0" the host.
//!
//! L2 has L1's page tables, descriptor tables and interrupt handlers, and its interrupts are not
//! intercepted: it is L1, but for the instructions that exit. It halts in a loop, or reads APERF, and
//! executes CPUID when it shall leave for L1, as that exits on every CPU.
//!
//! L1 finds its [`Page`] at the address in R14, besides [`Params`](crate::payload::Params). What is
//! "APM" here is volume 2 of AMD's manual; "SDM" is volume 3 of Intel's. Names of fields and bits
//! are those of arch/x86/include/asm/svm.h and vmx.h.

use std::{
    mem::offset_of,
    slice, //
};

use anyhow::{
    ensure,
    Result, //
};

use crate::{
    exits::Vendor,
    payload::{
        Params,
        Payload,
        DONE,
        DONE_PORT,
        TIMER_VECTOR, //
    }, //
};

/// What a vCPU needs, in pages: [`Page`]; VMCB or VMCS; what the CPU wants for itself, which is the
/// host state-save area or the VMXON region; and MSR bitmaps that intercept nothing.
pub const PAGES: usize = 5;
const PAGE: u64 = 0x1000;
const CONTROL_BLOCK: u64 = PAGE;
const OWN: u64 = 2 * PAGE;
const MSR_BITMAP_PAGES: u64 = 3 * PAGE;

/// L2's stack is in the page of `Params`, below that of L1.
const L2_STACK: u64 = 0xc00;

/// What L1 is told, and what it tells.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct L1 {
    /// How often L2 shall have left for L1.
    pub leave: u32,
    /// How often it has.
    pub left: u32,
    /// How often L1 may have entered L2 again.
    pub back: u32,
    /// HLT exits that L1 got.
    pub hlts: u32,
    /// What L1 did not expect: an exit code or reason, or, with [`L1::INSTRUCTION`], the error of
    /// an instruction.
    pub failed: u32,
}

impl L1 {
    pub const INSTRUCTION: u32 = 1 << 30;
}

/// One page of L1.
#[repr(C)]
pub struct Page {
    pub l1: L1,
    is_vmx: u64,
    /// The address of the VMCB or VMCS.
    control_block: u64,
    /// The address of the page for the CPU.
    own: u64,
    /// VMCS fields and their values, up to [`NO_FIELD`].
    fields: [[u64; 2]; 96],
}

const _: () = assert!(size_of::<Page>() <= PAGE as usize);

const NO_FIELD: u64 = u64::MAX;

core::arch::global_asm!(
    ".pushsection .rodata.exitpolicy_nested, \"a\"",
    ".balign 16",
    // Global: the compiler may put what uses them into another object.
    ".globl exitpolicy_nested_start",
    "exitpolicy_nested_start:",
    "cli",
    "mov ecx, 0x80f", // spurious interrupt vector: APIC enabled
    "xor edx, edx",
    "mov eax, 0x1ff",
    "wrmsr",
    "mov ecx, 0x83e", // timer divide configuration: by 1
    "mov eax, 0xb",
    "wrmsr",
    "mov ecx, 0x832", // timer LVT: one-shot
    "mov eax, {timer_vector}",
    "wrmsr",
    "mov r13, [r14 + {control_block}]",
    "cmp dword ptr [r14 + {is_vmx}], 0",
    "jne 30f",
    // SVM.
    "mov ecx, 0xc0000080", // EFER
    "rdmsr",
    "or eax, 1 << 12", // SVME
    "wrmsr",
    "mov ecx, 0xc0010117", // VM_HSAVE_PA
    "mov eax, [r14 + {own}]",
    "mov edx, [r14 + {own} + 4]",
    "wrmsr",
    "20:",
    "mov rax, r13",
    "vmrun rax",
    "stgi",
    "mov edx, [r13 + {exit_code}]",
    "cmp edx, 0x72", // SVM_EXIT_CPUID
    "je 21f",
    "cmp edx, 0x78", // SVM_EXIT_HLT
    "jne 90f",
    "call 60f",
    "inc qword ptr [r13 + {save_rip}]",
    "jmp 20b",
    "21:",
    "call 50f",
    "add qword ptr [r13 + {save_rip}], 2",
    "jmp 20b",
    // VMX.
    "30:",
    "mov rax, cr4",
    "or rax, 1 << 13", // VMXE
    "mov cr4, rax",
    "vmxon qword ptr [r14 + {own}]",
    "jbe 39f",
    "vmclear qword ptr [r14 + {control_block}]",
    "jbe 39f",
    "vmptrld qword ptr [r14 + {control_block}]",
    "jbe 39f",
    "lea rsi, [r14 + {fields}]",
    "31:",
    "mov rax, [rsi]",
    "cmp rax, {no_field}",
    "je 32f",
    "vmwrite rax, qword ptr [rsi + 8]",
    "jbe 39f",
    "add rsi, 16",
    "jmp 31b",
    "32:",
    "vmlaunch",
    "jmp 39f",
    ".globl exitpolicy_nested_vmexit",
    "exitpolicy_nested_vmexit:",
    "mov eax, {vm_exit_reason}",
    "vmread rdx, rax",
    "cmp edx, 10", // EXIT_REASON_CPUID
    "je 33f",
    "cmp edx, 12", // EXIT_REASON_HLT
    "jne 90f",
    "call 60f",
    "mov edi, 1",
    "jmp 34f",
    "33:",
    "call 50f",
    "mov edi, 2",
    "34:",
    "mov eax, {guest_rip}",
    "vmread rdx, rax",
    "add rdx, rdi",
    "vmwrite rax, rdx",
    "vmresume",
    "39:",
    "mov eax, {vm_instruction_error}",
    "xor edx, edx",
    "vmread rdx, rax",
    "or edx, {instruction}",
    "jmp 90f",
    // L2 has left. The gate on the way back.
    "50:",
    "inc dword ptr [r14 + {left}]",
    "51:",
    "cmp dword ptr [r15 + {stop}], 0",
    "jne 91f",
    "mov eax, [r14 + {back}]",
    "cmp eax, [r14 + {left}]",
    "jb 51b",
    "ret",
    // L2 halts, as far as L1 lets it.
    "60:",
    "inc dword ptr [r14 + {hlts}]",
    "sti",
    "hlt",
    "cli",
    "ret",
    "90:",
    "mov [r14 + {failed}], edx",
    "91:",
    "mov dx, {done_port}",
    "mov eax, {done}",
    "out dx, al",
    "jmp 91b",
    // L2, and its gate.
    ".globl exitpolicy_nested_l2",
    "exitpolicy_nested_l2:",
    "cmp dword ptr [r15 + {stop}], 0",
    "jne 71f",
    "mov eax, [r14 + {left}]",
    "cmp eax, [r14 + {leave}]",
    "jae 72f",
    "71:",
    "cpuid",
    "72:",
    "mov eax, [r15 + {executed}]",
    "cmp eax, [r15 + {until}]",
    "jae exitpolicy_nested_l2",
    "inc dword ptr [r15 + {begun}]",
    "cmp dword ptr [r15 + {payload}], {aperf}",
    "je 73f",
    "mov ecx, 0x838", // timer initial count
    "mov eax, [r15 + {ticks}]",
    "xor edx, edx",
    "wrmsr",
    // Its timer cannot end the HLT before it began.
    "sti",
    "hlt",
    "cli",
    "74:",
    "inc dword ptr [r15 + {executed}]",
    "jmp exitpolicy_nested_l2",
    "73:",
    "mov ecx, 0xe8", // IA32_APERF
    "rdmsr",
    "jmp 74b",
    ".globl exitpolicy_nested_end",
    "exitpolicy_nested_end:",
    ".popsection",
    payload = const offset_of!(Params, payload),
    aperf = const Payload::L2Aperf as u32,
    ticks = const offset_of!(Params, ticks),
    executed = const offset_of!(Params, executed),
    stop = const offset_of!(Params, stop),
    until = const offset_of!(Params, until),
    begun = const offset_of!(Params, begun),
    leave = const offset_of!(Page, l1) + offset_of!(L1, leave),
    left = const offset_of!(Page, l1) + offset_of!(L1, left),
    back = const offset_of!(Page, l1) + offset_of!(L1, back),
    hlts = const offset_of!(Page, l1) + offset_of!(L1, hlts),
    failed = const offset_of!(Page, l1) + offset_of!(L1, failed),
    instruction = const L1::INSTRUCTION,
    is_vmx = const offset_of!(Page, is_vmx),
    control_block = const offset_of!(Page, control_block),
    own = const offset_of!(Page, own),
    fields = const offset_of!(Page, fields),
    no_field = const NO_FIELD as i64,
    exit_code = const vmcb::EXIT_CODE,
    save_rip = const vmcb::RIP,
    vm_exit_reason = const vmcs::VM_EXIT_REASON,
    vm_instruction_error = const vmcs::VM_INSTRUCTION_ERROR,
    guest_rip = const vmcs::GUEST_RIP,
    timer_vector = const TIMER_VECTOR,
    done_port = const DONE_PORT,
    done = const DONE,
);

extern "C" {
    static exitpolicy_nested_start: u8;
    static exitpolicy_nested_vmexit: u8;
    static exitpolicy_nested_l2: u8;
    static exitpolicy_nested_end: u8;
}

fn offset(label: *const u8) -> u64 {
    (label.addr() - (&raw const exitpolicy_nested_start).addr()) as u64
}

/// The code of L1 and L2. It begins at its first byte.
pub fn code() -> &'static [u8] {
    let length = offset(&raw const exitpolicy_nested_end) as usize;
    // SAFETY: The labels stand around one piece of read-only data of this program, assembled above.
    unsafe { slice::from_raw_parts(&raw const exitpolicy_nested_start, length) }
}

/// What L1 has in the registers that L2 shall have, too, and where things are in its memory.
#[derive(Clone, Copy)]
pub struct Setup {
    pub vendor: Vendor,
    /// Whether L1 intercepts L2's HLT.
    pub intercepts_hlt: bool,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub gdt: (u64, u16),
    pub idt: (u64, u16),
    /// Where [`code`] is.
    pub code: u64,
    /// The vCPU's [`Params`].
    pub params: u64,
    /// The first of [`PAGES`] pages that are the vCPU's.
    pub pages: u64,
}

/// The selectors of L1's code and data, and one that is not in its GDT: no more is looked for there.
const CS: u64 = 8;
const DATA: u64 = 16;
const TR: u64 = 24;
const RFLAGS: u64 = 2;
const DR7: u64 = 0x400;

impl Setup {
    /// The words to be written to the vCPU's pages, which are zero before, each with its offset.
    /// `read_msr` reads an MSR of the vCPU.
    pub fn words(&self, read_msr: impl Fn(u32) -> Result<u64>) -> Result<Vec<(usize, u64)>> {
        let mut words = vec![
            (offset_of!(Page, control_block), self.pages + CONTROL_BLOCK),
            (offset_of!(Page, own), self.pages + OWN),
        ];
        match self.vendor {
            Vendor::Svm => {
                let in_vmcb = |(at, word)| (CONTROL_BLOCK as usize + at, word);
                words.extend(self.vmcb().into_iter().map(in_vmcb));
            }
            Vendor::Vmx => self.vmx(read_msr, &mut words)?,
        }
        Ok(words)
    }

    /// APM appendix B; `struct vmcb`.
    fn vmcb(&self) -> Vec<(usize, u64)> {
        const INTERCEPT_CPUID: u64 = 1 << (114 - 96);
        const INTERCEPT_HLT: u64 = 1 << (120 - 96);
        const INTERCEPT_MSR_PROT: u64 = 1 << (124 - 96);
        const INTERCEPT_VMRUN: u64 = 1; // 128, the first one of its word
        const SVME: u64 = 1 << 12;
        let hlt = if self.intercepts_hlt {
            INTERCEPT_HLT
        } else {
            0
        };
        let segment = |selector: u64, attrib: u64| selector | (attrib << 16) | (0xffff_ffff << 32);
        let table = |(_, limit): (u64, u16)| u64::from(limit) << 32;
        let (code, data) = (segment(CS, 0xa9b), segment(DATA, 0xc93));
        vec![
            // The fourth and fifth word of the intercepts, a half of each of these.
            (0x008, (INTERCEPT_CPUID | hlt | INTERCEPT_MSR_PROT) << 32),
            (0x010, INTERCEPT_VMRUN),
            (vmcb::MSRPM_BASE_PA, self.pages + MSR_BITMAP_PAGES),
            (0x058, 1),    // asid
            (0x400, data), // es
            (0x410, code), // cs
            (0x420, data), // ss
            (0x430, data), // ds
            (0x460, table(self.gdt)),
            (0x468, self.gdt.0),
            (0x480, table(self.idt)),
            (0x488, self.idt.0),
            (0x4d0, self.efer | SVME),
            (0x548, self.cr4),
            (0x550, self.cr3),
            (0x558, self.cr0),
            (0x560, DR7),
            (0x568, 0xffff_0ff0), // dr6
            (0x570, RFLAGS),
            (vmcb::RIP, self.l2()),
            (0x5d8, self.params + L2_STACK), // rsp
        ]
    }

    fn l2(&self) -> u64 {
        self.code + offset(&raw const exitpolicy_nested_l2)
    }

    fn vmx(
        &self,
        read_msr: impl Fn(u32) -> Result<u64>,
        words: &mut Vec<(usize, u64)>,
    ) -> Result<()> {
        use vmcs::*;

        // Of IA32_VMX_BASIC, the revision of VMXON region and VMCS (SDM appendix A.1).
        let revision = read_msr(MSR_IA32_VMX_BASIC)? & 0x7fff_ffff;
        words.extend([CONTROL_BLOCK, OWN].map(|page| (page as usize, revision)));
        words.push((offset_of!(Page, is_vmx), 1));

        // What must be set, and what may be (SDM appendix A.2).
        let control = |msr: u32, wanted: u64| -> Result<u64> {
            let value = read_msr(msr)?;
            let (must, may) = (value & 0xffff_ffff, value >> 32);
            ensure!(wanted & !may == 0, "MSR {msr:#x} forbids {wanted:#x}");
            Ok(wanted | must)
        };
        let hlt = if self.intercepts_hlt {
            CPU_BASED_HLT_EXITING
        } else {
            0
        };
        let pin = control(MSR_IA32_VMX_PINBASED_CTLS, 0)?;
        let exec = control(MSR_IA32_VMX_PROCBASED_CTLS, CPU_BASED_USE_MSR_BITMAPS | hlt)?;
        let exit = control(MSR_IA32_VMX_EXIT_CTLS, VM_EXIT_HOST_ADDR_SPACE_SIZE)?;
        let entry = control(MSR_IA32_VMX_ENTRY_CTLS, VM_ENTRY_IA32E_MODE)?;

        let cr4 = self.cr4 | (1 << 13); // VMXE
        let vmexit = self.code + offset(&raw const exitpolicy_nested_vmexit);
        let mut fields = vec![
            (PIN_BASED_VM_EXEC_CONTROL, pin),
            (CPU_BASED_VM_EXEC_CONTROL, exec),
            (VM_EXIT_CONTROLS, exit),
            (VM_ENTRY_CONTROLS, entry),
            (MSR_BITMAP, self.pages + MSR_BITMAP_PAGES),
            (VMCS_LINK_POINTER, u64::MAX),
            (GUEST_CS_SELECTOR, CS),
            (GUEST_CS_LIMIT, 0xffff_ffff),
            (GUEST_CS_AR_BYTES, 0xa09b),
            (GUEST_LDTR_AR_BYTES, 0x1_0000), // unusable
            (GUEST_TR_SELECTOR, TR),
            (GUEST_TR_LIMIT, 0x67),
            (GUEST_TR_AR_BYTES, 0x8b), // busy TSS
            (GUEST_GDTR_BASE, self.gdt.0),
            (GUEST_GDTR_LIMIT, self.gdt.1.into()),
            (GUEST_IDTR_BASE, self.idt.0),
            (GUEST_IDTR_LIMIT, self.idt.1.into()),
            (GUEST_CR0, self.cr0),
            (GUEST_CR3, self.cr3),
            (GUEST_CR4, cr4),
            (GUEST_DR7, DR7),
            (GUEST_RFLAGS, RFLAGS),
            (GUEST_RIP, self.l2()),
            (GUEST_RSP, self.params + L2_STACK),
            (HOST_CS_SELECTOR, CS),
            (HOST_TR_SELECTOR, TR),
            (HOST_GDTR_BASE, self.gdt.0),
            (HOST_IDTR_BASE, self.idt.0),
            (HOST_CR0, self.cr0),
            (HOST_CR3, self.cr3),
            (HOST_CR4, cr4),
            (HOST_RIP, vmexit),
            (HOST_RSP, self.params + PAGE),
        ];
        // ES, SS, DS, FS and GS.
        for segment in [0, 2, 3, 4, 5] {
            fields.extend([
                (GUEST_ES_SELECTOR + 2 * segment, DATA),
                (GUEST_ES_LIMIT + 2 * segment, 0xffff_ffff),
                (GUEST_ES_AR_BYTES + 2 * segment, 0xc093),
                (HOST_ES_SELECTOR + 2 * segment, DATA),
            ]);
        }
        // VMCLEAR leaves the fields undefined (SDM 25.11.3).
        fields.extend(ZEROES.map(|field| (field, 0)));
        fields.push((NO_FIELD, 0));
        for (index, (field, value)) in fields.into_iter().enumerate() {
            let at = offset_of!(Page, fields) + index * 16;
            assert!(at + 16 <= size_of::<Page>());
            words.extend([(at, field), (at + 8, value)]);
        }
        Ok(())
    }
}

mod vmcb {
    pub const MSRPM_BASE_PA: usize = 0x048;
    pub const EXIT_CODE: usize = 0x070;
    pub const RIP: usize = 0x578;
}

mod vmcs {
    pub const MSR_IA32_VMX_BASIC: u32 = 0x480;
    pub const MSR_IA32_VMX_PINBASED_CTLS: u32 = 0x481;
    pub const MSR_IA32_VMX_PROCBASED_CTLS: u32 = 0x482;
    pub const MSR_IA32_VMX_EXIT_CTLS: u32 = 0x483;
    pub const MSR_IA32_VMX_ENTRY_CTLS: u32 = 0x484;

    pub const CPU_BASED_HLT_EXITING: u64 = 1 << 7;
    pub const CPU_BASED_USE_MSR_BITMAPS: u64 = 1 << 28;
    pub const VM_EXIT_HOST_ADDR_SPACE_SIZE: u64 = 1 << 9;
    pub const VM_ENTRY_IA32E_MODE: u64 = 1 << 9;

    pub const GUEST_ES_SELECTOR: u64 = 0x0800;
    pub const GUEST_CS_SELECTOR: u64 = 0x0802;
    pub const GUEST_LDTR_SELECTOR: u64 = 0x080c;
    pub const GUEST_TR_SELECTOR: u64 = 0x080e;
    pub const HOST_ES_SELECTOR: u64 = 0x0c00;
    pub const HOST_CS_SELECTOR: u64 = 0x0c02;
    pub const HOST_TR_SELECTOR: u64 = 0x0c0c;
    pub const MSR_BITMAP: u64 = 0x2004;
    pub const VM_EXIT_MSR_STORE_ADDR: u64 = 0x2006;
    pub const VM_EXIT_MSR_LOAD_ADDR: u64 = 0x2008;
    pub const VM_ENTRY_MSR_LOAD_ADDR: u64 = 0x200a;
    pub const VMCS_LINK_POINTER: u64 = 0x2800;
    pub const GUEST_IA32_DEBUGCTL: u64 = 0x2802;
    pub const PIN_BASED_VM_EXEC_CONTROL: u64 = 0x4000;
    pub const CPU_BASED_VM_EXEC_CONTROL: u64 = 0x4002;
    pub const EXCEPTION_BITMAP: u64 = 0x4004;
    pub const PAGE_FAULT_ERROR_CODE_MASK: u64 = 0x4006;
    pub const PAGE_FAULT_ERROR_CODE_MATCH: u64 = 0x4008;
    pub const CR3_TARGET_COUNT: u64 = 0x400a;
    pub const VM_EXIT_CONTROLS: u64 = 0x400c;
    pub const VM_EXIT_MSR_STORE_COUNT: u64 = 0x400e;
    pub const VM_EXIT_MSR_LOAD_COUNT: u64 = 0x4010;
    pub const VM_ENTRY_CONTROLS: u64 = 0x4012;
    pub const VM_ENTRY_MSR_LOAD_COUNT: u64 = 0x4014;
    pub const VM_ENTRY_INTR_INFO_FIELD: u64 = 0x4016;
    pub const VM_ENTRY_EXCEPTION_ERROR_CODE: u64 = 0x4018;
    pub const VM_ENTRY_INSTRUCTION_LEN: u64 = 0x401a;
    pub const VM_INSTRUCTION_ERROR: u64 = 0x4400;
    pub const VM_EXIT_REASON: u64 = 0x4402;
    pub const GUEST_ES_LIMIT: u64 = 0x4800;
    pub const GUEST_CS_LIMIT: u64 = 0x4802;
    pub const GUEST_LDTR_LIMIT: u64 = 0x480c;
    pub const GUEST_TR_LIMIT: u64 = 0x480e;
    pub const GUEST_GDTR_LIMIT: u64 = 0x4810;
    pub const GUEST_IDTR_LIMIT: u64 = 0x4812;
    pub const GUEST_ES_AR_BYTES: u64 = 0x4814;
    pub const GUEST_CS_AR_BYTES: u64 = 0x4816;
    pub const GUEST_LDTR_AR_BYTES: u64 = 0x4820;
    pub const GUEST_TR_AR_BYTES: u64 = 0x4822;
    pub const GUEST_INTERRUPTIBILITY_INFO: u64 = 0x4824;
    pub const GUEST_ACTIVITY_STATE: u64 = 0x4826;
    pub const GUEST_SYSENTER_CS: u64 = 0x482a;
    pub const HOST_IA32_SYSENTER_CS: u64 = 0x4c00;
    pub const CR0_GUEST_HOST_MASK: u64 = 0x6000;
    pub const CR4_GUEST_HOST_MASK: u64 = 0x6002;
    pub const CR0_READ_SHADOW: u64 = 0x6004;
    pub const CR4_READ_SHADOW: u64 = 0x6006;
    pub const GUEST_CR0: u64 = 0x6800;
    pub const GUEST_CR3: u64 = 0x6802;
    pub const GUEST_CR4: u64 = 0x6804;
    pub const GUEST_ES_BASE: u64 = 0x6806;
    pub const GUEST_CS_BASE: u64 = 0x6808;
    pub const GUEST_SS_BASE: u64 = 0x680a;
    pub const GUEST_DS_BASE: u64 = 0x680c;
    pub const GUEST_FS_BASE: u64 = 0x680e;
    pub const GUEST_GS_BASE: u64 = 0x6810;
    pub const GUEST_LDTR_BASE: u64 = 0x6812;
    pub const GUEST_TR_BASE: u64 = 0x6814;
    pub const GUEST_GDTR_BASE: u64 = 0x6816;
    pub const GUEST_IDTR_BASE: u64 = 0x6818;
    pub const GUEST_DR7: u64 = 0x681a;
    pub const GUEST_RSP: u64 = 0x681c;
    pub const GUEST_RIP: u64 = 0x681e;
    pub const GUEST_RFLAGS: u64 = 0x6820;
    pub const GUEST_PENDING_DBG_EXCEPTIONS: u64 = 0x6822;
    pub const GUEST_SYSENTER_ESP: u64 = 0x6824;
    pub const GUEST_SYSENTER_EIP: u64 = 0x6826;
    pub const HOST_CR0: u64 = 0x6c00;
    pub const HOST_CR3: u64 = 0x6c02;
    pub const HOST_CR4: u64 = 0x6c04;
    pub const HOST_FS_BASE: u64 = 0x6c06;
    pub const HOST_GS_BASE: u64 = 0x6c08;
    pub const HOST_TR_BASE: u64 = 0x6c0a;
    pub const HOST_GDTR_BASE: u64 = 0x6c0c;
    pub const HOST_IDTR_BASE: u64 = 0x6c0e;
    pub const HOST_IA32_SYSENTER_ESP: u64 = 0x6c10;
    pub const HOST_IA32_SYSENTER_EIP: u64 = 0x6c12;
    pub const HOST_RSP: u64 = 0x6c14;
    pub const HOST_RIP: u64 = 0x6c16;

    /// What is used with the controls that we have, and is 0 here.
    pub const ZEROES: [u64; 40] = [
        GUEST_LDTR_SELECTOR,
        VM_EXIT_MSR_STORE_ADDR,
        VM_EXIT_MSR_LOAD_ADDR,
        VM_ENTRY_MSR_LOAD_ADDR,
        GUEST_IA32_DEBUGCTL,
        EXCEPTION_BITMAP,
        PAGE_FAULT_ERROR_CODE_MASK,
        PAGE_FAULT_ERROR_CODE_MATCH,
        CR3_TARGET_COUNT,
        VM_EXIT_MSR_STORE_COUNT,
        VM_EXIT_MSR_LOAD_COUNT,
        VM_ENTRY_MSR_LOAD_COUNT,
        VM_ENTRY_INTR_INFO_FIELD,
        VM_ENTRY_EXCEPTION_ERROR_CODE,
        VM_ENTRY_INSTRUCTION_LEN,
        GUEST_LDTR_LIMIT,
        GUEST_INTERRUPTIBILITY_INFO,
        GUEST_ACTIVITY_STATE,
        GUEST_SYSENTER_CS,
        HOST_IA32_SYSENTER_CS,
        CR0_GUEST_HOST_MASK,
        CR4_GUEST_HOST_MASK,
        CR0_READ_SHADOW,
        CR4_READ_SHADOW,
        GUEST_ES_BASE,
        GUEST_CS_BASE,
        GUEST_SS_BASE,
        GUEST_DS_BASE,
        GUEST_FS_BASE,
        GUEST_GS_BASE,
        GUEST_LDTR_BASE,
        GUEST_TR_BASE,
        GUEST_PENDING_DBG_EXCEPTIONS,
        GUEST_SYSENTER_ESP,
        GUEST_SYSENTER_EIP,
        HOST_FS_BASE,
        HOST_GS_BASE,
        HOST_TR_BASE,
        HOST_IA32_SYSENTER_ESP,
        HOST_IA32_SYSENTER_EIP,
    ];
}
