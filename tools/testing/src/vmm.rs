// SPDX-License-Identifier: GPL-2.0

//! A VMM that is small and yet a real one: KVM with its in-kernel interrupt controllers, and vCPUs
//! in long mode that run a [`Payload`].
//!
//! The interrupt controllers are no luxury: on Intel, a vCPU that halts natively wakes only by an
//! interrupt, so the guests need a LAPIC whose timer sends one.

use std::{
    fs::{
        File,
        OpenOptions, //
    },
    io,
    num::NonZero,
    os::{
        fd::{
            AsFd,
            AsRawFd,
            RawFd, //
        },
        unix::fs::FileExt, //
    },
    ptr::{
        self,
        NonNull, //
    },
    sync::{
        atomic::{
            AtomicBool,
            Ordering, //
        },
        Arc, //
    }, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use kvm_bindings::{
    kvm_enable_cap,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msr_entry,
    kvm_regs,
    kvm_segment,
    kvm_sregs,
    kvm_userspace_memory_region,
    kvm_vcpu_events,
    CpuId,
    Msrs,
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X86_DISABLE_EXITS,
    KVM_MAX_CPUID_ENTRIES,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_SMM, //
};
use kvm_ioctls::{
    Kvm,
    MsrFilterDefaultAction,
    MsrFilterRange,
    MsrFilterRangeFlags,
    VcpuExit,
    VcpuFd,
    VmFd, //
};
use nix::sys::{
    memfd::{
        memfd_create,
        MFdFlags, //
    },
    mman::{
        mmap,
        munmap,
        MapFlags,
        ProtFlags, //
    }, //
};
use serde::{
    Deserialize,
    Serialize, //
};

use crate::{
    exits::Vendor,
    nested,
    payload::{
        self,
        Params,
        Payload,
        DE_VECTOR,
        DONE,
        DONE_BY_SIPI,
        DONE_PORT,
        KVM_FEATURE_PV_UNHALT,
        TIMER_VECTOR, //
    },
    stats,
    timed::{
        self,
        Words, //
    }, //
};

/// The size of a guest's memory: the one large page that its page tables map.
const MEMORY: usize = 2 << 20;
const GDT: usize = 0x1000;
const IDT: usize = 0x2000;
const PML4: usize = 0x3000;
const PDPT: usize = 0x4000;
const PD: usize = 0x5000;
const CODE: usize = 0x8000;
/// Where a vCPU begins after SIPI, as a page number.
pub const SIPI_PAGE: usize = 0xd;
/// A word that the SMI handler increments, and one that keeps it from returning while it is not 0.
const SMIS: usize = 0xe000;
const SMM_GATE: usize = SMIS + 2;
/// One page for each vCPU.
const PARAMS: usize = 0x10000;
/// The SMI handler, where it is after a reset; the page of a vCPU that gets none.
const SMM: usize = 0x38000;
/// KVM_CAP_MULTI_ADDRESS_SPACE: that of SMM.
const SMM_ADDRESS_SPACE: u32 = 1;
const PAGE: usize = 0x1000;
/// The code of guests that have guests, and the first vCPU's pages for that.
const NESTED_CODE: usize = 0x10_0000;
const NESTED: usize = 0x10_1000;
/// Where VMX on CPUs without unrestricted guests puts three pages of its own.
const TSS: usize = 0xfffb_d000;

/// Of an I/O APIC that the VMM would have.
const IOAPIC_PINS: u64 = 24;

/// CPUID leaf 1 ECX: MONITOR and MWAIT.
const CPUID1_ECX_MWAIT: u32 = 1 << 3;
/// CPUID leaf 6 ECX: APERF and MPERF.
const CPUID6_ECX_APERFMPERF: u32 = 1 << 0;
/// CPUID leaf 1 ECX: VMX.
const CPUID1_ECX_VMX: u32 = 1 << 5;
/// CPUID leaf 0x80000001 ECX: SVM.
const CPUID8_1_ECX_SVM: u32 = 1 << 2;
const MSR_IA32_FEAT_CTL: u32 = 0x3a;
/// FEAT_CTL_LOCKED and FEAT_CTL_VMX_ENABLED_OUTSIDE_SMX.
const FEAT_CTL_VMX: u64 = (1 << 0) | (1 << 2);
const KVM_CPUID_FEATURES: u32 = 0x4000_0001;

/// What a guest does in one run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Work {
    pub payload: Payload,
    /// How many executions.
    pub count: u32,
    /// Nanoseconds until the guest's timer ends a HLT or MWAIT; 0 for a timer that never does.
    pub ticks: u32,
    /// The gate, until it is opened further; see [`Guest::open_gate`].
    pub until: u32,
    /// Low and high half of what [`Payload::Ipi`] and [`Payload::Wakeups`] send.
    pub icr: [u32; 2],
    /// [`Payload::Wakeups`]: how many vCPUs there are, and whether this one has the token at first.
    pub vcpus: u32,
    pub starts: bool,
}

impl Work {
    /// `count` executions, with a timer that is slow enough for the vCPU to go to sleep.
    pub fn new(payload: Payload, count: u32) -> Self {
        Self {
            payload,
            count,
            ticks: 50_000,
            until: u32::MAX,
            icr: [0; 2],
            vcpus: 0,
            starts: false,
        }
    }

    /// Executions without end, of which the gate lets through none for now.
    pub fn gated(payload: Payload) -> Self {
        Self {
            until: 0,
            ..Self::new(payload, u32::MAX)
        }
    }
}

/// What a guest did, and saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Executions. Less than asked for if the run was stopped.
    pub executed: u32,
    /// #GP faults that the guest survived.
    pub gp: u32,
    /// #UD faults that the guest survived.
    pub ud: u32,
    /// Timer interrupts that the guest took.
    pub interrupts: u32,
    /// NMIs that the guest took.
    pub nmis: u32,
    /// Exceptions that the VMM gave the guest, and it took.
    pub exceptions: u32,
    /// The guest was begun again by INIT and SIPI, and that is how the run ended.
    pub by_sipi: bool,
    /// Whether the guest's CPUID has KVM_FEATURE_PV_UNHALT.
    pub pv_unhalt: bool,
    /// By how much KVM's `halt_exits` of this vCPU grew.
    pub halt_exits: u64,
    /// By how much KVM's `exits` of it did: those of every kind, the last one among them.
    pub exits: u64,
    /// Where the guest was when it was given up.
    pub stuck_at: Option<u64>,
}

/// Which interrupt controllers KVM emulates; the VMM has to do the others, and ours does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Irqchip {
    /// KVM_CREATE_IRQCHIP: all.
    #[default]
    Kernel,
    /// KVM_CAP_SPLIT_IRQCHIP: the LAPICs.
    Split,
    None,
}

/// What a VMM does to a vCPU that does not run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Action {
    /// KVM_SET_CPUID2, with the table that the VMM has for every vCPU.
    SetCpuid,
    /// KVM_SET_MP_STATE, with KVM_MP_STATE_RUNNABLE.
    SetRunnable,
    /// KVM_NMI.
    Nmi,
    /// KVM_SET_VCPU_EVENTS, with an exception to be injected.
    InjectException,
    /// KVM_SMI.
    Smi,
    /// KVM_INTERRUPT, where the VMM has the interrupt controllers, with the timer's vector.
    Interrupt,
    /// What a reset of the machine does, as QEMU does it: all that KVM_CREATE_VCPU left is put back
    /// (target/i386/kvm/kvm.c:kvm_arch_put_registers()). What runs next sets the vCPU up again, as
    /// firmware would.
    Reset,
    /// KVM_SET_VCPU_EVENTS with an INIT, and KVM_SET_MP_STATE with a SIPI, for the next KVM_RUN.
    InitAndSipi,
}

nix::ioctl_write_ptr!(kvm_interrupt, 0xAE, 0x86, kvm_bindings::kvm_interrupt);

/// What makes a vCPU go on elsewhere.
#[derive(Clone)]
pub struct State {
    regs: kvm_regs,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
}

/// The memory of a guest.
struct Memory {
    address: NonNull<u8>,
    file: File,
}

// SAFETY: The mapping belongs to the value, not to a thread.
unsafe impl Send for Memory {}
// SAFETY: All access goes through raw pointers, to parts that only one vCPU's thread uses once the
// VM is built, but for words that are read and written volatile.
unsafe impl Sync for Memory {}

impl Memory {
    fn new() -> Result<Self> {
        let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(MEMORY as u64)?;
        Self::map(file)
    }

    fn map(file: File) -> Result<Self> {
        let length = NonZero::new(MEMORY).context("no memory asked for")?;
        // SAFETY: A new mapping, at an address that the kernel chooses.
        let address = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                file.as_fd(),
                0,
            )
        }?;
        Ok(Self {
            address: address.cast(),
            file,
        })
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= MEMORY);
        // SAFETY: Within the mapping, as just checked; a guest that reads it meanwhile is no Rust
        // code.
        unsafe {
            ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.address.as_ptr().add(offset),
                bytes.len(),
            )
        };
    }

    fn write_u64(&self, offset: usize, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    fn params(&self, index: usize) -> *mut Params {
        let offset = PARAMS + index * PAGE;
        assert!(offset + PAGE <= MEMORY);
        // SAFETY: Within the mapping, as just checked.
        unsafe { self.address.as_ptr().add(offset) }.cast()
    }

    fn words(&self, index: usize) -> *mut Words {
        let params: *mut u8 = self.params(index).cast();
        // SAFETY: Within the same page.
        unsafe { params.add(timed::WORDS) }.cast()
    }

    fn l1(&self, index: usize) -> *mut nested::L1 {
        let offset = nested_pages(index);
        assert!(offset + PAGE <= MEMORY);
        // SAFETY: Within the mapping, as just checked.
        unsafe { self.address.as_ptr().add(offset) }.cast()
    }
}

/// Where a vCPU's pages are for a guest of its guest.
fn nested_pages(index: usize) -> usize {
    NESTED + index * nested::PAGES * PAGE
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: Ours alone since `new`. KVM's slot goes with the VM, whose file is closed first.
        let _ = unsafe { munmap(self.address.cast(), MEMORY) };
    }
}

/// The memory of a guest of another process. What is asked of it costs neither a system call nor an
/// exit.
pub struct Guest {
    memory: Memory,
}

impl Guest {
    /// Maps the memory that a process has open.
    pub fn of_process(pid: i32, fd: RawFd) -> Result<Self> {
        let path = format!("/proc/{pid}/fd/{fd}");
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let memory = Memory::map(file)?;
        Ok(Self { memory })
    }

    /// What the guest of a vCPU told so far.
    pub fn params(&self, index: usize) -> Params {
        // SAFETY: Mapped and aligned. The guest's words are each written at once, and a copy of
        // them that was not made at one moment is the caller's to deal with.
        unsafe { self.memory.params(index).read_volatile() }
    }

    /// Interrupts that the guest of a vCPU took that measures.
    pub fn taken(&self, index: usize) -> u32 {
        // SAFETY: As in `params`.
        unsafe { (&raw const (*self.memory.words(index)).taken).read_volatile() }
    }

    /// The first `count` values that the guest of a vCPU measured, as [`crate::timed`] has them.
    pub fn samples(&self, index: usize, count: u32) -> Vec<i64> {
        assert!(index < timed::VCPUS && count <= timed::MOST);
        let at = timed::SAMPLES + index * timed::SAMPLES_SIZE;
        // SAFETY: Within the mapping and aligned; the guest does not write any more, or what it does
        // is written at once.
        let value = |number: u32| unsafe {
            let samples: *const i64 = self.memory.address.as_ptr().add(at).cast();
            samples.add(number as usize).read_volatile()
        };
        (0..count).map(value).collect()
    }

    /// System management interrupts that the guest took.
    pub fn smis(&self) -> u16 {
        // SAFETY: Mapped and aligned; the guest's word is written at once.
        unsafe {
            let smis: *const u16 = self.memory.address.as_ptr().add(SMIS).cast();
            smis.read_volatile()
        }
    }

    /// Keeps a guest that is, or gets, there in system management mode, or lets it go.
    pub fn hold_in_smm(&self, hold: bool) {
        // SAFETY: Mapped and aligned; only one test writes it.
        unsafe {
            let gate: *mut u16 = self.memory.address.as_ptr().add(SMM_GATE).cast();
            gate.write_volatile(hold.into());
        }
    }

    /// Lets the guest of a vCPU end `count` executions more than it was allowed so far.
    pub fn open_gate(&self, index: usize, count: u32) -> u32 {
        let params = self.memory.params(index);
        // SAFETY: Mapped and aligned; only one test writes it.
        unsafe {
            let until = &raw mut (*params).until;
            let value = until.read_volatile() + count;
            until.write_volatile(value);
            value
        }
    }

    /// Changes [`Work::ticks`] between two executions.
    pub fn set_ticks(&self, index: usize, ticks: u32) {
        // SAFETY: Mapped and aligned; only one test writes it.
        unsafe { (&raw mut (*self.memory.params(index)).ticks).write_volatile(ticks) };
    }

    /// Changes [`Params::backstop`], which is 0 at first.
    pub fn set_backstop(&self, index: usize, ticks: u32) {
        // SAFETY: Mapped and aligned; only one test writes it.
        unsafe { (&raw mut (*self.memory.params(index)).backstop).write_volatile(ticks) };
    }

    /// What the guest of a vCPU told so far of the guest that it has.
    pub fn l1(&self, index: usize) -> nested::L1 {
        // SAFETY: As in `params`.
        unsafe { self.memory.l1(index).read_volatile() }
    }

    /// Makes L2 leave for L1 until it has done so `leave` times, and L1 go back `back` times.
    pub fn set_l2(&self, index: usize, leave: u32, back: u32) {
        let l1 = self.memory.l1(index);
        // SAFETY: Mapped and aligned; only one test writes these words.
        unsafe {
            (&raw mut (*l1).back).write_volatile(back);
            (&raw mut (*l1).leave).write_volatile(leave);
        }
    }
}

impl AsRawFd for Vcpu {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A VM.
pub struct Vm {
    // Dropped first, as KVM uses the memory.
    fd: VmFd,
    memory: Arc<Memory>,
    cpuid: CpuId,
    irqchip: Irqchip,
    /// Whether guests are told of KVM_FEATURE_PV_UNHALT.
    pv_unhalt: AtomicBool,
}

impl Vm {
    /// KVM_CREATE_VM, the interrupt controllers and the memory; nothing that KVM does only before
    /// the first vCPU is left undone but KVM_ENABLE_CAP.
    pub fn new(irqchip: Irqchip) -> Result<Self> {
        let memory = Memory::new()?;
        build_guest(&memory);
        Self::with_memory(Arc::new(memory), irqchip)
    }

    /// Another one with the same memory, as after a migration.
    pub fn twin(&self) -> Result<Self> {
        Self::with_memory(self.memory.clone(), self.irqchip)
    }

    fn with_memory(memory: Arc<Memory>, irqchip: Irqchip) -> Result<Self> {
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let fd = kvm.create_vm().context("KVM_CREATE_VM")?;
        fd.set_tss_address(TSS).context("KVM_SET_TSS_ADDR")?;
        match irqchip {
            Irqchip::Kernel => fd.create_irq_chip().context("KVM_CREATE_IRQCHIP")?,
            Irqchip::Split => {
                let mut cap = kvm_enable_cap {
                    cap: KVM_CAP_SPLIT_IRQCHIP,
                    ..Default::default()
                };
                cap.args[0] = IOAPIC_PINS;
                fd.enable_cap(&cap).context("KVM_CAP_SPLIT_IRQCHIP")?;
            }
            Irqchip::None => (),
        }
        for slot in [0, SMM_ADDRESS_SPACE << 16] {
            // SAFETY: `memory` is mapped for as long as `fd` is open.
            unsafe {
                fd.set_user_memory_region(kvm_userspace_memory_region {
                    slot,
                    flags: 0,
                    guest_phys_addr: 0,
                    memory_size: MEMORY as u64,
                    userspace_addr: memory.address.as_ptr().addr() as u64,
                })
            }
            .context("KVM_SET_USER_MEMORY_REGION")?;
        }
        let mut cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .context("KVM_GET_SUPPORTED_CPUID")?;
        // What a VMM adds for guests that shall use what is passed through.
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => entry.ecx |= CPUID1_ECX_MWAIT,
                6 => entry.ecx |= CPUID6_ECX_APERFMPERF,
                _ => (),
            }
        }
        Ok(Self {
            fd,
            memory,
            cpuid,
            irqchip,
            pv_unhalt: AtomicBool::new(true),
        })
    }

    /// The file of its memory.
    pub fn memory(&self) -> RawFd {
        self.memory.file.as_raw_fd()
    }

    /// Does not tell guests of KVM_FEATURE_PV_UNHALT, from the next KVM_SET_CPUID2 on.
    pub fn hide_pv_unhalt(&self) {
        self.pv_unhalt.store(false, Ordering::Release);
    }

    /// The table for KVM_SET_CPUID2.
    pub fn cpuid(&self) -> CpuId {
        let mut cpuid = self.cpuid.clone();
        if !self.pv_unhalt.load(Ordering::Acquire) {
            for entry in cpuid.as_mut_slice() {
                if entry.function == KVM_CPUID_FEATURES {
                    entry.eax &= !KVM_FEATURE_PV_UNHALT;
                }
            }
        }
        cpuid
    }

    /// KVM_X86_SET_MSR_FILTER: the guest's reads of `count` MSRs from `base` on fault.
    pub fn deny_msr_reads(&self, base: u32, count: u32) -> Result<()> {
        // A bit that is clear denies.
        let bitmap = vec![0; count.div_ceil(8) as usize];
        let range = MsrFilterRange {
            flags: MsrFilterRangeFlags::READ,
            base,
            msr_count: count,
            bitmap: &bitmap,
        };
        self.fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range])
            .context("KVM_X86_SET_MSR_FILTER")
    }

    /// KVM_ENABLE_CAP(KVM_CAP_X86_DISABLE_EXITS).
    pub fn disable_exits(&self, bits: u64) -> io::Result<()> {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_X86_DISABLE_EXITS,
            ..Default::default()
        };
        cap.args[0] = bits;
        self.fd.enable_cap(&cap).map_err(from_kvm)
    }

    /// What KVM can disable on this host.
    pub fn supported() -> Result<Exits> {
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let bits = kvm.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into());
        Ok(Exits::from_bits_truncate(u64::try_from(bits)?))
    }

    /// KVM_CREATE_VCPU, in the calling thread.
    pub fn create_vcpu(self: &Arc<Self>, index: usize) -> io::Result<Vcpu> {
        let fd = self.fd.create_vcpu(index as u64).map_err(from_kvm)?;
        Ok(Vcpu {
            fd,
            index,
            vm: self.clone(),
            has_cpuid: false,
            ready: false,
            fresh: None,
        })
    }
}

impl AsRawFd for Vm {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// kvm-ioctls has an error type of its own.
fn from_kvm(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// A vCPU.
pub struct Vcpu {
    // Dropped before the VM, as a VMM does.
    fd: VcpuFd,
    index: usize,
    vm: Arc<Vm>,
    has_cpuid: bool,
    ready: bool,
    /// As KVM_CREATE_VCPU left it, see [`Vcpu::keep_fresh`].
    fresh: Option<State>,
}

impl Vcpu {
    /// Runs `work` to its end, or until the guest is asked to stop, or until `give_up` is set and a
    /// signal comes.
    pub fn run(&mut self, work: Work, give_up: &AtomicBool) -> Result<Report> {
        self.prepare(work)?;
        self.go_on(give_up)
    }

    /// Makes the vCPU begin `work` when it runs.
    pub fn prepare(&mut self, work: Work) -> Result<()> {
        self.set_up_once()?;
        let params = self.vm.memory.params(self.index);
        // SAFETY: The page belongs to this vCPU, which does not run now.
        unsafe {
            params.write_volatile(Params {
                payload: work.payload as u32,
                count: work.count,
                ticks: work.ticks,
                until: work.until,
                icr: work.icr,
                index: self.index as u32,
                vcpus: work.vcpus,
                starts: work.starts.into(),
                ..Params::default()
            })
        };
        let page = (PARAMS + self.index * PAGE) as u64;
        let is_nested = matches!(
            work.payload,
            Payload::L2Hlt | Payload::L2HltIntercepted | Payload::L2Aperf
        );
        if is_nested {
            self.prepare_nested(work.payload == Payload::L2HltIntercepted)
                .context("cannot make the guest a hypervisor")?;
        }
        self.fd.set_regs(&kvm_regs {
            rip: if is_nested { NESTED_CODE } else { CODE } as u64,
            rsp: page + PAGE as u64,
            r14: nested_pages(self.index) as u64,
            r15: page,
            rflags: 2,
            ..Default::default()
        })?;
        Ok(())
    }

    /// Makes the vCPU measure when it runs. `peer` is the index of the vCPU that has a part in it.
    pub fn prepare_timed(&mut self, work: timed::Work, peer: usize) -> Result<()> {
        ensure!(
            self.index.max(peer) < timed::VCPUS && work.count <= timed::MOST,
            "so much does not fit: {work:?}"
        );
        self.set_up_once()?;
        let khz = self.fd.get_tsc_khz().context("KVM_GET_TSC_KHZ")?;
        let memory = &self.vm.memory;
        let page = PARAMS + self.index * PAGE;
        memory.write(page, &[0; PAGE]);
        let words = Words {
            operation: work.operation as u32,
            count: work.count,
            gap: (u64::from(work.gap_us) * u64::from(khz) / 1000).try_into()?,
            msr: work.msr,
            samples: (timed::SAMPLES + self.index * timed::SAMPLES_SIZE) as u64,
            peer: (PARAMS + peer * PAGE) as u64,
            peer_id: peer as u32,
            ..Words::default()
        };
        // SAFETY: Mapped and aligned, and the page belongs to this vCPU, which does not run now.
        unsafe { memory.words(self.index).write_volatile(words) };
        self.fd.set_regs(&kvm_regs {
            rip: timed::CODE as u64,
            rsp: (page + PAGE) as u64,
            r15: page as u64,
            rflags: 2,
            ..Default::default()
        })?;
        Ok(())
    }

    /// How many ticks the guest's TSC has in a ms.
    pub fn tsc_khz(&self) -> Result<u32> {
        self.fd.get_tsc_khz().context("KVM_GET_TSC_KHZ")
    }

    /// Makes what the guest needs to have a guest.
    fn prepare_nested(&mut self, intercepts_hlt: bool) -> Result<()> {
        let cpuid = self.vm.cpuid();
        let has = |function, ecx| {
            let mut leaves = cpuid.as_slice().iter();
            leaves.any(|leaf| leaf.function == function && leaf.ecx & ecx != 0)
        };
        let vendor = if has(0x8000_0001, CPUID8_1_ECX_SVM) {
            Vendor::Svm
        } else if has(1, CPUID1_ECX_VMX) {
            self.write_msr(MSR_IA32_FEAT_CTL, FEAT_CTL_VMX)?;
            Vendor::Vmx
        } else {
            bail!("KVM has neither VMX nor SVM for its guests");
        };
        let sregs = self.fd.get_sregs()?;
        let pages = nested_pages(self.index);
        let setup = nested::Setup {
            vendor,
            intercepts_hlt,
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            gdt: (sregs.gdt.base, sregs.gdt.limit),
            idt: (sregs.idt.base, sregs.idt.limit),
            code: NESTED_CODE as u64,
            params: (PARAMS + self.index * PAGE) as u64,
            pages: pages as u64,
        };
        let words = setup.words(|msr| self.read_msr(msr))?;
        let memory = &self.vm.memory;
        memory.write(pages, &[0; nested::PAGES * PAGE]);
        for (offset, word) in words {
            memory.write_u64(pages + offset, word);
        }
        Ok(())
    }

    fn read_msr(&self, index: u32) -> Result<u64> {
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
            index,
            ..Default::default()
        }])?;
        let done = self.fd.get_msrs(&mut msrs)?;
        ensure!(done == 1, "KVM_GET_MSRS of {index:#x}");
        Ok(msrs.as_slice()[0].data)
    }

    fn write_msr(&self, index: u32, data: u64) -> Result<()> {
        let msrs = Msrs::from_entries(&[kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }])?;
        let done = self.fd.set_msrs(&msrs)?;
        ensure!(done == 1, "KVM_SET_MSRS of {index:#x}");
        Ok(())
    }

    /// KVM_RUN of what was prepared, to its end, and nothing else.
    pub fn enter(&mut self) -> Result<()> {
        self.run_until_done(&AtomicBool::new(false)).map(drop)
    }

    /// Runs what the vCPU was at, as [`Vcpu::run`] does.
    pub fn go_on(&mut self, give_up: &AtomicBool) -> Result<Report> {
        let before = stats::Exits::of(self.fd.as_raw_fd())?;
        let end = self.run_until_done(give_up)?;
        let after = stats::Exits::of(self.fd.as_raw_fd())?;
        // SAFETY: The page belongs to this vCPU, which does not run now.
        let result = unsafe { self.vm.memory.params(self.index).read_volatile() };
        Ok(Report {
            executed: result.executed,
            gp: result.gp,
            ud: result.ud,
            interrupts: result.interrupts,
            nmis: result.nmis,
            exceptions: result.exceptions,
            by_sipi: matches!(end, End::Done(DONE_BY_SIPI)),
            pv_unhalt: result.kvm_features & KVM_FEATURE_PV_UNHALT != 0,
            halt_exits: after.halt - before.halt,
            exits: after.all - before.all,
            stuck_at: match end {
                End::Done(_) => None,
                End::GivenUp(rip) => Some(rip),
            },
        })
    }

    /// Does something to the vCPU, which does not run now.
    pub fn act(&mut self, action: Action) -> Result<()> {
        match action {
            Action::SetCpuid => self.fd.set_cpuid2(&self.vm.cpuid()).map_err(from_kvm)?,
            Action::SetRunnable => self.set_runnable()?,
            Action::Nmi => self.fd.nmi().map_err(from_kvm)?,
            Action::Smi => self.fd.smi().map_err(from_kvm)?,
            Action::Interrupt => {
                let interrupt = kvm_bindings::kvm_interrupt {
                    irq: TIMER_VECTOR as u32,
                };
                // SAFETY: The command reads such a structure.
                unsafe { kvm_interrupt(self.fd.as_raw_fd(), &interrupt) }?;
            }
            Action::InjectException => {
                let mut events = self.fd.get_vcpu_events()?;
                events.exception.injected = 1;
                events.exception.nr = DE_VECTOR as u8;
                events.exception.has_error_code = 0;
                self.fd.set_vcpu_events(&events).map_err(from_kvm)?;
            }
            Action::Reset => {
                let fresh = self.fresh.clone().context("the vCPU was never fresh")?;
                self.put(&fresh)?;
                (self.has_cpuid, self.ready) = (false, false);
            }
            Action::InitAndSipi => {
                let mut events = self.fd.get_vcpu_events()?;
                events.flags |= KVM_VCPUEVENT_VALID_SMM | KVM_VCPUEVENT_VALID_SIPI_VECTOR;
                events.smi.latched_init = 1;
                events.sipi_vector = SIPI_PAGE as u32;
                self.fd.set_vcpu_events(&events).map_err(from_kvm)?;
                self.set_mp_state(KVM_MP_STATE_SIPI_RECEIVED)?;
            }
        }
        Ok(())
    }

    /// What the vCPU is at, for [`Vcpu::restore`].
    pub fn save(&mut self) -> Result<State> {
        Ok(State {
            regs: self.fd.get_regs()?,
            sregs: self.fd.get_sregs()?,
            lapic: self.fd.get_lapic()?,
            events: self.fd.get_vcpu_events()?,
            mp_state: self.fd.get_mp_state()?,
        })
    }

    /// Where the guest is, and what it could be woken by, for people.
    pub fn describe(&mut self) -> Result<String> {
        let State {
            regs,
            lapic,
            events,
            mp_state,
            ..
        } = self.save()?;
        let apic = |at: usize| {
            let bytes: Vec<u8> = lapic.regs[at..at + 4].iter().map(|c| *c as u8).collect();
            u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        };
        let vectors = |at: usize| -> Vec<u32> {
            let set = |vector: &u32| {
                apic(at + (*vector as usize / 32) * 0x10) & (1 << (vector % 32)) != 0
            };
            (0..256).filter(set).collect()
        };
        // What it has just executed, and what comes next; the guest's addresses are physical ones.
        let mut code = [0; 4];
        let at = regs.rip.saturating_sub(2);
        let read = self.vm.memory.file.read_at(&mut code, at);
        let code = match read {
            Ok(_) => format!("from {at:#x} on {code:02x?}"),
            Err(_) => "outside of its memory".into(),
        };
        Ok(format!(
            "rip {:#x} ({code}), rflags {:#x}, shadow {}, injected {} of {}, {mp_state:?}, \
             requested {:?}, in service {:?}, timer {:#x} at {} of {}",
            regs.rip,
            regs.rflags,
            events.interrupt.shadow,
            events.interrupt.injected,
            events.interrupt.nr,
            vectors(0x200),
            vectors(0x100),
            apic(0x320),
            apic(0x390),
            apic(0x380),
        ))
    }

    /// Makes the vCPU go on where another one was. Their ids must be the same, and the memory.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        self.set_up_once()?;
        self.put(state)
    }

    fn put(&mut self, state: &State) -> Result<()> {
        self.fd.set_sregs(&state.sregs)?;
        self.fd.set_regs(&state.regs)?;
        self.fd.set_lapic(&state.lapic)?;
        self.fd.set_vcpu_events(&state.events)?;
        self.fd.set_mp_state(state.mp_state)?;
        Ok(())
    }

    fn set_up_once(&mut self) -> Result<()> {
        if !self.has_cpuid {
            self.set_cpuid(&self.vm.cpuid())?;
        }
        if !self.ready {
            self.set_up().context("cannot set up the vCPU")?;
            self.ready = true;
        }
        Ok(())
    }

    /// Executions so far. Another thread may be running the vCPU.
    pub fn progress(vm: &Vm, index: usize) -> u32 {
        // SAFETY: Mapped, aligned, and only ever written by the guest or by `run`.
        unsafe { (&raw const (*vm.memory.params(index)).executed).read_volatile() }
    }

    /// Asks a guest that another thread runs to end its run. To be repeated until it does: a run
    /// that begins forgets it.
    pub fn ask_to_stop(vm: &Vm, index: usize) {
        // SAFETY: Mapped and aligned; nobody else but `run` writes it.
        unsafe { (&raw mut (*vm.memory.params(index)).stop).write_volatile(1) };
    }

    fn run_until_done(&mut self, give_up: &AtomicBool) -> Result<End> {
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoOut(DONE_PORT, &[by @ (DONE | DONE_BY_SIPI)])) => {
                    return Ok(End::Done(by));
                }
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    bail!(
                        "the guest left KVM by {exit} at {:#x}",
                        self.fd.get_regs()?.rip
                    );
                }
                Err(error) if error.errno() == libc::EINTR => {
                    if give_up.load(Ordering::Acquire) {
                        return Ok(End::GivenUp(self.fd.get_regs()?.rip));
                    }
                }
                Err(error) => return Err(from_kvm(error)).context("KVM_RUN"),
            }
        }
    }

    /// Remembers what KVM_CREATE_VCPU has left, for [`Action::Reset`], unless that was done before.
    pub fn keep_fresh(&mut self) -> Result<()> {
        if self.fresh.is_none() && self.vm.irqchip != Irqchip::None {
            self.fresh = Some(self.save()?);
        }
        Ok(())
    }

    /// KVM_SET_CPUID2 and nothing else, in place of the one of who prepares the vCPU.
    pub fn set_cpuid(&mut self, cpuid: &CpuId) -> Result<()> {
        self.fd.set_cpuid2(cpuid).context("KVM_SET_CPUID2")?;
        self.has_cpuid = true;
        Ok(())
    }

    /// Long mode.
    fn set_up(&mut self) -> Result<()> {
        let segment = |selector: u16, type_: u8, long: bool| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            s: 1,
            l: long.into(),
            db: (!long).into(),
            g: 1,
            ..Default::default()
        };
        let mut sregs = self.fd.get_sregs()?;
        sregs.cs = segment(8, 0xb, true);
        let data = segment(16, 0x3, false);
        sregs.ds = data;
        sregs.es = data;
        sregs.fs = data;
        sregs.gs = data;
        sregs.ss = data;
        sregs.gdt.base = GDT as u64;
        sregs.gdt.limit = 3 * 8 - 1;
        sregs.idt.base = IDT as u64;
        sregs.idt.limit = 256 * 16 - 1;
        sregs.cr3 = PML4 as u64;
        sregs.cr4 = 1 << 5; // PAE
        sregs.cr0 = (1 << 31) | (1 << 5) | 1; // PG, NE, PE
        sregs.efer = (1 << 10) | (1 << 8); // LMA, LME

        // x2APIC mode, so that arming the timer is a WRMSR and no instruction for KVM to emulate.
        if self.vm.irqchip != Irqchip::None {
            sregs.apic_base |= 0xc00;
        }
        self.fd.set_sregs(&sregs).context("KVM_SET_SREGS")?;

        // A vCPU with another index than 0 waits for INIT and SIPI.
        self.set_runnable()
    }

    fn set_runnable(&mut self) -> Result<()> {
        self.set_mp_state(KVM_MP_STATE_RUNNABLE)
    }

    fn set_mp_state(&mut self, mp_state: u32) -> Result<()> {
        self.fd
            .set_mp_state(kvm_mp_state { mp_state })
            .context("KVM_SET_MP_STATE")
    }
}

/// How KVM_RUN ended.
enum End {
    /// By the guest, with what it wrote to the port.
    Done(u8),
    /// By a signal, with the guest's RIP.
    GivenUp(u64),
}

/// Page tables, descriptor tables and code.
fn build_guest(memory: &Memory) {
    memory.write_u64(PML4, PDPT as u64 | 3);
    memory.write_u64(PDPT, PD as u64 | 3);
    memory.write_u64(PD, 0x83); // present, writable, large
    memory.write_u64(GDT + 8, 0x00af_9b00_0000_ffff); // 64-bit code
    memory.write_u64(GDT + 16, 0x00cf_9300_0000_ffff); // data
    let code = payload::code();
    memory.write(CODE, code.bytes);
    memory.write(SIPI_PAGE * PAGE, code.sipi);
    // In 16-bit mode: inc word ptr [SMIS]; 1: cmp word ptr [SMM_GATE], 0; jne 1b; rsm.
    let [smis, gate] = [SMIS, SMM_GATE].map(|at| (at as u16).to_le_bytes());
    let mut smi = vec![0xff, 0x06, smis[0], smis[1]];
    smi.extend([0x83, 0x3e, gate[0], gate[1], 0x00, 0x75, 0xf9, 0x0f, 0xaa]);
    memory.write(SMM, &smi);
    memory.write(NESTED_CODE, nested::code());
    let (timed, handler) = timed::code();
    memory.write(timed::CODE, timed);
    let handlers = code
        .handlers
        .map(|(vector, offset)| (vector, CODE + offset));
    let timed = (timed::VECTOR, timed::CODE + handler);
    for (vector, handler) in handlers.into_iter().chain([timed]) {
        let handler = handler as u64;
        let gate = (handler & 0xffff) | (8 << 16) | (0x8e00 << 32) | ((handler >> 16) << 48);
        memory.write_u64(IDT + vector * 16, gate);
        memory.write_u64(IDT + vector * 16 + 8, 0);
    }
}

/// Fails unless the guest did all that it was asked to.
pub fn ensure_complete(work: Work, report: &Report) -> Result<()> {
    ensure!(
        report.executed == work.count && report.stuck_at.is_none(),
        "the guest executed {} of {} ({:?}), stuck at {:x?}",
        report.executed,
        work.count,
        work.payload,
        report.stuck_at,
    );
    Ok(())
}
