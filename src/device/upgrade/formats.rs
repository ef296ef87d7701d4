//! Which formats a program reads that it shares with other processes: sessions, entries, the control socket.

use std::ffi::OsString;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device::launch::{self, Program};
use crate::device::options::Recovery;
use crate::device::registry::{ENTRY_FORMAT, Entry};
use crate::device::session;
use crate::device::socket;
use crate::error::{Error, Kind, Result};
use crate::image;
use crate::printable::printable;

/// How long a program may take to say which formats it reads.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// See the module's head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Formats {
    /// The version of the program.
    pub version: String,
    /// The versions of the session files that it reads.
    pub sessions: Vec<u64>,
    /// The versions of the devices' entries that it reads.
    pub entries: Vec<u32>,
    /// The versions of the control socket's protocol that it speaks.
    pub sockets: Vec<u32>,
}

impl Formats {
    /// Those of this program.
    pub fn ours() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            sessions: vec![image::VERSION],
            entries: vec![ENTRY_FORMAT],
            sockets: vec![socket::VERSION],
        }
    }

    /// Those of `program`, which is run with `arguments` to print them.
    ///
    /// # Errors
    ///
    /// If it cannot be run; [`Kind::Unsupported`] if it does not say.
    pub fn of(program: &Program, arguments: impl IntoIterator<Item = OsString>) -> Result<Self> {
        let answer = launch::answer(program, arguments, ANSWER_PATIENCE)?;
        serde_json::from_str(&answer.unwrap_or_default()).map_err(|error| {
            let message = format!("the program does not say which formats it reads: {error}");
            Error::new(Kind::Unsupported, message)
                .remedy("name a vhdx-ublk that has the command `upgrade` (see `vhdx-ublk --version`)")
        })
    }

    /// Refuses a device that the program could not serve.
    ///
    /// # Errors
    ///
    /// [`Kind::Unsupported`] if something of it has a version that the program does not read;
    /// [`Kind::NotFound`] if it has no session.
    pub fn check(&self, entry: &Entry) -> Result<()> {
        self.compare(
            "entry",
            u64::from(entry.format),
            self.entries.iter().map(|&format| format.into()),
            entry,
        )?;
        // Every program so far speaks this one.
        self.compare(
            "control socket",
            socket::VERSION.into(),
            self.sockets.iter().map(|&one| one.into()),
            entry,
        )?;
        // Without recovery there is no session either, and the daemon refuses.
        if entry.read_only || entry.recovery == Recovery::None {
            return Ok(());
        }
        let file = (entry.image_file.device, entry.image_file.inode);
        let kept = session::kept()?.into_iter().find(|kept| kept.file == file);
        let Some(version) = kept.and_then(|kept| kept.version) else {
            let message = format!("{} has no session that can be read", entry.device.display());
            return Err(Error::new(Kind::NotFound, message)
                .remedy("end the use of the device, then remove and add it"));
        };
        self.compare("session file", version, self.sessions.iter().copied(), entry)
    }

    fn compare(
        &self,
        what: &str,
        has: u64,
        reads: impl Iterator<Item = u64> + Clone,
        entry: &Entry,
    ) -> Result<()> {
        if reads.clone().any(|version| version == has) {
            return Ok(());
        }
        let reads: Vec<String> = reads.map(|version| version.to_string()).collect();
        let (device, program) = (entry.device.display(), printable(&self.version));
        let message = format!(
            "the {what} of {device} has version {has}, and vhdx-ublk {program} reads version {}",
            if reads.is_empty() { "none".into() } else { reads.join(", ") }
        );
        Err(Error::new(Kind::Unsupported, message).remedy(
            "the device stays with its program; to change that, end its use, then remove and add it \
             (`vhdx-ublk del`, `vhdx-ublk add`)",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::registry::entry;

    #[test]
    fn formats_are_stated_as_documented() {
        let text = serde_json::to_string(&Formats::ours()).expect("serialisable");
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(text, format!(r#"{{"version":"{version}","sessions":[1],"entries":[1],"sockets":[1]}}"#));
    }

    #[test]
    fn a_device_of_a_version_that_is_not_read_is_refused_with_both_versions() {
        let read_only = Entry { read_only: true, ..entry(3) };
        Formats::ours().check(&read_only).expect("our own");
        let later = Formats { version: "9.9.9".into(), entries: vec![7, 8], ..Formats::ours() };
        let error = later.check(&read_only).expect_err("refused");
        assert_eq!(error.kind(), Kind::Unsupported);
        let text = error.to_string();
        for part in ["entry of /dev/ublkb3 has version 1", "vhdx-ublk 9.9.9 reads version 7, 8"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(error.remedy_text().is_some_and(|remedy| remedy.contains("stays with its program")));
        let deaf = Formats { sockets: Vec::new(), ..Formats::ours() };
        assert!(deaf.check(&read_only).expect_err("refused").to_string().contains("reads version none"));
    }
}
