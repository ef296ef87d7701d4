//! Whether an image is a copy of another: all that it says of its disk is the same, byte by byte.

use crate::chain::{Member, Relative};
use crate::disk::{Reactor, read_sectors};
use crate::error::{Doing, Locate, Result};
use crate::format::metadata::Metadata;
use crate::format::{MIB, index};
use crate::image::{Location, locate};

/// How much is compared at once, bytes.
const WINDOW_BYTES: u64 = 4 * MIB;

/// Whether both images have the same content and know the same parent; the way to that may differ.
pub(super) fn is_alike(one: &Member, other: &Member, reactor: &Reactor) -> Result<bool> {
    let linkage = |member: &Member| {
        let locator = member.image.metadata.parent_locator.as_ref();
        locator.and_then(|locator| locator.linkage().ok())
    };
    let metadata = |member: &Member| Metadata { parent_locator: None, ..member.image.metadata.clone() };
    if one.data_write_guid() != other.data_write_guid()
        || linkage(one) != linkage(other)
        || metadata(one) != metadata(other)
    {
        return Ok(false);
    }
    reactor.block_on(have_same_content(one, other, reactor))
}

async fn have_same_content(one: &Member, other: &Member, reactor: &Reactor) -> Result<bool> {
    let members = [one, other];
    let disks = members.map(|member| reactor.disk(member.file.clone()));
    for (member, disk) in members.into_iter().zip(&disks) {
        member.image.read_bitmaps(disk).await.file(member.file.path())?;
    }
    let (mut at, size) = (0, one.image.metadata.virtual_size);
    let mut bytes = [const { Vec::new() }; 2];
    while at < size {
        let end = size.min(at + WINDOW_BYTES);
        let found = members.map(|member| locate(0, &member.image.map, at, end));
        let length = found[0].1.min(found[1].1);
        assert!(length > 0, "a piece at {at} has bytes");
        match found.map(|(location, _)| location) {
            [Location::File { offset: first, .. }, Location::File { offset: second, .. }] => {
                for ((bytes, disk), offset) in bytes.iter_mut().zip(&disks).zip([first, second]) {
                    bytes.resize(index(length), 0);
                    read_sectors(disk, offset, bytes).await.doing("comparing the copy")?;
                }
                if bytes[0] != bytes[1] {
                    return Ok(false);
                }
            }
            [first, second] if first != second => return Ok(false),
            _ => {}
        }
        at += length;
    }
    Ok(true)
}
