# fsx, which does random operations and compares each read with its own copy, on devices whose daemon is killed
# meanwhile. It goes through the kernel's cache and has no direct I/O: the cache is dropped at each kill.
# VHDX_FSX_SEED repeats the operations of a run.
# shellcheck shell=bash

operations() { echo $(($1 * (${FULL:-0} * 29 + 1))); }

# exercise DEVICE FILE OPERATIONS: fsx as fsx.toml says, with its daemon killed and recovered again and again.
exercise() {
    local device=$1 file=$2 seed=${VHDX_FSX_SEED:-$RANDOM$RANDOM} worker kills=0 status=0
    "$VHDX_FSX" -f fsx.toml -S "$seed" -N "$3" -P . "$file" >fsx.log 2>&1 &
    worker=$!
    while kill -0 $worker 2>/dev/null; do
        sleep "$((RANDOM % 2)).$((RANDOM % 10))"
        echo 3 >/proc/sys/vm/drop_caches
        kill -9 "$(daemon_pid)"
        recovered "$device" || fail "not recovered after $kills kills: $(cat refusal)"
        kills=$((kills + 1))
    done
    wait $worker || status=$?
    note "$3 operations with seed $seed, $kills kills"
    [ $status -eq 0 ] || { head -n 8 fsx.log; tail -n 20 fsx.log; fail "fsx has read what it did not write"; }
    [ $kills -gt 2 ] || fail "fsx ended after $kills kills"
}

begin_fsx() {
    [ -x "${VHDX_FSX:-}" ] || { skipped "no fsx (VHDX_FSX)"; exit 0; }
    cat >fsx.toml
}

# The device itself, whose size does not change. Punched holes are discards that leave zeros.
test_fsx_on_a_device() {
    local device before
    begin_fsx <<'CONFIG'
blockmode = true
opsize = { max = 262144, align = 512 }
weights = { truncate = 0, punch_hole = 2, fsync = 1, fdatasync = 1, invalidate = 1, posix_fadvise = 1, sendfile = 5 }
CONFIG
    ublk create disk.vhdx --size 64M --block-size 1M
    device=$(ublk add disk.vhdx --queues 2)
    exercise "$device" "$device" "$(operations 2000)"
    sync "$device"
    before=$(sha "$device")
    ublk del "$device"
    ublk check disk.vhdx >/dev/null
    device=$(ublk add --read-only disk.vhdx)
    [ "$(sha "$device")" = "$before" ] || fail "the image holds something else"
    ublk del "$device"
}

# fsx_on FSTYPE: a file on it, of a child whose parent has the file system.
fsx_on() {
    local device before
    begin_fsx <<'CONFIG'
flen = 33554432
opsize = { max = 262144 }
[weights]
close_open = 1
fsync = 1
fdatasync = 1
invalidate = 1
posix_fadvise = 1
posix_fallocate = 2
punch_hole = 5
sendfile = 5
copy_file_range = 5
CONFIG
    ublk create base.vhdx --size 1G --block-size 1M
    device=$(ublk add base.vhdx)
    "mkfs.$1" -q "$device"
    ublk del "$device"
    ublk create disk.vhdx --parent base.vhdx
    device=$(ublk add disk.vhdx --queues 2)
    mount -o discard "$device" "$mnt"
    exercise "$device" "$mnt/file" "$(operations 2000)"
    before=$(sha "$mnt/file")
    umount "$mnt"
    ublk del "$device"
    ublk check disk.vhdx >/dev/null
    device=$(ublk add --read-only disk.vhdx)
    mount -o ro "$device" "$mnt"
    [ "$(sha "$mnt/file")" = "$before" ] || fail "the image holds something else"
    umount "$mnt"
    ublk del "$device"
}

test_fsx_on_ext4() { fsx_on ext4; }
test_fsx_on_xfs() { fsx_on xfs; }
