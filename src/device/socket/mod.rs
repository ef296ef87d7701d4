//! The control socket of a device: `/run/vhdx-ublk/N.sock`, through which other processes talk to its daemon.
//!
//! Only root may use it: the folder is closed to others, and the daemon checks the peer's user. A connection
//! carries one line of JSON each way, with the protocol's version; an unknown version is refused by name.
//! Before the answer of a job that takes long, lines say how far it is, one a second.
//!
//! Invariants:
//!
//! * a connection does not delay the others: each has its own thread, up to `MAX_CLIENTS`;
//! * every connection ends: a line has a maximum length and a deadline, and so has the answer, or the next
//!   line of a job's progress;
//! * nothing is done for a caller that left before the decisive moment, see `Reply::claim`. What is done
//!   later is logged if the caller could not be answered.

mod client;
mod server;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use client::{compact, grow, merge, report, snapshot, status};
pub(super) use client::{end_waits, hand_over};
pub(super) use server::listen;

use super::job::Progress;
use super::order::Sizes;
use super::path;
use super::stats::Stats;
use super::warnings::Warning;
use super::wire::Failure;
use crate::disk::HostFile;
use crate::engine::port_counts::Shortage;
use crate::error::{Doing, Error, Kind, Result};

/// The version of the protocol.
pub(super) const VERSION: u32 = 1;

/// The longest line that is read, bytes: a path and a few words.
const MAX_LINE_BYTES: usize = 64 << 10;

/// How long the other side may take to send its whole line, or to read the answer.
const LINE_DEADLINE: Duration = Duration::from_secs(10);

/// The time between two lines that say how far a job is.
const PROGRESS_PERIOD: Duration = Duration::from_secs(1);

/// How long a command may take that is no job: it writes back dirty metadata and makes an image.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);

/// A command to a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    /// Freeze the image as the parent of a new one, and serve the new one.
    Snapshot {
        /// The path of the new image: absolute.
        #[serde(with = "path::one")]
        image: PathBuf,
    },
    /// Make the disk larger.
    Grow(Sizes),
    /// Merge a layer of the chain into its parent. It ends early when the caller leaves.
    Merge {
        /// The file of the layer.
        layer: HostFile,
    },
    /// Make the file of the image shorter.
    Compact {
        /// The most bytes that are copied in a second, if the caller has a limit.
        #[serde(default)]
        max_rate: Option<u64>,
        /// Whether to stop when the caller closes its end, or sends nothing more.
        #[serde(default)]
        stop_on_disconnect: bool,
    },
    /// End, and leave the device to the caller, which has its image open.
    HandOver {
        /// That image: the daemon refuses if it serves another one by now.
        image_file: HostFile,
    },
    /// Have requests fail that wait for room, now and from now on: the device is about to be stopped.
    EndWaits,
    /// Report the status of the device.
    Status,
    /// Report what the device has done.
    Stats,
}

/// The status of a device, as its daemon knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// A sync or a metadata write has failed: every write and flush fails.
    pub poisoned: bool,
    /// The host had no room for a write, and there has been none since.
    pub host_full: bool,
    /// The last error of the host, as text.
    pub last_error: Option<String>,
    /// The last warning of the daemon.
    #[serde(default)]
    pub last_warning: Option<Warning>,
    /// What it does on its image beside serving it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<Progress>,
    /// The daemon is handing its device over, and ends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
    /// The requests that wait until the host has room, if any do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_of_room: Option<Shortage>,
}

/// What a daemon knows of its device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How the device is.
    #[serde(flatten)]
    pub status: Status,
    /// What it has done.
    #[serde(flatten)]
    pub stats: Stats,
}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    version: u32,
    command: serde_json::Value,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    /// The job has come so far.
    Progress(Progress),
    Done(serde_json::Value),
    Error(Failure),
}

/// Reads a line, up to its end or the end of the stream.
fn read_line(mut stream: &UnixStream, deadline: Duration) -> Result<String> {
    let until = Instant::now() + deadline;
    let (mut line, mut part) = (Vec::new(), [0; 4096]);
    while !line.contains(&b'\n') {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let message = format!("the other side has not sent a whole line within {} s", deadline.as_secs());
            return Err(Error::new(Kind::Io, message));
        }
        stream.set_read_timeout(Some(left)).doing("reading from the control socket")?;
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(count) => line.extend_from_slice(&part[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error).doing("reading from the control socket"),
        }
        if line.len() > MAX_LINE_BYTES {
            let message = format!("the line is longer than {MAX_LINE_BYTES} bytes");
            return Err(Error::new(Kind::Usage, message).remedy("use a shorter path"));
        }
    }
    String::from_utf8(line).map_err(|_| Error::new(Kind::Usage, "the line is not UTF-8"))
}

fn write_line(mut stream: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_string(message)?;
    line.push('\n');
    stream.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_line_has_an_end_a_length_and_a_deadline() {
        let pair = || UnixStream::pair().expect("a pair of sockets");
        let read = |stream: &UnixStream, deadline| read_line(stream, deadline);
        let (mut near, far) = pair();
        near.write_all(b"sent\n and more").expect("room");
        assert!(read(&far, LINE_DEADLINE).expect("a line").starts_with("sent\n"));
        drop(near);
        assert_eq!(read(&far, LINE_DEADLINE).expect("the end of the stream"), "");
        let (mut near, far) = pair();
        let writer = thread::spawn(move || near.write_all(&vec![b'x'; 2 * MAX_LINE_BYTES]));
        assert!(read(&far, LINE_DEADLINE).expect_err("too long").to_string().contains("longer"));
        drop(far);
        let _ = writer.join().expect("it does not panic");
        // A byte now and then does not extend the deadline.
        let (mut near, far) = pair();
        let dripping = thread::spawn(move || {
            while near.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(10));
            }
        });
        let error = read(&far, Duration::from_millis(200)).expect_err("no line");
        assert!(error.to_string().contains("has not sent a whole line"), "{error}");
        drop(far);
        dripping.join().expect("it does not panic");
    }
}
