//! Every file that a power cut may leave, as far as its metadata goes.
//!
//! A crash image is a choice per sector at risk, of what was durable there or of any write on its way to it,
//! and of a length. Reductions, all sound:
//!
//! * a sector that a write does not change is no choice;
//! * payload is left out: recovery never reads it (see [`super::medium`]), so each of its sectors is judged
//!   by itself;
//! * only when the choices multiply beyond the limit are the sectors of one log entry taken together, as
//!   nothing, all of them, or random parts of them: any part of an entry is a broken entry;
//! * beyond that, the boundary cases and a uniform sample stand for the rest.

use std::collections::BTreeMap;
use std::rc::Rc;

use fastrand::Rng;

use super::disk::Effect;
use super::store::Store;

/// Broken variants drawn per log entry where its sectors are taken together.
const BROKEN_MEMBERS: usize = 6;

/// What every byte of a torn sector reads.
pub const GARBAGE: u8 = 0xa5;

/// A change of metadata that is not durable.
pub struct Risk<'a> {
    /// Its place in the order of issue.
    pub op: u64,
    pub effect: &'a Effect,
    /// It may leave garbage.
    pub garbage: bool,
    /// It goes to the log.
    pub log: bool,
}

/// How many images to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// All of them up to this many.
    pub all: usize,
    /// Otherwise the boundary cases and so many at random.
    pub samples: usize,
}

/// How the images of a moment were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// Every one.
    All,
    /// Every one, with log entries as whole, absent or broken.
    Classes,
    /// The boundary cases and a sample.
    Sampled,
}

/// The choice of one variant per digit, and of a length.
pub type Choice = Vec<usize>;

struct Variant {
    patches: Vec<(u64, Rc<[u8]>)>,
    delta: u64,
    garbage: bool,
}

struct Digit {
    op: u64,
    variants: Vec<Variant>,
}

/// The images that are possible at one moment.
pub struct Images {
    base: Store,
    base_hash: u64,
    digits: Vec<Digit>,
    lengths: Vec<u64>,
}

struct Sector {
    durable: Rc<[u8]>,
    log: bool,
    options: Vec<(Rc<[u8]>, u64, bool)>,
}

impl Images {
    /// The images over `base`, which holds metadata only and hashes to `base_hash`.
    pub fn new(
        base: Store,
        base_hash: u64,
        risks: &[Risk<'_>],
        lengths: Vec<u64>,
        unit: usize,
        limits: Limits,
        rng: &mut Rng,
    ) -> (Self, Coverage) {
        let sectors = collect(&base, risks, unit);
        let single: Vec<Digit> = sectors.iter().map(|(at, sector)| sector_digit(*at, sector)).collect();
        let fits = |digits: &[Digit]| product(digits, lengths.len()).is_some_and(|all| all <= limits.all);
        if fits(&single) {
            return (Self { base, base_hash, digits: single, lengths }, Coverage::All);
        }
        let digits = class_digits(&sectors, rng);
        let coverage = if fits(&digits) { Coverage::Classes } else { Coverage::Sampled };
        (Self { base, base_hash, digits, lengths }, coverage)
    }

    /// The choices to look at.
    pub fn choices(&self, coverage: Coverage, limits: Limits, rng: &mut Rng) -> Vec<Choice> {
        match coverage {
            Coverage::All | Coverage::Classes => self.every_choice(),
            Coverage::Sampled => self.some_choices(limits.samples, rng),
        }
    }

    /// The image's own number.
    pub fn hash(&self, choice: &Choice) -> u64 {
        let (length, digits) = choice.split_last().expect("a length is chosen");
        let start = self.base_hash ^ mix(self.lengths[*length]);
        let variants = self.digits.iter().zip(digits).map(|(digit, &pick)| digit.variants[pick].delta);
        variants.fold(start, |hash, delta| hash ^ delta)
    }

    /// The length of the file.
    pub fn length(&self, choice: &Choice) -> u64 {
        self.lengths[*choice.last().expect("a length is chosen")]
    }

    /// Whether a torn sector is in it.
    pub fn has_garbage(&self, choice: &Choice) -> bool {
        self.digits.iter().zip(choice).any(|(digit, &pick)| digit.variants[pick].garbage)
    }

    /// Whether the length comes from another moment than the newest data.
    pub fn has_own_length(&self, choice: &Choice) -> bool {
        choice.last() != Some(&(self.lengths.len() - 1))
    }

    /// Whether some of the choices kept what was durable and some did not.
    pub fn is_partial(&self, choice: &Choice) -> bool {
        let digits = &choice[..self.digits.len()];
        digits.contains(&0) && digits.iter().any(|&pick| pick > 0)
    }

    /// Whether every write is there as a whole or not at all.
    pub fn is_of_whole_writes(&self, choice: &Choice) -> bool {
        let digits = || self.digits.iter().zip(choice);
        digits().all(|(digit, &pick)| {
            let kept = |other: &Digit, pick: usize| pick + 1 == other.variants.len();
            (pick == 0 || kept(digit, pick))
                && digits().all(|(other, &same)| other.op != digit.op || (same == 0) == (pick == 0))
        })
    }

    /// The image itself, metadata only.
    pub fn store(&self, choice: &Choice) -> Store {
        let mut store = self.base.clone();
        store.length = store.length.max(self.length(choice));
        for (digit, &pick) in self.digits.iter().zip(choice) {
            for (at, bytes) in &digit.variants[pick].patches {
                store.write(*at, bytes);
            }
        }
        store.length = self.length(choice);
        store
    }

    /// The same failure with as little as possible on the medium that was not durable.
    pub fn shrink(&self, choice: &Choice, fails: impl Fn(&Choice) -> bool) -> Choice {
        let mut least = choice.clone();
        for digit in 0..self.digits.len() {
            let mut less = least.clone();
            less[digit] = 0;
            if less != least && fails(&less) {
                least = less;
            }
        }
        least
    }

    /// What a choice put on the medium, for a failing test's message.
    pub fn describe(&self, choice: &Choice) -> String {
        let patches = self.digits.iter().zip(choice).flat_map(|(digit, &pick)| {
            let variant = &digit.variants[pick];
            let how = if variant.garbage { "garbage" } else { "write" };
            variant
                .patches
                .iter()
                .map(move |(at, bytes)| format!("{} bytes at {at} of {how} number {}", bytes.len(), digit.op))
        });
        let patches: Vec<String> = patches.collect();
        format!("length {}; on the medium: {}", self.length(choice), patches.join(", "))
    }

    fn every_choice(&self) -> Vec<Choice> {
        let mut bounds: Vec<usize> = self.digits.iter().map(|digit| digit.variants.len()).collect();
        bounds.push(self.lengths.len());
        let mut choices = vec![vec![0; bounds.len()]];
        for (place, bound) in bounds.iter().enumerate() {
            let before = choices.len();
            for pick in 1..*bound {
                for index in 0..before {
                    let mut choice = choices[index].clone();
                    choice[place] = pick;
                    choices.push(choice);
                }
            }
        }
        choices
    }

    /// None, all, each alone, each one missing, each prefix in order of issue, and a uniform sample.
    fn some_choices(&self, samples: usize, rng: &mut Rng) -> Vec<Choice> {
        let count = self.digits.len();
        let last = |digit: usize| self.digits[digit].variants.len() - 1;
        let mut picks: Vec<Vec<usize>> = vec![vec![0; count], (0..count).map(last).collect()];
        for digit in 0..count {
            for pick in 1..=last(digit) {
                picks.push((0..count).map(|other| if other == digit { pick } else { 0 }).collect());
            }
            picks.push((0..count).map(|other| if other == digit { 0 } else { last(other) }).collect());
        }
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by_key(|&digit| self.digits[digit].op);
        for prefix in 1..count {
            let kept = |digit: usize| order[..prefix].contains(&digit);
            picks.push((0..count).map(|digit| if kept(digit) { last(digit) } else { 0 }).collect());
        }
        for _ in 0..samples {
            picks.push((0..count).map(|digit| rng.usize(..=last(digit))).collect());
        }
        for pick in &mut picks {
            pick.push(rng.usize(..self.lengths.len()));
        }
        picks
    }
}

/// Hashes the metadata in `store`, so that a changed sector changes the hash by its own part.
pub fn hash_store(store: &Store, unit: usize) -> u64 {
    let sectors = store.stored().flat_map(|(at, page)| {
        page.chunks(unit)
            .enumerate()
            .map(move |(index, bytes)| hash_sector(at + (index * unit) as u64, bytes))
    });
    sectors.fold(0, |hash, sector| hash ^ sector)
}

fn hash_sector(at: u64, bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    let (any, hash) = words.fold((0, at), |(any, hash), word| {
        (any | word, (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
    });
    if any == 0 { 0 } else { mix(hash) }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    (value ^ (value >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ (value >> 32)
}

/// What each sector at risk may hold.
fn collect(base: &Store, risks: &[Risk<'_>], unit: usize) -> BTreeMap<u64, Sector> {
    let mut sectors: BTreeMap<u64, Sector> = BTreeMap::new();
    for risk in risks {
        let zeros;
        let (offset, bytes) = match risk.effect {
            Effect::Write { offset, bytes, .. } => (offset, bytes.as_slice()),
            Effect::Zero { offset, length, .. } => {
                zeros = vec![0; usize::try_from(*length).expect("a bitmap")];
                (offset, zeros.as_slice())
            }
            _ => continue,
        };
        for (index, bytes) in bytes.chunks(unit).enumerate() {
            let at = offset + (index * unit) as u64;
            let sector = sectors.entry(at).or_insert_with(|| Sector::durable(base, at, unit, risk.log));
            if *sector.durable == *bytes || sector.options.iter().any(|(other, ..)| **other == *bytes) {
                continue;
            }
            sector.options.push((bytes.into(), risk.op, false));
            if risk.garbage {
                sector.options.push((vec![GARBAGE; unit].into(), risk.op, true));
            }
        }
    }
    sectors.retain(|_, sector| !sector.options.is_empty());
    sectors
}

impl Sector {
    fn durable(base: &Store, at: u64, unit: usize, log: bool) -> Self {
        let mut durable = vec![0; unit];
        base.read_onto_zeros(at, &mut durable);
        Self { durable: durable.into(), log, options: Vec::new() }
    }
}

fn sector_digit(at: u64, sector: &Sector) -> Digit {
    let unchanged = Variant { patches: Vec::new(), delta: 0, garbage: false };
    let changed = sector.options.iter().map(|(bytes, _, garbage)| Variant {
        patches: vec![(at, bytes.clone())],
        delta: hash_sector(at, &sector.durable) ^ hash_sector(at, bytes),
        garbage: *garbage,
    });
    // The newest write comes last, as "all of it" means.
    let mut variants: Vec<Variant> = std::iter::once(unchanged).chain(changed).collect();
    variants[1..].sort_by_key(|variant| !variant.garbage);
    Digit { op: sector.options.last().expect("kept because it has some").1, variants }
}

fn product(digits: &[Digit], lengths: usize) -> Option<usize> {
    digits.iter().try_fold(lengths, |all, digit| all.checked_mul(digit.variants.len()))
}

/// One digit per log entry, one per sector of anything else.
fn class_digits(sectors: &BTreeMap<u64, Sector>, rng: &mut Rng) -> Vec<Digit> {
    let mut digits = Vec::new();
    let mut entries: BTreeMap<u64, Vec<Digit>> = BTreeMap::new();
    for (at, sector) in sectors {
        let digit = sector_digit(*at, sector);
        if sector.log {
            entries.entry(digit.op).or_default().push(digit);
        } else {
            digits.push(digit);
        }
    }
    digits.extend(entries.into_iter().map(|(op, parts)| entry_digit(op, &parts, rng)));
    digits
}

fn entry_digit(op: u64, parts: &[Digit], rng: &mut Rng) -> Digit {
    let member = |pick: &mut dyn FnMut(&Digit) -> usize| {
        let chosen: Vec<&Variant> = parts.iter().map(|part| &part.variants[pick(part)]).collect();
        Variant {
            patches: chosen.iter().flat_map(|variant| variant.patches.iter().cloned()).collect(),
            delta: chosen.iter().fold(0, |delta, variant| delta ^ variant.delta),
            garbage: chosen.iter().any(|variant| variant.garbage),
        }
    };
    let mut variants = vec![member(&mut |_| 0)];
    for _ in 0..BROKEN_MEMBERS {
        variants.push(member(&mut |part| rng.usize(..part.variants.len())));
    }
    variants.push(member(&mut |part| part.variants.len() - 1));
    Digit { op, variants }
}
