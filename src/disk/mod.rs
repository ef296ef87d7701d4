//! The seam under the engine: what it may ask of the file that holds an image.
//!
//! Production implements [`Disk`] with `io_uring` on the open file description that carries the image's lock,
//! and syncs through one of its own; tests implement it with a simulated disk that reorders, loses and tears.
//!
//! Contract of every implementation:
//!
//! * operations run concurrently and complete in any order; nothing is durable before a [`Disk::sync`] that
//!   was *issued after the operation completed* has itself completed;
//! * short transfers, `EINTR` and `EAGAIN` are dealt with below this trait: an operation ends whole or fails;
//! * offsets and lengths of `read` and `write` are multiples of 4096;
//! * `grow` is separate from `write`, because an extension can be lost on its own.

mod block_device;
mod buffer;
mod file;
mod host_file;
mod lock;
mod open;
mod place;
mod plain;
mod reactor;
mod refusal;
mod ring;
mod sectors;
mod shared_file;
mod sparse;
pub mod tally;
mod transfer;
mod unfinished;
mod uring;

pub use block_device::BlockDevice;
pub use buffer::{Buffer, PAGE_BYTES, is_zero};
pub use file::{HostRoom, ImageFile, PayloadIo, folder_of, host_bytes, is_sparse_for_windows};
pub(crate) use file::{next_data, next_hole};
pub use host_file::HostFile;
pub use lock::Access;
pub(crate) use open::in_time;
pub use open::{Links, Opened, open_regular};
pub use place::Place;
pub use plain::PlainDisk;
pub use reactor::{Mail, Reactor};
pub use refusal::{CHOOSE, REPLACE, dangling, missing_folder, name_of_new, path_of, taken, without_proc};
pub use ring::{Ring, ring_refused};
pub use sectors::read_sectors;
pub use shared_file::{SharedFile, Stretch};
pub use sparse::{SPARSE_FOR_WINDOWS, Sparse};
pub use unfinished::{Remover, Unfinished};
pub use uring::{Counters, UringDisk};

use std::io;

/// An image file that is only read.
#[expect(async_fn_in_trait, reason = "one thread drives all of it: futures need not be Send")]
pub trait ReadDisk {
    /// Reads `length` bytes at `offset`; what lies past the end of the file reads as zero.
    async fn read(&self, offset: u64, length: usize) -> io::Result<Buffer>;

    /// Where the next bytes lie that the host has stored, at `offset` or behind it; from `offset` to there
    /// the file is a hole and reads as zero. Nothing if there are none. Hosts that do not know say `offset`.
    async fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;

    /// The file's length in bytes.
    async fn length(&self) -> io::Result<u64>;

    /// Whether [`Disk::punch`] surely gives space of this file back. Looking changes nothing.
    fn takes_space_back(&self) -> bool;
}

/// An image file open for writing, seen by one engine thread.
#[expect(async_fn_in_trait, reason = "one thread drives all of it: futures need not be Send")]
pub trait Disk: ReadDisk {
    /// Writes all of `data` at `offset`, inside the file's present length.
    async fn write(&self, offset: u64, data: Buffer) -> io::Result<()>;

    /// Makes everything that completed before this call durable, the file's length included.
    async fn sync(&self) -> io::Result<()>;

    /// Makes durable what the whole file system of the image holds. Fails if the host has lost data of any of
    /// its files since it was last asked, by any program: an error that this file's sync has
    /// reported to a dead process is not reported twice, and is still found here.
    async fn sync_host(&self) -> io::Result<()>;

    /// Extends the file to `length` bytes; the new bytes read as zero. Never shortens. Where the file may
    /// have no holes, what a power cut leaves there may be anything until a sync has made it durable.
    async fn grow(&self, length: u64) -> io::Result<()>;

    /// Shortens the file to `length` bytes.
    async fn truncate(&self, length: u64) -> io::Result<()>;

    /// Has the host allocate the holes of `offset..offset + length`, so that a later write there cannot run
    /// out of space. Hosts that cannot do it succeed without effect.
    async fn reserve(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Whether the file may have holes. Where it may not, [`Disk::grow`] allocates and [`Disk::punch`] does
    /// nothing; whoever has other ways to the file must not make holes either.
    fn may_have_holes(&self) -> bool {
        true
    }

    /// Whether the host reports a write that it has lost to every description of the file, so that a sync by
    /// any of them finds it.
    fn reports_losses_to_all(&self) -> bool {
        true
    }

    /// Makes `offset..offset + length` read as zero, keeping its space.
    async fn zero(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Gives the space of `offset..offset + length` back to the host; it reads as zero afterwards. `false`
    /// when the host cannot, and nothing has changed.
    async fn punch(&self, offset: u64, length: u64) -> io::Result<bool>;
}
