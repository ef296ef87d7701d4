//! The control socket of a device: `/run/vhdx-ublk/N.sock`, by which other processes talk to its daemon.
//!
//! Only root may: the folder is closed to others, and the daemon looks whom it talks to. One line of JSON each way
//! per connection, with the version of what is said; a version that is not known is refused by name.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use serde::{Deserialize, Serialize};

use super::snapshot::Snapped;
use super::wire::Failure;
use crate::error::{Error, Kind, Result};

/// What is said, and how.
const VERSION: u32 = 1;

/// The longest line that is listened to, bytes: a path and a few words.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// How long the other side may take to say its line.
const LINE_DEADLINE: Duration = Duration::from_secs(10);

/// How long a command may take: it writes back what is dirty, and makes an image.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);

/// What may be asked of a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    /// Freeze the image as the parent of a new one, and serve that.
    Snapshot {
        /// Where the new image shall be: absolute.
        image: PathBuf,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    version: u32,
    command: serde_json::Value,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Done(Snapped),
    Error(Failure),
}

/// A command that has come, and where its answer goes.
pub(super) struct Call {
    pub(super) command: Command,
    pub(super) answer: mpsc::Sender<Result<Snapped>>,
    /// Set by who asked when it gives up; if it is set already, it is being done.
    pub(super) decided: Arc<AtomicBool>,
}

/// Listens at `path` and passes on what comes, one connection after the other, until the process ends.
pub(super) fn listen(path: &Path, pass_on: impl Fn(Call) + Send + 'static) -> Result<()> {
    let failed = |error| Error::io("making the control socket", error).file(path);
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let serve = move || {
        for stream in listener.incoming().flatten() {
            if let Err(error) = converse(&stream, &pass_on) {
                tracing::warn!("the control socket: {error}");
            }
        }
    };
    thread::Builder::new().name("ublk-control".into()).spawn(serve).map(drop).map_err(failed)
}

fn converse(stream: &UnixStream, pass_on: &impl Fn(Call)) -> io::Result<()> {
    stream.set_read_timeout(Some(LINE_DEADLINE))?;
    stream.set_write_timeout(Some(LINE_DEADLINE))?;
    let answer = match hear(stream) {
        Ok(command) => obey(command, pass_on),
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

fn obey(command: Command, pass_on: &impl Fn(Call)) -> Result<Snapped> {
    let (answer, answered) = mpsc::channel();
    let decided = Arc::new(AtomicBool::new(false));
    pass_on(Call { command, answer, decided: decided.clone() });
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

/// Asks the daemon that listens at `path` to do `command`, and waits until it has.
///
/// # Errors
///
/// What the daemon says; [`Kind::Io`] if it does not listen, or not answer.
pub fn ask(path: &Path, command: &Command) -> Result<Snapped> {
    let failed = |error| Error::io("asking the daemon", error).file(path);
    let stream = UnixStream::connect(path).map_err(failed)?;
    stream.set_read_timeout(Some(2 * ANSWER_DEADLINE + LINE_DEADLINE)).map_err(failed)?;
    let command = serde_json::to_value(command).map_err(|error| failed(error.into()))?;
    say(&stream, &Request { version: VERSION, command }).map_err(failed)?;
    match serde_json::from_str(&read_line(&stream)?).map_err(|error| failed(error.into()))? {
        Answer::Done(done) => Ok(done),
        Answer::Error(failure) => Err(failure.into()),
    }
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
    }

    #[test]
    fn commands_go_to_the_daemon_and_answers_come_back() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("7.sock");
        fs::write(&path, "left over").expect("writable");
        listen(&path, |call| {
            let Command::Snapshot { image } = call.command;
            call.answer.send(Err(Error::new(Kind::Exists, "no").file(&image))).expect("somebody waits");
        })
        .expect("free");
        let outcome = ask(&path, &snapshot());
        let Err(error) = outcome else { panic!("refused") };
        // Who is not root is refused before.
        let expected = if nix::unistd::geteuid().is_root() { Kind::Exists } else { Kind::Permission };
        assert_eq!(error.kind(), expected, "{error}");
    }
}
