//! A Linux block device whose blocks live in a VHDX file.
//!
//! `vhdx-ublk add disk.vhdx` starts a daemon that serves the image as `/dev/ublkbN`. This page is the way
//! into its code; [`design`] has the reasons, and [`guide`] is for users.
//!
//! # The house
//!
//! Each floor uses only those below it.
//!
//! ```text
//!   cli          one file for each command (in the program, not in this library)
//!   system       file systems on devices, boot, names       the machine around the devices
//!   device       ublk, threads, the daemon's life, /run     who serves
//!   operations   what is done to images beside serving      who changes files at rest
//!   engine       Front and Engine                           requests, blocks, the log, what must be durable
//!   chain        parents found and recognised               several images
//!   image        geometry, block map, space, replay         one image
//!   disk         io_uring, locks, direct I/O                one file
//!   format       structures, checked and laid out           bytes
//!   machine, atomic, simulation, error, printable           used by all of them
//! ```
//!
//! * [`printable`]: text from elsewhere, made fit to be shown;
//! * [`error`]: the one error type;
//! * [`simulation`]: switches for the crash tests, constants in every other build;
//! * [`atomic`]: the words that threads share, the standard library's in every build but that of one test;
//! * [`machine`]: the clock, and what a process waits for; in one test, the test's;
//! * [`mod@format`]: the bytes of a VHDX file, both ways, no I/O;
//! * [`disk`]: the seam under the engine, and its `io_uring` implementation;
//! * [`image`]: an opened image: geometry, block map, log replay;
//! * [`chain`]: the parents of a differencing image;
//! * [`engine`]: the live writer, and the front that serves one queue;
//! * [`operations`]: what is done to images beside serving them;
//! * [`device`]: ublk: control commands, queue loops, the daemon's life cycle;
//! * [`system`]: the machine around the devices.
//!
//! # One write, from the kernel to the file
//!
//! A guest writes 4096 bytes to `/dev/ublkb0`. The kernel completes the command by which a queue has offered
//! a tag, and the queue's thread wakes in its `io_uring_enter`.
//!
//! 1. `device/queue/ring` copies the request's descriptor, checks it, and makes an [`engine::front::Request`]
//!    of it.
//! 2. `device/queue/thread` gives that to the queue's [`engine::front::Front`].
//! 3. The front finds the session open (otherwise it asks the engine to open it), splits the range at block
//!    borders and looks each block up in the [`image::BlockMap`]: one atomic load.
//!
//! **A hit**: the block has space.
//!
//! 4. The front submits one write at the file offset through its [`engine::port::Port`].
//! 5. `device/queue/ring` pushes it, with everything else of the batch, and sleeps in the next
//!    `io_uring_enter`.
//! 6. The front takes the completion. A short write continues; a durable write that failed poisons the
//!    device.
//! 7. `device/queue/ring` reports the result and offers the tag again, by one command.
//!
//! No lock, no allocation, no other thread: `tests/simulator/hit_path.rs` holds the front to that.
//!
//! **A miss**: the block has no space. As a rule the engine has set some aside, which the front gives the
//! block itself (`engine/pool`); then it is a hit. Otherwise, or if the block needs content of its parents:
//!
//! 4. The front sends [`Ask::Allocate`](engine::message::Ask) through its mailbox. The tag waits; the queue
//!    serves others meanwhile.
//! 5. `device/engine_thread` wakes, because its ring reads the mailbox's eventfd, and starts a task of the
//!    [`engine::Engine`].
//! 6. `engine/allocate` waits for its turn at the block and takes space from [`image::Space`]: zeroed first
//!    if it is recycled, or at the end of a file that grows.
//! 7. It publishes the mapping with one store, marks the BAT page dirty, and replies.
//! 8. The front looks the block up again, and it is a hit.
//!
//! Nothing has been synced. A flush of the guest, or a log a quarter of which is dirty, starts a commit
//! cycle. (With nothing to log, the front syncs for the flush: `engine/unlogged`.)
//!
//! 9. `engine/commit` closes the set of dirty pages and copies them.
//! 10. It syncs if a page names space or data that no completed sync covers.
//! 11. It writes the [log entries](mod@format::log), syncs, and answers the flush.
//! 12. It writes the pages in place, in the background.
//!
//! A power cut at any of these steps leaves a file that opens. [`design::ordering`] says why, and
//! `tests/simulator/crash.rs` tries each of them.
//!
//! # Where to change what
//!
//! * What a structure on disk may hold: its file in [`mod@format`], and its [rule](design::vhdx_rules).
//! * What is accepted when an image is opened, examined or repaired: `image/open`, `image/check`,
//!   `image/repair`.
//! * When something becomes durable: [`design::ordering`], then the head of its file in [`engine`], and a bug
//!   to plant in [`simulation`], by which the tests prove that they see it.
//! * How a request is split, joined or answered: `engine/front`.
//! * How parents are found: [`chain`].
//! * What a command does to an image that is not served: [`operations`].
//! * How a device is made, recovered or removed: `device/daemon`, `device/control`, `device/stop`.
//! * What a daemon is allowed to do: [`device::confine`].
//! * The words of a command: its file in `cli`, and the tests in `tests/cli/main.rs` that read them.
//! * A word: the [`design::glossary`].

pub mod atomic;
pub mod chain;
pub mod design;
pub mod device;
pub mod disk;
pub mod engine;
pub mod error;
pub mod format;
pub mod guide;
pub mod image;
pub mod machine;
pub mod operations;
pub mod printable;
pub mod simulation;
pub mod system;
