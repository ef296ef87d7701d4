//! Switches for the crash tests: bugs planted on purpose, and logs shorter than the format allows.
//!
//! A test harness is worth what it catches, so the places where an ordering or a check decides between a
//! crash-safe image and a broken one can be broken on purpose, one at a time. Without the cargo feature
//! `simulation` every question asked here is a constant, and a build without debug assertions refuses the
//! feature. The switches belong to the thread that sets them.

use std::sync::atomic::Ordering;

#[cfg(all(feature = "simulation", not(debug_assertions)))]
compile_error!("the feature `simulation` plants bugs: it is for tests and never for a release");

/// A bug that can be planted. Each names what goes wrong; the code says where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// No sync between zeroing recycled space and logging a mapping to it.
    SkipRecyclingSync,
    /// No sync between extending the file and logging a mapping to the new part.
    SkipGrowthSync,
    /// A BAT page is written in place before its log entry is durable.
    ApplyBeforeLog,
    /// The log's Tail passes pages that are in place but not durable there.
    TailBeforeSync,
    /// Unmapped space is used again before the unmapping is durable.
    ReuseBeforeDurable,
    /// A flush is acknowledged before its sync has completed.
    EarlyFlush,
    /// A header names a log that has no entry yet.
    HeaderBeforeEntry,
    /// Log entries do not say how long the file surely is.
    NoFlushedOffset,
    /// Replay does not extend the file to the length the log asks for.
    NoExtension,
    /// A durable write is an ordinary one.
    IgnoreFua,
    /// An entry takes 127 descriptors, which others cannot read.
    LongEntry,
    /// A torn log entry counts as whole.
    SkipChecksum,
    /// Entries before the Tail are replayed too.
    ReplayBeforeTail,
    /// Entries behind a broken one are replayed without what they build on.
    KeepLaterEntries,
    /// Unmapped space is used again while older lookups are still on their way to it.
    SkipBarrier,
    /// Recycled space is granted with its old content.
    SkipZeroFill,
    /// Both headers are in flight at once.
    TwinHeaders,
    /// A page that changes while it is logged is left out of the next cycle.
    LateMark,
    /// The page as it is when it is written is logged, not the copy that was synced for.
    LogLivePage,
    /// Log entries say that the file surely is as long as it is now.
    UnstableLength,
    /// Free space found at open counts as zeros.
    TrustTail,
    /// A piece that is submitted again counts for the barrier from then on, not from its lookup.
    LateCount,
    /// A durable write that failed does not poison the device.
    NoPoison,
    /// A killed process's I/O still lands when its successor has read the file.
    NoFence,
    /// A header carries a FileWriteGuid that the session's memory does not know yet.
    LateAnnouncement,
    /// A successor forgets the GUID in the file when it announces the next one.
    LateSettlement,
    /// The log starts again while its last pages are on their way to their place.
    StartAgainEarly,
    /// What a killed process wrote counts as durable.
    TrustKilled,
    /// A successor does not commit what the killed process had not logged.
    ForgetPending,
    /// A successor uses space that only the file still names.
    ForgetUnmapped,
    /// A block of a differencing image gets zeros where it has its parent's content.
    ForgetParents,
    /// No sync between filling a block from its parents and logging a mapping to it.
    SkipFillSync,
    /// A block of a differencing image that is discarded shows its parent's content again.
    RevealParents,
    /// No sync between the data of partially present blocks and the entry that has its bits.
    SkipBitsSync,
    /// A sector counts as being there when its write is submitted.
    BitsBeforeData,
    /// Bits that were set are not logged.
    ForgetBits,
    /// A block becomes partially present over bits that a power cut has left in the file.
    KeepStaleBits,
    /// A block becomes partially present before its chunk's sector bitmap is durable.
    EarlyReliance,
    /// A block becomes fully present before all its sectors are there.
    EarlyPromotion,
    /// A successor does not log the bits that the killed process had set.
    ForgetResumedBits,
    /// A front says that it holds while requests are still under way.
    EarlyHeld,
    /// A successor's sync that succeeds counts as proof that the killed process's syncs did.
    TrustHost,
    /// A session from before a power cut is adopted.
    IgnoreBoot,
    /// A session of another layout is read as if it had this one.
    IgnoreVersion,
    /// A session whose header is damaged is used.
    IgnoreChecksum,
    /// A block with data that is to read as zeros counts as one that does.
    SkipPresent,
    /// A block of a differencing image that is discarded, and that only its parents have, stays as it is.
    KeepParents,
    /// A block that had no space when it was looked up becomes ZERO, even if it has got space since.
    TrustFirstLook,
    /// Space that a power cut has left without an owner stays in the image when it is closed.
    KeepLeaks,
    /// The engine syncs through the description that the fronts write through, which may have been told of
    /// what was lost before.
    SharedDescription,
    /// A sync counts although a durable write that was in flight may have failed.
    UnseenFailure,
    /// A flush counts as one that needs a sync only, before what a cycle logs is durable.
    EarlyClear,
    /// A flush counts as one that needs a sync only, although a mapping is visible, until a cycle logs it.
    LateFlag,
    /// A front syncs for a flush while bits of sectors are not in the log.
    SyncOverBits,
    /// A front's sync counts although what was in flight at its end may have failed.
    SyncPastUnseen,
    /// A front's sync that failed does not poison the device.
    SilentSync,
    /// A durable write for which the host has no room poisons the device.
    RefusalPoisons,
    /// A sector bitmap is named while it is a hole of the file.
    UnreservedBitmap,
    /// Pages that the host had no room to log are not logged again.
    ForgetRefusedPages,
    /// Pages that the host had no room for in their place stay in the log only.
    ForgetRefusedBatch,
    /// Of a page that several rounds have, the oldest copy goes to its place.
    KeepOlderCopy,
    /// After a header was refused, the other one is written, which is the only whole one.
    SkipRefusedSlot,
    /// A header that was refused counts as not in the file.
    TrustRefusal,
    /// A front makes holes in a file that must have none.
    IgnoreDensity,
    /// New space of a file without holes is used before its zeros are durable.
    EarlyGrowth,
    /// No sync between copying a block that moves and logging its new place.
    SkipMoveSync,
    /// The old place of a block that has moved is used again before its new place is durable.
    ReuseMovedEarly,
    /// A sector bitmap moves, and its bits do not.
    MoveBareBitmap,
    /// A front changes a block that is on its way to another place.
    IgnoreMove,
    /// A block that moves is copied while writes are still on their way to it.
    EarlyCopy,
    /// The old place of a block that has moved is used again while reads are still on their way to it.
    ForgetReaders,
    /// A sector is written to the new place of a partially present block, and its bit logged, before the
    /// entry that has the place.
    EarlyBits,
    /// The file of a served image is cut while its log says that it is longer.
    EarlyCut,
    /// A region table names a new place of the BAT before the BAT is there.
    EarlyRegion,
    /// A change of the metadata that readers see leaves the DataWriteGuid as it was.
    SilentChange,
    /// A change of the metadata that readers see has its new DataWriteGuid before it is certain to be made.
    EarlyOrphans,
    /// A disk that grows shows what its last block has behind its old end.
    KeepOldEnd,
    /// A disk that grows takes slots of its BAT as they are.
    KeepOldSlots,
    /// A child that grows shows its parent behind its old end.
    ShowParentsEnd,
    /// A disk that grows counts as larger before that is durable.
    EarlySize,
    /// A disk that grows while it is served gets a FileWriteGuid that its session does not know.
    UnannouncedGrowth,
    /// A front continues with the map that it had before its disk grew.
    KeepOldMap,
    /// A chain that moves loses its old names before its children name their parents at both places.
    SkipMoveRelink,
    /// A chain that moves loses its leaf's old name first, and nothing leads to the others any longer.
    RemoveLeafFirst,
    /// A file that has the name of an image that moves counts as its copy.
    TrustStranger,
    /// The successor of a daemon writes the image before the daemon's last request has ended.
    EarlyWriter,
    /// The successor of a daemon replaces the device's entry before it serves the device.
    EarlyEntry,
    /// A file system grows that was not shut down cleanly.
    GrowUnclean,
    /// What is known of a trim counts for a disk that was written since.
    TrustRecord,
    /// A sector that a merge copies into part of a block is not marked as present there.
    ForgetMergedBits,
    /// What a merge has copied is not made durable before the layer is dropped.
    UnsyncedMerge,
    /// The file of a merged layer is removed before its child's new link is durable.
    LayerBeforeLink,
    /// The file of a merged layer is removed while fronts read it.
    LayerBeforeFronts,
    /// A merge takes a GUID that a killed one has written for durable.
    RelyOnCache,
    /// A request that waits for room counts as one that is served.
    CountWaiting,
    /// Of a request that has waited for room, only what was not begun before is done.
    DoOnlyTheRest,
    /// A request that has waited for room is done, even if it found none again.
    TrustSecondTry,
    /// A front gives a block space and does not mark the page of its mapping.
    ForgetClaim,
    /// What is in the pool of fronts stays there when the file is cut, or when the host has no room.
    KeepPool,
    /// A thread that is about to sleep looks for messages in no order with having said so.
    SkipSleepFence,
    /// A thread that has sent a message looks whether the receiver sleeps in no order with having sent it.
    SkipSendFence,
    /// A thread looks for messages before it says that it is about to sleep.
    LookFirst,
    /// A front that finds a sector marked as present leaves the mark of its page to whichever front set it.
    TrustFoundBits,
    /// A page is marked as changed before it is.
    MarkBeforeChange,
    /// A group of pages is marked as having marked ones before its page is.
    GroupBeforePage,
    /// A front that finds a mapping leaves the mark of its page to whichever front has made it.
    TrustFoundMapping,
    /// A reader that finds a sector in the file looks for it where the block was before.
    TrustFoundPlace,
    /// A front changes a page without being counted into it.
    StayOutside,
    /// A mapping is marked as durable over one that a front has made meanwhile.
    StoreDurable,
    /// Whoever finds a sector's bit set may see its page as it was before.
    RelaxedFind,
    /// A sector's bit is set in no order with what its front did before.
    RelaxedBits,
    /// A page is marked in no order with its bits.
    RelaxedMark,
    /// The mark of a page is taken in no order with the copy of its bits.
    RelaxedTake,
    /// A mapping is published in no order with the bit that its page has entries.
    RelaxedPublish,
    /// Whoever finds a mapping may not see the bit that its page has entries.
    RelaxedLookup,
    /// A mapping counts as durable although it has changed since it was logged.
    IgnoreChange,
    /// A session is opened over poison that came meanwhile.
    OpenOverPoison,
    /// A durable write has ended in no order with its poison.
    RelaxedEnd,
    /// Whoever finds no durable write in flight may not see the poison of one that has ended.
    RelaxedLook,
    /// A durable write has ended before its failure has poisoned.
    EndBeforePoison,
    /// Whoever finds no page marked may not see that a cycle has taken the marks.
    RelaxedCount,
    /// A cycle takes marks in no order with saying so.
    RelaxedUncount,
    /// A front answers a barrier or a fence while what it waits for is under way.
    EarlyAnswer,
    /// The session of a device is removed before what it holds is committed.
    SessionFirst,
    /// The entry of a device is removed before the device.
    EntryFirst,
    /// A session gets its name by way of another one, which a kill leaves.
    SecondName,
    /// A daemon notes requests to end when its device is gone.
    NoteToTheEnd,
    /// Requests that a killed daemon had fail, where they are to be repeated.
    FailInFlight,
    /// A write is completed when its I/O has not begun.
    EarlyCompletion,
    /// The entry of a device names the image before after a snapshot.
    ForgetSwitch,
    /// The entry of a device does not say that a merge is under way.
    ForgetMerge,
    /// The kernel does not learn that a disk became larger when its daemon was killed.
    SkipCatchUp,
    /// A command of the driver that a signal has interrupted has failed.
    GiveUpInterrupted,
    /// A device that is open is stopped, although it was asked for only if it is not.
    StopUsed,
    /// A daemon that was asked to end stops a device that somebody has opened.
    EndUsed,
    /// An image counts as closed because its device is gone.
    TrustGone,
    /// A new device gets a number that an entry has by which another image is to be closed.
    ReuseNumber,
    /// A device is taken for removed when the daemon has ended that its entry named a while ago.
    TrustOldEntry,
}

impl Plant {
    /// Those that show in the order of requests, of what the host does, and of crashes.
    pub const ALL: [Self; 99] = [
        Self::SkipRecyclingSync,
        Self::SkipGrowthSync,
        Self::ApplyBeforeLog,
        Self::TailBeforeSync,
        Self::ReuseBeforeDurable,
        Self::EarlyFlush,
        Self::HeaderBeforeEntry,
        Self::NoFlushedOffset,
        Self::NoExtension,
        Self::IgnoreFua,
        Self::LongEntry,
        Self::SkipChecksum,
        Self::ReplayBeforeTail,
        Self::KeepLaterEntries,
        Self::SkipBarrier,
        Self::SkipZeroFill,
        Self::TwinHeaders,
        Self::LateMark,
        Self::LogLivePage,
        Self::UnstableLength,
        Self::TrustTail,
        Self::LateCount,
        Self::NoPoison,
        Self::NoFence,
        Self::LateAnnouncement,
        Self::LateSettlement,
        Self::StartAgainEarly,
        Self::TrustKilled,
        Self::ForgetPending,
        Self::ForgetUnmapped,
        Self::ForgetParents,
        Self::SkipFillSync,
        Self::RevealParents,
        Self::SkipBitsSync,
        Self::BitsBeforeData,
        Self::ForgetBits,
        Self::KeepStaleBits,
        Self::EarlyReliance,
        Self::EarlyPromotion,
        Self::ForgetResumedBits,
        Self::EarlyHeld,
        Self::TrustHost,
        Self::IgnoreBoot,
        Self::IgnoreVersion,
        Self::IgnoreChecksum,
        Self::SkipPresent,
        Self::KeepParents,
        Self::TrustFirstLook,
        Self::KeepLeaks,
        Self::SharedDescription,
        Self::UnseenFailure,
        Self::EarlyClear,
        Self::LateFlag,
        Self::SyncOverBits,
        Self::SyncPastUnseen,
        Self::SilentSync,
        Self::RefusalPoisons,
        Self::UnreservedBitmap,
        Self::ForgetRefusedPages,
        Self::ForgetRefusedBatch,
        Self::KeepOlderCopy,
        Self::SkipRefusedSlot,
        Self::TrustRefusal,
        Self::IgnoreDensity,
        Self::EarlyGrowth,
        Self::SkipMoveSync,
        Self::ReuseMovedEarly,
        Self::MoveBareBitmap,
        Self::IgnoreMove,
        Self::EarlyCopy,
        Self::ForgetReaders,
        Self::EarlyBits,
        Self::EarlyCut,
        Self::EarlyRegion,
        Self::SilentChange,
        Self::EarlyOrphans,
        Self::KeepOldEnd,
        Self::KeepOldSlots,
        Self::ShowParentsEnd,
        Self::EarlySize,
        Self::UnannouncedGrowth,
        Self::KeepOldMap,
        Self::SkipMoveRelink,
        Self::RemoveLeafFirst,
        Self::TrustStranger,
        Self::EarlyWriter,
        Self::EarlyEntry,
        Self::GrowUnclean,
        Self::TrustRecord,
        Self::ForgetMergedBits,
        Self::UnsyncedMerge,
        Self::LayerBeforeLink,
        Self::LayerBeforeFronts,
        Self::RelyOnCache,
        Self::CountWaiting,
        Self::DoOnlyTheRest,
        Self::TrustSecondTry,
        Self::ForgetClaim,
        Self::KeepPool,
    ];

    /// Those that show in the order of what processes do to a device.
    pub const OF_DEVICES: [Self; 15] = [
        Self::SessionFirst,
        Self::EntryFirst,
        Self::SecondName,
        Self::NoteToTheEnd,
        Self::FailInFlight,
        Self::EarlyCompletion,
        Self::ForgetSwitch,
        Self::SkipCatchUp,
        Self::ForgetMerge,
        Self::GiveUpInterrupted,
        Self::StopUsed,
        Self::EndUsed,
        Self::TrustGone,
        Self::ReuseNumber,
        Self::TrustOldEntry,
    ];

    /// Those that show where threads run side by side.
    pub const OF_THREADS: [Self; 24] = [
        Self::SkipSleepFence,
        Self::SkipSendFence,
        Self::LookFirst,
        Self::TrustFoundBits,
        Self::MarkBeforeChange,
        Self::GroupBeforePage,
        Self::TrustFoundMapping,
        Self::TrustFoundPlace,
        Self::StayOutside,
        Self::StoreDurable,
        Self::RelaxedFind,
        Self::RelaxedBits,
        Self::RelaxedMark,
        Self::RelaxedTake,
        Self::RelaxedPublish,
        Self::RelaxedLookup,
        Self::IgnoreChange,
        Self::OpenOverPoison,
        Self::RelaxedEnd,
        Self::RelaxedLook,
        Self::EndBeforePoison,
        Self::RelaxedCount,
        Self::RelaxedUncount,
        Self::EarlyAnswer,
    ];
}

/// Whether `plant` is planted: never, outside the simulation.
#[cfg(not(feature = "simulation"))]
#[inline]
pub const fn planted(_plant: Plant) -> bool {
    false
}

/// The order of a step on a word that threads share: `usual`, or none while `plant` is planted.
#[inline]
pub fn ordered(plant: Plant, usual: Ordering) -> Ordering {
    if planted(plant) { Ordering::Relaxed } else { usual }
}

/// The unit of a log's length, bytes: `usual`.
#[cfg(not(feature = "simulation"))]
#[inline]
pub const fn log_unit(usual: u64) -> u64 {
    usual
}

/// The most descriptors of an entry that is written: `usual`.
#[cfg(not(feature = "simulation"))]
#[inline]
pub const fn descriptors_per_entry(usual: usize) -> usize {
    usual
}

#[cfg(feature = "simulation")]
pub use switches::{
    PLANT_VARIABLE, descriptors_per_entry, log_unit, plant, planted, set_descriptors_per_entry, set_log_unit,
};

#[cfg(feature = "simulation")]
mod switches {
    use std::cell::Cell;
    use std::sync::LazyLock;

    use super::Plant;

    /// Names the bug that is planted in every thread of a process.
    pub const PLANT_VARIABLE: &str = "VHDX_UBLK_PLANT";

    static OF_PROCESS: LazyLock<Option<Plant>> = LazyLock::new(|| {
        let name = std::env::var(PLANT_VARIABLE).ok()?;
        let plant = Plant::OF_DEVICES.into_iter().find(|plant| format!("{plant:?}") == name);
        Some(plant.unwrap_or_else(|| panic!("there is no bug {name} of devices")))
    });

    thread_local! {
        static PLANTED: Cell<Option<Plant>> = const { Cell::new(None) };
        static LOG_UNIT: Cell<Option<u64>> = const { Cell::new(None) };
        static DESCRIPTORS: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Whether `plant` is planted in this thread.
    pub fn planted(plant: Plant) -> bool {
        PLANTED.get().or(*OF_PROCESS) == Some(plant)
    }

    /// Plants one bug in this thread, or none.
    pub fn plant(plant: Option<Plant>) {
        PLANTED.set(plant);
    }

    /// The most descriptors of an entry that is written in this thread: `usual`, fewer, or one too many.
    pub fn descriptors_per_entry(usual: usize) -> usize {
        DESCRIPTORS.get().unwrap_or(usual) + usize::from(planted(Plant::LongEntry))
    }

    /// Makes entries in this thread as short as `count` descriptors, or as long as usual: a log of few
    /// sectors then has rounds of several entries.
    pub fn set_descriptors_per_entry(count: Option<usize>) {
        DESCRIPTORS.set(count);
    }

    /// The unit of a log's length in this thread, bytes: `usual`, or what was set.
    pub fn log_unit(usual: u64) -> u64 {
        LOG_UNIT.get().unwrap_or(usual)
    }

    /// Makes logs of any multiple of `bytes` legal in this thread, or of the usual unit only.
    pub fn set_log_unit(bytes: Option<u64>) {
        LOG_UNIT.set(bytes);
    }
}
