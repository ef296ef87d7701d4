//! The parent locator: how a differencing image finds and recognises its parent.
//!
//! Invariants: a locator's keys are unique; keys and values are neither empty nor hold a NUL; all of it fits
//! one metadata item. So whatever was parsed can be encoded again; one that was changed since can be if its
//! [check](ParentLocator::check) passes, as an image may come with one that has no room for another key.
//!
//! [Rules 38 to 41](crate::design::vhdx_rules#rule-38).

use std::collections::BTreeSet;

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{MAX_ITEM_LENGTH, guid};
use crate::error::{Error, Kind, Result};
use crate::printable::shortened;

/// Key: the parent's `DataWriteGuid`.
pub const PARENT_LINKAGE: &str = "parent_linkage";
/// Key: the `DataWriteGuid` the parent gets when a merge under way ends.
pub const PARENT_LINKAGE2: &str = "parent_linkage2";
/// Key: the parent's path from the child's folder, with backslashes.
pub const RELATIVE_PATH: &str = "relative_path";
/// Key: the parent's path under a Windows volume name.
pub const VOLUME_PATH: &str = "volume_path";
/// Key: the parent's path under a Windows drive letter or share.
pub const ABSOLUTE_WIN32_PATH: &str = "absolute_win32_path";

/// The most pairs a locator holds: MS-VHDX names five, Microsoft's own parser stops at this.
pub const MAX_PAIRS: usize = 256;

const STRUCTURE: &str = "parent locator";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawLocator {
    locator_type: [u8; 16],
    reserved: U16,
    key_value_count: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawPair {
    key_offset: U32,
    value_offset: U32,
    key_length: U16,
    value_length: U16,
}

const _: () = assert!(size_of::<RawLocator>() == 20);
const _: () = assert!(size_of::<RawPair>() == 12);

/// What a child knows of its parent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParentLocator {
    /// Keys and values in the item's order.
    pub entries: Vec<(String, String)>,
}

impl ParentLocator {
    /// Reads a locator from the bytes of its item.
    ///
    /// Tolerated: a non-zero reserved field; a NUL at the end of a key or value; a value with half a
    /// surrogate pair, which Windows allows in file names (it reads as U+FFFD and will not be found by that
    /// path).
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for another locator type or too many pairs; [`Kind::Corrupt`] if a pair lies
    /// outside the item, is empty, overlaps others, holds a NUL, or repeats a key.
    pub fn parse(item: &[u8]) -> Result<Self> {
        let corrupt = |message: String| Error::corrupt(STRUCTURE, message);
        let Ok((head, rest)) = RawLocator::ref_from_prefix(item) else {
            return Err(corrupt(format!("{} bytes, at least 20 expected", item.len())));
        };
        let kind = guid::read(&head.locator_type);
        if kind != guid::LOCATOR_TYPE_VHDX {
            let message = format!("locator type {} is not known here", guid::print(kind));
            return Err(Error::new(Kind::Unsupported, message).in_structure(STRUCTURE));
        }
        let count = usize::from(head.key_value_count.get());
        if count > MAX_PAIRS {
            let message = format!("{count} pairs; at most {MAX_PAIRS} are supported");
            return Err(Error::new(Kind::Unsupported, message).in_structure(STRUCTURE));
        }
        let Ok((pairs, _)) = <[RawPair]>::ref_from_prefix_with_elems(rest, count) else {
            return Err(corrupt(format!("{count} pairs do not fit {} bytes", item.len())));
        };
        // Strings that share bytes would let a small item fill much memory.
        if encoded_length(pairs.iter().map(|pair| (pair.key_length.get(), pair.value_length.get())))
            > item.len()
        {
            return Err(corrupt(format!("its strings exceed its {} bytes", item.len())));
        }
        let mut entries = Vec::with_capacity(count);
        let mut seen = BTreeSet::new();
        for (index, pair) in pairs.iter().enumerate() {
            let (key, value) =
                read_pair(item, pair).map_err(|reason| corrupt(format!("pair {index}: {reason}")))?;
            if !seen.insert(key.clone()) {
                return Err(corrupt(format!("key {:?} is there twice", shortened(&key))));
            }
            entries.push((key, value));
        }
        Ok(Self { entries })
    }

    /// Checks that it fits one item, as what was parsed does until something is set.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if there are more than [`MAX_PAIRS`], if a string exceeds 65535 bytes of UTF-16,
    /// or if the whole exceeds an item.
    pub fn check(&self) -> Result<()> {
        let too_much = |message: String| {
            let error = Error::new(Kind::Unsupported, message).in_structure(STRUCTURE);
            Err(error.remedy("copy the disk into a new image, with `vhdx-ublk convert`"))
        };
        let (pairs, strings) =
            (self.entries.len(), self.entries.iter().flat_map(|(key, value)| [key, value]));
        let lengths: Vec<usize> = strings.map(|string| 2 * string.encode_utf16().count()).collect();
        let whole = size_of::<RawLocator>() + pairs * size_of::<RawPair>() + lengths.iter().sum::<usize>();
        if pairs > MAX_PAIRS {
            return too_much(format!("it would have {pairs} pairs; at most {MAX_PAIRS} are supported"));
        }
        if let Some(length) = lengths.into_iter().find(|length| *length > usize::from(u16::MAX)) {
            return too_much(format!("a string in it would have {length} bytes; the format ends at 65535"));
        }
        if whole > MAX_ITEM_LENGTH as usize {
            return too_much(format!("it would have {whole} bytes; the format ends at {MAX_ITEM_LENGTH}"));
        }
        Ok(())
    }

    /// The bytes of the item.
    ///
    /// # Panics
    /// If a key or value is empty or holds a NUL; if a key repeats; if it does not pass [`Self::check`].
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.entries.len() <= MAX_PAIRS, "at most {MAX_PAIRS} pairs");
        let mut seen = BTreeSet::new();
        let head = RawLocator {
            locator_type: guid::write(guid::LOCATOR_TYPE_VHDX),
            reserved: U16::new(0),
            key_value_count: U16::new(u16::try_from(self.entries.len()).expect("at most 256")),
        };
        let mut pairs = Vec::new();
        let mut text: Vec<u8> = Vec::new();
        let text_start = size_of::<RawLocator>() + self.entries.len() * size_of::<RawPair>();
        let mut put = |string: &str| {
            assert!(!string.is_empty() && !string.contains('\0'), "no empty string, no NUL: {string:?}");
            let offset = U32::new(u32::try_from(text_start + text.len()).expect("an item is small"));
            let before = text.len();
            text.extend(string.encode_utf16().flat_map(u16::to_le_bytes));
            (offset, U16::new(u16::try_from(text.len() - before).expect("a string has at most 65535 bytes")))
        };
        for (key, value) in &self.entries {
            assert!(seen.insert(key), "key {key:?} repeats");
            let (key_offset, key_length) = put(key);
            let (value_offset, value_length) = put(value);
            pairs.push(RawPair { key_offset, value_offset, key_length, value_length });
        }
        let bytes = [head.as_bytes(), pairs.as_bytes(), &text].concat();
        assert!(bytes.len() <= MAX_ITEM_LENGTH as usize, "a locator fits an item");
        assert_eq!(text_start, bytes.len() - text.len(), "strings lie where the pairs say");
        debug_assert!(Self::parse(&bytes).is_ok_and(|read| read == *self), "what is written reads back");
        bytes
    }

    /// The bytes of `item`, which can be parsed, as the format wants them: no string ends in a NUL, and the
    /// reserved field is zero. Nothing if they are so already, or if the strings would be others then.
    pub fn without_excess(item: &[u8]) -> Option<Vec<u8>> {
        let mut mended = item.to_vec();
        let (head, rest) = RawLocator::mut_from_prefix(&mut mended).ok()?;
        head.reserved = U16::new(0);
        let count = usize::from(head.key_value_count.get());
        let (pairs, _) = <[RawPair]>::mut_from_prefix_with_elems(rest, count).ok()?;
        for pair in pairs {
            pair.key_length = trimmed(item, pair.key_offset, pair.key_length);
            pair.value_length = trimmed(item, pair.value_offset, pair.value_length);
        }
        let same = Self::parse(&mended).ok() == Self::parse(item).ok();
        (same && mended != item).then_some(mended)
    }

    /// The value of `key`, which is case-sensitive.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.entries.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Sets the value of `key`, in place if it is there already.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        match self.entries.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value.into(),
            None => self.entries.push((key.into(), value.into())),
        }
    }

    /// Takes `key` and its value away, if it is there.
    pub fn remove(&mut self, key: &str) {
        self.entries.retain(|(name, _)| name != key);
    }

    /// The `DataWriteGuid` the parent had when this child was made, in any case, with or without braces.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if the locator has none, or no GUID there.
    pub fn linkage(&self) -> Result<Uuid> {
        let Some(text) = self.get(PARENT_LINKAGE) else {
            return Err(Error::corrupt(STRUCTURE, format!("{PARENT_LINKAGE} is missing")));
        };
        guid::parse(text).ok_or_else(|| {
            let text = shortened(text);
            Error::corrupt(STRUCTURE, format!("{PARENT_LINKAGE} is {text:?}, a GUID expected"))
        })
    }

    /// The `DataWriteGuid` the parent gets when a merge under way ends. Windows fills unused ones with zeros;
    /// that is as absent as no key at all, and so is text that is no GUID.
    pub fn linkage2(&self) -> Option<Uuid> {
        self.get(PARENT_LINKAGE2).and_then(guid::parse).filter(|guid| !guid.is_nil())
    }
}

/// The length of the string at `offset` without the NULs that it ends in, bytes.
fn trimmed(item: &[u8], offset: U32, length: U16) -> U16 {
    let string = item.get(offset.get() as usize..).and_then(|rest| rest.get(..usize::from(length.get())));
    let nuls =
        string.map_or(0, |string| string.chunks_exact(2).rev().take_while(|unit| *unit == [0, 0]).count());
    U16::new(length.get() - u16::try_from(2 * nuls).expect("no longer than the string"))
}

/// Bytes of a locator whose keys and values have these lengths in bytes and share none.
fn encoded_length(lengths: impl Iterator<Item = (u16, u16)>) -> usize {
    lengths.fold(size_of::<RawLocator>(), |sum, (key, value)| {
        sum + size_of::<RawPair>() + usize::from(key) + usize::from(value)
    })
}

/// One key and its value.
fn read_pair(item: &[u8], pair: &RawPair) -> std::result::Result<(String, String), String> {
    let units = |what: &str, offset: U32, length: U16| {
        let (start, length) = (offset.get() as usize, usize::from(length.get()));
        if start == 0 || length == 0 || length % 2 != 0 {
            return Err(format!("a {what} of {length} bytes at {start}"));
        }
        let bytes = start.checked_add(length).and_then(|end| item.get(start..end));
        let Some(bytes) = bytes else {
            return Err(format!("its {what} of {length} bytes at {start} exceeds the item's {}", item.len()));
        };
        let mut units: Vec<u16> =
            bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
        while units.last() == Some(&0) {
            units.pop();
        }
        if units.is_empty() || units.contains(&0) {
            return Err(format!("its {what} holds a NUL"));
        }
        Ok(units)
    };
    let key = String::from_utf16(&units("key", pair.key_offset, pair.key_length)?)
        .map_err(|_| "its key is not UTF-16".to_string())?;
    let value = String::from_utf16_lossy(&units("value", pair.value_offset, pair.value_length)?);
    Ok((key, value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::testing::noise;
    use proptest::prelude::*;

    const LINKAGE: Uuid = Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);

    fn pairs(entries: &[(&str, &str)]) -> ParentLocator {
        let entries = entries.iter().map(|&(key, value)| (key.into(), value.into())).collect();
        ParentLocator { entries }
    }

    /// What Windows 10 writes into a child.
    fn windows() -> ParentLocator {
        pairs(&[
            (PARENT_LINKAGE, "{01234567-89ab-cdef-0123-456789abcdef}"),
            (PARENT_LINKAGE2, "{00000000-0000-0000-0000-000000000000}"),
            (RELATIVE_PATH, ".\\parent.vhdx"),
            (ABSOLUTE_WIN32_PATH, "C:\\Images\\parent.vhdx"),
            (VOLUME_PATH, "\\\\?\\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\\Images\\parent.vhdx"),
        ])
    }

    fn refusal(item: &[u8]) -> (Kind, String) {
        let error = ParentLocator::parse(item).expect_err("a locator to refuse");
        (error.kind(), error.to_string())
    }

    /// A locator of one pair, `key` and `value`, with `with` at byte `at`.
    fn patched(at: usize, with: &[u8]) -> Vec<u8> {
        let mut item = pairs(&[("key", "value")]).encode();
        item[at..at + with.len()].copy_from_slice(with);
        item
    }

    #[test]
    fn every_field_lies_where_the_specification_puts_it() {
        let item = patched(0, &[]);
        assert_eq!(item[..16], guid::write(guid::LOCATOR_TYPE_VHDX));
        assert_eq!(item[16..20], [0, 0, 1, 0]);
        assert_eq!(item[20..32], [32, 0, 0, 0, 38, 0, 0, 0, 6, 0, 10, 0]);
        assert_eq!(&item[32..], b"k\0e\0y\0v\0a\0l\0u\0e\0");
    }

    #[test]
    fn a_windows_child_names_its_parent() {
        let locator = ParentLocator::parse(&windows().encode()).expect("own locator");
        assert_eq!(locator, windows());
        assert_eq!(locator.linkage().expect("a linkage"), LINKAGE);
        assert_eq!(locator.get(RELATIVE_PATH), Some(".\\parent.vhdx"));
        assert_eq!(locator.get("Relative_Path"), None, "keys are case-sensitive");
    }

    #[test]
    fn a_second_linkage_of_zeros_is_absent() {
        let mut locator = windows();
        assert_eq!(locator.linkage2(), None);
        locator.set(PARENT_LINKAGE2, "no guid");
        assert_eq!(locator.linkage2(), None);
        locator.set(PARENT_LINKAGE2, guid::print(LINKAGE));
        assert_eq!(locator.linkage2(), Some(LINKAGE));
        assert_eq!(ParentLocator::default().linkage2(), None);
    }

    #[test]
    fn a_linkage_is_read_in_any_case_with_or_without_braces() {
        for text in ["01234567-89AB-cdef-0123-456789ABCDEF", "{01234567-89AB-CDEF-0123-456789ABCDEF}"] {
            assert_eq!(pairs(&[(PARENT_LINKAGE, text)]).linkage().expect(text), LINKAGE);
        }
        for locator in [pairs(&[]), pairs(&[(PARENT_LINKAGE, "{}")])] {
            assert_eq!(locator.linkage().expect_err("no linkage").kind(), Kind::Corrupt);
        }
    }

    #[test]
    fn a_value_is_set_in_place_or_added() {
        let mut locator = pairs(&[("a", "1"), ("b", "2")]);
        locator.set("a", "3");
        locator.set("c", "4");
        assert_eq!(locator, pairs(&[("a", "3"), ("b", "2"), ("c", "4")]));
    }

    #[test]
    fn another_type_and_too_many_pairs_are_unsupported() {
        assert_eq!(refusal(&patched(0, &[1])).0, Kind::Unsupported);
        assert_eq!(refusal(&patched(18, &[1, 1])).0, Kind::Unsupported);
        assert_eq!(refusal(&patched(18, &[0xff, 0xff])).0, Kind::Unsupported);
    }

    #[test]
    fn a_locator_that_ends_early_is_refused() {
        assert!(refusal(&patched(0, &[])[..19]).1.contains("19 bytes, at least 20"));
        assert!(refusal(&patched(0, &[])[..31]).1.contains("1 pairs do not fit 31 bytes"));
        assert!(refusal(&patched(18, &[0, 1])).1.contains("256 pairs do not fit"));
        assert!(refusal(&[]).1.contains("0 bytes"));
    }

    #[test]
    fn a_string_that_is_empty_odd_or_outside_is_refused() {
        for (at, with) in [
            (20, [0; 4]),                   // key at 0
            (24, [0; 4]),                   // value at 0
            (20, [44, 0, 0, 0]),            // key past the end
            (24, [0xfe, 0xff, 0xff, 0xff]), // value far past the end
            (28, [0, 0, 10, 0]),            // empty key
            (28, [6, 0, 0, 0]),             // empty value
            (28, [5, 0, 10, 0]),            // odd key
            (28, [6, 0, 9, 0]),             // odd value
        ] {
            let (kind, message) = refusal(&patched(at, &with));
            assert_eq!(kind, Kind::Corrupt);
            assert!(message.starts_with("parent locator: pair 0: "), "{message}");
        }
    }

    #[test]
    fn strings_that_share_bytes_cannot_multiply_memory() {
        let count = 256_u16;
        let mut item = vec![0; 20 + 12 * usize::from(count) + 65534];
        item[..16].copy_from_slice(&guid::write(guid::LOCATOR_TYPE_VHDX));
        item[18..20].copy_from_slice(&count.to_le_bytes());
        for index in 0..usize::from(count) {
            let pair = [[20, 12, 0, 0], [20, 12, 0, 0], [0xfe, 0xff, 0xfe, 0xff]].concat();
            item[20 + 12 * index..][..12].copy_from_slice(&pair);
        }
        assert!(refusal(&item).1.contains("its strings exceed"));
    }

    #[test]
    fn a_key_that_repeats_is_refused() {
        let mut item = pairs(&[("a", "1"), ("b", "2")]).encode();
        let at = item.len() - 4;
        item[at] = b'a';
        assert!(refusal(&item).1.contains("key \"a\" is there twice"));
    }

    #[test]
    fn a_nul_inside_a_string_is_refused_and_at_its_end_tolerated() {
        assert!(refusal(&patched(34, &[0])).1.contains("its key holds a NUL"));
        assert!(refusal(&patched(38, &[0])).1.contains("its value holds a NUL"));
        assert!(refusal(&patched(38, &[0; 10])).1.contains("its value holds a NUL"));
        let item = patched(46, &[0, 0]);
        assert_eq!(ParentLocator::parse(&item).expect("a NUL at the end"), pairs(&[("key", "valu")]));
        let mended = ParentLocator::without_excess(&item).expect("something to mend");
        assert_eq!(ParentLocator::parse(&mended).expect("a locator"), pairs(&[("key", "valu")]));
        assert_eq!(ParentLocator::without_excess(&mended), None);
        assert_eq!(ParentLocator::without_excess(&windows().encode()), None);
    }

    #[test]
    fn half_a_surrogate_pair_is_tolerated_in_a_value_and_refused_in_a_key() {
        let locator = ParentLocator::parse(&patched(38, &[0, 0xd8])).expect("an odd file name");
        assert_eq!(locator.get("key"), Some("\u{fffd}alue"));
        assert!(refusal(&patched(32, &[0, 0xd8])).1.contains("not UTF-16"));
    }

    #[test]
    fn a_reserved_field_is_tolerated() {
        assert_eq!(
            ParentLocator::parse(&patched(16, &[1, 1])).expect("reserved"),
            pairs(&[("key", "value")])
        );
    }

    #[test]
    #[should_panic(expected = "no empty string, no NUL")]
    fn a_nul_is_never_written() {
        pairs(&[("key", "a\0b")]).encode();
    }

    #[test]
    #[should_panic(expected = "repeats")]
    fn a_key_is_never_written_twice() {
        pairs(&[("key", "a"), ("key", "b")]).encode();
    }

    proptest! {
        #[test]
        fn a_locator_comes_back(entries in prop::collection::btree_map("[^\0]{1,20}", "[^\0]{1,60}", 0..20)) {
            let locator = ParentLocator { entries: entries.into_iter().collect() };
            prop_assert_eq!(ParentLocator::parse(&locator.encode()).expect("own locator"), locator);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(
            seed: u64, len in 0_usize..=65536, count in 0_u8..20, at in 18_usize..160
        ) {
            let mut item = noise(seed, len);
            prop_assert!(ParentLocator::parse(&item).is_err());
            if len >= 20 {
                item[..16].copy_from_slice(&guid::write(guid::LOCATOR_TYPE_VHDX));
                item[18..20].copy_from_slice(&[count, 0]);
                let _ = ParentLocator::parse(&item);
            }
            let mut near = windows().encode();
            near[at..at + usize::from(count)].copy_from_slice(&noise(seed, usize::from(count)));
            if let Ok(locator) = ParentLocator::parse(&near) {
                prop_assert_eq!(ParentLocator::parse(&locator.encode()).expect("own locator"), locator);
            }
        }
    }
}
