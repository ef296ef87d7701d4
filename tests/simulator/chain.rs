//! Chains: what a front reads through layers of every shape is what a sector-by-sector model says; a chain
//! that is not one is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::chain::{self, Layer as _, MAX_DEPTH, MAX_NEIGHBOURS, Search};
use vhdx_ublk::engine::Outcome;
use vhdx_ublk::engine::front::{Front, MAX_PIECES, Op, Request};
use vhdx_ublk::engine::message::ToEngine;
use vhdx_ublk::engine::port::{FileIo, FileOp, PieceId, Port, Ticket};
use vhdx_ublk::engine::shared::Shared;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::format::bat::{BatEntry, Geometry};
use vhdx_ublk::format::guid;
use vhdx_ublk::format::locator::{PARENT_LINKAGE, PARENT_LINKAGE2, ParentLocator, RELATIVE_PATH};
use vhdx_ublk::image::{BlockMap, Identity, Image, ReadImage, repair};

use crate::craft::{self, Change, Craft, END, LOG_GUID, LogEntry, METADATA, MIB};
use crate::sim::disk::SimDisk;
use crate::sim::tasks::block_on;
use crate::sim::world::Config;

/// Bytes on either side of a chunk's end, and at the disk's start, where the layers have something.
const WINDOW: u64 = 4 * MIB;

/// One layer as the model sees it: a number per sector stands for its content, 0 for zeros.
struct Model {
    geometry: Geometry,
    blocks: BTreeMap<u64, Block>,
    /// The file, a number per sector.
    file: Vec<u32>,
}

#[derive(Clone)]
enum Block {
    Nothing(BatEntry),
    Whole(u64),
    Part(u64, Vec<bool>),
}

impl Model {
    fn random(rng: &mut Rng, number: u32, sector: u32, size: u64, differencing: bool) -> Self {
        let geometry = Geometry::new(size, (1 << 20) << rng.u32(0..3), sector, differencing);
        let border = geometry.chunk_ratio() * geometry.block_size();
        let mut layer = Self { geometry, blocks: BTreeMap::new(), file: vec![0; sectors(MIB, sector)] };
        for window in [0..WINDOW, border - WINDOW..border + WINDOW] {
            let blocks = window.start / geometry.block_size()..window.end.div_ceil(geometry.block_size());
            for block in blocks.filter(|block| *block < geometry.block_count()) {
                let block_state = layer.random_block(rng, number);
                layer.blocks.insert(block, block_state);
            }
        }
        layer
    }

    fn random_block(&mut self, rng: &mut Rng, number: u32) -> Block {
        let count = sectors(self.geometry.block_size(), self.geometry.logical_sector_size());
        match rng.u32(0..if self.geometry.is_differencing() { 9 } else { 6 }) {
            0 => Block::Nothing(BatEntry::zero()),
            1 => Block::Nothing(BatEntry::unmapped()),
            2 => Block::Nothing(BatEntry(1)),
            3 => Block::Nothing(BatEntry::not_present()),
            4 | 5 => Block::Whole(self.grow(rng, number, count)),
            _ => {
                let mut bits = Vec::with_capacity(count);
                while bits.len() < count {
                    let run = 1 << rng.u32(0..11);
                    let here = rng.bool();
                    bits.extend(std::iter::repeat_n(here, run.min(count - bits.len())));
                }
                Block::Part(self.grow(rng, number, count), bits)
            }
        }
    }

    /// Puts a block at the end of the file; its first byte's offset.
    fn grow(&mut self, rng: &mut Rng, number: u32, count: usize) -> u64 {
        let offset = self.file.len() as u64 * u64::from(self.geometry.logical_sector_size());
        self.file.extend((0..count).map(|_| number << 28 | rng.u32(1..1 << 28)));
        offset
    }

    fn layer(&self) -> BlockMap {
        let map = BlockMap::empty(self.geometry);
        for (block, content) in &self.blocks {
            let entry = match content {
                Block::Nothing(entry) => *entry,
                Block::Whole(offset) => BatEntry::present(*offset),
                Block::Part(offset, bits) => {
                    let slice = self.geometry.bitmap_slice(*block);
                    let mut bytes = vec![0; index(slice.end - slice.start)];
                    for (bit, _) in bits.iter().enumerate().filter(|(_, here)| **here) {
                        bytes[bit / 8] |= 1 << (bit % 8);
                    }
                    map.bitmaps().store(&self.geometry, *block, &bytes).expect("memory");
                    BatEntry::partially_present(*offset)
                }
            };
            map.restore(self.geometry.payload_slot(*block), &[entry.write()]);
        }
        map
    }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64-bit hosts only")
}

fn sectors(bytes: u64, sector: u32) -> usize {
    usize::try_from(bytes / u64::from(sector)).expect("small")
}

/// What sector `sector` of the disk is, by the format's own words.
fn content(chain: &[Model], sector: u64) -> u32 {
    let Some((layer, parents)) = chain.split_first() else { return 0 };
    let bytes = u64::from(layer.geometry.logical_sector_size());
    if sector * bytes >= layer.geometry.virtual_size() {
        return 0;
    }
    let block = sector * bytes / layer.geometry.block_size();
    let within = usize::try_from(sector % (layer.geometry.block_size() / bytes)).expect("small");
    let stored = |offset: u64| layer.file[usize::try_from(offset / bytes).expect("small") + within];
    match layer.blocks.get(&block) {
        Some(Block::Whole(offset)) => stored(*offset),
        Some(Block::Part(offset, bits)) if bits[within] => stored(*offset),
        Some(Block::Nothing(entry)) if entry.0 != 0 => 0,
        Some(Block::Part(..) | Block::Nothing(_)) | None => content(parents, sector),
    }
}

/// The files of a chain, and one request's buffer, a number per sector.
struct Files<'a> {
    chain: &'a [Model],
    sector: u64,
    buffer: Vec<u32>,
    live: Vec<(PieceId, i32)>,
    result: Option<i32>,
}

impl Port for Files<'_> {
    fn change_leaf(&mut self) -> Option<Arc<Shared>> {
        None
    }

    fn submit(&mut self, piece: PieceId, io: FileIo) {
        let at = |bytes: u64| usize::try_from(bytes / self.sector).expect("small");
        let count = at(io.length.into());
        let target = at(io.buffer_offset.into())..at(io.buffer_offset.into()) + count;
        match io.op {
            FileOp::FillZero => self.buffer[target].fill(0),
            FileOp::Read => {
                let file = &self.chain[usize::from(io.layer)].file;
                self.buffer[target].copy_from_slice(&file[at(io.file_offset)..at(io.file_offset) + count]);
            }
            op => panic!("{op:?} on a chain that is only read"),
        }
        self.live.push((piece, io.length.cast_signed()));
        assert!(self.live.len() <= MAX_PIECES);
    }

    fn send(&mut self, message: ToEngine) {
        panic!("a read asks the engine nothing: {message:?}");
    }

    fn complete(&mut self, _: Ticket, result: Outcome<u32>) {
        let result = result.map_or_else(|errno| -(errno as i32), u32::cast_signed);
        assert!(self.result.replace(result).is_none(), "completed once");
    }
}

fn read(front: &mut Front, files: &mut Files, rng: &mut Rng, offset: u64, length: u64) {
    files.buffer = vec![u32::MAX; usize::try_from(length / files.sector).expect("small")];
    front.start(0, Request { op: Op::Read, offset, length }, files);
    while !files.live.is_empty() {
        let (piece, result) = files.live.swap_remove(rng.usize(0..files.live.len()));
        front.io_done(piece, result, files);
    }
    assert_eq!(files.result.take().map(i64::from), i64::try_from(length).ok());
}

fn random_chain(rng: &mut Rng) -> Vec<Model> {
    let sector = if rng.u32(0..4) == 0 { 4096 } else { 512 };
    let border = 8 * MIB * u64::from(sector);
    let depth = rng.u32(1..6);
    (0..depth)
        .map(|number| {
            let size = border + rng.u64(0..2 * WINDOW / 4096) * 4096 - WINDOW;
            Model::random(rng, number, sector, size, number + 1 < depth)
        })
        .collect()
}

#[test]
fn a_chain_reads_as_its_layers_say_sector_by_sector() {
    for seed in 0..150 {
        let mut rng = Rng::with_seed(seed);
        let chain = random_chain(&mut rng);
        let mut layers: Vec<Arc<BlockMap>> = chain.iter().map(|model| model.layer().into()).collect();
        let leaf = layers.remove(0);
        let shared = Arc::new(Shared::of_chain(leaf, layers.into(), true, false));
        let mut front = Front::new(shared, 1);
        let sector = u64::from(chain[0].geometry.logical_sector_size());
        let mut files = Files { chain: &chain, sector, buffer: Vec::new(), live: Vec::new(), result: None };
        let size = chain[0].geometry.virtual_size();
        let border = 8 * MIB * sector;
        for _ in 0..40 {
            let start =
                if rng.bool() { rng.u64(0..WINDOW) } else { border - WINDOW + rng.u64(0..2 * WINDOW) };
            let offset = (start.min(size - 1)) / sector * sector;
            let longest = MIB >> rng.u32(0..10);
            let length = (rng.u64(0..longest) / sector * sector + sector).min(size - offset);
            read(&mut front, &mut files, &mut rng, offset, length);
            for (index, found) in files.buffer.iter().enumerate() {
                let number = offset / sector + index as u64;
                assert_eq!(*found, content(&chain, number), "seed {seed}, sector {number}");
            }
        }
    }
}

const LINKAGE: Uuid = Uuid::from_u128(0x51);
const LINKAGE2: Uuid = Uuid::from_u128(0x52);
const OTHER: Uuid = Uuid::from_u128(0x53);

/// An image laid out by hand, with a parent if it has a locator.
fn image(data_write_guid: Uuid, locator: Option<ParentLocator>) -> Craft {
    let mut craft = Craft::new(&Config::small());
    let (image, _) = craft.open_read_only().expect("a new image");
    let mut metadata = image.metadata.clone();
    metadata.has_parent = locator.is_some();
    metadata.parent_locator = locator;
    craft.write(METADATA, &metadata.encode_region());
    craft.change_headers(|header| header[32..48].copy_from_slice(&data_write_guid.to_bytes_le()));
    craft
}

fn locator(linkage: Uuid, linkage2: Uuid, path: &str) -> ParentLocator {
    let mut locator = ParentLocator::default();
    locator.set(PARENT_LINKAGE, linkage.braced().to_string());
    locator.set(PARENT_LINKAGE2, linkage2.braced().to_string());
    locator.set(RELATIVE_PATH, path);
    locator
}

/// A folder of images that only pretend to be in their files.
#[derive(Default)]
struct Folder {
    folder: Option<tempfile::TempDir>,
    images: BTreeMap<PathBuf, Craft>,
}

struct Opened {
    image: ReadImage,
    path: PathBuf,
}

impl chain::Layer for Opened {
    fn image(&self) -> &Image {
        &self.image
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

impl Folder {
    fn path(&mut self, name: &str) -> PathBuf {
        let folder = self.folder.get_or_insert_with(|| tempfile::tempdir().expect("a folder"));
        folder.path().canonicalize().expect("it is there").join(name)
    }

    fn add(&mut self, name: &str, image: Craft) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, name).expect("room");
        self.images.insert(path.clone(), image);
        path
    }

    fn open(&self, path: &Path) -> Result<Opened> {
        let path = path.canonicalize().expect("it is there");
        let found =
            self.images.get(&path).ok_or_else(|| Error::new(Kind::NotVhdx, "no image").file(&path))?;
        Ok(Opened { image: found.open_read_only()?.0, path })
    }

    fn parents(&self, leaf: &Path, search: &Search) -> Result<Vec<PathBuf>> {
        let leaf = self.open(leaf)?;
        let parents = chain::open_parents(&leaf, search, |path| self.open(path))?;
        Ok(parents.iter().map(|parent| parent.path().to_owned()).collect())
    }

    fn refusal(&self, leaf: &Path, search: &Search) -> (Kind, String) {
        let error = self.parents(leaf, search).expect_err("no chain");
        (error.kind(), format!("{error:#}"))
    }
}

#[test]
fn a_chain_is_found_by_its_linkage_in_either_place() {
    let mut folder = Folder::default();
    let base = folder.add("Base.vhdx", image(LINKAGE2, None));
    let middle = folder.add("middle.vhdx", image(OTHER, Some(locator(LINKAGE, LINKAGE2, r".\base.VHDX"))));
    let leaf = folder.add("leaf.vhdx", image(LINKAGE, Some(locator(OTHER, Uuid::nil(), r".\middle.vhdx"))));
    let search = Search::default();
    assert_eq!(folder.parents(&leaf, &search).expect("a chain"), [middle.clone(), base.clone()]);
    assert_eq!(folder.parents(&base, &search).expect("no parents"), [] as [PathBuf; 0]);
    let given = Search { parents: vec![middle.clone()], ..Search::default() };
    assert_eq!(folder.parents(&leaf, &given).expect("a chain"), [middle, base.clone()]);
    let (kind, text) = folder.refusal(&base, &given);
    assert_eq!(kind, Kind::Usage, "{text}");
}

/// All zeros is what Windows writes where there is no second linkage; it is never a match.
#[test]
fn a_parent_written_since_is_refused_and_its_guid_is_told_only_if_it_was_named() {
    for found in [OTHER, Uuid::nil()] {
        let mut folder = Folder::default();
        folder.add("base.vhdx", image(found, None));
        let leaf = folder.add("leaf.vhdx", image(OTHER, Some(locator(LINKAGE, Uuid::nil(), r".\base.vhdx"))));
        let given = Search { parents: vec![folder.path("base.vhdx")], ..Search::default() };
        for (search, given) in [(Search::default(), false), (given, true)] {
            let (kind, text) = folder.refusal(&leaf, &search);
            assert_eq!(kind, Kind::Mismatch, "{text}");
            let has = |guid: Uuid| text.to_lowercase().contains(&guid.to_string());
            assert_eq!((has(LINKAGE), has(found)), (true, given), "{text}");
        }
    }
}

#[test]
fn the_next_place_is_tried_when_the_first_has_another_image() {
    let mut folder = Folder::default();
    let sub = folder.path("sub");
    fs::create_dir(&sub).expect("a folder");
    folder.add("sub/base.vhdx", image(OTHER, None));
    let right = folder.add("base.vhdx", image(LINKAGE, None));
    let leaf = folder.add("leaf.vhdx", image(OTHER, Some(locator(LINKAGE, Uuid::nil(), r".\sub\base.vhdx"))));
    assert_eq!(folder.parents(&leaf, &Search::default()).expect("a chain"), [right]);
    let given = Search { parents: vec![sub.join("base.vhdx")], ..Search::default() };
    assert_eq!(folder.refusal(&leaf, &given).0, Kind::Mismatch, "what is given is not replaced");
}

#[test]
fn a_chain_that_returns_to_itself_or_never_ends_is_refused() {
    let mut folder = Folder::default();
    let one = folder.add("one.vhdx", image(LINKAGE, Some(locator(LINKAGE2, Uuid::nil(), r".\two.vhdx"))));
    let two = folder.add("two.vhdx", image(LINKAGE2, Some(locator(LINKAGE, Uuid::nil(), r".\one.vhdx"))));
    assert_eq!(folder.refusal(&one, &Search::default()).0, Kind::Corrupt);
    let link = folder.path("link.vhdx");
    fs::hard_link(&one, &link).expect("one file system");
    let given = Search { parents: vec![two, link], ..Search::default() };
    assert_eq!(folder.refusal(&one, &given).0, Kind::Corrupt, "another name of the same file");
    let mut long = Folder::default();
    for number in 0..=MAX_DEPTH {
        let next = format!(r".\{}.vhdx", number + 1);
        long.add(&format!("{number}.vhdx"), image(LINKAGE, Some(locator(LINKAGE, Uuid::nil(), &next))));
    }
    let first = long.path("0.vhdx");
    assert_eq!(long.refusal(&first, &Search::default()).0, Kind::Unsupported);
}

#[test]
fn a_parent_that_is_nowhere_is_asked_for() {
    let mut folder = Folder::default();
    let leaf =
        folder.add("leaf.vhdx", image(OTHER, Some(locator(LINKAGE, Uuid::nil(), r"..\lost\base.vhdx"))));
    let (kind, text) = folder.refusal(&leaf, &Search::default());
    assert_eq!(kind, Kind::NotFound);
    assert!(text.contains(r"..\lost\base.vhdx"), "{text}");
}

/// What was made of an image is found beside it, whatever its name's letters; nothing else is.
#[test]
fn the_children_beside_an_image_are_found() {
    let mut folder = Folder::default();
    let base = folder.add("base.vhdx", image(LINKAGE, None));
    let child = |linkage, linkage2, path: &str| image(OTHER, Some(locator(linkage, linkage2, path)));
    let one = folder.add("one.vhdx", child(LINKAGE, Uuid::nil(), r".\base.vhdx"));
    let merging = folder.add("Two.AVHDX", child(LINKAGE2, LINKAGE, r".\BASE.VHDX"));
    folder.add("of-an-older-base.vhdx", child(LINKAGE2, Uuid::nil(), r".\base.vhdx"));
    folder.add("of-a-copy.vhdx", child(LINKAGE, Uuid::nil(), r".\copy.vhdx"));
    folder.add("copy.vhdx", image(LINKAGE, None));
    folder.add("called-otherwise.bak", child(LINKAGE, Uuid::nil(), r".\base.vhdx"));
    fs::write(folder.path("no-image.vhdx"), "").expect("room");
    fs::create_dir(folder.path("folder.vhdx")).expect("a folder");
    let link = folder.path("another-name-of-it.vhdx");
    fs::hard_link(&base, &link).expect("one file system");
    let parent = folder.open(&base).expect("an image");
    let found = chain::children_beside(&parent, &Search::default(), |path| folder.open(path));
    assert_eq!(found, [merging, one]);
}

/// An image is identified by what its log makes of it, unless that is too long to be read; what its blocks
/// are like is all one.
#[test]
fn an_identity_is_that_of_the_replayed_image() {
    let mut child = image(OTHER, Some(locator(LINKAGE, Uuid::nil(), r".\base.vhdx")));
    child.set_slot(0, 4);
    child.name_log(LOG_GUID);
    let identity = |child: &Craft, longest_log| {
        let disk = SimDisk::new(child.file.clone(), true, true, 512);
        block_on(Identity::read(&disk, longest_log))
    };
    let found = identity(&child, u64::MAX).expect("only a block is damaged");
    assert_eq!(found.data_write_guid, OTHER);
    assert_eq!(found.metadata.parent_locator.expect("a child").linkage().expect("a linkage"), LINKAGE);
    child.write_log(0, &LogEntry::new(1, 0, &[Change::Page { at: METADATA, fill: 1 }]).encode());
    let error = identity(&child, u64::MAX).expect_err("no metadata table is left");
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    assert_eq!(identity(&child, 1).expect("its log is too long").data_write_guid, OTHER);
}

#[test]
fn a_full_folder_is_not_read_to_its_end() {
    let mut folder = Folder::default();
    let base = folder.add("base.vhdx", image(LINKAGE, None));
    for number in 0..2 * MAX_NEIGHBOURS {
        fs::write(folder.path(&format!("{number}.vhdx")), "").expect("room");
    }
    let parent = folder.open(&base).expect("an image");
    let mut looked_at = 0;
    let found = chain::children_beside(&parent, &Search::default(), |path| {
        looked_at += 1;
        folder.open(path)
    });
    assert_eq!((found, looked_at), (Vec::new(), MAX_NEIGHBOURS));
}

/// A child with block 0 partially present; the log holds a newer page of its bitmap than the file.
#[test]
fn a_bitmap_in_the_log_counts_and_a_missing_one_is_an_error() {
    let mut child = image(OTHER, Some(locator(LINKAGE, Uuid::nil(), r".\base.vhdx")));
    child.file.resize(END + 3 * MIB);
    child.set_slot(0, (END + MIB) | 7);
    let (image, disk) = child.open_read_only().expect("legal so far");
    let error = block_on(image.read_bitmaps(&disk)).expect_err("its bitmap is nowhere");
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    let bitmap_slot = image.map.geometry().bitmap_slot(0);
    child.set_slot(bitmap_slot, END | 6);
    child.name_log(LOG_GUID);
    child.write_log(0, &LogEntry::new(1, 0, &[Change::Page { at: END, fill: 1 }]).encode());
    let (image, disk) = child.open_read_only().expect("the log changes no payload");
    block_on(image.read_bitmaps(&disk)).expect("it is there");
    let bits = craft::page(1);
    let geometry = image.map.geometry();
    for sector in 0..64 {
        let expected = bits[sector / 8] >> (sector % 8) & 1 == 1;
        assert_eq!(
            image.map.bitmaps().has(geometry, 0, sector as u64..sector as u64 + 1),
            expected,
            "sector {sector}"
        );
    }
}

/// All of a long locator fits no log entry: only what changes is written.
#[test]
fn a_long_locator_is_mended_where_it_is_wrong() {
    let mut long = locator(LINKAGE, Uuid::nil(), r".\base.vhdx");
    (0..20).for_each(|key| long.set(&format!("key{key}"), "x".repeat(16 << 10)));
    let mut child = image(OTHER, Some(long));
    let kind = guid::write(guid::LOCATOR_TYPE_VHDX);
    let region = child.read(METADATA, 1 << 20);
    let item = region.windows(kind.len()).position(|bytes| bytes == kind).expect("it has a locator");
    child.write(METADATA + item as u64 + 16, &[1]);
    let disk = SimDisk::new(child.file.clone(), true, true, 512);
    let repaired = block_on(repair(&disk, || Uuid::from_u128(7))).expect("an image");
    assert_eq!((repaired.before.repairable, repaired.after.corruptions), (1, 0), "{:?}", repaired.after);
}
