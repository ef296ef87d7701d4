//! What is known of file systems that hold images.

use std::io;
use std::path::Path;

use nix::sys::statfs::{FsType, statfs};

use super::finding::Finding;

/// How well a file system holds images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// As a disk does.
    Local,
    /// It writes to a new place what is overwritten.
    Copying,
    /// A server has the files.
    Remote,
    /// A hole marks a file as sparse for Windows.
    Windows,
    /// Files end at 4 GiB, and have no holes.
    Fat,
    /// Nothing is kept.
    Memory,
}

/// Numbers in `statfs`, with names and kinds.
const KNOWN: [(i64, &str, Kind); 19] = [
    (0xef53, "ext4", Kind::Local),
    (0x5846_5342, "XFS", Kind::Local),
    (0xf2f5_2010, "F2FS", Kind::Local),
    (0x794c_7630, "overlayfs", Kind::Local),
    (0x9123_683e, "btrfs", Kind::Copying),
    (0xca45_1a4e, "bcachefs", Kind::Copying),
    (0x2fc1_2fc1, "ZFS", Kind::Copying),
    (0x6969, "NFS", Kind::Remote),
    (0xff53_4d42, "SMB", Kind::Remote),
    (0xfe53_4d42, "SMB", Kind::Remote),
    (0x0102_1997, "9P", Kind::Remote),
    (0x00c3_6400, "Ceph", Kind::Remote),
    (0x6573_5546, "FUSE", Kind::Remote),
    (0x7366_746e, "NTFS", Kind::Windows),
    (0x5346_544e, "NTFS", Kind::Windows),
    (0x2011_bab0, "exFAT", Kind::Windows),
    (0x4d44, "FAT", Kind::Fat),
    (0x0102_1994, "tmpfs", Kind::Memory),
    (0x8584_58f6, "ramfs", Kind::Memory),
];

/// What the file system of `folder` means for an image.
pub(super) fn finding(folder: &Path) -> Finding {
    match statfs(folder) {
        Ok(found) => of_type(found.filesystem_type()),
        Err(errno) => {
            let error = io::Error::from(errno);
            Finding::wrong(CHECK, format!("the host does not say: {error}"), "check the mount of the folder")
        }
    }
}

const CHECK: &str = "file system";

fn of_type(found: FsType) -> Finding {
    let known = KNOWN.iter().find(|(number, ..)| i128::from(*number) == i128::from(found.0));
    let Some((_, name, kind)) = known else {
        return Finding::fine(CHECK, format!("not known to this program ({:#x})", found.0));
    };
    match kind {
        Kind::Local => Finding::fine(CHECK, *name),
        Kind::Copying => Finding::fine(
            CHECK,
            format!("{name}, which copies on write: overwrites and flushes need room, too"),
        ),
        Kind::Remote => Finding::fine(CHECK, format!("{name}: I/O waits while the server is away")),
        Kind::Windows => {
            Finding::fine(CHECK, format!("{name}: the file gets no holes, for which Windows would refuse it"))
        }
        Kind::Fat => Finding::wrong(
            CHECK,
            format!("{name}: a file ends at 4 GiB, and writes beyond fail"),
            "put the image on another file system",
        ),
        Kind::Memory => Finding::wrong(
            CHECK,
            format!("{name} is in memory: nothing survives a restart, whatever is flushed"),
            "put the image on a disk",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_keeps_nothing_or_ends_at_4_gib_is_no_place_for_an_image() {
        let fine = |number| of_type(FsType(number)).fine;
        assert!(fine(0xef53) && fine(0x9123_683e) && fine(0x6969) && fine(1));
        assert!(!fine(0x0102_1994) && !fine(0x4d44));
    }

    #[test]
    fn each_number_is_known_once() {
        for (place, (number, ..)) in KNOWN.iter().enumerate() {
            assert!(KNOWN[..place].iter().all(|(other, ..)| other != number), "{number:#x}");
        }
    }
}
