//! A device as the user names it, and the search for it.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::device::DeviceInfo;
use crate::device::name::{Name, id_of_node_name};
use crate::device::registry::{Entry, Listed, Registry, Survey};
use crate::device::sysfs::device_number;
use crate::disk::{HostFile, folder_of, path_of};
use crate::error::{Error, Kind, Locate, Result};
use crate::operations::named_file;

/// How a user names a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The N of `/dev/ublkbN`.
    Id(u32),
    /// The device of this name; if the word may be a path as well, also the device that serves that image.
    Name(Name, Option<PathBuf>),
    /// The device that serves this image.
    Image(PathBuf),
}

impl Target {
    /// `3`, `ublkb3`, `/dev/ublkb3`, a partition of it, the path of a link or another node that leads to
    /// one of these, a name, `/dev/vhdx/NAME`, or an image's path.
    ///
    /// A word without `/` is a device's own name or number, or an image in this folder: no link that the
    /// owner of the folder has put there leads it to a device. Nor does a link of another user lead a path to
    /// an image or a device.
    ///
    /// # Errors
    ///
    /// [`Kind::Permission`] if such a link would have to be followed.
    pub fn parse(text: &OsStr) -> Result<Self> {
        let means_itself = Name::of_link(Path::new(text)).is_some() || id_of_word(text).is_some();
        let resolved = if means_itself { None } else { follow(Path::new(text))? };
        Ok(Self::of(text, resolved))
    }

    /// As [`Self::parse`], for a path that leads to `resolved`, if there is such a file.
    fn of(text: &OsStr, resolved: Option<PathBuf>) -> Self {
        let path = Path::new(text);
        if let Some(name) = Name::of_link(path) {
            return Self::Name(name, None);
        }
        if let Some(id) = id_of_word(text) {
            return Self::Id(id);
        }
        let is_word = is_word(text);
        let in_dev = |path: &Path| id_of_node_name(path.strip_prefix("/dev").ok()?.to_str()?);
        let by_path = || in_dev(path).or_else(|| in_dev(resolved.as_deref()?));
        let by_node = || id_of_node(resolved.as_deref()?);
        let device = by_path().or_else(by_node);
        let name = text.to_str().and_then(|text| text.parse().ok());
        match (device, name) {
            (Some(id), _) if !is_word => Self::Id(id),
            (Some(_), Some(name)) => Self::Name(name, None),
            (None, Some(name)) => Self::Name(name, Some(resolved.unwrap_or_else(|| absolute(path)))),
            (_, None) => Self::Image(resolved.unwrap_or_else(|| absolute(path))),
        }
    }

    /// The path of the image, if it is one.
    pub fn image(&self) -> Option<&Path> {
        match self {
            Self::Id(_) => None,
            Self::Name(_, image) => image.as_deref(),
            Self::Image(path) => Some(path),
        }
    }

    /// Whether it names the device of `entry`.
    pub fn names(&self, entry: &Entry) -> bool {
        match self {
            Self::Id(id) => entry.id == *id,
            Self::Name(name, image) => {
                entry.name.as_ref() == Some(name) || image.as_ref().is_some_and(|path| serves(entry, path))
            }
            Self::Image(path) => serves(entry, path),
        }
    }
}

fn is_word(text: &OsStr) -> bool {
    !text.as_bytes().contains(&b'/')
}

/// The device that the word `text` names by its number.
fn id_of_word(text: &OsStr) -> Option<u32> {
    let word = text.to_str().filter(|_| is_word(text))?;
    word.parse().ok().or_else(|| id_of_node_name(word))
}

/// Where `path` leads, if it leads to a file.
fn follow(path: &Path) -> Result<Option<PathBuf>> {
    if !path.exists() {
        return Ok(None);
    }
    let found = named_file::find(path)?;
    // Its name may lead elsewhere by now.
    path_of(&found, "finding the file").map(Some).file(path)
}

/// Whether the image of the device is the file at `path`, where links have been followed already.
fn serves(entry: &Entry, path: &Path) -> bool {
    match fs::symlink_metadata(path) {
        Ok(found) => HostFile::of(&found) == entry.image_file,
        Err(_) => *path == entry.image,
    }
}

/// The device of a node that has another name.
fn id_of_node(path: &Path) -> Option<u32> {
    let found = fs::metadata(path).ok().filter(|found| found.file_type().is_block_device())?;
    let number = device_number(found.rdev());
    let device = fs::canonicalize(Path::new("/sys/dev/block").join(number)).ok()?;
    id_of_node_name(device.file_name()?.to_str()?)
}

/// The absolute path of a file that no longer exists, if its folder does.
fn absolute(path: &Path) -> PathBuf {
    let folder = fs::canonicalize(folder_of(path)).ok();
    let found = folder.zip(path.file_name()).map(|(folder, name)| folder.join(name));
    found.unwrap_or_else(|| path.to_owned())
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(f, "/dev/ublkb{id}"),
            Self::Name(name, _) => write!(f, "{name}"),
            Self::Image(path) => write!(f, "{}", path.display()),
        }
    }
}

/// The device that `target` names.
///
/// # Errors
///
/// [`Kind::NotFound`] if it is no device of this program; [`Kind::Usage`] if several serve the image,
/// read-only; why its entry cannot be read.
pub fn find(registry: &Registry, target: &Target) -> Result<Listed> {
    find_in(registry.survey()?, target)
}

pub(super) fn find_in(survey: Survey, target: &Target) -> Result<Listed> {
    let Survey { mut devices, orphans, unreadable } = survey;
    devices.retain(|listed| target.names(&listed.entry));
    if let [first, second, ..] = &devices[..] {
        let (first, second) = (first.entry.device.display(), second.entry.device.display());
        let message = format!("{target} names several devices, {first} and {second} among them");
        return Err(Error::new(Kind::Usage, message).remedy("name the device by its number"));
    }
    if let Some(found) = devices.pop() {
        return Ok(found);
    }
    let Target::Id(id) = target else {
        let message = match target {
            Target::Name(name, None) => format!("no device has the name {name}"),
            Target::Name(name, Some(_)) => format!("no device has the name {name} or serves such an image"),
            _ => format!("no device serves {target}"),
        };
        return Err(Error::new(Kind::NotFound, message).remedy("vhdx-ublk list"));
    };
    if let Some(damaged) = unreadable.into_iter().find(|unreadable| unreadable.id == *id) {
        return Err(damaged.error);
    }
    if let Some(orphan) = orphans.iter().find(|orphan| orphan.id == *id) {
        return Err(unknown_image(orphan));
    }
    Err(Error::new(Kind::NotFound, format!("{target} is not a device of this program"))
        .remedy("vhdx-ublk list"))
}

/// The image of a device without an entry is not known.
pub(super) fn unknown_image(orphan: &DeviceInfo) -> Error {
    let id = orphan.id;
    let served = match orphan.server {
        Some(pid) => format!("process {pid} serves it"),
        None => "its daemon is gone".into(),
    };
    let message =
        format!("the registry has no entry for /dev/ublkb{id}, so its image is not known; {served}");
    let remedy = format!(
        "`vhdx-ublk del --force {id}` removes it; the image may be left as after a crash: `add` repairs it"
    );
    Error::new(Kind::Unsupported, message).remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::super::super::KernelState;
    use super::super::super::registry::entry;
    use super::*;

    fn parse(text: &OsStr) -> Target {
        Target::parse(text).expect("no link of another user")
    }

    #[test]
    fn a_device_is_found_by_every_name() {
        for text in ["3", "ublkb3", "/dev/ublkb3", "/dev/ublkb3p1", "ublkb3p12"] {
            assert_eq!(parse(text.as_ref()), Target::Id(3), "{text}");
        }
        let place = tempfile::tempdir().expect("a directory");
        let image = place.path().join("disk.vhdx");
        fs::write(&image, "").expect("written");
        let image = image.canonicalize().expect("there");
        assert_eq!(parse(image.as_os_str()), Target::Image(image));
        for text in ["/dev/ublkb", "/dev/ublkbp1", "/dev/ublkb1p", "/dev/ublkb1q1"] {
            assert_eq!(parse(text.as_ref()), Target::Image(text.into()));
        }
        let here = fs::canonicalize(".").expect("there");
        for text in ["-1", "./gone.vhdx"] {
            assert_eq!(parse(text.as_ref()), Target::Image(here.join(text)), "from the root");
        }
        let name = |text: &str| text.parse::<Name>().expect("a name");
        for text in ["/dev/vhdx/data", "/dev/vhdx/data-part2"] {
            assert_eq!(parse(text.as_ref()), Target::Name(name("data"), None));
        }
        let either = Target::Name(name("gone.vhdx"), Some(here.join("gone.vhdx")));
        assert_eq!(parse("gone.vhdx".as_ref()), either);
    }

    /// The owner of the folder may put a link or a file of any name there.
    #[test]
    fn a_word_is_led_to_no_device_by_a_link() {
        let of = |text: &str, resolved: &str| Target::of(text.as_ref(), Some(resolved.into()));
        let data: Name = "data".parse().expect("a name");
        assert_eq!(of("data", "/dev/ublkb0"), Target::Name(data.clone(), None));
        assert_eq!(of("a b", "/dev/ublkb0"), Target::Image("/dev/ublkb0".into()));
        for text in ["./data", "/tmp/data", "folder/a b"] {
            assert_eq!(of(text, "/dev/ublkb0"), Target::Id(0), "{text}");
        }
        for text in ["3", "ublkb3", "ublkb3p1"] {
            assert_eq!(of(text, "/images/other.vhdx"), Target::Id(3), "{text}");
        }
        assert_eq!(of("data", "/images/a.vhdx"), Target::Name(data, Some("/images/a.vhdx".into())));
    }

    #[test]
    fn a_word_that_names_two_devices_is_refused() {
        let place = tempfile::tempdir().expect("a directory");
        let image = place.path().join("data");
        fs::write(&image, "").expect("written");
        let named = Entry { name: "data".parse().ok(), ..entry(0) };
        let serving = Entry { image_file: HostFile::at(&image).expect("there"), ..entry(1) };
        let survey = |entries: &[&Entry]| Survey {
            devices: entries
                .iter()
                .map(|&entry| Listed { entry: entry.clone(), state: crate::device::registry::State::Live })
                .collect(),
            ..Survey::default()
        };
        let word = Target::Name("data".parse().expect("a name"), Some(image));
        assert_eq!(find_in(survey(&[&named]), &word).expect("by its name").entry.id, 0);
        assert_eq!(find_in(survey(&[&serving]), &word).expect("by its image").entry.id, 1);
        let error = find_in(survey(&[&named, &serving]), &word).expect_err("two");
        assert_eq!(error.kind(), Kind::Usage);
        let link = parse("/dev/vhdx/data-part1".as_ref());
        assert_eq!(find_in(survey(&[&named, &serving]), &link).expect("only a name").entry.id, 0);
    }

    #[test]
    fn a_device_without_an_entry_is_reported_with_a_remedy() {
        let orphan = DeviceInfo {
            id: 4,
            queues: 1,
            depth: 1,
            request_bytes: 4096,
            flags: 0,
            state: KernelState::Quiesced,
            mark: 0,
            server: None,
        };
        let survey = || Survey { orphans: vec![orphan], ..Survey::default() };
        let error = find_in(survey(), &Target::Id(4)).expect_err("no entry");
        assert!(error.remedy_text().is_some_and(|text| text.contains("del --force 4")), "{error}");
        assert_eq!(find_in(survey(), &Target::Id(5)).expect_err("no device").kind(), Kind::NotFound);
    }

    #[test]
    fn an_image_is_recognised_after_it_was_renamed() {
        let place = tempfile::tempdir().expect("a directory");
        let (before, after) = (place.path().join("a.vhdx"), place.path().join("b.vhdx"));
        fs::write(&before, "").expect("written");
        let image_file = HostFile::at(&before).expect("there");
        let served = Entry { image: before.clone(), image_file, ..entry(0) };
        assert!(Target::Image(before.clone()).names(&served));
        fs::rename(&before, &after).expect("renamed");
        assert!(Target::Image(after).names(&served));
        assert!(Target::Image(before).names(&served), "by its old path, as nothing else is there");
    }

    #[test]
    fn another_file_at_the_images_path_is_not_the_image() {
        let place = tempfile::tempdir().expect("a directory");
        let path = place.path().join("a.vhdx");
        fs::write(&path, "").expect("written");
        let served = Entry { image: path.clone(), ..entry(0) };
        assert!(!Target::Image(path).names(&served));
    }
}
