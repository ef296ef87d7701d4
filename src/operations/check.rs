//! Checking and repairing an image, and checking the chain it is in.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::{Devices, inspect, locked, replaced};
use crate::chain::{self, Known, Search};
use crate::disk::{Access, ImageFile, PlainDisk, Reactor, ReadDisk, is_sparse_for_windows};
use crate::error::{Error, Kind, Locate, Result};
use crate::image::{self, Identity, Repair, Report, Severity};
use crate::printable::shell;

/// What was found in an image and in its parents.
pub struct Checked {
    /// The image's file, as an absolute path without symbolic links.
    pub path: PathBuf,
    /// Windows will refuse the file for its holes.
    pub is_sparse_for_windows: bool,
    /// What was found in the image; after a repair, as it is then.
    pub report: Report,
    /// What was found before the repair, if there was one.
    pub before: Option<Report>,
    /// What was found in its parents.
    pub chain: CheckedChain,
}

/// What was found in the parents of an image.
#[derive(Default)]
pub struct CheckedChain {
    /// The files and what was found in them: parents, nearest first, up to the first broken link.
    pub parents: Vec<(PathBuf, Report)>,
    /// What is wrong with that link.
    pub fault: Option<Error>,
}

impl CheckedChain {
    /// Whether the image reads from its parents what it should, as far as their structure shows.
    pub fn is_sound(&self) -> bool {
        self.fault.is_none() && !self.has(Severity::Corruption)
    }

    /// Whether the worst finding in one of the parents is of this severity.
    pub fn has(&self, severity: Severity) -> bool {
        self.parents.iter().any(|(_, report)| report.verdict() == Some(severity))
    }
}

/// Checks the image at `path`, and its parents, where `search` leads. Nothing is written.
///
/// # Errors
///
/// Those of locking and reading the image; [`Kind::Usage`] if more parents are given than there are. All else
/// that is wrong with the image or a parent is a finding.
pub fn check(path: &Path, search: &Search, devices: &dyn Devices) -> Result<Checked> {
    let (disk, lock) = inspect::lock_for_reading(path).map_err(|error| devices.with_holder(error, path))?;
    let report = smol::future::block_on(image::check(&disk)).file(path)?;
    let leaf = smol::future::block_on(identify(&disk, lock.path()))?;
    let chain = check_parents(leaf.as_ref(), search, devices)?;
    let is_sparse_for_windows = is_sparse_for_windows(disk.file()).unwrap_or(false);
    Ok(Checked { path: lock.path().to_owned(), is_sparse_for_windows, report, before: None, chain })
}

/// Repairs the image at `path`, then checks it and its parents, which are never changed.
///
/// # Errors
///
/// As [`check`]; [`Kind::InUse`] if a killed daemon left a session of it.
pub fn repair(path: &Path, search: &Search, devices: &dyn Devices) -> Result<Checked> {
    let file = Arc::new(locked::lock(path, Access::ReadWrite, devices)?);
    replaced::refuse_foreign_links(path, &*file)?;
    let reactor = Reactor::new()?;
    let disk = reactor.disk(Arc::clone(&file));
    devices.refuse_orphan(&file, None).map_err(|error| match reactor.block_on(image::check(&disk)) {
        Ok(found) if found.complete && found.beyond_repair == 0 => error,
        _ => no_takeover(&file),
    })?;
    let Repair { before, after } = reactor.block_on(image::repair(&disk, Uuid::new_v4)).file(path)?;
    let leaf = reactor.block_on(identify(&disk, file.path()))?;
    let chain = check_parents(leaf.as_ref(), search, devices)?;
    let is_sparse_for_windows = is_sparse_for_windows(PlainDisk::of(&file)?.file()).unwrap_or(false);
    let path = file.path().to_owned();
    Ok(Checked { path, is_sparse_for_windows, report: after, before: Some(before), chain })
}

/// A killed daemon left a session, and `add`, which would take it over, refuses the image.
fn no_takeover(file: &ImageFile) -> Error {
    let path = shell(file.path());
    let message = "a killed daemon left acknowledged writes in its session, and the image is too damaged \
                   to take them";
    let remedy = format!(
        "`vhdx-ublk check {path}` shows the damage, `vhdx-ublk salvage {path} COPY` copies what is left; \
         keep the session, which has the writes that the image lacks"
    );
    Error::new(Kind::InUse, message).file(file.path()).remedy(remedy)
}

/// The image as its parents' child, unless it is beyond reading: its own report says so then.
async fn identify<D: ReadDisk>(disk: &D, path: &Path) -> Result<Option<Known>> {
    match Identity::read(disk, u64::MAX).await {
        Ok(identity) => Ok(Some(Known { identity, path: path.to_owned(), lock: () })),
        Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Truncated) => Ok(None),
        Err(error) => Err(error.file(path)),
    }
}

/// Identifies the parent at `path`, whatever its blocks are like, and locks it for reading.
fn lock_parent(path: &Path) -> Result<Known<(PlainDisk, ImageFile)>> {
    let (disk, lock) = inspect::lock_for_reading(path)?;
    let identity = smol::future::block_on(Identity::read(&disk, u64::MAX)).file(path)?;
    Ok(Known { identity, path: lock.path().to_owned(), lock: (disk, lock) })
}

/// Checks the parents of `leaf`, if it could be read at all. They are locked meanwhile.
fn check_parents(leaf: Option<&Known>, search: &Search, devices: &dyn Devices) -> Result<CheckedChain> {
    let Some(leaf) = leaf else { return Ok(CheckedChain::default()) };
    let mut found = Vec::new();
    let open = |path: &Path| lock_parent(path).map_err(|error| devices.with_holder(error, path));
    let fault = match chain::follow_parents(leaf, search, &mut found, open) {
        Err(error) if error.kind() == Kind::Usage => return Err(error),
        outcome => outcome.err(),
    };
    let mut chain = CheckedChain { parents: Vec::new(), fault };
    for Known { path, lock: (disk, _), .. } in &found {
        match smol::future::block_on(image::check(disk)) {
            Ok(report) => chain.parents.push((path.clone(), report)),
            Err(error) => {
                // Parents beyond it may not belong to this chain.
                chain.fault = Some(error.file(path));
                break;
            }
        }
    }
    Ok(chain)
}
