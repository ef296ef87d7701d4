//! A partition table and its partitions, whichever kind of table it is.

use schemars::JsonSchema;
use serde::Serialize;

use super::volume::Volume;

/// A partition table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Table {
    /// What kind it is.
    pub kind: TableKind,
    /// What distinguishes this disk from others: a GUID, or eight digits.
    pub id: Option<String>,
    /// What the table itself takes at the end of the disk, bytes.
    pub backup_bytes: u64,
    /// Whether that is at the end of the disk; it is not if the disk has grown. An MBR has none.
    pub backup_at_end: bool,
    /// The partitions, in the order of their numbers.
    pub partitions: Vec<Partition>,
    /// The end of what the table knows without partitions, bytes: the table itself, or a disk whose end
    /// another structure has taken.
    #[serde(skip)]
    pub(super) least_bytes: u64,
}

/// The kinds of tables. Serialised in small letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TableKind {
    /// The table of UEFI.
    Gpt,
    /// The table of the BIOS, with extended partitions.
    Mbr,
}

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Partition {
    /// Its number, as Linux counts.
    pub number: u32,
    /// Where it starts, bytes.
    pub start: u64,
    /// How long it is, bytes. Its end may lie behind the end of the disk.
    pub length: u64,
    /// What it is meant for: a GUID, or `0x` and two digits.
    pub r#type: String,
    /// The name that the table has for it.
    pub name: Option<String>,
    /// What it holds.
    pub volume: Option<Volume>,
}

/// What the commonest types mean.
const TYPES: [(&str, &str); 16] = [
    ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "EFI system"),
    ("e3c9e316-0b5c-4db8-817d-f92df00215ae", "Microsoft reserved"),
    ("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", "basic data"),
    ("de94bba4-06d1-4d40-a16a-bfd50179d6ac", "Windows recovery"),
    ("0fc63daf-8483-4772-8e79-3d69d8477de4", "Linux"),
    ("4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "Linux root"),
    ("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", "Linux swap"),
    ("e6d6d379-f507-44c2-a23c-238f2a3df928", "Linux LVM"),
    ("21686148-6449-6e6f-744e-656564454649", "BIOS boot"),
    ("0x07", "NTFS or exFAT"),
    ("0x0b", "FAT32"),
    ("0x0c", "FAT32"),
    ("0x42", "Windows dynamic disk"),
    ("0x82", "Linux swap"),
    ("0x83", "Linux"),
    ("0x8e", "Linux LVM"),
];

/// The types of an MBR's extended partitions, which hold the logical ones.
pub(super) const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// How a type of an MBR is written.
pub(super) fn mbr_type(kind: u8) -> String {
    format!("0x{kind:02x}")
}

impl Partition {
    /// Where it ends, bytes.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }

    /// Whether it is a place for logical partitions, and holds nothing itself.
    pub fn is_extended(&self) -> bool {
        EXTENDED.iter().any(|&kind| self.r#type == mbr_type(kind))
    }

    /// What its type means, if it is a common one.
    pub fn type_name(&self) -> Option<&'static str> {
        TYPES.iter().find(|(known, _)| *known == self.r#type).map(|(_, name)| *name)
    }
}

impl Table {
    /// The end of the last partition, or of the table itself, bytes.
    pub(super) fn end(&self) -> u64 {
        self.partitions.iter().map(Partition::end).fold(self.least_bytes, u64::max)
    }
}
