//! What is known of kernels.

/// A kernel's version: of its first numbers, and of what a distribution has put behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    major: u32,
    minor: u32,
    patch: u32,
    build: u32,
}

impl Version {
    /// The version in `release`, such as `6.17.0-1015-azure`.
    fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|character: char| !character.is_ascii_digit()).map(str::parse);
        let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        let mut next = || numbers.next().and_then(Result::ok).unwrap_or(0);
        let (patch, build) = (next(), next());
        Some(Self { major, minor, patch, build })
    }

    fn is(self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) == (major, minor)
    }
}

/// What is wrong with the kernel of this `release`, and what helps.
pub(super) fn fault(release: &str) -> Option<(&'static str, &'static str)> {
    const OOPS: &str = "this kernel's ublk driver crashes when a device is added";
    let Some(version) = Version::parse(release) else {
        return Some((
            "the version of the kernel is not understood",
            "check by `vhdx-ublk add` whether it serves",
        ));
    };
    let clouds = [("azure", 1015), ("azure", 1018), ("aws", 1017)];
    let of_cloud = |(cloud, build): &(&str, u32)| release.ends_with(cloud) && version.build == *build;
    if (version.major, version.minor) < (6, 0) {
        return Some(("this kernel has no ublk driver", "boot Linux 6.1 or newer"));
    }
    if version.is(6, 0) {
        return Some((
            "this kernel cannot recover devices whose daemon was killed",
            "boot Linux 6.1 or newer",
        ));
    }
    if version.is(6, 17) && clouds.iter().any(of_cloud) {
        return Some((OOPS, "boot another kernel of the distribution: a newer one, or one older than 6.17"));
    }
    if version.is(6, 17) {
        let message = "some kernels 6.17 refuse to start a device (EINVAL)";
        return Some((
            message,
            "if `vhdx-ublk add` fails so, boot Linux 6.18.6 or newer, or one older than 6.17",
        ));
    }
    if version.is(6, 18) && matches!(version.patch, 4 | 5) {
        return Some((OOPS, "boot Linux 6.18.6 or newer, but not 6.18.40"));
    }
    if version.is(6, 18) && version.patch == 40 {
        return Some((
            "this kernel loses commands to the ublk driver when several devices are added at once",
            "add devices one after another, or boot another kernel",
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_bad_kernels_are_recognised_and_their_neighbours_are_not() {
        let is_bad = |release: &str| fault(release).is_some();
        for bad in [
            "5.15.0-91-generic",
            "6.0.12",
            "6.17.0",
            "6.17.4-arch1-1",
            "6.17.0-1015-azure",
            "6.17.0-1018-azure",
            "6.17.0-1017-aws",
            "6.18.4",
            "6.18.5-arch1-1",
            "6.18.40",
            "",
            "new",
        ] {
            assert!(is_bad(bad), "{bad}");
        }
        for good in
            ["6.1.0-25-amd64", "6.12.57+deb13-amd64", "6.16.9", "6.18.3", "6.18.6", "6.18.41", "7.3.4"]
        {
            assert_eq!(fault(good), None, "{good}");
        }
    }

    #[test]
    fn a_crash_is_not_taken_for_a_refusal() {
        let what = |release: &str| fault(release).expect("bad").0;
        assert!(what("6.17.0-1015-azure").contains("crashes") && what("6.18.4").contains("crashes"));
        assert!(what("6.17.0-1015-gcp").contains("EINVAL"));
    }
}
