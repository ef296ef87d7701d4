//! What the machine says of itself, in `/proc`, `/sys`, `/dev`, `/lib` and `/run`.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::unistd::geteuid;

use super::finding::Finding;
use super::kernel;
use crate::device::Surroundings;
use crate::disk::HostRoom;
use crate::printable::human_size;

/// The most that is read of a file.
const MAX_BYTES: u64 = 1 << 20;

/// Free space under `/run` for the entries of devices, and for sessions of some size.
const RUN_BYTES: u64 = 16 << 20;

/// The bit of `CAP_IPC_LOCK` in a set of capabilities.
const CAP_IPC_LOCK: u64 = 1 << 14;

/// ramfs, which keeps sessions as well.
const RAMFS: FsType = FsType(0x8584_58f6);

/// The folders with udev's rules, and the name of ours.
const RULES: [&str; 4] =
    ["etc/udev/rules.d", "run/udev/rules.d", "usr/lib/udev/rules.d", "usr/local/lib/udev/rules.d"];
const RULE: &str = "60-vhdx-ublk.rules";

/// A machine, seen below a root.
pub(super) struct Machine {
    root: PathBuf,
}

impl Machine {
    /// The machine whose files lie below `root`.
    pub(super) fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// All checks.
    pub(super) fn checks(&self) -> Vec<Finding> {
        let checks = [
            self.kernel(),
            self.driver(),
            self.permissions(),
            self.rings(),
            self.run_room(),
            self.locked_memory(),
            self.device_names(),
        ];
        checks.into_iter().chain(self.device_limit()).collect()
    }

    /// A file's text, without the space around it.
    fn text(&self, path: &str) -> Option<String> {
        let mut text = String::new();
        File::open(self.root.join(path)).ok()?.take(MAX_BYTES).read_to_string(&mut text).ok()?;
        Some(text.trim().to_owned())
    }

    fn has(&self, path: impl AsRef<Path>) -> bool {
        fs::symlink_metadata(self.root.join(path)).is_ok()
    }

    fn release(&self) -> String {
        self.text("proc/sys/kernel/osrelease").unwrap_or_default()
    }

    fn kernel(&self) -> Finding {
        let release = self.release();
        match kernel::fault(&release) {
            None => Finding::fine("kernel", format!("Linux {release}")),
            Some((fault, remedy)) => Finding::wrong("kernel", format!("Linux {release}: {fault}"), remedy),
        }
    }

    fn driver(&self) -> Finding {
        const CHECK: &str = "driver";
        let release = self.release();
        if self.has("sys/module/ublk_drv") || self.has("dev/ublk-control") {
            return Finding::fine(CHECK, "ublk_drv is loaded");
        }
        let surroundings = Surroundings::below(&self.root);
        let missing = || {
            let (why, remedy) = surroundings.advice();
            Finding::wrong(CHECK, why, remedy)
        };
        if surroundings == Surroundings::Container {
            return missing();
        }
        // The release is a name of a folder, and nothing else.
        let modules = Path::new("lib/modules").join(release.replace('/', "_"));
        let names =
            ["ko", "ko.zst", "ko.xz", "ko.gz"].map(|end| format!("kernel/drivers/block/ublk_drv.{end}"));
        if names.iter().any(|name| self.has(modules.join(name))) {
            return Finding::wrong(CHECK, "ublk_drv is there and not loaded", "modprobe ublk_drv");
        }
        missing()
    }

    fn permissions(&self) -> Finding {
        const CHECK: &str = "permissions";
        if !geteuid().is_root() {
            let remedy = "run the command as root: some checks need it, and devices do, too";
            return Finding::wrong(CHECK, "not running as root", remedy);
        }
        let is_driver_there = self.has("sys/module/ublk_drv");
        let opened = File::options().read(true).write(true).open(self.root.join("dev/ublk-control"));
        match opened {
            Ok(_) => Finding::fine(CHECK, "/dev/ublk-control can be opened"),
            Err(error) if is_driver_there => {
                let remedy =
                    "in a container: let it have /dev/ublk-control and /dev/ublkcN, and CAP_SYS_ADMIN";
                Finding::wrong(CHECK, format!("/dev/ublk-control cannot be opened: {error}"), remedy)
            }
            Err(_) => Finding::fine(CHECK, "running as root; the driver is not loaded yet"),
        }
    }

    /// The most devices that the driver makes, where it says so.
    fn device_limit(&self) -> Option<Finding> {
        const CHECK: &str = "device limit";
        let limit: usize = self.text("sys/module/ublk_drv/parameters/ublks_max")?.parse().ok()?;
        let class = fs::read_dir(self.root.join("sys/class/ublk-char"));
        let devices = class.map_or(0, |names| names.take(limit.saturating_add(1)).count());
        let found = format!("{devices} ublk devices, ublks_max is {limit}");
        if devices < limit {
            return Some(Finding::fine(CHECK, found));
        }
        let remedy = format!("echo {} > /sys/module/ublk_drv/parameters/ublks_max", limit.saturating_mul(2));
        Some(Finding::wrong(CHECK, found, remedy))
    }

    fn rings(&self) -> Finding {
        const CHECK: &str = "io_uring";
        match self.text("proc/sys/kernel/io_uring_disabled").as_deref() {
            None | Some("0") => Finding::fine(CHECK, "allowed"),
            Some(value) => Finding::wrong(
                CHECK,
                format!("the sysctl kernel.io_uring_disabled is {value}, which forbids it"),
                "sysctl kernel.io_uring_disabled=0",
            ),
        }
    }

    fn run_room(&self) -> Finding {
        let (run, own) = (self.root.join("run"), self.root.join("run/vhdx-ublk"));
        let device = |path: &Path| fs::symlink_metadata(path).ok().map(|found| found.dev());
        // The folder of the sessions may be a file system of its own.
        let is_apart = device(&own).is_some_and(|own| device(&run) != Some(own));
        let (folder, name) = if is_apart { (own, "/run/vhdx-ublk") } else { (run, "/run") };
        let kind = statfs(&folder).map(|found| found.filesystem_type());
        let is_memory = kind.is_ok_and(|kind| kind == TMPFS_MAGIC || kind == RAMFS);
        let free = HostRoom::at(&folder).ok().and_then(|room| room.for_this_user());
        run_room(name, is_memory, free.unwrap_or(0))
    }

    fn locked_memory(&self) -> Finding {
        const CHECK: &str = "locked memory";
        let limits = self.text("proc/self/limits").unwrap_or_default();
        let limit = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
        let hard = limit.and_then(|limit| limit.split_whitespace().nth(1)).unwrap_or("unknown").to_owned();
        let status = self.text("proc/self/status").unwrap_or_default();
        let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let may_lock = set
            .is_some_and(|set| u64::from_str_radix(set.trim(), 16).is_ok_and(|set| set & CAP_IPC_LOCK != 0));
        if may_lock || hard == "unlimited" {
            return Finding::fine(CHECK, "not limited for a daemon that this process starts");
        }
        let found = format!("limited to {hard} bytes, and this process has no CAP_IPC_LOCK");
        let remedy =
            "run as root; in a service set LimitMEMLOCK=infinity, in a container --ulimit memlock=-1";
        Finding::wrong(CHECK, found, remedy)
    }

    /// Whether udev knows our devices.
    fn device_names(&self) -> Finding {
        const CHECK: &str = "udev rule";
        if !self.has("run/udev") {
            return Finding::fine(CHECK, "there is no udev here");
        }
        if let Some(folder) = RULES.iter().find(|folder| self.has(Path::new(folder).join(RULE))) {
            return Finding::fine(CHECK, format!("/{folder}/{RULE}"));
        }
        let found = format!("{RULE} is not installed: devices get no stable names");
        let remedy = "copy tools/package.d/*.rules to /etc/udev/rules.d, then udevadm control --reload";
        Finding::wrong(CHECK, found, remedy)
    }
}

/// What is found of the `folder` whose file system has the sessions, with so many bytes free.
fn run_room(folder: &str, is_memory: bool, free: u64) -> Finding {
    const CHECK: &str = "room in /run";
    let found = format!("{} free", human_size(free));
    if !is_memory {
        // A tmpfs on /run itself would hide the sockets of the running system.
        let remedy = "until then a killed daemon cannot be recovered; when no device is served: mkdir -p \
                      /run/vhdx-ublk && mount -t tmpfs -o mode=700 tmpfs /run/vhdx-ublk";
        let found = format!("{folder} is not in memory (tmpfs), so sessions cannot be kept there");
        return Finding::wrong(CHECK, found, remedy);
    }
    if free < RUN_BYTES {
        let remedy = format!("remove what fills {folder}, or enlarge it: mount -o remount,size=25% {folder}");
        return Finding::wrong(CHECK, format!("{found}: sessions of devices need room there"), remedy);
    }
    Finding::fine(CHECK, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A made-up root with these files.
    fn root(files: &[(&str, &str)]) -> (tempfile::TempDir, Machine) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("room");
            fs::write(path, text).expect("room");
        }
        let machine = Machine::at(folder.path());
        (folder, machine)
    }

    const RELEASE: (&str, &str) = ("proc/sys/kernel/osrelease", "6.12.57+deb13-amd64\n");

    #[test]
    fn a_driver_is_loaded_or_can_be_loaded_or_is_missing() {
        let (_folder, loaded) = root(&[RELEASE, ("sys/module/ublk_drv/refcnt", "0")]);
        assert!(loaded.driver().fine && loaded.kernel().fine);
        let module = "lib/modules/6.12.57+deb13-amd64/kernel/drivers/block/ublk_drv.ko.xz";
        let (_folder, there) = root(&[RELEASE, (module, "")]);
        assert_eq!(there.driver().remedy.as_deref(), Some("modprobe ublk_drv"));
        let (_folder, missing) = root(&[RELEASE]);
        assert_eq!(missing.driver().found, "this kernel offers no ublk");
        let (_folder, container) = root(&[RELEASE, (module, ""), (".dockerenv", "")]);
        assert!(container.driver().remedy.is_some_and(|remedy| remedy.starts_with("on the host: ")));
        let wsl = ("proc/sys/kernel/osrelease", "6.6.87.2-microsoft-standard-WSL2\n");
        let (_folder, wsl) = root(&[wsl]);
        assert!(wsl.driver().found.contains("the standard kernel of WSL"));
        let (_folder, odd) = root(&[("proc/sys/kernel/osrelease", "../../etc"), ("etc/kernel", "")]);
        assert!(!odd.kernel().fine && !odd.driver().fine, "a release is no path");
    }

    #[test]
    fn a_limit_is_reached_by_as_many_devices() {
        let limit = |devices: &[(&str, &str)]| {
            let files = [("sys/module/ublk_drv/parameters/ublks_max", "2\n")];
            let (_folder, machine) = root(&[&files[..], devices].concat());
            machine.device_limit().expect("the driver says it")
        };
        assert!(limit(&[]).fine && limit(&[("sys/class/ublk-char/ublkc0", "")]).fine);
        let full = limit(&[("sys/class/ublk-char/ublkc0", ""), ("sys/class/ublk-char/ublkc7", "")]);
        assert!(!full.fine && full.remedy.is_some_and(|remedy| remedy.contains("echo 4 >")));
        assert_eq!(root(&[]).1.device_limit(), None);
    }

    #[test]
    fn a_forbidden_ring_is_found() {
        let rings = |value| root(&[("proc/sys/kernel/io_uring_disabled", value)]).1.rings().fine;
        assert!(rings("0\n") && !rings("1\n") && !rings("2\n"));
        assert!(root(&[]).1.rings().fine, "kernels before 6.6 do not have the sysctl");
    }

    #[test]
    fn memory_may_be_locked_by_a_right_or_without_a_limit() {
        let limits = |hard: &str| {
            format!("Limit  Soft Limit  Hard Limit  Units\nMax locked memory  8388608  {hard}  bytes\n")
        };
        let locked = |hard: &str, rights: &str| {
            let (limits, status) = (limits(hard), format!("Name:\tx\nCapEff:\t{rights}\n"));
            root(&[("proc/self/limits", &limits), ("proc/self/status", &status)]).1.locked_memory()
        };
        assert!(locked("8388608", "000001ffffffffff").fine && locked("unlimited", "0000000000000000").fine);
        let limited = locked("8388608", "0000000000000000");
        assert!(!limited.fine && limited.found.contains("8388608"));
        assert!(!root(&[]).1.locked_memory().fine, "what is not known is not fine");
    }

    #[test]
    fn the_rule_may_lie_in_any_folder_of_rules() {
        let with = |files: &[(&str, &str)]| root(files).1.device_names();
        assert!(with(&[]).fine, "without udev");
        let udev = ("run/udev/control", "");
        assert!(!with(&[udev]).fine);
        assert!(with(&[udev, ("usr/lib/udev/rules.d/60-vhdx-ublk.rules", "")]).fine);
    }

    #[test]
    fn run_is_memory_and_has_room() {
        assert!(run_room("/run", true, RUN_BYTES).fine);
        let full = run_room("/run/vhdx-ublk", true, RUN_BYTES - 1);
        assert!(full.remedy.is_some_and(|remedy| remedy.ends_with("size=25% /run/vhdx-ublk")));
        let lasting = run_room("/run", false, u64::MAX);
        let remedy = lasting.remedy.expect("it is not fine");
        assert!(!remedy.contains("tmpfs /run ") && remedy.ends_with("tmpfs /run/vhdx-ublk"), "{remedy}");
    }

    #[test]
    fn whatever_is_wrong_has_a_remedy() {
        let (_folder, machine) = root(&[]);
        let checks = machine.checks();
        assert!(checks.iter().any(|finding| !finding.fine));
        for finding in checks {
            assert_eq!(finding.remedy.is_none(), finding.fine, "{finding:?}");
        }
    }
}
