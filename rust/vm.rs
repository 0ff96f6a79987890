// SPDX-License-Identifier: GPL-2.0

//! The VMs that were decided on.

use crate::{
    kernel_ext::raw_spinlock::{
        new_raw_spinlock,
        RawSpinLock, //
    },
    kvm,
    policy::Exits, //
};
use kernel::{
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNodeReservation, //
    },
};

/// What is known of a VM.
#[derive(Clone, Copy)]
pub(crate) struct Record {
    /// Counts up from 1.
    pub(crate) id: u64,
    /// The VMM's thread group, in the initial pid namespace.
    pub(crate) pid: u32,
    /// The VMM's address space, as an identity only.
    pub(crate) mm: usize,
    /// The VMM's domain cgroup at the decision.
    pub(crate) cgroup: u64,
    pub(crate) floor: Exits,
    pub(crate) requested: Exits,
    pub(crate) effective: Exits,
    pub(crate) clamped: Exits,
}

struct Entry {
    record: Record,
    key: usize,
}

struct Tables {
    last_id: u64,
    by_id: RBTree<u64, Entry>,
    /// The `struct kvm`'s address -> id.
    by_key: RBTree<usize, u64>,
    count: u64,
    /// Up to which id there may be a directory in sysfs.
    published: u64,
    /// Ids up to `published` whose VM is gone and whose directory may still be there.
    gone: RBTree<u64, Entry>,
}

/// The VMs that were decided on and still exist.
///
/// An entry does not hold its VM: it is removed when the VM is destroyed, under the lock, so that
/// who finds an entry under the lock has a VM that is alive.
#[pin_data]
pub(crate) struct Vms {
    #[pin]
    tables: RawSpinLock<Tables>,
}

impl Vms {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            tables <- new_raw_spinlock!(
                Tables {
                    last_id: 0,
                    by_id: RBTree::new(),
                    by_key: RBTree::new(),
                    count: 0,
                    published: 0,
                    gone: RBTree::new(),
                },
                "exitpolicy_vms"
            ),
        })
    }

    /// The record of the VM with this key. Atomic context.
    pub(crate) fn by_key(&self, key: usize) -> Option<Record> {
        let tables = self.tables.lock();
        let id = tables.by_key.get(&key)?;
        tables.by_id.get(id).map(|entry| entry.record)
    }

    /// Replaces the record with the same id. Atomic context.
    pub(crate) fn replace(&self, record: Record) {
        if let Some(entry) = self.tables.lock().by_id.get_mut(&record.id) {
            entry.record = record;
        }
    }

    /// Adds a VM, gives it an id, and returns its record. Fails with [`ENOMEM`]. Atomic context.
    pub(crate) fn add(&self, key: usize, record: Record) -> Result<Record> {
        let by_id = RBTreeNodeReservation::new(GFP_ATOMIC)?;
        let by_key = RBTreeNodeReservation::new(GFP_ATOMIC)?;
        let mut tables = self.tables.lock();
        tables.last_id += 1;
        let record = Record {
            id: tables.last_id,
            ..record
        };
        tables
            .by_id
            .insert(by_id.into_node(record.id, Entry { record, key }));
        tables.by_key.insert(by_key.into_node(key, record.id));
        tables.count += 1;
        Ok(record)
    }

    /// Forgets the VM with this key, and returns whether it was known. Atomic context.
    pub(crate) fn remove(&self, key: usize) -> bool {
        let mut tables = self.tables.lock();
        let Some(id) = tables.by_key.remove(&key) else {
            return false;
        };
        tables.forget(id);
        true
    }

    /// Forgets all VMs.
    pub(crate) fn clear(&self) {
        loop {
            let mut tables = self.tables.lock();
            let Some((&key, &id)) = tables.by_key.iter().next() else {
                return;
            };
            tables.by_key.remove(&key);
            tables.forget(id);
        }
    }

    /// The number of VMs.
    pub(crate) fn count(&self) -> u64 {
        self.tables.lock().count
    }

    /// The VM with this id, and the number of its vCPUs.
    pub(crate) fn get(&self, id: u64) -> Option<(Record, u32)> {
        let tables = self.tables.lock();
        tables.by_id.get(&id).map(Entry::with_vcpus)
    }

    /// The VM with the next higher id, and the number of its vCPUs.
    pub(crate) fn next_after(&self, id: u64) -> Option<(Record, u32)> {
        let tables = self.tables.lock();
        let cursor = tables.by_id.cursor_lower_bound(&id.checked_add(1)?)?;
        let (_, entry) = cursor.current();
        Some(entry.with_vcpus())
    }

    /// The next VM that has no directory in sysfs yet. The caller is about to make it one.
    pub(crate) fn next_to_publish(&self) -> Option<u64> {
        let mut tables = self.tables.lock();
        let published = tables.published;
        let id = *tables
            .by_id
            .cursor_lower_bound(&(published + 1))?
            .current()
            .0;
        tables.published = id;
        Some(id)
    }

    /// A VM that is gone while its directory may still be there. The caller is about to remove it.
    pub(crate) fn next_to_unpublish(&self) -> Option<u64> {
        let mut tables = self.tables.lock();
        let id = *tables.gone.iter().next()?.0;
        let node = tables.gone.remove_node(&id);
        drop(tables);
        drop(node);
        Some(id)
    }
}

impl Entry {
    /// To be called under the lock, with an entry of `by_id`.
    fn with_vcpus(&self) -> (Record, u32) {
        // SAFETY: An entry of `by_id` under the lock: the VM has not got past its vm_destroy,
        // where `Vms::remove` takes that lock.
        (self.record, unsafe { kvm::online_vcpus_of(self.key) })
    }
}

impl Tables {
    fn forget(&mut self, id: u64) {
        if let Some(node) = self.by_id.remove_node(&id) {
            self.count -= 1;
            if id <= self.published {
                self.gone.insert(node);
            }
        }
    }
}
