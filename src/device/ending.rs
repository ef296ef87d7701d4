//! When a daemon ends: how it responds to signals.
//!
//! A request to end comes from a user, or from a shutdown, which signals every process at once and unmounts
//! file systems afterwards. So a device that is in use stays, and the request is remembered: the device ends
//! by itself as soon as nothing uses it.
//!
//! | signal | device is not in use | device is in use |
//! |---|---|---|
//! | SIGTERM, SIGINT | ends | stays, logs that, and ends when its use ends |
//! | another one within [`INSISTENCE`], but not from process 1 | ends | ends: what uses it sees I/O errors |
//! | SIGHUP | reopens its log | reopens its log |
//! | faults of the program | dies: `vhdx-ublk recover` continues | the same |
//! | every other that can be ignored | nothing | nothing |
//!
//! `vhdx-ublk del` sends no signal: it has the kernel stop the device, which the daemon notices.
//!
//! A service manager that stops the daemon waits for a short time only: what stays in use until the machine
//! goes off must not hold up a shutdown. It is asked for more as long as requests come, as they do while a
//! file system is unmounted, but for no more than [`UNMOUNT_PATIENCE`] in all.
//!
//! What is found to use a device may have changed a moment later. So where the kernel can refuse to stop a
//! device that is open, it has the last word, and what it refuses counts as in use.
//!
//! Decisions are made here; the caller finds the users, which takes time, and acts.

use std::time::{Duration, Instant};

use crate::engine::port_counts::Requests;

/// How soon a second signal must follow the first to mean that the user insists.
pub(super) const INSISTENCE: Duration = Duration::from_secs(5);

/// How often to check whether a device that is to end is still in use: a shutdown waits for it.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How long a service manager is asked to wait for the end of a use that continues. A shutdown may take this
/// long, and the little that the manager waits by itself.
const UNMOUNT_PATIENCE: Duration = Duration::from_secs(40);

/// What happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Happening {
    /// A signal asks the daemon to end. The first process, the service manager among them, sends it again by
    /// itself when it has waited for long enough: that is no insistence.
    EndRequested { by_init: bool },
    /// The daemon before this one was asked to end. That is no request of a user who may insist now.
    AskedBefore,
    /// The log is to be reopened.
    HungUp,
    /// The users of the device that a check has found.
    UsersFound(Vec<String>),
    /// It is time for the next check.
    Time,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Nothing,
    /// Find the users of the device, and report them.
    FindUsers,
    /// Log that the device stays, and its users.
    Stay(Vec<String>),
    /// Reopen the log.
    Reopen,
    /// Take the device down, unless the kernel knows that it is in use.
    EndIfUnused,
    /// Take the device down.
    End,
}

/// The requests so far.
#[derive(Debug, Default)]
pub(super) struct Ending {
    /// The time of the first request to end.
    since: Option<Instant>,
    /// The time of the last one.
    requested: Option<Instant>,
    /// The requests to the device that had come by the last check.
    served: Option<Requests>,
    /// When to check next; none while a check is under way, and before the first request.
    next_check: Option<Instant>,
    /// The users that were logged last.
    logged: Option<Vec<String>>,
}

impl Ending {
    /// When [`Happening::Time`] is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.next_check
    }

    /// What to do about something that happens `now`.
    pub(super) fn on(&mut self, happening: Happening, now: Instant) -> Step {
        match happening {
            Happening::HungUp => Step::Reopen,
            Happening::EndRequested { by_init } => self.request(by_init, now),
            Happening::AskedBefore => {
                self.since.get_or_insert(now);
                Step::FindUsers
            }
            Happening::UsersFound(users) if users.is_empty() => Step::EndIfUnused,
            Happening::UsersFound(users) => {
                self.next_check = Some(now + CHECK_INTERVAL);
                if self.logged.as_ref() == Some(&users) {
                    return Step::Nothing;
                }
                self.logged = Some(users.clone());
                Step::Stay(users)
            }
            Happening::Time => {
                self.next_check = None;
                Step::FindUsers
            }
        }
    }

    /// Whether to ask the service manager for more time `now`, when the device has had the requests `served`.
    pub(super) fn wants_time(&mut self, served: Requests, now: Instant) -> bool {
        let is_in_time = self.since.is_some_and(|since| now.duration_since(since) < UNMOUNT_PATIENCE);
        let before = self.served.replace(served);
        is_in_time && before.is_some_and(|before| before != served)
    }

    fn request(&mut self, by_init: bool, now: Instant) -> Step {
        self.since.get_or_insert(now);
        let before = self.requested.replace(now);
        match before {
            Some(before) if !by_init && now.duration_since(before) < INSISTENCE => Step::End,
            // The result of the check that is under way, or of the next one, is logged again.
            Some(_) => {
                self.logged = None;
                Step::Nothing
            }
            None => Step::FindUsers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Happening = Happening::EndRequested { by_init: false };

    fn used() -> Happening {
        Happening::UsersFound(vec!["mounted at /mnt".into()])
    }

    fn unused() -> Happening {
        Happening::UsersFound(Vec::new())
    }

    #[test]
    fn a_device_that_is_not_in_use_ends_on_request() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        assert_eq!((ending.due(), ending.on(ASKED, now)), (None, Step::FindUsers));
        assert_eq!(ending.on(unused(), now), Step::EndIfUnused);
    }

    #[test]
    fn a_device_in_use_stays_and_ends_when_its_use_ends() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        ending.on(ASKED, now);
        assert_eq!(ending.on(used(), now), Step::Stay(vec!["mounted at /mnt".into()]));
        for second in 1..100 {
            let now = now + Duration::from_secs(second);
            assert!(ending.due().is_some_and(|due| due <= now));
            assert_eq!(ending.on(Happening::Time, now), Step::FindUsers);
            assert_eq!(ending.due(), None, "one check at a time");
            assert_eq!(ending.on(used(), now), Step::Nothing, "it was logged");
        }
        let other = Happening::UsersFound(vec!["used by dm-0".into()]);
        assert_eq!(ending.on(other, now), Step::Stay(vec!["used by dm-0".into()]));
        ending.on(Happening::Time, now);
        assert_eq!(ending.on(unused(), now), Step::EndIfUnused);
        assert_eq!(
            ending.on(used(), now),
            Step::Stay(vec!["mounted at /mnt".into()]),
            "the kernel has refused"
        );
        ending.on(Happening::Time, now);
        assert_eq!(ending.on(unused(), now), Step::EndIfUnused);
    }

    #[test]
    fn a_second_request_insists_and_a_much_later_one_does_not() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        ending.on(ASKED, now);
        assert_eq!(ending.on(ASKED, now + Duration::from_secs(1)), Step::End, "during a check");
        let mut ending = Ending::default();
        ending.on(ASKED, now);
        ending.on(used(), now);
        let later = now + INSISTENCE;
        assert_eq!(ending.on(ASKED, later), Step::Nothing);
        assert!(ending.due().is_some(), "it continues to check");
        assert!(matches!(ending.on(used(), later), Step::Stay(_)), "and logs it again");
        assert_eq!(ending.on(ASKED, later + Duration::from_secs(1)), Step::End);
    }

    #[test]
    fn what_the_daemon_before_was_asked_holds_and_is_no_insistence() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        assert_eq!(ending.on(Happening::AskedBefore, now), Step::FindUsers);
        assert!(matches!(ending.on(used(), now), Step::Stay(_)));
        assert!(ending.due().is_some(), "it checks again");
        assert_eq!(ending.on(ASKED, now), Step::FindUsers, "it is the first of a user");
        assert_eq!(ending.on(unused(), now), Step::EndIfUnused);
    }

    #[test]
    fn a_service_manager_that_repeats_its_request_does_not_insist() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        let stop = || Happening::EndRequested { by_init: true };
        assert_eq!(ending.on(stop(), now), Step::FindUsers);
        ending.on(used(), now);
        assert_eq!(ending.on(stop(), now + Duration::from_secs(1)), Step::Nothing);
        assert_eq!(ending.on(ASKED, now + Duration::from_secs(2)), Step::End, "a user may");
    }

    #[test]
    fn a_manager_is_asked_for_time_while_requests_come_but_not_for_ever() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        let served = |write| Requests { write, ..Requests::default() };
        assert!(!ending.wants_time(served(1), now), "it was not asked to end");
        assert!(!ending.wants_time(served(2), now));
        let (mut ending, mut asked) = (Ending::default(), Vec::new());
        ending.on(ASKED, now);
        for second in 0..100 {
            if second == 30 {
                ending.on(ASKED, now + Duration::from_secs(30));
            }
            // Nothing comes in the tenth second.
            let served = served(if second == 10 { 9 } else { second });
            asked.push(ending.wants_time(served, now + Duration::from_secs(second)));
        }
        let patience = usize::try_from(UNMOUNT_PATIENCE.as_secs()).expect("small");
        let expected: Vec<bool> =
            (0..100).map(|second| !matches!(second, 0 | 10) && second < patience).collect();
        assert_eq!(asked, expected);
    }

    #[test]
    fn a_hangup_reopens_the_log_and_is_no_request() {
        let (mut ending, now) = (Ending::default(), Instant::now());
        assert_eq!(ending.on(Happening::HungUp, now), Step::Reopen);
        assert_eq!(ending.due(), None);
        assert_eq!(ending.on(ASKED, now), Step::FindUsers, "a hangup does not count as a request");
    }
}
