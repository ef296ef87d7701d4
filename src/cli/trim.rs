//! The step of `compact` that has file systems give up their free space, and what is said of it.

use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::chain;
use vhdx_ublk::device::claims::{self, Claims};
use vhdx_ublk::device::registry::Registry;
use vhdx_ublk::disk::{Access, Sparse};
use vhdx_ublk::error::{Doing, Error, Kind, Result};
use vhdx_ublk::operations::children::refuse_parent;
use vhdx_ublk::operations::compact::Figures;
use vhdx_ublk::operations::inspect::{self, Opened};
use vhdx_ublk::operations::{Watch, inside, named_file};
use vhdx_ublk::printable::{human_size, printable};
use vhdx_ublk::system::mount::trim_mounted;
use vhdx_ublk::system::private_device::PrivateDevice;
use vhdx_ublk::system::trim::{Survey, Trimmed, VolumeTrim, candidates};
use vhdx_ublk::system::trim_record::TrimRecord;

use super::parent_options::ParentOptions;
use super::{add, output};

/// What is to be done.
pub struct Request<'a> {
    pub image: &'a Path,
    pub parents: &'a ParentOptions,
    pub sparse: Sparse,
    pub dry_run: bool,
}

/// What was done, or why nothing was.
pub struct Outcome {
    /// What the file took before, if it could be opened.
    pub before: Option<Figures>,
    pub trimmed: Result<Trimmed>,
    /// How far it has come, which counts for the next command unless this one does all.
    record: Option<TrimRecord>,
}

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    not_possible: Option<String>,
    volumes: Vec<VolumeTrim>,
}

impl Request<'_> {
    /// Has the file systems trimmed. That it is not possible is an outcome, too.
    pub fn run(&self, watch: &impl Watch) -> Outcome {
        let (mut before, mut record) = (None, None);
        let trimmed = self.trim(&mut before, &mut record, watch);
        Outcome { before, trimmed, record }
    }

    fn trim(
        &self,
        before: &mut Option<Figures>,
        record: &mut Option<TrimRecord>,
        watch: &impl Watch,
    ) -> Result<Trimmed> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::new(Kind::Permission, "only root can have the kernel mount them"));
        }
        let named = named_file::open(self.image, &Claims)?;
        *before = Some(Figures::of(&named.file).doing("looking at the image")?);
        let search = self.parents.search();
        refuse_parent(&named.path, &search, false, &Claims)?;
        if let Some(registry) = claims::registry()? {
            let known = record.insert(TrimRecord::of(&named.file, &registry)?);
            if let Some(volumes) = known.outcome().filter(|_| !self.dry_run) {
                return Ok(Trimmed { volumes: volumes.to_vec(), stopped: false });
            }
        }
        let add = |access| {
            let arguments = add::private(&named.file, access, self.sparse, self.parents);
            PrivateDevice::add(arguments, &named.file)
        };
        let device = add(Access::ReadOnly)?;
        let registry = Registry::open()?;
        let survey = Survey::of(device.path())?;
        // The image is locked: no other process changes what the record is about.
        let known = record.insert(TrimRecord::of(&named.file, &registry)?);
        let done = if self.dry_run { None } else { survey.done_before(known) };
        device.remove()?;
        if let Some(trimmed) = done {
            return Ok(trimmed);
        }
        if self.dry_run || !survey.has_work() || watch.stop_requested() {
            return Ok(Trimmed { stopped: watch.stop_requested(), ..survey.outline() });
        }
        let device = add(Access::ReadWrite)?;
        // It was not locked in between.
        let known = record.insert(TrimRecord::of(&named.file, &registry)?);
        let trimmed = survey.trim(device.path(), known, watch)?;
        device.remove()?;
        Ok(trimmed)
    }
}

impl Outcome {
    /// Whether it was stopped before its end.
    pub fn stopped(&self) -> bool {
        self.trimmed.as_ref().is_ok_and(|trimmed| trimmed.stopped)
    }

    /// The command has done all that was to be done.
    pub fn forget(&self) {
        self.record.iter().for_each(TrimRecord::remove);
    }

    pub fn answer(&self) -> Answer {
        match &self.trimmed {
            Ok(trimmed) => Answer { not_possible: None, volumes: trimmed.volumes.clone() },
            Err(error) => Answer { not_possible: Some(output::message(error)), volumes: Vec::new() },
        }
    }

    /// A line for each volume, or one that says why none was trimmed.
    pub fn lines(&self, dry_run: bool) -> Vec<String> {
        let trimmed = match &self.trimmed {
            Ok(trimmed) => trimmed,
            Err(error) => return vec![format!("No file system was trimmed: {}", output::message(error))],
        };
        let line = |volume: &VolumeTrim| {
            let name = volume.name();
            match (&volume.left_alone, volume.trimmed_bytes) {
                (Some(reason), _) => format!("{name} was left alone: {}", printable(reason)),
                (None, Some(bytes)) => format!("{name}: {} of free space discarded", human_size(bytes)),
                (None, None) if dry_run => format!("{name} would be trimmed"),
                (None, None) => format!("{name} was not trimmed: the command was stopped"),
            }
        };
        trimmed.volumes.iter().map(line).collect()
    }
}

/// Has the file systems of the device `id` trimmed where they are mounted.
pub fn mounted(id: u32) -> Outcome {
    let trimmed = trim_mounted(id).and_then(|volumes| {
        if volumes.is_empty() {
            let message = "no file system of the device is mounted here";
            return Err(
                Error::new(Kind::NotFound, message).remedy("mount it, or run `fstrim` where it is mounted")
            );
        }
        Ok(Trimmed { volumes, stopped: false })
    });
    Outcome { before: None, trimmed, record: None }
}

/// What may still be gained by trimming, if the disk holds file systems that can be trimmed.
pub fn hint(image: &Path, parents: &ParentOptions) -> Option<String> {
    let opened = open_chain(image, parents).ok()?;
    let layers: Vec<&Opened> = opened.iter().collect();
    let names = candidates(&inside::contents(&layers, None));
    let (last, others) = names.split_last()?;
    let all = if others.is_empty() { last.clone() } else { format!("{} and {last}", others.join(", ")) };
    Some(format!(
        "what files on the disk ({all}) have freed is given back once it is trimmed: use --trim, or run \
         `fstrim -a` in the guest"
    ))
}

fn open_chain(image: &Path, parents: &ParentOptions) -> Result<Vec<Opened>> {
    let leaf = inspect::open(image)?;
    let mut found = Vec::new();
    chain::follow_parents(&leaf, &parents.search(), &mut found, |path: &Path| inspect::open(path))?;
    Ok(std::iter::once(leaf).chain(found).collect())
}
