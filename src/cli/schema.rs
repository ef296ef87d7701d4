//! The schemas of what `--json` prints, derived from the very types that are printed.
//!
//! Invariant: fields are only ever added. `tests/formats/json.txt` keeps what was printed so far.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema};

use vhdx_ublk::device::features::Feature;
use vhdx_ublk::device::order::Snapped;
use vhdx_ublk::device::upgrade::Upgraded;
use vhdx_ublk::operations::convert::Measured;
use vhdx_ublk::system::doctor::Finding;

use super::output::Outcome;
use super::{
    add, check, compact, compare, convert, create, enable, generate, info, list, map, merge, mount,
    move_chain, output, progress, recover, relink, resize, salvage, session, set, snapshot_list,
    snapshot_revert, start, stats,
};

/// The name and the text of each file.
pub fn files() -> Vec<(String, String)> {
    let file = |(name, schema): (&str, Schema)| {
        let text = serde_json::to_string_pretty(&schema).expect("a schema is JSON");
        (format!("{name}.json"), text + "\n")
    };
    all().into_iter().map(file).collect()
}

/// The schema of each command's answer, by its name with dashes; of its error, and of its progress.
fn all() -> Vec<(&'static str, Schema)> {
    vec![
        ("add", of::<add::Answer>()),
        ("check", of::<check::Json>()),
        ("compact", of::<compact::Answer>()),
        ("compare", of::<compare::Json>()),
        ("convert", of::<convert::Json>()),
        ("create", of::<create::Answer>()),
        ("del", of::<Vec<Outcome>>()),
        ("disable", of::<enable::Disabled>()),
        ("doctor", of::<Vec<Finding>>()),
        ("enable", of::<enable::Enabled>()),
        ("error", of::<output::Report>()),
        ("features", of::<Vec<Feature>>()),
        ("generate", of::<generate::Answer>()),
        ("info", of::<info::Printed>()),
        ("list", of::<Vec<list::Row>>()),
        ("map", of::<Vec<map::Json>>()),
        ("measure", of::<Measured>()),
        ("merge", of::<merge::Answer>()),
        ("mount", of::<mount::Answer>()),
        ("move", of::<move_chain::Answer>()),
        ("progress", of::<progress::Line>()),
        ("recover", of::<Vec<recover::Answer>>()),
        ("relink", of::<relink::Answer>()),
        ("resize", of::<resize::Answer>()),
        ("salvage", of::<salvage::Report>()),
        ("session-discard", of::<Vec<String>>()),
        ("session-list", of::<Vec<session::Row>>()),
        ("set", of::<set::Answer>()),
        ("snapshot", of::<Snapped>()),
        ("snapshot-list", of::<snapshot_list::Answer>()),
        ("snapshot-revert", of::<snapshot_revert::Answer>()),
        ("start", of::<start::Answer>()),
        ("stats", of::<Vec<stats::Row>>()),
        ("umount", of::<Vec<Outcome>>()),
        ("upgrade", of::<Vec<Upgraded>>()),
    ]
}

/// The schema of `T` as it is written.
fn of<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12().for_serialize().into_generator().into_root_schema_for::<T>()
}
