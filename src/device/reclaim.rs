//! Whether a device compacts its image by itself: `add --reclaim`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// How long a device is idle before it compacts its image, if the user says no more than that it may.
const USUAL_PATIENCE: u32 = 60;

/// The longest time that can be chosen: a day.
const MAX_PATIENCE: u32 = 24 * 60 * 60;

/// After how many seconds without a request a device compacts its image, if it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Reclaim(Option<u32>);

impl Reclaim {
    /// Never.
    pub const OFF: Self = Self(None);

    /// Whether that is the choice.
    pub fn is_off(&self) -> bool {
        *self == Self::OFF
    }

    /// How long the device is idle before it does.
    pub fn patience(self) -> Option<Duration> {
        self.0.map(|seconds| Duration::from_secs(seconds.into()))
    }
}

impl FromStr for Reclaim {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let seconds = match text {
            "off" => return Ok(Self::OFF),
            "auto" => Some(USUAL_PATIENCE),
            _ => text.strip_prefix("auto=").and_then(|seconds| seconds.parse().ok()),
        };
        let seconds = seconds.filter(|seconds| (1..=MAX_PATIENCE).contains(seconds));
        seconds.map(|seconds| Self(Some(seconds))).ok_or_else(|| {
            let message = format!("`off`, `auto`, or `auto=SECONDS` with 1 to {MAX_PATIENCE} seconds");
            Error::new(Kind::Usage, message)
        })
    }
}

impl fmt::Display for Reclaim {
    /// As it is parsed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("off"),
            Some(seconds) => write!(f, "auto={seconds}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_chosen_is_read_as_it_is_written() {
        let parse = |text: &str| text.parse::<Reclaim>();
        assert_eq!(parse("off").expect("a choice"), Reclaim::default());
        assert_eq!(parse("auto").expect("a choice"), Reclaim(Some(60)));
        for text in ["off", "auto=1", "auto=86400"] {
            assert_eq!(parse(text).expect("a choice").to_string(), text);
        }
        for wrong in ["", "on", "auto=", "auto=0", "auto=86401", "auto=-1", "auto 5"] {
            assert_eq!(parse(wrong).expect_err("no choice").kind(), Kind::Usage, "{wrong}");
        }
    }
}
