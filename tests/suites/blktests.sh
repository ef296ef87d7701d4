# blktests: its tests of ublk, and those of the block layer that take a device. Sourced by tests/suites/run.
# shellcheck shell=bash

find_blktests() { # SOURCE
    [ -x "$1/check" ] && [ -d "$1/tests/ublk" ] || { echo "$1: blktests are not there" >&2; return 1; }
    command -v gawk >/dev/null || { echo "blktests need gawk: apt-get install gawk" >&2; return 1; }
}

# run_blktests SOURCE [TEST...]: in the current folder. Without TESTs, those that take a device follow.
run_blktests() {
    local source=$1 device status=0
    shift
    cp -r "$source" blktests
    # Either server that its tests know is our program.
    cp "$suites/kublk" blktests/src/miniublk
    cp "$suites/kublk" blktests/src/rublk_wrapper.sh
    mkdir images
    export VHDX_SUITE_IMAGES=$PWD/images
    cd blktests
    [ $# -eq 0 ] || { ./check "$@"; return; }
    ./check ublk block/033 || status=1
    # The disk is made now, because the tests of ublk remove all devices.
    ublk create ../disk.vhdx --size 4G
    device=$(ublk add ../disk.vhdx --queues 2)
    TEST_DEVS=$device ./check --quick=30 --device-only block || status=1
    ublk del "$device"
    ublk check ../disk.vhdx || status=1
    return $status
}
