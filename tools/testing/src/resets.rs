// SPDX-License-Identifier: GPL-2.0

//! Guests that were reset, which none of ours asks for, noted for who runs the VMMs: who waits for
//! one of their guests sees only that it does nothing any more.

use std::{
    env,
    fs::{
        self,
        OpenOptions, //
    },
    io::Write,
    path::{
        Path,
        PathBuf, //
    }, //
};

/// In the environment of VMMs: the file for notes. Without it, nothing is noted.
const NOTES: &str = "EXITPOLICY_RESETS";

fn notes() -> Option<PathBuf> {
    env::var_os(NOTES).map(PathBuf::from)
}

/// VMMs that this process starts from now on note resets there.
pub fn note_in(file: &Path) {
    env::set_var(NOTES, file);
    forget();
}

/// Notes one, and what there is to say about it.
pub(crate) fn note(what: &str) {
    let Some(file) = notes() else {
        return;
    };
    let written = OpenOptions::new()
        .append(true)
        .create(true)
        .open(file)
        .and_then(|mut file| writeln!(file, "{what}"));
    if let Err(error) = written {
        eprintln!("cannot note that {what}: {error}");
    }
}

/// What was noted, if anything was.
pub fn noted() -> Option<String> {
    fs::read_to_string(notes()?).ok()
}

/// Begins anew.
pub fn forget() {
    if let Some(file) = notes() {
        // There may be none.
        let _ = fs::remove_file(file);
    }
}
