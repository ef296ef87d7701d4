//! `move`: moves a chain to another folder.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::disk::Remover;
use vhdx_ublk::error::Result;
use vhdx_ublk::operations::Watch;
use vhdx_ublk::operations::move_chain::{Moving, Request, Step, move_chain};

use super::output;
use super::progress::{ProgressOptions, Shown};

/// Move an image with all its parents to another folder.
///
/// Files are renamed where the file system allows it, and copied elsewhere; then each child names its parent
/// at its new place, and the old files are removed. After a power cut the chain opens at one of the places;
/// run the command again to finish the move.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Move {
    /// The image whose chain moves
    image: PathBuf,
    /// The folder that it moves to
    folder: PathBuf,
    /// A parent in another folder than the image, which moves, too; repeat for others
    #[arg(long = "parent", value_name = "FILE", allow_hyphen_values = true)]
    parents: Vec<PathBuf>,
    #[command(flatten)]
    progress: ProgressOptions,
    /// As JSON: one object, errors too
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk move vm/disk.avhdx /srv/disks         with all its parents
  vhdx-ublk move vm/disk.avhdx /srv/disks --parent base/win.vhdx
  vhdx-ublk info --chain vm/disk.avhdx            show what would move

Prints the new path of the image. Parents in other folders must be named (--parent). The move is
refused if a name is taken in the folder, if an image is in use, or if another image in the folders
of the chain has one of its images as its parent.
All parents must be where their children name them: relink those that are not.
JSON: image (its new path).
Exit status: 0 moved, 1 failure (the chain opens at its old or at its new place), 2 wrong usage.";

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The new path of the image.
    image: WrittenPath,
}

impl Move {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let Self { image, folder, parents, progress, json } = self;
        let request = Request { leaf: image, folder, parents };
        let leaf = move_chain(&request, &Claims, &Shows(progress.start()?))?;
        if json {
            return output::print_json(&Answer { image: WrittenPath::of(leaf) });
        }
        output::print_line(&leaf.display().to_string())
    }
}

/// What the user sees of the move.
struct Shows(Shown);

impl Watch for Shows {
    fn progress(&self, done: u64, total: u64) {
        self.0.progress(done, total);
    }

    fn stop_requested(&self) -> bool {
        self.0.stop_requested()
    }

    fn unfinished(&self, remover: Remover) {
        self.0.unfinished(remover);
    }
}

impl Moving for Shows {
    fn done(&self, step: Step<'_>) -> Result<()> {
        let (what, path) = match step {
            Step::Arrived(path) => ("arrived", path),
            Step::Removed(path) => ("removed", path),
            Step::Relinked(path) => ("names its parent here", path),
        };
        self.0.suspend(|| tracing::debug!("{}: {what}", path.display()));
        Ok(())
    }
}
