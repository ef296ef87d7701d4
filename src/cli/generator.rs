//! `vhdx-ublk-generator`: what systemd runs, early at boot and at each reload, to have its units made.
//!
//! The boot must not depend on it: it always ends with success, and what is wrong with the table is one line
//! each in the kernel's log, the only one that there is so early. The journal has these lines, too.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use vhdx_ublk::error::Error;
use vhdx_ublk::system::table::{self, Table};
use vhdx_ublk::system::units;

use super::start;

/// The kernel's log, and the priority of an error in it.
const LOG: &str = "/dev/kmsg";
const PRIORITY: &str = "<3>";

/// The most bytes of a line: the kernel refuses longer ones.
const MAX_LINE: usize = 800;

/// Make units for the disks in /etc/vhdxtab; systemd runs it.
#[derive(clap::Args)]
pub struct Generator {
    /// The folder for the units
    folder: PathBuf,
    /// The folder for units that override the administrator's: it gets none
    early: Option<PathBuf>,
    /// The folder for units that all others override: it gets none
    late: Option<PathBuf>,
}

impl Generator {
    /// Runs the command.
    pub fn run(&self) {
        let check = |disk: &table::Disk| start::add_of(disk).map(drop);
        // What cannot be read mounts nothing.
        let fstab = fs::read(units::FSTAB).unwrap_or_default();
        match Table::read(Path::new(table::PATH)) {
            Ok(table) => units::generate(&table, &fstab, &self.folder, check).iter().for_each(log),
            Err(error) => log(&error),
        }
    }
}

fn log(error: &Error) {
    let text = format!("{error:#}");
    let end = (0..=text.len().min(MAX_LINE)).rev().find(|&end| text.is_char_boundary(end));
    let line = format!("{PRIORITY}{}: {}\n", units::GENERATOR, &text[..end.unwrap_or(0)]);
    let written = OpenOptions::new().write(true).open(LOG).and_then(|mut log| log.write_all(line.as_bytes()));
    if written.is_err() {
        tracing::error!("{text}");
    }
}
