//! The options of the commands that open whole chains: where the parents are, and how to answer.

use std::ffi::OsString;
use std::path::PathBuf;

use vhdx_ublk::chain::{PathMap, Search};
use vhdx_ublk::error::{Error, Kind, Result};

/// Options of the commands that open whole chains.
#[derive(clap::Args)]
pub struct ParentOptions {
    /// The parent of a differencing image, if it is not where the image says; repeat for the parent of the
    /// parent, and so on
    #[arg(long, value_name = "FILE", allow_hyphen_values = true)]
    parent: Vec<PathBuf>,
    /// Where a Windows drive, volume or share is on this machine, as in 'C:\=/mnt/c'; can be repeated
    #[arg(long, value_name = "FROM=TO")]
    parent_map: Vec<PathMap>,
}

/// Options of the commands that look at whole chains, and say in one answer what they have found.
#[derive(clap::Args)]
pub struct AnswerOptions {
    #[command(flatten)]
    pub parents: ParentOptions,
    /// As JSON: one object, errors too
    #[arg(long)]
    pub json: bool,
}

impl ParentOptions {
    /// Where to look for parents.
    pub fn search(&self) -> Search {
        Search { parents: self.parent.clone(), maps: self.parent_map.clone(), ..Search::default() }
    }

    /// Refuses these options without `option`, which makes the command open parents.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] if there is one of them.
    pub fn refuse_without(&self, option: &str) -> Result<()> {
        if self.parent.is_empty() && self.parent_map.is_empty() {
            return Ok(());
        }
        Err(Error::new(Kind::Usage, format!("--parent and --parent-map require {option}")))
    }

    /// The same options again.
    pub fn arguments(&self) -> impl Iterator<Item = OsString> {
        let parents = self.parent.iter().flat_map(|path| {
            let mut option = OsString::from("--parent=");
            option.push(path);
            [option]
        });
        parents.chain(self.parent_map.iter().map(|map| format!("--parent-map={map}").into()))
    }
}
