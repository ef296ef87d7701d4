//! The block allocation table: one word per block, and the arithmetic that finds it.
//!
//! Invariants:
//!
//! * A [`BatEntry`] is any 64 bits a file can hold; its parts are asked for, never assumed.
//! * A [`Geometry`] is one the format allows. The slot of a block is the same in fixed, dynamic and
//!   differencing images: after every chunk's payload blocks comes one slot for its sector bitmap, used or
//!   not. Images under one chunk (4 GiB or more) do not show it.
//! * Lookups divide by shifting; only the way back from a slot to its block divides, and not where slots are
//!   walked through in order.
//!
//! [Rules 44 to 59](crate::design::vhdx_rules#rule-44).

use std::fmt;
use std::ops::Range;

use super::{MAX_BLOCK_SIZE, MAX_VIRTUAL_SIZE, MIB, MIN_BLOCK_SIZE, SECTOR_SIZES};

/// Bytes of an entry.
pub const ENTRY_SIZE: usize = 8;

/// Bytes of a sector bitmap block, whatever the payload block (MS-VHDX 2.4).
pub const BITMAP_BLOCK_SIZE: u64 = MIB;

/// Sectors that one sector bitmap block covers: a bit each. That many sectors are a chunk.
pub const SECTORS_PER_CHUNK: u64 = 8 * BITMAP_BLOCK_SIZE;

const STATE_MASK: u64 = 0b111;
const OFFSET_MASK: u64 = !(MIB - 1);
const RESERVED_MASK: u64 = !(STATE_MASK | OFFSET_MASK);

const _: () = assert!(STATE_MASK & OFFSET_MASK == 0, "state and offset share no bit");
const _: () = assert!(SECTORS_PER_CHUNK.is_power_of_two(), "chunks are found by shifting");
const _: () =
    assert!(SECTORS_PER_CHUNK * SECTOR_SIZES[0] as u64 > MAX_BLOCK_SIZE as u64, "chunks hold blocks");

/// What an entry says about its payload block (MS-VHDX 2.5.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PayloadState {
    /// Nothing here: the parent's content in a differencing image, else undefined.
    NotPresent = 0,
    /// Content undefined; never the parent's.
    Undefined = 1,
    /// Zeros.
    Zero = 2,
    /// Given back by the guest: zeros or the block's old content, never the parent's.
    Unmapped = 3,
    /// In this file, all of it.
    FullyPresent = 6,
    /// In this file where the sector bitmap has a one, in the parent where it has a zero; differencing only.
    PartiallyPresent = 7,
}

/// What an entry says about its sector bitmap block (MS-VHDX 2.5.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BitmapState {
    /// There is no bitmap for this chunk.
    NotPresent = 0,
    /// The bitmap is in this file.
    Present = 6,
}

/// One word of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct BatEntry(pub u64);

const _: () = assert!(size_of::<BatEntry>() == ENTRY_SIZE);

impl BatEntry {
    /// The entry whose bytes on disk are `bytes`.
    pub const fn read(bytes: [u8; ENTRY_SIZE]) -> Self {
        Self(u64::from_le_bytes(bytes))
    }

    /// The bytes of this entry on disk.
    pub const fn write(self) -> [u8; ENTRY_SIZE] {
        self.0.to_le_bytes()
    }

    /// A payload or bitmap block that is nowhere.
    pub const fn not_present() -> Self {
        Self(0)
    }

    /// A payload block that reads as zeros. It names no place: Hyper-V refuses one that does.
    pub const fn zero() -> Self {
        Self(PayloadState::Zero as u64)
    }

    /// A payload block that was given back, and its space with it.
    pub const fn unmapped() -> Self {
        Self(PayloadState::Unmapped as u64)
    }

    /// A payload or bitmap block that is in this file, at `offset` bytes.
    ///
    /// # Panics
    /// If `offset` lies in the header section or is no multiple of 1 MiB.
    pub const fn present(offset: u64) -> Self {
        assert!(
            offset >= MIB && offset & !OFFSET_MASK == 0,
            "blocks start on 1 MiB, behind the header section"
        );
        Self(offset | PayloadState::FullyPresent as u64)
    }

    /// A payload block of which some sectors are in this file, at `offset` bytes.
    ///
    /// # Panics
    /// As [`BatEntry::present`].
    pub const fn partially_present(offset: u64) -> Self {
        Self(Self::present(offset).0 | PayloadState::PartiallyPresent as u64)
    }

    /// The state of a payload block; none for the reserved state 4. State 5 is what images of the format's
    /// beta call unmapped, and is tolerated as that.
    pub const fn payload_state(self) -> Option<PayloadState> {
        match self.0 & STATE_MASK {
            0 => Some(PayloadState::NotPresent),
            1 => Some(PayloadState::Undefined),
            2 => Some(PayloadState::Zero),
            3 | 5 => Some(PayloadState::Unmapped),
            6 => Some(PayloadState::FullyPresent),
            7 => Some(PayloadState::PartiallyPresent),
            _ => None,
        }
    }

    /// Whether the state is 5, which only images of the format's beta may have.
    pub const fn is_beta_unmapped(self) -> bool {
        self.0 & STATE_MASK == 5
    }

    /// The state of a sector bitmap block; none for a reserved one.
    pub const fn bitmap_state(self) -> Option<BitmapState> {
        match self.0 & STATE_MASK {
            0 => Some(BitmapState::NotPresent),
            6 => Some(BitmapState::Present),
            _ => None,
        }
    }

    /// Where the block lies in the file, in bytes: a multiple of 1 MiB, 0 for nowhere. An entry may say more
    /// than any file holds, and where the state gives no place a meaning it may say anything.
    pub const fn offset(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// The bits between state and offset, in place; not zero only in damaged files.
    pub const fn reserved_bits(self) -> u64 {
        self.0 & RESERVED_MASK
    }
}

/// The stretches of entries that are not all zero, and how far into `entries` each begins. Most of the BAT of
/// most images is zeros.
pub fn nonzero(entries: &[[u8; ENTRY_SIZE]]) -> impl Iterator<Item = (usize, &[[u8; ENTRY_SIZE]])> {
    let is_zero = |entry: &[u8; ENTRY_SIZE]| u64::from_ne_bytes(*entry) == 0;
    let stretches = entries.chunk_by(move |one, next| is_zero(one) == is_zero(next));
    let placed = stretches.scan(0, |past, stretch| {
        *past += stretch.len();
        Some((*past - stretch.len(), stretch))
    });
    placed.filter(move |(_, stretch)| !is_zero(&stretch[0]))
}

/// What a slot of the BAT is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A payload block's entry.
    Block(u64),
    /// The entry of a chunk's sector bitmap.
    Bitmap(u64),
    /// Nothing: it lies behind the last block's.
    Nothing,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block(block) => write!(f, "block {block}"),
            Self::Bitmap(chunk) => write!(f, "the sector bitmap of chunk {chunk}"),
            Self::Nothing => f.write_str("an entry without a block"),
        }
    }
}

/// The shape of a virtual disk: which slot belongs to which block. Sizes and offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    virtual_size: u64,
    block_shift: u32,
    sector_shift: u32,
    ratio_shift: u32,
    differencing: bool,
}

impl Geometry {
    /// The geometry of a disk of `virtual_size` bytes in blocks of `block_size` bytes.
    ///
    /// # Panics
    /// If the format does not allow these numbers: they come from checked metadata or a checked command line.
    pub fn new(virtual_size: u64, block_size: u32, logical_sector_size: u32, differencing: bool) -> Self {
        assert!(block_size.is_power_of_two() && (MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size));
        assert!(SECTOR_SIZES.contains(&logical_sector_size));
        assert!(virtual_size <= MAX_VIRTUAL_SIZE && virtual_size.is_multiple_of(logical_sector_size.into()));
        let (block_shift, sector_shift) = (block_size.trailing_zeros(), logical_sector_size.trailing_zeros());
        let chunk_shift = SECTORS_PER_CHUNK.trailing_zeros() + sector_shift;
        assert!(chunk_shift > block_shift, "the largest block is a part of the smallest chunk");
        Self { virtual_size, block_shift, sector_shift, ratio_shift: chunk_shift - block_shift, differencing }
    }

    /// Bytes of the virtual disk.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Bytes of a payload block.
    pub fn block_size(&self) -> u64 {
        1 << self.block_shift
    }

    /// Bytes of a logical sector.
    pub fn logical_sector_size(&self) -> u32 {
        1 << self.sector_shift
    }

    /// Whether the image has a parent.
    pub fn is_differencing(&self) -> bool {
        self.differencing
    }

    /// Payload blocks; the last may reach past the disk's end.
    #[inline]
    pub fn block_count(&self) -> u64 {
        self.virtual_size.div_ceil(1 << self.block_shift)
    }

    /// Payload blocks per chunk.
    pub fn chunk_ratio(&self) -> u64 {
        1 << self.ratio_shift
    }

    /// Chunks begun, each with room for one sector bitmap block; only differencing images use that room.
    pub fn bitmap_block_count(&self) -> u64 {
        self.block_count().div_ceil(1 << self.ratio_shift)
    }

    /// Entries of the BAT. A differencing image ends with its last chunk's bitmap, any other with its last
    /// block.
    pub fn slot_count(&self) -> u64 {
        match self.block_count() {
            0 => 0,
            _ if self.differencing => self.bitmap_block_count() * (self.chunk_ratio() + 1),
            blocks => self.payload_slot(blocks - 1) + 1,
        }
    }

    /// Bytes of the BAT.
    pub fn bat_length(&self) -> u64 {
        self.slot_count() * ENTRY_SIZE as u64
    }

    /// The slot of payload block `block`.
    #[inline]
    pub fn payload_slot(&self, block: u64) -> u64 {
        block + (block >> self.ratio_shift)
    }

    /// The slot of the sector bitmap of chunk `chunk`.
    #[inline]
    pub fn bitmap_slot(&self, chunk: u64) -> u64 {
        ((chunk + 1) << self.ratio_shift) + chunk
    }

    /// Whether `slot` is a chunk's last, the one for its sector bitmap.
    #[inline]
    pub fn is_bitmap_slot(&self, slot: u64) -> bool {
        slot % (self.chunk_ratio() + 1) == self.chunk_ratio()
    }

    /// The payload block of `slot`, unless the slot is a bitmap's or lies behind the last block.
    #[inline]
    pub fn block_of_slot(&self, slot: u64) -> Option<u64> {
        let (chunk, index) = (slot / (self.chunk_ratio() + 1), slot % (self.chunk_ratio() + 1));
        let block = (chunk << self.ratio_shift) + index;
        (index < self.chunk_ratio() && block < self.block_count()).then_some(block)
    }

    /// The first payload block whose slot is `slot` or behind it; past the disk's last if there is none.
    pub fn first_block_from(&self, slot: u64) -> u64 {
        // The slot behind a bitmap's is the next chunk's first.
        let (chunk, index) = (slot / (self.chunk_ratio() + 1), slot % (self.chunk_ratio() + 1));
        (chunk << self.ratio_shift) + index
    }

    /// The `slots` in order, and what each is for.
    pub fn walk(&self, slots: Range<u64>) -> impl Iterator<Item = (u64, Role)> {
        let (ratio, blocks) = (self.chunk_ratio(), self.block_count());
        let (mut chunk, mut index) = (slots.start / (ratio + 1), slots.start % (ratio + 1));
        slots.map(move |slot| {
            let block = slot - chunk;
            let role = match index {
                index if index == ratio => Role::Bitmap(chunk),
                _ if block < blocks => Role::Block(block),
                _ => Role::Nothing,
            };
            (chunk, index) = if index == ratio { (chunk + 1, 0) } else { (chunk, index + 1) };
            (slot, role)
        })
    }

    /// The payload block that holds byte `virtual_offset` of the disk.
    #[inline]
    pub fn block_of_offset(&self, virtual_offset: u64) -> u64 {
        virtual_offset >> self.block_shift
    }

    /// Where byte `virtual_offset` of the disk lies within its payload block.
    #[inline]
    pub fn offset_in_block(&self, virtual_offset: u64) -> u64 {
        virtual_offset & (self.block_size() - 1)
    }

    /// Bytes of a block that are bytes of the disk: fewer of the last one than of the others.
    pub fn disk_bytes_of(&self, block: u64) -> u64 {
        assert!(block < self.block_count(), "block {block} is on the disk");
        (self.virtual_size - block * self.block_size()).min(self.block_size())
    }

    /// The chunk of payload block `block`.
    #[inline]
    pub fn chunk_of_block(&self, block: u64) -> u64 {
        block >> self.ratio_shift
    }

    /// The bytes of its chunk's sector bitmap that belong to payload block `block`: one bit per sector, the
    /// lowest bit of a byte first.
    #[inline]
    pub fn bitmap_slice(&self, block: u64) -> Range<u64> {
        let length = BITMAP_BLOCK_SIZE >> self.ratio_shift;
        let start = (block & (self.chunk_ratio() - 1)) * length;
        debug_assert!(start + length <= BITMAP_BLOCK_SIZE, "a block's bits lie in its chunk's bitmap");
        start..start + length
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KIB: u64 = 1 << 10;
    const GIB: u64 = 1 << 30;
    const TIB: u64 = 1 << 40;

    #[test]
    fn stretches_leave_out_zeros_and_nothing_else() {
        let of = |words: &[u64]| {
            let entries: Vec<_> = words.iter().map(|word| word.to_le_bytes()).collect();
            let found = nonzero(&entries).map(|(at, stretch)| (at, stretch.len())).collect::<Vec<_>>();
            for (at, length) in &found {
                assert!(words[*at..at + length].iter().all(|word| *word != 0));
            }
            assert_eq!(
                found.iter().map(|(_, length)| length).sum::<usize>(),
                words.iter().filter(|w| **w != 0).count()
            );
            found
        };
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[0, 0, 0]), []);
        assert_eq!(of(&[1 << 63, 0, 0, 6, 6, 0]), [(0, 1), (3, 2)]);
        assert_eq!(of(&[0, 1, 0, 2]), [(1, 1), (3, 1)]);
        assert_eq!(of(&[5, 7]), [(0, 2)]);
    }

    #[test]
    fn an_entry_has_state_and_offset_where_the_specification_puts_them() {
        let entry = BatEntry::present(0x1234_5670_0000);
        assert_eq!(entry.write(), [6, 0, 0x70, 0x56, 0x34, 0x12, 0, 0]);
        assert_eq!(BatEntry::read(entry.write()), entry);
        assert_eq!(entry.offset(), 0x1234_5670_0000);
        assert_eq!(BatEntry::partially_present(MIB).0, MIB | 7);
        assert_eq!(BatEntry(u64::MAX).reserved_bits(), 0xf_fff8);
        assert_eq!(BatEntry(u64::MAX).offset(), !0xf_ffff);
    }

    #[test]
    fn states_without_a_place_name_none() {
        for (entry, state) in [
            (BatEntry::not_present(), PayloadState::NotPresent),
            (BatEntry::zero(), PayloadState::Zero),
            (BatEntry::unmapped(), PayloadState::Unmapped),
        ] {
            assert_eq!((entry.payload_state(), entry.offset(), entry.reserved_bits()), (Some(state), 0, 0));
        }
    }

    #[test]
    fn all_eight_payload_states_are_read_and_the_betas_unmapped_is_tolerated() {
        use PayloadState::{FullyPresent, NotPresent, PartiallyPresent, Undefined, Unmapped, Zero};
        let states = [
            Some(NotPresent),
            Some(Undefined),
            Some(Zero),
            Some(Unmapped),
            None,
            Some(Unmapped),
            Some(FullyPresent),
            Some(PartiallyPresent),
        ];
        for (number, state) in (0_u64..).zip(states) {
            assert_eq!(BatEntry((5 * MIB) | 0xf_fff8 | number).payload_state(), state, "{number}");
        }
    }

    #[test]
    fn a_bitmap_is_present_or_not_and_nothing_else() {
        for number in 0..8 {
            let expected = match number {
                0 => Some(BitmapState::NotPresent),
                6 => Some(BitmapState::Present),
                _ => None,
            };
            assert_eq!(BatEntry(MIB | number).bitmap_state(), expected, "{number}");
        }
    }

    #[test]
    #[should_panic(expected = "behind the header section")]
    fn no_block_is_ever_put_in_the_header_section() {
        let _ = BatEntry::present(0);
    }

    #[test]
    #[should_panic(expected = "blocks start on 1 MiB")]
    fn no_block_is_ever_put_off_its_grid() {
        let _ = BatEntry::partially_present(MIB + 4096);
    }

    #[test]
    fn the_chunk_ratio_is_the_specifications_for_every_block_and_sector_size() {
        for (sector, first) in [(512, 4096), (4096, 32768)] {
            for shift in 0..9 {
                let geometry = Geometry::new(0, MIN_BLOCK_SIZE << shift, sector, false);
                assert_eq!(geometry.chunk_ratio(), first >> shift);
                assert_eq!(geometry.block_size() * geometry.chunk_ratio(), (1 << 23) * u64::from(sector));
            }
        }
    }

    /// Virtual size, block MiB, sector, chunk ratio, blocks, bitmap blocks, slots dynamic, slots
    /// differencing.
    const SLOTS: [(u64, u32, u32, [u64; 5]); 9] = [
        (0, 1, 512, [4096, 0, 0, 0, 0]),
        (512, 256, 512, [16, 1, 1, 1, 17]),
        (4 * GIB, 2, 512, [2048, 2048, 1, 2048, 2049]),
        (4 * GIB + 512, 2, 512, [2048, 2049, 2, 2050, 4098]),
        (127 * GIB, 32, 512, [128, 4064, 32, 4095, 4128]),
        (127 * GIB, 2, 512, [2048, 65024, 32, 65055, 65568]),
        (TIB, 2, 512, [2048, 524_288, 256, 524_543, 524_544]),
        (40 * GIB, 32, 4096, [1024, 1280, 2, 1281, 2050]),
        (64 * TIB, 1, 512, [4096, 67_108_864, 16384, 67_125_247, 67_125_248]),
    ];

    #[test]
    fn the_number_of_slots_is_the_specifications_up_to_64_tib() {
        for (size, block_mib, sector, [ratio, blocks, bitmaps, dynamic, differencing]) in SLOTS {
            let geometry = Geometry::new(size, block_mib << 20, sector, false);
            let child = Geometry::new(size, block_mib << 20, sector, true);
            assert_eq!((geometry.chunk_ratio(), geometry.block_count()), (ratio, blocks), "{size}");
            assert_eq!(geometry.bitmap_block_count(), bitmaps, "{size}");
            assert_eq!((geometry.slot_count(), child.slot_count()), (dynamic, differencing), "{size}");
            assert_eq!(child.is_differencing(), !geometry.is_differencing());
        }
        let largest = Geometry::new(MAX_VIRTUAL_SIZE, MIN_BLOCK_SIZE, 512, true);
        assert_eq!(largest.bat_length(), 537_001_984);
        assert!(largest.bat_length() <= super::super::region::MAX_BAT_LENGTH.into());
    }

    #[test]
    fn a_walk_tells_what_every_slot_is_for() {
        for (size, block_mib, sector, _) in &SLOTS[..6] {
            let geometry = Geometry::new(*size, block_mib << 20, *sector, true);
            let end = geometry.slot_count() + 3;
            for first in [0, 1, geometry.chunk_ratio(), geometry.chunk_ratio() + 1, end - 1] {
                for (slot, role) in geometry.walk(first..end) {
                    let block = geometry.block_of_slot(slot);
                    let expected = match block {
                        Some(block) => Role::Block(block),
                        None if geometry.is_bitmap_slot(slot) => {
                            Role::Bitmap(slot / (geometry.chunk_ratio() + 1))
                        }
                        None => Role::Nothing,
                    };
                    assert_eq!(role, expected, "slot {slot} of {geometry:?}");
                }
                assert_eq!(geometry.walk(first..end).count() as u64, end.saturating_sub(first));
            }
        }
    }

    #[test]
    fn the_bitmap_slot_of_a_chunk_follows_its_last_block() {
        let geometry = Geometry::new(8 * GIB, 2 << 20, 512, true);
        assert_eq!(geometry.payload_slot(2047), 2047);
        assert_eq!(geometry.bitmap_slot(0), 2048);
        assert_eq!(geometry.payload_slot(2048), 2049);
        assert_eq!(geometry.bitmap_slot(1), 4097);
        assert_eq!(geometry.slot_count(), 4098);
        assert_eq!(geometry.block_of_slot(2048), None);
        assert_eq!([2047, 2048, 2049].map(|slot| geometry.first_block_from(slot)), [2047, 2048, 2048]);
        assert_eq!(geometry.block_of_slot(2049), Some(2048));
        assert_eq!(geometry.block_of_slot(4098), None);
    }

    #[test]
    fn a_blocks_slice_of_its_bitmap_is_one_bit_per_sector() {
        let slice = |block_mib: u32, sector, block| {
            Geometry::new(64 * GIB, block_mib << 20, sector, true).bitmap_slice(block)
        };
        assert_eq!(slice(2, 512, 0), 0..512);
        assert_eq!(slice(2, 512, 2047), MIB - 512..MIB);
        assert_eq!(slice(2, 512, 2049), 512..1024);
        assert_eq!(slice(32, 512, 1), 8 * KIB..16 * KIB);
        assert_eq!(slice(2, 4096, 3), 192..256);
    }

    #[test]
    fn an_offset_belongs_to_one_block() {
        let geometry = Geometry::new(5 * GIB, 2 << 20, 512, false);
        assert_eq!(geometry.block_of_offset(4 * GIB + 5), 2048);
        assert_eq!(geometry.chunk_of_block(2048), 1);
        assert_eq!(geometry.offset_in_block(4 * GIB + 5), 5);
    }

    prop_compose! {
        fn any_geometry()(
            sector in prop::sample::select(&SECTOR_SIZES[..]), shift in 0_u32..9, differencing: bool,
            size in prop_oneof![0_u64..=200 * GIB, 0_u64..=MAX_VIRTUAL_SIZE],
        ) -> Geometry {
            Geometry::new(size - size % u64::from(sector), MIN_BLOCK_SIZE << shift, sector, differencing)
        }
    }

    proptest! {
        #[test]
        fn every_slot_is_a_blocks_or_a_bitmaps_or_unused(
            geometry in any_geometry(), at: prop::sample::Index
        ) {
            prop_assume!(geometry.block_count() > 0);
            let block = at.index(usize::try_from(geometry.block_count()).expect("64 bits")) as u64;
            let slot = geometry.payload_slot(block);
            prop_assert!(slot < geometry.slot_count());
            prop_assert!(!geometry.is_bitmap_slot(slot));
            prop_assert_eq!(geometry.block_of_slot(slot), Some(block));
            let bitmap = geometry.bitmap_slot(geometry.chunk_of_block(block));
            prop_assert!(geometry.is_bitmap_slot(bitmap) && bitmap > slot);
            prop_assert_eq!(geometry.block_of_slot(bitmap), None);
            prop_assert!(!geometry.is_differencing() || bitmap < geometry.slot_count());
            prop_assert!(geometry.bitmap_slice(block).end <= BITMAP_BLOCK_SIZE);
            let bits = 8 * (geometry.bitmap_slice(block).end - geometry.bitmap_slice(block).start);
            prop_assert_eq!(bits * u64::from(geometry.logical_sector_size()), geometry.block_size());
        }

        #[test]
        fn slots_count_blocks_and_bitmaps_and_nothing_else(
            blocks in 0_u64..40_000, shift in 0_u32..9, sector in prop::sample::select(&SECTOR_SIZES[..]),
        ) {
            let size = blocks << (20 + shift);
            prop_assume!(size <= MAX_VIRTUAL_SIZE);
            let geometry = Geometry::new(size, MIN_BLOCK_SIZE << shift, sector, true);
            let slots = geometry.slot_count();
            let payload = (0..slots).filter(|&slot| geometry.block_of_slot(slot).is_some()).count() as u64;
            let bitmaps = (0..slots).filter(|&slot| geometry.is_bitmap_slot(slot)).count() as u64;
            prop_assert_eq!((payload, bitmaps), (blocks, geometry.bitmap_block_count()));
        }

        #[test]
        fn no_word_makes_an_entry_panic(word: u64) {
            let entry = BatEntry(word);
            prop_assert_eq!(entry.offset() | entry.reserved_bits() | (word & 7), word);
            prop_assert_eq!(entry.payload_state().is_none(), word & 7 == 4);
            prop_assert_eq!(entry.is_beta_unmapped(), word & 7 == 5);
            prop_assert_eq!(entry.bitmap_state().is_some(), matches!(word & 7, 0 | 6));
            prop_assert_eq!(BatEntry::read(entry.write()), entry);
        }
    }
}
