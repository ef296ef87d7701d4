//! `features`: what the kernel's driver can do.

use vhdx_ublk::device::features::{self, Feature};
use vhdx_ublk::error::Result;

use super::output;

/// Show what the kernel's ublk driver can do.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Features {
    /// As JSON: an array of objects, errors too
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk features

JSON: bit, name, meaning, since (the first kernel that has it), supported, used (by this
program).
Exit status: 0 success, 1 failure (as when there is no driver), 2 wrong usage.";

impl Features {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let features = features::list()?;
        if self.json {
            return output::print_json(&features);
        }
        let rows: Vec<_> = features.iter().map(row).collect();
        output::print(&output::table(["BIT", "FEATURE", "KERNEL", "SUPPORTED", "USED", "MEANING"], &rows))
    }
}

fn row(feature: &Feature) -> [String; 6] {
    let word = |is: bool| if is { "yes" } else { "-" }.to_owned();
    [
        feature.bit.to_string(),
        feature.name.to_owned(),
        feature.since.to_owned(),
        word(feature.supported),
        word(feature.used),
        feature.meaning.to_owned(),
    ]
}
