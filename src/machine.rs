//! The machine that a process runs on: its clock, its driver, its folders, and whose turn it is.
//!
//! With the cargo feature `simulation` a process may run on a machine that a test makes
//! ([`testing`](crate::design::testing)). Its variable names the folder that takes the place of `/run` and
//! `/dev`, and in it the socket at which the test answers what the driver would. At each step that other
//! processes can see, the process waits for its turn there: so the test has processes run in the order that
//! it wants, and kills them between two steps of its choice. If the test wants that, the threads that serve
//! requests wait for their turns, too. In every other build the functions here are the machine's own, or
//! nothing.

#[cfg(not(feature = "simulation"))]
pub use own::{
    Tags, VARIABLES, answers, attend, command, folder, idles, node, now, pause, run_folder, step, turn,
    waits_for,
};
#[cfg(feature = "simulation")]
pub use simulated::{
    Tags, VARIABLE, VARIABLES, answers, attend, command, folder, idles, node, now, pause, run_folder, step,
    turn, waits_for,
};

#[cfg(not(feature = "simulation"))]
mod own {
    use std::borrow::Cow;
    use std::path::Path;
    use std::thread;
    use std::time::{Duration, Instant};

    /// The variables that a process hands on to its children: none.
    pub const VARIABLES: [&str; 0] = [];

    /// The time.
    #[inline]
    pub fn now() -> Instant {
        Instant::now()
    }

    /// Waits.
    #[inline]
    pub fn pause(duration: Duration) {
        thread::sleep(duration);
    }

    /// Where a test has made a machine: nowhere.
    #[inline]
    pub const fn folder() -> Option<&'static Path> {
        None
    }

    /// The folder of this program: `usual`.
    #[inline]
    pub fn run_folder(usual: &str) -> &Path {
        Path::new(usual)
    }

    /// A node in `/dev`: the one at `path`.
    #[inline]
    pub fn node(path: &Path) -> Cow<'_, Path> {
        path.into()
    }

    /// Does nothing.
    #[inline]
    pub const fn turn(_step: &'static str) {}

    /// Does nothing.
    #[inline]
    pub const fn attend(_thread: std::fmt::Arguments<'_>) {}

    /// Does nothing.
    #[inline]
    pub const fn step(_step: &'static str) {}

    /// Does nothing.
    #[inline]
    pub const fn idles() {}

    /// Does nothing.
    #[inline]
    pub const fn waits_for(_pid: u32) {}

    /// Does nothing.
    #[inline]
    pub const fn answers() {}

    /// The answer of a test to a command of the driver: there is none.
    #[inline]
    pub const fn command(_op: u32, _command: &[u8], _payload: &mut [u8]) -> Option<Option<i32>> {
        None
    }

    /// What a test has in the place of a queue's tags: nothing.
    #[derive(Debug)]
    pub struct Tags;

    impl Tags {
        /// None.
        #[inline]
        pub const fn of(_device: u32, _queue: u16, _depth: u16) -> Option<Self> {
            None
        }
    }
}

#[cfg(feature = "simulation")]
mod simulated {
    use std::borrow::Cow;
    use std::cell::RefCell;
    use std::fmt;
    use std::io::{Read, Write};
    use std::os::fd::{AsRawFd, RawFd};
    use std::os::unix::net::UnixStream;
    use std::path::{Path, PathBuf};
    use std::process;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{LazyLock, Mutex, PoisonError};
    use std::thread;
    use std::time::{Duration, Instant};

    /// Names the folder of the machine that a test has made.
    pub const VARIABLE: &str = "VHDX_UBLK_MACHINE";

    /// The variables that a process hands on to its children.
    pub const VARIABLES: [&str; 2] = [VARIABLE, crate::simulation::PLANT_VARIABLE];

    static FOLDER: LazyLock<Option<PathBuf>> = LazyLock::new(|| std::env::var_os(VARIABLE).map(Into::into));

    /// How far the machine's clock is ahead of the one that this process has, nanoseconds.
    static AHEAD: AtomicU64 = AtomicU64::new(0);

    /// One step of the process at a time.
    static LINE: Mutex<Option<UnixStream>> = Mutex::new(None);

    thread_local! {
        /// The line of a thread that serves requests.
        static OWN_LINE: RefCell<Option<UnixStream>> = const { RefCell::new(None) };
    }

    /// Where a test has made a machine.
    pub fn folder() -> Option<&'static Path> {
        FOLDER.as_deref()
    }

    /// The folder of this program.
    pub fn run_folder(usual: &str) -> &Path {
        folder().unwrap_or(Path::new(usual))
    }

    /// A node in `/dev`, which is a file in the machine's folder.
    pub fn node(path: &Path) -> Cow<'_, Path> {
        let name = path.file_name().filter(|_| path.parent() == Some(Path::new("/dev")));
        match folder().zip(name) {
            Some((folder, name)) => folder.join(name).into(),
            None => path.into(),
        }
    }

    /// The machine's time.
    pub fn now() -> Instant {
        Instant::now() + Duration::from_nanos(AHEAD.load(Ordering::Relaxed))
    }

    /// Waits until the machine's time has come.
    pub fn pause(duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).expect("a short time");
        if ask(b's', &nanoseconds.to_ne_bytes()).is_none() {
            thread::sleep(duration);
        }
    }

    /// Waits until it is this process's turn to do `step`, which others can see.
    pub fn turn(step: &'static str) {
        ask(b't', step.as_bytes());
    }

    /// This `thread` serves requests: it waits for its turns, too, if the test wants that.
    ///
    /// # Panics
    ///
    /// If the test has gone.
    pub fn attend(thread: fmt::Arguments<'_>) {
        let Some(folder) = folder() else { return };
        let mut line = connect(folder, b'B', thread.to_string().as_bytes()).expect("the test listens");
        let [is_wanted] = read_chunk(&mut line).expect("the test answers");
        OWN_LINE.set((is_wanted != 0).then_some(line));
    }

    /// Waits until it is this thread's turn to do `step` for a request.
    pub fn step(step: &'static str) {
        OWN_LINE.with_borrow_mut(|line| {
            let Some(line) = line else { return };
            let exchanged = send(line, b't', step.as_bytes()).and_then(|()| read_chunk::<1>(line));
            exchanged.map_or_else(|_| process::exit(1), drop);
        });
    }

    /// This process does nothing by itself from now on.
    pub fn idles() {
        say(b'i', &[]);
    }

    /// It waits for what its child `pid` answers.
    pub fn waits_for(pid: u32) {
        say(b'w', &pid.to_ne_bytes());
    }

    /// It has answered its parent.
    pub fn answers() {
        say(b'n', &[]);
    }

    /// The machine's answer to a command of the driver; `Some(None)` if there is none.
    ///
    /// # Panics
    ///
    /// If the test breaks the protocol.
    pub fn command(op: u32, command: &[u8], payload: &mut [u8]) -> Option<Option<i32>> {
        let mut text = op.to_ne_bytes().to_vec();
        text.extend(&command[..32]);
        text.extend(&*payload);
        let answer = ask(b'c', &text)?;
        let (result, answer) = answer.split_first_chunk().expect("a result");
        payload[..answer.len()].copy_from_slice(answer);
        let result = i32::from_ne_bytes(*result);
        Some((result != i32::MIN).then_some(result))
    }

    /// Asks the machine, and waits for its answer. None if this process runs on no such machine.
    fn ask(kind: u8, text: &[u8]) -> Option<Vec<u8>> {
        with_line(|line| {
            send(line, kind, text)?;
            let ahead = read_chunk(line)?;
            AHEAD.store(u64::from_ne_bytes(ahead), Ordering::Relaxed);
            let length = u32::from_ne_bytes(read_chunk(line)?);
            let mut answer = vec![0; length as usize];
            line.read_exact(&mut answer)?;
            Ok(answer)
        })
    }

    fn say(kind: u8, text: &[u8]) {
        with_line(|line| send(line, kind, text));
    }

    /// The process ends with the test.
    fn with_line<T>(exchange: impl FnOnce(&mut UnixStream) -> std::io::Result<T>) -> Option<T> {
        let folder = folder()?;
        let mut line = LINE.lock().unwrap_or_else(PoisonError::into_inner);
        let exchanged = match &mut *line {
            Some(line) => exchange(line),
            none => connect(folder, b'P', &[]).and_then(|made| exchange(none.insert(made))),
        };
        Some(exchanged.unwrap_or_else(|_| process::exit(1)))
    }

    fn connect(folder: &Path, kind: u8, text: &[u8]) -> std::io::Result<UnixStream> {
        let mut line = UnixStream::connect(folder.join("machine"))?;
        let mut hello = process::id().to_ne_bytes().to_vec();
        hello.extend(text);
        send(&mut line, kind, &hello)?;
        Ok(line)
    }

    fn send(line: &mut UnixStream, kind: u8, text: &[u8]) -> std::io::Result<()> {
        let mut message = vec![kind];
        message.extend(u32::try_from(text.len()).expect("short").to_ne_bytes());
        message.extend(text);
        line.write_all(&message)
    }

    fn read_chunk<const N: usize>(line: &mut UnixStream) -> std::io::Result<[u8; N]> {
        let mut chunk = [0; N];
        line.read_exact(&mut chunk)?;
        Ok(chunk)
    }

    /// The tags of a queue: a line for each, in the place of the driver's commands.
    #[derive(Debug)]
    pub struct Tags(Vec<UnixStream>);

    impl Tags {
        /// Those of `queue` of `device`, if this process runs on a machine that a test has made.
        ///
        /// # Panics
        ///
        /// If the test has gone.
        pub fn of(device: u32, queue: u16, depth: u16) -> Option<Self> {
            let folder = folder()?;
            let line = |tag: u16| {
                let mut text = device.to_ne_bytes().to_vec();
                text.extend(queue.to_ne_bytes());
                text.extend(tag.to_ne_bytes());
                connect(folder, b'T', &text).expect("the test listens")
            };
            Some(Self((0..depth).map(line).collect()))
        }

        /// Becomes readable when there is a request for `tag`, or no more.
        pub fn line(&self, tag: u16) -> RawFd {
            self.0[usize::from(tag)].as_raw_fd()
        }

        /// Offers `tag`, with the `result` of its last request and what that has read.
        ///
        /// # Panics
        ///
        /// If the test has gone.
        pub fn offer(&mut self, tag: u16, result: Option<i32>, data: &[u8]) {
            let mut text = result.unwrap_or_default().to_ne_bytes().to_vec();
            text.extend(data);
            let kind = if result.is_some() { b'D' } else { b'F' };
            send(&mut self.0[usize::from(tag)], kind, &text).expect("the test listens");
        }

        /// What has come for `tag`: a result, and the data of a write.
        ///
        /// # Panics
        ///
        /// If the test has gone.
        pub fn take(&mut self, tag: u16) -> (i32, Vec<u8>) {
            let line = &mut self.0[usize::from(tag)];
            let result = i32::from_ne_bytes(read_chunk(line).expect("the test listens"));
            let length = u32::from_ne_bytes(read_chunk(line).expect("the test listens"));
            let mut data = vec![0; length as usize];
            line.read_exact(&mut data).expect("the test listens");
            (result, data)
        }
    }
}
