//! The production [`Disk`]: one image file, through the ring of one thread.
//!
//! Invariants:
//!
//! * an operation ends whole or fails: a short transfer continues, from a page border, where the last one
//!   stopped;
//! * a sync is never repeated: the kernel reports a lost write once per description, so a second sync that
//!   succeeds says nothing about the data of the first. It goes through a description by which no other
//!   operation could be given the error;
//! * `write` and `zero` never change the file's length;
//! * a dense file gets no hole: it grows by `fallocate`, or by zeros that are written one behind the other.

use std::cell::{Cell, OnceCell};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::ring::{Memory, Op, Ring, STALLS_MAX, is_not_begun};
use super::sparse::Host;
use super::transfer::{Transfer, assert_paged, invalid, span};
use super::{Buffer, Disk, ImageFile, PAGE_BYTES, ReadDisk};
use crate::disk::tally::Histogram;
use crate::machine;

/// Length of the zero pages that stand in for `fallocate` where the host has none.
const ZERO_PAGES_BYTES: usize = 1 << 20;
/// How many writes of them are under way at once: enough to keep a device busy, few enough to leave it to
/// others.
const ZERO_WRITES_MAX: usize = 8;

/// How much of a hole is filled in one step.
const HOLE_STEP_BYTES: u64 = 64 << 20;

/// What a disk has asked of its host, in operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads submitted.
    pub reads: u64,
    /// Writes submitted, of zero pages included.
    pub writes: u64,
    /// Syncs submitted.
    pub syncs: u64,
    /// `fallocate` calls submitted.
    pub fallocates: u64,
    /// Changes of the file's length.
    pub resizes: u64,
}

/// An image file on a ring.
#[derive(Debug)]
pub struct UringDisk {
    ring: Rc<Ring>,
    file: Arc<ImageFile>,
    /// The file's length as last seen, in bytes: a lower bound, since only [`Disk::truncate`] shortens.
    length: Cell<u64>,
    can_allocate: Cell<bool>,
    can_reserve: Cell<bool>,
    can_zero: Cell<bool>,
    can_punch: Cell<bool>,
    zero_pages: OnceCell<Rc<Buffer>>,
    counters: Cell<Counters>,
    sync_times: Arc<Histogram>,
}

impl UringDisk {
    /// The disk of `file`, whose operations go through `ring`; `sync_times` gets how long its syncs take.
    pub fn new(ring: Rc<Ring>, file: Arc<ImageFile>, sync_times: Arc<Histogram>) -> Self {
        Self {
            ring,
            file,
            length: Cell::new(0),
            can_allocate: Cell::new(true),
            can_reserve: Cell::new(true),
            can_zero: Cell::new(true),
            can_punch: Cell::new(true),
            zero_pages: OnceCell::new(),
            counters: Cell::new(Counters::default()),
            sync_times,
        }
    }

    /// The file beneath.
    pub fn file(&self) -> &Arc<ImageFile> {
        &self.file
    }

    /// What was submitted since the disk was made.
    pub fn counters(&self) -> Counters {
        self.counters.get()
    }

    fn count(&self, change: impl FnOnce(&mut Counters)) {
        let mut counters = self.counters.get();
        change(&mut counters);
        self.counters.set(counters);
    }

    /// The file's present length, in bytes.
    fn fresh_length(&self) -> io::Result<u64> {
        self.length.set(self.file.length()?);
        Ok(self.length.get())
    }

    /// Refuses what would end behind the end of the file, and so extend it.
    fn check_inside(&self, end: u64) -> io::Result<()> {
        if end <= self.length.get() || end <= self.fresh_length()? {
            return Ok(());
        }
        let length = self.length.get();
        Err(invalid(format!("a write up to byte {end} of a file of {length} bytes")))
    }

    fn start_write(&self, transfer: Transfer, memory: Memory) -> PendingWrite {
        machine::step("writes the image");
        self.count(|counters| counters.writes += 1);
        let op = self.ring.write(self.file.clone(), transfer.position(), memory, transfer.next());
        PendingWrite { transfer, op }
    }

    async fn finish_write(&self, mut pending: PendingWrite) -> io::Result<()> {
        loop {
            let (result, memory) = pending.op.await;
            pending.transfer.wrote(result)?;
            if pending.transfer.is_complete() {
                return Ok(());
            }
            pending = self.start_write(pending.transfer, memory);
        }
    }

    /// Writes zero pages to `range`. All that was started has ended when it returns, also when it fails.
    async fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        self.check_inside(range.end)?;
        let pages = self.zero_pages.get_or_init(|| Rc::new(Buffer::zeroed(ZERO_PAGES_BYTES)));
        let mut under_way = VecDeque::with_capacity(ZERO_WRITES_MAX);
        let mut outcome = Ok(());
        for offset in range.clone().step_by(ZERO_PAGES_BYTES) {
            if under_way.len() == ZERO_WRITES_MAX
                && let Some(oldest) = under_way.pop_front()
            {
                outcome = self.finish_write(oldest).await;
            }
            if outcome.is_err() {
                break;
            }
            let length = usize::try_from(range.end - offset).unwrap_or(usize::MAX).min(ZERO_PAGES_BYTES);
            let transfer = Transfer::new(offset, length)?;
            under_way.push_back(self.start_write(transfer, Memory::Shared(Rc::clone(pages))));
        }
        for pending in under_way {
            let ended = self.finish_write(pending).await;
            outcome = outcome.and(ended);
        }
        outcome
    }

    /// Extends the file by `range`, which begins at its end, so that no part of it is a hole. It is not
    /// synced: a failure of that is the caller's to see.
    async fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        assert!(range.start < range.end, "{range:?} extends the file");
        let by_host = self.file.host() != Host::MarksHolesOfFallocate;
        let extending = async {
            if by_host && self.fallocate(&self.can_allocate, 0, range.clone()).await? {
                return Ok(());
            }
            self.append_zeroes(range.clone()).await
        };
        let extended = extending.await;
        if extended.is_err() {
            // What was allocated of it is of no use.
            self.file.set_length(range.start)?;
        }
        extended
    }

    /// Writes zeros from the end of the file to `range.end`, one write behind the other: each begins where
    /// the file ends.
    async fn append_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        // Less than a page, and so no hole.
        self.file.set_length(range.start.next_multiple_of(PAGE_BYTES as u64).min(range.end))?;
        let mut end = self.fresh_length()?;
        while end < range.end {
            let length = usize::try_from(range.end - end).unwrap_or(usize::MAX).min(ZERO_PAGES_BYTES);
            let pages = self.zero_pages.get_or_init(|| Rc::new(Buffer::zeroed(ZERO_PAGES_BYTES)));
            let transfer = Transfer::new(end, length.next_multiple_of(PAGE_BYTES))?;
            self.finish_write(self.start_write(transfer, Memory::Shared(Rc::clone(pages)))).await?;
            end += length as u64;
        }
        // The last page may have been longer than what was wanted.
        self.file.set_length(range.end)
    }

    /// Writes zeros into the holes of the file from `from` on, as far as one step goes, and says where the
    /// next step begins; nothing if no hole was left. The file reads as before. Space that the host has
    /// reserved and not written counts as a hole, because programs that copy the file take it for one.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub async fn fill_hole(&self, from: u64) -> io::Result<Option<u64>> {
        const PAGE: u64 = PAGE_BYTES as u64;
        let length = self.fresh_length()?;
        let hole = self.file.next_hole(from.min(length))?.min(length).next_multiple_of(PAGE);
        if hole >= length {
            return Ok(None);
        }
        let data = self.file.next_data(hole)?.unwrap_or(length).min(length);
        // Pages that are only in part a hole have their place already.
        let end = (data - data % PAGE).min(hole + HOLE_STEP_BYTES);
        if hole < end {
            self.write_zeroes(hole..end).await?;
        }
        Ok(Some(end.max(hole + PAGE)))
    }

    /// `fallocate` of `range`; `false` when the host has no such thing, which `able` remembers.
    async fn fallocate(&self, able: &Cell<bool>, mode: i32, range: Range<u64>) -> io::Result<bool> {
        if !able.get() {
            return Ok(false);
        }
        let mut stalls = 0;
        loop {
            self.count(|counters| counters.fallocates += 1);
            let length = range.end - range.start;
            let (result, _) = self.ring.fallocate(self.file.clone(), mode, range.start, length).await;
            match result {
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    if able.replace(false) {
                        let path = self.file.path().display();
                        tracing::info!("{path}: the host cannot fallocate in mode {mode:#x}: doing without");
                    }
                    return Ok(false);
                }
                Err(error) if !is_not_begun(&error) || stalls == STALLS_MAX => return Err(error),
                Err(_) => stalls += 1,
            }
        }
    }

    async fn sync_data(&self) -> io::Result<()> {
        if self.file.keeps_errors_by_handle() {
            // A server that acknowledges early and fails later reports only to the handle that the write came
            // by.
            self.count(|counters| counters.syncs += 1);
            self.ring.sync_data(self.file.clone()).await.0?;
        }
        machine::step("syncs the image");
        self.count(|counters| counters.syncs += 1);
        self.ring.sync_data(Arc::new(Syncing(self.file.clone()))).await.0.map(drop)
    }
}

impl ReadDisk for UringDisk {
    async fn read(&self, offset: u64, length: usize) -> io::Result<Buffer> {
        let mut transfer = Transfer::new(offset, length)?;
        let mut pages = Buffer::zeroed(length);
        while !transfer.is_complete() {
            self.count(|counters| counters.reads += 1);
            let op = self.ring.read(self.file.clone(), transfer.position(), pages, transfer.next());
            let (result, memory) = op.await;
            let Memory::Pages(returned) = memory else { unreachable!("an operation returns its memory") };
            pages = returned;
            if let Some(valid) = transfer.read(result, || self.fresh_length())? {
                // What direct I/O leaves behind the end of the file is not said to be zero.
                pages[valid..].fill(0);
            }
        }
        Ok(pages)
    }

    async fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.next_data(offset)
    }

    async fn length(&self) -> io::Result<u64> {
        self.fresh_length()
    }

    fn takes_space_back(&self) -> bool {
        self.can_punch.get() && !self.file.is_dense() && self.file.takes_space_back()
    }
}

impl Disk for UringDisk {
    async fn write(&self, offset: u64, data: Buffer) -> io::Result<()> {
        let transfer = Transfer::new(offset, data.len())?;
        if transfer.is_complete() {
            return Ok(());
        }
        self.check_inside(transfer.end())?;
        self.finish_write(self.start_write(transfer, Memory::Pages(data))).await
    }

    async fn sync(&self) -> io::Result<()> {
        let begun = Instant::now();
        let outcome = self.sync_data().await;
        self.sync_times.record(begun.elapsed());
        outcome
    }

    /// A plain system call, for a thread that serves nothing yet.
    async fn sync_host(&self) -> io::Result<()> {
        Ok(nix::unistd::syncfs(&self.file)?)
    }

    /// A plain system call, so that looking and changing are one step on this thread; the host may keep it
    /// waiting for the direct I/O under way on the file. The same goes for [`Disk::truncate`].
    async fn grow(&self, length: u64) -> io::Result<()> {
        let present = self.fresh_length()?;
        if length > present {
            self.count(|counters| counters.resizes += 1);
            if self.file.is_dense() {
                self.allocate(present..length).await?;
            } else {
                self.file.set_length(length)?;
            }
            self.length.set(length);
        }
        Ok(())
    }

    fn may_have_holes(&self) -> bool {
        !self.file.is_dense()
    }

    fn reports_losses_to_all(&self) -> bool {
        !self.file.keeps_errors_by_handle()
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        let present = self.fresh_length()?;
        if length > present {
            return Err(invalid(format!("shortening a file of {present} bytes to {length}")));
        }
        if length < present {
            self.count(|counters| counters.resizes += 1);
            self.file.set_length(length)?;
            self.length.set(length);
        }
        Ok(())
    }

    async fn reserve(&self, offset: u64, length: u64) -> io::Result<()> {
        let range = span(offset, length)?;
        if !range.is_empty() {
            self.fallocate(&self.can_reserve, libc::FALLOC_FL_KEEP_SIZE, range).await?;
        }
        Ok(())
    }

    async fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        const MODE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        let range = span(offset, length)?;
        assert_paged(offset, length);
        // A server may make a hole of it.
        let helps = !self.file.is_dense();
        if range.is_empty() || helps && self.fallocate(&self.can_zero, MODE, range.clone()).await? {
            return Ok(());
        }
        // What lies behind the end of the file reads as zero already.
        let end = self.fresh_length()?.next_multiple_of(PAGE_BYTES as u64).min(range.end);
        self.write_zeroes(range.start..end).await
    }

    async fn punch(&self, offset: u64, length: u64) -> io::Result<bool> {
        const MODE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let range = span(offset, length)?;
        if self.file.is_dense() {
            return Ok(false);
        }
        if range.is_empty() {
            return Ok(true);
        }
        self.fallocate(&self.can_punch, MODE, range).await
    }
}

/// The side of an image file that is synced; it keeps the file open, and locked.
struct Syncing(Arc<ImageFile>);

impl AsFd for Syncing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.syncing_fd()
    }
}

/// A write under way.
struct PendingWrite {
    transfer: Transfer,
    op: Op,
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::future::poll_fn;
    use std::path::PathBuf;
    use std::pin::pin;
    use std::task::Poll;
    use std::time::Duration;

    use super::super::{Access, PayloadIo, Reactor, Sparse, host_bytes};
    use super::*;

    const PAGE: u64 = PAGE_BYTES as u64;

    struct Bench {
        reactor: Reactor,
        path: PathBuf,
        _directory: tempfile::TempDir,
    }

    impl Bench {
        fn new(contents: &[u8]) -> Self {
            let directory = tempfile::tempdir().expect("a temporary directory");
            let path = directory.path().join("image");
            fs::write(&path, contents).expect("writable");
            Self { reactor: Reactor::new().expect("io_uring is there"), path, _directory: directory }
        }

        /// The image, buffered.
        fn disk(&self) -> UringDisk {
            let file = ImageFile::open(&self.path, Access::ReadWrite, Duration::ZERO).expect("regular");
            self.reactor.disk(Arc::new(file))
        }

        /// The image buffered and, one after the other, direct where the host has that.
        fn both(&self, mut check: impl AsyncFnMut(&UringDisk)) {
            for direct in [false, true] {
                let disk = self.disk();
                if direct && disk.file().enable_direct(512).expect("can be looked at") != PayloadIo::Direct {
                    eprintln!("no direct I/O here: tested buffered only");
                    continue;
                }
                self.reactor.block_on(check(&disk));
            }
        }

        fn contents(&self) -> Vec<u8> {
            fs::read(&self.path).expect("readable")
        }
    }

    fn pages(byte: u8, count: usize) -> Buffer {
        Buffer::copy_of(&vec![byte; count * PAGE_BYTES])
    }

    /// What lies past the end reads as zero: a part of a page, whole pages, and everything far behind.
    #[test]
    fn reads_past_the_end_are_zero() {
        for length in [10_000, 8192, 8704, 1, 0] {
            let bench = Bench::new(&vec![7; length]);
            bench.both(async |disk| {
                let read = disk.read(0, 8 * PAGE_BYTES).await.expect("readable");
                assert!(read[..length].iter().all(|&byte| byte == 7));
                assert!(read[length..].iter().all(|&byte| byte == 0));
                let tail = disk.read(2 * PAGE, PAGE_BYTES).await.expect("readable");
                let valid = length.saturating_sub(8192);
                assert!(tail[..valid].iter().all(|&byte| byte == 7));
                assert!(tail[valid..].iter().all(|&byte| byte == 0));
                let far = disk.read(1 << 40, PAGE_BYTES).await.expect("readable");
                assert!(far.iter().all(|&byte| byte == 0));
            });
        }
    }

    #[test]
    fn what_was_written_is_read_back_and_counted() {
        let bench = Bench::new(&vec![0; 16 * PAGE_BYTES]);
        bench.both(async |disk| {
            disk.write(PAGE, pages(1, 2)).await.expect("inside");
            disk.sync().await.expect("the host syncs");
            let read = disk.read(0, 4 * PAGE_BYTES).await.expect("readable");
            let (written, around) = (PAGE_BYTES..3 * PAGE_BYTES, [0, 3 * PAGE_BYTES]);
            assert!(read[written].iter().all(|&byte| byte == 1));
            assert!(around.into_iter().all(|at| read[at] == 0));
            let expected = Counters { reads: 1, writes: 1, syncs: 1, ..Counters::default() };
            assert_eq!(disk.counters(), expected);
        });
        assert_eq!(bench.contents()[PAGE_BYTES], 1);
    }

    /// A write never extends the file: extending is `grow`, which can be lost on its own.
    #[test]
    fn writes_stay_inside_the_file() {
        let bench = Bench::new(&[0; 3 * PAGE_BYTES + 100]);
        bench.both(async |disk| {
            for (offset, count) in [(3, 1), (4, 1), (1, 3), (1 << 30, 1)] {
                let error = disk.write(offset * PAGE, pages(1, count)).await.expect_err("outside");
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            }
            let last = (i64::MAX as u64) & !(PAGE - 1);
            let error = disk.write(last, pages(1, 1)).await.expect_err("no file can hold it");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            disk.write(0, Buffer::zeroed(0)).await.expect("nothing to do");
            assert_eq!(disk.counters().writes, 0);
        });
        assert_eq!(bench.contents().len(), 3 * PAGE_BYTES + 100);
    }

    #[test]
    fn growing_never_shortens_and_truncating_never_grows() {
        let bench = Bench::new(&[7; PAGE_BYTES]);
        let disk = bench.disk();
        bench.reactor.block_on(async {
            disk.grow(4 * PAGE).await.expect("room");
            disk.grow(2 * PAGE).await.expect("nothing to do");
            assert_eq!(disk.length().await.expect("open"), 4 * PAGE);
            disk.write(3 * PAGE, pages(9, 1)).await.expect("inside now");
            disk.truncate(2 * PAGE).await.expect("shorter");
            disk.write(2 * PAGE, pages(9, 1)).await.expect_err("outside again");
            disk.truncate(2 * PAGE).await.expect("nothing to do");
            disk.truncate(3 * PAGE).await.expect_err("longer");
            disk.grow(4 * PAGE).await.expect("room");
            let read = disk.read(0, 4 * PAGE_BYTES).await.expect("readable");
            assert!(read[..PAGE_BYTES].iter().all(|&byte| byte == 7));
            assert!(read[PAGE_BYTES..].iter().all(|&byte| byte == 0), "new bytes read as zero");
            assert_eq!(disk.counters().resizes, 3);
        });
    }

    /// However it grows, is zeroed and asked to punch, a dense file has no hole: by `fallocate`, by writing,
    /// and from a length inside a page.
    #[test]
    fn a_dense_file_gets_no_hole() {
        const MIB: u64 = 1 << 20;
        for (helped, length) in [(true, PAGE_BYTES), (false, PAGE_BYTES), (false, PAGE_BYTES + 100)] {
            let bench = Bench::new(&vec![7; length]);
            let disk = bench.disk();
            assert!(disk.may_have_holes(), "a host of the tests is a plain one");
            disk.file().set_sparse(Sparse::No);
            disk.can_allocate.set(helped);
            bench.reactor.block_on(async {
                disk.grow(3 * MIB).await.expect("room");
                disk.grow(5 * MIB + 4 * PAGE).await.expect("room");
                disk.zero(MIB, MIB).await.expect("zeroed");
                assert!(!disk.punch(MIB, MIB).await.expect("nothing is done"));
                assert!(!disk.may_have_holes() && !disk.takes_space_back());
            });
            let found = fs::metadata(&bench.path).expect("there");
            assert_eq!(found.len(), 5 * MIB + 4 * PAGE);
            assert!(host_bytes(&found) >= found.len(), "{} of {}", host_bytes(&found), found.len());
            assert!(bench.contents()[length..].iter().all(|&byte| byte == 0));
            assert!(bench.contents()[..length].iter().all(|&byte| byte == 7));
        }
    }

    /// Holes are filled, what is there stays, and the length.
    #[test]
    fn a_file_with_holes_becomes_dense() {
        const LENGTH: usize = 9 << 20;
        let bench = Bench::new(&[]);
        let disk = bench.disk();
        bench.reactor.block_on(async {
            disk.grow(LENGTH as u64).await.expect("room");
            for page in [0, 5, 700, 701, 2303] {
                disk.write(page * PAGE, pages(7, 1)).await.expect("inside");
            }
            disk.reserve(1000 * PAGE, 50 * PAGE).await.expect("room");
            let before = bench.contents();
            let mut at = Some(0);
            while let Some(from) = at {
                at = disk.fill_hole(from).await.expect("room");
                assert!(at.is_none_or(|next| next > from), "each step leads on");
            }
            disk.sync().await.expect("the host syncs");
            assert!(bench.contents() == before);
            assert_eq!(disk.file().next_hole(0).expect("open"), LENGTH as u64);
        });
        let found = fs::metadata(&bench.path).expect("there");
        assert!(host_bytes(&found) >= LENGTH as u64);
    }

    /// What did not fit is cut off again.
    #[test]
    fn a_dense_file_that_cannot_grow_keeps_its_length() {
        let bench = Bench::new(&[7; PAGE_BYTES]);
        let disk = bench.disk();
        disk.file().set_sparse(Sparse::No);
        disk.can_allocate.set(true);
        let error = bench.reactor.block_on(disk.grow(1 << 60)).expect_err("no host has that");
        assert!(error.raw_os_error().is_some(), "{error}");
        assert_eq!(bench.contents().len(), PAGE_BYTES);
    }

    /// Zeroing works with and without the host's help, and leaves the neighbours and the length alone.
    #[test]
    fn zeroed_ranges_read_as_zero() {
        const LENGTH: usize = 12 << 20;
        for helped in [true, false] {
            let bench = Bench::new(&vec![7; LENGTH]);
            bench.both(async |disk| {
                disk.can_zero.set(helped);
                disk.write(0, pages(7, LENGTH / PAGE_BYTES)).await.expect("inside");
                disk.zero(PAGE, (LENGTH - 2 * PAGE_BYTES) as u64).await.expect("zeroed");
                assert_eq!(disk.ring.in_flight(), 0, "nothing is left behind");
                let read = disk.read(0, LENGTH).await.expect("readable");
                let zeroes = PAGE_BYTES..LENGTH - PAGE_BYTES;
                assert!(read[zeroes.clone()].iter().all(|&byte| byte == 0));
                assert!(read[..zeroes.start].iter().chain(&read[zeroes.end..]).all(|&byte| byte == 7));
                disk.zero(LENGTH as u64 - PAGE, 1 << 20).await.expect("the rest lies behind the end");
                disk.zero(1 << 40, PAGE).await.expect("all of it lies behind the end");
                assert_eq!(disk.length().await.expect("open"), LENGTH as u64);
                if !helped {
                    assert_eq!(disk.counters().writes, 1 + 12 + 1, "one per MiB");
                }
            });
        }
    }

    /// Punching says whether the host could; either way nothing else has changed.
    #[test]
    fn punching_gives_space_back_or_says_no() {
        const LENGTH: usize = 1 << 20;
        let bench = Bench::new(&vec![7; LENGTH]);
        let disk = bench.disk();
        bench.reactor.block_on(async {
            disk.sync().await.expect("the host syncs");
            let before = disk.file().host_bytes().expect("open");
            let punched = disk.punch(PAGE, 128 * PAGE).await.expect("a yes or a no");
            let read = disk.read(0, LENGTH).await.expect("readable");
            let inside = if punched { 0 } else { 7 };
            assert!(read[PAGE_BYTES..129 * PAGE_BYTES].iter().all(|&byte| byte == inside));
            assert!(read[129 * PAGE_BYTES..].iter().all(|&byte| byte == 7));
            assert_eq!(disk.length().await.expect("open"), LENGTH as u64);
            let after = disk.file().host_bytes().expect("open");
            assert!(if punched { after < before } else { after == before }, "{punched}: {before} to {after}");
            disk.can_punch.set(false);
            let asked = disk.counters().fallocates;
            assert!(!disk.punch(0, PAGE).await.expect("a no"));
            assert_eq!(disk.counters().fallocates, asked, "the host is not asked again");
        });
    }

    #[test]
    fn reserving_keeps_length_and_contents() {
        let bench = Bench::new(&[7; PAGE_BYTES]);
        let disk = bench.disk();
        bench.reactor.block_on(async {
            disk.grow(1 << 20).await.expect("room");
            disk.reserve(0, 1 << 20).await.expect("reserved, or nothing done");
            disk.reserve(0, 0).await.expect("nothing to do");
            if disk.can_reserve.get() {
                assert!(disk.file().host_bytes().expect("open") >= 1 << 20);
            }
            let read = disk.read(0, 1 << 20).await.expect("readable");
            assert!(read[..PAGE_BYTES].iter().all(|&byte| byte == 7) && read[PAGE_BYTES] == 0);
            assert_eq!(disk.length().await.expect("open"), 1 << 20);
        });
    }

    fn byte_of(index: usize) -> u8 {
        u8::try_from(index % 251).expect("less than 251")
    }

    /// More operations at once than the submission queue has entries, from tasks and from one future.
    #[test]
    fn many_operations_run_at_once() {
        const TASKS: usize = 1000;
        let bench = Bench::new(&vec![0; TASKS * PAGE_BYTES]);
        let disk = Rc::new(bench.disk());
        let tasks: Vec<_> = (0..TASKS)
            .map(|index| {
                let disk = Rc::clone(&disk);
                bench.reactor.spawn(async move {
                    let byte = byte_of(index);
                    let offset = index as u64 * PAGE;
                    disk.write(offset, pages(byte, 1)).await.expect("inside");
                    assert_eq!(disk.read(offset, PAGE_BYTES).await.expect("readable")[5], byte);
                })
            })
            .collect();
        bench.reactor.block_on(async {
            for task in tasks {
                task.await;
            }
        });
        assert_eq!((disk.counters().reads, disk.counters().writes), (TASKS as u64, TASKS as u64));
        let contents = bench.contents();
        assert!((0..TASKS).all(|index| contents[index * PAGE_BYTES] == byte_of(index)));
    }

    /// A dropped future leaves its memory to the kernel until the operation has ended.
    #[test]
    fn a_dropped_future_frees_nothing_early() {
        let bench = Bench::new(&vec![7; 64 * PAGE_BYTES]);
        bench.both(async |disk| {
            for _ in 0..100 {
                let mut read = pin!(disk.read(0, 64 * PAGE_BYTES));
                poll_fn(|context| {
                    assert!(read.as_mut().poll(context).is_pending());
                    Poll::Ready(())
                })
                .await;
            }
            assert_eq!(disk.ring.in_flight(), 100);
            let read = disk.read(0, PAGE_BYTES).await.expect("readable");
            assert!(read.iter().all(|&byte| byte == 7));
            while disk.ring.in_flight() > 0 {
                disk.read(0, PAGE_BYTES).await.expect("readable");
            }
        });
    }

    /// A file stays open, and locked, until the operations on it have ended, wanted or not.
    #[test]
    fn the_lock_outlasts_an_abandoned_operation() {
        let bench = Bench::new(&[7; PAGE_BYTES]);
        let disk = bench.disk();
        let again = || ImageFile::open(&bench.path, Access::ReadWrite, Duration::ZERO);
        drop(disk.ring.sync_data(disk.file.clone()));
        drop(disk);
        again().expect_err("an operation is still under way");
        bench.reactor.ring().turn(true);
        again().expect("it has ended");
    }

    #[test]
    fn a_read_only_file_is_not_written() {
        let bench = Bench::new(&[7; PAGE_BYTES]);
        let file = ImageFile::open(&bench.path, Access::ReadOnly, Duration::ZERO).expect("regular");
        let disk = bench.reactor.disk(Arc::new(file));
        bench.reactor.block_on(async {
            disk.write(0, pages(1, 1)).await.expect_err("read-only");
            disk.grow(2 * PAGE).await.expect_err("read-only");
            disk.truncate(0).await.expect_err("read-only");
            assert!(disk.zero(0, PAGE).await.is_err());
        });
        assert!(bench.contents().iter().all(|&byte| byte == 7));
    }
}
