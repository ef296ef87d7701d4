//! Root works in folders of others, on images of others: whatever they put there, and whenever they swap it,
//! nothing is opened, told, changed or removed but what the user has named.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use vhdx_ublk::format::locator::RELATIVE_PATH;

use super::merge::{Layer, relocate};
use super::relink::{base, child_of};
use super::{Bench, MIB, Ran, create, info, on, program, run};

/// How long a command may take that must not hang: many times what any of these takes.
const NO_HANG: Duration = Duration::from_secs(60);

/// An account without privileges.
const UNPRIVILEGED: u32 = 65534;

/// Runs `command`, and fails if it hangs.
fn ended(mut command: Command) -> Ran {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
    let until = Instant::now() + NO_HANG;
    while child.try_wait().expect("ours").is_none() {
        if Instant::now() > until {
            child.kill().expect("ours");
            panic!("{command:?} hangs");
        }
        thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("ours").into()
}

fn ended_on(command: &str, image: &Path, options: &[&str]) -> Ran {
    let mut program = program();
    program.arg(command).args(options).arg(image);
    ended(program)
}

/// Who may do what with a file, and what is in it.
fn state(path: &Path) -> (u32, u32, u32, Vec<u8>) {
    let found = fs::metadata(path).expect("there");
    (found.uid(), found.gid(), found.mode(), fs::read(path).expect("readable"))
}

/// The copy that a merge leaves is as private as the child was, and as the base that it is a copy of.
#[test]
fn a_copy_of_the_parent_belongs_to_the_owner_of_the_child() {
    if !nix::unistd::geteuid().is_root() {
        return super::skipped("only root gives files away: the owner of `merge --copy` is not tested");
    }
    for (of_base, of_child, of_copy) in [(0o644, 0o600, 0o600), (0o600, 0o644, 0o600), (0o640, 0o666, 0o640)]
    {
        let bench = Bench::new();
        let parent = base(&bench, "base.vhdx");
        let child = child_of(&bench, &parent, "child.vhdx");
        for (path, mode) in [(&parent, of_base), (&child, of_child)] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("ours");
        }
        chown(&child, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).expect("root may");
        let copy = bench.path("copy.vhdx");
        let merged = ended_on("merge", &child, &["--copy", copy.to_str().expect("UTF-8")]);
        assert_eq!(merged.status, Some(0), "{}", merged.stderr);
        let (owner, group, mode, _) = state(&copy);
        assert_eq!((owner, group, mode & 0o7777), (UNPRIVILEGED, UNPRIVILEGED, of_copy), "{of_base:o}");
    }
}

/// What another user owned becomes private: that they own the source is not known, whatever its mode. The
/// warning says so, and how they get it back.
#[test]
fn the_owner_of_a_replaced_file_gets_no_source_of_another_user() {
    if !nix::unistd::geteuid().is_root() {
        return super::skipped("only root gives files away: the owner of a replaced file is not tested");
    }
    let bench = Bench::new();
    let source = base(&bench, "source.vhdx");
    fs::set_permissions(&source, fs::Permissions::from_mode(0o644)).expect("ours");
    let target = bench.path("target.raw");
    fs::write(&target, "").expect("room");
    chown(&target, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).expect("root may");
    let [source, named] = [&source, &target].map(|path| path.to_str().expect("UTF-8"));
    let ran = run(&["convert", "--force", source, named]);
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("does not own the source"), "{}", ran.stderr);
    assert!(ran.stderr.contains(&format!("chown {UNPRIVILEGED} ")), "{}", ran.stderr);
    let (owner, _, mode, _) = state(&target);
    assert_eq!((owner, mode & 0o7777), (0, 0o600));
}

/// A disk is served from boot on, or mounted, without anybody who looks at the image's name.
#[test]
fn an_image_behind_a_link_of_another_user_is_neither_mounted_nor_enabled() {
    if !nix::unistd::geteuid().is_root() {
        return super::skipped("only root gives links away: links to mounted images are not tested");
    }
    let bench = Bench::new();
    let image = base(&bench, "image.vhdx");
    let link = bench.path("link.vhdx");
    symlink(&image, &link).expect("room");
    lchown(&link, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).expect("root may");
    fs::create_dir(bench.path("mnt")).expect("room");
    let (link, folder) = (link.to_str().expect("UTF-8"), bench.path("mnt"));
    // The wrong option keeps the table of this machine as it is, whatever happens.
    for arguments in [["mount", link, folder.to_str().expect("UTF-8"), "-r"], ["enable", "x", link, "wrong"]]
    {
        let mut command = program();
        command.args(arguments);
        let message = ended(command).failed(1);
        assert!(message.contains("a symbolic link of another user"), "{message}");
    }
}

/// The image that another user's link leads to may be served: the link does not say which device is meant.
#[test]
fn a_link_of_another_user_names_no_device() {
    if !nix::unistd::geteuid().is_root() {
        return super::skipped("only root gives links away: links to served images are not tested");
    }
    let bench = Bench::new();
    let image = base(&bench, "image.vhdx");
    let (link, next) = (bench.path("link.vhdx"), bench.path("next.vhdx"));
    symlink(&image, &link).expect("room");
    let (named, next) = (link.to_str().expect("UTF-8"), next.to_str().expect("UTF-8"));
    let commands: [&[&str]; 6] = [
        &["del", named],
        &["snapshot", named, next],
        &["upgrade", named],
        &["recover", named],
        &["stats", named],
        &["resize", named, "--size", "2G", "--dry-run"],
    ];
    let message = |arguments: &[&str]| run(arguments).stderr;
    for arguments in commands {
        assert!(!message(arguments).contains("symbolic link"), "{arguments:?}: the link is root's own");
    }
    lchown(&link, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).expect("root may");
    for arguments in commands {
        let message = message(arguments);
        assert!(message.contains("a symbolic link of another user"), "{arguments:?}: {message}");
    }
}

/// Has a thread end that runs beside a test, where an assertion fails, too.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// As `/etc/shadow` is.
fn secret(bench: &Bench) -> PathBuf {
    let path = bench.path("shadow");
    fs::write(&path, "TOPSECRET:hash").expect("room");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("ours");
    path
}

/// The owner of the folder puts a link to a file of root's in the place of the file that is being made.
#[test]
fn a_link_in_place_of_the_unfinished_image_gives_nothing_away() {
    if !nix::unistd::geteuid().is_root() {
        return super::skipped(
            "only root gives files away: the swapped file of `create --force` is not tested",
        );
    }
    let bench = Bench::new();
    let victim = secret(&bench);
    fs::create_dir(bench.path("home")).expect("room");
    let image = bench.image("home/a.vhdx", &["--size", "1G"]);
    chown(&image, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).expect("root may");
    fs::set_permissions(&image, fs::Permissions::from_mode(0o666)).expect("ours");
    let (before, old) = (state(&victim), state(&image));
    let (done, swaps) = (AtomicBool::new(false), AtomicBool::new(false));
    let swap_all = || {
        let mut number = 0;
        while !done.load(Ordering::Relaxed) {
            let names = fs::read_dir(bench.path("home")).expect("readable").flatten();
            for path in names.map(|name| name.path()).filter(|path| path.extension() == Some("tmp".as_ref()))
            {
                number += 1;
                let is_link = fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink());
                if !is_link && fs::rename(&path, bench.path(&format!("moved.{number}"))).is_ok() {
                    symlink(&victim, &path).expect("free");
                    swaps.store(true, Ordering::Relaxed);
                }
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(swap_all);
        let _ends = Ends(&done);
        for _ in 0..3 {
            let options = ["--size", "16T", "--block-size", "1M", "--block-state", "zero", "--force"];
            let ran = create(&image, &options);
            if ran.status != Some(0) {
                // The last: the thread has moved the file, and has made no link yet.
                let says = ["another file has taken its place", "it is not in its folder any longer"];
                assert!(says.iter().any(|text| ran.stderr.contains(text)), "{}", ran.stderr);
            }
        }
    });
    assert!(swaps.load(Ordering::Relaxed), "no file was swapped: nothing is tested");
    assert!(state(&victim) == before, "the file behind the link was changed");
    assert!(state(&image) == old, "the image was replaced by what is not the new one");
}

/// The folder of the chain becomes a link to another while the merge copies.
#[test]
fn a_merge_removes_its_own_child_and_not_one_behind_a_link() {
    const BLOCKS: u64 = 192;
    let bench = Bench::new();
    for folder in ["mine", "yours"] {
        fs::create_dir(bench.path(folder)).expect("room");
    }
    let base = bench.image("mine/base.vhdx", &["--size", "256M", "--block-size", "1M"]);
    let child = child_of(&bench, &base, "mine/child.vhdx");
    let mut disk = vec![0; usize::try_from(BLOCKS * MIB).expect("small")];
    let mut layer = Layer { path: &child, disk: &mut disk };
    for block in 0..BLOCKS {
        layer.whole(block, 0x5a);
    }
    let yours = bench.path("yours/child.vhdx");
    fs::write(&yours, "root's own").expect("room");
    let mut merging = program().arg("merge").arg(&child).spawn().expect("it runs");
    let until = Instant::now() + NO_HANG;
    let copied = || fs::metadata(&base).map_or(0, |found| found.len()) > 16 * MIB;
    while !copied() && Instant::now() < until && merging.try_wait().expect("ours").is_none() {
        thread::sleep(Duration::from_millis(1));
    }
    fs::rename(bench.path("mine"), bench.path("moved")).expect("ours");
    symlink(bench.path("yours"), bench.path("mine")).expect("room");
    assert!(bench.path("moved/child.vhdx").exists(), "it was swapped too late: nothing is tested");
    let status = merging.wait().expect("ours");
    assert_eq!(fs::read_to_string(&yours).expect("it stays"), "root's own");
    assert!(status.success() && !bench.path("moved/child.vhdx").exists(), "{status}");
}

/// The base and a link to a copy of it elsewhere change places all the time: the copy has the very identity
/// that the child looks for, and was not named.
#[test]
fn a_merge_writes_to_what_it_has_examined_and_to_no_copy_elsewhere() {
    const ROUNDS: usize = 60;
    let bench = Bench::new();
    for folder in ["mine", "yours"] {
        fs::create_dir(bench.path(folder)).expect("room");
    }
    let parent = base(&bench, "mine/base.vhdx");
    let child = child_of(&bench, &parent, "mine/child.vhdx");
    let (yours, link, new) = (bench.path("yours/base.vhdx"), bench.path("mine/link"), bench.path("mine/new"));
    fs::copy(&parent, &yours).expect("room");
    let (of_parent, of_child) = (fs::read(&parent).expect("ours"), fs::read(&child).expect("ours"));
    let done = AtomicBool::new(false);
    let swap_all = || {
        while !done.load(Ordering::Relaxed) {
            let (one, other) = (&*parent, &*link);
            renameat2(AT_FDCWD, one, AT_FDCWD, other, RenameFlags::RENAME_EXCHANGE).expect("both are there");
        }
    };
    let (mut refused, mut copies_kept) = (0, true);
    for _ in 0..ROUNDS {
        fs::write(&child, &of_child).expect("room");
        fs::write(&new, &of_parent).expect("room");
        fs::rename(&new, &parent).expect("ours");
        let _ = fs::remove_file(&link);
        symlink(&yours, &link).expect("free");
        done.store(false, Ordering::Relaxed);
        let ran = thread::scope(|scope| {
            scope.spawn(swap_all);
            let _ends = Ends(&done);
            ended_on("merge", &child, &[])
        });
        copies_kept &= fs::read(&yours).expect("readable") == of_parent;
        refused += usize::from(ran.status != Some(0));
    }
    assert!(copies_kept, "the merge wrote to a copy that was not named");
    assert!(refused > 0, "the link was never found: nothing is tested");
}

/// What a child may say its parent is, and what must be said of that.
fn intruders(bench: &Bench) -> Vec<(PathBuf, &'static str)> {
    let fifo = bench.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO can be made");
    let mut intruders = vec![
        (fifo, "a FIFO"),
        (secret(bench), "not a VHDX"),
        ("/dev/zero".into(), "a character device"),
        ("/proc/self/status".into(), "a file of the kernel's (procfs)"),
        (bench.0.path().to_owned(), "a folder"),
    ];
    if Path::new("/proc/kmsg").exists() {
        intruders.push(("/proc/kmsg".into(), "a file of the kernel's (procfs)"));
    }
    if Path::new("/sys/kernel/uevent_seqnum").exists() {
        intruders.push(("/sys/kernel/uevent_seqnum".into(), "a file of the kernel's (sysfs)"));
    }
    intruders
}

/// A child leads to what never answers, acts, or is secret: every command says what it is, and nothing of
/// what is in it.
#[test]
fn a_parent_that_is_no_file_on_a_disk_is_refused_at_once() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let child = child_of(&bench, &parent, "child.vhdx");
    fs::remove_file(&parent).expect("ours");
    for (intruder, what) in intruders(&bench) {
        symlink(&intruder, &parent).expect("free");
        let commands: [(&str, &[&str]); 4] = [
            ("check", &[]),
            ("merge", &[]),
            ("info", &["--chain"]),
            ("create", &["--force", "--size", "1G"]),
        ];
        for (command, options) in commands {
            let path = if command == "create" { &parent } else { &child };
            let Ran { status, stdout, stderr } = ended_on(command, path, options);
            let said = stdout + &stderr;
            assert!(status == Some(1) && said.contains(what), "{command} {}: {said}", intruder.display());
            assert!(!said.contains("TOP"), "{command} shows another file's content: {said}");
        }
        fs::remove_file(&parent).expect("ours");
    }
}

/// In the folder of another user the name of an image leads to an image of root's.
#[test]
fn a_link_of_another_user_does_not_say_what_is_replaced() {
    if !nix::unistd::geteuid().is_root() {
        return super::skipped(
            "only root gives links away: `create --force` on those of others is not tested",
        );
    }
    let bench = Bench::new();
    fs::create_dir(bench.path("home")).expect("room");
    let victim = bench.image("victim.vhdx", &["--size", "1G"]);
    let (foreign, ours) = (bench.path("home/foreign"), bench.path("home/ours"));
    symlink("../victim.vhdx", &foreign).expect("free");
    lchown(&foreign, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).expect("root may");
    symlink("foreign", &ours).expect("free");
    let before = state(&victim);
    let target = victim.canonicalize().expect("there");
    let parent = bench.image("parent.vhdx", &["--size", "1G"]);
    for link in [&foreign, &ours] {
        let [named, parent] = [link, &parent].map(|path| path.to_str().expect("UTF-8"));
        for refused in [
            create(link, &["--size", "2G", "--force"]),
            on("resize", link, &["--size", "2G"]),
            run(&["relink", named, parent]),
            run(&["set", named, "--disk-id", "new"]),
            run(&["compact", named]),
            run(&["check", "--repair", named]),
        ] {
            let message = refused.failed(1);
            let remedy = format!("name it: {}", target.display());
            assert!(
                message.contains("a symbolic link of another user") && message.contains(&remedy),
                "{message}"
            );
        }
        assert!(state(&victim) == before, "the file behind the link was changed");
    }
    // Who owns the file as well needs no link to replace it.
    chown(&victim, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).expect("root may");
    create(&ours, &["--size", "2G", "--force"]).succeeded();
    assert_eq!(info(&victim)["virtual_size"], 2048 * MIB);
}

/// A new image may belong to the owner of the one that it is like: it does not go where that owner leads it.
#[test]
fn no_new_image_goes_behind_a_link_of_another_user() {
    if !nix::unistd::geteuid().is_root() {
        return super::skipped(
            "only root gives links away: new images behind those of others are not tested",
        );
    }
    let bench = Bench::new();
    for folder in ["home", "disks"] {
        fs::create_dir(bench.path(folder)).expect("room");
    }
    let foreign = bench.path("home/disks");
    symlink("../disks", &foreign).expect("free");
    let base = bench.image("base.vhdx", &["--size", "1G"]);
    let (leaf, new) = (child_of(&bench, &base, "leaf.vhdx"), foreign.join("new.vhdx"));
    let [base, leaf, new, folder] = [&base, &leaf, &new, &foreign].map(|path| path.to_str().expect("UTF-8"));
    let commands: [&[&str]; 3] =
        [&["snapshot", "revert", leaf, base, new], &["merge", leaf, "--copy", new], &["move", leaf, folder]];
    lchown(&foreign, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).expect("root may");
    for command in commands {
        let message = run(command).failed(1);
        assert!(message.contains("a symbolic link of another user"), "{command:?}: {message}");
        assert_eq!(fs::read_dir(bench.path("disks")).expect("readable").count(), 0, "{command:?}");
    }
    lchown(&foreign, Some(0), Some(0)).expect("root may");
    run(commands[0]).succeeded();
}

/// The owner of a folder leads one of its folders elsewhere: everything in there would be at their choice.
/// Root's own links, and those that the kernel shows, lead to what is meant.
#[test]
fn a_folder_behind_a_link_of_another_user_is_not_written_to() {
    if !nix::unistd::geteuid().is_root() {
        return super::skipped("only root gives links away: folders behind those of others are not tested");
    }
    let bench = Bench::new();
    for folder in ["home", "disks"] {
        fs::create_dir(bench.path(folder)).expect("room");
    }
    let victim = bench.image("disks/victim.vhdx", &["--size", "1G"]);
    let (foreign, ours) = (bench.path("home/disks"), bench.path("ours"));
    symlink("../disks", &foreign).expect("free");
    symlink("home/disks", &ours).expect("free");
    let before = state(&victim);
    let commands: [&[&str]; 5] = [
        &["create", "--force", "--size", "2G"],
        &["resize", "--size", "2G"],
        &["set", "--disk-id", "new"],
        &["compact"],
        &["check", "--repair"],
    ];
    let on_way = |way: &Path, command: &[&str]| -> Ran {
        program().args(command).arg(way.join("victim.vhdx")).output().expect("it runs").into()
    };
    lchown(&foreign, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).expect("root may");
    for way in [&foreign, &ours, &foreign.join("../disks/."), &bench.path("home/../ours")] {
        for command in commands {
            let message = on_way(way, command).failed(1);
            let remedy = format!("name it: {}", victim.canonicalize().expect("there").display());
            assert!(
                message.contains("a symbolic link of another user") && message.contains(&remedy),
                "{command:?}: {message}"
            );
        }
        assert!(state(&victim) == before, "the file behind the link was changed");
    }
    let named = fs::read_dir(bench.path("disks")).expect("readable").count();
    assert_eq!(named, 1, "and nothing was left beside it");
    lchown(&foreign, Some(0), Some(0)).expect("root may");
    for way in
        [&foreign, &ours, &Path::new("/proc/self/root").join(ours.strip_prefix("/").expect("absolute"))]
    {
        on_way(way, &["resize", "--size", "2G"]).succeeded();
        on_way(way, &["create", "--force", "--size", "1G"]).succeeded();
    }
    for way in ["/dev/fd/3", "/proc/self/fd/3", "/proc/self/cwd/victim.vhdx"] {
        let script = format!("exec \"$0\" resize {way} --size 2G 3<>victim.vhdx");
        let mut command = Command::new("sh");
        command.current_dir(bench.path("disks")).args(["-c", &script]).arg(program().get_program());
        Ran::from(command.output().expect("it runs")).succeeded();
    }
}

/// A wrong name is no reason to lose a file; a damaged image may be replaced.
#[test]
fn force_replaces_images_and_empty_files_only() {
    let bench = Bench::new();
    let file = bench.path("a.vhdx");
    for content in [&b"all of my notes"[..], &[0; 4096], b"QFI\xfb\0\0\0\x03"] {
        fs::write(&file, content).expect("room");
        let message = create(&file, &["--size", "1G", "--force"]).failed(1);
        assert!(
            message.contains("not a VHDX image") && message.contains("remove the file yourself"),
            "{message}"
        );
        assert_eq!(fs::read(&file).expect("readable"), content);
    }
    fs::write(&file, "").expect("room");
    create(&file, &["--size", "1G", "--force"]).succeeded();
    let mut bytes = fs::read(&file).expect("readable");
    bytes[..8].fill(0);
    fs::write(&file, bytes).expect("room");
    create(&file, &["--size", "2G", "--force"]).succeeded();
    assert_eq!(info(&file)["virtual_size"], 2048 * MIB);
}

/// Says whether `action` opens a FIFO for reading, for a moment or for longer.
fn watched<T>(fifo: &Path, action: impl FnOnce() -> T) -> (bool, T) {
    // For the writer to get to where it waits, and to say that it was let go.
    let settle = || thread::sleep(Duration::from_millis(500));
    let opened = AtomicBool::new(false);
    thread::scope(|scope| {
        // Waits until there is a reader, were it for a moment.
        let writer = scope.spawn(|| {
            let writer = OpenOptions::new().write(true).open(fifo);
            opened.store(true, Ordering::SeqCst);
            writer
        });
        settle();
        let outcome = action();
        settle();
        let seen = opened.load(Ordering::SeqCst);
        let release = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(fifo);
        drop(writer.join().expect("it waits"));
        drop(release.expect("a FIFO"));
        (seen, outcome)
    })
}

/// The search for an image's children opens no link and nothing but regular files.
#[test]
fn neighbours_that_are_no_files_are_not_opened() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G"]);
    let fifo = bench.path("fifo.vhdx");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO can be made");
    symlink(&fifo, bench.path("link.vhdx")).expect("room");
    let (opened, ran) = watched(&fifo, || ended_on("create", &image, &["--force", "--size", "2G"]));
    ran.succeeded();
    assert!(!opened, "a neighbour was opened that is no file");
    let (opened, seen) = watched(&fifo, || File::open(bench.path("link.vhdx")).is_ok());
    assert!(opened && seen, "the watch sees what is opened through a link");
}

/// A file system in a process of another user, which never answers.
struct Silent {
    path: PathBuf,
    /// What it would answer by.
    _server: File,
}

impl Silent {
    fn at(path: PathBuf) -> Option<Self> {
        fs::create_dir(&path).expect("room");
        let server = OpenOptions::new().read(true).write(true).open("/dev/fuse").ok()?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("silent"), &path, Some("fuse"), flags, Some(&*options)).ok()?;
        Some(Self { path, _server: server })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        umount2(&self.path, MntFlags::MNT_DETACH).expect("ours");
    }
}

/// A child leads the search for its parent to a file system that does not answer. That ends, and the parent
/// beside the child is found.
#[test]
fn a_parent_on_a_silent_file_system_holds_no_command() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let child = child_of(&bench, &parent, "child.vhdx");
    relocate(&child, |locator| locator.set(RELATIVE_PATH, r".\silent\base.vhdx"));
    let Some(_silent) = Silent::at(bench.path("silent")) else {
        return super::skipped("no FUSE can be mounted: a silent file system is not tested");
    };
    let ran = ended_on("info", &child, &["--chain", "--json"]);
    assert!(ran.stderr.contains("has not answered"), "{}", ran.stderr);
    assert!(ran.status == Some(0) && ran.stdout.contains("base.vhdx"), "{}", ran.stdout);
    let message = ended_on("resize", &parent, &["--size", "32M"]).failed(1);
    assert!(message.contains("it is the parent of") && message.contains("child.vhdx"), "{message}");
}

/// Whoever may read an image may lock it, and keep a device from it: by default that is its owner alone.
#[test]
fn images_are_private_unless_more_is_asked_for() {
    let bench = Bench::new();
    let mode = |path: &Path| fs::metadata(path).expect("there").mode() & 0o777;
    let open_mask = |image: &str, options: &[&str]| {
        let path = bench.path(image);
        let mut shell = Command::new("sh");
        shell.args(["-c", r#"umask 0; exec "$0" "$@""#, env!("CARGO_BIN_EXE_vhdx-ublk"), "create"]);
        ended({
            shell.args(options).arg(&path);
            shell
        })
        .succeeded();
        path
    };
    let image = open_mask("a.vhdx", &["--size", "1G"]);
    assert_eq!(mode(&image), 0o600);
    let parent = image.to_str().expect("UTF-8");
    assert_eq!(mode(&open_mask("child.vhdx", &["--parent", parent])), 0o600);
    assert_eq!(mode(&open_mask("open.vhdx", &["--size", "1G", "--mode", "644"])), 0o644);
    // A child has no content of its own yet: who may not read the parent must not read it through the child.
    assert_eq!(mode(&open_mask("open-child.vhdx", &["--parent", parent, "--mode", "644"])), 0o600);
    fs::set_permissions(&image, fs::Permissions::from_mode(0o640)).expect("ours");
    assert_eq!(mode(&open_mask("group.vhdx", &["--parent", parent, "--mode", "664"])), 0o640);
    let other = bench.path("b.vhdx");
    create(&other, &["--size", "1G", "--mode", "640"]).succeeded();
    open_mask("b.vhdx", &["--size", "2G", "--force", "--mode", "666"]);
    assert_eq!((mode(&other), info(&other)["virtual_size"].as_u64()), (0o640, Some(2048 * MIB)));
    for wrong in ["777", "7", "rw", "060", "4644", ""] {
        on("create", &bench.path("c.vhdx"), &["--size", "1G", "--mode", wrong]).misused();
    }
}

/// Characters that steer a terminal, or forge a line of the program's.
const STEERING: [char; 6] = ['\x1b', '\x07', '\u{7f}', '\u{9b}', '\u{202e}', '\u{2066}'];

fn is_clean(text: &str) -> bool {
    !text.contains(STEERING) && !text.lines().any(|line| line.starts_with("FORGED"))
}

/// A name says what it is and does nothing: in answers, errors, warnings and JSON.
#[test]
fn names_neither_steer_terminals_nor_forge_lines() {
    let bench = Bench::new();
    let odd = "x\nFORGED: all is well\x1b]0;title\x07\u{7f}\u{9b}2J\u{202e}\u{2066}.vhdx";
    let image = bench.image(odd, &["--size", "16M", "--block-size", "2M"]);
    let child = child_of(&bench, &image, &format!("child-{odd}"));
    let commands: [(&str, &Path, &[&str]); 8] = [
        ("info", &child, &["--chain"]),
        ("info", &child, &["--chain", "--json"]),
        ("check", &child, &[]),
        ("check", &child, &["--json"]),
        ("create", &child, &["--size", "1G"]),
        ("merge", &image, &[]),
        ("create", &image, &["--size", "1G", "--force"]),
        ("merge", &child, &[]),
    ];
    for (command, path, options) in commands {
        let Ran { stdout, stderr, .. } = ended_on(command, path, options);
        assert!(is_clean(&stdout) && is_clean(&stderr), "{command}: {stdout:?} {stderr:?}");
        assert!(stdout.contains(r"FORGED: all") || stderr.contains(r"FORGED: all"), "{command}: {stderr}");
    }
    let json = info(&image);
    assert_eq!(json["image"].as_str().map(|path| path.ends_with(odd)), Some(true), "JSON has the very name");
}

/// Whoever pastes the command that is suggested runs that command alone, on the very file.
#[test]
fn a_suggested_command_takes_any_name_for_a_name() {
    let bench = Bench::new();
    let ran = bench.path("ran");
    let image = bench.image("a;$(touch ran) it's b.vhdx", &["--size", "16M", "--block-size", "2M"]);
    let message = ended_on("merge", &image, &[]).failed(1);
    let (_, command) = message.split_once("try: `vhdx-ublk ").expect("a command is suggested");
    let (command, _) = command.split_once("` shows").expect("the command ends");
    let line = format!("exec '{}' {command}", env!("CARGO_BIN_EXE_vhdx-ublk"));
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(&line).current_dir(bench.0.path());
    let told = ended(shell).succeeded();
    assert!(told.contains("b.vhdx") && !ran.exists(), "{line}: {told}");
}

/// A path need not be text.
#[test]
fn a_name_that_is_no_text_is_a_name() {
    let bench = Bench::new();
    let name = |bytes: &[u8]| bench.0.path().join(std::ffi::OsStr::from_bytes(bytes));
    fs::create_dir(name(b"\xff")).expect("room");
    let image = name(b"\xff/base.vhdx");
    create(&image, &["--size", "16M"]).succeeded();
    let child = name(b"\xff/ch\xe9ld.vhdx");
    let mut making = program();
    making.arg("create").arg("--parent").arg(&image).arg(&child);
    ended(making).succeeded();
    for command in ["info", "check"] {
        assert_eq!(ended_on(command, &child, &[]).status, Some(0));
        assert_eq!(ended_on(command, &child, &["--json"]).status, Some(0));
    }
    create(&image, &["--size", "1G", "--force"]).failed(1);
    assert_eq!(ended_on("merge", &child, &[]).status, Some(0));
    assert!(!child.exists());
}
