//! The leaf says something else of its parent, and the fronts read a chain without the merged layer.
//!
//! While the fronts are held: the image is committed and its session at rest; its parent locator changes; the
//! device's entry loses the layer; the image gets a new session and a new engine, over the parents that the
//! entry has then.

use std::sync::Arc;

use super::Merger;
use crate::chain::ReadLayer;
use crate::device::exchange::Exchange;
use crate::device::layers::EngineParents;
use crate::device::order::{Dropped, NewLeaf, RelinkOrder};
use crate::device::served_image::ServedImage;
use crate::error::{Locate, Result};
use crate::image::{BlockMap, WritableImage};
use crate::operations::merge::Link;

impl Merger<'_> {
    /// Does what is ordered, and answers.
    pub(in crate::device) fn relink(&self, order: RelinkOrder, served: &mut ServedImage) {
        let RelinkOrder { link, dropped, done } = order;
        let outcome = self.try_to_relink(link.as_ref(), dropped, served).file(served.file.path());
        // The merge waits for it.
        let _ = done.send(outcome);
    }

    fn try_to_relink(
        &self,
        link: Option<&Link>,
        dropped: Option<Dropped>,
        served: &mut ServedImage,
    ) -> Result<()> {
        let exchange = self.exchange;
        let geometry = *served.engine.shared().geometry();
        let mut session = exchange.prepare(&geometry, served)?;
        let mut switched = Ok(());
        let (before, pause_us) = exchange.run(served, |served| {
            let rested = exchange.reactor.block_on(served.engine.rest());
            served.check("freezing the image", rested)?;
            let relinked = served.engine.relink(|image, locator| {
                Exchange::claim_room(&mut session, image, &geometry, None)?;
                link.map_or(Ok(()), |link| {
                    link.put_into(locator.expect("a chain that is merged has parents"))
                })
            });
            let image = match exchange.reactor.block_on(relinked) {
                Ok(image) => image,
                Err(error) => {
                    Exchange::abandon(session);
                    return Err(error);
                }
            };
            let mut parents = served.parents(exchange.reactor);
            if let Some(dropped) = dropped {
                let without = self.without(&dropped, served);
                // A daemon that could not write the entry keeps the layer, as its successor would.
                switched = (dropped.switch)(new_leaf(served, &image, &without));
                if switched.is_ok() {
                    parents = with_map(without, dropped.target);
                }
            }
            exchange.serve((image, session), parents, served)
        })?;
        exchange.reactor.block_on(before.engine.leave());
        tracing::debug!("requests have waited for {pause_us} us");
        switched
    }

    /// The parents without the layer, and the place of the target among them.
    fn without(&self, dropped: &Dropped, served: &ServedImage) -> (EngineParents, usize) {
        let (mut layers, files) = served.parents(self.exchange.reactor);
        let place = files.iter().position(|file| file.identity() == dropped.layer);
        let place = place.expect("the chain changes by one merge at a time");
        layers.remove(place);
        let mut files = files.to_vec();
        files.remove(place);
        ((layers, files.into()), place)
    }
}

fn with_map(((mut layers, files), place): (EngineParents, usize), map: BlockMap) -> EngineParents {
    let ReadLayer { disk, .. } = layers.remove(place);
    layers.insert(place, ReadLayer { disk, map: Arc::new(map) });
    (layers, files)
}

fn new_leaf(
    served: &ServedImage,
    image: &WritableImage,
    ((_, files), _): &(EngineParents, usize),
) -> NewLeaf {
    NewLeaf {
        image: served.file.path().into(),
        image_file: served.image_file(),
        parents: files.iter().map(|file| file.path().into()).collect(),
        parent_files: files.iter().map(|file| file.identity()).collect(),
        file_write_guid: image.header.header.file_write_guid,
    }
}
