//! The journal of systemd, as the daemon of a device writes to it: by the journal's own protocol, in one
//! datagram a message.
//!
//! Nothing here waits. The journal may lie on the disk that this process serves: a thread that serves it and
//! waits for room in the journal would wait for itself. A message for which there is no room is dropped and
//! counted, and the next one that is sent says how many were.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::field::{Field, Visit};
use tracing::{Event, Level};

use vhdx_ublk::device::image_name;
use vhdx_ublk::printable::printable;

/// Where the journal listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";

/// The most that a message has of its text, bytes before they are made printable: a name is at most 4 KiB.
const MAX_MESSAGE_BYTES: usize = 16 << 10;

/// See the module's head.
pub struct Journal {
    datagrams: UnixDatagram,
    socket: PathBuf,
    /// What every message has, encoded.
    fields: Vec<u8>,
    dropped: AtomicU64,
}

impl Journal {
    /// The journal that listens at `socket`. Each message gets the `fields`.
    pub fn at(socket: &Path, fields: &[(&str, &[u8])]) -> io::Result<Self> {
        let datagrams = UnixDatagram::unbound()?;
        datagrams.set_nonblocking(true)?;
        let mut encoded = Vec::new();
        for (name, value) in fields {
            encode(&mut encoded, name, value);
        }
        let journal = Self { datagrams, socket: socket.into(), fields: encoded, dropped: AtomicU64::new(0) };
        // The journal ignores an empty datagram: this shows whether it listens. Without room it does.
        match journal.datagrams.send_to(&[], socket) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(journal),
        }
    }

    /// Sends a message, or drops it if there is no room.
    pub fn send(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        self.send_text(*event.metadata().level(), &text.0);
    }

    fn send_text(&self, level: Level, text: &str) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let sent = self.announce(dropped) && self.try_send(level, text);
        if !sent {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Says that messages are missing here. If there is no room for that, they are counted again.
    fn announce(&self, dropped: u64) -> bool {
        let text = format!("messages are lost before this one, as the journal had no room: {dropped}");
        let sent = dropped == 0 || self.try_send(Level::WARN, &text);
        if !sent {
            self.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
        sent
    }

    fn try_send(&self, level: Level, text: &str) -> bool {
        let mut message = self.fields.clone();
        encode(&mut message, "VHDX_IMAGE", image_name::get().as_os_str().as_bytes());
        encode(&mut message, "PRIORITY", priority(level).as_bytes());
        encode(&mut message, "MESSAGE", shown(text).as_bytes());
        self.datagrams.send_to(&message, &self.socket).is_ok()
    }
}

/// A message as people read it: what an image holds, and the names of files in it, steer no terminal and
/// begin no line, and are not longer than the journal takes.
fn shown(text: &str) -> Cow<'_, str> {
    let mut end = text.len().min(MAX_MESSAGE_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    printable(&text[..end])
}

/// The journal's word for a level.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "5",
        Level::DEBUG => "6",
        Level::TRACE => "7",
    }
}

/// A field in the form that takes any bytes: its name, its length, and its value, on lines of their own.
fn encode(message: &mut Vec<u8>, name: &str, value: &[u8]) {
    message.extend(name.as_bytes());
    message.push(b'\n');
    message.extend((value.len() as u64).to_le_bytes());
    message.extend(value);
    message.push(b'\n');
}

/// The text of an event, which has no other fields.
#[derive(Default)]
pub struct Text(pub String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The place of the text among the fields of a message that has no others.
    const MESSAGE: usize = 2;

    /// The fields of a message, in their order.
    fn decode(mut message: &[u8]) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        while let Some(end) = message.iter().position(|&byte| byte == b'\n') {
            let (length, value) = message[end + 1..].split_first_chunk().expect("a length");
            let length = usize::try_from(u64::from_le_bytes(*length)).expect("a short one");
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
            fields.push((text(&message[..end]), text(&value[..length])));
            assert_eq!(value[length], b'\n');
            message = &value[length + 1..];
        }
        fields
    }

    /// All messages that wait at `socket`.
    fn received(socket: &UnixDatagram) -> Vec<Vec<(String, String)>> {
        socket.set_nonblocking(true).expect("a socket");
        let mut message = [0; 4096];
        let all =
            std::iter::from_fn(|| socket.recv(&mut message).ok().map(|length| decode(&message[..length])));
        all.filter(|fields| !fields.is_empty()).collect()
    }

    fn listening() -> (tempfile::TempDir, PathBuf, UnixDatagram) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("socket");
        let socket = UnixDatagram::bind(&path).expect("free");
        (folder, path, socket)
    }

    #[test]
    fn a_message_has_its_fields_whatever_bytes_are_in_them_and_a_text_of_one_line() {
        let (_folder, path, socket) = listening();
        let journal = Journal::at(&path, &[("VHDX_DEVICE", b"/dev/ublkb0")]).expect("it listens");
        for image in ["/a\nPRIORITY=0", "/snapshot"] {
            image_name::set(Path::new(image));
            journal.send_text(Level::WARN, "two\nlines \x1b[2J");
            let expected = [
                ("VHDX_DEVICE", "/dev/ublkb0"),
                ("VHDX_IMAGE", image),
                ("PRIORITY", "4"),
                ("MESSAGE", "two\\nlines \\u{1b}[2J"),
            ];
            let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
            assert_eq!(received(&socket), [expected]);
        }
    }

    #[test]
    fn a_message_is_cut_where_it_is_too_long_for_the_journal() {
        let whole = "ü".repeat(MAX_MESSAGE_BYTES / 2);
        assert_eq!(shown(&whole), whole);
        assert_eq!(shown(&format!("{whole}more")), whole);
        assert_eq!(shown(&format!("x{whole}")).len(), MAX_MESSAGE_BYTES - 1, "no half of a character");
    }

    #[test]
    fn a_journal_that_takes_nothing_holds_up_no_thread_and_no_message_is_lost_in_silence() {
        const MESSAGES: usize = 10_000;
        let (_folder, path, socket) = listening();
        let journal = Journal::at(&path, &[]).expect("it listens");
        for number in 0..MESSAGES {
            journal.send_text(Level::WARN, &format!("message {number}"));
        }
        let first = received(&socket);
        assert!(!first.is_empty() && first.len() < MESSAGES, "{} messages have room", first.len());
        journal.send_text(Level::ERROR, "the last one");
        let [announced, last] = &received(&socket)[..] else { panic!("two messages") };
        let expected = format!(
            "messages are lost before this one, as the journal had no room: {}",
            MESSAGES - first.len()
        );
        assert!(announced[MESSAGE].1 == expected, "{announced:?}: {expected}");
        assert_eq!(last[MESSAGE].1, "the last one");
    }

    #[test]
    fn a_journal_that_does_not_listen_is_none() {
        let (folder, path, socket) = listening();
        drop(socket);
        assert!(Journal::at(&path, &[]).is_err());
        assert!(Journal::at(&folder.path().join("none"), &[]).is_err());
    }
}
