//! How an error travels between two processes of this program: as JSON, with kind, message and remedy.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind};

/// An error as it travels.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    kind: String,
    message: String,
    remedy: Option<String>,
}

/// What kinds are called.
const KINDS: [(Kind, &str); 14] = [
    (Kind::NotVhdx, "not-vhdx"),
    (Kind::Corrupt, "corrupt"),
    (Kind::Truncated, "truncated"),
    (Kind::Unsupported, "unsupported"),
    (Kind::InUse, "in-use"),
    (Kind::NoSpace, "no-space"),
    (Kind::Permission, "permission"),
    (Kind::Exists, "exists"),
    (Kind::NotFound, "not-found"),
    (Kind::NoDriver, "no-driver"),
    (Kind::Usage, "usage"),
    (Kind::Mismatch, "mismatch"),
    (Kind::Poisoned, "poisoned"),
    (Kind::Io, "io"),
];

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let kind = KINDS.iter().find(|(kind, _)| *kind == error.kind()).map_or("io", |(_, name)| name);
        let remedy = error.remedy_text().map(str::to_owned);
        Self { kind: kind.into(), message: format!("{error:#}"), remedy }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let kind = KINDS.iter().find(|(_, name)| *name == failure.kind).map_or(Kind::Io, |(kind, _)| *kind);
        let error = Self::new(kind, failure.message);
        match failure.remedy {
            Some(remedy) => error.remedy(remedy),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_error_arrives_with_its_message_and_remedy() {
        for (kind, _) in KINDS {
            let sent = Failure::from(&Error::new(kind, "a.vhdx: no").remedy("do this"));
            let text = serde_json::to_string(&sent).expect("serialisable");
            let error = Error::from(serde_json::from_str::<Failure>(&text).expect("as it was sent"));
            assert_eq!(error.kind(), kind);
            assert_eq!((error.to_string().as_str(), error.remedy_text()), ("a.vhdx: no", Some("do this")));
        }
    }
}
