//! Promises defended here: wherever a move ends early, the chain opens at its old or at its new place with
//! the same content, and the same move again finishes; nothing else is moved, overwritten or left without
//! its parent.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vhdx_ublk::chain::Search;
use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::disk::{Access, ImageFile, Reactor};
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::Watch;
use vhdx_ublk::operations::move_chain::{Moving, Request, Step, move_chain};
use vhdx_ublk::operations::opened::OpenChain;

use crate::map::{Block, set};
use crate::skip::skipped;
use crate::{Bench, MIB, create, info, on, run};

/// Ends the move after some steps, or stops it.
struct Ends {
    left: Cell<u32>,
    stop: bool,
}

impl Ends {
    fn after(steps: u32) -> Self {
        Self { left: steps.into(), stop: false }
    }
}

impl Watch for Ends {
    fn progress(&self, done: u64, total: u64) {
        assert!(done <= total);
    }

    fn stop_requested(&self) -> bool {
        self.stop
    }
}

impl Moving for Ends {
    fn done(&self, _: Step<'_>) -> Result<()> {
        let left = self.left.get().checked_sub(1);
        self.left.set(left.ok_or_else(|| Error::new(Kind::Io, "the power went out"))?);
        Ok(())
    }
}

/// A chain of three layers in these folders, the leaf first. Each has a block of its own.
fn chain(folders: &[PathBuf; 3]) -> [PathBuf; 3] {
    let names = ["leaf.avhdx", "middle.avhdx", "base.vhdx"];
    let paths = [0, 1, 2].map(|layer| folders[layer].join(names[layer]));
    for layer in (0..3).rev() {
        fs::create_dir_all(&folders[layer]).expect("room");
        match paths.get(layer + 1) {
            Some(parent) => create(&paths[layer], &["--parent", parent.to_str().expect("UTF-8")]),
            None => create(&paths[layer], &["--size", "8M"]),
        }
        .succeeded();
        set(&paths[layer], layer as u64, Block::Data);
    }
    paths
}

/// The move of a chain, with all its parents named.
fn of(old: &[PathBuf; 3], folder: &Path) -> Request {
    Request { leaf: old[0].clone(), folder: folder.to_owned(), parents: old[1..].to_vec() }
}

/// What a reader of the chain sees.
fn content(leaf: &Path) -> Result<Vec<u8>> {
    let reactor = Reactor::new()?;
    let chain = OpenChain::read(leaf, &Search::default(), &reactor, &Claims)?;
    let mut bytes = vec![0; 8 << 20];
    reactor.block_on(chain.content().read(0, &mut bytes)).expect("no fault");
    Ok(bytes)
}

/// Moves the chain of `leaf` and ends after each possible number of steps; `make` makes it anew each time.
fn end_everywhere(folder: &Path, make: impl Fn() -> [PathBuf; 3]) {
    for steps in 0.. {
        let old = make();
        fs::create_dir_all(folder).expect("room");
        let expected = content(&old[0]).expect("a chain");
        let new_leaf = folder.canonicalize().expect("there").join("leaf.avhdx");
        let ended = move_chain(&of(&old, folder), &Claims, &Ends::after(steps));
        let places = [&old[0], &new_leaf].map(|leaf| content(leaf));
        assert!(places.iter().any(Result::is_ok), "after {steps} steps the chain is nowhere: {places:?}");
        for found in places.into_iter().flatten() {
            assert!(found == expected, "after {steps} steps it has another content");
        }
        let finished = move_chain(&of(&old, folder), &Claims, &Ends::after(u32::MAX)).expect("it finishes");
        assert_eq!(finished, new_leaf);
        assert!(content(&new_leaf).expect("a chain") == expected);
        let mut names: Vec<_> =
            fs::read_dir(folder).expect("there").map(|entry| entry.expect("there").file_name()).collect();
        names.sort();
        assert_eq!(names, ["base.vhdx", "leaf.avhdx", "middle.avhdx"]);
        for (child, parent) in [("leaf.avhdx", r".\middle.avhdx"), ("middle.avhdx", r".\base.vhdx")] {
            let locator = info(&folder.join(child))["parent"].clone();
            assert_eq!(locator["relative_path"], parent);
            assert!(locator.get("absolute_win32_path").is_none(), "{locator}");
            on("check", &folder.join(child), &[]).succeeded();
        }
        for path in old.iter().filter(|path| path.parent() != Some(folder)) {
            assert!(!path.exists(), "{} is left", path.display());
        }
        fs::remove_dir_all(folder).expect("ours");
        if ended.is_ok() {
            assert!(steps > 2, "a move has steps");
            break;
        }
    }
}

#[test]
fn a_chain_that_is_renamed_opens_wherever_the_move_ends() {
    let bench = Bench::new();
    let target = bench.path("target");
    let one = bench.path("one");
    end_everywhere(&target, || chain(&[one.clone(), one.clone(), one.clone()]));
    let three = ["a/deep", "b", "c"].map(|name| bench.path(name));
    end_everywhere(&target, || chain(&three));
    // Its base is there already.
    let two = [bench.path("a"), bench.path("b"), target.clone()];
    end_everywhere(&target, || chain(&two));
}

#[test]
fn a_chain_that_is_copied_opens_wherever_the_move_ends() {
    let bench = Bench::new();
    let Ok(far) = tempfile::tempdir_in("/dev/shm") else {
        return skipped("no /dev/shm to copy to");
    };
    let device = |path: &Path| fs::metadata(path).expect("there").dev();
    if device(far.path()) == device(bench.0.path()) {
        return skipped("/dev/shm is no other file system");
    }
    let target = far.path().join("target");
    let folders = ["a", "b", "b"].map(|name| bench.path(name));
    end_everywhere(&target, || chain(&folders));
    let mixed = [bench.path("a"), far.path().join("x"), far.path().join("y")];
    end_everywhere(&target, || chain(&mixed));
    let mixed = [far.path().join("x"), bench.path("a"), far.path().join("y")];
    end_everywhere(&target, || chain(&mixed));
    // A stop leaves no half copy.
    let old = chain(&folders);
    fs::create_dir(&target).expect("room");
    let stop = Ends { left: u32::MAX.into(), stop: true };
    let error = move_chain(&of(&old, &target), &Claims, &stop).expect_err("it was stopped");
    assert_eq!(error.kind(), Kind::Stopped, "{error}");
    assert_eq!(fs::read_dir(&target).expect("there").count(), 0);
}

#[test]
fn what_a_move_would_harm_is_refused() {
    let bench = Bench::new();
    let folders = ["a", "b", "b"].map(|name| bench.path(name));
    let old = chain(&folders);
    let target = bench.path("target");
    let moved = |folder: &Path| move_chain(&of(&old, folder), &Claims, &Ends::after(u32::MAX));
    let refused = |kind: Kind| {
        let error = moved(&target).expect_err("it is refused");
        assert_eq!(error.kind(), kind, "{error}");
        assert!(old.iter().all(|path| path.exists()));
        assert!(!target.join("leaf.avhdx").exists(), "nothing has arrived");
    };
    refused(Kind::NotFound);
    fs::create_dir(&target).expect("room");
    // Another file, a link, and another disk under the GUIDs of the base.
    let taken = target.join("base.vhdx");
    fs::write(&taken, "mine").expect("room");
    refused(Kind::Exists);
    fs::remove_file(&taken).expect("ours");
    std::os::unix::fs::symlink(&old[2], &taken).expect("room");
    refused(Kind::Exists);
    fs::remove_file(&taken).expect("ours");
    fs::copy(&old[2], &taken).expect("room");
    let end = fs::metadata(&taken).expect("there").len();
    let file = fs::File::options().write(true).open(&taken).expect("ours");
    std::os::unix::fs::FileExt::write_all_at(&file, b"changed", end - MIB).expect("room");
    drop(file);
    refused(Kind::Exists);
    fs::remove_file(&taken).expect("ours");
    let other = bench.path("b/other.avhdx");
    create(&other, &["--parent", old[2].to_str().expect("UTF-8")]).succeeded();
    refused(Kind::InUse);
    fs::remove_file(&other).expect("ours");
    let held = ImageFile::open(&old[1], Access::ReadOnly, Duration::ZERO).expect("free");
    refused(Kind::InUse);
    drop(held);
    // A whole copy is what a move that ended early leaves.
    fs::copy(&old[2], &taken).expect("room");
    moved(&target).expect("nothing forbids it");
    assert!(old.iter().all(|path| !path.exists()));
}

#[test]
fn move_prints_the_new_path() {
    let bench = Bench::new();
    let folders = ["a", "b", "c"].map(|name| bench.path(name));
    let old = chain(&folders);
    let target = bench.path("target");
    fs::create_dir(&target).expect("room");
    let [leaf, middle, base, folder] =
        [&old[0], &old[1], &old[2], &target].map(|path| path.to_str().expect("UTF-8"));
    let new = target.canonicalize().expect("there").join("leaf.avhdx");
    let printed = format!("{}\n", new.display());
    let unnamed = run(&["move", leaf, folder, "--parent", middle]).failed(2);
    assert!(unnamed.contains("base.vhdx") && old.iter().all(|path| path.exists()), "{unnamed}");
    let all = ["move", leaf, folder, "--parent", middle, "--parent", base];
    assert_eq!(run(&all).succeeded(), printed);
    let again = run(&all);
    assert_eq!((again.status, again.stdout), (Some(0), printed), "there is nothing left to do");
    assert!(again.stderr.contains("it is not there"), "{}", again.stderr);
    run(&["move", leaf]).misused();
    assert!(run(&["move", "--help"]).succeeded().contains("Exit status:"));
}

/// One folder under two paths: nothing moves, and above all nothing is removed.
#[test]
fn a_folder_under_another_path_is_the_same_folder() {
    let bench = Bench::new();
    let folder = bench.path("a");
    let old = chain(&[folder.clone(), folder.clone(), folder.clone()]);
    let expected = content(&old[0]).expect("a chain");
    let alias = bench.path("alias");
    fs::create_dir(&alias).expect("room");
    let mount = |arguments: &[&str]| {
        let status = std::process::Command::new("unshare").args(["-m", "sh", "-c"]).args(arguments).status();
        status.is_ok_and(|status| status.success())
    };
    let program = env!("CARGO_BIN_EXE_vhdx-ublk");
    let bind = format!("mount --bind {} {}", folder.display(), alias.display());
    if !mount(&[&bind]) {
        return skipped("no right to mount: no folder has had two paths");
    }
    let moved = format!("{bind} && {program} move {} {}", old[0].display(), alias.display());
    assert!(mount(&[&moved]));
    assert!(old.iter().all(|path| path.exists()), "an image is gone");
    assert!(content(&old[0]).expect("a chain") == expected);
}

/// A link of another user does not lead root to an image.
#[test]
fn a_link_of_another_user_is_refused() {
    let bench = Bench::new();
    let folder = bench.path("a");
    let old = chain(&[folder.clone(), folder.clone(), folder]);
    let link = bench.path("link.vhdx");
    std::os::unix::fs::symlink(&old[0], &link).expect("room");
    if std::os::unix::fs::lchown(&link, Some(65534), Some(65534)).is_err() {
        return skipped("not root: no link has another owner");
    }
    let target = bench.path("target");
    fs::create_dir(&target).expect("room");
    let request = Request { leaf: link, folder: target.clone(), parents: Vec::new() };
    let error = move_chain(&request, &Claims, &Ends::after(u32::MAX)).expect_err("another user's link");
    assert_eq!(error.kind(), Kind::Permission, "{error}");
    assert_eq!(fs::read_dir(&target).expect("there").count(), 0);
}
