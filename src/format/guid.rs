//! GUIDs: the ones MS-VHDX names, their bytes on disk, their text.
//!
//! Invariant: on disk the first three fields are little-endian, the rest is in order. Only this file knows.

use uuid::{Uuid, uuid};

/// Region: the block allocation table.
pub const REGION_BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
/// Region: the metadata.
pub const REGION_METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");

/// Metadata item: File Parameters.
pub const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
/// Metadata item: Virtual Disk Size.
pub const VIRTUAL_DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
/// Metadata item: Virtual Disk ID, what SCSI shows on page 83h.
pub const VIRTUAL_DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
/// Metadata item: Logical Sector Size.
pub const LOGICAL_SECTOR_SIZE: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
/// Metadata item: Physical Sector Size.
pub const PHYSICAL_SECTOR_SIZE: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
/// Metadata item: Parent Locator.
pub const PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");

/// Parent locator type: VHDX, the only one there is.
pub const LOCATOR_TYPE_VHDX: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");

/// Metadata item Windows writes, not in MS-VHDX: cylinders, heads, sectors. It says nothing about content.
pub const CHS_GEOMETRY: Uuid = uuid!("da02d7bc-3d3a-423c-ac88-2a36ab21479b");
/// Metadata item Windows writes, not in MS-VHDX: the creation of this file has not finished.
pub const INCOMPLETE_FILE: Uuid = uuid!("71cc85f0-1b69-4e28-9558-c3bf83ae75d3");
/// Metadata item Windows writes, not in MS-VHDX: a persistent memory label. It says nothing about content.
pub const PMEM_LABEL: Uuid = uuid!("10e1ae8a-4b7e-4169-a40f-cd70de928393");

/// The GUID whose bytes on disk are `bytes`.
pub fn read(bytes: &[u8; 16]) -> Uuid {
    Uuid::from_bytes_le(*bytes)
}

/// The bytes of `guid` on disk.
pub fn write(guid: Uuid) -> [u8; 16] {
    guid.to_bytes_le()
}

/// The text of `guid` as parent locators hold it: lower case, in braces.
pub fn print(guid: Uuid) -> String {
    guid.braced().to_string()
}

/// The GUID that `text` spells, in any case, with or without braces: MS-VHDX asks for lower case and braces
/// and then gives an example in upper case.
pub fn parse(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_named_guid_has_the_bytes_the_specification_prints() {
        let table: [(Uuid, &str); 12] = [
            (REGION_BAT, "6677c22d23f600429d64115e9bfd4a08"),
            (REGION_METADATA, "06a27c8b90479a4bb8fe575f050f886e"),
            (FILE_PARAMETERS, "3767a1ca36fa434db3b633f0aa44e76b"),
            (VIRTUAL_DISK_SIZE, "2442a52f1bcd7648b2115dbed83bf4b8"),
            (VIRTUAL_DISK_ID, "ab12cabee6b2234593efc309e000c746"),
            (LOGICAL_SECTOR_SIZE, "1dbf41816fa90947ba47f233a8faab5f"),
            (PHYSICAL_SECTOR_SIZE, "c748a3cd5d4471449cc9e9885251c556"),
            (PARENT_LOCATOR, "2d5fd3a80bb34d45abf7d3d84834ab0c"),
            (LOCATOR_TYPE_VHDX, "b7ef4ab09ed1814ab78925b8e9445913"),
            (CHS_GEOMETRY, "bcd702da3a3d3c42ac882a36ab21479b"),
            (INCOMPLETE_FILE, "f085cc71691b284e9558c3bf83ae75d3"),
            (PMEM_LABEL, "8aaee1107e4b6941a40fcd70de928393"),
        ];
        for (guid, bytes) in table {
            let printed = u128::from_str_radix(bytes, 16).expect("hexadecimal");
            assert_eq!(write(guid), printed.to_be_bytes(), "{guid}");
        }
    }

    #[test]
    fn text_is_lower_case_in_braces_and_read_in_any_case_with_or_without_them() {
        let text = "{2dc27766-f623-4200-9d64-115e9bfd4a08}";
        assert_eq!(print(REGION_BAT), text);
        assert_eq!(parse(text), Some(REGION_BAT));
        assert_eq!(parse(&text.to_uppercase()), Some(REGION_BAT));
        assert_eq!(parse("2DC27766-f623-4200-9D64-115e9bfd4a08"), Some(REGION_BAT));
        assert_eq!(parse("{2dc27766-f623-4200-9d64-115e9bfd4a08"), None);
        assert_eq!(parse(""), None);
    }

    proptest! {
        #[test]
        fn bytes_and_text_come_back(bytes in any::<[u8; 16]>()) {
            let guid = read(&bytes);
            prop_assert_eq!(write(guid), bytes);
            prop_assert_eq!(parse(&print(guid)), Some(guid));
        }
    }
}
