# What the tests of a booted system share. Sourced by tests/boot/run and by each test.
# shellcheck shell=bash

: "${VHDX_UBLK:?the vhdx-ublk binary}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
machine=${VHDX_BOOT_SCRATCH:?set by tests/boot/run}/machine

note() { echo "note: $*"; }
fail() { echo "$*" >&2; return 1; }

wanted() {
    local name=$1 part
    shift
    [ $# -gt 0 ] || return 0
    for part; do [[ $name != *"$part"* ]] || return 0; done
    return 1
}

# make_package: the package that every machine installs, once for all tests.
make_package() {
    "$here/../../tools/package" deb --binary "$VHDX_UBLK" --level 0 --to "$VHDX_BOOT_SCRATCH/package"
}

# A new machine, which finds the package in its shared folder.
begin() {
    rm -rf --one-file-system "$machine"
    mkdir -p "$machine/share"
    cp "$VHDX_BOOT_SCRATCH"/package/*.deb "$machine/share/vhdx-ublk.deb"
    cp "$here/inside.sh" "$machine/share/"
}

# The package of a version before this one, of the same program.
older_package() {
    local tree=$VHDX_BOOT_SCRATCH/older
    rm -rf "$tree"
    dpkg-deb --raw-extract "$machine/share/vhdx-ublk.deb" "$tree"
    sed -i 's/^Version: .*/&~before/' "$tree/DEBIAN/control"
    dpkg-deb --build --root-owner-group -Znone "$tree" "$tree.deb" >&2
    cat "$tree.deb"
}

# unpack NAME...: images made by other software, in the shared folder.
unpack() {
    local name
    for name; do xz -dc "$here/../images/$name.vhdx.xz" >"$machine/share/$name.vhdx"; done
}

# boot [OPTION...]: boots the machine and runs the standard input in it, as root, then powers off.
boot() {
    { echo '. /run/laboratory/share/inside.sh'; cat; } >"$machine/script"
    "$here/../../tools/boot" run --release "${VHDX_BOOT_RELEASE:-bookworm}" "$@" "$machine" "$machine/script"
}

# boot_and_cut [OPTION...]: the same; the power is cut where the script says `cut_power`.
boot_and_cut() { boot --cut 'cut the power' "$@"; }

off_seconds() { printf '%d.%d' $(($(cat "$machine/off_ms") / 1000)) $(($(cat "$machine/off_ms") % 1000 / 100)); }

# image NAME: brings /images/NAME out of the machine, which is off; its path is then $machine and the last part of NAME.
image() {
    debugfs -R "dump \"/$1\" $machine/${1##*/}" "$machine/images.disk" 2>/dev/null
    [ -s "$machine/${1##*/}" ] || fail "the machine has no /images/$1"
}

# image_closed NAME: /images/NAME is sound, and was closed: nothing is left to replay.
image_closed() {
    image "$1"
    "$VHDX_UBLK" check "$machine/${1##*/}"
    "$VHDX_UBLK" info --json "$machine/${1##*/}" | grep -q '"state": "clean"' || fail "$1 was not closed"
}

# Reads are left out: udev may look at a device that is just being removed. A file system whose read fails says so.
no_io_errors() {
    ! grep -aE 'I/O error.* op 0x[1-9]|lost (async|sync) page write|(EXT4-fs|XFS|JBD2).*[Ee]rror' "$machine/console" ||
        fail "a file system saw errors"
}
