//! Where warnings go: to standard error, which is the device's log once a daemon has detached.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{EnvFilter, dynamic_filter_fn};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use vhdx_ublk::printable::Printable;

/// Set once standard error is a log.
static DETACHED: AtomicBool = AtomicBool::new(false);

/// Starts it. `RUST_LOG` chooses what is shown; without it, informational messages and above on a terminal,
/// from warnings upwards in a log.
pub fn start() {
    let lines = tracing_subscriber::fmt::layer().event_format(Lines).with_writer(std::io::stderr);
    let registry = tracing_subscriber::registry();
    match EnvFilter::try_from_default_env() {
        Ok(filter) => registry.with(lines.with_filter(filter)).init(),
        Err(_) => {
            registry.with(lines.with_filter(dynamic_filter_fn(|event, _| is_shown(*event.level())))).init();
        }
    }
}

/// From now on standard error is a log.
pub fn detached() {
    DETACHED.store(true, Ordering::Relaxed);
}

fn is_shown(level: Level) -> bool {
    level <= if DETACHED.load(Ordering::Relaxed) { Level::WARN } else { Level::INFO }
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
