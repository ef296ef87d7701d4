//! Promise defended here: the crash tests see what they are for. Every bug planted in the program is caught
//! by a broken promise or by the assertion that stands guard, in the scenario or the test that names it, and
//! never by chance.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::disk::{Buffer, Disk};
use vhdx_ublk::engine::front::Op;
use vhdx_ublk::format::header;
use vhdx_ublk::format::log::{Change, NewEntry};
use vhdx_ublk::image::{Image, Mismatch, SLOTS_PER_PAGE, SessionMemory, SharedWords, VERSION, WritableImage};
use vhdx_ublk::simulation::{Plant, plant};

use crate::resize;
use crate::sim::campaign::{run, scenario, tiny};
use crate::sim::disk::SimDisk;
use crate::sim::judge::Effort;
use crate::sim::oracle::decode;
use crate::sim::short_logs::ShortLogs;
use crate::sim::store::Store;
use crate::sim::tasks::block_on;
use crate::sim::violation::{broken_promise, message, violated};
use crate::sim::world::death::place;
use crate::sim::world::{Config, World, new_image};
use crate::{amend, compact, contents, faults, live_merge, move_chain, trim, upgrade};

/// Seeds that a planted bug may take to be caught.
const SEEDS: u64 = 200;

/// What catches a planted bug.
enum Catch {
    /// A promise that breaks in a scenario.
    Scenario(&'static str),
    /// A promise that a test breaks.
    Test(fn()),
    /// What an assertion of the program says in a scenario, before any promise can break.
    Assertion(&'static str, &'static str),
}

/// The test that catches `planted`, if no scenario does.
fn test_for(planted: Plant) -> Option<fn()> {
    Some(match planted {
        Plant::IgnoreBoot => a_session_from_before_a_power_cut_is_not_taken_over,
        Plant::IgnoreVersion => a_session_of_another_layout_is_told_apart,
        Plant::IgnoreChecksum => a_damaged_session_is_told_apart,
        Plant::LateSettlement => two_successors_may_be_killed_at_any_step,
        Plant::TrustFirstLook => a_first_write_survives_zeros_beside_it,
        Plant::NoFlushedOffset => a_file_that_lost_its_durable_end_is_refused,
        Plant::NoExtension => a_length_that_the_log_asks_for_is_restored,
        Plant::LongEntry => others_can_read_every_entry,
        Plant::ReplayBeforeTail => entries_before_the_tail_are_not_replayed,
        Plant::SkipMoveSync | Plant::MoveBareBitmap => compact::moves_survive_cuts,
        Plant::KeepOldEnd | Plant::KeepOldSlots | Plant::ShowParentsEnd => {
            resize::what_comes_into_a_disk_is_zero
        }
        Plant::SkipMoveRelink | Plant::RemoveLeafFirst | Plant::TrustStranger => {
            move_chain::a_chain_is_at_one_place_wherever_a_move_is_cut
        }
        Plant::EarlyWriter => upgrade::a_successor_writes_when_the_daemon_has_left_the_image,
        Plant::EarlyEntry => upgrade::the_entry_stays_that_of_the_program_before_until_the_device_is_served,
        Plant::GrowUnclean => contents::what_was_not_shut_down_does_not_grow,
        Plant::TrustRecord => trim::the_record_of_a_trim_counts_until_the_disk_is_written,
        Plant::ForgetMergedBits
        | Plant::UnsyncedMerge
        | Plant::LayerBeforeLink
        | Plant::LayerBeforeFronts => live_merge::a_merge_shows_what_is_wrong,
        Plant::RelyOnCache => live_merge::a_merge_after_a_kill_shows_what_is_wrong,
        Plant::SyncPastUnseen => {
            faults::no_front_s_sync_succeeds_beside_a_durable_write_that_has_lost_the_cache
        }
        Plant::SilentChange => amend::what_a_guest_sees_changes_under_a_new_guid,
        Plant::EarlyRegion | Plant::EarlyOrphans => resize::a_bat_that_moves_is_durable_before_it_is_named,
        _ => return None,
    })
}

/// What catches `planted`.
fn catch_for(planted: Plant) -> Catch {
    use Catch::{Assertion, Scenario, Test};
    if let Some(test) = test_for(planted) {
        return Test(test);
    }
    match planted {
        Plant::SkipRecyclingSync => Assertion("no-punch", "an entry names payload that is not durable"),
        Plant::ReuseBeforeDurable => {
            Assertion("no-punch", "space stays in quarantine until its unmapping is durable")
        }
        Plant::SkipGrowthSync => Assertion("growing", "an entry names space past a stable length"),
        Plant::ApplyBeforeLog => Assertion("growing", "pages go in place once their entry is durable"),
        Plant::StartAgainEarly => Assertion("flushes", "the log starts again while it is needed"),
        Plant::SkipBarrier | Plant::SkipZeroFill | Plant::LogLivePage => Scenario("no-punch"),
        Plant::UnstableLength => Scenario("growing"),
        Plant::EarlyFlush
        | Plant::HeaderBeforeEntry
        | Plant::IgnoreFua
        | Plant::SkipChecksum
        | Plant::TwinHeaders
        | Plant::LateMark
        | Plant::SkipPresent
        | Plant::KeepLeaks
        | Plant::TrustTail => Scenario("dynamic"),
        Plant::KeepLaterEntries | Plant::TailBeforeSync => Scenario("chunk-border"),
        Plant::LateCount => Scenario("again"),
        Plant::NoFence | Plant::LateAnnouncement | Plant::TrustKilled | Plant::ForgetPending => {
            Scenario("killed")
        }
        Plant::ForgetUnmapped => Scenario("killed-no-punch"),
        Plant::ForgetParents | Plant::SkipFillSync => Scenario("child-filled"),
        Plant::RevealParents
        | Plant::KeepParents
        | Plant::SkipBitsSync
        | Plant::BitsBeforeData
        | Plant::ForgetBits
        | Plant::KeepStaleBits
        | Plant::EarlyPromotion => Scenario("child"),
        Plant::EarlyReliance => Scenario("child-new"),
        Plant::EarlyHeld => Scenario("snapshot"),
        Plant::EarlySize | Plant::KeepOldMap => Scenario("grown"),
        Plant::UnannouncedGrowth => Scenario("grown-killed"),
        Plant::ForgetResumedBits => Scenario("child-killed"),
        Plant::NoPoison => Scenario("failed-durable-write"),
        Plant::TrustHost => Scenario("killed-and-lost"),
        Plant::SharedDescription => Scenario("lost-writes"),
        Plant::UnseenFailure => Scenario("lost-cache"),
        Plant::RefusalPoisons => Scenario("full"),
        Plant::UnreservedBitmap => Scenario("full-child-new"),
        Plant::ForgetRefusedPages | Plant::ForgetRefusedBatch | Plant::TrustRefusal => {
            Scenario("full-copying")
        }
        Plant::KeepOlderCopy => Scenario("flushes"),
        Plant::IgnoreDensity | Plant::EarlyGrowth => Scenario("dense"),
        Plant::SkipRefusedSlot => Scenario("full-copying-flushes"),
        other => catch_for_more(other),
    }
}

/// What catches `planted`, of a block that moves, a file that is cut under load, or a request that waits.
fn catch_for_more(planted: Plant) -> Catch {
    match planted {
        Plant::EarlyBits => Catch::Scenario("moving-child"),
        Plant::EarlyCut => Catch::Scenario("moving"),
        Plant::CountWaiting => Catch::Scenario("waiting-snapshot"),
        Plant::DoOnlyTheRest | Plant::TrustSecondTry => Catch::Scenario("waiting"),
        Plant::IgnoreMove | Plant::EarlyCopy | Plant::ForgetReaders | Plant::ReuseMovedEarly => {
            Catch::Scenario("moving-slowly")
        }
        other => catch_for_sync(other),
    }
}

/// What catches `planted`, of a flush that its front syncs for, or of space that its front gives a block.
fn catch_for_sync(planted: Plant) -> Catch {
    match planted {
        Plant::EarlyClear | Plant::LateFlag | Plant::ForgetClaim | Plant::KeepPool => {
            Catch::Scenario("dynamic")
        }
        Plant::SyncOverBits => Catch::Scenario("child"),
        Plant::SilentSync => Catch::Scenario("failed-sync"),
        other => unreachable!("{other:?} is caught by a test"),
    }
}

/// What catches `planted` and the seed that it takes; none, and what else was seen.
fn hunt(planted: Plant, catch: &Catch) -> Result<(u64, String), Vec<String>> {
    let mut others = Vec::new();
    for seed in 0..SEEDS {
        plant(Some(planted));
        let outcome = catch_unwind(AssertUnwindSafe(|| match *catch {
            Catch::Scenario(name) | Catch::Assertion(name, _) => {
                let scenario = scenario(name);
                run(&scenario, seed, scenario.config.requests, Effort::TEST);
            }
            Catch::Test(test) => test(),
        }));
        plant(None);
        let Err(panic) = outcome else { continue };
        let caught = match catch {
            Catch::Scenario(_) | Catch::Test(_) => broken_promise(&*panic),
            Catch::Assertion(_, says) => Some(message(&*panic)).filter(|said| said.contains(*says)),
        };
        match caught {
            Some(why) => return Ok((seed, why.to_owned())),
            None => others.push(message(&*panic).to_owned()),
        }
    }
    Err(others)
}

#[test]
fn every_planted_bug_is_caught() {
    let mut missed = Vec::new();
    for planted in Plant::ALL {
        match hunt(planted, &catch_for(planted)) {
            Ok((seed, why)) => println!("{planted:?}, seed {seed}: {why}"),
            Err(others) => missed.push((planted, others)),
        }
    }
    let (all, caught) = (Plant::ALL.len(), Plant::ALL.len() - missed.len());
    println!("{caught} of {all} planted bugs were caught");
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

/// How soon a scenario catches a planted bug: `VHDX_PLANT` and `VHDX_SCENARIO` name them.
#[test]
#[ignore = "it compares scenarios for a planted bug"]
fn one_planted_bug() {
    let name = std::env::var("VHDX_PLANT").expect("VHDX_PLANT names a bug");
    let planted = Plant::ALL.into_iter().find(|planted| format!("{planted:?}") == name);
    let planted = planted.unwrap_or_else(|| panic!("there is no {name}"));
    let scenario = std::env::var("VHDX_SCENARIO").ok().map(|name| &*name.leak());
    let catch = scenario.map_or_else(|| catch_for(planted), Catch::Scenario);
    println!("{planted:?}: {:?}", hunt(planted, &catch));
}

/// A file that is shorter than it surely was when its newest log entry was written has lost something.
#[test]
fn a_file_that_lost_its_durable_end_is_refused() {
    let _logs = ShortLogs::new(None);
    let config = Config { requests: 0, ..tiny() };
    let mut rng = Rng::with_seed(1);
    let content = new_image(&config, &mut rng);
    let mut world = World::open(config.clone(), content, config.oracle(), rng);
    world.request(Op::Write { durable: false }, 0, 4096);
    world.drain();
    world.request(Op::Flush, 0, 0);
    world.drain();
    let mut file = world.cut_file();
    open(&config, &file).expect("the whole file opens");
    file.resize(file.length - (1 << 20));
    if open(&config, &file).is_ok() {
        violated("a file that lost its durable end is taken for whole".into());
    }
}

/// Zeros for one part of a block while another part is written for the first time: both are there afterwards.
#[test]
fn a_first_write_survives_zeros_beside_it() {
    let _logs = ShortLogs::new(None);
    let config = Config { requests: 0, ..tiny() };
    for seed in 0..SEEDS {
        let mut rng = Rng::with_seed(seed);
        let content = new_image(&config, &mut rng);
        let mut world = World::open(config.clone(), content, config.oracle(), rng);
        world.request(Op::Write { durable: false }, 0, 4096);
        world.request(Op::WriteZeroes { keep_space: true }, u64::from(config.image.block_size) / 2, 4096);
        world.drain();
        world.request(Op::Read, 0, 4096);
        world.drain();
    }
}

/// QEMU reads no entry of more than 126 descriptors.
#[test]
fn others_can_read_every_entry() {
    let mut config = Config::small();
    config.image.virtual_size = 1 << 40;
    config.image.log_length = 2 << 20;
    config.requests = 0;
    let mut rng = Rng::with_seed(1);
    let content = new_image(&config, &mut rng);
    let mut world = World::open(config.clone(), content, config.oracle(), rng);
    for page in 0..160 {
        world.request(Op::Write { durable: false }, (page * SLOTS_PER_PAGE) << 20, 4096);
        world.drain();
    }
    let file = world.cut_file();
    let log = 1 << 20..(1 << 20) + u64::from(config.image.log_length);
    let mut longest = 0;
    for (_, page) in file.stored().filter(|(at, page)| log.contains(at) && page.starts_with(b"loge")) {
        longest = longest.max(u32::from_le_bytes(page[24..28].try_into().expect("four bytes")));
    }
    assert!(longest >= 126, "the pages did not fill an entry: {longest}");
    if longest > 126 {
        violated(format!("an entry has {longest} descriptors"));
    }
}

/// What an entry before the Tail changed may since have become something else.
#[test]
fn entries_before_the_tail_are_not_replayed() {
    let _logs = ShortLogs::new(None);
    let (config, file, bat) = with_log(|bat, length| {
        let stale = NewPage { tail: 0, file_offset: bat, first_word: length | 6 };
        vec![stale, NewPage { tail: 8192, file_offset: bat + 4096, first_word: 0 }]
    });
    let replayed = open(&config, &file).expect("the log is valid");
    if replayed.map.load(0).entry.0 != 0 {
        violated(format!("an entry before the Tail was replayed over the BAT at {bat}"));
    }
}

/// Our own logs name no space that a lost length takes away; others' do.
#[test]
fn a_length_that_the_log_asks_for_is_restored() {
    let _logs = ShortLogs::new(None);
    let (config, file, _) =
        with_log(|bat, length| vec![NewPage { tail: 0, file_offset: bat, first_word: length | 6 }]);
    match open(&config, &file) {
        Ok(image) if image.layout.file_length > file.length => {}
        Ok(_) => violated("the file was not extended".into()),
        Err(error) => violated(format!("a log that extends the file is not replayed: {error}")),
    }
}

/// A daemon that leaves a log is killed, and so are its successors at these steps of their openings. Whether
/// one of them was killed.
fn kill_successors(steps: &[usize]) -> bool {
    let config = Config { requests: 0, ..tiny() };
    let mut rng = Rng::with_seed(1);
    let content = new_image(&config, &mut rng);
    let mut world = World::open(config.clone(), content, config.oracle(), rng);
    for (op, length) in [(Op::Write { durable: false }, 4096), (Op::Flush, 0)] {
        world.request(op, 0, length);
        world.drain();
    }
    world.die_again(|_, deaths| steps.get(deaths as usize - 1).copied());
    world.close();
    world.marks.count("deaths in a recovery") > 0
}

/// The first one may have announced a FileWriteGuid, and written it; the second one another. Both come once
/// the log was read, in the second half of an opening.
#[test]
fn two_successors_may_be_killed_at_any_step() {
    let _logs = ShortLogs::new(None);
    let steps = (0..1000).find(|step| !kill_successors(&[*step])).expect("an opening ends");
    assert!(steps > 30, "no log was replayed: {steps}");
    let later = steps / 2..steps;
    for (first, second) in later.clone().flat_map(|first| later.clone().map(move |second| (first, second))) {
        kill_successors(&[first, second]);
    }
}

/// The session file outlives a power cut, names the right image and knows its FileWriteGuid: what it maps was
/// never durable.
#[test]
fn a_session_from_before_a_power_cut_is_not_taken_over() {
    let _logs = ShortLogs::new(None);
    let config = Config { requests: 0, can_punch: false, ..Config::small() };
    let mut rng = Rng::with_seed(1);
    let content = new_image(&config, &mut rng);
    let mut world = World::open(config.clone(), content, config.oracle(), rng.fork());
    for block in [0, 1] {
        world.request(Op::Write { durable: false }, block << 20, 4096);
        world.drain();
    }
    world.request(Op::Discard, 0, 1 << 20);
    world.drain();
    let (content, oracle) = (world.close(), world.oracle.clone());
    // The new block gets space that another block had; nothing of it is flushed.
    let mut world = World::open(config.clone(), content, oracle, rng.fork());
    world.request(Op::Write { durable: false }, (2 << 20) + (512 << 10), 4096);
    world.drain();
    let memory = world.memory().clone();
    let after_cut = world.disk().at_risk(|durable, _, _| durable.clone());
    let disk = SimDisk::new(after_cut, true, false, 512);
    let image = block_on(Image::read(&disk)).expect("an image");
    let carried = image.header.header.file_write_guid;
    if memory.check(&image.owner(place(2)), carried) == Err(Mismatch::OtherBoot) {
        return;
    }
    let resumed = block_on(WritableImage::resume(&disk, memory, carried, || Uuid::from_u128(8)));
    let entry = resumed.expect("nothing else shows that it is too old").map.load(2).entry;
    let mut bytes = vec![0; 512];
    disk.content().read(entry.offset(), &mut bytes);
    violated(format!("the guest reads {:?} where it never wrote", decode(2 << 11, &bytes)));
}

/// Memory of a session as its maker has left it; its word `number` is changed then.
fn changed_session(number: usize, change: impl Fn(u64) -> u64) -> Result<(), Mismatch> {
    let config = Config::small();
    let disk = SimDisk::new(new_image(&config, &mut Rng::with_seed(1)), true, true, 512);
    let mut image = block_on(Image::open_for_writing(&disk, || Uuid::from_u128(1))).expect("a new image");
    let count = SessionMemory::words_for(image.map.geometry());
    let words: &[AtomicU64] = (0..count).map(|_| AtomicU64::new(0)).collect::<Vec<_>>().leak();
    let owner = image.owner(place(1));
    let memory =
        SessionMemory::shared(SharedWords::of(words, Arc::new(())), Arc::new(|_| Ok(())), Arc::new(Some));
    image.start_session(memory.clone(), &owner).expect("there is room");
    memory.check(&owner, image.header.header.file_write_guid).expect("it is whole");
    words[number].store(change(words[number].load(Ordering::Relaxed)), Ordering::Relaxed);
    memory.check(&owner, image.header.header.file_write_guid)
}

/// What only another version can read must not be given up as if it were nothing.
#[test]
fn a_session_of_another_layout_is_told_apart() {
    let found = changed_session(1, |version| version + 1);
    if found != Err(Mismatch::Version(VERSION + 1)) {
        violated(format!("a session of another layout is {found:?}"));
    }
}

/// What is damaged may be all that was acknowledged: it must not be taken for another image's.
#[test]
fn a_damaged_session_is_told_apart() {
    let found = changed_session(8, |half_of_disk_id| half_of_disk_id ^ 1);
    if found != Err(Mismatch::Damaged("header")) {
        violated(format!("a damaged session is {found:?}"));
    }
}

/// A log entry that changes one page.
struct NewPage {
    tail: u32,
    file_offset: u64,
    first_word: u64,
}

/// A new image with a log of `entries`, which get the BAT's offset and the file's length; they ask for 1
/// MiB more.
fn with_log(entries: impl FnOnce(u64, u64) -> Vec<NewPage>) -> (Config, Store, u64) {
    let mut config = tiny();
    config.image.virtual_size = 600 << 20;
    let mut rng = Rng::with_seed(1);
    let disk = SimDisk::new(new_image(&config, &mut rng), true, true, 512);
    let image = block_on(Image::open_for_writing(&disk, || Uuid::from_u128(1))).expect("a new image");
    let (bat, length) = (image.layout.bat.offset, image.layout.file_length);
    let mut header = image.header.header.clone();
    header.log_guid = Uuid::from_u128(2);
    for (number, NewPage { tail, file_offset, first_word }) in (0..).zip(entries(bat, length)) {
        let mut page = Box::new([0; 4096]);
        page[..8].copy_from_slice(&first_word.to_le_bytes());
        let entry = NewEntry {
            sequence_number: number + 1,
            tail,
            log_guid: header.log_guid,
            flushed_file_offset: length,
            last_file_offset: length + (1 << 20),
            changes: &[Change::Data { file_offset, page }],
        };
        let place = header.log_offset + number * 8192;
        block_on(disk.write(place, Buffer::copy_of(&entry.encode()))).expect("room");
    }
    header.sequence_number += 1;
    let slot = header::OFFSETS[image.header.slot ^ 1];
    block_on(disk.write(slot, Buffer::copy_of(&header.encode()))).expect("room");
    (config, disk.content(), bat)
}

fn open(config: &Config, file: &Store) -> vhdx_ublk::error::Result<WritableImage> {
    let sector = config.image.logical_sector_size;
    let disk = SimDisk::new(file.clone(), true, config.can_punch, sector);
    block_on(Image::open_for_writing(&disk, || Uuid::from_u128(3)))
}
