//! Showing how far an operation is, and stopping it with a signal.
//!
//! On a terminal there is a bar. Elsewhere there is a line a second on standard error, so that operations
//! that take less print nothing.

use std::cell::Cell;
use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use schemars::JsonSchema;
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use vhdx_ublk::disk::Remover;
use vhdx_ublk::error::{Doing, Result};
use vhdx_ublk::operations::Watch;
use vhdx_ublk::printable::human_size;

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
    /// Shows an operation. A first SIGINT or SIGTERM asks it to stop. A second one, or SIGHUP, ends the
    /// program; an unfinished file is removed before.
    ///
    /// # Errors
    ///
    /// When the signals cannot be handled.
    pub fn start(&self) -> Result<Shown> {
        const HANDLING: &str = "handling signals";
        let stop = Arc::new(Stop::default());
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).doing(HANDLING)?;
        let told = stop.clone();
        let watch = move || signals.forever().for_each(|signal| told.receive(signal));
        thread::Builder::new().name("signals".into()).spawn(watch).doing(HANDLING)?;
        Ok(Shown::new(self.progress, stop))
    }
}

/// What signals ask for.
#[derive(Default)]
struct Stop {
    requested: AtomicBool,
    unfinished: Mutex<Vec<Remover>>,
}

impl Stop {
    fn receive(&self, signal: i32) {
        if !self.requested.swap(true, Ordering::Relaxed) && signal != SIGHUP {
            return;
        }
        let mut unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        end_without(&mut unfinished, signal);
    }
}

/// Removes the files and ends the program by `signal`; none of them is finished meanwhile.
fn end_without(unfinished: &mut Vec<Remover>, signal: i32) {
    match unfinished.pop() {
        Some(remover) => remover.remove_and(|| end_without(unfinished, signal)),
        None => drop(emulate_default_handler(signal)),
    }
}

/// The progress of one operation.
pub struct Shown {
    form: Form,
    bar: ProgressBar,
    started: Instant,
    /// When the last line was printed.
    line: Cell<Instant>,
    stop: Arc<Stop>,
}

/// A line of `--progress json`.
#[derive(Serialize, JsonSchema)]
pub struct Line {
    /// What is done.
    done_bytes: u64,
    /// What there is to do, as far as it is known.
    total_bytes: u64,
    /// The rate since the line before.
    bytes_per_second: u64,
}

impl Shown {
    fn new(form: Form, stop: Arc<Stop>) -> Self {
        let visible = form == Form::Text && io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        // Not wider than 80 columns, whatever the sizes are.
        let style =
            ProgressStyle::with_template("{bar:20} {percent:>3}%  {status}").expect("a good template");
        let style = style.with_key("status", |state: &ProgressState, out: &mut dyn fmt::Write| {
            let status = status(state.pos(), state.len().unwrap_or(0), whole(state.per_sec()));
            let _ = out.write_str(&status); // a bar that cannot be drawn is not missed
        });
        let bar = ProgressBar::with_draw_target(Some(0), target).with_style(style);
        let now = Instant::now();
        Self { form, bar, started: now, line: now.into(), stop }
    }

    /// Runs `print` while no bar is drawn.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }

    fn print_line(&self, done: u64, total: u64) {
        #[expect(clippy::cast_precision_loss, reason = "a rate need not be exact")]
        let rate = whole(done as f64 / self.started.elapsed().as_secs_f64());
        if self.form == Form::Json {
            let line = Line { done_bytes: done, total_bytes: total, bytes_per_second: rate };
            eprintln!("{}", serde_json::to_string(&line).expect("numbers"));
            return;
        }
        eprintln!("{}", status(done, total, rate));
    }
}

/// A rate in whole bytes.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast to an integer saturates")]
fn whole(rate: f64) -> u64 {
    rate as u64
}

/// What people read of an operation that does `rate` bytes a second.
fn status(done: u64, total: u64, rate: u64) -> String {
    let left = total.saturating_sub(done);
    let seconds = left.checked_div(rate).filter(|_| left > 0);
    let left =
        seconds.map(|seconds| format!(", {} left", HumanDuration(Duration::from_secs(seconds.max(1)))));
    let [done, total, rate] = [done, total, rate].map(human_size);
    format!("{done} of {total}, {rate}/s{}", left.unwrap_or_default())
}

impl Watch for Shown {
    fn progress(&self, done: u64, total: u64) {
        assert!(done <= total, "{done} of {total} bytes are done");
        if total == 0 {
            return; // how much it will be is not known yet
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
        let silent = self.form == Form::None || self.form == Form::Text && !self.bar.is_hidden();
        if !silent && self.line.get().elapsed() >= PERIOD {
            self.line.set(Instant::now());
            self.print_line(done, total);
        }
    }

    fn stop_requested(&self) -> bool {
        self.stop.requested.load(Ordering::Relaxed)
    }

    fn unfinished(&self, remover: Remover) {
        self.stop.unfinished.lock().unwrap_or_else(PoisonError::into_inner).push(remover);
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
