//! `del`: takes devices away and closes their images.

use std::ffi::OsString;
use std::time::Duration;

use vhdx_ublk::device::registry::{Entry, Listed, Registry};
use vhdx_ublk::device::stop::{self, How, Openers, Target};
use vhdx_ublk::device::{Control, DeviceInfo, claims, launch, leftovers};
use vhdx_ublk::error::{Error, Kind, Result};

use super::{SUCCESS, output};

/// Remove devices and close their images.
///
/// Everything that was written to the device is in the image when the command returns.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Del {
    /// The device: its number, its name, /dev/ublkbN or a partition of it, or the path of its image
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    target: Vec<OsString>,
    /// Remove all devices of this program, those on top of others first
    #[arg(short, long)]
    all: bool,
    /// Remove devices that are in use too: their users get I/O errors. A daemon that does not end in time is
    /// killed
    #[arg(short, long)]
    force: bool,
    /// How long to wait for each daemon to close its image, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = stop::DEFAULT_TIMEOUT.as_secs())]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// As JSON: an array of objects, errors too
    #[arg(long)]
    json: bool,
    /// This process is the child that waits in the kernel; the number is the device's mark
    #[arg(long, hide = true, conflicts_with = "all")]
    stop_device: Option<u64>,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk del 0
  vhdx-ublk del /dev/ublkb0 disk.vhdx
  vhdx-ublk del --all
  vhdx-ublk del --force --timeout 10 0    remove it even if its daemon hangs

A device is in use while it is mounted, used as swap, open, exported by the kernel (nvmet, LIO),
or has a loop device, a mapper or an array on it. If --force kills a daemon, its session remains,
and `del` writes what was acknowledged from it to the image.
JSON: target (as it was named), error (null, or why the device remains or what its image lacks).
Exit status: 0 all devices are removed, 1 some remain or their image could not be closed cleanly,
2 wrong usage.";

/// A device that is to be removed.
enum Doomed {
    Known(Box<Listed>),
    Orphan(DeviceInfo),
}

/// A device that was gone, and what came of closing its image.
type Completed = (Entry, Result<()>);

impl Doomed {
    fn lies_on(&self, below: &Self) -> bool {
        match (self, below) {
            (Self::Known(above), Self::Known(below)) => stop::lies_on(&above.entry, &below.entry),
            _ => false,
        }
    }

    fn device(&self) -> OsString {
        match self {
            Self::Known(listed) => listed.entry.device.clone().into(),
            Self::Orphan(info) => format!("/dev/ublkb{}", info.id).into(),
        }
    }

    fn take_away(&self, registry: &Registry, how: &How) -> Result<()> {
        match self {
            Self::Known(listed) => stop::stop(registry, &listed.entry, how),
            Self::Orphan(info) => stop::stop_orphan(registry, info, how),
        }
    }
}

impl Del {
    /// Runs the command; returns the exit status. Every target is tried; the last failure is returned,
    /// earlier ones are reported at once.
    pub fn run(self) -> Result<u8> {
        if let Some(mark) = self.stop_device {
            return self.stop_device(mark).map(|()| SUCCESS);
        }
        let registry = claims::registry()?;
        let outcomes = match &registry {
            Some(registry) => {
                // Without the driver it is unknown which entries are stale.
                let completed = match Control::open() {
                    Ok(control) => {
                        let completed = stop::complete(registry, &control, |entry| self.means(entry))?;
                        leftovers::tidy(registry, &control);
                        completed
                    }
                    Err(_) => Vec::new(),
                };
                if self.all { self.all(registry, completed)? } else { self.named(registry, completed) }
            }
            None if self.all => Vec::new(),
            None => {
                let none = |text: &OsString| {
                    (text.clone(), Target::parse(text).and_then(|target| Err(claims::no_devices(&target))))
                };
                self.target.iter().map(none).collect()
            }
        };
        output::finish(outcomes, self.json)
    }

    fn how(&self) -> How {
        How { force: self.force, timeout: Duration::from_secs(self.timeout) }
    }

    /// Whether the device of `entry` is to be removed.
    fn means(&self, entry: &Entry) -> bool {
        let names = |text: &OsString| Target::parse(text).is_ok_and(|target| target.names(entry));
        self.all || self.target.iter().any(names)
    }

    fn named(&self, registry: &Registry, mut completed: Vec<Completed>) -> Vec<(OsString, Result<()>)> {
        let mut take = |text: &OsString| {
            let target = Target::parse(text)?;
            match completed.iter().position(|(entry, _)| target.names(entry)) {
                Some(at) => completed.swap_remove(at).1,
                None => stop::take_away(registry, &target, &self.how()),
            }
        };
        self.target.iter().map(|text| (text.clone(), take(text))).collect()
    }

    /// Removes all devices. A device in use is tried again after another has been removed, which may have
    /// lain on it.
    fn all(&self, registry: &Registry, completed: Vec<Completed>) -> Result<Vec<(OsString, Result<()>)>> {
        let survey = registry.survey()?;
        let known = survey.devices.into_iter().map(|listed| Doomed::Known(listed.into()));
        let all = known.chain(survey.orphans.into_iter().map(Doomed::Orphan)).collect();
        let completed = completed.into_iter().map(|(entry, outcome)| (entry.device.into(), outcome));
        let (mut left, mut outcomes) =
            (stop::nested_first(all, Doomed::lies_on), completed.collect::<Vec<_>>());
        loop {
            let (count, mut again, mut in_use) = (left.len(), Vec::new(), Vec::new());
            for doomed in left {
                let (device, outcome) = (doomed.device(), doomed.take_away(registry, &self.how()));
                // With any other error the device is removed, and the fault is its image's.
                if is_in_use(&outcome) {
                    again.push(doomed);
                    in_use.push((device, outcome));
                } else {
                    outcomes.push((device, outcome));
                }
            }
            if again.is_empty() || again.len() == count {
                outcomes.extend(in_use);
                return Ok(outcomes);
            }
            left = again;
        }
    }

    /// Runs in the child, which may wait in the kernel for long.
    fn stop_device(&self, mark: u64) -> Result<()> {
        let [text] = &self.target[..] else {
            return Err(Error::new(Kind::Usage, "a child process removes one device"));
        };
        let Target::Id(id) = Target::parse(text)? else {
            return Err(Error::new(Kind::Usage, "a child process needs the device's number"));
        };
        let openers = if self.force { Openers::Any } else { Openers::None };
        launch::report_stopped(&stop::stop_here(id, mark, openers))
    }
}

fn is_in_use(outcome: &Result<()>) -> bool {
    outcome.as_ref().is_err_and(|error| error.kind() == Kind::InUse)
}
