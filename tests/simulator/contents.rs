//! Promise defended here: what is on a disk is recognised as `blkid` does, and no disk, whatever is on it,
//! makes the search panic, read without end, or fail.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use fastrand::Rng;
use proptest::prelude::*;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::contents::{Contents, Journal, ReadAt, TableKind, Volume, VolumeKind, find};
use vhdx_ublk::system::grow::Plan;

use crate::sim::tasks::block_on;
use crate::sim::violation::violated;
use crate::skip::skipped;

const MIB: u64 = 1 << 20;

/// The most bytes that one search may read: every partition of the longest table, and a table.
const MAX_READ: u64 = (1024 + 2) * (200 << 10) + 3 * MIB;

/// A disk that is `bytes` and then zeros, and counts what is read.
struct Drive<'a> {
    bytes: &'a [u8],
    size: u64,
    sector: u32,
    read: Cell<u64>,
    /// Everything from here on is unreadable.
    bad: u64,
}

impl<'a> Drive<'a> {
    fn new(bytes: &'a [u8], size: u64, sector: u32) -> Self {
        Self { bytes, size, sector, read: Cell::new(0), bad: u64::MAX }
    }

    fn find(&self) -> Contents {
        let found = block_on(find(self));
        assert!(self.read.get() <= MAX_READ, "{} bytes were read", self.read.get());
        let whole = |size: u64| size.is_multiple_of(self.sector.into());
        assert!(found.minimum_size().is_none_or(whole), "{found:?}");
        found
    }
}

impl ReadAt for Drive<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn sector_size(&self) -> u32 {
        self.sector
    }

    async fn read_at(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        let end = from + bytes.len() as u64;
        assert!(end <= self.size && from < end, "bytes {from} to {end} of {}", self.size);
        let whole = |at: u64| at.is_multiple_of(self.sector.into()) || at == self.size;
        assert!(whole(from) && whole(end), "sectors are read, not bytes {from} to {end}");
        self.read.set(self.read.get() + bytes.len() as u64);
        if end > self.bad {
            return Err(Error::new(Kind::Io, "a bad sector"));
        }
        let start = usize::try_from(from).map_or(self.bytes.len(), |from| from.min(self.bytes.len()));
        let count = bytes.len().min(self.bytes.len() - start);
        bytes[..count].copy_from_slice(&self.bytes[start..start + count]);
        bytes[count..].fill(0);
        Ok(())
    }
}

/// Runs a program on `image`, with `script` on its standard input; `false` if it is not installed.
fn run(image: &Path, program: &str, options: &[&str], script: &str) -> bool {
    let path = format!("{}:/sbin:/usr/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(program);
    command.args(options).arg(image).env("PATH", path).stdin(Stdio::piped());
    let Ok(mut child) = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn() else { return false };
    let mut stdin = child.stdin.take().expect("it was asked for");
    std::io::Write::write_all(&mut stdin, script.as_bytes()).expect("it reads");
    drop(stdin);
    assert!(child.wait().expect("it ends").success(), "{program} {options:?}");
    true
}

/// What `blkid` says of the volume in the file: its type, label, UUID.
fn by_blkid(image: &Path) -> Option<[Option<String>; 3]> {
    let output = Command::new("/sbin/blkid").args(["-p", "-o", "export"]).arg(image).output().ok()?;
    let text = String::from_utf8(output.stdout).expect("it writes UTF-8");
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.map(|value| value.replace('\\', ""))
    };
    Some(["TYPE", "LABEL", "UUID"].map(value))
}

/// A file system, as one of `mkfs` makes it in `size` bytes; `None` where that is not installed.
fn formatted(size: u64, program: &str, options: &[&str]) -> Option<(Vec<u8>, tempfile::NamedTempFile)> {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(size).expect("room");
    if !run(file.path(), program, options, "") {
        skipped(&format!("{program} is not installed"));
        return None;
    }
    Some((fs::read(file.path()).expect("it reads"), file))
}

/// Program, options, size in MiB, kind, version.
type Format = (&'static str, &'static [&'static str], u64, VolumeKind, Option<&'static str>);

const FORMATS: [Format; 11] = [
    ("mke2fs", &["-q", "-F", "-t", "ext2", "-L", "two"], 4, VolumeKind::Ext2, None),
    ("mke2fs", &["-q", "-F", "-t", "ext3", "-L", "three"], 8, VolumeKind::Ext3, None),
    ("mke2fs", &["-q", "-F", "-t", "ext4", "-L", "four"], 8, VolumeKind::Ext4, None),
    ("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096", "-O", "64bit"], 8, VolumeKind::Ext4, None),
    ("mkfs.xfs", &["-q", "-f", "-L", "x f s"], 300, VolumeKind::Xfs, None),
    ("mkfs.btrfs", &["-q", "-f", "-L", "butter"], 110, VolumeKind::Btrfs, None),
    ("mkfs.vfat", &["-F", "12", "-n", "TWELVE"], 2, VolumeKind::Vfat, Some("FAT12")),
    ("mkfs.vfat", &["-F", "16", "-n", "SIXTEEN"], 16, VolumeKind::Vfat, Some("FAT16")),
    ("mkfs.vfat", &["-F", "32", "-n", "LABEL 32"], 64, VolumeKind::Vfat, Some("FAT32")),
    ("mkfs.vfat", &["-F", "32", "-S", "4096"], 512, VolumeKind::Vfat, Some("FAT32")),
    ("mkswap", &["-L", "paging"], 4, VolumeKind::Swap, None),
];

#[test]
fn every_volume_is_what_blkid_takes_it_for() {
    for (program, options, mib, kind, version) in FORMATS {
        let Some((bytes, file)) = formatted(mib * MIB, program, options) else { continue };
        let found = Drive::new(&bytes, mib * MIB, 512).find();
        let volume = found.volume.clone().unwrap_or_else(|| panic!("{program} {options:?}: {found:?}"));
        assert_eq!((volume.kind, volume.version), (kind, version));
        let size = volume.size.expect("all of these say it");
        assert!(size <= mib * MIB && size >= mib * MIB - MIB, "{program} {options:?}: {size}");
        assert_eq!(found.minimum_size(), Some(size.next_multiple_of(512)));
        assert!(found.faults.is_empty() && found.table.is_none(), "{found:?}");
        let expected = if kind == VolumeKind::Xfs { Journal::Unknown } else { Journal::Clean };
        assert_eq!(volume.journal, expected, "{program} {options:?}");
        assert!(!volume.other_devices, "{program} {options:?}");
        let Some(judged) = by_blkid(file.path()) else { continue };
        let ours = [Some(kind.name().to_owned()), volume.label, volume.uuid];
        assert_eq!(ours, judged, "{program} {options:?}");
        assert_eq!(serde_json::to_value(kind).expect("a word"), kind.name());
    }
}

/// The bytes of a small disk with these fields.
fn lay(fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; 128 << 10];
    for (at, field) in fields {
        bytes[*at..at + field.len()].copy_from_slice(field);
    }
    bytes
}

fn wide(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn volume(
    kind: VolumeKind,
    label: Option<&str>,
    uuid: Option<&str>,
    size: Option<u64>,
    journal: Journal,
) -> Volume {
    let [label, uuid] = [label, uuid].map(|text| text.map(str::to_owned));
    Volume { kind, version: None, label, uuid, size, journal, other_devices: false }
}

const ID: [u8; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
const ID_TEXT: &str = "01020304-0506-0708-090a-0b0c0d0e0f10";

/// Volumes whose programs are rarely installed, by the fields that their specifications give.
fn crafted() -> Vec<(Vec<u8>, Volume)> {
    let f2fs = lay(&[
        (1024, &0xf2f5_2010_u32.to_le_bytes()),
        (1040, &12_u32.to_le_bytes()),
        (1060, &2048_u64.to_le_bytes()),
        (1132, &ID),
        (1148, &wide("flash")),
    ]);
    let exfat = lay(&[
        (3, b"EXFAT   "),
        (72, &2048_u64.to_le_bytes()),
        (88, &64_u32.to_le_bytes()),
        (96, &3_u32.to_le_bytes()),
        (100, &0xab12_cd34_u32.to_le_bytes()),
        (106, &[2]),
        (108, &[9, 3]),
        (510, &[0x55, 0xaa]),
        (72 * 512, &[&[0x85; 32][..], &[0x83, 4], &wide("card")].concat()),
    ]);
    let luks2 = lay(&[(0, b"LUKS\xba\xbe\0\x02"), (24, b"secret"), (168, ID_TEXT.as_bytes())]);
    let lvm2 = lay(&[
        (512, b"LABELONE"),
        (532, &32_u32.to_le_bytes()),
        (536, b"LVM2 001abcdefghijklmnopqrstuvwxyz012345"),
        (576, &MIB.to_le_bytes()),
    ]);
    let sleeping = lay(&[(1028, &255_u32.to_le_bytes()), (4086, b"S1SUSPEND\0")]);
    let refs = lay(&[(3, b"ReFS\0\0\0\0"), (24, &512_u64.to_le_bytes()), (32, &4096_u32.to_le_bytes())]);
    let mut luks = volume(VolumeKind::Luks, Some("secret"), Some(ID_TEXT), None, Journal::Unknown);
    luks.version = Some("2");
    let physical = "abcdef-ghij-klmn-opqr-stuv-wxyz-012345";
    vec![
        (f2fs, volume(VolumeKind::F2fs, Some("flash"), Some(ID_TEXT), Some(8 * MIB), Journal::Unknown)),
        (exfat, volume(VolumeKind::Exfat, Some("card"), Some("AB12-CD34"), Some(MIB), Journal::Dirty)),
        (luks2, luks),
        (lvm2, volume(VolumeKind::Lvm2, None, Some(physical), Some(MIB), Journal::Unknown)),
        (sleeping, volume(VolumeKind::Swap, None, None, Some(MIB), Journal::Dirty)),
        (lay(&[(3, b"-FVE-FS-")]), volume(VolumeKind::Bitlocker, None, None, None, Journal::Unknown)),
        (refs, volume(VolumeKind::Refs, None, None, Some(2 * MIB), Journal::Unknown)),
    ]
}

#[test]
fn volumes_are_read_as_their_specifications_say() {
    for (bytes, expected) in crafted() {
        let found = Drive::new(&bytes, 8 * MIB, 512).find();
        // Where a volume does not say how long it is, all of the disk is needed.
        assert_eq!(found.minimum_size(), Some(expected.size.unwrap_or(8 * MIB)));
        assert_eq!(found.volume, Some(expected));
    }
}

/// What the superblock at `block` says with `bytes` in it at `at`.
fn names_others(disk: &[u8], block: usize, at: usize, bytes: &[u8]) -> bool {
    let mut disk = disk.to_vec();
    disk[block + at..][..bytes.len()].copy_from_slice(bytes);
    let size = disk.len() as u64;
    Drive::new(&disk, size, 512).find().volume.expect("it is recognised").other_devices
}

#[test]
fn parts_on_other_devices_show() {
    let f2fs = crafted().swap_remove(0).0;
    assert!(!names_others(&f2fs, 1024, 2201, b"\0"));
    for device in [0, 1, 7] {
        assert!(names_others(&f2fs, 1024, 2201 + 68 * device, b"/dev/sda"), "{device}");
    }
    assert!(!names_others(&f2fs, 1024, 2201 + 68 * 8, b"x"), "that is behind the paths");
    for second in [4 << 10, 16 << 10, 64 << 10] {
        let mut f2fs = f2fs.clone();
        f2fs[second + 1024..][..4].copy_from_slice(&0xf2f5_2010_u32.to_le_bytes());
        assert!(names_others(&f2fs, second + 1024, 2269, b"/dev/sda"), "the copy at {second}");
    }
    if let Some((btrfs, _)) = formatted(110 * MIB, FORMATS[5].0, FORMATS[5].1) {
        assert!(names_others(&btrfs, 64 << 10, 136, &2_u64.to_le_bytes()));
    }
    if let Some((ext4, _)) = formatted(8 * MIB, FORMATS[2].0, FORMATS[2].1) {
        assert!(names_others(&ext4, 1024, 0xe0, &0_u32.to_le_bytes()));
    }
}

/// An ext4 that was mounted when its machine lost power.
#[test]
fn a_journal_that_was_not_replayed_shows() {
    let Some((mut bytes, _)) = formatted(8 * MIB, "mke2fs", FORMATS[2].1) else { return };
    bytes[1024 + 0x60] |= 4;
    let found = Drive::new(&bytes, 8 * MIB, 512).find();
    assert_eq!(found.volume.map(|volume| volume.journal), Some(Journal::Dirty));
    let Some((mut bytes, _)) = formatted(64 * MIB, "mkfs.vfat", FORMATS[8].1) else { return };
    bytes[65] |= 1;
    let found = Drive::new(&bytes, 64 * MIB, 512).find();
    assert_eq!(found.volume.map(|volume| volume.journal), Some(Journal::Dirty));
}

/// An ext4 with a journal, and with these features that not every program knows.
fn ext4(incompatible: u32) -> Contents {
    let bytes = lay(&[
        (1028, &2048_u32.to_le_bytes()),
        (1024 + 0x38, &0xef53_u16.to_le_bytes()),
        (1024 + 0x3a, &1_u16.to_le_bytes()),
        (1024 + 0x5c, &4_u32.to_le_bytes()),
        (1024 + 0x60, &incompatible.to_le_bytes()),
        (1024 + 0xe0, &8_u32.to_le_bytes()),
    ]);
    Drive::new(&bytes, 8 * MIB, 512).find()
}

/// Its journal would be replayed by whoever mounts it.
#[test]
pub fn what_was_not_shut_down_does_not_grow() {
    const EXTENTS: u32 = 0x40;
    const RECOVER: u32 = 4;
    let refused = |contents: &Contents| Plan::of(contents, None).err().map(|error| error.to_string());
    let clean = refused(&ext4(EXTENTS)).unwrap_or_default();
    assert!(clean.is_empty() || clean.contains("is not installed"), "{clean}");
    let unclean = refused(&ext4(EXTENTS | RECOVER)).unwrap_or_default();
    if !unclean.contains("was not shut down cleanly") {
        violated(format!("an ext4 whose journal is to be replayed grows: {unclean}"));
    }
}

/// A disk with a table by `sfdisk`, and two file systems in it.
fn partitioned(label: &str) -> Option<Vec<u8>> {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(32 * MIB).expect("room");
    let rest = if label == "gpt" { "" } else { ",type=5\nstart=14336,size=8192" };
    let script =
        format!("label: {label}\nstart=2048,size=4096\nstart=8192,size=4096\nstart=12288,size=32768{rest}\n");
    if !run(file.path(), "sfdisk", &["-q"], &script) {
        skipped("sfdisk is not installed");
        return None;
    }
    let place = |bytes: &[u8], at: u64| file.as_file().write_all_at(bytes, at).expect("room");
    place(&formatted(2 * MIB, FORMATS[6].0, FORMATS[6].1)?.0, MIB);
    place(&formatted(4 * MIB, FORMATS[0].0, &["-q", "-F", "-t", "ext2"])?.0[..2 << 20], 4 * MIB);
    Some(fs::read(file.path()).expect("it reads"))
}

#[test]
fn partitions_and_what_is_in_them_are_found() {
    for (label, kind) in [("gpt", TableKind::Gpt), ("dos", TableKind::Mbr)] {
        let Some(bytes) = partitioned(label) else { return };
        let disk = Drive::new(&bytes, 32 * MIB, 512);
        let found = disk.find();
        let table = found.table.as_ref().unwrap_or_else(|| panic!("{label}: {found:?}"));
        assert_eq!((table.kind, table.backup_at_end), (kind, true));
        let places = found.partitions().iter().map(|part| (part.number, part.start / MIB, part.length / MIB));
        let places: Vec<_> = places.collect();
        let mut expected = vec![(1, 1, 2), (2, 4, 2), (3, 6, 16)];
        let kinds: Vec<_> =
            found.partitions().iter().map(|part| part.volume.as_ref().map(|volume| volume.kind)).collect();
        if kind == TableKind::Mbr {
            expected.push((5, 7, 4));
        }
        assert_eq!(places, expected, "{label}");
        assert_eq!(kinds[..2], [Some(VolumeKind::Vfat), Some(VolumeKind::Ext2)]);
        let backup = if kind == TableKind::Gpt { 33 * 512 } else { 0 };
        assert_eq!(found.minimum_size(), Some(22 * MIB + backup));
        // The second file system was made for a larger place.
        assert!(matches!(&found.faults[..], [fault] if fault.contains("does not fit")), "{:?}", found.faults);
    }
}

#[test]
fn a_damaged_table_is_a_fault_and_its_backup_counts() {
    let Some(whole) = partitioned("gpt") else { return };
    let partitions = Drive::new(&whole, 32 * MIB, 512).find().partitions().to_vec();
    let last = whole.len() - 512;
    let faults = |bytes: &[u8]| {
        let found = Drive::new(bytes, bytes.len() as u64, 512).find();
        let faults = found.faults.iter().filter(|fault| fault.contains("GPT")).cloned().collect::<Vec<_>>();
        (found, faults)
    };
    for (at, word) in [(512 + 40, "checksum"), (512, "not there"), (1024 + 60, "checksum of its entries")] {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        let (found, faults) = faults(&bytes);
        assert_eq!(found.partitions(), partitions, "by the backup");
        assert!(matches!(&faults[..], [fault] if fault.contains(word)), "{faults:?}");
        bytes[last] = 0;
        let found = Drive::new(&bytes, 32 * MIB, 512).find();
        let protective = found.table.as_ref().expect("the MBR that protects the GPT");
        assert_eq!(protective.kind, TableKind::Mbr);
        assert_eq!(found.minimum_size(), Some(32 * MIB), "nothing is given up");
    }
    let mut bytes = whole.clone();
    bytes[last + 40] ^= 0xff;
    let (found, damage) = faults(&bytes);
    assert_eq!(found.partitions(), partitions);
    assert!(matches!(&damage[..], [fault] if fault.starts_with("the backup GPT")), "{damage:?}");
    // The disk has grown: the backup is whole, and not at the end.
    let mut bytes = whole;
    bytes.resize(bytes.len() + (4 << 20), 0);
    let (found, damage) = faults(&bytes);
    assert_eq!(found.table.map(|table| table.backup_at_end), Some(false));
    assert_eq!(damage, [] as [&str; 0]);
}

/// A list of logical partitions that leads back to itself, or never ends, or out of the disk.
#[test]
fn extended_partitions_end() {
    let sector = |entries: &[(u8, u32, u32)]| {
        let mut bytes = vec![0; 512];
        for ((kind, first, count), at) in entries.iter().zip((446..).step_by(16)) {
            bytes[at + 4] = *kind;
            bytes[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
            bytes[at + 12..at + 16].copy_from_slice(&count.to_le_bytes());
        }
        bytes[510..].copy_from_slice(&[0x55, 0xaa]);
        bytes
    };
    let mut circle = sector(&[(5, 8, 4000)]);
    circle.resize(9 * 512, 0);
    circle[8 * 512..].copy_from_slice(&sector(&[(0x83, 1, 1), (5, 0, 10)]));
    let found = Drive::new(&circle, MIB, 512).find();
    assert_eq!(found.partitions().len(), 2);
    assert!(found.faults.iter().any(|fault| fault.contains("circle")), "{:?}", found.faults);
    let mut endless = sector(&[(5, 8, 4000)]);
    for next in 0..1000 {
        endless.resize((8 + next) * 512, 0);
        let next = u32::try_from(next).expect("small");
        endless.extend(sector(&[(0x83, 1, 1), (5, next + 1, 10)]));
    }
    let found = Drive::new(&endless, MIB, 512).find();
    assert_eq!(found.partitions().len(), 129);
    assert!(found.faults.iter().any(|fault| fault.contains("does not end")), "{:?}", found.faults);
    let away = sector(&[(5, u32::MAX, u32::MAX)]);
    let found = Drive::new(&away, MIB, 4096).find();
    assert!(found.faults.iter().any(|fault| fault.contains("breaks off")), "{:?}", found.faults);
    assert!(found.minimum_size() > Some(MIB));
}

#[test]
fn what_cannot_be_read_is_a_fault() {
    let Some(bytes) = partitioned("gpt") else { return };
    for bad in [0, 3 * MIB, 5 * MIB, 31 * MIB] {
        let mut disk = Drive::new(&bytes, 32 * MIB, 512);
        disk.bad = bad;
        let found = disk.find();
        assert!(found.faults.iter().any(|fault| fault.contains("cannot be read")), "{found:?}");
    }
}

#[test]
fn nothing_is_recognised_where_nothing_is() {
    for size in [0, 512, 4096, MIB, 1 << 50] {
        let found = Drive::new(&[], size, 512).find();
        assert!(found.table.is_none() && found.volume.is_none() && found.faults.is_empty(), "{found:?}");
        assert_eq!(found.minimum_size(), None);
    }
}

/// Real disks and crafted ones with some of their bytes changed, cut anywhere, in either sector size.
#[test]
fn no_disk_is_too_hostile() {
    let formats = FORMATS.iter().filter(|format| format.2 <= 64);
    let real = formats.filter_map(|format| formatted(format.2 * MIB, format.0, format.1));
    let mut disks: Vec<Vec<u8>> = real.map(|(bytes, _)| bytes).collect();
    disks.extend(crafted().into_iter().map(|(bytes, _)| bytes));
    disks.extend(["gpt", "dos"].into_iter().filter_map(partitioned));
    disks.push(vec![0xff; 128 << 10]);
    let mut rng = Rng::with_seed(1);
    // Where tables and superblocks are, numbers that lead far are likely.
    let odd = [0, 1, 0x7f, 0x80, 0xff];
    for (number, disk) in disks.iter_mut().enumerate() {
        for _ in 0..400 {
            let mut undo = Vec::new();
            for _ in 0..rng.usize(1..12) {
                let near = [512, 2048, 4096, 70_000][rng.usize(..4)];
                let at = rng.usize(..near.min(disk.len()));
                for at in at..(at + [1, 2, 4, 8][rng.usize(..4)]).min(disk.len()) {
                    undo.push((at, disk[at]));
                    disk[at] = if rng.bool() { odd[rng.usize(..odd.len())] } else { rng.u8(..) };
                }
            }
            mend_gpt(disk, &mut rng, &mut undo);
            let size = if rng.u8(..4) == 0 { rng.u64(..2 * disk.len() as u64) } else { disk.len() as u64 };
            let mut searched = Drive::new(disk, size, if rng.bool() { 512 } else { 4096 });
            searched.bad = if rng.u8(..8) == 0 { rng.u64(..=size) } else { u64::MAX };
            searched.find();
            undo.into_iter().rev().for_each(|(at, byte)| disk[at] = byte);
        }
        assert!(!disk.is_empty(), "disk {number}");
    }
}

/// Often the checksums are right all the same, so that what lies behind them is reached.
fn mend_gpt(disk: &mut [u8], rng: &mut Rng, undo: &mut Vec<(usize, u8)>) {
    if &disk[512..520] != b"EFI PART" || rng.u8(..4) == 0 {
        return;
    }
    let count = u32::from_le_bytes(disk[592..596].try_into().expect("four bytes")) as usize;
    let length = u32::from_le_bytes(disk[596..600].try_into().expect("four bytes")) as usize;
    if let Some(entries) = count.checked_mul(length).and_then(|bytes| disk.get(1024..1024 + bytes)) {
        let sum = crc32fast::hash(entries).to_le_bytes();
        for (at, byte) in (600..).zip(sum) {
            undo.push((at, disk[at]));
            disk[at] = byte;
        }
    }
    let header = [&disk[512..528], &[0; 4], &disk[532..604]].concat();
    for (at, byte) in (528..).zip(crc32fast::hash(&header).to_le_bytes()) {
        undo.push((at, disk[at]));
        disk[at] = byte;
    }
}

/// What begins a structure, and where.
const MAGICS: [(usize, &[u8]); 12] = [
    (0, b"XFSB"),
    (0, b"LUKS\xba\xbe\0\x01"),
    (3, b"NTFS    "),
    (3, b"EXFAT   "),
    (3, b"ReFS\0\0\0\0"),
    (3, b"-FVE-FS-"),
    (512, b"EFI PART"),
    (512, b"LABELONE"),
    (1080, &[0x53, 0xef]),
    (1024, &[0x10, 0x20, 0xf5, 0xf2]),
    (4086, b"SWAPSPACE2"),
    (65600, b"_BHRfS_M"),
];

proptest! {
    /// Structures of any content: all numbers are as far off as they can be.
    #[test]
    fn no_structure_is_too_hostile(
        (at, magic) in prop::sample::select(&MAGICS[..]),
        noise in prop::collection::vec((0_usize..2048, any::<[u8; 4]>()), 0..40),
        fill in any::<u8>(),
        boot in any::<bool>(),
        large in any::<bool>(),
    ) {
        let mut bytes = vec![fill; 80 << 10];
        let start = at / 1024 * 1024;
        for (offset, noise) in noise {
            bytes[start + offset..start + offset + 4].copy_from_slice(&noise);
        }
        bytes[at..at + magic.len()].copy_from_slice(magic);
        if boot {
            bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        }
        let disk = Drive::new(&bytes, bytes.len() as u64, if large { 4096 } else { 512 });
        let found = disk.find();
        prop_assert!(found.volume.is_none() || found.minimum_size().is_some());
    }
}
