// SPDX-License-Identifier: GPL-2.0

//! What is written, as text and as JSON. `man/json.txt`, a section of the man page, documents
//! the keys.

use exitpolicy::{
    cgroup::Hierarchy,
    device,
    doctor,
    explain::{
        Fate,
        Reason, //
    },
    live::{
        Refusal,
        State,
        Vcpu, //
    },
    policy::{
        Exits,
        Policy,
        Resolved, //
    },
    unmanaged::Unmanaged, //
};
use serde::{
    Serialize,
    Serializer, //
};
use std::{
    collections::BTreeMap,
    fmt, //
};
use tabled::{
    builder::Builder,
    settings::{
        Padding,
        Style, //
    },
};

/// Counts up when a key changes its meaning or goes away.
const SCHEMA_VERSION: u32 = 1;

/// How answers and errors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
    PrettyJson,
}

/// What a command has to say.
pub trait View: Serialize {
    /// As text, with a line feed at the end.
    fn text(&self) -> String;
}

/// A remark on a request that was carried out, and may not do what was expected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Note {
    pub code: &'static str,
    pub message: String,
}

impl Format {
    pub fn render(self, view: &impl View, notes: &[Note]) -> String {
        #[derive(Serialize)]
        struct Document<'a, T> {
            schema_version: u32,
            #[serde(flatten)]
            body: &'a T,
            notes: &'a [Note],
        }

        match self {
            Self::Text => view.text(),
            _ => self.json(&Document {
                schema_version: SCHEMA_VERSION,
                body: view,
                notes,
            }),
        }
    }

    pub fn render_error(
        self,
        code: &str,
        message: &str,
        hint: Option<&str>,
        remaining: Option<&Remaining>,
    ) -> String {
        #[derive(Serialize)]
        struct Document<'a> {
            schema_version: u32,
            error: Body<'a>,
        }
        #[derive(Serialize)]
        struct Body<'a> {
            code: &'a str,
            message: &'a str,
            hint: Option<&'a str>,
            #[serde(flatten)]
            remaining: Option<&'a Remaining>,
        }

        match (self, hint) {
            (Self::Text, None) => format!("error: {message}\n"),
            (Self::Text, Some(hint)) => format!("error: {message}\n  hint: {hint}\n"),
            _ => self.json(&Document {
                schema_version: SCHEMA_VERSION,
                error: Body {
                    code,
                    message,
                    hint,
                    remaining,
                },
            }),
        }
    }

    fn json(self, document: &impl Serialize) -> String {
        let text = match self {
            Self::PrettyJson => serde_json::to_string_pretty(document),
            _ => serde_json::to_string(document),
        };
        // Only maps with keys that are no strings can fail, and there are none.
        text.expect("documents are JSON") + "\n"
    }
}

/// A set: an array of names in JSON, and as in the policy algebra in text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Set(pub Exits);

impl Serialize for Set {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(
            Exits::NAMES
                .into_iter()
                .filter(|(exit, _)| self.0.contains(*exit))
                .map(|(_, name)| name),
        )
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A cgroup. The path is not known if the cgroup was removed, or if the caller may not look.
#[derive(Clone, Debug, Serialize)]
pub struct CgroupView {
    pub id: u64,
    pub path: Option<String>,
    pub removed: bool,
}

impl CgroupView {
    /// Looks for the path of a cgroup that is known by its id.
    pub fn of_id(hierarchy: Option<&Hierarchy>, id: u64) -> Self {
        let found = hierarchy.map(|hierarchy| hierarchy.path_of(id));
        Self {
            id,
            removed: matches!(found, Some(Ok(None))),
            path: match found {
                Some(Ok(Some(path))) => Some(path.display().to_string()),
                _ => None,
            },
        }
    }
}

impl From<&exitpolicy::cgroup::Cgroup> for CgroupView {
    fn from(cgroup: &exitpolicy::cgroup::Cgroup) -> Self {
        Self {
            id: cgroup.id(),
            path: Some(cgroup.path().display().to_string()),
            removed: false,
        }
    }
}

impl fmt::Display for CgroupView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => f.write_str(path),
            None if self.removed => f.write_str("(removed)"),
            None => write!(f, "(id {})", self.id),
        }
    }
}

#[derive(Debug, Serialize)]
pub struct StatusView {
    pub vendor: Option<&'static str>,
    pub enabled: bool,
    pub supported: Set,
    pub floor: Set,
    pub policies: u64,
    pub vms: u64,
    pub pending: u64,
    pub holding: u64,
    pub clamps: u64,
    pub missed: u64,
}

impl From<device::Info> for StatusView {
    fn from(info: device::Info) -> Self {
        Self {
            vendor: info.vendor.map(device::Vendor::name),
            enabled: info.enabled,
            supported: Set(info.supported),
            floor: Set(info.floor),
            policies: info.policies,
            vms: info.vms,
            pending: info.pending,
            holding: info.holding,
            clamps: info.clamps,
            missed: info.missed,
        }
    }
}

impl View for StatusView {
    fn text(&self) -> String {
        pairs([
            ("vendor", self.vendor.unwrap_or("none").into()),
            ("enabled", yes_or_no(self.enabled)),
            ("supported", self.supported.to_string()),
            ("floor", self.floor.to_string()),
            ("policies", self.policies.to_string()),
            ("vms", self.vms.to_string()),
            ("pending", self.pending.to_string()),
            ("holding", self.holding.to_string()),
            ("clamps", self.clamps.to_string()),
            ("missed", self.missed.to_string()),
        ])
    }
}

/// A vCPU that is on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StragglerView {
    pub vm: u64,
    pub vcpu: u32,
    pub wanted: Set,
    pub in_force: Set,
    pub state: &'static str,
}

impl From<&Vcpu> for StragglerView {
    fn from(vcpu: &Vcpu) -> Self {
        Self {
            vm: vcpu.vm,
            vcpu: vcpu.id,
            wanted: Set(vcpu.wanted),
            in_force: Set(vcpu.in_force),
            state: vcpu.state.name(),
        }
    }
}

/// What keeps the module in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Remaining {
    pub stragglers: Vec<StragglerView>,
    /// The ids of the VMs.
    pub holders: Vec<u64>,
}

#[derive(Debug, Serialize)]
pub struct OnView {
    pub enabled: bool,
    pub stragglers: Vec<StragglerView>,
}

impl View for OnView {
    fn text(&self) -> String {
        pairs([("enabled", yes_or_no(self.enabled))])
    }
}

#[derive(Debug, Serialize)]
pub struct OffView {
    pub enabled: bool,
    #[serde(flatten)]
    pub remaining: Remaining,
}

impl View for OffView {
    fn text(&self) -> String {
        pairs([("enabled", yes_or_no(self.enabled))])
    }
}

#[derive(Debug, Serialize)]
pub struct UnloadView {
    pub unloaded: bool,
}

impl View for UnloadView {
    fn text(&self) -> String {
        pairs([("unloaded", yes_or_no(self.unloaded))])
    }
}

/// What a command has changed, and who has not changed yet.
#[derive(Debug, Serialize)]
pub struct ChangeView<T> {
    #[serde(flatten)]
    pub changed: T,
    pub stragglers: Vec<StragglerView>,
}

impl<T: View> View for ChangeView<T> {
    fn text(&self) -> String {
        self.changed.text()
    }
}

#[derive(Debug, Serialize)]
pub struct PolicyView {
    pub cgroup: CgroupView,
    pub disable: Set,
    pub allow: Set,
}

impl PolicyView {
    pub fn new(cgroup: CgroupView, policy: Policy) -> Self {
        Self {
            cgroup,
            disable: Set(policy.disable),
            allow: Set(policy.allow),
        }
    }
}

impl View for PolicyView {
    fn text(&self) -> String {
        pairs([
            ("cgroup", self.cgroup.to_string()),
            ("id", self.cgroup.id.to_string()),
            ("disable", self.disable.to_string()),
            ("allow", self.allow.to_string()),
        ])
    }
}

#[derive(Debug, Serialize)]
pub struct PolicyListView {
    pub policies: Vec<PolicyView>,
}

impl View for PolicyListView {
    fn text(&self) -> String {
        table(
            ["ID", "DISABLE", "ALLOW", "CGROUP"],
            self.policies.iter().map(|policy| {
                [
                    policy.cgroup.id.to_string(),
                    policy.disable.to_string(),
                    policy.allow.to_string(),
                    policy.cgroup.to_string(),
                ]
            }),
        )
    }
}

#[derive(Debug, Serialize)]
pub struct ClearedView {
    pub cgroup: CgroupView,
    pub cleared: bool,
}

impl View for ClearedView {
    fn text(&self) -> String {
        pairs([
            ("cgroup", self.cgroup.to_string()),
            ("id", self.cgroup.id.to_string()),
            ("policy", "none".into()),
        ])
    }
}

#[derive(Debug, Serialize)]
pub struct EffectiveView {
    pub cgroup: CgroupView,
    pub enabled: bool,
    pub disable: Set,
    pub allow: Set,
    pub source: Option<CgroupView>,
    pub policies: Vec<PolicyView>,
    pub exits: Vec<ExitView>,
}

#[derive(Debug, Serialize)]
pub struct ExitView {
    pub exit: String,
    pub state: &'static str,
    pub disabled_by: Option<CgroupView>,
    pub withheld_by: Vec<CgroupView>,
    pub explanation: String,
}

impl EffectiveView {
    /// `policies` are those of the cgroup and above it, nearest first, which `resolved` and
    /// `reasons` were made from.
    pub fn new(
        cgroup: CgroupView,
        enabled: bool,
        policies: Vec<(CgroupView, Policy)>,
        resolved: Resolved,
        reasons: &[Reason],
    ) -> Self {
        let known: BTreeMap<_, _> = policies
            .iter()
            .map(|(cgroup, _)| (cgroup.id, cgroup.clone()))
            .collect();
        Self {
            cgroup,
            enabled,
            disable: Set(resolved.disable),
            allow: Set(resolved.allow),
            source: resolved.source.map(|id| known[&id].clone()),
            exits: reasons
                .iter()
                .map(|reason| ExitView::new(reason, &known))
                .collect(),
            policies: policies
                .into_iter()
                .map(|(cgroup, policy)| PolicyView::new(cgroup, policy))
                .collect(),
        }
    }
}

impl ExitView {
    fn new(reason: &Reason, known: &BTreeMap<u64, CgroupView>) -> Self {
        let disabled_by = reason.disabled_by.map(|id| known[&id].clone());
        let withheld_by: Vec<_> = reason
            .withheld_by
            .iter()
            .map(|id| known[id].clone())
            .collect();
        let asked = disabled_by
            .as_ref()
            .map(|cgroup| format!("\"disable\" of {cgroup} names it"));
        let withheld = withheld_by
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(" and ");
        let explanation = match (reason.fate, asked) {
            (Fate::Floor, _) => "KVM itself disables it in every VM, whatever policies say".into(),
            (Fate::Unsupported, None) => "KVM cannot disable it on this host".into(),
            (Fate::Unsupported, Some(asked)) => {
                format!("{asked}, but KVM cannot disable it on this host")
            }
            (Fate::Withheld, None) => format!("\"allow\" of {withheld} leaves it out"),
            (Fate::Withheld, Some(asked)) => {
                format!("{asked}, but \"allow\" of {withheld} leaves it out")
            }
            (Fate::Given, Some(asked)) => asked,
            (Fate::Given | Fate::OnRequest, _) => {
                "no \"disable\" names it, and nothing withholds it from a VMM that asks".into()
            }
        };
        Self {
            exit: reason.exit.to_string(),
            state: reason.fate.name(),
            disabled_by,
            withheld_by,
            explanation,
        }
    }
}

impl View for EffectiveView {
    fn text(&self) -> String {
        let mut disable = self.disable.to_string();
        if let Some(source) = &self.source {
            disable += &format!(" (from {source})");
        }
        let exits = self.exits.iter().map(|exit| {
            [
                exit.exit.clone(),
                exit.state.replace('_', " "),
                exit.explanation.clone(),
            ]
        });
        pairs([
            ("cgroup", self.cgroup.to_string()),
            ("id", self.cgroup.id.to_string()),
            ("enabled", yes_or_no(self.enabled)),
            ("disable", disable),
            ("allow", self.allow.to_string()),
        ]) + "\n"
            + &table(["EXIT", "STATE", "WHY"], exits)
    }
}

#[derive(Debug, Serialize)]
pub struct VmView {
    pub id: u64,
    pub pid: u32,
    pub vcpus: u32,
    pub cgroup: CgroupView,
    pub floor: Set,
    pub requested: Set,
    pub effective: Set,
    pub clamped: Set,
    #[serde(rename = "override")]
    pub override_: Option<Set>,
    pub refused: Set,
    pub refusal: Option<&'static str>,
    pub pending: usize,
    pub adopted: bool,
    pub vcpu_list: Vec<VcpuView>,
    /// For people.
    #[serde(skip)]
    short_state: String,
    #[serde(skip)]
    state: String,
}

#[derive(Debug, Serialize)]
pub struct VcpuView {
    pub vcpu: u32,
    #[serde(rename = "override")]
    pub override_: Option<Set>,
    pub wanted: Set,
    pub in_force: Set,
    pub state: &'static str,
    pub refused: Set,
    pub refusal: Option<&'static str>,
    /// For people.
    pub explanation: String,
}

impl VmView {
    pub fn new(vm: device::Vm, vcpus: &[Vcpu], cgroup: CgroupView) -> Self {
        let withheld = vm.withheld(vcpus);
        let count =
            |is_meant: fn(State) -> bool| vcpus.iter().filter(|vcpu| is_meant(vcpu.state)).count();
        let behind = count(State::is_behind);
        let next_entry = count(|state| state == State::NextEntry);
        let on_their_way: Vec<_> = [
            (behind, State::Pending),
            (next_entry, State::NextEntry), //
        ]
        .into_iter()
        .filter(|(number, _)| *number > 0)
        .map(|(number, state)| format!("{number} {state}"))
        .collect();
        let refused = (!withheld.is_empty()).then(|| format!("{withheld} refused"));
        let state = |refused: Option<String>| {
            let parts: Vec<_> = on_their_way.iter().cloned().chain(refused).collect();
            if parts.is_empty() {
                "in force".into()
            } else {
                parts.join(", ")
            }
        };
        let reason = vm.refusal.or_else(|| {
            let reasons = vcpus.iter().filter(|vcpu| !vcpu.withheld().is_empty());
            reasons.filter_map(|vcpu| vcpu.refusal).next()
        });
        Self {
            id: vm.id,
            pid: vm.pid,
            vcpus: vm.vcpus,
            cgroup,
            floor: Set(vm.floor),
            requested: Set(vm.requested),
            effective: Set(vm.effective),
            clamped: Set(vm.clamped),
            override_: vm.disable.map(Set),
            refused: Set(vm.refused),
            refusal: vm.refusal.map(Refusal::name),
            // Not the module's number, which was asked for at another time.
            pending: behind + next_entry,
            adopted: vm.adopted,
            vcpu_list: vcpus.iter().map(VcpuView::from).collect(),
            short_state: state(refused.clone()),
            state: state(refused.map(|refused| match reason {
                Some(reason) => format!("{refused}: {reason}"),
                None => refused,
            })),
        }
    }
}

impl From<&Vcpu> for VcpuView {
    fn from(vcpu: &Vcpu) -> Self {
        Self {
            vcpu: vcpu.id,
            override_: vcpu.disable.map(Set),
            wanted: Set(vcpu.wanted),
            in_force: Set(vcpu.in_force),
            state: vcpu.state.name(),
            refused: Set(vcpu.refused),
            refusal: vcpu.refusal.map(Refusal::name),
            explanation: vcpu.to_string(),
        }
    }
}

/// An override, or that there is none: "none" is a set.
fn override_text(set: Option<Set>) -> String {
    set.map_or_else(|| "-".into(), |set| set.to_string())
}

impl View for VmView {
    fn text(&self) -> String {
        let vcpus = self.vcpu_list.iter().map(|vcpu| {
            [
                vcpu.vcpu.to_string(),
                override_text(vcpu.override_),
                vcpu.wanted.to_string(),
                vcpu.in_force.to_string(),
                vcpu.explanation.clone(),
            ]
        });
        pairs([
            ("id", self.id.to_string()),
            ("pid", self.pid.to_string()),
            ("vcpus", self.vcpus.to_string()),
            ("cgroup", self.cgroup.to_string()),
            ("floor", self.floor.to_string()),
            ("requested", self.requested.to_string()),
            ("effective", self.effective.to_string()),
            ("clamped", self.clamped.to_string()),
            ("override", override_text(self.override_)),
            ("adopted", yes_or_no(self.adopted)),
            ("state", self.state.clone()),
        ]) + "\n"
            + &table(["VCPU", "OVERRIDE", "WANTED", "IN FORCE", "STATE"], vcpus)
    }
}

#[derive(Debug, Serialize)]
pub struct VmListView {
    pub vms: Vec<VmView>,
    /// Those that the module does not know; nothing if that cannot be seen.
    pub unmanaged: Option<Vec<UnmanagedView>>,
}

#[derive(Debug, Serialize)]
pub struct UnmanagedView {
    pub pid: Option<u32>,
    pub fd: Option<u32>,
    pub debugfs: Option<String>,
    pub reason: &'static str,
    /// For people.
    pub explanation: String,
}

impl From<&Unmanaged> for UnmanagedView {
    fn from(vm: &Unmanaged) -> Self {
        Self {
            pid: vm.pid,
            fd: vm.place.map(|place| place.fd),
            debugfs: vm.place.map(|place| place.to_string()),
            reason: vm.reason.name(),
            explanation: vm.reason.to_string(),
        }
    }
}

/// As in "pid 4711 (fd 12): no vCPU yet".
impl fmt::Display for UnmanagedView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "pid {pid}")?,
            None => f.write_str("pid unknown")?,
        }
        match (self.pid, self.fd, &self.debugfs) {
            (Some(_), Some(fd), _) => write!(f, " (fd {fd})")?,
            (None, _, Some(debugfs)) => write!(f, " ({debugfs} in debugfs)")?,
            _ => f.write_str(" (one of several VMs)")?,
        }
        write!(f, ": {}", self.explanation)
    }
}

impl View for VmListView {
    fn text(&self) -> String {
        let mut unmanaged = String::new();
        for vm in self.unmanaged.iter().flatten() {
            if unmanaged.is_empty() {
                unmanaged += "\n";
            }
            unmanaged += &format!("unmanaged: {vm}\n");
        }
        table(
            [
                "ID",
                "PID",
                "VCPUS",
                "FLOOR",
                "REQUESTED",
                "EFFECTIVE",
                "CLAMPED",
                "OVERRIDE",
                "STATE",
                "CGROUP",
            ],
            self.vms.iter().map(|vm| {
                [
                    vm.id.to_string(),
                    vm.pid.to_string(),
                    vm.vcpus.to_string(),
                    vm.floor.to_string(),
                    vm.requested.to_string(),
                    vm.effective.to_string(),
                    vm.clamped.to_string(),
                    override_text(vm.override_),
                    vm.short_state.clone(),
                    vm.cgroup.to_string(),
                ]
            }),
        ) + &unmanaged
    }
}

#[derive(Debug, Serialize)]
pub struct DoctorView {
    pub can_work: bool,
    pub checks: Vec<CheckView>,
}

#[derive(Debug, Serialize)]
pub struct CheckView {
    pub id: &'static str,
    pub state: &'static str,
    pub found: String,
    pub todo: Option<String>,
}

impl From<Vec<doctor::Check>> for DoctorView {
    fn from(checks: Vec<doctor::Check>) -> Self {
        Self {
            can_work: doctor::can_work(&checks),
            checks: checks
                .into_iter()
                .map(|check| CheckView {
                    id: check.id,
                    state: check.state.name(),
                    found: check.found,
                    todo: check.todo,
                })
                .collect(),
        }
    }
}

impl View for DoctorView {
    fn text(&self) -> String {
        let mut text = String::new();
        for check in &self.checks {
            let title = check.id.replace('_', " ");
            text += &format!("{:8} {title}: {}\n", check.state, check.found);
            if let Some(todo) = &check.todo {
                text += &format!("{:8} -> {todo}\n", "");
            }
        }
        text += if self.can_work {
            "\nThis host can run kvm_exitpolicy.\n"
        } else {
            "\nSomething is missing: this host cannot run kvm_exitpolicy as it is.\n"
        };
        text
    }
}

fn yes_or_no(value: bool) -> String {
    if value { "yes" } else { "no" }.into()
}

/// Names and values, one pair to a line.
fn pairs<const N: usize>(pairs: [(&str, String); N]) -> String {
    columns(pairs.map(|(name, value)| [name.to_owned(), value]))
}

fn table<const N: usize>(heads: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    columns([heads.map(str::to_owned)].into_iter().chain(rows))
}

/// Columns with two spaces between, and none at the ends of lines.
fn columns<const N: usize>(rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut builder = Builder::new();
    for row in rows {
        builder.push_record(row);
    }
    builder
        .build()
        .with(Style::empty())
        .with(Padding::new(0, 2, 0, 0))
        .to_string()
        .lines()
        .flat_map(|line| [line.trim_end(), "\n"])
        .collect()
}
