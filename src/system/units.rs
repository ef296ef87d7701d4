//! What systemd learns of the disks in `/etc/vhdxtab`.
//!
//! The unit `vhdx-ublk@NAME.service` is installed as a template. For each line of the table this adds:
//!
//! | what | why |
//! |---|---|
//! | a drop-in of the unit | the mounts below the image come first, and what waits for the disk comes later |
//! | a link in `local-fs.target.wants`, or `remote-fs.target.wants` with `_netdev` | it is served from boot on; not with `noauto` |
//! | a link in `dev-vhdx-NAME.device.wants` | it is served when a mount asks for its device |
//! | the same for each partition that `/etc/fstab` names, `/dev/vhdx/NAME-partN` | that is a device of its own to systemd |
//!
//! Links are *wants*, never *requires*: a disk that cannot be served stops no boot, and a daemon that is
//! started again after a crash must not have the file systems on its disk unmounted.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::escape::{from_field, in_unit_name, in_unit_setting};
use super::table::{Disk, Table};
use crate::device::name::Name;
use crate::disk::folder_of;
use crate::error::{Doing, Error, Locate, Result};

/// The table of mounts.
pub const FSTAB: &str = "/etc/fstab";

/// The installed template, to which links lead.
const TEMPLATE: &str = "/lib/systemd/system/vhdx-ublk@.service";

/// The unit that serves the disk of that name.
pub fn service(name: &Name) -> String {
    format!("vhdx-ublk@{}.service", in_unit_name(name.as_str()))
}

/// Writes the units for the lines of `table` below `folder`. `fstab` is the text of the table of mounts;
/// `check` judges options. What is wrong with a line, or its files, is returned; the other lines have theirs.
pub fn generate(
    table: &Table,
    fstab: &[u8],
    folder: &Path,
    check: impl Fn(&Disk) -> Result<()>,
) -> Vec<Error> {
    let mounted = partitions(fstab);
    let generate = |disk: Result<Disk>, number| {
        let disk = disk?;
        check(&disk).map_err(|error| table.locate(&error, number))?;
        let of_disk = |link: &&PathBuf| Name::of_link(link).as_ref() == Some(&disk.name);
        let mounted: Vec<_> = mounted.iter().filter(of_disk).map(|link| unit_of(link)).collect();
        write(&disk, &mounted, number, table.path(), folder).doing("writing the units").file(folder)
    };
    table.lines().into_iter().filter_map(|line| generate(line.disk, line.number).err()).collect()
}

/// The partitions of named disks that a table of mounts has: `/dev/vhdx/NAME-partN`.
fn partitions(fstab: &[u8]) -> BTreeSet<PathBuf> {
    let first = |line: &[u8]| {
        let mut fields = line.split(u8::is_ascii_whitespace);
        fields.find(|field| !field.is_empty()).map(|field| PathBuf::from(from_field(field)))
    };
    let is_partition = |link: &PathBuf| Name::of_link(link).is_some_and(|name| name.link() != *link);
    fstab.split(|&byte| byte == b'\n').filter_map(first).filter(is_partition).collect()
}

/// What the names of units have for a link below /dev.
fn unit_of(link: &Path) -> String {
    in_unit_name(&link.display().to_string()[1..])
}

/// `mounted`: the partitions of the disk that are mounted, as units have them.
fn write(disk: &Disk, mounted: &[String], number: usize, table: &Path, folder: &Path) -> io::Result<()> {
    let service = service(&disk.name);
    let drop_ins = folder.join(format!("{service}.d"));
    fs::create_dir_all(&drop_ins)?;
    fs::write(drop_ins.join("50-vhdxtab.conf"), drop_in(disk, mounted, number, table))?;
    for target in wanted_by(disk, mounted) {
        let wants = folder.join(format!("{target}.wants"));
        fs::create_dir_all(&wants)?;
        symlink(TEMPLATE, wants.join(&service))?;
    }
    Ok(())
}

/// The target that waits for the disk, unless it has `nofail`.
fn target(disk: &Disk) -> &'static str {
    if disk.netdev { "remote-fs.target" } else { "local-fs.target" }
}

/// The units that have it started.
fn wanted_by(disk: &Disk, mounted: &[String]) -> Vec<String> {
    let whole = unit_of(&disk.name.link());
    let devices = mounted.iter().chain([&whole]).map(|unit| format!("{unit}.device"));
    let boot = (!disk.noauto).then(|| target(disk).to_owned());
    boot.into_iter().chain(devices).collect()
}

fn drop_in(disk: &Disk, mounted: &[String], number: usize, table: &Path) -> String {
    let (table, folder) = (table.display(), mounts_for(&disk.image));
    let before = match target(disk) {
        target if !disk.noauto && !disk.nofail => format!("Before={target}\n"),
        _ => String::new(),
    };
    let network = if disk.netdev {
        "Wants=network-online.target\nAfter=network-online.target remote-fs-pre.target\n"
    } else {
        ""
    };
    // As the template has it for the whole disk: mounts are made after these targets, and end before them.
    let prepared = |unit: &String| format!("Wants=blockdev@{unit}.target\nBefore=blockdev@{unit}.target\n");
    let prepared: String = mounted.iter().map(prepared).collect();
    format!(
        "# Made by vhdx-ublk-generator from line {number} of {table}.\n[Unit]\nSourcePath={table}\n\
         RequiresMountsFor={folder}\n{before}{network}{prepared}"
    )
}

/// The folder of the image as a word, or the nearest above it whose name a unit can hold.
fn mounts_for(image: &Path) -> String {
    let mut folders = folder_of(image).ancestors();
    folders.find_map(in_unit_setting).unwrap_or_else(|| "/".into())
}

/// Where a generator may be installed.
const GENERATORS: [&str; 5] = [
    "/run/systemd/system-generators",
    "/etc/systemd/system-generators",
    "/usr/local/lib/systemd/system-generators",
    "/usr/lib/systemd/system-generators",
    "/lib/systemd/system-generators",
];

/// The generator's name.
pub const GENERATOR: &str = "vhdx-ublk-generator";

/// Whether systemd finds this program as its generator.
pub fn has_generator() -> bool {
    GENERATORS.iter().any(|folder| PathBuf::from(folder).join(GENERATOR).exists())
}

/// Whether systemd runs this machine.
pub fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::error::Kind;

    /// The files and links that a table of these lines makes, with what is in them, and the errors.
    fn generated(lines: &str) -> (BTreeMap<String, String>, Vec<String>) {
        generated_with("", lines)
    }

    /// The same with this table of mounts.
    fn generated_with(fstab: &str, lines: &str) -> (BTreeMap<String, String>, Vec<String>) {
        let place = tempfile::tempdir().expect("a directory");
        let (table, folder) = (place.path().join("vhdxtab"), place.path().join("units"));
        fs::write(&table, lines).expect("room");
        let check = |disk: &Disk| match disk.arguments().iter().find(|word| *word == "--odd") {
            Some(_) => Err(Error::new(Kind::Usage, "odd")),
            None => Ok(()),
        };
        let errors = generate(&Table::read(&table).expect("there"), fstab.as_bytes(), &folder, check);
        let mut made = BTreeMap::new();
        for unit in fs::read_dir(&folder).into_iter().flatten() {
            for file in fs::read_dir(unit.expect("readable").path()).expect("a folder") {
                let path = file.expect("readable").path();
                let name = path.strip_prefix(&folder).expect("below").display().to_string();
                let link = fs::read_link(&path).map(|target| format!("-> {}", target.display()));
                let text = link.unwrap_or_else(|_| fs::read_to_string(&path).expect("text"));
                made.insert(name, text);
            }
        }
        (
            made,
            errors
                .iter()
                .map(|error| error.to_string().replace(&place.path().display().to_string(), ""))
                .collect(),
        )
    }

    #[test]
    fn a_line_becomes_a_unit_that_the_boot_waits_for() {
        let (made, errors) = generated("my-disk /images/a\\040b/disk.vhdx\n");
        assert_eq!(errors, [""; 0]);
        let unit = "vhdx-ublk@my\\x2ddisk.service";
        let links: Vec<_> =
            made.iter().filter(|(_, text)| text.starts_with("-> ")).map(|(name, _)| name).collect();
        assert_eq!(
            links,
            [&format!("dev-vhdx-my\\x2ddisk.device.wants/{unit}"), &format!("local-fs.target.wants/{unit}")]
        );
        let drop_in = &made[&format!("{unit}.d/50-vhdxtab.conf")];
        assert!(drop_in.contains("\nRequiresMountsFor=\"/images/a b\"\n"), "{drop_in}");
        assert!(drop_in.contains("\nBefore=local-fs.target\n"), "{drop_in}");
    }

    #[test]
    fn options_of_the_unit_say_who_waits_for_it_and_who_starts_it() {
        let (made, _) = generated("a /a noauto\nb /b nofail\nc /c _netdev\n");
        let has = |name: &str| made.contains_key(name);
        assert!(!has("local-fs.target.wants/vhdx-ublk@a.service"), "noauto");
        assert!(has("dev-vhdx-a.device.wants/vhdx-ublk@a.service"), "a mount asks for it");
        assert!(has("local-fs.target.wants/vhdx-ublk@b.service"));
        assert!(!made["vhdx-ublk@b.service.d/50-vhdxtab.conf"].contains("Before="), "nofail");
        assert!(has("remote-fs.target.wants/vhdx-ublk@c.service"));
        let drop_in = &made["vhdx-ublk@c.service.d/50-vhdxtab.conf"];
        assert!(
            drop_in.contains("Before=remote-fs.target") && drop_in.contains("network-online"),
            "{drop_in}"
        );
    }

    #[test]
    fn a_partition_that_is_mounted_starts_its_disk_and_ends_before_it() {
        let fstab = "/dev/vhdx/my-disk-part2 /a ext4 defaults\n\t/dev/vhdx/my-disk-part11 /b auto noauto\n\
            # /dev/vhdx/my-disk-part3 /c auto\n/dev/vhdx/other-part4 /d auto\nUUID=1 /e auto\n\n\
            /dev/vhdx/my-disk /f auto\n/dev/vhdx/my-disk-part2 /g auto\n/dev/vhdx/my-disk-part5/.. /h auto\n";
        let (made, errors) = generated_with(fstab, "my-disk /a noauto\n");
        assert_eq!(errors, [""; 0]);
        let unit = "vhdx-ublk@my\\x2ddisk.service";
        let links: Vec<_> =
            made.keys().filter_map(|name| name.strip_suffix(&format!(".device.wants/{unit}"))).collect();
        let (second, eleventh) = ("dev-vhdx-my\\x2ddisk\\x2dpart2", "dev-vhdx-my\\x2ddisk\\x2dpart11");
        assert_eq!(links, ["dev-vhdx-my\\x2ddisk", eleventh, second]);
        let drop_in = &made[&format!("{unit}.d/50-vhdxtab.conf")];
        for part in [second, eleventh] {
            for setting in ["Wants", "Before"] {
                assert_eq!(
                    drop_in.matches(&format!("\n{setting}=blockdev@{part}.target\n")).count(),
                    1,
                    "{drop_in}"
                );
            }
        }
        assert_eq!(drop_in.matches("blockdev@").count(), 4, "{drop_in}");
    }

    /// A boot must not fail, and no other disk be missing, for one line.
    #[test]
    fn a_wrong_line_spoils_no_other() {
        let (made, errors) = generated("a /a\nbroken\nb relative\nc /c odd\na /again\nd /d\n");
        assert_eq!(made.keys().filter(|name| name.ends_with("vhdxtab.conf")).count(), 2, "{made:?}");
        let first_words =
            ["line 2: it has a name", "line 3: the path", "line 4: odd", "line 5: the name a is"];
        assert_eq!(errors.len(), first_words.len(), "{errors:?}");
        for (error, words) in errors.iter().zip(first_words) {
            assert!(error.starts_with(&format!("/vhdxtab: {words}")), "{error}");
        }
    }

    #[test]
    fn no_path_breaks_out_of_its_setting() {
        let (made, errors) = generated("a /x\\012ExecStart=/bin/evil/%n/a\n");
        assert_eq!(errors, [""; 0]);
        let drop_in = &made["vhdx-ublk@a.service.d/50-vhdxtab.conf"];
        assert!(drop_in.contains("\nRequiresMountsFor=\"/\"\n") && !drop_in.contains("evil"), "{drop_in}");
    }
}
