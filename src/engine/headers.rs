//! The engine's header updates, one at a time.

use std::rc::Rc;

use super::{Engine, Outcome};
use crate::disk::Disk;
use crate::format::header::Header;
use crate::image::Headers;
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
    /// Changes both headers, one after the other, each durable before the next.
    pub(super) async fn update_headers(self: &Rc<Self>, change: impl FnOnce(&mut Header)) -> Outcome {
        let turn = self.header_turn.enter().await;
        self.headers.borrow_mut().change(change);
        for slot in 1..=Headers::SLOTS {
            self.check_poison()?;
            let (offset, page) = self.headers.borrow_mut().next_slot();
            if let Err(error) = self.disk.write(offset, page).await {
                return Err(self.poison("writing a header", &error));
            }
            if slot == Headers::SLOTS || !planted(Plant::TwinHeaders) {
                self.sync().await?;
            }
        }
        drop(turn);
        Ok(())
    }
}
