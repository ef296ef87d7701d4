//! Which code an input has reached: the compiler's edge counters, where the build has them (`tools/fuzz`),
//! and otherwise nothing, so that only the outcome of a trial says what is new.

use std::sync::Mutex;

/// Counters of each object file: where they start, how many bytes.
static COUNTERS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Called before `main` by every object that was compiled with counters.
// SAFETY: nothing else defines this name; the sanitizers' runtime, which would, is not linked.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, end: *mut u8) {
    let length = end as usize - start as usize;
    let mut counters = COUNTERS.lock().expect("one thread before main");
    if length > 0 && !counters.contains(&(start as usize, length)) {
        counters.push((start as usize, length));
    }
}

/// The edges reached so far, by how often in one trial: a bit per power of two.
pub struct Coverage {
    seen: Vec<Vec<u8>>,
}

impl Coverage {
    pub fn new() -> Self {
        let counters = COUNTERS.lock().expect("no panic holds it");
        Self { seen: counters.iter().map(|&(_, length)| vec![0; length]).collect() }
    }

    /// Whether the build counts at all.
    pub fn counts(&self) -> bool {
        !self.seen.is_empty()
    }

    /// Forgets what was counted since the last trial.
    pub fn start() {
        each(|_, counters| counters.fill(0));
    }

    /// Takes over what was counted; whether any of it is new.
    pub fn finish(&mut self) -> bool {
        let mut seen = std::mem::take(&mut self.seen);
        let mut new = false;
        each(|index, counters| {
            // Read once: this function is counted, too.
            let counts = counters.iter().copied().zip(&mut seen[index]);
            for (count, seen) in counts.filter(|(count, _)| *count > 0) {
                let bit = 1_u8 << count.ilog2();
                new |= *seen & bit == 0;
                *seen |= bit;
            }
        });
        self.seen = seen;
        new
    }

    /// Edges reached at least once, and all there are.
    pub fn edges(&self) -> (usize, usize) {
        let all = self.seen.iter().map(Vec::len).sum();
        (self.seen.iter().flatten().filter(|seen| **seen > 0).count(), all)
    }
}

fn each(mut act: impl FnMut(usize, &mut [u8])) {
    for (index, &(start, length)) in COUNTERS.lock().expect("no panic holds it").iter().enumerate() {
        // SAFETY: the object said that its counters are these bytes; they live as long as the program, and no
        // code but the counting itself, which is plain increments on this thread, touches them.
        act(index, unsafe { std::slice::from_raw_parts_mut(start as *mut u8, length) });
    }
}
