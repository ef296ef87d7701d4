//! A picture of an image, in characters and as SVG.

use std::fmt::Write;

use vhdx_ublk::operations::picture::{Cell, LAYERS, Picture, Strip};
use vhdx_ublk::printable::human_size;

/// The columns of a screen, and the rows of characters that each part of the picture has.
const COLUMNS: usize = 80;
const ROWS: usize = 8;

/// The most cells of a part that is drawn in colours: a character has two.
pub const CELLS: usize = COLUMNS * ROWS * 2;

/// The most cells of a part that is drawn without: a character has one, and its kind shows what is there.
pub const PLAIN_CELLS: usize = COLUMNS * ROWS;

/// The colours of the layers, of 256, and as SVG writes them.
const COLOURS: [(u8, &str); LAYERS] = [
    (33, "#0087ff"),
    (208, "#ff8700"),
    (40, "#00d700"),
    (170, "#d75fd7"),
    (220, "#ffd700"),
    (44, "#00d7d7"),
    (167, "#d75f5f"),
    (245, "#8a8a8a"),
];

/// What shows a layer without colours: its number.
const CHARACTERS: [char; LAYERS] = ['0', '1', '2', '3', '4', '5', '6', '7'];

/// What shows an empty cell without colours.
const EMPTY: char = '.';

/// The colour of what describes the image.
const STRUCTURES: (u8, &str) = (250, "#bcbcbc");

fn colour(cell: Cell) -> Option<(u8, &'static str)> {
    match cell {
        Cell::Empty => None,
        Cell::Layer(layer) => Some(COLOURS[layer]),
        Cell::Structures => Some(STRUCTURES),
    }
}

/// The parts of a picture under their names.
fn parts(picture: &Picture) -> [(&'static str, &Strip); 2] {
    [("disk", &picture.disk), ("file", &picture.file)]
}

fn headline(name: &str, strip: &Strip) -> String {
    format!("{name}: {}, {} each cell", human_size(strip.bytes), human_size(strip.per_cell))
}

/// The layers and whatever else the picture shows.
fn shown(picture: &Picture) -> Vec<(Cell, String)> {
    let seen = |cell: Cell| parts(picture).iter().any(|(_, strip)| strip.cells.contains(&cell));
    let layers = (0..LAYERS).map(|layer| {
        let name =
            if layer == LAYERS - 1 { format!("layer {layer} and below") } else { format!("layer {layer}") };
        (Cell::Layer(layer), name)
    });
    let all = layers.chain([(Cell::Structures, "structures of the file".to_owned())]);
    all.filter(|(cell, _)| seen(*cell)).collect()
}

/// The picture for a screen in colours: each line of characters is two lines of cells.
pub fn coloured(picture: &Picture) -> String {
    let line = |pair: &[Cell]| {
        let (upper, lower) = pair.split_at(pair.len().min(COLUMNS));
        let lower = lower.iter().copied().chain(std::iter::repeat(Cell::Empty));
        upper.iter().zip(lower).map(|(upper, lower)| halves(*upper, lower)).collect()
    };
    text(picture, 2 * COLUMNS, line, |cell| halves(cell, cell))
}

/// The picture without colours: a character for each cell.
pub fn plain(picture: &Picture) -> String {
    let line = |cells: &[Cell]| cells.iter().map(|cell| character(*cell)).collect();
    let text = text(picture, COLUMNS, line, |cell| character(cell).to_string());
    let more = if text.ends_with('\n') { "" } else { ", " };
    format!("{text}{more}{EMPTY} empty")
}

/// Both parts, each line of `cells` cells as `line` draws it, and what the characters mean.
fn text(
    picture: &Picture,
    cells: usize,
    line: impl Fn(&[Cell]) -> String,
    sample: impl Fn(Cell) -> String,
) -> String {
    let mut text = String::new();
    for (name, strip) in parts(picture) {
        text += &headline(name, strip);
        text.push('\n');
        for cells in strip.cells.chunks(cells) {
            text += line(cells).trim_end();
            text.push('\n');
        }
    }
    let legend = shown(picture).into_iter().map(|(cell, name)| format!("{} {name}", sample(cell)));
    text + &legend.collect::<Vec<_>>().join(", ")
}

/// Two cells, one above the other, in their colours.
fn halves(upper: Cell, lower: Cell) -> String {
    match (colour(upper), colour(lower)) {
        (None, None) => " ".to_owned(),
        (Some((above, _)), None) => format!("\x1b[38;5;{above}m▀\x1b[0m"),
        (None, Some((below, _))) => format!("\x1b[38;5;{below}m▄\x1b[0m"),
        (Some((above, _)), Some((below, _))) if above == below => format!("\x1b[38;5;{above}m█\x1b[0m"),
        (Some((above, _)), Some((below, _))) => format!("\x1b[38;5;{above};48;5;{below}m▀\x1b[0m"),
    }
}

/// What stands for a cell without colours.
fn character(cell: Cell) -> char {
    match cell {
        Cell::Empty => EMPTY,
        Cell::Layer(layer) => CHARACTERS[layer],
        Cell::Structures => '#',
    }
}

/// The side of a cell, and the height of a line of text.
const SIDE: usize = 10;
const LINE: usize = 20;

/// The picture as SVG: cells of a row that are alike are one rectangle.
pub fn svg(picture: &Picture) -> String {
    let mut body = String::new();
    let mut y = 0;
    let mut put = |text: std::fmt::Arguments<'_>| body.write_fmt(text).expect("a string takes everything");
    for (name, strip) in parts(picture) {
        y += LINE;
        put(format_args!("<text x=\"0\" y=\"{}\">{}</text>\n", y - 5, headline(name, strip)));
        for row in strip.cells.chunks(COLUMNS) {
            let mut x = 0;
            for run in row.chunk_by(|one, other| one == other) {
                let width = run.len() * SIDE;
                let fill = colour(run[0]).map_or("#f2f2f2", |(_, fill)| fill);
                put(format_args!(
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{SIDE}\" fill=\"{fill}\"/>\n"
                ));
                x += width;
            }
            y += SIDE;
        }
    }
    for (cell, name) in shown(picture) {
        y += LINE;
        let fill = colour(cell).map_or("none", |(_, fill)| fill);
        put(format_args!(
            "<rect x=\"0\" y=\"{}\" width=\"{SIDE}\" height=\"{SIDE}\" fill=\"{fill}\"/>\n\
             <text x=\"{LINE}\" y=\"{}\">{name}</text>\n",
            y - SIDE,
            y - 1
        ));
    }
    let (width, height) = (COLUMNS * SIDE, y + SIDE);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n{body}</svg>\n"
    )
}
