//! The control socket of a device: `/run/vhdx-ublk/N.sock`, by which other processes talk to its daemon.
//!
//! Only root may: the folder is closed to others, and the daemon looks whom it talks to. One line of JSON each way
//! per connection, with the version of what is said; a version that is not known is refused by name.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, getsockopt, socket, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::path;
use super::snapshot::Snapped;
use super::wire::Failure;
use crate::error::{Error, Kind, Result};

/// What is said, and how.
const VERSION: u32 = 1;

/// The longest line that is listened to, bytes: a path and a few words.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// How long the other side may take to say its line.
const LINE_DEADLINE: Duration = Duration::from_secs(10);

/// How long a daemon may take to say how it is: it only looks.
const STATUS_DEADLINE: Duration = Duration::from_secs(1);

/// How long a command may take: it writes back what is dirty, and makes an image.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);

/// What may be asked of a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    /// Freeze the image as the parent of a new one, and serve that.
    Snapshot {
        /// Where the new image shall be: absolute.
        #[serde(with = "path::one")]
        image: PathBuf,
    },
    /// Tell how the device is.
    Status,
}

/// How a device is, as its daemon knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// A sync or a metadata write has failed: every write and flush fails.
    pub poisoned: bool,
    /// The host had no room for a write, and there has been none since.
    pub host_full: bool,
    /// The last error of the host, in words.
    pub last_error: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    version: u32,
    command: serde_json::Value,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Done(serde_json::Value),
    Error(Failure),
}

/// A snapshot that is asked for, and where the answer goes.
pub(super) struct Call {
    /// Where the new image shall be: absolute.
    pub(super) image: PathBuf,
    pub(super) answer: mpsc::Sender<Result<Snapped>>,
    /// Set by who asked when it gives up; if it is set already, it is being done.
    pub(super) decided: Arc<AtomicBool>,
}

/// Listens at `path` until the process ends, one connection after the other: tells `status`, and passes on what has
/// to be done.
pub(super) fn listen(
    path: &Path,
    status: impl Fn() -> Status + Send + 'static,
    pass_on: impl Fn(Call) + Send + 'static,
) -> Result<()> {
    let failed = |error| Error::io("making the control socket", error).file(path);
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let serve = move || {
        for stream in listener.incoming().flatten() {
            if let Err(error) = converse(&stream, &status, &pass_on) {
                tracing::warn!("the control socket: {error}");
            }
        }
    };
    thread::Builder::new().name("ublk-control".into()).spawn(serve).map(drop).map_err(failed)
}

fn converse(stream: &UnixStream, status: &impl Fn() -> Status, pass_on: &impl Fn(Call)) -> io::Result<()> {
    stream.set_read_timeout(Some(LINE_DEADLINE))?;
    stream.set_write_timeout(Some(LINE_DEADLINE))?;
    let answer = match hear(stream) {
        Ok(Command::Status) => json(&status()),
        Ok(Command::Snapshot { image }) => obey(image, pass_on).and_then(|done| json(&done)),
        Err(error) => Err(error),
    };
    let answer = answer.map_or_else(|error| Answer::Error((&error).into()), Answer::Done);
    say(stream, &answer)
}

fn hear(stream: &UnixStream) -> Result<Command> {
    let peer = getsockopt(stream, sockopt::PeerCredentials);
    let peer = peer.map_err(|errno| Error::io("looking who asks", errno.into()))?;
    if peer.uid() != 0 {
        return Err(Error::new(Kind::Permission, "only root may command a daemon"));
    }
    parse(&read_line(stream)?)
}

fn parse(line: &str) -> Result<Command> {
    let unknown = |what: String| {
        Error::new(Kind::Unsupported, what).remedy("`vhdx-ublk list` tells the daemon's version")
    };
    let request: Request = serde_json::from_str(line)
        .map_err(|error| unknown(format!("the daemon does not understand: {error}")))?;
    if request.version != VERSION {
        let message = format!("the daemon understands version {VERSION}, not {}", request.version);
        return Err(unknown(message));
    }
    serde_json::from_value(request.command)
        .map_err(|error| unknown(format!("the daemon does not know this command: {error}")))
}

fn json(answer: &impl Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(answer).map_err(|error| Error::io("writing the answer", error.into()))
}

fn obey(image: PathBuf, pass_on: &impl Fn(Call)) -> Result<Snapped> {
    let (answer, answered) = mpsc::channel();
    let decided = Arc::new(AtomicBool::new(false));
    pass_on(Call { image, answer, decided: decided.clone() });
    let gone = |_| {
        Error::new(Kind::Io, "the device was taken away, or did not answer in time")
            .remedy("`vhdx-ublk list` tells what is served")
    };
    match answered.recv_timeout(ANSWER_DEADLINE) {
        Err(RecvTimeoutError::Timeout) if decided.swap(true, Ordering::AcqRel) => {
            answered.recv_timeout(ANSWER_DEADLINE).map_err(gone)?
        }
        answer => answer.map_err(gone)?,
    }
}

fn read_line(stream: &UnixStream) -> Result<String> {
    let mut line = String::new();
    let read = BufReader::new(stream.take(MAX_LINE_BYTES)).read_line(&mut line);
    read.map_err(|error| Error::io("listening at the control socket", error))?;
    Ok(line)
}

fn say(mut stream: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_string(message)?;
    line.push('\n');
    stream.write_all(line.as_bytes())
}

/// Asks the daemon that listens at `path` for a snapshot, and waits until it is taken.
///
/// # Errors
///
/// What the daemon says; [`Kind::Io`] if it does not listen, or not answer.
pub fn snapshot(path: &Path, image: PathBuf) -> Result<Snapped> {
    ask(path, &Command::Snapshot { image }, 2 * ANSWER_DEADLINE + LINE_DEADLINE)
}

/// Asks the daemon that listens at `path` how its device is.
///
/// # Errors
///
/// As [`snapshot`], in a second.
pub fn status(path: &Path) -> Result<Status> {
    ask(path, &Command::Status, STATUS_DEADLINE)
}

fn ask<T: DeserializeOwned>(path: &Path, command: &Command, patience: Duration) -> Result<T> {
    let failed = |error| Error::io("asking the daemon", error).file(path);
    let stream = connect(path, patience).map_err(failed)?;
    let command = serde_json::to_value(command).map_err(|error| failed(error.into()))?;
    say(&stream, &Request { version: VERSION, command }).map_err(failed)?;
    match serde_json::from_str(&read_line(&stream)?).map_err(|error| failed(error.into()))? {
        Answer::Done(done) => serde_json::from_value(done).map_err(|error| failed(error.into())),
        Answer::Error(failure) => Err(failure.into()),
    }
}

/// A connection on which nothing waits longer than `patience`, not even for a daemon that takes no more of them.
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
    use super::*;

    fn snapshot() -> Command {
        Command::Snapshot { image: "/disks/new.vhdx".into() }
    }

    #[test]
    fn a_command_is_said_as_documented() {
        let line = r#"{"version":1,"command":{"snapshot":{"image":"/disks/new.vhdx"}}}"#;
        assert_eq!(parse(line).expect("understood"), snapshot());
        let refusal = |line: &str| parse(line).expect_err("not understood").to_string();
        assert!(refusal(&line.replace(":1", ":2")).contains("version 1, not 2"));
        assert!(refusal(&line.replace("snapshot", "dance")).contains("dance"));
        assert!(refusal("hello").contains("does not understand"));
        assert_eq!(parse(r#"{"version":1,"command":"status"}"#).expect("understood"), Command::Status);
    }

    #[test]
    fn a_daemon_that_does_not_answer_keeps_nobody_waiting() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("7.sock");
        let _deaf = UnixListener::bind(&path).expect("free");
        assert!(status(&path).is_err());
    }

    #[test]
    fn commands_go_to_the_daemon_and_answers_come_back() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("7.sock");
        fs::write(&path, "left over").expect("writable");
        let ill = Status { host_full: true, last_error: Some("no room".into()), ..Status::default() };
        let told = ill.clone();
        listen(
            &path,
            move || told.clone(),
            |call| {
                call.answer
                    .send(Err(Error::new(Kind::Exists, "no").file(&call.image)))
                    .expect("somebody waits");
            },
        )
        .expect("free");
        match status(&path) {
            Ok(status) => assert_eq!(status, ill),
            Err(error) => assert_eq!(error.kind(), Kind::Permission, "{error}"),
        }
        let outcome = super::snapshot(&path, "/disks/new.vhdx".into());
        let Err(error) = outcome else { panic!("refused") };
        // Who is not root is refused before.
        let expected = if nix::unistd::geteuid().is_root() { Kind::Exists } else { Kind::Permission };
        assert_eq!(error.kind(), expected, "{error}");
    }
}
