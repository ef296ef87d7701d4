//! A file that is being made, and goes unless it gets finished.
//!
//! Until then only its owner may open it. It is removed, kept and renamed only while its name still is this
//! file.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{ImageFile, Place};
use crate::error::Result;

type Made = Option<(Place, Arc<ImageFile>)>;

/// Removes its file when it is dropped, unless that was finished before.
#[derive(Debug, Default)]
pub struct Unfinished(Arc<Mutex<Made>>);

/// Removes an unfinished file from elsewhere.
#[derive(Debug)]
pub struct Remover(Arc<Mutex<Made>>);

impl Unfinished {
    /// Makes the file, empty, and locks it for writing.
    ///
    /// # Errors
    ///
    /// Those of [`Place::create`].
    pub fn create(&self, place: Place) -> Result<Arc<ImageFile>> {
        let mut made = lock(&self.0);
        let file = Arc::new(place.create()?);
        *made = Some((place, file.clone()));
        Ok(file)
    }

    /// What removes the file if the program must end.
    pub fn remover(&self) -> Remover {
        Remover(self.0.clone())
    }

    /// Makes it durable that the file is there, if it still has its name.
    ///
    /// # Errors
    ///
    /// Those of [`Place::require`] and [`Place::sync`].
    pub fn persist(&self) -> Result<()> {
        let made = lock(&self.0);
        let Some((place, file)) = &*made else { return Ok(()) };
        place.require(file)?;
        place.sync()
    }

    /// The file stays, and takes the name of `old`, which is at `place`.
    ///
    /// # Errors
    ///
    /// If either has lost its name, or cannot be renamed: the file is removed then, and `old` stays; if the
    /// folder cannot be synced.
    pub fn replace(self, place: &Place, old: &ImageFile) -> Result<()> {
        let mut made = lock(&self.0);
        if let Some((beside, file)) = &*made {
            beside.rename(file, place, old)?;
        }
        *made = None;
        place.sync()
    }

    /// The file stays, and takes the name at `place`, durably.
    ///
    /// # Errors
    ///
    /// [`Kind::Exists`](crate::error::Kind::Exists) if there is something by now: the file is removed then.
    /// If the file has lost its name, or the folder cannot be synced.
    pub fn name(self, place: &Place) -> Result<()> {
        let mut made = lock(&self.0);
        if let Some((beside, file)) = &*made {
            beside.rename_to_free(file, place)?;
        }
        *made = None;
        place.sync()
    }

    /// The file stays.
    pub fn keep(self) {
        *lock(&self.0) = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        remove(lock(&self.0).take());
    }
}

impl Remover {
    /// Removes the file, then calls `end`; no file is finished meanwhile.
    pub fn remove_and(self, end: impl FnOnce()) {
        let mut made = lock(&self.0);
        remove(made.take());
        end();
    }
}

fn lock(made: &Mutex<Made>) -> MutexGuard<'_, Made> {
    made.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove(made: Made) {
    let Some((place, file)) = made else { return };
    if let Err(error) = place.remove(&file) {
        tracing::warn!("the unfinished image is not removed: {error:#}");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_not_finished_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.vhdx");
        let place = || Place::of(&path).expect("a folder");
        let unfinished = Unfinished::default();
        unfinished.create(place()).expect("free");
        drop(unfinished);
        assert!(!path.exists());
        let unfinished = Unfinished::default();
        unfinished.create(place()).expect("free");
        unfinished.persist().expect("it has its name");
        unfinished.keep();
        assert!(path.exists());
        let second = Unfinished::default();
        second.create(place()).expect_err("taken");
        drop(second);
        assert!(path.exists(), "not ours to remove");
    }

    /// It takes a name that is free, and no other.
    #[test]
    fn a_finished_file_takes_a_free_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| Place::of(&folder.path().join(name)).expect("a folder");
        for (number, free) in [(0, true), (1, false)] {
            let unfinished = Unfinished::default();
            let made = unfinished.create(at(&format!("{number}.tmp"))).expect("free");
            let named = unfinished.name(&at("a"));
            assert_eq!(
                named.map_err(|error| error.kind()),
                if free { Ok(()) } else { Err(crate::error::Kind::Exists) }
            );
            let named = crate::disk::HostFile::at(&folder.path().join("a")).expect("there");
            assert_eq!(named == made.identity(), free);
        }
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 1, "the other one is removed");
    }

    #[test]
    fn a_file_that_has_lost_its_name_is_neither_persisted_nor_removed() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.vhdx");
        let unfinished = Unfinished::default();
        unfinished.create(Place::of(&path).expect("a folder")).expect("free");
        fs::rename(&path, folder.path().join("moved")).expect("ours");
        fs::write(&path, "another's").expect("room");
        unfinished.persist().expect_err("another file has its name");
        drop(unfinished);
        assert_eq!(fs::read_to_string(&path).expect("it stays"), "another's");
    }
}
