//! `stats`: what devices have done.

use std::ffi::OsString;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::registry::{Listed, Registry};
use vhdx_ublk::device::socket::{self, Report};
use vhdx_ublk::device::stop::{self, Target};
use vhdx_ublk::device::{claims, path};
use vhdx_ublk::disk::tally::Times;
use vhdx_ublk::engine::port_counts::{Requests, Shortage, Wait};
use vhdx_ublk::engine::{Counters, Levels};
use vhdx_ublk::error::{Error, Kind};
use vhdx_ublk::printable::{self, counted, human_size, printable};

use super::{list, output};

/// Show what devices have done, and how long requests have waited.
///
/// The kernel counts requests and their bytes (`iostat`). This command shows what only the daemon knows:
/// which layer was read, how many blocks got space, how long requests waited for the engine, and how long
/// syncs of the image took. Counting starts anew with each daemon.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Stats {
    /// The device: its number, its name, /dev/ublkbN, or the path of its image [default: all devices]
    target: Vec<OsString>,
    /// As JSON: an array of objects, errors too; with --watch one such array per line
    #[arg(long)]
    pub json: bool,
    /// Show every second what has been done since the line before, until the command is interrupted
    #[arg(short, long)]
    watch: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk stats 0
  vhdx-ublk stats --watch
  vhdx-ublk stats disk.vhdx --json

Requests wait for the engine only if they need something that is not there yet: `session` (the
first change of the image), `space` (a block without space), `unmap` and `zero` (discards and
zeros), `flush` (a change that has to be logged; other flushes are a sync by their queue). Times of
waits and syncs are counted in steps: up to 16 us, 32 us, and so on; `99% up to 4 ms` means that at
most one in a hundred took longer.

--watch shows, for each second: reads, writes and flushes; read and written data; first writes
(blocks that got space); requests that wait now, for the engine or for room on the host; syncs of
the image and their mean; how full the log is.

JSON: id, device, image, poisoned, host_full, short_of_room (null, or the requests that wait for
room: requests, since in seconds since 1970), last_error, requests (read, write, durable_write,
flush, discard, write_zeroes, and failed), read (an array: image, bytes), zero_filled_bytes,
written_bytes, zeroed_bytes, retries, zero_copy, late_registrations, wakes (between the threads of
the queues and the engine's), waits (an array: for, waiting, count, sum_us, buckets), engine (how
often: syncs, commits, rounds of these, logs begun, log entries, pages logged, grants of space,
recycled_grants, fills from parents, bitmaps begun, promotions of blocks to complete ones, grows of
the file, unmapped blocks, moves of blocks, released extents, barriers), levels (log_bytes,
log_used_bytes, dirty_pages, quarantined_bytes), syncs (count, sum_us, buckets).
The first bucket has what took up to 16 us, the next one up to 32 us, and so on; the last one has
the rest.
Exit status: 0 success, 1 failure, 2 wrong usage.";

/// The time between two lines.
const INTERVAL: Duration = Duration::from_secs(1);

/// How often --watch repeats its headline, in rounds.
const HEADLINE_ROUNDS: usize = 20;

/// One device, as it is shown.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Row {
    id: u32,
    device: PathBuf,
    #[serde(with = "path::one")]
    #[schemars(with = "path::WrittenPath")]
    image: PathBuf,
    poisoned: bool,
    host_full: bool,
    /// The requests that wait until the host has room, if any do.
    short_of_room: Option<Shortage>,
    last_error: Option<String>,
    requests: Requests,
    read: Vec<Layer>,
    zero_filled_bytes: u64,
    written_bytes: u64,
    zeroed_bytes: u64,
    retries: u64,
    zero_copy: bool,
    late_registrations: u64,
    wakes: u64,
    waits: Vec<Wait>,
    engine: Counters,
    levels: Levels,
    syncs: Times,
}

/// What was read from one image.
#[derive(Clone, Debug, Serialize, JsonSchema)]
struct Layer {
    #[serde(with = "path::one")]
    #[schemars(with = "path::WrittenPath")]
    image: PathBuf,
    bytes: u64,
}

impl Row {
    fn of(listed: Listed, report: Report) -> Self {
        let (entry, Report { status, stats }) = (listed.entry, report);
        let traffic = stats.traffic;
        // From the lowest layer up: a snapshot may have put another on top in between.
        let images = entry.parents.iter().rev().chain([&entry.image]);
        let read = images.zip(traffic.read_bytes.iter().rev());
        let mut read: Vec<Layer> =
            read.map(|(image, bytes)| Layer { image: image.clone(), bytes: *bytes }).collect();
        read.reverse();
        Self {
            id: entry.id,
            device: entry.device,
            image: entry.image,
            poisoned: status.poisoned,
            host_full: status.host_full,
            short_of_room: status.short_of_room,
            last_error: status.last_error,
            requests: traffic.requests,
            read,
            zero_filled_bytes: traffic.zero_filled_bytes,
            written_bytes: traffic.written_bytes,
            zeroed_bytes: traffic.zeroed_bytes,
            retries: traffic.retries,
            zero_copy: entry.zero_copy,
            late_registrations: traffic.late_registrations,
            wakes: traffic.wakes,
            waits: traffic.waits,
            engine: stats.engine,
            levels: stats.levels,
            syncs: stats.syncs,
        }
    }

    fn read_bytes(&self) -> u64 {
        self.read.iter().fold(0, |sum, layer| sum.saturating_add(layer.bytes))
    }

    /// The requests that wait now.
    fn waiting(&self) -> u64 {
        let for_room = self.short_of_room.map_or(0, |shortage| shortage.requests);
        self.waits.iter().fold(for_room, |sum, wait| sum.saturating_add(wait.waiting))
    }

    fn log_percent(&self) -> u64 {
        (u128::from(self.levels.log_used_bytes) * 100)
            .checked_div(u128::from(self.levels.log_bytes))
            .and_then(|percent| u64::try_from(percent).ok())
            .unwrap_or(0)
    }
}

impl Stats {
    /// Runs the command.
    pub fn run(&self) -> Result<()> {
        let targets = self.target.iter().map(|text| Target::parse(text));
        let targets = targets.collect::<Result<Vec<Target>, _>>()?;
        let registry = match (claims::registry()?, targets.first()) {
            (Some(registry), _) => registry,
            (None, Some(target)) => return Err(claims::no_devices(target).into()),
            (None, None) if self.json => return Ok(output::print_json(&[(); 0])?),
            (None, None) => return Ok(()),
        };
        if self.watch {
            return self.watch(&registry, &targets);
        }
        let rows = rows(&registry, &targets)?;
        if self.json {
            return Ok(output::print_json(&rows)?);
        }
        rows.iter().try_for_each(|row| Ok(output::print(&text(row))?))
    }

    /// One line for each device and second, until a device is gone, or no one reads them.
    fn watch(&self, registry: &Registry, targets: &[Target]) -> Result<()> {
        let mut before = rows(registry, targets)?;
        for round in 0.. {
            let began = Instant::now();
            thread::sleep(INTERVAL);
            let now = rows(registry, targets)?;
            let text = if self.json {
                printable(&serde_json::to_string(&now)?).into_owned()
            } else {
                let headline = (round % HEADLINE_ROUNDS == 0).then_some(&HEADLINE);
                lines(headline, &before, &now, began.elapsed())
            };
            if !output::print_while_read(&text)? {
                break;
            }
            before = now;
        }
        Ok(())
    }
}

/// The devices that `targets` name, or all.
fn rows(registry: &Registry, targets: &[Target]) -> Result<Vec<Row>> {
    let listed = match targets {
        [] => registry.survey()?.devices,
        targets => targets.iter().map(|target| stop::find(registry, target)).collect::<Result<_, _>>()?,
    };
    let row = |listed: Listed| Ok(Row::of(listed.clone(), report(registry, &listed)?));
    listed.into_iter().map(row).collect()
}

/// What the daemon of `listed` reports.
pub(super) fn report(registry: &Registry, listed: &Listed) -> Result<Report, Error> {
    let entry = &listed.entry;
    if !entry.daemon.is_alive() {
        let message = format!("the daemon of {} is not running", entry.device.display());
        let remedy = format!("`vhdx-ublk recover {}` starts another one", entry.id);
        return Err(Error::new(Kind::NotFound, message).remedy(remedy));
    }
    socket::report(&registry.socket_path(entry.id)).map_err(|error| match error.kind() {
        Kind::Unsupported => {
            let message = format!(
                "the daemon of {} is version {}, which counts nothing",
                entry.device.display(),
                entry.version
            );
            Error::new(Kind::Unsupported, message).remedy(format!("vhdx-ublk upgrade {}", entry.id))
        }
        _ => error,
    })
}

fn text(row: &Row) -> String {
    let mut fields = output::Fields::default();
    fields.add("device", row.device.display().to_string());
    fields.add("requests", requests(row.requests));
    for (layer, key) in row.read.iter().zip(std::iter::once("read").chain(std::iter::repeat(""))) {
        fields.add(key, format!("{} from {}", human_size(layer.bytes), layer.image.display()));
    }
    fields.add("", format!("{} of zeros, which no file has", human_size(row.zero_filled_bytes)));
    let zeroed = human_size(row.zeroed_bytes);
    fields.add("written", format!("{}; {zeroed} made zero", human_size(row.written_bytes)));
    let engine = &row.engine;
    fields.add(
        "first writes",
        format!(
            "{} got space ({} of it used before, {} filled from parents); the file grew {}",
            counted(engine.grants, "block"),
            engine.recycled_grants,
            engine.fills,
            printable::times(engine.grows)
        ),
    );
    let mut key = "waits";
    for wait in row.waits.iter().filter(|wait| wait.times.count > 0 || wait.waiting > 0) {
        fields.add(key, format!("for {}: {}; {} wait now", wait.reason, times(&wait.times), wait.waiting));
        key = "";
    }
    fields.add("syncs", times(&row.syncs));
    fields.add(
        "commits",
        format!(
            "{} in {}, with {}",
            engine.commits,
            counted(engine.rounds, "round"),
            counted(engine.pages, "page")
        ),
    );
    let (log, percent) = (human_size(row.levels.log_bytes), row.log_percent());
    let (begun, dirty) = (printable::times(engine.logs), counted(row.levels.dirty_pages, "page"));
    fields.add("log", format!("{percent}% of {log} filled; begun {begun}; {dirty} dirty"));
    fields.add(
        "unmapped",
        format!(
            "{}; {} in quarantine",
            counted(engine.unmapped, "block"),
            human_size(row.levels.quarantined_bytes)
        ),
    );
    fields.add("zero copy", if row.zero_copy { "all data" } else { "no data" });
    fields.add("retries", row.retries.to_string());
    let health = match (row.poisoned, row.short_of_room) {
        (true, _) => "poisoned: no write or flush succeeds".into(),
        (false, Some(shortage)) => format!("the host is full: {}", list::waiting(shortage)),
        (false, None) if row.host_full => "the host is full".into(),
        (false, None) => "well".to_owned(),
    };
    fields.add("health", health);
    fields.to_string()
}

fn requests(requests: Requests) -> String {
    let Requests { read, write, durable_write, flush, discard, write_zeroes, failed } = requests;
    format!(
        "{}, {}, {}, {}, {}, {write_zeroes} for zeros; {failed} failed",
        counted(read, "read"),
        counted(write, "write"),
        counted(durable_write, "durable write"),
        counted(flush, "flush"),
        counted(discard, "discard")
    )
}

fn times(times: &Times) -> String {
    let Some(mean) = times.mean() else { return "none".into() };
    let most =
        times.bound_of(99).map_or("more than 33 s".into(), |bound| format!("up to {}", duration(bound)));
    format!("{}, mean {}, 99% {most}", times.count, duration(mean))
}

/// A duration for people, with two digits at least.
fn duration(duration: Duration) -> String {
    let micros = duration.as_micros();
    match micros {
        ..10_000 => format!("{micros} us"),
        10_000..10_000_000 => format!("{} ms", micros / 1000),
        _ => format!("{} s", micros / 1_000_000),
    }
}

const HEADLINE: [&str; 11] = [
    "DEVICE",
    "READS",
    "WRITES",
    "FLUSHES",
    "READ",
    "WRITTEN",
    "FIRST",
    "WAITING",
    "SYNCS",
    "SYNC-MEAN",
    "LOG",
];

/// The widths of these columns: numbers that grow do not move the others.
const WIDTHS: [usize; 11] = [12, 8, 8, 8, 12, 12, 7, 8, 6, 10, 4];

/// What each device has done since `before`, per second.
fn lines(headline: Option<&[&str; 11]>, before: &[Row], now: &[Row], elapsed: Duration) -> String {
    let line = |cells: [String; 11]| {
        let cells = cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:>width$}"));
        cells.collect::<Vec<_>>().join(" ")
    };
    let headline = headline.map(|headline| line(headline.map(str::to_owned)));
    let rows = now.iter().filter_map(|row| {
        let then = before.iter().find(|then| then.id == row.id)?;
        Some(line(cells(then, row, elapsed)))
    });
    headline.into_iter().chain(rows).collect::<Vec<_>>().join("\n")
}

fn cells(then: &Row, now: &Row, elapsed: Duration) -> [String; 11] {
    let millis = elapsed.as_millis().max(1);
    let rate = |count: u64| u64::try_from(u128::from(count) * 1000 / millis).unwrap_or(u64::MAX);
    let requests = now.requests.since(&then.requests);
    let grew = |now: u64, then: u64| rate(now.saturating_sub(then));
    let syncs = now.syncs.since(&then.syncs);
    let writes = requests.write.saturating_add(requests.durable_write);
    [
        now.device.display().to_string(),
        rate(requests.read).to_string(),
        rate(writes).to_string(),
        rate(requests.flush).to_string(),
        human_size(grew(now.read_bytes(), then.read_bytes())),
        human_size(grew(now.written_bytes, then.written_bytes)),
        grew(now.engine.grants, then.engine.grants).to_string(),
        now.waiting().to_string(),
        rate(syncs.count).to_string(),
        syncs.mean().map_or("-".into(), duration),
        format!("{}%", now.log_percent()),
    ]
}

#[cfg(test)]
mod tests {
    use vhdx_ublk::engine::port_counts::Traffic;

    use super::*;

    fn row() -> Row {
        let listed = list::testing::listed();
        let mut report = Report::default();
        report.stats.traffic = Traffic {
            requests: Requests { read: 7, write: 5, durable_write: 1, failed: 1, ..Requests::default() },
            read_bytes: vec![4096, 512],
            written_bytes: 24 << 10,
            waits: vec![Wait {
                reason: "space".into(),
                waiting: 2,
                times: Times { count: 4, sum_us: 400, buckets: vec![0, 0, 0, 4, 0] },
            }],
            ..Traffic::default()
        };
        report.stats.engine.grants = 3;
        report.stats.levels = Levels { log_bytes: 1 << 20, log_used_bytes: 512 << 10, ..Levels::default() };
        Row::of(listed, report)
    }

    /// The registry names one layer; what lies above it has no name yet.
    #[test]
    fn layers_are_named_from_the_lowest_one_up() {
        let row = row();
        assert_eq!(row.read.len(), 1);
        assert_eq!((row.read[0].image.to_str(), row.read[0].bytes), (Some("/images/disk.vhdx"), 512));
    }

    #[test]
    fn text_and_json_say_the_same() {
        let shown = text(&row());
        for part in [
            "7 reads, 5 writes, 1 durable write, 0 flushes",
            "1 failed",
            "512 bytes from /images/disk.vhdx",
            "24 KiB; 0 bytes made zero",
            "3 blocks got space",
            "for space: 4, mean 100 us, 99% up to 128 us; 2 wait now",
            "50% of 1 MiB filled",
            "syncs:        none",
        ] {
            assert!(shown.contains(part), "{part}:\n{shown}");
        }
        let json = serde_json::to_value(row()).expect("serialisable");
        assert_eq!(json["requests"]["durable_write"], 1);
        assert_eq!(json["waits"][0]["for"], "space");
        assert_eq!(json["waits"][0]["buckets"][3], 4);
        assert_eq!(
            (&json["engine"]["grants"], &json["levels"]["log_used_bytes"]),
            (&3.into(), &(512 << 10).into())
        );
    }

    #[test]
    fn a_line_shows_what_is_new_per_second() {
        let (then, mut now) = (row(), row());
        now.requests.read += 100;
        now.written_bytes += 4 << 20;
        now.syncs = Times { count: 2, sum_us: 6000, buckets: Vec::new() };
        let shown = lines(None, &[then], &[now], Duration::from_secs(2));
        let cells: Vec<_> = shown.split_whitespace().collect();
        let expected = "/dev/ublkb3 50 0 0 0 bytes 2 MiB 0 2 1 3000 us 50%";
        assert_eq!(cells.join(" "), expected);
    }
}
