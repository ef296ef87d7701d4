//! Why a session cannot be taken over.

use std::fmt;

use crate::error::{Error, Kind};
use crate::image::{Image, Mismatch, Place, Session, SessionMemory, VERSION};

/// See the module's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    Missing,
    Unfit(Mismatch),
    Poisoned,
}

impl Obstacle {
    /// What keeps the image at `place` from taking over the session in `memory`, if anything does.
    pub(super) fn of(memory: &SessionMemory, image: Option<&Image>, place: &Place) -> Option<Self> {
        if let Err(mismatch) = memory.check_layout() {
            return Some(Self::Unfit(mismatch));
        }
        // This program writes no log that can only be replayed in place, so another one has written the
        // image.
        let Some(image) = image else { return Some(Self::Unfit(Mismatch::Changed)) };
        match memory.check(&image.owner(place.clone()), image.header.header.file_write_guid) {
            Err(Mismatch::Grown) if memory.session() == Session::Idle => None,
            Err(Mismatch::Grown) => Some(Self::Poisoned),
            Err(mismatch) => Some(Self::Unfit(mismatch)),
            Ok(()) if !memory.fits(image.map.geometry()) => Some(Self::Unfit(Mismatch::Damaged("length"))),
            Ok(()) if memory.session() == Session::Poisoned => Some(Self::Poisoned),
            Ok(()) => None,
        }
    }

    /// Whether no write can have been acknowledged with the session.
    pub(super) fn is_nothing(self) -> bool {
        matches!(self, Self::Missing | Self::Unfit(Mismatch::Incomplete))
    }

    /// Whether another program, or a person, may recover from the session what this program cannot.
    pub(super) fn may_be_of_use(self) -> bool {
        matches!(self, Self::Unfit(Mismatch::Version(_) | Mismatch::Damaged(_)))
    }

    pub(super) fn error(self) -> Error {
        let kind = match self {
            Self::Poisoned => Kind::Poisoned,
            Self::Unfit(Mismatch::Version(_)) => Kind::Unsupported,
            Self::Unfit(Mismatch::Damaged(_)) => Kind::Corrupt,
            Self::Missing | Self::Unfit(_) => Kind::NotFound,
        };
        let error = Error::new(kind, self.to_string()).in_structure("session");
        if self.may_be_of_use() {
            return error;
        }
        error.remedy(
            "`vhdx-ublk del` removes the device; `vhdx-ublk recover --accept-loss` serves what the image \
             holds, which is the flushed data: a mounted file system may be damaged by that",
        )
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Missing => "there is no session file of this image",
            Self::Unfit(Mismatch::Incomplete) => "the session file was never completed",
            Self::Unfit(Mismatch::Version(version)) => {
                let ours = env!("CARGO_PKG_VERSION");
                return write!(
                    f,
                    "the session file has layout version {version}, and vhdx-ublk {ours} reads version \
                     {VERSION}: use the vhdx-ublk that made it"
                );
            }
            Self::Unfit(Mismatch::Damaged(part)) => {
                return write!(f, "the session file is damaged: its {part} is wrong");
            }
            Self::Unfit(Mismatch::OtherBoot) => {
                "the session file is from before the machine was started: only flushed data is left"
            }
            Self::Unfit(Mismatch::Foreign) => "the session file belongs to another image",
            Self::Unfit(Mismatch::Grown) => "the disk has become larger under this session",
            Self::Unfit(Mismatch::Changed) => {
                "another program has written the image since the daemon was killed"
            }
            Self::Poisoned => "writing to the image failed before the daemon was killed",
        };
        f.write_str(text)
    }
}
