//! What becomes of the free space of one volume.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A volume, and what becomes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VolumeTrim {
    /// The number of its partition; none if it is the disk as a whole.
    pub partition: Option<u32>,
    /// What it is, if it is recognised.
    pub r#type: Option<String>,
    /// How much free space its driver has discarded, bytes; nothing until it has.
    pub trimmed_bytes: Option<u64>,
    /// Why it is not trimmed.
    pub left_alone: Option<String>,
}

/// How people call what is on a partition, or on all of a disk: `ext4 on partition 1`.
pub(super) fn name(partition: Option<u32>, kind: Option<&str>) -> String {
    match (partition, kind) {
        (Some(number), Some(kind)) => format!("{kind} on partition {number}"),
        (Some(number), None) => format!("partition {number}"),
        (None, Some(kind)) => kind.into(),
        (None, None) => "the disk".into(),
    }
}

impl VolumeTrim {
    /// How people call it: `ext4 on partition 1`.
    pub fn name(&self) -> String {
        name(self.partition, self.r#type.as_deref())
    }
}
