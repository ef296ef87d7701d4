# A host without room: what needs room fails, nothing is poisoned, and everything works again when there is room.
# shellcheck shell=bash

# full_host FSTYPE SIZE: a small file system of that kind, mounted on full/.
full_host() {
    local fstype=$1
    grep -qw "$fstype" /proc/filesystems || modprobe "$fstype" 2>/dev/null || true
    if ! grep -qw "$fstype" /proc/filesystems || ! command -v "mkfs.$fstype" >/dev/null; then
        skipped "this kernel or machine has no $fstype"
        exit 0
    fi
    truncate -s "$2" full.img
    case $fstype in
        ext4) mkfs.ext4 -q -F -m 0 full.img ;;
        xfs) mkfs.xfs -q -f full.img ;;
        btrfs) mkfs.btrfs -q -f full.img ;;
    esac
    mkdir -p full
    mount -o loop full.img full
}

take_down() { umount -q full 2>/dev/null || true; }

# Takes what room there is, and what a commit of the host's file system gives back.
fill() {
    local round
    for round in 1 2 3; do
        dd if=/dev/zero of="full/filler.$round" bs=1M 2>/dev/null || true
        dd if=/dev/zero of="full/filler.$round.k" bs=4k 2>/dev/null || true
        sync
    done
}

# A compaction of a served image takes no room that the guest may need next: it wants more than it takes at a time.
test_full_host_keeps_its_last_room_from_a_compaction() {
    local device before left
    full_host xfs 600M
    ublk create full/disk.vhdx --size 1G --block-size 1M
    device=$(ublk add full/disk.vhdx)
    dd if=/dev/urandom of="$device" bs=1M count=200 oflag=direct,sync status=none
    blkdiscard -o 0 -l 100M "$device"
    for _ in $(seq 300); do
        [ "$(host_bytes full/disk.vhdx)" -gt $((110 << 20)) ] || break
        sleep 0.1
    done
    left=$(df --output=avail -B1 full | tail -n 1)
    fallocate -l $((left - (12 << 20))) full/filler
    before=$(stat -c %s full/disk.vhdx)
    refused ublk compact "$device"
    grep -q 'compacting an image while it is served needs' refusal || fail "$(cat refusal)"
    [ "$(stat -c %s full/disk.vhdx)" -eq "$before" ] || fail "it was compacted"
    write_stamps "$device" 300 8 2
    check_stamps "$device" 300 8 2
    rm full/filler
    ublk compact "$device" >/dev/null
    [ "$(stat -c %s full/disk.vhdx)" -lt $((130 << 20)) ] || fail "$(stat -c %s full/disk.vhdx) bytes for 108 MiB"
    check_stamps "$device" 300 8 2
    ublk del "$device"
    ublk check full/disk.vhdx >/dev/null || fail "$(ublk check full/disk.vhdx)"
}

error_of() { grep -o 'No space left\|Input/output\|[A-Z][a-z ]*error' "$1" | head -n 1 | tr ' ' '-'; }

# put NAME DD-ARGUMENT...: a write of 4096 bytes; whether it worked is noted, not judged.
put() {
    local name=$1 status=0
    shift
    timeout 60 dd if=/dev/urandom of="$device" bs=4k count=1 conv=notrunc status=none "$@" 2>put.log || status=$?
    [ "$status" != 124 ] || fail "$name hangs"
    if [ "$status" = 0 ]; then outcome+=" $name:ok"; else outcome+=" $name:$(error_of put.log)"; fi
}

# while_full: a write of every kind, on a host without room.
while_full() {
    outcome=
    put plain-hole oflag=direct seek=50000
    put overwrite oflag=direct seek=256
    put fua-overwrite oflag=direct,sync seek=257
    put fua-hole oflag=direct,sync seek=60000
    put flush oflag=direct seek=258 conv=notrunc,fdatasync
    blkdiscard -o $((4 << 20)) -l $((1 << 20)) "$device" || outcome+=" discard:failed"
    put log-and-bat oflag=direct seek=259 conv=notrunc,fdatasync
    fill
    put new-block oflag=direct seek=70000
    put flush-again oflag=direct seek=260 conv=notrunc,fdatasync
    note "$1:$outcome"
}

# Every kind of write works.
with_room() {
    local at
    rm -f full/filler*
    sync
    for at in 100 101; do
        write_stamps "$device" $at 1 $at
        check_stamps "$device" $at 1 $at
    done
    outcome=
    put plain-hole oflag=direct seek=50000
    put fua-hole oflag=direct,sync seek=60000
    put fua-overwrite oflag=direct,sync seek=257
    put flush oflag=direct seek=258 conv=notrunc,fdatasync
    [ "$outcome" = " plain-hole:ok fua-hole:ok fua-overwrite:ok flush:ok" ] ||
        fail "there is room again, and not everything works:$outcome"
    check_stamps "$device" 0 1 5
    check_stamps "$device" 2 1 5
}

# on_full_host FSTYPE SIZE
on_full_host() {
    local device outcome
    full_host "$1" "$2"
    ublk create full/disk.vhdx --size 1G --block-size 1M
    device=$(ublk add full/disk.vhdx)
    for at in 0 1 2 4; do write_stamps "$device" $at 1 5; done
    sync "$device"
    fill
    while_full "$1, plain image"
    with_room
    no_poison
    ublk del "$device"
    qemu-img check -q full/disk.vhdx

    # What a first write begins: the session, the log, a sector bitmap.
    ublk create full/child.vhdx --parent full/disk.vhdx
    device=$(ublk add full/child.vhdx)
    fill
    while_full "$1, untouched child"
    with_room
    fill
    while_full "$1, child with sector bitmaps"
    with_room
    no_poison
    ublk del "$device"
    ublk check full/child.vhdx
    umount full
}

# Of the daemon that serves now: logs of earlier ones stay.
no_poison() {
    ! grep -h "\[$(daemon_pid)\]: .*no write or flush will succeed" /run/vhdx-ublk/*.log ||
        fail "poisoned for want of room"
}

test_full_host_ext4() { on_full_host ext4 96M; }
test_full_host_xfs() { on_full_host xfs 320M; }
test_full_host_btrfs() { on_full_host btrfs 256M; }
