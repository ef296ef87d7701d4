//! Hostile images that are repaired, or whose locator is changed.
//!
//! * Both end in a bounded number of operations, in an image or an error.
//! * What opened before opens afterwards, with the same blocks in the same places.
//! * A repair leaves nothing that it could mend; a locator that was accepted is there.

use std::hash::{DefaultHasher, Hash, Hasher};

use uuid::Uuid;
use vhdx_ublk::format::locator::{PARENT_LINKAGE, RELATIVE_PATH};
use vhdx_ublk::image::{Image, ReadImage, check, repair};

use super::corpus;
use super::target::{Case, Outcome, Target, any_bytes, no_bytes};
use super::trial::REFUSED;
use crate::sim::disk::SimDisk;
use crate::sim::store::Store;
use crate::sim::tasks::block_on;

pub const REPAIR: Target = Target {
    name: "repair",
    seeds: || corpus::images().into_iter().chain(corpus::children()).map(Case::of).collect(),
    change_bytes: no_bytes,
    run: |case, _| repaired(&case.files[0]),
    endings: &[REFUSED, NOTHING, MENDED],
};

pub const RELINK: Target = Target {
    name: "relink",
    seeds: || {
        let case = |child| Case { files: vec![child], bytes: b".\\parent.vhdx".to_vec() };
        corpus::children().into_iter().chain(corpus::full_children()).map(case).collect()
    },
    change_bytes: any_bytes,
    run: |case, _| relinked(&case.files[0], &case.bytes),
    endings: &[REFUSED, CHANGED, NOT_CHANGED],
};

const NOTHING: &str = "nothing to mend";
const MENDED: &str = "mended";
const CHANGED: &str = "changed";
const NOT_CHANGED: &str = "not changed";

/// Blocks that are compared.
const COMPARED: u64 = 10_000;

fn disk(file: &Store) -> SimDisk {
    SimDisk::new(file.clone(), true, true, 512)
}

fn opened(file: &Store) -> Option<ReadImage> {
    block_on(Image::read(&disk(file))).ok()
}

/// What opened before opens, and names the same places.
fn assert_kept(before: Option<&ReadImage>, file: &Store) {
    let Some(before) = before else { return };
    let after = opened(file).expect("it opened before");
    assert_eq!(before.metadata.virtual_size, after.metadata.virtual_size);
    for block in 0..before.map.geometry().block_count().min(COMPARED) {
        let [old, new] = [before, &after].map(|image| image.map.load(block).entry);
        assert_eq!(old.payload_state(), new.payload_state(), "block {block}");
        assert!(old.offset() == new.offset() || new.offset() == 0, "block {block}: {old:?} {new:?}");
    }
}

fn repaired(file: &Store) -> Outcome {
    let mut shape = DefaultHasher::new();
    let before = opened(file);
    let target = disk(file);
    let mut number = 0;
    let new_guid = || {
        number += 1;
        Uuid::from_u128(number)
    };
    let ending = match block_on(repair(&target, new_guid)) {
        Err(error) => {
            (format!("{:?}", error.kind()), error.structure()).hash(&mut shape);
            REFUSED
        }
        Ok(done) => {
            let again = block_on(check(&target)).expect("it was examined before");
            assert_eq!(again.repairable, 0, "left to mend: {:?}", again.findings);
            assert!(again.beyond_repair <= done.before.beyond_repair, "a repair adds no damage");
            (done.before.repairable, done.after.beyond_repair).hash(&mut shape);
            if done.before.repairable == 0 {
                assert_eq!(target.versions().0, 0, "an image with nothing to mend is not changed");
                NOTHING
            } else {
                MENDED
            }
        }
    };
    assert_kept(before.as_ref(), &target.content());
    ending.hash(&mut shape);
    Outcome { ending, signature: shape.finish(), peak: 0 }
}

fn relinked(file: &Store, path: &[u8]) -> Outcome {
    let mut shape = DefaultHasher::new();
    let target = disk(file);
    let opening = block_on(Image::open_for_writing(&target, || Uuid::from_u128(0xf11e)));
    let ending = match opening {
        Ok(image) if image.metadata.parent_locator.is_some() => {
            let replayed = opened(&target.content());
            let mut metadata = image.metadata.clone();
            let mut locator = metadata.parent_locator.take().expect("it was there");
            // A path of this machine's has no NUL, and none is empty.
            let text = String::from_utf8_lossy(path).replace('\0', "");
            locator.set(RELATIVE_PATH, if text.is_empty() { "." } else { &text });
            locator.set(PARENT_LINKAGE, Uuid::from_u128(9).braced().to_string());
            metadata.parent_locator = Some(locator);
            let amended = block_on(image.amend(&target, &metadata, || Uuid::from_u128(0xa)));
            let found = opened(&target.content()).expect("it opened before");
            assert_kept(replayed.as_ref(), &target.content());
            match amended {
                Ok(_) => {
                    assert_eq!(found.metadata.parent_locator, metadata.parent_locator);
                    CHANGED
                }
                Err(error) => {
                    format!("{:?}", error.kind()).hash(&mut shape);
                    NOT_CHANGED
                }
            }
        }
        _ => REFUSED,
    };
    ending.hash(&mut shape);
    Outcome { ending, signature: shape.finish(), peak: 0 }
}
