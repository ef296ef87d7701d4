//! The side of other processes.

use std::io::{self, BufRead, BufReader};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};
use serde::de::DeserializeOwned;

use super::{
    ANSWER_DEADLINE, Answer, Command, LINE_DEADLINE, PROGRESS_PERIOD, Report, Request, Status, VERSION,
    read_line, write_line,
};
use crate::device::job::Progress;
use crate::device::order::{Grown, HandedOver, Merged, Shortened, Sizes, Snapped};
use crate::disk::HostFile;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::machine;
use crate::operations::Watch;

/// How long a daemon may take to report its status, which is in memory.
const STATUS_DEADLINE: Duration = Duration::from_secs(1);

/// Requests a snapshot from the daemon that listens at `path`, and waits until it is taken.
///
/// # Errors
///
/// The daemon's; [`Kind::Io`] if it does not listen or does not answer. Once this has returned, a daemon that
/// has not answered takes the snapshot only if it had already claimed it: its log and the device's entry show
/// that.
pub fn snapshot(path: &Path, image: PathBuf) -> Result<Snapped> {
    let snapped = send(path, &Command::Snapshot { image }, 2 * ANSWER_DEADLINE + LINE_DEADLINE);
    snapped.map_err(|error| match error.kind() {
        Kind::Io if error.remedy_text().is_none() => error.remedy(
            "`vhdx-ublk list` shows which image is served now, and the log beside the socket what was done",
        ),
        _ => error,
    })
}

/// Has the daemon that listens at `path` make its disk larger, and waits until the kernel shows it so.
///
/// # Errors
///
/// As [`snapshot`].
pub fn grow(path: &Path, sizes: Sizes) -> Result<Grown> {
    let grown = send(path, &Command::Grow(sizes), 2 * ANSWER_DEADLINE + LINE_DEADLINE);
    grown.map_err(|error| match error.kind() {
        Kind::Io if error.remedy_text().is_none() => error.remedy(
            "`vhdx-ublk list` shows the size of the disk, and the log beside the socket what was done",
        ),
        _ => error,
    })
}

/// Has the daemon that listens at `path` merge the `layer` of its chain, and waits until that has ended.
/// `watch` sees how far it is, and may stop it.
///
/// # Errors
///
/// The daemon's; [`Kind::Io`] if it does not listen, or has ended.
pub fn merge(path: &Path, layer: HostFile, watch: &impl Watch) -> Result<Merged> {
    let merged = work(path, &Command::Merge { layer }, watch);
    merged.map_err(|error| match error.kind() {
        Kind::Io if error.remedy_text().is_none() => {
            error.remedy("`vhdx-ublk list` shows how the device is; the same command continues the merge")
        }
        _ => error,
    })
}

/// Has the daemon that listens at `path` make the file of its image shorter, and shows `watch` how far that
/// is.
///
/// # Errors
///
/// As [`snapshot`].
pub fn compact(path: &Path, max_rate: Option<u64>, watch: &impl Watch) -> Result<Shortened> {
    work(path, &Command::Compact { max_rate, stop_on_disconnect: true }, watch)
}

/// Has the daemon that listens at `path` end, and leave its device to this process, which has the image
/// `image_file` open.
///
/// # Errors
///
/// The daemon's: it continues; [`Kind::Io`] if it does not listen or does not answer, as when it has ended
/// before its answer was written.
pub(in crate::device) fn hand_over(path: &Path, image_file: HostFile) -> Result<HandedOver> {
    send(path, &Command::HandOver { image_file }, ANSWER_DEADLINE)
}

/// Has the daemon that listens at `path` fail the requests that wait for room, now and from now on. How many
/// there are.
///
/// # Errors
///
/// As [`snapshot`].
pub(in crate::device) fn end_waits(path: &Path) -> Result<u64> {
    send(path, &Command::EndWaits, LINE_DEADLINE)
}

/// Requests the status of its device from the daemon that listens at `path`.
///
/// # Errors
///
/// As [`snapshot`], within a second.
pub fn status(path: &Path) -> Result<Status> {
    send(path, &Command::Status, STATUS_DEADLINE)
}

/// Requests the status of its device, and what it has done, from the daemon that listens at `path`.
///
/// # Errors
///
/// As [`status`]; [`Kind::Unsupported`] from a daemon of a version that does not count.
pub fn report(path: &Path) -> Result<Report> {
    send(path, &Command::Stats, STATUS_DEADLINE)
}

fn send<T: DeserializeOwned>(path: &Path, command: &Command, patience: Duration) -> Result<T> {
    const FAILED: &str = "talking to the daemon";
    let stream = connect(path, patience).doing(FAILED).file(path)?;
    let command = serde_json::to_value(command).doing(FAILED)?;
    let written = write_line(&stream, &Request { version: VERSION, command });
    // A daemon that refuses a caller may close before the line is written, and has answered all the same.
    let read = read_line(&stream, patience).file(path);
    machine::turn("hears of the daemon");
    let answer = match read {
        Ok(answer) if !answer.is_empty() => answer,
        nothing => {
            written.doing(FAILED).file(path)?;
            nothing?;
            return Err(Error::new(Kind::Io, "the daemon has ended without an answer").file(path));
        }
    };
    match serde_json::from_str(&answer).doing(FAILED).file(path)? {
        Answer::Done(done) => serde_json::from_value(done).doing(FAILED).file(path),
        Answer::Error(failure) => Err(failure.into()),
        Answer::Progress(_) => {
            Err(Error::new(Kind::Io, "the daemon has told of a job, and was asked for none"))
        }
    }
}

/// Has the daemon that listens at `path` do the job of `command`, and shows `watch` how far it is. If `watch`
/// wants it to stop, the daemon learns that nothing more is sent, and answers what was done until then.
fn work<T: DeserializeOwned>(path: &Path, command: &Command, watch: &impl Watch) -> Result<T> {
    const FAILED: &str = "talking to the daemon";
    // Of what takes it so long, the daemon would have told.
    let stream = connect(path, LINE_DEADLINE + PROGRESS_PERIOD).doing(FAILED).file(path)?;
    let command = serde_json::to_value(command).doing(FAILED)?;
    let written = write_line(&stream, &Request { version: VERSION, command });
    let (mut lines, mut line) = (BufReader::new(&stream), String::new());
    loop {
        line.clear();
        if lines.read_line(&mut line).doing(FAILED).file(path)? == 0 {
            written.doing(FAILED).file(path)?;
            return Err(Error::new(Kind::Io, "the daemon has ended without an answer").file(path));
        }
        match serde_json::from_str(&line).doing(FAILED).file(path)? {
            Answer::Done(done) => return serde_json::from_value(done).doing(FAILED).file(path),
            Answer::Error(failure) => return Err(failure.into()),
            Answer::Progress(Progress { done_bytes, total_bytes, .. }) => {
                watch.progress(done_bytes.min(total_bytes), total_bytes);
            }
        }
        if watch.stop_requested() {
            stream.shutdown(Shutdown::Write).doing(FAILED).file(path)?;
        }
    }
}

/// A connection on which nothing waits longer than `patience`, not even for a daemon that accepts no more
/// clients.
fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let stream = UnixStream::from(socket);
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    nix::sys::socket::connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Wants to stop once it has seen progress.
    #[derive(Default)]
    struct Impatient(std::cell::Cell<Option<(u64, u64)>>);

    impl Watch for Impatient {
        fn progress(&self, done: u64, total: u64) {
            self.0.set(Some((done, total)));
        }

        fn stop_requested(&self) -> bool {
            self.0.get().is_some()
        }
    }

    #[test]
    fn who_wants_a_job_to_stop_sends_no_more_and_gets_the_answer() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("7.sock");
        let listener = UnixListener::bind(&path).expect("free");
        let daemon = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a caller");
            let mut lines = BufReader::new(&stream).lines();
            let request = lines.next().expect("a request").expect("a line");
            let progress = r#"{"progress":{"job":"compact","done_bytes":5,"total_bytes":7,"file_bytes":9}}"#;
            writeln!(&stream, "{progress}").expect("it is read");
            assert!(lines.next().is_none(), "it sends no more");
            writeln!(&stream, r#"{{"done":8}}"#).expect("it is read");
            request
        });
        let watch = Impatient::default();
        let done: u64 = work(&path, &Command::Status, &watch).expect("it answers");
        assert_eq!((done, watch.0.get()), (8, Some((5, 7))));
        assert_eq!(daemon.join().expect("it does not panic"), r#"{"version":1,"command":"status"}"#);
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_not_waited_for() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("7.sock");
        let _silent = UnixListener::bind(&path).expect("free");
        assert!(status(&path).is_err());
    }
}
