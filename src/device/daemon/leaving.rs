//! Ends serving a device that another process takes over.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::Device;
use crate::device::control;
use crate::device::handover::{self, QUIESCE_PATIENCE, SETTLE_PATIENCE, Way};
use crate::device::options::Recovery;
use crate::device::order::HandedOver;
use crate::device::reply::Reply;
use crate::device::spec::EngineHandle;
use crate::disk::HostFile;
use crate::error::{Error, Kind, Result};

impl<E: EngineHandle> Device<E> {
    /// Ends serving for the caller, which takes the device over. `false`: that was refused, and the device is
    /// served as before.
    pub(super) fn hand_over(
        &mut self,
        image_file: HostFile,
        successor: u32,
        reply: Reply<HandedOver>,
    ) -> bool {
        let left = || Error::new(Kind::Io, "the caller has stopped waiting");
        handover::note("asked for");
        let agreed = self.agree(image_file);
        handover::note("agreed");
        // Whoever asks after the caller's death must not learn later that the device is handed over.
        self.leaving.store(true, Ordering::Release);
        let agreed = agreed.and_then(|way| if reply.claim() { self.pause(way) } else { Err(left()) });
        match agreed {
            Ok(handed_over) => {
                handover::note("requests wait");
                tracing::info!("ending: another process serves the device from now on");
                reply.send(Ok(handed_over));
                self.announce_to_manager(successor);
                // What is not completed or not synced now is the successor's, as after a kill. If a sync
                // fails, it refuses the session.
                let is_quiescable = self.is_quiescable();
                if !self.is_repeated() {
                    // One that began to wait just now: the kernel would fail it with another error.
                    self.supervisor.end_waits();
                }
                let engine = self.engine.as_ref().expect("a device that is up has an engine");
                if is_quiescable
                    && let Err(error) = self.supervisor.hand_over(|| engine.settle(false, SETTLE_PATIENCE))
                {
                    tracing::warn!("{error:#}");
                }
                handover::note("the process ends");
                true
            }
            Err(error) => {
                self.leaving.store(false, Ordering::Release);
                tracing::warn!("the device is not handed over: {error:#}");
                reply.send(Err(error));
                false
            }
        }
    }

    /// Whether another process may take the device over, and how. Leaves little to be committed.
    fn agree(&self, image_file: HostFile) -> Result<Way> {
        let entry = || self.entry.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let way = handover::way(entry().recovery, self.is_quiescable())?;
        if self.sources.shortage().is_some() && !self.is_repeated() {
            return Err(self.is_short_of_room());
        }
        // Snapshots that were requested before are taken first, and change the entry.
        self.engine().settle(false, SETTLE_PATIENCE)?;
        if entry().image_file != image_file {
            let message = format!("{} serves another image by now", self.path().display());
            return Err(Error::new(Kind::InUse, message).remedy("run the command again"));
        }
        Ok(way)
    }

    /// Has requests wait for the next server.
    fn pause(&self, way: Way) -> Result<HandedOver> {
        let handed_over = HandedOver { paused_at_us: handover::now_us()? };
        match way {
            Way::Quiesce => self.control.quiesce(self.info.id, QUIESCE_PATIENCE)?,
            Way::Hold => self.engine().settle(true, SETTLE_PATIENCE)?,
        }
        Ok(handed_over)
    }

    /// Whether the kernel repeats to the next process what this one has not completed.
    fn is_repeated(&self) -> bool {
        self.entry.lock().unwrap_or_else(PoisonError::into_inner).recovery == Recovery::Reissue
    }

    fn is_short_of_room(&self) -> Error {
        let message = format!(
            "requests of {} wait for room on the host, and would fail: it was added with --recovery queue",
            self.path().display()
        );
        Error::new(Kind::InUse, message).remedy("free space there, and run the command again")
    }

    fn is_quiescable(&self) -> bool {
        self.info.flags & control::QUIESCE_FEATURE != 0
    }

    /// Has the service manager, if there is one, watch the process `pid`.
    pub(super) fn announce_to_manager(&self, pid: u32) {
        if let Some(manager) = &self.manager
            && let Err(error) = manager.announce(pid)
        {
            tracing::warn!("the service manager does not learn of process {pid}: {error}");
        }
    }
}
