//! The design: what the program promises, and the rules that its parts keep so that the promises hold.
//!
//! | page | question |
//! |---|---|
//! | [`architecture`] | Which parts are there, on which thread does each run, and which way does a request take? |
//! | [`ordering`] | What must be durable before what, and which crash makes that necessary? |
//! | [`contract`] | What is promised to users of a device, and which test defends each promise? |
//! | [`vhdx_rules`] | What does the VHDX format demand? The rules are numbered, so that code can cite them. |
//! | [`ublk`] | How do the kernel's driver, `io_uring` and Linux files behave, and which traps are there? |
//! | [`testing`] | How are the promises attacked: simulation, planted bugs, hostile input, other readers? |
//! | [`laboratory`] | How do tests get a kernel that has the driver? |
//! | [`glossary`] | What does each word mean? |
//!
//! These pages say why. What a function does, and in which units, is in its own documentation; where a page
//! and the code differ, the code is right and the page has a bug.

#[doc = include_str!("architecture.md")]
pub mod architecture {}

#[doc = include_str!("ordering.md")]
pub mod ordering {}

#[doc = include_str!("contract.md")]
pub mod contract {}

#[doc = include_str!("vhdx-rules.md")]
pub mod vhdx_rules {}

#[doc = include_str!("ublk.md")]
pub mod ublk {}

#[doc = include_str!("testing.md")]
pub mod testing {}

#[doc = include_str!("laboratory.md")]
pub mod laboratory {}

#[doc = include_str!("glossary.md")]
pub mod glossary {}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    const PAGES: [(&str, &str); 8] = [
        ("architecture.md", include_str!("architecture.md")),
        ("ordering.md", include_str!("ordering.md")),
        ("contract.md", include_str!("contract.md")),
        ("vhdx-rules.md", include_str!("vhdx-rules.md")),
        ("ublk.md", include_str!("ublk.md")),
        ("testing.md", include_str!("testing.md")),
        ("laboratory.md", include_str!("laboratory.md")),
        ("glossary.md", include_str!("glossary.md")),
    ];

    /// The numbers that follow `mark` in `text`.
    fn numbers_after(text: &str, mark: &str) -> Vec<usize> {
        let digits = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>();
        text.split(mark).skip(1).filter_map(|part| digits(part).parse().ok()).collect()
    }

    /// The text of every file below `folder`.
    fn sources(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("a folder of the sources");
        let paths = entries.map(|entry| entry.expect("an entry").path());
        let read = |path: PathBuf| {
            if path.is_dir() { sources(&path) } else { vec![fs::read_to_string(path).expect("text")] }
        };
        paths.flat_map(read).collect()
    }

    /// Rules are numbered without gaps, and every rule that a link names is there.
    #[test]
    fn every_rule_that_is_cited_exists() {
        let rules = numbers_after(include_str!("vhdx-rules.md"), "<a id=\"rule-");
        assert!(rules.iter().copied().eq(1..=rules.len()), "rules out of order: {rules:?}");
        for text in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
            for rule in numbers_after(&text, concat!("vhdx_rules#", "rule-")) {
                assert!(rules.contains(&rule), "rule {rule} is cited and not listed");
            }
        }
    }

    /// A page that names a file of this repository names one that is there; `folder/file` is one of the
    /// sources.
    #[test]
    fn every_file_that_a_page_names_exists() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let read = |name| (name, fs::read_to_string(root.join(name)).expect("it is text"));
        let others = ["README.md", "CHANGELOG.md", "src/lib.rs"].map(read);
        let others = others.iter().map(|(name, text)| (*name, text.as_str()));
        let guide: Vec<_> = sources(&root.join("src/guide"));
        let others = others.chain(guide.iter().map(|text| ("the guide", text.as_str())));
        for (page, text) in PAGES.into_iter().chain(others) {
            for name in text.split(['`', '(', ')', '#', ' ', '\n']).filter(|name| !name.contains(':')) {
                let (folder, file) = name.split_once('/').unwrap_or_default();
                let exists = match folder {
                    "tests" | "tools" | "benches" | "src" => root.join(name).exists(),
                    "format" | "disk" | "image" | "chain" | "engine" | "operations" | "device" | "cli" => {
                        let path = root.join("src").join(name);
                        path.exists() || path.with_extension("rs").exists()
                    }
                    _ => true,
                };
                assert!(exists, "{page} names {folder}/{file}");
            }
        }
    }
}
