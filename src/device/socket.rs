//! The control socket of a device: `/run/vhdx-ublk/N.sock`, by which other processes talk to its daemon.
//!
//! Only root may: the folder is closed to others, and the daemon looks whom it talks to. One line of JSON each way
//! per connection, with the version of what is said; a version that is not known is refused by name.
//!
//! Invariants:
//!
//! * a connection keeps nobody else from talking: each has a thread of its own, up to `MAX_CLIENTS`;
//! * it ends: a line has a length and a deadline, and so has the answer;
//! * nothing is done for a caller that has left before the decisive moment, see `Caller::claim`. What is done
//!   afterwards is in the log if the caller could not be told.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, getsockopt, socket, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::confine::{self, Role};
use super::order::{Call, Caller, Snapped};
use super::path;
use super::wire::Failure;
use crate::error::{Error, Kind, Result};

/// What is said, and how.
const VERSION: u32 = 1;

/// The longest line that is listened to, bytes: a path and a few words.
const MAX_LINE_BYTES: usize = 64 << 10;

/// Connections that are listened to at a time: people and scripts, not crowds.
const MAX_CLIENTS: usize = 8;

/// How long the other side may take to say its whole line, or to read the answer.
const LINE_DEADLINE: Duration = Duration::from_secs(10);

/// How long a daemon may take to say how it is: it only looks.
const STATUS_DEADLINE: Duration = Duration::from_secs(1);

/// How long to wait before another connection is accepted when that has failed: descriptors may be short.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

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

/// Listens at `path` until the process ends: tells `status`, and passes on what has to be done.
pub(super) fn listen(
    path: &Path,
    status: impl Fn() -> Status + Clone + Send + 'static,
    pass_on: impl Fn(Call) + Clone + Send + 'static,
) -> Result<()> {
    let failed = |error| Error::io("making the control socket", error).file(path);
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let serve = move || {
        confine::become_(Role::Plain);
        let clients = Arc::new(());
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => attend(stream, &clients, (status.clone(), pass_on.clone())),
                Err(error) => {
                    tracing::warn!("the control socket: {error:#}");
                    thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    };
    thread::Builder::new().name("ublk-control".into()).spawn(serve).map(drop).map_err(failed)
}

/// Talks to a client on a thread of its own. Each thread has one of `clients`.
fn attend(
    stream: UnixStream,
    clients: &Arc<()>,
    (status, pass_on): (impl Fn() -> Status + Send + 'static, impl Fn(Call) + Send + 'static),
) {
    if Arc::strong_count(clients) > MAX_CLIENTS {
        let message = format!("the daemon listens to {MAX_CLIENTS} connections at a time, and has as many");
        let busy = Error::new(Kind::InUse, message).remedy("try again when one of them has ended");
        // There is room for one short line in a fresh socket; who does not get it sees the connection end.
        let _ = say(&stream, &Answer::Error((&busy).into()));
        return;
    }
    let client = clients.clone();
    let talk = move || {
        if let Err(error) = converse(&stream, &status, &pass_on) {
            tracing::warn!("the control socket: {error:#}");
        }
        drop(client);
    };
    if let Err(error) = thread::Builder::new().name("ublk-client".into()).spawn(talk) {
        tracing::warn!("the control socket: {error:#}");
    }
}

fn converse(stream: &UnixStream, status: &impl Fn() -> Status, pass_on: &impl Fn(Call)) -> io::Result<()> {
    stream.set_write_timeout(Some(LINE_DEADLINE))?;
    let caller = Arc::new(Caller::of(stream)?);
    let told = match hear(stream) {
        Ok(Command::Status) => answer(stream, json(&status())),
        Ok(Command::Snapshot { image }) => {
            snap(stream, image, &caller, pass_on);
            Ok(())
        }
        Err(error) => answer(stream, Err(error)),
    };
    // A caller that has left misses nothing.
    if caller.is_there() { told } else { Ok(()) }
}

/// Takes the snapshot and tells; where there is nobody to be told, the log says what was done.
fn snap(stream: &UnixStream, image: PathBuf, caller: &Arc<Caller>, pass_on: &impl Fn(Call)) {
    if !caller.is_there() {
        tracing::warn!("who asked for the snapshot {} has left, and it is not taken", image.display());
        return;
    }
    let outcome = obey(image, caller, pass_on);
    let done = outcome.as_ref().ok().cloned();
    let told = answer(stream, outcome.and_then(|snapped| json(&snapped)));
    if told.is_ok() && caller.is_there() {
        return;
    }
    if let Some(snapped) = done {
        let (image, parent) = (snapped.image.display(), snapped.parent.display());
        tracing::warn!(
            "{image} is served now, and {parent} is its parent: who asked for it left before it was told"
        );
    }
}

fn answer(stream: &UnixStream, outcome: Result<serde_json::Value>) -> io::Result<()> {
    say(stream, &outcome.map_or_else(|error| Answer::Error((&error).into()), Answer::Done))
}

fn json(answer: &impl Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(answer).map_err(|error| Error::io("writing the answer", error.into()))
}

fn hear(stream: &UnixStream) -> Result<Command> {
    let peer = getsockopt(stream, sockopt::PeerCredentials);
    let peer = peer.map_err(|errno| Error::io("looking who asks", errno.into()))?;
    if peer.uid() != 0 {
        return Err(Error::new(Kind::Permission, "only root may command a daemon"));
    }
    parse(&read_line(stream, LINE_DEADLINE)?)
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
    let command = serde_json::from_value(request.command)
        .map_err(|error| unknown(format!("the daemon does not know this command: {error}")))?;
    if let Command::Snapshot { image } = &command
        && (!image.is_absolute() || image.file_name().is_none())
    {
        let message = "the daemon needs a path from the root, to a file: it has another folder than who asks";
        return Err(Error::new(Kind::Usage, message).file(image).remedy("name the file by its whole path"));
    }
    Ok(command)
}

fn obey(image: PathBuf, caller: &Arc<Caller>, pass_on: &impl Fn(Call)) -> Result<Snapped> {
    let (answer, answered) = mpsc::channel();
    let path = image.clone();
    pass_on(Call { image, answer, caller: caller.clone() });
    let gone = |_| {
        Error::new(Kind::Io, "the device was taken away, or did not answer in time")
            .remedy("`vhdx-ublk list` tells what is served")
    };
    match answered.recv_timeout(ANSWER_DEADLINE) {
        Err(RecvTimeoutError::Timeout) if caller.give_up() => {
            let seconds = ANSWER_DEADLINE.as_secs();
            let message = format!("it has taken more than {seconds} s, and is not done");
            tracing::warn!("the snapshot {}: {message}", path.display());
            Err(Error::new(Kind::Io, message).remedy("look why (the device's log, dmesg), then try again"))
        }
        // It is being done.
        Err(RecvTimeoutError::Timeout) => answered.recv_timeout(ANSWER_DEADLINE).map_err(gone)?,
        answer => answer.map_err(gone)?,
    }
}

/// Reads a line, up to its end or the end of what is said.
fn read_line(mut stream: &UnixStream, deadline: Duration) -> Result<String> {
    let until = Instant::now() + deadline;
    let failed = |error| Error::io("listening at the control socket", error);
    let (mut line, mut part) = (Vec::new(), [0; 4096]);
    while !line.contains(&b'\n') {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let message = format!("the other side has not said its line within {} s", deadline.as_secs());
            return Err(Error::new(Kind::Io, message));
        }
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(count) => line.extend_from_slice(&part[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(failed(error)),
        }
        if line.len() > MAX_LINE_BYTES {
            let message = format!("the line is longer than {MAX_LINE_BYTES} bytes");
            return Err(Error::new(Kind::Usage, message).remedy("name a shorter path"));
        }
    }
    String::from_utf8(line).map_err(|_| Error::new(Kind::Usage, "the line is not UTF-8"))
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
/// What the daemon says; [`Kind::Io`] if it does not listen, or not answer. A daemon that has not answered does not
/// take it once this has returned, unless it is at it: its log tells, and the device's entry.
pub fn snapshot(path: &Path, image: PathBuf) -> Result<Snapped> {
    let snapped = ask(path, &Command::Snapshot { image }, 2 * ANSWER_DEADLINE + LINE_DEADLINE);
    snapped.map_err(|error| match error.kind() {
        Kind::Io if error.remedy_text().is_none() => error.remedy(
            "`vhdx-ublk list` tells which image is served now, and the log beside the socket what was done",
        ),
        _ => error,
    })
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
    let answer = read_line(&stream, patience).map_err(|error| error.file(path))?;
    if answer.is_empty() {
        return Err(Error::new(Kind::Io, "the daemon has ended without an answer").file(path));
    }
    match serde_json::from_str(&answer).map_err(|error| failed(error.into()))? {
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
    fn a_path_that_does_not_begin_at_the_root_is_refused() {
        for path in ["new.vhdx", "", "./new.vhdx", "../new.vhdx", "/", "/disks/.."] {
            let line = format!(r#"{{"version":1,"command":{{"snapshot":{{"image":"{path}"}}}}}}"#);
            let error = parse(&line).expect_err("refused");
            assert!(error.to_string().contains("from the root"), "{path}: {error}");
        }
    }

    #[test]
    fn a_line_has_an_end_a_length_and_a_deadline() {
        let pair = || UnixStream::pair().expect("a pair of sockets");
        let read = |stream: &UnixStream, deadline| read_line(stream, deadline);
        let (mut near, far) = pair();
        near.write_all(b"said\n and more").expect("room");
        assert!(read(&far, LINE_DEADLINE).expect("a line").starts_with("said\n"));
        drop(near);
        assert_eq!(read(&far, LINE_DEADLINE).expect("the end of what is said"), "");
        let (mut near, far) = pair();
        let writer = thread::spawn(move || near.write_all(&vec![b'x'; 2 * MAX_LINE_BYTES]));
        assert!(read(&far, LINE_DEADLINE).expect_err("too long").to_string().contains("longer"));
        drop(far);
        let _ = writer.join().expect("it does not panic");
        // A byte now and then does not prolong it.
        let (mut near, far) = pair();
        let dripping = thread::spawn(move || {
            while near.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(10));
            }
        });
        let error = read(&far, Duration::from_millis(200)).expect_err("no line");
        assert!(error.to_string().contains("has not said its line"), "{error}");
        drop(far);
        dripping.join().expect("it does not panic");
    }

    #[test]
    fn nothing_is_done_for_a_caller_that_has_left() {
        let caller = |stream: &UnixStream| Caller::of(stream).expect("another descriptor");
        let (near, far) = UnixStream::pair().expect("a pair of sockets");
        assert!(caller(&far).claim(), "it waits");
        near.shutdown(std::net::Shutdown::Write).expect("open");
        assert!(caller(&far).claim(), "it has said all, and still waits");
        let given_up = caller(&far);
        assert!(given_up.give_up() && !given_up.claim(), "it took too long");
        let being_done = caller(&far);
        assert!(being_done.claim() && !being_done.give_up(), "too late to give it up");
        let left = caller(&far);
        drop(near);
        assert!(!left.claim() && !left.is_there());
    }

    #[test]
    fn a_client_that_says_nothing_keeps_no_other_from_being_heard() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("7.sock");
        listen(&path, Status::default, |_| {}).expect("free");
        let connect = || UnixStream::connect(&path).expect("it listens");
        let mut silent: Vec<UnixStream> = (1..MAX_CLIENTS).map(|_| connect()).collect();
        let heard = status(&path);
        assert!(heard.is_ok() || heard.is_err_and(|error| error.kind() == Kind::Permission));
        // The thread of the one that was heard may not have ended yet: in the end there is one too many.
        let until = Instant::now() + LINE_DEADLINE;
        while Instant::now() < until && silent.len() < 2 * MAX_CLIENTS {
            silent.push(connect());
        }
        let Err(error) = status(&path) else { panic!("refused") };
        // Who is not root is refused as soon as it is heard, and makes room by that.
        if nix::unistd::geteuid().is_root() {
            assert_eq!(error.kind(), Kind::InUse, "{error}");
        }
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
            |call: Call| {
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
