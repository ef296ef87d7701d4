//! What devices have done, as OpenMetrics text.
//!
//! Every sample names its device; which image that serves is in `vhdx_ublk_device_info`: a snapshot changes
//! it, and begins no count anew. The samples of one metric stand together, as the format demands.

use std::fmt::{Display, Write as _};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::{fs, io};

use crate::device::registry::Entry;
use crate::device::socket::Report;
use crate::disk::tally::Times;
use crate::disk::{folder_of, name_of_new};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::printable::printable;

/// Whoever collects the metrics reads the file as another user.
const FILE_MODE: u32 = 0o644;

/// A device, and what its daemon reports, if it answers.
pub struct Sample {
    /// The device.
    pub entry: Entry,
    /// What it has done.
    pub report: Option<Report>,
}

/// A number of a report.
type Number = fn(&Report) -> u64;

/// Counters without further labels: name, meaning, value.
const COUNTERS: [(&str, &str, Number); 18] = [
    ("requests_failed", "Requests of any kind that failed.", |r| r.stats.traffic.requests.failed),
    ("zero_filled_bytes", "Bytes of reads that no file has.", |r| r.stats.traffic.zero_filled_bytes),
    ("written_bytes", "Bytes written to the image.", |r| r.stats.traffic.written_bytes),
    ("zeroed_bytes", "Bytes of the image that were made zero.", |r| r.stats.traffic.zeroed_bytes),
    ("retries", "Pieces of file I/O that were submitted again.", |r| r.stats.traffic.retries),
    ("late_registrations", "Zero copy requests whose pages were registered late.", |r| {
        r.stats.traffic.late_registrations
    }),
    ("wakes", "Wakes between the threads of the queues and the engine's.", |r| r.stats.traffic.wakes),
    ("first_writes", "Blocks that got space.", |r| r.stats.engine.grants),
    ("recycled_grants", "First writes into space that was used before.", |r| r.stats.engine.recycled_grants),
    ("fills", "First writes that copied the block from the parents.", |r| r.stats.engine.fills),
    ("unmapped_blocks", "Blocks that lost their space.", |r| r.stats.engine.unmapped),
    ("file_growths", "Extensions of the image's file.", |r| r.stats.engine.grows),
    ("syncs", "Syncs of the image by the engine.", |r| r.stats.engine.syncs),
    ("commits", "Commit cycles that logged something.", |r| r.stats.engine.commits),
    ("commit_rounds", "Rounds of these cycles.", |r| r.stats.engine.rounds),
    ("logged_pages", "Pages of metadata that were logged.", |r| r.stats.engine.pages),
    ("log_entries", "Log entries written.", |r| r.stats.engine.entries),
    ("logs_begun", "Logs begun.", |r| r.stats.engine.logs),
];

/// Gauges without further labels.
const GAUGES: [(&str, &str, Number); 7] = [
    ("poisoned", "1 if no write or flush succeeds any longer.", |r| u64::from(r.status.poisoned)),
    ("host_full", "1 if the host had no room for a write.", |r| u64::from(r.status.host_full)),
    ("short_of_room", "Requests that wait until the host has room.", |r| {
        r.status.short_of_room.map_or(0, |shortage| shortage.requests)
    }),
    ("log_bytes", "Length of the image's log.", |r| r.stats.levels.log_bytes),
    ("log_used_bytes", "How far the log is filled.", |r| r.stats.levels.log_used_bytes),
    ("dirty_pages", "Pages of metadata that are not in the log.", |r| r.stats.levels.dirty_pages),
    ("quarantined_bytes", "Unmapped space that may not be used yet.", |r| r.stats.levels.quarantined_bytes),
];

/// The metrics of `samples`.
pub fn text(samples: &[Sample]) -> String {
    let mut page = Page::default();
    page.family("device", "info", "What a device serves.");
    for Sample { entry, .. } in samples {
        let labels = [("image", entry.image.to_string_lossy()), ("version", entry.version.as_str().into())];
        page.sample("device_info", entry, &labels, 1);
    }
    page.family("up", "gauge", "1 if the daemon of a device answers.");
    for Sample { entry, report } in samples {
        page.sample("up", entry, &[], u8::from(report.is_some()));
    }
    let known: Vec<(&Entry, &Report)> =
        samples.iter().filter_map(|sample| Some((&sample.entry, sample.report.as_ref()?))).collect();
    page.requests(&known);
    page.layers(&known);
    for (name, help, number) in COUNTERS {
        page.family(name, "counter", help);
        for (entry, report) in &known {
            page.sample(&total(name), entry, &[], number(report));
        }
    }
    for (name, help, number) in GAUGES {
        page.family(name, "gauge", help);
        for (entry, report) in &known {
            page.sample(name, entry, &[], number(report));
        }
    }
    page.waits(&known);
    page.0.push_str("# EOF\n");
    page.0
}

fn total(name: &str) -> String {
    format!("{name}_total")
}

type Labels<'a> = [(&'a str, std::borrow::Cow<'a, str>)];

#[derive(Default)]
struct Page(String);

impl Page {
    /// Begins a metric.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP vhdx_ublk_{name} {help}\n# TYPE vhdx_ublk_{name} {kind}"));
    }

    fn sample(&mut self, name: &str, entry: &Entry, labels: &Labels<'_>, value: impl Display) {
        let mut text = format!("vhdx_ublk_{name}{{device=\"ublkb{}\"", entry.id);
        for (label, value) in labels {
            let _ = write!(text, ",{label}=\"{}\"", escaped(value)); // a string takes everything
        }
        self.line(format_args!("{text}}} {value}"));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.0, "{line}"); // a string takes everything
    }

    fn requests(&mut self, known: &[(&Entry, &Report)]) {
        self.family("requests", "counter", "Requests by kind.");
        for (entry, report) in known {
            let requests = &report.stats.traffic.requests;
            for (kind, count) in [
                ("read", requests.read),
                ("write", requests.write),
                ("durable_write", requests.durable_write),
                ("flush", requests.flush),
                ("discard", requests.discard),
                ("write_zeroes", requests.write_zeroes),
            ] {
                self.sample("requests_total", entry, &[("kind", kind.into())], count);
            }
        }
    }

    /// Layers are counted from the lowest one, number 0, as a snapshot puts others on top.
    fn layers(&mut self, known: &[(&Entry, &Report)]) {
        self.family("read_bytes", "counter", "Bytes read from a layer's file; layer 0 is the lowest one.");
        for (entry, report) in known {
            for (layer, bytes) in report.stats.traffic.read_bytes.iter().rev().enumerate() {
                self.sample("read_bytes_total", entry, &[("layer", layer.to_string().into())], bytes);
            }
        }
    }

    fn waits(&mut self, known: &[(&Entry, &Report)]) {
        self.family("waiting", "gauge", "Requests that wait for the engine now.");
        for (entry, report) in known {
            for wait in &report.stats.traffic.waits {
                self.sample("waiting", entry, &[("for", wait.reason.as_str().into())], wait.waiting);
            }
        }
        self.family("wait_seconds", "histogram", "How long requests have waited for the engine.");
        for (entry, report) in known {
            for wait in &report.stats.traffic.waits {
                self.times("wait_seconds", entry, &[("for", wait.reason.as_str().into())], &wait.times);
            }
        }
        self.family("sync_seconds", "histogram", "How long syncs of the image have taken.");
        for (entry, report) in known {
            self.times("sync_seconds", entry, &[], &report.stats.syncs);
        }
    }

    fn times(&mut self, name: &str, entry: &Entry, labels: &Labels<'_>, times: &Times) {
        let mut below = 0_u64;
        let bucket = format!("{name}_bucket");
        for (bound, count) in times.bounds().zip(&times.buckets) {
            below = below.saturating_add(*count);
            if let Some(bound) = bound {
                let bound = seconds(u64::try_from(bound.as_micros()).unwrap_or(u64::MAX));
                self.sample(&bucket, entry, &[labels, &[("le", bound.into())][..]].concat(), below);
            }
        }
        self.sample(&bucket, entry, &[labels, &[("le", "+Inf".into())][..]].concat(), below);
        self.sample(&format!("{name}_count"), entry, labels, below);
        self.sample(&format!("{name}_sum"), entry, labels, seconds(times.sum_us));
    }
}

/// So many microseconds as a decimal number.
fn seconds(micros: u64) -> String {
    format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000)
}

/// A label's value: printable, on one line, between quotes.
fn escaped(value: &str) -> String {
    printable(value).replace('\\', "\\\\").replace('"', "\\\"")
}

/// Writes `text` to the file at `path`, in one step: whoever reads it sees all of the old text or of the new.
///
/// # Errors
///
/// [`Kind::Exists`] if something other than a regular file is there; what the operating system says.
pub fn write(path: &Path, text: &str) -> Result<()> {
    const FAILED: &str = "writing the metrics";
    name_of_new(path)?;
    match fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => {
            let error = Error::new(Kind::Exists, "it is no regular file, and would be replaced by one");
            return Err(error.file(path).remedy("name a file, or remove what is there"));
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).doing(FAILED).file(path),
        _ => {}
    }
    // Collectors take names that end in `.prom`, which this one does not.
    let file = tempfile::Builder::new().prefix(".vhdx-ublk-metrics.").tempfile_in(folder_of(path));
    let mut file = file.doing(FAILED).file(path)?;
    file.write_all(text.as_bytes()).doing(FAILED).file(path)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(FILE_MODE)).doing(FAILED).file(path)?;
    file.persist(path).map(drop).map_err(|error| error.error).doing(FAILED).file(path)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::device::registry::entry;
    use crate::engine::port_counts::Wait;

    fn sample(id: u32, image: &str) -> Sample {
        let mut report = Report::default();
        report.stats.traffic.requests.read = 7;
        report.stats.traffic.read_bytes = vec![1, 2];
        let times = Times { count: 3, sum_us: 1_500_000, buckets: vec![1, 0, 1, 1] };
        report.stats.traffic.waits = vec![Wait { reason: "space".into(), waiting: 1, times }];
        Sample { entry: Entry { image: image.into(), ..entry(id) }, report: Some(report) }
    }

    /// Family by family: HELP, TYPE, then samples of that name and no others, each series once.
    #[test]
    fn the_text_keeps_to_the_format() {
        let silent = Sample { report: None, ..sample(9, "/gone.vhdx") };
        let shown = text(&[sample(0, "/a.vhdx"), sample(1, "/b.vhdx"), silent]);
        let body = shown.strip_suffix("# EOF\n").expect("it ends so");
        let (mut families, mut series) = (BTreeSet::new(), BTreeSet::new());
        for family in body.split("# HELP ").skip(1) {
            let mut lines = family.lines();
            let (name, help) = lines.next().and_then(|line| line.split_once(' ')).expect("name and help");
            assert!(help.ends_with('.') && families.insert(name.to_owned()), "{name}");
            let kind =
                lines.next().and_then(|line| line.strip_prefix(&format!("# TYPE {name} "))).expect("type");
            let ends: &[&str] = match kind {
                "counter" => &["_total"],
                "gauge" => &[""],
                "info" => &["_info"],
                "histogram" => &["_bucket", "_count", "_sum"],
                other => panic!("{other} is no type"),
            };
            for line in lines {
                let (labelled, value) = line.rsplit_once(' ').expect("a value");
                assert!(value.parse::<f64>().is_ok_and(|value| value >= 0.0), "{line}");
                let (sample, labels) = labelled.split_once('{').expect("labels");
                assert!(ends.iter().any(|end| sample == format!("{name}{end}")), "{line} in {name}");
                assert!(labels.starts_with("device=\"ublkb") && labels.ends_with("\"}"), "{line}");
                assert!(series.insert(labelled.to_owned()), "twice: {line}");
            }
        }
        assert_eq!(families.len(), COUNTERS.len() + GAUGES.len() + 7);
    }

    #[test]
    fn values_are_where_they_belong() {
        let shown = text(&[sample(0, "/a.vhdx"), Sample { report: None, ..sample(9, "/gone.vhdx") }]);
        for line in [
            "vhdx_ublk_up{device=\"ublkb0\"} 1",
            "vhdx_ublk_up{device=\"ublkb9\"} 0",
            "vhdx_ublk_requests_total{device=\"ublkb0\",kind=\"read\"} 7",
            "vhdx_ublk_read_bytes_total{device=\"ublkb0\",layer=\"0\"} 2",
            "vhdx_ublk_wait_seconds_bucket{device=\"ublkb0\",for=\"space\",le=\"0.000016\"} 1",
            "vhdx_ublk_wait_seconds_bucket{device=\"ublkb0\",for=\"space\",le=\"0.000064\"} 2",
            "vhdx_ublk_wait_seconds_bucket{device=\"ublkb0\",for=\"space\",le=\"+Inf\"} 3",
            "vhdx_ublk_wait_seconds_count{device=\"ublkb0\",for=\"space\"} 3",
            "vhdx_ublk_wait_seconds_sum{device=\"ublkb0\",for=\"space\"} 1.500000",
        ] {
            assert!(shown.lines().any(|shown| shown == line), "{line}:\n{shown}");
        }
        assert!(!shown.contains("requests_total{device=\"ublkb9\""), "nothing is known of it");
    }

    #[test]
    fn a_name_makes_no_line_and_no_label_of_its_own() {
        let shown = text(&[sample(0, "/a\"} 1\nvhdx_ublk_up{device=\"x\\")]);
        let info = shown.lines().find(|line| line.starts_with("vhdx_ublk_device_info")).expect("there");
        assert!(info.contains(r#"image="/a\"} 1\\nvhdx_ublk_up{device=\"x\\",version="#), "{info}");
    }

    #[test]
    fn a_file_is_replaced_and_nothing_else_is() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("vhdx.prom");
        for text in ["old", "new"] {
            write(&path, text).expect("room");
            assert_eq!(fs::read_to_string(&path).expect("written"), text);
        }
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, FILE_MODE);
        let (link, target) = (folder.path().join("link"), folder.path().join("target"));
        fs::write(&target, "theirs").expect("room");
        std::os::unix::fs::symlink(&target, &link).expect("room");
        assert_eq!(write(&link, "x").expect_err("a link").kind(), Kind::Exists);
        assert!(write(folder.path(), "x").is_err() && write(Path::new("/dev/null"), "x").is_err());
        assert_eq!(fs::read_to_string(&target).expect("there"), "theirs");
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 3);
    }
}
