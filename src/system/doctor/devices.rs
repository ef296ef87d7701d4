//! What this program has left on the machine: daemons of another version, sessions without a device.

use std::fs;
use std::path::Path;

use super::finding::Finding;
use crate::device::claims;
use crate::device::registry::Listed;
use crate::device::session::{self, Kept, KeptState};

/// All checks. Only root may look at devices: others get nothing here.
pub(super) fn checks() -> Vec<Finding> {
    if !nix::unistd::geteuid().is_root() {
        return Vec::new();
    }
    let daemons = claims::devices().map(|devices| daemons(&devices));
    let daemons = daemons.unwrap_or_else(|error| Finding::failed("daemons", &error, "vhdx-ublk list"));
    let sessions = session::kept().map(|kept| sessions(&kept));
    let sessions =
        sessions.unwrap_or_else(|error| Finding::failed("sessions", &error, "vhdx-ublk session list"));
    vec![daemons, sessions]
}

/// Whether the daemons run this program, as it is on the disk.
fn daemons(devices: &[Listed]) -> Finding {
    const CHECK: &str = "daemons";
    let living: Vec<&Listed> = devices.iter().filter(|listed| listed.entry.daemon.is_alive()).collect();
    let program =
        |listed: &Listed| fs::read_link(format!("/proc/{}/exe", listed.entry.daemon.pid)).unwrap_or_default();
    let old = living.iter().filter(|listed| is_old(&listed.entry.version, &program(listed)));
    let old: Vec<String> = old.map(|listed| listed.entry.device.display().to_string()).collect();
    if old.is_empty() {
        let found = match living.len() {
            0 => "none is running".into(),
            1 => "one, of this version".into(),
            count => format!("{count}, all of this version"),
        };
        return Finding::fine(CHECK, found);
    }
    let found = format!("{} are served by a program that has been replaced since", old.join(", "));
    let remedy = format!("vhdx-ublk upgrade {}", old.join(" "));
    Finding::wrong(CHECK, found, remedy)
}

/// Whether a daemon of this `version`, whose program the kernel shows as `program`, is older than this one.
fn is_old(version: &str, program: &Path) -> bool {
    version != env!("CARGO_PKG_VERSION") || program.to_string_lossy().ends_with(" (deleted)")
}

/// Whether sessions wait for somebody.
fn sessions(kept: &[Kept]) -> Finding {
    const CHECK: &str = "sessions";
    let orphans: Vec<&Kept> = kept.iter().filter(|kept| kept.state != KeptState::Live).collect();
    let [first, ..] = &orphans[..] else {
        let found = match kept.len() {
            0 => "none".into(),
            1 => "one, in use by a daemon".into(),
            count => format!("{count}, each in use by a daemon"),
        };
        return Finding::fine(CHECK, found);
    };
    let image = first.image.as_deref().map_or("an unknown image".into(), |image| image.display().to_string());
    let found = format!("{} have no daemon, of {image} for example", orphans.len());
    let remedy =
        "`vhdx-ublk list` and `vhdx-ublk session list` show them: `recover` the device, or `add` the image";
    Finding::wrong(CHECK, found, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_old_if_its_program_was_replaced() {
        let this = env!("CARGO_PKG_VERSION");
        assert!(!is_old(this, Path::new("/usr/sbin/vhdx-ublk")) && !is_old(this, Path::new("")));
        assert!(is_old(this, Path::new("/usr/sbin/vhdx-ublk (deleted)")));
        assert!(is_old("0.0.1", Path::new("/usr/sbin/vhdx-ublk")));
    }

    #[test]
    fn only_sessions_without_a_daemon_are_reported() {
        let kept = |state| Kept {
            name: "1-2".into(),
            state,
            image: Some("/disks/a.vhdx".into()),
            file: (1, 2),
            memory_bytes: 4096,
            version: None,
        };
        assert!(sessions(&[]).fine && sessions(&[kept(KeptState::Live)]).fine);
        for state in [KeptState::Orphan, KeptState::Poisoned, KeptState::Damaged] {
            let found = sessions(&[kept(KeptState::Live), kept(state)]);
            assert!(!found.fine && found.found.contains("1 have no daemon, of /disks/a.vhdx"), "{found:?}");
        }
        assert!(daemons(&[]).fine);
    }
}
