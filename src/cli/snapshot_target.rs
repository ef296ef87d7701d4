//! What the commands of snapshots have in common: the image that is meant, the new image, the table of disks.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use vhdx_ublk::device::claims;
use vhdx_ublk::device::stop::Target;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::place_of_new;
use vhdx_ublk::system::table::{self, Table};

use super::served;

/// The image of the device that `text` names, or the image that it names itself.
pub fn image_of(text: &OsStr) -> Result<PathBuf> {
    let target = Target::parse(text)?;
    let image = || target.image().filter(|path| path.exists()).map(Path::to_owned);
    match claims::find(&target) {
        Ok(listed) => Ok(listed.entry.image),
        Err(error) => image().ok_or_else(|| served::missing(Path::new(text), error)),
    }
}

/// For an `error` about a word behind `snapshot WORD`: a device may have that word for its name.
pub fn of_that_name(word: &str, error: Error) -> Error {
    let has_name = |name: &str| claims::find(&Target::parse(name.as_ref())?).map(drop);
    if error.kind() != Kind::NotFound || has_name(&format!("/dev/vhdx/{word}")).is_err() {
        return error;
    }
    let remedy = format!("for a snapshot of the device {word}: vhdx-ublk snapshot /dev/vhdx/{word} NEW.vhdx");
    Error::new(Kind::NotFound, error.message()).remedy(remedy)
}

/// A line of the table that names the `former` image serves an old state of the disk from the next boot on.
pub fn warn_of_table(former: &Path, image: &Path, is_now: &str) {
    let numbers = Table::read(table::PATH.as_ref()).map(|table| table.lines_with(former));
    for number in numbers.unwrap_or_default() {
        tracing::warn!(
            "{}: line {number} names {}, which is {is_now} now: change it to {}, or the next boot serves the \
             disk as it was",
            table::PATH,
            former.display(),
            image.display()
        );
    }
}

/// The absolute path of a file that does not exist yet.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    Ok(place_of_new(path)?.path().to_owned())
}
