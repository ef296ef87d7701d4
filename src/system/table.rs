//! `/etc/vhdxtab`: the disks that are served from boot on, one a line, in the manner of `/etc/crypttab`.
//!
//! ```text
//! # NAME  IMAGE                        OPTIONS
//! data    /images/data.vhdx            queues=2,nofail
//! wsl     /images/a\040name.vhdx       read-only
//! ```
//!
//! A line that is wrong spoils no other. The table is replaced as a whole: it is written under another name,
//! synced and renamed, so a power cut leaves the old one or the new one. Of two changes at once, one waits
//! until the other has renamed it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;

use super::escape::{from_field, to_field};
use super::lock;
use crate::chain::same_file;
use crate::device::name::Name;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::printable::shell;

/// Where the table is.
pub const PATH: &str = "/etc/vhdxtab";

/// What a change of it locks. It is not in the folder of devices: as long as there is none, no command needs
/// root to see whether a device has an image.
pub const LOCK: &str = "/run/.vhdx-ublk.table";

/// The most bytes of a table: thousands of lines.
const MAX_BYTES: u64 = 1 << 20;

/// The mode of a table that is made: its options are no secret.
const MODE: u32 = 0o644;

/// What separates the options of a line.
const SEPARATOR: u8 = b',';

/// Options of `add` that a line cannot have: the line has the name itself, and its unit serves.
const NOT_IN_A_TABLE: [&str; 7] = ["fd", "foreground", "serve", "name", "respawn", "help", "version"];

/// A disk of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The name of its device.
    pub name: Name,
    /// Its image, an absolute path.
    pub image: PathBuf,
    /// It is served when something asks for it, not from boot on.
    pub noauto: bool,
    /// The boot does not wait for it.
    pub nofail: bool,
    /// Its image is reached over a network.
    pub netdev: bool,
    /// The other options: those of `add`, without the dashes.
    options: Vec<OsString>,
}

impl Disk {
    /// The disk of a line's fields.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] for a name, a path or an option that a line cannot have.
    pub fn new(name: &OsStr, image: &OsStr, options: &OsStr) -> Result<Self> {
        let name = name.to_str().ok_or_else(|| wrong("the name of a device is ASCII"))?.parse()?;
        if !Path::new(image).is_absolute() {
            let image = Path::new(image).display();
            return Err(wrong(format!("the path of the image, {image}, is not absolute")));
        }
        let mut disk = Self {
            name,
            image: image.into(),
            noauto: false,
            nofail: false,
            netdev: false,
            options: Vec::new(),
        };
        for option in options.as_bytes().split(|&byte| byte == SEPARATOR) {
            disk.add_option(&from_field(option))?;
        }
        Ok(disk)
    }

    fn add_option(&mut self, option: &OsStr) -> Result<()> {
        match option.as_bytes() {
            b"" | b"defaults" | b"auto" | b"rw" => {}
            b"noauto" => self.noauto = true,
            b"nofail" => self.nofail = true,
            b"_netdev" => self.netdev = true,
            b"ro" => self.options.push("read-only".into()),
            other => {
                let word = other.split(|&byte| byte == b'=').next().unwrap_or_default();
                let plain = |&byte: &u8| byte.is_ascii_lowercase() || byte == b'-';
                if !word.iter().all(plain) || word.starts_with(b"-") || word.is_empty() {
                    return Err(wrong(format!("`{}` is no option", option.display())));
                }
                if NOT_IN_A_TABLE.iter().any(|refused| refused.as_bytes() == word) {
                    let word = String::from_utf8_lossy(word);
                    return Err(wrong(format!("a line of the table cannot have the option `{word}`")));
                }
                self.options.push(option.into());
            }
        }
        Ok(())
    }

    /// The words after `vhdx-ublk add` that serve it.
    pub fn arguments(&self) -> Vec<OsString> {
        let long = |option: &OsString| {
            let mut word = OsString::from("--");
            word.push(option);
            word
        };
        let mut words = vec![format!("--name={}", self.name).into()];
        words.extend(self.options.iter().map(long));
        words.extend(["--".into(), self.image.clone().into()]);
        words
    }

    /// Its line in the table.
    fn line(&self) -> String {
        let flags = [(self.noauto, "noauto"), (self.nofail, "nofail"), (self.netdev, "_netdev")];
        let flags = flags.into_iter().filter(|(set, _)| *set).map(|(_, word)| word.to_owned());
        let options = self.options.iter().map(|option| to_field(option, &[SEPARATOR]));
        let options: Vec<String> = options.chain(flags).collect();
        let image = to_field(self.image.as_os_str(), b"");
        let options = if options.is_empty() { String::new() } else { format!("\t{}", options.join(",")) };
        format!("{}\t{image}{options}\n", self.name)
    }
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(Kind::Usage, message)
}

/// A line that names a disk, or fails to.
#[derive(Debug)]
pub struct Line {
    /// Its number, from 1.
    pub number: usize,
    /// What it says.
    pub disk: Result<Disk>,
}

/// The table as it is on disk.
#[derive(Debug)]
pub struct Table {
    path: PathBuf,
    text: Vec<u8>,
    /// Its owner, group and mode; none if there is no file.
    attributes: Option<(u32, u32, u32)>,
    /// What keeps other changes waiting.
    _lock: Option<Flock<File>>,
}

impl Table {
    /// The table at `path`, which is empty if there is none.
    ///
    /// # Errors
    ///
    /// [`Kind::Unsupported`] if it is no regular file, or too long; what the operating system says.
    pub fn read(path: &Path) -> Result<Self> {
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = match opened {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Ok(Self { path: path.into(), text: Vec::new(), attributes: None, _lock: None });
            }
            opened => opened.doing("opening the table").file(path)?,
        };
        let found = file.metadata().doing("opening the table").file(path)?;
        if !found.is_file() || found.len() > MAX_BYTES {
            let message = format!("it is not a table: not a regular file of at most {MAX_BYTES} bytes");
            return Err(Error::new(Kind::Unsupported, message).file(path));
        }
        let mut text = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut text).doing("reading the table").file(path)?;
        let attributes = Some((found.uid(), found.gid(), found.permissions().mode() & 0o7777));
        Ok(Self { path: path.into(), text, attributes, _lock: None })
    }

    /// As [`Self::read`], for a change: until the table is dropped, every other change that locks the file
    /// `lock` waits.
    ///
    /// # Errors
    ///
    /// Those of [`Self::read`]; [`Kind::InUse`] if another change takes too long.
    pub fn read_to_change(path: &Path, lock: &Path) -> Result<Self> {
        let lock = lock::acquire(lock, "another change of the table of disks")?;
        Ok(Self { _lock: Some(lock), ..Self::read(path)? })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The lines that are not empty and no comment. Of two that give one name, the second is wrong.
    pub fn lines(&self) -> Vec<Line> {
        let mut names = BTreeMap::new();
        let texts = self.text.split(|&byte| byte == b'\n').zip(1..);
        let lines = texts.filter_map(|(text, number)| {
            let disk = parse(text)?.and_then(|disk| match names.insert(disk.name.to_string(), number) {
                None => Ok(disk),
                Some(first) => {
                    names.insert(disk.name.to_string(), first);
                    let message = format!("the name {} is that of line {first} already", disk.name);
                    Err(wrong(message).remedy("give each line a name of its own"))
                }
            });
            let disk = disk.map_err(|error| self.locate(&error, number));
            Some(Line { number, disk })
        });
        lines.collect()
    }

    /// Says in which file and line the error is.
    pub(super) fn locate(&self, error: &Error, number: usize) -> Error {
        let located =
            Error::new(error.kind(), format!("line {number}: {}", error.message())).file(&self.path);
        match error.remedy_text() {
            Some(remedy) => located.remedy(remedy),
            None => located.remedy(format!("correct the line in {}", self.path.display())),
        }
    }

    /// The numbers of the lines that name the file at `image`, by whatever path.
    pub fn lines_with(&self, image: &Path) -> Vec<usize> {
        let names = |line: &Line| line.disk.as_ref().is_ok_and(|disk| same_file(&disk.image, image));
        self.lines().into_iter().filter(names).map(|line| line.number).collect()
    }

    /// The disk of that name.
    ///
    /// # Errors
    ///
    /// [`Kind::NotFound`] if no line has the name; the error of a line that is wrong and has it.
    pub fn find(&self, name: &OsStr) -> Result<Disk> {
        let mut first_error = None;
        for line in self.lines() {
            match line.disk {
                Ok(disk) if OsStr::new(disk.name.as_str()) == name => return Ok(disk),
                Err(error) if self.has_name(line.number, name) => {
                    first_error.get_or_insert(error);
                }
                Ok(_) | Err(_) => {}
            }
        }
        let missing = || {
            let message = format!("no line names {}", name.display());
            let remedy = format!("vhdx-ublk enable {} IMAGE", shell(Path::new(name)));
            Error::new(Kind::NotFound, message).file(&self.path).remedy(remedy)
        };
        Err(first_error.unwrap_or_else(missing))
    }

    /// Whether the first word of a line is this name, whatever is behind it.
    fn has_name(&self, number: usize, name: &OsStr) -> bool {
        let line = self.text.split(|&byte| byte == b'\n').nth(number - 1).unwrap_or_default();
        fields(line).next() == Some(name.as_bytes())
    }

    /// Adds a line for `disk` at the end.
    ///
    /// # Errors
    ///
    /// [`Kind::Exists`] if a line has its name; what the operating system says.
    pub fn add(&mut self, disk: &Disk) -> Result<()> {
        if let Some(number) = self.numbers_of(disk.name.as_str().as_ref()).next() {
            let message = format!("line {number} has the name {} already", disk.name);
            let remedy = format!("choose another name, or first `vhdx-ublk disable {}`", disk.name);
            return Err(Error::new(Kind::Exists, message).file(&self.path).remedy(remedy));
        }
        let mut text = self.text.clone();
        if !text.is_empty() && !text.ends_with(b"\n") {
            text.push(b'\n');
        }
        text.extend(disk.line().bytes());
        self.replace(text)
    }

    /// Removes the lines that have this name. Whether there was one.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn remove(&mut self, name: &OsStr) -> Result<bool> {
        let numbers: Vec<usize> = self.numbers_of(name).collect();
        if numbers.is_empty() {
            return Ok(false);
        }
        let lines = self.text.split_inclusive(|&byte| byte == b'\n').zip(1..);
        let kept: Vec<&[u8]> =
            lines.filter(|(_, number)| !numbers.contains(number)).map(|(line, _)| line).collect();
        self.replace(kept.concat())?;
        Ok(true)
    }

    fn numbers_of(&self, name: &OsStr) -> impl Iterator<Item = usize> {
        let lines = self.text.split(|&byte| byte == b'\n').zip(1..);
        lines.filter(move |(line, _)| fields(line).next() == Some(name.as_bytes())).map(|(_, number)| number)
    }

    fn replace(&mut self, text: Vec<u8>) -> Result<()> {
        self.write(&text).doing("replacing the table").file(&self.path)?;
        self.text = text;
        Ok(())
    }

    /// Writes the table under another name, and gives it the old one's owner, mode and name.
    fn write(&self, text: &[u8]) -> io::Result<()> {
        // A link leads to the table that is meant: it stays.
        let path = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let folder = crate::disk::folder_of(&path);
        let mut new = tempfile::Builder::new().prefix(".vhdxtab.").tempfile_in(folder)?;
        new.write_all(text)?;
        if let Some((owner, group, _)) = self.attributes {
            fchown(new.as_file(), Some(owner), Some(group))?;
        }
        let mode = self.attributes.map_or(MODE, |(_, _, mode)| mode);
        new.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
        new.as_file().sync_all()?;
        new.persist(&path)?;
        File::open(folder)?.sync_all()
    }
}

/// The fields of a line, which blanks separate.
fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| b" \t\r".contains(byte)).filter(|field| !field.is_empty())
}

/// The disk of a line; none of an empty one, or a comment.
fn parse(line: &[u8]) -> Option<Result<Disk>> {
    let fields: Vec<&[u8]> = fields(line).collect();
    if fields.first()?.starts_with(b"#") {
        return None;
    }
    Some(match fields[..] {
        [name, image] => Disk::new(OsStr::from_bytes(name), &from_field(image), OsStr::new("")),
        [name, image, options] => {
            Disk::new(OsStr::from_bytes(name), &from_field(image), OsStr::from_bytes(options))
        }
        [_] => Err(wrong("it has a name, but no image").remedy("NAME IMAGE [OPTIONS]")),
        _ => Err(wrong("it has more than three fields").remedy("write \\040 for a blank in a path")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> (tempfile::TempDir, Table) {
        let place = tempfile::tempdir().expect("a directory");
        let path = place.path().join("vhdxtab");
        fs::write(&path, text).expect("room");
        let table = Table::read(&path).expect("there");
        (place, table)
    }

    fn disk(name: &str, image: &str, options: &str) -> Result<Disk> {
        Disk::new(name.as_ref(), image.as_ref(), options.as_ref())
    }

    #[test]
    fn a_line_has_a_name_an_image_and_options_that_are_those_of_add() {
        let (_place, table) =
            table("# a comment\n\n  data \t /a\\040b.vhdx  ro,queues=2,parent=/p\\054q,nofail\n");
        let [line] = &table.lines()[..] else { panic!("one line") };
        let disk = line.disk.as_ref().expect("a good line");
        assert_eq!(
            (line.number, disk.name.as_str(), disk.image.as_path()),
            (3, "data", Path::new("/a b.vhdx"))
        );
        let words = ["--name=data", "--read-only", "--queues=2", "--parent=/p,q", "--", "/a b.vhdx"];
        assert_eq!(disk.arguments(), words);
        assert!(disk.nofail && !disk.noauto && !disk.netdev);
    }

    #[test]
    fn a_disk_is_written_as_it_is_read() {
        let (_place, mut table) = table("x /x\n");
        let disk = disk("data", "/a b#\\.vhdx", "parent=/p\\054q,noauto,_netdev,read-only").expect("good");
        table.add(&disk).expect("room");
        assert_eq!(Table::read(&table.path).expect("there").find("data".as_ref()).expect("there"), disk);
    }

    #[test]
    fn what_a_line_cannot_have_is_refused() {
        for (name, image, options) in [
            ("", "/a", ""),
            ("a/b", "/a", ""),
            ("7", "/a", ""),
            ("a", "a.vhdx", ""),
            ("a", "/a", "fd=3"),
            ("a", "/a", "foreground"),
            ("a", "/a", "name=b"),
            ("a", "/a", "--force"),
            ("a", "/a", "=x"),
            ("a", "/a", "Queues=2"),
        ] {
            assert_eq!(
                disk(name, image, options).expect_err("refused").kind(),
                Kind::Usage,
                "{name} {image} {options}"
            );
        }
    }

    #[test]
    fn a_search_reports_what_is_wrong_with_the_line_of_that_name_only() {
        let (_place, table) = table("broken\ndata /data\ndata /again\nlast /l x y\n");
        assert_eq!(table.find("data".as_ref()).expect("the first").image, Path::new("/data"));
        let error = table.find("last".as_ref()).expect_err("too many fields");
        assert!(error.to_string().contains("vhdxtab: line 4: it has more than three"), "{error}");
        assert_eq!(table.find("none".as_ref()).expect_err("no such line").kind(), Kind::NotFound);
    }

    /// What people wrote into the table stays, and who may read it.
    #[test]
    fn a_change_keeps_comments_order_mode_and_links() {
        let text = "# mine\n\na /a  # no comment here\nbroken\n\tb\t/b\n# end";
        let (place, _) = table(text);
        let (path, link) = (place.path().join("vhdxtab"), place.path().join("link"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("ours");
        std::os::unix::fs::symlink("vhdxtab", &link).expect("room");
        let mut table = Table::read(&link).expect("there");
        table.add(&disk("c", "/c", "nofail").expect("good")).expect("room");
        assert!(
            table.remove("b".as_ref()).expect("room") && !table.remove("b".as_ref()).expect("nothing to do")
        );
        assert_eq!(
            fs::read_to_string(&path).expect("there"),
            "# mine\n\na /a  # no comment here\nbroken\n# end\nc\t/c\tnofail\n"
        );
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o7777, 0o640);
        assert!(fs::symlink_metadata(&link).expect("there").is_symlink());
        assert_eq!(fs::read_dir(place.path()).expect("there").count(), 2, "nothing is left over");
    }

    #[test]
    fn a_name_is_given_once_also_by_a_line_that_is_wrong() {
        let (_place, mut table) = table("data\n");
        let error = table.add(&disk("data", "/a", "").expect("good")).expect_err("taken");
        assert_eq!(error.kind(), Kind::Exists);
        assert!(table.remove("data".as_ref()).expect("it can be removed"));
    }

    /// Each of many changes at once is made to the table that the one before has left.
    #[test]
    fn changes_at_once_are_all_made() {
        let (place, table) = table("");
        let lock = place.path().join("lock");
        std::thread::scope(|scope| {
            for number in 0..16 {
                let (path, lock) = (&table.path, &lock);
                scope.spawn(move || {
                    let disk = disk(&format!("disk{number}"), "/a", "").expect("good");
                    Table::read_to_change(path, lock).expect("readable").add(&disk).expect("room");
                });
            }
        });
        assert_eq!(Table::read(&table.path).expect("there").lines().len(), 16);
    }

    #[test]
    fn a_missing_table_is_empty_and_a_strange_one_is_refused() {
        let place = tempfile::tempdir().expect("a directory");
        let path = place.path().join("vhdxtab");
        let mut table = Table::read(&path).expect("none is empty");
        assert!(table.lines().is_empty());
        assert_eq!(Table::read(place.path()).expect_err("a folder").kind(), Kind::Unsupported);
        table.add(&disk("a", "/a", "").expect("good")).expect("room");
        assert_eq!(fs::metadata(&path).expect("made").permissions().mode() & 0o7777, 0o644);
        fs::write(&path, vec![b'\n'; 1 + usize::try_from(MAX_BYTES).expect("small")]).expect("room");
        assert_eq!(Table::read(&path).expect_err("too long").kind(), Kind::Unsupported);
    }

    /// An image is found by its file: links and other paths lead to it, too.
    #[test]
    fn the_lines_that_name_an_image_are_found_whatever_it_is_called() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| folder.path().join(name);
        fs::write(at("disk.vhdx"), "").expect("room");
        fs::write(at("other.vhdx"), "").expect("room");
        std::os::unix::fs::symlink("disk.vhdx", at("link.vhdx")).expect("room");
        let line = |name: &str, image: &str| format!("{name} {}\n", at(image).display());
        let lines = [("a", "other.vhdx"), ("b", "disk.vhdx"), ("c", "link.vhdx"), ("d", "gone.vhdx")];
        let text: String = lines.map(|(name, image)| line(name, image)).concat();
        fs::write(at("table"), format!("# disks\n{text}b relative\n")).expect("room");
        let table = Table::read(&at("table")).expect("readable");
        assert_eq!(table.lines_with(&at("disk.vhdx")), [3, 4]);
        assert_eq!(table.lines_with(&at("gone.vhdx")), Vec::<usize>::new());
    }
}
