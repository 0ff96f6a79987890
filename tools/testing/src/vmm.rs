// SPDX-License-Identifier: GPL-2.0

//! A VMM that is small and yet a real one: KVM with its in-kernel interrupt controllers, and vCPUs
//! in long mode that run a [`Payload`].
//!
//! The interrupt controllers are no luxury: on Intel, a vCPU that halts natively wakes only by an
//! interrupt, so the guests need a LAPIC whose timer sends one.

use std::{
    io,
    num::NonZero,
    os::fd::{
        AsRawFd,
        RawFd, //
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
    kvm_mp_state,
    kvm_regs,
    kvm_segment,
    kvm_userspace_memory_region,
    CpuId,
    KVM_CAP_X86_DISABLE_EXITS,
    KVM_MAX_CPUID_ENTRIES,
    KVM_MP_STATE_RUNNABLE, //
};
use kvm_ioctls::{
    Kvm,
    VcpuExit,
    VcpuFd,
    VmFd, //
};
use nix::sys::mman::{
    mmap_anonymous,
    munmap,
    MapFlags,
    ProtFlags, //
};
use serde::{
    Deserialize,
    Serialize, //
};

use crate::{
    payload::{
        self,
        Params,
        Payload,
        DONE_PORT, //
    },
    stats, //
};

/// The size of a guest's memory: the one large page that its page tables map.
const MEMORY: usize = 2 << 20;
const GDT: usize = 0x1000;
const IDT: usize = 0x2000;
const PML4: usize = 0x3000;
const PDPT: usize = 0x4000;
const PD: usize = 0x5000;
const CODE: usize = 0x8000;
/// One page for each vCPU.
const PARAMS: usize = 0x10000;
const PAGE: usize = 0x1000;
/// Where VMX on CPUs without unrestricted guests puts three pages of its own.
const TSS: usize = 0xfffb_d000;

/// CPUID leaf 1 ECX: MONITOR and MWAIT.
const CPUID1_ECX_MWAIT: u32 = 1 << 3;
/// CPUID leaf 6 ECX: APERF and MPERF.
const CPUID6_ECX_APERFMPERF: u32 = 1 << 0;
/// KVM_CPUID_FEATURES EAX: KVM_FEATURE_PV_UNHALT.
const KVM_FEATURE_PV_UNHALT: u32 = 1 << 7;

/// What a guest does in one run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Work {
    pub payload: Payload,
    /// How many executions.
    pub count: u32,
    /// Nanoseconds until the guest's timer ends a HLT or MWAIT.
    pub ticks: u32,
}

impl Work {
    /// `count` executions, with a timer that is slow enough for the vCPU to go to sleep.
    pub fn new(payload: Payload, count: u32) -> Self {
        Self {
            payload,
            count,
            ticks: 50_000,
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
    /// Whether the guest's CPUID has KVM_FEATURE_PV_UNHALT.
    pub pv_unhalt: bool,
    /// By how much KVM's `halt_exits` of this vCPU grew.
    pub halt_exits: u64,
    /// Where the guest was when it was given up.
    pub stuck_at: Option<u64>,
}

/// The memory of a guest.
struct Memory {
    address: NonNull<u8>,
}

// SAFETY: The mapping belongs to the value, not to a thread.
unsafe impl Send for Memory {}
// SAFETY: All access goes through raw pointers, to parts that only one vCPU's thread uses once the
// VM is built, but for counters that are read volatile.
unsafe impl Sync for Memory {}

impl Memory {
    fn new() -> Result<Self> {
        let length = NonZero::new(MEMORY).context("no memory asked for")?;
        // SAFETY: A new anonymous mapping, at an address that the kernel chooses.
        let address = unsafe {
            mmap_anonymous(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )
        }?;
        Ok(Self {
            address: address.cast(),
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
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: Ours alone since `new`. KVM's slot goes with the VM, whose file is closed first.
        let _ = unsafe { munmap(self.address.cast(), MEMORY) };
    }
}

/// A VM.
pub struct Vm {
    // Dropped first, as KVM uses the memory.
    fd: VmFd,
    memory: Memory,
    cpuid: CpuId,
}

impl Vm {
    /// KVM_CREATE_VM, the interrupt controllers and the memory; nothing that KVM does only before
    /// the first vCPU is left undone but KVM_ENABLE_CAP.
    pub fn new() -> Result<Self> {
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let fd = kvm.create_vm().context("KVM_CREATE_VM")?;
        fd.set_tss_address(TSS).context("KVM_SET_TSS_ADDR")?;
        fd.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        let memory = Memory::new()?;
        build_guest(&memory);
        // SAFETY: `memory` is mapped for as long as `fd` is open.
        unsafe {
            fd.set_user_memory_region(kvm_userspace_memory_region {
                slot: 0,
                flags: 0,
                guest_phys_addr: 0,
                memory_size: MEMORY as u64,
                userspace_addr: memory.address.as_ptr().addr() as u64,
            })
        }
        .context("KVM_SET_USER_MEMORY_REGION")?;
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
        Ok(Self { fd, memory, cpuid })
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
            ready: false,
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
    ready: bool,
}

impl Vcpu {
    /// Runs `work` to its end, or until the guest is asked to stop, or until `give_up` is set and a
    /// signal comes.
    pub fn run(&mut self, work: Work, give_up: &AtomicBool) -> Result<Report> {
        if !self.ready {
            self.set_up().context("cannot set up the vCPU")?;
            self.ready = true;
        }
        let params = self.vm.memory.params(self.index);
        // SAFETY: The page belongs to this vCPU, which does not run now.
        unsafe {
            params.write_volatile(Params {
                payload: work.payload as u32,
                count: work.count,
                ticks: work.ticks,
                ..Params::default()
            })
        };
        let page = (PARAMS + self.index * PAGE) as u64;
        self.fd.set_regs(&kvm_regs {
            rip: CODE as u64,
            rsp: page + PAGE as u64,
            r15: page,
            rflags: 2,
            ..Default::default()
        })?;
        let before = stats::halt_exits(self.fd.as_raw_fd())?;
        let stuck_at = self.run_until_done(give_up)?;
        let halt_exits = stats::halt_exits(self.fd.as_raw_fd())? - before;
        // SAFETY: As above.
        let result = unsafe { params.read_volatile() };
        Ok(Report {
            executed: result.executed,
            gp: result.gp,
            ud: result.ud,
            interrupts: result.interrupts,
            pv_unhalt: result.kvm_features & KVM_FEATURE_PV_UNHALT != 0,
            halt_exits,
            stuck_at,
        })
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

    fn run_until_done(&mut self, give_up: &AtomicBool) -> Result<Option<u64>> {
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoOut(DONE_PORT, _)) => return Ok(None),
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    let regs = self.fd.get_regs()?;
                    bail!("the guest left KVM by {exit} at {:#x}", regs.rip);
                }
                Err(error) if error.errno() == libc::EINTR => {
                    if give_up.load(Ordering::Acquire) {
                        return Ok(Some(self.fd.get_regs()?.rip));
                    }
                }
                Err(error) => return Err(from_kvm(error)).context("KVM_RUN"),
            }
        }
    }

    /// CPUID and long mode.
    fn set_up(&mut self) -> Result<()> {
        self.fd
            .set_cpuid2(&self.vm.cpuid)
            .context("KVM_SET_CPUID2")?;
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
        sregs.apic_base |= 0xc00;
        self.fd.set_sregs(&sregs).context("KVM_SET_SREGS")?;

        // A vCPU with another index than 0 waits for INIT and SIPI.
        self.fd
            .set_mp_state(kvm_mp_state {
                mp_state: KVM_MP_STATE_RUNNABLE,
            })
            .context("KVM_SET_MP_STATE")?;
        Ok(())
    }
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
    for (vector, offset) in code.handlers {
        let handler = (CODE + offset) as u64;
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
