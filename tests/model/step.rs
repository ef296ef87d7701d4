//! The steps of commands and daemons. A kill, a power cut or another process may come between any two.
//!
//! The doc of each names the file of `src` and the function that it stands for.

/// What a process does next.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Step {
    /// `cli/add.rs` `open_locked`: takes the image's lock.
    Locks,
    /// `device/claims.rs` `refuse_abandoned`: not an image with which a device waits.
    Surveys,
    /// `operations/children.rs` `refuse_parent`: not an image that was frozen meanwhile.
    RefusesParent,
    /// `device/session/choice.rs` `refuse_orphan`: not an image that a killed daemon has left a session of.
    RefusesOrphan,
    /// `device/session/choice.rs` `choose`: the session to take over.
    Chooses,
    /// `image/memory.rs` `confirm_guid`: the session knows the FileWriteGuid that the image carries.
    Confirms,
    /// `image/memory.rs` `announce`: the session knows the one that the replay will write.
    Announces,
    /// `image/open.rs` `open_for_writing`: replays a dirty log in place.
    Replays,
    /// `image/resume.rs` `resume`: what the session and the file differ in is to be committed.
    Reconciles,
    /// `device/writable.rs` `begin`: a session of its own.
    Begins,
    /// `device/registry/survey.rs` `sweep`: removes the entries of devices that are gone; takes the lock.
    Sweeps,
    /// `device/control/mod.rs` `add`: the kernel makes the device.
    AddsDevice,
    /// `device/registry/store.rs` `write`: its entry, under the registry's lock.
    WritesEntry,
    /// `device/control/mod.rs` `start`: requests flow.
    Starts,
    /// `device/daemon/mod.rs` `bring_up`: the entry says that the device was started.
    NotesStart,
    /// `device/daemon/mod.rs` `run`: serves requests until something happens.
    Serves,
    /// `engine/session.rs` `session_guids`: the first write has the coming FileWriteGuid announced.
    AnnouncesSession,
    /// `engine/headers.rs` `update_headers`: both headers carry it.
    ChangesHeaders,
    /// `engine/session.rs` `open_session_as`: the session word says that the image may be modified.
    OpensSession,
    /// `engine/sync.rs` `sync`: what the log names is durable, and the flush is answered.
    Syncs,
    /// `device/snapshot/maker.rs` `make`: the child's file.
    MakesChild,
    /// `image/create.rs` `write`: the child is durable.
    SyncsChild,
    /// `device/snapshot/mod.rs` `serve_child`: the child's session.
    BeginsChild,
    /// `device/exchange.rs` `run`: the fronts are held, the image is committed.
    Freezes,
    /// `engine/grow.rs` `rest`: its log is empty, its session rests.
    Rests,
    /// `engine/grow.rs` `carry_out`: the session knows the FileWriteGuid of the larger disk.
    AnnouncesGrowth,
    /// `image/amend.rs` `carry_out`: both headers carry it.
    NamesGrowth,
    /// `image/edit.rs` `write`: one log entry makes the disk larger, and the headers name that log.
    Enlarges,
    /// `image/edit.rs` `write`: what the entry says is in place, and the headers name no log.
    EndsEdit,
    /// `device/session/file.rs` `publish`: a session for the larger disk takes the name of the other.
    RenewsSession,
    /// `device/daemon/calls.rs` `tell_size`: the kernel has the new size.
    TellsSize,
    /// `device/snapshot/mod.rs` `switch`: the entry names the child.
    NamesChild,
    /// `device/snapshot/mod.rs` `retire`: the parent may be read, its session goes.
    Retires,
    /// `device/daemon/mod.rs` `stop`: no request comes from now on.
    Stops,
    /// `engine/close.rs` `close_session`: what the session holds is committed, durably.
    Commits,
    /// `engine/cut.rs` `end_log`: the headers name no log.
    EndsLog,
    /// `device/session/file.rs` `remove`: the image needs no session.
    RemovesSession,
    /// `device/control/mod.rs` `delete`: the kernel gives the number back.
    Deletes,
    /// `device/registry/store.rs` `remove`: the entry goes.
    RemovesEntry,
    /// `device/daemon/mod.rs` `take_down`: the daemon ends, and its locks with it.
    Exits,
    /// `device/stop/kernel.rs` `stop_device`: another process has the kernel stop the device.
    StopsDevice,
    /// `device/stop/daemon.rs` `end_daemon`: waits for the daemon's end.
    AwaitsDaemon,
    /// `device/stop/mod.rs` `remove_remains`: removes what a dead daemon has left in the kernel.
    RemovesRemains,
    /// `device/stop/mod.rs` `stop`: removes its entry.
    RemovesLastEntry,
    /// `device/stop/image.rs` `close_image`: whether the image is to be closed, and locks it.
    LocksToClose,
    /// `cli/del.rs` `run`: the device is gone.
    Reports,
    /// `cli/recover.rs` `refuse_served`: the device waits for a daemon.
    FindsDevice,
    /// `cli/recover.rs` `open`: takes the lock of its image.
    LocksToRecover,
    /// `cli/recover.rs` `refuse_changed`: it is still the device's image.
    RefusesChanged,
    /// `device/control/mod.rs` `start_recovery`: the kernel releases the device for another daemon.
    StartsRecovery,
    /// `device/registry/store.rs` `name_daemon`: the entry names the new daemon.
    NamesDaemon,
    /// `device/control/mod.rs` `end_recovery`: requests flow again.
    EndsRecovery,
    /// `device/daemon/calls.rs` `catch_up_with`: the kernel has the size of a disk that grew before the kill.
    CatchesUp,
    /// `disk/lock.rs` `lock_beside`: a successor's lock lies beside the daemon's.
    LocksBeside,
    /// `device/upgrade/successor.rs` `refuse_ended`: the daemon has lived until then.
    RefusesEnded,
    /// `device/upgrade/successor.rs` `take_over`: asks the daemon for the device.
    AsksDaemon,
    /// `device/upgrade/successor.rs` `has_ended`: waits for the daemon's end.
    AwaitsEnd,
    /// `disk/lock.rs` `take_writer`: the daemon's last I/O has ended.
    TakesWriter,
    /// `device/session/list.rs` `await_free`: nothing uses the session.
    AwaitsSession,
    /// `device/snapshot/mod.rs` `settle`: the daemon commits, and has requests wait.
    Settles,
    /// `device/daemon/leaving.rs` `hand_over`: it ends as if it had been killed.
    Leaves,
    /// `operations/compact/run.rs` `run`: changes the image at rest.
    Changes,
    /// `operations/resize.rs` `resize`: makes the disk of the image at rest larger.
    Resizes,
}
