//! `doctor`: whether a machine and an image are fit for use.

use std::path::PathBuf;

use vhdx_ublk::error::Result;
use vhdx_ublk::system::doctor::{self, Finding};

use super::{FAILURE, SUCCESS, output};

/// Examine this machine, or an image and its host, and say what to do about what is not fine.
///
/// Nothing is changed. In a folder that only the caller may write to, a file without a name is made for a
/// moment, to try whether the host punches holes and how long a sync takes.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Doctor {
    /// The image [default: only the machine is examined]
    image: Option<PathBuf>,
    /// As JSON: an array of objects, errors too
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk doctor
  vhdx-ublk doctor disk.vhdx

The machine: its kernel (versions known to be bad), the ublk driver and its limit, permissions,
io_uring, room in /run, locked memory, the udev rule; daemons of an older program, sessions
without a daemon.
An image: its structure, its lock, its chain, the file system of its host, direct I/O, whether
space can be given back, how long a sync takes, space left, whether Windows would refuse it for
its holes, change tracking of Hyper-V.

JSON: check, fine, found, remedy (null if it is fine).
Exit status: 0 everything is fine, 1 something is not, 2 wrong usage.";

impl Doctor {
    /// Runs the command; returns the exit status.
    pub fn run(&self) -> Result<u8> {
        let checks = match &self.image {
            None => doctor::machine(),
            Some(image) => doctor::image(image),
        };
        if self.json {
            output::print_json(&checks)?;
        } else {
            let mut fields = output::Fields::default();
            for finding in &checks {
                fields.add(finding.check, text(finding));
            }
            output::print(&fields.to_string())?;
        }
        Ok(if checks.iter().all(|finding| finding.fine) { SUCCESS } else { FAILURE })
    }
}

fn text(finding: &Finding) -> String {
    match &finding.remedy {
        None => format!("fine ({})", finding.found),
        Some(remedy) => format!("NOT FINE: {}; try: {remedy}", finding.found),
    }
}
