//! `mount.vhdx` and `umount.vhdx`: what mount(8) and umount(8) run for images.
//!
//! The program under these names takes the arguments that mount(8) documents for its helpers, and ends with
//! its exit statuses.

use std::ffi::OsString;
use std::path::PathBuf;

use vhdx_ublk::error::{Kind, Result};
use vhdx_ublk::system::mount::{self, MountOptions, MountRequest, UnmountRequest};

/// Exit statuses of mount(8).
pub const WRONG_USAGE: u8 = 1;
/// The file system was not mounted, or not unmounted.
pub const FAILURE: u8 = 32;

/// The type of this program's mounts; the type of the inner file system may follow: `vhdx.ntfs3`.
const TYPE: &str = "vhdx";

/// Mount the file system of an image: what mount(8) runs for `mount -t vhdx`.
#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of mount(8)")]
pub struct MountHelper {
    /// The VHDX file
    image: PathBuf,
    /// The folder on which to mount it
    folder: PathBuf,
    /// Options, as `vhdx-ublk mount --help` lists them
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Ignore options that the file system does not know
    #[arg(short)]
    sloppy: bool,
    /// Only examine the command line
    #[arg(short)]
    fake: bool,
    /// Do not record the mount in /run/mount/utab
    #[arg(short)]
    no_record: bool,
    /// Read-only, as -o ro
    #[arg(short)]
    read_only: bool,
    /// Writable, as -o rw
    #[arg(short = 'w', conflicts_with = "read_only")]
    writable: bool,
    /// The type: vhdx, or vhdx.TYPE for a certain inner file system
    #[arg(short = 't', value_name = "TYPE")]
    kind: Option<String>,
    /// The mount namespace
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<OsString>,
}

impl MountHelper {
    /// Runs the command.
    pub fn run(self, verbose: bool) -> Result<()> {
        let mut options = MountOptions::parse(&self.options.join(","))?;
        options.read_only = (options.read_only || self.read_only) && !self.writable || options.only_reads();
        if self.fake {
            return Ok(());
        }
        let given = [(self.sloppy, "-s"), (self.no_record, "-n"), (verbose, "-v")];
        let request = MountRequest {
            image: self.image,
            folder: self.folder,
            kind: self.kind.as_deref().and_then(inner_kind).map(str::to_owned),
            options,
            flags: flags(&given, self.namespace),
        };
        match super::mount::run(&request) {
            Err(error) if error.kind() == Kind::NotFound && request.is_missing() => Ok(()),
            outcome => outcome.map(drop),
        }
    }
}

/// Unmount the file system of an image: what umount(8) runs for one that `mount.vhdx` has mounted.
#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of mount(8)")]
pub struct UmountHelper {
    /// Where it is mounted
    folder: PathBuf,
    /// Do not remove the mount from /run/mount/utab
    #[arg(short)]
    no_record: bool,
    /// Detach it now, and unmount it when it is no longer in use
    #[arg(short)]
    lazy: bool,
    /// Unmount it even if its storage cannot be reached
    #[arg(short)]
    force: bool,
    /// If it cannot be unmounted, make it read-only
    #[arg(short)]
    read_only: bool,
    /// The type; it is not needed
    #[arg(short = 't', value_name = "TYPE")]
    kind: Option<String>,
    /// The mount namespace
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<OsString>,
}

impl UmountHelper {
    /// Runs the command.
    pub fn run(self, verbose: bool) -> Result<()> {
        let given = [(self.no_record, "-n"), (self.force, "-f"), (self.read_only, "-r"), (verbose, "-v")];
        let flags = flags(&given, self.namespace);
        mount::unmount(&UnmountRequest { folder: self.folder, lazy: self.lazy, flags })
    }
}

/// The type of the inner file system in `vhdx.TYPE`.
fn inner_kind(kind: &str) -> Option<&str> {
    kind.strip_prefix(TYPE)?.strip_prefix('.').filter(|inner| !inner.is_empty())
}

/// The options for the inner program.
fn flags(given: &[(bool, &str)], namespace: Option<OsString>) -> Vec<OsString> {
    let mut flags: Vec<OsString> =
        given.iter().filter(|(is_given, _)| *is_given).map(|(_, flag)| flag.into()).collect();
    if let Some(namespace) = namespace {
        flags.extend(["-N".into(), namespace]);
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_names_the_inner_file_system_or_none() {
        assert_eq!(inner_kind("vhdx.ntfs3"), Some("ntfs3"));
        for kind in ["vhdx", "vhdx.", "ntfs3", "vhdxntfs"] {
            assert_eq!(inner_kind(kind), None, "{kind}");
        }
    }
}
