//! What an examination found, for people and for programs.

use schemars::JsonSchema;
use serde::Serialize;

use crate::error::Error;

/// How many findings of each severity are kept; all are counted. More are of no help, and a hostile image has
/// one per BAT entry.
pub const KEPT_FINDINGS: u64 = 1000;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Contradicts the format: data may be lost already, and the image is not to be written to.
    Corruption,
    /// Room taken on the host that nothing names. No data is in danger.
    Leak,
    /// Worth knowing, and no fault.
    Note,
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The structure concerned.
    pub structure: &'static str,
    /// Where in the file, bytes; none if it concerns no place.
    pub offset: Option<u64>,
    /// What was found.
    pub what: String,
    /// What the reader can do; what a repair does if `repairable`.
    pub remedy: Option<String>,
    /// Whether a repair mends it.
    pub repairable: bool,
}

impl Finding {
    /// A corruption, beyond repair unless [`Finding::mended_by`] says otherwise.
    pub(super) fn corruption(structure: &'static str, offset: u64, what: impl Into<String>) -> Self {
        Self::new(Severity::Corruption, structure, offset, what)
    }

    /// A leak.
    pub(super) fn leak(structure: &'static str, offset: u64, what: impl Into<String>) -> Self {
        Self::new(Severity::Leak, structure, offset, what)
    }

    /// A note.
    pub(super) fn note(structure: &'static str, offset: u64, what: impl Into<String>) -> Self {
        Self::new(Severity::Note, structure, offset, what)
    }

    /// What a parser refused.
    pub(super) fn refusal(error: &Error) -> Self {
        Self {
            severity: Severity::Corruption,
            structure: error.structure().unwrap_or("file"),
            offset: error.offset(),
            what: error.message(),
            remedy: error.remedy_text().map(str::to_owned),
            repairable: false,
        }
    }

    /// What a repair does about it.
    pub(super) fn mended_by(mut self, repair: &str) -> Self {
        (self.remedy, self.repairable) = (Some(repair.to_owned()), true);
        self
    }

    /// What the reader can do about it.
    pub(super) fn remedy(mut self, remedy: &str) -> Self {
        self.remedy = Some(remedy.to_owned());
        self
    }

    fn new(severity: Severity, structure: &'static str, offset: u64, what: impl Into<String>) -> Self {
        let offset = Some(offset);
        Self { severity, structure, offset, what: what.into(), remedy: None, repairable: false }
    }
}

/// What was found in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LogFound {
    /// The examination did not come so far.
    #[default]
    Unknown,
    /// Nothing to replay.
    Clean,
    /// Entries to replay: everything else was examined as if they had been.
    Dirty,
    /// Named by the header, never written.
    Virgin,
    /// Named by the header, and no valid sequence of entries in it.
    Torn,
}

/// The result of an examination.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Report {
    /// Whether every structure could be examined.
    pub complete: bool,
    /// Corruptions, kept or not.
    pub corruptions: u64,
    /// Runs of leaked space, kept or not.
    pub leaks: u64,
    /// Notes, kept or not.
    pub notes: u64,
    /// Corruptions that no repair mends.
    pub beyond_repair: u64,
    /// Of all findings, those that a repair mends.
    pub repairable: u64,
    /// What was found in the log.
    pub log: LogFound,
    /// Entries to replay.
    pub log_entries: usize,
    /// Payload blocks of the virtual disk.
    pub blocks: u64,
    /// Payload blocks with data in this file.
    pub allocated_blocks: u64,
    /// Bytes between used ones that nothing names, leaked ones included. Writers use them first.
    pub free_bytes: u64,
    /// Of these, bytes in MiB that take room on the host.
    pub leaked_bytes: u64,
    /// Bytes at the file's end that nothing names.
    pub unused_tail_bytes: u64,
    /// At most [`KEPT_FINDINGS`] of each severity, in the order of the examination.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The worst that was found; none if only notes were.
    pub fn verdict(&self) -> Option<Severity> {
        match (self.corruptions, self.leaks) {
            (0, 0) => None,
            (0, _) => Some(Severity::Leak),
            _ => Some(Severity::Corruption),
        }
    }

    /// No repair is possible after all.
    pub(super) fn withdraw_repairs(&mut self) {
        (self.repairable, self.beyond_repair) = (0, self.corruptions);
        for finding in self.findings.iter_mut().filter(|finding| finding.repairable) {
            (finding.repairable, finding.remedy) = (false, None);
        }
        assert!(!self.findings.iter().any(|finding| finding.repairable), "nothing is promised any longer");
    }

    pub(super) fn add(&mut self, finding: Finding) {
        let count = match finding.severity {
            Severity::Corruption => &mut self.corruptions,
            Severity::Leak => &mut self.leaks,
            Severity::Note => &mut self.notes,
        };
        *count += 1;
        self.repairable += u64::from(finding.repairable);
        self.beyond_repair += u64::from(finding.severity == Severity::Corruption && !finding.repairable);
        if *count <= KEPT_FINDINGS {
            self.findings.push(finding);
        }
        assert!(self.findings.len() as u64 <= 3 * KEPT_FINDINGS, "findings are bounded");
        assert!(self.beyond_repair <= self.corruptions, "only a corruption is beyond repair");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_counted_and_some_of_each_severity_are_kept() {
        let mut report = Report::default();
        for _ in 0..KEPT_FINDINGS + 5 {
            report.add(Finding::note("BAT", 0, "odd"));
        }
        assert_eq!(report.verdict(), None);
        report.add(Finding::leak("space", 0, "lost").mended_by("is given back"));
        assert_eq!(report.verdict(), Some(Severity::Leak));
        report.add(Finding::corruption("BAT", 0, "wrong"));
        assert_eq!(report.verdict(), Some(Severity::Corruption));
        assert_eq!((report.notes, report.leaks, report.corruptions), (KEPT_FINDINGS + 5, 1, 1));
        assert_eq!((report.findings.len() as u64, report.repairable), (KEPT_FINDINGS + 2, 1));
        report.add(Finding::corruption("BAT", 8, "odd").mended_by("is put right"));
        assert_eq!((report.repairable, report.beyond_repair), (2, 1));
        report.withdraw_repairs();
        assert_eq!((report.repairable, report.beyond_repair), (0, 2));
        assert!(report.findings.iter().all(|finding| !finding.repairable));
    }
}
