//! The engine's header updates, one at a time.

use std::rc::Rc;

use super::{Engine, Outcome};
use crate::disk::Disk;
use crate::format::header::Header;
use crate::image::Headers;
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
    /// Changes both headers, one after the other, each durable before the next.
    ///
    /// A host without room refuses one. If that is the first, nothing has changed; if it is the second, the
    /// change is durable in the other. Either way the slot that was refused may be torn, and is written first
    /// the next time: never is the other one, which is whole, at risk before that.
    pub(super) async fn update_headers(self: &Rc<Self>, change: impl FnOnce(&mut Header)) -> Outcome {
        let turn = self.turns.headers.enter().await;
        let outcome = self.write_headers(change).await;
        drop(turn);
        outcome
    }

    async fn write_headers(self: &Rc<Self>, change: impl FnOnce(&mut Header)) -> Outcome {
        let unchanged = self.headers.borrow().clone();
        self.headers.borrow_mut().change(change);
        let changed = self.headers.borrow().current().file_write_guid;
        assert!(!changed.is_nil(), "a header has a FileWriteGuid");
        for slot in 1..=Headers::SLOTS {
            self.check_poison()?;
            let before = self.headers.borrow().clone();
            let (offset, page) = self.headers.borrow_mut().next_slot();
            if let Err(errno) = self.write_metadata("writing a header", offset, page).await {
                self.check_poison()?;
                if slot == 1 {
                    self.headers.replace(unchanged.in_doubt());
                    return Err(errno);
                }
                if !planted(Plant::SkipRefusedSlot) {
                    self.headers.replace(before);
                }
                return Ok(());
            }
            if slot == Headers::SLOTS || !planted(Plant::TwinHeaders) {
                self.sync().await?;
            }
        }
        assert!(!self.headers.borrow().are_in_doubt(), "both headers were written");
        Ok(())
    }

    /// A header that was refused may be there all the same. Before anything is written that it contradicts,
    /// the one that holds takes its place.
    pub(super) async fn resolve_headers_in_doubt(self: &Rc<Self>) -> Outcome {
        let in_doubt = self.headers.borrow().are_in_doubt();
        if in_doubt && !planted(Plant::TrustRefusal) { self.update_headers(|_| ()).await } else { Ok(()) }
    }
}
