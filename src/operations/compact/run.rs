//! Compacting one image, on whatever its file is on.
//!
//! The order of the steps, each durable before the next:
//!
//! 1. blocks that read as zeros, and the old content that unmapped blocks name, give up their space;
//! 2. blocks move to lower places, a batch at a time ([`crate::engine::relocate`]);
//! 3. the image is closed: the log is empty, then the file is cut where what is last ends;
//! 4. if that is the BAT or the metadata, the region moves to a lower place
//!    ([`WritableImage::move_region`]), and it begins with step 2 again.
//!
//! A power cut between any two leaves the disk as it was, in an image that opens. What was won until then
//! stays won but for the tail of the file, which the next run cuts. The disk does not change, so the
//! DataWriteGuid stays, and children stay valid.

use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::plan::{MOST_COPIED, Plan, RegionMove, Step, batch};
use super::survey::{self, Fixed};
use super::{Steps, zeros};
use crate::chain::{Content, ReadLayer};
use crate::disk::{Disk, ReadDisk};
use crate::engine::message::ToFront;
use crate::engine::relocate::Move;
use crate::engine::waiting::Spawn;
use crate::engine::{Engine, Fronts, GuidSource, Setup};
use crate::error::{Doing, Error, Kind, Result};
use crate::format::metadata::DiskType;
use crate::image::{self, BlockMap, Extent, Image, ReadImage, WritableImage, payload_extent};
use crate::operations::Watch;

/// Bytes that a batch of moves copies, at most, unless a single block is longer: what a kill costs. A disk
/// writes them in less than a second, so a compaction that is killed every second ends all the same.
const BATCH: u64 = 32 << 20;

/// The most blocks with space of an image that is compacted: their plan takes 150 bytes of memory for each.
const MOST_BLOCKS: u64 = 16 << 20;

/// How long a compaction under a limit may take no notice of a request to stop.
const PAUSE: Duration = Duration::from_millis(100);

/// What was done, or would be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Blocks that read as zeros and had space.
    pub zero_blocks: u64,
    /// Blocks without content that named space.
    pub old_blocks: u64,
    /// Bytes of those.
    pub given_up_bytes: u64,
    /// Blocks and sector bitmaps that were moved, those that were moved twice counted twice.
    pub moves: u64,
    /// Bytes of those.
    pub moved_bytes: u64,
    /// Where the file ends, bytes.
    pub end: u64,
    /// Free bytes below.
    pub free_bytes: u64,
    /// What stays where it is and lies last.
    pub held_by: Option<Fixed>,
    /// It was asked to stop before all was done.
    pub stopped: bool,
}

/// An image that is compacted, and its file.
pub struct Compaction<D, H, G> {
    /// The image, opened for writing.
    pub image: WritableImage,
    /// Gives handles on its file.
    pub disk: H,
    /// Its parents, its own first. Without them, blocks of a child that are partially present are not
    /// searched for zeros.
    pub parents: Vec<ReadLayer<D>>,
    /// The most bytes that are copied in a second, if there is a limit.
    pub max_rate: Option<u64>,
    /// What runs the engine's tasks.
    pub tasks: Rc<dyn Spawn>,
    /// Where every new GUID comes from.
    pub new_guid: G,
}

impl<D: Disk + 'static, H: Fn() -> D, G: FnMut() -> Uuid + Clone + 'static> Compaction<D, H, G> {
    /// Makes `steps`. An image in which there is nothing to do is not changed by one byte.
    ///
    /// # Errors
    /// I/O errors, want of room included: the disk reads as before, what was won stays won, and the image can
    /// be compacted again.
    pub async fn run(self, steps: Steps, watch: &impl Watch) -> Result<Done> {
        let Self { mut image, disk, mut parents, max_rate, tasks, new_guid } = self;
        let (mut steps, mut done) = (steps, Done::default());
        check_size(&image)?;
        loop {
            let (mut done_now, guids) = (Done::default(), Box::new(new_guid.clone()));
            let layers = std::mem::take(&mut parents);
            let pass = Pass { image, disk: &disk, parents: layers, max_rate, tasks: tasks.clone(), guids };
            let region = pass.run(steps, watch, &mut done_now).await?;
            done.add(done_now);
            let Some((which, place)) = region else { return Ok(done) };
            let file = disk();
            image = Image::open_for_writing(&file, new_guid.clone()).await?;
            image = image.move_region(&file, which, place, new_guid.clone()).await?;
            done.moves += 1;
            done.moved_bytes += place.length;
            steps = Steps { zeros: false, ..steps };
        }
    }
}

impl Done {
    /// What a later pass has done.
    fn add(&mut self, later: Self) {
        *self = Self {
            zero_blocks: self.zero_blocks + later.zero_blocks,
            old_blocks: self.old_blocks + later.old_blocks,
            given_up_bytes: self.given_up_bytes + later.given_up_bytes,
            moves: self.moves + later.moves,
            moved_bytes: self.moved_bytes + later.moved_bytes,
            ..later
        };
    }
}

/// The work between two moves of regions.
struct Pass<'a, D, H> {
    image: WritableImage,
    disk: &'a H,
    parents: Vec<ReadLayer<D>>,
    max_rate: Option<u64>,
    tasks: Rc<dyn Spawn>,
    guids: GuidSource,
}

impl<D: Disk + 'static, H: Fn() -> D> Pass<'_, D, H> {
    /// Makes `steps`, and closes the image. Then the region, if one is returned, is last and has room below.
    async fn run(self, steps: Steps, watch: &impl Watch, done: &mut Done) -> Result<Option<(Uuid, Extent)>> {
        let Self { image, disk, parents, max_rate, tasks, guids } = self;
        let file = disk();
        image.read_bitmaps(&file).await?;
        let leaks = has_leaks(&file, &image).await?;
        let fixed = survey::fixed(&image);
        let kept_guid = image.header.header.data_write_guid;
        let keeps_space = image.metadata.kind() == DiskType::Fixed;
        if steps.zeros {
            // A host that keeps what was written to itself may call it a hole until then.
            file.sync().await.map_err(|error| Error::io("syncing the image", error))?;
        }
        let fronts = Rc::new(NoFronts);
        let engine = Engine::new(Setup { image, disk: file, parents: Vec::new(), tasks, fronts, guids })?;
        let content = content(disk(), engine.shared().map.clone(), parents);
        let work = Work { engine: &engine, steps, fixed, kept_guid, max_rate, watch };
        let outcome = async {
            let given_up = give_up(&content, keeps_space, steps, watch, done).await?;
            work.all(&given_up, leaks, done).await
        };
        let outcome = outcome.await;
        let closed = engine.close().await.doing("closing the image");
        assert_eq!(engine.data_write_guid(), kept_guid, "children know the disk by its DataWriteGuid");
        outcome.and_then(|region| closed.map(|()| region))
    }
}

/// What [`Compaction::run`] would do with the image on `disk`, over these parents. Nothing is written.
///
/// # Errors
/// I/O errors.
pub async fn outline<D: ReadDisk>(
    image: ReadImage,
    disk: D,
    parents: Vec<ReadLayer<D>>,
    steps: Steps,
    watch: &impl Watch,
) -> Result<Done> {
    let mut done = Done::default();
    let (mut fixed, mut space) = (survey::fixed(&image), image.space.clone());
    let keeps_space = image.metadata.kind() == DiskType::Fixed;
    check_size(&image)?;
    let content = content(disk, image.into_map().into(), parents);
    let map = &content.layers()[0].map;
    let given_up = give_up(&content, keeps_space, steps, watch, &mut done).await?;
    let place = |block: &u64| payload_extent(map.load(*block).entry, map.geometry());
    let freed = given_up.iter().filter_map(place);
    freed.for_each(|place| space.free(place, image::Content::Recycled));
    let mut items = survey::items(map);
    items.retain(|item| space.is_used(item.place.offset..item.place.end()));
    let mut plan = Plan::new(space, items, places(&fixed), MOST_COPIED);
    while let Some((region, to)) = make_room(&mut plan, steps, map.geometry().chunk_ratio(), &fixed) {
        let moved = fixed.iter_mut().find(|fixed| fixed.region == Some(region));
        moved.expect("a region of the image").place = to;
        done.moves += 1;
        done.moved_bytes += to.length;
    }
    plan.steps().iter().for_each(|step| count(step, &mut done));
    conclude(&plan, &fixed, &mut done);
    Ok(done)
}

fn content<D>(disk: D, map: Arc<BlockMap>, parents: Vec<ReadLayer<D>>) -> Content<D> {
    Content::new(std::iter::once(ReadLayer { disk, map }).chain(parents).collect())
}

/// The blocks whose space is given up, in disk order.
async fn give_up<D: ReadDisk>(
    content: &Content<D>,
    keeps_space: bool,
    steps: Steps,
    watch: &impl Watch,
    done: &mut Done,
) -> Result<Vec<u64>> {
    let (map, mut blocks) = (&content.layers()[0].map, Vec::new());
    if steps.zeros && !keeps_space {
        let whole = content.layers().len() > 1 || !map.geometry().is_differencing();
        blocks = zeros::find(content, &survey::present(map, whole), watch).await?;
        done.zero_blocks = blocks.len() as u64;
        done.stopped = watch.stop_requested();
    }
    if !keeps_space && (steps.length || steps.defragment) {
        let old = survey::old_content(map);
        done.old_blocks = old.len() as u64;
        blocks.extend(old);
        blocks.sort_unstable();
    }
    done.given_up_bytes = blocks.len() as u64 * map.geometry().block_size();
    Ok(blocks)
}

/// Refuses an image whose blocks would take gigabytes of memory while their moves are planned.
fn check_size(image: &Image) -> Result<()> {
    let blocks = image.space.used_bytes() / u64::from(image.metadata.block_size);
    if blocks <= MOST_BLOCKS {
        return Ok(());
    }
    let message = format!("{blocks} blocks have space, more than the {MOST_BLOCKS} that can be compacted");
    Err(Error::new(Kind::Unsupported, message).remedy("`vhdx-ublk convert` copies it into a compact image"))
}

/// Whether the host has stored something that nothing in the image names.
async fn has_leaks<D: ReadDisk>(disk: &D, image: &Image) -> Result<bool> {
    for run in image.space.unknown_runs() {
        let found = disk.next_data(run.offset).await;
        let found = found.map_err(|error| Error::io("looking for holes", error).at(run.offset))?;
        if found.is_some_and(|found| found < run.end()) {
            return Ok(disk.takes_space_back());
        }
    }
    Ok(false)
}

/// The part of a compaction that writes.
struct Work<'a, D: Disk, W> {
    engine: &'a Rc<Engine<D>>,
    steps: Steps,
    fixed: Vec<Fixed>,
    kept_guid: Uuid,
    max_rate: Option<u64>,
    watch: &'a W,
}

impl<D: Disk + 'static, W: Watch> Work<'_, D, W> {
    /// Returns the region that is to be moved next.
    async fn all(&self, given_up: &[u64], leaks: bool, done: &mut Done) -> Result<Option<(Uuid, Extent)>> {
        if !given_up.is_empty() {
            self.open().await?;
            self.engine.give_up(given_up).await.doing("giving up the space of blocks")?;
        }
        let mut plan = self.plan();
        let tail = self.engine.shared().map.file_bytes() > plan.end();
        let ratio = self.engine.shared().geometry().chunk_ratio();
        let region = make_room(&mut plan, self.steps, ratio, &self.fixed);
        let cut = self.steps.length || self.steps.defragment;
        if !plan.steps().is_empty() || cut && (tail || leaks) {
            self.open().await?;
        }
        let moved = self.make(plan.steps(), done).await;
        conclude(&self.plan(), &self.fixed, done);
        moved?;
        Ok(region.filter(|_| !done.stopped))
    }

    async fn open(&self) -> Result<()> {
        self.engine.open_session_as(Some(self.kept_guid)).await.doing("opening the image")
    }

    /// The file as it is now.
    fn plan(&self) -> Plan {
        let items = survey::items(&self.engine.shared().map);
        Plan::new(self.engine.space(), items, places(&self.fixed), MOST_COPIED)
    }

    /// The moves, batch by batch.
    async fn make(&self, mut steps: &[Step], done: &mut Done) -> Result<()> {
        let total: u64 = steps.iter().map(|step| step.item.place.length).sum();
        let (started, most) = (Instant::now(), self.max_rate.map_or(BATCH, |rate| rate.min(BATCH)));
        while !steps.is_empty() {
            if self.watch.stop_requested() {
                done.stopped = true;
                return Ok(());
            }
            let (now, later) = steps.split_at(batch(steps, most));
            let moves: Vec<Move> = now.iter().map(Move::from).collect();
            let made = self.engine.relocate(&moves).await.doing("moving blocks")?;
            assert_eq!(made, moves, "nothing else uses the image");
            for step in now {
                count(step, done);
            }
            self.watch.progress(done.moved_bytes, total);
            steps = later;
            self.wait(started, done.moved_bytes);
        }
        Ok(())
    }

    /// Waits until `bytes` may have been copied since `started`.
    fn wait(&self, started: Instant, bytes: u64) {
        let Some(rate) = self.max_rate else { return };
        let due = Duration::from_millis(bytes.saturating_mul(1000) / rate);
        while let Some(left) = due.checked_sub(started.elapsed()).filter(|left| !left.is_zero()) {
            if self.watch.stop_requested() {
                break;
            }
            // Nothing else runs on this thread meanwhile: no device uses the image.
            thread::sleep(left.min(PAUSE));
        }
    }
}

/// Plans the moves. Returns the region that is to be moved when they are made, and its new place.
fn make_room(plan: &mut Plan, steps: Steps, chunk_ratio: u64, fixed: &[Fixed]) -> Option<(Uuid, Extent)> {
    match steps {
        Steps { defragment: true, .. } => plan.sort(chunk_ratio),
        Steps { length: true, .. } => plan.shorten(),
        _ => return None,
    }
    let movable: Vec<Extent> =
        fixed.iter().filter(|fixed| fixed.region.is_some()).map(|fixed| fixed.place).collect();
    let RegionMove { from, to } = plan.lower_region(&movable)?;
    let region = fixed.iter().find(|fixed| fixed.place == from)?.region?;
    Some((region, to))
}

fn count(step: &Step, done: &mut Done) {
    done.moves += 1;
    done.moved_bytes += step.item.place.length;
}

fn places(fixed: &[Fixed]) -> Vec<Extent> {
    fixed.iter().map(|fixed| fixed.place).collect()
}

/// What is left when all moves of `plan` are made.
fn conclude(plan: &Plan, fixed: &[Fixed], done: &mut Done) {
    done.end = plan.end();
    done.free_bytes = plan.free_bytes();
    done.held_by = fixed.iter().find(|fixed| fixed.place.end() == plan.end()).copied();
}

/// No device uses the image.
struct NoFronts;

impl Fronts for NoFronts {
    fn send(&self, front: usize, message: ToFront) {
        unreachable!("{message:?} to front {front} of none");
    }

    fn count(&self) -> usize {
        0
    }
}
