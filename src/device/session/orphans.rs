//! Promise defended here: nothing that was acknowledged is given up silently, and no impossible session is
//! taken over.

use std::fs;
use std::path::PathBuf;

use nix::fcntl::{Flock, FlockArg};

use super::choice::refuse_orphan_among;
use super::{Plan, Sessions, is_needed, sweep};
use crate::device::registry::{Entry, Registry, entry};
use crate::device::spec::EngineHandle;
use crate::device::testing::Bench;
use crate::error::Kind;
use crate::image::VERSION;

const WORD: usize = 8;
const VERSION_PLACE: usize = 1;
const BOOT_PLACE: usize = 3;
const BYTES_PLACE: usize = 10;
const STATE_PLACE: usize = 16;
const IDLE: u64 = 0x1d1e_1d1e_0f0f_0f01;

/// A bench whose image has an open session that a killed daemon left, changed by `change`.
fn orphan(change: impl FnOnce(&mut Vec<u8>)) -> (Bench, PathBuf, Vec<u8>) {
    let bench = Bench::new();
    let engine = bench.open_as(Plan::Fresh { keep: true }).expect("a good image");
    engine.opened().shared.open_session();
    let left = bench.session().expect("it was made");
    let mut bytes = fs::read(&left).expect("readable");
    engine.opened().shared.map.memory().rest();
    engine.close().expect("nothing to do");
    change(&mut bytes);
    fs::write(&left, &bytes).expect("as a killed daemon leaves it");
    (bench, left, bytes)
}

fn set_word(bytes: &mut [u8], place: usize, word: u64) {
    bytes[place * WORD..][..WORD].copy_from_slice(&word.to_le_bytes());
}

const ADD: Plan = Plan::Fresh { keep: true };
const RECOVER: Plan = Plan::Resume { accept_loss: false };

/// Neither `add`, `del` nor `recover` takes it over or removes it, and each reports why.
fn assert_kept(change: impl FnOnce(&mut Vec<u8>), kind: Kind, words: &[&str]) {
    let (bench, left, bytes) = orphan(change);
    let image = fs::read(&bench.path).expect("readable");
    for plan in [ADD, Plan::Close, RECOVER, Plan::Fresh { keep: false }] {
        let error = bench.open_as(plan).err().unwrap_or_else(|| panic!("{plan:?} takes it over"));
        assert_eq!(error.kind(), kind, "{plan:?}: {error}");
        for word in words {
            assert!(error.to_string().contains(word), "{plan:?}: {error}");
        }
        assert!(plan == RECOVER || error.remedy_text().is_some_and(|text| text.contains("session discard")));
        assert!(fs::read(&left).expect("it is kept") == bytes, "{plan:?}");
    }
    assert!(fs::read(&bench.path).expect("readable") == image);
    bench
        .open_as(Plan::Resume { accept_loss: true })
        .expect("the user insists")
        .close()
        .expect("nothing to do");
    assert_eq!(bench.session(), None);
}

#[test]
fn a_session_of_another_version_is_refused_and_kept() {
    let later = VERSION + 1;
    let words = [format!("version {later}"), format!("version {VERSION}")];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    assert_kept(|bytes| set_word(bytes, VERSION_PLACE, later), Kind::Unsupported, &words);
}

#[test]
fn a_damaged_session_is_refused_and_kept() {
    assert_kept(|bytes| bytes[BYTES_PLACE * WORD] ^= 1, Kind::Corrupt, &["damaged"]);
    assert_kept(|bytes| bytes.truncate(bytes.len() - WORD), Kind::Corrupt, &["damaged", "length"]);
    assert_kept(|bytes| bytes.truncate(WORD), Kind::Corrupt, &["damaged", "length"]);
    assert_kept(|bytes| bytes.truncate(512 * WORD + 3), Kind::Corrupt, &["damaged", "length"]);
    assert_kept(|bytes| bytes[3] ^= 0x40, Kind::Corrupt, &["damaged"]);
}

/// A power cut takes what was not flushed; a session that survives describes a state that is lost.
#[test]
fn a_session_of_an_earlier_start_of_the_machine_is_given_up() {
    let earlier = |bytes: &mut Vec<u8>| {
        bytes[BOOT_PLACE * WORD] ^= 1;
        let mut sum = 0;
        let word = |place: usize| &bytes[place * WORD..][..WORD];
        for place in [1].into_iter().chain(3..16).chain(32..512) {
            sum = crc32c::crc32c_append(sum, word(place));
        }
        set_word(bytes, 2, sum.into());
    };
    let (bench, ..) = orphan(earlier);
    let refused = bench.open_as(RECOVER).err().expect("it is worth nothing");
    assert!(refused.to_string().contains("before the machine was started"), "{refused}");
    bench.open_as(ADD).expect("a device without it").close().expect("nothing to do");
    assert_eq!(bench.session(), None);
    let (bench, ..) = orphan(earlier);
    let error = bench.open_as(Plan::Close).err().expect("`del` reports a loss");
    assert!(error.to_string().contains("before the machine was started"), "{error}");
}

/// Inodes are used again: the session of an image that is gone does not block the next one.
#[test]
fn a_new_image_in_the_place_of_another_is_served_and_the_old_session_given_up() {
    let (bench, left, _) = orphan(|_| ());
    bench.replace_content();
    let engine = bench.open_as(ADD).expect("a new image");
    assert!(engine.opened().recoverable && bench.session() != Some(left));
    engine.close().expect("nothing to do");
    assert_eq!(bench.session(), None, "the old one is gone too");
}

/// `del` does not report success if acknowledged data is lost.
#[test]
fn closing_reports_a_session_that_cannot_be_taken_over() {
    let (bench, ..) = orphan(|_| ());
    let kept = fs::read(bench.session().expect("there")).expect("readable");
    let left = bench.session().expect("there");
    fs::remove_file(&left).expect("there");
    bench.modify();
    fs::write(&left, kept).expect("room");
    let error = bench.open_as(Plan::Close).err().expect("it is lost");
    assert!(error.to_string().contains("another program has written"), "{error}");
    assert_eq!(bench.session(), None, "it is of no use to any program");
}

/// That a process looks at the session, as `session list` does, or has not ended yet, is no reason to change
/// the image.
#[test]
fn an_orphan_that_a_process_holds_is_not_passed_by() {
    let (bench, left, bytes) = orphan(|_| {});
    let (sessions, file) = (Sessions::at(left.parent().expect("its folder")), bench.file());
    let refuse = || refuse_orphan_among(&sessions, &file, None);
    assert_eq!(refuse().expect_err("it is one").kind(), Kind::InUse);
    let open = fs::File::open(&left).expect("readable");
    let held = Flock::lock(open, FlockArg::LockExclusiveNonblock).expect("free");
    assert_eq!(refuse().expect_err("it still is one").kind(), Kind::InUse);
    assert!(fs::read(&left).expect("it is kept") == bytes);
    let mut rests = bytes;
    set_word(&mut rests, STATE_PLACE, IDLE);
    fs::write(&left, &rests).expect("as after a snapshot");
    refuse().expect("the image has everything, whoever holds the session");
    drop(held);
}

/// What a killed process has left at rest takes memory for nothing. Anything else may be all that there is.
#[test]
fn a_session_at_rest_is_given_up_unless_a_device_or_a_process_may_need_it() {
    let at_rest = |bytes: &mut Vec<u8>| set_word(bytes, STATE_PLACE, IDLE);
    let (bench, left, bytes) = orphan(|_| {});
    let registry = Registry::at(left.parent().expect("its folder")).expect("made");
    sweep(&registry).expect("readable");
    assert!(fs::read(&left).expect("it is an orphan") == bytes);
    let mut rests = bytes;
    at_rest(&mut rests);
    fs::write(&left, &rests).expect("as before the first write");
    let mut waits = entry(7);
    waits.image_file.inode = bench.file().identity().inode;
    registry.write(&waits).expect("written");
    sweep(&registry).expect("readable");
    assert!(left.exists(), "a device cannot be recovered without it");
    registry.remove(7, waits.mark).expect("removed");
    let held = fs::File::open(&left).expect("readable");
    let held = Flock::lock(held, FlockArg::LockExclusiveNonblock).expect("free");
    sweep(&registry).expect("readable");
    assert!(left.exists(), "a process uses it");
    drop(held);
    fs::write(left.with_extension("session.next"), "").expect("as of a disk that grew");
    sweep(&registry).expect("readable");
    assert!(!left.exists() && !left.with_extension("session.next").exists());
}

/// A `del` that was killed left the entry, and the image was added again: `del` of the image is for the new
/// device.
#[test]
fn a_device_that_is_gone_needs_no_session_that_another_one_of_its_image_uses() {
    let (bench, left, _) = orphan(|_| {});
    let registry = Registry::at(left.parent().expect("its folder")).expect("made");
    let of_image = |id| Entry { image_file: bench.file().identity(), ..entry(id) };
    let gone = of_image(7);
    registry.write(&gone).expect("written");
    assert!(is_needed(&registry, &gone).expect("readable"), "it is an orphan");
    let open = fs::File::open(&left).expect("readable");
    let held = Flock::lock(open, FlockArg::LockExclusiveNonblock).expect("free");
    assert!(is_needed(&registry, &gone).expect("readable"), "a command closes the image now");
    registry.write(&of_image(3)).expect("written");
    assert!(!is_needed(&registry, &gone).expect("readable"), "it is the other device's");
    drop(held);
    assert!(is_needed(&registry, &gone).expect("readable"), "both are gone");
}
