//! The disk of the image that is served grows, while requests come.

use vhdx_ublk::disk::ReadDisk;
use vhdx_ublk::engine::message::ToFront;
use vhdx_ublk::engine::{Engine, Setup};
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::image::{PreparedResize, WritableImage};

use super::{Seen, World, death, guids, parents};
use crate::sim::violation::violated;

impl World {
    pub(super) fn grows_now(&mut self) -> bool {
        let grow = self.config.faults.grow;
        let may = grow > 0
            && self.held.is_none()
            && !self.config.sizes.is_empty()
            && self.issued < self.config.requests;
        may && self.rng.u32(..grow) == 0
    }

    /// The disk gets its next size, in the steps of the device's. Killed in between, the successor serves
    /// either size.
    pub(super) fn grow(&mut self) {
        let to = self.config.sizes.remove(0);
        let from = self.config.image.virtual_size;
        self.config.frozen.get_or_insert_with(|| self.lineage.clone().into());
        self.marks.hit("disks that grow");
        let (before, deaths) = (self.images_judged(), self.deaths);
        if let Some(judge) = &mut self.judge {
            judge.expect_sizes(from..=to);
        }
        self.hold();
        if self.deaths == deaths {
            self.freeze();
        }
        if self.deaths > deaths {
            return self.grown_or_not(from, to);
        }
        self.held = Some(self.hosts.len());
        let Some(image) = self.grow_frozen(to) else { return self.grown_or_not(from, to) };
        self.marks.add("images while a disk grows", self.images_judged() - before);
        if self.dies_now("deaths between growth and session") {
            return self.grown_or_not(from, to);
        }
        self.serve_grown(image);
        if self.dies_now("deaths between session and release") {
            return self.grown_or_not(from, to);
        }
        self.held = None;
        self.told(to);
        for front in 0..self.hosts.len() {
            self.inbox.0.borrow_mut()[front].push_back(ToFront::Release);
        }
    }

    /// The image after that; none if the daemon was killed.
    fn grow_frozen(&mut self, to: u64) -> Option<WritableImage> {
        let (engine, disk) = (self.engine.clone(), self.disk.clone());
        let growing = self.tasks.start(async move {
            engine.rest().await.unwrap_or_else(|errno| violated(format!("no rest: {errno}")));
            let length = disk.length().await.expect("it has one");
            let left = engine.grow(to, |_, _| Err(Error::new(Kind::Io, "the caller has left"))).await;
            assert!(left.is_err(), "a growth that is declined fails");
            if disk.length().await.expect("it has one") != length {
                violated("a disk that does not grow keeps the room for that".into());
            }
            let decide = |_: &WritableImage, prepared: &PreparedResize<'_>| {
                // Recovery reads it as soon as an entry names it.
                prepared.border().into_iter().for_each(|(_, bitmap)| disk.add_bitmap(bitmap.offset));
                Ok(())
            };
            let image = engine.grow(to, decide).await?;
            image.read_bitmaps(&disk).await?;
            Ok(image) as Result<_>
        });
        let deaths = self.deaths;
        self.step_until("the disk has grown", |world| world.deaths > deaths || growing.borrow().is_some());
        if self.deaths > deaths {
            return None;
        }
        let grown = growing.borrow_mut().take().expect("it has ended");
        Some(grown.unwrap_or_else(|error| violated(format!("the disk does not grow: {error:#}"))))
    }

    /// The grown image gets a session and an engine, with which the fronts continue.
    fn serve_grown(&mut self, mut image: WritableImage) {
        self.memory = death::start_session(&mut image, self.config.faults);
        self.layout = image.layout;
        let old = self.engine.clone();
        let maps = old.shared().layers().skip(1).cloned();
        let (layers, _) = parents(&self.lineage);
        let layers = layers.into_iter().zip(maps);
        let parents =
            layers.map(|(layer, map)| vhdx_ublk::chain::ReadLayer { disk: layer.disk, map }).collect();
        let (disk, tasks, fronts) = (self.disk.clone(), self.tasks.clone(), self.inbox.clone());
        let guids = Box::new(guids(&mut self.rng));
        let engine = Engine::new(Setup { image, disk, parents, tasks, fronts, guids });
        self.engine = engine.expect("the image is writable");
        self.tasks.start(async move { old.leave().await });
        for host in &mut self.hosts {
            host.next = Some(self.engine.shared().clone());
        }
        self.seen = Seen::default();
    }

    /// The daemon was killed while the disk grew: it has the size that its successor serves.
    fn grown_or_not(&mut self, from: u64, to: u64) {
        let size = self.engine.shared().geometry().virtual_size();
        if size != from && size != to {
            violated(format!("a disk that was to grow from {from} to {to} bytes has {size}"));
        }
        self.marks.hit(if size == to {
            "kills that leave the new size"
        } else {
            "kills that leave the old size"
        });
        self.told(size);
    }

    /// The guest knows that the disk has `size` bytes.
    fn told(&mut self, size: u64) {
        self.config.image.virtual_size = size;
        if let Some(judge) = &mut self.judge {
            judge.expect_sizes(size..=size);
        }
    }
}
