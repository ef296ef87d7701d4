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

# A new machine, which finds the program in its shared folder.
begin() {
    rm -rf --one-file-system "$machine"
    mkdir -p "$machine/share"
    cp "$VHDX_UBLK" "$machine/share/vhdx-ublk"
    cp -r "$here/inside.sh" "$here/../../tools/package.d" "$machine/share/"
}

# boot [OPTION...]: boots the machine and runs the standard input in it, as root, then powers off.
boot() {
    { echo '. /run/laboratory/share/inside.sh'; cat; } >"$machine/script"
    "$here/../../tools/boot" run "$@" "$machine" "$machine/script"
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

no_io_errors() { ! grep -aE 'I/O error|EXT4-fs error' "$machine/console" || fail "a file system saw errors"; }
