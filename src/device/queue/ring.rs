//! The ring of one queue: ublk commands, file I/O and the mailbox's eventfd, in one `io_uring`.
//!
//! Invariants:
//!
//! * the thread that makes the ring is the only one that uses it (the kernel checks);
//! * a tag is with the kernel (its command is out), with the front (its request is being served), or ended;
//!   [`Port::complete`] takes it from the front back to the kernel, exactly once per request;
//! * everything pushed in a batch is submitted by the one `io_uring_enter` that also waits:
//!   [`QueueRing::wait`]. It has no timeout, so an idle queue never wakes up, unless requests wait for room;
//! * the buffers and the eventfd's eight bytes outlive all I/O: a ring that fails is leaked, not dropped.
#![allow(unsafe_code, reason = "pushing a submission gives the kernel a pointer")]

use std::fs::File;
use std::io;
use std::iter;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use libublk::sys;
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::buffers::{RequestBuffers, Transfer};
use super::descriptor;
use super::token::Token;
use crate::chain::MAX_DEPTH as MAX_LAYERS;
use crate::device::control::bare_number;
use crate::device::leaf_handover::LeafHandover;
use crate::device::mailbox::Sender;
use crate::device::region::Region;
use crate::disk::{ImageFile, PAGE_BYTES};
use crate::engine::Outcome;
use crate::engine::front::{MAX_PIECES, Request};
use crate::engine::message::{ToEngine, ToFront};
use crate::engine::port::{FileIo, FileOp, MAX_WRITE_ZEROS, PieceId, Port, Ticket, errno};
use crate::engine::port_counts::{PortCounts, Reason};
use crate::engine::shared::{LEAF, Shared};
use crate::error::{Doing, Error, Result};
use crate::machine;
use crate::simulation::{Plant, planted};

/// Places in the submission queue: a full one is submitted and filled again, so this bounds memory, not work.
const MAX_SUBMISSIONS: u32 = 4096;

/// How often, and after what pause, I/O is submitted again when the kernel has no memory for it: for two
/// seconds.
const MAX_SHORTAGES: u32 = 1000;
const SHORTAGE_PAUSE: Duration = Duration::from_millis(2);

/// The files of the ring: the character device, the source of zeros, the leaf as this queue alone syncs it,
/// and the images of the chain, the leaf last, with slots for more.
const CHARACTER_DEVICE: Fixed = Fixed(0);
const ZEROS: Fixed = Fixed(1);
const SYNCING: u32 = 2;
const FIRST_IMAGE: u32 = 3;

/// A slot without a file.
const NO_FILE: i32 = -1;

const _: () = assert!(size_of::<sys::ublksrv_io_desc>() == 24 && size_of::<sys::ublksrv_io_cmd>() == 16);

/// What a queue's ring is made of.
pub(in crate::device) struct RingSetup {
    /// The device's number.
    pub(in crate::device) device: u32,
    /// The queue's number.
    pub(in crate::device) queue: u16,
    /// Its tags.
    pub(in crate::device) depth: u16,
    /// Longest request, bytes.
    pub(in crate::device) request_bytes: u32,
    /// Buffers for its requests, if they were made before.
    pub(in crate::device) spare: Option<Region>,
    /// Whether the kernel takes commands by their `ioctl` numbers.
    pub(in crate::device) ioctl_numbers: bool,
    /// How data reaches the file.
    pub(in crate::device) transfer: Transfer,
    /// `/dev/ublkcN`.
    pub(in crate::device) character_device: Arc<File>,
    /// The images, the leaf first.
    pub(in crate::device) images: Arc<[File]>,
    /// The leaf.
    pub(in crate::device) leaf: Arc<ImageFile>,
    /// Where a new leaf appears after a snapshot.
    pub(in crate::device) handover: LeafHandover,
    /// To the engine.
    pub(in crate::device) sender: Sender<ToEngine>,
    /// Wakes this queue.
    pub(in crate::device) wake: Arc<EventFd>,
    /// Counts what goes through it.
    pub(in crate::device) counts: Arc<PortCounts>,
}

/// The holder of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    /// Its first command is not out yet.
    Unfetched,
    /// Its command is out.
    Kernel,
    /// Its request is here, and its pages are being registered.
    Registering,
    /// Its request is being served.
    Front {
        /// Its pages were registered by a command of ours, and have to be given back by one.
        by_command: bool,
    },
    /// Its command came back, and there will be no other.
    Ended,
}

/// What came out of the ring.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    /// A request; `Err` is what it is completed with.
    Request {
        /// The tag it came for.
        tag: u16,
        /// What the kernel requests.
        request: Outcome<Request>,
    },
    /// The tag's command came back without a request, or a command that must not fail did, with this negative
    /// `errno`: there will be no more.
    Ended {
        /// The tag.
        tag: u16,
        /// `-ENODEV` when the device was stopped; anything else is a refusal.
        result: i32,
    },
    /// File I/O for a piece has ended.
    Io {
        /// The piece.
        piece: PieceId,
        /// Bytes done, or a negative `errno`.
        result: i32,
    },
    /// The other side has written the eventfd. [`QueueRing::arm_wake`] must follow, to read the next write.
    Wake,
}

/// See the module's head. The ring comes first: it is dropped before the memory it was given.
pub(super) struct QueueRing {
    uring: IoUring,
    /// Mapped read-only from the driver: the request of each tag.
    descriptors: Region,
    buffers: RequestBuffers,
    /// The eventfd's count is read into this.
    wake_count: Region,
    zeros: Region,
    setup: RingSetup,
    /// The number of images in the chain.
    layers: usize,
    /// How many leaves it has served after the first one.
    exchanges: u64,
    holders: Box<[Holder]>,
    /// What each tag asks the engine for, and since when.
    asked: Box<[Option<(Reason, Instant)>]>,
    /// Since when a flush syncs the leaf, by its tag.
    syncs: Box<[Option<Instant>]>,
    /// Pieces that ended as they were submitted, with their lengths.
    filled: Vec<(PieceId, u32)>,
    ended: u16,
    file_io_in_flight: usize,
    wake_armed: bool,
    /// Where a test takes the driver's place.
    #[cfg_attr(not(feature = "simulation"), expect(dead_code, reason = "the driver has its own place"))]
    tags: Option<machine::Tags>,
}

impl QueueRing {
    /// Makes the ring and its memory. Nothing is submitted yet.
    pub(super) fn new(mut setup: RingSetup) -> Result<Self> {
        assert!((1..=MAX_LAYERS).contains(&setup.images.len()), "{} images", setup.images.len());
        let (queue, spare) = (setup.queue, setup.spare.take());
        let doing = |what: &str| format!("queue {queue}: {what}");
        let uring = build_ring(setup.depth).doing(doing("making its ring"))?;
        let buffers = RequestBuffers::new(setup.transfer, setup.depth, setup.request_bytes, spare);
        let mut buffers = buffers.doing(doing("allocating its buffers"))?;
        buffers.register(&uring, setup.depth).doing(doing("registering its buffers"))?;
        let images =
            setup.images.iter().rev().map(AsRawFd::as_raw_fd).chain(iter::repeat(NO_FILE)).take(MAX_LAYERS);
        let first = [setup.character_device.as_raw_fd(), buffers.zeros_fd().unwrap_or(NO_FILE), NO_FILE];
        let files: Vec<_> = first.into_iter().chain(images).collect();
        uring.submitter().register_files(&files).doing(doing("registering its files"))?;
        sync_through(&uring, &setup.leaf, queue);
        let (offset, length) = descriptor_range(setup.queue, setup.depth);
        let descriptors = Region::of_device(&setup.character_device, offset, length);
        let tags = machine::Tags::of(setup.device, setup.queue, setup.depth);
        machine::attend(format_args!("queue {queue}"));
        let pieces = usize::from(setup.depth) * MAX_PIECES;
        Ok(Self {
            uring,
            descriptors: descriptors.doing(doing("mapping its I/O descriptors"))?,
            buffers,
            wake_count: Region::memory(PAGE_BYTES).doing(doing("allocating a page"))?,
            zeros: Region::zeros(bytes(MAX_WRITE_ZEROS)).doing(doing("mapping zeros"))?,
            holders: vec![Holder::Unfetched; usize::from(setup.depth)].into_boxed_slice(),
            asked: vec![None; usize::from(setup.depth)].into_boxed_slice(),
            syncs: vec![None; usize::from(setup.depth)].into_boxed_slice(),
            filled: Vec::with_capacity(pieces),
            layers: setup.images.len(),
            exchanges: 0,
            setup,
            ended: 0,
            file_io_in_flight: 0,
            wake_armed: false,
            tags,
        })
    }

    /// Offers every tag to the kernel. Refusals come out of [`QueueRing::next_event`] at once.
    pub(super) fn fetch_all(&mut self) -> Result<()> {
        for tag in 0..self.setup.depth {
            let before = std::mem::replace(&mut self.holders[usize::from(tag)], Holder::Kernel);
            assert_eq!(before, Holder::Unfetched, "tag {tag} is fetched once");
            self.push_offer(tag, sys::UBLK_U_IO_FETCH_REQ, 0);
        }
        self.enter(0, None)
    }

    /// Has the other side's next write of the eventfd, or the last one that was not yet read, end a wait.
    pub(super) fn arm_wake(&mut self) {
        assert!(!self.wake_armed, "one read of the eventfd at a time");
        self.wake_armed = true;
        let count = self.wake_count.at(0, size_of::<u64>());
        let fd = Fd(self.setup.wake.as_fd().as_raw_fd());
        self.push(opcode::Read::new(fd, count, 8).build(), Token::Wake);
    }

    /// Announces what was sent.
    pub(super) fn announce(&mut self) {
        if self.setup.sender.flush() {
            self.setup.counts.wakes();
        }
    }

    /// Submits what was pushed, and sleeps until something has come back, or for so long, if there is a
    /// limit.
    pub(super) fn wait(&mut self, limit: Option<Duration>) -> Result<()> {
        self.enter(1, limit)
    }

    /// The next thing that came back, if there is one.
    pub(super) fn next_event(&mut self) -> Option<Event> {
        if let Some((piece, length)) = self.filled.pop() {
            return Some(Event::Io { piece, result: length.cast_signed() });
        }
        loop {
            let completion = self.uring.completion().next()?;
            if let Some(event) = self.take(Token::decode(completion.user_data()), completion.result()) {
                return Some(event);
            }
        }
    }

    fn take(&mut self, token: Token, result: i32) -> Option<Event> {
        Some(match token {
            Token::Command { tag } => return self.take_back(tag, result),
            Token::Register { tag } => self.registered(tag, result),
            Token::Unregister { tag } => {
                assert!(result < 0, "the kernel reports failures only");
                Event::Ended { tag, result }
            }
            Token::FileIo(piece) => {
                assert!(self.file_io_in_flight > 0, "{piece:?} has ended before it was submitted");
                self.file_io_in_flight -= 1;
                if let Some(since) = self.syncs[usize::from(piece.tag)].take() {
                    self.setup.counts.sync_ends(result, since.elapsed());
                }
                Event::Io { piece, result }
            }
            Token::Wake => {
                assert!(self.wake_armed, "the eventfd was read twice");
                assert_eq!(result, 8, "reading an eventfd that blocks gives its count");
                self.wake_armed = false;
                self.setup.counts.wakes();
                Event::Wake
            }
        })
    }

    /// Announces what was sent and submits what was pushed, without sleeping.
    pub(super) fn exchange(&mut self) -> Result<()> {
        self.announce();
        self.enter(0, None)
    }

    /// Everything that was pushed is with the kernel.
    pub(super) fn is_submitted(&mut self) -> bool {
        self.uring.submission().is_empty()
    }

    /// No request is here but `resting` ones: every other tag is with the kernel, or has ended.
    pub(super) fn serves_only(&self, resting: usize) -> bool {
        let is_served = |holder: &&Holder| matches!(holder, Holder::Registering | Holder::Front { .. });
        self.file_io_in_flight == 0 && self.holders.iter().filter(is_served).count() == resting
    }

    /// Every tag has ended: the kernel has nothing left for this queue.
    pub(super) fn has_ended(&self) -> bool {
        self.ended == self.setup.depth
    }

    /// Nothing that was submitted is still under way: the ring may be dropped.
    pub(super) fn is_quiet(&self) -> bool {
        self.has_ended() && self.file_io_in_flight == 0 && !self.wake_armed
    }

    /// Releases everything. The kernel tears a ring down asynchronously, and until then a registered file
    /// stays open, which would keep the device's number taken: so the files go first.
    pub(super) fn close(self) {
        assert!(self.is_quiet(), "a ring is closed when nothing is under way");
        if let Err(error) = self.uring.submitter().unregister_files() {
            tracing::warn!("queue {}: unregistering its files: {error}", self.setup.queue);
        }
    }

    /// Gives up all files, which nothing under way needs, before the process ends. Otherwise the kernel keeps
    /// them open, and the image's locks, until it has torn the ring down, which takes it a while after that.
    pub(super) fn leave_files(&self) {
        assert_eq!(self.file_io_in_flight, 0, "the images are left when no piece is under way");
        let none = vec![NO_FILE; FIRST_IMAGE as usize + self.layers];
        if let Err(error) = self.uring.submitter().register_files_update(0, &none) {
            tracing::warn!("queue {}: giving up its files: {error}", self.setup.queue);
        }
    }

    /// The queue's number.
    pub(super) fn queue(&self) -> u16 {
        self.setup.queue
    }

    /// Fails a request that no front can begin.
    pub(super) fn refuse(&mut self, tag: u16, errno: Errno) {
        self.end(tag, Err(errno));
    }

    fn end(&mut self, tag: u16, result: Outcome<u32>) {
        machine::step("completes a request");
        let before = std::mem::replace(&mut self.holders[usize::from(tag)], Holder::Kernel);
        let Holder::Front { by_command } = before else {
            panic!("a request is completed exactly once (tag {tag}, {before:?})")
        };
        self.setup.counts.ends(tag, result);
        if by_command {
            // Before the offer, and executed in order: the index is free when the next request needs it.
            let entry = self.command(tag, sys::UBLK_U_IO_UNREGISTER_IO_BUF, 0, u64::from(tag)).build();
            self.push(entry.flags(squeue::Flags::SKIP_SUCCESS), Token::Unregister { tag });
        }
        let result = result.map_or_else(|errno| -(errno as i32), u32::cast_signed);
        self.push_offer(tag, sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, result);
    }

    fn take_back(&mut self, tag: u16, result: i32) -> Option<Event> {
        #[cfg(feature = "simulation")]
        let result = self.tags.as_mut().map_or(result, |tags| take_simulated(tags, tag, &self.buffers));
        let holder = &mut self.holders[usize::from(tag)];
        assert_eq!(*holder, Holder::Kernel, "tag {tag} came back twice");
        if result.cast_unsigned() != sys::UBLK_IO_RES_OK {
            *holder = Holder::Ended;
            self.ended += 1;
            return Some(Event::Ended { tag, result });
        }
        let descriptor = self.descriptors.descriptor(usize::from(tag));
        if self.buffers.wants_registration(descriptor.op_flags) {
            self.setup.counts.registers_late();
            *holder = Holder::Registering;
            let entry = self.command(tag, sys::UBLK_U_IO_REGISTER_IO_BUF, 0, u64::from(tag));
            self.push(entry.build(), Token::Register { tag });
            return None;
        }
        *holder = Holder::Front { by_command: false };
        machine::step("takes a request");
        Some(self.request(tag, &descriptor))
    }

    /// The pages of a request have been registered by our command, or cannot be: then it fails.
    fn registered(&mut self, tag: u16, result: i32) -> Event {
        let by_command = result >= 0;
        let before = std::mem::replace(&mut self.holders[usize::from(tag)], Holder::Front { by_command });
        assert_eq!(before, Holder::Registering, "tag {tag} did not wait for its pages");
        if by_command {
            let descriptor = self.descriptors.descriptor(usize::from(tag));
            self.request(tag, &descriptor)
        } else {
            Event::Request { tag, request: Err(errno(-result)) }
        }
    }

    fn request(&self, tag: u16, descriptor: &sys::ublksrv_io_desc) -> Event {
        let request = descriptor::request(descriptor, self.setup.request_bytes);
        if let Ok(request) = request {
            self.setup.counts.begins(tag, request);
        }
        Event::Request { tag, request }
    }

    /// Notes a message from the engine that has arrived.
    pub(super) fn received(&mut self, message: ToFront) {
        if let ToFront::Reply { tag, .. } = message
            && let Some((reason, since)) = self.asked[usize::from(tag)].take()
        {
            self.setup.counts.answered(tag, reason, since.elapsed());
        }
    }

    /// Notes how many requests wait for room.
    pub(super) fn short_of_room(&self, requests: usize) {
        let now = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs());
        self.setup.counts.short_of_room(requests as u64, now);
    }

    /// A command that offers `tag` to the kernel.
    fn push_offer(&mut self, tag: u16, op: u32, result: i32) {
        #[cfg(feature = "simulation")]
        if self.tags.is_some() {
            return self.push_simulated(tag, op, result);
        }
        let (address, submission_address) = self.buffers.offer(tag);
        let entry = self.command(tag, op, result, address).addr(submission_address);
        self.push(entry.build(), Token::Command { tag });
    }

    /// The same where a test takes the driver's place: its line becomes readable.
    #[cfg(feature = "simulation")]
    fn push_simulated(&mut self, tag: u16, op: u32, result: i32) {
        let is_read = self.descriptors.descriptor(usize::from(tag)).op_flags & 0xff == sys::UBLK_IO_OP_READ;
        let result = (op == sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ).then_some(result);
        let length = result.filter(|_| is_read).and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
        let data = self.buffers.read_out(tag, length);
        let tags = self.tags.as_mut().expect("it is simulated");
        tags.offer(tag, result, &data);
        let line = opcode::PollAdd::new(Fd(tags.line(tag)), libc::POLLIN.cast_unsigned().into()).build();
        self.push(line, Token::Command { tag });
    }

    fn command(&self, tag: u16, op: u32, result: i32, address: u64) -> opcode::UringCmd16 {
        let op = if self.setup.ioctl_numbers { op } else { bare_number(op) };
        let command = encode(self.setup.queue, tag, result, address);
        opcode::UringCmd16::new(CHARACTER_DEVICE, op).cmd(command)
    }

    fn push(&mut self, entry: squeue::Entry, token: Token) {
        let entry = entry.user_data(token.encode());
        // SAFETY: the pointers in an entry lead into regions of this ring, which outlive it, are offsets in
        // pages that the kernel has registered, or are none.
        while unsafe { self.uring.submission().push(&entry) }.is_err() {
            self.enter(0, None).expect("a full submission queue can be submitted");
        }
    }

    /// Submits everything and waits for `want` completions, or for so long, if there is a limit.
    fn enter(&mut self, want: usize, limit: Option<Duration>) -> Result<()> {
        let mut shortages = 0;
        loop {
            let entered = match limit.map(Timespec::from) {
                None => self.uring.submitter().submit_and_wait(want),
                Some(limit) => {
                    self.uring.submitter().submit_with_args(want, &SubmitArgs::new().timespec(&limit))
                }
            };
            let Err(error) = entered else { return Ok(()) };
            match error.raw_os_error() {
                Some(libc::ETIME) => return Ok(()),
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) if shortages < MAX_SHORTAGES => {
                    shortages += 1;
                    std::thread::sleep(SHORTAGE_PAUSE);
                }
                _ => return Err(Error::io(format!("queue {}: waiting for I/O", self.setup.queue), error)),
            }
        }
    }

    /// The file of a layer.
    fn image(&self, layer: u8) -> Fixed {
        assert!(usize::from(layer) < self.layers, "layer {layer} of a chain of {}", self.layers);
        let index = self.layers - 1 - usize::from(layer);
        Fixed(FIRST_IMAGE + u32::try_from(index).expect("at most 256"))
    }

    fn assert_served(&self, tag: u16) {
        let holder = self.holders[usize::from(tag)];
        assert!(matches!(holder, Holder::Front { .. }), "tag {tag} has no request ({holder:?})");
    }
}

impl Port for QueueRing {
    fn submit(&mut self, piece: PieceId, io: FileIo) {
        let FileIo { op, file_offset, length, .. } = io;
        assert!(length > 0 || op == FileOp::Sync, "{piece:?}: I/O of nothing");
        assert!(usize::from(piece.piece) < MAX_PIECES, "{piece:?} of a request of {MAX_PIECES} pieces");
        self.assert_served(piece.tag);
        self.setup.counts.submits(io, self.layers);
        let entry = match op {
            FileOp::Read => self.buffers.read(self.image(io.layer), piece.tag, io),
            FileOp::FillZero => match self.buffers.fill_zero(ZEROS, piece.tag, io) {
                Some(entry) => entry,
                None => return self.filled.push((piece, length)),
            },
            FileOp::Write { durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                self.buffers.write(self.image(LEAF), piece.tag, io, flags)
            }
            FileOp::WriteZeros => {
                let zeros = self.zeros.at(0, bytes(length));
                opcode::Write::new(self.image(LEAF), zeros, length).offset(file_offset).build()
            }
            FileOp::ZeroRange => fallocate(self.image(LEAF), libc::FALLOC_FL_ZERO_RANGE, file_offset, length),
            FileOp::PunchHole => fallocate(self.image(LEAF), libc::FALLOC_FL_PUNCH_HOLE, file_offset, length),
            FileOp::Sync => {
                self.setup.counts.sync_starts();
                let before = self.syncs[usize::from(piece.tag)].replace(Instant::now());
                assert_eq!(before, None, "a flush syncs once");
                opcode::Fsync::new(Fixed(SYNCING)).flags(FsyncFlags::DATASYNC).build()
            }
        };
        machine::step("begins I/O of a request");
        if matches!(op, FileOp::Write { .. }) && planted(Plant::EarlyCompletion) {
            self.filled.push((piece, length));
            return self.push(entry.flags(squeue::Flags::SKIP_SUCCESS), Token::FileIo(piece));
        }
        self.file_io_in_flight += 1;
        // Otherwise completions could overflow, see `build_ring`.
        assert!(self.file_io_in_flight <= self.holders.len() * MAX_PIECES, "a piece is submitted twice");
        self.push(entry, Token::FileIo(piece));
    }

    fn resubmit(&mut self, piece: PieceId, io: FileIo) {
        self.setup.counts.submits_again();
        self.submit(piece, io);
    }

    fn change_leaf(&mut self) -> Option<Arc<Shared>> {
        let leaf = self.setup.handover.newer_than(&mut self.exchanges)?;
        let layers = leaf.shared.layers().count();
        assert!((1..=MAX_LAYERS).contains(&layers), "as many layers as there are slots, {layers}");
        assert_eq!(layers, leaf.files.len(), "each layer has its file");
        if layers != self.layers {
            let files = leaf.files.iter().rev().map(|file| file.as_fd().as_raw_fd());
            let slots = layers.max(self.layers);
            let files: Vec<_> = files.chain(iter::repeat(NO_FILE)).take(slots).collect();
            update_files(&self.uring, FIRST_IMAGE, &files);
            self.layers = layers;
        }
        sync_through(&self.uring, &leaf.files[0], self.setup.queue);
        Some(leaf.shared)
    }

    fn send(&mut self, message: ToEngine) {
        if let ToEngine::Ask { tag, ask } = message {
            let reason = Reason::of(ask);
            self.setup.counts.asks(tag, reason);
            self.asked[usize::from(tag)] = Some((reason, Instant::now()));
        }
        self.setup.sender.send(message);
    }

    fn complete(&mut self, ticket: Ticket, result: Outcome<u32>) {
        self.end(ticket.tag(), result);
    }
}

/// What a test has for `tag`, with the data of a write in its buffer.
#[cfg(feature = "simulation")]
fn take_simulated(tags: &mut machine::Tags, tag: u16, buffers: &RequestBuffers) -> i32 {
    let (result, data) = tags.take(tag);
    buffers.read_in(tag, &data);
    result
}

/// Has flushes of `queue` sync `leaf` from now on, if it may be written. None is under way.
fn sync_through(uring: &IoUring, leaf: &ImageFile, queue: u16) {
    leaf.with_queue(queue, |syncing| {
        update_files(uring, SYNCING, &[syncing.map_or(NO_FILE, |file| file.as_raw_fd())]);
    });
}

/// Puts `files` into the slots from `first` on. The ring keeps them open.
fn update_files(uring: &IoUring, first: u32, files: &[RawFd]) {
    let updated = uring.submitter().register_files_update(first, files);
    assert!(updated.as_ref().is_ok_and(|&count| count == files.len()), "slots take files: {updated:?}");
}

/// A ring whose completions do not interrupt the thread.
fn build_ring(depth: u16) -> io::Result<IoUring> {
    let entries = (2 * u32::from(depth) + 1).next_power_of_two().min(MAX_SUBMISSIONS);
    let pieces = u32::try_from(MAX_PIECES).expect("a small constant");
    // Room for the completions of everything that can be under way, so that they never overflow.
    let completions = (u32::from(depth) * (pieces + 1) + 1).next_power_of_two().max(2 * entries);
    let mut builder = IoUring::builder();
    builder.setup_cqsize(completions).setup_submit_all().setup_single_issuer();
    // Not DEFER_TASKRUN: it ends a wait with one completion, even if there are more.
    builder.setup_coop_taskrun().build(entries)
}

/// Where in `/dev/ublkcN` a queue's descriptors are: each queue has room for the greatest depth.
fn descriptor_range(queue: u16, depth: u16) -> (i64, usize) {
    let size = |tags: usize| (tags * size_of::<sys::ublksrv_io_desc>()).next_multiple_of(PAGE_BYTES);
    let greatest = i64::try_from(size(bytes(sys::UBLK_MAX_QUEUE_DEPTH))).expect("about a hundred kilobytes");
    (i64::from(sys::UBLKSRV_CMD_BUF_OFFSET) + i64::from(queue) * greatest, size(usize::from(depth)))
}

/// The bytes of a `ublksrv_io_cmd`.
fn encode(queue: u16, tag: u16, result: i32, address: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[offset_of!(sys::ublksrv_io_cmd, q_id)..][..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[offset_of!(sys::ublksrv_io_cmd, tag)..][..2].copy_from_slice(&tag.to_ne_bytes());
    bytes[offset_of!(sys::ublksrv_io_cmd, result)..][..4].copy_from_slice(&result.to_ne_bytes());
    bytes[offset_of!(sys::ublksrv_io_cmd, addr)..][..8].copy_from_slice(&address.to_ne_bytes());
    bytes
}

fn fallocate(file: Fixed, mode: i32, offset: u64, length: u32) -> squeue::Entry {
    let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
    opcode::Fallocate::new(file, u64::from(length)).offset(offset).mode(mode).build()
}

/// A 32-bit length or offset as an index.
fn bytes(value: u32) -> usize {
    value as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_a_queue_start_where_the_driver_puts_them() {
        // 4096 descriptors of 24 bytes are exactly 24 pages.
        assert_eq!(descriptor_range(0, 64), (0, 4096));
        assert_eq!(descriptor_range(3, 4096), (3 * 98304, 98304));
        assert_eq!(descriptor_range(1, 171), (98304, 8192));
    }

    #[test]
    fn a_command_is_laid_out_as_the_kernel_reads_it() {
        let mut expected = Vec::new();
        expected.extend(2_u16.to_ne_bytes());
        expected.extend(9_u16.to_ne_bytes());
        expected.extend((-5_i32).to_ne_bytes());
        expected.extend(0x10_0000_u64.to_ne_bytes());
        assert_eq!(encode(2, 9, -5, 0x10_0000), *expected);
    }

    #[test]
    fn a_ring_of_any_depth_can_be_made() {
        for depth in [1, 64, 4096] {
            let ring = build_ring(depth).expect("io_uring works here");
            assert!(ring.params().cq_entries() > u32::from(depth) * 9);
        }
    }
}
