//! Work that a daemon does on the image of its device while it serves it: one job at a time, which others see
//! and may stop.
//!
//! A job stops at its next safe point: what is done until then stays done, and the same command again
//! continues. Whatever holds the queues comes first, and stops it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// It makes the file of the image shorter.
    Compact,
    /// It merges a layer of the chain into its parent.
    Merge,
}

impl fmt::Display for JobKind {
    /// What the device is doing then.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Compact => "compacting",
            Self::Merge => "merging",
        })
    }
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// What it does.
    pub job: JobKind,
    /// Bytes that are done.
    pub done_bytes: u64,
    /// Bytes that there are to do, as far as it is known; the load may change that.
    pub total_bytes: u64,
    /// The length of the image's file.
    pub file_bytes: u64,
}

impl fmt::Display for Progress {
    /// As a person reads it: `compacting, 42 %`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (u128::from(self.done_bytes) * 100).checked_div(self.total_bytes.into()) {
            Some(percent) => write!(f, "{}, {} %", self.job, percent.min(100)),
            None => write!(f, "{}", self.job),
        }
    }
}

/// Why a job is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Stop {
    /// Who requested it has left, or wants it to.
    Caller,
    /// Requests have come to a device that was idle: what a caller has ordered does not stop for them.
    #[schemars(skip)]
    Requests,
    /// A snapshot is to be taken.
    Snapshot,
    /// The disk is to become larger.
    Resize,
    /// Another process takes the device over.
    Upgrade,
    /// The device ends.
    End,
}

/// One job. The caller who waits for it and the thread that does it share it.
#[derive(Debug)]
pub struct Job(Mutex<State>);

#[derive(Debug)]
struct State {
    progress: Progress,
    stop: Option<Stop>,
}

impl Job {
    /// One that has not begun.
    pub fn new(kind: JobKind) -> Arc<Self> {
        let progress = Progress { job: kind, done_bytes: 0, total_bytes: 0, file_bytes: 0 };
        Arc::new(Self(Mutex::new(State { progress, stop: None })))
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.state().progress
    }

    /// It has done so many bytes of so many, and the file has so many by now.
    pub fn advance(&self, done_bytes: u64, total_bytes: u64, file_bytes: u64) {
        let progress = &mut self.state().progress;
        *progress = Progress { job: progress.job, done_bytes, total_bytes, file_bytes };
    }

    /// Has it stop at its next safe point. The first reason counts.
    pub fn stop(&self, why: Stop) {
        self.state().stop.get_or_insert(why);
    }

    /// Why it is to stop, if it is.
    pub fn stopped(&self) -> Option<Stop> {
        self.state().stop
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The job of a device, if it has one.
#[derive(Clone, Debug, Default)]
pub struct Jobs(Arc<Mutex<Option<Arc<Job>>>>);

impl Jobs {
    /// The device does `job` until what is returned is dropped.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`] if it has a job already.
    pub fn begin(&self, job: Arc<Job>) -> Result<Running> {
        let mut place = self.place();
        if let Some(other) = &*place {
            let message = format!("the device is busy: {}", other.progress());
            return Err(Error::new(Kind::InUse, message).remedy("run the command again when that has ended"));
        }
        *place = Some(job.clone());
        Ok(Running { job, jobs: self.clone() })
    }

    /// How far the job of the device is.
    pub fn progress(&self) -> Option<Progress> {
        self.place().as_ref().map(|job| job.progress())
    }

    /// Whether it merges a layer of its chain.
    pub fn is_merging(&self) -> bool {
        self.progress().is_some_and(|progress| progress.job == JobKind::Merge)
    }

    fn place(&self) -> MutexGuard<'_, Option<Arc<Job>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A job that a device does.
pub struct Running {
    /// The job.
    pub job: Arc<Job>,
    jobs: Jobs,
}

impl Drop for Running {
    fn drop(&mut self) {
        *self.jobs.place() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_one_job_at_a_time() {
        let jobs = Jobs::default();
        let job = Job::new(JobKind::Compact);
        let running = jobs.begin(job.clone()).expect("it has none");
        job.advance(42, 100, 1000);
        let shown = jobs.progress().expect("it has one").to_string();
        assert_eq!(shown, "compacting, 42 %");
        let refused = jobs.begin(Job::new(JobKind::Compact)).err().expect("it has one");
        assert_eq!(refused.kind(), Kind::InUse);
        assert!(refused.to_string().contains(&shown), "{refused}");
        drop(running);
        assert_eq!(jobs.progress(), None);
        jobs.begin(Job::new(JobKind::Compact)).expect("it has none");
    }

    #[test]
    fn the_first_reason_to_stop_counts() {
        let job = Job::new(JobKind::Compact);
        assert_eq!(job.stopped(), None);
        job.stop(Stop::Snapshot);
        job.stop(Stop::End);
        assert_eq!(job.stopped(), Some(Stop::Snapshot));
    }

    #[test]
    fn what_there_is_to_do_may_be_unknown() {
        assert_eq!(Job::new(JobKind::Compact).progress().to_string(), "compacting");
    }
}
