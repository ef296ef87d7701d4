//! How an error travels between two processes of this program: as JSON, with kind, message and remedy.

use serde::de::IntoDeserializer;
use serde::de::value::Error as Invalid;
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Kind};
use crate::printable::shortened_to;

/// An error as it travels.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    #[serde(deserialize_with = "kind_or_io")]
    kind: Kind,
    message: String,
    remedy: Option<String>,
}

/// A kind of another version, which this one does not know, is an I/O error.
fn kind_or_io<'a, D: Deserializer<'a>>(deserializer: D) -> Result<Kind, D::Error> {
    let name = String::deserialize(deserializer)?;
    let kind: Result<Kind, Invalid> = Kind::deserialize(name.into_deserializer());
    Ok(kind.unwrap_or(Kind::Io))
}

/// The most bytes of a message, and of a remedy, that travel: more than the longest paths in it have. Where
/// each has to be escaped, six bytes for one, all of it still fits a line.
const MOST: usize = 5 << 10;

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let short = |text: &str| shortened_to(text, MOST).into_owned();
        Self {
            kind: error.kind(),
            message: short(&format!("{error:#}")),
            remedy: error.remedy_text().map(short),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let error = Self::new(failure.kind, failure.message);
        match failure.remedy {
            Some(remedy) => error.remedy(remedy),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrived(json: &str) -> Error {
        serde_json::from_str::<Failure>(json).expect("a failure").into()
    }

    #[test]
    fn an_error_arrives_with_its_kind_message_and_remedy() {
        for kind in [Kind::NotVhdx, Kind::InUse, Kind::NoSpace, Kind::NotFound, Kind::Poisoned, Kind::Io] {
            let sent = Failure::from(&Error::new(kind, "a.vhdx: no").remedy("do this"));
            let error = arrived(&serde_json::to_string(&sent).expect("serialisable"));
            assert_eq!(error.kind(), kind);
            assert_eq!((error.to_string().as_str(), error.remedy_text()), ("a.vhdx: no", Some("do this")));
        }
    }

    /// An image can make a message as long as itself, of whatever has to be escaped.
    #[test]
    fn a_long_error_fits_a_line() {
        for text in ["\u{1}", "\"", "ü", "x"] {
            let text = text.repeat(1 << 20);
            let json =
                serde_json::to_string(&Failure::from(&Error::new(Kind::NotFound, &*text).remedy(&*text)));
            let json = json.expect("serialisable");
            assert!(json.len() < 63 << 10, "{} bytes", json.len());
            assert_eq!(arrived(&json).kind(), Kind::NotFound);
        }
    }

    #[test]
    fn an_unknown_kind_is_an_io_error() {
        let error = arrived(r#"{"kind":"melted","message":"no","remedy":null}"#);
        assert_eq!((error.kind(), error.remedy_text()), (Kind::Io, None));
        assert_eq!(arrived(r#"{"kind":"in-use","message":"no"}"#).kind(), Kind::InUse);
    }
}
