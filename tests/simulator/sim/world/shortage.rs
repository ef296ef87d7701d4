//! Requests for which the host has no room wait until it has some, and are tried again at any time.

use super::World;
use crate::sim::room::Room;

impl World {
    /// The fronts that may try again requests that wait for room, when `rest` other things may happen. A host
    /// that stays full shows nothing new, however often it is asked; and a front that holds tries nothing.
    pub(super) fn tries_again(&mut self, rest: usize) -> Vec<usize> {
        let changes = self.config.faults.full > 0 || !self.disk.room(Room::is_full);
        let may = rest > 0 || changes && self.held.is_none();
        if !may || !self.config.faults.waits || rest > 0 && self.rng.u32(..20) > 0 {
            return Vec::new();
        }
        (0..self.hosts.len()).filter(|&index| self.hosts[index].front.resting() > 0).collect()
    }

    pub(super) fn try_again(&mut self, index: usize) {
        self.marks.hit("requests tried again for which there was no room");
        self.with_front(index, |front, port| front.try_again(port));
    }

    /// Requests that wait for room.
    pub fn short_of_room(&self) -> usize {
        self.hosts.iter().map(|host| host.front.short_of_room()).sum()
    }

    /// The guest has asked for everything, and the device is stopped while requests wait.
    pub(super) fn ends_waits_now(&mut self) -> bool {
        let is_last = self.issued > 0 && self.issued >= self.config.requests;
        is_last && !self.waits_ended && self.short_of_room() > 0 && self.rng.u32(..40) == 0
    }

    /// The device is about to be stopped: what waits for room fails.
    pub fn end_waits(&mut self) {
        let waiting = self.short_of_room() as u64;
        self.marks.add("requests that waited for room until the device ended", waiting);
        self.waits_ended = true;
        for index in 0..self.hosts.len() {
            self.with_front(index, |front, port| front.end_waits(port));
        }
    }
}
