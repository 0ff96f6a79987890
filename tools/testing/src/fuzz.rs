// SPDX-License-Identifier: GPL-2.0

//! A grammar of what programs may do to the module's interfaces, right, nearly right and wild, and
//! what `include/uapi/linux/exitpolicy.h` and `Documentation/ABI` say must come of it.
//!
//! Nothing here touches the module: what is made is made from a seed alone, so that a seed repeats
//! a run. Whatever differs from run to run, such as ids and file descriptors, has a name here
//! instead of a number.

use std::{
    collections::{
        BTreeMap,
        BTreeSet, //
    },
    fmt,
    mem::offset_of, //
};

use exitpolicy_policy::Exits;
use rand::{
    seq::{
        IndexedRandom,
        SliceRandom, //
    },
    Rng,
    SeedableRng, //
};
use rand_chacha::ChaCha8Rng;
use serde::{
    Deserialize,
    Serialize, //
};

use crate::uapi;

/// The longest argument that the module looks at.
pub const PAGE: usize = 4096;

/// Where the numbers come from: the same ones for a seed, whatever crate or machine.
pub type Random = ChaCha8Rng;

/// The numbers of one of those who work at once.
pub fn random(seed: u64, stream: u64) -> Random {
    let mut random = Random::seed_from_u64(seed);
    random.set_stream(stream);
    random
}

/// A file descriptor to name a cgroup with, or what somebody may take for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handle {
    /// The directory of a cgroup that comes and goes.
    Cgroup(usize),
    /// The same, opened with O_PATH.
    Path(usize),
    Root,
    /// That of the VMM.
    Vmm,
    Threaded,
    /// One that was removed while it was open.
    Removed,
    /// A file in a cgroup.
    File,
    V1,
    Sysfs,
    Device,
    Program,
    Closed,
    Number(i32),
}

/// A VM's id, by which VM it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmId {
    Running,
    /// One that has ended.
    Gone,
    Number(u64),
}

/// A cgroup's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupId {
    Of(usize),
    Before(usize),
    Root,
    Vmm,
    Number(u64),
}

/// Where an argument lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In memory, so many bytes behind the beginning of a page.
    Good(usize),
    /// Before memory that is not there.
    AtEnd,
    /// With so many bytes in memory, and the rest not.
    Across(usize),
    ReadOnly,
    Unmapped,
    /// No memory of a program is there.
    Address(usize),
}

impl Place {
    /// Whether it can be read and written.
    pub fn is_good(self) -> bool {
        matches!(self, Self::Good(_) | Self::AtEnd)
    }
}

/// An ioctl.
#[derive(Clone, Debug)]
pub struct Call {
    pub command: u64,
    /// What the argument says of its size.
    pub size: u32,
    /// What is in memory: as much as `size` says, but four bytes at least, and a page at most. Ids
    /// and descriptors are put in when they are known.
    pub bytes: Vec<u8>,
    pub place: Place,
    pub cgroup: Option<Handle>,
    pub vm: Option<VmId>,
    pub after: Option<CgroupId>,
}

/// The name of a command, or its number.
pub fn name(command: u64) -> String {
    const NAMES: [&str; 13] = [
        "GET_INFO",
        "SET_ENABLED",
        "SET_POLICY",
        "GET_POLICY",
        "CLEAR_POLICY",
        "NEXT_POLICY",
        "RESOLVE_POLICY",
        "NEXT_VM",
        "GET_VM",
        "SET_VM",
        "RESET_VM",
        "NEXT_VCPU",
        "GET_VCPU",
    ];
    let index = uapi::COMMANDS.iter().position(|known| known.0 == command);
    index.map_or(format!("{command:#x}"), |index| NAMES[index].to_string())
}

/// A number that something may stumble over.
fn odd(random: &mut Random) -> u64 {
    match random.random_range(0..6) {
        0 => 1 << random.random_range(0..64),
        1 => u64::MAX >> random.random_range(0..64),
        2 => random.random_range(0..256),
        3 => u64::MAX - random.random_range(0..4),
        4 => random.random::<u32>().into(),
        _ => random.random(),
    }
}

fn one_in(random: &mut Random, count: u32) -> bool {
    random.random_ratio(1, count)
}

fn flags(random: &mut Random, known: u32) -> u32 {
    let flags = random.random::<u32>() & known;
    match random.random_range(0..20) {
        0 => flags ^ (1 << random.random_range(0..32)),
        1 => odd(random) as u32,
        _ => flags,
    }
}

fn reserved(random: &mut Random) -> u32 {
    if one_in(random, 20) {
        odd(random) as u32
    } else {
        0
    }
}

/// What the module writes, and must not read.
fn output<T>(random: &mut Random) -> T
where
    T: TryFrom<u64> + Default,
{
    if one_in(random, 3) {
        T::try_from(odd(random) & 0x7fff_ffff).unwrap_or_default()
    } else {
        T::default()
    }
}

fn set(random: &mut Random) -> u64 {
    let set = random.random::<u64>() & Exits::ALL.bits();
    match random.random_range(0..20) {
        0 => set | (1 << random.random_range(0..64)),
        1 => odd(random),
        _ => set,
    }
}

fn timeout(random: &mut Random) -> u32 {
    match random.random_range(0..10) {
        0 => uapi::MAX_TIMEOUT,
        1 => 1,
        2 => random.random_range(0..=uapi::MAX_TIMEOUT),
        3 => *[uapi::MAX_TIMEOUT + 1, u32::MAX, odd(random) as u32]
            .choose(random)
            .expect("not empty"),
        _ => 0,
    }
}

fn vm_id(random: &mut Random) -> VmId {
    match random.random_range(0..20) {
        0 => VmId::Gone,
        1 => VmId::Number(0),
        2 => VmId::Number(odd(random)),
        _ => VmId::Running,
    }
}

fn vcpu_id(random: &mut Random) -> u32 {
    match random.random_range(0..10) {
        0 => 2,
        1 => odd(random) as u32,
        number => number % 2,
    }
}

/// How many cgroups come and go.
pub const CGROUPS: usize = 6;

fn handle(random: &mut Random) -> Handle {
    let cgroup = random.random_range(0..CGROUPS);
    match random.random_range(0..40) {
        0..=15 => Handle::Cgroup(cgroup),
        16..=21 => Handle::Path(cgroup),
        22..=24 => Handle::Root,
        25..=29 => Handle::Vmm,
        30 | 31 => Handle::Threaded,
        32 => Handle::Removed,
        33 => Handle::File,
        34 => Handle::V1,
        35 => Handle::Sysfs,
        36 => Handle::Device,
        37 => Handle::Program,
        38 => Handle::Closed,
        _ => Handle::Number(*[-1, i32::MIN, i32::MAX, -100].choose(random).expect("some")),
    }
}

/// The bytes of one of the structures.
fn bytes_of<T: Copy>(value: &T) -> Vec<u8> {
    // SAFETY: The structures of `uapi` have no padding, and live while they are looked at.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast::<u8>(), size_of::<T>()) }.to_vec()
}

/// One of the structures, from the bytes that there are; the rest is zero.
///
/// # Safety
///
/// `T` must be one of the structures of `uapi`.
unsafe fn of_bytes<T: Copy + Default>(bytes: &[u8]) -> T {
    let mut value = T::default();
    let known = bytes.len().min(size_of::<T>());
    // SAFETY: Any bytes make such a structure, and `known` is beyond the end of neither.
    unsafe {
        let at = (&raw mut value).cast::<u8>();
        std::ptr::write_bytes(at, 0, size_of::<T>());
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, known);
    }
    value
}

/// Something that has the layout of an argument.
pub trait Argument: Copy + Default {
    /// What a caller that has only these bytes means.
    fn of(bytes: &[u8]) -> Self;
}

macro_rules! arguments {
    ($($name:ident)*) => {
        $(impl Argument for uapi::$name {
            fn of(bytes: &[u8]) -> Self {
                // SAFETY: It is one of them.
                unsafe { of_bytes(bytes) }
            }
        })*
    };
}

arguments! { Info Enabled Policy Vm Vcpu Override }

impl Call {
    /// Any call.
    pub fn any(random: &mut Random) -> Self {
        if one_in(random, 30) {
            return Self::unknown(random);
        }
        let (command, size, oldest) = *uapi::COMMANDS.choose(random).expect("not empty");
        let mut call = Self {
            command,
            size: 0,
            bytes: Vec::new(),
            place: Place::Good(0),
            cgroup: None,
            vm: None,
            after: None,
        };
        call.fill(random);
        call.resize(random, size, oldest);
        call.place = Self::anywhere(random, call.bytes.len());
        call
    }

    /// A command that there is not.
    fn unknown(random: &mut Random) -> Self {
        let command = match random.random_range(0..3) {
            0 => 0xbb00 | random.random_range(0..0x100),
            // A known one with a direction and a size, as _IOWR() would make it.
            1 => 0xbb00 | random.random_range(0..0x100) | (random.random_range(1..0x1_0000) << 16),
            // Of nobody: FIONBIO and the like are not for the module to answer.
            _ => 0xc000 | random.random_range(0..0x1000),
        };
        let known = uapi::COMMANDS.iter().any(|known| known.0 == command);
        let bytes = vec![0; 64];
        Self {
            // No command has that bit.
            command: if known { command | 0x80 } else { command },
            size: 64,
            place: Self::anywhere(random, bytes.len()),
            bytes,
            cgroup: None,
            vm: None,
            after: None,
        }
    }

    fn is_known(&self) -> bool {
        uapi::COMMANDS.iter().any(|known| known.0 == self.command)
    }

    fn anywhere(random: &mut Random, length: usize) -> Place {
        match random.random_range(0..40) {
            0..=27 => Place::Good(random.random_range(0..1024)),
            28..=33 => Place::AtEnd,
            34 => Place::Across(random.random_range(1..length)),
            35 | 36 => Place::ReadOnly,
            37 => Place::Unmapped,
            _ => Place::Address(
                *[
                    0,
                    8,
                    usize::MAX - 3,
                    0xffff_8880_0000_0000,
                    0xffff_ffff_8100_0000,
                    // No address at all.
                    0x8000_0000_0000_0000,
                    // The last bytes that a program can have, and beyond.
                    0x7fff_ffff_effc,
                ]
                .choose(random)
                .expect("not empty"),
            ),
        }
    }

    /// The members.
    fn fill(&mut self, random: &mut Random) {
        let changing = uapi::NEW_ONLY | uapi::NO_WAIT;
        let sets = uapi::POLICY_DISABLE | uapi::POLICY_ALLOW;
        self.bytes = match self.command {
            uapi::GET_INFO => bytes_of(&uapi::Info {
                flags: flags(random, 0),
                vendor: output(random),
                floor: output(random),
                holding: output(random),
                ..Default::default()
            }),
            uapi::SET_ENABLED => bytes_of(&uapi::Enabled {
                flags: flags(random, changing),
                enabled: match random.random_range(0..10) {
                    0 => odd(random) as u32,
                    number => u32::from(number > 3),
                },
                reserved: reserved(random),
                timeout_ms: timeout(random),
                pending: output(random),
                ..Default::default()
            }),
            uapi::NEXT_VM | uapi::GET_VM => {
                self.vm = Some(if self.command == uapi::NEXT_VM && one_in(random, 2) {
                    VmId::Number(0)
                } else {
                    vm_id(random)
                });
                bytes_of(&uapi::Vm {
                    flags: flags(random, 0),
                    pid: output(random),
                    effective: output(random),
                    adopted: output(random),
                    ..Default::default()
                })
            }
            uapi::NEXT_VCPU | uapi::GET_VCPU => {
                self.vm = Some(vm_id(random));
                bytes_of(&uapi::Vcpu {
                    flags: flags(random, 0),
                    vcpu_id: vcpu_id(random),
                    wanted: output(random),
                    ..Default::default()
                })
            }
            uapi::SET_VM | uapi::RESET_VM => {
                self.vm = Some(vm_id(random));
                let flags = flags(random, uapi::VM_VCPU | uapi::NO_WAIT);
                let named = flags & uapi::VM_VCPU != 0 || one_in(random, 20);
                let none = self.command == uapi::RESET_VM && !one_in(random, 10);
                bytes_of(&uapi::Override {
                    flags,
                    vcpu_id: if named { vcpu_id(random) } else { 0 },
                    timeout_ms: timeout(random),
                    disable: if none { 0 } else { set(random) },
                    pending: output(random),
                    reserved: reserved(random),
                    ..Default::default()
                })
            }
            _ => {
                let next = self.command == uapi::NEXT_POLICY;
                if !next || one_in(random, 20) {
                    self.cgroup = Some(handle(random));
                }
                if next {
                    self.after = Some(match random.random_range(0..8) {
                        0 => CgroupId::Root,
                        1 => CgroupId::Number(odd(random)),
                        2 | 3 => CgroupId::Of(random.random_range(0..CGROUPS)),
                        4 => CgroupId::Before(random.random_range(0..CGROUPS)),
                        _ => CgroupId::Number(0),
                    });
                }
                let known = match self.command {
                    uapi::SET_POLICY => changing | sets,
                    uapi::CLEAR_POLICY => changing,
                    _ => 0,
                };
                // One in four would name neither set.
                let named = match self.command {
                    uapi::SET_POLICY if !one_in(random, 10) => 1 << random.random_range(0..2),
                    _ => 0,
                };
                bytes_of(&uapi::Policy {
                    flags: flags(random, known) | named,
                    reserved: reserved(random),
                    cgroup_id: output(random),
                    disable: set(random),
                    allow: set(random) | if one_in(random, 2) { 0x1f } else { 0 },
                    timeout_ms: timeout(random),
                    pending: output(random),
                    ..Default::default()
                })
            }
        };
    }

    /// What the caller says of the size, and has.
    fn resize(&mut self, random: &mut Random, size: usize, oldest: usize) {
        let claimed = match random.random_range(0..20) {
            0 => random.random_range(0..oldest),
            1 => odd(random) as usize & 0xffff_ffff,
            2 | 3 => random.random_range(oldest..=size),
            4 | 5 => random.random_range(size + 1..=PAGE),
            6 => PAGE + 1,
            _ => size,
        };
        self.size = claimed as u32;
        let length = if claimed > PAGE { size } else { claimed.max(4) };
        self.bytes.resize(length, 0);
        if length > size && one_in(random, 3) {
            let at = random.random_range(size..length);
            self.bytes[at] = random.random_range(1..=255);
        }
        self.put(0, &self.size.to_ne_bytes());
    }

    /// Writes something into the argument, as far as there is room.
    fn put(&mut self, at: usize, value: &[u8]) {
        for (index, byte) in value.iter().enumerate() {
            if let Some(place) = self.bytes.get_mut(at + index) {
                *place = *byte;
            }
        }
    }

    /// Puts in a descriptor.
    pub fn set_cgroup(&mut self, fd: i32) {
        self.put(offset_of!(uapi::Policy, cgroup_fd), &fd.to_ne_bytes());
    }

    /// Puts in a VM's id.
    pub fn set_vm(&mut self, id: u64) {
        let at = match self.command {
            uapi::NEXT_VM | uapi::GET_VM => offset_of!(uapi::Vm, id),
            uapi::NEXT_VCPU | uapi::GET_VCPU => offset_of!(uapi::Vcpu, vm),
            _ => offset_of!(uapi::Override, vm),
        };
        self.put(at, &id.to_ne_bytes());
    }

    /// Puts in a cgroup's id.
    pub fn set_after(&mut self, id: u64) {
        self.put(offset_of!(uapi::Policy, cgroup_id), &id.to_ne_bytes());
    }

    /// What the module knows of this argument.
    pub fn argument<T: Argument>(&self) -> T {
        T::of(&self.bytes)
    }

    /// How much of the argument the module knows, and may write.
    pub fn known(&self) -> usize {
        let known = uapi::COMMANDS.iter().find(|known| known.0 == self.command);
        known.map_or(0, |known| known.1.min(self.bytes.len()))
    }

    /// What is wrong with the call, whatever the state: the module may say any of these, and must
    /// say one.
    pub fn wrong(&self) -> BTreeSet<i32> {
        let mut wrong = BTreeSet::new();
        let Some((_, size, oldest)) = uapi::COMMANDS.iter().find(|known| known.0 == self.command)
        else {
            return [libc::ENOTTY].into();
        };
        let claimed = self.size as usize;
        if !self.place.is_good() {
            wrong.insert(libc::EFAULT);
        }
        if claimed < *oldest || self.has_wrong_member() {
            wrong.insert(libc::EINVAL);
        }
        let rest = self.bytes.get(*size..).unwrap_or_default();
        if claimed > PAGE || rest.iter().any(|byte| *byte != 0) {
            wrong.insert(libc::E2BIG);
        }
        wrong
    }

    /// What it may depend on the state to say.
    pub fn dependent(&self) -> BTreeSet<i32> {
        let errors: &[i32] = match self.command {
            uapi::SET_POLICY => &[libc::EBADF, libc::ENODEV, libc::EOPNOTSUPP, libc::ENOMEM],
            uapi::GET_POLICY | uapi::CLEAR_POLICY => &[libc::EBADF, libc::ENODEV, libc::ENOENT],
            uapi::RESOLVE_POLICY => &[libc::EBADF, libc::ENODEV],
            uapi::GET_INFO | uapi::SET_ENABLED => &[],
            _ if self.is_known() => &[libc::ENOENT],
            _ => &[],
        };
        errors.iter().copied().collect()
    }

    fn has_wrong_member(&self) -> bool {
        let exits = |bits| Exits::from_bits(bits).is_none();
        let changing = uapi::NEW_ONLY | uapi::NO_WAIT;
        let sets = uapi::POLICY_DISABLE | uapi::POLICY_ALLOW;
        match self.command {
            uapi::GET_INFO => self.argument::<uapi::Info>().flags != 0,
            uapi::SET_ENABLED => {
                let it = self.argument::<uapi::Enabled>();
                it.flags & !changing != 0
                    || it.enabled > 1
                    || it.reserved != 0
                    || it.timeout_ms > uapi::MAX_TIMEOUT
            }
            uapi::NEXT_VM | uapi::GET_VM => self.argument::<uapi::Vm>().flags != 0,
            uapi::NEXT_VCPU | uapi::GET_VCPU => self.argument::<uapi::Vcpu>().flags != 0,
            uapi::SET_VM | uapi::RESET_VM => {
                let it = self.argument::<uapi::Override>();
                it.flags & !(uapi::VM_VCPU | uapi::NO_WAIT) != 0
                    || it.timeout_ms > uapi::MAX_TIMEOUT
                    || it.reserved != 0
                    || (it.vcpu_id != 0 && it.flags & uapi::VM_VCPU == 0)
                    || (self.command == uapi::RESET_VM && it.disable != 0)
                    || exits(it.disable)
            }
            command => {
                let it = self.argument::<uapi::Policy>();
                let wrong = match command {
                    uapi::SET_POLICY => {
                        it.flags & !(changing | sets) != 0
                            || it.flags & sets == 0
                            || exits(it.disable)
                            || exits(it.allow)
                            || it.timeout_ms > uapi::MAX_TIMEOUT
                    }
                    uapi::CLEAR_POLICY => {
                        it.flags & !changing != 0 || it.timeout_ms > uapi::MAX_TIMEOUT
                    }
                    uapi::NEXT_POLICY => it.flags != 0 || it.cgroup_fd != 0,
                    _ => it.flags != 0,
                };
                wrong || it.reserved != 0
            }
        }
    }
}

/// A file of the module in sysfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum File {
    Top(&'static str),
    /// Of a cgroup's policy.
    Policy(CgroupId, &'static str),
    Vm(VmId, &'static str),
    Vcpu(VmId, u32, &'static str),
}

const TOP: [&str; 11] = [
    "vendor",
    "supported",
    "floor",
    "enabled",
    "missed",
    "clamps",
    "pending",
    "holding",
    "attach",
    "detach",
    "none of these",
];
const POLICY: [&str; 4] = ["path", "disable", "allow", "uevent"];
const VM: [&str; 13] = [
    "pid",
    "cgroup",
    "adopted",
    "floor",
    "requested",
    "effective",
    "clamped",
    "disable",
    "refused",
    "refusal",
    "pending",
    "vcpus",
    "uevent",
];
const VCPU: [&str; 5] = ["disable", "wanted", "in_force", "state", "uevent"];

impl File {
    fn any(random: &mut Random) -> Self {
        // Those that can be written, more often than not.
        let writable = one_in(random, 2);
        let cgroup = match random.random_range(0..10) {
            0 => CgroupId::Number(odd(random)),
            1 => CgroupId::Root,
            2 | 3 => CgroupId::Vmm,
            _ => CgroupId::Of(random.random_range(0..CGROUPS)),
        };
        let pick = |random: &mut Random, names: &[&'static str], writable_ones: &[&'static str]| {
            let names = if writable { writable_ones } else { names };
            *names.choose(random).expect("not empty")
        };
        match random.random_range(0..4) {
            0 => Self::Top(pick(
                random,
                &TOP,
                &["enabled", "attach", "attach", "detach"],
            )),
            1 => Self::Policy(cgroup, pick(random, &POLICY, &["disable", "allow"])),
            2 => Self::Vm(vm_id(random), pick(random, &VM, &["disable"])),
            _ => {
                let vcpu = vcpu_id(random);
                Self::Vcpu(vm_id(random), vcpu, pick(random, &VCPU, &["disable"]))
            }
        }
    }

    /// Its name, without what is before that.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Top(name)
            | Self::Policy(_, name)
            | Self::Vm(_, name)
            | Self::Vcpu(_, _, name) => name,
        }
    }

    /// Whether there is such a file, where there is its directory.
    pub fn exists(&self) -> bool {
        !["none of these", "uevent"].contains(&self.name())
    }

    /// Whether it can be read.
    pub fn is_readable(&self) -> bool {
        self.exists() && !["attach", "detach"].contains(&self.name())
    }

    /// Whether it can be written.
    pub fn is_writable(&self) -> bool {
        ["enabled", "attach", "detach", "disable", "allow"].contains(&self.name())
    }

    /// Whether everybody may read it.
    pub fn is_public(&self) -> bool {
        matches!(
            self,
            Self::Top("vendor" | "supported" | "floor" | "enabled")
        )
    }

    /// What it may depend on the state to say when it is written.
    pub fn dependent(&self) -> BTreeSet<i32> {
        let errors: &[i32] = match self {
            Self::Top("attach") => &[
                libc::ENOENT,
                libc::ENOTDIR,
                libc::EEXIST,
                libc::ENODEV,
                libc::EOPNOTSUPP,
                libc::ENOMEM,
            ],
            Self::Top("detach") => &[libc::ENOENT, libc::ENOTDIR],
            Self::Top(_) => &[],
            // Of a directory that is not there, or goes.
            _ => &[libc::ENOENT, libc::ENODEV],
        };
        errors.iter().copied().collect()
    }
}

/// What is done to a file.
#[derive(Clone, Debug)]
pub enum FileOp {
    Read { offset: u64, length: usize },
    Write { offset: u64, text: Text },
}

/// What is written.
#[derive(Clone, PartialEq, Eq)]
pub struct Text(pub Vec<u8>);

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shown, more) = self.0.split_at(self.0.len().min(120));
        write!(f, "\"{}\"", shown.escape_ascii())?;
        if !more.is_empty() {
            write!(f, " and {} bytes more", more.len())?;
        }
        Ok(())
    }
}

/// Something done in sysfs.
#[derive(Clone, Debug)]
pub struct Access {
    pub file: File,
    pub op: FileOp,
}

/// What a text means to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meaning {
    Enabled(bool),
    Set(Exits),
    Inherit,
    /// Names of cgroups, from the root down.
    Path(Vec<String>),
    /// The kernel does not tell the file of it.
    Nothing,
    Invalid,
}

fn spaces(random: &mut Random) -> &'static str {
    ["", "", "", "", " ", "  ", "\t"]
        .choose(random)
        .expect("not empty")
}

impl Text {
    fn any(random: &mut Random, file: &File, paths: &[&str]) -> Self {
        let kind = match file.name() {
            _ if one_in(random, 8) => random.random_range(0..6),
            "enabled" => 0,
            "attach" | "detach" => 1,
            _ => random.random_range(2..5),
        };
        let mut text = match kind {
            0 => ["0", "1", "1", "1", "2", "10", "-1", "on"]
                .choose(random)
                .expect("not empty")
                .as_bytes()
                .to_vec(),
            1 => Self::path(random, paths),
            2 | 3 => {
                let mut names = Exits::NAMES.map(|(_, name)| name);
                names.shuffle(random);
                let count = random.random_range(1..=names.len());
                let mut text = spaces(random).to_string();
                for (index, name) in names[..count].iter().enumerate() {
                    if index > 0 {
                        text += ",";
                    }
                    text += spaces(random);
                    text += name;
                    text += spaces(random);
                }
                text.into_bytes()
            }
            4 => {
                let word = ["all", "none", "inherit"]
                    .choose(random)
                    .expect("not empty");
                format!("{}{word}{}", spaces(random), spaces(random)).into_bytes()
            }
            _ => Self::garbage(random),
        };
        if one_in(random, 2) {
            text.push(b'\n');
        }
        if one_in(random, 6) {
            Self::spoil(random, &mut text);
        }
        Self(text)
    }

    fn path(random: &mut Random, paths: &[&str]) -> Vec<u8> {
        let mut path = paths.choose(random).expect("not empty").to_string();
        match random.random_range(0..12) {
            0 => path += "/",
            1 => path = path.replace('/', "//"),
            2 => path += "/nowhere",
            3 => path += "/cgroup.procs",
            4 => path += &format!("/cgroup.procs/{}", random.random_range(0..1000)),
            5 => path += "/..",
            6 => path = path.trim_start_matches('/').to_string(),
            7 => path += &"/x".repeat(random.random_range(1..2000)),
            _ => {}
        }
        path.into_bytes()
    }

    fn garbage(random: &mut Random) -> Vec<u8> {
        let length = *[0, 1, 16, 255, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE]
            .choose(random)
            .expect("not empty");
        match random.random_range(0..4) {
            0 => vec![0; length],
            1 => vec![b'a'; length],
            2 => b"hlt,".iter().copied().cycle().take(length).collect(),
            _ => (0..length).map(|_| random.random()).collect(),
        }
    }

    fn spoil(random: &mut Random, text: &mut Vec<u8>) {
        let at = random.random_range(0..=text.len());
        match random.random_range(0..6) {
            0 => text.truncate(at),
            1 => text.insert(at, random.random()),
            2 => text.insert(at, 0),
            3 => text.extend(text.clone()),
            4 => text.make_ascii_uppercase(),
            _ => text.extend_from_slice(b"\n\n"),
        }
    }

    /// What it means, by `Documentation/ABI`.
    pub fn meaning(&self, file: &File) -> Meaning {
        if self.0.is_empty() {
            return Meaning::Nothing;
        }
        if self.0.len() >= PAGE {
            return Meaning::Invalid;
        }
        let text = self.0.strip_suffix(b"\n").unwrap_or(&self.0);
        let words = std::str::from_utf8(text).ok();
        match (file, file.name()) {
            (_, "enabled") => match text {
                b"0" => Meaning::Enabled(false),
                b"1" => Meaning::Enabled(true),
                _ => Meaning::Invalid,
            },
            (_, "attach" | "detach") => {
                if !text.starts_with(b"/") || text.contains(&0) {
                    return Meaning::Invalid;
                }
                let names = text.split(|byte| *byte == b'/');
                let names = names.filter(|name| !name.is_empty());
                Meaning::Path(
                    names
                        .map(|name| String::from_utf8_lossy(name).into_owned())
                        .collect(),
                )
            }
            (File::Vm(..) | File::Vcpu(..), _)
                if words.is_some_and(|words| words.trim_ascii() == "inherit") =>
            {
                Meaning::Inherit
            }
            _ => words
                .and_then(|words| words.parse().ok())
                .map_or(Meaning::Invalid, Meaning::Set),
        }
    }
}

impl Access {
    /// Any access. `paths` are those of cgroups.
    pub fn any(random: &mut Random, paths: &[&str]) -> Self {
        let file = File::any(random);
        let offset = if one_in(random, 4) {
            *[1, 3, 4095, 4096, 1 << 31]
                .choose(random)
                .expect("not empty")
        } else {
            0
        };
        let op = if one_in(random, 3) {
            let length = *[0, 1, 5, 4096, 8192].choose(random).expect("not empty");
            FileOp::Read { offset, length }
        } else {
            let text = Text::any(random, &file, paths);
            FileOp::Write { offset, text }
        };
        Self { file, op }
    }
}

/// What came of how many operations: the errno, or 0.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally(BTreeMap<String, BTreeMap<i32, u64>>);

impl Tally {
    /// Counts one.
    pub fn count(&mut self, what: &str, errno: i32) {
        let of = self.0.entry(what.to_string()).or_default();
        *of.entry(errno).or_default() += 1;
    }

    /// Adds those of another.
    pub fn add(&mut self, other: &Self) {
        for (what, counts) in &other.0 {
            let of = self.0.entry(what.clone()).or_default();
            for (errno, count) in counts {
                *of.entry(*errno).or_default() += count;
            }
        }
    }

    /// How many there were.
    pub fn total(&self) -> u64 {
        self.0.values().flat_map(BTreeMap::values).sum()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, counts) in &self.0 {
            write!(f, "{what:16}")?;
            for (errno, count) in counts {
                let name = match errno {
                    0 => "ok".to_string(),
                    errno => format!("{:?}", nix::errno::Errno::from_raw(*errno)),
                };
                write!(f, "  {name} {count}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_a_run() {
        let run = |seed, stream| {
            let mut random = random(seed, stream);
            let calls = (0..200).map(|_| format!("{:?}", Call::any(&mut random)));
            calls.collect::<Vec<_>>()
        };
        assert_eq!(run(1, 0), run(1, 0));
        assert_ne!(run(1, 0), run(2, 0));
        assert_ne!(run(1, 0), run(1, 1));
    }

    /// Otherwise nothing but refusals is looked at, or nothing but what is fine.
    #[test]
    fn every_command_is_called_right_and_wrong() {
        let mut random = random(0, 0);
        let mut seen = BTreeMap::<_, (u32, u32)>::new();
        for _ in 0..20_000 {
            let call = Call::any(&mut random);
            let (right, wrong) = seen.entry(call.command).or_default();
            *(if call.wrong().is_empty() {
                right
            } else {
                wrong
            }) += 1;
            assert!(
                call.bytes.len() >= 4 && call.bytes.len() <= PAGE,
                "{call:?}"
            );
        }
        for (command, ..) in uapi::COMMANDS {
            let (right, wrong) = seen[&command];
            assert!(
                right > 200 && wrong > 200,
                "{}: {right}, {wrong}",
                name(command)
            );
        }
    }

    #[test]
    fn every_file_is_written_right_and_wrong() {
        let mut random = random(0, 0);
        let mut seen = BTreeMap::<_, (u32, u32)>::new();
        for _ in 0..20_000 {
            let access = Access::any(&mut random, &["/", "/a/b"]);
            let FileOp::Write { text, .. } = &access.op else {
                continue;
            };
            let (right, wrong) = seen.entry(access.file.name()).or_default();
            let invalid = text.meaning(&access.file) == Meaning::Invalid;
            *(if invalid { wrong } else { right }) += 1;
        }
        for name in ["enabled", "attach", "detach", "disable", "allow"] {
            let (right, wrong) = seen[name];
            assert!(right > 100 && wrong > 100, "{name}: {right}, {wrong}");
        }
    }

    #[test]
    fn what_a_text_means() {
        let of = |file: &File, text: &str| Text(text.as_bytes().to_vec()).meaning(file);
        let policy = File::Policy(CgroupId::Root, "disable");
        let vm = File::Vm(VmId::Running, "disable");
        assert_eq!(
            of(&policy, " hlt ,\tpause\n"),
            Meaning::Set(Exits::HLT | Exits::PAUSE)
        );
        assert_eq!(of(&policy, "inherit"), Meaning::Invalid);
        assert_eq!(of(&vm, " inherit\n"), Meaning::Inherit);
        assert_eq!(of(&vm, ""), Meaning::Nothing);
        assert_eq!(of(&File::Top("enabled"), "1\n"), Meaning::Enabled(true));
        assert_eq!(of(&File::Top("enabled"), "1\n\n"), Meaning::Invalid);
        let path = Meaning::Path(vec!["a".into(), "b".into()]);
        assert_eq!(of(&File::Top("attach"), "//a/b/\n"), path);
        assert_eq!(of(&File::Top("attach"), "a/b"), Meaning::Invalid);
    }
}
