//! `snapshot list`: the chain of an image, and what branches off from it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims::{self, Claims};
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::disk::{HostFile, folder_of};
use vhdx_ublk::error::Result;
use vhdx_ublk::operations::tree::{TreeLayer, tree};
use vhdx_ublk::printable::human_size;

use super::output;
use super::parent_options::AnswerOptions;
use super::snapshot_target::{image_of, of_that_name};

/// List the chain of a device or an image, and the images that branch off from it.
///
/// The lowest image comes first, and each above its parent.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct List {
    /// The device: its number, its name, or /dev/ublkbN; or the path of an image
    target: OsString,
    #[command(flatten)]
    answer: AnswerOptions,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk snapshot list /dev/ublkb0
  vhdx-ublk snapshot list disk.vhdx --json

Children are found beside their parents, among the first 256 images of a folder, and where devices
use them. Only root sees which images devices use. For a snapshot of a device with the name
`list`, write /dev/vhdx/list.
JSON: layers, a list; of each image, parent (null or a path), in_chain (whether it is the target or
below it), served (the device, or null), virtual_size, host_bytes, modified (seconds since 1970);
broken (null, or why the chain ends early).
Exit status: 0 success, 1 failure (also of a chain that ends early, which is listed), 2 wrong
usage.";

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The lowest first, and each above its parent.
    layers: Vec<Layer>,
    /// Why the chain ends early, if it does.
    broken: Option<String>,
}

/// An image.
#[derive(Serialize, JsonSchema)]
struct Layer {
    /// Its absolute path.
    image: WrittenPath,
    /// Its parent.
    parent: Option<WrittenPath>,
    /// It is the one that was asked for, or below it.
    in_chain: bool,
    /// The device that serves it.
    served: Option<PathBuf>,
    /// The size of its disk, bytes.
    virtual_size: u64,
    /// The space that it takes on its host, bytes.
    host_bytes: u64,
    /// When its file was last written, seconds since 1970.
    modified: u64,
}

impl List {
    /// Runs the command.
    pub fn run(&self) -> Result<()> {
        let path = image_of(&self.target).map_err(|error| of_that_name("list", error))?;
        let found = tree(&path, &self.answer.parents.search(), &Claims)?;
        let served = served();
        if self.answer.json {
            let layer = |layer: &TreeLayer| Layer {
                image: WrittenPath::of(&layer.path),
                parent: layer.parent.map(|place| WrittenPath::of(&found.layers[place].path)),
                in_chain: layer.in_chain,
                served: served.get(&key(layer.file)).cloned(),
                virtual_size: layer.virtual_size,
                host_bytes: layer.host_bytes,
                modified: layer.modified.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            };
            let layers = found.layers.iter().map(layer).collect();
            let broken = found.broken.as_ref().map(|error| format!("{error:#}"));
            return output::print_json(&Answer { layers, broken });
        }
        let rows: Vec<_> = (0..found.layers.len()).map(|place| row(&found.layers, place, &served)).collect();
        output::print(&output::table(["IMAGE", "ON HOST", "LAST WRITTEN", "SERVED AS"], &rows))?;
        found.broken.map_or(Ok(()), Err)
    }
}

/// The devices by the images that they serve; none for a user who may not see them.
fn served() -> BTreeMap<(u64, u64), PathBuf> {
    let devices = claims::devices().unwrap_or_default().into_iter();
    devices.map(|listed| (key(listed.entry.image_file), listed.entry.device)).collect()
}

fn key(file: HostFile) -> (u64, u64) {
    (file.device, file.inode)
}

fn row(layers: &[TreeLayer], place: usize, served: &BTreeMap<(u64, u64), PathBuf>) -> [String; 4] {
    let layer = &layers[place];
    let now = SystemTime::now();
    let device = served.get(&key(layer.file)).map(|device| device.display().to_string());
    let beside = layer.parent.is_some_and(|parent| folder_of(&layers[parent].path) == folder_of(&layer.path));
    let name = if beside { layer.path.file_name().map(Path::new) } else { None };
    let image = format!("{}{}", lines(layers, place), name.unwrap_or(&layer.path).display());
    let age = now.duration_since(layer.modified).map_or(0, |age| age.as_secs());
    [image, human_size(layer.host_bytes), human_age(age), device.unwrap_or_default()]
}

/// What leads from the parents of a layer to it.
fn lines(layers: &[TreeLayer], place: usize) -> String {
    let Some(parent) = layers[place].parent else { return String::new() };
    let has_more = |of: usize, behind: usize| layers[behind + 1..].iter().any(|one| one.parent == Some(of));
    let mut text = String::from(if has_more(parent, place) { "├─ " } else { "└─ " });
    let mut at = parent;
    while let Some(parent) = layers[at].parent {
        text.insert_str(0, if has_more(parent, at) { "│  " } else { "   " });
        at = parent;
    }
    text
}

/// How long ago, for people.
fn human_age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_image_hangs_on_its_parent() {
        let layer = |parent| TreeLayer {
            path: "/a".into(),
            file: HostFile { device: 1, inode: 2 },
            parent,
            in_chain: true,
            virtual_size: 0,
            host_bytes: 0,
            modified: UNIX_EPOCH,
        };
        let layers = [None, Some(0), Some(1), Some(1), Some(0)].map(layer);
        let drawn: Vec<String> = (0..5).map(|place| lines(&layers, place)).collect();
        assert_eq!(drawn, ["", "├─ ", "│  ├─ ", "│  └─ ", "└─ "]);
    }

    #[test]
    fn an_age_is_told_in_one_unit() {
        let ages = [0, 119, 120, 7199, 7200, 172_799, 172_800].map(human_age);
        assert_eq!(ages[..4], ["0 s ago", "119 s ago", "2 min ago", "119 min ago"]);
        assert_eq!(ages[4..], ["2 h ago", "47 h ago", "2 days ago"]);
    }
}
