//! Becoming a daemon without `fork`: the program runs itself again, and reads a line from a pipe.
//!
//! The child does everything and then writes one line to its standard output: `{"ready":…}` or `{"error":…}`.
//! It detaches with that line and not before: until then its standard error is its parent's, so no failure on
//! the way up is in a log only. A child that dies without a line is reported with its status. One that writes
//! nothing before its deadline is killed; if it waits in the kernel, where even that does not end it, it is
//! left behind.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd;
use serde::{Deserialize, Serialize};

use super::confine;
use super::log_file;
use super::spec::Ready;
use super::wire::Failure;
use crate::disk::{HostFile, without_proc};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::machine;

/// This program, even if its file has been replaced.
const SELF: &str = "/proc/self/exe";

/// The longest line that is read of a child, bytes.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// How long a child that has failed may take to end, or one that was killed: it may wait in the kernel.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// How often to look for that end.
const END_INTERVAL: Duration = Duration::from_millis(5);

/// This process takes a device over from a daemon that has stopped serving it: it no longer depends on its
/// parent.
static TAKES_OVER: AtomicBool = AtomicBool::new(false);

/// This process has left its device to another one.
static HANDED_OVER: AtomicBool = AtomicBool::new(false);

/// A program to run, whatever its path names by then: an open file, or this one.
pub struct Program(Option<File>);

/// The first argument of a daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstArgument(&'static str);

impl FirstArgument {
    /// The usual one.
    pub(super) const USUAL: Self = Self(PROCESS_NAME);

    /// That of the daemon `pid`, if it is one that a daemon may have; otherwise the usual one.
    pub fn of_process(pid: u32) -> Self {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let first = line.split(|&byte| byte == 0).next().unwrap_or_default();
        if first == SPARED_NAME.as_bytes() { Self(SPARED_NAME) } else { Self::USUAL }
    }
}

impl Program {
    /// This one.
    pub fn this() -> Self {
        Self(None)
    }

    /// The program in the file at `path`, which may be a script.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn at(path: &Path) -> Result<Self> {
        let file = Self::open(path).doing("opening the program").file(path)?;
        // What interprets a script opens it once more.
        fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty())).doing("opening the program").file(path)?;
        Ok(Self(Some(file)))
    }

    /// The program that the process `pid` runs, even if its file was removed.
    ///
    /// # Errors
    ///
    /// The host's, as when the process has ended.
    pub fn of_process(pid: u32) -> Result<Self> {
        let path = PathBuf::from(format!("/proc/{pid}/exe"));
        let file = Self::open(&path).doing("opening the program of the daemon").file(&path)?;
        Ok(Self(Some(file)))
    }

    /// Whether it is the one that this process runs.
    pub(super) fn is_this(&self) -> bool {
        let this = fs::metadata(SELF).map(|found| HostFile::of(&found));
        let it = self.0.as_ref().map(|file| file.metadata().map(|found| HostFile::of(&found)));
        it.is_none_or(|it| it.is_ok_and(|it| this.is_ok_and(|this| it == this)))
    }

    fn open(path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)
    }

    /// The kernel's link to it.
    fn link(&self) -> String {
        self.0.as_ref().map_or_else(|| SELF.into(), |file| format!("/proc/self/fd/{}", file.as_raw_fd()))
    }
}

/// How the start of a daemon that takes a device over has failed.
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub error: Error,
    /// What became of the daemon before it.
    pub stage: Stage,
}

/// How far a daemon has come that takes a device over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The daemon before it was not disturbed.
    Before,
    /// The daemon before it ends, or has ended.
    Begun,
    /// It has not said.
    Unknown,
}

/// The daemon's name, whatever name this process has: under another the program is another command.
const PROCESS_NAME: &str = "vhdx-ublk";

/// The same for a daemon that the end of a shutdown is to spare, as systemd does with processes whose first
/// argument begins like this.
const SPARED_NAME: &str = "@vhdx-ublk";

/// The one line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    Ready(Ready),
    /// Whether a device was stopped, which is the only purpose of this child.
    Stopped(bool),
    Error(Failure),
    /// The same, after the daemon that served the device has begun to end.
    Abandoned(Failure),
}

/// Runs this program again with `arguments`, as a daemon that calls [`enter`], then [`announce`] or
/// [`announce_failure`]; waits until it has. Its way up has its own deadlines.
///
/// # Errors
///
/// The child's, or that it ended without a line.
pub fn launch(arguments: impl IntoIterator<Item = OsString>) -> Result<Ready> {
    let mut child = start(&Program::this(), FirstArgument::USUAL, arguments)?;
    machine::waits_for(child.id());
    let line = read_line(child.stdout.take().expect("it was asked for"));
    machine::turn("hears of its daemon");
    let line = line.doing("reading from the daemon")?;
    parse(&line).unwrap_or_else(|| Err(died(child)))
}

/// Starts this program with these arguments as a process whose standard input and output are pipes, and which
/// has nowhere else to write.
///
/// # Errors
///
/// The operating system's.
pub(super) fn helper(arguments: Vec<OsString>) -> io::Result<Child> {
    let mut command = Command::new(SELF);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn()
}

/// As [`launch`], for a daemon that may have to wait for what cannot be interrupted: one that is not ready
/// within `patience` is killed.
///
/// # Errors
///
/// As [`launch`], and [`Kind::Io`] at the deadline.
pub fn launch_within(arguments: impl IntoIterator<Item = OsString>, patience: Duration) -> Result<Ready> {
    launch_program(&Program::this(), FirstArgument::USUAL, arguments, patience).map_err(|failed| failed.error)
}

/// As [`launch_within`], for any program. One that has failed has ended, if that can be seen within
/// `END_PATIENCE`: it keeps no lock then.
///
/// # Errors
///
/// As [`launch_within`].
pub fn launch_program(
    program: &Program,
    first: FirstArgument,
    arguments: impl IntoIterator<Item = OsString>,
    patience: Duration,
) -> std::result::Result<Ready, Failed> {
    let mut child =
        start(program, first, arguments).map_err(|error| Failed { error, stage: Stage::Before })?;
    let (stage, error) = match read_ready(&mut child, patience) {
        Ok(line) => match serde_json::from_str(&line) {
            Ok(Line::Ready(ready)) => return Ok(ready),
            Ok(Line::Error(failure)) => (Stage::Before, failure.into()),
            Ok(Line::Abandoned(failure)) => (Stage::Begun, failure.into()),
            Ok(Line::Stopped(_)) | Err(_) => {
                return Err(Failed { error: died(child), stage: Stage::Unknown });
            }
        },
        Err(error) => (Stage::Unknown, error),
    };
    await_end(&mut child);
    Err(Failed { error, stage })
}

/// Waits a while for the end of a child that has nothing left to do.
fn await_end(child: &mut Child) {
    let until = machine::now() + END_PATIENCE;
    while matches!(child.try_wait(), Ok(None)) && machine::now() < until {
        machine::pause(END_INTERVAL);
    }
}

fn read_ready(child: &mut Child, patience: Duration) -> Result<String> {
    line_within(child, patience)?.ok_or_else(|| {
        let message = format!("the daemon was not ready within {} s, and was killed", patience.as_secs());
        Error::new(Kind::Io, message).remedy("check dmesg, and whether the image can be read")
    })
}

/// What `program` prints when it is run with `arguments`: one line. `None` if it prints none within
/// `patience`.
///
/// # Errors
///
/// If it cannot be run.
pub fn answer(
    program: &Program,
    arguments: impl IntoIterator<Item = OsString>,
    patience: Duration,
) -> Result<Option<String>> {
    let mut child = start(program, FirstArgument::USUAL, arguments)?;
    let line = line_within(&mut child, patience)?;
    let _ = child.kill(); // it has nothing left to do
    child.wait().doing("waiting for the program's end")?;
    Ok(line)
}

/// Runs this program again with `arguments`, as a child that calls [`report_stopped`]. What it reports;
/// `None` at the deadline.
///
/// # Errors
///
/// The child's, or that it ended without a line.
pub fn run_child(arguments: impl IntoIterator<Item = OsString>, patience: Duration) -> Result<Option<bool>> {
    let mut child = start(&Program::this(), FirstArgument::USUAL, arguments)?;
    let Some(line) = line_within(&mut child, patience)? else { return Ok(None) };
    match serde_json::from_str(&line) {
        Ok(Line::Stopped(stopped)) => Ok(Some(stopped)),
        Ok(Line::Error(failure) | Line::Abandoned(failure)) => Err(failure.into()),
        Ok(Line::Ready(_)) | Err(_) => Err(died(child)),
    }
}

/// In the child: reports to the parent whether a device was stopped, or why not.
///
/// # Errors
///
/// If the parent is gone.
pub fn report_stopped(outcome: &Result<bool>) -> Result<()> {
    write_line(&match outcome {
        Ok(stopped) => Line::Stopped(*stopped),
        Err(error) => Line::Error(error.into()),
    })
}

fn start(
    program: &Program,
    first: FirstArgument,
    arguments: impl IntoIterator<Item = OsString>,
) -> Result<Child> {
    let kept = confine::kept_variables().filter_map(|name| Some((name, std::env::var_os(name)?)));
    let child = Command::new(program.link())
        .arg0(first.0)
        .args(arguments)
        .env_clear()
        .envs(kept)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    child.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => without_proc(),
        _ => Error::io("starting the daemon", error),
    })
}

fn read_line(output: ChildStdout) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(output.take(MAX_LINE_BYTES)).read_line(&mut line)?;
    Ok(line)
}

/// The child's line. If it does not come in time, the child is killed and there is none.
fn line_within(child: &mut Child, patience: Duration) -> Result<Option<String>> {
    let output = child.stdout.take().expect("it was asked for");
    let (sender, receiver) = mpsc::channel();
    let read = move || {
        let _ = sender.send(read_line(output)); // after the deadline nothing receives it
    };
    thread::Builder::new().name("listener".into()).spawn(read).doing("reading from the daemon")?;
    machine::waits_for(child.id());
    let heard = receiver.recv_timeout(patience);
    machine::turn("hears of its child");
    match heard {
        Ok(line) => line.map(Some).doing("reading from the daemon"),
        Err(RecvTimeoutError::Timeout) => {
            child.kill().doing("killing the daemon")?;
            Ok(None)
        }
        Err(RecvTimeoutError::Disconnected) => unreachable!("the listener always sends something"),
    }
}

fn parse(line: &str) -> Option<Result<Ready>> {
    match serde_json::from_str(line).ok()? {
        Line::Ready(ready) => Some(Ok(ready)),
        Line::Stopped(_) => None,
        Line::Error(failure) | Line::Abandoned(failure) => Some(Err(failure.into())),
    }
}

fn died(mut child: Child) -> Error {
    match child.wait() {
        Ok(status) => Error::new(Kind::Io, format!("the daemon ended before it was ready ({status})")),
        Err(error) => Error::io("waiting for the daemon's end", error),
    }
}

/// In the child, before anything else: leaves the parent's session, and with it the terminal's signals, and
/// gives up what it inherited, except for `kept`. Until the child has reported, it ends with its parent.
///
/// # Errors
///
/// If the child leads a process group already, as it does if it was not started by [`launch`]; if the parent
/// is gone.
pub fn enter(kept: Option<RawFd>) -> Result<()> {
    if let Err(error) = fs::write("/proc/self/comm", PROCESS_NAME) {
        tracing::debug!("the process keeps its name: {error}");
    }
    unistd::setsid().doing("starting a session")?;
    confine::detach(kept);
    // Giving up capabilities does not reset this; getting any would.
    prctl::set_pdeathsig(Signal::SIGTERM).doing("following the parent")?;
    if is_alone() {
        return Err(Error::new(Kind::Io, "the process that started the daemon is gone"));
    }
    Ok(())
}

/// Whether no process reads the standard output: that shows a parent that died before its child could follow
/// it.
fn is_alone() -> bool {
    let output = io::stdout();
    let mut ends = [PollFd::new(output.as_fd(), PollFlags::empty())];
    let polled = poll(&mut ends, PollTimeout::ZERO);
    polled.is_ok_and(|count| count > 0)
        && ends[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
}

/// What ends a daemon besides signals and `vhdx-ublk del`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lives {
    /// Nothing.
    OnItsOwn,
    /// The end of its parent, which is a request like SIGTERM: a device in use stays until it is not.
    WithItsParent,
}

/// In the child: detaches from everything that the parent owns, and reports that the device is ready. From
/// now on warnings are appended to the device's log, after those of earlier daemons of this number.
///
/// # Errors
///
/// If the parent is gone, or the log cannot be written. The device should be taken down then: no process
/// knows of it.
pub fn announce(ready: &Ready, lives: Lives) -> Result<()> {
    let log = log_file::open(&ready.log)?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = null.doing("opening /dev/null")?;
    unistd::chdir(Path::new("/")).doing("leaving the directory")?;
    unistd::dup2_stdin(&null).doing("detaching the input")?;
    unistd::dup2_stderr(&log).doing("detaching the errors")?;
    if lives == Lives::OnItsOwn {
        // The parent ends when it knows of the device.
        leave_parent()?;
    }
    let told = write_line(&Line::Ready(ready.clone()));
    if !takes_over() {
        told?;
    }
    log_file::begin(&ready.log);
    unistd::dup2_stdout(&null).doing("detaching the output")
}

/// In the child: reports to the parent why there is no device.
///
/// # Errors
///
/// If the parent is gone.
pub fn announce_failure(error: &Error) -> Result<()> {
    write_line(&if takes_over() { Line::Abandoned(error.into()) } else { Line::Error(error.into()) })
}

/// Whether this process takes a device over from a daemon that serves it.
pub(super) fn takes_over() -> bool {
    TAKES_OVER.load(Ordering::Relaxed)
}

/// In the child: it no longer ends with its parent.
///
/// # Errors
///
/// The kernel's.
pub(super) fn leave_parent() -> Result<()> {
    prctl::set_pdeathsig(None).doing("leaving the parent")
}

/// In the child, after [`leave_parent`]: the daemon before this one has stopped serving.
pub(super) fn take_over() {
    TAKES_OVER.store(true, Ordering::Relaxed);
}

/// The device has another daemon from now on.
pub(super) fn hand_over() {
    HANDED_OVER.store(true, Ordering::Relaxed);
}

/// Whether this process ends because another one serves its device.
pub fn has_handed_over() -> bool {
    HANDED_OVER.load(Ordering::Relaxed)
}

fn write_line(line: &Line) -> Result<()> {
    let mut text = serde_json::to_string(line).doing("reporting to the parent")?;
    text.push('\n');
    machine::turn("answers its parent");
    let mut output = io::stdout().lock();
    let written = output.write_all(text.as_bytes()).and_then(|()| output.flush());
    machine::answers();
    written.doing("reporting to the parent")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through_the_pipe(line: &Line) -> Result<Ready> {
        parse(&serde_json::to_string(line).expect("serialisable")).expect("a line")
    }

    #[test]
    fn a_device_is_announced_as_documented() {
        let ready = Ready {
            id: 0,
            device: "/dev/ublkb0".into(),
            log: "/run/vhdx-ublk/0.log".into(),
            image: "/a.vhdx".into(),
            pause_us: None,
        };
        let text = serde_json::to_string(&Line::Ready(ready.clone())).expect("serialisable");
        assert!(text.starts_with(r#"{"ready":{"id":0,"device":"/dev/ublkb0""#), "{text}");
        assert_eq!(through_the_pipe(&Line::Ready(ready.clone())).expect("ready"), ready);
    }

    #[test]
    fn a_failure_is_announced_as_documented() {
        let error = Error::new(Kind::NoSpace, "a.vhdx: no").remedy("do this");
        let text = serde_json::to_string(&Line::Error((&error).into())).expect("serialisable");
        assert_eq!(text, r#"{"error":{"kind":"no-space","message":"a.vhdx: no","remedy":"do this"}}"#);
        let found = parse(&text).expect("a line").expect_err("an error");
        assert_eq!(found.remedy_text(), Some("do this"));
    }

    /// A process whose first argument is `name`, and what a daemon gets that succeeds it.
    fn succeeded(name: &str) -> FirstArgument {
        let mut command = Command::new("sh");
        command.arg0(name).args(["-c", "echo begun; read line"]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("sh starts");
        // Before that the kernel may not show its arguments.
        assert_eq!(read_line(child.stdout.take().expect("piped")).expect("readable"), "begun\n");
        let first = FirstArgument::of_process(child.id());
        child.kill().expect("it runs");
        child.wait().expect("it ends");
        first
    }

    #[test]
    fn a_successor_is_spared_at_shutdown_if_its_predecessor_was() {
        assert_eq!(succeeded("@vhdx-ublk"), FirstArgument(SPARED_NAME));
        assert_eq!(succeeded("vhdx-ublk"), FirstArgument::USUAL);
        assert_eq!(succeeded("@vhdx-ublk2"), FirstArgument::USUAL);
        assert_eq!(FirstArgument::of_process(0), FirstArgument::USUAL);
    }

    #[test]
    fn this_program_is_told_from_others() {
        assert!(Program::this().is_this());
        assert!(Program::of_process(std::process::id()).expect("it runs").is_this());
        assert!(!Program::at(Path::new("/bin/sh")).expect("every machine has it").is_this());
    }

    #[test]
    fn a_child_without_a_line_is_noticed() {
        assert!(parse("").is_none());
        assert!(parse("panicked at\n").is_none());
    }
}
