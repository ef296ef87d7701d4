//! Where warnings go: to standard error, which is the device's log once a daemon has detached; to the journal
//! of systemd if standard error leads there, with fields by which the messages of a device are found.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::stat::fstat;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{EnvFilter, dynamic_filter_fn};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use super::journal::{self, Journal, Text};
use vhdx_ublk::device::spec::Ready;
use vhdx_ublk::device::{image_name, log_file, warnings};
use vhdx_ublk::printable::Printable;

/// Set once standard error is a log.
static DETACHED: AtomicBool = AtomicBool::new(false);

/// The journal, once a device is served whose messages go there.
static JOURNAL: OnceLock<Journal> = OnceLock::new();

/// How much is said.
static VERBOSITY: OnceLock<Verbosity> = OnceLock::new();

/// How much is said, for every command.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct Verbosity {
    /// Say more on standard error, and in the log of a device: what is done (-v), and how (-vv)
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    #[arg(display_order = 1000)]
    verbose: u8,
    /// Say less: only warnings (-q), only errors (-qq); in the log of a device, only errors (-q)
    #[arg(short, long, global = true, action = clap::ArgAction::Count, display_order = 1001)]
    quiet: u8,
}

impl Verbosity {
    /// The least important level that is shown.
    fn level(self, is_detached: bool) -> LevelFilter {
        const LEVELS: [LevelFilter; 5] = [
            LevelFilter::ERROR,
            LevelFilter::WARN,
            LevelFilter::INFO,
            LevelFilter::DEBUG,
            LevelFilter::TRACE,
        ];
        let usual: usize = if is_detached { 1 } else { 2 };
        LEVELS[(usual + usize::from(self.verbose)).saturating_sub(self.quiet.into()).min(4)]
    }

    /// Whether more is to be said than usual.
    pub fn is_verbose(self) -> bool {
        self.verbose > 0
    }
}

/// Starts it. `RUST_LOG` chooses what is shown; without it, informational messages and above on a terminal,
/// from warnings upwards in a log, and more or less as `verbosity` says.
pub fn start(verbosity: Verbosity) {
    VERBOSITY.get_or_init(|| verbosity);
    let lines = tracing_subscriber::fmt::layer().event_format(Lines).with_writer(io::stderr);
    let lines = lines.with_filter(dynamic_filter_fn(|_, _| JOURNAL.get().is_none()));
    let shown = lines.and_then(ToJournal).and_then(Bounded);
    let registry = tracing_subscriber::registry().with(LastWarning.with_filter(LevelFilter::WARN));
    if let Ok(filter) = EnvFilter::try_from_default_env() {
        return registry.with(shown.with_filter(filter)).init();
    }
    let is_shown = move |level: Level| level <= verbosity.level(DETACHED.load(Ordering::Relaxed));
    registry.with(shown.with_filter(dynamic_filter_fn(move |event, _| is_shown(*event.level())))).init();
}

/// The options that have a daemon say as much as this process.
pub fn arguments() -> impl Iterator<Item = OsString> {
    let Verbosity { verbose, quiet } = VERBOSITY.get().copied().unwrap_or_default();
    std::iter::repeat_n("-v".into(), verbose.into()).chain(std::iter::repeat_n("-q".into(), quiet.into()))
}

/// From now on standard error is a log.
pub fn detached() {
    DETACHED.store(true, Ordering::Relaxed);
}

/// From now on this process serves a device. If standard error leads to the journal, messages go there by
/// its own protocol, and say what they are about.
pub fn serving(ready: &Ready) {
    if !is_journal() {
        return;
    }
    let fields =
        [("SYSLOG_IDENTIFIER", &b"vhdx-ublk"[..]), ("VHDX_DEVICE", ready.device.as_os_str().as_bytes())];
    image_name::set(&ready.image);
    // Where the journal cannot be reached by its socket, it still gets standard error.
    if let Ok(journal) = Journal::at(Path::new(journal::SOCKET), &fields) {
        JOURNAL.get_or_init(|| journal);
    }
}

/// Whether standard error is the stream to the journal that the service manager has opened for this process.
fn is_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    fstat(io::stderr()).is_ok_and(|found| stream == format!("{}:{}", found.st_dev, found.st_ino))
}

/// The layer that sends messages to the journal.
struct ToJournal;

impl<S: Subscriber> Layer<S> for ToJournal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if let Some(journal) = JOURNAL.get() {
            journal.send(event);
        }
    }
}

/// The layer that begins a new log when a line has filled this one.
struct Bounded;

impl<S: Subscriber> Layer<S> for Bounded {
    fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
        log_file::keep_bounded();
    }
}

/// The layer that remembers the last warning.
struct LastWarning;

impl<S: Subscriber> Layer<S> for LastWarning {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        warnings::note(&text.0);
    }
}

/// One line per event, like the program's other messages. In a log, to which one daemon after the other
/// writes, with the time, the process and its version.
struct Lines;

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut line: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if DETACHED.load(Ordering::Relaxed) {
            SystemTime.format_time(&mut line)?;
            write!(line, " vhdx-ublk {}[{}]: ", env!("CARGO_PKG_VERSION"), std::process::id())?;
        } else {
            line.write_str("vhdx-ublk: ")?;
        }
        line.write_str(match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            Level::INFO => "",
            Level::DEBUG | Level::TRACE => "debug: ",
        })?;
        // What is logged has names in it, of files and of whoever has them open.
        context.format_fields(Writer::new(&mut Printable(line.by_ref())), event)?;
        writeln!(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_v_says_more_and_each_q_less() {
        let level = |verbose, quiet, is_detached| Verbosity { verbose, quiet }.level(is_detached);
        assert_eq!((level(0, 0, false), level(0, 0, true)), (LevelFilter::INFO, LevelFilter::WARN));
        assert_eq!((level(1, 0, false), level(1, 0, true)), (LevelFilter::DEBUG, LevelFilter::INFO));
        assert_eq!((level(9, 0, false), level(2, 0, true)), (LevelFilter::TRACE, LevelFilter::DEBUG));
        assert_eq!((level(0, 1, false), level(0, 1, true)), (LevelFilter::WARN, LevelFilter::ERROR));
        assert_eq!((level(0, 2, false), level(0, 9, true)), (LevelFilter::ERROR, LevelFilter::ERROR));
    }
}
