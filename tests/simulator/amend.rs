//! Promise defended here: what an image's metadata says is changed as a whole or not at all, wherever the
//! power is cut in it, and nothing else changes. What becomes of a disk of another size is in `resize`.

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::disk::ReadDisk;
use vhdx_ublk::error::{Kind, Result};
use vhdx_ublk::format::guid;
use vhdx_ublk::format::locator::{PARENT_LINKAGE, PARENT_LINKAGE2, ParentLocator, RELATIVE_PATH};
use vhdx_ublk::format::metadata::{Metadata, Table};
use vhdx_ublk::image::{Image, Resize, WritableImage, check};

use crate::craft::{Craft, END, METADATA, MIB};
use crate::sim::disk::{Profile, SimDisk};
use crate::sim::store::Store;
use crate::sim::tasks::{SimTasks, block_on};
use crate::sim::violation::violated;
use crate::sim::world::Config;

/// Cuts per moment and profile.
const CUTS: usize = 4;

fn locator(path: &str) -> ParentLocator {
    let mut locator = ParentLocator::default();
    locator.set(PARENT_LINKAGE, Uuid::from_u128(1).braced().to_string());
    locator.set(PARENT_LINKAGE2, Uuid::nil().braced().to_string());
    locator.set(RELATIVE_PATH, path);
    locator
}

/// A child with a block, by a log of 1 MiB.
fn child() -> Craft {
    let mut craft = Craft::new(&Config::small());
    let mut metadata = craft.open_read_only().expect("a new image").0.metadata.clone();
    (metadata.has_parent, metadata.parent_locator) = (true, Some(locator(r".\base.vhdx")));
    craft.write(METADATA, &metadata.encode_region());
    craft.file.resize(END + MIB);
    craft.set_slot(0, END | 6);
    craft.write(END, &[0x55; 8192]);
    craft
}

/// The same child, whose locator comes before all other items: it cannot grow where it is.
fn hemmed_in() -> Craft {
    let mut child = child();
    let metadata = opened(&child.file).expect("an image").metadata.clone();
    let region = metadata.encode_region();
    let table = Table::parse(&region, 1 << 20).expect("its own");
    let mut entries: Vec<_> = table.entries().to_vec();
    entries.rotate_right(1);
    assert_eq!(entries[0].item_id, guid::PARENT_LOCATOR);
    let (mut offset, mut items) = (65536, Vec::new());
    for entry in &mut entries {
        entry.offset = offset;
        offset += entry.length;
        items.extend(metadata.item_bytes(entry.item_id).expect("it has it"));
    }
    let table = Table::new(entries, 1 << 20).expect("a good table").encode();
    child.write(METADATA, &[table, items].concat());
    child
}

fn opened(store: &Store) -> Result<WritableImage> {
    let disk = SimDisk::new(store.clone(), true, true, 512);
    block_on(Image::open_for_writing(&disk, || Uuid::from_u128(7)))
}

/// Amends the image in `before` step by step and cuts the power at each one; `judge` sees what each cut
/// leaves.
fn cut_everywhere(
    before: &Store,
    change: impl FnOnce(&mut Metadata) + 'static,
    judge: impl FnMut(&Store),
) -> Store {
    cut_under(before, None, change, judge)
}

/// The same, with a new DataWriteGuid if readers are to see the change.
fn cut_under(
    before: &Store,
    data_write: Option<Uuid>,
    change: impl FnOnce(&mut Metadata) + 'static,
    mut judge: impl FnMut(&Store),
) -> Store {
    let disk = SimDisk::new(before.clone(), false, true, 512);
    let (tasks, on) = (SimTasks::default(), disk.clone());
    let (mut rng, mut guids) = (Rng::with_seed(3), Rng::with_seed(4));
    let result = tasks.start(async move {
        let image = Image::open_for_writing(&on, || panic!("the log is empty")).await?;
        let mut metadata = image.metadata.clone();
        change(&mut metadata);
        let to = Resize { metadata, parent_bytes: 0, data_write, zero_from: None };
        image.resize(&on, &to, || Uuid::from_u128(guids.u128(1..))).await.map(drop)
    });
    let mut steps = 0;
    while tasks.ready() > 0 {
        tasks.run(0);
        for profile in Profile::ALL {
            for _ in 0..CUTS {
                judge(&disk.cut(profile, &mut rng));
            }
        }
        if let Some(place) = disk.places(false, true).first() {
            disk.complete(*place);
        }
        steps += 1;
        assert!(steps < 10_000, "it does not end");
    }
    result.take().expect("it has ended").expect("an amendment");
    let report = block_on(check(&SimDisk::new(disk.content(), true, true, 512))).expect("an image");
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
    disk.content()
}

#[test]
fn a_locator_is_the_old_one_or_the_new_one_and_nothing_else_changes() {
    let paths = [r".\b.vhdx", r"..\some\where\else\with\a\longer\name\base.vhdx", &r"..\..\far".repeat(900)];
    for (path, child) in paths.into_iter().flat_map(|path| [(path, child()), (path, hemmed_in())]) {
        let before = opened(&child.file).expect("an image");
        let (old, new) = (before.metadata.clone(), path.to_owned());
        let mut expected = old.clone();
        expected.parent_locator.as_mut().expect("a child").set(RELATIVE_PATH, path);
        let mut found = [0, 0];
        let after = cut_everywhere(
            &child.file,
            move |metadata| metadata.parent_locator.as_mut().expect("a child").set(RELATIVE_PATH, new),
            |cut| {
                let image = opened(cut).unwrap_or_else(|error| panic!("after a cut: {error}"));
                assert!(image.metadata == old || image.metadata == expected, "half a change");
                found[usize::from(image.metadata == expected)] += 1;
                assert_eq!(image.map.load(0).entry, before.map.load(0).entry);
            },
        );
        assert!(found[0] > 100 && found[1] > 100, "{found:?}");
        let image = opened(&after).expect("an image");
        let (header, new_header) = (&before.header.header, &image.header.header);
        assert_eq!(image.metadata, expected);
        assert_eq!(header.data_write_guid, new_header.data_write_guid);
        assert_ne!(header.file_write_guid, new_header.file_write_guid);
        let mut bytes = [0; 4];
        after.read(END + 4096, &mut bytes);
        assert_eq!((bytes, after.length), ([0x55; 4], child.file.length));
    }
}

/// A disk that is another to its guest is another to its children, before it is and ever after.
#[test]
pub fn what_a_guest_sees_changes_under_a_new_guid() {
    let craft = Craft::new(&Config::small());
    let (old_guid, new_guid) =
        (opened(&craft.file).expect("an image").header.header.data_write_guid, Uuid::max());
    let old = opened(&craft.file).expect("an image").metadata.clone();
    let mut new = old.clone();
    (new.disk_id, new.physical_sector_size) = (Uuid::from_u128(99), 4096 + 512 - old.physical_sector_size);
    let expected = new.clone();
    let mut found = [0, 0];
    let after = cut_under(
        &craft.file,
        Some(new_guid),
        move |metadata| *metadata = new,
        |cut| {
            let image = opened(cut).unwrap_or_else(|error| panic!("after a cut: {error}"));
            assert!(image.metadata == old || image.metadata == expected, "half a change");
            let is_new = image.metadata == expected;
            found[usize::from(is_new)] += 1;
            let guid = image.header.header.data_write_guid;
            if guid != new_guid && (is_new || guid != old_guid) {
                violated(format!("another disk is known by {guid}"));
            }
        },
    );
    assert!(found.iter().all(|found| *found > 20), "{found:?}");
    assert_eq!(opened(&after).expect("an image").metadata, expected);
}

/// The FileWriteGuid is new before anything else is.
#[test]
fn what_tells_others_that_the_file_changed_comes_first() {
    let child = child();
    let before = opened(&child.file).expect("an image").header.header.file_write_guid;
    let region = child.read(METADATA, 1 << 20);
    let log = child.read(MIB, 1 << 20);
    cut_everywhere(
        &child.file,
        |metadata| metadata.parent_locator.as_mut().expect("a child").set(RELATIVE_PATH, "b"),
        |cut| {
            let disk = SimDisk::new(cut.clone(), true, true, 512);
            let image = block_on(Image::read(&disk)).expect("an image");
            if image.header.header.file_write_guid == before {
                let read = |at| block_on(disk.read(at, 1 << 20)).expect("it reads");
                assert!(read(METADATA)[..] == region && read(MIB)[..] == log);
            }
        },
    );
}

#[test]
fn nothing_is_written_if_nothing_changes_or_there_is_no_room() {
    let child = child();
    let disk = SimDisk::new(child.file.clone(), true, true, 512);
    let guid = || -> Uuid { panic!("no GUID is needed") };
    let image = block_on(Image::open_for_writing(&disk, guid)).expect("an image");
    let metadata = image.metadata.clone();
    let image = block_on(image.amend(&disk, &metadata, guid)).expect("the same");
    let mut long = metadata.clone();
    (0..30).for_each(|key| {
        long.parent_locator.as_mut().expect("a child").set(&format!("key{key}"), "x".repeat(16 << 10));
    });
    let error = block_on(image.amend(&disk, &long, guid)).err().expect("too long for an entry");
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    let activity = disk.activity();
    assert_eq!((activity.writes, activity.syncs, activity.resizes, activity.zeroes), (0, 0, 0, 0));
}
