//! Another program takes over a device that is in use: its users see no error, and wait for milliseconds.
//!
//! Three processes take part: the command (`vhdx-ublk upgrade`, [`Exchange`]), the daemon that serves, and
//! its *successor*, which the command starts ([`Successor`]). Order:
//!
//! 1. the command opens the program of the daemon, which may have been removed from its folder, and asks the
//!    new program which [`Formats`] it reads;
//! 2. the successor takes room in `/run` for the device's entry, opens the image and its parents, and locks
//!    them beside the daemon; it brings the buffers of its queues into memory, so that there is enough and
//!    requests do not wait for that;
//! 3. it leaves its parent, blocks the signals that request something, and asks the daemon for the device.
//!    The daemon commits what is dirty, has new requests wait, completes those that it serves, syncs them,
//!    and ends as if it had been killed (see `handover`);
//! 4. the successor waits for the end of the daemon's last I/O, takes over the session, and serves; only then
//!    it writes an entry of its own version;
//! 5. if it does not, the command starts the program of 1 to recover the device. It does so in the control
//!    group of the daemon, in which it has been since 1: so the service is not over, and its manager can
//!    watch the process that continues it.
//!
//! What a kill leaves at each step:
//!
//! | killed | before 3 | after 3 |
//! |---|---|---|
//! | the command | the successor ends with it; the daemon serves | the successor serves |
//! | the successor | the daemon serves | the command starts the old program |
//! | the daemon | the device waits for `recover` | as if it had ended by itself |
//! | command and successor | the daemon serves | the device waits for `recover` |
//!
//! Invariants:
//!
//! * until 3 nothing has changed, and a refusal leaves the daemon as it was;
//! * from 2 on no other program can lock the image for writing: the successor's lock lies beside the daemon's
//!   until that ends, and the byte that makes a writer passes only then, after the last I/O;
//! * the session stays open all the time. No process marks it clean, and a successor that fails leaves it;
//! * a request to end is not lost: whichever process gets one notes it in a file, which goes with the device,
//!   and the process that serves the device next does what it says. A command of a user to serve the device
//!   (`start`, `recover`) is newer, and takes it back;
//! * nothing lies on SMB: no lock can lie beside another there;
//! * one upgrade runs at a time.

mod exchange;
mod formats;
mod successor;

pub use exchange::{Exchange, Upgraded};
pub use formats::Formats;
pub use successor::{Pause, Successor, TakenOver, join_service, leave_requests};
