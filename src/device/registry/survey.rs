//! The devices of this program, from the registry and the kernel together.

use super::entry::Entry;
use super::sight::{Seen, Sight, State, judge};
use super::store::{Registry, Unreadable};
use crate::device::control::{Control, DeviceInfo, is_mark_of_program};
use crate::device::links;
use crate::device::options::Recovery;
use crate::device::process::Life;
use crate::error::Result;

/// A device of this program, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What its daemon wrote.
    pub entry: Entry,
    /// What the kernel adds.
    pub state: State,
}

impl Listed {
    /// Its daemon was killed, and it waits for the next one.
    pub fn is_abandoned(&self) -> bool {
        match self.state {
            State::Quiesced | State::FailIo => true,
            // The kernel notices a daemon's end only later.
            State::Live => self.entry.recovery != Recovery::None && self.entry.daemon.life() == Life::Ended,
            _ => false,
        }
    }

    /// It waits for the next daemon, or nothing that can be seen from here rules that out.
    pub fn may_be_abandoned(&self) -> bool {
        self.is_abandoned() || self.state == State::Unknown && !self.entry.daemon.is_alive()
    }
}

/// All that is known of this program's devices.
#[derive(Debug, Default)]
pub struct Survey {
    /// Those with an entry.
    pub devices: Vec<Listed>,
    /// Those that only the kernel knows.
    pub orphans: Vec<DeviceInfo>,
    /// Entries that cannot be read; the device may be among the orphans.
    pub unreadable: Vec<Unreadable>,
}

impl Survey {
    /// Whether there is nothing to report.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty() && self.orphans.is_empty() && self.unreadable.is_empty()
    }
}

impl Registry {
    /// The devices that have an entry, as they are now. Nothing is changed.
    ///
    /// # Errors
    ///
    /// If the registry cannot be read, or the kernel does not answer.
    pub fn list(&self) -> Result<Vec<Listed>> {
        self.survey().map(|survey| survey.devices)
    }

    /// All that is known of this program's devices, as they are now. Nothing is changed.
    ///
    /// # Errors
    ///
    /// If the registry cannot be read, or the kernel does not answer.
    pub fn survey(&self) -> Result<Survey> {
        let sight = Sight::open()?;
        let (entries, unreadable) = self.entries()?;
        let marks: Vec<u64> = entries.iter().map(|entry| entry.mark).collect();
        let mut devices = Vec::new();
        for entry in entries {
            if let Some(state) = sight.state_of(&entry)? {
                devices.push(Listed { entry, state });
            }
        }
        let mut orphans = match &sight {
            Sight::Kernel(control) => control.devices()?,
            Sight::NoDriver | Sight::Hidden => Vec::new(),
        };
        // The entry may have been written since the entries were read.
        let is_written =
            |info: &DeviceInfo| matches!(self.entry(info.id), Ok(Some(entry)) if entry.mark == info.mark);
        orphans
            .retain(|info| is_mark_of_program(info.mark) && !marks.contains(&info.mark) && !is_written(info));
        Ok(Survey { devices, orphans, unreadable })
    }

    /// Removes the entries of devices that the kernel reports gone, unless a failure is still to be reported
    /// or the entry is to be kept, and what else killed processes have left of devices.
    ///
    /// # Errors
    ///
    /// If the registry cannot be read or changed, or the kernel does not answer.
    pub(in crate::device) fn sweep(
        &self,
        control: &Control,
        keeps: impl Fn(&Entry) -> Result<bool>,
    ) -> Result<()> {
        let (entries, unreadable) = self.entries()?;
        for entry in entries {
            if Self::is_gone(control, &entry)? && !keeps(&entry)? {
                self.remove(entry.id, entry.mark)?;
            }
        }
        for Unreadable { id, .. } in unreadable {
            if control.info(id)?.is_none_or(|info| !is_mark_of_program(info.mark)) {
                let locked = self.lock()?;
                if self.entry(id).is_err() {
                    locked.unlink(id)?;
                }
            }
        }
        links::sweep(self.directory());
        self.sweep_strays(control)
    }

    /// Whether the kernel reports the device of `entry` gone, its daemon has ended, and there is nothing to
    /// report.
    pub(in crate::device) fn is_gone(control: &Control, entry: &Entry) -> Result<bool> {
        let seen = control.info(entry.id)?;
        Ok(judge(entry, Seen::Answer(seen), entry.daemon.life()).is_none())
    }

    /// Removes half an entry, and the files of devices that have neither an entry nor are known to the
    /// kernel. Whoever makes either has the directory locked.
    fn sweep_strays(&self, control: &Control) -> Result<()> {
        if !self.has_strays()? {
            return Ok(());
        }
        let locked = self.lock()?;
        locked.remove_half_entry()?;
        for id in self.strays()? {
            if control.info(id)?.is_none() {
                locked.unlink(id)?;
            }
        }
        Ok(())
    }

    fn has_strays(&self) -> Result<bool> {
        Ok(self.has_half_entry() || !self.strays()?.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::super::entry::tests::entry;
    use super::*;
    use crate::device::process::ProcessId;

    #[test]
    fn a_daemon_that_cannot_be_seen_is_not_taken_for_a_dead_one() {
        let ours = entry(0);
        let hidden = Entry { daemon: ProcessId { namespace: 1, ..ours.daemon }, ..ours };
        assert!(!Listed { entry: hidden, state: State::Live }.is_abandoned());
        let waits = Listed { entry: entry(0), state: State::Unknown };
        assert!(waits.may_be_abandoned() && !waits.is_abandoned());
    }
}
