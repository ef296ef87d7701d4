//! What the tests of the engine and of sessions share.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::engine_thread::EngineThread;
use super::errands::Errands;
use super::layers::Parents;
use super::mailbox::{FrontEnds, mailboxes};
use super::session::{Plan, Sessions, folder_in_memory};
use super::spec::EngineHandle;
use super::writable::WritableOpener;
use crate::chain::Search;
use crate::disk::{self, Access, ImageFile, Reactor};
use crate::engine::message::{Ask, ToEngine, ToFront};
use crate::error::Result;
use crate::format::MIB;
use crate::image::{InitialState, NewImage, ParentRef};

/// An image, and a folder for its sessions.
pub(super) struct Bench {
    pub(super) path: PathBuf,
    pub(super) directory: tempfile::TempDir,
    /// The folder of sessions.
    pub(super) memory: tempfile::TempDir,
}

impl Bench {
    /// A fresh dynamic image of 16 blocks of 1 MiB.
    pub(super) fn new() -> Self {
        Self::with_parent(None)
    }

    pub(super) fn with_parent(parent: Option<ParentRef>) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("disk.vhdx");
        Self::make(&path, parent);
        Self { path, directory, memory: folder_in_memory() }
    }

    /// Makes an image, with a new disk id every time.
    fn make(path: &Path, parent: Option<ParentRef>) {
        let reactor = Reactor::new().expect("io_uring is there");
        let disk =
            reactor.disk(Arc::new(disk::Place::of(path).and_then(|place| place.create()).expect("free")));
        let image = NewImage {
            virtual_size: 16 * MIB,
            fixed: false,
            block_size: 1 << 20,
            log_length: 1 << 20,
            logical_sector_size: 512,
            physical_sector_size: 4096,
            initial_state: InitialState::NotPresent,
            parent,
        };
        reactor.block_on(image.write(&disk, Uuid::new_v4)).expect("room");
    }

    /// Puts a new image into the image's file, which stays the same one.
    pub(super) fn replace_content(&self) {
        let other = self.directory.path().join("other.vhdx");
        Self::make(&other, None);
        fs::write(&self.path, fs::read(&other).expect("readable")).expect("room");
    }

    pub(super) fn file(&self) -> Arc<ImageFile> {
        Arc::new(ImageFile::open(&self.path, Access::ReadWrite, Duration::ZERO).expect("free"))
    }

    pub(super) fn open(&self) -> Result<EngineThread> {
        self.open_as(Plan::Fresh { keep: false })
    }

    pub(super) fn open_as(&self, plan: Plan) -> Result<EngineThread> {
        EngineThread::open_with(self.file(), self.opener(plan))
    }

    pub(super) fn opener(&self, plan: Plan) -> WritableOpener {
        let parents = Parents { search: Search::default(), open: |path| panic!("{path:?} is no parent") };
        let sessions = Sessions::at(self.memory.path());
        WritableOpener { may_write: || Ok(()), plan, sessions, parents, errands: Errands::default() }
    }

    /// The session file, if there is one.
    pub(super) fn session(&self) -> Option<PathBuf> {
        let entries = fs::read_dir(self.memory.path()).expect("readable");
        let mut paths = entries.map(|entry| entry.expect("readable").path());
        paths.find(|path| path.extension().is_some_and(|extension| extension == "session"))
    }

    /// Opens the image, allocates a block, and closes it again.
    pub(super) fn modify(&self) {
        let (ends, mut fronts) = mailboxes(1, 4).expect("file descriptors");
        let engine = self.open().expect("a good image").start(ends);
        for (tag, ask) in [(0, Ask::OpenSession), (1, Ask::Allocate { first: 0, count: 1 })] {
            fronts[0].sender.send(ToEngine::Ask { tag, ask });
            fronts[0].sender.flush();
            assert_eq!(answered(receive(&fronts[0])), tag);
        }
        engine.close().expect("committed");
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        fs::read(&self.path).expect("readable")
    }
}

/// Waits for the next message, as a queue's thread does.
pub(super) fn receive(front: &FrontEnds) -> ToFront {
    loop {
        if let Some(message) = front.receiver.pop() {
            return message;
        }
        if front.receiver.may_sleep() {
            front.wake.read().expect("it is open");
        }
        front.receiver.awake();
    }
}

/// The tag of a reply, which must be a success.
pub(super) fn answered(message: ToFront) -> u16 {
    match message {
        ToFront::Reply { tag, result: Ok(()) } => tag,
        other => panic!("{other:?}"),
    }
}
