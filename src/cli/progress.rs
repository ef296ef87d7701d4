//! Showing how far an operation is, and stopping it with a signal.
//!
//! On a terminal there is a bar. Elsewhere there is a line a second on standard error, so that operations
//! that take less print nothing.

use std::cell::Cell;
use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{BinaryBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use vhdx_ublk::error::{Doing, Result};
use vhdx_ublk::operations::Watch;

/// The time between two lines.
const PERIOD: Duration = Duration::from_secs(1);

/// How progress is shown.
#[derive(clap::Args)]
pub struct ProgressOptions {
    /// Show the progress on standard error: a bar or lines of text (text), JSON, a line a second (json), or
    /// nothing (none)
    #[arg(long, value_name = "FORM", default_value = "text")]
    progress: Form,
}

/// The form in which progress is shown.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Text,
    Json,
    None,
}

impl ProgressOptions {
    /// Shows an operation. A first SIGINT or SIGTERM asks it to stop, a second one ends the program.
    ///
    /// # Errors
    ///
    /// When the signals cannot be handled.
    pub fn start(&self) -> Result<Shown> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            let second = flag::register_conditional_default(signal, stop.clone());
            second.and_then(|_| flag::register(signal, stop.clone())).doing("handling signals")?;
        }
        Ok(Shown::new(self.progress, stop))
    }
}

/// The progress of one operation.
pub struct Shown {
    form: Form,
    bar: ProgressBar,
    started: Instant,
    /// When the last line was printed.
    line: Cell<Instant>,
    stop: Arc<AtomicBool>,
}

/// A line of `--progress json`.
#[derive(Serialize)]
struct Line {
    done_bytes: u64,
    total_bytes: u64,
    bytes_per_second: u64,
}

impl Shown {
    fn new(form: Form, stop: Arc<AtomicBool>) -> Self {
        let visible = form == Form::Text && io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let template = "{bar:30} {percent:>3}%  {binary_bytes} of {binary_total_bytes}  \
             {binary_bytes_per_sec}  {eta} left";
        let style = ProgressStyle::with_template(template).expect("a good template");
        let bar = ProgressBar::with_draw_target(Some(0), target).with_style(style);
        let now = Instant::now();
        Self { form, bar, started: now, line: now.into(), stop }
    }

    /// Runs `print` while no bar is drawn.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }

    fn print_line(&self, done: u64, total: u64) {
        let seconds = self.started.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, clippy::cast_sign_loss, clippy::cast_possible_truncation)]
        let rate = (done as f64 / seconds) as u64;
        if self.form == Form::Json {
            let line = Line { done_bytes: done, total_bytes: total, bytes_per_second: rate };
            eprintln!("{}", serde_json::to_string(&line).expect("numbers"));
            return;
        }
        let left = (total - done).checked_div(rate).map(Duration::from_secs);
        let left = left.map(|left| format!(", {} left", HumanDuration(left))).unwrap_or_default();
        let [done, total, rate] = [done, total, rate].map(BinaryBytes);
        eprintln!("{done} of {total}, {rate}/s{left}");
    }
}

impl Watch for Shown {
    fn progress(&self, done: u64, total: u64) {
        assert!(done <= total, "{done} of {total} bytes are done");
        self.bar.set_length(total);
        self.bar.set_position(done);
        let silent = self.form == Form::None || self.form == Form::Text && !self.bar.is_hidden();
        if !silent && self.line.get().elapsed() >= PERIOD {
            self.line.set(Instant::now());
            self.print_line(done, total);
        }
    }

    fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
