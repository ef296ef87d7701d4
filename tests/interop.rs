//! Promise defended here: the image is always a valid VHDX for others, crashed or clean. QEMU, which shares no
//! code with us, replays the logs that power cuts leave and reads what they may hold; we read what QEMU wrote.

#[allow(dead_code, reason = "the simulator serves several tests, none of which needs all of it")]
mod sim;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use fastrand::Rng;
use sim::oracle::decode;
use sim::world::{Config, World, new_image};

/// Crash states that QEMU judges.
const JUDGED: u64 = 40;

/// `false`, and a loud word, where QEMU's tools are missing.
fn have_qemu() -> bool {
    let found =
        Command::new("qemu-img").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!(
            "SKIPPED: qemu-img is not installed (Debian package qemu-utils): nobody judges our crash states"
        );
    }
    found
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output().expect("the program starts");
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary names are plain")
}

#[test]
fn qemu_replays_what_power_cuts_leave() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (image, raw) = (folder.path().join("cut.vhdx"), folder.path().join("cut.raw"));
    let config = Config::small();
    let mut dirty = 0;
    for seed in 0..JUDGED {
        let mut rng = Rng::with_seed(1000 + seed);
        let content = new_image(&config, &mut rng);
        let mut world = World::open(config.clone(), content, config.oracle(), rng.fork());
        let last_step = rng.usize(50..2500);
        (0..last_step).take_while(|_| world.step()).for_each(drop);
        let cut = world.cut_file();
        cut.save(&image).expect("room");
        dirty += u64::from(run("qemu-img", &["check", "-q", "-f", "vhdx", text(&image)]).is_err());
        let replayed = run("qemu-img", &["check", "-q", "-f", "vhdx", "-r", "all", text(&image)]);
        replayed.unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        run("qemu-img", &["convert", "-f", "vhdx", "-O", "raw", text(&image), text(&raw)]).expect("readable");
        let file = File::open(&raw).expect("just written");
        for sector in world.oracle.touched() {
            let mut bytes = [0; 512];
            file.read_exact_at(&mut bytes, sector * 512).expect("inside the disk");
            let found = decode(sector, &bytes).unwrap_or_else(|why| panic!("seed {seed}: QEMU reads: {why}"));
            let legal = world.oracle.may_survive(sector, found);
            assert!(legal, "seed {seed}: QEMU reads: {}", world.oracle.explain(sector, found));
        }
    }
    println!("QEMU judged {JUDGED} crash states, {dirty} of them with a log to replay");
    assert!(dirty > JUDGED / 4, "too few crash states had a log to replay: {dirty}");
}
