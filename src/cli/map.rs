//! `map`: shows where the content of a disk is.

use std::fmt::Write as _;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;
use tempfile::NamedTempFile;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::disk::{CHOOSE, Reactor, folder_of, missing_folder, name_of_new, taken};
use vhdx_ublk::error::{Doing, Error, Kind, Locate, Result};
use vhdx_ublk::operations::inspect::inspect;
use vhdx_ublk::operations::map::{Extent, Extents};
use vhdx_ublk::operations::opened::OpenChain;
use vhdx_ublk::operations::picture::Picture;
use vhdx_ublk::printable::{human_size, printable};

use super::drawing;
use super::output;
use super::parent_options::ParentOptions;

/// Show where the content of a disk is: which layer has it, where in its file, and what is empty.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Map {
    /// The VHDX file; its parents are read, too
    image: PathBuf,
    /// Show only what has changed since LAYER, one of the parents, was the image
    #[arg(long, value_name = "LAYER")]
    since: Option<PathBuf>,
    /// Draw the disk, the file, and the order of the blocks in the file: colours, or digits where there are
    /// none, show the layers, empty cells of the file the holes in it. In a file without fragmentation the
    /// order is that of a rainbow, or of the alphabet
    #[arg(long, conflicts_with_all = ["json", "since"])]
    picture: bool,
    /// Write the picture as SVG to FILE, which must not exist; - writes it to standard output
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "since"])]
    svg: Option<PathBuf>,
    #[command(flatten)]
    parents: ParentOptions,
    /// As JSON: an array of objects, errors too; the keys are those of `qemu-img map --output=json`
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk map disk.vhdx                          how much is in which state and layer
  vhdx-ublk map disk.vhdx --picture                the disk and its file as a picture
  vhdx-ublk map --since disk.vhdx monday.avhdx     what a snapshot's child has changed

Prints how many bytes of the disk are in which state, then how many bytes of data each layer has:
bytes, share of the disk, state or layer, size. The states are those of NBD: 0 data; 2 zero (a block
has space, and its host stores nothing); 3 hole,zero. With --since: a line for each extent, with its
start and length in bytes and its state.

JSON: start and length (bytes), depth (0 for the image, 1 for its parent, and so on), present (a
layer has it), zero, data (a file has space for it), compressed (never), offset (in the file of the
layer, only with data).

An incremental backup copies what has changed since the last one: `vhdx-ublk help backup` has the
commands, and a script that runs them.
Blocks that were discarded or filled with zeros count as changed. An image that is being written
cannot be mapped; the layers below it can.
Exit status: 0 success, 1 failure, 2 wrong usage.";

impl Map {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let reactor = Reactor::new()?;
        let chain = OpenChain::read(&self.image, &self.parents.search(), &reactor, &Claims)?;
        if self.picture || self.svg.is_some() {
            return self.draw(&chain);
        }
        let extents = match &self.since {
            Some(layer) => Extents::since(&chain, layer)?,
            None => Extents::all(&chain),
        };
        if self.json {
            let json = |extent: &Extent| serde_json::to_string(&Json::of(extent)).expect("numbers");
            return print_each(extents, ("[", ",\n", "]"), json);
        }
        if self.since.is_some() {
            let line = |extent: &Extent| format!("{} {} {}", extent.start, extent.length, state(extent).1);
            return print_each(extents, ("", "\n", ""), line);
        }
        output::print(&totals(extents, &chain)?)
    }

    fn draw(&self, chain: &OpenChain) -> Result<()> {
        let to_stdout = self.svg.as_deref().is_some_and(|path| path == Path::new("-"));
        if to_stdout && self.picture {
            let error = Error::new(Kind::Usage, "--picture and --svg - would both write standard output");
            return Err(error.remedy("name a file: --svg FILE"));
        }
        let leaf = inspect(&self.image)?;
        let picture = |cells| Picture::of(chain, &leaf, cells);
        if let Some(path) = &self.svg {
            let svg = drawing::svg(&picture(drawing::CELLS)?);
            if to_stdout {
                return output::print(svg.trim_end());
            }
            write_new(path, &svg).file(path)?;
        }
        if !self.picture {
            return Ok(());
        }
        let coloured = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        output::print(&if coloured {
            drawing::coloured(&picture(drawing::CELLS)?)
        } else {
            drawing::plain(&picture(drawing::PLAIN_CELLS)?)
        })
    }
}

/// The number and the name that NBD has for the state of an extent.
fn state(extent: &Extent) -> (u32, &'static str) {
    match (extent.is_data(), extent.zero) {
        (true, false) => (0, "data"),
        (true, true) => (2, "zero"),
        (false, _) => (3, "hole,zero"),
    }
}

/// An extent as QEMU describes it.
#[derive(Serialize, JsonSchema)]
#[expect(clippy::struct_excessive_bools, reason = "QEMU has the same")]
pub struct Json {
    /// Where it starts on the disk.
    start: u64,
    /// How long it is, bytes.
    length: u64,
    /// The layer that has it: 0 for the image, 1 for its parent, and so on.
    depth: usize,
    /// Whether a layer has it.
    present: bool,
    /// Whether it reads as zeros.
    zero: bool,
    /// Whether a file has space for it.
    data: bool,
    /// Never.
    compressed: bool,
    /// Where it is in the file of its layer, if that has space for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl Json {
    fn of(extent: &Extent) -> Self {
        let Extent { start, length, depth, present, zero, offset } = *extent;
        Self { start, length, depth, present, zero, data: extent.is_data(), compressed: false, offset }
    }
}

/// Prints the extents as they are found. A reader that has left ends it.
fn print_each(
    extents: Extents<'_>,
    (before, between, after): (&str, &str, &str),
    text: impl Fn(&Extent) -> String,
) -> Result<()> {
    let mut stdout = BufWriter::new(io::stdout().lock());
    let mut lead = before;
    let mut printed = Ok(());
    for extent in extents {
        printed = write!(stdout, "{lead}{}", text(&extent?));
        if printed.is_err() {
            break;
        }
        lead = between;
    }
    let rest = if lead == before { before } else { "" };
    let end = if lead == before && before.is_empty() { "" } else { "\n" };
    match printed.and_then(|()| write!(stdout, "{rest}{after}{end}")).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.doing("writing the output"),
    }
}

/// How much of the disk is in which state, then in which layer.
fn totals(extents: Extents<'_>, chain: &OpenChain) -> Result<String> {
    let size = chain.content().virtual_size();
    let mut states = [(0, "data", 0), (2, "zero", 0), (3, "hole,zero", 0)];
    let mut layers = vec![0; chain.layers().len()];
    for extent in extents {
        let extent = extent?;
        let (number, _) = state(&extent);
        let (.., bytes) = states.iter_mut().find(|known| known.0 == number).expect("all are listed");
        *bytes += extent.length;
        layers[extent.depth] += if extent.is_data() { extent.length } else { 0 };
    }
    assert_eq!(states.iter().map(|(.., bytes)| bytes).sum::<u64>(), size, "each byte is in one extent");
    let mut text = String::new();
    for (number, name, bytes) in states.into_iter().filter(|(.., bytes)| *bytes > 0) {
        let (share, human) = (percent(bytes, size), human_size(bytes));
        let line = writeln!(text, "{bytes:>20} {share:>6} {number:>3} {name} ({human})");
        line.expect("a string takes everything");
    }
    for (depth, (bytes, layer)) in layers.into_iter().zip(chain.layers()).enumerate() {
        let path = layer.file.path().to_string_lossy();
        let (share, human, path) = (percent(bytes, size), human_size(bytes), printable(&path));
        let line = write!(text, "\n{bytes:>20} {share:>6} layer {depth} ({human}): {path}");
        line.expect("a string takes everything");
    }
    Ok(text)
}

/// The share of `bytes` in `size`, to the nearest tenth.
fn percent(bytes: u64, size: u64) -> String {
    let size = u128::from(size.max(1));
    let tenths = (u128::from(bytes) * 2000 + size) / (2 * size);
    format!("{}.{}%", tenths / 10, tenths % 10)
}

/// Writes a file that was not there; it gets its name when it is whole.
fn write_new(path: &Path, text: &str) -> Result<()> {
    const WRITING: &str = "writing the picture";
    name_of_new(path)?;
    let folder = folder_of(path);
    let made = NamedTempFile::new_in(folder).doing(WRITING);
    let mut file = made.map_err(|error| missing_folder(error, folder))?;
    file.write_all(text.as_bytes()).doing(WRITING)?;
    file.persist_noclobber(path).map(drop).map_err(|failed| match failed.error.kind() {
        io::ErrorKind::AlreadyExists => taken(path).remedy(CHOOSE),
        _ => Error::io(WRITING, failed.error),
    })
}
