//! Mistakes that the model's properties must catch.

/// Each is a change of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    None,
    /// A session is taken over without a look at the image's FileWriteGuid.
    IgnoreGuid,
    /// A header carries a FileWriteGuid that its session does not know yet.
    LateAnnouncement,
    /// The entry goes before the device.
    EntryFirst,
    /// The session is removed before what it holds is committed.
    SessionFirst,
    /// The image's lock is given back before the image is closed.
    UnlockBeforeClose,
    /// The lock ends with the process, and not with its last I/O.
    LockOfProcess,
    /// A command that changes an image does not look for a device that waits with it, nor for its session.
    IgnoreClaims,
    /// A session that a process still holds says nothing of the image.
    IgnoreHeldSession,
    /// The entry names a child before the image is complete.
    EarlyName,
    /// The child's file is not durable when the entry names it.
    UnsyncedChild,
    /// A successor takes the writers' byte while the daemon lives.
    EagerSuccessor,
    /// A daemon that hands its device over removes the session, as it does when it ends.
    LeaveNothing,
    /// A device whose daemon has no session counts as one that serves the image.
    CountOthers,
    /// `del` removes the entry of a dead daemon before it closes the image.
    EntryBeforeClose,
    /// A sync that failed is done again: what the host has dropped is not written again.
    SyncAgain,
    /// A poisoned session is taken over.
    TakePoisoned,
    /// The larger disk has a FileWriteGuid that its session does not know.
    UnannouncedGrowth,
    /// The disk grows while its session is open.
    GrowUnrested,
    /// The session for the larger disk takes its name before the disk is larger.
    RenewEarly,
    /// The kernel has the new size before the image has.
    TellEarly,
    /// A successor serves a disk that has grown with the map that it had.
    KeepShortMap,
}

/// All of them, with the property that catches each, and the scenario in which it does.
pub const PLANTS: [(Plant, &str, usize); 21] = [
    (Plant::IgnoreGuid, "a session continues only what its image holds", 2),
    (Plant::LateAnnouncement, "a device that was killed can be recovered", 0),
    (Plant::EntryFirst, "no device is without an entry", 0),
    (Plant::SessionFirst, "what was acknowledged is served", 0),
    (Plant::UnlockBeforeClose, "an image has one writer", 0),
    (Plant::LockOfProcess, "an image has one writer", 0),
    (Plant::IgnoreClaims, "what was acknowledged is served", 3),
    (Plant::IgnoreHeldSession, "what was acknowledged is served", 3),
    (Plant::EarlyName, "what was acknowledged is served", 4),
    (Plant::UnsyncedChild, "what was flushed survives a power cut", 4),
    (Plant::EagerSuccessor, "an image has one writer", 5),
    (Plant::LeaveNothing, "a device that was killed can be recovered", 5),
    (Plant::EntryBeforeClose, "a device that was removed has left nothing", 0),
    (Plant::CountOthers, "a device that was removed has left nothing", 0),
    (Plant::SyncAgain, "what was flushed survives a power cut", 6),
    (Plant::TakePoisoned, "a session continues only what its image holds", 6),
    (Plant::UnannouncedGrowth, "a device that was killed can be recovered", 7),
    (Plant::GrowUnrested, "a device that was killed can be recovered", 7),
    (Plant::RenewEarly, "a device that was killed can be recovered", 7),
    (Plant::TellEarly, "a disk is as large as its users were told", 7),
    (Plant::KeepShortMap, "a device that was killed can be recovered", 7),
];
