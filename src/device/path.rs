//! Paths in JSON: the registry, the control socket and every `--json` represent each path that Linux allows.
//!
//! A path that is UTF-8 is a string. Any other is an object: `{"lossy": "/disks/a\ufffd.vhdx", "hex":
//! "2f6469736b732f61ff2e76686478"}`, its text for people and its bytes.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A path, or a file name: a text if it is UTF-8, otherwise its text for people and its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum WrittenPath {
    /// It is UTF-8.
    Text(String),
    /// It is not.
    Bytes {
        /// Its text, in which U+FFFD stands for what is not UTF-8.
        lossy: String,
        /// Its bytes, two digits each.
        hex: String,
    },
}

impl WrittenPath {
    /// This path.
    pub fn of(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        match path.to_str() {
            Some(text) => Self::Text(text.into()),
            None => {
                Self::Bytes { lossy: path.to_string_lossy().into(), hex: hex(path.as_os_str().as_bytes()) }
            }
        }
    }

    /// Its text for people. Not printable yet.
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Bytes { lossy: text, .. } => text,
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

    use super::WrittenPath;

    /// Writes it.
    ///
    /// # Errors
    ///
    /// The serializer's.
    pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        WrittenPath::of(path).serialize(serializer)
    }

    /// Reads it.
    ///
    /// # Errors
    ///
    /// When it has another form.
    pub fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<PathBuf, D::Error> {
        WrittenPath::deserialize(deserializer)?.path().map_err(D::Error::custom)
    }
}

/// A path, or none.
pub mod optional {
    use std::path::PathBuf;

    use serde::{Serialize, Serializer};

    use super::WrittenPath;

    /// Writes it.
    ///
    /// # Errors
    ///
    /// The serializer's.
    pub fn serialize<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
        path.as_ref().map(WrittenPath::of).serialize(serializer)
    }
}

/// An array of paths.
pub mod many {
    use std::path::PathBuf;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::WrittenPath;

    /// Writes them.
    ///
    /// # Errors
    ///
    /// The serializer's.
    pub fn serialize<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(paths.iter().map(WrittenPath::of))
    }

    /// Reads them.
    ///
    /// # Errors
    ///
    /// When one has another form.
    pub fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
        let written = Vec::<WrittenPath>::deserialize(deserializer)?;
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
            assert!(WrittenPath::Bytes { lossy: String::new(), hex: hex.into() }.path().is_err(), "{hex}");
        }
    }
}
