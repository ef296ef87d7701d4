//! Promise defended here: wherever a move is cut, and wherever the move that repeats it is cut, the chain
//! opens at its old or at its new place with the same content. The same move again finishes it, and leaves
//! nothing at the old place. A file that is not of the chain is never taken for a part of it.
//!
//! These are real files: a move is made of names and of links. What a cut inside of one change of an image
//! leaves is in `amend`.

use std::cell::Cell;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vhdx_ublk::chain::Search;
use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::disk::{Reactor, Sparse};
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::image::{DEFAULT_LOG_LENGTH, InitialState, NewImage};
use vhdx_ublk::operations::Watch;
use vhdx_ublk::operations::create::Creation;
use vhdx_ublk::operations::move_chain::{Moving, Request, Step, move_chain};
use vhdx_ublk::operations::opened::OpenChain;

use crate::craft::{BAT, END, MIB};
use crate::sim::violation::violated;

const NAMES: [&str; 3] = ["leaf.avhdx", "middle.avhdx", "base.vhdx"];

/// Bytes of the disk: a block for each layer, and one that none has.
const SIZE: u64 = 4 * MIB;

/// A power cut after so many steps.
struct Cut(Cell<u32>);

impl Cut {
    const NEVER: u32 = u32::MAX;

    fn after(steps: u32) -> Self {
        Self(Cell::new(steps))
    }
}

impl Watch for Cut {
    fn progress(&self, _: u64, _: u64) {}

    fn stop_requested(&self) -> bool {
        false
    }
}

impl Moving for Cut {
    fn done(&self, _: Step<'_>) -> Result<()> {
        let left = self.0.get().checked_sub(1).ok_or_else(|| Error::new(Kind::Io, "the power went out"))?;
        self.0.set(left);
        Ok(())
    }
}

/// A chain of three layers in folders of these names, each with a block of its own; and where it is to go.
struct World {
    folder: TempDir,
    old: [PathBuf; 3],
    content: Vec<u8>,
}

impl World {
    fn new(folders: [&str; 3]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let root = folder.path().canonicalize().expect("there");
        fs::create_dir_all(root.join("target")).expect("room");
        let old = [0, 1, 2].map(|layer| root.join(folders[layer]).join(NAMES[layer]));
        let mut content = vec![0; usize::try_from(SIZE).expect("small")];
        for layer in [2, 1, 0] {
            fs::create_dir_all(root.join(folders[layer])).expect("room");
            make(&old[layer], old.get(layer + 1).map(PathBuf::as_path), layer as u64);
            content[layer << 20..(layer + 1) << 20].fill(fill(layer as u64));
        }
        Self { folder, old, content }
    }

    fn target(&self) -> PathBuf {
        self.folder.path().canonicalize().expect("there").join("target")
    }

    fn run(&self, cut: u32) -> Result<PathBuf> {
        let parents = self.old[1..].iter().filter(|path| path.exists()).cloned().collect();
        let request = Request { leaf: self.old[0].clone(), folder: self.target(), parents };
        move_chain(&request, &Claims, &Cut::after(cut))
    }

    /// The chain is at one of its places, and no other disk is at either.
    fn judge(&self, when: &str) {
        let places = [self.old[0].clone(), self.target().join(NAMES[0])].map(|leaf| read(&leaf));
        if !places.iter().any(Result::is_ok) {
            violated(format!("{when}: the chain is nowhere: {places:?}"));
        }
        if places.into_iter().flatten().any(|found| found != self.content) {
            violated(format!("{when}: the disk has another content"));
        }
    }

    /// All of it has arrived, and nothing is left behind.
    fn finish(&self, when: &str) {
        if let Err(error) = self.run(Cut::NEVER) {
            violated(format!("{when}: the move does not finish: {error:#}"));
        }
        let found = read(&self.target().join(NAMES[0]));
        if !found.is_ok_and(|found| found == self.content) {
            violated(format!("{when}: what has arrived is another disk"));
        }
        let left = self.old.iter().filter(|path| path.parent() != Some(&self.target()) && path.exists());
        if let Some(left) = left.min() {
            violated(format!("{when}: {} is left at the old place", left.display()));
        }
        let mut names: Vec<_> = fs::read_dir(self.target()).expect("there").flatten().collect();
        names.sort_by_key(fs::DirEntry::file_name);
        assert!(names.iter().map(fs::DirEntry::file_name).eq(["base.vhdx", "leaf.avhdx", "middle.avhdx"]));
    }
}

fn fill(layer: u64) -> u8 {
    0x51 + layer.to_le_bytes()[0]
}

/// An image with block number `layer`.
fn make(path: &Path, parent: Option<&Path>, layer: u64) {
    let new = NewImage {
        virtual_size: SIZE,
        fixed: false,
        block_size: 1 << 20,
        log_length: DEFAULT_LOG_LENGTH,
        logical_sector_size: 512,
        physical_sector_size: 4096,
        initial_state: InitialState::NotPresent,
        parent: None,
    };
    let (image, parent) = (path.to_owned(), parent.map(Path::to_owned));
    let creation = Creation { image, new, parent, mode: None, replace: false, sparse: Sparse::Auto };
    creation.run(&Claims, |_| Ok(())).expect("room");
    let file = File::options().write(true).open(path).expect("ours");
    file.write_all_at(&vec![fill(layer); 1 << 20], END).expect("room");
    file.write_all_at(&(END | 6).to_le_bytes(), BAT + 8 * layer).expect("room");
}

fn read(leaf: &Path) -> Result<Vec<u8>> {
    let reactor = Reactor::new()?;
    let chain = OpenChain::read(leaf, &Search::default(), &reactor, &Claims)?;
    let mut bytes = vec![0; usize::try_from(SIZE).expect("small")];
    reactor.block_on(chain.content().read(0, &mut bytes)).expect("no fault");
    Ok(bytes)
}

#[test]
pub fn a_chain_is_at_one_place_wherever_a_move_is_cut() {
    for folders in [["one"; 3], ["a/deep", "b", "c"], ["a", "b", "target"]] {
        let mut cuts = 0;
        for first in 0.. {
            let mut is_whole = false;
            for second in [0, 1, 3] {
                let world = World::new(folders);
                is_whole = world.run(first).is_ok();
                world.judge(&format!("{folders:?}, cut after {first} steps"));
                let again = world.run(second).is_ok();
                let when = format!("{folders:?}, cut after {first} steps, and again after {second}");
                world.judge(&when);
                world.finish(&when);
                cuts += u32::from(!is_whole) + u32::from(!again);
                if is_whole {
                    break;
                }
            }
            if is_whole {
                break;
            }
        }
        assert!(cuts > 10, "only {cuts} moves of {folders:?} were cut");
    }
    strangers_stay();
}

/// A disk of the same chain, but with another content, is in the way of its base.
fn strangers_stay() {
    let world = World::new(["a", "a", "a"]);
    let stranger = world.target().join(NAMES[2]);
    fs::copy(&world.old[2], &stranger).expect("room");
    let file = File::options().write(true).open(&stranger).expect("ours");
    file.write_all_at(b"another", END + 100).expect("room");
    drop(file);
    match world.run(Cut::NEVER) {
        Err(error) if error.kind() == Kind::Exists => world.judge("beside a stranger"),
        outcome => violated(format!("a stranger was taken for the base: {outcome:?}")),
    }
}
