// SPDX-License-Identifier: GPL-2.0

//! Where the host's files are.

use std::{
    fs,
    io,
    path::{
        Path,
        PathBuf, //
    }, //
};

/// The host that is looked at: `/`, or in tests a directory that stands for it.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self::new("/")
    }
}

impl Host {
    /// A host whose `/proc`, `/sys`, `/dev` and so on are in `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where an absolute path of the host is.
    pub fn path(&self, absolute: impl AsRef<Path>) -> PathBuf {
        let absolute = absolute.as_ref();
        self.root
            .join(absolute.strip_prefix("/").unwrap_or(absolute))
    }

    /// Reads a file of one value, without the space around it.
    ///
    /// # Errors
    ///
    /// Those of [`fs::read_to_string`].
    pub fn read(&self, absolute: impl AsRef<Path>) -> io::Result<String> {
        Ok(fs::read_to_string(self.path(absolute))?.trim().to_owned())
    }

    /// Whether there is such a file or directory.
    pub fn has(&self, absolute: impl AsRef<Path>) -> bool {
        self.path(absolute).exists()
    }
}
