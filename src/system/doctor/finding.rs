//! One thing that was examined.

use schemars::JsonSchema;
use serde::Serialize;

use crate::error::Error;

/// What was examined, whether it is fine, and what to do if it is not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Finding {
    /// What was examined, in a word or two.
    pub check: &'static str,
    /// Whether it is as it should be.
    pub fine: bool,
    /// What was found.
    pub found: String,
    /// What to do, if it is not fine.
    pub remedy: Option<String>,
}

impl Finding {
    /// It is as it should be.
    pub(super) fn fine(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, fine: true, found: found.into(), remedy: None }
    }

    /// It is not, and this helps.
    pub(super) fn wrong(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, fine: false, found: found.into(), remedy: Some(remedy.into()) }
    }

    /// It could not be examined, or examining it showed this.
    pub(super) fn failed(check: &'static str, error: &Error, otherwise: &str) -> Self {
        let remedy = error.remedy_text().filter(|text| !text.is_empty()).unwrap_or(otherwise);
        Self::wrong(check, format!("{error:#}"), remedy)
    }
}
