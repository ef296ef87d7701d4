//! Choices that one body of test code makes: all combinations, one after the other.

/// The choices of one run of the body, and how the next run's differ.
pub struct Choices {
    made: Vec<(usize, usize)>,
    at: usize,
}

impl Choices {
    /// Every combination, in order.
    pub fn exhaustive() -> Self {
        Self { made: Vec::new(), at: 0 }
    }

    /// One of `0..bound`.
    pub fn pick(&mut self, bound: usize) -> usize {
        assert!(bound > 0, "there is something to choose");
        if self.at == self.made.len() {
            self.made.push((0, bound));
        }
        let (picked, before) = self.made[self.at];
        assert_eq!(bound, before, "the same choices offer the same next choice");
        self.at += 1;
        picked
    }

    /// Moves on to the next combination; `false` when all were there.
    pub fn advance(&mut self) -> bool {
        self.at = 0;
        while let Some((picked, bound)) = self.made.pop() {
            if picked + 1 < bound {
                self.made.push((picked + 1, bound));
                return true;
            }
        }
        false
    }
}
