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
use exitpolicy::policy::Exits;
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
    exit_status!(),
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
    exit_status!(),
    "

FILES
  /sys/kernel/exitpolicy/enabled  the same switch

SEE ALSO
  exitpolicy(1), exitpolicy-status(1)",
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

",
    exit_status!(),
    "

EXAMPLES
  Guests on CPUs of their own:
    exitpolicy policy set /machine.slice/pinned.slice --disable hlt,pause

  Nobody in there gets more than native PAUSE, not even who asks KVM for it:
    exitpolicy policy set /machine.slice/tenants.slice --allow pause

  The default of the host, for all that have no policy nearer to them:
    exitpolicy policy set / --disable aperfmperf

SEE ALSO
  exitpolicy(1), exitpolicy-policy-show(1), exitpolicy-policy-clear(1)",
);

const POLICY_SHOW_HELP: &str = concat!(
    "\
STATES
  given        every VM gets it disabled
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
  cgroup     of the VMM, at the time of the decision
  floor      what KVM itself had disabled
  requested  what the VMM asked for with KVM_CAP_X86_DISABLE_EXITS
  effective  what the VM got
  clamped    what the VMM asked for and \"allow\" took away

",
    exit_status!(),
    "

SEE ALSO
  exitpolicy(1), exitpolicy-policy-show(1)",
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
/// each allows is allowed. It is decided when the first vCPU of a VM is made, and holds for the
/// life of the VM.
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
    /// to new VMs; which exits KVM can disable on this host (supported); which it disables by
    /// itself in every VM (floor: pause, where the CPU cannot ration PAUSE exits); how many
    /// policies and VMs there are; in how many decisions "allow" took away what a VMM had asked
    /// for (clamps); and how many VMs or vCPUs the module could not decide on (missed), since it
    /// was loaded.
    #[command(after_long_help = STATUS_HELP)]
    Status,

    /// Applies policies to new VMs: the master switch
    ///
    /// The first vCPU of a VM decides: from now on, VMs get what the policies say. VMs that run
    /// already keep what they have. After loading the module, policies are on.
    #[command(after_long_help = SWITCH_HELP)]
    On,

    /// Leaves new VMs alone: the master switch
    ///
    /// From now on, new VMs are as on a host without the module. VMs that run already keep what
    /// they have, and policies stay as they are.
    #[command(after_long_help = SWITCH_HELP)]
    Off,

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

    /// Shows the VMs and what was decided for them
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
    /// all. VMs that run already keep what they have.
    ///
    /// Writes the policy, and notes to stderr where it will not do what one might expect.
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
    /// The cgroup inherits again. VMs that run already keep what they have.
    #[command(after_long_help = SEE_POLICY)]
    Clear {
        #[command(flatten)]
        target: Target,
    },
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
    /// Those that run and that the module has decided on, which are not the ones that are older
    /// than the module.
    #[command(after_long_help = VM_HELP)]
    List,

    /// Shows one VM
    #[command(after_long_help = VM_HELP)]
    Show {
        /// The VM's id, from 'exitpolicy vm list'
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,
    },
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
