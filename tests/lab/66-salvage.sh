# Images on disks that fail: what the host can still read comes back, and what is lost is listed.
# shellcheck shell=bash

take_down() {
    umount -q host 2>/dev/null || true
    ! [ -e /dev/mapper/lab-salvage ] || dmsetup remove --force lab-salvage || true
    losetup -j host.img -O NAME --noheadings 2>/dev/null | xargs -r -n 1 losetup -d || true
}

# failing_disk START LENGTH...: the file system of `host.img`, with these sectors unreadable.
failing_disk() {
    local size table='' at=0
    size=$(blockdev --getsz "$loop")
    while [ $# -gt 0 ]; do
        table+="$at $(($1 - at)) linear $loop $at"$'\n'"$1 $2 error"$'\n'
        at=$(($1 + $2))
        shift 2
    done
    dmsetup create lab-salvage --readonly <<<"$table$at $((size - at)) linear $loop $at"
    dmsetup mknodes lab-salvage # where no udev does it
    mount -t ext4 -o ro,noload /dev/mapper/lab-salvage host
}

# place_of OFFSET_MB: the sector of the host's disk that has this megabyte of the image's disk.
place_of() {
    local offset block
    offset=$("$VHDX_UBLK" map --json host/disk.vhdx | python3 -c '
import json, sys
at = int(sys.argv[1]) << 20
for extent in json.load(sys.stdin):
    if extent["start"] <= at < extent["start"] + extent["length"] and "offset" in extent:
        print(extent["offset"] + at - extent["start"])' "$1")
    block=$(debugfs -R "bmap disk.vhdx $((offset / 4096))" "$loop" 2>/dev/null)
    [ "${block:-0}" -gt 0 ] || fail "the host does not say where megabyte $1 lies"
    echo $((block * 8))
}

# bytes STATUS: how many bytes of the map have it, by ddrescuelog.
bytes() {
    echo $(($(ddrescuelog --list-blocks="$1" --block-size=4096 disk.map | wc -l) * 4096))
}

# Three places of the file are unreadable: in one block a sector, in another its middle, and one whole.
test_salvage_from_a_disk_with_unreadable_sectors() {
    local device first second third status=0 lost=$((4096 + 65536 + (1 << 20))) # whole pages
    command -v dmsetup >/dev/null || { skipped "no dmsetup"; exit 0; }
    truncate -s 200M host.img
    loop=$(losetup -f --show host.img)
    mkfs.ext4 -q -F -b 4096 "$loop"
    mkdir host
    mount "$loop" host
    ublk create host/disk.vhdx --size 100M --block-size 1M
    device=$(ublk add host/disk.vhdx)
    write_stamps "$device" 0 80 5
    ublk del "$device"
    sync
    first=$(($(place_of 10) + 128)) second=$(($(place_of 20) + 256)) third=$(place_of 30)
    umount host
    # shellcheck disable=SC2046 # numbers, in the order of the disk
    failing_disk $(printf '%s\n' "$first 8" "$second 128" "$third 2048" | sort -n)
    ! cp host/disk.vhdx plain-copy 2>/dev/null || fail "the disk does not fail"
    rm -f plain-copy
    ublk salvage host/disk.vhdx copy.raw --mapfile disk.map >said || status=$?
    [ "$status" = 3 ] || { cat said; fail "exit status $status, and bytes are lost"; }
    note "$(bytes -) bytes lost of $lost that no program can read"
    [ "$(bytes -)" = "$lost" ] || { cat said disk.map; fail "$(bytes -) bytes are lost, not $lost"; }
    [ "$(bytes +)" = $(((100 << 20) - lost)) ] || { cat disk.map; fail "$(bytes +) bytes have come back"; }
    stamps x 0 80 5 >expected
    dd if=/dev/zero of=expected bs=4k seek=$((10 * 256 + 16)) count=1 conv=notrunc status=none
    dd if=/dev/zero of=expected bs=4k seek=$((20 * 256 + 32)) count=16 conv=notrunc status=none
    dd if=/dev/zero of=expected bs=1M seek=30 count=1 conv=notrunc status=none
    truncate -s 100M expected
    cmp expected copy.raw || fail "what came back is not what was written"
}
