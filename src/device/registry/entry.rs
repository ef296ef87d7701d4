//! What is recorded of one device.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::device::name::Name;
use crate::device::options::{OnFull, Recovery, Salvage};
use crate::device::path;
use crate::device::process::ProcessId;
use crate::device::reclaim::Reclaim;
use crate::disk::{HostFile, Sparse};
use crate::error::{Error, Kind, Result};
use crate::printable::printable;

/// The version of the entries that this program writes, and the only one that it reads. A field that older
/// programs may ignore is no new version.
pub const ENTRY_FORMAT: u32 = 1;

/// The version of entries that do not state one: the first programs wrote none.
fn first_format() -> u32 {
    1
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Entry {
    /// The version of this structure.
    #[serde(default = "first_format")]
    pub format: u32,
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// The name that the user gave it.
    #[serde(default)]
    pub name: Option<Name>,
    /// It was made for a mount, and is removed with the last one.
    #[serde(default)]
    pub for_mount: bool,
    /// The process that had it made uses it alone, and it ends with that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub private: bool,
    /// The image, as an absolute path without symbolic links.
    #[serde(with = "path::one")]
    pub image: PathBuf,
    /// The image's device and inode, which a rename does not change.
    pub image_file: HostFile,
    /// The paths of the image's parents, nearest first.
    #[serde(default, with = "path::many")]
    pub parents: Vec<PathBuf>,
    /// The parents' devices and inodes, in the same order.
    #[serde(default)]
    pub parent_files: Vec<HostFile>,
    /// The mount namespace in which the paths lead to these files; 0 if it was not recorded.
    #[serde(default)]
    pub mount_namespace: u64,
    /// The daemon has a mount namespace of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub private_mounts: bool,
    /// The daemon.
    pub daemon: ProcessId,
    /// Queues.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Nothing may be written.
    pub read_only: bool,
    /// What is left of a damaged image is shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salvage: Option<Salvage>,
    /// The kernel leaves its partitions alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_partitions: bool,
    /// What happens to it when its daemon is killed.
    pub recovery: Recovery,
    /// Whether it compacts its image when it is idle.
    #[serde(default, skip_serializing_if = "Reclaim::is_off")]
    pub reclaim: Reclaim,
    /// What becomes of requests for which the host has no room.
    #[serde(default, skip_serializing_if = "OnFull::is_fail")]
    pub on_full: OnFull,
    /// The data of requests is not copied.
    #[serde(default)]
    pub zero_copy: bool,
    /// Whether the image's file may get holes.
    #[serde(default)]
    pub sparse: Sparse,
    /// The image's FileWriteGuid when it was opened.
    pub file_write_guid: Uuid,
    /// The identifier of the disk.
    #[serde(default)]
    pub disk_id: Uuid,
    /// The number that the kernel gives each disk once; it is known once the device is up.
    #[serde(default)]
    pub disk_sequence: Option<u64>,
    /// See [`DeviceInfo::mark`](crate::device::DeviceInfo::mark).
    pub mark: u64,
    /// The socket of the service manager that has started the first daemon, if one has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notify_socket: Option<String>,
    /// The version of the daemon.
    pub version: String,
    /// The device was started.
    pub started: bool,
    /// Why the image could not be closed cleanly; kept until a command has reported it.
    pub failure: Option<String>,
    /// A layer of the chain is being merged, or was when the daemon was killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merging: Option<MergeUnderWay>,
}

/// A merge of a layer of the chain that a device serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeUnderWay {
    /// The layer.
    #[serde(with = "path::one")]
    pub layer: PathBuf,
    /// Its file.
    pub layer_file: HostFile,
    /// Its parent, which it is merged into.
    #[serde(with = "path::one")]
    pub target: PathBuf,
    /// That one's file.
    pub target_file: HostFile,
}

impl Entry {
    /// Whether the device reads `file`: its image, or one of the image's parents.
    ///
    /// No path is followed: it may lie on a device that waits for its daemon, and the caller would wait as
    /// well.
    pub fn reads(&self, file: HostFile) -> bool {
        self.image_file == file || self.parent_files.contains(&file)
    }

    /// Explains `error`, of opening one of the files by its path, if the daemon saw other mounts.
    pub fn explain(&self, error: Error) -> Error {
        let is_elsewhere = self.mount_namespace != 0 && self.mount_namespace != mount_namespace();
        if error.kind() != Kind::NotFound || !is_elsewhere {
            return error;
        }
        let message = format!("{} (the path is valid in another mount namespace)", error.message());
        Error::new(Kind::NotFound, message).file(error.file_path().unwrap_or(&self.image)).remedy(
            "run the command where the device was added: in the same container, or for a service with \
             PrivateTmp in the service; or put the image at that path here (mount --bind)",
        )
    }
}

/// What an entry of any version has.
#[derive(Deserialize)]
struct Envelope {
    #[serde(default = "first_format")]
    format: u32,
    #[serde(default)]
    version: Option<String>,
}

/// Reads an entry.
///
/// # Errors
///
/// [`Kind::Unsupported`] if it is of a version that this program does not know; [`Kind::Corrupt`].
pub(super) fn parse(text: &str) -> Result<Entry> {
    let damaged = |error: serde_json::Error| Error::corrupt("device entry", error.to_string());
    let Envelope { format, version } = serde_json::from_str(text).map_err(damaged)?;
    if format != ENTRY_FORMAT {
        let (writer, this) = (version.as_deref().unwrap_or("?"), env!("CARGO_PKG_VERSION"));
        let message = format!(
            "the entry has format {format}, written by vhdx-ublk {}; vhdx-ublk {this} reads format \
             {ENTRY_FORMAT}",
            printable(writer)
        );
        return Err(Error::new(Kind::Unsupported, message)
            .in_structure("device entry")
            .remedy("the device continues; use the vhdx-ublk that serves it"));
    }
    serde_json::from_str(text).map_err(damaged)
}

/// The mount namespace of this process; 0 if `/proc` does not have it.
pub(in crate::device) fn mount_namespace() -> u64 {
    fs::metadata("/proc/self/ns/mnt").map_or(0, |found| found.ino())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn entry(id: u32) -> Entry {
        Entry {
            format: ENTRY_FORMAT,
            id,
            device: format!("/dev/ublkb{id}").into(),
            name: None,
            for_mount: false,
            private: false,
            image: "/images/disk.vhdx".into(),
            parents: Vec::new(),
            parent_files: Vec::new(),
            mount_namespace: 0,
            private_mounts: false,
            image_file: HostFile { device: 1, inode: 2 },
            daemon: ProcessId { pid: 1234, start_time: 5678, namespace: 0 },
            queues: 2,
            depth: 64,
            size_bytes: 1 << 30,
            read_only: false,
            salvage: None,
            no_partitions: false,
            reclaim: Reclaim::OFF,
            on_full: OnFull::Fail,
            recovery: Recovery::Reissue,
            sparse: Sparse::Auto,
            zero_copy: false,
            file_write_guid: Uuid::from_u128(1),
            disk_id: Uuid::from_u128(2),
            disk_sequence: None,
            mark: u64::MAX,
            notify_socket: None,
            version: "0.1.0".into(),
            started: true,
            failure: None,
            merging: None,
        }
    }

    /// Entries of every version that is read, as they were left.
    const LEFT: [(u32, &str); 1] = [(1, include_str!("../../../tests/formats/entry-1.json"))];

    #[test]
    fn what_earlier_programs_have_left_is_read_as_they_meant_it() {
        for (format, text) in LEFT {
            let found = parse(text).expect("it is read");
            assert_eq!((found.format, found.id, found.version.as_str()), (format, 3, "0.1.0"));
            assert_eq!(found.image_file, HostFile { device: 2049, inode: 4242 });
            assert_eq!(found.daemon, ProcessId { pid: 1234, start_time: 5678, namespace: 0 });
            assert_eq!((found.recovery, found.read_only, found.started), (Recovery::Reissue, false, true));
        }
        assert_eq!(LEFT[LEFT.len() - 1].0, ENTRY_FORMAT, "a new version has its sample, too");
    }

    #[test]
    fn an_entry_of_a_later_format_is_refused_with_both_versions() {
        let text = r#"{"format":2,"version":"9.9.9\u001b","daemons":[]}"#;
        let error = parse(text).expect_err("refused");
        assert_eq!((error.kind(), error.structure()), (Kind::Unsupported, Some("device entry")));
        for part in ["has format 2, written by vhdx-ublk 9.9.9\\u", "reads format 1"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert!(error.remedy_text().is_some_and(|remedy| remedy.contains("use the vhdx-ublk")));
        assert_eq!(parse("{}").expect_err("damaged").kind(), Kind::Corrupt);
    }

    #[test]
    fn how_a_damaged_image_is_shown_is_kept_and_no_earlier_program_knows_it() {
        let shown = Entry { salvage: Some(Salvage { assume: true }), ..entry(1) };
        let text = serde_json::to_string(&shown).expect("serialisable");
        assert!(text.contains(r#""salvage":{"assume":true}"#), "{text}");
        assert_eq!(parse(&text).expect("its own words"), shown);
        assert!(!serde_json::to_string(&entry(1)).expect("serialisable").contains("salvage"));
    }

    #[test]
    fn a_parent_is_known_by_its_inode_and_no_path_is_followed() {
        let parent = HostFile { device: 1, inode: 7 };
        let child = Entry { parents: vec!["/".into()], parent_files: vec![parent], ..entry(1) };
        assert!(child.reads(parent) && child.reads(child.image_file));
        assert!(!child.reads(HostFile::at("/".as_ref()).expect("there")));
    }

    #[test]
    fn a_path_of_another_mount_namespace_is_explained() {
        let missing = || Error::new(Kind::NotFound, "no such file");
        let here = Entry { mount_namespace: mount_namespace(), ..entry(1) };
        assert!(here.explain(missing()).remedy_text().is_none());
        let elsewhere = Entry { mount_namespace: mount_namespace() + 1, ..entry(1) };
        let error = elsewhere.explain(missing());
        assert!(error.to_string().contains("another mount namespace"), "{error}");
        assert!(elsewhere.explain(Error::new(Kind::Io, "no")).remedy_text().is_none());
    }
}
