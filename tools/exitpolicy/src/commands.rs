// SPDX-License-Identifier: GPL-2.0

//! What each command does.

use crate::{
    cli::{
        Cli,
        Command,
        PolicyCommand,
        PolicySet,
        Shell,
        Target,
        VmCommand, //
    },
    notes::{
        self,
        Situation, //
    },
    output::{
        CgroupView,
        ClearedView,
        DoctorView,
        EffectiveView,
        Format,
        Note,
        PolicyListView,
        PolicyView,
        StatusView,
        SwitchView,
        View,
        VmListView,
        VmView, //
    },
    FAILURE, //
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
    Device,
    Error,
    Host, //
};
use std::{
    env,
    process::ExitCode, //
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
        Command::On => runner.switch(true)?,
        Command::Off => runner.switch(false)?,
        Command::Policy(PolicyCommand::Set(set)) => runner.set_policy(set)?,
        Command::Policy(PolicyCommand::Show { target, effective }) => {
            if *effective {
                runner.show_effective(target)?
            } else {
                runner.show_policy(target)?
            }
        }
        Command::Policy(PolicyCommand::List) => runner.list_policies()?,
        Command::Policy(PolicyCommand::Clear { target }) => runner.clear_policy(target)?,
        Command::Vm(VmCommand::List) => runner.list_vms()?,
        Command::Vm(VmCommand::Show { id }) => runner.show_vm(*id)?,
        Command::Doctor => runner.doctor(),
        Command::Completions { shell } => completions(*shell)?,
    };
    Ok(answer)
}

struct Runner {
    host: Host,
    format: Format,
}

impl Runner {
    fn status(&self) -> Result<Answer, Error> {
        let info = Device::open(&self.host)?.info()?;
        let notes = notes::on_status(&info, doctor::is_exposed_to_smt_rsb(&self.host));
        Ok(self.answer(&StatusView::from(info), notes))
    }

    fn switch(&self, enabled: bool) -> Result<Answer, Error> {
        Device::open(&self.host)?.set_enabled(enabled)?;
        Ok(self.answer(&SwitchView { enabled }, vec![notes::on_switch()]))
    }

    fn set_policy(&self, set: &PolicySet) -> Result<Answer, Error> {
        let (device, cgroup) = self.open(&set.target)?;
        device.set_policy(&cgroup, set.disable, set.allow)?;

        let policy = device.policy(&cgroup)?;
        let notes = notes::on_policy(&Situation {
            info: device.info()?,
            policy,
            resolved: device.resolve_policy(&cgroup)?,
            exposed_to_smt_rsb: doctor::is_exposed_to_smt_rsb(&self.host),
        });
        Ok(self.answer(&PolicyView::new((&cgroup).into(), policy), notes))
    }

    fn show_policy(&self, target: &Target) -> Result<Answer, Error> {
        let (device, cgroup) = self.open(target)?;
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

    fn clear_policy(&self, target: &Target) -> Result<Answer, Error> {
        let (device, cgroup) = self.open(target)?;
        device.clear_policy(&cgroup)?;
        let view = ClearedView {
            cgroup: (&cgroup).into(),
            cleared: true,
        };
        Ok(self.answer(&view, Vec::new()))
    }

    fn list_vms(&self) -> Result<Answer, Error> {
        let device = Device::open(&self.host)?;
        let hierarchy = self.hierarchy_if_any();
        let vms = device
            .vms()
            .map(|vm| Ok(vm_view(hierarchy.as_ref(), vm?)))
            .collect::<Result<_, Error>>()?;
        Ok(self.answer(&VmListView { vms }, Vec::new()))
    }

    fn show_vm(&self, id: u64) -> Result<Answer, Error> {
        let vm = Device::open(&self.host)?.vm(id)?;
        let view = vm_view(self.hierarchy_if_any().as_ref(), vm);
        Ok(self.answer(&view, Vec::new()))
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
    fn open(&self, target: &Target) -> Result<(Device, Cgroup), Error> {
        let device = Device::open(&self.host)?;
        let cgroup = Hierarchy::find(&self.host)?.open(&target.cgroup)?;
        Ok((device, cgroup))
    }

    /// Lists do without paths where there is nothing to find them in.
    fn hierarchy_if_any(&self) -> Option<Hierarchy> {
        Hierarchy::find(&self.host).ok()
    }

    fn answer(&self, view: &impl View, notes: Vec<Note>) -> Answer {
        Answer {
            text: self.format.render(view, &notes),
            notes,
            status: ExitCode::SUCCESS,
        }
    }
}

fn vm_view(hierarchy: Option<&Hierarchy>, vm: Vm) -> VmView {
    let cgroup = CgroupView::of_id(hierarchy, vm.cgroup);
    VmView::new(vm, cgroup)
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
