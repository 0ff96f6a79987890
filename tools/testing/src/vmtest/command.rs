// SPDX-License-Identifier: GPL-2.0

//! The command `exitpolicy`, on a host that has the module and on one that has not.

use anyhow::{
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;
use serde_json::{
    json,
    Value, //
};
use testing::{
    cgroup::Cgroup,
    client::Vmm,
    exits::Vendor,
    interface::{
        self,
        command,
        ioctl,
        sysfs, //
    },
    modules::Unloaded,
    uapi::Device, //
};

use crate::{
    matrix::{
        floor,
        supported, //
    },
    Test, //
};

/// The module is not loaded.
const NOT_LOADED: i32 = 3;
/// The caller may not.
const NOT_PERMITTED: i32 = 4;

pub fn tests(vendor: Vendor) -> Vec<Test> {
    vec![
        Test::new("command::status", move || status(vendor)),
        Test::new("command::switch", switch),
        Test::new("command::policies", policies),
        Test::new("command::names_of_others", names_of_others),
        Test::new("command::effective", move || effective(vendor)),
        Test::new("command::vms", vms),
        Test::new("command::completions", completions),
        Test::new("command::doctor", doctor),
        Test::new("command::errors_in_json", errors_in_json),
        Test::new("command::not_loaded", not_loaded),
        Test::new("command::not_permitted", not_permitted),
    ]
}

/// A set as JSON has it.
fn names(exits: Exits) -> Value {
    let names = exits.iter().map(|exit| Value::from(exit.to_string()));
    Value::Array(names.collect())
}

/// The value behind a name, in lines of a name and a value.
fn field<'a>(text: &'a str, name: &str) -> Result<&'a str> {
    let value = text.lines().find_map(|line| {
        let (first, rest) = line.split_once(char::is_whitespace)?;
        (first == name).then_some(rest.trim())
    });
    value.with_context(|| format!("no {name} in:\n{text}"))
}

fn status(vendor: Vendor) -> Result<()> {
    let status = command::json(&["status"])?;
    for (key, expected) in [
        ("schema_version", json!(1)),
        ("vendor", json!(vendor.name())),
        ("enabled", json!(true)),
        ("supported", names(supported(vendor)?)),
        ("floor", names(floor(vendor)?)),
        ("policies", json!(0)),
        ("vms", json!(0)),
    ] {
        ensure!(status[key] == expected, "{key} in {status}");
    }
    let text = command::text(&["status"])?;
    ensure!(field(&text, "vendor")? == vendor.name(), "{text}");
    ensure!(
        field(&text, "supported")? == supported(vendor)?.to_string(),
        "{text}"
    );
    // The two JSON forms are one.
    let pretty = command::text(&["status", "--pretty"])?;
    let pretty: Value = serde_json::from_str(&pretty)?;
    ensure!(pretty == status, "{pretty} is not {status}");
    Ok(())
}

fn switch() -> Result<()> {
    for (word, enabled) in [("off", false), ("on", true)] {
        let answer = command::json(&[word])?;
        ensure!(answer["enabled"] == enabled, "{answer}");
        ensure!(
            Device::open()?.info()?.enabled == u32::from(enabled),
            "{word} did nothing"
        );
        ensure!(command::json(&["status"])?["enabled"] == enabled, "status");
    }
    Ok(())
}

/// A tenant's name for a cgroup, with what a terminal obeys: it clears the screen.
fn names_of_others() -> Result<()> {
    let cgroup = Cgroup::new("\u{1b}[2Jown")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    vmm.create_vcpu(vm, 0)?;
    for list in [["policy", "list"], ["vm", "list"]] {
        let text = command::text(&list)?;
        ensure!(
            text.contains(r"/\u{1b}[2Jown") && !text.contains('\u{1b}'),
            "{list:?}: {text:?}"
        );
    }
    let nothing = command::run(&["policy", "show", "/\u{1b}[2Jnone"])?;
    let error = String::from_utf8(nothing.stderr)?;
    ensure!(
        error.contains(r"/\u{1b}[2Jnone") && !error.contains('\u{1b}'),
        "{error:?}"
    );
    let list = command::json(&["policy", "list"])?;
    let path = &list["policies"][0]["cgroup"]["path"];
    ensure!(path == &cgroup.path(), "{list}");
    vmm.kill()
}

fn policies() -> Result<()> {
    let parent = Cgroup::new("parent")?;
    let child = parent.child("child")?;
    let path = child.path();
    let directory = child.directory().display().to_string();
    let disable = Exits::HLT | Exits::PAUSE;

    // A cgroup by each of its names; what is not named stays.
    command::text(&["policy", "set", &path, "--disable", "hlt,pause"])?;
    ensure!(
        ioctl::policy(&child)? == Some((disable, Exits::ALL)),
        "{:?}",
        ioctl::policy(&child)?
    );
    command::text(&["policy", "set", &directory, "--allow", "hlt"])?;
    ensure!(
        ioctl::policy(&child)? == Some((disable, Exits::HLT)),
        "{:?}",
        ioctl::policy(&child)?
    );

    let show = command::json(&["policy", "show", path.trim_start_matches('/')])?;
    let expected = json!({ "id": child.id()?, "path": path, "removed": false });
    ensure!(show["cgroup"] == expected, "{show}");
    ensure!(show["disable"] == names(disable), "{show}");
    ensure!(show["allow"] == names(Exits::HLT), "{show}");
    let text = command::text(&["policy", "show", &path])?;
    ensure!(field(&text, "cgroup")? == path, "{text}");
    ensure!(field(&text, "disable")? == "hlt,pause", "{text}");
    ensure!(field(&text, "allow")? == "hlt", "{text}");

    command::text(&["policy", "set", "/", "--disable", "none"])?;
    let list = command::json(&["policy", "list"])?;
    let paths: Vec<&Value> = list["policies"]
        .as_array()
        .context("policies")?
        .iter()
        .map(|policy| &policy["cgroup"]["path"])
        .collect();
    ensure!(paths == ["/", path.as_str()], "{list}");
    let text = command::text(&["policy", "list"])?;
    ensure!(
        text.lines().count() == 3 && text.contains(&path),
        "not a header and two lines:\n{text}"
    );

    for cgroup in ["/", &path] {
        let cleared = command::json(&["policy", "clear", cgroup])?;
        ensure!(cleared["cleared"] == true, "{cleared}");
        for action in ["clear", "show"] {
            let output = command::run(&["policy", action, cgroup])?;
            ensure!(
                output.status.code() == Some(1),
                "{action} without a policy: {}",
                output.status
            );
        }
    }
    Ok(())
}

/// Where each bit comes from.
fn effective(vendor: Vendor) -> Result<()> {
    let above = Cgroup::new("above")?;
    let own = above.child("own")?;
    ioctl::set_policy(&above, Exits::HLT, !Exits::MWAIT)?;
    ioctl::set_policy(&own, Exits::HLT | Exits::MWAIT, Exits::ALL)?;
    let shown = command::json(&["policy", "show", "--effective", &own.path()])?;
    ensure!(
        shown["disable"] == names(Exits::HLT | Exits::MWAIT),
        "{shown}"
    );
    ensure!(shown["allow"] == names(!Exits::MWAIT), "{shown}");
    ensure!(shown["source"]["path"] == own.path(), "{shown}");
    let exits = shown["exits"].as_array().context("exits")?;
    ensure!(exits.len() == 5, "{shown}");
    for (exit, (value, name)) in exits.iter().zip(Exits::NAMES) {
        ensure!(exit["exit"] == name, "{exit}");
        let expected = if floor(vendor)?.contains(value) {
            "floor"
        } else if !supported(vendor)?.contains(value) {
            "unsupported"
        } else if value == Exits::HLT {
            "given"
        } else if value == Exits::MWAIT {
            ensure!(exit["withheld_by"][0]["path"] == above.path(), "{exit}");
            "withheld"
        } else {
            "on_request"
        };
        ensure!(exit["state"] == expected, "{exit}, should be {expected}");
    }
    // A cgroup below inherits; the module says so too.
    let below = own.child("below")?;
    let shown = command::json(&["policy", "show", "--effective", &below.path()])?;
    ensure!(shown["source"]["path"] == own.path(), "{shown}");
    ensure!(shown["notes"] == json!([]), "{shown}");
    let text = command::text(&["policy", "show", "--effective", &below.path()])?;
    ensure!(field(&text, "disable")?.contains(&own.path()), "{text}");
    Ok(())
}

fn vms() -> Result<()> {
    let empty = command::json(&["vm", "list"])?;
    ensure!(empty["vms"] == json!([]), "{empty}");
    let cgroup = Cgroup::new("own")?;
    ioctl::set_policy(&cgroup, Exits::HLT, Exits::ALL)?;
    let mut vmm = Vmm::start(&cgroup)?;
    let vm = vmm.create_vm()?;
    vmm.create_vcpu(vm, 0)?;
    let view = interface::only_vm()?;

    let list = command::json(&["vm", "list"])?;
    let mut show = command::json(&["vm", "show", &view.id.to_string()])?;
    let document = show.as_object_mut().context("an object")?;
    document.remove("schema_version");
    document.remove("notes");
    ensure!(list["vms"] == json!([show]), "{list} and {show}");
    for text in [
        command::text(&["vm", "list"])?,
        command::text(&["vm", "show", &view.id.to_string()])?,
    ] {
        for expected in [
            view.pid.to_string(),
            view.cgroup.clone(),
            view.effective.to_string(),
        ] {
            ensure!(
                text.split_whitespace().any(|word| word == expected),
                "no {expected} in:\n{text}"
            );
        }
    }
    vmm.kill()?;
    interface::ensure_no_vms()?;
    let output = command::run(&["vm", "show", &view.id.to_string()])?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    Ok(())
}

fn completions() -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let script = command::text(&["completions", shell])?;
        ensure!(script.contains("policy"), "{shell}: {script}");
    }
    Ok(())
}

fn doctor() -> Result<()> {
    let healthy = command::json(&["doctor"])?;
    ensure!(healthy["can_work"] == true, "{healthy}");
    let module = |doctor: &Value| -> Result<Value> {
        let checks = doctor["checks"].as_array().context("checks")?;
        let module = checks.iter().find(|check| check["id"] == "module");
        Ok(module.context("no check of the module")?["state"].clone())
    };
    ensure!(module(&healthy)? == "ok", "{healthy}");
    let _unloaded = Unloaded::new()?;
    let output = command::run(&["doctor", "-j"])?;
    let without: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(module(&without)? != "ok", "{without}");
    let expected = i32::from(without["can_work"] == false);
    ensure!(
        output.status.code() == Some(expected),
        "{}: {without}",
        output.status
    );
    Ok(())
}

/// What a command says on stderr, as JSON, when it fails with this status.
fn failure(arguments: &[&str], status: i32) -> Result<Value> {
    let output = command::run(arguments)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(status),
        "{arguments:?}: {}, should be {status}: {stderr}",
        output.status
    );
    ensure!(
        output.stdout.is_empty(),
        "{arguments:?}: an error on stdout"
    );
    let error: Value =
        serde_json::from_str(&stderr).with_context(|| format!("no JSON: {stderr}"))?;
    Ok(error["error"]["code"].clone())
}

fn errors_in_json() -> Result<()> {
    let cgroup = Cgroup::new("own")?;
    let own = cgroup.path();
    for (arguments, status, code) in [
        (vec!["-j", "policy", "show", &own], 1, "no_policy"),
        (
            vec!["-j", "policy", "show", "/nowhere"],
            1,
            "no_such_cgroup",
        ),
        (vec!["-j", "vm", "show", "999999"], 1, "no_vm"),
        (
            vec!["-j", "policy", "set", &own, "--disable", "x"],
            2,
            "usage",
        ),
        (
            vec!["-j", "policy", "set", "/proc", "--disable", "hlt"],
            1,
            "not_a_cgroup",
        ),
    ] {
        let found = failure(&arguments, status)?;
        ensure!(found == code, "{arguments:?}: {found}, should be {code}");
    }
    ensure!(
        sysfs::policy_ids()?.is_empty(),
        "a failed command made a policy"
    );
    Ok(())
}

fn not_loaded() -> Result<()> {
    let _unloaded = Unloaded::new()?;
    for arguments in [
        vec!["-j", "status"],
        vec!["-j", "on"],
        vec!["-j", "policy", "list"],
        vec!["-j", "policy", "set", "/", "--disable", "hlt"],
        vec!["-j", "policy", "show", "--effective", "/"],
        vec!["-j", "vm", "list"],
        vec!["-j", "vm", "show", "1"],
    ] {
        let code = failure(&arguments, NOT_LOADED)?;
        ensure!(code == "not_loaded", "{arguments:?}: {code}");
    }
    // In text, it says what to do.
    let output = command::run(&["status"])?;
    let stderr = String::from_utf8(output.stderr)?;
    ensure!(stderr.contains("modprobe"), "no advice in: {stderr}");
    Ok(())
}

fn not_permitted() -> Result<()> {
    use std::os::unix::process::CommandExt;

    let before = interface::Snapshot::take()?;
    for arguments in [
        &["-j", "status"][..],
        &["-j", "policy", "set", "/", "--disable", "hlt"],
    ] {
        let output = std::process::Command::new(interface::COMMAND)
            .args(arguments)
            .uid(65534)
            .gid(65534)
            .output()?;
        ensure!(
            output.status.code() == Some(NOT_PERMITTED),
            "{arguments:?}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    before.ensure_unchanged()
}
