//! What a host does, tried on a file that has no name and goes with this process.
//!
//! Only in a folder that belongs to the caller and that no other user may write: elsewhere nothing is made.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, OFlag, fallocate, open};
use nix::sys::stat::Mode;
use nix::unistd::geteuid;

use super::finding::Finding;
use crate::disk::host_bytes;

/// How much is written and punched.
const PUNCHED: usize = 1 << 20;

/// How many syncs are timed.
const SYNCS: usize = 9;

/// Syncs that take longer make every flush of a guest slow.
const SLOW: Duration = Duration::from_millis(100);

const PUNCH: &str = "giving space back";
const SYNC: &str = "sync";

/// Tries whether space can be given back in `folder`, and how long a sync takes.
pub(super) fn checks(folder: &Path) -> Vec<Finding> {
    let file = match nameless(folder) {
        Ok(file) => file,
        Err(reason) => {
            let found = format!("not tried: {reason}");
            return vec![Finding::fine(PUNCH, found.clone()), Finding::fine(SYNC, found)];
        }
    };
    vec![punch(&file), sync(&file)]
}

/// A file without a name in `folder`; why there is none.
fn nameless(folder: &Path) -> Result<File, String> {
    let found = fs::metadata(folder).map_err(|error| error.to_string())?;
    let is_ours = found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0;
    if !is_ours {
        return Err("other users may write to the folder".into());
    }
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    match open(folder, flags, Mode::from_bits_truncate(0o600)) {
        Ok(file) => Ok(file.into()),
        Err(errno) => Err(format!("the host makes no file without a name: {errno}")),
    }
}

fn punch(file: &File) -> Finding {
    let remedy =
        "discards give no space back here: `vhdx-ublk compact` shortens the image when it is at rest";
    match punched(file) {
        Ok((before, after)) if after < before => {
            Finding::fine(PUNCH, "works, tried on a temporary file in the same folder")
        }
        Ok(_) => Finding::wrong(PUNCH, "the host punches holes, and they take the same space", remedy),
        Err(error) => Finding::wrong(PUNCH, format!("the host punches no holes: {error}"), remedy),
    }
}

/// The space that the file takes before and after a hole is punched.
fn punched(file: &File) -> io::Result<(u64, u64)> {
    file.write_all_at(&vec![0xa5; 2 * PUNCHED], 0)?;
    file.sync_all()?;
    let before = host_bytes(&file.metadata()?);
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, 0, i64::try_from(PUNCHED).expect("a small constant"))?;
    file.sync_all()?;
    Ok((before, host_bytes(&file.metadata()?)))
}

fn sync(file: &File) -> Finding {
    match median_sync(file) {
        Ok(median) => judge_sync(median),
        Err(error) => {
            let remedy = "do not write here before the cause is found: dmesg, smartctl, the server's log";
            Finding::wrong(SYNC, format!("a sync fails: {error}"), remedy)
        }
    }
}

fn judge_sync(median: Duration) -> Finding {
    let time = shown(median);
    let found = format!("median of {SYNCS}: {time}, on a temporary file in the same folder");
    if median < SLOW {
        return Finding::fine(SYNC, found);
    }
    let remedy = "every flush of the device waits as long: use a disk with a faster sync for busy images";
    Finding::wrong(SYNC, found, remedy)
}

/// Milliseconds to the tenth; less than one in microseconds.
fn shown(time: Duration) -> String {
    match time.as_micros() {
        micros @ ..1000 => format!("{micros} us"),
        micros => format!("{}.{} ms", micros / 1000, micros % 1000 / 100),
    }
}

fn median_sync(file: &File) -> io::Result<Duration> {
    let mut times = Vec::with_capacity(SYNCS);
    for round in 0..SYNCS {
        file.write_all_at(&[0x5a; 4096], (round * 4096) as u64)?;
        let began = Instant::now();
        file.sync_data()?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    Ok(times[SYNCS / 2])
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn nothing_is_left_and_nothing_is_made_where_others_may_write() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let checks = checks(folder.path());
        assert_eq!(checks.iter().map(|finding| finding.check).collect::<Vec<_>>(), [PUNCH, SYNC]);
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 0);
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).expect("ours");
        let refused = nameless(folder.path()).expect_err("not the caller's alone");
        assert!(refused.contains("other users"), "{refused}");
    }

    #[test]
    fn a_slow_sync_is_reported_and_a_file_that_cannot_be_written_as_well() {
        assert!(judge_sync(SLOW.mul_f32(0.9)).fine && !judge_sync(SLOW).fine);
        let found = judge_sync(Duration::from_micros(3388)).found;
        assert_eq!(found, "median of 9: 3.3 ms, on a temporary file in the same folder");
        assert_eq!(shown(Duration::from_micros(40)), "40 us");
        let null = File::open("/dev/null").expect("there");
        assert!(!punch(&null).fine && !sync(&null).fine, "it was opened for reading");
    }
}
