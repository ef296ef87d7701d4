//! `recover`: goes on serving devices whose daemon was killed.

use std::ffi::OsString;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vhdx_ublk::device::daemon::{self, Ready};
use vhdx_ublk::device::engine_thread::EngineThread;
use vhdx_ublk::device::launch;
use vhdx_ublk::device::layers::Parents;
use vhdx_ublk::device::opened::{NoEngine, Opened};
use vhdx_ublk::device::registry::{Entry, FileId, Listed, State};
use vhdx_ublk::device::session::Plan;
use vhdx_ublk::device::stop::Target;
use vhdx_ublk::disk::{Access, ImageFile};
use vhdx_ublk::error::{Error, Kind, Result};

use super::{add, detached, holders, output};

/// How long a killed daemon may take to be gone.
const END_WAIT: Duration = Duration::from_secs(2);

/// Go on serving devices whose daemon was killed.
///
/// Everything that was acknowledged is there, flushed or not, and the I/O that waited goes on. Prints the
/// devices' paths.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Recover {
    /// The device: its number, /dev/ublkbN, or the path of its image
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    target: Vec<OsString>,
    /// All devices of this program whose daemon was killed
    #[arg(short, long)]
    all: bool,
    /// If what the daemon left does not fit the image, go on with what was flushed: a mounted file system may
    /// be damaged by that
    #[arg(long)]
    accept_loss: bool,
    /// This is the child
    #[arg(long, hide = true, conflicts_with = "all")]
    serve: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk recover /dev/ublkb0
  vhdx-ublk recover --all

Exit status: 0 all of them are served again, 1 some are not (they wait on), 2 wrong usage.";

impl Recover {
    /// Runs the command. Every target is tried; the last failure is returned, earlier ones are told at once.
    pub fn run(self) -> Result<()> {
        if self.serve {
            return detached::run(|ready| self.serve(ready));
        }
        let targets = self.targets()?.into_iter();
        output::last_failure(targets.map(|listed| self.recover(&listed?)))
    }

    fn targets(&self) -> Result<Vec<Result<Listed>>> {
        if self.all {
            return Ok(holders::devices()?.into_iter().filter(Listed::is_abandoned).map(Ok).collect());
        }
        Ok(self.target.iter().map(|text| holders::find(&Target::parse(text))).collect())
    }

    /// Has a daemon of its own take the device over.
    fn recover(&self, listed: &Listed) -> Result<()> {
        await_end(listed);
        let mut arguments: Vec<OsString> = vec!["recover".into(), "--serve".into()];
        arguments.extend(self.accept_loss.then(|| "--accept-loss".into()));
        arguments.extend(["--".into(), listed.entry.id.to_string().into()]);
        let ready = launch::launch(arguments)?;
        output::print(&ready.device.display().to_string())
    }

    fn serve(&self, ready: impl FnOnce(&Ready) -> Result<()>) -> Result<()> {
        let [text] = &self.target[..] else { return Err(Error::new(Kind::Usage, "one device per daemon")) };
        let listed = holders::find(&Target::parse(text))?;
        refuse_served(&listed)?;
        let entry = &listed.entry;
        let parents = Parents::of_device(entry, |path| add::open_locked(path, Access::ReadOnly));
        if entry.read_only {
            let file = Arc::new(open(entry, Access::ReadOnly)?);
            refuse_changed(entry)?;
            let opened = Opened::read_only(file.clone(), &parents)?;
            if opened.file_write_guid != entry.file_write_guid && !self.accept_loss {
                return Err(changed(entry));
            }
            return daemon::recover(&opened.served(&file)?, entry, |ends| Ok(NoEngine(ends)), ready);
        }
        let file = Arc::new(open(entry, Access::ReadWrite)?);
        refuse_changed(entry)?;
        let engine =
            EngineThread::open(file.clone(), Plan::Resume { accept_loss: self.accept_loss }, parents)?;
        let served = engine.opened().served(&file)?;
        daemon::recover(&served, entry, |ends| Ok(engine.start(ends)), ready)
    }
}

/// Waits a little for the end of a daemon that was killed a moment ago and is not gone yet.
fn await_end(listed: &Listed) {
    let until = Instant::now() + END_WAIT;
    while listed.entry.daemon.is_alive() && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
}

fn refuse_served(listed: &Listed) -> Result<()> {
    if listed.is_abandoned() {
        return Ok(());
    }
    let device = listed.entry.device.display();
    let error = match listed.state {
        State::Dead | State::Failed => {
            let image = listed.entry.image.display();
            Error::new(Kind::Unsupported, format!("{device} cannot be recovered: its I/O has failed already"))
                .remedy(format!("`vhdx-ublk del {device}`, then `vhdx-ublk add {image}`"))
        }
        _ => Error::new(Kind::Usage, format!("{device} has a daemon: there is nothing to recover"))
            .remedy("vhdx-ublk list"),
    };
    Err(error)
}

/// Opens and locks the device's image, which must be the file it was.
fn open(entry: &Entry, access: Access) -> Result<ImageFile> {
    let file = add::open_locked(&entry.image, access)?;
    if FileId::of_image(&file)? != entry.image_file {
        let message = format!("this is not the file that {} was made of", entry.device.display());
        return Err(Error::new(Kind::NotFound, message)
            .file(&entry.image)
            .remedy("move the image back to its place"));
    }
    Ok(file)
}

/// Between the look at the device and the lock on its image a snapshot may have changed that.
fn refuse_changed(entry: &Entry) -> Result<()> {
    let now = holders::find(&Target::Id(entry.id))?.entry;
    if now.image_file == entry.image_file && now.mark == entry.mark {
        return Ok(());
    }
    let message = format!("another image is served as {} since a moment ago", entry.device.display());
    Err(Error::new(Kind::InUse, message).remedy("run the command again"))
}

fn changed(entry: &Entry) -> Error {
    let message = "somebody has written the image since the daemon was killed";
    Error::new(Kind::NotFound, message).file(&entry.image).remedy(
        "`vhdx-ublk del` takes the device away; `vhdx-ublk recover --accept-loss` serves the image as it is now",
    )
}
