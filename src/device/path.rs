//! Paths in JSON: the registry, the control socket and `list --json` represent every path that Linux allows.
//!
//! A path that is UTF-8 is a string. Any other is an object: `{"lossy": "/disks/a\ufffd.vhdx", "hex":
//! "2f6469736b732f61ff2e76686478"}`, its text for people and its bytes.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Text(String),
    Bytes { lossy: String, hex: String },
}

impl Written {
    fn of(path: &Path) -> Self {
        match path.to_str() {
            Some(text) => Self::Text(text.into()),
            None => {
                Self::Bytes { lossy: path.to_string_lossy().into(), hex: hex(path.as_os_str().as_bytes()) }
            }
        }
    }

    fn path(self) -> Result<PathBuf, &'static str> {
        match self {
            Self::Text(text) => Ok(text.into()),
            Self::Bytes { hex, .. } => bytes(&hex)
                .map(|bytes| OsString::from_vec(bytes).into())
                .ok_or("a path's bytes are not hex digits"),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).expect("half a byte");
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16)?).ok();
    let (pairs, []) = hex.as_bytes().as_chunks::<2>() else { return None };
    pairs.iter().map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect()
}

/// One path.
pub mod one {
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    use super::Written;

    /// Writes it.
    ///
    /// # Errors
    ///
    /// The serializer's.
    pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        Written::of(path).serialize(serializer)
    }

    /// Reads it.
    ///
    /// # Errors
    ///
    /// When it has another form.
    pub fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<PathBuf, D::Error> {
        Written::deserialize(deserializer)?.path().map_err(D::Error::custom)
    }
}

/// A path, or none.
pub mod optional {
    use std::path::PathBuf;

    use serde::{Serialize, Serializer};

    use super::Written;

    /// Writes it.
    ///
    /// # Errors
    ///
    /// The serializer's.
    pub fn serialize<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
        path.as_deref().map(Written::of).serialize(serializer)
    }
}

/// An array of paths.
pub mod many {
    use std::path::PathBuf;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::Written;

    /// Writes them.
    ///
    /// # Errors
    ///
    /// The serializer's.
    pub fn serialize<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(paths.iter().map(|path| Written::of(path)))
    }

    /// Reads them.
    ///
    /// # Errors
    ///
    /// When one has another form.
    pub fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
        let written = Vec::<Written>::deserialize(deserializer)?;
        written.into_iter().map(|path| path.path().map_err(D::Error::custom)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
    struct Named {
        #[serde(with = "one")]
        image: PathBuf,
        #[serde(with = "many")]
        parents: Vec<PathBuf>,
    }

    #[test]
    fn any_path_survives_json_and_text_stays_text() {
        let odd = PathBuf::from(OsString::from_vec(b"/a\xff.vhdx".to_vec()));
        let named = Named { image: odd.clone(), parents: vec!["/b".into(), odd] };
        let json = serde_json::to_value(&named).expect("any path can be written");
        let bytes = serde_json::json!({"lossy": "/a\u{fffd}.vhdx", "hex": "2f61ff2e76686478"});
        assert_eq!(json, serde_json::json!({"image": bytes, "parents": ["/b", bytes]}));
        assert_eq!(serde_json::from_value::<Named>(json).expect("as it was written"), named);
    }

    #[test]
    fn bytes_that_are_no_hex_digits_are_refused() {
        for hex in ["2", "2g", "é"] {
            assert!(Written::Bytes { lossy: String::new(), hex: hex.into() }.path().is_err(), "{hex}");
        }
    }
}
