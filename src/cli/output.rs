//! What the user reads: answers on standard output, errors on standard error.
//!
//! Names in it are made printable: in text as Rust writes them, `\u{9b}`, in JSON as JSON does, `\u009b`.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use anyhow::{Chain, Context};
use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::disk::folder_of;
use vhdx_ublk::error::{Doing, Error, Kind, Result, SALVAGE};
use vhdx_ublk::printable::{is_printable, printable, shell};

use super::{FAILURE, SUCCESS};

/// Writes one line to standard output, as [`print()`].
///
/// # Errors
///
/// As [`print()`].
pub fn print_line(line: &str) -> Result<()> {
    print(&printable(line))
}

/// Writes `text`, in which only line breaks are not printable, and a newline to standard output. A reader
/// that has left is no failure.
///
/// # Errors
///
/// When standard output cannot be written for any other reason.
pub fn print(text: &str) -> Result<()> {
    print_while_read(text).map(drop)
}

/// As [`print()`], for a command that ends only when it is read no longer: `false` if the reader has left.
///
/// # Errors
///
/// As [`print()`].
pub fn print_while_read(text: &str) -> Result<bool> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        outcome => outcome.doing("writing the output").map(|()| true),
    }
}

/// Writes `value` as JSON to standard output.
///
/// # Errors
///
/// As [`print()`].
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).doing("writing the output as JSON")?;
    print(&ascii_controls(&text))
}

/// JSON that no terminal obeys: `serde_json` escapes only what JSON must, the first 32 characters. Others
/// that are not printable are in strings alone.
fn ascii_controls(json: &str) -> String {
    let mut shown = String::with_capacity(json.len());
    for character in json.chars() {
        if is_printable(character) || character == '\n' {
            shown.push(character);
        } else {
            let _ = write!(shown, "\\u{:04x}", u32::from(character)); // a string takes everything
        }
    }
    shown
}

/// The name of a state, the same as in JSON.
///
/// # Errors
///
/// Never for a plain enum.
pub fn word(value: &impl Serialize) -> anyhow::Result<String> {
    let value = serde_json::to_value(value).context("naming a state")?;
    Ok(value.as_str().unwrap_or_default().to_owned())
}

/// Prints what went wrong, and what to do about it; on standard error even as JSON is wanted, if standard
/// output cannot be written. If the reader of that has left, only the exit status shows it.
pub fn report(error: &(dyn StdError + 'static), json: bool) {
    if has_no_reader(error) {
        return;
    }
    if json && print_json(&Report { error: Failure::of(error) }).is_ok() {
        return;
    }
    // If it cannot be written, the exit status still shows the failure.
    let mut stderr = io::stderr().lock();
    let _ = writeln!(stderr, "vhdx-ublk: {}", message(error));
    if let Some(remedy) = remedy(error) {
        let _ = writeln!(stderr, "  try: {}", printable(&remedy));
    }
}

/// `error`, in which a file is called as it is among the `arguments`: some commands know it by its absolute
/// path when they fail, and some do not yet.
pub fn as_typed(error: anyhow::Error, arguments: &[OsString]) -> anyhow::Error {
    let error = match error.downcast::<Error>() {
        Ok(error) => error,
        Err(other) => return other,
    };
    let is = |path: &&Path, found: &Path| {
        path.file_name() == found.file_name()
            && fs::canonicalize(folder_of(path)).is_ok_and(|folder| folder == folder_of(found))
    };
    let typed = error
        .file_path()
        .filter(|found| found.is_absolute())
        .and_then(|found| arguments.iter().map(Path::new).find(|path| is(path, found)).map(Path::to_owned));
    match typed {
        Some(typed) => error.called(&typed).into(),
        None => error.into(),
    }
}

/// Whether standard output is a pipe without a reader.
fn has_no_reader(error: &(dyn StdError + 'static)) -> bool {
    os_error(error).is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) && is_of_output(error)
}

/// Whether standard output could not be written.
fn is_of_output(error: &(dyn StdError + 'static)) -> bool {
    let is_output = |text: String| ["writing the output", "writing standard output"].contains(&text.as_str());
    Chain::new(error).any(|cause| is_output(cause.to_string()))
}

/// The last failure of all `outcomes`, each of which is asked for; earlier ones are reported at once.
///
/// # Errors
///
/// That failure.
pub fn last_failure(outcomes: impl Iterator<Item = Result<()>>) -> Result<()> {
    let mut failure = None;
    for error in outcomes.filter_map(Result::err) {
        if let Some(earlier) = failure.replace(error) {
            report(&earlier, false);
        }
    }
    failure.map_or(Ok(()), Err)
}

/// Ends a command that was given several targets, with what became of each: as JSON, or the last failure,
/// and earlier ones at once. The exit status.
///
/// # Errors
///
/// That failure; as [`print()`].
pub fn finish(outcomes: Vec<(OsString, Result<()>)>, json: bool) -> Result<u8> {
    if !json {
        return last_failure(outcomes.into_iter().map(|(_, outcome)| outcome)).map(|()| SUCCESS);
    }
    print_json(&outcomes.iter().map(Outcome::of).collect::<Vec<_>>())?;
    Ok(if outcomes.iter().all(|(_, outcome)| outcome.is_ok()) { SUCCESS } else { FAILURE })
}

/// What a command prints that has failed.
#[derive(Serialize, JsonSchema)]
pub struct Report<'a> {
    error: Failure<'a>,
}

/// An error as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Failure<'a> {
    /// What went wrong, in a word.
    kind: Kind,
    /// What went wrong, in a line.
    message: String,
    /// The file concerned.
    file: Option<WrittenPath>,
    /// The structure in it.
    structure: Option<&'static str>,
    /// Where that is in the file, bytes.
    offset: Option<u64>,
    /// What to do about it.
    remedy: Option<Cow<'a, str>>,
}

/// What became of one of several targets.
#[derive(Serialize, JsonSchema)]
pub struct Outcome<'a> {
    /// The target, as it was named.
    target: WrittenPath,
    /// Why the command has failed for it.
    error: Option<Failure<'a>>,
}

impl<'a> Failure<'a> {
    /// `error`, with advice.
    pub fn of(error: &'a (dyn StdError + 'static)) -> Self {
        let known = known(error);
        let file = known.and_then(Error::file_path);
        Self {
            kind: kind(error),
            message: message(error),
            file: file.map(WrittenPath::of),
            structure: known.and_then(Error::structure),
            offset: known.and_then(Error::offset),
            remedy: remedy(error),
        }
    }
}

impl<'a> Outcome<'a> {
    fn of((target, outcome): &'a (OsString, Result<()>)) -> Self {
        let error = outcome.as_ref().err().map(|error| Failure::of(error));
        Self { target: WrittenPath::of(target), error }
    }
}

impl Failure<'_> {
    /// As one line, with its advice.
    pub fn text(&self) -> String {
        match &self.remedy {
            Some(remedy) => format!("{}; try: {}", self.message, printable(remedy)),
            None => self.message.clone(),
        }
    }
}

/// What went wrong and why, as one printable line.
pub fn message(error: &(dyn StdError + 'static)) -> String {
    let causes: Vec<String> = Chain::new(error).map(ToString::to_string).collect();
    printable(&causes.join(": ")).into_owned()
}

/// The library's error in the chain of `error`, if it has one.
fn known<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Error> {
    Chain::new(error).find_map(|cause| cause.downcast_ref())
}

/// The operating system's error in the chain of `error`, if it has one.
fn os_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a io::Error> {
    Chain::new(error).find_map(|cause| cause.downcast_ref())
}

/// What went wrong, whatever the command added to it.
pub fn kind(error: &(dyn StdError + 'static)) -> Kind {
    let by_system = || os_error(error).map_or(Kind::Io, |error| error.kind().into());
    known(error).map_or_else(by_system, Error::kind)
}

/// The error with advice, if there is any: for an error that is sent to another process.
pub fn advised(error: Error) -> Error {
    match remedy(&error).map(Cow::into_owned) {
        Some(remedy) => error.remedy(remedy),
        None => error,
    }
}

/// Words that stand for the file of an error in advice that does not know it.
const STAND_INS: [&str; 2] = ["FILE", "OLD"];

/// What can be done: the advice of the error itself, or what helps with most errors of its kind.
pub fn remedy<'a>(error: &'a (dyn StdError + 'static)) -> Option<Cow<'a, str>> {
    let text = general_remedy(error)?;
    Some(match known(error).and_then(Error::file_path) {
        Some(file) => about(text, file).into(),
        None => text.into(),
    })
}

/// Advice that can be pasted: it has the name of `file`, not a word for it.
pub fn about(advice: &str, file: &Path) -> String {
    let name = |word: &str| if STAND_INS.contains(&word) { shell(file) } else { word.to_owned() };
    let words = advice.split_inclusive([' ', '`', ',', ';']).map(|word| {
        let bare = word.trim_end_matches([' ', '`', ',', ';']);
        name(bare) + &word[bare.len()..]
    });
    words.collect()
}

fn general_remedy<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a str> {
    let known = known(error);
    let number = os_error(error).and_then(io::Error::raw_os_error);
    known.and_then(Error::remedy_text).filter(|text| !text.is_empty()).or(match kind(error) {
        _ if number == Some(libc::EFBIG) => {
            Some("raise the file size limit (`ulimit -f`), or leave file systems that end at 4 GiB (FAT)")
        }
        _ if matches!(number, Some(libc::EMFILE | libc::ENFILE)) => {
            Some("raise the limit of open files (`ulimit -n`): each image of a chain needs a few")
        }
        _ if number == Some(libc::ENOTDIR) => {
            Some("check the spelling of the path: a part of it is a file, and should be a folder")
        }
        _ if number == Some(libc::ELOOP) => {
            Some("find the link that leads back to itself: `namei -l` shows the links of a path")
        }
        _ if number == Some(libc::ENAMETOOLONG) => {
            Some("choose a shorter name: most file systems end at 255 bytes, and paths at 4095")
        }
        _ if number == Some(libc::EAGAIN) && is_of_thread(known) => {
            Some("raise the limit of processes and threads (`ulimit -u`, or `pids.max` of the container)")
        }
        Kind::NotVhdx => {
            Some("check the name of the file; `file` and `qemu-img info` recognise many other formats")
        }
        Kind::Corrupt | Kind::Truncated => Some(SALVAGE),
        Kind::NoSpace if is_of_output(error) => Some("free space where standard output is written"),
        Kind::NoSpace => Some("free space on the file system of the file"),
        _ if number == Some(libc::EROFS) => {
            Some("the file system is read-only: remount it for writing, or use another one")
        }
        Kind::Permission if nix::unistd::geteuid().is_root() => {
            Some("check `lsattr` (immutable?), the file system (NFS?), and the limits of the container")
        }
        Kind::Permission => Some("run the command as root, or as a user with access to the file"),
        Kind::Stopped => Some("run the same command again to finish"),
        Kind::Exists => Some("choose another name"),
        Kind::NotFound => Some("check the spelling of the path"),
        Kind::Usage => Some("vhdx-ublk --help"),
        Kind::Unsupported if known.is_some_and(|error| error.structure().is_some()) => {
            Some("try a newer vhdx-ublk, or the program that created the image")
        }
        Kind::Unsupported | Kind::InUse | Kind::Mismatch | Kind::NoDriver | Kind::Poisoned | Kind::Io => None,
    })
}

/// Whether the kernel has refused a thread.
fn is_of_thread(known: Option<&Error>) -> bool {
    known.is_some_and(|error| error.message().starts_with("starting a thread"))
}

/// A list of `key: value` lines, the values aligned and printable.
#[derive(Default)]
pub struct Fields(Vec<(&'static str, String)>);

impl Fields {
    /// Appends a line. A key of no characters continues the line above.
    pub fn add(&mut self, key: &'static str, value: impl Into<String>) {
        self.0.push((key, value.into()));
    }
}

impl std::fmt::Display for Fields {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = self.0.iter().map(|(key, _)| key.len()).max().unwrap_or(0) + 2;
        for (index, (key, value)) in self.0.iter().enumerate() {
            let key = if key.is_empty() { String::new() } else { format!("{key}:") };
            let newline = if index == 0 { "" } else { "\n" };
            write!(f, "{newline}{key:width$}{}", printable(value))?;
        }
        Ok(())
    }
}

/// Rows under a headline, the columns aligned and printable, the last one ragged.
pub fn table<const N: usize>(headline: [&str; N], rows: &[[String; N]]) -> String {
    let headline = headline.map(str::to_owned);
    let rows: Vec<[String; N]> =
        rows.iter().map(|row| row.each_ref().map(|cell| printable(cell).into_owned())).collect();
    let all = || std::iter::once(&headline).chain(&rows);
    let width = |column: usize| all().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    all().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_tables_are_aligned() {
        let mut fields = Fields::default();
        fields.add("size", "1");
        fields.add("block size", "2");
        fields.add("", "3");
        assert_eq!(fields.to_string(), "size:       1\nblock size: 2\n            3");
        let rows = [["a".into(), "x y".into()], ["long".into(), String::new()]];
        assert_eq!(table(["N", "WHAT"], &rows), "N     WHAT\na     x y\nlong");
    }

    /// A name in a field, a table or JSON neither makes a line of its own nor steers the terminal.
    #[test]
    fn names_are_printable_everywhere() {
        let name = "a\nIMAGE: b\u{7f}\u{9b}\u{202e}";
        let mut fields = Fields::default();
        fields.add("image", name);
        let shown = r"a\nIMAGE: b\u{7f}\u{9b}\u{202e}";
        assert_eq!(fields.to_string(), format!("image: {shown}"));
        assert_eq!(table(["N"], &[[name.into()]]), format!("N\n{shown}"));
        let json = ascii_controls(&serde_json::to_string(name).expect("a string"));
        assert_eq!(json, r#""a\nIMAGE: b\u007f\u009b\u202e""#);
        assert_eq!(serde_json::from_str::<String>(&json).expect("JSON"), name);
    }

    #[test]
    fn an_error_as_json_has_every_part() {
        let error = Error::corrupt("BAT", "overlaps").at(7).file(Path::new("a.vhdx")).remedy("give up");
        let json = serde_json::to_value(Report { error: Failure::of(&error) }).expect("serialisable");
        let expected = serde_json::json!({"error": {
            "kind": "corrupt", "message": "a.vhdx: BAT at byte 7: overlaps", "file": "a.vhdx",
            "structure": "BAT", "offset": 7, "remedy": "give up",
        }});
        assert_eq!(json, expected);
    }

    #[test]
    fn what_a_command_was_doing_hides_no_kind_and_no_advice() {
        let refused = Error::io("opening the image", io::ErrorKind::NotFound.into()).in_structure("BAT");
        let refused = anyhow::Error::from(refused).context("adding a\nb");
        assert_eq!(kind(refused.as_ref()), Kind::NotFound);
        assert_eq!(remedy(refused.as_ref()).as_deref(), Some("check the spelling of the path"));
        let failure = Failure::of(refused.as_ref());
        assert_eq!(failure.message, "adding a\\nb: BAT: opening the image: entity not found");
        assert_eq!(failure.structure, Some("BAT"));
        let full =
            anyhow::Error::from(io::Error::from_raw_os_error(libc::ENOSPC)).context("writing the output");
        assert_eq!(kind(full.as_ref()), Kind::NoSpace);
    }

    #[test]
    fn only_a_broken_pipe_of_standard_output_is_no_message() {
        let broken = |doing: &str| Error::io(doing, io::ErrorKind::BrokenPipe.into());
        assert!(has_no_reader(&broken("writing the output")));
        assert!(has_no_reader(anyhow::Error::from(broken("writing standard output")).context("x").as_ref()));
        assert!(!has_no_reader(&broken("asking the daemon")));
        assert!(!has_no_reader(&Error::io("writing the output", io::ErrorKind::StorageFull.into())));
    }

    #[test]
    fn advice_that_is_missing_or_empty_is_made_up_for() {
        assert!(remedy(&Error::new(Kind::Truncated, "x")).is_some());
        assert!(remedy(&Error::new(Kind::Corrupt, "x").remedy("")).is_some_and(|text| !text.is_empty()));
    }

    /// Advice can be pasted: it has the file's name, not a word for it.
    #[test]
    fn advice_names_the_file() {
        let advice = |error: Error| remedy(&error.file(Path::new("a b.vhdx"))).map(Cow::into_owned);
        for (error, command) in [
            (Error::new(Kind::Corrupt, "x"), "vhdx-ublk salvage 'a b.vhdx' COPY"),
            (
                Error::new(Kind::NotVhdx, "x").remedy("vhdx-ublk convert OLD NEW.vhdx"),
                "convert 'a b.vhdx' NEW.vhdx",
            ),
            (Error::new(Kind::NotVhdx, "x").remedy("`vhdx-ublk check FILE` shows"), "check 'a b.vhdx'`"),
        ] {
            let advice = advice(error).unwrap_or_default();
            assert!(advice.contains(command), "{advice}");
        }
    }
}
