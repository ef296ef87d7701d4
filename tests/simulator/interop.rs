//! Promise defended here: the image is always a valid VHDX for others, crashed or clean. QEMU, which shares
//! no code with us, replays the logs that power cuts leave and reads what they may hold; and we replay what
//! QEMU leaves when it dies.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fastrand::Rng;
use vhdx_ublk::engine::Counters;
use vhdx_ublk::image::InitialState;

use crate::craft::{BAT, HEADERS};
use crate::qemu;
use crate::sim::oracle::{Oracle, decode, stamp};
use crate::sim::store::Store;
use crate::sim::world::{Activation, Config, World, check_recovery, new_image};

/// Crash states that QEMU judges, per shape of image; `VHDX_JUDGED` asks for more.
const JUDGED: u64 = 100;
/// Rounds of the ping-pong; `VHDX_ROUNDS` asks for more.
const ROUNDS: u64 = 50;

const SECTOR: u64 = 512;

/// A BAT entry's state when its block has all its data in the file.
const PRESENT: u8 = 6;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// Whether the current header names a log; `read` reads the file.
fn is_dirty(read: impl Fn(u64, &mut [u8])) -> bool {
    let field = |offset: u64, length: usize| {
        let mut bytes = vec![0; length];
        read(offset, &mut bytes);
        bytes
    };
    let number = |header: u64| u64::from_le_bytes(field(header + 8, 8).try_into().expect("eight bytes"));
    let newest = HEADERS.into_iter().max_by_key(|&header| number(header)).expect("two headers");
    field(newest + 48, 16) != [0; 16]
}

fn is_file_dirty(path: &Path) -> bool {
    let file = File::open(path).expect("readable");
    is_dirty(|offset, bytes| file.read_exact_at(bytes, offset).expect("inside the file"))
}

fn load(path: &Path) -> Store {
    Store::load(path).expect("readable")
}

/// Neighbouring sectors as (first, count).
fn runs(sectors: &[u64]) -> Vec<(u64, u64)> {
    sectors.chunk_by(|a, b| a + 1 == *b).map(|run| (run[0], run.len() as u64)).collect()
}

/// One line of `read -v`: the virtual offset and sixteen bytes.
fn dumped_line(line: &str) -> Option<(u64, Vec<u8>)> {
    let (offset, rest) = line.split_once(":  ")?;
    let offset = u64::from_str_radix(offset, 16).ok()?;
    let bytes: Option<Vec<u8>> =
        rest.get(..48)?.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    Some((offset, bytes?))
}

/// The bytes of these sectors, ascending, as QEMU reads them from an image whose log is empty.
fn read_by_qemu(image: &Path, sectors: &[u64]) -> Vec<[u8; 512]> {
    let mut command = qemu::command("qemu-io");
    command.args(["-r", "-f", "vhdx"]);
    for (first, count) in runs(sectors) {
        command.args(["-c", &format!("read -v {} {}", first * SECTOR, count * SECTOR)]);
    }
    let output = qemu::run(command.arg(image)).unwrap_or_else(|why| panic!("{why}"));
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<(u64, Vec<u8>)> = output.lines().filter_map(dumped_line).collect();
    assert_eq!(lines.len(), sectors.len() * 32, "QEMU dumps sixteen bytes a line");
    let sector = |(number, lines): (&u64, &[(u64, Vec<u8>)])| {
        assert_eq!(lines[0].0, number * SECTOR);
        let bytes: Vec<u8> = lines.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        bytes.try_into().expect("512 bytes")
    };
    sectors.iter().zip(lines.chunks(32)).map(sector).collect()
}

/// QEMU replays the log, finds no error and reads in every touched sector what may be there, which the oracle
/// afterwards knows.
fn judge(image: &Path, oracle: &mut Oracle) -> Result<(), String> {
    qemu::replay(image)?;
    let sectors: Vec<u64> = oracle.touched().collect();
    if sectors.is_empty() {
        return Ok(());
    }
    for (&sector, bytes) in sectors.iter().zip(read_by_qemu(image, &sectors)) {
        let found = decode(sector, &bytes)?;
        if !oracle.may_survive(sector, found) {
            return Err(oracle.explain(sector, found));
        }
        oracle.collapse(sector, found);
    }
    Ok(())
}

/// Takes crash states of this shape until QEMU has judged enough.
fn judge_crash_states(config: &Config) {
    judge_crash_states_of(config, |_| true);
}

/// The same, of lives that are `ripe`.
fn judge_crash_states_of(config: &Config, ripe: fn(&Counters) -> bool) {
    if !qemu::is_here() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("cut.vhdx");
    let (wanted, mut judged, mut dirty) = (setting("VHDX_JUDGED", JUDGED), 0, 0);
    for seed in 0..wanted {
        let mut rng = Rng::with_seed(1000 + seed);
        let content = new_image(config, &mut rng);
        let mut world = World::open(config.clone(), content, config.oracle(), rng.fork());
        (0..rng.usize(20..300)).take_while(|_| world.step()).for_each(drop);
        while judged < wanted && world.step() {
            if rng.u32(..120) != 0 || !ripe(&world.counters()) {
                continue;
            }
            let cut = world.cut_file();
            cut.save(&path).expect("room");
            let verdict = judge(&path, &mut world.oracle.clone());
            verdict.unwrap_or_else(|why| panic!("seed {seed}, crash state {judged}: {why}"));
            dirty += u64::from(is_dirty(|offset, bytes| cut.read(offset, bytes)));
            judged += 1;
        }
    }
    println!("QEMU judged {judged} crash states, {dirty} of them with a log to replay");
    assert_eq!(judged, wanted, "too few crash states");
    assert!(dirty > judged / 2, "too few crash states had a log to replay: {dirty}");
}

#[test]
fn qemu_replays_what_power_cuts_leave() {
    judge_crash_states(&Config::small());
}

#[test]
fn qemu_replays_what_power_cuts_leave_where_space_is_recycled() {
    judge_crash_states(&Config { can_punch: false, ..Config::small() });
}

#[test]
fn qemu_replays_what_power_cuts_leave_where_blocks_were_zeros() {
    let mut config = Config::small();
    config.image.initial_state = InitialState::Zero;
    config.image.block_size = 2 << 20;
    config.image.virtual_size = (12 << 20) + 4096;
    judge_crash_states(&config);
}

#[test]
fn qemu_replays_what_power_cuts_leave_on_both_sides_of_a_chunk_border() {
    let mut config = Config::small();
    config.image.virtual_size = 9 << 30;
    config.blocks = vec![0, 510, 511, 512, 4094, 4095, 4096, 4097, 8191, 8192, 9215];
    config.fronts = 3;
    judge_crash_states(&config);
}

#[test]
fn qemu_replays_what_power_cuts_leave_while_the_file_grows() {
    let mut config = Config::small();
    config.image.virtual_size = 600 << 20;
    config.image.block_size = 8 << 20;
    config.blocks = (0..75).collect();
    judge_crash_states(&config);
}

/// A log that is nearly full, and one that has started again. QEMU loses an entry of a log that is exactly
/// full, searches one that has a single free sector for ever, and misreads one that wraps: ours never is any
/// of these.
#[test]
fn qemu_replays_what_power_cuts_leave_when_the_log_is_full() {
    let full = Config { requests: 3000, weights: [40, 5, 0, 60, 25, 5], ..Config::small() };
    judge_crash_states_of(&full, |counters| counters.entries >= 118);
}

/// The two players' board: one image file and what its sectors may hold.
struct Table {
    config: Config,
    path: std::path::PathBuf,
    oracle: Oracle,
    rng: Rng,
    /// Rounds in which we, and in which QEMU, left a log for the other.
    left_by_us: u64,
    left_by_qemu: u64,
}

impl Table {
    /// We replay what is there, read everything, work on, and close or die.
    fn our_turn(&mut self) {
        let content = load(&self.path);
        let mut activation = Activation::default();
        let opened = check_recovery(&self.config, &content, &mut self.oracle, &mut self.rng, &mut activation);
        let content = opened.unwrap_or_else(|why| panic!("after QEMU's turn: {why}"));
        let mut world =
            World::open(self.config.clone(), content, self.oracle.clone(), Rng::with_seed(self.rng.u64(..)));
        let left = if self.rng.u32(..5) == 0 {
            world.drain();
            world.close()
        } else {
            (0..self.rng.usize(300..1500)).take_while(|_| world.step()).for_each(drop);
            world.cut_file()
        };
        self.left_by_us += u64::from(is_dirty(|offset, bytes| left.read(offset, bytes)));
        left.save(&self.path).expect("room");
        self.oracle = world.oracle.clone();
    }

    /// QEMU replays what is there, reads everything, writes, and closes or dies.
    fn qemus_turn(&mut self) {
        judge(&self.path, &mut self.oracle).unwrap_or_else(|why| panic!("after our turn: {why}"));
        let blocks = self.config.image.virtual_size >> 20;
        let absent = (0..blocks).find(|block| {
            let mut word = [0; 8];
            let file = File::open(&self.path).expect("readable");
            file.read_exact_at(&mut word, BAT + block * 8).expect("inside the file");
            word[0] & 7 != PRESENT
        });
        for _ in 0..3 {
            let sector = self.rng.u64(..blocks) * 2048 + self.rng.u64(..16);
            let written = self.write(sector, &["-f", "vhdx"], "quit", &self.path.clone());
            assert!(written, "QEMU writes");
        }
        if let Some(block) = absent.filter(|_| self.rng.u32(..4) > 0) {
            let sector = block * 2048 + self.rng.u64(..16);
            self.die(sector);
        }
        self.left_by_qemu += u64::from(is_file_dirty(&self.path));
    }

    /// QEMU logs a new block, cannot write the BAT in place, and is killed: its data and its entry are there.
    fn die(&mut self, sector: u64) {
        let options = format!(
            "driver=vhdx,file.driver=blkdebug,file.image.driver=file,file.image.filename={},\
             file.inject-error.0.event=none,file.inject-error.0.iotype=write,file.inject-error.0.errno=5,\
             file.inject-error.0.sector={}",
            self.path.display(),
            BAT / SECTOR
        );
        let ended = self.write(sector, &["--image-opts"], "sigraise 9", Path::new(&options));
        assert!(!ended, "QEMU was killed");
    }

    /// Has QEMU write one stamped sector and end by a command; whether it ended well.
    fn write(&mut self, sector: u64, open: &[&str], end: &str, image: &Path) -> bool {
        let mut bytes = [0; 512];
        let id = self.oracle.new_id();
        stamp(sector, id, &mut bytes);
        let stamped = self.path.with_extension("stamp");
        std::fs::write(&stamped, bytes).expect("room");
        let write = format!("write -s {} {} 512", stamped.display(), sector * SECTOR);
        self.oracle.issue(sector, 1, id, true);
        let mut command = qemu::command("qemu-io");
        let ended = qemu::run(command.args(open).args(["-c", &write, "-c", end]).arg(image)).is_ok();
        self.oracle.acknowledge(sector, 1, id, true);
        ended
    }
}

/// What one player leaves, dirty or clean, the other continues: nothing is lost and nothing appears.
#[test]
fn we_and_qemu_take_turns_on_one_image() {
    if !qemu::is_here() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut config = Config::small();
    config.image.virtual_size = 64 << 20;
    config.blocks = (0..64).collect();
    let mut rng = Rng::with_seed(50);
    let path = folder.path().join("table.vhdx");
    new_image(&config, &mut rng).save(&path).expect("room");
    let oracle = config.oracle();
    let mut table = Table { config, path, oracle, rng, left_by_us: 0, left_by_qemu: 0 };
    let rounds = setting("VHDX_ROUNDS", ROUNDS);
    for _ in 0..rounds {
        table.our_turn();
        table.qemus_turn();
    }
    let Table { left_by_us, left_by_qemu, .. } = table;
    println!("{rounds} rounds: {left_by_us} logs left to QEMU, {left_by_qemu} to us");
    assert!(left_by_us > rounds / 2 && left_by_qemu > rounds / 2, "too few logs changed hands");
}
