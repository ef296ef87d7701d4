//! `snapshot revert`: a new child of an image of the chain is served, and what is above that is given up.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims::{self, Claims};
use vhdx_ublk::device::launch;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::device::registry::{Entry, Registry};
use vhdx_ublk::device::spec::Ready;
use vhdx_ublk::device::stop::{self, How, Target};
use vhdx_ublk::disk::{Access, ImageFile, Sparse};
use vhdx_ublk::error::{Doing, Error, Kind, Locate, Result};
use vhdx_ublk::image::{DEFAULT_BLOCK_SIZE, DEFAULT_LOG_LENGTH, InitialState, NewImage};
use vhdx_ublk::operations::create::Creation;
use vhdx_ublk::operations::revert::{self, Return};
use vhdx_ublk::printable::shell;

use super::parent_options::AnswerOptions;
use super::snapshot_target::{absolute, image_of, of_that_name, warn_of_table};
use super::{add, create, output, respawn};

/// Return to an image of the chain: a new child of it is served, and the images above it are given up.
///
/// The device must not be in use. It keeps its number, its name and its options. If no device serves the
/// target, only the new image is made.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Revert {
    /// The device: its number, its name, or /dev/ublkbN; or the path of the uppermost image of the chain
    target: OsString,
    /// The image to return to; it is not changed
    image: PathBuf,
    /// The new image; the file must not exist [default: IMAGE-1.vhdx, with the first free number]
    new: Option<PathBuf>,
    /// Remove the images that are given up, up to one that is in use or has other children
    #[arg(long)]
    discard: bool,
    #[command(flatten)]
    answer: AnswerOptions,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk snapshot revert /dev/ublkb0 monday.vhdx
  vhdx-ublk snapshot revert data monday.vhdx tuesday-again.vhdx --discard

What is given up is named, and stays unless --discard is given. The new image is made first, then
the device is removed and added again, and the files are removed last. If the command is killed,
the device serves what it did before, or is removed: then `vhdx-ublk add` of the new image, which
was named when it was made, ends what was begun, and `add` of the former one takes it back.
A device of a service, of a mount, or one that is read-only is refused.
JSON: device (null or a path), image (the new one), parent (the one returned to), given_up and
removed (lists of paths).
Exit status: 0 success, 1 failure, 2 wrong usage.";

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The device that serves the new image.
    device: Option<PathBuf>,
    /// The new image.
    image: WrittenPath,
    /// The image that was returned to, its parent.
    parent: WrittenPath,
    /// The images above that, the uppermost first.
    given_up: Vec<WrittenPath>,
    /// Those of them that were removed.
    removed: Vec<WrittenPath>,
}

impl Revert {
    /// Runs the command.
    pub fn run(&self) -> Result<()> {
        let target = Target::parse(&self.target)?;
        let leaf = image_of(&self.target).map_err(|error| of_that_name("revert", error))?;
        let entry = claims::registry()?.and_then(|registry| stop::find(&registry, &target).ok());
        let entry = entry.map(|listed| listed.entry);
        let plan = revert::plan(&leaf, &self.image, &self.answer.parents.search())?;
        if let Some(entry) = &entry {
            refuse(entry)?;
        }
        let is_kept = entry.as_ref().map_or(Ok(false), is_kept)?;
        let new = absolute(&self.new.clone().unwrap_or_else(|| revert::free_name(&plan.to)))?;
        make(&new, &plan, entry.as_ref().map_or(Sparse::Auto, |entry| entry.sparse))?;
        let device = entry.as_ref().map(|entry| exchange((entry, is_kept), &new, &plan)).transpose()?;
        warn_of_table(&leaf, &new, "given up");
        let (removed, kept) =
            if self.discard { revert::discard(&plan.given_up, &Claims) } else { (Vec::new(), None) };
        if let Some(kept) = &kept {
            tracing::warn!("what is given up stays from here on: {kept:#}");
        }
        self.print(&plan, &new, device.map(|ready| ready.device), &removed)
    }

    fn print(&self, plan: &Return, new: &Path, device: Option<PathBuf>, removed: &[PathBuf]) -> Result<()> {
        if self.answer.json {
            let written = |paths: &[PathBuf]| paths.iter().map(WrittenPath::of).collect();
            return output::print_json(&Answer {
                device,
                image: WrittenPath::of(new),
                parent: WrittenPath::of(&plan.to),
                given_up: written(&plan.given_up),
                removed: written(removed),
            });
        }
        let (new, to) = (new.display(), plan.to.display());
        output::print_line(&match device {
            Some(device) => format!("{} now serves {new}; its parent is {to}", device.display()),
            None => format!("{new} is made; its parent is {to}"),
        })?;
        for path in &plan.given_up {
            let what = if removed.contains(path) { "removed" } else { "given up, and kept" };
            output::print_line(&format!("{what}: {}", path.display()))?;
        }
        Ok(())
    }
}

/// Refuses a device that cannot be removed and added again as it was.
fn refuse(entry: &Entry) -> Result<()> {
    let device = entry.device.display();
    let unsupported = |message: &str, remedy: String| {
        Err(Error::new(Kind::Unsupported, format!("{device} {message}")).remedy(remedy))
    };
    if !entry.daemon.is_alive() {
        let message = format!("the daemon of {device} is not running");
        return Err(Error::new(Kind::NotFound, message).remedy(format!("vhdx-ublk recover {}", entry.id)));
    }
    if entry.read_only {
        return unsupported("is read-only: nothing was written", format!("vhdx-ublk del {}", entry.id));
    }
    if entry.for_mount || entry.private {
        return unsupported("belongs to a mount", "unmount it, and name the image".into());
    }
    if entry.notify_socket.is_some() {
        let image = shell(&entry.image);
        let remedy = format!(
            "stop the service, run this for {image}, and change the line of /etc/vhdxtab to the new image"
        );
        return unsupported("belongs to a service, which would serve its image again", remedy);
    }
    stop::refuse_used(entry)
}

/// Makes the new image, durably.
fn make(new: &Path, plan: &Return, sparse: Sparse) -> Result<()> {
    let leaf = plan.given_up.first().expect("something is given up");
    let mode = fs::metadata(leaf).doing("looking at the image").file(leaf)?;
    let mode = std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o666;
    let image = NewImage {
        virtual_size: 0,
        fixed: false,
        block_size: DEFAULT_BLOCK_SIZE,
        log_length: DEFAULT_LOG_LENGTH,
        logical_sector_size: 512,
        physical_sector_size: 4096,
        initial_state: InitialState::NotPresent,
        parent: None,
    };
    let (parent, mode) = (Some(plan.to.clone()), Some(mode));
    let creation = Creation { image: new.to_owned(), new: image, parent, mode, replace: false, sparse };
    creation.run(&Claims, create::remove_on_signals)
}

/// Whether a process serves the device again whenever its daemon dies. Waits while it does that.
fn is_kept(entry: &Entry) -> Result<bool> {
    Ok(Registry::open()?.hold_keeper(entry.id)?.is_some())
}

/// Removes the device, and has it serve the new image.
fn exchange((entry, is_kept): (&Entry, bool), new: &Path, plan: &Return) -> Result<Ready> {
    // Whoever reads this knows how to go on if the command is killed.
    tracing::info!("{} is made, a child of {}", new.display(), plan.to.display());
    let registry = Registry::open()?;
    let how = How { force: false, timeout: stop::DEFAULT_TIMEOUT };
    match stop::stop(&registry, entry, &how) {
        Err(error) if registry.entry(entry.id)?.is_some_and(|last| last.mark == entry.mark) => {
            // It serves its image as before.
            remove_new(new);
            return Err(error);
        }
        // What is given up was not closed cleanly.
        Err(error) => tracing::warn!("{error:#}"),
        Ok(()) => {}
    }
    let parents: Vec<&Path> = std::iter::once(&plan.to).chain(&plan.parents).map(PathBuf::as_path).collect();
    let ready = launch::launch(add::again(entry, new, &parents));
    let ready = ready.map_err(|error| {
        let name = entry.name.as_ref().map_or(String::new(), |name| format!(" --name {name}"));
        let (new, old) = (shell(new), shell(&entry.image));
        Error::new(
            error.kind(),
            format!("{} is removed, and not added again: {error:#}", entry.device.display()),
        )
        .remedy(format!(
            "`vhdx-ublk add{name} {new}` serves the new image, `vhdx-ublk add{name} {old}` the former one"
        ))
    })?;
    if is_kept {
        respawn::start(&ready)?;
    }
    Ok(ready)
}

/// Removes the image that was made, unless something has it open.
fn remove_new(new: &Path) {
    let removed = ImageFile::open(new, Access::ReadWrite, std::time::Duration::ZERO)
        .and_then(|_lock| fs::remove_file(new).doing("removing the image").file(new));
    if let Err(error) = removed {
        tracing::warn!("the new image is not removed: {error:#}");
    }
}
