//! The command line: one file per command.
//!
//! Standard output carries the answer and nothing else; everything else goes to standard error. The exit
//! status is 0 for success, 1 for failure, 2 for wrong usage; a command that has others says so in its help.
//! One with `--json` gives its error as JSON too, on standard output.

mod add;
mod check;
mod compact;
mod compare;
mod convert;
mod create;
mod del;
mod detached;
mod disk_source;
mod doctor;
mod drawing;
mod enable;
mod features;
mod generate;
mod generator;
mod grow;
mod help;
mod helper;
mod info;
mod journal;
mod list;
mod logging;
mod manual;
mod map;
mod measure;
mod merge;
mod metrics;
mod mount;
mod move_chain;
mod notify;
mod output;
mod parent_options;
mod progress;
mod recover;
mod relink;
mod resize;
mod respawn;
mod salvage;
mod schema;
mod served;
mod served_layer;
mod session;
mod set;
mod size;
mod snapshot;
mod snapshot_list;
mod snapshot_revert;
mod snapshot_target;
mod start;
mod stats;
mod target_shape;
mod trim;
mod umount;
mod upgrade;

use std::ffi::{OsStr, OsString};
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use clap::error::{ContextKind, ContextValue};
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use vhdx_ublk::device::confine;
use vhdx_ublk::error::{Error, Kind};
use vhdx_ublk::system::units;

/// Exit statuses, as the help text states them.
const SUCCESS: u8 = 0;
const FAILURE: u8 = 1;
const WRONG_USAGE: u8 = 2;

/// The exit status of a daemon if the device is there, and not served by this process. A service manager
/// starts the service again, unless it knows the next daemon. That may have ended before the manager could
/// learn of it.
const WAITING: u8 = 3;

/// Serve VHDX disk images as Linux block devices.
#[derive(Parser)]
#[command(version, max_term_width = 100, after_help = AFTER_HELP, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    verbosity: logging::Verbosity,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk create disk.vhdx --size 10G      create an empty disk of 10 GiB
  vhdx-ublk add disk.vhdx                    serve it; prints the device: /dev/ublkb0
  vhdx-ublk del /dev/ublkb0                  remove the device and close its image
  vhdx-ublk check disk.vhdx                  examine the image's structure

`vhdx-ublk help` lists tasks, too, and `vhdx-ublk help TASK` shows how each is done.
Exit status: 0 success, 1 failure, 2 wrong usage. Where a command has others, its --help lists them.";

#[derive(Subcommand)]
enum Command {
    #[command(visible_alias = "attach")]
    Add(add::Add),
    #[command(visible_aliases = ["detach", "rm", "stop"], aliases = ["delete", "remove"])]
    Del(del::Del),
    #[command(visible_alias = "ls")]
    List(list::List),
    Recover(recover::Recover),
    Upgrade(upgrade::Upgrade),
    Stats(stats::Stats),
    Metrics(metrics::Metrics),
    Doctor(doctor::Doctor),
    Session(session::Sessions),
    Snapshot(snapshot::Snapshot),
    Enable(enable::Enable),
    Disable(enable::Disable),
    Start(start::Start),
    #[command(name = units::GENERATOR, hide = true)]
    Generator(generator::Generator),
    Mount(mount::Mount),
    #[command(alias = "unmount")]
    Umount(umount::Umount),
    Create(create::Create),
    Info(info::Info),
    Map(map::Map),
    #[command(alias = "verify")]
    Check(check::Check),
    Relink(relink::Relink),
    #[command(visible_alias = "grow")]
    Resize(resize::Resize),
    Merge(merge::Merge),
    Move(move_chain::Move),
    Set(set::Set),
    #[command(visible_alias = "shrink")]
    Compact(compact::Compact),
    Salvage(salvage::Salvage),
    Convert(convert::Convert),
    #[command(alias = "diff")]
    Compare(compare::Compare),
    Measure(measure::Measure),
    Features(features::Features),
    Generate(generate::Generate),
    #[command(hide = true)]
    Respawn(respawn::Respawn),
    #[command(name = "mount.vhdx", hide = true)]
    MountHelper(helper::MountHelper),
    #[command(name = "umount.vhdx", hide = true)]
    UmountHelper(helper::UmountHelper),
    Help(help::Help),
}

/// Commands that are run under names of their own.
const OTHER_NAMES: [&str; 3] = [units::GENERATOR, "mount.vhdx", "umount.vhdx"];

impl Command {
    /// The exit statuses for a failure and for wrong usage.
    fn failures(&self) -> (u8, u8) {
        match self {
            Self::Check(_) => (FAILURE, FAILURE),
            Self::Compare(_) => (compare::FAILURE, WRONG_USAGE),
            Self::MountHelper(_) | Self::UmountHelper(_) => (helper::FAILURE, helper::WRONG_USAGE),
            _ => (FAILURE, WRONG_USAGE),
        }
    }

    /// Runs the command; returns the exit status.
    fn run(self, verbose: bool) -> Result<u8> {
        match self {
            Self::Add(add) => add.run()?,
            Self::Del(del) => return Ok(del.run()?),
            Self::List(list) => return list.run(),
            Self::Stats(stats) => stats.run()?,
            Self::Metrics(metrics) => metrics.run()?,
            Self::Doctor(doctor) => return Ok(doctor.run()?),
            Self::Recover(recover) => return Ok(recover.run()?),
            Self::Respawn(respawn) => respawn.run()?,
            Self::Upgrade(upgrade) => upgrade.run()?,
            Self::Session(sessions) => sessions.run()?,
            Self::Snapshot(snapshot) => snapshot.run()?,
            Self::Enable(enable) => enable.run()?,
            Self::Disable(disable) => disable.run()?,
            Self::Start(start) => return Ok(start.run()?),
            Self::Generator(generator) => generator.run(),
            Self::Mount(mount) => mount.run()?,
            Self::Umount(umount) => return Ok(umount.run()?),
            Self::MountHelper(mount) => mount.run(verbose)?,
            Self::UmountHelper(umount) => umount.run(verbose)?,
            Self::Create(create) => create.run()?,
            Self::Info(info) => return Ok(info.run()?),
            Self::Map(map) => map.run()?,
            Self::Check(check) => return Ok(check.run()?),
            Self::Relink(relink) => relink.run()?,
            Self::Resize(resize) => resize.run()?,
            Self::Merge(merge) => merge.run()?,
            Self::Move(chain) => chain.run()?,
            Self::Set(set) => set.run()?,
            Self::Compact(compact) => return Ok(compact.run()?),
            Self::Salvage(salvage) => return Ok(salvage.run()?),
            Self::Convert(convert) => convert.run()?,
            Self::Compare(compare) => return Ok(compare.run()?),
            Self::Measure(measure) => measure.run()?,
            Self::Features(features) => features.run()?,
            Self::Generate(generate) => generate.run(Cli::command(), schema::files)?,
            Self::Help(help) => help.run(Cli::command())?,
        }
        Ok(SUCCESS)
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    // A write beyond the file size limit (`ulimit -f`) then fails with an error. Otherwise the signal kills
    // the program in the middle of its work.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::new(AtomicBool::new(false)));
    let arguments = by_name(std::env::args_os().collect());
    let (Cli { command, verbosity }, json) = match parse(&arguments) {
        Ok(parsed) => parsed,
        Err(error) => return misused(&error, arguments.get(1..).unwrap_or_default()),
    };
    logging::start(verbosity);
    confine::raise_descriptors();
    let (failure, misuse) = command.failures();
    let error = match command.run(verbosity.is_verbose()) {
        Ok(status) => return status.into(),
        Err(error) => error,
    };
    let error = output::as_typed(error, arguments.get(1..).unwrap_or_default());
    output::report(error.as_ref(), json);
    ExitCode::from(if output::kind(error.as_ref()) == Kind::Usage { misuse } else { failure })
}

/// The command line, and whether it asks for JSON.
fn parse(arguments: &[OsString]) -> clap::error::Result<(Cli, bool)> {
    let mut line = Cli::command();
    let mut matches = line.try_get_matches_from_mut(arguments).map_err(|error| with_guess(error, &line))?;
    let json = wants_json(&matches);
    let cli = Cli::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut line))?;
    Ok((cli, json))
}

/// Words that people try for a command with an option.
const MEANT: [(&str, &str); 2] = [("repair", "check --repair"), ("fix", "check --repair")];

/// The error, in which no command is suggested that `line` hides: a person has no use for it.
fn with_guess(mut error: clap::Error, line: &clap::Command) -> clap::Error {
    let word = match error.get(ContextKind::InvalidSubcommand) {
        Some(ContextValue::String(word)) => word.clone(),
        _ => return error,
    };
    let is_hidden = |name: &String| line.find_subcommand(name).is_some_and(clap::Command::is_hide_set);
    let suggested = match error.remove(ContextKind::SuggestedSubcommand) {
        Some(ContextValue::Strings(names)) => names,
        Some(ContextValue::String(name)) => vec![name],
        _ => Vec::new(),
    };
    let meant = MEANT.iter().find(|(tried, _)| *tried == word).map(|(_, meant)| vec![(*meant).to_owned()]);
    let guesses = meant.unwrap_or_else(|| suggested.into_iter().filter(|name| !is_hidden(name)).collect());
    error.remove(ContextKind::Suggested);
    if !guesses.is_empty() {
        error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(guesses));
    }
    error
}

/// Whether the innermost command has `--json`.
fn wants_json(matches: &ArgMatches) -> bool {
    match matches.subcommand() {
        Some((_, matches)) => wants_json(matches),
        None => matches.try_get_one("json").is_ok_and(|json| json == Some(&true)),
    }
}

/// The arguments, with the command that the program's own name stands for.
fn by_name(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let name = arguments.first().and_then(|path| Path::new(path).file_name());
    if let Some(command) = OTHER_NAMES.into_iter().find(|other| name == Some(OsStr::new(other))) {
        arguments.insert(1, command.into());
    }
    arguments
}

/// Prints the help that was asked for, or what is wrong with the command line. The exit status 2 of `check`
/// means corruption, so its wrong usage is a plain failure.
fn misused(error: &clap::Error, arguments: &[OsString]) -> ExitCode {
    let mut options = arguments.iter().take_while(|argument| *argument != "--");
    if error.use_stderr() && options.any(|argument| argument == "--json") {
        output::report(&misuse(&error.to_string(), arguments), true);
    } else if let Err(unwritten) = error.print().and_then(|()| io::stdout().flush())
        && unwritten.kind() != io::ErrorKind::BrokenPipe
        && !error.use_stderr()
    {
        output::report(&Error::io("writing the output", unwritten), false);
        return ExitCode::from(FAILURE);
    }
    match (error.use_stderr(), arguments.first().and_then(|command| command.to_str())) {
        (false, _) => ExitCode::SUCCESS,
        (true, Some("check")) => ExitCode::from(FAILURE),
        (true, Some("mount.vhdx" | "umount.vhdx")) => ExitCode::from(helper::WRONG_USAGE),
        (true, _) => ExitCode::from(WRONG_USAGE),
    }
}

/// What is wrong with the command line, from the `text` for people: its first lines say what, and perhaps
/// what was meant; then it repeats the usage.
fn misuse(text: &str, arguments: &[OsString]) -> Error {
    let told = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    let told = told.filter(|line| !line.is_empty() && !line.starts_with("For more information"));
    let (tips, what): (Vec<&str>, Vec<&str>) = told.partition(|line| line.starts_with("tip: "));
    let what = what.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let mut tips = tips.iter().filter_map(|tip| tip.strip_prefix("tip: "));
    let remedy = tips.find(|tip| tip.contains("similar")).map_or_else(
        || {
            let (mut words, mut command) = (vec!["vhdx-ublk".to_owned()], Cli::command());
            for argument in arguments {
                let Some(next) = command.find_subcommand(argument) else { break };
                words.push(next.get_name().to_owned());
                command = next.clone();
            }
            words.join(" ") + " --help"
        },
        str::to_owned,
    );
    Error::new(Kind::Usage, what).remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    /// Longer lines would be wrapped raggedly.
    fn long_lines(command: &clap::Command, found: &mut Vec<String>) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let long = help.lines().filter(|line| line.chars().count() > 100);
        found.extend(long.map(|line| format!("{}: {line}", command.get_name())));
        command.get_subcommands().for_each(|command| long_lines(command, found));
    }

    #[test]
    fn lines_of_help_texts_fit_the_terminal() {
        let mut found = Vec::new();
        long_lines(&Cli::command(), &mut found);
        assert_eq!(found, Vec::<String>::new());
    }

    /// The calls of this program in a line of shell: the words of each, without redirections.
    fn calls(line: &str) -> Vec<Vec<String>> {
        let calls = line.match_indices("vhdx-ublk ").map(|(at, _)| &line[at..]);
        let ends = |call: &str| call.find(['|', ';', ')', '&', '`']).unwrap_or(call.len());
        let words = |call: &str| {
            // A comment is set off by two spaces.
            let call = call[..ends(call)].split("  ").next().unwrap_or_default();
            let words = call.split(' ').filter(|word| !word.is_empty() && !word.contains(['<', '>']));
            words.map(|word| word.trim_matches('\'').to_owned()).collect()
        };
        calls.map(words).collect()
    }

    fn parse_examples(command: &clap::Command, count: &mut usize) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        for line in help.lines().filter(|line| line.starts_with("  ")) {
            for call in calls(line) {
                *count += 1;
                let parsed = Cli::try_parse_from(&call);
                assert!(parsed.is_ok(), "{line}: {}", parsed.err().expect("looked at"));
            }
        }
        command.get_subcommands().for_each(|command| parse_examples(command, count));
    }

    /// Every example of a help text and of the guide is right usage, of commands that need a device too.
    #[test]
    fn examples_are_right_usage() {
        let mut count = 0;
        parse_examples(&Cli::command(), &mut count);
        for (page, text) in help::PAGES {
            // The odd parts are between fences; a file or a version behind the name is no command.
            let blocks = text.split("```").skip(1).step_by(2).flat_map(str::lines);
            let is_call =
                |call: &Vec<String>| call.get(1).is_some_and(|word| word.starts_with(char::is_alphabetic));
            for call in blocks.flat_map(calls).filter(is_call) {
                count += 1;
                let parsed = Cli::try_parse_from(&call);
                assert!(parsed.is_ok(), "{page}: {}", parsed.err().expect("looked at"));
            }
        }
        assert!(count > 50, "{count}");
    }

    #[test]
    fn under_another_name_the_program_is_that_command() {
        let command = |words: &[&str]| {
            let arguments = by_name(words.iter().map(OsString::from).collect());
            Cli::try_parse_from(arguments).map(|cli| cli.command)
        };
        let mount = ["/sbin/mount.vhdx", "a.vhdx", "/mnt", "-o", "ro,partition=2", "-v"];
        assert!(matches!(command(&mount), Ok(Command::MountHelper(_))));
        let umount = ["umount.vhdx", "/mnt", "-l", "-t", "vhdx.ntfs3"];
        assert!(matches!(command(&umount), Ok(Command::UmountHelper(_))));
        assert!(matches!(command(&["./vhdx-ublk", "list"]), Ok(Command::List(_))));
    }

    /// What a person means by a word of theirs is suggested, and no command that is for programs.
    #[test]
    fn a_wrong_command_is_guessed_and_no_hidden_one_is() {
        let told = |word: &str| {
            let error = parse(&["vhdx-ublk".into(), word.into()]).err().expect("no command");
            error.to_string()
        };
        for word in ["repair", "fix"] {
            assert!(told(word).contains("'check --repair'"), "{}", told(word));
        }
        assert!(told("conver").contains("'convert'"), "{}", told("conver"));
        for hidden in Cli::command().get_subcommands().filter(|command| command.is_hide_set()) {
            let word = format!("{}x", hidden.get_name());
            let told = told(&word);
            let tip = told.lines().find(|line| line.contains("tip:")).unwrap_or_default();
            assert!(!tip.contains(&format!("'{}'", hidden.get_name())), "{told}");
            assert!(!told.contains("\n\n\n"), "{told}");
        }
        let command =
            |words: &[&str]| Cli::try_parse_from(["vhdx-ublk"].iter().chain(words)).map(|cli| cli.command);
        for word in ["delete", "remove"] {
            assert!(matches!(command(&[word, "0"]), Ok(Command::Del(_))));
        }
        assert!(matches!(command(&["unmount", "/mnt"]), Ok(Command::Umount(_))));
        assert!(matches!(command(&["verify", "a"]), Ok(Command::Check(_))));
        assert!(matches!(command(&["diff", "a", "b"]), Ok(Command::Compare(_))));
    }

    #[test]
    fn wrong_usage_is_told_in_one_line_with_advice() {
        let told = |words: &[&str]| {
            let error = Cli::try_parse_from(["vhdx-ublk"].iter().chain(words)).err().expect("wrong usage");
            let arguments: Vec<OsString> = words.iter().map(OsString::from).collect();
            let error = misuse(&error.to_string(), &arguments);
            (error.message(), error.remedy_text().unwrap_or_default().to_owned())
        };
        assert_eq!(
            told(&["compare", "a", "--json"]),
            (
                "the following required arguments were not provided: <OTHER>".into(),
                "vhdx-ublk compare --help".into()
            )
        );
        let (what, remedy) = told(&["info", "--jsom", "a", "--json"]);
        assert_eq!(what, "unexpected argument '--jsom' found");
        assert!(remedy.contains("'--json'"), "{remedy}");
        let (what, remedy) = told(&["session", "discard", "--frobnicate", "a", "--json"]);
        assert_eq!(what, "unexpected argument '--frobnicate' found");
        assert_eq!(remedy, "vhdx-ublk session discard --help");
    }
}
