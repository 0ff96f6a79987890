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

/// How a test ended, in one word.
///
/// `pass`, `skip`, `fail`, the name of a signal, or `hang`; then, if it has told of parts of it, how
/// many passed, failed and were skipped; and who else complained.
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

    /// All outcomes of a test, none of them twice.
    fn of(&self, test: &str) -> Vec<&str> {
        let mut outcomes: Vec<&str> = Vec::new();
        for (_, outcome) in self.0.iter().filter(|(name, _)| name == test) {
            if !outcomes.contains(&outcome.as_str()) {
                outcomes.push(outcome);
            }
        }
        outcomes
    }

    fn runs(&self, test: &str) -> usize {
        self.0.iter().filter(|(name, _)| name == test).count()
    }
}

/// What the list says of a test on a host.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    host: String,
    test: String,
    /// How it ends with everything passed through, or that it is not run.
    outcome: String,
    reason: String,
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
            outcome: outcome.to_string(),
            reason: reason
                .with_context(|| format!("no reason: {line}"))?
                .to_string(),
        })
    }
}

/// The tests that are not run, and the differences that are meant to be there.
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
                other.test == entry.test && (anywhere || other.host == entry.host)
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

    fn entry(&self, host: &str, test: &str) -> Option<&Entry> {
        let here = |entry: &&Entry| entry.host == host || entry.host == "any";
        self.0.iter().filter(here).find(|entry| entry.test == test)
    }

    /// Whether a test is not to be run on a host.
    pub fn is_excluded(&self, host: &str, test: &str) -> bool {
        self.entry(host, test)
            .is_some_and(|entry| entry.outcome == EXCLUDED)
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
    outcomes: [Vec<&'a str>; 3],
    repeated: bool,
    verdict: Verdict<'a>,
}

/// The results of one host, and what to think of them.
pub struct Table<'a> {
    host: &'a str,
    rows: Vec<Row<'a>>,
}

/// How many tests of a host may have come out otherwise when they were repeated: the emulators
/// have mistakes, and not that many.
const MOST_REPEATED: usize = 5;

impl<'a> Table<'a> {
    /// `results` are those of [`STATES`].
    pub fn new(
        host: &'a str,
        tests: &'a [String],
        list: &'a List,
        results: &'a [Results; 3],
    ) -> Self {
        let row = |test: &'a String| {
            let outcomes = [0, 1, 2].map(|state| results[state].of(test));
            let verdict = verdict(list.entry(host, test), &outcomes);
            let repeated = results.iter().any(|results| results.runs(test) > 1);
            Row {
                test,
                outcomes,
                repeated,
                verdict,
            }
        };
        Self {
            host,
            rows: tests.iter().map(row).collect(),
        }
    }

    /// The tests that are not as they should be.
    pub fn wrong(&self) -> impl Iterator<Item = &'a str> + '_ {
        let wrong = |row: &&Row| matches!(row.verdict, Verdict::Wrong(_));
        self.rows.iter().filter(wrong).map(|row| row.test)
    }

    fn repeated(&self) -> usize {
        self.rows.iter().filter(|row| row.repeated).count()
    }

    /// Whether all is as it should be.
    pub fn is_good(&self) -> bool {
        self.wrong().next().is_none() && self.repeated() <= MOST_REPEATED && !self.rows.is_empty()
    }
}

/// Of a test that was repeated, one outcome in common is enough: what differs is the emulator then.
/// But no repetition makes up for what the host itself suffered with the module.
fn verdict<'a>(entry: Option<&'a Entry>, outcomes: &[Vec<&str>; 3]) -> Verdict<'a> {
    let [absent, loaded, passed] = outcomes;
    if let Some(entry) = entry.filter(|entry| entry.outcome == EXCLUDED) {
        return Verdict::Excluded(&entry.reason);
    }
    let common = |some: &[&str], other: &[&str]| some.iter().any(|outcome| other.contains(outcome));
    let no_end = ["hang", "ends-host"];
    if outcomes.iter().any(Vec::is_empty) {
        return Verdict::Wrong("not run".to_string());
    }
    if absent
        .iter()
        .all(|outcome| no_end.iter().any(|end| outcome.starts_with(end)))
    {
        return Verdict::Wrong("has no end without the module, and is not excluded".to_string());
    }
    let harm = |outcome: &&&str| {
        let marks = ["ends-host", "+kernel", "+module"];
        marks.iter().any(|mark| outcome.contains(mark)) && !absent.contains(*outcome)
    };
    if let Some(outcome) = loaded.iter().chain(passed).find(harm) {
        return Verdict::Wrong(format!("{outcome} with the module, and not without"));
    }
    if !common(absent, loaded) {
        return Verdict::Wrong("differs without policy".to_string());
    }
    match entry {
        None if common(absent, passed) => Verdict::Same,
        None => Verdict::Wrong("differs, and nobody says why".to_string()),
        Some(entry) if absent.contains(&entry.outcome.as_str()) => {
            Verdict::Wrong("is listed, and ends so without the module, too".to_string())
        }
        Some(entry) if passed.contains(&entry.outcome.as_str()) => Verdict::Listed(&entry.reason),
        Some(entry) => Verdict::Wrong(format!("is listed as {}", entry.outcome)),
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
            let mut note = match &row.verdict {
                Verdict::Same => String::new(),
                Verdict::Listed(reason) => reason.to_string(),
                Verdict::Excluded(reason) => format!("not run: {reason}"),
                Verdict::Wrong(what) => format!("WRONG: {what}"),
            };
            if row.repeated {
                note = format!("REPEATED {note}");
            }
            line(row.test, [&cells[0], &cells[1], &cells[2]], &note)?;
        }
        let count = |is: fn(&Row) -> bool| self.rows.iter().filter(|row| is(row)).count();
        writeln!(
            f,
            "{}: {} tests, {} of them not run, {} the same in all three, {} differ as listed, \
             {} wrong, {} repeated",
            self.host,
            self.rows.len(),
            count(|row| matches!(row.verdict, Verdict::Excluded(_))),
            count(|row| row.verdict == Verdict::Same),
            count(|row| matches!(row.verdict, Verdict::Listed(_))),
            self.wrong().count(),
            self.repeated(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "# HOST TEST OUTCOME REASON\n\
        amd   a    fail      it asserts that HLT exits\n\
        any   slow excluded  too slow\n";

    fn tests() -> Vec<String> {
        ["a", "b", "slow"].map(String::from).to_vec()
    }

    fn wrong_of(host: &str, states: [&str; 3]) -> Vec<String> {
        let list = List::parse(LIST).unwrap();
        let tests = tests();
        let results = states.map(Results::parse);
        let table = Table::new(host, &tests, &list, &results);
        let wrong = table.wrong().map(String::from).collect();
        assert_eq!(table.is_good(), table.wrong().next().is_none());
        wrong
    }

    const PASS: &str = "test a ... pass\ntest b ... skip";
    const A_FAILS: &str = "test a ... fail\ntest b ... skip";

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
    fn what_was_not_run_is_wrong() {
        assert_eq!(wrong_of("intel", [PASS, PASS, "test b ... "]), ["a", "b"]);
    }

    #[test]
    fn repeated() {
        let again = format!("{A_FAILS}\ntest a ... pass");
        assert_eq!(wrong_of("intel", [PASS, &again, PASS]), [""; 0]);
        let never = format!("{A_FAILS}\n{A_FAILS}");
        assert_eq!(wrong_of("intel", [PASS, &never, PASS]), ["a"]);
    }

    #[test]
    fn no_repetition_makes_up_for_harm() {
        for harm in ["ends-host (125)", "pass+kernel", "pass+module"] {
            let harmed = format!("test a ... {harm}\n{PASS}");
            assert_eq!(wrong_of("intel", [PASS, &harmed, PASS]), ["a"]);
            assert_eq!(wrong_of("intel", [PASS, PASS, &harmed]), ["a"]);
            let without = wrong_of("intel", [&harmed, &harmed, &harmed]);
            assert_eq!(without, [""; 0]);
        }
    }

    #[test]
    fn who_has_no_end_is_to_be_excluded() {
        let hangs = "test a ... hang\ntest b ... skip";
        assert_eq!(wrong_of("intel", [hangs, hangs, hangs]), ["a"]);
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
    fn lists_without_reasons_are_none() {
        assert!(List::parse("amd a fail").is_err());
        assert!(List::parse("amd a fail x\nany a skip y").is_err());
        let list = List::parse("amd unheard fail x").unwrap();
        assert!(list.ensure_known(&tests()).is_err());
    }
}
