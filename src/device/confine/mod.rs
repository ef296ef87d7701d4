//! What a daemon keeps of its caller's environment, and of root's privileges.
//!
//! It runs for months, reads files that other users made, and a disk waits for it. So it inherits as little
//! as possible, and has no privilege that it does not use.
//!
//! | what | what the daemon has | why |
//! |---|---|---|
//! | descriptors | its own, and the image's if that was passed | the caller's would stay open, and pipes would not end |
//! | environment | `KEPT_VARIABLES` | the rest may hold secrets, and is not used |
//! | directory | `/`, once it is ready | the caller's could not be unmounted |
//! | umask | 077 | the files that it makes are for root, unless it sets another mode |
//! | signals | as at boot, see `ending` | the caller may have ignored or blocked any |
//! | address space, data, CPU time, file size, locked memory | unlimited | the disk is lost when a limit is reached |
//! | number of descriptors | `DESCRIPTORS` | the longest chain needs them |
//! | core dumps | none, unless the administrator raises the soft limit (`prlimit`); never with buffers and sessions | they hold the disk's data |
//! | `oom_score_adj` | -1000 | the file systems on the disk would wait for a process that is gone |
//! | parent | it ends with its starter, until it has reported ready | no process would know of the device |
//! | `CAP_SYS_ADMIN` | the device's thread | control commands of the driver |
//! | `CAP_SYS_PTRACE` | the device's thread | finding the processes that have the device open |
//! | `CAP_DAC_OVERRIDE` | the device's and the engine's thread | images of other users, and a snapshot's folder |
//! | `CAP_CHOWN`, `CAP_FOWNER` | the engine's thread | a snapshot gets the owner and mode of its parent; access times stay |
//! | `CAP_SYS_RESOURCE`, `CAP_IPC_LOCK` | every thread | space that a file system reserves for root; memory that stays locked |
//! | other capabilities | none, also in the bounding, inheritable and ambient sets | |
//! | `no_new_privs` | set | |
//! | system calls | once the device is up: those in `filter` | it runs no program, makes no process, opens no socket |
//!
//! A system call that is not allowed fails with EPERM, and the kernel's audit logs it: a refused call is an
//! error like others, a killed daemon is a disk without a server. Operations of `io_uring` bypass such a
//! filter; the thread's capabilities bound what they can do.
//!
//! A failure here costs safety and not the device: it is a warning. In a container root may not be allowed
//! all of this.

use std::fmt::Display;
use std::fs;
use std::os::fd::RawFd;

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;
use seccompiler::BpfProgram;

use super::sys;
use crate::machine;

mod filter;

/// What a daemon keeps of the environment: what to log, and where a build that measures coverage writes it.
const KEPT_VARIABLES: [&str; 3] = ["RUST_LOG", "RUST_BACKTRACE", "LLVM_PROFILE_FILE"];

/// Their names.
pub(super) fn kept_variables() -> impl Iterator<Item = &'static str> {
    KEPT_VARIABLES.into_iter().chain(machine::VARIABLES)
}

/// Descriptors that a process may have: the longest chain has 256 images, with at most four each, and a
/// device has at most 64 queues, with at most nine each.
const DESCRIPTORS: rlim_t = 4096;

/// Limits at which a daemon would be killed, or its disk would fail.
const UNLIMITED: [Resource; 5] = [
    Resource::RLIMIT_AS,
    Resource::RLIMIT_DATA,
    Resource::RLIMIT_CPU,
    Resource::RLIMIT_FSIZE,
    Resource::RLIMIT_MEMLOCK,
];

/// The mode bits that are cleared, so that only root may use a new file.
const UMASK: Mode = Mode::from_bits_truncate(0o077);

/// The kernel does not kill this process when memory runs out.
const OOM_SCORE_ADJ: &str = "-1000";

/// The task of a thread, which decides its privileges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Brings a device up.
    Starting,
    /// Talks to the driver, and finds the users of the device.
    Device,
    /// Writes the image, and makes the next one.
    Engine,
    /// Carries data, or talks to other processes.
    Plain,
}

impl Role {
    fn capabilities(self) -> &'static [Capability] {
        use Capability::{
            CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_SYS_NICE,
            CAP_SYS_PTRACE, CAP_SYS_RESOURCE,
        };
        match self {
            Self::Starting => &[
                CAP_CHOWN,
                CAP_DAC_OVERRIDE,
                CAP_FOWNER,
                CAP_IPC_LOCK,
                CAP_SYS_ADMIN,
                CAP_SYS_NICE,
                CAP_SYS_PTRACE,
                CAP_SYS_RESOURCE,
            ],
            Self::Device => {
                &[CAP_DAC_OVERRIDE, CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_SYS_RESOURCE]
            }
            Self::Engine => &[CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_IPC_LOCK, CAP_SYS_RESOURCE],
            Self::Plain => &[CAP_IPC_LOCK, CAP_SYS_RESOURCE],
        }
    }
}

/// Lets this process have as many descriptors as the longest chain needs, as far as its hard limit goes.
/// Every command opens chains.
pub fn raise_descriptors() {
    if let Err(errno) = raise(Resource::RLIMIT_NOFILE, DESCRIPTORS) {
        tracing::debug!("long chains may need more descriptors than this process can have: {errno}");
    }
}

/// Has this process get memory without I/O, as do the threads and processes that it starts. For those that
/// serve a disk, or help one to be served again: memory may lie on that disk, as with a swap area, and a
/// process that waited for it would wait for itself.
pub fn get_memory_without_io() {
    if geteuid().is_root() {
        warn_unless("getting memory without I/O", sys::become_io_flusher());
    }
}

/// Makes this process one that serves a device. It has one thread, and only the first three descriptors and
/// `kept` open.
pub fn detach(kept: Option<RawFd>) {
    warn_unless("closing the caller's descriptors", sys::close_descriptors(kept));
    prepare();
}

/// The same for a process that serves a device in the foreground: its descriptors are what the user gave it.
pub fn prepare() {
    if !geteuid().is_root() {
        return; // it cannot serve, and fails where it tries
    }
    get_memory_without_io();
    umask(UMASK);
    warn_unless("resetting signals", sys::reset_signals());
    for resource in UNLIMITED {
        warn_unless("lifting a limit", raise(resource, RLIM_INFINITY));
    }
    let cores = getrlimit(Resource::RLIMIT_CORE);
    warn_unless("ruling out cores", cores.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_CORE, 0, hard)));
    warn_unless("staying when memory runs out", fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ));
    warn_unless("ruling out new privileges", prctl::set_no_new_privs());
    warn_unless("giving up the bounding set", bound(Role::Starting));
    become_(Role::Starting);
}

/// Reduces the privileges of the calling thread, and of those that it starts, to what `role` needs.
pub(super) fn become_(role: Role) {
    if geteuid().is_root() {
        warn_unless("giving up capabilities", narrow(role));
    }
}

/// Whether the calling thread has `CAP_SYS_ADMIN`.
pub(super) fn is_admin() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_ADMIN).unwrap_or(true)
}

/// Reduces the system calls of the process to those that serving needs. Binds every thread, now and later.
pub(super) fn seal() {
    let sealed = filter::programs().and_then(|programs| {
        let install = |program: &BpfProgram| sys::install_filter(program).map_err(|error| error.to_string());
        programs.iter().try_for_each(install)
    });
    warn_unless("giving up system calls", sealed);
}

fn warn_unless<T, E: Display>(doing: &str, outcome: Result<T, E>) {
    if let Err(error) = outcome {
        tracing::warn!("the daemon is less protected than it could be: {doing}: {error:#}");
    }
}

/// Raises a soft limit to `wanted`, and the hard one where it has to be and can be.
fn raise(resource: Resource, wanted: rlim_t) -> nix::Result<()> {
    let (soft, hard) = getrlimit(resource)?;
    if soft >= wanted {
        return Ok(());
    }
    setrlimit(resource, wanted, hard.max(wanted))
        .or_else(|errno| setrlimit(resource, hard, hard).and(Err(errno)))
}

/// Reduces the bounding set: what a thread can ever gain.
fn bound(role: Role) -> Result<(), caps::errors::CapsError> {
    for capability in caps::runtime::thread_all_supported() {
        if !role.capabilities().contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    Ok(())
}

fn narrow(role: Role) -> Result<(), caps::errors::CapsError> {
    let had = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet =
        role.capabilities().iter().copied().filter(|capability| had.contains(capability)).collect();
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::device::registry::{Registry, entry};
    use crate::device::testing::Bench;

    fn permitted() -> CapsHashSet {
        caps::read(None, CapSet::Permitted).expect("every thread has a set")
    }

    /// Capabilities belong to a thread: the tests beside this one keep theirs.
    #[test]
    fn a_thread_keeps_what_its_role_needs_and_gets_nothing_back() {
        thread::spawn(|| {
            let before = permitted();
            for role in [Role::Starting, Role::Engine, Role::Plain] {
                narrow(role).expect("any thread may give up privileges");
                let may: CapsHashSet = role.capabilities().iter().copied().collect();
                assert!(permitted().is_subset(&may) && permitted().is_subset(&before), "{role:?}");
                let effective = caps::read(None, CapSet::Effective).expect("every thread has a set");
                assert_eq!(effective, permitted());
            }
            narrow(Role::Starting).expect("a lost capability is not requested");
            assert!(!permitted().contains(&Capability::CAP_SYS_ADMIN));
        })
        .join()
        .expect("it does not panic");
    }

    #[test]
    fn every_role_has_no_more_than_the_start() {
        let start = Role::Starting.capabilities();
        for role in [Role::Device, Role::Engine, Role::Plain] {
            assert!(role.capabilities().iter().all(|capability| start.contains(capability)), "{role:?}");
        }
    }

    /// A filter without TSYNC binds the thread that installs it, and no other test.
    #[test]
    fn under_the_filter_a_daemon_works_and_programs_cannot_be_run() {
        let (bench, folder) = (Bench::new(), tempfile::tempdir().expect("a temporary folder"));
        thread::spawn(move || {
            prctl::set_no_new_privs().expect("any process may");
            for program in filter::programs().expect("this machine is known") {
                seccompiler::apply_filter(&program).expect("the kernel takes it");
            }
            let other = thread::spawn(|| fs::read_to_string("/proc/self/comm").is_ok());
            assert!(other.join().expect("it does not panic"), "a thread reads a file");
            let registry = Registry::at(&folder.path().join("run")).expect("a directory is made");
            registry.write(&entry(1)).expect("an entry is written");
            registry.write(&entry(1)).expect("an entry is replaced");
            bench.file().memory_alignment(512).expect("a file is examined");
            let child = std::process::Command::new("/proc/self/exe").spawn();
            let refused = child.expect_err("no process is made").raw_os_error();
            assert_eq!(refused, Some(libc::EPERM));
            let socket = std::os::unix::net::UnixStream::pair().expect_err("no socket is made");
            assert_eq!(socket.raw_os_error(), Some(libc::EPERM));
        })
        .join()
        .expect("it does not panic");
    }

    #[test]
    fn the_soft_limit_follows_what_a_chain_needs_as_far_as_the_hard_one_goes() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("every process has one");
        let _ = raise(Resource::RLIMIT_NOFILE, DESCRIPTORS);
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).expect("every process has one");
        assert!(soft >= DESCRIPTORS.min(hard));
    }
}
