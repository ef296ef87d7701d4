//! `compare`: compares the content of two disks.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::chain::Search;
use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::disk::Reactor;
use vhdx_ublk::error::Result;
use vhdx_ublk::operations::compare::{Compared, compare};
use vhdx_ublk::operations::source::Source;

use super::disk_source::{self, FormatName};
use super::output;
use super::parent_options::AnswerOptions;
use super::progress::ProgressOptions;

/// Compare the content of two disks: VHDX with all their parents, VHDs, raw files or block devices.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Compare {
    /// One disk
    one: PathBuf,
    /// The other disk
    other: PathBuf,
    /// Disks of different sizes are different, even if the rest of the larger one is zeros
    #[arg(long)]
    strict: bool,
    /// Format of the first disk [default: what its first and last bytes look like]
    #[arg(long, value_enum, value_name = "FORMAT")]
    from: Option<FormatName>,
    /// Format of the second disk, likewise
    #[arg(long, value_enum, value_name = "FORMAT")]
    other_from: Option<FormatName>,
    #[command(flatten)]
    pub answer: AnswerOptions,
    #[command(flatten)]
    progress: ProgressOptions,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk compare disk.vhdx disk.raw
  vhdx-ublk compare child.vhdx flat.vhd --parent /backup/base.vhdx

--parent and --parent-map are about the first disk.
JSON: same, first_difference (a byte, or null), sizes (bytes of both disks), read_bytes.
Exit status: 0 the same content, 1 different content (the first difference is shown), 2 failure.";

/// The exit status of a comparison that has found a difference.
const DIFFERENT: u8 = 1;

/// The exit status of a comparison that could not be made.
pub const FAILURE: u8 = 2;

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Json {
    same: bool,
    first_difference: Option<u64>,
    sizes: [u64; 2],
    read_bytes: u64,
}

impl Compare {
    /// Runs the command; returns the exit status.
    pub fn run(self) -> Result<u8> {
        let Self { one, other, strict, from, other_from, answer, progress } = self;
        let AnswerOptions { parents, json } = answer;
        let reactor = Reactor::new()?;
        let open =
            |path, from, search| Source::open(&disk_source::request(path, from, search)?, &reactor, &Claims);
        let one = open(one, from, parents.search())?;
        let other = open(other, other_from, Search::default())?;
        let shown = progress.start()?;
        let Compared { difference, sizes, read } = compare(&one, &other, &shown)?;
        drop(shown);
        let [shorter, longer] = [sizes[0].min(sizes[1]), sizes[0].max(sizes[1])];
        let first_difference = difference.or((strict && shorter != longer).then_some(shorter));
        let same = first_difference.is_none();
        let larger = if sizes[0] > sizes[1] { one.path() } else { other.path() }.display();
        if json {
            output::print_json(&Json { same, first_difference, sizes, read_bytes: read })?;
        } else {
            output::print_line(&match first_difference {
                None if shorter == longer => "the disks have the same content".to_owned(),
                None => format!(
                    "the disks have the same content; {larger} is {} bytes larger, all of them zeros",
                    longer - shorter
                ),
                Some(at) if at >= shorter => {
                    format!("the disks differ: {larger} is larger, and has more from byte {at} on")
                }
                Some(at) => format!("the disks differ: the first difference is at byte {at}"),
            })?;
        }
        Ok(if same { super::SUCCESS } else { DIFFERENT })
    }
}
