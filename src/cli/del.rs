//! `del`: takes devices away and closes their images.

use std::ffi::OsString;

use vhdx_ublk::device::registry::{Entry, Registry};
use vhdx_ublk::device::stop::{self, Target};
use vhdx_ublk::error::Result;

use super::{holders, output};

/// Take devices away and close their images.
///
/// Everything that was written to the device is in the image when the command returns.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Del {
    /// The device: its number, /dev/ublkbN, or the path of its image
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    target: Vec<OsString>,
    /// All devices of this program
    #[arg(short, long)]
    all: bool,
    /// Also devices in use: what uses them sees I/O errors
    #[arg(short, long)]
    force: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk del 0
  vhdx-ublk del /dev/ublkb0 disk.vhdx
  vhdx-ublk del --all

Exit status: 0 all of them are gone, 1 some are still there or their image could not be closed
cleanly, 2 wrong usage.";

impl Del {
    /// Runs the command. Every target is tried; the last failure is returned, earlier ones are told at once.
    pub fn run(self) -> Result<()> {
        let registry = holders::registry()?;
        output::last_failure(self.outcomes(registry.as_ref())?)
    }

    /// Takes the devices away, one by one, as the outcomes are asked for.
    fn outcomes<'a>(
        &'a self,
        registry: Option<&'a Registry>,
    ) -> Result<Box<dyn Iterator<Item = Result<()>> + 'a>> {
        let remove = move |registry: &Registry, entry: Entry| stop::stop(registry, &entry, self.force);
        match registry {
            Some(registry) if self.all => {
                let listed = registry.list()?.into_iter();
                Ok(Box::new(listed.map(move |listed| remove(registry, listed.entry))))
            }
            None if self.all => Ok(Box::new(std::iter::empty())),
            registry => Ok(Box::new(self.target.iter().map(move |text| {
                let target = Target::parse(text);
                let registry = registry.ok_or_else(|| holders::nothing_serves(&target))?;
                remove(registry, stop::find(registry, &target)?.entry)
            }))),
        }
    }
}
