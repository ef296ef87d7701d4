//! Text from elsewhere, made fit to be shown.
//!
//! Names of files, keys in images and names of processes are chosen by others. Shown as they are they steer
//! terminals, forge lines of logs, and read in another order than they are written.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;

/// Whether a terminal shows the character and does nothing else with it: no control character, line or
/// paragraph separator, and nothing that changes the direction of others.
pub fn is_printable(character: char) -> bool {
    let steers = matches!(
        character,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    !character.is_control() && !steers
}

/// `text`, with what is not printable as Rust writes it: `\n`, `\u{9b}`. What was escaped already stays as it
/// is.
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_printable) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 16);
    push(&mut shown, text).expect("a string takes everything");
    shown.into()
}

/// `text` from an image, short enough for a line: the longest names of files stay whole.
pub fn shortened(text: &str) -> Cow<'_, str> {
    shortened_to(text, 255)
}

/// As [`shortened`], to `most` bytes and a sign that there were more.
pub fn shortened_to(text: &str, most: usize) -> Cow<'_, str> {
    if text.len() <= most {
        return text.into();
    }
    let end = (0..=most).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    format!("{}…", &text[..end]).into()
}

/// `path` as a word of a command that is suggested, for people to paste: a shell takes all of it for one
/// name, whatever is in it, and the command for no option.
pub fn shell(path: &Path) -> String {
    let text = path.to_string_lossy();
    let text = if text.starts_with('-') { format!("./{text}") } else { text.into_owned() };
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "_./:@%+=,-".contains(character);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A size for people: `10 GiB`, `1.5 MiB`, `512 bytes`.
pub fn human_size(size: u64) -> String {
    let power = (size.max(1).ilog2() / 10).min(6);
    if power == 0 {
        return format!("{size} bytes");
    }
    let unit = char::from(b"KMGTPE"[power as usize - 1]);
    let tenths = (u128::from(size) * 10) >> (10 * power);
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {unit}iB"),
        (whole, tenth) => format!("{whole}.{tenth} {unit}iB"),
    }
}

/// A number of things for people: `1 flush`, `2 flushes`.
pub fn counted(count: u64, thing: &str) -> String {
    let end = if count == 1 {
        ""
    } else if thing.ends_with('h') {
        "es"
    } else {
        "s"
    };
    format!("{count} {thing}{end}")
}

/// How often, for people: `once`, `2 times`.
pub fn times(count: u64) -> String {
    if count == 1 { "once".into() } else { counted(count, "time") }
}

/// A size both ways: `10737418240 (10 GiB)`.
pub fn both_sizes(size: u64) -> String {
    if size < 1024 { size.to_string() } else { format!("{size} ({})", human_size(size)) }
}

/// Passes on what is written to it, made printable.
pub struct Printable<W>(pub W);

impl<W: fmt::Write> fmt::Write for Printable<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        push(&mut self.0, text)
    }
}

fn push(to: &mut impl fmt::Write, text: &str) -> fmt::Result {
    let mut rest = text;
    while let Some((at, odd)) = rest.char_indices().find(|&(_, character)| !is_printable(character)) {
        to.write_str(&rest[..at])?;
        write!(to, "{}", odd.escape_default())?;
        rest = &rest[at + odd.len_utf8()..];
    }
    to.write_str(rest)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    /// A shell gets back the name, and nothing of it runs.
    #[test]
    fn a_shell_takes_any_path_for_one_name() {
        for (path, word) in [
            ("/srv/disk-1_a.vhdx", "/srv/disk-1_a.vhdx"),
            ("my disk.vhdx", "'my disk.vhdx'"),
            ("a;$(x) `b`.vhdx", "'a;$(x) `b`.vhdx'"),
            ("it's", r"'it'\''s'"),
            ("--force", "./--force"),
            ("-a b", "'./-a b'"),
            ("~root", "'~root'"),
            ("", "''"),
        ] {
            assert_eq!(shell(Path::new(path)), word);
        }
    }

    #[test]
    fn one_thing_is_no_plural() {
        assert_eq!([0, 1, 2].map(|count| counted(count, "flush")), ["0 flushes", "1 flush", "2 flushes"]);
        assert_eq!(counted(1, "read") + &counted(7, "read"), "1 read7 reads");
        assert_eq!([0, 1, 2].map(times), ["0 times", "once", "2 times"]);
    }

    #[test]
    fn what_steers_a_terminal_is_escaped_and_the_rest_kept() {
        for (text, shown) in [
            ("disk ü 🦀 \\n.vhdx", "disk ü 🦀 \\n.vhdx"),
            ("\x1b[2J\x07", "\\u{1b}[2J\\u{7}"),
            ("a\nvhdx-ublk: all is well\r", "a\\nvhdx-ublk: all is well\\r"),
            ("\u{7f}\u{9b}31m\u{85}", "\\u{7f}\\u{9b}31m\\u{85}"),
            ("\u{202e}xdhv\u{2066}\u{200f}\u{2029}", "\\u{202e}xdhv\\u{2066}\\u{200f}\\u{2029}"),
        ] {
            assert_eq!(printable(text), shown);
            assert_eq!(printable(shown), shown, "shown twice");
            let mut written = Printable(String::new());
            write!(written, "{text}").expect("a string takes everything");
            assert_eq!(written.0, shown);
        }
    }

    #[test]
    fn people_read_sizes_in_the_largest_unit() {
        assert_eq!(human_size(0), "0 bytes");
        assert_eq!(human_size(1023), "1023 bytes");
        assert_eq!(human_size(1024), "1 KiB");
        assert_eq!(human_size(1536), "1.5 KiB");
        assert_eq!(human_size((10 << 30) - 1), "9.9 GiB", "never more than it is");
        assert_eq!(human_size(64 << 40), "64 TiB");
        assert_eq!(human_size(u64::MAX), "15.9 EiB");
        assert_eq!(both_sizes(10 << 30), "10737418240 (10 GiB)");
        assert_eq!(both_sizes(512), "512");
    }
}
