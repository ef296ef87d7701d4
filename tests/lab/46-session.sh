# Sessions: what a killed daemon leaves is believed only if it can be true, and never given up without a word.
# shellcheck shell=bash

# A folder of its own for what is usually under /run/vhdx-ublk.
run_in() {
    mkdir -p /run/vhdx-ublk
    mount "$@" /run/vhdx-ublk
    chmod 700 /run/vhdx-ublk
}

take_down() {
    ! mountpoint -q /run/vhdx-ublk || umount /run/vhdx-ublk
    rm -f /run/vhdx-ublk/*.session
    ! mountpoint -q bad || umount bad
    ! dmsetup info bad >/dev/null 2>&1 || dmsetup remove bad
    losetup -j bad.img | cut -d: -f1 | xargs -r -n 1 losetup -d
}

session_file() { ls /run/vhdx-ublk/*.session; }

first_byte() { dd if="$1" bs=4k count=1 iflag=direct status=none | head -c 1; }

# Has the host begin to write FILE back, as it does by itself after half a minute. Takes no error.
write_back() {
    /usr/bin/python3 -c '
import ctypes, os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
WRITE = 2
nothing = ctypes.c_long(0)
sys.exit(ctypes.CDLL(None).sync_file_range(file, nothing, nothing, WRITE))' "$1"
}

# The host's disk fails while a killed daemon's fdatasync is under way: the kernel reports it to the dead process. The
# successor must not acknowledge the guest's flush, and what is read afterwards is what is on the disk.
test_session_flush_that_a_death_cuts_short() {
    local loop sectors good bad device pid guest
    truncate -s 256M bad.img
    loop=$(losetup --show -f -b 4096 bad.img)
    sectors=$(blockdev --getsz "$loop")
    mkfs.ext4 -q -F -O ^has_journal "$loop"
    good="0 $sectors linear $loop 0" bad="0 $sectors flakey $loop 0 0 600 1 error_writes"
    dmsetup create bad --table "$good"
    dmsetup mknodes bad
    mkdir -p bad
    mount /dev/mapper/bad bad
    ublk create bad/disk.vhdx --size 64M --block-size 1M
    device=$(ublk add bad/disk.vhdx --queues 1 2>said)
    grep -q "page cache" said || fail "the host has direct I/O: this shows nothing"
    head -c 4096 /dev/zero | tr '\0' A | dd of="$device" bs=4k count=1 oflag=direct conv=fdatasync status=none
    sync
    head -c 4096 /dev/zero | tr '\0' B | dd of="$device" bs=4k count=1 oflag=direct status=none
    pid=$(daemon_pid)
    dmsetup suspend --noflush --nolockfs bad
    dd if=/dev/null of="$device" conv=fsync,notrunc status=none 2>flushed && echo acknowledged >>flushed &
    guest=$!
    for _ in $(seq 100); do
        ! grep -q "Writeback: *[1-9]" /proc/meminfo || break
        sleep 0.1
    done
    sleep 0.3
    kill -9 "$pid"
    sleep 0.3
    dmsetup reload bad --table "$bad"
    dmsetup resume bad
    write_back bad/disk.vhdx
    sleep 1
    dmsetup suspend --noflush --nolockfs bad
    dmsetup reload bad --table "$good"
    dmsetup resume bad
    ublk recover "$device" 2>said && fail "recovered, though the host has lost what was written"
    grep -q "accept-loss" said
    ublk recover "$device" 2>said && fail "recovered at the second try"
    ublk del --force "$device" 2>said && fail "said to be closed cleanly"
    wait "$guest" || true
    ! grep -q acknowledged flushed || fail "the flush was acknowledged"
    device=$(ublk add bad/disk.vhdx 2>/dev/null)
    [ "$(first_byte "$device")" = A ] || fail "the device shows what is not on the disk"
    ublk del "$device"
}

# After a death on such a host in which nothing was lost, everything works; also if another file of the file system
# was lost before the device was there.
test_session_where_the_page_cache_is_used() {
    local loop device
    truncate -s 256M bad.img
    loop=$(losetup --show -f -b 4096 bad.img)
    mkfs.ext4 -q -F "$loop"
    mkdir -p bad
    mount "$loop" bad
    ublk create bad/disk.vhdx --size 64M --block-size 1M
    device=$(ublk add bad/disk.vhdx 2>said)
    grep -q "page cache" said
    write_stamps "$device" 10 20 7
    for _ in 1 2 3; do
        kill_daemon bad/disk.vhdx
        ublk recover "$device" 2>/dev/null
    done
    check_stamps "$device" 10 20 7
    sync "$device"
    ublk del "$device"
    umount bad
    losetup -d "$loop"
}

# A folder that a power cut does not empty: no session, and `add` says so.
test_session_folder_on_a_disk() {
    local device
    mkdir run
    run_in --bind run
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx 2>said)
    grep -q "cannot be recovered" said
    grep -q "not a tmpfs" said
    write_stamps "$device" 10 4 7
    ! ls /run/vhdx-ublk/*.session 2>/dev/null || fail "a session that outlives a power cut"
    ublk del "$device"
    umount /run/vhdx-ublk
}

# A session that only another version can read is kept, whatever is done, until that version takes it over.
test_session_of_another_version() {
    local device left
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 4 7
    left=$(session_file)
    kill_daemon disk.vhdx
    printf '\002' | dd of="$left" bs=1 seek=8 conv=notrunc status=none
    ublk recover "$device" 2>said && fail "recovered with a session that it cannot read"
    grep -q "version 2.*version 1" said
    ublk del --force "$device" 2>said && fail "del said that all is well"
    grep -q "session discard" said
    ublk add disk.vhdx 2>said && fail "served without what was acknowledged"
    grep -q "version 2.*version 1" said
    [ -e "$left" ] || fail "the session is gone"
    ublk session list --json >said
    grep -q '"state": "other-version"' said
    printf '\001' | dd of="$left" bs=1 seek=8 conv=notrunc status=none
    device=$(ublk add disk.vhdx)
    check_stamps "$device" 10 4 7
    ublk del "$device"
}

# One that is damaged is kept too; discarding it leaves what was flushed.
test_session_that_is_damaged() {
    local device left
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 4 7
    sync "$device"
    left=$(session_file)
    kill_daemon disk.vhdx
    printf '\377' | dd of="$left" bs=1 seek=83 conv=notrunc status=none
    ublk del --force "$device" 2>said && fail "del said that all is well"
    ublk add disk.vhdx 2>said && fail "a damaged session was ignored"
    grep -q damaged said
    ublk session discard "$(basename "$left")"
    [ ! -e "$left" ] || fail "it is still there"
    device=$(ublk add disk.vhdx)
    check_stamps "$device" 10 4 7
    ublk del "$device"
}

test_session_list_and_discard() {
    local device name
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    name=$(basename "$(session_file)")
    ublk session list | grep -q "$name  *live  *$device .*/disk.vhdx"
    ublk session discard "$name" 2>said && fail "a living daemon's session was discarded"
    grep -q "$device needs" said
    kill_daemon disk.vhdx
    ublk session list | grep -q "$name  *waiting  *$device"
    ublk session discard "$name" 2>said && fail "a waiting device's session was discarded"
    ublk session discard --force "$name"
    [ "$(ublk session list --json)" = "[]" ] || fail "a session is left"
    ublk recover "$device" 2>said && fail "recovered without its session"
    ublk session discard "$name" 2>said && fail "discarded what is not there"
    ublk del --force "$device"
}

# The image of a session is gone, and a new one has its inode.
test_session_of_an_image_that_is_gone() {
    local device inode
    ublk create old.vhdx --size 1G
    inode=$(stat -c %i old.vhdx)
    device=$(ublk add old.vhdx)
    write_stamps "$device" 10 4 7
    kill_daemon old.vhdx
    rm old.vhdx
    ublk del --force "$device" 2>/dev/null && fail "del said that all is well, and the image is gone"
    ublk session list | grep -q "orphan .*/old.vhdx"
    for number in $(seq 50); do
        ublk create "new$number.vhdx" --size 1G
        [ "$(stat -c %i "new$number.vhdx")" != "$inode" ] || break
    done
    [ "$(stat -c %i "new$number.vhdx")" = "$inode" ] || fail "no file got the inode"
    device=$(ublk add "new$number.vhdx" 2>said)
    grep -q "old.vhdx is given up" said
    kill_daemon "new$number.vhdx"
    ublk recover "$device"
    ublk del "$device"
    [ "$(ublk session list --json)" = "[]" ] || fail "a session is left"
}

# Another mount changes nothing: the session is found, and what it holds is taken over.
test_session_after_another_mount() {
    local loop device
    truncate -s 256M bad.img
    loop=$(losetup --show -f bad.img)
    mkfs.ext4 -q -F "$loop"
    mkdir -p bad
    mount "$loop" bad
    ublk create bad/disk.vhdx --size 64M --block-size 1M
    device=$(ublk add bad/disk.vhdx)
    write_stamps "$device" 10 20 7
    kill_daemon bad/disk.vhdx
    mkdir aside
    mv /run/vhdx-ublk/*.session aside/
    ublk del --force "$device" 2>/dev/null || true
    umount bad
    losetup -d "$loop"
    losetup --show -f bad.img >/dev/null # the first one's number, for another purpose
    loop=$(losetup --show -f bad.img)
    mount "$loop" bad
    mv aside/*.session /run/vhdx-ublk/
    device=$(ublk add bad/disk.vhdx)
    check_stamps "$device" 10 20 7
    ublk del "$device"
    [ "$(ublk session list --json)" = "[]" ] || fail "a session is left"
    umount bad
}

# Without room the device works; `info` says how much it may take, and a part of /run stays free.
test_session_without_room() {
    local device
    run_in -t tmpfs -o size=512k tmpfs
    ublk create disk.vhdx --size 64G --block-size 1M
    ublk info disk.vhdx | grep -q "session: .*516.1 KiB"
    device=$(ublk add disk.vhdx 2>said)
    grep -q "cannot be recovered" said
    write_stamps "$device" 10 4 7
    check_stamps "$device" 10 4 7
    ublk del "$device"
    umount /run/vhdx-ublk
}

# No other command could find a device without an entry: where not even that has room, `add` refuses and
# says what to do.
test_session_without_room_for_an_entry() {
    local device digest
    ublk create disk.vhdx --size 1G
    digest=$(sha256sum disk.vhdx)
    run_in -t tmpfs -o size=64k tmpfs
    ! dd if=/dev/zero of=/run/vhdx-ublk/filler bs=4k status=none 2>/dev/null || fail "the folder is not full"
    ! ublk add disk.vhdx 2>said || fail "a device without an entry"
    grep -q "free some space in /run" said
    mount -o remount,ro /run/vhdx-ublk
    ! ublk add disk.vhdx 2>said || fail "a device without an entry"
    grep -q "mount /run writable" said
    ! ls /dev/ublk[bc]* 2>/dev/null || fail "a device is left"
    [ "$(sha256sum disk.vhdx)" = "$digest" ] || fail "the image has changed"
    mount -o remount,rw /run/vhdx-ublk
    rm /run/vhdx-ublk/filler
    device=$(ublk add disk.vhdx)
    ublk del "$device"
    umount /run/vhdx-ublk
}

# each_sixteen_mib DEVICE COUNT write|check: a sector with a number of its own, so many times.
each_sixteen_mib() {
    python3 - "$@" <<'PYTHON' || fail "a sector is lost"
import os, sys
device, count, what = os.open(sys.argv[1], os.O_RDWR), int(sys.argv[2]), sys.argv[3]
for number in range(count):
    at, sector = number << 24, b"sector %d" % number
    if what == "write":
        os.pwrite(device, sector.ljust(512, b"\0"), at)
    elif os.pread(device, 512, at).rstrip(b"\0") != sector:
        sys.exit(f"sector {number} has other content")
os.fsync(device)
PYTHON
}

# A guest that writes a sector here and there cannot fill /run: its blocks are filled from the parents instead.
test_session_guest_cannot_fill_run() {
    local device total free block
    ublk create parent.vhdx --size 64G --block-size 1M
    ublk create child.vhdx --parent parent.vhdx --block-size 1M
    run_in -t tmpfs -o size=2M tmpfs
    device=$(ublk add child.vhdx 2>said)
    grep -q "may take up to" said
    each_sixteen_mib "$device" 401 write
    total=$(stat -f -c %b /run/vhdx-ublk) free=$(stat -f -c %a /run/vhdx-ublk)
    note "$free of $total pages are free"
    [ $((free * 4)) -ge "$total" ] || fail "the guest has filled /run"
    kill_daemon child.vhdx
    ublk recover "$device"
    each_sixteen_mib "$device" 401 check
    ublk del "$device"
    umount /run/vhdx-ublk
}
