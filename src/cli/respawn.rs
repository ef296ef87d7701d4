//! `respawn`: serves a device again whenever its daemon dies. `add --respawn` starts it.

use std::ffi::OsString;

use vhdx_ublk::device::launch::{self, Lives};
use vhdx_ublk::device::registry::Registry;
use vhdx_ublk::device::respawn::{ATTEMPTS, Keeper};
use vhdx_ublk::device::spec::Ready;
use vhdx_ublk::device::stop::{self, Target};
use vhdx_ublk::error::Result;

use super::detached;

/// Serve a device again whenever its daemon dies.
#[derive(clap::Args)]
pub struct Respawn {
    /// The N of /dev/ublkbN
    id: u32,
    /// Which device of this number it is
    #[arg(long)]
    mark: u64,
    /// How many failures in a row are one too many
    #[arg(long, default_value_t = ATTEMPTS)]
    attempts: u32,
}

impl Respawn {
    /// Runs the command.
    pub fn run(&self) -> Result<()> {
        let recover = ["recover", "--serve"].map(Into::into).into();
        let Self { id, mark, attempts } = *self;
        detached::run(None, Lives::OnItsOwn, |ready| {
            let keeper = Keeper { registry: Registry::open()?, id, mark, recover, attempts };
            keeper.begin()?;
            ready(&keeper.ready())?;
            keeper.keep()
        })
    }
}

/// Starts the process that serves the device of `ready` again.
///
/// # Errors
///
/// If the device cannot be recovered; whatever keeps the process from beginning.
pub fn start(ready: &Ready) -> Result<()> {
    let entry = stop::find(&Registry::open()?, &Target::Id(ready.id))?.entry;
    Keeper::refuse_unrecoverable(&entry)?;
    let words = ["respawn".into(), format!("--mark={}", entry.mark), "--".into(), ready.id.to_string()];
    launch::launch(words.map(OsString::from)).map(drop)
}
