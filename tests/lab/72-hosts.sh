# Hosts that fail in every way, under daemons that die, with a verifying writer on the device: no sector loses what
# an acknowledged flush covered. A cell of the matrix is a kind of host, a fault and a way of recovery.
# shellcheck shell=bash

# Names of this test's own: another laboratory sees other devices, but the same script.
host_disk=vhdx-ublk-host
host_loop=
writer=

# The host of a cell: a file system on a disk whose errors are ours to switch on, in the folder `host`.
#   direct     512-byte sectors on a disk of 512-byte sectors: direct I/O
#   buffered   512-byte sectors on a disk of 4096-byte sectors: through the page cache
#   4k         4096-byte sectors on a disk of 4096-byte sectors: direct I/O in its units
# Without a journal an error of the disk is the image's, not the end of the file system.
make_host() {
    local size_mb=$2 unit=4096 sector=512
    case $1 in
    direct) unit=512 ;;
    4k) sector=4096 ;;
    esac
    truncate -s "${size_mb}M" host.img
    host_loop=$(losetup --show -f -b "$unit" host.img)
    mkfs.ext4 -q -F -b 4096 -O ^has_journal "$host_loop"
    sectors=$(blockdev --getsz "$host_loop")
    dmsetup create "$host_disk" --table "$(good_table)"
    dmsetup mknodes "$host_disk"
    mkdir -p host
    mount "/dev/mapper/$host_disk" host
    ublk create host/disk.vhdx --size 1G --block-size 1M --logical-sector-size "$sector"
}

good_table() { echo "0 $sectors linear $host_loop 0"; }
error_table() { echo "0 $sectors flakey $host_loop 0 0 600 1 error_writes"; }

# What the disk does from now on; what waits in a disk that hangs meets the new table.
hang_disk() { dmsetup suspend --noflush --nolockfs "$host_disk"; }
load_table() { echo "$1" | dmsetup reload "$host_disk" && dmsetup resume "$host_disk"; }
switch_table() { hang_disk && load_table "$1"; }

# Called by finish, whatever state a cell was left in.
take_down() {
    [ -z "$writer" ] || { touch stop; wait "$writer" || true; }
    umount -q host || true
    dmsetup resume "$host_disk" 2>/dev/null || true
    dmsetup remove --retry "$host_disk" 2>/dev/null || true
    [ -z "$host_loop" ] || losetup -d "$host_loop" || true
}

kill_and_recover() {
    kill -9 "$(daemon_pid)"
    ublk recover "$device" >>recovered 2>&1
}

# The faults. Each leaves a good disk, and the device served or not; it fails where the promise is already broken.

fault_kill() {
    local turn
    for turn in 1 2 3 4 5; do
        sleep "0.$((RANDOM % 9 + 1))"
        kill_and_recover || { fail "not recovered after kill $turn: $(cat recovered)"; return 1; }
    done
}

# Writes fail for a while; then the daemon dies, too.
fault_flakey() {
    sleep 1
    switch_table "$(error_table)"
    sleep 1
    switch_table "$(good_table)"
    kill_and_recover || true
}

# A flush waits in a disk that hangs, its daemon is killed, and then the disk fails what waits: whoever comes after
# must hear of it.
fault_suspend() {
    sleep 1
    hang_disk
    sleep 1
    kill -9 "$(daemon_pid)"
    sleep 0.3
    load_table "$(error_table)"
    sleep 1
    switch_table "$(good_table)"
    ublk recover "$device" >>recovered 2>&1 || true
}

# No room: what needs some fails, nothing else; with room again everything works, also under a daemon that was
# killed meanwhile.
fault_full() {
    local free
    sleep 1
    free=$(($(stat -f -c '%a * %S' host) - (2 << 20)))
    fallocate -l "$free" host/filler
    sleep 1
    kill_and_recover || { fail "not recovered on a full host: $(cat recovered)"; return 1; }
    sleep 1
    rm host/filler
    head -c 4M /dev/zero | tr '\0' '\5' | dd of="$device" bs=1M seek=900 oflag=direct conv=fsync iflag=fullblock \
        status=none || fail "with room again, a write or its flush fails: $(cat /run/vhdx-ublk/*.log)"
}

# cell HOST FAULT RECOVERY: counts what was written and flushed, and what was lost.
cell() {
    local kind=$1 fault=$2 recovery=$3 device status=0 options=(--errors --ledger ledger) size=1500
    [ "$fault" != kill ] || options=(--ledger ledger)
    [ "$fault$recovery" != killqueue ] || options+=(--errors)
    case $fault in flakey | suspend) options+=(--flushed) ;; full) size=400 ;; esac
    make_host "$kind" "$size"
    device=$(ublk add host/disk.vhdx --queues 2 --recovery "$recovery" 2>recovered)
    rm -f stop
    stamper "$device" stop "${options[@]}" >stamper.log 2>&1 &
    writer=$!
    "fault_$fault" || status=1
    sleep 0.5
    touch stop
    # Where writing has failed for good the device waits or answers with errors: the writer must end.
    case $fault$status in
    kill0 | full0)
        wait "$writer" || status=1
        ublk del "$device" || status=1
        ;;
    *)
        ublk del --force "$device" >>recovered 2>&1 || true
        wait "$writer" || status=1
        ;;
    esac
    writer=
    # What the disk holds, not what the host still has in memory.
    umount host
    mount "/dev/mapper/$host_disk" host
    device=$(ublk add --read-only host/disk.vhdx 2>>recovered) || fail "$*: the image does not open: $(cat recovered)"
    stamper "$device" --verify ledger >>stamper.log 2>&1 || status=1
    ublk del "$device"
    tally "$status" "$@"
    umount host
    dmsetup remove --retry "$host_disk"
    losetup -d "$host_loop"
    host_loop=
    rm host.img
}

# tally STATUS CELL...: adds a cell's figures; the writer's last words tell them.
tally() {
    local line writes flushes lost
    line=$(grep -h 'flushes acknowledged' stamper.log | head -n 1)
    writes=$(sed -n 's/^\([0-9]*\) writes.*/\1/p' <<<"$line")
    flushes=$(sed -n 's/.* \([0-9]*\) flushes acknowledged.*/\1/p' <<<"$line")
    lost=$(sed -n 's/.*; \([0-9]*\) sectors lost or torn.*/\1/p' stamper.log |
        awk '{ sum += $1 } END { print sum + 0 }')
    cells=$((cells + 1)) all_writes=$((all_writes + ${writes:-0})) all_flushes=$((all_flushes + ${flushes:-0}))
    all_lost=$((all_lost + lost))
    note "${*:2}: ${writes:-no} writes, ${flushes:-no} flushes acknowledged, $lost sectors lost"
    [ "$1" = 0 ] || { bad+=("${*:2}"); tail -n 5 stamper.log | cut -c 1-160; }
}

# Every kind of host, fault and recovery is in the sample.
sample='direct kill reissue
buffered suspend reissue
4k flakey queue
buffered full queue'

matrix() {
    local kind fault recovery
    for kind in direct buffered 4k; do
        for fault in kill flakey suspend full; do
            for recovery in reissue queue; do echo "$kind $fault $recovery"; done
        done
    done
}

test_hosts_that_fail_lose_nothing_flushed() {
    local cells=0 all_writes=0 all_flushes=0 all_lost=0 bad=() kind fault recovery
    while read -r kind fault recovery; do
        cell "$kind" "$fault" "$recovery" </dev/null
    done < <(if [ -n "$FULL" ]; then matrix; else echo "$sample"; fi)
    note "$cells cells: $all_writes writes, $all_flushes flushes acknowledged, $all_lost sectors lost"
    [ "$all_flushes" -gt 0 ] || fail "no flush was acknowledged"
    [ ${#bad[@]} = 0 ] || fail "lost in: $(printf '%s; ' "${bad[@]}")"
}
