//! An opened image: geometry, block map, sector bitmaps, log scan and replay, the map of what occupies the
//! file.

mod amend;
mod bitmap_reader;
mod bitmaps;
mod block_map;
mod check;
mod create;
mod edit;
mod growth;
mod headers;
mod identity;
mod locate;
mod log_scan;
mod memory;
mod open;
mod overlay;
mod page;
mod pending;
mod region_move;
mod repair;
mod replay;
mod resume;
mod room;
mod runs;
mod salvage;
mod shrink;
mod space;
mod view;
mod words;

pub use amend::{PreparedResize, Resize};
pub use bitmaps::{MAX_BITMAP_BYTES, PAGES_PER_CHUNK, SectorBitmaps};
pub use block_map::{BlockMap, Mapping, SLOTS_PER_PAGE};
pub use check::{Finding, KEPT_FINDINGS, LogFound, Report, Severity, check};
pub use create::{DEFAULT_BLOCK_SIZE, DEFAULT_LOG_LENGTH, Draft, InitialState, NewImage, ParentRef};
pub use headers::Headers;
pub use identity::Identity;
pub use locate::{Location, locate};
pub use memory::{HEADER_WORDS, Mismatch, Owner, Place, Session, SessionMemory, VERSION};
pub use open::{FoundLog, Image, Layout, ReadImage, WritableImage, payload_extent};
pub use overlay::Overlay;
pub use page::Page;
pub use pending::Pending;
pub use repair::{Repair, repair};
pub use salvage::{Note, Salvaged, Trace};
pub use space::{Content, Extent, Grant, MAX_FILE_BYTES, Space};
pub use words::{Reserve, SharedWords, WORD_BITS, Written};
