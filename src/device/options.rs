//! The choices for a device, with the bounds of each, and the disk as the kernel sees it.

use std::mem::offset_of;

use libublk::sys;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::name::Name;
use super::reclaim::Reclaim;
use crate::engine::front::MAX_LOOKS;
use crate::error::{Error, Kind, Result};

/// Most queues of one device: one per CPU helps, and more than this has never helped a file.
pub const MAX_QUEUES: u16 = 64;

/// Most requests in flight per queue: the kernel's own limit.
pub const MAX_DEPTH: u16 = 4096;

/// Least request size: the kernel needs at least a page.
pub const MIN_REQUEST_BYTES: u32 = 4096;

/// Greatest number of a device: the kernel has twenty bits for it.
pub const MAX_ID: u32 = (1 << 20) - 1;

/// Greatest request size: the kernel splits larger ones, at no measurable cost.
pub const MAX_REQUEST_BYTES: u32 = 1 << 20;

/// Most memory for request buffers: queues × depth × request size. It is locked, so it must be small compared
/// to the memory of any machine that serves disks.
pub const MAX_BUFFER_BYTES: u64 = 256 << 20;

const MIB: u64 = 1 << 20;

const _: () = assert!(MAX_DEPTH as u32 == sys::UBLK_MAX_QUEUE_DEPTH);
const _: () = assert!((MAX_QUEUES as u32) <= sys::UBLK_MAX_NR_QUEUES);

/// What happens to a device whose daemon is killed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Recovery {
    /// Its requests fail, and so do all later ones.
    #[default]
    None,
    /// Its requests in flight fail, and so do later ones until `recover`.
    Fail,
    /// Its requests in flight fail; later ones wait for `recover`.
    Queue,
    /// All requests wait for `recover`; those in flight are repeated.
    Reissue,
}

/// What becomes of a request for which the host has no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnFull {
    /// It fails.
    #[default]
    Fail,
    /// It waits until the host has room.
    Wait,
}

impl OnFull {
    /// Whether it fails.
    pub fn is_fail(&self) -> bool {
        *self == Self::Fail
    }
}

/// Whether the data of requests is copied between the kernel and the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ZeroCopy {
    /// Whichever was measured to be faster.
    #[default]
    Auto,
    /// It stays where it is.
    On,
    /// It is copied.
    Off,
    /// As `On`, with the commands that the kernel requires when it is short of memory. For tests.
    #[value(hide = true)]
    Fallback,
}

/// How a damaged image is shown: what is left of it is read, and what is lost fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Salvage {
    /// What is a guess is used.
    pub assume: bool,
}

/// The choices for a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
pub struct Options {
    /// The N of `/dev/ublkbN`; the kernel chooses when there is none.
    pub id: Option<u32>,
    /// The name by which the user knows it.
    pub name: Option<Name>,
    /// It is removed with the last mount of it.
    pub for_mount: bool,
    /// The process that has it made uses it alone, and it ends with that. It gets no names.
    pub private: bool,
    /// Queues; the kernel gives at most one per CPU.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Longest request, bytes.
    pub request_bytes: u32,
    /// What happens to it when its daemon is killed; without a choice, the best that the kernel has.
    pub recovery: Option<Recovery>,
    /// Whether data is copied.
    pub zero_copy: ZeroCopy,
    /// The daemon has a mount namespace of its own.
    pub private_mounts: bool,
    /// The kernel leaves its partitions alone.
    pub no_partitions: bool,
    /// Its image may be anybody's: programs of the machine that mount what they find are to leave it alone.
    pub untrusted: bool,
    /// Whether it compacts its image when it is idle.
    pub reclaim: Reclaim,
    /// What becomes of requests for which the host has no room.
    pub on_full: OnFull,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            id: None,
            name: None,
            for_mount: false,
            private: false,
            queues: 1,
            depth: 64,
            request_bytes: 512 << 10,
            recovery: None,
            zero_copy: ZeroCopy::Auto,
            private_mounts: false,
            no_partitions: false,
            untrusted: false,
            reclaim: Reclaim::OFF,
            on_full: OnFull::Fail,
        }
    }
}

impl Options {
    /// Checks every bound.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`], naming the bound.
    pub fn validate(&self) -> Result<()> {
        let Self { id, queues, depth, request_bytes, .. } = *self;
        let usage = |message: String| Err(Error::new(Kind::Usage, message));
        if id.is_some_and(|id| id > MAX_ID) {
            return usage(format!("device number {}: numbers are 0 to {MAX_ID}", id.unwrap_or_default()));
        }
        if !(1..=MAX_QUEUES).contains(&queues) {
            return usage(format!("{queues} queues: a device has 1 to {MAX_QUEUES}"));
        }
        if !(1..=MAX_DEPTH).contains(&depth) {
            return usage(format!("a depth of {depth}: a queue has 1 to {MAX_DEPTH}"));
        }
        let sizes = MIN_REQUEST_BYTES..=MAX_REQUEST_BYTES;
        if !sizes.contains(&request_bytes) || !request_bytes.is_multiple_of(MIN_REQUEST_BYTES) {
            return usage(format!(
                "a request size of {request_bytes} bytes: it is a multiple of {MIN_REQUEST_BYTES}, at most \
                 {MAX_REQUEST_BYTES}"
            ));
        }
        let buffers = u64::from(queues) * u64::from(depth) * u64::from(request_bytes);
        if buffers > MAX_BUFFER_BYTES {
            let (needed, most) = (buffers.div_ceil(MIB), MAX_BUFFER_BYTES / MIB);
            let message = format!(
                "{queues} queues of depth {depth} need {needed} MiB of request buffers ({} KiB each); at \
                 most {most} MiB are locked in memory",
                request_bytes / 1024
            );
            return Err(Error::new(Kind::Usage, message).remedy("choose fewer queues, or a smaller depth"));
        }
        Ok(())
    }
}

/// The disk as the kernel sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Size of the disk, bytes; a multiple of the logical sector.
    pub size_bytes: u64,
    /// Logical sector, bytes: 512 or 4096.
    pub logical_sector_bytes: u32,
    /// Physical sector, bytes: 512 or 4096.
    pub physical_sector_bytes: u32,
    /// Nothing may be written.
    pub read_only: bool,
    /// The memory alignment that the files need for direct I/O, bytes, a power of two.
    pub memory_alignment_bytes: u32,
}

/// The kernel counts in sectors of 512 bytes, whatever the logical sector.
pub(super) const KERNEL_SECTOR_SHIFT: u32 = 9;

/// Best size of I/O, as a power of two: 1 MiB, on which every payload block starts.
const OPTIMAL_IO_SHIFT: u8 = 20;

/// Smallest range worth discarding, bytes: the page of most file systems below an image.
const DISCARD_GRANULARITY_BYTES: u32 = 4096;

/// Longest discard, bytes: as much as the kernel puts into one, as the cost is per block and not per byte,
/// yet few enough blocks not to delay other requests.
const MAX_DISCARD_BYTES: u64 = 4 << 30;

const _: () =
    assert!(MAX_DISCARD_BYTES >> MIN_BLOCK_SHIFT < MAX_LOOKS as u64, "a front looks at each block once");

/// Blocks have at least a MiB.
const MIN_BLOCK_SHIFT: u32 = 20;

/// Longest write-zeroes request, bytes. The kernel cuts a longer range at multiples of this. If this were
/// more than the kernel puts into one request, it would cut at any sector: parts of blocks would take space.
const MAX_ZEROES_BYTES: u64 = 2 << 30;

/// The kernel's `ublk_params`; the crate's lacks the last field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelParameters {
    len: u32,
    types: u32,
    basic: sys::ublk_param_basic,
    discard: sys::ublk_param_discard,
    devt: sys::ublk_param_devt,
    zoned: sys::ublk_param_zoned,
    dma: sys::ublk_param_dma_align,
}

const _: () = assert!(offset_of!(KernelParameters, zoned) == offset_of!(sys::ublk_params, zoned));
const _: () = assert!(offset_of!(KernelParameters, dma) == 108);

impl Parameters {
    /// The kernel's form of it: for requests whose data is copied to and from aligned buffers, or is
    /// `in_place`, where whoever makes the requests must align it for the file.
    pub(super) fn to_kernel(self, request_bytes: u32, in_place: bool) -> KernelParameters {
        let physical = self.physical_sector_bytes.max(self.logical_sector_bytes);
        let mut params = KernelParameters {
            len: u32::try_from(size_of::<KernelParameters>()).expect("about a hundred bytes"),
            types: sys::UBLK_PARAM_TYPE_BASIC,
            ..Default::default()
        };
        params.basic = sys::ublk_param_basic {
            attrs: if self.read_only {
                sys::UBLK_ATTR_READ_ONLY
            } else {
                sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA
            },
            logical_bs_shift: shift(self.logical_sector_bytes),
            physical_bs_shift: shift(physical),
            io_opt_shift: OPTIMAL_IO_SHIFT,
            io_min_shift: shift(physical),
            max_sectors: request_bytes >> KERNEL_SECTOR_SHIFT,
            dev_sectors: self.size_bytes >> KERNEL_SECTOR_SHIFT,
            ..Default::default()
        };
        if !self.read_only {
            let sectors = |bytes: u64| u32::try_from(bytes >> KERNEL_SECTOR_SHIFT).expect("a small constant");
            params.types |= sys::UBLK_PARAM_TYPE_DISCARD;
            params.discard = sys::ublk_param_discard {
                discard_granularity: DISCARD_GRANULARITY_BYTES.max(self.logical_sector_bytes),
                max_discard_sectors: sectors(MAX_DISCARD_BYTES),
                max_write_zeroes_sectors: sectors(MAX_ZEROES_BYTES),
                max_discard_segments: 1,
                ..Default::default()
            };
        }
        if in_place {
            params.types |= sys::UBLK_PARAM_TYPE_DMA_ALIGN;
            params.dma.alignment = self.memory_alignment_bytes.max(LEAST_MEMORY_ALIGNMENT_BYTES) - 1;
        }
        params
    }
}

/// What the kernel asks of memory for any disk that does not say otherwise.
const LEAST_MEMORY_ALIGNMENT_BYTES: u32 = 512;

fn shift(sector_bytes: u32) -> u8 {
    assert!(sector_bytes.is_power_of_two(), "sectors of {sector_bytes} bytes");
    u8::try_from(sector_bytes.trailing_zeros()).expect("below 32")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Parameters = Parameters {
        size_bytes: 10 << 30,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
        read_only: false,
        memory_alignment_bytes: 4,
    };

    #[test]
    fn each_bound_is_checked_and_the_defaults_are_within() {
        let good = Options::default();
        assert!(good.validate().is_ok());
        for bad in [
            Options { queues: 0, ..good.clone() },
            Options { queues: MAX_QUEUES + 1, ..good.clone() },
            Options { depth: 0, ..good.clone() },
            Options { depth: MAX_DEPTH + 1, ..good.clone() },
            Options { request_bytes: 0, ..good.clone() },
            Options { request_bytes: 6144, ..good.clone() },
            Options { request_bytes: 2 << 20, ..good.clone() },
        ] {
            assert_eq!(bad.validate().expect_err("out of bounds").kind(), Kind::Usage, "{bad:?}");
        }
        let number = Options { id: Some(MAX_ID), ..good.clone() };
        assert!(number.validate().is_ok());
        let error = Options { id: Some(MAX_ID + 1), ..good.clone() }.validate().expect_err("too large");
        assert!(error.to_string().contains("numbers are 0 to 1048575"), "{error}");
        let error = Options { queues: 9, ..good }.validate().expect_err("too many");
        assert!(error.to_string().contains("need 288 MiB"), "{error}");
        assert!(error.remedy_text().is_some());
    }

    #[test]
    fn a_writable_disk_has_a_cache_that_can_be_flushed_and_can_be_trimmed() {
        let params = DISK.to_kernel(512 << 10, false);
        assert_eq!(params.basic.attrs, sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA);
        assert_eq!((params.basic.logical_bs_shift, params.basic.physical_bs_shift), (9, 12));
        assert_eq!((params.basic.max_sectors, params.basic.dev_sectors), (1024, 20 << 20));
        assert_ne!(params.types & sys::UBLK_PARAM_TYPE_DISCARD, 0);
        assert_eq!(params.discard.max_discard_segments, 1);
    }

    #[test]
    fn the_physical_sector_is_never_below_the_logical_one() {
        let odd = Parameters { logical_sector_bytes: 4096, physical_sector_bytes: 512, ..DISK };
        let params = odd.to_kernel(4096, false);
        assert_eq!((params.basic.logical_bs_shift, params.basic.physical_bs_shift), (12, 12));
    }

    #[test]
    fn only_data_that_stays_in_place_has_to_lie_as_the_file_wants_it() {
        let alignment = |memory_alignment_bytes, in_place| {
            let params = Parameters { memory_alignment_bytes, ..DISK }.to_kernel(4096, in_place);
            (params.types & sys::UBLK_PARAM_TYPE_DMA_ALIGN != 0, params.dma.alignment)
        };
        assert_eq!(alignment(4096, false), (false, 0));
        assert_eq!(alignment(4, true), (true, 511));
        assert_eq!(alignment(4096, true), (true, 4095));
    }

    #[test]
    fn a_read_only_disk_offers_neither_flush_nor_trim() {
        let params = Parameters { read_only: true, ..DISK }.to_kernel(4096, false);
        assert_eq!(params.basic.attrs, sys::UBLK_ATTR_READ_ONLY);
        assert_eq!(params.types, sys::UBLK_PARAM_TYPE_BASIC);
    }
}
