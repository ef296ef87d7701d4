//! The man pages, from what `--help` shows: its texts, cut into the sections that man pages have.

use std::fmt::Write as _;

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, roman};

/// Programs for the administrator are in this section.
const SECTION: &str = "8";

/// What a command says about its exit status unless it has more to say.
const EXIT_STATUS: &str = "0 success, 1 failure, 2 wrong usage.";

/// Where to read on: a page, and those that it names beside the page of the whole program.
const RELATED: &[(&str, &[&str])] = &[
    ("vhdx-ublk", &["losetup(8)", "mount(8)", "fstrim(8)", "qemu-img(1)"]),
    ("vhdx-ublk-add", &["vhdx-ublk-del(8)", "vhdx-ublk-list(8)", "vhdx-ublk-recover(8)", "mount(8)"]),
    ("vhdx-ublk-del", &["vhdx-ublk-add(8)", "umount(8)"]),
    ("vhdx-ublk-list", &["vhdx-ublk-add(8)", "vhdx-ublk-recover(8)", "lsblk(8)"]),
    ("vhdx-ublk-recover", &["vhdx-ublk-list(8)", "vhdx-ublk-session(8)"]),
    ("vhdx-ublk-session", &["vhdx-ublk-recover(8)"]),
    ("vhdx-ublk-snapshot", &["vhdx-ublk-merge(8)", "vhdx-ublk-map(8)", "fsfreeze(8)"]),
    ("vhdx-ublk-create", &["vhdx-ublk-add(8)", "vhdx-ublk-convert(8)"]),
    ("vhdx-ublk-info", &["vhdx-ublk-check(8)", "vhdx-ublk-map(8)"]),
    ("vhdx-ublk-map", &["vhdx-ublk-snapshot(8)", "qemu-img(1)"]),
    ("vhdx-ublk-check", &["vhdx-ublk-salvage(8)", "vhdx-ublk-relink(8)"]),
    ("vhdx-ublk-relink", &["vhdx-ublk-move(8)", "vhdx-ublk-check(8)"]),
    ("vhdx-ublk-resize", &["vhdx-ublk-compact(8)", "resize2fs(8)", "growpart(1)"]),
    ("vhdx-ublk-merge", &["vhdx-ublk-snapshot(8)"]),
    ("vhdx-ublk-move", &["vhdx-ublk-relink(8)"]),
    ("vhdx-ublk-compact", &["vhdx-ublk-resize(8)", "fstrim(8)"]),
    ("vhdx-ublk-salvage", &["vhdx-ublk-check(8)", "ddrescue(1)", "ddrescuelog(1)"]),
    ("vhdx-ublk-convert", &["vhdx-ublk-measure(8)", "vhdx-ublk-compare(8)", "qemu-img(1)"]),
    ("vhdx-ublk-compare", &["vhdx-ublk-convert(8)", "qemu-img(1)"]),
    ("vhdx-ublk-measure", &["vhdx-ublk-convert(8)", "qemu-img(1)"]),
];

/// The names and the texts of all pages: one for the program, and one for each command that is not hidden.
pub fn pages(line: Command) -> Vec<(String, String)> {
    let mut line = line.disable_help_subcommand(true);
    line.build();
    let mut pages = Vec::new();
    add_pages(&line, &mut pages);
    pages
}

fn add_pages(command: &Command, pages: &mut Vec<(String, String)>) {
    let usage = command.clone().render_usage().to_string();
    let usage = usage.strip_prefix("Usage: ").unwrap_or(&usage).to_owned();
    let man = Man::new(command.clone().subcommand_help_heading("COMMANDS").override_usage(usage))
        .section(SECTION)
        .source(concat!("vhdx-ublk ", env!("CARGO_PKG_VERSION")))
        .manual("VHDX images as block devices");
    pages.push((man.get_filename(), page(&man, command)));
    command.get_subcommands().filter(|command| !command.is_hide_set()).for_each(|command| {
        add_pages(command, pages);
    });
}

/// One page.
fn page(man: &Man, command: &Command) -> String {
    let mut text = Vec::new();
    let mut sections = vec![Man::render_title, Man::render_name_section, Man::render_synopsis_section];
    sections.push(Man::render_description_section);
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        sections.push(Man::render_options_section);
    }
    if command.has_subcommands() {
        sections.push(Man::render_subcommands_section);
    }
    for render in sections {
        render(man, &mut text).expect("memory takes what is written");
    }
    let text = String::from_utf8(text).expect("made of names and help texts");
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    let more = more(name, &command.get_after_help().map(ToString::to_string).unwrap_or_default());
    once_prepared(&(text + &more.to_roff()))
}

/// Each part of a page defines the apostrophe again: the first time is enough.
fn once_prepared(text: &str) -> String {
    let mut page = String::with_capacity(text.len());
    let mut lines = text.lines();
    let prepares = |line: &str| line.starts_with(".ie \\n(.g .ds Aq") || line.starts_with(".el .ds Aq");
    page.extend(lines.by_ref().take(2).flat_map(|line| [line, "\n"]));
    for line in lines.filter(|line| !prepares(line)) {
        let _ = writeln!(page, "{}", emphasised(line)); // a string takes everything
    }
    page
}

/// A line of a page, in which what was between backquotes is bold.
fn emphasised(line: &str) -> String {
    let parts: Vec<_> = line.split('`').collect();
    if parts.len() % 2 == 0 {
        return line.to_owned();
    }
    let part = |(index, part): (usize, &&str)| match index % 2 {
        0 => (*part).to_owned(),
        _ => format!("\\fB{part}\\fR"),
    };
    parts.iter().enumerate().map(part).collect()
}

/// A piece of a section: a paragraph, or a line that is kept as it is.
enum Piece {
    Paragraph(String),
    Line(String),
}

/// The sections of what `--help` shows below the options, as a page orders them: how a line begins
/// them, and their headings. What begins with none of these is notes.
const SECTIONS: [(&str, &str); 4] =
    [("Exit status: ", "EXIT STATUS"), ("JSON: ", "JSON OUTPUT"), ("", "NOTES"), ("Examples:", "EXAMPLES")];
const STATUS: usize = 0;
const NOTES: usize = 2;

/// How long a line of a help text is at most.
const HELP_WIDTH: usize = 100;

/// Whether a paragraph ends with `line`: a sentence does, and the word that begins the `next` line would have
/// had room.
fn ends_paragraph(line: &str, next: &str) -> bool {
    let word = next.split(' ').next().unwrap_or_default();
    line.ends_with(['.', ':', ';']) && line.chars().count() + 1 + word.chars().count() <= HELP_WIDTH
}

/// Cuts the text into the pieces of each of [`SECTIONS`].
fn cut(text: &str) -> [Vec<Piece>; 4] {
    let mut sections = [const { Vec::new() }; 4];
    for block in text.split("\n\n") {
        let (mut section, mut begins) = (NOTES, true);
        let mut lines = block.lines().peekable();
        while let Some(whole) = lines.next() {
            let (line, next) = (whole, lines.peek());
            let begun = SECTIONS.iter().position(|(begin, _)| !begin.is_empty() && line.starts_with(begin));
            let line = line.strip_prefix(begun.map_or("", |begun| SECTIONS[begun].0)).unwrap_or(line);
            (section, begins) = (begun.unwrap_or(section), begins || begun.is_some());
            let pieces: &mut Vec<_> = &mut sections[section];
            match (line.strip_prefix("  "), pieces.last_mut()) {
                (Some(kept), _) => pieces.push(Piece::Line(kept.to_owned())),
                (None, Some(Piece::Paragraph(last))) if !begins => *last = format!("{last} {line}"),
                (None, _) if line.is_empty() => {}
                (None, _) => pieces.push(Piece::Paragraph(line.to_owned())),
            }
            begins = next.is_some_and(|next| ends_paragraph(whole, next));
        }
    }
    sections
}

/// The sections of the page `name` that follow its options.
fn more(name: &str, after_help: &str) -> Roff {
    let mut sections = cut(after_help);
    if sections[STATUS].is_empty() {
        sections[STATUS].push(Piece::Paragraph(EXIT_STATUS.to_owned()));
    }
    let mut roff = Roff::new();
    for ((_, heading), pieces) in SECTIONS.iter().zip(&sections).filter(|(_, pieces)| !pieces.is_empty()) {
        roff.control("SH", [*heading]);
        add_pieces(&mut roff, pieces);
    }
    let related = RELATED.iter().find(|(page, _)| *page == name).map_or(&[][..], |(_, related)| related);
    // `vhdx-ublk-session-list` belongs to `vhdx-ublk-session`, and the program's own page to none.
    let owner = name.rsplit_once('-').map(|(owner, _)| owner).filter(|owner| *owner != "vhdx");
    let owner = owner.map(|owner| format!("{owner}({SECTION})"));
    let pages = owner.iter().map(String::as_str).chain(related.iter().copied());
    roff.control("SH", ["SEE ALSO"]).text(references(pages));
    roff
}

fn add_pieces(roff: &mut Roff, pieces: &[Piece]) {
    let mut keeps = false;
    for piece in pieces {
        let is_line = matches!(piece, Piece::Line(_));
        match (keeps, is_line) {
            (false, true) => _ = roff.control("PP", []).control("nf", []),
            (true, false) => _ = roff.control("fi", []),
            _ => {}
        }
        keeps = is_line;
        match piece {
            Piece::Paragraph(text) => _ = roff.control("PP", []).text([roman(text)]),
            Piece::Line(text) => _ = roff.text([roman(text)]),
        }
    }
    if keeps {
        roff.control("fi", []);
    }
}

/// `one(8), other(1)`, the names bold.
fn references<'a>(pages: impl Iterator<Item = &'a str>) -> Vec<Inline> {
    let mut line = Vec::new();
    for page in pages {
        let (name, section) = page.split_at(page.find('(').unwrap_or(page.len()));
        let comma = if line.is_empty() { "" } else { ", " };
        line.extend([roman(comma), bold(name), roman(section)]);
    }
    line
}
