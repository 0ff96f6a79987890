// SPDX-License-Identifier: GPL-2.0

//! The descriptions for syzkaller, and `include/uapi/linux/exitpolicy.h`: they say the same.

use exitpolicy_policy::Exits;
use std::{
    collections::{
        BTreeMap,
        BTreeSet, //
    },
    env,
    path::{
        Path,
        PathBuf, //
    },
    process::Command, //
};

fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn description() -> String {
    std::fs::read_to_string(source("../syzkaller/dev_exitpolicy.txt")).unwrap()
}

/// The numbers of the `.const` file.
fn constants() -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(source("../syzkaller/dev_exitpolicy.txt.const")).unwrap();
    let mut lines = text.lines().filter(|line| !line.starts_with('#'));
    assert_eq!(lines.next(), Some("arches = amd64"));
    lines
        .map(|line| {
            let (name, value) = line.split_once(" = ").unwrap();
            (name.to_string(), value.parse().unwrap())
        })
        .collect()
}

/// What the C compiler makes of the header: numbers, and the members of structures with where they
/// are and how large.
type Member = (String, usize, usize);
fn header() -> (BTreeMap<String, u64>, BTreeMap<String, Vec<Member>>) {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("uapi");
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let compiled = Command::new(&compiler)
        .arg("-I")
        .arg(source("../../include/uapi"))
        .arg("-o")
        .args([&program, &source("tests/uapi.c")])
        .status()
        .unwrap_or_else(|error| panic!("cannot run {compiler:?}: {error}"));
    assert!(compiled.success());
    let printed = Command::new(&program).output().unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    let (mut numbers, mut structures) = (BTreeMap::new(), BTreeMap::<_, Vec<_>>::new());
    for line in printed.lines() {
        let words: Vec<_> = line.split(' ').collect();
        match (words[0].split_once('.'), &words[1..]) {
            (Some((structure, member)), [offset, size]) => {
                let member = (
                    member.to_string(),
                    offset.parse().unwrap(),
                    size.parse().unwrap(),
                );
                structures
                    .entry(structure.to_string())
                    .or_default()
                    .push(member);
            }
            (None, [number]) => {
                numbers.insert(words[0].to_string(), number.parse().unwrap());
            }
            _ => panic!("{line}"),
        }
    }
    (numbers, structures)
}

/// Every word that is the name of a constant.
fn constants_in(text: &str) -> BTreeSet<String> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .flat_map(|line| {
            line.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_')
        })
        .filter(|word| word.len() > 3 && word.contains('_'))
        .filter(|word| !word.chars().any(|letter| letter.is_ascii_lowercase()))
        .map(str::to_string)
        .collect()
}

#[test]
fn numbers_are_those_of_the_header() {
    let (numbers, _) = header();
    let constants = constants();
    for (name, value) in &constants {
        if let Some(name) = name.strip_prefix("EXITPOLICY_") {
            assert_eq!(numbers.get(name), Some(value), "{name}");
        }
    }
    for (exit, name) in Exits::NAMES {
        let name = format!("KVM_X86_DISABLE_EXITS_{}", name.to_uppercase());
        assert_eq!(constants.get(&name), Some(&exit.bits()), "{name}");
    }
    let numbers_of_others = [
        ("AT_FDCWD", libc::AT_FDCWD as u64),
        ("__NR_ioctl", libc::SYS_ioctl as u64),
        ("__NR_openat", libc::SYS_openat as u64),
    ];
    for (name, value) in numbers_of_others {
        assert_eq!(constants.get(name), Some(&value), "{name}");
    }
}

#[test]
fn every_name_has_a_number() {
    let constants = constants();
    let missing: Vec<_> = constants_in(&description())
        .into_iter()
        .filter(|name| !constants.contains_key(name))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_command_is_described() {
    let text = description();
    let (numbers, _) = header();
    // Commands are those that _IO() made.
    let commands = numbers.iter().filter(|(_, number)| **number >> 8 == 0xbb);
    for (name, _) in commands {
        let call = format!(
            "\nioctl$EXITPOLICY_{name}(fd fd_exitpolicy, cmd const[EXITPOLICY_{name}], arg ptr[inout, "
        );
        assert!(text.contains(&call), "{name}");
    }
}

/// How many bytes a type has.
fn size_of(kind: &str) -> usize {
    let word = kind.split(" (").next().unwrap();
    if word.contains("int64") || ["exitpolicy_vm_id", "exitpolicy_cgroup_id"].contains(&word) {
        8
    } else {
        let known =
            word.contains("int32") || ["bool32", "fd_cgroup", "exitpolicy_vcpu_id"].contains(&word);
        assert!(known, "a type of unknown size: {kind}");
        4
    }
}

#[test]
fn structures_are_those_of_the_header() {
    let text = description();
    let (_, structures) = header();
    let mut seen = BTreeSet::new();
    for block in text
        .split("\n\n")
        .filter(|block| block.ends_with('}') || block.ends_with("}\n"))
    {
        let (name, members) = block.split_once(" {\n").unwrap();
        let name = name.trim().strip_prefix("exitpolicy_").unwrap();
        // There are several of one structure: what is input depends on the command.
        let name = name.split('_').next().unwrap();
        let mut at = 0;
        let described: Vec<Member> = members
            .lines()
            .filter_map(|line| line.trim().split_once('\t'))
            .map(|(member, kind)| {
                let size = size_of(kind.trim().replace('\t', " ").as_str());
                let member = (member.to_string(), at, size);
                at += size;
                member
            })
            .collect();
        assert_eq!(structures.get(name), Some(&described), "{block}");
        seen.insert(name.to_string());
    }
    assert_eq!(seen, structures.into_keys().collect());
}
