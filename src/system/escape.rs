//! How names and paths are written in tables like `/etc/fstab`, and in systemd's units.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// The bytes of a field of a table, in which three octal digits stand for a byte: `\040` is a blank. Any
/// other backslash is one.
pub(super) fn from_field(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        if let Some(byte) = octal(rest) {
            bytes.push(byte);
            rest = &rest[4..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    OsString::from_vec(bytes)
}

/// The byte that `\ooo` at the beginning stands for.
fn octal(text: &[u8]) -> Option<u8> {
    let [b'\\', digits @ ..] = text.get(..4)? else { return None };
    let value = digits.iter().try_fold(0_u16, |value, digit| {
        (b'0'..=b'7').contains(digit).then(|| value * 8 + u16::from(digit - b'0'))
    });
    u8::try_from(value?).ok()
}

/// `text` as a field of a table; the bytes of `special` are escaped, too.
pub(super) fn to_field(text: &OsStr, special: &[u8]) -> String {
    let mut field = String::new();
    for &byte in text.as_bytes() {
        if byte.is_ascii_graphic() && !b"\\#".contains(&byte) && !special.contains(&byte) {
            field.push(byte.into());
        } else {
            let _ = write!(field, "\\{byte:03o}"); // a string takes everything
        }
    }
    field
}

/// `name` as a part of the name of a unit, as `systemd-escape` writes it.
pub(super) fn in_unit_name(name: &str) -> String {
    let mut escaped = String::new();
    for (place, byte) in name.bytes().enumerate() {
        match byte {
            b'/' => escaped.push('-'),
            b'.' if place == 0 => escaped.push_str("\\x2e"),
            b':' | b'_' | b'.' => escaped.push(byte.into()),
            _ if byte.is_ascii_alphanumeric() => escaped.push(byte.into()),
            _ => drop(write!(escaped, "\\x{byte:02x}")), // a string takes everything
        }
    }
    escaped
}

/// `path` as a word of a unit's setting. `None` if no setting can hold it: it is not UTF-8, or has a control
/// character in it.
pub(super) fn in_unit_setting(path: &Path) -> Option<String> {
    let text = path.to_str().filter(|text| !text.chars().any(char::is_control))?;
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%");
    Some(format!("\"{escaped}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_comes_back_as_it_was_whatever_is_in_it() {
        for text in [&b"/a b"[..], b"/a\\040", b"\xff\n\t#,", b"\\", b"/\xc3\xa4"] {
            let text = OsStr::from_bytes(text);
            let field = to_field(text, b",");
            assert!(field.bytes().all(|byte| byte.is_ascii_graphic() && !b"#,".contains(&byte)), "{field}");
            assert_eq!(from_field(field.as_bytes()), text);
        }
        assert_eq!(to_field("/a b,c".as_ref(), b""), "/a\\040b,c");
    }

    #[test]
    fn what_only_looks_like_an_escape_is_kept() {
        assert_eq!(from_field(b"\\08\\9\\777\\04"), "\\08\\9\\777\\04");
    }

    /// As `systemd-escape` and `systemd-escape --path` answer.
    #[test]
    fn a_units_name_is_escaped_as_systemd_does() {
        assert_eq!(in_unit_name("data"), "data");
        assert_eq!(in_unit_name("a-b_c.d"), "a\\x2db_c.d");
        assert_eq!(in_unit_name(".a"), "\\x2ea");
        assert_eq!(in_unit_name("dev/vhdx/a-part1"), "dev-vhdx-a\\x2dpart1");
    }

    #[test]
    fn a_path_in_a_setting_is_one_word_without_specifiers() {
        let written = |path: &str| in_unit_setting(Path::new(path));
        assert_eq!(written("/a b/100%").as_deref(), Some("\"/a b/100%%\""));
        assert_eq!(written("/\"\\").as_deref(), Some("\"/\\\"\\\\\""));
        assert_eq!(written("/a\nExecStart=/bin/true"), None);
        assert_eq!(in_unit_setting(Path::new(OsStr::from_bytes(b"/\xff"))), None);
    }
}
