//! What can be counted, and which file uses which: `cargo test --test tidy -- --nocapture figures`.

use std::collections::BTreeMap;

use crate::imports::Imports;
use crate::source::Source;

/// What one folder's files add up to.
#[derive(Default)]
struct Sum {
    code: usize,
    docs: usize,
    comments: usize,
    assertions: usize,
    unwraps: usize,
    unsafes: usize,
    public: usize,
}

impl Sum {
    fn of(source: &Source) -> Self {
        let words: Vec<_> = source.words().collect();
        let count = |matches: fn(&[&str]) -> bool| words.windows(2).filter(|pair| matches(pair)).count();
        Self {
            code: source.lines(false),
            docs: source.lines(true),
            comments: source.comments,
            assertions: count(|pair| {
                let name = pair[0].strip_prefix("debug_").unwrap_or(pair[0]);
                pair[1] == "!" && matches!(name, "assert" | "assert_eq" | "assert_ne" | "unreachable")
            }),
            unwraps: count(|pair| pair[0] == "." && pair[1] == "unwrap"),
            unsafes: count(|pair| pair[0] == "unsafe" && matches!(pair[1], "{" | "impl" | "fn")),
            public: count(|pair| {
                let item =
                    ["fn", "struct", "enum", "trait", "mod", "const", "type", "static", "use", "async"];
                pair[0] == "pub" && item.contains(&pair[1])
            }),
        }
    }

    fn add(&mut self, other: &Self) {
        self.code += other.code;
        self.docs += other.docs;
        self.comments += other.comments;
        self.assertions += other.assertions;
        self.unwraps += other.unwraps;
        self.unsafes += other.unsafes;
        self.public += other.public;
    }

    fn print(&self, name: &str) {
        let per_thousand = |count: usize| 1000 * count / self.code.max(1);
        println!(
            "{name:<12} code {:>6}, of 1000 lines: docs {:>4}, comments {:>3}, assertions {:>3}; unwraps {}, unsafe {}, public {}",
            self.code,
            per_thousand(self.docs),
            per_thousand(self.comments),
            per_thousand(self.assertions),
            self.unwraps,
            self.unsafes,
            self.public
        );
    }
}

#[test]
fn figures() {
    let mut lengths: Vec<_> =
        Source::all("src").flat_map(Source::functions).map(|function| function.lines).collect();
    lengths.sort_unstable();
    let at = |percent: usize| lengths[(lengths.len() - 1) * percent / 100];
    println!(
        "functions {}: median {}, p90 {}, p99 {}, max {}",
        lengths.len(),
        at(50),
        at(90),
        at(99),
        at(100)
    );
    let mut folders: BTreeMap<_, Sum> = BTreeMap::new();
    let mut all = Sum::default();
    for source in Source::all("src") {
        let sum = Sum::of(source);
        let name = source.path.iter().nth(1).expect("a file below src").to_string_lossy();
        folders.entry(name.into_owned()).or_default().add(&sum);
        all.add(&sum);
    }
    for (name, sum) in &folders {
        sum.print(name);
    }
    all.print("src");
    for (folder, uses) in Imports::read().uses() {
        println!("\nsrc/{folder}");
        let mut used_by: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (user, used) in uses {
            used_by.entry(user).or_default().push(used);
        }
        for (user, used) in &used_by {
            println!("    {user} -> {}", used.join(" "));
        }
    }
}
