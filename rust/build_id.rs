// SPDX-License-Identifier: GPL-2.0

//! Whether the KVM that runs is the one whose structures were compiled in.
//!
//! `vermagic` does not tell: two builds of the same version with other options have the same.
//! The linker's build ids do, and the kernel shows those of loaded modules, and its own, in sysfs.

use crate::kernel_ext::file::OwnedFile;
use kernel::{
    bindings,
    page::PAGE_SIZE,
    prelude::*,
    str::CString, //
};

include!(concat!(env!("EXITPOLICY_BINDINGS"), "/build_ids.rs"));

/// `NT_GNU_BUILD_ID` of include/uapi/linux/elf.h.
const NT_GNU_BUILD_ID: u32 = 3;

/// Where an image's code is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Image {
    /// In a module.
    Module,
    /// In the kernel itself.
    Kernel,
}

const KERNEL_NOTES: &CStr = c"/sys/kernel/notes";

fn built_for(image: &CStr) -> Option<&'static [u8]> {
    let found = BUILD_IDS.iter().find(|(name, _)| *name == image);
    found.map(|(_, id)| *id)
}

/// Whether the kernel that this was built for has it in itself.
fn is_built_in(image: &CStr) -> bool {
    match image.to_bytes() {
        b"kvm" => cfg!(CONFIG_KVM = "y"),
        b"kvm_amd" => cfg!(CONFIG_KVM_AMD = "y"),
        b"kvm_intel" => cfg!(CONFIG_KVM_INTEL = "y"),
        _ => false,
    }
}

/// Where one of KVM's images is: nowhere if it is a module that is not loaded, or whose init
/// function has yet to return. Process context, may sleep.
///
/// Fails, after saying why, if `/sys`, as the current task sees it, does not tell.
pub(crate) fn find(module: &CStr) -> Result<Option<Image>> {
    // There on every kernel that has build ids, so that without it nothing can be told.
    if let Err(error) = OwnedFile::open(KERNEL_NOTES, bindings::O_RDONLY) {
        pr_err!(
            "cannot open {}: {:?}; is /sys mounted?\n",
            KERNEL_NOTES,
            error
        );
        return Err(error);
    }
    let path = CString::try_from_fmt(fmt!("/sys/module/{}/initstate", module))?;
    let mut buffer = [0; 16];
    match OwnedFile::open(&path, bindings::O_RDONLY).and_then(|file| file.read(&mut buffer)) {
        Ok(b"live\n") => Ok(Some(Image::Module)),
        Ok(_) => Ok(None),
        // What is built in has no such file.
        Err(ENOENT) => Ok(is_built_in(module).then_some(Image::Kernel)),
        Err(error) => {
            pr_err!("cannot read {}: {:?}\n", &*path, error);
            Err(error)
        }
    }
}

/// Compares the build id of one of KVM's images with the one that was built for. Fails, after
/// saying why, if it is another one or cannot be found out. Process context, may sleep.
pub(crate) fn check(module: &CStr, image: Image) -> Result {
    let (name, path) = match image {
        Image::Module => (
            module,
            CString::try_from_fmt(fmt!("/sys/module/{}/notes/.note.gnu.build-id", module))?,
        ),
        Image::Kernel => (c"vmlinux", CString::try_from_fmt(fmt!("{}", KERNEL_NOTES))?),
    };
    let mut buffer = KVec::from_elem(0, PAGE_SIZE, GFP_KERNEL)?;
    let notes = OwnedFile::open(&path, bindings::O_RDONLY)
        .and_then(|file| file.read(&mut buffer))
        .inspect_err(|error| pr_err!("cannot read {}: {:?}\n", &*path, *error))?;
    let found = gnu_build_id(notes).unwrap_or(&[]);
    let expected = built_for(name).unwrap_or(&[]);
    if found != expected || found.is_empty() {
        pr_err!(
            "{} has build id {}, but this module was built for {}: \
             build it again for the running kernel\n",
            name,
            Hex(found),
            Hex(expected)
        );
        return Err(ENOEXEC);
    }
    Ok(())
}

/// Finds the GNU build id among ELF notes.
fn gnu_build_id(mut notes: &[u8]) -> Option<&[u8]> {
    let word =
        |bytes: &[u8], at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    loop {
        let name_size = word(notes, 0)? as usize;
        let desc_size = word(notes, 4)? as usize;
        let kind = word(notes, 8)?;
        let desc_at = 12_usize.checked_add(name_size.checked_next_multiple_of(4)?)?;
        let desc_end = desc_at.checked_add(desc_size)?;
        if kind == NT_GNU_BUILD_ID && notes.get(12..12 + name_size)? == b"GNU\0" {
            return notes.get(desc_at..desc_end);
        }
        notes = notes.get(desc_end.checked_next_multiple_of(4)?..)?;
    }
}

struct Hex<'a>(&'a [u8]);

impl kernel::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        self.0
            .iter()
            .try_for_each(|byte| f.write_fmt(fmt!("{:02x}", byte)))
    }
}

#[kunit_tests(exitpolicy_build_id)]
mod tests {
    use super::*;

    /// A note of another kind, then a GNU build id of four bytes.
    const NOTES: &[u8] = b"\x06\0\0\0\x02\0\0\0\x01\x01\0\0Linux\0\0\0\xaa\xbb\0\0\
                           \x04\0\0\0\x04\0\0\0\x03\0\0\0GNU\0\x12\x34\x56\x78";

    #[test]
    fn found_behind_others() {
        assert_eq!(gnu_build_id(NOTES), Some(&b"\x12\x34\x56\x78"[..]));
    }

    #[test]
    fn cut_off() {
        for length in 0..NOTES.len() {
            assert!(gnu_build_id(&NOTES[..length]).is_none());
        }
    }

    #[test]
    fn absurd_sizes() {
        let mut notes = [0xff; 16];
        assert!(gnu_build_id(&notes).is_none());
        notes[..4].fill(0);
        assert!(gnu_build_id(&notes).is_none());
    }
}
