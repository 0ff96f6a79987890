// SPDX-License-Identifier: GPL-2.0

//! What the self-tests of Linux's KVM say with the module absent, loaded, and passing everything
//! through; and which differences are meant to be there.

use std::{
    fmt::{
        self,
        Display,
        Formatter, //
    },
    str::FromStr, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Error,
    Result, //
};

/// What a host is like, in the order of the table's columns.
pub const STATES: [&str; 3] = ["absent", "no policy", "all passed through"];

/// The list's word for a test that is not run.
const EXCLUDED: &str = "excluded";

/// What the list's word for a test's arguments begins with. A comma is between two.
const ARGUMENTS: &str = "with:";

/// How often a test is run that is not as it should be at first.
const RUNS: usize = 3;

/// How a test ended, in one word.
///
/// `pass`, `skip`, `fail`, the name of a signal, or `hang`; then, if it has told of parts of it, how
/// many passed, failed and were skipped; the assertion that has failed first, if one has; and who
/// else complained.
pub fn outcome(
    how: &str,
    output: &str,
    kernel_complained: bool,
    module_complained: bool,
) -> String {
    let (mut ok, mut not_ok, mut skipped) = (0, 0, 0);
    for line in output.lines() {
        match line.strip_prefix("not ok ") {
            Some(_) => not_ok += 1,
            None if !line.starts_with("ok ") => {}
            None if line.contains("# SKIP") => skipped += 1,
            None => ok += 1,
        }
    }
    let mut word = how.to_string();
    if ok + not_ok + skipped > 0 {
        word += &format!("({ok}+{not_ok}+{skipped})");
    }
    if let Some(place) = failed_assertion(output) {
        word += &format!("@{place}");
    }
    for (complained, who) in [
        (kernel_complained, "+kernel"),
        (module_complained, "+module"),
    ] {
        if complained {
            word += who;
        }
    }
    word
}

/// Where a test says that an assertion has failed, the first one: its source file, and the line.
fn failed_assertion(output: &str) -> Option<&str> {
    let (_, rest) = output.split_once("==== Test Assertion Failure ====\n")?;
    let (place, _) = rest.lines().next()?.trim_start().split_once(": ")?;
    (!place.contains(char::is_whitespace)).then_some(place)
}

/// A line about a test that was run, and its outcome.
pub fn result_line(test: &str, outcome: &str) -> String {
    format!("test {test} ... {outcome}")
}

/// Tests and their outcomes, in the order in which they were run. One that was repeated has several.
#[derive(Debug, Default)]
pub struct Results(Vec<(String, String)>);

impl Results {
    /// Takes the lines that [`result_line`] made, and no other.
    pub fn parse(text: &str) -> Self {
        let result = |line: &str| {
            let (test, rest) = line.trim_end().strip_prefix("test ")?.split_once(" ... ")?;
            let outcome = rest.split(' ').next().filter(|word| !word.is_empty())?;
            Some((test.to_string(), outcome.to_string()))
        };
        Self(text.lines().filter_map(result).collect())
    }

    /// All outcomes of a test.
    fn of(&self, test: &str) -> Vec<&str> {
        let here = self.0.iter().filter(|(name, _)| name == test);
        here.map(|(_, outcome)| outcome.as_str()).collect()
    }
}

/// The outcome of more than half of a test's runs.
fn usual<'a>(outcomes: &[&'a str]) -> Option<&'a str> {
    let runs = |outcome: &str| outcomes.iter().filter(|other| **other == outcome).count();
    let most = |outcome: &&&str| 2 * runs(outcome) > outcomes.len();
    outcomes.iter().find(most).copied()
}

/// What the list says of a test on a host.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    /// It is not run.
    Excluded,
    /// It is run with these arguments.
    Arguments(Vec<String>),
    /// How it ends with everything passed through.
    Ends(String),
}

impl From<&str> for Said {
    fn from(word: &str) -> Self {
        match word.strip_prefix(ARGUMENTS) {
            Some(arguments) => Self::Arguments(arguments.split(',').map(String::from).collect()),
            None if word == EXCLUDED => Self::Excluded,
            None => Self::Ends(word.to_string()),
        }
    }
}

/// A line of the list.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    host: String,
    test: String,
    said: Said,
    reason: String,
}

impl Entry {
    /// Arguments, and how a test ends with them, are two entries.
    fn is_about_arguments(&self) -> bool {
        matches!(self.said, Said::Arguments(_))
    }
}

impl FromStr for Entry {
    type Err = Error;

    fn from_str(line: &str) -> Result<Self> {
        let mut words = line.splitn(4, char::is_whitespace).map(str::trim);
        let mut next = || words.next().filter(|word| !word.is_empty());
        let [Some(host), Some(test), Some(outcome), reason] = [next(), next(), next(), next()]
        else {
            bail!("not HOST TEST OUTCOME REASON: {line}");
        };
        Ok(Self {
            host: host.to_string(),
            test: test.to_string(),
            said: outcome.into(),
            reason: reason
                .with_context(|| format!("no reason: {line}"))?
                .to_string(),
        })
    }
}

/// The tests that are not run, the arguments of others, and the differences that are meant to be
/// there.
#[derive(Debug)]
pub struct List(Vec<Entry>);

impl List {
    /// Reads it: one entry a line, `HOST TEST OUTCOME REASON`, where the host can be `any`.
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let squeeze = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let entries = lines
            .map(|line| squeeze(line).parse())
            .collect::<Result<Vec<Entry>>>()?;
        for (index, entry) in entries.iter().enumerate() {
            let again = entries[..index].iter().any(|other| {
                let anywhere = entry.host == "any" || other.host == "any";
                other.test == entry.test
                    && other.is_about_arguments() == entry.is_about_arguments()
                    && (anywhere || other.host == entry.host)
            });
            ensure!(!again, "{} is listed twice for {}", entry.test, entry.host);
        }
        Ok(Self(entries))
    }

    /// Fails if it has a test that there is not: its entry would be one that nobody misses.
    pub fn ensure_known(&self, tests: &[String]) -> Result<()> {
        for entry in &self.0 {
            ensure!(
                tests.contains(&entry.test),
                "there is no test {}",
                entry.test
            );
        }
        Ok(())
    }

    fn entries<'a>(&'a self, host: &'a str, test: &'a str) -> impl Iterator<Item = &'a Entry> {
        let here =
            move |entry: &&Entry| entry.test == test && (entry.host == host || entry.host == "any");
        self.0.iter().filter(here)
    }

    /// A test's arguments on a host, if it has any, and why.
    fn arguments<'a>(&'a self, host: &'a str, test: &'a str) -> Option<(&'a [String], &'a str)> {
        self.entries(host, test)
            .find_map(|entry| match &entry.said {
                Said::Arguments(arguments) => Some((&arguments[..], &entry.reason[..])),
                _ => None,
            })
    }

    /// Whether a test is not to be run on a host.
    pub fn is_excluded(&self, host: &str, test: &str) -> bool {
        self.entries(host, test)
            .any(|entry| entry.said == Said::Excluded)
    }

    /// What runs a test on a host: its name, and its arguments.
    pub fn command(&self, host: &str, test: &str) -> String {
        let (arguments, _) = self.arguments(host, test).unwrap_or_default();
        [&[test.to_string()][..], arguments].concat().join(" ")
    }
}

/// What is to be said of a test.
#[derive(Debug, PartialEq, Eq)]
enum Verdict<'a> {
    Same,
    /// It differs as the list has it, for this reason.
    Listed(&'a str),
    /// It is not run, for this reason.
    Excluded(&'a str),
    Wrong(String),
}

/// A test and its outcomes in each state of the host.
struct Row<'a> {
    test: &'a str,
    /// And why it has them.
    arguments: Option<(&'a [String], &'a str)>,
    outcomes: [Vec<&'a str>; 3],
    verdict: Verdict<'a>,
}

impl Row<'_> {
    fn is_repeated(&self) -> bool {
        self.outcomes.iter().any(|outcomes| outcomes.len() > 1)
    }
}

/// The results of one host, and what to think of them.
pub struct Table<'a> {
    host: &'a str,
    rows: Vec<Row<'a>>,
    /// How many tests have to pass without the module.
    fewest_passes: usize,
}

/// How many tests of a host may have come out otherwise when they were repeated: the emulators
/// have mistakes, and not that many.
const MOST_REPEATED: usize = 3;

impl<'a> Table<'a> {
    /// `results` are those of [`STATES`]. If fewer than `fewest_passes` tests pass without the
    /// module, the host lacks something, and three columns that agree say little.
    pub fn new(
        host: &'a str,
        tests: &'a [String],
        list: &'a List,
        results: &'a [Results; 3],
        fewest_passes: usize,
    ) -> Self {
        let row = |test: &'a String| {
            let outcomes = [0, 1, 2].map(|state| results[state].of(test));
            let entry = list
                .entries(host, test)
                .find(|entry| !entry.is_about_arguments());
            Row {
                test,
                arguments: list.arguments(host, test),
                verdict: verdict(entry, &outcomes),
                outcomes,
            }
        };
        Self {
            host,
            rows: tests.iter().map(row).collect(),
            fewest_passes,
        }
    }

    /// The tests that are not as they should be.
    pub fn wrong(&self) -> impl Iterator<Item = &'a str> + '_ {
        let wrong = |row: &&Row| matches!(row.verdict, Verdict::Wrong(_));
        self.rows.iter().filter(wrong).map(|row| row.test)
    }

    fn repeated(&self) -> usize {
        self.rows.iter().filter(|row| row.is_repeated()).count()
    }

    /// How many tests pass without the module.
    fn passes(&self) -> usize {
        let absent = self.rows.iter().filter_map(|row| usual(&row.outcomes[0]));
        absent.filter(|outcome| outcome.starts_with("pass")).count()
    }

    /// Whether all is as it should be.
    pub fn is_good(&self) -> bool {
        self.wrong().next().is_none()
            && self.repeated() <= MOST_REPEATED
            && self.passes() >= self.fewest_passes
            && !self.rows.is_empty()
    }
}

fn has_no_end(outcome: &str) -> bool {
    outcome.starts_with("hang") || outcome.starts_with("ends-host")
}

/// Whether more than an assertion has failed.
fn is_harm(outcome: &str) -> bool {
    let killed = outcome.starts_with("SIG") || outcome.starts_with("signal-");
    let complained = outcome.contains("+kernel") || outcome.contains("+module");
    has_no_end(outcome) || killed || complained
}

/// What most runs of a test say counts, as many in each state: the emulator has mistakes. But no
/// other run makes up for one that, with the module only, has no end, dies of a signal, or has the
/// host suffer.
fn verdict<'a>(entry: Option<&'a Entry>, outcomes: &[Vec<&str>; 3]) -> Verdict<'a> {
    let wrong = |what: &str| Verdict::Wrong(what.to_string());
    if let Some(entry) = entry.filter(|entry| entry.said == Said::Excluded) {
        return Verdict::Excluded(&entry.reason);
    }
    let [absent, loaded, passed] = outcomes;
    if ![1, RUNS].contains(&absent.len()) || outcomes.iter().any(|runs| runs.len() != absent.len())
    {
        return wrong("not run, or not as often in all three");
    }
    if absent.iter().all(|outcome| has_no_end(outcome)) {
        return wrong("has no end without the module, and is not excluded");
    }
    let by_module = |outcome: &&&str| is_harm(outcome) && !absent.contains(*outcome);
    if let Some(outcome) = loaded.iter().chain(passed).find(by_module) {
        return Verdict::Wrong(format!("{outcome} with the module, and not without"));
    }
    let [Some(absent), Some(loaded), Some(passed)] =
        [absent, loaded, passed].map(|runs| usual(runs))
    else {
        return wrong("ends otherwise each time");
    };
    if absent != loaded {
        return wrong("differs without policy");
    }
    match entry.map(|entry| (&entry.said, &entry.reason)) {
        Some((Said::Ends(ends), _)) if absent == ends => {
            wrong("is listed, and ends so without the module, too")
        }
        Some((Said::Ends(ends), reason)) if passed == ends => Verdict::Listed(reason),
        Some((Said::Ends(ends), _)) => Verdict::Wrong(format!("is listed as {ends}")),
        _ if absent == passed => Verdict::Same,
        _ => wrong("differs, and nobody says why"),
    }
}

impl Display for Table<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let width = self
            .rows
            .iter()
            .map(|row| row.test.len())
            .max()
            .unwrap_or(0);
        let mut line = |test: &str, cells: [&str; 3], note: &str| {
            let [a, b, c] = cells;
            let text = format!("{test:width$}  {a:14}  {b:14}  {c:18}  {note}");
            writeln!(f, "{}", text.trim_end())
        };
        line(&self.host.to_uppercase(), STATES, "")?;
        for row in &self.rows {
            let cells = [0, 1, 2].map(|state: usize| row.outcomes[state].join("|"));
            let repeated = row.is_repeated().then(|| "REPEATED".to_string());
            let verdict = match &row.verdict {
                Verdict::Same => None,
                Verdict::Listed(reason) => Some(reason.to_string()),
                Verdict::Excluded(reason) => Some(format!("not run: {reason}")),
                Verdict::Wrong(what) => Some(format!("WRONG: {what}")),
            };
            let arguments = row
                .arguments
                .map(|(arguments, reason)| format!("[{}: {reason}]", arguments.join(" ")));
            let notes: Vec<_> = [repeated, verdict, arguments]
                .into_iter()
                .flatten()
                .collect();
            let note = notes.join(" ");
            line(row.test, [&cells[0], &cells[1], &cells[2]], &note)?;
        }
        let count = |is: fn(&Row) -> bool| self.rows.iter().filter(|row| is(row)).count();
        writeln!(
            f,
            "{}: {} tests, {} of them not run, {} the same in all three, {} differ as listed, \
             {} wrong, {} repeated; {} pass without the module, of {} that have to",
            self.host,
            self.rows.len(),
            count(|row| matches!(row.verdict, Verdict::Excluded(_))),
            count(|row| row.verdict == Verdict::Same),
            count(|row| matches!(row.verdict, Verdict::Listed(_))),
            self.wrong().count(),
            self.repeated(),
            self.passes(),
            self.fewest_passes,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "# HOST TEST OUTCOME REASON\n\
        amd   a    fail@a.c:7  it asserts that HLT exits\n\
        amd   a    with:-m,1   less memory\n\
        any   slow excluded    too slow\n";

    fn tests() -> Vec<String> {
        ["a", "b", "slow"].map(String::from).to_vec()
    }

    fn wrong_of(host: &str, states: [&str; 3]) -> Vec<String> {
        let list = List::parse(LIST).unwrap();
        let tests = tests();
        let results = states.map(Results::parse);
        let table = Table::new(host, &tests, &list, &results, 0);
        let wrong = table.wrong().map(String::from).collect();
        assert_eq!(table.is_good(), table.wrong().next().is_none());
        wrong
    }

    const PASS: &str = "test a ... pass\ntest b ... skip";
    const A_FAILS: &str = "test a ... fail@a.c:7\ntest b ... skip";

    /// Three runs of `a` with these outcomes, and three of `b`.
    fn repeated(a: [&str; RUNS]) -> String {
        a.map(|outcome| format!("test a ... {outcome}\ntest b ... skip"))
            .join("\n")
    }

    #[test]
    fn same_and_listed() {
        assert_eq!(wrong_of("amd", [PASS, PASS, A_FAILS]), [""; 0]);
        assert_eq!(wrong_of("intel", [PASS, PASS, PASS]), [""; 0]);
    }

    #[test]
    fn differences() {
        // Without policy; not listed; listed, and not there.
        assert_eq!(wrong_of("amd", [PASS, A_FAILS, A_FAILS]), ["a"]);
        assert_eq!(wrong_of("intel", [PASS, PASS, A_FAILS]), ["a"]);
        assert_eq!(wrong_of("amd", [PASS, PASS, PASS]), ["a"]);
        assert_eq!(wrong_of("amd", [A_FAILS, A_FAILS, A_FAILS]), ["a"]);
    }

    #[test]
    fn another_failure_than_the_listed_one_is_a_difference() {
        for other in ["fail", "fail@a.c:8", "fail@lib/kvm_util.c:7"] {
            let fails = A_FAILS.replace("fail@a.c:7", other);
            assert_eq!(wrong_of("amd", [PASS, PASS, &fails]), ["a"]);
            assert_eq!(wrong_of("intel", [A_FAILS, &fails, A_FAILS]), ["a"]);
        }
    }

    #[test]
    fn what_was_not_run_is_wrong() {
        assert_eq!(wrong_of("intel", [PASS, PASS, "test b ... "]), ["a", "b"]);
    }

    #[test]
    fn most_runs_count() {
        let pass = repeated(["pass"; RUNS]);
        for once in [
            ["fail", "pass", "pass"],
            ["pass", "fail", "pass"],
            ["pass", "pass", "fail"],
        ] {
            let once = repeated(once);
            assert_eq!(wrong_of("intel", [&pass, &once, &pass]), [""; 0]);
            assert_eq!(wrong_of("intel", [&once, &pass, &once]), [""; 0]);
        }
        let twice = repeated(["fail", "pass", "fail"]);
        assert_eq!(wrong_of("intel", [&pass, &twice, &pass]), ["a"]);
        assert_eq!(wrong_of("intel", [&pass, &pass, &twice]), ["a"]);
        let each = repeated(["fail", "pass", "skip"]);
        assert_eq!(wrong_of("intel", [&each, &each, &each]), ["a"]);
    }

    #[test]
    fn fewer_runs_than_three_do_not_forgive() {
        let one_of_two = format!("{A_FAILS}\n{PASS}");
        let two = format!("{PASS}\n{PASS}");
        assert_eq!(wrong_of("intel", [&two, &one_of_two, &two]), ["a", "b"]);
        let three = repeated(["pass"; RUNS]);
        assert_eq!(wrong_of("intel", [PASS, &three, PASS]), ["a", "b"]);
    }

    #[test]
    fn no_other_run_makes_up_for_harm() {
        let harms = [
            "ends-host (125)",
            "hang",
            "SIGSEGV",
            "signal-64",
            "pass+kernel",
            "pass+module",
        ];
        let pass = repeated(["pass"; RUNS]);
        for harm in harms {
            let harmed = repeated(["pass", harm, "pass"]);
            assert_eq!(wrong_of("intel", [&pass, &harmed, &pass]), ["a"]);
            assert_eq!(wrong_of("intel", [&pass, &pass, &harmed]), ["a"]);
            assert_eq!(wrong_of("intel", [&harmed, &harmed, &pass]), [""; 0]);
        }
    }

    #[test]
    fn who_has_no_end_is_to_be_excluded() {
        let hangs = "test a ... hang\ntest b ... skip";
        assert_eq!(wrong_of("intel", [hangs, hangs, hangs]), ["a"]);
    }

    #[test]
    fn too_few_passes_are_no_agreement() {
        let list = List::parse(LIST).unwrap();
        let tests = tests();
        let good = |text: &str, fewest| {
            let results = [text; 3].map(Results::parse);
            Table::new("intel", &tests, &list, &results, fewest).is_good()
        };
        let skips = PASS.replace("pass", "skip");
        assert!(good(PASS, 1));
        assert!(!good(PASS, 2));
        assert!(!good(&skips, 1));
        assert!(!good(A_FAILS, 1));
    }

    #[test]
    fn too_many_repetitions_are_wrong() {
        let tests: Vec<_> = ["a", "b", "c", "d"].map(String::from).to_vec();
        let list = List::parse("").unwrap();
        let once: Vec<_> = tests
            .iter()
            .map(|test| format!("test {test} ... pass"))
            .collect();
        let good = |repeated: usize| {
            let again = &once[..repeated];
            let runs = [&once[..], again, again].concat().join("\n");
            let results = [(); 3].map(|()| Results::parse(&runs));
            Table::new("amd", &tests, &list, &results, 0).is_good()
        };
        assert!(good(MOST_REPEATED));
        assert!(!good(MOST_REPEATED + 1));
    }

    #[test]
    fn parts_are_compared() {
        let output = "ok 1 x\nnot ok 2 y\nok 3 z # SKIP no\nok 4 u";
        let word = outcome("fail", output, true, false);
        assert_eq!(word, "fail(2+1+1)+kernel");
        let results = Results::parse(&result_line("a", &format!("{word} (2.3 s)")));
        assert_eq!(results.of("a"), [word]);
    }

    #[test]
    fn the_first_assertion_that_failed_is_named() {
        let output = "ok 1 x\n\
            ==== Test Assertion Failure ====\n  x86/a.c:46: eax == entry: 3\n  pid=5 tid=5 errno=4\n\
            ==== Test Assertion Failure ====\n  lib/b.c:1: false\n";
        let word = outcome("fail", output, false, true);
        assert_eq!(word, "fail(1+0+0)@x86/a.c:46+module");
        for other in [
            "",
            "x86/a.c:46: said elsewhere",
            "==== Test Assertion Failure ====\n",
        ] {
            assert_eq!(outcome("fail", other, false, false), "fail");
        }
    }

    #[test]
    fn arguments() {
        let list = List::parse(LIST).unwrap();
        assert_eq!(list.command("amd", "a"), "a -m 1");
        assert_eq!(list.command("intel", "a"), "a");
        assert!(List::parse("amd a with:-m,1 x\nany a with:-m,2 y").is_err());
    }

    #[test]
    fn lists_without_reasons_are_none() {
        assert!(List::parse("amd a fail").is_err());
        assert!(List::parse("amd a fail x\nany a skip y").is_err());
        let list = List::parse("amd unheard fail x").unwrap();
        assert!(list.ensure_known(&tests()).is_err());
    }
}
