//! What is merged is in the parent, as others read it, and no image that needs what goes is forgotten.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;
use vhdx_ublk::disk::{Access, ImageFile, Reactor};
use vhdx_ublk::format::locator::{
    ABSOLUTE_WIN32_PATH, MAX_PAIRS, PARENT_LINKAGE, PARENT_LINKAGE2, ParentLocator, RELATIVE_PATH,
};
use vhdx_ublk::image::Image;

use super::relink::{base, child_of};
use super::{Bench, MIB, Ran, Snapshot, has, info, on, program, qemu, skipped};

/// Where a child with a log of 1 MiB has its BAT, and its first block.
const BAT: u64 = 3 * MIB;
const END: u64 = 4 * MIB;

/// Blocks of 1 MiB of the disk, less than a chunk.
const BLOCKS: u64 = 16;

/// The slot of the sector bitmap: blocks of 1 MiB, sectors of 512 bytes.
const BITMAP_SLOT: u64 = 4096;

const ZERO: u64 = 2;
const PRESENT: u64 = 6;
const PARTIAL: u64 = 7;

/// A child's file and the disk that it and what is below it are, block by block.
pub struct Layer<'a> {
    pub path: &'a Path,
    pub disk: &'a mut [u8],
}

impl Layer<'_> {
    pub fn slot(&self, slot: u64, entry: u64) {
        let file = OpenOptions::new().write(true).open(self.path).expect("ours");
        file.write_all_at(&entry.to_le_bytes(), BAT + 8 * slot).expect("room");
    }

    pub fn append(&self, bytes: &[u8]) -> u64 {
        let file = OpenOptions::new().write(true).open(self.path).expect("ours");
        let at = file.metadata().expect("there").len().max(END);
        file.write_all_at(bytes, at).expect("room");
        at
    }

    fn of_disk(&mut self, block: u64) -> &mut [u8] {
        let start = usize::try_from(block * MIB).expect("small");
        &mut self.disk[start..start + (1 << 20)]
    }

    pub fn zero(&mut self, block: u64) {
        self.slot(block, ZERO);
        self.of_disk(block).fill(0);
    }

    pub fn whole(&mut self, block: u64, fill: u8) {
        let at = self.append(&vec![fill; 1 << 20]);
        self.slot(block, at | PRESENT);
        self.of_disk(block).fill(fill);
    }

    /// Every third sector is here; the others hold what must not be read.
    pub fn part(&mut self, block: u64, fill: u8) {
        let mut bitmap = vec![0; 1 << 20];
        let mut bytes = vec![0xee; 1 << 20];
        for sector in (0..2048).step_by(3) {
            bitmap[usize::try_from(block).expect("small") * 256 + sector / 8] |= 1 << (sector % 8);
            bytes[sector * 512..][..512].fill(fill);
            self.of_disk(block)[sector * 512..][..512].fill(fill);
        }
        let bitmap = self.append(&bitmap);
        self.slot(BITMAP_SLOT, bitmap | PRESENT);
        let at = self.append(&bytes);
        self.slot(block, at | PARTIAL);
    }
}

/// Merges; what is removed is printed, and what is written is said.
fn merged(child: &Path, options: &[&str]) -> String {
    let Ran { status, stdout, stderr } = on("merge", child, &[options, &["--progress", "none"]].concat());
    assert!(status == Some(0) && stderr.lines().count() == 1 && stderr.contains("merging "), "{stderr}");
    stdout
}

/// A base that QEMU has written, two layers over it, and the disk that they are.
fn chain(bench: &Bench) -> ([PathBuf; 3], Vec<u8>) {
    let base = base(bench, "base.vhdx");
    let writes = ["write -P 0x11 0 5M", "write -P 0x12 9M 3M"];
    let options = writes.iter().flat_map(|write| ["-c", write]);
    let written = Command::new("qemu-io").args(["-f", "vhdx"]).args(options).arg(&base).output();
    assert!(written.expect("it runs").status.success());
    let mut disk = vec![0; usize::try_from(BLOCKS * MIB).expect("small")];
    disk[..5 << 20].fill(0x11);
    disk[9 << 20..12 << 20].fill(0x12);
    let middle = child_of(bench, &base, "middle.vhdx");
    let mut layer = Layer { path: &middle, disk: &mut disk };
    layer.zero(0);
    layer.whole(1, 0x21);
    layer.whole(6, 0x22);
    layer.part(2, 0x23);
    let leaf = child_of(bench, &middle, "leaf.vhdx");
    let mut layer = Layer { path: &leaf, disk: &mut disk };
    layer.zero(9);
    layer.whole(2, 0x31);
    layer.part(1, 0x32);
    layer.whole(15, 0x33);
    ([base, middle, leaf], disk)
}

/// One step at a time and all at once: QEMU reads in the base what the chain was.
#[test]
fn a_merged_disk_is_read_by_others() {
    if !has("qemu-img") || !has("qemu-io") {
        return skipped("qemu-img or qemu-io is missing: no other program has read what was merged");
    }
    for at_once in [true, false] {
        let bench = Bench::new();
        let ([base, middle, leaf], disk) = chain(&bench);
        let flat = bench.path("flat.raw");
        fs::write(&flat, &disk).expect("room");
        let removed = if at_once {
            merged(&leaf, &["--into", base.to_str().expect("UTF-8")])
        } else {
            let first = merged(&leaf, &[]);
            assert_eq!(bench.names(), ["base.vhdx", "flat.raw", "middle.vhdx"]);
            // From another folder, through a link.
            let link = bench.path("link");
            std::os::unix::fs::symlink(&middle, &link).expect("room");
            let second = merged(&link, &[]);
            fs::remove_file(link).expect("there");
            first + &second
        };
        let mut removed: Vec<&Path> = removed.lines().map(Path::new).collect();
        removed.sort();
        let gone = [leaf, middle].map(|path| {
            bench.0.path().canonicalize().expect("there").join(path.file_name().expect("a name"))
        });
        assert_eq!(removed, gone);
        assert_eq!(bench.names(), ["base.vhdx", "flat.raw"]);
        qemu(&["compare", "-f", "vhdx", "-F", "raw", base.to_str().expect("UTF-8")], &flat);
        qemu(&["check"], &base);
        on("check", &base, &[]).succeeded();
    }
}

/// Who would lose a parent, or have another one, is named; nothing is changed.
#[test]
fn images_that_need_what_goes_are_named() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let child = child_of(&bench, &parent, "child.vhdx");
    fs::create_dir(bench.path("sub")).expect("a folder");
    let other = child_of(&bench, &child, "grandchild.vhdx");
    let leaf = child_of(&bench, &child, "leaf.vhdx");
    let before = [&parent, &child].map(|path| Snapshot::of(path));
    let message = on("merge", &leaf, &["--into", parent.to_str().expect("UTF-8")]).failed(1);
    assert!(message.contains("grandchild.vhdx: its parent is") && message.contains("relink"), "{message}");
    for gone in [&other, &leaf] {
        fs::remove_file(gone).expect("there");
    }
    let sibling = child_of(&bench, &parent, "sibling.vhdx");
    fs::write(bench.path("no-image.vhdx"), "text").expect("room");
    let message = on("merge", &child, &[]).failed(1);
    assert!(message.contains("sibling.vhdx: its parent is") && message.contains("--force"), "{message}");
    let [of_parent, of_child] = before;
    of_parent.assert_kept(&parent);
    of_child.assert_kept(&child);
    merged(&child, &["--force"]);
    assert!(!child.exists());
    let (printed, message) = on("info", &sibling, &["--chain"]).broke_off();
    assert!(printed.contains("sibling.vhdx") && message.contains("DataWriteGuid"), "{message}");
}

/// Cut after all is copied and before anything is removed, a merge is done again: second names keep the
/// files.
#[test]
fn a_merge_that_was_cut_in_the_end_is_done_again() {
    let bench = Bench::new();
    let ([base, middle, leaf], _) = chain(&bench);
    let kept = [(&middle, bench.path("middle.kept")), (&leaf, bench.path("leaf.kept"))];
    for (path, kept) in &kept {
        fs::hard_link(path, kept).expect("room");
    }
    let into = ["--into", base.to_str().expect("UTF-8")];
    merged(&leaf, &into);
    let merged = fs::read(&base).expect("readable");
    for (path, kept) in &kept {
        fs::rename(kept, path).expect("ours");
    }
    let again = on("merge", &leaf, &into);
    assert_eq!(again.status, Some(0), "{}", again.stderr);
    let said = again.stderr;
    assert!(said.contains("middle.vhdx: it is left over from an interrupted merge"), "{said}");
    assert_eq!(bench.names(), ["base.vhdx", "middle.vhdx"]);
    // Behind the headers and the log everything is as it was.
    assert!(fs::read(&base).expect("readable")[2 << 20..] == merged[2 << 20..], "the disk has changed");
}

#[test]
fn what_cannot_be_merged_is_left_alone() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let child = child_of(&bench, &parent, "child.vhdx");
    let before = [&parent, &child].map(|path| Snapshot::of(path));
    assert!(on("merge", &parent, &[]).failed(1).contains("not a differencing image"));
    let into = child.to_str().expect("UTF-8");
    assert!(on("merge", &child, &["--into", into]).failed(2).contains("not one of its parents"));
    let nowhere = bench.path("nowhere.vhdx");
    let nowhere = nowhere.to_str().expect("UTF-8");
    assert!(on("merge", &child, &["--into", nowhere]).failed(1).contains("finding the image to merge into"));
    let holder = format!("(pid {})", std::process::id());
    for (path, access) in
        [(&parent, Access::ReadOnly), (&parent, Access::ReadWrite), (&child, Access::ReadOnly)]
    {
        let held = ImageFile::open(path, access, Duration::ZERO).expect("free");
        let message = on("merge", &child, &[]).failed(1);
        assert!(message.contains(path.to_str().expect("UTF-8")) && message.contains(&holder), "{message}");
        drop(held);
    }
    let [of_parent, of_child] = before;
    of_parent.assert_kept(&parent);
    of_child.assert_kept(&child);
}

/// A layer in the middle goes into its parent, and its children, which are its parent's from then on, stay as
/// they were; a second child of the parent is in the way.
#[test]
fn the_children_of_a_merged_layer_stay() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let middle = child_of(&bench, &parent, "middle.vhdx");
    let beside = child_of(&bench, &middle, "beside.vhdx");
    fs::create_dir(bench.path("other")).expect("a folder");
    let far = child_of(&bench, &middle, "other/far.vhdx");
    let second = child_of(&bench, &parent, "second.vhdx");
    assert!(on("merge", &middle, &[]).failed(1).contains("second.vhdx"));
    fs::remove_file(&second).expect("ours");
    let far_text = far.to_str().expect("UTF-8");
    let wrong = parent.to_str().expect("UTF-8");
    assert_eq!(on("merge", &middle, &["--child", wrong]).status, Some(1), "it is in use by the merge itself");
    let removed = on("merge", &middle, &["--child", far_text]);
    assert_eq!((removed.status, middle.exists()), (Some(0), false), "{}", removed.stderr);
    for child in [&beside, &far] {
        let chain = on("info", child, &["--chain", "--json"]).succeeded();
        assert!(chain.contains("base.vhdx") && !chain.contains("middle.vhdx"), "{chain}");
        on("check", child, &[]).succeeded();
    }
}

/// Has the image at `path` know its parent by these two linkages.
fn know(path: &Path, linkages: [&Value; 2]) {
    relocate(path, |locator| {
        for (key, guid) in [PARENT_LINKAGE, PARENT_LINKAGE2].into_iter().zip(linkages) {
            locator.set(key, format!("{{{}}}", guid.as_str().expect("text")));
        }
    });
}

/// Changes where and how the image at `path` looks for its parent.
pub fn relocate(path: &Path, change: impl FnOnce(&mut ParentLocator)) {
    let reactor = Reactor::new().expect("io_uring is there");
    let file = ImageFile::open(path, Access::ReadWrite, Duration::ZERO).expect("free");
    let disk = reactor.disk(Arc::new(file));
    let change = async {
        let image = Image::open_for_writing(&disk, Uuid::new_v4).await?;
        let mut metadata = image.metadata.clone();
        change(metadata.parent_locator.as_mut().expect("a child"));
        image.amend(&disk, &metadata, Uuid::new_v4).await.map(drop)
    };
    reactor.block_on(change).expect("a short change");
}

/// Any user can make a child whose locator has no room for another key. Nothing changes then, and it is said
/// what to do.
#[test]
fn a_child_that_cannot_name_another_parent_stays_as_it_is() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let child = child_of(&bench, &parent, "child.vhdx");
    relocate(&child, |locator| {
        locator.remove(RELATIVE_PATH);
        locator.remove(PARENT_LINKAGE2);
        (locator.entries.len()..MAX_PAIRS).for_each(|key| locator.set(&format!("key{key}"), "x"));
    });
    let checked = on("check", &child, &[]);
    assert!(checked.stdout.contains("child.vhdx: sound"), "{}", checked.stderr);
    let before = [&parent, &child].map(|file| (file.clone(), Snapshot::of(file)));
    let [parent_text, child_text] = [&parent, &child].map(|file| file.to_str().expect("UTF-8"));
    let copy = bench.path("copy.vhdx");
    let copy_text = copy.to_str().expect("UTF-8");
    let commands: [&[&str]; 3] = [
        &["relink", child_text, parent_text],
        &["merge", "--force", "--parent", parent_text, child_text],
        &["merge", "--parent", parent_text, "--copy", copy_text, child_text],
    ];
    for command in commands {
        let message = Ran::from(program().args(command).output().expect("it runs")).failed(1);
        for part in ["child.vhdx", "parent locator", "256", "vhdx-ublk convert"] {
            assert!(message.contains(part), "{command:?}: {part} is not in: {message}");
        }
        for (file, before) in &before {
            before.assert_kept(file);
        }
        assert!(!copy.exists(), "{command:?}");
    }
}

/// `image`, renamed to `name`: no child finds it any longer.
fn renamed(bench: &Bench, image: &Path, name: &str) -> String {
    let path = bench.path(name);
    fs::rename(image, &path).expect("ours");
    path.to_str().expect("UTF-8").to_owned()
}

/// The parents were renamed, and the user has named them: their other children know them by their GUID alone,
/// and need what would be removed or changed all the same.
#[test]
fn children_that_no_longer_find_their_parent_are_not_forgotten() {
    let bench = Bench::new();
    let first = base(&bench, "base.vhdx");
    let middle = child_of(&bench, &first, "middle.vhdx");
    let [leaf, other] = ["leaf.vhdx", "other.vhdx"].map(|name| child_of(&bench, &middle, name));
    let (into, parent) = (renamed(&bench, &first, "new-base.vhdx"), renamed(&bench, &middle, "new.vhdx"));
    let images = [Path::new(&into), Path::new(&parent), &leaf, &other];
    let before = images.map(Snapshot::of);
    let copy = bench.path("own.vhdx");
    let options = ["--parent", &parent, "--parent", &into, "--into", &into];
    let copied = [&options[..], &["--copy", copy.to_str().expect("UTF-8")]].concat();
    let refused = |image: &Path, options: &[&str], child: &str| {
        let message = on("merge", image, options).failed(1);
        assert!(message.contains(child) && message.contains("relink"), "{message}");
        for (image, before) in images.iter().zip(&before) {
            before.assert_kept(image);
        }
    };
    refused(&leaf, &options, "other.vhdx: it was made of");
    refused(&leaf, &copied, "other.vhdx: it was made of");
    assert!(!copy.exists(), "nothing is copied for a merge that is refused");
    refused(images[1], &["--parent", &into], "leaf.vhdx: it was made of");
    // What the message says helps, and a child that is found becomes the ancestor's.
    for child in [&leaf, &other] {
        ran_relink(child, images[1]);
    }
    assert_eq!(on("merge", images[1], &["--parent", &into]).status, Some(0));
    assert!(!images[1].exists());
    for child in [&leaf, &other] {
        let chain = on("info", child, &["--chain"]).succeeded();
        assert!(chain.contains("new-base.vhdx") && !chain.contains("new.vhdx"), "{chain}");
    }
}

fn ran_relink(child: &Path, parent: &Path) {
    let ran = program().arg("relink").args([child, parent]).output().expect("it runs");
    assert!(ran.status.success(), "{ran:?}");
}

/// What no longer finds the layer that goes is lost if the user says so.
#[test]
fn children_that_no_longer_find_their_parent_are_lost_by_force() {
    let bench = Bench::new();
    let first = base(&bench, "base.vhdx");
    let middle = child_of(&bench, &first, "middle.vhdx");
    let [leaf, _] = ["leaf.vhdx", "other.vhdx"].map(|name| child_of(&bench, &middle, name));
    let (into, parent) = (renamed(&bench, &first, "new-base.vhdx"), renamed(&bench, &middle, "new.vhdx"));
    let options = ["--parent", &parent, "--parent", &into, "--into", &into, "--force"];
    let forced = on("merge", &leaf, &options);
    assert_eq!((forced.status, bench.path("new.vhdx").exists()), (Some(0), false), "{}", forced.stderr);
    assert!(forced.stderr.contains("other.vhdx: it was made of"), "{}", forced.stderr);
}

/// The other children of a target that was renamed keep their content, as those do that find it.
#[test]
fn the_target_has_children_that_no_longer_find_it() {
    let bench = Bench::new();
    let ([first, one, other], disks) = siblings(&bench);
    let into = renamed(&bench, &first, "new-base.vhdx");
    let before = Snapshot::of(Path::new(&into));
    let refused = on("merge", &one, &["--parent", &into]).failed(1);
    assert!(
        refused.contains("other.vhdx: its parent is") && refused.contains("--copy NEW.vhdx"),
        "{refused}"
    );
    let copy = bench.path("own.vhdx");
    merged(&one, &["--parent", &into, "--copy", copy.to_str().expect("UTF-8")]);
    before.assert_kept(Path::new(&into));
    assert_same(&copy, &disks[0]);
    ran_relink(&other, Path::new(&into));
    assert_same(&other, &disks[1]);
}

/// Where Windows' drives are holds for every image, not only for the one that is merged.
#[test]
fn children_are_looked_for_where_the_user_has_mapped_their_parents() {
    let bench = Bench::new();
    fs::create_dir(bench.path("drive")).expect("a folder");
    let base = base(&bench, "drive/base.vhdx");
    let [leaf, other] = ["leaf.vhdx", "other.vhdx"].map(|name| {
        let child = child_of(&bench, &base, name);
        relocate(&child, |locator| {
            locator.set(RELATIVE_PATH, r".\gone\base.vhdx");
            locator.set(ABSOLUTE_WIN32_PATH, r"C:\images\base.vhdx");
        });
        child
    });
    let map = format!(r"C:\images={}", bench.path("drive").display());
    let options = ["--parent-map", &map, "--into", base.to_str().expect("UTF-8")];
    let before = [&base, &leaf].map(|path| Snapshot::of(path));
    let refused = on("merge", &leaf, &options).failed(1);
    assert!(refused.contains("other.vhdx: its parent is") && refused.contains("--copy"), "{refused}");
    for (path, before) in [&base, &leaf].into_iter().zip(before) {
        before.assert_kept(path);
    }
    fs::remove_file(other).expect("ours");
    merged(&leaf, &options);
}

/// Cut when one of two children was its parent's already: the other one needs the layer, until the merge is
/// finished, and no other merge may change the parent.
#[test]
fn the_merge_of_a_layer_in_the_middle_is_finished_first() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let middle = child_of(&bench, &parent, "middle.vhdx");
    let [first, second] = ["first.vhdx", "second.vhdx"].map(|name| child_of(&bench, &middle, name));
    fs::create_dir(bench.path("kept")).expect("a folder");
    let kept = [(&middle, bench.path("kept/middle")), (&second, bench.path("kept/second"))];
    fs::hard_link(&middle, &kept[0].1).expect("room");
    fs::copy(&second, &kept[1].1).expect("room");
    assert_eq!(on("merge", &middle, &[]).status, Some(0));
    for (path, kept) in &kept {
        fs::rename(kept, path).expect("ours");
    }
    let [of_middle, of_parent] = [&middle, &parent].map(|path| info(path)["data_write_guid"].clone());
    know(&first, [&of_middle, &of_parent]);
    let message = on("merge", &first, &[]).failed(1);
    assert!(message.contains("second.vhdx") && message.contains("finish that merge first"), "{message}");
    let finished = on("merge", &middle, &[]);
    assert_eq!((finished.status, middle.exists()), (Some(0), false), "{}", finished.stderr);
    assert_eq!(info(&parent)["data_write_guid"], of_parent, "the parent did not change again");
    for child in [&first, &second] {
        let chain = on("info", child, &["--chain"]).succeeded();
        assert!(chain.contains("base.vhdx") && !chain.contains("parent_linkage2"), "{chain}");
    }
}

/// A child may name a parent anywhere: what is in other folders is written and removed only if the user has
/// named it.
#[test]
fn what_is_in_another_folder_has_to_be_named() {
    let bench = Bench::new();
    fs::create_dir(bench.path("yours")).expect("a folder");
    let base = base(&bench, "yours/base.vhdx");
    let middle = child_of(&bench, &base, "yours/middle.vhdx");
    let leaf = child_of(&bench, &middle, "leaf.vhdx");
    let before = [&base, &middle, &leaf].map(|path| Snapshot::of(path));
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let message = on("merge", &leaf, &[]).failed(2);
    assert!(message.contains("would write to") && message.contains("--into"), "{message}");
    let message = on("merge", &leaf, &["--into", &text(&base)]).failed(2);
    assert!(message.contains("would remove") && message.contains("--parent"), "{message}");
    assert!(message.contains("middle.vhdx"), "{message}");
    for (path, before) in [&base, &middle, &leaf].into_iter().zip(before) {
        before.assert_kept(path);
    }
    merged(&leaf, &["--into", &text(&base), "--parent", &text(&middle)]);
    assert!(base.exists() && !middle.exists() && !leaf.exists());
}

/// What lies behind the end of a smaller child is not lost by mistake.
#[test]
fn a_disk_shrinks_only_if_that_is_said() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let child = child_of(&bench, &parent, "child.vhdx");
    let mut bytes = fs::read(&child).expect("readable");
    let size = (16 * MIB).to_le_bytes();
    let items = (2 << 20) + (64 << 10);
    let at = bytes[items..].windows(8).position(|bytes| *bytes == size).expect("the size of the disk");
    bytes[items + at..][..8].copy_from_slice(&(8 * MIB).to_le_bytes());
    fs::write(&child, bytes).expect("room");
    let before = Snapshot::of(&parent);
    let message = on("merge", &child, &[]).failed(1);
    assert!(message.contains("16777216 (16 MiB)") && message.contains("--shrink"), "{message}");
    before.assert_kept(&parent);
    merged(&child, &["--shrink"]);
    assert_eq!(info(&parent)["virtual_size"], 8 * MIB);
}

/// Of two merges of one child at once one succeeds, and neither does harm.
#[test]
fn of_two_merges_at_once_one_succeeds() {
    for _ in 0..8 {
        let bench = Bench::new();
        let parent = base(&bench, "base.vhdx");
        let child = child_of(&bench, &parent, "child.vhdx");
        let start = || {
            let mut command = program();
            command.arg("merge").arg(&child).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().expect("it runs")
        };
        let both = [start(), start()].map(|merge| Ran::from(merge.wait_with_output().expect("ours")));
        let done = both.iter().filter(|ran| ran.status == Some(0)).count();
        let said: Vec<&str> = both.iter().map(|ran| ran.stderr.as_str()).collect();
        assert_eq!(done, 1, "{said:?}");
        assert_eq!(bench.names(), ["base.vhdx"]);
        assert_eq!(on("check", &parent, &[]).status, Some(0));
    }
}

/// A base, and two children of it that differ; the disks that the children are, as raw files.
fn siblings(bench: &Bench) -> ([PathBuf; 3], [PathBuf; 2]) {
    let base = base(bench, "base.vhdx");
    let children = [("one", 0x41), ("other", 0x51)].map(|(name, byte)| {
        let path = child_of(bench, &base, &format!("{name}.vhdx"));
        let mut disk = vec![0; usize::try_from(BLOCKS * MIB).expect("small")];
        let mut layer = Layer { path: &path, disk: &mut disk };
        layer.whole(1, byte);
        layer.part(4, byte + 1);
        path
    });
    let disks = children.each_ref().map(|child| {
        let raw = child.with_extension("raw");
        ran("convert", &[child, &raw]).succeeded();
        raw
    });
    let [one, other] = children;
    ([base, one, other], disks)
}

fn ran(command: &str, paths: &[&Path]) -> Ran {
    program().args([command, "--progress", "none"]).args(paths).output().expect("it runs").into()
}

fn assert_same(image: &Path, disk: &Path) {
    let compared = ran("compare", &[image, disk]);
    assert_eq!(compared.status, Some(0), "{}: {}{}", image.display(), compared.stdout, compared.stderr);
}

/// The merged child has a parent of its own then; the one that it had keeps its other child and every byte.
#[test]
fn a_copy_of_the_parent_leaves_that_to_its_other_children() {
    let bench = Bench::new();
    let ([base, one, other], disks) = siblings(&bench);
    let before = Snapshot::of(&base);
    let refused = on("merge", &one, &[]).failed(1);
    assert!(refused.contains("--copy"), "{refused}");
    let copy = bench.path("own.vhdx");
    let option = ["--copy", copy.to_str().expect("UTF-8")];
    let removed = merged(&one, &option);
    assert!(removed.trim_end().ends_with("one.vhdx"), "{removed}");
    assert_eq!(bench.names(), ["base.vhdx", "one.raw", "other.raw", "other.vhdx", "own.vhdx"]);
    before.assert_kept(&base);
    assert_same(&copy, &disks[0]);
    assert_same(&other, &disks[1]);
    for image in [&copy, &other] {
        on("check", image, &[]).succeeded();
    }
    // Of the layers of a longer chain, all of them go.
    let middle = child_of(&bench, &other, "middle.vhdx");
    let leaf = child_of(&bench, &middle, "leaf.vhdx");
    let again = bench.path("again.vhdx");
    let options = ["--into", base.to_str().expect("UTF-8"), "--copy", again.to_str().expect("UTF-8")];
    assert_eq!(merged(&leaf, &options).lines().count(), 3);
    before.assert_kept(&base);
    assert_same(&again, &disks[1]);
}

/// Wherever it was interrupted, the same command finishes; a file that is no copy is left alone.
#[test]
fn a_merge_into_a_copy_is_finished_and_takes_no_other_file() {
    for step in ["copied", "named"] {
        let bench = Bench::new();
        let ([base, one, other], disks) = siblings(&bench);
        let before = Snapshot::of(&base);
        let copy = bench.path("own.vhdx");
        if step == "copied" {
            fs::copy(&base, &copy).expect("room");
        } else {
            merged_without_room(&one, &base, &copy, &[]);
            assert_eq!(info(&one)["parent"]["relative_path"], r".\own.vhdx");
        }
        merged(&one, &["--copy", copy.to_str().expect("UTF-8")]);
        before.assert_kept(&base);
        assert_same(&copy, &disks[0]);
        assert_same(&other, &disks[1]);
    }
    let bench = Bench::new();
    let ([base, one, _], disks) = siblings(&bench);
    let (foreign, link) = (bench.image("foreign.vhdx", &["--size", "16M"]), bench.path("link.vhdx"));
    let copied = bench.path("copied.vhdx");
    fs::copy(&base, &copied).expect("room");
    std::os::unix::fs::symlink(&copied, &link).expect("room");
    let before = [&base, &one, &foreign, &copied].map(|path| (path, Snapshot::of(path)));
    for taken in [&foreign, &link, &disks[0]] {
        on("merge", &one, &["--copy", taken.to_str().expect("UTF-8")]).failed(1);
    }
    on("merge", &one, &["--copy", "x.vhdx", "--force"]).misused();
    for (path, before) in &before {
        before.assert_kept(path);
    }
    // What the user has made the parent is no copy that this command has made, even after one that was cut.
    merged_without_room(&one, &base, &bench.path("own.vhdx"), &[]);
    for parent in [&copied, &base] {
        let relinked = program().arg("relink").args([&one, parent]).output().expect("it runs");
        Ran::from(relinked).succeeded();
        let refused = on("merge", &one, &["--copy", parent.to_str().expect("UTF-8")]).failed(1);
        assert!(refused.contains("an image of the chain"), "{refused}");
    }
}

/// Merges into a copy that cannot become larger than the base: it is the parent then, and nothing is merged.
fn merged_without_room(child: &Path, base: &Path, copy: &Path, options: &[&str]) {
    let limit = fs::metadata(base).expect("there").len() / 512;
    let script = format!(r#"ulimit -f {limit}; exec "$0" merge "$@""#);
    let mut command = Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_vhdx-ublk")]).arg(child);
    command.arg("--copy").arg(copy).args(options);
    let message = Ran::from(command.output().expect("it runs")).failed(1);
    assert!(message.contains("ulimit -f"), "{message}");
}

/// The base of `siblings` and a layer over one of them, where none names its parent's place any longer; the
/// options that name all of them.
fn scattered(bench: &Bench) -> ([PathBuf; 3], PathBuf, Vec<String>) {
    let ([base, one, _], [disk, _]) = siblings(bench);
    let leaf = child_of(bench, &one, "leaf.vhdx");
    fs::create_dir(bench.path("far")).expect("a folder");
    let [far, middle] = ["far/base.vhdx", "far/one.vhdx"].map(|name| bench.path(name));
    fs::rename(&base, &far).expect("ours");
    fs::rename(&one, &middle).expect("ours");
    let named = [("--into", &far), ("--parent", &middle), ("--parent", &far)];
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let options = named.iter().flat_map(|(option, path)| [(*option).to_owned(), text(path)]).collect();
    ([far, middle, leaf], disk, options)
}

/// The copy takes the place of the parent that the user has named, also where an earlier command was cut.
#[test]
fn a_merge_into_a_copy_finds_the_parents_where_the_user_says() {
    for step in ["begun", "copied", "named", "removed"] {
        let bench = Bench::new();
        let ([base, middle, leaf], disk, options) = scattered(&bench);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let (before, copy) = (Snapshot::of(&base), bench.path("own.vhdx"));
        on("merge", &leaf, &["--copy", copy.to_str().expect("UTF-8")]).failed(1);
        match step {
            "copied" => fs::copy(&base, &copy).map(drop).expect("room"),
            "named" => {
                merged_without_room(&leaf, &base, &copy, &options);
                assert_eq!(info(&middle)["parent"]["relative_path"], r"..\own.vhdx");
            }
            _ => {}
        }
        let options = [&["--copy", copy.to_str().expect("UTF-8")], &options[..]].concat();
        let kept = bench.path("kept");
        fs::hard_link(&leaf, &kept).expect("room");
        assert_eq!(merged(&leaf, &options).lines().count(), 2, "{step}");
        if step == "removed" {
            // As a cut leaves it between the removal of both layers.
            fs::rename(&kept, &leaf).expect("ours");
            assert_eq!(merged(&leaf, &options).lines().count(), 1, "{step}");
        }
        assert!(!middle.exists() && !leaf.exists(), "{step}: both layers are in the copy");
        before.assert_kept(&base);
        assert_same(&copy, &disk);
        on("check", &copy, &[]).succeeded();
    }
}

/// Fills a block of the disk in the file at `path`, and leaves its GUIDs as they are.
fn write_block(path: &Path, block: u64, byte: u8) {
    let reactor = Reactor::new().expect("io_uring is there");
    let file = ImageFile::open(path, Access::ReadWrite, Duration::ZERO).expect("free");
    let disk = reactor.disk(Arc::new(file));
    let image = reactor.block_on(Image::read(&disk)).expect("sound");
    let file = OpenOptions::new().write(true).open(path).expect("ours");
    let end = file.metadata().expect("there").len();
    let size = usize::try_from(image.metadata.block_size).expect("small");
    file.write_all_at(&vec![byte; size], end).expect("room");
    file.write_all_at(&(end | PRESENT).to_le_bytes(), image.layout.bat.offset + 8 * block).expect("room");
}

/// A copy that is no longer one is not taken: it may be another image that has the name.
#[test]
fn a_merge_into_a_copy_of_a_named_parent_takes_no_other_file() {
    let bench = Bench::new();
    let ([base, middle, leaf], _, options) = scattered(&bench);
    let copy = bench.path("own.vhdx");
    fs::copy(&base, &copy).expect("room");
    write_block(&copy, 2, 0x33);
    let before = [&base, &middle, &leaf, &copy].map(|path| (path, Snapshot::of(path)));
    let copied = ["--copy", copy.to_str().expect("UTF-8")];
    let options: Vec<&str> = copied.into_iter().chain(options.iter().map(String::as_str)).collect();
    let message = on("merge", &leaf, &options).failed(1);
    assert!(message.contains("there is a file already"), "{message}");
    for (path, before) in &before {
        before.assert_kept(path);
    }
}

/// Killed at any moment, the same command again finishes, though the options name the original.
#[test]
fn a_merge_into_a_copy_of_a_named_parent_survives_kills() {
    let bench = Bench::new();
    let ([base, _, leaf], disk, options) = scattered(&bench);
    let (before, copy) = (Snapshot::of(&base), bench.path("own.vhdx"));
    let mut wait = Duration::from_millis(2);
    while leaf.exists() {
        let mut command = program();
        command.arg("merge").arg(&leaf).args(&options).arg("--copy").arg(&copy);
        let mut merging = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it runs");
        std::thread::sleep(wait);
        merging.kill().expect("ours");
        merging.wait().expect("ours");
        before.assert_kept(&base);
        wait = wait * 5 / 4;
    }
    on("check", &copy, &[]).succeeded();
    assert_same(&copy, &disk);
}

/// The parent under another name, a link to it, and itself: it is not a copy, and keeps every byte. Its other
/// children may be anywhere.
#[test]
fn a_merge_into_a_copy_never_takes_the_parent_for_one() {
    let bench = Bench::new();
    let base = base(&bench, "base.vhdx");
    let one = child_of(&bench, &base, "one.vhdx");
    let mut disk = vec![0; usize::try_from(BLOCKS * MIB).expect("small")];
    Layer { path: &one, disk: &mut disk }.whole(1, 0x41);
    let [link, second] = ["link.vhdx", "second.vhdx"].map(|name| bench.path(name));
    std::os::unix::fs::symlink("base.vhdx", &link).expect("room");
    fs::hard_link(&base, &second).expect("room");
    let before = [&base, &one].map(|path| (path, fs::read(path).expect("readable")));
    for taken in [&base, &link, &second, &one] {
        on("merge", &one, &["--copy", taken.to_str().expect("UTF-8")]).failed(1);
        for (path, before) in &before {
            assert!(fs::read(path).expect("readable") == *before, "{} has changed", path.display());
        }
    }
}

/// Killed at any moment, both disks read as before, and the same command again finishes.
#[test]
fn a_merge_into_a_copy_survives_kills() {
    let bench = Bench::new();
    let ([base, one, other], disks) = siblings(&bench);
    let before = Snapshot::of(&base);
    let copy = bench.path("own.vhdx");
    let mut wait = Duration::from_millis(2);
    while one.exists() {
        let mut command = program();
        command.arg("merge").arg(&one).arg("--copy").arg(&copy);
        let mut merging = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it runs");
        std::thread::sleep(wait);
        merging.kill().expect("ours");
        merging.wait().expect("ours");
        before.assert_kept(&base);
        assert_same(if one.exists() { &one } else { &copy }, &disks[0]);
        assert_same(&other, &disks[1]);
        wait = wait * 3 / 2;
    }
    on("check", &copy, &[]).succeeded();
    assert_same(&copy, &disks[0]);
}
