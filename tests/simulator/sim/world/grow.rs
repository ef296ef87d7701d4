//! The disk of the image that is served grows, while requests come.

use std::cell::Cell;
use std::rc::Rc;

use nix::errno::Errno;
use uuid::Uuid;
use vhdx_ublk::disk::ReadDisk;
use vhdx_ublk::engine::message::ToFront;
use vhdx_ublk::engine::shared::Session;
use vhdx_ublk::engine::{Engine, Setup};
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::format::bat::Geometry;
use vhdx_ublk::image::{Image, PreparedResize, WritableImage};

use super::{Seen, World, death, guids, parents};
use crate::sim::disk::{Effect, Fault, Injection, SimDisk};
use crate::sim::tasks::block_on;
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
        if !self.extend_ahead(to) {
            return self.grown_or_not(from, to);
        }
        self.hold();
        if self.deaths == deaths {
            self.freeze();
        }
        if self.deaths > deaths {
            return self.grown_or_not(from, to);
        }
        self.held = Some(self.hosts.len());
        if self.rng.u32(..4) == 0 {
            let keeps_length = self.rng.bool();
            return self.stay(to, keeps_length);
        }
        let Some(image) = self.grow_frozen(to) else { return self.grown_or_not(from, to) };
        self.marks.add("images while a disk grows", self.images_judged() - before);
        if self.dies_now("deaths between growth and session") {
            return self.grown_or_not(from, to);
        }
        self.serve_grown(image);
        if self.dies_now("deaths between session and release") {
            return self.grown_or_not(from, to);
        }
        self.told(to);
        self.release();
    }

    fn release(&mut self) {
        self.held = None;
        for front in 0..self.hosts.len() {
            self.inbox.0.borrow_mut()[front].push_back(ToFront::Release);
        }
    }

    /// The disk as it is to be.
    fn longer(&self, to: u64) -> Geometry {
        let old = self.engine.shared().geometry();
        let block = self.config.image.block_size;
        Geometry::new(to, block, old.logical_sector_size(), old.is_differencing())
    }

    /// The host makes room while requests go on. `false` if the daemon was killed.
    fn extend_ahead(&mut self, to: u64) -> bool {
        let (engine, deaths) = (self.engine.clone(), self.deaths);
        let bytes = engine.bytes_ahead(&self.longer(to));
        let extending = self.tasks.start(async move { engine.extend_ahead(bytes, || true).await });
        let is_done = |world: &Self| world.deaths > deaths || extending.borrow().is_some();
        // One growth at a time, as on the engine's thread.
        let grow = std::mem::take(&mut self.config.faults.grow);
        self.step_until("the host has room", is_done);
        self.config.faults.grow = grow;
        if self.deaths > deaths {
            return false;
        }
        if bytes > 0 {
            self.marks.hit("room made ahead of a growth");
        }
        let extended = extending.borrow_mut().take();
        extended.expect("it has ended").unwrap_or_else(|errno| violated(format!("no room: {errno}")));
        true
    }

    /// The disk keeps its size for now, and the file the length that it needs, or a longer one where the host
    /// does not shorten it.
    fn stay(&mut self, to: u64, keeps_length: bool) {
        self.marks.hit("growths that are given up");
        let (engine, deaths) = (self.engine.clone(), self.deaths);
        let cutting = self.tasks.start(async move {
            engine.rest().await?;
            engine.cut_end().await.map(drop)
        });
        if keeps_length {
            let fault = Fault::Error { errno: libc::EIO, times: 1 };
            let hits = |_, effect: &Effect| matches!(effect, Effect::Resize(_));
            self.disk.inject(Injection { fault, hits, after: 0, seed: self.rng.u64(..) });
        }
        let is_done = |world: &Self| world.deaths > deaths || cutting.borrow().is_some();
        self.step_until("the file is as long as before", is_done);
        let refused = self.disk.disarm().is_some();
        let from = self.config.image.virtual_size;
        if self.deaths > deaths {
            return self.grown_or_not(from, to);
        }
        if refused {
            self.marks.hit("files that were to be shortened and were not");
        }
        if cutting.borrow_mut().take() != Some(Ok(())) && !refused {
            violated("the file does not get its length back".into());
        }
        self.config.sizes.insert(0, to);
        self.told(from);
        self.release();
    }

    /// The disk keeps its size after all, on a host that does not shorten the file.
    pub fn keep_size(&mut self, to: u64) {
        self.hold();
        self.freeze();
        self.held = Some(self.hosts.len());
        self.stay(to, true);
    }

    /// The disk grows while no request is under way, and one operation of that fails. Whether the growth was
    /// decided by then, and whether the disk has grown.
    pub fn grow_struck(&mut self, to: u64, injection: Injection) -> (bool, bool) {
        self.config.frozen.get_or_insert_with(|| self.lineage.clone().into());
        let (engine, decided) = (self.engine.clone(), Rc::new(Cell::new(false)));
        let bytes = engine.bytes_ahead(&self.longer(to));
        self.disk.inject(injection);
        let extending = self.tasks.start(async move { engine.extend_ahead(bytes, || true).await });
        self.drain();
        let extended = extending.borrow_mut().take().expect("it has ended");
        self.hold();
        self.held = None;
        let (engine, disk, seen) = (self.engine.clone(), self.disk.clone(), decided.clone());
        let growing = self.tasks.start(async move {
            let failed = |errno: Errno| Error::new(Kind::Io, errno.to_string());
            engine.rest().await.map_err(failed)?;
            extended.map_err(failed)?;
            let decide = |_: &WritableImage, _: &PreparedResize<'_>| {
                seen.set(true);
                Ok(())
            };
            let image = engine.grow(to, decide).await?;
            // The device poisons then, too: nothing else is there to go on with.
            let read = image.read_bitmaps(&disk).await;
            read.inspect_err(|_| {
                engine.shared().poison();
            })?;
            Ok(image) as Result<_>
        });
        self.drain();
        let grown = growing.borrow_mut().take().expect("it has ended");
        let has_grown = grown.is_ok();
        match grown {
            Ok(image) => {
                self.serve_grown(image);
                self.told(to);
            }
            Err(_) if self.session() == Session::Idle => {
                let engine = self.engine.clone();
                self.tasks.start(async move { engine.cut_end().await });
                self.drain();
            }
            Err(_) => {}
        }
        self.release();
        self.drain();
        (decided.get(), has_grown)
    }

    /// Bytes of the disk as the file has it now.
    pub fn size_in_file(&self) -> u64 {
        let disk = SimDisk::new(self.disk.content(), true, true, self.config.image.logical_sector_size);
        let image = block_on(Image::open_for_writing(&disk, || Uuid::from_u128(1)));
        image.unwrap_or_else(|error| violated(format!("it does not open: {error}"))).metadata.virtual_size
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
