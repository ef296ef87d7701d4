//! `vhdx-ublk`: parses, runs, prints the error with its remedy, sets the exit status.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
