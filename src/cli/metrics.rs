//! `metrics`: what devices have done, for monitoring.

use std::path::PathBuf;

use anyhow::Result;

use vhdx_ublk::device::claims;
use vhdx_ublk::system::metrics::{self, Sample};

use super::{output, stats};

/// Print what all devices have done, as metrics in the OpenMetrics format.
///
/// These are the numbers of `stats`. A device whose daemon does not answer has `vhdx_ublk_up 0` and no
/// others.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Metrics {
    /// Write to this file instead, in one step, so that no reader sees half of it
    #[arg(long, value_name = "FILE")]
    textfile: Option<PathBuf>,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk metrics
  vhdx-ublk metrics --textfile /var/lib/prometheus/node-exporter/vhdx-ublk.prom

The second command is for the textfile collector of node_exporter. The timer
vhdx-ublk-metrics.timer runs it every 15 s.
Exit status: 0 success, 1 failure, 2 wrong usage.";

impl Metrics {
    /// Runs the command.
    pub fn run(&self) -> Result<()> {
        let samples = match claims::registry()? {
            Some(registry) => {
                let devices = registry.survey()?.devices.into_iter();
                let sample =
                    |listed| Sample { report: stats::report(&registry, &listed).ok(), entry: listed.entry };
                devices.map(sample).collect()
            }
            None => Vec::new(),
        };
        let text = metrics::text(&samples);
        match &self.textfile {
            Some(path) => metrics::write(path, &text)?,
            None => output::print(text.trim_end())?,
        }
        Ok(())
    }
}
