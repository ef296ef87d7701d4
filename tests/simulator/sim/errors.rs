//! What a host knows of writes that it has accepted and lost, and who was told: once per open file description, as
//! Linux does it (`errseq_t`). Who opens the file later is told of what nobody was told of before, and of nothing else.

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

    /// What a sync by the description with this cursor is told.
    pub fn tell(&mut self, cursor: &mut Cursor) -> Option<i32> {
        if cursor.0 == self.count {
            return None;
        }
        *cursor = Cursor(self.count);
        self.told = true;
        Some(self.errno)
    }
}

/// What a file's lost writes are told to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptions {
    file: Lost,
    /// The one that all rings share.
    shared: Cursor,
    /// The one that the engine syncs through.
    own: Cursor,
}

/// Through what something is synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    Shared,
    Own,
}

impl Descriptions {
    /// A write was lost.
    pub fn lose(&mut self, errno: i32) {
        self.file.add(errno);
    }

    /// Another process opens the file.
    pub fn open_anew(&mut self) {
        (self.shared, self.own) = (self.file.open(), self.file.open());
    }

    /// What a sync is told.
    pub fn tell(&mut self, through: Through) -> Option<i32> {
        match through {
            Through::Shared => self.file.tell(&mut self.shared),
            Through::Own => self.file.tell(&mut self.own),
        }
    }
}
