//! A source file as the compiler's tokens, without what only its tests need.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::LazyLock;

use proc_macro2::{Delimiter, Group, Spacing, Span, TokenStream, TokenTree};

/// The repository's folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `folder` (or `folder` itself, if it is a file), by their path from the root, in order.
pub fn files(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![PathBuf::from(folder)];
    while let Some(path) = left.pop() {
        let here = root().join(&path);
        if here.is_dir() {
            for entry in fs::read_dir(&here).expect("the repository can be read") {
                left.push(path.join(entry.expect("the repository can be read").file_name()));
            }
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The text of a file, `None` if it is not text.
pub fn text(path: &Path) -> Option<String> {
    String::from_utf8(fs::read(root().join(path)).expect("the repository can be read")).ok()
}

/// One token, or one side of a group.
#[derive(Clone, Debug)]
pub struct Token {
    pub text: String,
    /// Its first and last line.
    pub lines: (usize, usize),
    /// It is documentation.
    pub doc: bool,
}

/// A Rust file.
pub struct Source {
    /// From the root.
    pub path: PathBuf,
    /// All but the items under `#[cfg(test)]`.
    pub tokens: Vec<Token>,
    /// The lines that are plain comments and nothing else.
    pub comments: usize,
}

/// A function.
pub struct Function {
    pub name: String,
    /// Where it begins.
    pub line: usize,
    /// From its `fn` to its closing brace.
    pub lines: usize,
}

impl Source {
    pub fn read(path: &Path) -> Self {
        let text = text(path).expect("sources are UTF-8");
        let stream =
            TokenStream::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut tokens = Vec::new();
        flatten(stream, &mut tokens);
        let is_comment = |line: &&str| {
            let line = line.trim_start();
            line.starts_with("//") && !line.starts_with("///") && !line.starts_with("//!")
        };
        let comments = text.lines().filter(is_comment).count();
        Self { path: path.into(), tokens: without_tests(&tokens), comments }
    }

    /// The source files below `folder`; of those below `src`, none that only tests use.
    pub fn all(folder: &str) -> impl Iterator<Item = &'static Self> {
        static ALL: LazyLock<Vec<Source>> = LazyLock::new(|| {
            let rust = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "rs");
            let for_tests = |path: &PathBuf| path.starts_with("src") && path.ends_with("testing.rs");
            let paths = ["src", "tests", "benches"].into_iter().flat_map(files);
            paths.filter(|path| rust(path) && !for_tests(path)).map(|path| Source::read(&path)).collect()
        });
        ALL.iter().filter(move |source| source.path.starts_with(folder))
    }

    /// The texts of all tokens but documentation.
    pub fn words(&self) -> impl Iterator<Item = &str> {
        self.tokens.iter().filter(|token| !token.doc).map(|token| token.text.as_str())
    }

    /// How many lines have a token of the kind.
    pub fn lines(&self, doc: bool) -> usize {
        let of_kind = self.tokens.iter().filter(|token| token.doc == doc);
        of_kind.flat_map(|token| token.lines.0..=token.lines.1).collect::<BTreeSet<_>>().len()
    }

    /// Its functions that have a body.
    pub fn functions(&self) -> Vec<Function> {
        let tokens = &self.tokens;
        let starts = (0..tokens.len().saturating_sub(1))
            .filter(|&at| tokens[at].text == "fn" && tokens[at + 1].text != "(");
        let function = |at: usize| {
            let open = body(tokens, at)?;
            let end = tokens[closing(tokens, open)].lines.1;
            let line = tokens[at].lines.0;
            Some(Function { name: tokens[at + 1].text.clone(), line, lines: end - line + 1 })
        };
        starts.filter_map(function).collect()
    }
}

/// Puts the tokens of `stream` into one row: `::` is one of them, and so is a piece of documentation.
fn flatten(stream: TokenStream, row: &mut Vec<Token>) {
    let trees: Vec<_> = stream.into_iter().collect();
    let mut at = 0;
    while at < trees.len() {
        let span = trees[at].span();
        let token = |text: &str, span: Span| Token {
            text: text.into(),
            lines: (span.start().line, span.end().line),
            doc: false,
        };
        match &trees[at..] {
            [TokenTree::Punct(first), TokenTree::Punct(second), ..]
                if first.as_char() == ':' && first.spacing() == Spacing::Joint && second.as_char() == ':' =>
            {
                row.push(token("::", span));
                at += 1;
            }
            [TokenTree::Punct(hash), TokenTree::Group(group), ..]
                if hash.as_char() == '#' && is_doc(group) =>
            {
                row.push(Token { doc: true, ..token("#", group.span()) });
                at += 1;
            }
            [TokenTree::Punct(hash), TokenTree::Punct(_), TokenTree::Group(group), ..]
                if hash.as_char() == '#' && is_doc(group) =>
            {
                row.push(Token { doc: true, ..token("#", group.span()) });
                at += 2;
            }
            [TokenTree::Group(group), ..] => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::None => ("", ""),
                };
                row.push(token(open, group.span_open()));
                flatten(group.stream(), row);
                row.push(token(close, group.span_close()));
            }
            [tree, ..] => row.push(token(&tree.to_string(), span)),
            [] => unreachable!("a tree is left"),
        }
        at += 1;
    }
}

/// Whether these are the brackets of `#[doc = "..."]`, as which comments with three strokes are read.
fn is_doc(group: &Group) -> bool {
    let first = group.stream().into_iter().next();
    matches!(first, Some(TokenTree::Ident(name)) if name == "doc")
}

/// Leaves out the items under `#[cfg(test)]`.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let mut kept = Vec::with_capacity(tokens.len());
    let mut at = 0;
    while at < tokens.len() {
        let ahead: Vec<_> = tokens[at..].iter().take(7).map(|token| token.text.as_str()).collect();
        if ahead == ["#", "[", "cfg", "(", "test", ")", "]"] {
            at = body(tokens, at + 7).map_or_else(
                || (at..tokens.len()).find(|&at| tokens[at].text == ";").expect("an item ends") + 1,
                |open| closing(tokens, open) + 1,
            );
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

/// Where the body of the item at `at` opens; `None` if it has none.
fn body(tokens: &[Token], at: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate().skip(at) {
        match token.text.as_str() {
            "(" | "[" => depth += 1,
            ")" | "]" => depth -= 1,
            "{" if depth == 0 => return Some(at),
            ";" if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// Where the group that opens at `open` ends.
fn closing(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    panic!("a group that opens ends");
}
