# Images on disks that fail: what the host can still read comes back, and what is lost is listed.
# shellcheck shell=bash

take_down() {
    umount -q "$mnt" 2>/dev/null || true
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
    device=$(ublk add --salvage host/disk.vhdx 2>said) || { cat said; fail "it is not served"; }
    same_as_copy "$device" copy.raw disk.map
    ublk del "$device"
}

# same_as_copy DEVICE COPY MAP: each 4 KiB of the device is what the copy has, or fails where the map lists a loss.
# Where it lists none, many are read at once.
same_as_copy() {
    python3 - "$@" <<'PYTHON' || fail "the device and the copy differ"
import mmap, os, sys
device, copy, mapfile = sys.argv[1:]
lines = [line.split() for line in open(mapfile) if not line.startswith("#")][1:]
lost = [(int(start, 16), int(start, 16) + int(size, 16)) for start, size, sign in lines if sign == "-"]
page, unit, many = mmap.mmap(-1, 1 << 20), 4096, 1 << 20
given = os.open(device, os.O_RDONLY | os.O_DIRECT)
expected = open(copy, "rb")
counts = {True: 0, False: 0}
is_in = lambda start, end: any(first < end and start < last for first, last in lost)
at, size = 0, os.path.getsize(copy)
while at < size:
    length = unit if at % many or is_in(at, at + many) else many
    is_lost = is_in(at, at + length)
    counts[is_lost] += min(length, size - at) // unit
    expected.seek(at)
    wanted = expected.read(length)
    try:
        count = os.preadv(given, [memoryview(page)[:len(wanted)]], at)
        assert not is_lost, f"byte {at} is lost, and was read"
        assert page[:count] == wanted, f"byte {at} is not what the copy has"
    except OSError as error:
        assert is_lost and error.errno == 5, f"byte {at}: {error}"
    at += length
print(f"note: {counts[False]} pages are the same, {counts[True]} fail")
PYTHON
}

# overwrite FILE AT COUNT: random bytes.
overwrite() { head -c "$3" /dev/urandom | dd of="$1" oflag=seek_bytes seek="$2" conv=notrunc status=none; }

# What is done to an image of 64 MiB in blocks of 1 MiB, in each of its structures.
damage() {
    case $1 in
    nothing) ;;
    front) overwrite "$2" 0 65536 ;;
    headers) overwrite "$2" 65536 69632 ;;
    regions) overwrite "$2" 196608 131072 ;;
    metadata) overwrite "$2" $((2 << 20)) 65600 ;;
    entries) overwrite "$2" $(((3 << 20) + 40)) 24 ;;
    shared) dd if="$2" of="$2" bs=8 skip=$((3 << 17)) seek=$(((3 << 17) + 3)) count=1 conv=notrunc status=none ;;
    end) truncate -s -$(((10 << 20) + 12345)) "$2" ;;
    esac
}

# In whatever structure an image is damaged, its device gives out what a copy has, and fails where that lists a loss.
test_salvage_device_gives_out_what_a_copy_has() {
    local device what assume
    ublk create whole.vhdx --size 64M --block-size 1M
    device=$(ublk add whole.vhdx)
    write_stamps "$device" 0 40 9
    write_stamps "$device" 50 5 10
    ublk del "$device"
    for what in nothing front headers regions metadata entries shared end; do
        cp --sparse=never whole.vhdx disk.vhdx
        damage "$what" disk.vhdx
        sha256sum disk.vhdx >before
        assume=()
        ublk salvage --dry-run disk.vhdx >said || [ $? = 3 ]
        if grep -q '(a guess)' said; then
            ! ublk add --salvage disk.vhdx 2>said || fail "$what: a guess was made without consent"
            grep -q -- --assume said || { cat said; fail "$what: no word of --assume"; }
            assume=(--assume)
        fi
        rm -f copy.raw copy.map
        ublk salvage disk.vhdx copy.raw --mapfile copy.map "${assume[@]}" >said || [ $? = 3 ]
        device=$(ublk add --salvage "${assume[@]}" disk.vhdx)
        note "$what ${assume[*]}"
        same_as_copy "$device" copy.raw copy.map
        ! dd if=/dev/zero of="$device" bs=4k count=1 oflag=direct 2>/dev/null || fail "$what: it was written"
        ublk del "$device"
        sha256sum --check --quiet before || fail "$what: the image was changed"
    done
}

# A child whose parent is missing gives what it has. A killed daemon's successor serves the same, even if the parent has
# come back meanwhile. A device of what is left is shown as one, and everything that would write is refused.
test_salvage_device_stays_what_it_is() {
    local device
    ublk create base.vhdx --size 64M --block-size 1M
    device=$(ublk add base.vhdx)
    write_stamps "$device" 0 8 3
    ublk del "$device"
    ublk create child.vhdx --parent base.vhdx
    device=$(ublk add child.vhdx)
    write_stamps "$device" 4 2 4
    ublk del "$device"
    mv base.vhdx away
    sha256sum child.vhdx >before
    ublk salvage child.vhdx copy.raw --mapfile copy.map >said || [ $? = 3 ]
    device=$(ublk add --salvage child.vhdx 2>said)
    grep -q 'a parent is missing' said || { cat said; fail "nothing is said of the parent"; }
    same_as_copy "$device" copy.raw copy.map
    ublk list | grep -q ' salvage ' || fail "list does not say what it is"
    ublk info child.vhdx | grep -q "^attached: *$device (salvage" || fail "info does not say what it is"
    ! ublk snapshot "$device" snap.vhdx 2>said || fail "a snapshot of it was taken"
    grep -q 'what is left of a damaged image' said || { cat said; fail "the refusal does not say why"; }
    mv away base.vhdx
    for command in "resize --size +1G" compact "set --disk-id new" merge "check --repair"; do
        # shellcheck disable=SC2086 # words
        ! ublk $command child.vhdx >said 2>&1 || fail "$command of it was done"
        grep -q "$device" said || { cat said; fail "$command does not name the device"; }
    done
    kill_daemon child.vhdx
    ublk recover "$device"
    same_as_copy "$device" copy.raw copy.map
    ublk upgrade "$device"
    same_as_copy "$device" copy.raw copy.map
    ublk list | grep -q ' salvage ' || fail "list does not say what it is after recovery"
    ublk del "$device"
    sha256sum --check --quiet before || fail "the image was changed"
}

# An ext4 file system of which blocks are lost is mounted: files without losses are read, others fail.
test_salvage_device_is_mounted() {
    local device at
    ublk create disk.vhdx --size 64M --block-size 1M
    device=$(ublk add disk.vhdx)
    mkfs.ext4 -q -F -b 4096 "$device"
    mount "$device" "$mnt"
    head -c 8M /dev/urandom >"$mnt/first"
    head -c 8M /dev/urandom >"$mnt/second"
    sha256sum "$mnt/first" >sums
    sync
    # Where the second one begins on the disk, in MiB: that block of the image is lost.
    at=$(($(debugfs -R 'bmap second 300' "$device" 2>/dev/null) / 256))
    umount "$mnt"
    ublk del "$device"
    overwrite disk.vhdx $(((3 << 20) + 8 * at)) 8
    overwrite disk.vhdx 65536 100
    sha256sum disk.vhdx >before
    ublk mount -o salvage,noload disk.vhdx "$mnt" 2>said || { cat said; fail "it is not mounted"; }
    sha256sum --check --quiet sums || fail "a whole file is damaged"
    ! cat "$mnt/second" >/dev/null 2>said || fail "what is lost was read"
    grep -q 'Input/output error' said || { cat said; fail "the error is another one"; }
    ublk umount "$mnt"
    sha256sum --check --quiet before || fail "the image was changed"
}
