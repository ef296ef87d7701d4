# A host without room: what needs room fails, or waits where that was chosen, nothing is poisoned, and everything works
# again when there is room.
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
full_test_full_host_xfs() { on_full_host xfs 320M; }
test_full_host_btrfs() { on_full_host btrfs 256M; }

short_of_room() { ublk list --json | jq -r ".[] | select(.device == \"$1\") | .short_of_room.requests // 0"; }

await_short() {
    for _ in $(seq 300); do
        [ "$(short_of_room "$device")" = 0 ] || return 0
        sleep 0.1
    done
    fail "nothing waits for room: $(ublk list)"
}

# Something waits, the writer among it.
still_waits() {
    await_short
    kill -0 "$writer" || fail "the writer has ended on a full host"
}

# waiting_host FSTYPE SIZE [OPTION...]: a device on a full host, with a writer that waits for room.
waiting_host() {
    full_host "$1" "$2"
    shift 2
    ublk create full/disk.vhdx --size 1G --block-size 1M
    begin_to_wait "$@"
}

# begin_to_wait OPTION...
begin_to_wait() {
    device=$(ublk add full/disk.vhdx --on-full wait "$@")
    write_stamps "$device" 0 4 5
    sync "$device"
    fill
    write_stamps "$device" 100 8 6 &
    writer=$!
    await_short
}

make_room() { rm -f full/filler*; sync -f full; }

# The writer, and whatever else, has lost nothing.
ends_well() {
    wait "$writer" || { cat /run/vhdx-ublk/*.log; fail "a write that has waited failed"; }
    check_stamps "$device" 100 8 6
    check_stamps "$device" 0 4 5
    [ "$(short_of_room "$device")" = 0 ] || fail "everything is written, and something waits: $(ublk list)"
    [ "$(ublk list --json | jq -r '.[].health')" = ok ] || fail "$(ublk list)"
    no_poison
}

remove() {
    ublk del "$device"
    ublk check "$1" >/dev/null || fail "$(ublk check "$1")"
}

# requests_wait FSTYPE SIZE
requests_wait() {
    local device writer flusher said log=/run/vhdx-ublk/0.log
    waiting_host "$1" "$2"
    dd if=/dev/urandom of="$device" bs=4k count=1 seek=768 oflag=direct conv=notrunc,fdatasync status=none &
    flusher=$!
    ublk list | grep -q 'host-full ([0-9]* wait for room, for [0-9]* s)' || fail "$(ublk list)"
    ublk list | grep -q 'requests wait until the host has room' || fail "$(ublk list)"
    ublk stats "$device" | grep -q 'the host is full: [0-9]* wait for room' || fail "$(ublk stats "$device")"
    [ "$(ublk stats --json "$device" | jq '.[0].requests.failed')" = 0 ] || fail "a request failed"
    [ "$(dd if="$device" bs=1M count=2 iflag=direct status=none | sha256sum)" = "$(stamps - 0 2 5 | sha256sum)" ] ||
        fail "it cannot be read meanwhile"
    sleep 3
    still_waits
    make_room
    wait "$flusher" || fail "a flush that came meanwhile failed"
    wait "$writer" || { cat $log; fail "a write that has waited failed"; }
    for said in 'requests wait until the host has room' 'the host has room again'; do
        [ "$(grep -c "\[$(daemon_pid)\]: .*$said" $log)" = 1 ] || { cat $log; fail "not said once: $said"; }
    done
    check_stamps "$device" 100 8 6
    [ "$(ublk list --json | jq -r '.[].health')" = ok ] || fail "$(ublk list)"
    no_poison
    remove full/disk.vhdx
    qemu-img check -q full/disk.vhdx
}

full_test_full_host_lets_requests_wait_ext4() { requests_wait ext4 96M; }
full_test_full_host_lets_requests_wait_xfs() { requests_wait xfs 320M; }
test_full_host_lets_requests_wait_btrfs() { requests_wait btrfs 256M; }

test_full_host_waits_through_a_kill() {
    local device writer
    waiting_host ext4 96M
    for _ in 1 2; do
        kill_daemon full/disk.vhdx
        recovered "$device" || fail "$(cat refusal)"
        still_waits
    done
    make_room
    ends_well
    remove full/disk.vhdx
}

test_full_host_waits_through_an_upgrade() {
    local device writer pid
    waiting_host ext4 96M --queues 2
    for _ in 1 2; do
        pid=$(daemon_pid)
        ublk upgrade "$device" || { cat /run/vhdx-ublk/0.log; fail "it is not upgraded while requests wait"; }
        [ "$(daemon_pid)" != "$pid" ] || fail "the same daemon serves it"
        still_waits
    done
    make_room
    ends_well
    remove full/disk.vhdx
}

# The kernel would not repeat them.
test_full_host_refuses_an_upgrade_that_fails_what_waits() {
    local device writer
    waiting_host ext4 96M --recovery queue
    refused ublk upgrade "$device"
    grep -q 'wait for room on the host, and would fail' refusal || fail "$(cat refusal)"
    make_room
    ends_well
    ublk upgrade "$device"
    remove full/disk.vhdx
}

# A snapshot does not wait for them, and they find room in the new image if its host has some.
test_full_host_waits_through_a_snapshot() {
    local device writer
    waiting_host ext4 96M
    refused ublk snapshot "$device" full/child.vhdx
    still_waits
    ublk snapshot "$device" child.vhdx
    ends_well
    remove child.vhdx
    qemu-img check -q full/disk.vhdx
}

test_full_host_waits_while_the_disk_grows() {
    local device writer
    waiting_host ext4 96M
    ublk resize "$device" --size 1500M
    [ "$(blockdev --getsize64 "$device")" -eq $((1500 << 20)) ] || fail "the disk has not grown"
    await_short
    make_room
    ends_well
    remove full/disk.vhdx
}

# fails_what_waits: what has waited has failed, and the image is sound.
fails_what_waits() {
    ! wait "$writer" || fail "there was no room, and the write succeeded"
    [ "$(ublk list --json)" = "[]" ] || fail "$(ublk list)"
    [ ! -e "/proc/$pid" ] || fail "the daemon is still there"
    make_room
    ublk check full/disk.vhdx >/dev/null || fail "$(ublk check full/disk.vhdx)"
    device=$(ublk add full/disk.vhdx)
    check_stamps "$device" 0 4 5
    ublk del "$device"
}

test_full_host_is_no_reason_to_keep_a_device() {
    local device writer pid
    waiting_host ext4 96M
    pid=$(daemon_pid)
    refused ublk del "$device"
    [ "$(short_of_room "$device")" != 0 ] || fail "a refusal has failed what waits"
    ublk del --force "$device" 2>said || fail "$(cat said)"
    grep -q 'requests that wait for room on the host fail: [1-9]' said || fail "$(cat said)"
    ! grep -q 'was killed' said || fail "$(cat said)"
    fails_what_waits

    begin_to_wait
    pid=$(daemon_pid)
    kill "$pid"
    sleep 1
    kill "$pid"
    for _ in $(seq 200); do [ -e "/proc/$pid" ] || break; sleep 0.05; done
    fails_what_waits
}
