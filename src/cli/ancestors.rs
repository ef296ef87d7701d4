//! The parents of an image that is examined: found, locked, examined as well, and never changed.

use std::path::Path;

use serde::{Serialize, Serializer};

use vhdx_ublk::chain::{self, Known, Search};
use vhdx_ublk::error::{Kind, Result};
use vhdx_ublk::image::{self, Report, Severity};
use vhdx_ublk::printable::printable;

use super::output::{self, Failure};
use super::{holders, look};

/// What was found of the parents.
#[derive(Default, Serialize)]
pub struct Ancestors {
    /// The image's own parent first, as far as the chain leads.
    pub parents: Vec<Parent>,
    /// Why it leads no further.
    pub chain_fault: Option<ChainFault>,
}

/// What is wrong with a chain.
pub struct ChainFault(anyhow::Error);

impl Serialize for ChainFault {
    /// As every command gives an error.
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        Failure::of(&self.0).serialize(serializer)
    }
}

impl std::fmt::Display for ChainFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match output::remedy(self.0.as_ref()) {
            Some(remedy) => write!(f, "{:#}\n  try: {}", self.0, printable(remedy)),
            None => write!(f, "{:#}", self.0),
        }
    }
}

/// One of them.
#[derive(Serialize)]
pub struct Parent {
    /// Its file.
    pub image: String,
    /// What was found in it.
    #[serde(flatten)]
    pub report: Report,
}

impl Ancestors {
    /// Examines the parents of `leaf`, if it could be read at all. Nobody writes to them meanwhile.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] if more parents are given than there are. All else that is wrong with a parent is a finding.
    pub fn examine(leaf: Option<&Known>, search: &Search) -> Result<Self> {
        let Some(leaf) = leaf else { return Ok(Self::default()) };
        let mut found = Vec::new();
        let open = |path: &Path| look::identify(path).map_err(|error| holders::explain(error, path));
        let mut chain_fault = match chain::follow_parents(leaf, search, &mut found, open) {
            Err(error) if error.kind() == Kind::Usage => return Err(error),
            outcome => outcome.err(),
        };
        let mut parents = Vec::new();
        for parent in &found {
            let image = parent.known.path.to_string_lossy().into_owned();
            match smol::future::block_on(image::check(&parent.disk)) {
                Ok(report) => parents.push(Parent { image, report }),
                Err(error) => {
                    // What lies behind is no chain of this image while this is not known.
                    chain_fault = Some(error.file(&parent.known.path));
                    break;
                }
            }
        }
        Ok(Self { parents, chain_fault: chain_fault.map(|fault| ChainFault(fault.into())) })
    }

    /// Whether the image reads from its parents what it should, as far as their structure tells.
    pub fn are_sound(&self) -> bool {
        self.chain_fault.is_none() && !self.have(Severity::Corruption)
    }

    /// Whether there are findings as bad as this, and no worse, in one of them.
    pub fn have(&self, severity: Severity) -> bool {
        self.parents.iter().any(|parent| parent.report.verdict() == Some(severity))
    }
}
