# xfstests on two devices, with a third for its log of writes. Sourced by tests/suites/run.
# shellcheck shell=bash

# Those of the generic tests that judge what a disk does: fsx and fsstress, also across power cuts (dm-log-writes),
# failing disks (dm-flakey, dm-error) and shutdowns.
xfstests_of_disks="generic/013 generic/075 generic/091 generic/112 generic/127 generic/263 generic/311 generic/388
generic/455 generic/457 generic/475 generic/482 generic/521 generic/522"

find_xfstests() { # SOURCE
    [ -x "$1/check" ] || { echo "$1: xfstests are not there" >&2; return 1; }
    [ -x "$1/ltp/fsstress" ] || { echo "$1: xfstests are not built (see the README there)" >&2; return 1; }
}

# run_xfstests SOURCE FSTYP [TEST...]: in the current folder.
run_xfstests() {
    local source=$1 fs=$2 name status=0 devices=()
    shift 2
    # shellcheck disable=SC2086 # several
    [ $# -gt 0 ] || set -- $xfstests_of_disks
    for name in test scratch log; do
        ublk create "$name.vhdx" --size 10G
        devices+=("$(ublk add "$name.vhdx" --queues 2)")
        mkdir "$name"
    done
    "mkfs.$fs" -q "${devices[0]}"
    cat >config <<CONFIG
export FSTYP=$fs TEST_DEV=${devices[0]} TEST_DIR=$PWD/test SCRATCH_DEV=${devices[1]} SCRATCH_MNT=$PWD/scratch
export LOGWRITES_DEV=${devices[2]} RESULT_BASE=$PWD/results
CONFIG
    (cd "$source" && HOST_OPTIONS=$OLDPWD/config ./check "$@") || status=1
    umount -q test scratch || true
    ublk del "${devices[@]}"
    for name in test scratch log; do ublk check "$name.vhdx" || status=1; done
    return $status
}
