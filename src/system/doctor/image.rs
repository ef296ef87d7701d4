//! One image: its structure, its chain, its host.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::finding::Finding;
use super::{host, trial};
use crate::chain::{self, Known, Search};
use crate::device::claims;
use crate::disk::{Access, HostRoom, ImageFile, PayloadIo, folder_of};
use crate::error::Kind;
use crate::operations::inspect::{Inspected, identify, inspect};
use crate::printable::{human_size, shell};

/// Room that an image is to find when it grows.
const ROOM_BYTES: u64 = 1 << 30;

/// What Hyper-V's resilient change tracking keeps beside an image.
const TRACKING: [&str; 2] = ["rct", "mrt"];

/// All checks of the image at `path`.
pub(super) fn checks(path: &Path) -> Vec<Finding> {
    let inspected = match inspect(path) {
        Ok(inspected) => inspected,
        Err(error) => {
            return vec![Finding::failed("image", &error, &remedy(error.kind(), path))];
        }
    };
    let folder = folder_of(&inspected.path);
    let (lock, direct) = file_checks(&inspected);
    let mut checks = vec![structure(&inspected), lock, chain(&inspected), host::finding(folder), direct];
    checks.extend(trial::checks(folder));
    checks.extend([space(&inspected), windows(&inspected), tracking(&inspected.path)]);
    checks
}

/// What helps with an image that cannot be read for such a reason.
fn remedy(kind: Kind, path: &Path) -> String {
    match kind {
        Kind::Corrupt | Kind::Truncated => format!("`vhdx-ublk check {}` shows the damage", shell(path)),
        Kind::NotFound => "check the spelling of the path".into(),
        Kind::NotVhdx => "check the name of the file: this is no VHDX".into(),
        Kind::Permission => "run the command as root, or as a user with access to the file".into(),
        _ => format!("vhdx-ublk info {}", shell(path)),
    }
}

fn structure(inspected: &Inspected) -> Finding {
    const CHECK: &str = "image";
    let damaged: Vec<&str> = inspected
        .warnings()
        .into_iter()
        .filter(|warning| *warning != crate::disk::SPARSE_FOR_WINDOWS)
        .collect();
    if damaged.is_empty() {
        let kind = format!("{:?}", inspected.image.metadata.kind()).to_lowercase();
        let size = human_size(inspected.image.metadata.virtual_size);
        return Finding::fine(CHECK, format!("VHDX, {kind}, {size}"));
    }
    let path = shell(&inspected.path);
    Finding::wrong(CHECK, damaged.join("; "), format!("vhdx-ublk check --repair {path}"))
}

/// Whether the image can be locked, and whether its I/O passes the host's page cache by.
fn file_checks(inspected: &Inspected) -> (Finding, Finding) {
    const LOCK: &str = "lock";
    const DIRECT: &str = "direct I/O";
    let path = &inspected.path;
    let file = match ImageFile::open(path, Access::ReadOnly, Duration::ZERO) {
        Ok(file) => file,
        Err(error) if error.kind() == Kind::InUse => {
            let holder = claims::device_of(path).map(|device| device.display().to_string());
            let holder = holder.unwrap_or_else(|| claims::processes(path).join(", "));
            let found = if holder.is_empty() { "in use".into() } else { format!("in use by {holder}") };
            let direct = Finding::fine(DIRECT, "not examined, as the image is in use");
            return (Finding::fine(LOCK, found), direct);
        }
        Err(error) => {
            let remedy = "use a file system with locks; an NFS mount needs its lock service";
            let direct = Finding::fine(DIRECT, "not examined");
            return (Finding::failed(LOCK, &error, remedy), direct);
        }
    };
    let sector = inspected.image.metadata.logical_sector_size;
    let direct = match file.enable_direct(sector) {
        Ok(PayloadIo::Direct) => Finding::fine(DIRECT, format!("works in units of {sector} bytes")),
        Ok(PayloadIo::Buffered { reason }) => {
            let remedy = "the image works, and slower: use a file system with direct I/O in units of the \
                          image's logical sectors";
            Finding::wrong(DIRECT, reason, remedy)
        }
        Err(error) => Finding::failed(DIRECT, &error, "check the mount of the folder"),
    };
    (Finding::fine(LOCK, "the host grants it"), direct)
}

/// The parents, where they are found.
fn chain(inspected: &Inspected) -> Finding {
    const CHECK: &str = "chain";
    let mut parents: Vec<Known> = Vec::new();
    let followed = chain::follow_parents(inspected, &Search::default(), &mut parents, identify);
    let places: Vec<String> = parents.iter().map(|parent| parent.path.display().to_string()).collect();
    match followed {
        Ok(()) if places.is_empty() => Finding::fine(CHECK, "no parents"),
        Ok(()) => Finding::fine(CHECK, format!("parents: {}", places.join(", "))),
        Err(error) => {
            let remedy = "say where the parents are (--parent, --parent-map), or `vhdx-ublk relink`";
            Finding::failed(CHECK, &error, remedy)
        }
    }
}

/// Room on the host, for what the image may still take.
fn space(inspected: &Inspected) -> Finding {
    const CHECK: &str = "space left";
    let size = inspected.image.metadata.virtual_size;
    match HostRoom::at(folder_of(&inspected.path)).map(|room| room.for_this_user()) {
        Ok(Some(free)) => judge_space(free, size.saturating_sub(inspected.host_bytes)),
        Ok(None) => Finding::fine(CHECK, "the file system does not say"),
        Err(error) => {
            Finding::wrong(CHECK, format!("the host does not say: {error}"), "check the mount of the folder")
        }
    }
}

/// So many bytes are `free`, and the image may take so many `more`.
fn judge_space(free: u64, more: u64) -> Finding {
    let found = format!("{} free; the image may take {} more", human_size(free), human_size(more));
    if free >= more.min(ROOM_BYTES) {
        return Finding::fine("space left", found);
    }
    let remedy = "free space, or move the image: a write that finds no room fails";
    Finding::wrong("space left", found, remedy)
}

fn windows(inspected: &Inspected) -> Finding {
    const CHECK: &str = "sparse for Windows";
    if inspected.is_sparse_for_windows {
        let remedy = format!("vhdx-ublk compact --dense {}", shell(&inspected.path));
        return Finding::wrong(CHECK, "the file has holes, and Windows refuses it for them", remedy);
    }
    Finding::fine(CHECK, "no")
}

/// Whether Hyper-V tracks the changes of the image for backups: it does not see what is written here.
fn tracking(image: &Path) -> Finding {
    const CHECK: &str = "change tracking";
    let beside = |end: &str| {
        let mut name = image.as_os_str().to_owned();
        name.push(".");
        name.push(end);
        PathBuf::from(name)
    };
    let found: Vec<PathBuf> =
        TRACKING.iter().map(|end| beside(end)).filter(|path| path.symlink_metadata().is_ok()).collect();
    if found.is_empty() {
        return Finding::fine(CHECK, "Hyper-V keeps none beside the image");
    }
    let names: Vec<String> = found.iter().map(|path| shell(path)).collect();
    let message = format!("Hyper-V tracks changes in {}, and does not see those made here", names.join(" "));
    let remedy = "before you write: remove these files, and have the next backup be a full one";
    Finding::wrong(CHECK, message, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_can_hardly_grow_needs_little_room() {
        assert!(judge_space(0, 0).fine && judge_space(5 << 20, 4 << 20).fine);
        assert!(!judge_space(3 << 20, 4 << 20).fine);
        assert!(judge_space(ROOM_BYTES, u64::MAX).fine && !judge_space(ROOM_BYTES - 1, u64::MAX).fine);
    }

    #[test]
    fn tracking_is_found_beside_the_image_by_its_whole_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let image = folder.path().join("disk.vhdx");
        assert!(tracking(&image).fine);
        std::fs::write(folder.path().join("disk.rct"), "").expect("room");
        assert!(tracking(&image).fine, "another file's");
        std::fs::write(folder.path().join("disk.vhdx.rct"), "").expect("room");
        let found = tracking(&image);
        assert!(!found.fine && found.found.contains("disk.vhdx.rct"), "{found:?}");
    }
}
