//! Sizes as people write and read them. All units are powers of 1024.

use vhdx_ublk::format::{MAX_BLOCK_SIZE, MAX_VIRTUAL_SIZE, MIB, MIN_BLOCK_SIZE, header};

/// Units above the byte, each 1024 times the one before.
const UNITS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];

/// Reads a size: a number of bytes, or a number and a unit: `64K`, `64KiB`.
///
/// # Errors
///
/// Says what is wrong with the text.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err("a size must be a whole number with an optional unit: 512, 64K, 10G, 1TiB".into());
    }
    if let Some(rest) = unit.strip_prefix(['.', ',']) {
        return Err(no_fraction(number, rest));
    }
    let power = power_of(unit)?;
    let too_much = || "the size does not fit 64 bits".to_owned();
    let number: u64 = number.parse().map_err(|_| too_much())?;
    number.checked_mul(1 << (10 * power)).ok_or_else(too_much)
}

/// What to write instead of `number.rest`.
fn no_fraction(number: &str, rest: &str) -> String {
    let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (fraction, unit) = rest.split_at(digits);
    let smaller = || {
        let power = power_of(unit).ok()?.checked_sub(1)?;
        let one = 10_u64.checked_pow(u32::try_from(digits).ok()?)?;
        let scaled = number.parse::<u64>().ok()?.checked_mul(one)?.checked_add(fraction.parse().ok()?)?;
        let scaled = scaled.checked_mul(1024)?;
        let letter = power.checked_sub(1).map_or(String::new(), |index| UNITS[index as usize].to_string());
        scaled.is_multiple_of(one).then(|| format!("{}{letter}", scaled / one))
    };
    match smaller() {
        Some(instead) => format!("a size must be a whole number: write {instead}"),
        None => "a size must be a whole number: write it in a smaller unit, as in 1536M for one and a half G"
            .into(),
    }
}

/// The power of 1024 that `unit` stands for.
fn power_of(unit: &str) -> Result<u32, String> {
    let unknown = || Err(format!("unknown unit {unit:?}: write K, M, G, T or KiB, MiB, GiB, TiB"));
    let mut letters = unit.chars();
    let Some(first) = letters.next() else { return Ok(0) };
    match (first.to_ascii_uppercase(), letters.as_str().to_ascii_lowercase().as_str()) {
        ('B', "") => Ok(0),
        (letter, "" | "ib") => match UNITS.iter().position(|known| *known == letter) {
            Some(index) => Ok(u32::try_from(index + 1).expect("six units")),
            None => unknown(),
        },
        (letter, "b") if UNITS.contains(&letter) => Err(format!(
            "{unit} may mean 1000 or 1024: write {letter} or {letter}iB, which are powers of 1024"
        )),
        _ => unknown(),
    }
}

/// Reads the size of a disk.
///
/// # Errors
///
/// Says what is wrong with the text.
pub fn parse_disk(text: &str) -> Result<u64, String> {
    match parse(text)? {
        0 => Err("a disk must have at least one sector".into()),
        size if size > MAX_VIRTUAL_SIZE => Err("a disk cannot be larger than 64T".into()),
        size => Ok(size),
    }
}

/// Takes no word: one that stands after the image's name is often meant as the size.
///
/// # Errors
///
/// Always: says where the size goes.
pub fn misplaced(text: &str) -> Result<u64, String> {
    match parse(text) {
        Ok(_) => Err(format!("give the size of the disk with --size {text}")),
        Err(_) => {
            Err("only one image can be created at a time; everything else is an option: see --help".into())
        }
    }
}

/// Reads the size of a block.
///
/// # Errors
///
/// Says what is wrong with the text.
pub fn parse_block(text: &str) -> Result<u32, String> {
    let blocks = MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE;
    let size =
        u32::try_from(parse(text)?).ok().filter(|size| size.is_power_of_two() && blocks.contains(size));
    size.ok_or_else(|| "a block size must be a power of two from 1M to 256M".into())
}

/// Reads the size of a sector.
///
/// # Errors
///
/// Says what is wrong with the text.
pub fn parse_sector(text: &str) -> Result<u32, String> {
    match parse(text)? {
        512 => Ok(512),
        4096 => Ok(4096),
        _ => Err("a sector must have 512 or 4096 bytes".into()),
    }
}

/// Reads the size of a log.
///
/// # Errors
///
/// Says what is wrong with the text.
pub fn parse_log(text: &str) -> Result<u32, String> {
    let size = u32::try_from(parse(text)?).ok();
    let size = size.filter(|&size| (1..=header::MAX_LOG_LENGTH).contains(&size));
    let size = size.filter(|&size| u64::from(size).is_multiple_of(MIB));
    size.ok_or_else(|| "a log size must be a multiple of 1M, at most 1G".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_unit_is_read() {
        for (text, expected) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("64K", 64 << 10),
            ("64k", 64 << 10),
            ("64KiB", 64 << 10),
            ("10G", 10 << 30),
            ("10gib", 10 << 30),
            ("1T", 1 << 40),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn garbage_and_overflow_are_refused() {
        for text in [
            "",
            "G",
            "-1",
            "+1",
            "1.5G",
            "1 G",
            " 1",
            "1G ",
            "0x10",
            "10X",
            "10GG",
            "10iB",
            "16E",
            "1KB",
            "１",
            "18446744073709551616",
            "99999999999999999999999G",
            "1🦀",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        assert!(parse("10GB").expect_err("ambiguous").contains("GiB"));
        for (text, instead) in [
            ("1.5G", "write 1536M"),
            ("0,5K", "write 512"),
            ("2.25TiB", "write 2304G"),
            ("1.1G", "smaller unit"),
        ] {
            assert!(parse(text).expect_err("a fraction").contains(instead), "{text}");
        }
    }

    #[test]
    fn the_bounds_of_each_size_are_checked() {
        assert_eq!(parse_disk("64T"), Ok(MAX_VIRTUAL_SIZE));
        assert!(parse_disk("65T").is_err() && parse_disk("0").is_err());
        assert_eq!((parse_block("1M"), parse_block("256M")), (Ok(1 << 20), Ok(256 << 20)));
        assert!(["512K", "3M", "512M", "4G", "8G"].iter().all(|text| parse_block(text).is_err()));
        assert_eq!((parse_log("1M"), parse_log("1G")), (Ok(1 << 20), Ok(1 << 30)));
        assert!(["0", "1K", "1025M", "4G", "5G"].iter().all(|text| parse_log(text).is_err()));
    }
}
