//! When a daemon ends: what it makes of signals.
//!
//! A signal that asks it to end comes from a user, or from a machine that shuts down: that asks everything at once,
//! and unmounts file systems afterwards. So a device that is in use stays, and what has been asked is remembered: the
//! device ends by itself as soon as nothing uses it.
//!
//! | signal | device is not in use | device is in use |
//! |---|---|---|
//! | SIGTERM, SIGINT | ends | stays, says so, and ends when its use ends |
//! | another one within [`INSISTENCE`] | ends | ends: what uses it sees I/O errors |
//! | SIGHUP | opens its log anew | opens its log anew |
//! | faults of the program | dies: `vhdx-ublk recover` goes on | the same |
//! | every other that can be ignored | nothing | nothing |
//!
//! `vhdx-ublk del` does not ask: it has the kernel stop the device, which its daemon finds.
//!
//! Decisions are made here; looking, which takes time, and acting is for others.

use std::time::{Duration, Instant};

/// How soon after the first a second signal means that the user insists.
pub(super) const INSISTENCE: Duration = Duration::from_secs(5);

/// How often it is looked whether a device is still used that shall end: a shutdown waits for it.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Happening {
    /// Somebody asks the daemon to end.
    Asked,
    /// The log shall be opened anew.
    HungUp,
    /// What a look has found: who uses the device.
    Looked(Vec<String>),
    /// It is time for the next look.
    Time,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Nothing,
    /// See who uses the device, and tell.
    Look,
    /// Say that the device stays, and who uses it.
    Stay(Vec<String>),
    /// Open the log anew.
    Reopen,
    /// Take the device down.
    End,
}

/// What has been asked so far.
#[derive(Debug, Default)]
pub(super) struct Ending {
    /// When it was asked last.
    asked: Option<Instant>,
    /// When to look next; none while a look is under way, and before anything was asked.
    next_look: Option<Instant>,
    /// That the device stays has been said, and by whom it is used.
    said: Option<Vec<String>>,
}

impl Ending {
    /// When [`Happening::Time`] is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.next_look
    }

    /// What to do about what happens `now`.
    pub(super) fn on(&mut self, happening: Happening, now: Instant) -> Step {
        match happening {
            Happening::HungUp => Step::Reopen,
            Happening::Asked => self.ask(now),
            Happening::Looked(users) if users.is_empty() => Step::End,
            Happening::Looked(users) => {
                self.next_look = Some(now + LOOK_INTERVAL);
                if self.said.as_ref() == Some(&users) {
                    return Step::Nothing;
                }
                self.said = Some(users.clone());
                Step::Stay(users)
            }
            Happening::Time => {
                self.next_look = None;
                Step::Look
            }
        }
    }

    fn ask(&mut self, now: Instant) -> Step {
        let before = self.asked.replace(now);
        match before {
            Some(before) if now.duration_since(before) < INSISTENCE => Step::End,
            // The look that is under way, or the next one, will tell; what it finds is said again.
            Some(_) => {
                self.said = None;
                Step::Nothing
            }
            None => Step::Look,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used() -> Happening {
        Happening::Looked(vec!["mounted at /mnt".into()])
    }

    fn unused() -> Happening {
        Happening::Looked(Vec::new())
    }

    #[test]
    fn a_device_that_nothing_uses_ends_when_it_is_asked() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        assert_eq!((ending.due(), ending.on(Happening::Asked, now)), (None, Step::Look));
        assert_eq!(ending.on(unused(), now), Step::End);
    }

    #[test]
    fn a_device_in_use_stays_and_ends_when_its_use_ends() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        ending.on(Happening::Asked, now);
        assert_eq!(ending.on(used(), now), Step::Stay(vec!["mounted at /mnt".into()]));
        for second in 1..100 {
            let now = now + Duration::from_secs(second);
            assert!(ending.due().is_some_and(|due| due <= now));
            assert_eq!(ending.on(Happening::Time, now), Step::Look);
            assert_eq!(ending.due(), None, "one look at a time");
            assert_eq!(ending.on(used(), now), Step::Nothing, "it was said");
        }
        let other = Happening::Looked(vec!["used by dm-0".into()]);
        assert_eq!(ending.on(other, now), Step::Stay(vec!["used by dm-0".into()]));
        ending.on(Happening::Time, now);
        assert_eq!(ending.on(unused(), now), Step::End);
    }

    #[test]
    fn who_asks_twice_insists_and_who_asks_much_later_does_not() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        ending.on(Happening::Asked, now);
        assert_eq!(ending.on(Happening::Asked, now + Duration::from_secs(1)), Step::End, "while it looks");
        let mut ending = Ending::default();
        ending.on(Happening::Asked, now);
        ending.on(used(), now);
        let later = now + INSISTENCE;
        assert_eq!(ending.on(Happening::Asked, later), Step::Nothing);
        assert!(ending.due().is_some(), "it goes on looking");
        assert!(matches!(ending.on(used(), later), Step::Stay(_)), "and says it again");
        assert_eq!(ending.on(Happening::Asked, later + Duration::from_secs(1)), Step::End);
    }

    #[test]
    fn a_hangup_opens_the_log_and_asks_for_nothing() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        assert_eq!(ending.on(Happening::HungUp, now), Step::Reopen);
        assert_eq!(ending.due(), None);
        assert_eq!(ending.on(Happening::Asked, now), Step::Look, "a hangup does not count as asking");
    }
}
