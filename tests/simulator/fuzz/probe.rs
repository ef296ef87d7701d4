//! A disk that counts: an open that does not come to an end is caught.

use std::cell::{Cell, RefCell};
use std::io;

use vhdx_ublk::disk::{Buffer, Disk, ReadDisk};

use crate::sim::store::Store;

pub struct Probe {
    store: RefCell<Store>,
    left: Cell<u64>,
}

impl Probe {
    /// A disk that holds `store` and serves at most so many operations.
    pub fn new(store: Store, operations: u64) -> Self {
        Self { store: RefCell::new(store), left: Cell::new(operations) }
    }

    pub fn content(&self) -> Store {
        self.store.borrow().clone()
    }

    fn step(&self) {
        let left = self.left.get().checked_sub(1).expect("opening comes to an end in a bounded time");
        self.left.set(left);
    }
}

impl ReadDisk for Probe {
    async fn read(&self, offset: u64, length: usize) -> io::Result<Buffer> {
        self.step();
        assert!(offset.is_multiple_of(4096) && length.is_multiple_of(4096), "a read of {length} at {offset}");
        if i64::try_from(offset.saturating_add(length as u64)).is_err() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut bytes = Buffer::zeroed(length);
        self.store.borrow().read(offset, &mut bytes);
        Ok(bytes)
    }

    async fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.step();
        Ok(self.store.borrow().next_page(offset))
    }

    async fn length(&self) -> io::Result<u64> {
        Ok(self.store.borrow().length)
    }

    fn takes_space_back(&self) -> bool {
        true
    }
}

impl Disk for Probe {
    async fn write(&self, offset: u64, data: Buffer) -> io::Result<()> {
        self.step();
        let length = self.store.borrow().length;
        assert!(offset.is_multiple_of(4096) && offset + data.len() as u64 <= length, "a write at {offset}");
        self.store.borrow_mut().write(offset, &data);
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        self.step();
        Ok(())
    }

    async fn sync_host(&self) -> io::Result<()> {
        panic!("opening asks for no other file");
    }

    async fn grow(&self, length: u64) -> io::Result<()> {
        self.step();
        assert!(length > self.store.borrow().length, "growing to {length}");
        self.store.borrow_mut().resize(length);
        Ok(())
    }

    async fn truncate(&self, _length: u64) -> io::Result<()> {
        panic!("opening never shortens a file");
    }

    async fn reserve(&self, _offset: u64, _length: u64) -> io::Result<()> {
        panic!("opening reserves nothing");
    }

    async fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.step();
        assert!(offset + length <= self.store.borrow().length, "zeroing past the end");
        self.store.borrow_mut().zero(offset, length);
        Ok(())
    }

    async fn punch(&self, _offset: u64, _length: u64) -> io::Result<bool> {
        panic!("opening punches nothing");
    }
}
