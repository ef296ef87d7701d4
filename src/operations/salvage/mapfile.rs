//! A mapfile of GNU ddrescue: which bytes of the disk came back.
//!
//! Lines of text, numbers in hexadecimal; the blocks follow each other from 0 to the end of the disk. It is
//! written during the copy, so that it takes no memory.

use std::io::{self, Write};
use std::ops::Range;

use super::remains::Status;

/// What every mapfile begins with.
pub(super) const MAPFILE: &[u8] = b"# Mapfile.";

/// A mapfile that is being written.
pub struct Mapfile<W> {
    to: W,
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
        Ok(Self { to, open: None })
    }

    /// Adds bytes of the disk, which follow those that were added last.
    ///
    /// # Errors
    /// Those of the file.
    pub fn add(&mut self, range: Range<u64>, status: Status) -> io::Result<()> {
        let end = self.open.as_ref().map_or(0, |(open, _)| open.end);
        assert_eq!(range.start, end, "a mapfile has no gaps");
        match &mut self.open {
            Some((open, same)) if *same == status => open.end = range.end,
            _ => {
                self.close()?;
                self.open = Some((range, status));
            }
        }
        Ok(())
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
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).skip(1).collect();
        assert_eq!(
            lines,
            ["0x00000000  0x00001000  +", "0x00001000  0x000FF000  -", "0x00100000  0x4FFF00000  ?"]
        );
    }
}
