//! `generate`: man pages and shell completions, made from the definition of the command line.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;
use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::error::{Doing, Result};

use super::{manual, output};

/// The shells that get completions.
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

/// The permissions of what is made.
const MODE: u32 = 0o644;

/// Write the man pages, the shell completions or the schemas of the JSON into a folder.
///
/// For packages and for installations by hand. Files of the same names are replaced.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Generate {
    /// What to write
    #[arg(value_enum)]
    what: What,
    /// The folder; it is created if there is none
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// As JSON: one object, errors too
    #[arg(long)]
    json: bool,
}

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The files that were written.
    files: Vec<WrittenPath>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum What {
    /// A page for the program, and one for each command: vhdx-ublk.8, vhdx-ublk-add.8, ...
    Man,
    /// For bash (vhdx-ublk.bash), zsh (_vhdx-ublk) and fish (vhdx-ublk.fish)
    Completions,
    /// A JSON schema for each command with --json, and for errors: add.json, list.json, error.json, ...
    Schema,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk generate man man8                    write the pages
  man --local-file man8/vhdx-ublk-add.8          read one
  vhdx-ublk generate completions completions     write the completions
  . completions/vhdx-ublk.bash                   use them in this shell
  vhdx-ublk generate schema schema               write the schemas of what --json prints

JSON: files (an array of paths).
Exit status: 0 all files are written, 1 failure, 2 wrong usage.";

impl Generate {
    /// Runs the command: `line` is the whole command line, `schemas` has the names and texts of the schemas.
    ///
    /// # Errors
    ///
    /// If a file or the folder cannot be written.
    pub fn run(&self, line: Command, schemas: impl FnOnce() -> Vec<(String, String)>) -> Result<()> {
        fs::create_dir_all(&self.folder).doing("creating the folder").map_err(|e| e.file(&self.folder))?;
        let files = match self.what {
            What::Man => manual::pages(line),
            What::Schema => schemas(),
            What::Completions => SHELLS.map(|shell| completions(shell, line.clone())).into(),
        };
        files.iter().try_for_each(|(name, text)| write(&self.folder, name, text))?;
        if !self.json {
            return Ok(());
        }
        let files = files.iter().map(|(name, _)| WrittenPath::of(self.folder.join(name))).collect();
        output::print_json(&Answer { files })
    }
}

/// The name and the text of the file for `shell`.
fn completions(shell: Shell, mut line: Command) -> (String, String) {
    let name = line.get_name().to_owned();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut line, &name, &mut text);
    let mut text = String::from_utf8(text).expect("made of names and help texts");
    if shell == Shell::Bash {
        // clap_complete 4.6 mistakes the dash of the program's name for a separator of commands.
        text = text.replace("vhdx__subcmd__ublk", "vhdx__ublk") + BASH_FILES;
    }
    let file = match shell {
        Shell::Zsh => format!("_{name}"),
        shell => format!("{name}.{shell}"),
    };
    (file, text)
}

/// The function that is generated offers options for an empty word. A word that begins with no dash is a file
/// or a device, and bash completes it if the function offers nothing.
const BASH_FILES: &str = r#"
_vhdx__ublk__files() {
    _vhdx__ublk "$@"
    if [[ $COMP_CWORD -gt 1 && $2 != -* && ${COMPREPLY[0]} == -* ]]; then
        COMPREPLY=()
    fi
}
complete -F _vhdx__ublk__files -o bashdefault -o default vhdx-ublk
"#;

/// Writes the file by another name first, so that what has the name now is replaced and not written to.
fn write(folder: &Path, name: &str, text: &str) -> Result<()> {
    let path = folder.join(name);
    let made = || {
        let mode = Permissions::from_mode(MODE);
        let mut file = tempfile::Builder::new().permissions(mode).tempfile_in(folder)?;
        file.write_all(text.as_bytes())?;
        file.persist(&path)?;
        Ok::<(), std::io::Error>(())
    };
    made().doing("writing the file").map_err(|error| error.file(&path))
}
