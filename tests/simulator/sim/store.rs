//! File content as sparse pages that clones share: a crash state costs what it differs by.

use std::collections::BTreeMap;
use std::rc::Rc;

use vhdx_ublk::error::Error;

use super::tasks::block_on;

const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;

/// The bytes of a simulated file.
#[derive(Clone, Default)]
pub struct Store {
    pages: BTreeMap<u64, Rc<[u8; PAGE_BYTES]>>,
    pub length: u64,
}

impl Store {
    /// Reads; what was never written, and what lies past the end, is zero.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        for (page, within, range) in pieces(offset, bytes.len()) {
            match self.pages.get(&page) {
                Some(data) => bytes[range.clone()].copy_from_slice(&data[within..within + range.len()]),
                None => bytes[range].fill(0),
            }
        }
        let past = usize::try_from(self.length.saturating_sub(offset)).unwrap_or(usize::MAX);
        if past < bytes.len() {
            bytes[past..].fill(0);
        }
    }

    /// Fills in what is stored of a range whose bytes are zero so far.
    pub fn read_onto_zeros(&self, offset: u64, bytes: &mut [u8]) {
        let end = (offset + bytes.len() as u64).min(self.length.max(offset));
        for (page, data) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((page * PAGE).max(offset), ((page + 1) * PAGE).min(end));
            let place = |at: u64, base: u64| usize::try_from(at - base).expect("small");
            let source = &data[place(from, page * PAGE)..place(to, page * PAGE)];
            bytes[place(from, offset)..place(to, offset)].copy_from_slice(source);
        }
    }

    /// What lies in `ranges` of bytes, whole numbers of pages; the length stays.
    pub fn only(&self, ranges: &[std::ops::Range<u64>]) -> Self {
        let pages = ranges.iter().flat_map(|range| self.pages.range(range.start / PAGE..range.end / PAGE));
        Self { pages: pages.map(|(page, data)| (*page, data.clone())).collect(), length: self.length }
    }

    /// Every page that is not all zero by chance of never having been written: its offset and bytes.
    pub fn stored(&self) -> impl Iterator<Item = (u64, &[u8; PAGE_BYTES])> {
        self.pages.iter().map(|(page, data)| (page * PAGE, &**data))
    }

    /// Where the next stored byte may lie, at `offset` or behind it.
    pub fn next_stored(&self, offset: u64) -> Option<u64> {
        let found = self.pages.range(offset / PAGE..).next().map(|(page, _)| (page * PAGE).max(offset));
        found.filter(|found| *found < self.length)
    }

    /// Writes; what lies past the end is dropped, as a file system drops it.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let room = usize::try_from(self.length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let bytes = &bytes[..bytes.len().min(room)];
        for (page, within, range) in pieces(offset, bytes.len()) {
            if bytes[range.clone()].iter().all(|&byte| byte == 0) && !self.pages.contains_key(&page) {
                continue;
            }
            let data = self.pages.entry(page).or_insert_with(|| Rc::new([0; PAGE_BYTES]));
            Rc::make_mut(data)[within..within + range.len()].copy_from_slice(&bytes[range]);
        }
    }

    /// Zeroes a range, whole pages cheaply.
    pub fn zero(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        let (first, last) = (offset.div_ceil(PAGE), end / PAGE);
        if first >= last {
            return self.write(offset, &vec![0; usize::try_from(length).expect("below two pages")]);
        }
        self.write(offset, &vec![0; usize::try_from(first * PAGE - offset).expect("below a page")]);
        let whole: Vec<u64> = self.pages.range(first..last).map(|(page, _)| *page).collect();
        for page in whole {
            self.pages.remove(&page);
        }
        self.write(last * PAGE, &vec![0; usize::try_from(end - last * PAGE).expect("below a page")]);
    }

    /// Changes the length; bytes that come back after a shortening are zero.
    pub fn resize(&mut self, length: u64) {
        if length < self.length {
            self.zero(length, self.length - length);
            let beyond: Vec<u64> = self.pages.range(length.div_ceil(PAGE)..).map(|(page, _)| *page).collect();
            for page in beyond {
                self.pages.remove(&page);
            }
        }
        self.length = length;
    }

    /// Where the next page lies that was ever written, at `offset` or behind it, bytes.
    pub fn next_page(&self, offset: u64) -> Option<u64> {
        self.pages.range(offset / PAGE..).next().map(|(page, _)| (page * PAGE).max(offset))
    }

    /// What the file at `path` holds, its holes passed over.
    pub fn load(path: &std::path::Path) -> vhdx_ublk::error::Result<Self> {
        use vhdx_ublk::disk::{Links, PlainDisk, ReadDisk};
        const STEP: usize = 64 << 10;
        let io = |error| Error::io("loading a file", error);
        let (file, _) = PlainDisk::open(path, Links::Follow)?;
        block_on(async {
            let mut store = Self { length: file.length().await.map_err(io)?, ..Self::default() };
            let mut next = 0;
            while let Some(data) = file.next_data(next).await.map_err(io)?.filter(|&data| data < store.length)
            {
                let bytes = file.read(data, STEP).await.map_err(io)?;
                let length = usize::try_from(store.length - data).unwrap_or(STEP).min(STEP);
                store.write(data, &bytes[..length]);
                next = data + STEP as u64;
            }
            Ok(store)
        })
    }

    /// The whole file, for other programs to read.
    pub fn save(&self, path: &std::path::Path) -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create(path)?;
        file.set_len(self.length)?;
        for (page, data) in &self.pages {
            let offset = page * PAGE;
            let length = usize::try_from((self.length - offset).min(PAGE)).expect("a page");
            file.write_all_at(&data[..length], offset)?;
        }
        Ok(())
    }
}

/// Splits a range at page borders: (page, offset in it, range of the caller's bytes).
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let at = offset + done as u64;
        let within = usize::try_from(at % PAGE).expect("below a page");
        let count = (length - done).min(PAGE_BYTES - within);
        let range = done..done + count;
        done += count;
        Some((at / PAGE, within, range))
    })
}
