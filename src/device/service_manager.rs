//! The service manager (systemd) that has started a daemon, and watches the process that it knows.
//!
//! When another process continues to serve the device, the manager must watch that one, as it would take the
//! end of this one for the end of the service. The message must come from the process that it watches, which
//! may make no socket by then: so the socket is made early. If that process has ended without such a message,
//! any process of the service may send one, where its unit allows that (`NotifyAccess=all`).

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The variable by which a manager names its socket.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// Where the kernel has the groups of processes, one folder each.
const CONTROL_GROUPS: &str = "/sys/fs/cgroup";

/// See the module's head.
pub(super) struct ServiceManager(UnixDatagram);

impl ServiceManager {
    /// The socket of the manager that has started this process, if one has.
    pub(super) fn socket() -> Option<String> {
        std::env::var(VARIABLE).ok()
    }

    /// The manager that listens at `socket`: a path, or an abstract name behind `@`.
    pub(super) fn connect(socket: &str) -> io::Result<Self> {
        let address = match socket.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(socket)?,
        };
        let datagrams = UnixDatagram::unbound()?;
        datagrams.connect_addr(&address)?;
        datagrams.set_nonblocking(true)?;
        Ok(Self(datagrams))
    }

    /// Has the manager watch the process `pid` instead of this one.
    pub(super) fn announce(&self, pid: u32) -> io::Result<()> {
        self.0.send(format!("MAINPID={pid}").as_bytes()).map(drop)
    }

    /// Has the manager wait for `time` from now on, if it would wait for less: it stops the service.
    pub(super) fn ask_for_time(&self, time: Duration) -> io::Result<()> {
        self.0.send(format!("EXTEND_TIMEOUT_USEC={}", time.as_micros()).as_bytes()).map(drop)
    }
}

/// This process in the control group of another one. It goes back when this is dropped.
pub(super) struct GroupVisit(Option<PathBuf>);

impl GroupVisit {
    /// Moves this process to the control group of process `pid`: what it starts there ends and is limited
    /// with the service that it continues, and the service is not over while its daemons change.
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        let group = |process: &str| fs::read(format!("/proc/{process}/cgroup"));
        let (theirs, ours) = (group(&pid.to_string())?, group("self")?);
        match (folder(&theirs), folder(&ours)) {
            (Some(folder), home) if theirs != ours => enter(&folder).map(|()| Self(home)),
            _ => Ok(Self(None)),
        }
    }

    /// Stays there.
    pub(super) fn stay(mut self) {
        self.0 = None;
    }
}

impl Drop for GroupVisit {
    fn drop(&mut self) {
        if let Some(home) = &self.0
            && let Err(error) = enter(home)
        {
            tracing::debug!("this process stays in the control group of a daemon: {error}");
        }
    }
}

/// Whether the process `pid` is in another control group than this one.
pub fn is_elsewhere(pid: u32) -> bool {
    let group = |process: &str| fs::read(format!("/proc/{process}/cgroup")).ok();
    group(&pid.to_string()) != group("self")
}

fn enter(folder: &Path) -> io::Result<()> {
    fs::write(folder.join("cgroup.procs"), "0")
}

/// The folder of the group in the text of a `/proc/PID/cgroup`; none if it is not visible here.
fn folder(text: &[u8]) -> Option<PathBuf> {
    let mut lines = text.split(|&byte| byte == b'\n');
    let path = lines.find_map(|line| line.strip_prefix(b"0::/"))?;
    let is_visible = path != b".." && !path.starts_with(b"../");
    is_visible.then(|| Path::new(CONTROL_GROUPS).join(OsStr::from_bytes(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_learns_which_process_continues() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("free");
        let name = path.to_str().expect("an ordinary name");
        ServiceManager::connect(name).expect("it listens").announce(1234).expect("room");
        let name = format!("vhdx-ublk-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let abstract_socket = UnixDatagram::bind_addr(&address).expect("free");
        let manager = ServiceManager::connect(&format!("@{name}")).expect("it listens");
        manager.announce(5678).expect("room");
        manager.ask_for_time(Duration::from_secs(2)).expect("room");
        let time = "EXTEND_TIMEOUT_USEC=2000000";
        let sent = [(&socket, "MAINPID=1234"), (&abstract_socket, "MAINPID=5678"), (&abstract_socket, time)];
        for (socket, expected) in sent {
            let mut text = [0; 64];
            let length = socket.recv(&mut text).expect("it was sent");
            assert_eq!(&text[..length], expected.as_bytes());
        }
        assert!(ServiceManager::connect("vsock:2:1234").is_err());
    }

    #[test]
    fn the_folder_of_a_group_lies_below_all_groups() {
        let found = folder(b"1:cpu:/x\n0::/system.slice/vhdx-ublk@data.service\n");
        let expected = "/sys/fs/cgroup/system.slice/vhdx-ublk@data.service";
        assert_eq!(found.as_deref(), Some(Path::new(expected)));
        assert_eq!(folder(b"0::/\n").as_deref(), Some(Path::new("/sys/fs/cgroup/")));
        for hidden in [&b"0::/../../other"[..], b"0::/..", b"1:cpu:/x\n", b""] {
            assert_eq!(folder(hidden), None);
        }
    }
}
