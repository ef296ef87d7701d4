//! A target: what is put in, how it is changed, and what must hold.

use std::path::Path;

use fastrand::Rng;

use super::{chain, compact, mend, merge, mutator, resize, salvage, search, session, text, trial};
use crate::craft::Craft;
use crate::sim::store::Store;

/// What a trial is made of: images, and bytes beside them.
#[derive(Clone, Default)]
pub struct Case {
    pub files: Vec<Store>,
    pub bytes: Vec<u8>,
}

/// What a trial has shown.
pub struct Outcome {
    /// How it ended.
    pub ending: &'static str,
    /// Equal for trials that went the same way, as far as can be told from outside.
    pub signature: u64,
    /// Memory that it took, bytes, where that is measured.
    pub peak: u64,
}

/// One way in for hostile input.
pub struct Target {
    pub name: &'static str,
    /// Good cases.
    pub seeds: fn() -> Vec<Case>,
    /// Changes the bytes of a case; images are changed by the mutator of images.
    pub change_bytes: fn(&mut Vec<u8>, &mut Rng),
    /// Puts a case through everything.
    pub run: fn(&Case, u64) -> Outcome,
    /// Endings that a good run comes to.
    pub endings: &'static [&'static str],
}

/// All of them.
pub const TARGETS: [Target; 11] = [
    trial::TARGET,
    chain::TARGET,
    mend::REPAIR,
    mend::RELINK,
    merge::TARGET,
    compact::TARGET,
    resize::TARGET,
    salvage::TARGET,
    session::TARGET,
    search::TARGET,
    text::TARGET,
];

/// The target of this name.
pub fn named(name: &str) -> &'static Target {
    static ALL: [Target; 11] = TARGETS;
    let names = ALL.each_ref().map(|target| target.name);
    ALL.iter().find(|target| target.name == name).unwrap_or_else(|| panic!("{name} is none of {names:?}"))
}

impl Target {
    /// A case made from one that was kept, with parts of another.
    pub fn offspring(&self, parent: &Case, other: &Case, rng: &mut Rng) -> Case {
        let mut case = parent.clone();
        if !case.files.is_empty() && (case.bytes.is_empty() || rng.bool()) {
            let index = rng.usize(..case.files.len());
            let lender = &other.files[rng.usize(..other.files.len())];
            let mut image = Craft { file: case.files[index].clone() };
            mutator::mutate(&mut image, &Craft { file: lender.clone() }, rng);
            case.files[index] = image.file;
        } else {
            (self.change_bytes)(&mut case.bytes, rng);
        }
        case
    }
}

impl Case {
    /// A case of one image.
    pub fn of(file: Store) -> Self {
        Self { files: vec![file], bytes: Vec::new() }
    }

    /// Saves it in a folder.
    pub fn save(&self, folder: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        for (index, file) in self.files.iter().enumerate() {
            file.save(&folder.join(format!("{index}.vhdx")))?;
        }
        std::fs::write(folder.join("bytes"), &self.bytes)
    }

    /// Reads one that was saved.
    pub fn load(folder: &Path) -> std::io::Result<Self> {
        let mut case = Self { files: Vec::new(), bytes: std::fs::read(folder.join("bytes"))? };
        while let Ok(file) = Store::load(&folder.join(format!("{}.vhdx", case.files.len()))) {
            case.files.push(file);
        }
        Ok(case)
    }
}

/// For targets that have no bytes.
pub fn no_bytes(_: &mut Vec<u8>, _: &mut Rng) {}

/// Changes a few bytes: other values, lengths, repetitions.
pub fn any_bytes(bytes: &mut Vec<u8>, rng: &mut Rng) {
    /// No text grows beyond this.
    const LONGEST: usize = 4096;
    for _ in 0..rng.usize(1..4) {
        let at = rng.usize(..=bytes.len());
        match rng.u32(..6) {
            0 => bytes.insert(at, rng.u8(..)),
            1 => bytes.truncate(at),
            2 => {
                let part = bytes[at..].iter().copied().take(rng.usize(..64)).collect::<Vec<_>>();
                let to = rng.usize(..=bytes.len());
                bytes.splice(to..to, part);
            }
            3 => {
                let digits =
                    ["0", "-1", "18446744073709551615", "18446744073709551616", "1e400", "null", "{"];
                bytes.splice(at..at, digits[rng.usize(..digits.len())].bytes());
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << rng.u32(..8);
                }
            }
        }
    }
    bytes.truncate(LONGEST);
}
