//! The last warning of this process, for those who ask the daemon how its device is.

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::printable::printable;

/// The longest text that is kept, characters.
const MAX_CHARACTERS: usize = 200;

/// A warning, or an error that ended nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Warning {
    /// When it was logged, seconds since 1970.
    pub time: u64,
    /// What it said, printable; a long one is cut.
    pub text: String,
}

static LAST: Mutex<Option<Warning>> = Mutex::new(None);

/// Remembers a warning that is logged now.
pub fn note(text: &str) {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(Warning { time, text: short(text) });
}

/// The last one.
pub(super) fn last() -> Option<Warning> {
    LAST.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// The first characters of `text`, printable.
fn short(text: &str) -> String {
    let text = printable(text);
    match text.char_indices().nth(MAX_CHARACTERS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_warning_is_short_and_printable() {
        assert_eq!(short("a\x1b[2J\nb"), r"a\u{1b}[2J\nb");
        assert_eq!(short(&"ü".repeat(200)), "ü".repeat(200));
        assert_eq!(short(&"ü".repeat(201)), "ü".repeat(200) + "...");
        note("first");
        note("second");
        assert_eq!(last().map(|warning| warning.text).as_deref(), Some("second"));
    }
}
