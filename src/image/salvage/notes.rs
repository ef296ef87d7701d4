//! What was found damaged while an image was salvaged, and which reading was taken.

use schemars::JsonSchema;
use serde::Serialize;

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Note {
    /// The structure concerned.
    pub structure: &'static str,
    /// What is wrong with it, and what is done without it.
    pub what: String,
    /// The reading is a guess: it is only to be used if the user agrees.
    pub is_guess: bool,
}

/// All notes of an image, in the order of the reading.
#[derive(Default)]
pub(super) struct Notes(pub(super) Vec<Note>);

impl Notes {
    /// Notes what is wrong with `structure`.
    pub(super) fn add(&mut self, structure: &'static str, what: impl Into<String>) {
        self.0.push(Note { structure, what: what.into(), is_guess: false });
    }

    /// Notes what is assumed of `structure`.
    pub(super) fn guess(&mut self, structure: &'static str, what: impl Into<String>) {
        self.0.push(Note { structure, what: what.into(), is_guess: true });
    }
}
