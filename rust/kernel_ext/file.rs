// SPDX-License-Identifier: GPL-2.0

//! Files that the kernel opens itself.
//!
//! C headers: [`include/linux/fs.h`](srctree/include/linux/fs.h),
//! [`include/linux/fdtable.h`](srctree/include/linux/fdtable.h).

use crate::bindings as shim;
use core::ptr::NonNull;
use kernel::{
    bindings,
    error::{
        from_err_ptr,
        to_result, //
    },
    ffi::c_long,
    prelude::*, //
};

/// A file's operations, as an identity only. Valid as long as the module that they belong to is
/// loaded.
pub(crate) struct FileOperations(pub(crate) *const c_void);

/// A reference to an open file that is ours to put. Putting the last one closes the file at once,
/// and may sleep.
pub(crate) struct OwnedFile(NonNull<bindings::file>);

impl OwnedFile {
    /// Opens a file with `O_*` flags, as seen and permitted to the current task. May sleep.
    pub(crate) fn open(path: &CStr, flags: u32) -> Result<Self> {
        // SAFETY: The path ends in NUL.
        let file = unsafe { bindings::filp_open(path.as_char_ptr(), flags as c_int, 0) };
        let file = from_err_ptr(file)?;
        Ok(Self(NonNull::new(file).ok_or(ENOENT)?))
    }

    /// What can be done with the file: an identity of its kind.
    pub(crate) fn operations(&self) -> FileOperations {
        // SAFETY: The file is open.
        FileOperations(unsafe { shim::exitpolicy_file_operations(self.0.as_ptr().cast()) })
    }

    /// What the file belongs to, as an identity only.
    pub(crate) fn data(&self) -> usize {
        // SAFETY: The file is open.
        unsafe { shim::exitpolicy_file_data(self.0.as_ptr().cast()) }.addr()
    }

    /// Reads from the beginning, and returns what was read. May sleep.
    pub(crate) fn read<'buf>(&self, buffer: &'buf mut [u8]) -> Result<&'buf [u8]> {
        let mut position = 0;
        // SAFETY: The file is open, and `buffer` is valid for writes of its length.
        let read = unsafe {
            bindings::kernel_read(
                self.0.as_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                &mut position,
            )
        };
        if read < 0 {
            return Err(Error::from_errno(read as c_int));
        }
        buffer.get(..read as usize).ok_or(EIO)
    }

    /// An ioctl whose argument is a number. Not for one that takes a pointer: the number would be
    /// taken for an address in the current task. May sleep.
    pub(crate) fn ioctl(&self, command: u32, argument: u32) -> Result<c_long> {
        // SAFETY: The file is open; its operations check what user space could pass as well.
        let result = unsafe {
            shim::exitpolicy_file_ioctl(self.0.as_ptr().cast(), command, argument as usize)
        };
        if result < 0 {
            to_result(result as c_int)?;
        }
        Ok(result)
    }
}

impl Drop for OwnedFile {
    fn drop(&mut self) {
        // SAFETY: We own a reference to the file. If it is the last one, we are in process context
        // and hold no lock that the file's release could want: nobody opens files below such locks.
        unsafe { bindings::__fput_sync(self.0.as_ptr()) };
    }
}

/// A file descriptor of the current task that is ours to close.
pub(crate) struct OwnedFd(u32);

impl OwnedFd {
    /// Takes over a descriptor that an ioctl has installed and returned.
    pub(crate) fn from_ioctl(result: c_long) -> Self {
        Self(result as u32)
    }

    /// The file behind it. Another thread of the task may have put another one there.
    pub(crate) fn file(&self) -> Result<OwnedFile> {
        // SAFETY: May be called with any descriptor; returns a reference or NULL.
        let file = unsafe { bindings::fget(self.0) };
        Ok(OwnedFile(NonNull::new(file).ok_or(EBADF)?))
    }

    /// Closes it; dropping closes it too, but on the way back to user space.
    pub(crate) fn close_now(self) -> Result {
        let fd = self.0;
        core::mem::forget(self);
        // SAFETY: Removes a descriptor of the current task, if it is still open, and returns its
        // reference to the file.
        let file = unsafe { bindings::file_close_fd(fd) };
        drop(OwnedFile(NonNull::new(file).ok_or(EBADF)?));
        Ok(())
    }
}

impl Drop for OwnedFd {
    fn drop(&mut self) {
        // SAFETY: Closes a descriptor of the current task, if it is still open.
        let _ = unsafe { bindings::close_fd(self.0) };
    }
}
