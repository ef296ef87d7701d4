//! `relink`: tells a child where its parent is.

use std::path::PathBuf;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::error::Result;
use vhdx_ublk::operations::relink::relink;

/// Have a differencing image name another file as its parent, after either was moved or renamed.
///
/// The file must be the one that the child was made of: its DataWriteGuid decides. Only the child's metadata
/// changes, as a whole or not at all; a child that names the file already is not changed by one byte.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Relink {
    /// The differencing image
    child: PathBuf,
    /// The parent that it is to name
    parent: PathBuf,
    /// Take the parent even if it is another image than the child was made of, or was written since: what the
    /// child does not have itself is then what this parent has, which may damage file systems
    #[arg(long)]
    ignore_mismatch: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk relink child.vhdx moved/base.vhdx
  vhdx-ublk info --chain child.vhdx               the chain as it is now

The child names its parent by the path from its own folder; paths of Windows that led to the old
place are dropped.
Exit status: 0 the child names the parent, 1 failure (the child is as it was), 2 wrong usage.";

impl Relink {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        relink(&self.child, &self.parent, self.ignore_mismatch, &Claims)
    }
}
