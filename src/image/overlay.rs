//! A log replayed in memory: what a read-only open sees in place of the file's bytes.
//!
//! An ordered map of ranges that never overlap; a later change cuts or replaces what it covers, as a write
//! would. Its memory is bounded by the log's own length.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::format::log::Change;
use crate::format::{MIB, PAGE, index};

/// Pages and zeros that lie over the file.
#[derive(Debug, Default)]
pub struct Overlay {
    /// By start; the end lies beyond the key, and beyond no other key.
    ranges: BTreeMap<u64, Piece>,
    file_length: u64,
}

#[derive(Debug, Clone)]
enum Piece {
    Page(Box<[u8; PAGE]>),
    Zero { end: u64 },
}

impl Overlay {
    /// An overlay over a file of `file_length` bytes.
    pub fn new(file_length: u64) -> Self {
        Self { ranges: BTreeMap::new(), file_length }
    }

    /// The length the file would have after the replay, bytes.
    pub fn file_length(&self) -> u64 {
        self.file_length
    }

    /// The file would be at least `length` bytes long.
    pub fn extend(&mut self, length: u64) {
        self.file_length = self.file_length.max(length);
    }

    /// Lays one change over all earlier ones.
    pub fn apply(&mut self, change: Change) {
        let range = change.range();
        assert!(range.start < range.end, "a parsed change is not empty");
        assert!(range.start.is_multiple_of(PAGE as u64), "{range:?} starts on a page");
        assert!(range.end.is_multiple_of(PAGE as u64), "{range:?} ends on a page");
        self.cut(range.start, range.end);
        let piece = match change {
            Change::Data { page, .. } => {
                self.extend(range.end.next_multiple_of(MIB));
                Piece::Page(page)
            }
            // What lies past the end reads as zero already: zeros do not lengthen the file.
            Change::Zero { .. } => Piece::Zero { end: range.end },
        };
        let earlier = self.ranges.range(..range.end).next_back();
        assert!(earlier.is_none_or(|(&start, piece)| piece.end(start) <= range.start), "ranges overlap");
        self.ranges.insert(range.start, piece);
    }

    /// Whether the log has changed the page at `offset`.
    pub fn covers(&self, offset: u64) -> bool {
        let piece = self.ranges.range(..=offset).next_back();
        piece.is_some_and(|(&start, piece)| offset < piece.end(start))
    }

    /// The first byte of `bytes` of the file that the log has changed.
    pub fn first_in(&self, bytes: Range<u64>) -> Option<u64> {
        if self.covers(bytes.start) {
            return Some(bytes.start);
        }
        self.ranges.range(bytes).next().map(|(start, _)| *start)
    }

    /// Where the log has changed something next, at `offset` or behind it.
    pub fn next_change(&self, offset: u64) -> Option<u64> {
        if self.covers(offset) {
            return Some(offset);
        }
        self.ranges.range(offset..).next().map(|(&start, _)| start)
    }

    /// Replaces in `bytes`, read from the file at `offset`, what the log has changed.
    pub fn patch(&self, offset: u64, bytes: &mut [u8]) {
        let end = offset + bytes.len() as u64;
        let first = self.ranges.range(..=offset).next_back().map_or(offset, |(start, _)| *start);
        for (&start, piece) in self.ranges.range(first..end) {
            let from = start.max(offset);
            let until = piece.end(start).min(end);
            if from >= until {
                continue;
            }
            assert!(until <= piece.end(start) && until <= end, "what is patched was changed and is read");
            let target = &mut bytes[index(from - offset)..index(until - offset)];
            match piece {
                Piece::Page(page) => target.copy_from_slice(&page[index(from - start)..index(until - start)]),
                Piece::Zero { .. } => target.fill(0),
            }
        }
    }

    /// The changed ranges of the file, bytes, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.ranges.iter().map(|(&start, piece)| start..piece.end(start))
    }

    /// Removes `from..until` from the map; borders are page borders, so pages go whole.
    fn cut(&mut self, from: u64, until: u64) {
        if let Some((&start, piece)) = self.ranges.range(..from).next_back()
            && piece.end(start) > from
        {
            let end = piece.end(start);
            self.ranges.insert(start, Piece::Zero { end: from });
            self.ranges.insert(from, Piece::Zero { end });
        }
        while let Some((&start, piece)) = self.ranges.range(from..until).next() {
            let end = piece.end(start);
            assert!(start < end, "no range is empty");
            self.ranges.remove(&start);
            if end > until {
                self.ranges.insert(until, Piece::Zero { end });
            }
        }
    }
}

impl Piece {
    fn end(&self, start: u64) -> u64 {
        match self {
            Self::Page(_) => start + PAGE as u64,
            Self::Zero { end } => *end,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn data(page: u64, fill: u8) -> Change {
        Change::Data { file_offset: page * 4096, page: Box::new([fill; PAGE]) }
    }

    #[test]
    fn the_next_change_is_found_from_within_and_from_before() {
        let mut overlay = Overlay::new(0);
        overlay.apply(data(3, 1));
        overlay.apply(Change::Zero { file_offset: 5 * 4096, length: 2 * 4096 });
        let next = |page: u64| overlay.next_change(page * 4096).map(|found| found / 4096);
        assert_eq!([0, 3, 4, 5, 6, 7].map(next), [Some(3), Some(3), Some(5), Some(5), Some(6), None]);
    }

    proptest! {
        /// Whatever the changes, the overlay says what writing them in order would have left.
        #[test]
        fn reads_as_if_the_changes_had_been_written(
            changes in prop::collection::vec((0_u64..16, 0_u64..8, 1_u8..255), 0..40),
            from in 0_u64..16, count in 1_u64..8,
        ) {
            let mut overlay = Overlay::new(0);
            let mut model = vec![255_u8; 32 * PAGE];
            for (page, zeros, fill) in changes {
                let change = if zeros == 0 {
                    data(page, fill)
                } else {
                    Change::Zero { file_offset: page * 4096, length: zeros * 4096 }
                };
                let range = change.range();
                model[index(range.start)..index(range.end)].fill(if zeros == 0 { fill } else { 0 });
                overlay.apply(change);
            }
            let mut bytes = vec![255_u8; index(count * 4096)];
            overlay.patch(from * 4096, &mut bytes);
            prop_assert_eq!(&bytes[..], &model[index(from * 4096)..index((from + count) * 4096)]);
            let ranges: Vec<_> = overlay.ranges().collect();
            prop_assert!(ranges.is_sorted_by(|a, b| a.end <= b.start), "ranges overlap: {:?}", ranges);
        }
    }
}
