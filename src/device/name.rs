//! The name that a user gives a device.
//!
//! A name is a file name below `/dev/vhdx`, a word on a command line and a part of a unit's name. So its
//! bytes need no quoting anywhere, and no name can be taken for another kind of target.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind};

/// The folder of the links that bear the names.
pub const FOLDER: &str = "/dev/vhdx";

/// The longest name: with a suffix for the partition, it stays far below the limit of a file name.
const MAX_LENGTH: usize = 64;

/// What separates the name from a partition's number in the name of a link.
const PARTITION: &str = "-part";

/// A name that is valid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The link to the device: `/dev/vhdx/NAME`.
    pub fn link(&self) -> PathBuf {
        Path::new(FOLDER).join(&self.0)
    }

    /// The link to a partition of the device: `/dev/vhdx/NAME-partN`.
    pub fn link_to_partition(&self, number: &str) -> PathBuf {
        Path::new(FOLDER).join(format!("{}{PARTITION}{number}", self.0))
    }

    /// The name in the path of a link to a device or to a partition of it: `/dev/vhdx/NAME[-partN]`.
    pub fn of_link(path: &Path) -> Option<Self> {
        Self::of_link_name(path.strip_prefix(FOLDER).ok()?.to_str()?)
    }

    /// The name in the file name of such a link.
    pub fn of_link_name(file: &str) -> Option<Self> {
        let disk = partition_of(file).map_or(file, |(disk, _)| disk);
        disk.parse().ok()
    }
}

/// The N of `ublkbN` and of `ublkbNpM`.
pub fn id_of_node_name(name: &str) -> Option<u32> {
    let rest = name.strip_prefix("ublkb")?;
    let (id, partition) = rest.split_once('p').map_or((rest, None), |(id, part)| (id, Some(part)));
    (is_number(id) && partition.is_none_or(is_number)).then(|| id.parse().ok())?
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The parts of `NAME-partN`.
fn partition_of(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once(PARTITION).filter(|(_, number)| is_number(number))
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let reason = if text.is_empty() || text.len() > MAX_LENGTH {
            format!("a name has 1 to {MAX_LENGTH} characters")
        } else if !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
            "a name has letters, digits, `.`, `_` and `-` only".into()
        } else if !text.as_bytes()[0].is_ascii_alphanumeric() {
            "a name starts with a letter or a digit".into()
        } else if is_number(text) || id_of_node_name(text).is_some() {
            "it would be taken for the number of a device".into()
        } else if partition_of(text).is_some() {
            format!("`{PARTITION}N` at the end stands for a partition")
        } else {
            return Ok(Self(text.into()));
        };
        Err(Error::new(Kind::Usage, format!("`{text}` cannot be the name of a device: {reason}")))
    }
}

impl TryFrom<String> for Name {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_needs_no_quoting_and_names_nothing_else() {
        let longest = "a".repeat(MAX_LENGTH);
        for good in ["data", "0ab", "a.b_c-d", "wsl-part", "part1", "ublk", &longest] {
            assert_eq!(good.parse::<Name>().expect("valid").as_str(), good);
        }
        let long = "a".repeat(MAX_LENGTH + 1);
        for bad in
            ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "ä", "7", "ublkb3", "ublkb3p1", "a-part1", &long]
        {
            assert_eq!(bad.parse::<Name>().expect_err(bad).kind(), Kind::Usage);
        }
        assert!(serde_json::from_str::<Name>("\"../a\"").is_err(), "wherever it comes from");
    }

    #[test]
    fn a_link_leads_to_the_name_of_its_device() {
        let name = |path: &str| Name::of_link(Path::new(path)).map(String::from);
        assert_eq!(name("/dev/vhdx/data").as_deref(), Some("data"));
        assert_eq!(name("/dev/vhdx/data-part12").as_deref(), Some("data"));
        assert_eq!(name("/dev/vhdx/data-part").as_deref(), Some("data-part"));
        for other in ["/dev/data", "/dev/vhdx", "/dev/vhdx/a/b", "/dev/vhdx/-part1"] {
            assert_eq!(name(other), None, "{other}");
        }
    }
}
