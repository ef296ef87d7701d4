//! A mapfile of GNU ddrescue: which bytes of the disk came back.
//!
//! Lines of text, numbers in hexadecimal; the blocks follow each other from 0 to the end of the disk. It is
//! written during the copy, so that it takes no memory. An image may be damaged, or made, so that each of its
//! sectors is a run of its own: what lies behind the last entry that the file may have is one run, and not
//! known.

use std::io::{self, Write};
use std::ops::Range;

use super::remains::Status;

/// What every mapfile begins with.
pub(super) const MAPFILE: &[u8] = b"# Mapfile.";

/// The most entries of a mapfile, which is 32 MiB long then.
const MOST_ENTRIES: u64 = 1 << 20;

/// A mapfile that is being written.
pub struct Mapfile<W> {
    to: W,
    /// Entries that it may still get.
    left: u64,
    /// The run that the next one may continue.
    open: Option<(Range<u64>, Status)>,
}

impl<W: Write> Mapfile<W> {
    /// Begins a mapfile of what was salvaged.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn begin(mut to: W) -> io::Result<Self> {
        let version = env!("CARGO_PKG_VERSION");
        writeln!(to, "# Mapfile. Created by vhdx-ublk {version}, for tools of GNU ddrescue")?;
        writeln!(to, "# + is as the disk had it, - is lost, ? is not known: a log or a parent is missing")?;
        writeln!(to, "# current_pos  current_status  current_pass")?;
        writeln!(to, "0x00000000     +               1")?;
        writeln!(to, "#      pos        size  status")?;
        Ok(Self { to, left: MOST_ENTRIES, open: None })
    }

    /// Adds bytes of the disk, which follow those that were added last.
    ///
    /// # Errors
    /// Those of the file.
    pub fn add(&mut self, range: Range<u64>, status: Status) -> io::Result<()> {
        let end = self.open.as_ref().map_or(0, |(open, _)| open.end);
        assert_eq!(range.start, end, "a mapfile has no gaps");
        let is_last = self.is_cut();
        match &mut self.open {
            Some((open, same)) if *same == status || is_last => open.end = range.end,
            _ => {
                self.close()?;
                self.left -= 1;
                self.open = Some((range, if self.is_cut() { Status::Unknown } else { status }));
            }
        }
        Ok(())
    }

    /// Whether it has all entries that it may have: the last one is all the rest of the disk.
    pub fn is_cut(&self) -> bool {
        self.left == 0
    }

    /// Ends it.
    ///
    /// # Errors
    /// Those of the file.
    pub fn finish(mut self) -> io::Result<W> {
        self.close()?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn close(&mut self) -> io::Result<()> {
        let Some((range, status)) = self.open.take() else { return Ok(()) };
        let sign = match status {
            Status::Finished => '+',
            Status::Lost => '-',
            Status::Unknown => '?',
        };
        writeln!(self.to, "0x{:08X}  0x{:08X}  {sign}", range.start, range.end - range.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes and signs of the entries.
    fn entries(text: &str) -> Vec<&str> {
        text.lines().filter(|line| !line.starts_with('#')).skip(1).collect()
    }

    #[test]
    fn a_mapfile_ends_whatever_the_runs_are() {
        let mut mapfile = Mapfile { left: 3, ..Mapfile::begin(Vec::new()).expect("memory") };
        for sector in 0..9 {
            let status = if sector % 2 == 0 { Status::Finished } else { Status::Lost };
            assert_eq!(mapfile.is_cut(), sector > 2);
            mapfile.add(sector * 512..(sector + 1) * 512, status).expect("memory");
        }
        let text = String::from_utf8(mapfile.finish().expect("memory")).expect("text");
        let expected =
            ["0x00000000  0x00000200  +", "0x00000200  0x00000200  -", "0x00000400  0x00000E00  ?"];
        assert_eq!(entries(&text), expected);
    }

    #[test]
    fn runs_of_one_status_are_one_line_and_nothing_is_left_out() {
        let mut mapfile = Mapfile::begin(Vec::new()).expect("memory");
        let runs = [
            (0..512, Status::Finished),
            (512..4096, Status::Finished),
            (4096..1 << 20, Status::Lost),
            (1 << 20..5 << 32, Status::Unknown),
        ];
        for (range, status) in runs {
            mapfile.add(range, status).expect("memory");
        }
        let text = String::from_utf8(mapfile.finish().expect("memory")).expect("text");
        assert_eq!(
            entries(&text),
            ["0x00000000  0x00001000  +", "0x00001000  0x000FF000  -", "0x00100000  0x4FFF00000  ?"]
        );
    }
}
