//! Promise defended here: whatever is damaged in an image, all that could come back comes back, and nothing
//! that is wrong is listed as right. Known images are damaged in one structure after the other, overwritten,
//! unreadable or cut off, and what comes back is compared with what could, by the places of the damage alone.

mod served;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use vhdx_ublk::chain::{Content, ReadLayer};
use vhdx_ublk::disk::{Buffer, ReadDisk};
use vhdx_ublk::error::Result;
use vhdx_ublk::image::{Image, Location, Salvaged};
use vhdx_ublk::operations::Watch;
use vhdx_ublk::operations::salvage::{Mapfile, Remains, RemainsLayer, Status, Target, Totals, copy};

use crate::craft::{BAT, Craft, END, HEADERS, LOG, METADATA, MIB, REGION_TABLES, page};
use crate::fuzz::corpus;
use crate::sim::disk::SimDisk;
use crate::sim::store::Store;
use crate::sim::tasks::block_on;
use crate::sim::world::Config;

/// A file with sectors that the host cannot read.
pub struct Scratched {
    pub store: Store,
    pub unreadable: Vec<Range<u64>>,
}

impl ReadDisk for Scratched {
    async fn read(&self, offset: u64, length: usize) -> io::Result<Buffer> {
        assert!(offset.is_multiple_of(4096) && length.is_multiple_of(4096), "{length} bytes at {offset}");
        let end = offset + length as u64;
        // No host has a sector behind the end of a file.
        let last = self.store.length;
        if self.unreadable.iter().any(|range| range.start < end && offset < range.end.min(last)) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut bytes = Buffer::zeroed(length);
        self.store.read(offset, &mut bytes);
        Ok(bytes)
    }

    async fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(self.store.next_page(offset))
    }

    async fn length(&self) -> io::Result<u64> {
        Ok(self.store.length)
    }

    fn takes_space_back(&self) -> bool {
        false
    }
}

/// Shows nothing and never stops.
pub struct Unwatched;

impl Watch for Unwatched {
    fn progress(&self, done: u64, total: u64) {
        assert!(done <= total, "{done} of {total}");
    }

    fn stop_requested(&self) -> bool {
        false
    }
}

/// A copy in memory.
pub struct Copied(pub Store);

impl Target for Copied {
    async fn write(&mut self, offset: u64, data: Buffer) -> Result<()> {
        assert!(offset.is_multiple_of(4096) && !data.is_empty(), "pages are written, at {offset}");
        self.0.resize(self.0.length.max(offset + data.len() as u64));
        self.0.write(offset, &data);
        Ok(())
    }
}

/// What came back.
pub struct Outcome {
    pub totals: Totals,
    pub runs: Vec<(Range<u64>, Status)>,
    pub copy: Store,
}

/// Salvages what is left of a chain, and sees that a device gives out the same.
pub fn salvage<D: ReadDisk>(layers: Vec<D>) -> Result<Outcome> {
    let (outcome, remains) = copied(layers)?;
    served::assert_same(remains.into_layers(), &outcome);
    Ok(outcome)
}

/// Salvages what is left of a chain.
fn copied<D: ReadDisk>(layers: Vec<D>) -> Result<(Outcome, Remains<D>)> {
    let mut remains = Vec::new();
    for disk in layers {
        let image = block_on(Salvaged::read(&disk))?;
        remains.push(RemainsLayer { disk, image });
    }
    let remains = Remains::new(remains);
    let (mut copied, mut runs) = (Copied(Store::default()), Vec::new());
    // The list itself asserts that there is no gap.
    let mut list = Mapfile::begin(Vec::new()).expect("memory");
    let mut record = |range: Range<u64>, status| {
        list.add(range.clone(), status).expect("memory");
        runs.push((range, status));
        Ok(())
    };
    let totals = block_on(copy(&remains, &mut copied, &mut record, &Unwatched))?;
    assert_eq!(runs.last().map_or(0, |(range, _)| range.end), remains.virtual_size(), "the whole disk");
    let mut planned = Totals::default();
    remains.plan(|range, status| planned.add(range.end - range.start, status));
    assert!(planned.finished_bytes >= totals.finished_bytes, "more came back than could");
    copied.0.resize(remains.virtual_size());
    Ok((Outcome { totals, runs, copy: copied.0 }, remains))
}

/// The disk of a chain that is not damaged, as any reader has it.
pub fn original(layers: &[Store]) -> Store {
    let layer = |file: &Store| {
        let disk = SimDisk::new(file.clone(), true, true, 512);
        let image = block_on(Image::read(&disk)).expect("the original opens");
        block_on(image.read_bitmaps(&disk)).expect("its bitmaps are there");
        ReadLayer { disk, map: image.into_map().into() }
    };
    let content = Content::new(layers.iter().map(layer).collect());
    let (mut disk, mut at) = (Store::default(), 0);
    disk.resize(content.virtual_size());
    while at < content.virtual_size() {
        let (location, past) = content.locate(at, content.virtual_size());
        if matches!(location, Location::File { .. }) {
            let mut bytes = vec![0; usize::try_from(past - at).expect("a block")];
            block_on(content.read(at, &mut bytes)).expect("no fault");
            disk.write(at, &bytes);
        }
        at = past;
    }
    disk
}

/// Asserts that what is listed as right is right.
pub fn assert_true(original: &Store, outcome: &Outcome, what: &str) {
    let pages = original.stored().chain(outcome.copy.stored()).map(|(at, _)| at).collect::<BTreeSet<_>>();
    for (range, _) in outcome.runs.iter().filter(|(_, status)| *status == Status::Finished) {
        for at in pages.range(range.start / 4096 * 4096..range.end) {
            let both = range.start.max(*at)..range.end.min(at + 4096);
            let read = |store: &Store| {
                let mut bytes = vec![0; usize::try_from(both.end - both.start).expect("a page")];
                store.read(both.start, &mut bytes);
                bytes
            };
            assert!(read(original) == read(&outcome.copy), "{what}: {both:?} is listed as right and is not");
        }
    }
}

/// The blocks of 1 MiB that the known image has, and their places in the file.
const BLOCKS: [(u64, u64); 6] = [
    (0, END),
    (511, END + MIB),
    (512, END + 2 * MIB),
    (1000, END + 3 * MIB),
    (2047, END + 4 * MIB),
    (3071, END + 5 * MIB),
];

/// Its virtual size: six pages of the BAT.
const SIZE: u64 = 3072 * MIB;

/// An image with blocks in every page of its BAT but one.
fn known() -> Store {
    let mut config = Config::small();
    config.image.virtual_size = SIZE;
    let mut image = Craft::new(&config);
    image.file.resize(END + 6 * MIB);
    for (block, place) in BLOCKS {
        image.set_slot(block, place | 6);
        for at in (0..MIB).step_by(4096) {
            let fill = ((place + at) / 4096 % 251).to_le_bytes()[0];
            image.write(place + at, &page(fill));
        }
    }
    image.file
}

/// What is done to a file.
#[derive(Clone, Debug)]
enum Damage {
    Overwritten(Range<u64>),
    Unreadable(Range<u64>),
    Cut(u64),
}

impl Damage {
    fn apply(&self, file: &Store) -> Scratched {
        let (mut store, mut unreadable) = (file.clone(), Vec::new());
        match self.clone() {
            Self::Overwritten(range) => {
                let bytes: Vec<u8> = range.clone().map(|at| (at % 253).to_le_bytes()[0] | 0x18).collect();
                store.write(range.start, &bytes);
            }
            Self::Unreadable(range) => unreadable.push(range),
            Self::Cut(length) => store.resize(length),
        }
        Scratched { store, unreadable }
    }

    /// The part of the file that is gone. Whole pages are read.
    fn range(&self) -> Range<u64> {
        match self.clone() {
            Self::Overwritten(range) => range,
            Self::Unreadable(range) => range.start / 4096 * 4096..range.end.next_multiple_of(4096),
            Self::Cut(length) => length..u64::MAX,
        }
    }

    /// The bytes of the known disk that could come back: those of blocks whose entry is whole, as far as the
    /// file has them.
    fn could(&self) -> u64 {
        let gone = self.range();
        let meets = |range: &Range<u64>| gone.start < range.end && range.start < gone.end;
        let block = |block: u64| {
            if meets(&(BAT + 8 * block..BAT + 8 * block + 8)) {
                return 0;
            }
            let Some((_, place)) = BLOCKS.iter().find(|(present, _)| *present == block) else { return MIB };
            let gone = gone.start.clamp(*place, place + MIB)..gone.end.clamp(*place, place + MIB);
            MIB - (gone.end - gone.start)
        };
        (0..SIZE / MIB).map(block).sum()
    }
}

const ITEMS: [(&str, u64, u64); 5] =
    [("File Parameters", 0, 8), ("size", 8, 8), ("ID", 16, 16), ("logical", 32, 4), ("physical", 36, 4)];

/// One structure after the other, by both ways to lose it.
fn damages() -> Vec<(String, Damage)> {
    let mut ranges: Vec<(String, Range<u64>)> = vec![
        ("file identifier".into(), 0..65536),
        ("header 1".into(), HEADERS[0]..HEADERS[0] + 4096),
        ("header 2".into(), HEADERS[1]..HEADERS[1] + 4096),
        ("region table 1".into(), REGION_TABLES[0]..REGION_TABLES[0] + 65536),
        ("region table 2".into(), REGION_TABLES[1]..REGION_TABLES[1] + 65536),
        ("both region tables".into(), REGION_TABLES[0]..REGION_TABLES[1] + 65536),
        ("log".into(), LOG..LOG + MIB),
        ("metadata table".into(), METADATA..METADATA + 65536),
        ("all of the metadata".into(), METADATA..METADATA + MIB),
        ("region tables and metadata table".into(), REGION_TABLES[0]..METADATA + 65536),
    ];
    for (name, at, length) in ITEMS {
        let start = METADATA + 65536 + at;
        ranges.push((format!("item {name}"), start..start + length));
    }
    for page in 0..6 {
        ranges.push((format!("BAT page {page}"), BAT + 4096 * page..BAT + 4096 * (page + 1)));
    }
    ranges.push(("BAT".into(), BAT..BAT + MIB));
    let both = |(name, range): (String, Range<u64>)| {
        let damages = [Damage::Overwritten(range.clone()), Damage::Unreadable(range)];
        damages.map(|damage| (format!("{name}, {}", kind(&damage)), damage))
    };
    let mut damages: Vec<(String, Damage)> = ranges.into_iter().flat_map(both).collect();
    let sectors = END + 2 * MIB + 5 * 4096;
    damages.push(("payload, unreadable".into(), Damage::Unreadable(sectors..sectors + 3 * 4096)));
    damages.push(("first block, unreadable".into(), Damage::Unreadable(END..END + MIB)));
    for length in [END + 6 * MIB - 512, END + 5 * MIB + 12_345, END + 3 * MIB, END + 1, END, BAT + 5000, BAT]
    {
        damages.push((format!("cut at {length}"), Damage::Cut(length)));
    }
    damages
}

fn kind(damage: &Damage) -> &'static str {
    match damage {
        Damage::Overwritten(_) => "overwritten",
        Damage::Unreadable(_) => "unreadable",
        Damage::Cut(_) => "cut",
    }
}

#[test]
fn all_that_could_come_back_comes_back() {
    let file = known();
    let original = original(std::slice::from_ref(&file));
    let (mut missed, mut whole) = (Vec::new(), 0);
    for (name, damage) in damages() {
        let outcome = salvage(vec![damage.apply(&file)]).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        assert_eq!(outcome.copy.length, SIZE, "{name}");
        assert_true(&original, &outcome, &name);
        let (came, could) = (outcome.totals.finished_bytes, damage.could());
        println!("{name:45} {came:>12} of {could:>12}");
        whole += u64::from(came == SIZE);
        if came != could {
            missed.push((name, came, could));
        }
    }
    assert!(missed.is_empty(), "not all came back, or more than could: {missed:?}");
    assert!(whole >= 20, "only {whole} damages cost nothing");
}

/// Without a header the log is not known: blocks that are there come back, and of no other is it said that it
/// was empty.
#[test]
fn without_headers_only_what_is_there_is_certain() {
    let file = known();
    let outcome = salvage(vec![Damage::Overwritten(HEADERS[0]..HEADERS[1] + 4096).apply(&file)]);
    let outcome = outcome.expect("the rest is whole");
    assert_true(&original(std::slice::from_ref(&file)), &outcome, "headers");
    assert_eq!(outcome.totals.finished_bytes, 6 * MIB);
    assert_eq!(outcome.totals.unknown_bytes, SIZE - 6 * MIB);
}

/// An image that was cut before its metadata has nothing that leads to a disk.
#[test]
fn where_nothing_leads_to_the_disk_there_is_an_error() {
    for length in [0, 1, 70_000, MIB, METADATA, METADATA + 65536] {
        let error = salvage(vec![Damage::Cut(length).apply(&known())]).err().expect("no disk");
        assert!(error.remedy_text().is_some(), "{length}: {error:#}");
    }
}

/// How large blocks are is shown by those that the file has lost, too. If nothing shows it, it is not
/// guessed.
#[test]
fn a_size_of_blocks_that_nothing_shows_is_not_guessed() {
    let whole = known();
    let mut image = Craft { file: whole.clone() };
    image.write(METADATA, &vec![0; 128 << 10]);
    image.file.resize(END);
    let cut = |file: Store| salvage(vec![Scratched { store: file, unreadable: Vec::new() }]);
    let outcome = cut(image.file.clone()).expect("the BAT shows the disk");
    assert_eq!(outcome.totals.lost_bytes, 6 * MIB);
    assert_true(&original(std::slice::from_ref(&whole)), &outcome, "cut behind the BAT");
    for (block, _) in BLOCKS {
        image.set_slot(block, 2); // ZERO
    }
    let error = cut(image.file).err().expect("no size");
    assert!(error.to_string().contains("how large blocks are"), "{error:#}");
}

/// Two blocks in one place, a block over the metadata, a reserved state, reserved bits, and places beyond the
/// end: each loses its block and no other.
#[test]
fn a_block_is_lost_by_itself() {
    let whole = known();
    for (name, entries, lost) in [
        ("shared", vec![(7, END | 6)], vec![0, 7]),
        ("shared in part", vec![(7, (END + MIB) | 6), (8, (END + MIB) | 6)], vec![7, 8, 511]),
        ("over the metadata", vec![(7, METADATA | 6)], vec![7]),
        ("over the header", vec![(7, 6)], vec![7]),
        ("reserved state", vec![(511, (END + MIB) | 4)], vec![511]),
        ("reserved bits", vec![(511, (END + MIB) | 6 | 1 << 9)], vec![511]),
        ("partially present without parent", vec![(511, (END + MIB) | 7)], vec![511]),
        ("beyond the end", vec![(511, (END + 6 * MIB) | 6)], vec![511]),
        ("beyond every file", vec![(511, u64::MAX << 20 | 6)], vec![511]),
    ] {
        let mut image = Craft { file: whole.clone() };
        for (slot, word) in entries {
            image.set_slot(slot, word);
        }
        let outcome = salvage(vec![Scratched { store: image.file, unreadable: Vec::new() }]).expect(name);
        assert_true(&original(std::slice::from_ref(&whole)), &outcome, name);
        let blocks = outcome.runs.iter().filter(|(_, status)| *status == Status::Lost);
        let blocks: Vec<u64> = blocks.flat_map(|(range, _)| range.start / MIB..range.end / MIB).collect();
        assert_eq!(blocks, lost, "{name}");
    }
}

/// A child with every other run of four sectors of its first block, and its parent.
fn chain() -> [Store; 2] {
    let mut child = Craft { file: corpus::children().swap_remove(0) };
    child.write(END, &vec![0xcc; 1 << 20]);
    child.write(END + MIB, &[0xf0; 256]);
    let mut parent = Craft::new(&Config::small());
    parent.file.resize(END + 7 * MIB);
    for block in 0..7 {
        parent.set_slot(block, (END + block * MIB) | 6);
        parent.write(END + block * MIB, &vec![0x50 + block.to_le_bytes()[0]; 1 << 20]);
    }
    [child.file, parent.file]
}

fn intact(files: &[Store]) -> Vec<Scratched> {
    files.iter().map(|file| Scratched { store: file.clone(), unreadable: Vec::new() }).collect()
}

/// Without its parent a child gives what it has itself; without its bits not even that of a block.
#[test]
fn a_child_gives_what_it_has() {
    let files = chain();
    let (disk, size) = (original(&files), (6 << 20) + 4096);
    let whole = salvage(intact(&files)).expect("nothing is damaged");
    assert_true(&disk, &whole, "the chain");
    assert_eq!(whole.totals.finished_bytes, size);

    let alone = salvage(intact(&files[..1])).expect("a child");
    assert_true(&disk, &alone, "the child alone");
    assert_eq!((alone.totals.finished_bytes, alone.totals.unknown_bytes), (MIB / 2, size - MIB / 2));

    let mut chain = intact(&files);
    chain[0].unreadable.push(END + MIB..END + MIB + 1);
    let without_bits = salvage(chain).expect("a chain");
    assert_true(&disk, &without_bits, "the child without its bits");
    assert_eq!((without_bits.totals.finished_bytes, without_bits.totals.lost_bytes), (size - MIB, MIB));

    let mut chain = intact(&files);
    chain[1].store.resize(END + 3 * MIB);
    let cut_parent = salvage(chain).expect("a chain");
    assert_true(&disk, &cut_parent, "the parent cut");
    assert_eq!(cut_parent.totals.finished_bytes, 3 * MIB);
}

/// A log is replayed if it is whole, however short the file is by then; one that is damaged leaves doubts.
#[test]
fn a_log_counts_if_it_is_whole() {
    for seed in 0..6 {
        let config = Config { weights: [50, 10, 18, 18, 0, 0], ..Config::small() };
        let file = corpus::dirty(&config, seed);
        let disk = original(std::slice::from_ref(&file));
        let size = disk.length;
        let whole = salvage(intact(std::slice::from_ref(&file))).expect("it opens");
        assert_true(&disk, &whole, "a dirty log");
        assert_eq!(whole.totals.finished_bytes, size);
        for damage in [Damage::Unreadable(LOG..LOG + 4096), Damage::Overwritten(LOG..LOG + MIB)] {
            let outcome = salvage(vec![damage.apply(&file)]).expect("the rest is whole");
            assert_true(&disk, &outcome, "a lost log");
        }
        let cut = salvage(vec![Damage::Cut(file.length - MIB).apply(&file)]).expect("the metadata are whole");
        assert_true(&disk, &cut, "a file cut under its log");
        assert!(cut.totals.finished_bytes >= size - 2 * MIB, "seed {seed}: {:?}", cut.totals);
    }
}

/// Reads that fail for other reasons than the medium say nothing of what is lost.
#[test]
fn an_error_of_the_moment_is_no_loss() {
    struct Busy(Scratched, RefCell<u32>);
    impl ReadDisk for Busy {
        async fn read(&self, offset: u64, length: usize) -> io::Result<Buffer> {
            if self.1.replace_with(|left| left.saturating_sub(1)) == 1 {
                return Err(io::Error::from_raw_os_error(libc::ENOMEM));
            }
            self.0.read(offset, length).await
        }

        async fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
            self.0.next_data(offset).await
        }

        async fn length(&self) -> io::Result<u64> {
            self.0.length().await
        }

        fn takes_space_back(&self) -> bool {
            false
        }
    }
    let mut failed = 0;
    for at in 1..40 {
        let disk = Busy(intact(&[known()]).remove(0), RefCell::new(at));
        match copied(vec![disk]) {
            Err(error) => {
                assert_eq!(error.os_error(), Some(libc::ENOMEM), "{error:#}");
                failed += 1;
            }
            Ok((outcome, _)) => assert_eq!(outcome.totals.finished_bytes, SIZE),
        }
    }
    assert!(failed > 10, "{failed}");
}
