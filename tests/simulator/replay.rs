//! Promise defended here: a log is replayed by the format's rules, in place and in memory alike, whatever
//! state it was left in. Where QEMU follows the rules too, it judges the same logs.
//!
//! The log changes pages of the BAT region that no slot of the small disk reaches: whoever replays it leaves
//! them in the file for all to compare.

use std::collections::BTreeMap;

use uuid::Uuid;
use vhdx_ublk::error::Kind;
use vhdx_ublk::image::FoundLog;

use crate::craft::{self, BAT, Change, Craft, END, LOG, LOG_GUID, LOG_SECTORS, LogEntry, MIB, SECTOR, page};
use crate::qemu;
use crate::sim::world::Config;

/// What the pages hold before the replay.
const OLD: u8 = 0xee;

/// The pages of the BAT region behind the one that is in use.
const PAGES: std::ops::Range<u64> = 1..256;

fn at(page: u64) -> u64 {
    assert!(PAGES.contains(&page));
    BAT + page * 4096
}

fn data(page: u64, fill: u8) -> Change {
    Change::Page { at: at(page), fill }
}

fn zeros(page: u64, count: u64) -> Change {
    Change::Zeros { at: at(page), length: count * 4096 }
}

/// An entry that fills pages: (page, what with).
fn entry(sequence: u64, tail: u32, pages: &[(u64, u8)]) -> LogEntry {
    let changes: Vec<Change> = pages.iter().map(|&(page, fill)| data(page, fill)).collect();
    LogEntry::new(sequence, tail, &changes)
}

/// An image whose log holds these entries, each from a sector on.
fn ring(entries: &[(u32, LogEntry)]) -> Craft {
    let mut image = Craft::new(&Config::small());
    for page in PAGES {
        image.write(at(page), &craft::page(OLD));
    }
    image.name_log(LOG_GUID);
    for (sector, entry) in entries {
        image.write_log(*sector, &entry.encode());
    }
    image
}

/// What the pages hold after the replay: these, and all others what they held before. None is zeros.
struct Expected(BTreeMap<u64, Vec<u8>>);

impl Expected {
    fn new(changed: &[(u64, Option<u8>)]) -> Self {
        let mut pages: BTreeMap<u64, Vec<u8>> = PAGES.map(|number| (number, page(OLD))).collect();
        for &(number, fill) in changed {
            pages.insert(number, fill.map_or_else(|| vec![0; SECTOR], page));
        }
        Self(pages)
    }

    fn compare(&self, who: &str, read: impl Fn(u64) -> Vec<u8>) {
        for (number, bytes) in &self.0 {
            let found = read(at(*number));
            assert!(found == *bytes, "{who}: page {number} begins with {}, not with {}", found[0], bytes[0]);
        }
    }
}

fn some(pages: &[(u64, u8)]) -> Vec<(u64, Option<u8>)> {
    pages.iter().map(|&(page, fill)| (page, Some(fill))).collect()
}

/// Replays the log in memory and in place; both show what is expected. Returns the file's length afterwards.
fn replays_to(image: &Craft, changed: &[(u64, Option<u8>)]) -> u64 {
    let expected = Expected::new(changed);
    let (in_memory, _) = image.open_read_only().expect("replayed in memory");
    expected.compare("in memory", |offset| image.seen(&in_memory, offset, SECTOR));
    let (in_place, disk) = image.open_writable().expect("replayed in place");
    assert!(matches!(in_place.found_log, FoundLog::Dirty(_)));
    let after = Craft { file: disk.content() };
    expected.compare("in place", |offset| after.read(offset, SECTOR));
    assert_eq!(in_memory.layout.file_length, after.file.length, "both give the file one length");
    let (again, _) = after.open_writable().expect("what was replayed opens");
    assert_eq!(again.found_log, FoundLog::Clean, "a log is replayed once");
    after.file.length
}

/// As [`replays_to`], and QEMU leaves the same pages.
fn all_replay_to(image: &Craft, changed: &[(u64, Option<u8>)]) {
    replays_to(image, changed);
    if !qemu::is_here() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("dirty.vhdx");
    image.file.save(&path).expect("room");
    qemu::replay(&path).expect("QEMU replays it");
    let bytes = std::fs::read(&path).expect("readable");
    Expected::new(changed).compare("QEMU", |offset| {
        let offset = usize::try_from(offset).expect("small");
        bytes[offset..offset + SECTOR].to_vec()
    });
}

/// No reader opens it, for this reason; it stays as it is.
fn is_refused(image: &Craft, kind: Kind) {
    for error in [image.open_read_only().err(), image.open_writable().err()] {
        let error = error.expect("it must not open");
        assert_eq!((error.kind(), error.structure()), (kind, Some("log")), "{error}");
    }
}

#[test]
fn one_entry() {
    all_replay_to(&ring(&[(0, entry(1, 0, &[(1, b'a')]))]), &some(&[(1, b'a')]));
    all_replay_to(&ring(&[(77, entry(900, 77, &[(1, b'a'), (9, b'b')]))]), &some(&[(1, b'a'), (9, b'b')]));
}

#[test]
fn three_entries_in_order() {
    let log = ring(&[
        (0, entry(1, 0, &[(1, b'a'), (2, b'a')])),
        (3, entry(2, 0, &[(2, b'b'), (3, b'b')])),
        (6, entry(3, 0, &[(3, b'c')])),
    ]);
    all_replay_to(&log, &some(&[(1, b'a'), (2, b'b'), (3, b'c')]));
}

#[test]
fn entries_that_fill_the_ring() {
    let number = |index: u32| 1 + u64::from(index);
    let pages = |count: u32| -> Vec<(u64, u8)> {
        (0..count).map(|index| (number(index), number(index).to_le_bytes()[0])).collect()
    };
    let log = |count: u32| {
        let all = pages(count);
        let entries =
            (0..count).zip(&all).map(|(index, page)| (2 * index, entry(number(index), 0, &[*page])));
        ring(&entries.collect::<Vec<_>>())
    };
    all_replay_to(&log(LOG_SECTORS / 2 - 1), &some(&pages(LOG_SECTORS / 2 - 1)));
    // To the last sector QEMU loses the first entry: it is not asked.
    replays_to(&log(LOG_SECTORS / 2), &some(&pages(LOG_SECTORS / 2)));
}

/// QEMU starts at sector 0 and takes the newest entry there for all of the sequence: it is not asked.
#[test]
fn a_sequence_goes_on_round_the_rings_end() {
    let log = ring(&[
        (252, entry(7, 252, &[(1, b'a')])),
        (254, entry(8, 252, &[(1, b'b')])),
        (0, entry(9, 252, &[(2, b'c')])),
    ]);
    replays_to(&log, &some(&[(1, b'b'), (2, b'c')]));
}

#[test]
fn an_entry_goes_on_round_the_rings_end() {
    for start in 252..256 {
        let log = ring(&[(start, entry(7, start, &[(1, b'a'), (2, b'b'), (3, b'c'), (4, b'd')]))]);
        all_replay_to(&log, &some(&[(1, b'a'), (2, b'b'), (3, b'c'), (4, b'd')]));
    }
}

#[test]
fn an_older_sequence_before_or_behind_is_stale() {
    let (old, new) = (&[(1, b'o'), (2, b'o')], &[(2, b'n'), (3, b'n')]);
    all_replay_to(&ring(&[(0, entry(3, 0, old)), (20, entry(11, 20, new))]), &some(new));
    all_replay_to(&ring(&[(0, entry(11, 0, new)), (20, entry(3, 20, old))]), &some(new));
}

#[test]
fn another_logs_entries_are_stale() {
    let stale = LogEntry { guid: Uuid::from_u128(0x01d), ..entry(99, 0, &[(1, b'x')]) };
    let log =
        ring(&[(0, stale.clone()), (2, entry(1, 2, &[(2, b'a')])), (4, LogEntry { sequence: 2, ..stale })]);
    all_replay_to(&log, &some(&[(2, b'a')]));
}

#[test]
fn a_gap_in_the_sequence_numbers_ends_a_sequence() {
    let log = |tail| {
        ring(&[
            (0, entry(1, 0, &[(1, b'a')])),
            (2, entry(2, 0, &[(2, b'b')])),
            (4, entry(4, tail, &[(3, b'c')])),
        ])
    };
    // Behind the gap lies a sequence without its tail, or one of its own, which QEMU does not find.
    replays_to(&log(4), &some(&[(3, b'c')]));
    all_replay_to(&log(0), &some(&[(1, b'a'), (2, b'b')]));
}

#[test]
fn empty_entries_change_nothing() {
    all_replay_to(&ring(&[(0, entry(1, 0, &[]))]), &[]);
    let log = ring(&[(0, entry(1, 0, &[(1, b'a')])), (2, entry(2, 0, &[])), (3, entry(3, 0, &[(2, b'b')]))]);
    all_replay_to(&log, &some(&[(1, b'a'), (2, b'b')]));
    // The Tail has moved past everything before.
    replays_to(&ring(&[(0, entry(1, 0, &[(1, b'a')])), (2, entry(2, 2, &[]))]), &[]);
}

#[test]
fn zeros_and_pages_in_the_order_of_their_descriptors() {
    let zeroed = [(3, None), (4, None), (5, None)];
    all_replay_to(&ring(&[(0, LogEntry::new(1, 0, &[zeros(3, 3)]))]), &zeroed);
    let mixed = LogEntry::new(1, 0, &[data(7, b'a'), zeros(3, 3), data(8, b'b'), zeros(9, 1)]);
    all_replay_to(
        &ring(&[(0, mixed)]),
        &[&zeroed[..], &[(7, Some(b'a')), (8, Some(b'b')), (9, None)]].concat(),
    );
    let page_over_zeros = LogEntry::new(1, 0, &[zeros(3, 3), data(4, b'a')]);
    all_replay_to(&ring(&[(0, page_over_zeros)]), &[(3, None), (4, Some(b'a')), (5, None)]);
    let zeros_over_page = LogEntry::new(1, 0, &[data(4, b'a'), zeros(3, 3)]);
    all_replay_to(&ring(&[(0, zeros_over_page)]), &zeroed);
}

#[test]
fn of_a_page_twice_the_later_one_wins() {
    all_replay_to(&ring(&[(0, entry(1, 0, &[(1, b'a'), (1, b'b')]))]), &some(&[(1, b'b')]));
    let log = ring(&[(0, entry(1, 0, &[(1, b'a')])), (2, entry(2, 0, &[(1, b'b')]))]);
    all_replay_to(&log, &some(&[(1, b'b')]));
}

#[test]
fn the_file_gets_the_length_that_its_structures_need() {
    let longer = |length| LogEntry { last_file_offset: length, ..entry(1, 0, &[(1, b'a')]) };
    let odd = ring(&[(0, longer(6 * MIB + 4096))]);
    all_replay_to(&odd, &some(&[(1, b'a')]));
    assert_eq!(replays_to(&odd, &some(&[(1, b'a')])), 7 * MIB, "in whole MiB");
    // QEMU extends only what is no multiple of 1 MiB: it is not asked.
    assert_eq!(replays_to(&ring(&[(0, longer(9 * MIB))]), &some(&[(1, b'a')])), 9 * MIB);
    // A file is never shortened, and only the newest entry says how long it must be.
    let shorter = [(0, longer(20 * MIB)), (2, LogEntry { sequence: 2, ..longer(2 * MIB) })];
    assert_eq!(replays_to(&ring(&shorter), &some(&[(1, b'a')])), END);
}

#[test]
fn a_page_past_the_end_extends_the_file() {
    let mut far = LogEntry::new(1, 0, &[data(1, b'a')]);
    far.changes.push(Change::Page { at: 10 * MIB + 8192, fill: b'z' });
    let image = ring(&[(0, far)]);
    assert_eq!(replays_to(&image, &some(&[(1, b'a')])), 11 * MIB);
    let (_, disk) = image.open_writable().expect("replayed in place");
    assert_eq!(Craft { file: disk.content() }.read(10 * MIB + 8192, SECTOR), page(b'z'));
}

#[test]
fn a_torn_third_entry_never_happened() {
    let entries = [
        (0, entry(1, 0, &[(1, b'a')])),
        (2, entry(2, 0, &[(2, b'b')])),
        (4, entry(3, 0, &[(3, b'c'), (1, b'c')])),
    ];
    let expected = some(&[(1, b'a'), (2, b'b')]);
    let whole = ring(&entries);
    all_replay_to(&whole, &some(&[(1, b'c'), (2, b'b'), (3, b'c')]));
    let mut flipped = whole.clone();
    let byte = flipped.read(LOG + 5 * 4096 + 99, 1)[0];
    flipped.write(LOG + 5 * 4096 + 99, &[byte ^ 1]);
    all_replay_to(&flipped, &expected);
    // Each of its sectors lost alone: what was there before is there still.
    for lost in 4..7 {
        let mut torn = whole.clone();
        torn.write_log(lost, &[0; SECTOR]);
        all_replay_to(&torn, &expected);
        torn.write_log(lost, &page(0x33));
        all_replay_to(&torn, &expected);
    }
}

#[test]
fn a_file_shorter_than_its_newest_entry_says_is_refused() {
    let flushed =
        |sequence, length| LogEntry { flushed_file_offset: length, ..entry(sequence, 0, &[(1, b'a')]) };
    let image = ring(&[(0, flushed(1, END + MIB))]);
    is_refused(&image, Kind::Truncated);
    if qemu::is_here() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("short.vhdx");
        image.file.save(&path).expect("room");
        qemu::replay(&path).expect_err("QEMU refuses it too");
    }
    // An older one may: the file has been shortened since, by the rules. QEMU checks each: it is not asked.
    replays_to(&ring(&[(0, flushed(1, END + MIB)), (2, flushed(2, END))]), &some(&[(1, b'a')]));
}

/// QEMU refuses every one of these entries, which Windows writes: it is not asked.
#[test]
fn entries_with_several_sectors_of_descriptors_are_replayed() {
    for count in [127, 128, 200, 253] {
        let pages: Vec<(u64, u8)> =
            (1..=count).map(|number: u64| (number, number.to_le_bytes()[0] ^ 0x5a)).collect();
        replays_to(&ring(&[(0, entry(1, 0, &pages))]), &some(&pages));
        replays_to(&ring(&[(200, entry(1, 200, &pages))]), &some(&pages));
    }
}

/// QEMU never looks at the Tail: it is not asked, here and in the next two.
#[test]
fn entries_before_the_tail_are_not_replayed() {
    let log = |tail| {
        ring(&[
            (0, entry(1, 0, &[(1, b'a')])),
            (2, entry(2, 0, &[(2, b'b')])),
            (4, entry(3, tail, &[(3, b'c')])),
        ])
    };
    replays_to(&log(2), &some(&[(2, b'b'), (3, b'c')]));
    replays_to(&log(4), &some(&[(3, b'c')]));
}

#[test]
fn a_tail_outside_its_sequence_makes_that_invalid() {
    is_refused(&ring(&[(0, entry(1, 9, &[(1, b'a')]))]), Kind::Corrupt);
    is_refused(&ring(&[(0, entry(1, 0, &[(1, b'a')])), (2, entry(2, 1, &[(2, b'b')]))]), Kind::Corrupt);
    let elsewhere = ring(&[(0, entry(8, 9, &[(1, b'a')])), (40, entry(3, 40, &[(2, b'b')]))]);
    replays_to(&elsewhere, &some(&[(2, b'b')]));
}

#[test]
fn a_sequence_that_wraps_onto_its_own_older_entries_starts_at_its_tail() {
    // Two laps of entries of 64 sectors: 5 and 6 have overwritten 1 and 2; 3 is whole, and only 4 is needed.
    let lap = |sequence: u64, tail, fill| {
        let pages: Vec<(u64, u8)> = (0..63).map(|page| (1 + page + sequence, fill)).collect();
        entry(sequence, tail, &pages)
    };
    let log = ring(&[
        (0, lap(5, 192, b'e')),
        (64, lap(6, 192, b'f')),
        (128, lap(3, 128, b'c')),
        (192, lap(4, 192, b'd')),
    ]);
    let mut expected: Vec<(u64, u8)> = vec![(5, b'd'), (6, b'e')];
    expected.extend((7..70).map(|page| (page, b'f')));
    replays_to(&log, &some(&expected));
}

#[test]
fn a_log_that_is_named_and_holds_no_sequence_is_corrupt() {
    let mut torn = ring(&[(0, entry(1, 0, &[(1, b'a')]))]);
    torn.write_log(1, &[0; SECTOR]);
    is_refused(&torn, Kind::Corrupt);
}

/// QEMU leaves this when it dies between the header and its first entry: nothing was logged, nothing is lost.
#[test]
fn a_log_that_is_named_and_was_never_written_is_empty() {
    let image = ring(&[]);
    let (read, of_reader) = image.open_read_only().expect("nothing is lost");
    let (writable, of_writer) = image.open_writable().expect("nothing is lost");
    for (found_log, disk) in [(read.found_log, of_reader), (writable.found_log, of_writer)] {
        assert_eq!(found_log, FoundLog::Virgin);
        let after = Craft { file: disk.content() };
        Expected::new(&[]).compare("virgin", |offset| after.read(offset, SECTOR));
    }
}

/// What would change the file identifier, a header or the log itself is no entry, whatever its checksum says.
#[test]
fn an_entry_that_would_change_what_the_log_must_not_is_none() {
    for target in [0, 64 << 10, 128 << 10, LOG, LOG + 252 * 4096] {
        let hostile = LogEntry::new(2, 0, &[Change::Page { at: target, fill: b'x' }]);
        is_refused(&ring(&[(0, hostile.clone())]), Kind::Corrupt);
        let log = ring(&[(0, entry(1, 0, &[(1, b'a')])), (2, hostile)]);
        replays_to(&log, &some(&[(1, b'a')]));
    }
}
