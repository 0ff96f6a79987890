// SPDX-License-Identifier: GPL-2.0

//! The VMs that were decided on.

use crate::{
    kernel_ext::raw_spinlock::{
        new_raw_spinlock,
        RawSpinLock, //
    },
    policy::Exits, //
};
use kernel::{
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNode,
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
    /// One that is being created included.
    pub(crate) vcpus: u32,
}

struct Tables {
    last_id: u64,
    by_id: RBTree<u64, Record>,
    /// The `struct kvm`'s address -> id.
    by_key: RBTree<usize, u64>,
    count: u64,
    /// Up to which id there may be a directory in sysfs.
    published: u64,
    /// Ids up to `published` whose VM is gone and whose directory may still be there.
    gone: RBTree<u64, Record>,
}

/// The VMs that were decided on and still exist.
///
/// An entry does not hold its VM, and nothing is read through it: what is known is what the hooks
/// saw. It is removed when the VM is destroyed, under the lock.
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
        tables.by_id.get(id).copied()
    }

    /// Replaces the record with the same id. Atomic context.
    pub(crate) fn replace(&self, record: Record) {
        if let Some(known) = self.tables.lock().by_id.get_mut(&record.id) {
            *known = record;
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
        tables.by_id.insert(by_id.into_node(record.id, record));
        tables.by_key.insert(by_key.into_node(key, record.id));
        tables.count += 1;
        Ok(record)
    }

    /// Forgets the VM with this key, and returns whether it was known. Atomic context.
    pub(crate) fn remove(&self, key: usize) -> bool {
        // Memory is freed after the lock, which is a raw one.
        let forgotten = self.tables.lock().forget(key);
        forgotten.is_some()
    }

    /// Forgets all VMs.
    pub(crate) fn clear(&self) {
        loop {
            let first = self.tables.lock().by_key.keys().next().copied();
            match first {
                Some(key) => self.remove(key),
                None => return,
            };
        }
    }

    /// The number of VMs.
    pub(crate) fn count(&self) -> u64 {
        self.tables.lock().count
    }

    /// The VM with this id.
    pub(crate) fn get(&self, id: u64) -> Option<Record> {
        self.tables.lock().by_id.get(&id).copied()
    }

    /// The VM with the next higher id.
    pub(crate) fn next_after(&self, id: u64) -> Option<Record> {
        let tables = self.tables.lock();
        let cursor = tables.by_id.cursor_lower_bound(&id.checked_add(1)?)?;
        Some(*cursor.current().1)
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

impl Tables {
    /// Forgets a VM, and returns what is to be freed.
    fn forget(&mut self, key: usize) -> Option<Forgotten> {
        let id = *self.by_key.get(&key)?;
        let key = self.by_key.remove_node(&key);
        let mut record = self.by_id.remove_node(&id);
        if record.is_some() {
            self.count -= 1;
        }
        if id <= self.published {
            if let Some(node) = record.take() {
                self.gone.insert(node);
            }
        }
        Some(Forgotten {
            _key: key,
            _record: record,
        })
    }
}

/// Nodes that are in no tree any more.
struct Forgotten {
    _key: Option<RBTreeNode<usize, u64>>,
    _record: Option<RBTreeNode<u64, Record>>,
}
