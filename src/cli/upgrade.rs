//! `upgrade`: has another program serve devices that are in use.

use std::ffi::OsString;
use std::path::PathBuf;

use vhdx_ublk::device::claims;
use vhdx_ublk::device::confine;
use vhdx_ublk::device::launch::{Lives, Program};
use vhdx_ublk::device::private_mounts;
use vhdx_ublk::device::registry::{Listed, Registry, State};
use vhdx_ublk::device::spec::Ready;
use vhdx_ublk::device::stop::Target;
use vhdx_ublk::device::upgrade::{
    Exchange, Formats, Successor, TakenOver, Upgraded, join_service, leave_requests,
};
use vhdx_ublk::error::{Doing, Error, Kind, Locate, Result};

use super::{add, detached, output, recover};

/// Replace the program that serves devices with this one, while they are in use.
///
/// Mounted file systems stay mounted. Requests wait for some milliseconds, and none fails. If the new
/// program cannot take a device over, the old one continues to serve it.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own on the command line")]
pub struct Upgrade {
    /// The device: its number, its name, /dev/ublkbN or a partition of it, or the path of its image
    #[arg(required_unless_present_any = ["all", "formats"], conflicts_with = "all")]
    target: Vec<OsString>,
    /// Upgrade all devices that are served, but for those that another command has made for itself
    #[arg(short, long)]
    all: bool,
    /// The program that serves the devices from then on [default: this one]
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// As JSON: an array of objects, errors too
    #[arg(long)]
    pub json: bool,
    /// Print which formats this program reads
    #[arg(long, hide = true, conflicts_with_all = ["all", "target", "binary"])]
    formats: bool,
    /// This process is the new daemon
    #[arg(long, hide = true, conflicts_with_all = ["all", "binary"])]
    serve: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk upgrade --all
  vhdx-ublk upgrade /dev/ublkb0 --binary /usr/local/sbin/vhdx-ublk.new

The new program is examined first: if it does not read the session of a device, that device stays
with its program. `vhdx-ublk list` shows the version that serves each device. Devices that were
added with --recovery fail or none are refused; so are those with --recovery queue before Linux
6.16, and those with an image or a parent on SMB. The new daemon runs in the background, even if
the device was added with --foreground.
JSON: id, device, from, to (versions), pause_us (how long requests waited at most).
Exit status: 0 the program serves all of the devices, 1 it does not serve some of them (the error
states which program does), 2 wrong usage.";

impl Upgrade {
    /// Runs the command. Every target is tried; the last failure is returned, earlier ones are reported at
    /// once.
    pub fn run(self) -> Result<()> {
        if self.formats {
            return output::print(
                &serde_json::to_string(&Formats::ours()).doing("writing the output as JSON")?,
            );
        }
        if self.serve {
            return detached::run(None, Lives::OnItsOwn, |ready| self.serve(ready));
        }
        let Some(registry) = claims::registry()? else { return self.none() };
        confine::get_memory_without_io();
        let exchange = self.exchange()?;
        let _alone = registry.lock_upgrades()?;
        let mut upgraded: Vec<Upgraded> = Vec::new();
        let outcomes: Vec<Result<()>> = self
            .targets()?
            .into_iter()
            .map(|listed| {
                let done = exchange.upgrade(&listed?)?;
                if !self.json {
                    output::print(&describe(&done))?;
                }
                upgraded.push(done);
                Ok(())
            })
            .collect();
        output::last_failure(outcomes.into_iter())?;
        if self.json { output::print_json(&upgraded) } else { Ok(()) }
    }

    /// There are no devices.
    fn none(&self) -> Result<()> {
        match self.target.first() {
            Some(text) => Err(claims::no_devices(&Target::parse(text)?)),
            None if self.json => output::print_json(&Vec::<Upgraded>::new()),
            None => Ok(()),
        }
    }

    fn exchange(&self) -> Result<Exchange> {
        let words = |words: &[&str]| words.iter().map(Into::into).collect::<Vec<OsString>>();
        let (program, formats) = match &self.binary {
            None => (Program::this(), Formats::ours()),
            Some(path) => {
                let program = Program::at(path)?;
                let formats = Formats::of(&program, words(&["upgrade", "--formats"])).file(path)?;
                (program, formats)
            }
        };
        let (succeed, recover) = (words(&["upgrade", "--serve"]), words(&["recover", "--serve"]));
        Ok(Exchange { program, formats, succeed, recover })
    }

    fn targets(&self) -> Result<Vec<Result<Listed>>> {
        if self.all {
            return Ok(claims::devices()?.into_iter().filter(is_meant_by_all).map(Ok).collect());
        }
        let find = |text: &OsString| claims::find(&Target::parse(text)?);
        Ok(self.target.iter().map(find).collect())
    }

    /// In the new daemon.
    fn serve(&self, ready: impl FnOnce(&Ready) -> Result<()>) -> Result<()> {
        let [text] = &self.target[..] else {
            return Err(Error::new(Kind::Usage, "a daemon serves one device"));
        };
        let target = Target::parse(text)?;
        let registry = claims::registry()?.ok_or_else(|| claims::no_devices(&target))?;
        let listed = claims::find(&target)?;
        let taken_over = || {
            join_service(&listed.entry);
            prepare(&registry, &listed)?.take_over(&registry)
        };
        let served = taken_over().and_then(|taken_over| continue_to_serve(taken_over, ready));
        served.inspect_err(|_| leave_requests(&registry, &listed.entry))
    }
}

/// Makes this process ready to take over the device of `listed`.
///
/// # Errors
///
/// As [`Successor::prepare`].
pub fn prepare(registry: &Registry, listed: &Listed) -> Result<Successor> {
    if listed.entry.private_mounts {
        private_mounts::leave()?;
    }
    Successor::prepare(registry, listed, add::open_locked)
}

/// Serves a device that was taken over.
///
/// # Errors
///
/// Whatever prevented it, or kept the image from being closed cleanly.
pub fn continue_to_serve(taken_over: TakenOver, ready: impl FnOnce(&Ready) -> Result<()>) -> Result<()> {
    let TakenOver { entry, image, parents, room, spare, pause } = taken_over;
    let ready = |served: &Ready| {
        drop(parents);
        ready(&Ready { pause_us: Some(pause.until_now_us()?), ..served.clone() })
    };
    recover::serve_image(&entry, (image, room, spare), false, ready)
}

/// Whether it is served, and not for a command alone that ends with it, such as `compact --trim`.
fn is_meant_by_all(listed: &Listed) -> bool {
    listed.state == State::Live && !listed.is_abandoned() && !listed.entry.private
}

fn describe(Upgraded { device, from, to, pause_us, .. }: &Upgraded) -> String {
    let pause = pause_us.div_ceil(1000);
    format!("{}: vhdx-ublk {from} -> {to} (pause: {pause} ms)", device.display())
}
