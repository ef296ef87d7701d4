//! A museum of public bugs: what corrupted or refused images elsewhere must never happen here. Each test
//! names its exhibit. Bugs in reading a log are shown in `replay.rs`.

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::engine::front::Op;
use vhdx_ublk::error::Kind;
use vhdx_ublk::image::{FoundLog, Image, SLOTS_PER_PAGE};

use crate::craft::{
    self, BAT, Change, Craft, END, HEADERS, LOG, LOG_GUID, LogEntry, METADATA, MIB, REGION_TABLES, page,
};
use crate::qemu;
use crate::sim::disk::{Effect, Fault, Injection, Owner, Profile, SimDisk};
use crate::sim::oracle::Oracle;
use crate::sim::store::Store;
use crate::sim::tasks::block_on;
use crate::sim::world::{Activation, Config, World, check_recovery, new_image};

/// A BAT entry's state when its block has all its data in the file.
const PRESENT: u64 = 6;

/// A world that does nothing but what the test asks.
fn quiet(config: &Config) -> World {
    let content = new_image(config, &mut Rng::with_seed(3));
    reopened(config, content, config.oracle(), 4)
}

fn reopened(config: &Config, content: Store, oracle: Oracle, seed: u64) -> World {
    World::open(Config { requests: 0, ..config.clone() }, content, oracle, Rng::with_seed(seed))
}

fn write(world: &mut World, offset: u64) {
    world.request(Op::Write { durable: false }, offset, 4096);
    world.drain();
}

fn flush(world: &mut World) {
    world.request(Op::Flush, 0, 0);
    world.drain();
}

/// Opens `content` as the next process would; every sector holds what it may.
fn check(config: &Config, content: &Store, oracle: &mut Oracle) -> Store {
    let checked = check_recovery(config, content, oracle, &mut Rng::with_seed(5), &mut Activation::default());
    checked.unwrap_or_else(|why| panic!("{why}"))
}

/// What QEMU finds wrong with an image; nothing if it is not here.
fn qemu_accepts(content: &Store) {
    if !qemu::is_here() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("image.vhdx");
    content.save(&path).expect("room");
    let mut command = qemu::command("qemu-img");
    qemu::run(command.args(["check", "-q", "-f", "vhdx"]).arg(&path)).expect("QEMU finds no error");
}

fn slot(content: &Store, number: u64) -> u64 {
    let mut word = [0; 8];
    content.read(BAT + number * 8, &mut word);
    u64::from_le_bytes(word)
}

/// An image with block 0 at its end, filled with one page over and over, and a log.
fn image_with_block(entries: &[(u32, LogEntry)]) -> Craft {
    let mut image = Craft::new(&Config::small());
    image.file.resize(END + MIB);
    image.set_slot(0, END | PRESENT);
    for number in 0..256 {
        image.write(END + number * 4096, &page(b'p'));
    }
    image.name_log(LOG_GUID);
    for (sector, entry) in entries {
        image.write_log(*sector, &entry.encode());
    }
    image
}

fn spare_page(number: u64, fill: u8) -> Change {
    Change::Page { at: BAT + 4096 * number, fill }
}

/// After a replay in place, the spare pages of the BAT region hold this.
fn replays_to(image: &Craft, pages: &[(u64, u8)]) -> Craft {
    let (_, disk) = image.open_writable().expect("the log is replayed");
    let after = Craft { file: disk.content() };
    for &(number, fill) in pages {
        assert!(after.read(BAT + 4096 * number, 4096) == page(fill), "page {number}");
    }
    after
}

// --- QEMU: the log ---

/// QEMU `vhdx_log_read_sectors`: an entry with more than 126 descriptors makes it refuse the image.
#[test]
fn no_entry_has_descriptors_that_qemu_cannot_read() {
    let mut config = Config::small();
    config.image.virtual_size = 1 << 40;
    config.image.log_length = 4 << 20;
    let mut world = quiet(&config);
    for number in 0..240 {
        write(&mut world, (number * SLOTS_PER_PAGE) << 20);
    }
    flush(&mut world);
    let image = Craft { file: world.disk().content() };
    let mut largest = 0;
    for sector in 0..1024 {
        let header = image.read(LOG + sector * 4096, 32);
        if header.starts_with(b"loge") {
            largest = largest.max(u32::from_le_bytes(header[24..28].try_into().expect("four bytes")));
        }
    }
    assert_eq!(largest, 126, "of 240 pages at once, an entry takes what QEMU can read and no more");
}

/// QEMU `vhdx_log_search`: entries before the Tail are replayed over space that has become payload since.
#[test]
fn an_old_entry_is_not_replayed_over_a_page_that_has_become_payload() {
    let old = LogEntry::new(1, 0, &[Change::Page { at: END, fill: b'x' }]);
    let new = LogEntry::new(2, 2, &[spare_page(1, b'n')]);
    let after = replays_to(&image_with_block(&[(0, old), (2, new)]), &[(1, b'n')]);
    assert!(after.read(END, 4096) == page(b'p'));
}

/// QEMU `vhdx_log_search`: sequences are compared by their first entries.
#[test]
fn the_sequence_that_ends_last_counts_and_not_the_one_that_starts_last() {
    let mut entries: Vec<(u32, LogEntry)> = (0..10_u32)
        .map(|index| (2 * index, LogEntry::new(1 + u64::from(index), 0, &[spare_page(1, b'a')])))
        .collect();
    entries.push((100, LogEntry::new(8, 100, &[spare_page(1, b'x')])));
    replays_to(&image_with_block(&entries), &[(1, b'a')]);
}

/// QEMU `vhdx_log_read_desc`: one bad descriptor in a torn entry makes the whole image unopenable.
#[test]
fn a_bad_descriptor_makes_an_entry_invalid_and_not_the_image() {
    let good = LogEntry::new(1, 0, &[spare_page(1, b'g')]);
    let bad = LogEntry::new(2, 0, &[spare_page(1, b'x')]);
    for (at, with) in [(64, *b"dxxx"), (64 + 16, [1, 2, 0, 0]), (64 + 24, [9, 0, 0, 0])] {
        for resealed in [false, true] {
            let mut bytes = bad.encode();
            bytes[at..at + 4].copy_from_slice(&with);
            if resealed {
                craft::seal(&mut bytes);
            }
            let mut image = image_with_block(&[(0, good.clone())]);
            image.write_log(2, &bytes);
            replays_to(&image, &[(1, b'g')]);
        }
    }
}

/// QEMU `vhdx_validate_log_entry`: after a bad entry the search continues behind the length that it claims.
#[test]
fn an_entry_inside_the_claimed_length_of_a_torn_one_is_found() {
    let pages: Vec<Change> = (2..42).map(|number| spare_page(number, b'x')).collect();
    let mut image = image_with_block(&[(0, LogEntry::new(5, 0, &pages))]);
    image.write_log(2, &LogEntry::new(6, 2, &[spare_page(1, b'g')]).encode());
    replays_to(&image, &[(1, b'g')]);
}

/// QEMU `vhdx_log_write`: the headers name a log before its first entry is there; Windows calls that corrupt.
#[test]
fn no_cut_leaves_a_log_that_is_named_and_empty() {
    for seed in 0..20 {
        let config = Config::small();
        let content = new_image(&config, &mut Rng::with_seed(seed));
        let mut world = reopened(&config, content, config.oracle(), seed);
        world.request(Op::Write { durable: true }, 0, 4096);
        while world.step() {
            world.cut(1);
        }
    }
}

/// QEMU `vhdx_log_flush` gives a new DataWriteGuid, which cuts off every child; openvmm leaves the
/// FileWriteGuid.
#[test]
fn a_replay_announces_itself_and_leaves_the_children_their_link() {
    let image = image_with_block(&[(0, LogEntry::new(1, 0, &[spare_page(1, b'a')]))]);
    let (before, _) = image.open_read_only().expect("replayed in memory");
    let (after, _) = image.open_writable().expect("replayed in place");
    let (before, after) = (&before.header.header, &after.header.header);
    assert_eq!(before.data_write_guid, after.data_write_guid);
    assert_ne!(before.file_write_guid, after.file_write_guid);
}

/// QEMU `vhdx_log_flush_desc`: zeros of 1 MiB cost 256 synced writes.
#[test]
fn a_replay_costs_the_same_syncs_whatever_it_replays() {
    let zeros = Change::Zeros { at: BAT + 4096, length: MIB - 4096 };
    let image = image_with_block(&[(0, LogEntry::new(1, 0, &[zeros]))]);
    let (_, disk) = image.open_writable().expect("replayed in place");
    assert_eq!(disk.activity().syncs, 6, "what others wrote before, two headers, the changes, two headers");
    assert_eq!(disk.activity().writes, 4, "the headers");
}

/// QEMU `vhdx_log_flush` ignores whether the log could be emptied.
#[test]
fn a_replay_that_fails_anywhere_is_an_error_and_can_be_repeated() {
    let image = image_with_block(&[(0, LogEntry::new(1, 0, &[spare_page(1, b'a'), spare_page(2, b'b')]))]);
    let changes: fn(Owner, &Effect) -> bool =
        |_, effect| !matches!(effect, Effect::Read { .. } | Effect::Given { .. });
    for after in 0..11 {
        let disk = SimDisk::new(image.file.clone(), true, true, 512);
        let fault = Fault::Error { errno: libc::EIO, times: 1 };
        disk.inject(Injection { fault, hits: changes, after, seed: after });
        let opened = block_on(Image::open_for_writing(&disk, || Uuid::from_u128(9)));
        assert!(disk.struck().is_some(), "operation {after} of 11: six writes and five syncs");
        assert_eq!(opened.err().map(|error| error.kind()), Some(Kind::Io), "operation {after}");
        for profile in Profile::ALL {
            let left = Craft { file: disk.cut(profile, &mut Rng::with_seed(after)) };
            replays_or_did(&left);
        }
    }
}

/// The log has been replayed, or is still there.
fn replays_or_did(image: &Craft) {
    let (_, disk) = image.open_writable().expect("a replay can be repeated");
    let after = Craft { file: disk.content() };
    assert!(after.read(BAT + 4096, 4096) == page(b'a') && after.read(BAT + 8192, 4096) == page(b'b'));
    let (again, _) = after.open_read_only().expect("a clean image");
    assert_eq!(again.found_log, FoundLog::Clean);
}

// --- QEMU: the image ---

/// QEMU before 2.0: block and sector sizes from the file were divisors (CVE-2014-0148).
#[test]
fn sizes_that_the_format_does_not_have_are_refused() {
    let items = METADATA + (64 << 10);
    let good = Craft::new(&Config::small());
    let places = (0..64_u64).map(|word| items + 4 * word);
    let is = |value: u32| {
        let mut found = places.clone().filter(|&at| good.read(at, 4) == value.to_le_bytes());
        found.next().expect("the item is there")
    };
    let (block_size, sector_size) = (is(1 << 20), is(512));
    for (at, value) in
        [(block_size, 0), (block_size, 1), (block_size, 512 << 20), (sector_size, 0), (sector_size, 1 << 31)]
    {
        let mut image = good.clone();
        image.write(at, &u32::to_le_bytes(value));
        let Err(error) = image.open_writable() else { panic!("{value} at {at}: opened") };
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    }
}

/// QEMU 1.7: a ZERO block with an offset, which Hyper-V takes for corruption (fixed by commit cdf9634b).
#[test]
fn a_block_of_zeros_names_no_space() {
    let config = Config::small();
    let mut world = quiet(&config);
    write(&mut world, 0);
    flush(&mut world);
    world.request(Op::WriteZeroes { keep_space: false }, 0, 2 << 20);
    flush(&mut world);
    let content = world.close();
    assert_eq!((slot(&content, 0), slot(&content, 1)), (2, 2), "ZERO, and nothing else");
    qemu_accepts(&content);
}

/// `Disk2VHD` writes two equal headers, which QEMU refused (fixed by commit 69060461).
#[test]
fn twin_headers_are_read_and_written_apart() {
    let mut image = Craft::new(&Config::small());
    let first = image.read(HEADERS[0], 4096);
    image.write(HEADERS[1], &first);
    let config = Config::small();
    let mut world = reopened(&config, image.file, config.oracle(), 1);
    write(&mut world, 0);
    let content = Craft { file: world.close() };
    assert_ne!(content.read(HEADERS[0], 4096), content.read(HEADERS[1], 4096));
    check(&config, &content.file, &mut world.oracle);
}

/// QEMU reads the first region table only.
#[test]
fn one_good_region_table_is_enough() {
    let config = Config::small();
    for offset in REGION_TABLES {
        let mut image = Craft::new(&config);
        image.write(offset + 100, b"garbage");
        let mut world = reopened(&config, image.file, config.oracle(), 1);
        write(&mut world, 0);
        let content = world.close();
        check(&config, &content, &mut world.oracle);
    }
}

/// QEMU issue 727: BAT entries written eight bytes off left garbage in slots that no reader may use.
#[test]
fn garbage_in_a_bitmap_slot_is_neither_obeyed_nor_changed() {
    let mut config = Config::small();
    config.image.virtual_size = 5 << 30;
    config.blocks = vec![4094, 4095, 4096, 4097];
    let mut image = Craft::new(&config);
    let garbage = (7 << 40) | PRESENT;
    image.set_slot(4096, garbage);
    let mut world = reopened(&config, image.file, config.oracle(), 1);
    config.blocks.iter().for_each(|block| write(&mut world, block << 20));
    flush(&mut world);
    let content = world.close();
    assert_eq!(slot(&content, 4096), garbage);
    check(&config, &content, &mut world.oracle);
}

/// QEMU writes fixed images whose file ends inside the last block; openvmm refuses them, and QEMU's own
/// tolerance counts bitmap slots as blocks past the first chunk.
#[test]
fn a_file_that_ends_inside_its_last_block_is_completed() {
    for blocks in [2, 200] {
        let mut config = Config::small();
        config.image.fixed = true;
        config.image.block_size = 32 << 20;
        config.image.virtual_size = blocks * (32 << 20) - (20 << 20);
        config.blocks = vec![blocks - 1];
        let mut file = new_image(&config, &mut Rng::with_seed(1));
        file.resize(file.length - (20 << 20));
        let mut world = reopened(&config, file, config.oracle(), 1);
        let last = config.image.virtual_size - 4096;
        world.request(Op::Read, last, 4096);
        world.drain();
        write(&mut world, last);
        flush(&mut world);
        world.cut(20);
        let content = world.close();
        check(&config, &content, &mut world.oracle);
        qemu_accepts(&content);
    }
}

/// QEMU makes fixed images whose blocks are all ZERO and whose space nothing refers to, and grows them again.
#[test]
fn the_space_of_a_fixed_image_is_used_and_not_added_to() {
    if !qemu::is_here() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("fixed.vhdx");
    let mut command = qemu::command("qemu-img");
    command.args(["create", "-q", "-f", "vhdx", "-o", "subformat=fixed,block_size=1M"]);
    qemu::run(command.arg(&path).arg("16M")).expect("made");
    let bytes = std::fs::read(&path).expect("readable");
    let mut file = Store::default();
    file.resize(bytes.len() as u64);
    file.write(0, &bytes);
    let mut config = Config::small();
    config.image.virtual_size = 16 << 20;
    config.image.fixed = true;
    let mut world = reopened(&config, file, config.oracle(), 1);
    (0..16).for_each(|block| write(&mut world, block << 20));
    flush(&mut world);
    assert_eq!(world.counters().grows, 0, "there was room for every block");
    let content = world.close();
    check(&config, &content, &mut world.oracle);
    qemu_accepts(&content);
}

/// QEMU allocates at the end of the file only: space that was given back is never used again.
#[test]
fn space_that_was_given_back_is_used_again() {
    let config = Config::small();
    let mut world = quiet(&config);
    for round in 0..100 {
        write(&mut world, (round % 6) << 20);
        flush(&mut world);
        world.request(Op::Discard, (round % 6) << 20, 1 << 20);
        flush(&mut world);
    }
    assert_eq!(world.counters().grants, 100);
    assert_eq!(world.counters().grows, 1);
    assert_eq!(world.close().length, END, "and the tail is trimmed");
}

/// QEMU publishes a mapping before its entry is logged and lets another writer flush in between; openvmm pads
/// a new block after publishing it. Either loses the second writer's sectors.
#[test]
fn the_second_writer_of_a_new_block_keeps_what_it_flushed() {
    for seed in 0..60 {
        let config = Config::small();
        let content = new_image(&config, &mut Rng::with_seed(seed));
        let mut world = reopened(&config, content, config.oracle(), seed);
        world.request(Op::Write { durable: false }, 0, 512);
        world.request(Op::Write { durable: true }, 4096, 512);
        world.request(Op::Write { durable: true }, 8192, 512);
        while world.step() {
            world.cut(1);
        }
        assert_eq!(world.counters().grants, 1);
    }
}

// --- cloud-hypervisor ---

/// cloud-hypervisor #6844: an image is unusable after its first use.
#[test]
fn an_image_is_used_again_and_again() {
    let config = Config::small();
    let mut content = new_image(&config, &mut Rng::with_seed(1));
    let mut oracle = config.oracle();
    for seed in 0..20 {
        let mut world = reopened(&config, content, oracle, seed);
        write(&mut world, (seed % 6) << 20);
        content = world.close();
        oracle = world.oracle.clone();
    }
    qemu_accepts(&content);
    check(&config, &content, &mut oracle);
}

/// cloud-hypervisor #7665: several queues corrupt an image.
#[test]
fn many_queues_write_one_image() {
    for seed in 0..8 {
        let config = Config { fronts: 8, requests: 300, ..Config::small() };
        let content = new_image(&config, &mut Rng::with_seed(seed));
        let mut world = World::open(config.clone(), content, config.oracle(), Rng::with_seed(seed));
        world.drain();
        let content = world.close();
        check(&config, &content, &mut world.oracle);
    }
}

/// cloud-hypervisor #8606: two queues allocate one block twice, and one of the two spaces is lost.
#[test]
fn two_queues_that_meet_in_a_new_block_get_one_space() {
    for seed in 0..60 {
        let config = Config { fronts: 4, ..Config::small() };
        let content = new_image(&config, &mut Rng::with_seed(seed));
        let mut world = reopened(&config, content, config.oracle(), seed);
        for place in 0..8 {
            world.request(Op::Write { durable: false }, place * 8192, 8192);
        }
        world.drain();
        assert_eq!(world.counters().grants, 1, "seed {seed}");
        assert_eq!(world.close().length, END + MIB, "seed {seed}");
    }
}

/// cloud-hypervisor, libvhdi and FreeBSD's mkimg have taken the BAT for a plain array: wrong past 4 GiB.
#[test]
fn blocks_past_the_first_chunk_lie_one_slot_further() {
    let mut config = Config::small();
    config.image.virtual_size = 9 << 30;
    let mut world = quiet(&config);
    let blocks = [4095, 4096, 8191, 8192];
    for block in blocks {
        write(&mut world, block << 20);
    }
    let content = world.close();
    for (block, expected) in blocks.into_iter().zip([4095, 4097, 8192, 8194]) {
        assert_eq!(slot(&content, expected) & 7, PRESENT, "block {block}");
    }
    assert_eq!((slot(&content, 4096), slot(&content, 8193)), (0, 0), "bitmap slots");
    qemu_accepts(&content);
}

/// cloud-hypervisor's flush does nothing; the loop example of libublk has called `sync_file_range`.
#[test]
fn every_flush_syncs() {
    let mut world = quiet(&Config::small());
    write(&mut world, 0);
    for _ in 0..5 {
        let before = world.disk().activity().syncs;
        flush(&mut world);
        assert!(world.disk().activity().syncs > before);
    }
}

// --- openvmm, and others that log ---

/// openvmm: both file lengths in log entries are those at open, so a file that has grown since may be short.
#[test]
fn an_entry_names_the_length_that_its_mappings_need() {
    let mut config = Config::small();
    config.image.virtual_size = 1 << 30;
    config.image.block_size = 32 << 20;
    let mut world = quiet(&config);
    let mut before = 0;
    for block in 0..6 {
        write(&mut world, block * (32 << 20));
        flush(&mut world);
        let image = Craft { file: world.disk().content() };
        let entries = (0..256).map(|sector| image.read(LOG + sector * 4096, 64));
        let lengths = entries.filter(|entry| entry.starts_with(b"loge")).map(|entry| {
            let field = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("eight bytes"));
            (field(16), field(48), field(56))
        });
        let (_, flushed, last) = lengths.max().expect("something was logged");
        let needed = (slot(&image.file, block) & !0xf_ffff) + (32 << 20);
        assert!(last >= needed, "block {block} ends at {needed}, the entry says {last}");
        // Space that is set aside for first writes is in the length, too.
        assert!(last >= before && flushed <= image.file.length);
        before = last;
        world.cut(10);
    }
}

/// redb: after a crash the file is as short as before it grew, and its header knows of the growth.
#[test]
fn growth_that_is_lost_loses_nothing_flushed() {
    for seed in 0..20 {
        let mut config = Config { requests: 60, ..Config::small() };
        config.image.block_size = 8 << 20;
        config.image.virtual_size = 256 << 20;
        config.blocks = (0..32).collect();
        let content = new_image(&config, &mut Rng::with_seed(seed));
        let mut world = World::open(config.clone(), content, config.oracle(), Rng::with_seed(seed));
        let mut rng = Rng::with_seed(seed);
        while world.step() {
            if rng.u32(..20) == 0 {
                let content = world.disk().cut(Profile::Length, &mut rng);
                check(&config, &content, &mut world.oracle.clone());
            }
        }
        assert!(world.counters().grows > 0);
    }
}

/// raft-wal #10 and cqlite #1390: a half-written entry at the end of a log hides what is appended after it.
#[test]
fn what_is_logged_after_a_torn_entry_survives() {
    let config = Config::small();
    for seed in 0..30 {
        let content = new_image(&config, &mut Rng::with_seed(seed));
        let mut world = reopened(&config, content, config.oracle(), seed);
        write(&mut world, 0);
        flush(&mut world);
        world.request(Op::Write { durable: true }, 1 << 20, 4096);
        (0..8 + seed).take_while(|_| world.step()).for_each(drop);
        let (content, oracle) = world.cut(1).expect("a crash state");
        // Another life has GUIDs of its own.
        let mut world = reopened(&config, content, oracle, 1000 + seed);
        write(&mut world, 2 << 20);
        flush(&mut world);
        world.cut(10);
    }
}
