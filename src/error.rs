//! The library's one error type.
//!
//! Callers match on [`Kind`]; people read the message: which file, which structure, which offset, what was
//! expected, and what to run next. Layers add what they know (`in_structure`, `at`, `file`, `remedy`) on the
//! way up, to an [`Error`] or to a [`Result`] by [`Locate`]; a layer never overwrites what an inner one said.
//!
//! An error of the operating system becomes one by [`Doing`], and stays its
//! [`source`](std::error::Error::source):
//!
//! ```
//! use vhdx_ublk::error::{Doing, Kind, Locate};
//!
//! let path = "/no/such/image.vhdx".as_ref();
//! let found = std::fs::metadata(path).doing("reading the attributes").file(path);
//! assert_eq!(found.expect_err("it is missing").kind(), Kind::NotFound);
//! ```
//!
//! `{}` shows an error without its source, `{:#}` with it, as `anyhow` does: a message or a log line wants
//! `{:#}`. Either is one printable line, whatever names are in it.

use std::fmt::{self, Write};
use std::io;
use std::path::{Path, PathBuf};

use crate::printable::{Printable, printable};

/// What to do about an image that is damaged beyond repair. No advice costs data that is left: an image is
/// never to be replaced before what is in it was copied.
pub const SALVAGE: &str =
    "`vhdx-ublk salvage FILE COPY` copies what is left of the disk, and does not change the file";

/// What went wrong, as far as a caller needs to tell cases apart. Serialised in kebab case: `not-vhdx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The file is no VHDX at all.
    NotVhdx,
    /// A structure contradicts the format.
    Corrupt,
    /// The file is shorter than its structures say.
    Truncated,
    /// Legal, but not something this program handles.
    Unsupported,
    /// Another program has the image or the device.
    InUse,
    /// The host has no room.
    NoSpace,
    /// The caller lacks a permission.
    Permission,
    /// What is there is another image than the one that is needed.
    Mismatch,
    /// The target exists already.
    Exists,
    /// No such file or device.
    NotFound,
    /// The kernel offers no ublk.
    NoDriver,
    /// An argument makes no sense.
    Usage,
    /// The user has stopped the operation.
    Stopped,
    /// An earlier failure forbids all further writes.
    Poisoned,
    /// The operating system failed an operation.
    Io,
}

impl From<io::ErrorKind> for Kind {
    fn from(kind: io::ErrorKind) -> Self {
        match kind {
            io::ErrorKind::NotFound => Self::NotFound,
            io::ErrorKind::PermissionDenied => Self::Permission,
            io::ErrorKind::AlreadyExists => Self::Exists,
            // The last: by a limit of the process or of the file system.
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::NoSpace
            }
            _ => Self::Io,
        }
    }
}

/// An error with its place in the file and its remedy.
#[derive(Debug)]
pub struct Error(Box<Inner>);

/// Behind a pointer, so that a [`Result`] is small.
#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    file: Option<PathBuf>,
    structure: Option<&'static str>,
    offset: Option<u64>,
    remedy: Option<String>,
    source: Option<io::Error>,
}

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind`; `message` says what was found and what was expected.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            file: None,
            structure: None,
            offset: None,
            remedy: None,
            source: None,
        }))
    }

    /// A structure that contradicts the format.
    pub fn corrupt(structure: &'static str, message: impl Into<String>) -> Self {
        Self::new(Kind::Corrupt, message).in_structure(structure)
    }

    /// An operating system error while `doing` something; the kind follows from the error number.
    pub fn io(doing: impl Into<String>, source: io::Error) -> Self {
        let mut error = Self::new(source.kind().into(), doing);
        error.0.source = Some(source);
        error
    }

    /// Names the structure, unless an inner layer already did.
    #[must_use]
    pub fn in_structure(mut self, structure: &'static str) -> Self {
        self.0.structure.get_or_insert(structure);
        self
    }

    /// Gives the byte offset in the file, unless an inner layer already did.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Names the file, unless an inner layer already did.
    #[must_use]
    pub fn file(mut self, file: &Path) -> Self {
        self.0.file.get_or_insert_with(|| file.to_owned());
        self
    }

    /// Calls the file `path`, as the reader does.
    #[must_use]
    pub fn called(mut self, path: &Path) -> Self {
        self.0.file = Some(path.to_owned());
        self
    }

    /// Says what the reader can do next, unless an inner layer already did.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy.get_or_insert_with(|| remedy.into());
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// What was found and what was expected, without its place, and the cause beneath.
    pub fn message(&self) -> String {
        let text = match &self.0.source {
            Some(source) => format!("{}: {source}", self.0.message),
            None => self.0.message.clone(),
        };
        printable(&text).into_owned()
    }

    /// The operating system's error number beneath, if there is one.
    pub fn os_error(&self) -> Option<i32> {
        self.0.source.as_ref()?.raw_os_error()
    }

    /// The file concerned.
    pub fn file_path(&self) -> Option<&Path> {
        self.0.file.as_deref()
    }

    /// The structure in the file.
    pub fn structure(&self) -> Option<&'static str> {
        self.0.structure
    }

    /// The byte offset in the file.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// What can be done about it.
    pub fn remedy_text(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show_source = f.alternate();
        let mut f = Printable(f);
        if let Some(file) = &self.0.file {
            write!(f, "{}: ", file.display())?;
        }
        if let Some(structure) = self.0.structure {
            write!(f, "{structure}")?;
            if let Some(offset) = self.0.offset {
                write!(f, " at byte {offset}")?;
            }
            write!(f, ": ")?;
        }
        write!(f, "{}", self.0.message)?;
        if let (None, Some(offset)) = (self.0.structure, self.0.offset) {
            write!(f, " (at byte {offset})")?;
        }
        match &self.0.source {
            Some(source) if show_source => write!(f, ": {source}"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| source as _)
    }
}

/// Says what failed, where the operating system or a format of text only says why.
pub trait Doing<T> {
    /// Turns a failure into an [`Error`] whose message is `what`, as [`Error::io`].
    ///
    /// # Errors
    ///
    /// The failure.
    fn doing(self, what: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|error| Error::io(what, error.into()))
    }
}

/// Says where an error belongs, with the methods of [`Error`].
pub trait Locate {
    /// As [`Error::file`].
    #[must_use]
    fn file(self, file: &Path) -> Self;

    /// As [`Error::at`].
    #[must_use]
    fn at(self, offset: u64) -> Self;

    /// As [`Error::in_structure`].
    #[must_use]
    fn in_structure(self, structure: &'static str) -> Self;
}

impl<T> Locate for Result<T> {
    fn file(self, file: &Path) -> Self {
        self.map_err(|error| error.file(file))
    }

    fn at(self, offset: u64) -> Self {
        self.map_err(|error| error.at(offset))
    }

    fn in_structure(self, structure: &'static str) -> Self {
        self.map_err(|error| error.in_structure(structure))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_file_structure_offset_and_cause() {
        let error = Error::corrupt("header 1", "checksum does not match").at(65536).file(Path::new("a.vhdx"));
        assert_eq!(error.to_string(), "a.vhdx: header 1 at byte 65536: checksum does not match");
        let grown: io::Result<()> = Err(io::Error::from_raw_os_error(28));
        let error = grown.doing("growing the file").at(4096).file(Path::new("b.vhdx")).expect_err("no room");
        assert_eq!((error.kind(), error.os_error()), (Kind::NoSpace, Some(28)));
        assert_eq!(error.to_string(), "b.vhdx: growing the file (at byte 4096)");
        let whole = format!("{error:#}");
        assert_eq!(whole, "b.vhdx: growing the file (at byte 4096): No space left on device (os error 28)");
        assert_eq!(whole, format!("{:#}", anyhow::Error::from(error)), "the chain is the same");
    }

    /// Neither a name nor a message forges a line or steers a terminal.
    #[test]
    fn an_error_is_one_printable_line() {
        let error =
            Error::new(Kind::Corrupt, "key \u{9b}2J").file(Path::new("a\nvhdx-ublk: done\x1b]0;x\x07"));
        assert_eq!(error.to_string(), "a\\nvhdx-ublk: done\\u{1b}]0;x\\u{7}: key \\u{9b}2J");
        assert_eq!(error.message(), "key \\u{9b}2J");
    }

    #[test]
    fn an_outer_layer_never_overwrites_an_inner_one() {
        let error = Error::new(Kind::Corrupt, "x").at(1).at(2).remedy("first").remedy("second");
        assert_eq!(error.to_string(), "x (at byte 1)");
        assert_eq!(error.remedy_text(), Some("first"));
    }
}
