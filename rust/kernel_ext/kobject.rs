// SPDX-License-Identifier: GPL-2.0

//! Directories and attributes in sysfs.
//!
//! C headers: [`include/linux/kobject.h`](srctree/include/linux/kobject.h),
//! [`include/linux/sysfs.h`](srctree/include/linux/sysfs.h).

use crate::kernel_ext::capability::require_sys_admin;
use core::{
    marker::PhantomData,
    ptr,
    slice, //
};
use kernel::{
    bindings,
    error::{
        from_result,
        to_result, //
    },
    fmt::{
        self,
        Write, //
    },
    page::PAGE_SIZE,
    prelude::*,
    str::CString,
    sync::Completion,
    types::Opaque, //
};

/// One file of a [`Directory`], which reads and writes a `T`.
#[repr(C)]
pub(crate) struct Attribute<T> {
    inner: bindings::attribute,
    show: Option<fn(&T, &mut Output<'_>) -> Result>,
    store: Option<fn(&T, &[u8]) -> Result>,
    _data: PhantomData<fn(&T)>,
}

// SAFETY: `inner` holds pointers to constants only, and is read only.
unsafe impl<T> Sync for Attribute<T> {}

impl<T> Attribute<T> {
    const fn new(name: &'static CStr, mode: u16) -> Self {
        let mut inner: bindings::attribute = pin_init::zeroed();
        inner.name = kernel::str::as_char_ptr_in_const_context(name);
        inner.mode = mode;
        Self {
            inner,
            show: None,
            store: None,
            _data: PhantomData,
        }
    }

    /// A file that anybody may read. What `show` writes is followed by a new line.
    pub(crate) const fn public(
        name: &'static CStr,
        show: fn(&T, &mut Output<'_>) -> Result,
    ) -> Self {
        let mut this = Self::new(name, 0o444);
        this.show = Some(show);
        this
    }

    /// A file that root may read who has CAP_SYS_ADMIN in the initial user namespace: the root of a
    /// container without a user namespace has files of root's, too.
    pub(crate) const fn private(
        name: &'static CStr,
        show: fn(&T, &mut Output<'_>) -> Result,
    ) -> Self {
        let mut this = Self::new(name, 0o400);
        this.show = Some(show);
        this
    }

    /// Lets root write the file too. `store` gets what was written, without a new line at its end.
    pub(crate) const fn writable(mut self, store: fn(&T, &[u8]) -> Result) -> Self {
        self.inner.mode |= 0o200;
        self.store = Some(store);
        self
    }

    /// A file that root may write and nobody can read.
    pub(crate) const fn write_only(name: &'static CStr, store: fn(&T, &[u8]) -> Result) -> Self {
        Self::new(name, 0).writable(store)
    }
}

/// What a file shows, at most a page.
pub(crate) struct Output<'a> {
    buffer: &'a mut [u8],
    length: usize,
}

impl Output<'_> {
    /// Appends bytes as they are. Fails with [`ENOSPC`].
    pub(crate) fn write_bytes(&mut self, bytes: &[u8]) -> Result {
        let end = self.length.checked_add(bytes.len()).ok_or(ENOSPC)?;
        self.buffer
            .get_mut(self.length..end)
            .ok_or(ENOSPC)?
            .copy_from_slice(bytes);
        self.length = end;
        Ok(())
    }
}

impl Write for Output<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.write_bytes(text.as_bytes()).map_err(|_| fmt::Error)
    }
}

/// What the files of a [`Directory`] show.
pub(crate) trait Attributes: Send + Sync + Sized + 'static {
    /// The files, in the order in which they are made. None of their functions may drop the
    /// directory, nor wait for anybody who is about to drop it.
    const ATTRIBUTES: &'static [Attribute<Self>];
}

/// A directory without files.
impl Attributes for () {
    const ATTRIBUTES: &'static [Attribute<Self>] = &[];
}

/// Where a new directory goes.
pub(crate) enum Parent<'a, P: Attributes> {
    /// `/sys/kernel`.
    Kernel,
    /// Another directory.
    Directory(&'a Directory<P>),
}

impl<P: Attributes> Parent<'_, P> {
    fn kobject(&self) -> *mut bindings::kobject {
        match self {
            // SAFETY: A global that the kernel sets up before any module is loaded.
            Self::Kernel => unsafe { bindings::kernel_kobj },
            Self::Directory(directory) => directory.kobject.get(),
        }
    }

    /// Changes who may look into a directory that is here. It cannot be asked for when that one is
    /// made. Fails with [`ENOENT`] if there is none of this name.
    pub(crate) fn set_mode(&self, name: &'static CStr, mode: u16) -> Result {
        // For all that it is called, it changes anything with that name.
        let directory = Attribute::<()>::new(name, 0);
        // SAFETY: The kobject has been added. The attribute is a name, for this call.
        to_result(unsafe { bindings::sysfs_chmod_file(self.kobject(), &directory.inner, mode) })
    }
}

/// A directory in sysfs.
///
/// Dropping it removes the directory with its files, waits for those that are being read or
/// written, and waits until nobody holds the kobject any more.
///
/// # Invariants
///
/// `kobject` is initialised and added from initialisation to drop.
#[pin_data(PinnedDrop)]
pub(crate) struct Directory<T: Attributes> {
    data: T,
    #[pin]
    released: Completion,
    #[pin]
    kobject: Opaque<bindings::kobject>,
}

// SAFETY: A kobject is bound to no thread, and `T` is `Send`.
unsafe impl<T: Attributes> Send for Directory<T> {}
// SAFETY: `&Directory` gives access to `T`, which is `Sync`, and to the kobject as a parent.
unsafe impl<T: Attributes> Sync for Directory<T> {}

impl<T: Attributes> Directory<T> {
    const OPS: bindings::sysfs_ops = bindings::sysfs_ops {
        show: Some(Self::show),
        store: Some(Self::store),
    };

    const TYPE: &'static bindings::kobj_type = &bindings::kobj_type {
        release: Some(Self::release),
        sysfs_ops: &Self::OPS,
        ..pin_init::zeroed()
    };

    /// Makes a directory with its files. Fails with [`EEXIST`] if the name is taken. May sleep.
    pub(crate) fn new<P: Attributes>(
        name: fmt::Arguments<'_>,
        parent: Parent<'_, P>,
        data: T,
    ) -> Result<Pin<KBox<Self>>> {
        let name = CString::try_from_fmt(name)?;
        let parent = parent.kobject();
        let this = KBox::try_pin_init(
            try_pin_init!(Self {
                data,
                released <- Completion::new(),
                // SAFETY: `slot` is valid for writes, and all zeroes is what `kobject_init`
                // expects; it stays where it is, since `Self` is pinned, and `drop` waits for its
                // release. `parent` is alive, as its directory is borrowed.
                kobject <- Opaque::try_ffi_init(|slot: *mut bindings::kobject| unsafe {
                    ptr::write_bytes(slot, 0, 1);
                    let added = to_result(bindings::kobject_init_and_add(
                        slot,
                        Self::TYPE,
                        parent,
                        c"%s".as_char_ptr(),
                        name.as_char_ptr(),
                    ));
                    if added.is_err() {
                        // `released` was initialised before, and what is about to be freed
                        // must not be released later.
                        bindings::kobject_put(slot);
                        Self::from_kobject(slot).released.wait_for_completion();
                    }
                    added
                }),
            }),
            GFP_KERNEL,
        )?;
        // An early return drops `this`, and the directory with what it has so far.
        for attribute in T::ATTRIBUTES {
            // SAFETY: The kobject has been added. The attribute is a constant.
            to_result(unsafe {
                bindings::sysfs_create_file_ns(this.kobject.get(), &attribute.inner, ptr::null())
            })?;
        }
        Ok(this)
    }

    /// # Safety
    ///
    /// `kobject` must be the kobject of a `Self` that lives for `'a`.
    unsafe fn from_kobject<'a>(kobject: *mut bindings::kobject) -> &'a Self {
        // SAFETY: By the safety requirements. Nobody borrows a `Self` mutably while it is added.
        unsafe { &*kernel::container_of!(Opaque::cast_from(kobject).cast_mut(), Self, kobject) }
    }

    /// # Safety
    ///
    /// To be called by sysfs only: `kobject` is that of a `Self`, `attribute` one of
    /// `T::ATTRIBUTES`, and `buffer` a page.
    unsafe extern "C" fn show(
        kobject: *mut bindings::kobject,
        attribute: *mut bindings::attribute,
        buffer: *mut c_char,
    ) -> isize {
        // SAFETY: By the safety requirements. sysfs calls this while it holds the file active,
        // and removing the directory waits for that, so that the `Self` outlives the call.
        let (this, attribute, buffer) = unsafe {
            (
                Self::from_kobject(kobject),
                // `inner` is the first field of a `repr(C)` structure.
                &*attribute.cast::<Attribute<T>>(),
                // The page is not to be filled: that is a WARN (fs/sysfs/file.c: sysfs_kf_seq_show()).
                slice::from_raw_parts_mut(buffer, PAGE_SIZE - 1),
            )
        };
        from_result(|| {
            if attribute.inner.mode & 0o004 == 0 {
                require_sys_admin()?;
            }
            let mut out = Output { buffer, length: 0 };
            attribute.show.ok_or(EIO)?(&this.data, &mut out)?;
            out.write_bytes(b"\n")?;
            Ok(out.length as isize)
        })
    }

    /// # Safety
    ///
    /// To be called by sysfs only: `kobject` is that of a `Self`, `attribute` one of
    /// `T::ATTRIBUTES`, and `buffer` has `length` bytes.
    unsafe extern "C" fn store(
        kobject: *mut bindings::kobject,
        attribute: *mut bindings::attribute,
        buffer: *const c_char,
        length: usize,
    ) -> isize {
        // SAFETY: As in `show`.
        let (this, attribute, text) = unsafe {
            (
                Self::from_kobject(kobject),
                &*attribute.cast::<Attribute<T>>(),
                slice::from_raw_parts(buffer, length),
            )
        };
        from_result(|| {
            // kernfs cuts a longer write to a page, and would hand on the rest as a second one.
            if length >= PAGE_SIZE {
                return Err(EINVAL);
            }
            let text = text.strip_suffix(b"\n").unwrap_or(text);
            attribute.store.ok_or(EIO)?(&this.data, text)?;
            Ok(length as isize)
        })
    }

    /// # Safety
    ///
    /// To be called by `kobject_put` only, with the kobject of a `Self`.
    unsafe extern "C" fn release(kobject: *mut bindings::kobject) {
        // SAFETY: By the safety requirements. Whoever drops the `Self` waits for this completion.
        unsafe { Self::from_kobject(kobject) }
            .released
            .complete_all();
    }
}

#[pinned_drop]
impl<T: Attributes> PinnedDrop for Directory<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Added, by the invariant, and this is our reference.
        unsafe {
            bindings::kobject_del(self.kobject.get());
            bindings::kobject_put(self.kobject.get());
        }
        // Others who hold the kobject do so for a moment only (sysfs does not), except for
        // CONFIG_DEBUG_KOBJECT_RELEASE, which makes everybody wait.
        self.released.wait_for_completion();
    }
}
