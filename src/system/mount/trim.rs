//! Having the file systems of a device discard their free space where they are mounted.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;

use super::mounted::{self, Mounted};
use crate::device::trim_file_system;
use crate::error::Result;
use crate::system::trim::VolumeTrim;

/// Trims the mounted file systems of the device `id` and its partitions that this process sees, each once.
///
/// # Errors
///
/// When `/proc` cannot be read. What is not trimmed says why.
pub fn trim_mounted(id: u32) -> Result<Vec<VolumeTrim>> {
    let mut seen = BTreeSet::new();
    let mut all = mounted::all()?;
    all.retain(|mounted| mounted.id == id && seen.insert(mounted.node.clone()));
    Ok(all.iter().map(trim).collect())
}

fn trim(Mounted { point, node, kind, .. }: &Mounted) -> VolumeTrim {
    let number = fs::read_to_string(Path::new("/sys/dev/block").join(node).join("partition"));
    let partition = number.ok().and_then(|number| number.trim().parse().ok());
    let trimmed = File::open(point).and_then(|folder| trim_file_system(folder, 0, u64::MAX));
    let (trimmed_bytes, left_alone) = match trimmed {
        Ok(bytes) => (Some(bytes), None),
        Err(error) => (None, Some(format!("its driver does not trim it at {}: {error}", point.display()))),
    };
    VolumeTrim { partition, r#type: Some(kind.clone()), trimmed_bytes, left_alone }
}
