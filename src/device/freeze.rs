//! File systems that are at rest while a snapshot of their device is taken (`FIFREEZE`).
//!
//! A frozen file system has everything on the disk, and whoever writes to it waits. None may stay frozen,
//! whatever becomes of the command: so another process freezes and thaws, in a session of its own, and thaws
//! as soon as the pipe from the command is closed, which a kill closes, too; and after `HOLD_PATIENCE` in
//! any case. If that process is killed itself, the command thaws. While something is frozen neither of the
//! two writes to anything but their pipes: what the command prints may go to a file on the device.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd;

use super::{launch, sys};
use crate::error::{Doing, Error, Kind, Locate, Result};

/// How long the file systems may take to come to rest: they write everything back.
const FREEZE_PATIENCE: Duration = Duration::from_secs(60);

/// How long they are frozen at most.
const HOLD_PATIENCE: Duration = Duration::from_secs(30);

/// In the place of an error number, for a file system that is frozen.
const FROZEN: i32 = 0;

/// What the other process says when all that can be frozen is, and when nothing is any longer.
const READY: &str = "ready";
const THAWED: &str = "thawed";
const LATE: &str = "late";

/// File systems that are frozen until this is dropped, or [ended](Self::end).
#[derive(Debug)]
pub struct Frozen {
    child: Child,
    /// Closed to have them thawed.
    pipe: Option<ChildStdin>,
    lines: Receiver<String>,
    /// The mount points that were named.
    folders: Vec<File>,
    /// The places among them of those that the other process has frozen.
    places: Vec<usize>,
}

/// A file system that is not frozen.
#[derive(Debug)]
pub struct Unfrozen {
    /// Where it is mounted.
    pub point: PathBuf,
    /// Why.
    pub error: io::Error,
}

impl Frozen {
    /// Freezes the file systems at `points`, by this program with these `arguments`, which calls [`hold`].
    /// Those that could not be.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] if they take too long; the host's.
    pub fn begin(points: &[PathBuf], arguments: Vec<OsString>) -> Result<(Self, Vec<Unfrozen>)> {
        let until = Instant::now() + FREEZE_PATIENCE;
        let folders = open_within(points, until)?;
        let mut child = launch::helper(arguments).doing("starting the process that freezes")?;
        let pipe = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("it was asked for"));
        let (sender, lines) = mpsc::channel();
        let read = move || stdout.lines().map_while(io::Result::ok).try_for_each(|line| sender.send(line));
        let reading = thread::Builder::new().name("vhdx-freeze".into()).spawn(read);
        let mut frozen = Self { child, pipe, lines, folders, places: Vec::new() };
        reading.doing("starting a thread for the freeze")?;
        let mut unfrozen = Vec::new();
        loop {
            let Some(line) = frozen.line(until)? else {
                frozen.thaw();
                let message = "the process that freezes the file systems has ended; they are thawed";
                return Err(Error::new(Kind::Io, message).remedy("run the command again"));
            };
            if line == READY {
                return Ok((frozen, unfrozen));
            }
            let (place, errno) = line.split_once(' ').unwrap_or_default();
            let (place, errno) = (place.parse().unwrap_or(usize::MAX), errno.parse().unwrap_or(libc::EIO));
            if errno == FROZEN {
                frozen.places.push(place);
                continue;
            }
            let point = points.get(place).cloned().unwrap_or_default();
            unfrozen.push(Unfrozen { point, error: io::Error::from_raw_os_error(errno) });
        }
    }

    /// What the other process says next; none if it has ended.
    fn line(&self, until: Instant) -> Result<Option<String>> {
        match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => Err(too_late()),
        }
    }

    /// Thaws what the other process, which has ended, has left frozen. Whether all of it was.
    fn thaw(&self) -> bool {
        let folders = self.places.iter().rev().filter_map(|&place| self.folders.get(place));
        folders.filter(|folder| sys::thaw_file_system(folder).is_err()).count() == 0
    }

    /// Has them thawed, and waits for it. Whether they were frozen until now.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] if that takes too long.
    pub fn end(mut self) -> Result<bool> {
        self.pipe = None;
        let ended = self.line(Instant::now() + FREEZE_PATIENCE)?;
        let were_frozen = ended.map_or_else(|| self.thaw(), |said| said == THAWED);
        self.child.wait().doing("waiting for the process that freezes")?;
        Ok(were_frozen)
    }
}

/// In the other process: freezes the file systems at `points`, and thaws them when standard input ends.
///
/// # Errors
///
/// The host's; nothing is frozen then.
pub fn hold(points: &[PathBuf]) -> Result<()> {
    // What is sent to the command and its group thaws by the end of the pipe.
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGPIPE];
    signals.into_iter().collect::<SigSet>().thread_block().doing("blocking signals")?;
    let _ = unistd::setsid(); // fails if it has a session of its own
    let folders = open_all(points)?;
    let mut held = Held(Vec::new());
    for (place, folder) in folders.iter().enumerate() {
        let errno = match sys::freeze_file_system(folder) {
            Ok(()) => {
                held.0.push(folder);
                FROZEN
            }
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        say(&format!("{place} {errno}"));
    }
    say(READY);
    let ended = is_ended_within(HOLD_PATIENCE);
    drop(held);
    say(if ended { THAWED } else { LATE });
    Ok(())
}

fn too_late() -> Error {
    let seconds = FREEZE_PATIENCE.as_secs();
    let message = format!("the file systems have not come to rest, or to life, within {seconds} s");
    Error::new(Kind::Io, message).remedy("look for the cause (dmesg): their disk may hang")
}

/// Opens them on a thread of its own: another file system that is mounted over a point may never answer.
fn open_within(points: &[PathBuf], until: Instant) -> Result<Vec<File>> {
    let (sender, opened) = mpsc::channel();
    let points = points.to_vec();
    // If it takes too long, nothing waits for it any longer.
    let open = move || drop(sender.send(open_all(&points)));
    let opening = thread::Builder::new().name("vhdx-freeze".into()).spawn(open);
    opening.doing("starting a thread for the freeze")?;
    opened.recv_timeout(until.saturating_duration_since(Instant::now())).map_err(|_| too_late())?
}

fn open_all(points: &[PathBuf]) -> Result<Vec<File>> {
    points.iter().map(|path| File::open(path).doing("opening the mount point").file(path)).collect()
}

/// Thaws what it holds, the last one first.
struct Held<'a>(Vec<&'a File>);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for folder in self.0.iter().rev() {
            // It is frozen by this process; if it is not any longer, another one has thawed it.
            let _ = sys::thaw_file_system(folder);
        }
    }
}

/// A command that has ended reads nothing.
fn say(line: &str) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

fn is_ended_within(patience: Duration) -> bool {
    let stdin = io::stdin();
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut ends = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ends, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(nix::Error::EINTR) if !left.is_zero() => {}
            Err(_) => return false,
        }
    }
}

/// The remedy for a file system at `point` that cannot be frozen.
pub fn without(point: &Path) -> String {
    format!("unmount {}, or take the snapshot with --freeze=try, which leaves it as it is", point.display())
}
