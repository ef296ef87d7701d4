//! Copying the file of an image into another one, which gets its name when it is whole and synced.
//!
//! Where the host can do that, both files share their blocks until one of them is written.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::{Watch, naming, room};
use crate::chain::Member;
use crate::disk::{Disk, ImageFile, PAGE_BYTES, Place, Reactor, ReadDisk, Unfinished, UringDisk};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::{MIB, index};

/// What the owner of an image may always do with it.
const PRIVATE: u32 = 0o600;

/// How much is copied at once, bytes.
const WINDOW_BYTES: u64 = 4 * MIB;

const READING: &str = "reading the image";

/// A copy that is to be made.
pub(super) struct Duplicate<'a> {
    /// The image, locked against writers.
    pub(super) of: &'a Member,
    /// Where its copy will be.
    pub(super) at: &'a Place,
    /// The image whose owner the copy gets, and whose permissions, as far as others have them of the copied
    /// image.
    pub(super) like: &'a Member,
    /// The parent that the copy names, if it is not the one of the image.
    pub(super) parent: Option<&'a Path>,
    /// Bytes for which there must be room, if blocks cannot be shared.
    pub(super) needed: u64,
}

impl Duplicate<'_> {
    /// Makes it.
    ///
    /// # Errors
    ///
    /// [`Kind::Exists`] if there is something at its place; [`Kind::NoSpace`]; [`Kind::Stopped`]; what the
    /// operating system says. Nothing of the copy is left then.
    pub(super) fn make(&self, reactor: &Reactor, watch: &impl Watch) -> Result<()> {
        let Self { of, at, like, parent, needed } = *self;
        let unfinished = Unfinished::default();
        let beside = at.beside(format!(".vhdx-ublk-{}.tmp", Uuid::new_v4().simple()).as_ref())?;
        let file = unfinished.create(beside)?;
        watch.unfinished(unfinished.remover());
        if rustix::fs::ioctl_ficlone(&*file, &*of.file).is_err() {
            room::require(file.host_room(), needed, "the copy needs").file(at.path())?;
            reactor.block_on(copy(&of.file, &file, reactor, watch)).file(at.path())?;
        }
        if let Some(parent) = parent {
            naming::amend(&file, naming::locator(of, at.path(), parent, None)?, reactor)?;
        }
        let synced = reactor.block_on(reactor.disk(Arc::clone(&file)).sync());
        synced.doing("syncing the copy").file(at.path())?;
        file.resemble(&like.file, of.file.mode()? | PRIVATE)?;
        unfinished.name(at)
    }
}

/// Copies a file. What the host does not store of it is not written.
///
/// The start comes last, and when all else is durable: without it the file is no image. With it, what a
/// killed copy leaves would be taken for one, and for a child of the images that it names.
async fn copy(
    from: &Arc<ImageFile>,
    to: &Arc<ImageFile>,
    reactor: &Reactor,
    watch: &impl Watch,
) -> Result<()> {
    let (source, target) = (reactor.disk(from.clone()), reactor.disk(to.clone()));
    let length = source.length().await.doing(READING)?.next_multiple_of(PAGE_BYTES as u64);
    target.grow(length).await.doing("extending the copy")?;
    // Some hosts do not know of data that they have not written yet.
    source.sync().await.doing("syncing the image")?;
    let start = MIB.min(length);
    for (range, before) in [(start..length, 0), (0..start, length - start)] {
        copy_range(from, (&source, &target), range, |done| watch.progress(before + done, length), watch)
            .await?;
        target.sync().await.doing("syncing the copy")?;
    }
    Ok(())
}

async fn copy_range(
    from: &ImageFile,
    (source, target): (&UringDisk, &UringDisk),
    range: Range<u64>,
    progress: impl Fn(u64),
    watch: &impl Watch,
) -> Result<()> {
    let page = PAGE_BYTES as u64;
    let (mut at, past) = (range.start, range.end);
    while let Some(data) = from.next_data(at).doing(READING)?.filter(|&data| data < past) {
        if watch.stop_requested() {
            return Err(Error::new(Kind::Stopped, "the copy was stopped"));
        }
        at = data - data % page;
        let stored = from.next_hole(data).doing(READING)?;
        let end = stored.max(data + 1).min(at + WINDOW_BYTES).next_multiple_of(page).min(past);
        assert!(at < end && end <= past, "bytes {at} to {end} of {past}");
        let bytes = source.read(at, index(end - at)).await.doing(READING)?;
        target.write(at, bytes).await.doing("writing the copy")?;
        at = end;
        progress(at - range.start);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;

    use super::*;
    use crate::disk::Access;

    /// Looks at the copy whenever there is progress.
    struct Onlooker<'a> {
        copy: &'a Path,
        seen: Cell<u64>,
    }

    impl Watch for Onlooker<'_> {
        fn progress(&self, done: u64, total: u64) {
            let has_start = fs::read(self.copy).expect("readable").starts_with(b"vhdxfile");
            assert_eq!(has_start, done == total, "after {done} of {total} bytes");
            assert!(done >= self.seen.replace(done), "it goes back");
        }

        fn stop_requested(&self) -> bool {
            false
        }
    }

    #[test]
    fn a_copy_is_no_image_until_it_has_all() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (from, to) = (folder.path().join("from.vhdx"), folder.path().join("to.vhdx"));
        let mut bytes = vec![3; 9 << 20];
        bytes[..8].copy_from_slice(b"vhdxfile");
        fs::write(&from, &bytes).expect("room");
        let (reactor, unfinished) = (Reactor::new().expect("io_uring is there"), Unfinished::default());
        let source = ImageFile::open(&from, Access::ReadOnly, std::time::Duration::ZERO).expect("ours");
        let target = unfinished.create(Place::of(&to).expect("a folder")).expect("free");
        let onlooker = Onlooker { copy: &to, seen: Cell::new(0) };
        let copied = reactor.block_on(copy(&Arc::new(source), &target, &reactor, &onlooker));
        copied.expect("room");
        assert_eq!(onlooker.seen.get(), 9 << 20);
        assert!(fs::read(&to).expect("readable") == bytes);
    }
}
