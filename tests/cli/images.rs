//! Images made by other software, kept beside this file; `README.md` there says where each is from.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

/// Unpacks an image, and looks at its digest.
pub fn unpack(name: &str, target: &Path) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images");
    let packed = folder.join(format!("{name}.vhdx.xz"));
    let file = File::create(target).expect("room");
    let unpacked = Command::new("xz").arg("-dc").arg(&packed).stdout(file).status();
    assert!(unpacked.expect("xz is installed").success(), "{}", packed.display());
    let output = Command::new("sha256sum").arg(target).output().expect("coreutils are installed");
    let digest = String::from_utf8_lossy(&output.stdout).into_owned();
    let table = fs::read_to_string(folder.join("README.md")).expect("it is in the repository");
    let row = table.lines().find(|line| line.starts_with(&format!("| {name} "))).expect("it is in the table");
    assert!(row.contains(&digest[..64]), "{}: another image than the table's", packed.display());
}
