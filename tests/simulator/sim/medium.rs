//! The disk that recovery runs on: the metadata of a crash image, every operation at once, all of them kept.
//!
//! Recovery does one operation at a time, so what it did gives every state in which a second power cut can
//! find it. It has no business with payload: a read there is a violation, and that is what makes payload
//! sectors independent of each other.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use vhdx_ublk::disk::{Buffer, Disk, ReadDisk};

use super::disk::{Effect, apply};
use super::places::Places;
use super::store::Store;
use super::violation::violated;

/// One crash image under recovery.
pub struct Medium {
    store: RefCell<Store>,
    /// Changes and syncs, in order.
    ops: RefCell<Vec<Effect>>,
    places: Places,
}

impl Medium {
    /// A file with this content, of which only what is in `places` is there.
    pub fn new(store: Store, places: Places) -> Self {
        Self { store: RefCell::new(store), ops: RefCell::default(), places }
    }

    /// What recovery did.
    pub fn into_ops(self) -> Vec<Effect> {
        self.ops.into_inner()
    }

    fn run(&self, effect: Effect) {
        apply(&mut self.store.borrow_mut(), &effect);
        self.ops.borrow_mut().push(effect);
    }

    fn check_place(&self, doing: &str, offset: u64, length: usize) {
        if !self.places.has(offset) || !self.places.has(offset + length as u64 - 1) {
            violated(format!("recovery {doing} payload: {length} bytes at {offset}"));
        }
    }
}

impl ReadDisk for Medium {
    async fn read(&self, offset: u64, length: usize) -> io::Result<Buffer> {
        self.check_place("reads", offset, length);
        let mut buffer = Buffer::zeroed(length);
        self.store.borrow().read_onto_zeros(offset, &mut buffer);
        Ok(buffer)
    }

    async fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(self.store.borrow().next_stored(offset))
    }

    async fn length(&self) -> io::Result<u64> {
        Ok(self.store.borrow().length)
    }

    fn takes_space_back(&self) -> bool {
        true
    }
}

impl Disk for Medium {
    async fn write(&self, offset: u64, data: Buffer) -> io::Result<()> {
        self.check_place("writes", offset, data.len());
        self.run(Effect::Write { offset, bytes: Rc::new(data.to_vec()), durable: false });
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        self.ops.borrow_mut().push(Effect::Sync);
        Ok(())
    }

    async fn sync_host(&self) -> io::Result<()> {
        self.sync().await
    }

    async fn grow(&self, length: u64) -> io::Result<()> {
        self.run(Effect::Resize(length));
        Ok(())
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        violated(format!("recovery shortens the file to {length} bytes"))
    }

    async fn reserve(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    async fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_place("zeroes", offset, usize::try_from(length).expect("64-bit hosts only"));
        self.run(Effect::Zero { offset, length, gives_back: false });
        Ok(())
    }

    async fn punch(&self, offset: u64, length: u64) -> io::Result<bool> {
        self.zero(offset, length).await.map(|()| true)
    }
}
