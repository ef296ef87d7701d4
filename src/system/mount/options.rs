//! The options of mount(8) and of fstab, as one text: `ro,partition=2,nofail,x-systemd.automount`.

use crate::error::{Error, Kind, Result};

/// The options that say how the device is made: all take a value, and are options of `add` by the same names.
const OF_DEVICE: [&str; 9] =
    ["parent", "parent-map", "queues", "depth", "zero-copy", "recovery", "name", "sparse", "on-full"];

/// Flags of the device, options of `add` by the same names, and whether such a device can be written to.
const FLAGS: [(&str, bool); 3] = [("assume", true), ("salvage", false), ("untrusted", false)];

/// What the options say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// The partition to be mounted: its number or its label.
    pub partition: Option<String>,
    /// How the device is made, as options of `add`: `--queues=4`.
    pub device: Vec<String>,
    /// What is left, for the mount of the file system.
    pub inner: Vec<String>,
    /// Nothing is to be written.
    pub read_only: bool,
    /// An image that does not exist is no failure.
    pub may_be_missing: bool,
}

impl MountOptions {
    /// Takes `text` apart. Of contradicting options the last counts, as everywhere in mount(8).
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] for an option without its value.
    pub fn parse(text: &str) -> Result<Self> {
        let mut found = Self::default();
        for option in split(text) {
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key, Some(unquoted(value))),
                None => (option, None),
            };
            match (key, value) {
                ("partition", Some(value)) => found.partition = Some(value.into()),
                (key, Some(value)) if OF_DEVICE.contains(&key) => {
                    found.device.push(format!("--{key}={value}"));
                }
                (key, None) if key == "partition" || OF_DEVICE.contains(&key) => {
                    let message = format!("the mount option `{key}` needs a value: `{key}=...`");
                    return Err(Error::new(Kind::Usage, message));
                }
                ("ro", None) => found.read_only = true,
                (key, None) if FLAGS.iter().any(|(flag, _)| *flag == key) => {
                    found.device.push(format!("--{key}"));
                }
                ("rw", None) => found.read_only = false,
                ("nofail", None) => found.may_be_missing = true,
                // What decides whether to mount at all.
                ("auto" | "noauto" | "defaults", None) => {}
                // These are the program's own.
                ("helper" | "uhelper" | "loop" | "offset" | "sizelimit", _) => {
                    let message = format!("the mount option `{key}` does not go with an image");
                    return Err(Error::new(Kind::Usage, message));
                }
                _ => found.inner.push(option.into()),
            }
        }
        found.read_only |= found.only_reads();
        Ok(found)
    }

    /// Whether the device refuses writes, whatever else the options say.
    pub fn only_reads(&self) -> bool {
        FLAGS.iter().any(|(flag, is_writable)| !is_writable && self.is_flagged(flag))
    }

    /// Whether the device is for an image that may be malicious.
    pub fn is_untrusted(&self) -> bool {
        self.is_flagged("untrusted")
    }

    fn is_flagged(&self, flag: &str) -> bool {
        self.device.iter().any(|option| option.strip_prefix("--") == Some(flag))
    }

    /// Whether the mount of the file system gets this option.
    pub fn has(&self, option: &str) -> bool {
        self.inner.iter().any(|found| found == option)
    }
}

/// The options in `text`. A comma between double quotes belongs to a value.
fn split(text: &str) -> Vec<&str> {
    let mut quoted = false;
    let options = text.split(|character: char| {
        quoted ^= character == '"';
        character == ',' && !quoted
    });
    options.filter(|option| !option.is_empty()).collect()
}

fn unquoted(value: &str) -> &str {
    value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_option_goes_where_it_belongs() {
        let text = "rw,partition=2,queues=1,parent=\"/a,b\",noatime,nofail,_netdev,x-systemd.idle-timeout=9,\
                    context=\"a,b\",ro";
        let found = MountOptions::parse(text).expect("good options");
        assert_eq!(found.partition.as_deref(), Some("2"));
        assert_eq!(found.device, ["--queues=1", "--parent=/a,b"]);
        assert_eq!(found.inner, ["noatime", "_netdev", "x-systemd.idle-timeout=9", "context=\"a,b\""]);
        assert_eq!(MountOptions::parse("rw,salvage,assume").expect("good").device, ["--salvage", "--assume"]);
        for text in ["rw,salvage", "salvage,rw", "rw,untrusted", "untrusted,rw"] {
            let found = MountOptions::parse(text).expect("good");
            assert!(found.read_only && found.only_reads(), "{text}");
            assert_eq!(found.is_untrusted(), text.contains("untrusted"), "{text}");
        }
        assert!(!MountOptions::parse("rw,assume").expect("good").read_only);
        assert!(found.read_only && found.may_be_missing && found.has("noatime") && !found.has("ro"));
        assert_eq!(MountOptions::parse("ro,rw,,auto,defaults").expect("good"), MountOptions::default());
    }

    #[test]
    fn an_option_without_its_value_and_one_of_our_own_are_refused() {
        for text in ["partition", "queues", "loop", "helper=x", "offset=512"] {
            assert_eq!(MountOptions::parse(text).expect_err(text).kind(), Kind::Usage);
        }
    }
}
