//! `umount`: unmounts the file system of an image, and removes its device.

use std::path::PathBuf;

use vhdx_ublk::error::Result;
use vhdx_ublk::system::mount::{self, UnmountRequest};

use super::output;

/// Unmount file systems that `mount` mounted, and close their images.
///
/// The device is removed with the last mount of it, if `vhdx-ublk mount` made it: everything is in the image
/// then. A device that `vhdx-ublk add` made stays.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Umount {
    /// Where it is mounted
    #[arg(required = true)]
    folder: Vec<PathBuf>,
    /// Detach it now; it is unmounted and its device removed when it is no longer in use
    #[arg(short, long)]
    lazy: bool,
    /// As JSON: an array of objects, errors too
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk umount /mnt
  umount /mnt             the same, where umount.vhdx is installed

JSON: target (the folder), error (null, or why it is still mounted or its image not closed).
Exit status: 0 all are unmounted and their images are closed, 1 failure, 2 wrong usage.";

impl Umount {
    /// Runs the command; returns the exit status. Every folder is tried; the last failure is returned,
    /// earlier ones are reported at once.
    pub fn run(self) -> Result<u8> {
        let lazy = self.lazy;
        let unmount = |folder: PathBuf| {
            let target = folder.clone().into();
            (target, mount::unmount(&UnmountRequest { folder, lazy, flags: Vec::new() }))
        };
        output::finish(self.folder.into_iter().map(unmount).collect(), self.json)
    }
}
