//! A picture of an image, in characters and as SVG.

use std::fmt::Write;

use vhdx_ublk::operations::picture::{Cell, LAYERS, PARTS, Picture, Strip};
use vhdx_ublk::printable::human_size;

/// The columns of a screen, and the rows of characters that each part of the picture has.
const COLUMNS: usize = 80;
const ROWS: usize = 6;

/// The most cells of a part that is drawn in colours: a character has two.
pub const CELLS: usize = COLUMNS * ROWS * 2;

/// The most cells of a part that is drawn without: a character has one, and its kind shows what is there.
pub const PLAIN_CELLS: usize = COLUMNS * ROWS;

/// The colours of the layers, of the 256 that terminals have.
const COLOURS: [u8; LAYERS] = [33, 208, 40, 170, 220, 44, 167, 245];

/// The colours of the parts of the disk: a rainbow.
const RAINBOW: [u8; PARTS] = [
    21, 27, 33, 39, 45, 51, 50, 49, 48, 47, 46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196, 197, 198,
    199, 200, 201,
];

/// What shows a layer without colours: its number.
const CHARACTERS: [char; LAYERS] = ['0', '1', '2', '3', '4', '5', '6', '7'];

/// What shows a part of the disk without colours: a letter.
const LETTERS: [u8; PARTS] = *b"abcdefghijklmnopqrstuvwxyz";

/// What shows an empty cell without colours.
const EMPTY: char = '.';

/// The colour of what describes the image.
const STRUCTURES: u8 = 250;

fn colour(cell: Cell) -> Option<u8> {
    match cell {
        Cell::Empty => None,
        Cell::Layer(layer) => Some(COLOURS[layer]),
        Cell::Part(part) => Some(RAINBOW[part]),
        Cell::Structures => Some(STRUCTURES),
    }
}

/// A colour of a terminal as SVG writes it: 16 to 231 are a cube, those behind are grey.
fn rgb(colour: u8) -> String {
    const LEVELS: [u8; 6] = [0, 95, 135, 175, 215, 255];
    const GREY: u8 = 232;
    let level = |place: u8| LEVELS[usize::from((colour - 16) / place % 6)];
    let [red, green, blue] =
        if colour >= GREY { [8 + 10 * (colour - GREY); 3] } else { [36, 6, 1].map(level) };
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// The parts of a picture under their headlines.
fn parts(picture: &Picture) -> [(String, &Strip); 3] {
    let sized = |name: &str, strip: &Strip| {
        format!("{name}: {}, {} each cell", human_size(strip.bytes), human_size(strip.per_cell))
    };
    let Picture { disk, file, order } = picture;
    let ordered = "order: which part of the disk the blocks of the file are from".to_owned();
    [(sized("disk", disk), disk), (sized("file", file), file), (ordered, order)]
}

/// The layers and whatever else the picture shows.
fn shown(picture: &Picture) -> Vec<(Cell, String)> {
    let seen = |cell: Cell| parts(picture).iter().any(|(_, strip)| strip.cells.contains(&cell));
    let layers = (0..LAYERS).map(|layer| {
        let name =
            if layer == LAYERS - 1 { format!("layer {layer} and below") } else { format!("layer {layer}") };
        (Cell::Layer(layer), name)
    });
    let ends = [(Cell::Part(0), "first part"), (Cell::Part(PARTS - 1), "last part")];
    let others = [(Cell::Structures, "structures of the file")].into_iter().chain(ends);
    let all = layers.chain(others.map(|(cell, name)| (cell, name.to_owned())));
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
    for (headline, strip) in parts(picture) {
        text += &headline;
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
        (Some(above), None) => format!("\x1b[38;5;{above}m▀\x1b[0m"),
        (None, Some(below)) => format!("\x1b[38;5;{below}m▄\x1b[0m"),
        (Some(above), Some(below)) if above == below => format!("\x1b[38;5;{above}m█\x1b[0m"),
        (Some(above), Some(below)) => format!("\x1b[38;5;{above};48;5;{below}m▀\x1b[0m"),
    }
}

/// What stands for a cell without colours.
fn character(cell: Cell) -> char {
    match cell {
        Cell::Empty => EMPTY,
        Cell::Layer(layer) => CHARACTERS[layer],
        Cell::Part(part) => char::from(LETTERS[part]),
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
    for (headline, strip) in parts(picture) {
        y += LINE;
        put(format_args!("<text x=\"0\" y=\"{}\">{headline}</text>\n", y - 5));
        for row in strip.cells.chunks(COLUMNS) {
            let mut x = 0;
            for run in row.chunk_by(|one, other| one == other) {
                let width = run.len() * SIDE;
                let fill = colour(run[0]).map_or_else(|| "#f2f2f2".to_owned(), rgb);
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
        let fill = colour(cell).map_or_else(|| "none".to_owned(), rgb);
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
