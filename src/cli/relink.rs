//! `relink`: makes a child name the present place of its parent.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::error::Result;
use vhdx_ublk::operations::relink::relink;

use super::output;

/// Make a differencing image name another file as its parent, after either was moved or renamed.
///
/// The file must be the image that the child was created from, with the same DataWriteGuid. Only the metadata
/// of the child changes, as a whole or not at all; a child that already names the file is not changed.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Relink {
    /// The differencing image
    child: PathBuf,
    /// The new path of its parent
    parent: PathBuf,
    /// Accept a parent that is another image, or was written since the child was created. The disk is then a
    /// mix of two: file systems on it may be damaged
    #[arg(long)]
    ignore_mismatch: bool,
    /// As JSON: one object, errors too
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk relink child.vhdx moved/base.vhdx
  vhdx-ublk info --chain child.vhdx               show the chain

The child names its parent by a path relative to its own folder; Windows paths to the old place
are removed.
JSON: child, parent.
Exit status: 0 the child names the parent, 1 failure (the child is unchanged), 2 wrong usage.";

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The differencing image, as it was named.
    child: WrittenPath,
    /// The parent that it names now, as that was named.
    parent: WrittenPath,
}

impl Relink {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        relink(&self.child, &self.parent, self.ignore_mismatch, &Claims)?;
        if !self.json {
            return Ok(());
        }
        let (child, parent) = (WrittenPath::of(self.child), WrittenPath::of(self.parent));
        output::print_json(&Answer { child, parent })
    }
}
