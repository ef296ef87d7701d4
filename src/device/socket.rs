//! The control socket of a device: `/run/vhdx-ublk/N.sock`, through which other processes talk to its daemon.
//!
//! Only root may use it: the folder is closed to others, and the daemon checks the peer's user. A connection
//! carries one line of JSON each way, with the protocol's version; an unknown version is refused by name.
//!
//! Invariants:
//!
//! * a connection does not delay the others: each has its own thread, up to `MAX_CLIENTS`;
//! * every connection ends: a line has a maximum length and a deadline, and the answer has a deadline;
//! * nothing is done for a caller that left before the decisive moment, see `Reply::claim`. What is done later is
//!   logged if the caller could not be answered.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, getsockopt, socket, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::confine::{self, Role};
use super::order::{Call, Snapped};
use super::path;
use super::reply::{is_connected, reply_to};
use super::wire::Failure;
use crate::error::{Doing, Error, Kind, Locate, Result};

/// The version of the protocol.
const VERSION: u32 = 1;

/// The longest line that is read, bytes: a path and a few words.
const MAX_LINE_BYTES: usize = 64 << 10;

/// Connections at a time: enough for people and scripts.
const MAX_CLIENTS: usize = 8;

/// How long the other side may take to send its whole line, or to read the answer.
const LINE_DEADLINE: Duration = Duration::from_secs(10);

/// How long a daemon may take to report its status, which is in memory.
const STATUS_DEADLINE: Duration = Duration::from_secs(1);

/// The pause before the next connection is accepted after that has failed: descriptors may be short.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// How long a command may take: it writes back dirty metadata and makes an image.
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
    /// Report the status of the device.
    Status,
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

/// Listens at `path` until the process ends: answers with `status`, and passes calls on to `pass_on`.
pub(super) fn listen(
    path: &Path,
    status: impl Fn() -> Status + Clone + Send + 'static,
    pass_on: impl Fn(Call) + Clone + Send + 'static,
) -> Result<()> {
    const FAILED: &str = "making the control socket";
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        removed => removed.doing(FAILED).file(path)?,
    }
    let listener = UnixListener::bind(path).doing(FAILED).file(path)?;
    let serve = move || {
        confine::become_(Role::Plain);
        let clients = Arc::new(());
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => accept(stream, &clients, (status.clone(), pass_on.clone())),
                Err(error) => {
                    tracing::warn!("the control socket: {error:#}");
                    thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    };
    thread::Builder::new().name("ublk-control".into()).spawn(serve).map(drop).doing(FAILED).file(path)
}

/// Serves a client on its own thread. Each thread holds one of `clients`.
fn accept(
    stream: UnixStream,
    clients: &Arc<()>,
    (status, pass_on): (impl Fn() -> Status + Send + 'static, impl Fn(Call) + Send + 'static),
) {
    if Arc::strong_count(clients) > MAX_CLIENTS {
        let message = format!("the daemon serves at most {MAX_CLIENTS} connections at a time");
        let busy = Error::new(Kind::InUse, message).remedy("try again when one of them has ended");
        // A new socket has room for one short line. A client that does not get it sees the connection end.
        let _ = write_line(&stream, &Answer::Error((&busy).into()));
        return;
    }
    let client = clients.clone();
    let serve = move || {
        if let Err(error) = serve_client(&stream, &status, &pass_on) {
            tracing::warn!("the control socket: {error:#}");
        }
        drop(client);
    };
    if let Err(error) = thread::Builder::new().name("ublk-client".into()).spawn(serve) {
        tracing::warn!("the control socket: {error:#}");
    }
}

fn serve_client(
    stream: &UnixStream,
    status: &impl Fn() -> Status,
    pass_on: &impl Fn(Call),
) -> io::Result<()> {
    stream.set_write_timeout(Some(LINE_DEADLINE))?;
    let written = match read_command(stream) {
        Ok(Command::Status) => write_answer(stream, json(&status())),
        Ok(Command::Snapshot { image }) => {
            snapshot_for(stream, image, pass_on);
            Ok(())
        }
        Err(error) => write_answer(stream, Err(error)),
    };
    // A caller that has left misses nothing.
    if is_connected(stream) { written } else { Ok(()) }
}

/// Takes a snapshot and answers. If the answer does not reach the caller, the log says what was done.
fn snapshot_for(stream: &UnixStream, image: PathBuf, pass_on: &impl Fn(Call)) {
    if !is_connected(stream) {
        tracing::warn!(
            "the caller that requested the snapshot {} has left: it is not taken",
            image.display()
        );
        return;
    }
    let outcome = take_snapshot(stream, image, pass_on);
    let done = outcome.as_ref().ok().cloned();
    let written = write_answer(stream, outcome.and_then(|snapped| json(&snapped)));
    if written.is_ok() && is_connected(stream) {
        return;
    }
    if let Some(snapped) = done {
        let (image, parent) = (snapped.image.display(), snapped.parent.display());
        tracing::warn!(
            "{image} is served now, and {parent} is its parent: the caller left before the answer"
        );
    }
}

fn take_snapshot(stream: &UnixStream, image: PathBuf, pass_on: &impl Fn(Call)) -> Result<Snapped> {
    let path = image.clone();
    let (reply, awaited) = reply_to(stream).doing("duplicating a descriptor")?;
    pass_on(Call { image, reply });
    let gone = |_| {
        Error::new(Kind::Io, "the device was removed, or did not answer in time")
            .remedy("`vhdx-ublk list` shows what is served")
    };
    match awaited.wait(ANSWER_DEADLINE) {
        Err(RecvTimeoutError::Timeout) if awaited.give_up() => {
            let seconds = ANSWER_DEADLINE.as_secs();
            let message = format!("the snapshot was not taken within {seconds} s and is given up");
            tracing::warn!("{}: {message}", path.display());
            Err(Error::new(Kind::Io, message)
                .remedy("look for the cause (the device's log, dmesg), then try again"))
        }
        // The engine has claimed it.
        Err(RecvTimeoutError::Timeout) => awaited.wait(ANSWER_DEADLINE).map_err(gone)?,
        answer => answer.map_err(gone)?,
    }
}

fn write_answer(stream: &UnixStream, outcome: Result<serde_json::Value>) -> io::Result<()> {
    write_line(stream, &outcome.map_or_else(|error| Answer::Error((&error).into()), Answer::Done))
}

fn json(answer: &impl Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(answer).doing("writing the answer")
}

fn read_command(stream: &UnixStream) -> Result<Command> {
    let peer = getsockopt(stream, sockopt::PeerCredentials).doing("reading the caller's user")?;
    if peer.uid() != 0 {
        return Err(Error::new(Kind::Permission, "only root may command a daemon"));
    }
    parse(&read_line(stream, LINE_DEADLINE)?)
}

fn parse(line: &str) -> Result<Command> {
    let unknown = |what: String| {
        Error::new(Kind::Unsupported, what).remedy("`vhdx-ublk list` shows the daemon's version")
    };
    let request: Request = serde_json::from_str(line)
        .map_err(|error| unknown(format!("the daemon does not understand: {error}")))?;
    if request.version != VERSION {
        let message = format!("the daemon understands version {VERSION}, not {}", request.version);
        return Err(unknown(message));
    }
    let command = serde_json::from_value(request.command)
        .map_err(|error| unknown(format!("the daemon does not know this command: {error}")))?;
    if let Command::Snapshot { image } = &command
        && (!image.is_absolute() || image.file_name().is_none())
    {
        let message =
            "the daemon needs the absolute path of a file, as its working directory is not the caller's";
        return Err(Error::new(Kind::Usage, message).file(image).remedy("give the whole path of the file"));
    }
    Ok(command)
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

/// Requests the status of its device from the daemon that listens at `path`.
///
/// # Errors
///
/// As [`snapshot`], within a second.
pub fn status(path: &Path) -> Result<Status> {
    send(path, &Command::Status, STATUS_DEADLINE)
}

fn send<T: DeserializeOwned>(path: &Path, command: &Command, patience: Duration) -> Result<T> {
    const FAILED: &str = "talking to the daemon";
    let stream = connect(path, patience).doing(FAILED).file(path)?;
    let command = serde_json::to_value(command).doing(FAILED)?;
    write_line(&stream, &Request { version: VERSION, command }).doing(FAILED).file(path)?;
    let answer = read_line(&stream, patience).file(path)?;
    if answer.is_empty() {
        return Err(Error::new(Kind::Io, "the daemon has ended without an answer").file(path));
    }
    match serde_json::from_str(&answer).doing(FAILED).file(path)? {
        Answer::Done(done) => serde_json::from_value(done).doing(FAILED).file(path),
        Answer::Error(failure) => Err(failure.into()),
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
    use super::*;

    fn snapshot() -> Command {
        Command::Snapshot { image: "/disks/new.vhdx".into() }
    }

    #[test]
    fn a_command_is_written_as_documented() {
        let line = r#"{"version":1,"command":{"snapshot":{"image":"/disks/new.vhdx"}}}"#;
        assert_eq!(parse(line).expect("understood"), snapshot());
        let refusal = |line: &str| parse(line).expect_err("not understood").to_string();
        assert!(refusal(&line.replace(":1", ":2")).contains("version 1, not 2"));
        assert!(refusal(&line.replace("snapshot", "dance")).contains("dance"));
        assert!(refusal("hello").contains("does not understand"));
        assert_eq!(parse(r#"{"version":1,"command":"status"}"#).expect("understood"), Command::Status);
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_not_waited_for() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("7.sock");
        let _silent = UnixListener::bind(&path).expect("free");
        assert!(status(&path).is_err());
    }

    #[test]
    fn a_path_that_does_not_begin_at_the_root_is_refused() {
        for path in ["new.vhdx", "", "./new.vhdx", "../new.vhdx", "/", "/disks/.."] {
            let line = format!(r#"{{"version":1,"command":{{"snapshot":{{"image":"{path}"}}}}}}"#);
            let error = parse(&line).expect_err("refused");
            assert!(error.to_string().contains("absolute path"), "{path}: {error}");
        }
    }

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

    #[test]
    fn a_silent_client_does_not_keep_others_from_being_served() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("7.sock");
        listen(&path, Status::default, |_| {}).expect("free");
        let connect = || UnixStream::connect(&path).expect("it listens");
        let mut silent: Vec<UnixStream> = (1..MAX_CLIENTS).map(|_| connect()).collect();
        let answered = status(&path);
        assert!(answered.is_ok() || answered.is_err_and(|error| error.kind() == Kind::Permission));
        // The thread of the client that was answered may not have ended yet: in the end there is one too
        // many.
        let until = Instant::now() + LINE_DEADLINE;
        while Instant::now() < until && silent.len() < 2 * MAX_CLIENTS {
            silent.push(connect());
        }
        let Err(error) = status(&path) else { panic!("refused") };
        // A caller that is not root is refused when its line is read, which makes room.
        if nix::unistd::geteuid().is_root() {
            assert_eq!(error.kind(), Kind::InUse, "{error}");
        }
    }

    #[test]
    fn commands_go_to_the_daemon_and_answers_come_back() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("7.sock");
        fs::write(&path, "left over").expect("writable");
        let degraded = Status { host_full: true, last_error: Some("no room".into()), ..Status::default() };
        let reported = degraded.clone();
        listen(
            &path,
            move || reported.clone(),
            |call: Call| {
                let refusal = Error::new(Kind::Exists, "no").file(&call.image);
                call.reply.send(Err(refusal));
            },
        )
        .expect("free");
        match status(&path) {
            Ok(status) => assert_eq!(status, degraded),
            Err(error) => assert_eq!(error.kind(), Kind::Permission, "{error}"),
        }
        let outcome = super::snapshot(&path, "/disks/new.vhdx".into());
        let Err(error) = outcome else { panic!("refused") };
        // A caller that is not root is refused before.
        let expected = if nix::unistd::geteuid().is_root() { Kind::Exists } else { Kind::Permission };
        assert_eq!(error.kind(), expected, "{error}");
    }
}
