//! Promise defended here: what is known of an interrupted trim counts only for the disk that was trimmed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use uuid::Uuid;
use vhdx_ublk::device::registry::Registry;
use vhdx_ublk::format::header::{Header, OFFSETS};
use vhdx_ublk::system::trim::VolumeTrim;
use vhdx_ublk::system::trim_record::TrimRecord;

use crate::sim::violation::violated;

/// The headers of an image in the file at `path`, and nothing else of it.
fn write_headers(path: &Path, sequence_number: u64, data_write_guid: Uuid) -> File {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path).expect("room");
    let header = Header {
        sequence_number,
        file_write_guid: Uuid::from_u128(sequence_number.into()),
        data_write_guid,
        log_guid: Uuid::nil(),
        log_version: 0,
        log_offset: 1 << 20,
        log_length: 1 << 20,
    };
    for (sequence_number, offset) in (sequence_number..).zip(OFFSETS) {
        let bytes = Header { sequence_number, ..header.clone() }.encode();
        file.write_all_at(&bytes, offset).expect("room");
    }
    file
}

/// Moves of blocks change the headers, and not the disk.
#[test]
pub fn the_record_of_a_trim_counts_until_the_disk_is_written() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let registry = Registry::at(&folder.path().join("run")).expect("a folder is made");
    let path = folder.path().join("disk.vhdx");
    let [trimmed, written] = [Uuid::from_u128(1), Uuid::from_u128(2)];
    let image = write_headers(&path, 1, trimmed);
    let record = |image: &File| TrimRecord::of(image, &registry).expect("it has headers");
    assert!(record(&image).outcome().is_none(), "nothing is known yet");
    let volume = VolumeTrim {
        partition: Some(2),
        r#type: Some("xfs".into()),
        trimmed_bytes: Some(7),
        left_alone: None,
    };
    record(&image).finish(std::slice::from_ref(&volume));
    write_headers(&path, 3, trimmed);
    assert_eq!(record(&image).outcome(), Some(&[volume][..]), "the disk is what it was");
    write_headers(&path, 5, written);
    if record(&image).outcome().is_some() {
        violated("a disk that was written counts as trimmed".into());
    }
    write_headers(&path, 7, trimmed);
    let other = write_headers(&folder.path().join("other.vhdx"), 1, trimmed);
    assert!(record(&other).outcome().is_none(), "a copy has free space of its own");
    record(&image).remove();
    assert!(record(&image).outcome().is_none(), "it is forgotten");
}

/// A record of many is the oldest at some time.
#[test]
fn few_records_are_kept_and_half_a_one_does_not_count() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = folder.path().join("run");
    let registry = Registry::at(&run).expect("a folder is made");
    let names = || std::fs::read_dir(&run).expect("a folder").map(|entry| entry.expect("a name").path());
    let images: Vec<File> = (0..20)
        .map(|number| write_headers(&folder.path().join(number.to_string()), 1, Uuid::from_u128(number + 1)))
        .collect();
    for image in &images {
        TrimRecord::of(image, &registry).expect("it has headers").finish(&[]);
    }
    assert_eq!(names().count(), 16);
    let last = || TrimRecord::of(&images[19], &registry).expect("it has headers");
    assert!(last().outcome().is_some());
    for record in names() {
        let text = std::fs::read(&record).expect("it is there");
        std::fs::write(&record, &text[..text.len() / 2]).expect("room");
    }
    assert!(last().outcome().is_none());
}
