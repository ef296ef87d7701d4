//! What is done to images, beside serving them.
//!
//! An operation finds its images, locks them, refuses what it must not do, and does it; the command line says
//! what is wanted and shows what was done. What an operation must know of devices, which stand above it, it
//! asks [`Devices`].

pub mod block_counts;
pub mod check;
pub mod children;
pub mod compact;
pub mod compare;
pub mod contents;
pub mod convert;
pub mod create;
mod devices;
mod duplicate;
pub mod inside;
pub mod inspect;
mod likeness;
mod locked;
pub mod map;
pub mod merge;
pub mod move_chain;
pub mod named_file;
mod naming;
pub mod opened;
pub mod picture;
pub mod relink;
mod replaced;
pub mod resize;
pub mod revert;
pub(crate) mod room;
pub mod salvage;
pub mod set;
pub mod source;
pub mod tree;
mod watch;
mod workers;

pub use devices::Devices;
pub use replaced::{place_of_new, refuse_foreign_links};
pub use watch::Watch;

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::devices::NoDevices;
    use super::*;
    use crate::chain::Search;
    use crate::disk::{Reactor, Sparse, host_bytes};
    use crate::error::{Kind, Result};
    use crate::image::{DEFAULT_BLOCK_SIZE, DEFAULT_LOG_LENGTH, InitialState, NewImage};

    fn new_image() -> NewImage {
        NewImage {
            virtual_size: 16 << 20,
            fixed: false,
            block_size: DEFAULT_BLOCK_SIZE,
            log_length: DEFAULT_LOG_LENGTH,
            logical_sector_size: 512,
            physical_sector_size: 4096,
            initial_state: InitialState::NotPresent,
            parent: None,
        }
    }

    /// Creates the image `name` in `folder`, as a child of `parent` if there is one.
    fn create(folder: &Path, name: &str, parent: Option<&Path>, replace: bool) -> Result<PathBuf> {
        let new = new_image();
        let image = folder.join(name);
        let parent = parent.map(Path::to_owned);
        let sparse = Sparse::Auto;
        let creation = create::Creation { image: image.clone(), new, parent, mode: None, replace, sparse };
        creation.run(&NoDevices, |_| Ok(())).map(|()| image)
    }

    fn relink(child: &Path, parent: &Path) -> Result<()> {
        relink::relink(child, parent, false, &NoDevices)
    }

    fn check(image: &Path) -> check::Checked {
        check::check(image, &Search::default(), &NoDevices).expect("an image")
    }

    /// Windows refuses an image that has holes.
    #[test]
    fn an_image_without_holes_is_created() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for fixed in [false, true] {
            let image = folder.path().join(format!("{fixed}.vhdx"));
            let new = NewImage { fixed, ..new_image() };
            let creation = create::Creation {
                image: image.clone(),
                new,
                parent: None,
                mode: None,
                replace: false,
                sparse: Sparse::No,
            };
            creation.run(&NoDevices, |_| Ok(())).expect("room");
            let found = std::fs::metadata(&image).expect("there");
            assert!(host_bytes(&found) >= found.len() && found.len() > 1 << 20, "{found:?}");
            assert!(check(&image).report.verdict().is_none());
        }
    }

    struct Removed(std::cell::RefCell<Vec<PathBuf>>);

    impl Watch for Removed {
        fn progress(&self, _: u64, _: u64) {}

        fn stop_requested(&self) -> bool {
            false
        }
    }

    impl merge::Progress for Removed {
        fn removed(&self, path: &Path) -> Result<()> {
            self.0.borrow_mut().push(path.to_owned());
            Ok(())
        }
    }

    /// An image with children is not replaced, and a chain that was moved is mended and
    /// merged.
    #[test]
    fn a_chain_is_created_broken_relinked_and_merged() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let folder = folder.path().canonicalize().expect("it is there");
        let base = create(&folder, "base.vhdx", None, false).expect("free");
        let child = create(&folder, "child.vhdx", Some(&base), false).expect("free");
        let taken = create(&folder, "base.vhdx", None, false).expect_err("taken");
        assert_eq!(taken.kind(), Kind::Exists);
        let parent = create(&folder, "base.vhdx", None, true).expect_err("it has a child");
        assert_eq!(parent.kind(), Kind::InUse);
        let itself = create(&folder, "base.vhdx", Some(&base), true).expect_err("it would be its own parent");
        assert_eq!(itself.kind(), Kind::InUse);
        assert!(check(&child).chain.is_sound());

        let moved = folder.join("moved.vhdx");
        std::fs::rename(&base, &moved).expect("ours");
        let broken = check(&child).chain;
        assert_eq!(broken.fault.map(|fault| fault.kind()), Some(Kind::NotFound));
        assert_eq!(relink(&child, &child).expect_err("its own parent").kind(), Kind::Usage);
        let stranger = create(&folder, "stranger.vhdx", None, false).expect("free");
        assert_eq!(relink(&child, &stranger).expect_err("another image").kind(), Kind::Mismatch);
        relink(&child, &moved).expect("it is the parent");
        let chain = check(&child).chain;
        assert!(chain.is_sound() && chain.parents[0].0 == moved);

        let (search, into) = (Search::default(), None);
        let request = merge::Request {
            child: child.clone(),
            into,
            copied: None,
            children: Vec::new(),
            search,
            force: false,
            shrink: false,
        };
        let reactor = Reactor::new().expect("io_uring");
        let chain = merge::LockedChain::open(&request, &reactor, &NoDevices).expect("nothing forbids it");
        let removed = Removed(Vec::new().into());
        chain.merge(&reactor, &removed).expect("there is room");
        assert_eq!(removed.0.into_inner(), [child]);
        assert_eq!(inspect::inspect(&moved).expect("an image").image.metadata.virtual_size, 16 << 20);
    }
}
