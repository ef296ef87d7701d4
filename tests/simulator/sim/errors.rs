//! What a host knows of writes that it has accepted and lost. As in Linux (`errseq_t`), each open file
//! description gets the error once; a description that is opened later gets it only if no other has.

/// Lost writes of one file.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lost {
    count: u64,
    errno: i32,
    told: bool,
}

/// How far one description has been told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor(u64);

impl Lost {
    /// Something was lost.
    pub fn add(&mut self, errno: i32) {
        *self = Self { count: self.count + 1, errno, told: false };
    }

    /// The cursor of a description that is opened now.
    pub fn open(&self) -> Cursor {
        Cursor(if self.told { self.count } else { self.count.saturating_sub(1) })
    }

    /// The error of a sync by the description with this cursor.
    pub fn tell(&mut self, cursor: &mut Cursor) -> Option<i32> {
        if cursor.0 == self.count {
            return None;
        }
        *cursor = Cursor(self.count);
        self.told = true;
        Some(self.errno)
    }
}

/// The most queues of a device that have descriptions.
const QUEUES: usize = 8;

/// The descriptions to which a file's lost writes are reported.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptions {
    file: Lost,
    /// The one that all rings share.
    shared: Cursor,
    /// The one that the engine syncs through.
    own: Cursor,
    /// Those that the queues sync through.
    queues: [Cursor; QUEUES],
}

/// Through what something is synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    Shared,
    Own,
    Queue(usize),
}

impl Descriptions {
    /// A write was lost.
    pub fn lose(&mut self, errno: i32) {
        self.file.add(errno);
    }

    /// Another process opens the file.
    pub fn open_anew(&mut self) {
        let opened = self.file.open();
        (self.shared, self.own, self.queues) = (opened, opened, [opened; QUEUES]);
    }

    /// The error of a sync.
    pub fn tell(&mut self, through: Through) -> Option<i32> {
        match through {
            Through::Shared => self.file.tell(&mut self.shared),
            Through::Own => self.file.tell(&mut self.own),
            Through::Queue(queue) => self.file.tell(&mut self.queues[queue]),
        }
    }
}
