//! The daemon's side of the control socket.

use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use serde::Serialize;

use super::{
    ANSWER_DEADLINE, Answer, Command, LINE_DEADLINE, PROGRESS_PERIOD, Report, Request, VERSION, read_line,
    write_line,
};
use crate::device::confine::{self, Role};
use crate::device::job::{Job, JobKind, Stop};
use crate::device::order::Call;
use crate::device::reply::{Reply, has_left, is_connected, reply_to};
use crate::error::{Doing, Error, Kind, Locate, Result};

/// Connections at a time: enough for people and scripts.
const MAX_CLIENTS: usize = 8;

/// The pause before the next connection is accepted after that has failed: descriptors may be short.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Listens at `path` until the process ends: answers with `report`, and passes calls on to `pass_on`.
pub(in crate::device) fn listen(
    path: &Path,
    report: impl Fn() -> Report + Clone + Send + 'static,
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
                Ok(stream) => accept(stream, &clients, (report.clone(), pass_on.clone())),
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
    (report, pass_on): (impl Fn() -> Report + Send + 'static, impl Fn(Call) + Send + 'static),
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
        if let Err(error) = serve_client(&stream, &report, &pass_on) {
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
    report: &impl Fn() -> Report,
    pass_on: &impl Fn(Call),
) -> io::Result<()> {
    stream.set_write_timeout(Some(LINE_DEADLINE))?;
    let written = match read_command(stream) {
        Ok(Command::Status) => write_answer(stream, json(&report().status)),
        Ok(Command::Stats) => write_answer(stream, json(&report())),
        Ok(Command::Snapshot { image }) => {
            snapshot_for(stream, image, pass_on);
            Ok(())
        }
        Ok(Command::Grow(sizes)) => {
            let outcome = ask(stream, "the resize", pass_on, |reply| Call::Grow { sizes, reply });
            write_answer(stream, outcome.and_then(|grown| json(&grown)))
        }
        Ok(Command::Merge { layer }) => {
            let begin = |job, reply| pass_on(Call::Merge { layer, job, reply });
            let outcome = work(stream, JobKind::Merge, true, begin);
            write_answer(stream, outcome.and_then(|merged| json(&merged)))
        }
        Ok(Command::Compact { max_rate, stop_on_disconnect }) => {
            let begin = |job, reply| pass_on(Call::Compact { max_rate, job, reply });
            let outcome = work(stream, JobKind::Compact, stop_on_disconnect, begin);
            write_answer(stream, outcome.and_then(|shortened| json(&shortened)))
        }
        Ok(Command::HandOver { image_file }) => {
            let successor = u32::try_from(getsockopt(stream, sockopt::PeerCredentials)?.pid()).unwrap_or(0);
            let call = |reply| Call::HandOver { image_file, successor, reply };
            let outcome = ask(stream, "the handover of the device", pass_on, call);
            write_answer(stream, outcome.and_then(|done| json(&done)))
        }
        Ok(Command::EndWaits) => {
            let outcome = ask(stream, "the end of waits", pass_on, |reply| Call::EndWaits { reply });
            write_answer(stream, outcome.and_then(|requests| json(&requests)))
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
    let what = format!("the snapshot {}", image.display());
    let outcome = ask(stream, &what, pass_on, |reply| Call::Snapshot { image, reply });
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

/// Has `begin` begin a job, and waits for its answer. Until then, a line a second says to the caller how far
/// the job is. It continues when the caller leaves, but for one who wants it to end then.
fn work<T>(
    stream: &UnixStream,
    kind: JobKind,
    stop_on_disconnect: bool,
    begin: impl FnOnce(Arc<Job>, Reply<T>),
) -> Result<T> {
    let (reply, awaited) = reply_to(stream).doing("duplicating a descriptor")?;
    let job = Job::new(kind);
    begin(job.clone(), reply);
    let mut listens = true;
    loop {
        match awaited.wait(PROGRESS_PERIOD) {
            Err(RecvTimeoutError::Timeout) => {}
            answer => return answer.map_err(gone)?,
        }
        if stop_on_disconnect && has_left(stream) {
            job.stop(Stop::Caller);
        }
        listens = listens && write_line(stream, &Answer::Progress(job.progress())).is_ok();
    }
}

fn gone(_: RecvTimeoutError) -> Error {
    Error::new(Kind::Io, "the device was removed, or did not answer in time")
        .remedy("`vhdx-ublk list` shows what is served")
}

/// Passes the call on that `call` makes of a reply, and waits for its answer. `what` is requested.
fn ask<T>(
    stream: &UnixStream,
    what: &str,
    pass_on: &impl Fn(Call),
    call: impl FnOnce(Reply<T>) -> Call,
) -> Result<T> {
    let (reply, awaited) = reply_to(stream).doing("duplicating a descriptor")?;
    pass_on(call(reply));
    match awaited.wait(ANSWER_DEADLINE) {
        Err(RecvTimeoutError::Timeout) if awaited.give_up() => {
            let seconds = ANSWER_DEADLINE.as_secs();
            let message = format!("{what} has not taken place within {seconds} s and is given up");
            tracing::warn!("{message}");
            Err(Error::new(Kind::Io, message)
                .remedy("look for the cause (the device's log, dmesg), then try again"))
        }
        // It was claimed.
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::time::Instant;

    use super::*;
    use crate::device::order::Sizes;
    use crate::device::socket::{Status, report, status};
    use crate::disk::HostFile;

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
        for (word, command) in [("status", Command::Status), ("endwaits", Command::EndWaits)] {
            let line = format!(r#"{{"version":1,"command":"{word}"}}"#);
            assert_eq!(parse(&line).expect("understood"), command);
        }
        let line = r#"{"version":1,"command":{"handover":{"image_file":{"device":1,"inode":2}}}}"#;
        let image_file = HostFile { device: 1, inode: 2 };
        let grow = r#"{"version":1,"command":{"grow":{"from_bytes":512,"to_bytes":1024}}}"#;
        let sizes = Sizes { from_bytes: 512, to_bytes: 1024 };
        assert_eq!(parse(grow).expect("understood"), Command::Grow(sizes));
        let merge = r#"{"version":1,"command":{"merge":{"layer":{"device":1,"inode":2}}}}"#;
        assert_eq!(parse(merge).expect("understood"), Command::Merge { layer: image_file });
        assert_eq!(parse(line).expect("understood"), Command::HandOver { image_file });
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
    fn a_silent_client_does_not_keep_others_from_being_served() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("7.sock");
        listen(&path, Report::default, |_| {}).expect("free");
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

    /// What the caller of a job reads until it stops sending, and then; and whether the job was stopped.
    fn watched_job(stop_on_disconnect: bool) -> (Vec<String>, bool) {
        let (near, far) = UnixStream::pair().expect("a pair of sockets");
        let serving = thread::spawn(move || {
            let outcome = work(&far, JobKind::Compact, stop_on_disconnect, |job, reply| {
                job.advance(1, 2, 3);
                let until = Instant::now() + 5 * PROGRESS_PERIOD;
                thread::spawn(move || {
                    while job.stopped().is_none() && Instant::now() < until {
                        thread::sleep(Duration::from_millis(10));
                    }
                    reply.send(Ok(job.stopped().is_some()));
                });
            });
            let stopped = *outcome.as_ref().expect("it ends");
            write_answer(&far, outcome.and_then(|stopped| json(&stopped))).expect("it is read");
            stopped
        });
        let mut lines = BufReader::new(&near).lines().map(|line| line.expect("a line"));
        let mut read: Vec<String> = lines.by_ref().take(1).collect();
        near.shutdown(std::net::Shutdown::Write).expect("open");
        read.extend(lines);
        (read, serving.join().expect("it does not panic"))
    }

    #[test]
    fn a_job_tells_how_far_it_is_and_stops_for_who_wants_it_to() {
        let (read, stopped) = watched_job(true);
        let told = r#"{"progress":{"job":"compact","done_bytes":1,"total_bytes":2,"file_bytes":3}}"#;
        assert_eq!((read[0].as_str(), stopped), (told, true));
        assert_eq!(read.last().map(String::as_str), Some(r#"{"done":true}"#));
        let (read, stopped) = watched_job(false);
        assert!(!stopped && read.len() > 2 && read[1] == told, "{read:?}");
        assert_eq!(read.last().map(String::as_str), Some(r#"{"done":false}"#));
    }

    #[test]
    fn commands_go_to_the_daemon_and_answers_come_back() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("7.sock");
        fs::write(&path, "left over").expect("writable");
        let degraded = Status { host_full: true, last_error: Some("no room".into()), ..Status::default() };
        let mut reported = Report { status: degraded.clone(), ..Report::default() };
        reported.stats.traffic.requests.read = u64::MAX;
        let told = reported.clone();
        listen(
            &path,
            move || told.clone(),
            |call: Call| {
                let refusal = || Error::new(Kind::Exists, "no");
                match call {
                    Call::Snapshot { image, reply } => reply.send(Err(refusal().file(&image))),
                    Call::HandOver { reply, .. } => reply.send(Err(refusal())),
                    Call::Grow { reply, .. } => reply.send(Err(refusal())),
                    Call::Merge { reply, .. } => reply.send(Err(refusal())),
                    Call::EndWaits { reply } => reply.send(Ok(7)),
                    Call::Compact { .. } => unreachable!("no test calls it"),
                    Call::HasGrown { .. } | Call::Reclaimed(_) => panic!("no client makes it"),
                }
            },
        )
        .expect("free");
        match status(&path) {
            Ok(status) => assert_eq!(status, degraded),
            Err(error) => assert_eq!(error.kind(), Kind::Permission, "{error}"),
        }
        match report(&path) {
            Ok(report) => assert_eq!(report, reported),
            Err(error) => assert_eq!(error.kind(), Kind::Permission, "{error}"),
        }
        let outcome = crate::device::socket::snapshot(&path, "/disks/new.vhdx".into());
        let Err(error) = outcome else { panic!("refused") };
        // A caller that is not root is refused before.
        let expected = if nix::unistd::geteuid().is_root() { Kind::Exists } else { Kind::Permission };
        assert_eq!(error.kind(), expected, "{error}");
        let error = crate::device::socket::hand_over(&path, HostFile { device: 1, inode: 2 });
        assert_eq!(error.expect_err("refused").kind(), expected);
        match crate::device::socket::end_waits(&path) {
            Ok(requests) => assert_eq!(requests, 7),
            Err(error) => assert_eq!(error.kind(), Kind::Permission, "{error}"),
        }
    }
}
