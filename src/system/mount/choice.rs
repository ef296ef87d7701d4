//! Which file system of a disk is to be mounted.

use std::fmt::Write;
use std::path::Path;

use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::operations::contents::{Contents, Journal, Partition, Volume, VolumeKind};
use crate::printable::{human_size, printable};
use crate::system::{btrfs, driver};

/// A file system that was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// The partition that holds it; none if the disk has no partitions.
    pub(super) place: Option<Place>,
    /// What is known of it.
    pub(super) volume: Option<Volume>,
}

/// Where a partition lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Its number.
    pub(super) number: u32,
    /// Where it starts, bytes.
    pub(super) start: u64,
    /// How long it is, bytes.
    pub(super) length: u64,
}

/// The partitions that belong to the firmware or to the repair of Windows: they are mounted only by request.
const OF_THE_SYSTEM: [&str; 4] = ["EFI system", "Microsoft reserved", "Windows recovery", "BIOS boot"];

/// The types whose drivers open what a superblock names: another device, or every part of one file system.
const NAMES_DEVICES: [&str; 8] = ["ext2", "ext3", "ext4", "btrfs", "f2fs", "bcachefs", "jfs", "reiserfs"];

/// The partition called `wanted`, or the only file system of the disk.
///
/// # Errors
///
/// [`Kind::NotFound`] if there is none, [`Kind::Usage`] if there are several, both with what the disk has;
/// [`Kind::Unsupported`] for a volume that holds no file system itself, or that names other devices of the
/// machine.
pub(super) fn choose(contents: &Contents, wanted: Option<&str>) -> Result<Choice> {
    if contents.table.is_none() {
        return whole_disk(contents, wanted);
    }
    let partition = match wanted {
        Some(wanted) => called(contents, wanted)?,
        None => only_one(contents)?,
    };
    let place = Place { number: partition.number, start: partition.start, length: partition.length };
    if partition.is_extended() {
        let message = format!("partition {} holds other partitions, no file system", partition.number);
        return Err(Error::new(Kind::Unsupported, message).remedy(list(contents)));
    }
    refuse(partition.volume.as_ref(), &format!("partition {}", partition.number))?;
    Ok(Choice { place: Some(place), volume: partition.volume.clone() })
}

fn whole_disk(contents: &Contents, wanted: Option<&str>) -> Result<Choice> {
    let label = contents.volume.as_ref().and_then(|volume| volume.label.as_deref());
    if let Some(wanted) = wanted.filter(|&wanted| label != Some(wanted)) {
        let message = format!("there is no partition {wanted}: the disk has no partitions");
        return Err(Error::new(Kind::NotFound, message).remedy("mount it without naming a partition"));
    }
    refuse(contents.volume.as_ref(), "the disk")?;
    Ok(Choice { place: None, volume: contents.volume.clone() })
}

/// The partition with this number or label.
fn called<'a>(contents: &'a Contents, wanted: &str) -> Result<&'a Partition> {
    let partitions = contents.partitions();
    let number = wanted.parse().ok();
    if let Some(found) = partitions.iter().find(|partition| Some(partition.number) == number) {
        return Ok(found);
    }
    let has_label = |partition: &&Partition| {
        let label = partition.volume.as_ref().and_then(|volume| volume.label.as_deref());
        label == Some(wanted) || partition.name.as_deref() == Some(wanted)
    };
    let mut found = partitions.iter().filter(has_label);
    match (found.next(), found.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => {
            Err(Error::new(Kind::NotFound, format!("there is no partition {wanted}")).remedy(list(contents)))
        }
        (Some(_), Some(_)) => {
            let message = format!("several partitions have the label {wanted}: name one by its number");
            Err(Error::new(Kind::Usage, message).remedy(list(contents)))
        }
    }
}

/// The only partition with a file system, those of the system left out where there are others.
fn only_one(contents: &Contents) -> Result<&Partition> {
    let holds_files = |partition: &&Partition| partition.volume.is_some() && layer_of(partition).is_none();
    let is_plain =
        |partition: &&Partition| partition.type_name().is_none_or(|name| !OF_THE_SYSTEM.contains(&name));
    let all: Vec<_> = contents.partitions().iter().filter(holds_files).collect();
    let plain: Vec<_> = all.iter().copied().filter(|partition| is_plain(partition)).collect();
    let hidden = contents
        .partitions()
        .iter()
        .filter(is_plain)
        .find(|partition| layer_of(partition).is_some_and(|layer| layer.remedy.is_some()));
    match (&plain[..], &all[..], hidden) {
        ([only], _, None) | ([], [only], None) => Ok(only),
        // What hides its files may be what is meant, and is the reason why nothing else is.
        ([], _, Some(hidden)) => Ok(hidden),
        ([], [], None) => {
            let message = "no file system was recognised on the disk";
            Err(Error::new(Kind::NotFound, message).remedy(list(contents)))
        }
        _ => {
            let message = "the disk has several file systems";
            Err(Error::new(Kind::Usage, message).remedy(list(contents)))
        }
    }
}

/// A volume that holds no files itself.
#[derive(Clone, Copy)]
struct Layer {
    what: &'static str,
    /// How to get to the files that it hides, if it hides any.
    remedy: Option<&'static str>,
}

fn layer(kind: VolumeKind) -> Option<Layer> {
    let (what, remedy) = match kind {
        VolumeKind::Swap => ("swap space", None),
        VolumeKind::Luks => (
            "encrypted with LUKS",
            Some(
                "serve the image with `vhdx-ublk add`, then `cryptsetup open DEVICE NAME`, and mount \
                  /dev/mapper/NAME",
            ),
        ),
        VolumeKind::Bitlocker => (
            "encrypted with BitLocker",
            Some(
                "serve the image with `vhdx-ublk add`, then `cryptsetup open --type bitlk DEVICE NAME` with \
                  the recovery key, and mount /dev/mapper/NAME",
            ),
        ),
        VolumeKind::Lvm2 => (
            "a physical volume of LVM",
            Some(
                "serve the image with `vhdx-ublk add`, then `vgchange -ay`, and mount the logical volume \
                  that `lvs` shows",
            ),
        ),
        _ => return None,
    };
    Some(Layer { what, remedy })
}

fn layer_of(partition: &Partition) -> Option<Layer> {
    partition.volume.as_ref().and_then(|volume| layer(volume.kind))
}

/// One driver is for all that ext has become.
fn driver_of(name: &str) -> &str {
    if ["ext2", "ext3"].contains(&name) { "ext4" } else { name }
}

fn refuse(volume: Option<&Volume>, place: &str) -> Result<()> {
    if let Some(volume) = volume.filter(|volume| volume.other_devices) {
        return Err(needs_other_devices(volume.kind, place));
    }
    let Some(Layer { what, remedy }) = volume.and_then(|volume| layer(volume.kind)) else {
        return Ok(());
    };
    let error = Error::new(Kind::Unsupported, format!("{place} is {what}: it has no file system to mount"));
    Err(match remedy {
        Some(remedy) => error.remedy(remedy),
        None => error,
    })
}

/// The kernel would open devices of the machine for it.
fn needs_other_devices(kind: VolumeKind, place: &str) -> Error {
    let why = driver::why_alone(kind);
    let message = format!("the {} on {place} leads the kernel to other devices: {why}", kind.name());
    Error::new(Kind::Unsupported, message)
        .remedy("if all of them are yours: serve the image with `vhdx-ublk add`, and mount its device")
}

/// What there is to choose from.
fn list(contents: &Contents) -> String {
    if contents.partitions().is_empty() {
        return "the partition table is empty".into();
    }
    let mut text = String::from("choose with --partition N or LABEL (in fstab: partition=N), from:");
    for partition in contents.partitions() {
        let volume = partition.volume.as_ref();
        let what = volume.map_or(partition.type_name().unwrap_or("unknown"), |volume| volume.kind.name());
        let label = volume.and_then(|volume| volume.label.as_deref()).or(partition.name.as_deref());
        let label = label.map(|label| format!(" `{}`", printable(label))).unwrap_or_default();
        let size = human_size(partition.length);
        // A text takes everything.
        let _ = write!(text, " [{}: {what}{label}, {size}]", partition.number);
    }
    text
}

impl Choice {
    /// Where it begins on the disk, bytes.
    pub(super) fn start(&self) -> u64 {
        self.place.map_or(0, |place| place.start)
    }

    /// The type for mount(8): the one that is `wanted`, else what was recognised. mount(8) looks for none
    /// itself: it could find another file system than the one that was examined.
    ///
    /// # Errors
    ///
    /// [`Kind::Unsupported`] if none is wanted and none was recognised, or if the wanted one can lead the
    /// kernel to other devices and another was recognised; [`Kind::Usage`] for several.
    pub(super) fn type_for_mount<'a>(&self, wanted: Option<&'a str>) -> Result<&'a str> {
        let found = self.volume.as_ref().map(|volume| volume.kind.name());
        let Some(wanted) = wanted.filter(|&wanted| wanted != "auto") else {
            return found.ok_or_else(|| {
                Error::new(Kind::Unsupported, "no file system was recognised")
                    .remedy("if you trust the image, name the type of its file system: -t TYPE")
            });
        };
        if wanted.contains(',') || wanted.starts_with("no") {
            let message = format!("`{}` is not one type of file system", printable(wanted));
            return Err(Error::new(Kind::Usage, message).remedy("name one, or omit -t"));
        }
        match found {
            Some(found) if NAMES_DEVICES.contains(&wanted) && driver_of(wanted) != driver_of(found) => {
                let message = format!("the file system is {found}, not {wanted}");
                Err(Error::new(Kind::Unsupported, message).remedy("omit -t"))
            }
            _ => Ok(wanted),
        }
    }

    /// Refuses a btrfs that the kernel would put together with devices of the machine, whatever its own bytes
    /// say: it is not mounted to find out. It begins at byte `start` of the device at `node`.
    ///
    /// # Errors
    ///
    /// [`Kind::Unsupported`]; if the device cannot be read.
    pub(super) fn refuse_joined(&self, node: &Path, start: u64) -> Result<()> {
        let is_btrfs = self.volume.as_ref().is_some_and(|volume| volume.kind == VolumeKind::Btrfs);
        if !is_btrfs || !btrfs::has_other_devices(node, start).doing("reading the device").file(node)? {
            return Ok(());
        }
        let message = "another device of this machine has a btrfs with the same identifier, and the kernel \
                       would take both for parts of one";
        Err(Error::new(Kind::Unsupported, message).remedy(
            "unmount the other one, if it is a copy; `btrfstune -u` gives one of them another identifier",
        ))
    }

    /// Refuses to write to a Windows volume that Windows still has in memory, or has not put in order.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`], with what helps.
    pub(super) fn refuse_unclean(&self) -> Result<()> {
        let Some(volume) = &self.volume else { return Ok(()) };
        if volume.kind != VolumeKind::Ntfs || volume.journal != Journal::Dirty {
            return Ok(());
        }
        let message = "the NTFS volume was not shut down cleanly: Windows is hibernated, was shut down with \
                       fast startup, or has crashed. Writing to it would damage it";
        Err(Error::new(Kind::InUse, message).remedy(
            "mount it read-only (-o ro); or start Windows once more and shut it down with `shutdown /s /t 0`",
        ))
    }

    /// The option that mounts a volume whose journal cannot be replayed, as its disk is read-only.
    pub(super) fn without_replay(&self) -> Option<&'static str> {
        let volume = self.volume.as_ref().filter(|volume| volume.journal == Journal::Dirty)?;
        matches!(volume.kind, VolumeKind::Ext3 | VolumeKind::Ext4).then_some("noload")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(kind: VolumeKind, label: Option<&str>) -> Volume {
        Volume {
            kind,
            version: None,
            label: label.map(str::to_owned),
            uuid: None,
            size: None,
            journal: Journal::Clean,
            other_devices: false,
        }
    }

    /// A disk whose partitions have these types and volumes.
    fn disk(partitions: &[(&str, Option<Volume>)]) -> Contents {
        let partition = |(number, (kind, volume)): (u32, &(&str, Option<Volume>))| Partition {
            number,
            start: u64::from(number) << 20,
            length: 1 << 20,
            r#type: (*kind).into(),
            name: (number == 3).then(|| "third".into()),
            volume: volume.clone(),
        };
        Contents::of_partitions((1..).zip(partitions).map(partition).collect())
    }

    const EFI: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
    const DATA: &str = "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7";

    fn number(contents: &Contents, wanted: Option<&str>) -> Result<u32> {
        choose(contents, wanted).map(|choice| choice.place.expect("a partition").number)
    }

    #[test]
    fn the_only_file_system_is_chosen_and_the_firmwares_is_not_counted() {
        let efi = (EFI, Some(volume(VolumeKind::Vfat, None)));
        let ntfs = (DATA, Some(volume(VolumeKind::Ntfs, Some("Data"))));
        let swap = ("0x82", Some(volume(VolumeKind::Swap, None)));
        assert_eq!(number(&disk(&[efi.clone(), swap, ntfs.clone()]), None).expect("one"), 3);
        assert_eq!(number(&disk(std::slice::from_ref(&efi)), None).expect("it is all there is"), 1);
        let error = number(&disk(&[ntfs.clone(), efi, ntfs]), None).expect_err("two");
        assert_eq!(error.kind(), Kind::Usage);
        let remedy = error.remedy_text().expect("what there is");
        assert!(
            remedy.contains("[1: ntfs `Data`, 1 MiB]") && remedy.contains("[2: vfat, 1 MiB]"),
            "{remedy}"
        );
    }

    #[test]
    fn a_partition_is_called_by_its_number_its_label_and_its_name() {
        let ext4 = |label| (DATA, Some(volume(VolumeKind::Ext4, Some(label))));
        let disk = disk(&[ext4("a"), ext4("b"), ext4("a"), (DATA, None)]);
        assert_eq!(number(&disk, Some("2")).expect("there"), 2);
        assert_eq!(number(&disk, Some("b")).expect("there"), 2);
        assert_eq!(number(&disk, Some("third")).expect("there"), 3);
        assert_eq!(number(&disk, Some("4")).expect("its type may be named"), 4);
        assert_eq!(number(&disk, Some("a")).expect_err("two").kind(), Kind::Usage);
        assert_eq!(number(&disk, Some("5")).expect_err("none").kind(), Kind::NotFound);
    }

    #[test]
    fn what_holds_no_files_is_refused_with_what_it_is() {
        for (kind, word) in [
            (VolumeKind::Luks, "LUKS"),
            (VolumeKind::Bitlocker, "BitLocker"),
            (VolumeKind::Lvm2, "LVM"),
            (VolumeKind::Swap, "swap"),
        ] {
            let efi = (EFI, Some(volume(VolumeKind::Vfat, None)));
            let disk = disk(&[efi, (DATA, Some(volume(kind, None)))]);
            let error = choose(&disk, Some("2")).expect_err("no files");
            assert!(error.kind() == Kind::Unsupported && error.message().contains(word), "{error}");
            if kind != VolumeKind::Swap {
                assert!(choose(&disk, None).expect_err("no files").message().contains(word));
            }
        }
    }

    #[test]
    fn nothing_is_mounted_that_leads_to_other_devices() {
        for kind in [VolumeKind::Ext3, VolumeKind::Ext4, VolumeKind::Btrfs] {
            let with = |other_devices| disk(&[(DATA, Some(Volume { other_devices, ..volume(kind, None) }))]);
            let error = choose(&with(true), None).expect_err("a part of it is elsewhere");
            assert!(error.kind() == Kind::Unsupported && error.message().contains("other device"), "{error}");
            choose(&with(false), None).expect("all of it is here");
        }
    }

    #[test]
    fn paths_in_an_f2fs_are_not_opened() {
        let f2fs = |other_devices| Volume { other_devices, ..volume(VolumeKind::F2fs, None) };
        let error = choose(&disk(&[(DATA, Some(f2fs(true)))]), None).expect_err("it names devices");
        assert!(error.kind() == Kind::Unsupported && error.message().contains("by path"), "{error}");
        let whole = |volume| {
            let mut contents = disk(&[]);
            (contents.table, contents.volume) = (None, Some(volume));
            contents
        };
        assert_eq!(choose(&whole(f2fs(true)), None).expect_err("the same").kind(), Kind::Unsupported);
        assert_eq!(choose(&whole(f2fs(false)), None).expect("it names none").place, None);
    }

    #[test]
    fn what_was_examined_is_what_is_mounted() {
        let with =
            |kind: Option<VolumeKind>| Choice { place: None, volume: kind.map(|kind| volume(kind, None)) };
        let (unknown, vfat, ext2) = (with(None), with(Some(VolumeKind::Vfat)), with(Some(VolumeKind::Ext2)));
        let ntfs = with(Some(VolumeKind::Ntfs));
        for (choice, wanted, expected) in [
            (&vfat, None, "vfat"),
            (&vfat, Some("auto"), "vfat"),
            (&ntfs, None, "ntfs"),
            (&ntfs, Some("ntfs3"), "ntfs3"),
            (&ext2, Some("ext4"), "ext4"),
            (&unknown, Some("iso9660"), "iso9660"),
        ] {
            assert_eq!(choice.type_for_mount(wanted).expect("one type"), expected);
        }
        for wanted in [None, Some("auto")] {
            let error = unknown.type_for_mount(wanted).expect_err("mount(8) would look");
            assert!(error.kind() == Kind::Unsupported && error.message().contains("recognised"), "{error}");
        }
        for wanted in ["f2fs", "ext4", "btrfs", "jfs"] {
            let error = vfat.type_for_mount(Some(wanted)).expect_err("its superblock was not read");
            assert_eq!(error.kind(), Kind::Unsupported, "{wanted}");
        }
        for wanted in ["vfat,f2fs", "noext4"] {
            assert_eq!(vfat.type_for_mount(Some(wanted)).expect_err("several").kind(), Kind::Usage);
        }
    }

    #[test]
    fn windows_keeps_what_it_has_in_memory() {
        let with =
            |kind, journal| Choice { place: None, volume: Some(Volume { journal, ..volume(kind, None) }) };
        assert!(with(VolumeKind::Ntfs, Journal::Dirty).refuse_unclean().is_err());
        assert!(with(VolumeKind::Ntfs, Journal::Clean).refuse_unclean().is_ok());
        assert!(with(VolumeKind::Ext4, Journal::Dirty).refuse_unclean().is_ok(), "its journal is replayed");
        assert_eq!(with(VolumeKind::Ext4, Journal::Dirty).without_replay(), Some("noload"));
        assert_eq!(with(VolumeKind::Ext4, Journal::Clean).without_replay(), None);
    }
}
