//! The lock of an image: advisory locks on its open file description, in the byte layout QEMU uses, so that
//! both programs keep out of each other's way.
//!
//! An opener states what it does (permissions held) and what it does not let others do (permissions not
//! shared). Each statement is a read lock on a byte of its own: `100 + n` for permission `n` held, `200 + n`
//! for permission `n` not shared. Read locks never exclude each other, so the conflicts are searched for once
//! all are taken: is there a foreign lock on `200 + n` of something held, or on `100 + n` of something not
//! shared?
//!
//! Whoever may read a file may take any of these locks, and so keep every writer out, or look like one. A
//! writer of this program therefore locks one byte more, exclusively: that takes a description that can
//! write. Where it is free no writer of ours is left, dead ones with I/O in flight included, whatever others
//! have locked.
//!
//! Invariants:
//!
//! * locks first, look second: of two openers that race at least one sees the other, so both may lose, both
//!   never win;
//! * after a failed attempt the description holds no lock of ours;
//! * nothing is looked at on SMB that the description itself has locked;
//! * the locks belong to the description, not to the process: they end when the last reference to it ends, an
//!   operation still in flight in the kernel included.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::sparse::is_on_smb;
use crate::error::{Error, Kind, Result};
use crate::machine;

/// What the opener of an image does with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads, beside other readers, and no writer.
    ReadOnly,
    /// Reads and writes, alone.
    ReadWrite,
}

/// QEMU's block permissions, as bit numbers; "write unchanged" (2) and others play no part in ours.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// First byte of the permissions held.
const HELD_BASE: i64 = 100;
/// First byte of the permissions not shared.
const UNSHARED_BASE: i64 = 200;
/// Room for permission bytes behind each base; no program has defined more than five.
const PERMISSIONS: i64 = 8;

/// The byte that writers of this program lock exclusively. QEMU has nothing there.
const WRITER: i64 = 300;

/// What neither a reader nor a writer of ours lets others do.
const UNSHARED: [i64; 2] = [WRITE, RESIZE];

/// How often a conflict is looked at anew before it counts: another opener that fails, or only probes, holds
/// its locks for microseconds.
const ATTEMPTS: u32 = 4;
/// The pause after the first conflict; doubled after each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// The pause between attempts while waiting for a holder to leave.
const POLL_PAUSE: Duration = Duration::from_millis(50);

impl Access {
    fn held(self) -> &'static [i64] {
        match self {
            Self::ReadOnly => &[READ],
            Self::ReadWrite => &[READ, WRITE, RESIZE],
        }
    }
}

/// Locks `file` for `access`, without waiting for a holder to leave.
///
/// # Errors
///
/// [`Kind::InUse`] when another process holds what `access` excludes, or excludes what it holds; `remedy` is
/// left for the caller, who may know the holder. [`Kind::Io`] when the file system has no such locks.
pub fn try_lock(file: &File, access: Access) -> Result<()> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..ATTEMPTS {
        match attempt(file, access) {
            Err(error) if error.kind() == Kind::InUse => machine::pause(pause),
            outcome => return outcome,
        }
        pause *= 2;
    }
    attempt(file, access)
}

/// Locks `file`, found at `path`, for `access`; waits up to `wait` for other holders to leave, and says so
/// once.
///
/// # Errors
///
/// As [`try_lock`], once `wait` has passed.
pub fn lock(file: &File, path: &Path, access: Access, wait: Duration) -> Result<()> {
    let deadline = machine::now() + wait;
    let mut told = false;
    loop {
        let Err(error) = try_lock(file, access) else { return Ok(()) };
        let left = deadline.saturating_duration_since(machine::now());
        if error.kind() != Kind::InUse || left.is_zero() {
            return Err(error);
        }
        if !told {
            tracing::info!("{}: {error:#}; waiting up to {} s for it", path.display(), wait.as_secs_f32());
            told = true;
        }
        machine::pause(POLL_PAUSE.min(left));
    }
}

/// Locks `file` for writing although readers have locked it. The caller knows that none of those who have it
/// open can write it, apart from this program's writers, dead ones included: these are found here.
///
/// # Errors
///
/// [`Kind::InUse`] if there is such a writer, or another process has locked its byte.
pub fn lock_past_readers(file: &File) -> Result<()> {
    take(file, Access::ReadWrite).inspect_err(|_| unlock(file))
}

/// Takes on `other`, another description of a locked file, what [`try_lock`] took on the first one and others
/// may take, too: who looks finds the lock free only when both have ended. The writers' own byte stays with
/// the first, which all writing goes through: a sync of a dead process that [`lock_past_readers`] does not
/// find writes nothing that its successor does not see in the file already.
///
/// # Errors
///
/// As [`try_lock`]; `other` has no lock of ours then.
pub fn join(other: &File, access: Access) -> Result<()> {
    // The client of SMB has one handle for both, and a lock that it has twice is refused when a server asks
    // for the locks.
    if is_on_smb(other) {
        return Ok(());
    }
    let held = access.held().iter().map(|permission| HELD_BASE + permission);
    let unshared = UNSHARED.iter().map(|permission| UNSHARED_BASE + permission);
    let locks = held.chain(unshared).map(|byte| (libc::F_RDLCK, byte));
    set_each(other, access, locks).inspect_err(|_| unlock(other))
}

/// Locks `file` beside the holder that the caller is to succeed, as [`join`] does on a file of one's own: the
/// two keep all others out, and no other comes between when the first one ends. Before it writes, the
/// successor takes the writers' own byte with [`take_writer`].
///
/// # Errors
///
/// As [`try_lock`]; [`Kind::Unsupported`] on SMB, where no lock can lie beside another of the same client.
/// `file` has no lock of ours then.
pub fn lock_beside(file: &File) -> Result<()> {
    if is_on_smb(file) {
        return Err(Error::new(Kind::Unsupported, "a file on SMB cannot be locked beside its user"));
    }
    join(file, Access::ReadWrite)
}

/// Takes the writers' own byte on a file that was locked with [`lock_beside`]; waits up to `wait` for the
/// writer before, whose last I/O has ended then.
///
/// # Errors
///
/// [`Kind::InUse`] if the writer has not ended by then.
pub fn take_writer(file: &File, wait: Duration) -> Result<()> {
    let deadline = machine::now() + wait;
    loop {
        match set_each(file, Access::ReadWrite, [(libc::F_WRLCK, WRITER)]) {
            Err(error) if error.kind() == Kind::InUse && machine::now() < deadline => {
                machine::pause(FIRST_PAUSE);
            }
            outcome => return outcome,
        }
    }
}

/// Locks `writer` for writing, another description of the file that `readers` have locked for reading. The
/// readers' locks are given back once the writer's are taken: others never find the file free. If others read
/// it, the readers have their locks again.
///
/// # Errors
///
/// [`Kind::InUse`] if others have the file open; [`Kind::Unsupported`] on SMB, where no lock can lie beside
/// another of the same client.
pub fn lock_for_readers<'a>(writer: &File, readers: impl Iterator<Item = &'a File> + Clone) -> Result<()> {
    if is_on_smb(writer) {
        return Err(Error::new(Kind::Unsupported, "a file on SMB cannot be locked beside its reader"));
    }
    take(writer, Access::ReadWrite).inspect_err(|_| unlock(writer))?;
    readers.clone().for_each(unlock);
    let mut pause = FIRST_PAUSE;
    for _ in 1..ATTEMPTS {
        if look(writer, Access::ReadWrite).is_ok() {
            return Ok(());
        }
        machine::pause(pause);
        pause *= 2;
    }
    let seen = look(writer, Access::ReadWrite);
    if seen.is_err() {
        let mut readers = readers;
        let again = readers.try_for_each(|reader| join(reader, Access::ReadOnly));
        unlock(writer);
        again?;
    }
    seen
}

/// Gives back whatever [`try_lock`] took. A failure is not reported: the end of the description gives it
/// back, too.
pub fn unlock(file: &File) {
    for base in [HELD_BASE, UNSHARED_BASE] {
        let _ = set(file, libc::F_UNLCK, base..base + PERMISSIONS);
    }
    let _ = set(file, libc::F_UNLCK, WRITER..WRITER + 1);
}

/// Gives back what only a writer holds, so that the lock is a reader's. A failure is not reported, as in
/// [`unlock`].
pub fn share(file: &File) {
    for permission in Access::ReadWrite.held().iter().filter(|held| !Access::ReadOnly.held().contains(held)) {
        let _ = set(file, libc::F_UNLCK, HELD_BASE + permission..HELD_BASE + permission + 1);
    }
    let _ = set(file, libc::F_UNLCK, WRITER..WRITER + 1);
}

/// One round: take every lock, then look for conflicts; give every lock back unless all is well.
fn attempt(file: &File, access: Access) -> Result<()> {
    machine::turn("locks an image");
    if is_on_smb(file) {
        return attempt_on_smb(file, access);
    }
    let outcome = take(file, access).and_then(|()| look(file, access));
    if outcome.is_err() {
        unlock(file);
    }
    outcome
}

/// The same on SMB, where a look at a byte that the description has locked itself finds that lock, and ends
/// it at the server. So nothing is looked at that is locked already. A reader and a writer at the same time
/// still see each other: either locks first what the other looks at last. Two writers meet at their own byte.
fn attempt_on_smb(file: &File, access: Access) -> Result<()> {
    let held = access.held().iter().map(|permission| HELD_BASE + permission);
    let unshared = UNSHARED.map(|permission| UNSHARED_BASE + permission);
    let against_held = access.held().iter().map(|permission| UNSHARED_BASE + permission);
    let against_unshared = UNSHARED.map(|permission| HELD_BASE + permission);
    let writer = (access == Access::ReadWrite).then_some((libc::F_WRLCK, WRITER));
    let outcome = look_at(file, access, against_unshared)
        .and_then(|()| set_each(file, access, held.clone().map(|byte| (libc::F_RDLCK, byte)).chain(writer)))
        .and_then(|()| look_at(file, access, against_held))
        .and_then(|()| set_each(file, access, unshared.map(|byte| (libc::F_RDLCK, byte))))
        .and_then(|()| {
            let not_held =
                against_unshared.into_iter().filter(|byte| !held.clone().any(|held| held == *byte));
            look_at(file, access, not_held)
        });
    outcome.map_err(|error| {
        unlock(file);
        // Its words are of what others have locked.
        if error.kind() == Kind::InUse { in_use(file, HELD_BASE + WRITE, access) } else { error }
    })
}

fn take(file: &File, access: Access) -> Result<()> {
    let held = access.held().iter().map(|permission| HELD_BASE + permission);
    let unshared = UNSHARED.iter().map(|permission| UNSHARED_BASE + permission);
    let shared = held.chain(unshared).map(|byte| (libc::F_RDLCK, byte));
    set_each(file, access, shared)?;
    set_each(file, access, (access == Access::ReadWrite).then_some((libc::F_WRLCK, WRITER)))
}

fn set_each(file: &File, access: Access, locks: impl IntoIterator<Item = (libc::c_int, i64)>) -> Result<()> {
    for (kind, byte) in locks {
        match set(file, kind, byte..byte + 1) {
            Ok(()) => {}
            // Somebody without QEMU's manners holds an exclusive lock.
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(in_use(file, byte, access)),
            Err(errno) => return Err(Error::io("locking the image", errno.into())),
        }
    }
    Ok(())
}

fn look(file: &File, access: Access) -> Result<()> {
    let against_held = access.held().iter().map(|permission| UNSHARED_BASE + permission);
    let against_unshared = UNSHARED.iter().map(|permission| HELD_BASE + permission);
    look_at(file, access, against_held.chain(against_unshared))
}

fn look_at(file: &File, access: Access, bytes: impl IntoIterator<Item = i64>) -> Result<()> {
    for byte in bytes {
        if foreign(file, byte)?.is_some() {
            return Err(in_use(file, byte, access));
        }
    }
    Ok(())
}

/// A lock that is not of this description.
struct Foreign {
    /// The process, where the lock belongs to one; a lock of an open file description names none.
    pid: Option<i32>,
}

fn foreign(file: &File, byte: i64) -> Result<Option<Foreign>> {
    let mut found = record(libc::F_WRLCK, byte..byte + 1);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))
        .map_err(|errno| Error::io("looking at the image's locks", io::Error::from(errno)))?;
    let free = i32::from(found.l_type) == libc::F_UNLCK;
    Ok((!free).then(|| Foreign { pid: (found.l_pid > 0).then_some(found.l_pid) }))
}

/// The error for a conflict seen at `byte`.
fn in_use(file: &File, byte: i64, access: Access) -> Error {
    let writer = foreign(file, HELD_BASE + WRITE).ok().flatten();
    let what = match (&writer, access) {
        (Some(_), _) => "another program has it open for writing",
        (None, Access::ReadWrite) => "another program has it open and admits no writer",
        (None, Access::ReadOnly) => "another program has it open and admits no reader",
    };
    let holder = writer.or_else(|| foreign(file, byte).ok().flatten());
    let message = match holder.and_then(|holder| holder.pid) {
        Some(pid) => format!("{what} (process {pid})"),
        None => what.to_owned(),
    };
    Error::new(Kind::InUse, message)
}

fn set(file: &File, kind: libc::c_int, bytes: Range<i64>) -> nix::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&record(kind, bytes))).map(drop)
}

#[expect(clippy::cast_possible_truncation, reason = "small constants, wider than their field")]
fn record(kind: libc::c_int, bytes: Range<i64>) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: bytes.start,
        l_len: bytes.end - bytes.start,
        l_pid: 0, // the kernel insists on it for these locks
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, Command, Output, Stdio};
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Instant;

    use super::*;

    // A test that starts a program shares every description of the process with it for a moment, those of
    // other tests included. So the tests unlock where it matters when the lock is free: closing alone may not
    // do it at once.

    fn open(path: &Path, access: Access) -> File {
        File::options().read(true).write(access == Access::ReadWrite).open(path).expect("the file exists")
    }

    fn kind_of(outcome: Result<()>) -> Option<Kind> {
        outcome.err().map(|error| error.kind())
    }

    /// Readers share with readers; a writer excludes everybody, also within one process.
    #[test]
    fn the_lock_matrix() {
        use Access::{ReadOnly, ReadWrite};
        for (first, second, shared) in [
            (ReadOnly, ReadOnly, true),
            (ReadOnly, ReadWrite, false),
            (ReadWrite, ReadOnly, false),
            (ReadWrite, ReadWrite, false),
        ] {
            let file = tempfile::NamedTempFile::new().expect("a temporary file");
            let holder = open(file.path(), first);
            try_lock(&holder, first).expect("no other lock is there");
            let other = open(file.path(), second);
            let outcome = kind_of(try_lock(&other, second));
            assert_eq!(outcome, (!shared).then_some(Kind::InUse), "{second:?} beside {first:?}");
            unlock(&holder);
            try_lock(&other, second).expect("the holder has left");
        }
    }

    /// A failed attempt leaves nothing behind that would keep others out.
    #[test]
    fn a_failed_attempt_releases_its_locks() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let reader = open(file.path(), Access::ReadOnly);
        try_lock(&reader, Access::ReadOnly).expect("free");
        let writer = open(file.path(), Access::ReadWrite);
        assert_eq!(kind_of(try_lock(&writer, Access::ReadWrite)), Some(Kind::InUse));
        let second_reader = open(file.path(), Access::ReadOnly);
        try_lock(&second_reader, Access::ReadOnly).expect("the loser is gone");
    }

    /// Whoever may read the file can keep the lock from others, and cannot look like a writer of ours.
    #[test]
    fn readers_are_passed_by_and_writers_are_not() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let reader = open(file.path(), Access::ReadOnly);
        for byte in [HELD_BASE + WRITE, UNSHARED_BASE + WRITE] {
            set(&reader, libc::F_RDLCK, byte..byte + 1).expect("a reader may");
        }
        let writer = open(file.path(), Access::ReadWrite);
        assert_eq!(kind_of(try_lock(&writer, Access::ReadWrite)), Some(Kind::InUse));
        lock_past_readers(&writer).expect("there is no writer");
        let second = open(file.path(), Access::ReadWrite);
        assert_eq!(kind_of(lock_past_readers(&second)), Some(Kind::InUse), "a writer of ours is there");
        share(&writer);
        lock_past_readers(&second).expect("it no longer writes");
        unlock(&second);
        // A lock on the writers' own byte hides whether there is one.
        set(&reader, libc::F_RDLCK, WRITER..WRITER + 1).expect("a reader may");
        assert_eq!(kind_of(lock_past_readers(&second)), Some(Kind::InUse));
        assert_eq!(
            set(&reader, libc::F_WRLCK, WRITER..WRITER + 1),
            Err(Errno::EBADF),
            "no reader looks like one"
        );
    }

    /// Between one writer and its successor no other gets in, and the successor cannot write before the first
    /// one has ended.
    #[test]
    fn a_successor_leaves_no_gap() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let [first, successor, other] = [(); 3].map(|()| open(file.path(), Access::ReadWrite));
        try_lock(&first, Access::ReadWrite).expect("free");
        lock_beside(&successor).expect("the first one does not keep it out");
        assert_eq!(kind_of(take_writer(&successor, Duration::ZERO)), Some(Kind::InUse));
        unlock(&first);
        assert_eq!(kind_of(try_lock(&other, Access::ReadWrite)), Some(Kind::InUse), "before it writes");
        assert_eq!(kind_of(try_lock(&other, Access::ReadOnly)), Some(Kind::InUse));
        take_writer(&successor, Duration::ZERO).expect("the first one has ended");
        assert_eq!(kind_of(lock_past_readers(&other)), Some(Kind::InUse), "it is a writer now");
        unlock(&successor);
        try_lock(&other, Access::ReadWrite).expect("both have ended");
    }

    /// Whoever races, two writers never hold the lock at once, and waiting gets everybody there in the end.
    #[test]
    fn racing_writers_never_both_win() {
        const THREADS: usize = 4;
        const ROUNDS: usize = 20;
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let (inside, won) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let start = Barrier::new(THREADS);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    start.wait();
                    for _ in 0..ROUNDS {
                        let writer = open(file.path(), Access::ReadWrite);
                        let wait = Duration::from_secs(60);
                        lock(&writer, file.path(), Access::ReadWrite, wait).expect("everybody's turn comes");
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two writers at once");
                        won.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        unlock(&writer);
                    }
                });
            }
        });
        assert_eq!(won.load(Ordering::SeqCst), THREADS * ROUNDS);
    }

    #[test]
    fn waiting_ends_when_the_holder_leaves_and_at_the_bound() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let holder = open(file.path(), Access::ReadWrite);
        try_lock(&holder, Access::ReadWrite).expect("free");
        let other = open(file.path(), Access::ReadWrite);
        let begun = Instant::now();
        let bound = Duration::from_millis(200);
        assert_eq!(kind_of(lock(&other, file.path(), Access::ReadWrite, bound)), Some(Kind::InUse));
        assert!(begun.elapsed() >= bound);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                drop(holder);
            });
            lock(&other, file.path(), Access::ReadWrite, Duration::from_secs(60)).expect("the holder leaves");
        });
    }

    /// A program that locks the whole file in the classic way is named by its process number.
    #[test]
    fn a_classic_exclusive_lock_is_a_conflict() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let holder = open(file.path(), Access::ReadWrite);
        let everything = libc::flock { l_len: 0, ..record(libc::F_WRLCK, 0..1) };
        fcntl(&holder, FcntlArg::F_SETLK(&everything)).expect("no lock is held");
        let reader = open(file.path(), Access::ReadOnly);
        let error = try_lock(&reader, Access::ReadOnly).expect_err("the whole file is locked");
        assert_eq!(error.kind(), Kind::InUse);
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    }

    // --- QEMU ---

    /// Whether `qemu-io` and `qemu-img` are there; says loudly when they are not.
    fn qemu_is_installed() -> bool {
        let found = ["qemu-io", "qemu-img"].iter().all(|tool| {
            Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success())
        });
        if !found {
            eprintln!("\n*** NOT TESTED: qemu-io or qemu-img is missing, so QEMU's locks were not met ***\n");
        }
        found
    }

    fn qemu_image(directory: &Path) -> std::path::PathBuf {
        let path = directory.join("image.vhdx");
        let output =
            Command::new("qemu-img").args(["create", "-q", "-f", "vhdx"]).arg(&path).arg("16M").output();
        assert!(output.expect("qemu-img starts").status.success());
        path
    }

    /// `qemu-io` with the image open, until its standard input is closed.
    fn qemu_holder(path: &Path, options: &[&str]) -> Child {
        let mut child = Command::new("qemu-io")
            .args(options)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io starts");
        // It answers its first command only once the image is open.
        child.stdin.as_mut().expect("piped").write_all(b"length\n").expect("qemu-io listens");
        let mut output = BufReader::new(child.stdout.as_mut().expect("piped"));
        let mut line = String::new();
        while !line.contains("16 MiB") {
            line.clear();
            assert_ne!(output.read_line(&mut line).expect("readable"), 0, "qemu-io ended early");
        }
        child
    }

    fn end(mut child: Child) {
        drop(child.stdin.take());
        child.wait().expect("qemu-io ends when its input does");
    }

    fn qemu_once(path: &Path, options: &[&str]) -> Output {
        Command::new("qemu-io")
            .args(options)
            .args(["-c", "length"])
            .arg(path)
            .output()
            .expect("qemu-io starts")
    }

    #[test]
    fn qemu_keeps_us_out() {
        if !qemu_is_installed() {
            return;
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = qemu_image(directory.path());
        let writer = qemu_holder(&path, &["-f", "vhdx"]);
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let error = try_lock(&open(&path, access), access).expect_err("QEMU writes");
            assert_eq!(error.kind(), Kind::InUse);
            assert!(error.to_string().contains("open for writing"), "{error}");
        }
        end(writer);
        let reader = qemu_holder(&path, &["-r", "-f", "vhdx"]);
        let beside = open(&path, Access::ReadOnly);
        try_lock(&beside, Access::ReadOnly).expect("readers share");
        unlock(&beside);
        let writer = open(&path, Access::ReadWrite);
        assert_eq!(kind_of(try_lock(&writer, Access::ReadWrite)), Some(Kind::InUse));
        end(reader);
        try_lock(&writer, Access::ReadWrite).expect("QEMU has left");
    }

    #[test]
    fn we_keep_qemu_out() {
        if !qemu_is_installed() {
            return;
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = qemu_image(directory.path());
        let writer = open(&path, Access::ReadWrite);
        try_lock(&writer, Access::ReadWrite).expect("free");
        for options in [&["-f", "vhdx"][..], &["-r", "-f", "vhdx"], &["-f", "raw"]] {
            let refused = qemu_once(&path, options);
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(!refused.status.success() && said.contains("lock"), "{options:?}: {said}");
        }
        unlock(&writer);
        let reader = open(&path, Access::ReadOnly);
        try_lock(&reader, Access::ReadOnly).expect("free");
        assert!(qemu_once(&path, &["-r", "-f", "vhdx"]).status.success(), "readers share");
        assert!(!qemu_once(&path, &["-f", "vhdx"]).status.success(), "a writer is kept out");
        unlock(&reader);
        assert!(qemu_once(&path, &["-f", "vhdx"]).status.success(), "we have left");
    }
}
