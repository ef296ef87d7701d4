//! `relink`: tells a child where its parent is.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use vhdx_ublk::chain::{self, Layer, Search};
use vhdx_ublk::disk::{Access, Reactor};
use vhdx_ublk::error::{Error, Kind, Locate, Result};
use vhdx_ublk::format::metadata::Metadata;
use vhdx_ublk::image::Image;

use super::look;
use super::rest::AtRest;

/// Have a differencing image name another file as its parent, after either was moved or renamed.
///
/// The file has to be what the child was made of, which its DataWriteGuid tells. Only the child's metadata changes,
/// as a whole or not at all; a child that names the file already is not changed by one byte.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Relink {
    /// The differencing image
    child: PathBuf,
    /// What it shall name as its parent
    parent: PathBuf,
    /// Take the parent even if it is another image than the child was made of, or was written since: what the
    /// child does not have itself is then what this parent has, and file systems may be damaged by that
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
        let reactor = Reactor::new()?;
        let child = AtRest::open(&reactor, &self.child, Access::ReadWrite)?;
        refuse_itself(&child, &self.parent)?;
        let parent = AtRest::open(&reactor, &self.parent, Access::ReadOnly)?;
        child.image.check_writable().file(child.path())?;
        let locator = chain::relinked(&child, &parent, self.ignore_mismatch)?;
        refuse_cycle(&child, &parent)?;
        if child.image.metadata.parent_locator.as_ref() == Some(&locator) {
            return Ok(());
        }
        let disk = reactor.disk(child.file.clone());
        let change = async {
            let image = Image::open_for_writing(&disk, Uuid::new_v4).await?;
            let metadata = Metadata { parent_locator: Some(locator), ..image.metadata.clone() };
            image.amend(&disk, &metadata, Uuid::new_v4).await
        };
        reactor.block_on(change).map(drop).file(child.path())
    }
}

/// The child's lock would keep the program itself out.
fn refuse_itself(child: &AtRest, parent: &Path) -> Result<()> {
    if chain::same_file(child.path(), parent) {
        return Err(no_ancestor_of_itself(child));
    }
    Ok(())
}

/// Refuses a parent whose own chain leads to the child. A chain that ends early may be what is being mended.
fn refuse_cycle(child: &AtRest, parent: &AtRest) -> Result<()> {
    let mut returns = false;
    let open = |path: &Path| {
        returns |= chain::same_file(child.path(), path);
        look::look(path)
    };
    let opened = chain::open_parents(parent, &Search::default(), open).map(drop);
    if returns {
        return Err(no_ancestor_of_itself(child));
    }
    if let Err(error) = opened {
        tracing::warn!("the parent's own chain does not open: {error:#}");
    }
    Ok(())
}

fn no_ancestor_of_itself(child: &AtRest) -> Error {
    let message = "it would be its own ancestor: the chain would never end";
    Error::new(Kind::Usage, message).file(child.path()).remedy("name the image that the child was made of")
}
