// SPDX-License-Identifier: GPL-2.0

//! What each command does.

use crate::{
    cli::{
        Cli,
        Command,
        Live,
        PolicyCommand,
        PolicySet,
        Shell,
        Target,
        VmCommand,
        Waiting, //
    },
    notes::{
        self,
        Situation,
        Surroundings, //
    },
    output::{
        CgroupView,
        ChangeView,
        ClearedView,
        DoctorView,
        EffectiveView,
        Format,
        Note,
        OffView,
        OnView,
        PolicyListView,
        PolicyView,
        Remaining,
        StatusView,
        StragglerView,
        UnloadView,
        UnmanagedView,
        View,
        VmListView,
        VmView, //
    },
    say,
    FAILURE,
    ON_THEIR_WAY, //
};
use clap::CommandFactory;
use exitpolicy::{
    cgroup::{
        Cgroup,
        Hierarchy, //
    },
    device::Vm,
    doctor,
    explain::explain,
    live::{
        Apply,
        State,
        Timeout,
        Vcpu,
        Wait, //
    },
    policy::Exits,
    unload,
    unmanaged::{
        Known,
        Kvm,
        Reason,
        Unmanaged, //
    },
    Device,
    Error,
    Host, //
};
use std::{
    collections::BTreeMap,
    env,
    process::ExitCode,
    thread,
    time::{
        Duration,
        Instant, //
    }, //
};

/// What a command has to say, and how it went.
pub struct Answer {
    /// For stdout.
    pub text: String,
    /// For stderr, unless `text` has them already.
    pub notes: Vec<Note>,
    pub status: ExitCode,
}

/// Carries out the command.
pub fn run(cli: &Cli, format: Format) -> anyhow::Result<Answer> {
    let runner = Runner {
        // For tests, and undocumented: a directory that stands for `/`.
        host: env::var_os("EXITPOLICY_TEST_ROOT").map_or_else(Host::default, Host::new),
        format,
    };
    let answer = match &cli.command {
        Command::Status => runner.status()?,
        Command::On(live) => runner.switch_on(*live)?,
        Command::Off(live) => runner.switch_off(*live)?,
        Command::Unload { timeout } => runner.unload(*timeout)?,
        Command::Policy(PolicyCommand::Set(set)) => runner.set_policy(set)?,
        Command::Policy(PolicyCommand::Show { target, effective }) => {
            if *effective {
                runner.show_effective(target)?
            } else {
                runner.show_policy(target)?
            }
        }
        Command::Policy(PolicyCommand::List) => runner.list_policies()?,
        Command::Policy(PolicyCommand::Clear { target, live }) => {
            runner.clear_policy(target, *live)?
        }
        Command::Vm(VmCommand::List) => runner.list_vms()?,
        Command::Vm(VmCommand::Show { vm }) => runner.show_vm(vm.id)?,
        Command::Vm(VmCommand::Set {
            vm,
            disable,
            vcpu,
            waiting,
        }) => runner.set_vm(vm.id, *vcpu, Some(*disable), *waiting)?,
        Command::Vm(VmCommand::Reset { vm, vcpu, waiting }) => {
            runner.set_vm(vm.id, *vcpu, None, *waiting)?
        }
        Command::Doctor => runner.doctor(),
        Command::Completions { shell } => completions(*shell)?,
    };
    Ok(answer)
}

/// How often [`Runner::unload`] looks.
const INTERVAL: Duration = Duration::from_millis(100);

struct Runner {
    host: Host,
    format: Format,
}

/// A VM as it was after a change.
struct Seen {
    vm: Vm,
    vcpus: Vec<Vcpu>,
}

impl Seen {
    /// What any of the vCPUs should have; what the VM should, if it has none.
    fn wanted(&self) -> Exits {
        let wanted = self.vcpus.iter().map(|vcpu| vcpu.wanted);
        wanted
            .reduce(|one, other| one | other)
            .unwrap_or(self.vm.effective)
    }
}

/// What came of a change.
struct Outcome {
    /// Those that are on their way.
    stragglers: Vec<Vcpu>,
    notes: Vec<Note>,
    status: ExitCode,
}

impl Outcome {
    /// `in_vain` is how many vCPUs the module waited for in vain; `seen`, the VMs that were to
    /// change, with those of their vCPUs that were.
    fn new(apply: Apply, in_vain: u32, seen: &[Seen]) -> Self {
        let stragglers = if apply.new_only || (apply.wait != Wait::No && in_vain == 0) {
            Vec::new()
        } else {
            of_all(seen, |vcpu| vcpu.state.is_behind())
        };
        Self::with(apply, in_vain, seen, stragglers)
    }

    /// As [`Outcome::new`], where those that change at their next entry matter, too.
    fn of_off(apply: Apply, in_vain: u32, seen: &[Seen]) -> Self {
        let stragglers = if apply.new_only {
            Vec::new()
        } else {
            of_all(seen, |vcpu| vcpu.state != State::InForce)
        };
        Self::with(apply, in_vain, seen, stragglers)
    }

    fn with(apply: Apply, in_vain: u32, seen: &[Seen], stragglers: Vec<Vcpu>) -> Self {
        // All may have arrived meanwhile.
        let is_behind = stragglers.iter().any(|vcpu| vcpu.state.is_behind());
        let mut notes = Vec::new();
        if apply.new_only {
            notes.push(notes::on_new_only());
        } else {
            let refused = seen
                .iter()
                .filter_map(|seen| notes::on_refused(&seen.vm, &seen.vcpus));
            notes.extend(refused);
            notes.extend(notes::on_stragglers(&stragglers));
        }
        Self {
            stragglers,
            notes,
            status: if apply.wait != Wait::No && in_vain > 0 && is_behind {
                ON_THEIR_WAY.into()
            } else {
                ExitCode::SUCCESS
            },
        }
    }

    fn views(&self) -> Vec<StragglerView> {
        self.stragglers.iter().map(StragglerView::from).collect()
    }
}

fn of_all(seen: &[Seen], is_meant: impl Fn(&Vcpu) -> bool) -> Vec<Vcpu> {
    seen.iter()
        .flat_map(|seen| seen.vcpus.iter().copied())
        .filter(is_meant)
        .collect()
}

/// The module was not unloaded, after policies had been switched off for that.
#[derive(Debug, thiserror::Error)]
pub enum LeftOff {
    /// VMs did not become in time what their VMM asked for.
    #[error(
        "cannot unload kvm_exitpolicy: {vms} not given back in {timeout} what the VMM asked \
         for{vcpus}"
    )]
    Held {
        timeout: Timeout,
        vms: String,
        vcpus: String,
        remaining: Remaining,
    },

    /// The kernel would not.
    #[error(transparent)]
    Refused(Error),
}

impl LeftOff {
    pub fn cause(&self) -> Option<&Error> {
        match self {
            Self::Held { .. } => None,
            Self::Refused(error) => Some(error),
        }
    }

    pub fn remaining(&self) -> Option<&Remaining> {
        match self {
            Self::Held { remaining, .. } => Some(remaining),
            Self::Refused(_) => None,
        }
    }

    pub fn hint(&self) -> String {
        let what = match self {
            Self::Held { .. } => {
                "a vCPU changes on its way into the guest: let these VMs run, or end them, and try \
                 again"
                    .into()
            }
            Self::Refused(Error::NotPermitted { .. }) => {
                "run it as root, outside of containers: to unload a module takes CAP_SYS_MODULE"
                    .into()
            }
            Self::Refused(error) => error.hint().unwrap_or_else(|| "try again".into()),
        };
        format!("{what}; policies stay switched off until 'exitpolicy on'")
    }
}

impl Runner {
    fn status(&self) -> Result<Answer, Error> {
        let info = Device::open(&self.host)?.info()?;
        let notes = notes::on_status(&info, Surroundings::of(&self.host));
        Ok(self.answer(&StatusView::from(info), notes))
    }

    fn switch_on(&self, live: Live) -> Result<Answer, Error> {
        let device = Device::open(&self.host)?;
        let apply = Apply::from(live);
        let in_vain = device.set_enabled(true, apply)?;
        let outcome = Outcome::new(apply, in_vain, &look(&device, |_| true)?);
        let view = OnView {
            enabled: true,
            stragglers: outcome.views(),
        };
        Ok(self.answer_change(&view, outcome, Vec::new()))
    }

    fn switch_off(&self, live: Live) -> Result<Answer, Error> {
        let device = Device::open(&self.host)?;
        let apply = Apply::from(live);
        let in_vain = device.set_enabled(false, apply)?;
        let seen = look(&device, |_| true)?;
        let mut outcome = Outcome::of_off(apply, in_vain, &seen);
        let holding = device.info()?.holding;
        let holders = holders(&seen, holding);
        if holding > 0 {
            outcome.notes.push(notes::on_holders(&holders, holding));
        }
        let view = OffView {
            enabled: false,
            remaining: Remaining {
                stragglers: outcome.views(),
                holders,
            },
        };
        Ok(self.answer_change(&view, outcome, Vec::new()))
    }

    fn unload(&self, timeout: Timeout) -> anyhow::Result<Answer> {
        unload::is_possible(&self.host)?;
        let device = Device::open(&self.host)?;
        let until = Instant::now() + timeout.duration();
        let off = Apply {
            new_only: false,
            wait: Wait::UpTo(timeout.min(Timeout::DEFAULT)),
        };
        device.set_enabled(false, off)?;

        let mut progress = Progress::new(self.format);
        loop {
            let info = device.info()?;
            if info.holding == 0 {
                break;
            }
            progress.say(format!(
                "waiting for {}; vCPUs on their way: {}",
                notes::vms_in_words(&[], info.holding),
                info.pending,
            ));
            if Instant::now() >= until {
                return Err(held(&device, timeout, info.holding)?.into());
            }
            thread::sleep(INTERVAL);
        }

        // What cannot be taken back does not keep the module.
        let notes = look(&device, |_| true)?
            .iter()
            .filter_map(|seen| notes::on_refused(&seen.vm, &seen.vcpus))
            .collect();
        // It is a use of the module, too.
        drop(device);
        loop {
            match unload::remove() {
                Ok(true) => break,
                Ok(false) if Instant::now() < until => {
                    progress.say("waiting for those who have the device open".into());
                    thread::sleep(INTERVAL);
                }
                Ok(false) => return Err(LeftOff::Refused(unload::in_use(&self.host)).into()),
                Err(error) => return Err(LeftOff::Refused(error).into()),
            }
        }
        Ok(self.answer(&UnloadView { unloaded: true }, notes))
    }

    fn set_policy(&self, set: &PolicySet) -> Result<Answer, Error> {
        let (device, hierarchy, cgroup) = self.open(&set.target)?;
        let apply = Apply::from(set.live);
        let in_vain = device.set_policy(&cgroup, set.disable, set.allow, apply)?;

        let seen = look_below(&device, &hierarchy, &cgroup)?;
        let outcome = Outcome::new(apply, in_vain, &seen);
        let policy = device.policy(&cgroup)?;
        let notes = notes::on_policy(&Situation {
            info: device.info()?,
            policy,
            resolved: device.resolve_policy(&cgroup)?,
            surroundings: Surroundings::of(&self.host),
        });
        let view = ChangeView {
            changed: PolicyView::new((&cgroup).into(), policy),
            stragglers: outcome.views(),
        };
        Ok(self.answer_change(&view, outcome, notes))
    }

    fn show_policy(&self, target: &Target) -> Result<Answer, Error> {
        let (device, _, cgroup) = self.open(target)?;
        let policy = device.policy(&cgroup)?;
        Ok(self.answer(&PolicyView::new((&cgroup).into(), policy), Vec::new()))
    }

    fn show_effective(&self, target: &Target) -> Result<Answer, Error> {
        let device = Device::open(&self.host)?;
        let hierarchy = Hierarchy::find(&self.host)?;
        let cgroup = hierarchy.open(&target.cgroup)?;
        let info = device.info()?;

        let mut policies = Vec::new();
        for above in hierarchy.self_and_ancestors(&cgroup)? {
            match device.policy(&above) {
                Ok(policy) => policies.push((above, policy)),
                Err(Error::NoPolicy { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let by_id: Vec<_> = policies
            .iter()
            .map(|(cgroup, policy)| (cgroup.id(), *policy))
            .collect();
        let (resolved, reasons) = explain(&by_id, info.floor, info.supported);

        let mut notes = Vec::new();
        if !info.enabled {
            notes.push(notes::off());
        }
        let in_module = device.resolve_policy(&cgroup)?;
        if in_module != resolved {
            notes.push(notes::differs(in_module.disable, in_module.allow));
        }
        let view = EffectiveView::new(
            (&cgroup).into(),
            info.enabled,
            policies
                .iter()
                .map(|(cgroup, policy)| (cgroup.into(), *policy))
                .collect(),
            resolved,
            &reasons,
        );
        Ok(self.answer(&view, notes))
    }

    fn list_policies(&self) -> Result<Answer, Error> {
        let device = Device::open(&self.host)?;
        let hierarchy = self.hierarchy_if_any();
        let policies = device
            .policies()
            .map(|found| {
                let (id, policy) = found?;
                let cgroup = CgroupView::of_id(hierarchy.as_ref(), id);
                Ok(PolicyView::new(cgroup, policy))
            })
            .collect::<Result<_, Error>>()?;
        Ok(self.answer(&PolicyListView { policies }, Vec::new()))
    }

    fn clear_policy(&self, target: &Target, live: Live) -> Result<Answer, Error> {
        let (device, hierarchy, cgroup) = self.open(target)?;
        let apply = Apply::from(live);
        let in_vain = device.clear_policy(&cgroup, apply)?;

        let seen = look_below(&device, &hierarchy, &cgroup)?;
        let outcome = Outcome::new(apply, in_vain, &seen);
        let view = ChangeView {
            changed: ClearedView {
                cgroup: (&cgroup).into(),
                cleared: true,
            },
            stragglers: outcome.views(),
        };
        Ok(self.answer_change(&view, outcome, Vec::new()))
    }

    fn list_vms(&self) -> Result<Answer, Error> {
        let device = Device::open(&self.host)?;
        // Before the module is asked: it knows a VM before KVM shows a vCPU of it.
        let kvm = Kvm::look(&self.host);
        let mut seen = look(&device, |_| true)?;
        let unmanaged = kvm.and_then(|kvm| unmanaged(&device, kvm, &mut seen));
        let mut notes = Vec::new();
        let unmanaged = match unmanaged {
            Ok(unmanaged) => Some(unmanaged.iter().map(UnmanagedView::from).collect()),
            Err(error) => {
                notes.push(notes::on_unmanaged_unknown(&error));
                None
            }
        };
        let hierarchy = self.hierarchy_if_any();
        let vms = seen
            .iter()
            .map(|seen| vm_view(hierarchy.as_ref(), seen))
            .collect();
        Ok(self.answer(&VmListView { vms, unmanaged }, notes))
    }

    fn show_vm(&self, id: u64) -> Result<Answer, Error> {
        let seen = look_at(&Device::open(&self.host)?, id)?;
        let view = vm_view(self.hierarchy_if_any().as_ref(), &seen);
        Ok(self.answer(&view, Vec::new()))
    }

    /// Sets an override, or takes it away.
    fn set_vm(
        &self,
        id: u64,
        vcpu: Option<u32>,
        disable: Option<Exits>,
        waiting: Waiting,
    ) -> Result<Answer, Error> {
        let device = Device::open(&self.host)?;
        let wait = Wait::from(waiting);
        let in_vain = match disable {
            Some(disable) => device.set_vm(id, vcpu, disable, wait)?,
            None => device.reset_vm(id, vcpu, wait)?,
        };

        let mut seen = look_at(&device, id)?;
        let view = vm_view(self.hierarchy_if_any().as_ref(), &seen);
        if let Some(meant) = vcpu {
            seen.vcpus.retain(|vcpu| vcpu.id == meant);
        }
        let notes = match disable {
            Some(disable) => notes::on_override(
                &device.info()?,
                disable,
                seen.wanted(),
                Surroundings::of(&self.host),
            ),
            None => Vec::new(),
        };
        let apply = Apply {
            new_only: false,
            wait,
        };
        let outcome = Outcome::new(apply, in_vain, &[seen]);
        let view = ChangeView {
            changed: view,
            stragglers: outcome.views(),
        };
        Ok(self.answer_change(&view, outcome, notes))
    }

    fn doctor(&self) -> Answer {
        let view = DoctorView::from(doctor::examine(&self.host));
        let status = if view.can_work { 0 } else { FAILURE };
        Answer {
            status: status.into(),
            ..self.answer(&view, Vec::new())
        }
    }

    /// Opens the device first: without the module, nothing about the cgroup matters.
    fn open(&self, target: &Target) -> Result<(Device, Hierarchy, Cgroup), Error> {
        let device = Device::open(&self.host)?;
        let hierarchy = Hierarchy::find(&self.host)?;
        let cgroup = hierarchy.open(&target.cgroup)?;
        Ok((device, hierarchy, cgroup))
    }

    /// Lists do without paths where there is nothing to find them in.
    fn hierarchy_if_any(&self) -> Option<Hierarchy> {
        Hierarchy::find(&self.host).ok()
    }

    /// `notes` come before those on what came of the change.
    fn answer_change(&self, view: &impl View, outcome: Outcome, mut notes: Vec<Note>) -> Answer {
        notes.extend(outcome.notes);
        Answer {
            status: outcome.status,
            ..self.answer(view, notes)
        }
    }

    fn answer(&self, view: &impl View, notes: Vec<Note>) -> Answer {
        Answer {
            text: self.format.render(view, &notes),
            notes,
            status: ExitCode::SUCCESS,
        }
    }
}

/// What is said while something is waited for, each thing once. JSON has no place for it.
struct Progress {
    format: Format,
    said: String,
}

impl Progress {
    fn new(format: Format) -> Self {
        Self {
            format,
            said: String::new(),
        }
    }

    fn say(&mut self, text: String) {
        if self.format == Format::Text && text != self.said {
            say(&format!("{text}\n"));
            self.said = text;
        }
    }
}

/// The VMs that are meant, and all their vCPUs.
fn look(device: &Device, mut is_meant: impl FnMut(&Vm) -> bool) -> Result<Vec<Seen>, Error> {
    let vms: Vec<_> = device.vms().collect::<Result<_, _>>()?;
    vms.into_iter()
        .filter(|vm| is_meant(vm))
        .map(|vm| {
            let vcpus = device.vcpus(vm.id).collect::<Result<_, _>>()?;
            Ok(Seen { vm, vcpus })
        })
        .collect()
}

fn look_at(device: &Device, id: u64) -> Result<Seen, Error> {
    let vm = device.vm(id)?;
    let vcpus = device.vcpus(id).collect::<Result<_, _>>()?;
    Ok(Seen { vm, vcpus })
}

/// The VMs that the module does not know. `seen` are those that it knows, which it may be asked for
/// again.
fn unmanaged(
    device: &Device,
    mut kvm: Kvm<'_>,
    seen: &mut Vec<Seen>,
) -> Result<Vec<Unmanaged>, Error> {
    let vendor = device.info()?.vendor;
    let unmanaged = kvm.unmanaged(&known(seen), vendor);
    if unmanaged.iter().all(|vm| vm.reason == Reason::NoVcpu) {
        return Ok(unmanaged);
    }
    // One may have ended, or got its first vCPU, while we looked.
    *seen = look(device, |_| true)?;
    kvm.forget_ended()?;
    Ok(kvm.unmanaged(&known(seen), vendor))
}

fn known(seen: &[Seen]) -> Vec<Known> {
    seen.iter()
        .map(|seen| Known {
            pid: seen.vm.pid,
            vcpus: seen.vcpus.iter().map(|vcpu| vcpu.id).collect(),
        })
        .collect()
}

/// The VMs in a cgroup and below, with those whose cgroup cannot be found from here.
fn look_below(device: &Device, hierarchy: &Hierarchy, cgroup: &Cgroup) -> Result<Vec<Seen>, Error> {
    let mut known = BTreeMap::new();
    look(device, |vm| {
        *known
            .entry(vm.cgroup)
            .or_insert_with(|| match hierarchy.path_of(vm.cgroup) {
                Ok(Some(path)) => path.starts_with(cgroup.path()),
                Ok(None) => false,
                Err(_) => true,
            })
    })
}

/// The VMs that keep the module, as far as can be seen from outside.
fn holders(seen: &[Seen], holding: u64) -> Vec<u64> {
    if holding == 0 {
        return Vec::new();
    }
    seen.iter()
        .filter(|seen| seen.vm.holds(&seen.vcpus))
        .map(|seen| seen.vm.id)
        .collect()
}

/// Why the module stays.
fn held(device: &Device, timeout: Timeout, holding: u64) -> Result<LeftOff, Error> {
    let seen = look(device, |_| true)?;
    let holders = holders(&seen, holding);
    let vcpus: String = seen
        .iter()
        .filter(|seen| holders.contains(&seen.vm.id))
        .filter_map(|seen| {
            let meant: Vec<_> = seen
                .vcpus
                .iter()
                .filter(|vcpu| vcpu.state != State::InForce)
                .copied()
                .collect();
            (!meant.is_empty())
                .then(|| format!("; VM {}: {}", seen.vm.id, notes::vcpus_in_words(&meant)))
        })
        .collect();
    let stragglers = of_all(&seen, |vcpu| vcpu.state != State::InForce);
    Ok(LeftOff::Held {
        timeout,
        vms: format!(
            "{} {}",
            notes::vms_in_words(&holders, holding),
            if holding == 1 { "was" } else { "were" },
        ),
        vcpus,
        remaining: Remaining {
            stragglers: stragglers.iter().map(StragglerView::from).collect(),
            holders,
        },
    })
}

fn vm_view(hierarchy: Option<&Hierarchy>, seen: &Seen) -> VmView {
    let cgroup = CgroupView::of_id(hierarchy, seen.vm.cgroup);
    VmView::new(seen.vm, &seen.vcpus, cgroup)
}

/// A script is a script, whatever the format.
fn completions(shell: Shell) -> anyhow::Result<Answer> {
    let mut command = Cli::command();
    let mut script = Vec::new();
    let name = command.get_name().to_owned();
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    clap_complete::generate(shell, &mut command, name, &mut script);
    Ok(Answer {
        text: String::from_utf8(script)?,
        notes: Vec::new(),
        status: ExitCode::SUCCESS,
    })
}
