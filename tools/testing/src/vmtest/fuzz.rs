// SPDX-License-Identifier: GPL-2.0

//! Hostile input: what [`testing::fuzz`] makes up is done to the module, by root, by nobody, and by
//! root of a user namespace, while a VM runs.

use std::{
    collections::{
        BTreeMap,
        BTreeSet, //
    },
    fs::{
        self,
        File,
        OpenOptions, //
    },
    io::{
        self,
        Read,
        Seek,
        Write, //
    },
    num::NonZeroUsize,
    os::{
        fd::AsRawFd,
        unix::fs::{
            chown,
            FileExt,
            OpenOptionsExt, //
        },
    },
    path::{
        Path,
        PathBuf, //
    },
    process::{
        Command,
        Stdio, //
    },
    ptr,
    sync::atomic::{
        AtomicBool,
        AtomicU8,
        Ordering, //
    },
    thread,
    time::{
        Duration,
        Instant, //
    },
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::{
    Exits,
    Policy,
    Resolved, //
};
use nix::{
    sched::{
        unshare,
        CloneFlags, //
    },
    sys::{
        memfd::{
            memfd_create,
            MFdFlags, //
        },
        mman::{
            mmap,
            mmap_anonymous,
            mprotect,
            MapFlags,
            ProtFlags, //
        },
        prctl, //
    },
    unistd::{
        setgid,
        setgroups,
        setuid,
        Gid,
        Uid, //
    },
};
use rand::{
    rngs::OsRng,
    Rng,
    TryRngCore, //
};
use testing::{
    cgroup::{
        self,
        Cgroup,
        CGROUP2,
        V1, //
    },
    client::{
        Thread,
        Vmm, //
    },
    exits::Vendor,
    fuzz::{
        self,
        Access,
        Call,
        CgroupId,
        FileOp,
        Handle,
        Meaning,
        Place,
        Random,
        Tally,
        VmId,
        CGROUPS,
        PAGE, //
    },
    interface::{
        self,
        sysfs,
        Snapshot,
        SYSFS, //
    },
    modules::{
        self,
        EXITPOLICY, //
    },
    payload::Payload,
    soon,
    uapi::{
        self,
        Device, //
    },
    vmm::Work, //
};

use crate::{
    child::{
        leave_chroot,
        Running, //
    },
    churn::CHURN,
    is_slow_host,
    matrix::{
        floor,
        supported, //
    },
    Test, //
};

/// Repeats what this seed makes up.
const SEED: &str = "EXITPOLICY_FUZZ_SEED";
/// Goes on, with one seed after the other, until so many seconds are over.
const SECONDS: &str = "EXITPOLICY_FUZZ_SECONDS";

/// Nobody.
const NOBODY: u32 = 65534;
/// Who owns the cgroup that is delegated, and is root of a user namespace.
const DELEGATE: u32 = 100_000;

/// How long a vCPU halts, in ns. Not as short as elsewhere: the CPUs are there for who calls.
const TICKS: u32 = 2_000_000;

/// An fd that nobody has open.
const CLOSED: i32 = 1000;

/// The cgroups that come and go. The last one is the delegate's.
const COMING: [&str; CGROUPS] = [
    "/fuzz/a",
    "/fuzz/a/b",
    "/fuzz/a/b/c",
    "/fuzz/d",
    "/fuzz/d/e",
    "/fuzz/delegated/x",
];
const VMM: &str = "/fuzz/vmm";
const THREADS: &str = "/fuzz/threads";
const THREADED: &str = "/fuzz/threads/threaded";
const DELEGATED: &str = "/fuzz/delegated";

/// What `attach` and `detach` are told.
const PATHS: [&str; CGROUPS + 6] = [
    COMING[0], COMING[1], COMING[2], COMING[3], COMING[4], COMING[5], VMM, THREADS, THREADED,
    DELEGATED, "/", "/nowhere",
];

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    // On the amd host, a minute for the three.
    let share = if is_slow_host()? { 20 } else { 1 };
    Ok(vec![
        Test::new("fuzz::model", move || {
            rounds("model", |seed, tally| {
                model(vendor, seed, 6_000 / share, tally)
            })
        }),
        Test::new("fuzz::unprivileged", move || {
            rounds("unprivileged", |seed, tally| {
                unprivileged(vendor, seed, 10_000 / share, tally)
            })
        }),
        Test::new("fuzz::everybody", move || {
            rounds("everybody", |seed, tally| {
                everybody(vendor, seed, 3_000 / share, tally)
            })
        }),
    ])
}

/// One round, or as many as there is time for.
fn rounds(name: &str, mut round: impl FnMut(u64, &mut Tally) -> Result<()>) -> Result<()> {
    let number = |variable: &str| -> Result<Option<u64>> {
        std::env::var(variable)
            .ok()
            .map(|value| value.parse().with_context(|| format!("{variable}={value}")))
            .transpose()
    };
    let mut seed = match number(SEED)? {
        Some(seed) => seed,
        // Short enough to be written down.
        None => OsRng.unwrap_err().random::<u32>().into(),
    };
    let end = number(SECONDS)?.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut all = Tally::default();
    loop {
        println!("fuzz::{name}: {SEED}={seed}");
        let mut tally = Tally::default();
        round(seed, &mut tally)
            .with_context(|| format!("{SEED}={seed} does this again: fuzz::{name}"))?;
        println!("fuzz::{name}: {} operations", tally.total());
        all.add(&tally);
        if end.is_none_or(|end| Instant::now() >= end) {
            break;
        }
        seed += 1;
    }
    println!("fuzz::{name}: {} operations in all:\n{all}", all.total());
    Ok(())
}

fn directory(path: &str) -> PathBuf {
    Path::new(CGROUP2).join(path.trim_start_matches('/'))
}

// --- what there is ------------------------------------------------------------

/// What everybody works on, and can name.
struct Field {
    device: Device,
    vmm: Vmm,
    vcpus: [Thread; 2],
    /// What the module calls the VM, and one that has ended.
    vm: u64,
    gone: u64,
    /// What its VMM asked for.
    requested: Exits,
    root: File,
    vmm_cgroup: File,
    threaded: File,
    removed: File,
    file: File,
    v1_directory: File,
    sysfs: File,
    program: File,
    _v1: V1,
    _leftovers: Leftovers,
    _cgroups: Vec<Cgroup>,
}

/// What a run leaves behind, wherever it ends: the cgroups below could not be removed, and the next
/// test would find what it did not make. Dropped when the VMM is gone.
struct Leftovers;

impl Drop for Leftovers {
    fn drop(&mut self) {
        // Most of it is not there, or there is no module to tell.
        for path in PATHS {
            let _ = fs::write(Path::new(SYSFS).join("detach"), path);
        }
        let _ = fs::write(Path::new(SYSFS).join("enabled"), "1");
        for path in COMING.iter().rev() {
            let _ = soon(|| {
                let removed = fs::remove_dir(directory(path));
                Ok(removed.is_ok() || !directory(path).exists())
            });
        }
    }
}

impl Field {
    fn new(vendor: Vendor, random: &mut Random) -> Result<Self> {
        let fuzz = Cgroup::new("fuzz")?;
        let home = fuzz.child("vmm")?;
        let threads = fuzz.child("threads")?;
        let threaded = threads.child("threaded")?;
        threaded.make_threaded()?;
        let delegated = fuzz.child("delegated")?;
        for file in [
            "",
            "cgroup.procs",
            "cgroup.threads",
            "cgroup.subtree_control",
        ] {
            let path = delegated.directory().join(file);
            chown(&path, Some(DELEGATE), Some(DELEGATE)).with_context(|| format!("{path:?}"))?;
        }
        let removed = fuzz.child("removed")?;
        let removed_directory = removed.open()?;
        removed.remove()?;

        let device = Device::open()?;
        let mut vmm = Vmm::start(&home)?;
        let vm = vmm.create_vm()?;
        vmm.create_vcpu(vm, 0)?;
        let gone = device.vms()?.first().context("no VM")?.id;
        vmm.kill()?;
        interface::ensure_no_vms()?;

        let changeable = supported(vendor)? & !floor(vendor)?;
        let requested = Exits::from_bits_truncate(random.random()) & changeable;
        let mut vmm = Vmm::start(&home)?;
        let vm = vmm.create_vm()?;
        if !requested.is_empty() {
            vmm.disable_exits(vm, requested)?;
        }
        // So that "hlt" is refused nowhere.
        vmm.hide_pv_unhalt(vm)?;
        let vcpus = [vmm.create_vcpu(vm, 0)?, vmm.create_vcpu(vm, 1)?];
        for vcpu in vcpus {
            vmm.start_run(
                vcpu,
                Work {
                    ticks: TICKS,
                    ..Work::new(Payload::Hlt, u32::MAX)
                },
            )?;
        }
        let vm = interface::only_vm()?.id;

        let v1 = V1::mount("fuzz")?;
        Ok(Self {
            vmm,
            vcpus,
            vm,
            gone,
            requested,
            root: cgroup::root()?,
            vmm_cgroup: home.open()?,
            threaded: threaded.open()?,
            removed: removed_directory,
            // Open all the time: the kernel must not look for names in it.
            file: File::open(home.directory().join("cgroup.procs"))?,
            v1_directory: File::open(v1.directory())?,
            sysfs: File::open(SYSFS)?,
            program: File::open("/proc/self/exe")?,
            device,
            _v1: v1,
            _leftovers: Leftovers,
            // Children first.
            _cgroups: vec![delegated, threaded, threads, home, fuzz],
        })
    }

    /// An fd, and the file that it is of if it is for this once.
    fn handle(&self, handle: Handle) -> (Option<File>, i32) {
        let open = |cgroup: usize, flags| {
            let mut options = OpenOptions::new();
            let options = options.read(true).custom_flags(flags);
            match options.open(directory(COMING[cgroup])) {
                Ok(file) => {
                    let fd = file.as_raw_fd();
                    (Some(file), fd)
                }
                Err(_) => (None, CLOSED),
            }
        };
        let kept = |file: &File| (None, file.as_raw_fd());
        match handle {
            Handle::Cgroup(cgroup) => open(cgroup, libc::O_DIRECTORY),
            Handle::Path(cgroup) => open(cgroup, libc::O_DIRECTORY | libc::O_PATH),
            Handle::Root => kept(&self.root),
            Handle::Vmm => kept(&self.vmm_cgroup),
            Handle::Threaded => kept(&self.threaded),
            Handle::Removed => kept(&self.removed),
            Handle::File => kept(&self.file),
            Handle::V1 => kept(&self.v1_directory),
            Handle::Sysfs => kept(&self.sysfs),
            Handle::Device => kept(&self.device.0),
            Handle::Program => kept(&self.program),
            Handle::Closed => (None, CLOSED),
            Handle::Number(number) => (None, number),
        }
    }

    fn vm_id(&self, vm: VmId) -> u64 {
        match vm {
            VmId::Running => self.vm,
            VmId::Gone => self.gone,
            VmId::Number(number) => number,
        }
    }

    /// The id of a cgroup now, or one that no cgroup has.
    fn cgroup_id(&self, cgroup: CgroupId) -> u64 {
        let of = |path: &str| cgroup::id(&directory(path)).unwrap_or(1 << 40);
        match cgroup {
            CgroupId::Of(cgroup) => of(COMING[cgroup]),
            CgroupId::Before(cgroup) => of(COMING[cgroup]) - 1,
            CgroupId::Root => of("/"),
            CgroupId::Vmm => of(VMM),
            CgroupId::Number(number) => number,
        }
    }

    /// Puts in what a call names. What comes back is to live as long as the call.
    fn fill_in(&self, call: &mut Call) -> Option<File> {
        if let Some(vm) = call.vm {
            call.set_vm(self.vm_id(vm));
        }
        if let Some(cgroup) = call.after {
            call.set_after(self.cgroup_id(cgroup));
        }
        let (file, fd) = self.handle(call.cgroup?);
        call.set_cgroup(fd);
        file
    }

    fn path(&self, file: &fuzz::File) -> PathBuf {
        let top = Path::new(SYSFS);
        match file {
            fuzz::File::Top(name) => top.join(name),
            fuzz::File::Policy(cgroup, name) => {
                let id = self.cgroup_id(*cgroup).to_string();
                top.join("cgroups").join(id).join(name)
            }
            fuzz::File::Vm(vm, name) => sysfs::vm_directory(self.vm_id(*vm)).join(name),
            fuzz::File::Vcpu(vm, vcpu, name) => sysfs::vm_directory(self.vm_id(*vm))
                .join(format!("vcpu{vcpu}"))
                .join(name),
        }
    }

    /// Fails if a vCPU has come to an end, which none should, and says how.
    fn ensure_running(&mut self) -> Result<()> {
        for vcpu in self.vcpus {
            if self.vmm.ended(vcpu)? {
                let report = self.vmm.wait(vcpu)?;
                bail!("the guest has ended: {report:?}");
            }
        }
        Ok(())
    }

    /// Fails unless both vCPUs go on.
    fn ensure_progress(&mut self) -> Result<()> {
        self.ensure_running()?;
        for vcpu in self.vcpus {
            let before = self.vmm.progress(vcpu)?;
            let vmm = &mut self.vmm;
            ensure!(
                soon(|| Ok(vmm.progress(vcpu)? > before + 2))?,
                "a vCPU is stuck: {:?}",
                interface::ioctl::vms()?
            );
        }
        Ok(())
    }

    /// Everything back, and the module out of the kernel and in again: nothing is left of it, and
    /// the guest does not notice.
    fn end(mut self) -> Result<()> {
        self.ensure_progress().context("after all that")?;
        interface::only_vm().context("after all that")?;
        interface::drain()?;
        // A cgroup that goes takes its policy along, and these go when the module is away.
        for path in PATHS {
            let _ = fs::write(Path::new(SYSFS).join("detach"), path);
        }
        // They are what holds the module; a device that nobody can use takes their place.
        let nothing = File::open("/dev/null")?;
        self.device = Device(nothing.try_clone()?);
        self.sysfs = nothing;
        ensure!(
            soon(|| Ok(modules::unload(EXITPOLICY).is_ok()))?,
            "the module cannot be unloaded"
        );
        for path in [uapi::DEVICE, SYSFS] {
            ensure!(!Path::new(path).exists(), "{path} is left");
        }
        modules::load(EXITPOLICY)?;
        interface::only_vm().context("loaded again")?;
        self.vmm.kill()
    }
}

/// A wish that fails now and then is of no interest: who makes and removes cgroups at once gets in
/// each other's way.
fn try_to_change_cgroups(random: &mut Random, vmm: Option<i32>) {
    let path = directory(COMING[random.random_range(0..CGROUPS)]);
    let _ = match random.random_range(0..3) {
        0 => fs::remove_dir(path),
        1 => fs::create_dir(path),
        _ => match vmm {
            Some(pid) if random.random_ratio(1, 4) => {
                let home = directory(VMM);
                let path = if random.random() { home } else { path };
                fs::write(path.join("cgroup.procs"), pid.to_string())
            }
            _ => fs::create_dir(path),
        },
    };
}

// --- one operation ------------------------------------------------------------

/// What is around an argument. All of it is compared, after each call.
const GUARDS: [u8; 2 * PAGE] = [0x5a; 2 * PAGE];

/// Memory for arguments: two pages, then one that is not there; and one that can only be read.
struct Memory {
    pages: *mut u8,
    read_only: *mut u8,
    /// The same memory, which here can be written.
    writable: *mut u8,
}

// SAFETY: The mappings are its own, and of the process, not of a thread.
unsafe impl Send for Memory {}

fn errno_of<T>(result: &io::Result<T>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(error) => error.raw_os_error().unwrap_or(-1),
    }
}

impl Memory {
    fn new() -> Result<Self> {
        let length = |pages: usize| NonZeroUsize::new(pages * PAGE).context("no length");
        let writable = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: New mappings, where the kernel chooses. They are never unmapped.
        unsafe {
            let pages = mmap_anonymous(None, length(3)?, writable, MapFlags::MAP_PRIVATE)?;
            mprotect(pages.byte_add(2 * PAGE), PAGE, ProtFlags::PROT_NONE)?;
            let shared = File::from(memfd_create("argument", MFdFlags::empty())?);
            shared.set_len(PAGE as u64)?;
            let map = |protection| {
                let length = NonZeroUsize::new(PAGE).expect("not zero");
                mmap(None, length, protection, MapFlags::MAP_SHARED, &shared, 0)
            };
            Ok(Self {
                pages: pages.as_ptr().cast(),
                read_only: map(ProtFlags::PROT_READ)?.as_ptr().cast(),
                writable: map(writable)?.as_ptr().cast(),
            })
        }
    }

    /// Makes a call, and returns what has become of the argument. Fails if memory was written that
    /// is not the module's to write.
    fn call(&self, device: &Device, call: &Call) -> Result<(io::Result<()>, Vec<u8>)> {
        let length = call.bytes.len();
        // Where it is, and how much of it lies in the pages.
        let (at, inside) = match call.place {
            Place::Good(offset) => (64 + offset, length),
            Place::AtEnd => (2 * PAGE - length, length),
            Place::Across(there) => (2 * PAGE - there, there),
            _ => (0, 0),
        };
        let address = match call.place {
            Place::Good(_) | Place::AtEnd | Place::Across(_) => self.pages.wrapping_add(at),
            Place::ReadOnly => self.read_only,
            Place::Unmapped => self.pages.wrapping_add(2 * PAGE),
            Place::Address(address) => ptr::without_provenance_mut(address),
        };
        // SAFETY: Both mappings are ours alone, and large enough: an argument is at most a page.
        // The kernel writes there during the call only.
        let (result, pages) = unsafe {
            ptr::copy_nonoverlapping(GUARDS.as_ptr(), self.pages, GUARDS.len());
            ptr::copy_nonoverlapping(call.bytes.as_ptr(), self.pages.add(at), inside);
            ptr::copy_nonoverlapping(call.bytes.as_ptr(), self.writable, length);
            let result = device.raw(call.command, address);
            let pages = std::slice::from_raw_parts(self.pages, 2 * PAGE);
            (result, pages)
        };
        let (before, rest) = pages.split_at(at);
        let (argument, behind) = rest.split_at(inside);
        ensure!(
            [before, behind].iter().all(|part| GUARDS.starts_with(part)),
            "memory outside of the argument was written"
        );
        // SAFETY: As above.
        let readable = unsafe { std::slice::from_raw_parts(self.read_only, length) };
        ensure!(
            readable == call.bytes,
            "memory was written that is read-only"
        );
        let known = if result.is_ok() { call.known() } else { 0 };
        ensure!(
            argument[known.min(inside)..] == call.bytes[known.min(inside)..inside],
            "what the module does not know was written, or by a call that failed"
        );
        if result.is_ok() {
            ensure!(
                argument[..8] == call.bytes[..8],
                "size or flags were written"
            );
        }
        Ok((result, argument.to_vec()))
    }
}

/// Fails unless a call may end like this. `dependent` is what may be wrong with the state.
fn ensure_allowed(
    call: &Call,
    errno: i32,
    privileged: bool,
    dependent: &BTreeSet<i32>,
) -> Result<()> {
    if !privileged {
        // Whatever is asked, and however wrongly.
        ensure!(
            errno == libc::EPERM,
            "errno {errno}: the caller is nobody to ask"
        );
        return Ok(());
    }
    let wrong = call.wrong();
    if errno == 0 {
        ensure!(wrong.is_empty(), "should have failed with one of {wrong:?}");
        return Ok(());
    }
    ensure!(
        wrong.contains(&errno) || dependent.contains(&errno),
        "errno {errno}, which should be one of {wrong:?}, {dependent:?}"
    );
    Ok(())
}

/// What came of an access: the errno or 0, how many bytes, and those that were read.
struct Accessed {
    errno: i32,
    length: usize,
    read: Vec<u8>,
}

fn access(field: &Field, access: &Access, inherited: Option<&File>) -> Accessed {
    let path = field.path(&access.file);
    let open = |options: &mut OpenOptions| match inherited {
        Some(file) => file.try_clone(),
        None => options.open(&path),
    };
    let (result, read) = match &access.op {
        FileOp::Read { offset, length } => {
            let mut read = vec![0; *length];
            let result = open(OpenOptions::new().read(true))
                .and_then(|file| file.read_at(&mut read, *offset));
            read.truncate(*result.as_ref().unwrap_or(&0));
            (result, read)
        }
        FileOp::Write { offset, text } => {
            let result = open(OpenOptions::new().write(true))
                .and_then(|file| file.write_at(&text.0, *offset));
            (result, Vec::new())
        }
    };
    Accessed {
        errno: errno_of(&result),
        length: result.unwrap_or(0),
        read,
    }
}

/// Fails unless an access may end like this, whatever the state.
fn ensure_access_allowed(it: &Access, came: &Accessed, dependent: &BTreeSet<i32>) -> Result<()> {
    let errno = came.errno;
    // What a file's mode and its being there say.
    let may = match it.op {
        FileOp::Read { .. } => it.file.is_readable(),
        FileOp::Write { .. } => it.file.is_writable(),
    };
    if !it.file.exists() || !may {
        let expected = if it.file.exists() {
            libc::EACCES
        } else {
            libc::ENOENT
        };
        ensure!(
            errno == expected || dependent.contains(&errno),
            "errno {errno}, should be {expected}"
        );
        return Ok(());
    }
    let FileOp::Write { text, .. } = &it.op else {
        ensure!(errno == 0 || dependent.contains(&errno), "errno {errno}");
        return Ok(());
    };
    let meaning = text.meaning(&it.file);
    match errno {
        0 => {
            ensure!(meaning != Meaning::Invalid, "should have failed");
            ensure!(came.length == text.0.len(), "took {} bytes", came.length);
        }
        libc::EINVAL => ensure!(
            meaning == Meaning::Invalid,
            "EINVAL of what means {meaning:?}"
        ),
        _ => ensure!(
            dependent.contains(&errno),
            "errno {errno} of what means {meaning:?}"
        ),
    }
    Ok(())
}

/// How operations are counted.
fn kind(it: &Access) -> String {
    let verb = match it.op {
        FileOp::Read { .. } => "read",
        FileOp::Write { .. } => "write",
    };
    format!("{verb} {}", it.file.name())
}

// --- root alone, and what it should see ---------------------------------------

/// What the module should say.
struct Model {
    enabled: bool,
    policies: BTreeMap<u64, Policy>,
    /// By their paths.
    cgroups: BTreeMap<String, u64>,
    supported: Exits,
    floor: Exits,
    requested: Exits,
    vm: u64,
    vmm_at: String,
    disable: Option<Exits>,
    vcpus: [Option<Exits>; 2],
    /// What the VM was last decided by, and whether overrides counted.
    applied: (Resolved, bool),
    missed: u64,
}

/// What a VM should have by the policies and overrides, and what was clamped.
struct Expected {
    vm: exitpolicy_policy::Decision,
    vcpus: [Exits; 2],
}

impl Model {
    fn new(field: &Field) -> Result<Self> {
        let info = field.device.info()?;
        let set = |bits| Exits::from_bits(bits).context("unknown exits");
        let mut cgroups = BTreeMap::new();
        for path in ["/", "/fuzz", VMM, THREADS, THREADED, DELEGATED] {
            cgroups.insert(path.to_string(), cgroup::id(&directory(path))?);
        }
        Ok(Self {
            enabled: true,
            policies: BTreeMap::new(),
            cgroups,
            supported: set(info.supported)?,
            floor: set(info.floor)?,
            requested: field.requested,
            vm: field.vm,
            vmm_at: VMM.to_string(),
            disable: None,
            vcpus: [None; 2],
            applied: (Resolved::UNRESTRICTED, true),
            missed: info.missed,
        })
    }

    /// A cgroup's domain and what is above it, by their ids.
    fn above(&self, path: &str) -> Vec<u64> {
        let domain = if path == THREADED { THREADS } else { path };
        Path::new(domain)
            .ancestors()
            .map(|path| self.cgroups[path.to_str().expect("from a string")])
            .collect()
    }

    fn resolve(&self, path: &str) -> Resolved {
        Resolved::from_nearest_to_root(
            self.above(path)
                .into_iter()
                .filter_map(|id| self.policies.get(&id).map(|policy| (id, *policy))),
        )
    }

    /// The VM is decided on again.
    fn decide(&mut self) {
        let resolved = if self.enabled {
            self.resolve(&self.vmm_at)
        } else {
            Resolved::UNRESTRICTED
        };
        self.applied = (resolved, self.enabled);
    }

    /// Policies of this cgroup have changed.
    fn changed(&mut self, cgroup: u64, new_only: bool) {
        if !new_only && self.above(&self.vmm_at).contains(&cgroup) {
            self.decide();
        }
    }

    fn expected(&self) -> Expected {
        let (resolved, overridable) = self.applied;
        let decide = |disable: Option<Exits>| {
            resolved.overridden(disable.filter(|_| overridable)).decide(
                self.floor,
                self.requested,
                self.supported,
            )
        };
        Expected {
            vm: decide(self.disable),
            vcpus: self
                .vcpus
                .map(|vcpu| decide(vcpu.or(self.disable)).effective),
        }
    }

    /// Fails unless the module says the same.
    fn compare(&self, device: &Device) -> Result<()> {
        let info = device.info()?;
        ensure!(
            (info.enabled == 1, info.policies, info.vms, info.missed)
                == (self.enabled, self.policies.len() as u64, 1, self.missed),
            "{info:?}"
        );
        let policies = device.policies()?;
        let same = policies
            .iter()
            .map(|it| (it.cgroup_id, it.disable, it.allow))
            .eq(self
                .policies
                .iter()
                .map(|(id, it)| (*id, it.disable.bits(), it.allow.bits())));
        ensure!(same, "{policies:?}, should be {:?}", self.policies);

        let expected = self.expected();
        let [vm]: [_; 1] = device.vms()?.try_into().expect("one");
        let disable = (vm.has_disable == 1).then_some(vm.disable);
        ensure!(
            (
                vm.id,
                vm.cgroup_id,
                vm.requested,
                vm.effective,
                vm.clamped,
                disable
            ) == (
                self.vm,
                self.cgroups[&self.vmm_at],
                self.requested.bits(),
                expected.vm.effective.bits(),
                expected.vm.clamped.bits(),
                self.disable.map(Exits::bits),
            ),
            "{vm:?}, should be {:?}, override {:?}",
            expected.vm,
            self.disable
        );
        for (index, vcpu) in device.vcpus(self.vm)?.into_iter().enumerate() {
            let disable = (vcpu.has_disable == 1).then_some(vcpu.disable);
            ensure!(
                (vcpu.vcpu_id as usize, vcpu.wanted, disable)
                    == (
                        index,
                        expected.vcpus[index].bits(),
                        self.vcpus[index].map(Exits::bits)
                    ),
                "{vcpu:?}, should be {:?}, override {:?}",
                expected.vcpus[index],
                self.vcpus[index]
            );
        }
        Ok(())
    }

    /// Fails unless sysfs says the same.
    fn compare_sysfs(&self) -> Result<()> {
        let ids = sysfs::policy_ids()?;
        ensure!(
            ids.iter().eq(self.policies.keys()),
            "sysfs has {ids:?}, should be {:?}",
            self.policies
        );
        for (id, policy) in &self.policies {
            for (name, set) in [("disable", policy.disable), ("allow", policy.allow)] {
                let file = Path::new(SYSFS)
                    .join("cgroups")
                    .join(id.to_string())
                    .join(name);
                let value = interface::read(&file)?;
                ensure!(value == set.to_string(), "{file:?}: {value}, not {set}");
            }
        }
        let vm = sysfs::vm(self.vm)?;
        let each: Vec<_> = vm.each.iter().map(|vcpu| vcpu.disable).collect();
        ensure!(
            vm.disable == self.disable && each == self.vcpus,
            "{vm:?}, should be {:?}, {:?}",
            self.disable,
            self.vcpus
        );
        Ok(())
    }

    /// The cgroup that a descriptor is of, or the errno that it gives.
    fn cgroup_of(&self, handle: Handle) -> Result<String, i32> {
        let path = match handle {
            Handle::Cgroup(index) | Handle::Path(index) => COMING[index],
            Handle::Root => "/",
            Handle::Vmm => VMM,
            Handle::Threaded => THREADED,
            Handle::Removed => return Err(libc::ENODEV),
            _ => return Err(libc::EBADF),
        };
        if self.cgroups.contains_key(path) {
            Ok(path.to_string())
        } else {
            Err(libc::EBADF)
        }
    }

    /// What the state has against a call.
    fn errors(&self, call: &Call) -> Option<i32> {
        let there = |vm: u64, vcpu: Option<u32>| {
            vm == self.vm && vcpu.is_none_or(|vcpu| (vcpu as usize) < self.vcpus.len())
        };
        let there = match call.command {
            uapi::SET_POLICY | uapi::GET_POLICY | uapi::CLEAR_POLICY | uapi::RESOLVE_POLICY => {
                let path = match self.cgroup_of(call.cgroup.unwrap_or(Handle::Closed)) {
                    Ok(path) => path,
                    Err(errno) => return Some(errno),
                };
                match call.command {
                    uapi::SET_POLICY if path == THREADED => return Some(libc::EOPNOTSUPP),
                    uapi::SET_POLICY | uapi::RESOLVE_POLICY => true,
                    _ => self.policies.contains_key(&self.cgroups[&path]),
                }
            }
            uapi::NEXT_POLICY => {
                let after = call.argument::<uapi::Policy>().cgroup_id;
                self.next_policy(after).is_some()
            }
            uapi::NEXT_VM => call.argument::<uapi::Vm>().id < self.vm,
            uapi::GET_VM => there(call.argument::<uapi::Vm>().id, None),
            uapi::NEXT_VCPU | uapi::GET_VCPU => {
                let it = call.argument::<uapi::Vcpu>();
                there(it.vm, Some(it.vcpu_id))
            }
            uapi::SET_VM | uapi::RESET_VM => {
                let it = call.argument::<uapi::Override>();
                let one = it.flags & uapi::VM_VCPU != 0;
                there(it.vm, one.then_some(it.vcpu_id))
            }
            _ => true,
        };
        (!there).then_some(libc::ENOENT)
    }

    fn next_policy(&self, after: u64) -> Option<(u64, Policy)> {
        let after = after.checked_add(1)?;
        let next = self.policies.range(after..).next()?;
        Some((*next.0, *next.1))
    }

    /// Follows a call that succeeded, and fails unless it answered what it should.
    fn follow(&mut self, call: &Call, answer: &[u8]) -> Result<()> {
        use fuzz::Argument;
        let set = Exits::from_bits_truncate;
        let path = call.cgroup.and_then(|handle| self.cgroup_of(handle).ok());
        let cgroup = path.as_ref().map_or(0, |path| self.cgroups[path]);
        match call.command {
            uapi::GET_INFO => {
                let it = uapi::Info::of(answer);
                ensure!(
                    (it.enabled == 1, it.policies, it.vms)
                        == (self.enabled, self.policies.len() as u64, 1),
                    "{it:?}"
                );
            }
            uapi::SET_ENABLED => {
                let it = call.argument::<uapi::Enabled>();
                self.enabled = it.enabled == 1;
                if it.flags & uapi::NEW_ONLY == 0 {
                    self.decide();
                }
            }
            uapi::SET_VM | uapi::RESET_VM => {
                let it = call.argument::<uapi::Override>();
                let disable = (call.command == uapi::SET_VM).then(|| set(it.disable));
                let vcpu = it.flags & uapi::VM_VCPU != 0;
                self.override_(vcpu.then_some(it.vcpu_id), disable);
            }
            uapi::NEXT_VM | uapi::GET_VM => {
                let it = uapi::Vm::of(answer);
                let effective = self.expected().vm.effective.bits();
                ensure!((it.id, it.effective) == (self.vm, effective), "{it:?}");
            }
            uapi::NEXT_VCPU | uapi::GET_VCPU => {
                let (asked, it) = (call.argument::<uapi::Vcpu>(), uapi::Vcpu::of(answer));
                let wanted = self.expected().vcpus[asked.vcpu_id as usize].bits();
                ensure!((it.vcpu_id, it.wanted) == (asked.vcpu_id, wanted), "{it:?}");
            }
            command => {
                let (asked, it) = (call.argument::<uapi::Policy>(), uapi::Policy::of(answer));
                let new_only = asked.flags & uapi::NEW_ONLY != 0;
                let (id, policy) = match command {
                    uapi::SET_POLICY => {
                        let given = |flag, bits| (asked.flags & flag != 0).then(|| set(bits));
                        let old = self.policies.get(&cgroup);
                        let new = old.copied().unwrap_or(Policy::NEUTRAL).with(
                            given(uapi::POLICY_DISABLE, asked.disable),
                            given(uapi::POLICY_ALLOW, asked.allow),
                        );
                        self.policies.insert(cgroup, new);
                        self.changed(cgroup, new_only);
                        (cgroup, new)
                    }
                    uapi::CLEAR_POLICY => {
                        self.policies.remove(&cgroup);
                        self.changed(cgroup, new_only);
                        ensure!(it.cgroup_id == cgroup, "{it:?}");
                        return Ok(());
                    }
                    uapi::GET_POLICY => (cgroup, self.policies[&cgroup]),
                    uapi::NEXT_POLICY => {
                        let next = self.next_policy(asked.cgroup_id);
                        next.context("no policy was left")?
                    }
                    _ => {
                        let resolved = self.resolve(&path.context("no cgroup")?);
                        let Resolved { disable, allow, .. } = resolved;
                        (resolved.source.unwrap_or(0), Policy { disable, allow })
                    }
                };
                ensure!(
                    (it.cgroup_id, it.disable, it.allow)
                        == (id, policy.disable.bits(), policy.allow.bits()),
                    "{it:?}, should be {id}, {policy:?}"
                );
            }
        }
        Ok(())
    }

    fn override_(&mut self, vcpu: Option<u32>, disable: Option<Exits>) {
        match vcpu {
            Some(vcpu) => self.vcpus[vcpu as usize] = disable,
            None => {
                self.disable = disable;
                if disable.is_none() {
                    self.vcpus = [None; 2];
                }
            }
        }
    }

    /// The cgroup with this name, or the errno of looking for it.
    fn find(&self, names: &[String]) -> Result<String, i32> {
        for count in 0..=names.len() {
            let path = format!("/{}", names[..count].join("/"));
            if !self.cgroups.contains_key(&path) {
                // The one file that the grammar has.
                return Err(if names[count - 1] == "cgroup.procs" {
                    libc::ENOTDIR
                } else {
                    libc::ENOENT
                });
            }
        }
        Ok(format!("/{}", names.join("/")))
    }

    /// Follows what a write means. `Err` is the errno that it should end with.
    fn write(&mut self, field: &Field, file: &fuzz::File, meaning: Meaning) -> Result<(), i32> {
        match (file, meaning) {
            (_, Meaning::Nothing) => {}
            (_, Meaning::Invalid) => return Err(libc::EINVAL),
            (_, Meaning::Enabled(enabled)) => {
                self.enabled = enabled;
                self.decide();
            }
            (file, Meaning::Path(names)) => {
                let path = self.find(&names)?;
                let cgroup = self.cgroups[&path];
                let has = self.policies.contains_key(&cgroup);
                if file.name() == "attach" {
                    if path == THREADED {
                        return Err(libc::EOPNOTSUPP);
                    }
                    if has {
                        return Err(libc::EEXIST);
                    }
                    self.policies.insert(cgroup, Policy::NEUTRAL);
                } else if !has {
                    return Err(libc::ENOENT);
                } else {
                    self.policies.remove(&cgroup);
                }
                self.changed(cgroup, false);
            }
            (fuzz::File::Policy(cgroup, name), Meaning::Set(set)) => {
                let cgroup = field.cgroup_id(*cgroup);
                let policy = self.policies.get_mut(&cgroup).ok_or(libc::ENOENT)?;
                if *name == "disable" {
                    policy.disable = set;
                } else {
                    policy.allow = set;
                }
                self.changed(cgroup, false);
            }
            (fuzz::File::Vcpu(_, vcpu, _), meaning) => self.override_(Some(*vcpu), as_set(meaning)),
            (_, meaning) => self.override_(None, as_set(meaning)),
        }
        Ok(())
    }

    /// Whether the directory of a file is there.
    fn has(&self, field: &Field, file: &fuzz::File) -> bool {
        match file {
            fuzz::File::Top(_) => true,
            fuzz::File::Policy(cgroup, _) => self.policies.contains_key(&field.cgroup_id(*cgroup)),
            fuzz::File::Vm(vm, _) => field.vm_id(*vm) == self.vm,
            fuzz::File::Vcpu(vm, vcpu, _) => field.vm_id(*vm) == self.vm && *vcpu < 2,
        }
    }

    /// A cgroup comes, goes, or gets the VMM.
    fn move_something(&mut self, field: &Field, random: &mut Random) -> Result<()> {
        let path = COMING[random.random_range(0..CGROUPS)];
        let parent = path.rsplit_once('/').expect("a path").0;
        let below = |it: &String| it.starts_with(&format!("{path}/"));
        if !self.cgroups.contains_key(path) {
            if self.cgroups.contains_key(parent) {
                fs::create_dir(directory(path)).context("create_dir")?;
                self.cgroups
                    .insert(path.to_string(), cgroup::id(&directory(path))?);
            }
        } else if random.random_ratio(1, 3) {
            let path = if random.random() { VMM } else { path };
            let procs = directory(path).join("cgroup.procs");
            fs::write(&procs, field.vmm.pid().to_string()).context("moving the VMM")?;
            if self.vmm_at != path {
                self.vmm_at = path.to_string();
                self.decide();
                let id = self.cgroups[path];
                let moved = soon(|| Ok(field.device.vms()?.iter().all(|vm| vm.cgroup_id == id)))?;
                ensure!(moved, "the VM did not follow its VMM to {path}");
            }
        } else if random.random_ratio(1, 3)
            && self.vmm_at != path
            && !self.cgroups.keys().any(below)
        {
            fs::remove_dir(directory(path)).context("remove_dir")?;
            let id = self.cgroups.remove(path).context("was there")?;
            self.policies.remove(&id);
            let left = self.policies.len() as u64;
            ensure!(
                soon(|| Ok(field.device.info()?.policies == left
                    && sysfs::policy_ids()?.len() as u64 == left))?,
                "the policy of {path} did not go with it"
            );
        }
        Ok(())
    }
}

fn as_set(meaning: Meaning) -> Option<Exits> {
    match meaning {
        Meaning::Set(set) => Some(set),
        _ => None,
    }
}

/// Root, one operation after the other; after each, the module says what the model says.
fn model(vendor: Vendor, seed: u64, operations: u32, tally: &mut Tally) -> Result<()> {
    let mut random = fuzz::random(seed, 0);
    let mut field = Field::new(vendor, &mut random)?;
    let memory = Memory::new()?;
    let mut model = Model::new(&field)?;
    model.decide();
    model.compare(&field.device).context("at the beginning")?;
    for number in 0..operations {
        if number % 1_000 == 999 {
            println!("fuzz::model: {} of {operations} operations", number + 1);
        }
        let what;
        let result = match random.random_range(0..100) {
            0..60 => {
                let mut call = Call::any(&mut random);
                let _file = field.fill_in(&mut call);
                what = format!("{}: {call:?}", fuzz::name(call.command));
                model_call(&field, &memory, &mut model, &call, tally)
            }
            60..94 => {
                let it = Access::any(&mut random, &PATHS);
                what = format!("{it:?}");
                model_access(&field, &mut model, &it, tally)
            }
            _ => {
                what = "cgroups come and go".to_string();
                model.move_something(&field, &mut random)
            }
        };
        result
            .and_then(|()| model.compare(&field.device))
            .and_then(|()| field.ensure_running())
            .with_context(|| format!("operation {number}: {what}"))?;
        if number % 32 == 0 {
            model
                .compare_sysfs()
                .with_context(|| format!("in sysfs, up to operation {number}: {what}"))?;
        }
    }
    field.end()
}

fn model_call(
    field: &Field,
    memory: &Memory,
    model: &mut Model,
    call: &Call,
    tally: &mut Tally,
) -> Result<()> {
    let expected: BTreeSet<i32> = model.errors(call).into_iter().collect();
    let (result, answer) = memory.call(&field.device, call)?;
    let errno = errno_of(&result);
    let known = uapi::COMMANDS.iter().any(|known| known.0 == call.command);
    let name = if known {
        fuzz::name(call.command)
    } else {
        "unknown".into()
    };
    tally.count(&name, errno);
    ensure_allowed(call, errno, true, &expected)?;
    if errno != 0 {
        return Ok(());
    }
    ensure!(expected.is_empty(), "should have failed with {expected:?}");
    model.follow(call, &answer)
}

fn model_access(field: &Field, model: &mut Model, it: &Access, tally: &mut Tally) -> Result<()> {
    let there = model.has(field, &it.file);
    let whole = fs::read(field.path(&it.file)).unwrap_or_default();
    let came = access(field, it, None);
    tally.count(&kind(it), came.errno);
    if !there {
        ensure!(
            came.errno == libc::ENOENT,
            "errno {}, should be ENOENT",
            came.errno
        );
        return Ok(());
    }
    let mut expected = BTreeSet::new();
    match &it.op {
        FileOp::Write { text, .. } if it.file.is_writable() => {
            if let Err(errno) = model.write(field, &it.file, text.meaning(&it.file)) {
                expected.insert(errno);
                ensure!(
                    came.errno == errno,
                    "errno {}, should be {errno}",
                    came.errno
                );
            }
        }
        FileOp::Read { offset, length } if it.file.is_readable() => {
            // These count what happens by itself.
            let moves = [
                "pending", "holding", "in_force", "state", "refused", "refusal",
            ];
            let from = (*offset).min(whole.len() as u64) as usize;
            let to = whole.len().min(from + length);
            ensure!(
                moves.contains(&it.file.name()) || came.read == whole[from..to],
                "read {:?}, the file has {whole:?}",
                came.read
            );
        }
        _ => {}
    }
    ensure_access_allowed(it, &came, &expected)
}

// --- many at once -------------------------------------------------------------

/// Who it is that does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Actor {
    Root,
    Nobody,
    /// Root of a user namespace, in a cgroup that was delegated to it.
    Delegate,
}

impl Actor {
    /// Becomes who it is. What root has open stays open.
    fn become_it(self) -> Result<()> {
        match self {
            Self::Root => Ok(()),
            Self::Nobody => {
                setgroups(&[])?;
                setgid(Gid::from_raw(NOBODY))?;
                Ok(setuid(Uid::from_raw(NOBODY))?)
            }
            Self::Delegate => {
                leave_chroot().context("leave_chroot")?;
                let procs = directory(DELEGATED).join("cgroup.procs");
                fs::write(procs, "0").context("entering the delegated cgroup")?;
                setgroups(&[])?;
                setgid(Gid::from_raw(DELEGATE))?;
                setuid(Uid::from_raw(DELEGATE))?;
                // Who changes its user id is not to be looked at, nor its maps to be written.
                prctl::set_dumpable(true)?;
                unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWCGROUP)
                    .context("unshare")?;
                fs::write("/proc/self/uid_map", format!("0 {DELEGATE} 1"))?;
                fs::write("/proc/self/setgroups", "deny")?;
                fs::write("/proc/self/gid_map", format!("0 {DELEGATE} 1"))?;
                ensure!(nix::unistd::getuid().is_root(), "not root of its namespace");
                Ok(())
            }
        }
    }
}

/// Files that root has opened and others have got.
fn open_files(field: &Field) -> Result<Vec<(fuzz::File, File)>> {
    let files = [
        (fuzz::File::Top("enabled"), true),
        (fuzz::File::Top("attach"), false),
        (fuzz::File::Top("detach"), false),
        (fuzz::File::Policy(CgroupId::Root, "disable"), true),
        (fuzz::File::Policy(CgroupId::Root, "allow"), true),
        (fuzz::File::Vm(VmId::Running, "disable"), true),
        (fuzz::File::Vcpu(VmId::Running, 0, "disable"), true),
        (fuzz::File::Vcpu(VmId::Running, 1, "disable"), true),
    ];
    files
        .into_iter()
        .map(|(file, read)| {
            let path = field.path(&file);
            let open = OpenOptions::new().read(read).write(true).open(&path);
            Ok((file, open.with_context(|| format!("{path:?}"))?))
        })
        .collect()
}

/// One thread of somebody's.
struct Hands<'a> {
    field: &'a Field,
    inherited: &'a [(fuzz::File, File)],
    actor: Actor,
    random: Random,
    memory: Memory,
    tally: Tally,
    wrong: Vec<String>,
}

impl Hands<'_> {
    fn work(mut self, operations: u32) -> (Tally, Vec<String>) {
        for number in 0..operations {
            let (what, result) = match self.random.random_range(0..100) {
                0..55 => self.call(),
                55..94 => self.access(),
                _ => {
                    let vmm = (self.actor == Actor::Root).then_some(self.field.vmm.pid());
                    try_to_change_cgroups(&mut self.random, vmm);
                    (String::new(), Ok(()))
                }
            };
            if let Err(error) = result {
                self.wrong.push(format!(
                    "{:?}, operation {number}: {what}: {error:#}",
                    self.actor
                ));
                if self.wrong.len() > 10 {
                    break;
                }
            }
        }
        (self.tally, self.wrong)
    }

    fn call(&mut self) -> (String, Result<()>) {
        let mut call = Call::any(&mut self.random);
        let _file = self.field.fill_in(&mut call);
        let result = self.try_call(&call);
        (format!("{}: {call:?}", fuzz::name(call.command)), result)
    }

    fn try_call(&mut self, call: &Call) -> Result<()> {
        let (result, _) = self.memory.call(&self.field.device, call)?;
        let errno = errno_of(&result);
        let known = uapi::COMMANDS.iter().any(|known| known.0 == call.command);
        let name = if known {
            fuzz::name(call.command)
        } else {
            "unknown".into()
        };
        self.tally.count(&name, errno);
        ensure_allowed(call, errno, self.actor == Actor::Root, &call.dependent())
    }

    fn access(&mut self) -> (String, Result<()>) {
        let mut it = Access::any(&mut self.random, &PATHS);
        let privileged = self.actor == Actor::Root;
        let mut inherited = None;
        if !privileged && !self.inherited.is_empty() && self.random.random() {
            let (file, open) = &self.inherited[self.random.random_range(0..self.inherited.len())];
            it.file = file.clone();
            inherited = Some(open);
        }
        let came = access(self.field, &it, inherited);
        self.tally.count(&kind(&it), came.errno);
        let mut dependent = it.file.dependent();
        if !privileged {
            dependent.extend([libc::EPERM, libc::EACCES]);
            // One that was not opened for reading.
            dependent.insert(libc::EBADF);
        }
        let writes = matches!(it.op, FileOp::Write { .. });
        let result = if !privileged && writes && came.length > 0 {
            Err(anyhow::anyhow!(
                "took {} bytes of somebody who may not",
                came.length
            ))
        } else if !privileged && !writes && came.length > 0 && !it.file.is_public() {
            Err(anyhow::anyhow!("somebody has read it who may not"))
        } else {
            ensure_access_allowed(&it, &came, &dependent)
        };
        let how = if inherited.is_some() { " (open)" } else { "" };
        (format!("{it:?}{how}"), result)
    }
}

/// Memory that one thread changes while another one hands it to the module.
fn race(field: &Field, seed: u64, operations: u32) -> Result<(Tally, Vec<String>)> {
    let mut random = fuzz::random(seed, 1000);
    let argument: Vec<AtomicU8> = (0..2 * PAGE).map(|_| AtomicU8::new(0)).collect();
    let done = AtomicBool::new(false);
    let mut tally = Tally::default();
    let mut wrong = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = fuzz::random(seed, 1001);
            while !done.load(Ordering::Relaxed) {
                let mut call = Call::any(&mut random);
                let _file = field.fill_in(&mut call);
                for (byte, value) in argument.iter().zip(&call.bytes) {
                    byte.store(*value, Ordering::Relaxed);
                }
            }
        });
        for number in 0..operations {
            let call = Call::any(&mut random);
            let address = argument.as_ptr().cast::<u8>().cast_mut();
            // SAFETY: Whatever size is read there, no command writes more than a page, and nobody
            // takes what is there for more than bytes.
            let errno = errno_of(&unsafe { field.device.raw(call.command, address) });
            let name = fuzz::name(call.command);
            let known = !name.starts_with("0x");
            tally.count(if known { "racing" } else { "unknown" }, errno);
            let mut allowed = call.dependent();
            if known {
                allowed.extend([0, libc::EINVAL, libc::E2BIG]);
            } else {
                allowed.insert(libc::ENOTTY);
            }
            if !allowed.contains(&errno) {
                wrong.push(format!("racing, operation {number}: {name}: errno {errno}"));
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    Ok((tally, wrong))
}

/// Somebody at work in a process of its own.
struct AtWork {
    process: Running,
    /// What it counted.
    tally: File,
}

impl AtWork {
    fn start(
        field: &Field,
        inherited: &[(fuzz::File, File)],
        actor: Actor,
        seed: u64,
        operations: u32,
    ) -> Result<Self> {
        let tally = File::from(memfd_create("tally", MFdFlags::empty())?);
        let mut written = tally.try_clone()?;
        let process = Running::start(move || {
            actor.become_it().with_context(|| format!("{actor:?}"))?;
            if actor != Actor::Root {
                let opened = File::open(uapi::DEVICE);
                ensure!(
                    errno_of(&opened) == libc::EACCES,
                    "{actor:?} opens {}: {opened:?}",
                    uapi::DEVICE
                );
            }
            let (mut all, mut wrong) = (Tally::default(), Vec::new());
            let results: Result<Vec<_>> = thread::scope(|scope| {
                let mut threads = Vec::new();
                for stream in 0..2 {
                    let hands = Hands {
                        field,
                        inherited,
                        actor,
                        random: fuzz::random(seed, 10 * (actor as u64 + 1) + stream),
                        memory: Memory::new()?,
                        tally: Tally::default(),
                        wrong: Vec::new(),
                    };
                    threads.push(scope.spawn(move || Ok(hands.work(operations))));
                }
                if actor == Actor::Root {
                    threads.push(scope.spawn(|| race(field, seed, operations)));
                }
                threads
                    .into_iter()
                    .map(|thread| thread.join().expect("no thread panics"))
                    .collect()
            });
            for (tally, lines) in results? {
                all.add(&tally);
                wrong.extend(lines);
            }
            written.write_all(&serde_json::to_vec(&all)?)?;
            Ok(wrong)
        })?;
        Ok(Self { process, tally })
    }

    fn wait(mut self, tally: &mut Tally) -> Result<()> {
        self.process.wait()?;
        let mut text = String::new();
        self.tally.rewind()?;
        self.tally.read_to_string(&mut text)?;
        tally.add(&serde_json::from_str(&text)?);
        Ok(())
    }
}

/// Some state to lose, for those who must not change it.
fn make_state(field: &Field) -> Result<()> {
    for path in COMING {
        fs::create_dir(directory(path)).with_context(|| format!("cannot make {path}"))?;
    }
    // Made by root, and yet the delegate's.
    chown(directory(COMING[5]), Some(DELEGATE), Some(DELEGATE))?;
    let set = |file: fuzz::File, text: &str| -> Result<()> {
        let path = field.path(&file);
        fs::write(&path, text).with_context(|| format!("{path:?}"))
    };
    set(fuzz::File::Top("attach"), "/")?;
    set(fuzz::File::Policy(CgroupId::Root, "disable"), "hlt")?;
    set(fuzz::File::Top("attach"), COMING[1])?;
    set(fuzz::File::Policy(CgroupId::Of(1), "allow"), "mwait,pause")?;
    set(fuzz::File::Vm(VmId::Running, "disable"), "pause")?;
    set(fuzz::File::Vcpu(VmId::Running, 1, "disable"), "none")?;
    Ok(())
}

/// Those who may not change anything do not.
fn unprivileged(vendor: Vendor, seed: u64, operations: u32, tally: &mut Tally) -> Result<()> {
    let mut random = fuzz::random(seed, 0);
    let field = Field::new(vendor, &mut random)?;
    make_state(&field)?;
    // No more than root has made: a cgroup that goes takes its policy with it.
    ensure!(
        soon(|| Ok(field.device.info()?.pending == 0))?,
        "vCPUs do not get where they should"
    );
    let inherited = open_files(&field)?;
    let before = Snapshot::take()?;
    let actors = [Actor::Nobody, Actor::Delegate];
    let at_work: Vec<_> = actors
        .into_iter()
        .map(|actor| AtWork::start(&field, &inherited, actor, seed, operations))
        .collect::<Result<_>>()?;
    let mut result = Ok(());
    for actor in at_work {
        result = result.and(actor.wait(tally));
    }
    result?;
    before.ensure_unchanged()?;
    drop(inherited);
    fs::write(Path::new(SYSFS).join("detach"), "/")?;
    field.end()
}

/// All of them at once, while VMs and cgroups come and go.
fn everybody(vendor: Vendor, seed: u64, operations: u32, tally: &mut Tally) -> Result<()> {
    let mut random = fuzz::random(seed, 0);
    let field = Field::new(vendor, &mut random)?;
    make_state(&field)?;
    let missed = field.device.info()?.missed;
    let inherited = open_files(&field)?;
    let mut churn = Command::new("/proc/self/exe")
        .arg(CHURN)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    let mut at_work = Vec::new();
    for actor in [Actor::Root, Actor::Nobody, Actor::Delegate] {
        at_work.push(AtWork::start(&field, &inherited, actor, seed, operations)?);
    }
    let mut result = Ok(());
    for actor in at_work {
        result = result.and(actor.wait(tally));
    }
    drop(churn.stdin.take());
    let churned = churn.wait()?;
    result?;
    ensure!(churned.success(), "the VMs that came and went: {churned}");
    drop(inherited);
    let device = &field.device;
    ensure!(
        soon(|| Ok(device.vms()?.len() == 1 && sysfs::vm_ids()?.len() == 1))?,
        "VMs are left: {:?}",
        device.vms()?
    );
    let now = device.info()?.missed;
    if now != missed {
        bail!("{} VMs were missed", now - missed);
    }
    // The same policies, by ioctl and in sysfs.
    let policies = || -> Result<Vec<u64>> {
        let policies = device.policies()?;
        Ok(policies.iter().map(|policy| policy.cgroup_id).collect())
    };
    ensure!(
        soon(|| Ok(policies()? == sysfs::policy_ids()?))?,
        "policies by ioctl {:?}, in sysfs {:?}",
        policies()?,
        sysfs::policy_ids()?
    );
    field.end()
}
