// SPDX-License-Identifier: GPL-2.0

//! The command line. The help texts are the man pages too, see `examples/man.rs`.

use clap::{
    builder::{
        PossibleValue,
        StringValueParser,
        TypedValueParser, //
    },
    Arg,
    ArgGroup,
    Args,
    Parser,
    Subcommand,
    ValueEnum,
    ValueHint, //
};
use exitpolicy::{
    live::{
        Apply,
        Timeout,
        Wait, //
    },
    policy::Exits, //
};
use std::{
    ffi::OsStr,
    path::PathBuf, //
};

/// Global options come after a command's own, in help texts.
const LAST: usize = 100;

macro_rules! exit_status {
    () => {
        "\
EXIT STATUS
  0  done
  1  it failed: stderr says what was tried, why not, and what to do
  2  the command line is wrong
  3  the module kvm_exitpolicy is not loaded
  4  not permitted"
    };
}

/// Of a command that changes VMs that run.
macro_rules! exit_status_of_change {
    () => {
        concat!(
            exit_status!(),
            "
  5  done, but some vCPUs are still on their way: stderr names them"
        )
    };
}

macro_rules! waiting {
    () => {
        "\
WAITING
  A vCPU changes in its own thread, on its way into the guest. The command makes those
  that are in the guest leave it, and returns when each has changed, or is outside and
  will change before it is in the guest again. It waits a second, or the time that
  --timeout gives. One that has not left by then changes when it does; the command
  names it on stderr and exits with 5. That can be a vCPU in a guest of its own guest
  (\"pending: in L2\"), which changes when that one exits to it.

"
    };
}

const ROOT_HELP: &str = concat!(
    "\
EXITS
  hlt         HLT
  mwait       MWAIT and MONITOR. KVM does not advertise MWAIT: only guests whose
              VMM does use it. By itself, it costs the VMX preemption timer.
  pause       PAUSE, and with it pause-loop exiting and the pause filter
  cstate      reads of MSR_CORE_C1_RES and MSR_CORE_C3/C6/C7_RESIDENCY; Intel
  aperfmperf  reads of IA32_APERF and IA32_MPERF. KVM clears CPUID leaf 6 ECX:
              only guests whose VMM exposes them use them.

SETS
  A set is written as 'all', 'none', or exits with commas between, as 'hlt,pause'.

",
    exit_status_of_change!(),
    "

EXAMPLES
  Can this host do it?
    exitpolicy doctor

  Guests of machine.slice halt natively:
    exitpolicy policy set machine.slice --disable hlt

  Those of shared.slice never do, even if their VMM asks KVM for it:
    exitpolicy policy set shared.slice --allow none

  Who gets what, and why?
    exitpolicy vm list
    exitpolicy policy show --effective pinned.slice

  VM 3 alone, whatever its cgroup says, and back:
    exitpolicy vm set 3 --disable hlt,pause
    exitpolicy vm reset 3

  Every VM as its VMM made it, and the module out of the kernel:
    exitpolicy unload

FILES
  /dev/exitpolicy          the module's device; root only
  /sys/kernel/exitpolicy/  the same state, as files
  /sys/fs/cgroup/          where cgroup v2 is usually mounted

SEE ALSO
  cgroups(7), systemd.slice(5), systemd-cgls(1), modprobe(8)",
);

const STATUS_HELP: &str = concat!(
    exit_status!(),
    "

EXAMPLES
  exitpolicy status
  exitpolicy status --json | jq .supported

SEE ALSO
  exitpolicy(1), exitpolicy-doctor(1)",
);

const SWITCH_HELP: &str = concat!(
    waiting!(),
    exit_status_of_change!(),
    "

FILES
  /sys/kernel/exitpolicy/enabled           the same switch
  /sys/kernel/exitpolicy/pending, holding  how far it has come

SEE ALSO
  exitpolicy(1), exitpolicy-status(1), exitpolicy-unload(1)",
);

const UNLOAD_HELP: &str = concat!(
    "\
NOTES
  A VM that differs from what its VMM asked for keeps the module in the kernel. So
  policies are switched off first, which gives every VM that runs what its VMM asked
  for; once each vCPU has it, the module goes, and its policies with it.

  If that takes longer than the time given, or if someone else uses the module, it
  stays, and so does the switch: policies are off, until 'exitpolicy on'.

",
    exit_status!(),
    "

EXAMPLES
  exitpolicy unload
  exitpolicy unload --timeout 1m

SEE ALSO
  exitpolicy(1), exitpolicy-off(1), rmmod(8), delete_module(2)",
);

const POLICY_HELP: &str = concat!(
    exit_status!(),
    "

SEE ALSO
  exitpolicy(1), exitpolicy-policy-set(1), exitpolicy-policy-show(1),
  exitpolicy-policy-list(1), exitpolicy-policy-clear(1)",
);

const POLICY_SET_HELP: &str = concat!(
    "\
NOTES
  The host sees a vCPU that halts natively as 100 % busy: its thread never sleeps. Give
  'hlt' and 'mwait' to guests that have their CPUs for themselves. The other threads of
  such a CPU wait for the end of a time slice.

  KVM does not offer paravirtual spinlocks (PV_UNHALT) to a guest that halts natively.
  On Intel, a VM whose guest was offered them is refused 'hlt' while it runs: it gets it
  when it is started again. Guests whose state is encrypted are refused all but 'hlt'.

",
    waiting!(),
    exit_status_of_change!(),
    "

EXAMPLES
  Guests on CPUs of their own:
    exitpolicy policy set /machine.slice/pinned.slice --disable hlt,pause

  Nobody in there gets more than native PAUSE, not even who asks KVM for it:
    exitpolicy policy set /machine.slice/tenants.slice --allow pause

  The default of the host, for all that have no policy nearer to them:
    exitpolicy policy set / --disable aperfmperf

  VMs that run stay as they are; those that start get it:
    exitpolicy policy set machine.slice --disable hlt --new-only

SEE ALSO
  exitpolicy(1), exitpolicy-policy-show(1), exitpolicy-policy-clear(1)",
);

const POLICY_CLEAR_HELP: &str = concat!(
    waiting!(),
    exit_status_of_change!(),
    "

SEE ALSO
  exitpolicy(1), exitpolicy-policy-set(1), exitpolicy-policy-show(1)",
);

const POLICY_SHOW_HELP: &str = concat!(
    "\
STATES
  given        every VM gets it disabled, but for those with an override of their own
  on request   a VM gets it disabled if its VMM asks for it
  withheld     no VM gets it disabled: some \"allow\" leaves it out
  floor        KVM itself disables it in every VM
  unsupported  KVM cannot disable it on this host

",
    exit_status!(),
    "

EXAMPLES
  exitpolicy policy show machine.slice
  exitpolicy policy show --effective /machine.slice/vm1.scope

SEE ALSO
  exitpolicy(1), exitpolicy-policy-set(1), exitpolicy-policy-list(1)",
);

const SEE_POLICY: &str = concat!(
    exit_status!(),
    "

SEE ALSO
  exitpolicy(1), exitpolicy-policy-set(1), exitpolicy-policy-show(1)",
);

const VM_HELP: &str = concat!(
    "\
COLUMNS
  id         counts up from 1, and is not used twice while the module stays loaded
  pid        of the VMM, in the initial pid namespace
  vcpus      number of vCPUs
  cgroup     of the VMM, when its VM was last decided on
  floor      what KVM itself had disabled
  requested  what the VMM asked for with KVM_CAP_X86_DISABLE_EXITS
  effective  what the VM should have; vCPUs with an override differ
  clamped    what the VMM asked for and \"allow\" took away
  override   what stands in for the cgroup's \"disable\", if 'vm set' said so
  adopted    whether the VM is older than the module
  state      whether it has what it should have: else how many of its vCPUs are pending
             or change at their next entry, and what is refused

OF EACH VCPU
  vcpu       its id, as in KVM_CREATE_VCPU
  override   its own, which stands in for that of the VM
  wanted     what it should have
  in force   what it has
  state      in force
             at next entry   it is not in the guest, and changes before it is
             pending         it is in the guest, and was asked to leave it
             pending: in L2  it is in a guest of its guest, and changes when that one
                             exits to it
             refused: guest uses PV_UNHALT
                             'hlt', on Intel: the guest was told of
                             KVM_FEATURE_PV_UNHALT, whose kick would not end a native
                             HLT
             refused: guest state is encrypted
                             all but 'hlt'
             refused: KVM runs on Hyper-V
                             all: KVM does not use the CPU's own VMCS

UNMANAGED
  VMs that KVM's debugfs has and the module does not know: the pid of the VMM, the number
  of the VM's file there, and why

  no vCPU yet     it is decided on when its first vCPU is created
  missed          the module should know it: see 'missed' in exitpolicy-status(1), and
                  what the kernel log says of exitpolicy
  TDX, or missed  the same, or it is a TDX VM, which is left alone: with
                  kvm_intel.tdx=Y, it cannot be told from outside
  the module works with no vendor module
                  it refused kvm_amd or kvm_intel: the kernel log says why

  Of several VMs of a VMM it may not be known which ones they are, but how many. The pid
  is unknown if the thread that made the VM has ended, or has its file under another
  number by now, and those that run the vCPUs do not lead to it either.

",
    exit_status!(),
    "

FILES
  /sys/kernel/debug/kvm/  the VMs that KVM has, each with a directory THREAD-FD

SEE ALSO
  exitpolicy(1), exitpolicy-vm-set(1), exitpolicy-vm-reset(1),
  exitpolicy-policy-show(1)",
);

const VM_SET_HELP: &str = concat!(
    "\
NOTES
  What a VM gets: floor, and of what its VMM requested or the override gives, that which
  \"allow\" of its cgroups lets through. An override goes with its VM, and it follows
  the VM to other cgroups. 'exitpolicy off' suspends it.

",
    waiting!(),
    exit_status_of_change!(),
    "

EXAMPLES
  exitpolicy vm set 3 --disable hlt,pause
  exitpolicy vm set 3 --disable none --vcpu 0 --timeout 5s

FILES
  /sys/kernel/exitpolicy/vms/*/disable        the same of a VM
  /sys/kernel/exitpolicy/vms/*/vcpu*/disable  the same of a vCPU

SEE ALSO
  exitpolicy(1), exitpolicy-vm-show(1), exitpolicy-vm-reset(1)",
);

const VM_RESET_HELP: &str = concat!(
    waiting!(),
    exit_status_of_change!(),
    "

EXAMPLES
  exitpolicy vm reset 3
  exitpolicy vm reset 3 --vcpu 0

SEE ALSO
  exitpolicy(1), exitpolicy-vm-show(1), exitpolicy-vm-set(1)",
);

const DOCTOR_HELP: &str = "\
EXIT STATUS
  0  the module can work here, or does
  1  something is missing
  2  the command line is wrong

FILES
  /proc/cpuinfo, /proc/config.gz, /boot/config-*, /lib/modules/*/, /sys/module/,
  /dev/kvm, /sys/kernel/security/lockdown, /sys/firmware/efi/efivars/

SEE ALSO
  exitpolicy(1), exitpolicy-status(1), mokutil(1), dkms(8)";

const COMPLETIONS_HELP: &str = "\
EXAMPLES
  exitpolicy completions bash > /usr/share/bash-completion/completions/exitpolicy
  exitpolicy completions zsh > /usr/share/zsh/site-functions/_exitpolicy
  exitpolicy completions fish > /usr/share/fish/vendor_completions.d/exitpolicy.fish

SEE ALSO
  exitpolicy(1)";

/// Decides which guest instructions run without VM exits, per cgroup
///
/// A VM exit is what makes HLT, MWAIT, PAUSE and some MSR reads of a guest slow: the CPU leaves
/// the guest, and KVM does the instruction's work in its place. Where a physical CPU belongs to
/// one guest, nobody gains from that. With the kernel module kvm_exitpolicy the administrator of
/// a host says for which cgroups KVM shall not intercept them. No VMM has to know of it.
///
/// A policy belongs to a cgroup (v2) and has two sets of exits: "disable", what every VM in the
/// cgroup gets, asked for or not, and "allow", the most that any VM in it may get. "disable" is
/// inherited from the nearest cgroup above that has a policy, "allow" from all of them: only what
/// each allows is allowed. A VM or one of its vCPUs can have an override, which stands in for
/// "disable".
///
/// Changes reach VMs that run: each vCPU changes on its way into the guest.
#[derive(Debug, Parser)]
#[command(version, after_long_help = ROOT_HELP, max_term_width = 100)]
pub struct Cli {
    /// Writes JSON, errors too
    #[arg(short, long, global = true, display_order = LAST)]
    pub json: bool,

    /// Writes JSON over many lines, for people
    #[arg(short, long, global = true, display_order = LAST)]
    pub pretty: bool,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Shows what the module found on this host and what it does
    ///
    /// Shows which of kvm_amd (svm) and kvm_intel (vmx) is in use; whether policies are applied
    /// (enabled); which exits KVM can disable on this host (supported); which it disables by
    /// itself in every VM (floor: pause, where the CPU cannot ration PAUSE exits); how many
    /// policies and VMs there are; how many vCPUs are on their way to what they should have
    /// (pending); how many VMs differ from what their VMM asked for, and keep the module in the
    /// kernel (holding); in how many decisions "allow" took away what a VMM had asked for
    /// (clamps); and how many VMs or vCPUs the module could not decide on (missed), since it was
    /// loaded.
    #[command(after_long_help = STATUS_HELP)]
    Status,

    /// Applies policies and overrides: the master switch
    ///
    /// From now on VMs get what the policies say, those that run too. After loading the module,
    /// policies are on.
    #[command(after_long_help = SWITCH_HELP)]
    On(Live),

    /// Gives every VM what its VMM asked for: the master switch
    ///
    /// From now on VMs are as on a host without the module, those that run too. Policies and
    /// overrides are kept, and apply again after 'exitpolicy on'.
    ///
    /// Names on stderr each vCPU that is still on its way, and the VMs that still differ from
    /// what their VMM asked for. Once there is none, nothing holds the module: it can be
    /// unloaded.
    #[command(after_long_help = SWITCH_HELP)]
    Off(Live),

    /// Switches policies off, waits for the VMs, and removes the module
    ///
    /// Waits until every VM has what its VMM asked for, and says on stderr what it waits for.
    #[command(after_long_help = UNLOAD_HELP)]
    Unload {
        /// How long it may take: from 1ms to 60s, as in 500ms or 5s
        #[arg(
            short,
            long,
            value_name = "TIME",
            default_value = "10s",
            allow_hyphen_values = true
        )]
        timeout: Timeout,
    },

    /// Sets, shows, lists and clears policies
    ///
    /// A policy has two sets of exits. "disable" is given to every VM in the cgroup, asked for or
    /// not, as far as KVM can disable it on this host. "allow" is the most that any VM in the
    /// cgroup may get, by a policy or because its VMM asks KVM for it.
    ///
    /// What a VM gets: floor, and of what its VMM requested or "disable" gives, that which
    /// "allow" lets through.
    #[command(subcommand, after_long_help = POLICY_HELP)]
    Policy(PolicyCommand),

    /// Shows the VMs and what was decided for them, and makes exceptions
    #[command(subcommand, after_long_help = VM_HELP)]
    Vm(VmCommand),

    /// Tells whether this host can run the module, and what is missing
    ///
    /// Looks at the CPU, KVM, the configuration of the kernel, ftrace, cgroups, signatures, and
    /// the module. Each check comes out as "ok", as "warning" (it works with a restriction, or
    /// could not be looked at) or as "missing", with what was found and what to do. Needs neither
    /// the module nor privileges, and changes nothing.
    #[command(after_long_help = DOCTOR_HELP)]
    Doctor,

    /// Prints a completion script for a shell
    #[command(after_long_help = COMPLETIONS_HELP)]
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Those that completions are made and tried for.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Makes or changes the policy of a cgroup
    ///
    /// A set that is not given stays as it is; in a new policy, "disable" is none and "allow" is
    /// all. VMs that run in the cgroup change too, unless --new-only is given.
    ///
    /// Writes the policy, and notes to stderr where it does not do what one might expect.
    #[command(after_long_help = POLICY_SET_HELP)]
    Set(PolicySet),

    /// Shows the policy of a cgroup, or what holds for it and why
    ///
    /// Without --effective, the policy of this very cgroup. With it, what a VM in the cgroup
    /// gets: for each exit its state, and which policies make it so.
    #[command(after_long_help = POLICY_SHOW_HELP)]
    Show {
        #[command(flatten)]
        target: Target,

        /// Shows what holds for VMs in the cgroup, inheritance included, and why
        #[arg(short, long)]
        effective: bool,
    },

    /// Lists all policies
    ///
    /// Policies of cgroups that were removed go away by themselves; one that has not gone yet is
    /// shown as removed.
    #[command(after_long_help = SEE_POLICY)]
    List,

    /// Removes the policy of a cgroup
    ///
    /// The cgroup inherits again. VMs that run in it change too, unless --new-only is given.
    #[command(after_long_help = POLICY_CLEAR_HELP)]
    Clear {
        #[command(flatten)]
        target: Target,

        #[command(flatten)]
        live: Live,
    },
}

/// How a change reaches VMs that run.
#[derive(Clone, Copy, Debug, Args)]
pub struct Live {
    /// Leaves VMs that run as they are
    ///
    /// The change is for those that start from now on. A VM that runs keeps what it has until
    /// something else changes that decides about it.
    #[arg(short, long)]
    pub new_only: bool,

    #[command(flatten)]
    pub waiting: Waiting,
}

impl From<Live> for Apply {
    fn from(live: Live) -> Self {
        Self {
            new_only: live.new_only,
            wait: live.waiting.into(),
        }
    }
}

/// Whether vCPUs are waited for.
#[derive(Clone, Copy, Debug, Args)]
pub struct Waiting {
    /// Does not wait for vCPUs that are in the guest
    #[arg(long)]
    pub no_wait: bool,

    /// How long to wait for them: from 1ms to 60s, as in 500ms or 5s
    #[arg(
        short,
        long,
        value_name = "TIME",
        default_value = "1s",
        allow_hyphen_values = true,
        conflicts_with = "no_wait"
    )]
    pub timeout: Timeout,
}

impl From<Waiting> for Wait {
    fn from(waiting: Waiting) -> Self {
        if waiting.no_wait {
            Self::No
        } else {
            Self::UpTo(waiting.timeout)
        }
    }
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("sets").required(true).multiple(true))]
pub struct PolicySet {
    #[command(flatten)]
    pub target: Target,

    /// What every VM in the cgroup gets, asked for or not
    ///
    /// "all", "none", or some of mwait, hlt, pause, cstate and aperfmperf with commas between.
    #[arg(
        short,
        long,
        value_name = "SET",
        group = "sets",
        value_parser = ExitsParser,
        hide_possible_values = true
    )]
    pub disable: Option<Exits>,

    /// The most that any VM in the cgroup may get
    ///
    /// "all", "none", or some of mwait, hlt, pause, cstate and aperfmperf with commas between.
    #[arg(
        short,
        long,
        value_name = "SET",
        group = "sets",
        value_parser = ExitsParser,
        hide_possible_values = true
    )]
    pub allow: Option<Exits>,

    #[command(flatten)]
    pub live: Live,
}

#[derive(Debug, Args)]
pub struct Target {
    /// The cgroup: its directory, or its path in the v2 hierarchy
    ///
    /// /sys/fs/cgroup/machine.slice, /machine.slice and machine.slice are the same cgroup; a path
    /// that begins with ./ or ../ goes out from the current directory. The root, /, is the
    /// default of the host.
    #[arg(value_hint = ValueHint::DirPath)]
    pub cgroup: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Lists the VMs
    ///
    /// Those that run. The module takes over VMs that are older than itself when it is loaded.
    /// Below them, as "unmanaged", are VMs that KVM has and the module does not know, and why it
    /// does not.
    #[command(after_long_help = VM_HELP)]
    List,

    /// Shows one VM and its vCPUs
    ///
    /// For each vCPU what it should have, what is in force, and if that differs, why.
    #[command(after_long_help = VM_HELP)]
    Show {
        #[command(flatten)]
        vm: Id,
    },

    /// Gives a VM or one of its vCPUs an override
    ///
    /// It stands in for "disable" of the cgroup's policy: for the whole VM, or with --vcpu for
    /// one vCPU. "allow" holds all the same.
    #[command(after_long_help = VM_SET_HELP)]
    Set {
        #[command(flatten)]
        vm: Id,

        /// What the VM or the vCPU gets, as far as "allow" lets it through
        ///
        /// "all", "none", or some of mwait, hlt, pause, cstate and aperfmperf with commas
        /// between.
        #[arg(
            short,
            long,
            value_name = "SET",
            value_parser = ExitsParser,
            hide_possible_values = true
        )]
        disable: Exits,

        /// One vCPU, by its id in KVM_CREATE_VCPU
        #[arg(long, value_name = "N")]
        vcpu: Option<u32>,

        #[command(flatten)]
        waiting: Waiting,
    },

    /// Takes overrides away
    ///
    /// That of the VM and those of all its vCPUs, or with --vcpu that of one vCPU. What its
    /// cgroup says holds again; for a vCPU, what its VM says.
    #[command(after_long_help = VM_RESET_HELP)]
    Reset {
        #[command(flatten)]
        vm: Id,

        /// One vCPU, by its id in KVM_CREATE_VCPU
        #[arg(long, value_name = "N")]
        vcpu: Option<u32>,

        #[command(flatten)]
        waiting: Waiting,
    },
}

#[derive(Clone, Copy, Debug, Args)]
pub struct Id {
    /// The VM's id, from 'exitpolicy vm list'
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub id: u64,
}

/// Reads a set of exits. The possible values are for completion, and are not all there are.
#[derive(Clone)]
struct ExitsParser;

impl TypedValueParser for ExitsParser {
    type Value = Exits;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<Exits, clap::Error> {
        StringValueParser::new()
            .try_map(|text| text.parse::<Exits>())
            .parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let names = Exits::NAMES.into_iter().map(|(_, name)| name);
        Some(Box::new(
            names.chain(["all", "none"]).map(PossibleValue::new),
        ))
    }
}
