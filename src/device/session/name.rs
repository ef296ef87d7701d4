//! The name of a session file.

use std::fmt;

use uuid::Uuid;

const SUFFIX: &str = ".session";

/// See the head of the folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) inode: u64,
    pub(super) disk_id: Uuid,
    pub(super) device: u64,
}

impl Name {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_suffix(SUFFIX)?.split('-');
        let hexadecimal = |part: Option<&str>| u64::from_str_radix(part?, 16).ok();
        let (inode, disk_id, device) = (parts.next(), parts.next(), parts.next());
        let disk_id = disk_id.filter(|part| part.len() == 32)?.parse().ok()?;
        parts.next().is_none().then_some(Self {
            inode: hexadecimal(inode)?,
            disk_id,
            device: hexadecimal(device)?,
        })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{}-{:x}{SUFFIX}", self.inode, self.disk_id.simple(), self.device)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_name_is_read_as_it_is_written(inode: u64, disk: u128, device: u64) {
            let name = Name { inode, disk_id: Uuid::from_u128(disk), device };
            prop_assert_eq!(Name::parse(&name.to_string()), Some(name));
        }
    }

    #[test]
    fn other_files_of_the_folder_are_no_sessions() {
        for text in
            ["0.json", "0.log", "1-2.session", "1-2-3.session", "x.session", ".session", "1-0-1-1.session"]
        {
            assert_eq!(Name::parse(text), None, "{text}");
        }
    }
}
