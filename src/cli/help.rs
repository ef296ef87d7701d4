//! `help`: the help of a command, or a page of the guide.

use std::fmt::Write as _;

use clap::Command;
use clap::error::ErrorKind;

use vhdx_ublk::error::{Doing, Error, Kind, Result};

use super::output;

/// The pages of the guide: the word by which each is asked for, and its text.
pub const PAGES: [(&str, &str); 14] = [
    ("wsl", include_str!("../guide/wsl.md")),
    ("rescue", include_str!("../guide/rescue.md")),
    ("kubernetes", include_str!("../guide/kubernetes.md")),
    ("shrink", include_str!("../guide/shrink.md")),
    ("grow", include_str!("../guide/grow.md")),
    ("backup", include_str!("../guide/backup.md")),
    ("guest", include_str!("../guide/guest.md")),
    ("windows", include_str!("../guide/windows.md")),
    ("boot", include_str!("../guide/boot.md")),
    ("watch", include_str!("../guide/watch.md")),
    ("network-images", include_str!("../guide/network-images.md")),
    ("upgrade", include_str!("../guide/upgrade.md")),
    ("export", include_str!("../guide/export.md")),
    ("json", include_str!("../guide/json.md")),
];

/// Show how a task is done, or the help of a command.
///
/// Without a name it lists the tasks. A task that is called like a command is shown as the task; the help of
/// that command is in its `--help`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Help {
    /// The task or the command
    #[arg(value_name = "TASK|COMMAND")]
    names: Vec<String>,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk help               list the tasks
  vhdx-ublk help backup        how to back a disk up
  vhdx-ublk help session list  the help of this command

Exit status: 0 shown, 2 there is no such task and no such command.";

impl Help {
    /// Runs the command: `line` is the whole command line.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] if there is nothing of this name.
    pub fn run(&self, mut line: Command) -> Result<()> {
        let [first, rest @ ..] = &self.names[..] else {
            line.print_help().doing("writing the output")?;
            return output::print(&tasks());
        };
        if let Some((_, text)) = PAGES.iter().find(|(name, _)| name == first).filter(|_| rest.is_empty()) {
            return output::print(plain(text).trim_end());
        }
        let words = ["vhdx-ublk"].into_iter().chain(self.names.iter().map(String::as_str)).chain(["--help"]);
        match line.try_get_matches_from_mut(words) {
            Err(help) if help.kind() == ErrorKind::DisplayHelp => help.print().doing("writing the output"),
            _ => {
                let message = format!("there is no task and no command {}", self.names.join(" "));
                Err(Error::new(Kind::Usage, message).remedy("`vhdx-ublk help` lists both"))
            }
        }
    }
}

/// A page as a terminal shows it: `[text](crate::guide::page)` becomes `text (vhdx-ublk help page)`.
fn plain(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("](crate::guide::") {
        let link = before.rsplit_once('[').zip(after.split_once(')'));
        let ((lead, name), (page, behind)) = link.expect("a link has both brackets");
        let _ = write!(shown, "{lead}{name} (vhdx-ublk help {})", page.replace('_', "-"));
        rest = behind;
    }
    shown + rest
}

/// The list of the tasks, each with the first line of its page.
fn tasks() -> String {
    let row = |(name, text): &(&str, &str)| {
        let title = text.lines().next().unwrap_or_default();
        format!("\n  {name:14} {}", title.trim_end_matches('.'))
    };
    let rows: String = PAGES.iter().map(row).collect();
    format!("\nTasks, which `vhdx-ublk help TASK` explains:{rows}")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// No link of rustdoc is shown, and each leads to a page.
    #[test]
    fn links_are_shown_as_commands() {
        assert_eq!(
            plain("see [`a`](crate::guide::b_c), [d](crate::guide::e)."),
            "see `a` (vhdx-ublk help b-c), d (vhdx-ublk help e)."
        );
        for (name, text) in PAGES {
            let shown = plain(text);
            assert!(!shown.contains("](crate::"), "{name}");
            let marks = shown.split("(vhdx-ublk help ").skip(1);
            let pages = marks.map(|rest| rest.split(')').next().unwrap_or_default());
            pages.for_each(|page| assert!(PAGES.iter().any(|(known, _)| *known == page), "{name}: {page}"));
        }
    }

    /// Every page of the guide can be asked for, and begins with its title.
    #[test]
    fn no_page_is_missing() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide");
        let names = fs::read_dir(folder).expect("the guide").map(|item| item.expect("readable").file_name());
        let names = names.map(|name| name.into_string().expect("UTF-8"));
        let mut there: Vec<_> =
            names.filter_map(|name| name.strip_suffix(".md").map(str::to_owned)).collect();
        let mut known = PAGES.map(|(name, _)| name.to_owned()).to_vec();
        there.sort();
        known.sort();
        assert_eq!(known, there);
        for (name, text) in PAGES {
            let title = text.lines().next().unwrap_or_default();
            assert!(title.ends_with('.') && title.len() < 80 && !title.starts_with('#'), "{name}: {title}");
        }
    }
}
