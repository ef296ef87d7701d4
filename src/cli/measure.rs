//! `measure`: computes what a conversion would take.

use std::path::PathBuf;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::disk::Reactor;
use vhdx_ublk::error::Result;
use vhdx_ublk::operations::convert;
use vhdx_ublk::operations::source::{Source, TO_QCOW2};
use vhdx_ublk::printable::both_sizes;

use super::disk_source::{self, FormatName};
use super::output::{self, Fields};
use super::parent_options::AnswerOptions;
use super::target_shape::ShapeOptions;

/// Compute how many bytes a disk takes in another format.
///
/// Data is not read: data that is all zeros takes less than is said.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Measure {
    /// The disk: a VHDX, a VHD, a raw file or a block device
    source: PathBuf,
    /// Format of the target
    #[arg(long, value_enum, value_name = "FORMAT", required_unless_present = "azure")]
    to: Option<FormatName>,
    /// Format of the source [default: what its first and last bytes look like]
    #[arg(long, value_enum, value_name = "FORMAT")]
    from: Option<FormatName>,
    #[command(flatten)]
    shape: ShapeOptions,
    #[command(flatten)]
    pub answer: AnswerOptions,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk measure disk.raw --to vhdx
  vhdx-ublk measure disk.vhdx --to vhd --type fixed --json

JSON: required (bytes of the file with the content that the disk has now) and fully-allocated (bytes
if every block has data), as `qemu-img measure` names them.
Exit status: 0 success, 1 failure, 2 wrong usage.";

impl Measure {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let Self { source, to, from, shape, answer: AnswerOptions { parents, json } } = self;
        let shape = shape.shape(to.unwrap_or(FormatName::Vhd).format(TO_QCOW2)?)?;
        let request = disk_source::request(source, from, parents.search())?;
        let source = Source::open(&request, &Reactor::new()?, &Claims)?;
        let measured = convert::measure(&source, &shape)?;
        if json {
            return output::print_json(&measured);
        }
        let mut fields = Fields::default();
        fields.add("required", both_sizes(measured.required));
        fields.add("fully allocated", both_sizes(measured.fully_allocated));
        output::print(&fields.to_string())
    }
}
