//! Which module uses which: every path in the sources, followed through the names that modules pass on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::source::{Source, Token};

/// A module, by its names from the crate's root, which is empty.
type Module = Vec<String>;

/// The modules of `src`, with the paths that lead out of each.
pub struct Imports {
    /// What each module calls the items that it imports.
    names: BTreeMap<Module, BTreeMap<String, Vec<String>>>,
    /// Each path from the root, with the module that uses it.
    paths: Vec<(Module, Vec<String>)>,
}

impl Imports {
    pub fn read() -> Self {
        let names = Source::all("src").map(|source| (module(&source.path), BTreeMap::new())).collect();
        let mut imports = Self { names, paths: Vec::new() };
        for source in Source::all("src") {
            imports.scan(&module(&source.path), &source.tokens);
        }
        imports
    }

    /// Under the path of each folder, which of its files (or folders) uses which. A folder's `mod.rs` ties
    /// its files together and is none of them.
    pub fn uses(&self) -> BTreeMap<String, BTreeSet<(String, String)>> {
        let mut uses: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for (from, path) in &self.paths {
            let to = self.resolve(path.clone());
            let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
            if let (Some(user), Some(used)) = (from.get(shared), to.get(shared)) {
                uses.entry(from[..shared].join("/")).or_default().insert((user.clone(), used.clone()));
            }
        }
        uses
    }

    /// The module in which the item at `path` is.
    fn resolve(&self, mut path: Vec<String>) -> Module {
        let mut depth = 0;
        while depth < path.len() {
            let renamed = self.names.get(&path[..depth]).and_then(|names| names.get(&path[depth]));
            if self.names.contains_key(&path[..=depth]) {
                depth += 1;
            } else if let Some(meant) = renamed {
                path = meant.iter().chain(&path[depth + 1..]).cloned().collect();
                depth = 0;
            } else {
                break;
            }
        }
        path.truncate(depth);
        path
    }

    /// Notes the paths of one file: those in `use`, and those in the code that begin with `crate`, `super` or
    /// the library's name.
    fn scan(&mut self, file: &Module, tokens: &[Token]) {
        // The modules inside the file, each with the depth of its braces.
        let mut inner: Vec<(String, usize)> = Vec::new();
        let mut depth = 0;
        let mut at = 0;
        let text = |at: usize| tokens.get(at).map_or("", |token| token.text.as_str());
        while at < tokens.len() {
            match text(at) {
                "{" => depth += 1,
                "}" => {
                    depth -= 1;
                    inner.pop_if(|(_, opened)| *opened == depth);
                }
                "mod" if text(at + 2) == "{" => inner.push((text(at + 1).into(), depth)),
                _ => {}
            }
            let here: Module = file.iter().chain(inner.iter().map(|(name, _)| name)).cloned().collect();
            let begins = |word: &str| matches!(word, "crate" | "super" | "vhdx_ublk");
            if text(at) == "use" && text(at + 1) != "<" {
                at = self.tree(file, &here, tokens, at + 1, &[]);
            } else if begins(text(at)) && text(at + 1) == "::" {
                let mut path = vec![text(at).to_owned()];
                while text(at + 1) == "::" && text(at + 2).starts_with(|first: char| first.is_alphabetic()) {
                    path.push(text(at + 2).into());
                    at += 2;
                }
                self.note(file, &here, &path, None);
                at += 1;
            } else {
                at += 1;
            }
        }
    }

    /// Notes the branches of the `use` at `at`, which begin with `stem`; says where it ends.
    fn tree(
        &mut self,
        file: &Module,
        here: &Module,
        tokens: &[Token],
        mut at: usize,
        stem: &[String],
    ) -> usize {
        let mut path = stem.to_vec();
        let mut alias = None;
        loop {
            match tokens[at].text.as_str() {
                "::" => {}
                "{" => {
                    at += 1;
                    while tokens[at].text != "}" {
                        at = self.tree(file, here, tokens, at, &path);
                        at += usize::from(tokens[at].text == ",");
                    }
                    return at + 1;
                }
                "as" => {
                    alias = Some(tokens[at + 1].text.clone());
                    at += 1;
                }
                ";" | "," | "}" => break,
                "self" if !path.is_empty() => {}
                name => path.push(name.into()),
            }
            at += 1;
        }
        let alias = alias.or_else(|| path.last().cloned());
        self.note(file, here, &path, alias);
        at
    }

    /// Notes that module `file`, at `here` in it, uses the item at `path`, by the name `alias`.
    fn note(&mut self, file: &Module, here: &Module, path: &[String], alias: Option<String>) {
        let mut base = here.clone();
        let mut rest = path;
        let Some(first) = path.first() else { return };
        if first == "crate" || first == "vhdx_ublk" {
            base.clear();
            rest = &path[1..];
        } else if first == "self" || first == "super" {
            while let Some("super" | "self") = rest.first().map(String::as_str) {
                if rest[0] == "super" {
                    base.pop();
                }
                rest = &rest[1..];
            }
        } else {
            base.push(first.clone());
            if !self.names.contains_key(&base) {
                return; // another crate's
            }
            base.pop();
        }
        base.extend_from_slice(rest);
        if let Some(alias) = alias.filter(|_| file == here) {
            self.names.get_mut(file).expect("each file is a module").insert(alias, base.clone());
        }
        self.paths.push((file.clone(), base));
    }
}

/// The module that a file below `src` is. The program's own file is `main`.
fn module(path: &Path) -> Module {
    let path = path.strip_prefix("src").expect("a file below src").with_extension("");
    let mut names: Module = path.iter().map(|name| name.to_string_lossy().into()).collect();
    if names.last().is_some_and(|name| name == "mod") || names == ["lib"] {
        names.pop();
    }
    names
}

/// The circles in `uses`: in each set, every name uses every other, at least by way of others.
pub fn circles(uses: &BTreeSet<(String, String)>) -> BTreeSet<BTreeSet<String>> {
    let reached = |from: &str| {
        let mut reached = BTreeSet::new();
        let mut left = vec![from];
        while let Some(user) = left.pop() {
            let next = uses.iter().filter(|(from, _)| from == user).map(|(_, to)| to.as_str());
            left.extend(next.filter(|used| reached.insert((*used).to_owned())));
        }
        reached
    };
    let all: BTreeMap<_, _> = uses.iter().map(|(user, _)| (user.as_str(), reached(user))).collect();
    let circle = |user: &str| {
        let back =
            all[user].iter().filter(|used| all.get(used.as_str()).is_some_and(|back| back.contains(user)));
        back.cloned().collect::<BTreeSet<_>>()
    };
    all.keys().map(|user| circle(user)).filter(|circle| !circle.is_empty()).collect()
}
