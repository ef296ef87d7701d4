//! `set`: changes what an image says of its disk.

use std::path::PathBuf;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::Serialize;
use uuid::Uuid;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::set::{Settings, set};

use super::output;

/// Change the identifier or the physical sector size that a disk shows to its guest.
///
/// Only the metadata of the image changes, as a whole or not at all.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Set {
    /// The VHDX file, which must not be in use
    image: PathBuf,
    /// The identifier of the disk: a UUID, or `new` for a random one
    #[arg(long, value_name = "UUID")]
    disk_id: Option<DiskId>,
    /// The size of a physical sector in bytes, at least that of a logical one
    #[arg(long, value_name = "BYTES", value_parser = ["512", "4096"])]
    physical_sector_size: Option<String>,
    /// Change the image even if it has children, which then no longer recognise it as their parent
    #[arg(short, long)]
    force: bool,
    /// As JSON: one object, errors too
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk set copy.vhdx --disk-id new                   a copy that is used beside its original
  vhdx-ublk set disk.vhdx --physical-sector-size 4096

Prints the identifier of the disk, if it is given. Both values are part of what a guest sees of the
disk, so the DataWriteGuid of the image changes, by which children know their parent: an image with
children is refused without --force. A child has values of its own, which this command changes
without harm to its parent.
Children are found if devices use them, or in the folder of the image; make sure yourself that it
has none elsewhere.
JSON: image, disk_id and physical_sector_size (null if they were not given).
Exit status: 0 the image has the values, 1 failure (it is unchanged), 2 wrong usage.";

/// What can be set.
const SETTABLE: &str = "name what to set: --disk-id UUID, or new; --physical-sector-size 512, or 4096";

/// The text of a UUID, or `new`.
#[derive(Clone, Copy)]
struct DiskId(Uuid);

impl FromStr for DiskId {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "new" {
            return Ok(Self(Uuid::new_v4()));
        }
        Uuid::try_parse(text).map(Self).map_err(|_| format!("{text:?} is neither a UUID nor 'new'"))
    }
}

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The image, as it was named.
    image: WrittenPath,
    /// The identifier of the disk, if it was set.
    disk_id: Option<String>,
    /// The size of a physical sector, if it was set.
    physical_sector_size: Option<u32>,
}

impl Set {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let Self { image, disk_id, physical_sector_size, force, json } = self;
        if disk_id.is_none() && physical_sector_size.is_none() {
            let error = Error::new(Kind::Usage, "nothing is to be changed").file(&image);
            return Err(error.remedy(SETTABLE));
        }
        let disk_id = disk_id.map(|DiskId(id)| id);
        let physical_sector_size = physical_sector_size.map(|size| size.parse().expect("one of two numbers"));
        set(&image, Settings { disk_id, physical_sector_size, force }, &Claims)?;
        let disk_id = disk_id.map(|id| id.to_string());
        if json {
            let image = WrittenPath::of(image);
            return output::print_json(&Answer { image, disk_id, physical_sector_size });
        }
        disk_id.map_or(Ok(()), |id| output::print_line(&id))
    }
}
