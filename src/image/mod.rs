//! An opened image: geometry, block map, sector bitmaps, log scan and replay, the map of what occupies the file.

mod amend;
mod bitmaps;
mod block_map;
mod check;
mod create;
mod edit;
mod headers;
mod log_scan;
mod memory;
mod open;
mod overlay;
mod repair;
mod replay;
mod resume;
mod space;

pub use bitmaps::{MAX_BITMAP_BYTES, SectorBitmaps};
pub use block_map::{BlockMap, Mapping, SLOTS_PER_PAGE};
pub use check::{Finding, KEPT_FINDINGS, LogFound, Report, Severity, check};
pub use create::{Descent, InitialState, NewImage};
pub use headers::Headers;
pub use memory::{Mismatch, Owner, Session, SessionMemory};
pub use open::{FoundLog, Image, Layout, Mode, payload_extent};
pub use overlay::Overlay;
pub use repair::{Repair, repair};
pub use resume::Pending;
pub use space::{Extent, Grant, MAX_FILE_BYTES, Space};
