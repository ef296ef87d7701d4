# Snapshots of devices in use: what is frozen is the device at one moment, and the device stays in use.
# shellcheck shell=bash

# Takes a snapshot of the only device and keeps the pause, in microseconds, in `pauses`.
snap() { ublk snapshot "$device" "$1" --json | tr -d ' \n' | grep -o '"pause_us":[0-9]*' | cut -d: -f2 >>pauses; }

tell_pauses() {
    local count p99
    count=$(wc -l <pauses)
    p99=$(sort -n pauses | sed -n "$(((count * 99 + 99) / 100))p")
    note "$count snapshots $1: pause p99 $p99 us, median $(sort -n pauses | sed -n "$(((count + 1) / 2))p") us"
}

# A verifying writer works all the time; each frozen image passes the examination, and the last chain has it all.
snapshots_under_writer() {
    local device writer number status=0
    ublk create 0.vhdx --size 1G --block-size 1M
    device=$(ublk add 0.vhdx --queues 2)
    rm -f stop pauses
    stamper "$device" stop >stamper.log 2>&1 &
    writer=$!
    for number in $(seq "$1"); do
        sleep "0.$((RANDOM % 3))$((RANDOM % 10))"
        snap "$number.vhdx"
        ! "${2:-false}" || { kill -9 "$(daemon_pid)"; ublk recover "$device" >/dev/null; }
    done
    touch stop
    wait "$writer" || status=1
    [ $status -eq 0 ] || { cat stamper.log; cat /run/vhdx-ublk/*.log; fail "something was lost"; }
    ublk del "$device"
    qemu-img check -q 0.vhdx
    ublk check "$1.vhdx" >/dev/null
    [ "$(ublk info --chain --json "$1.vhdx" | grep -c '"image"')" -eq "$(($1 + 1))" ] || fail "the chain is too short"
    tell_pauses "under a writer"
    [ -z "$(ls /run/vhdx-ublk/*.session 2>/dev/null)" ] || fail "a session outlives the clean close"
}

# A frozen image needs no session, and leaves no room taken under /run.
test_snapshot_gives_room_under_run_back() {
    local device number before after
    ublk create 0.vhdx --size 1T --block-size 1M
    device=$(ublk add 0.vhdx)
    write_stamps "$device" 0 3 7
    before=$(df --output=used -k /run | tail -n 1)
    for number in 1 2 3 4; do
        ublk snapshot "$device" "$number.vhdx" >/dev/null
        write_stamps "$device" $((number * 100000)) 2 "$number"
    done
    after=$(df --output=used -k /run | tail -n 1)
    note "/run: $before KiB with one image, $after KiB with four frozen ones below it"
    [ "$after" -lt $((before + 1024)) ] || fail "the sessions of frozen images take $((after - before)) KiB"
    check_stamps "$device" 0 3 7
    ublk merge 2.vhdx >/dev/null
    kill_daemon 4.vhdx
    ublk recover "$device" >/dev/null
    check_stamps "$device" 0 3 7
    for number in 1 2 3 4; do check_stamps "$device" $((number * 100000)) 2 "$number"; done
    ublk del "$device"
}

test_snapshot_under_a_verifying_writer() { snapshots_under_writer 40; }
test_snapshot_and_kill() { snapshots_under_writer 20 true; }
test_snapshot_zero_copy() { zero_copy=on snapshots_under_writer 10; }

# The daemon is killed in the middle of a snapshot: the device comes back with the one image or the other.
test_snapshot_killed_in_the_middle() {
    local device writer number status=0 taken=0
    ublk create 0.vhdx --size 1G --block-size 1M
    device=$(ublk add 0.vhdx)
    rm -f stop
    stamper "$device" stop >stamper.log 2>&1 &
    writer=$!
    for number in $(seq 30); do
        ublk snapshot "$device" "$number.vhdx" >/dev/null 2>&1 &
        sleep "0.0$((RANDOM % 10))$((RANDOM % 10))"
        kill -9 "$(daemon_pid)"
        wait $! || true
        ublk recover "$device" >/dev/null || fail "not recovered after kill $number"
        ! ublk list --json | grep -q "/$number.vhdx" || taken=$((taken + 1))
    done
    touch stop
    wait "$writer" || status=1
    [ $status -eq 0 ] || { cat stamper.log; cat /run/vhdx-ublk/*.log; fail "something was lost"; }
    note "$taken of 30 snapshots were taken before the kill"
    ublk del "$device"
}

# fio verifies every byte that it has written before, between and after the snapshots.
test_snapshot_under_fio() {
    local device fio
    ublk create 0.vhdx --size 1G
    device=$(ublk add 0.vhdx --queues 2)
    fio --name=verify --filename="$device" --direct=1 --ioengine=io_uring --iodepth=16 --rw=randrw --bsrange=4k-256k \
        --blockalign=4k --size=512m --io_size=1500m --verify=crc32c --verify_fatal=1 --verify_backlog=64 \
        --minimal >fio.log 2>&1 &
    fio=$!
    rm -f pauses
    for number in $(seq 20); do
        sleep 0.2
        snap "$number.vhdx"
    done
    wait $fio || fail "$(cut -c1-300 fio.log)"
    tell_pauses "under fio"
    ublk del "$device"
}

# A mounted file system is written to all the time. What was frozen is as after a power cut: its journal makes it whole.
test_snapshot_of_a_mounted_ext4() {
    local device writer number
    ublk create 0.vhdx --size 2G
    device=$(ublk add 0.vhdx)
    mkfs.ext4 -q "$device"
    mount "$device" "$mnt"
    (while [ ! -e stop ]; do copy_real_files 20 "$mnt/$RANDOM"; done) &
    writer=$!
    rm -f pauses
    for number in $(seq 5); do
        sleep 1
        snap "$number.vhdx"
    done
    touch stop
    wait $writer || true # the disk may be full
    manifest "$mnt" >before
    umount "$mnt"
    tell_pauses "under a mounted ext4"
    qemu-img convert -f vhdx -O raw 0.vhdx frozen.raw || fail "QEMU does not read the frozen image"
    e2fsck -p frozen.raw >fsck.log || [ $? -le 1 ] || fail "$(cat fsck.log)"
    e2fsck -fn frozen.raw >fsck.log 2>&1 || fail "$(cat fsck.log)"
    ublk del "$device"
    device=$(ublk add --read-only 5.vhdx)
    e2fsck -fn "$device" >fsck.log 2>&1 || fail "$(cat fsck.log)"
    mount -o ro "$device" "$mnt"
    manifest "$mnt" | diff -q - before || fail "files have changed"
    umount "$mnt"
    ublk del "$device"
}

test_snapshot_refusals() {
    local device
    ublk create 0.vhdx --size 1G
    device=$(ublk add 0.vhdx)
    echo mine >taken.vhdx
    ! ublk snapshot "$device" taken.vhdx 2>said || fail "a file was replaced"
    [ "$(cat taken.vhdx)" = mine ] || fail "a file was written"
    ! ublk snapshot "$device" nowhere/new.vhdx 2>said || fail "there is no such folder"
    mkfs.ext4 -q "$device"
    mount "$device" "$mnt"
    ! ublk snapshot "$device" "$mnt/new.vhdx" 2>said || fail "the device would lie on itself"
    grep -q 'on the device itself' said || fail "$(cat said)"
    [ ! -e "$mnt/new.vhdx" ] || fail "something was left behind"
    umount "$mnt"
    write_stamps "$device" 10 20 3
    check_stamps "$device" 10 20 3
    ublk del "$device"
    device=$(ublk add --read-only 0.vhdx)
    ! ublk snapshot "$device" new.vhdx 2>said || fail "it cannot be written"
    grep -q 'read-only' said || fail "$(cat said)"
    [ ! -e new.vhdx ] || fail "something was left behind"
    ublk del "$device"
}

# A file system on a loop device of its own, in a file of the current folder, mounted at $1.
loop_mount() {
    truncate -s 300M "$2"
    mkfs.ext4 -q -F "$2"
    mkdir -p "$1"
    mount -o loop "$2" "$1"
}

# A loop file system on the device, an own device on the device: the snapshot would wait for itself.
test_snapshot_onto_itself_is_refused_through_loops_and_devices() {
    local device other
    take_down() { umount -q looped || true; }
    ublk create 0.vhdx --size 2G
    device=$(ublk add 0.vhdx)
    mkfs.ext4 -q "$device"
    mount "$device" "$mnt"
    loop_mount looped "$mnt/file"
    ! ublk snapshot "$device" looped/new.vhdx 2>said || fail "taken, onto itself"
    grep -q 'on the device itself' said || fail "$(cat said)"
    [ ! -e looped/new.vhdx ] || fail "something was left behind"
    umount looped
    ublk create "$mnt/1.vhdx" --size 500M
    other=$(ublk add "$mnt/1.vhdx")
    mkfs.ext4 -q "$other"
    mount "$other" looped
    ! ublk snapshot "$device" looped/new.vhdx 2>said || fail "taken, onto itself"
    grep -q 'on the device itself' said || fail "$(cat said)"
    # The other one's snapshot may be where its image is.
    ublk snapshot "$other" "$mnt/2.vhdx"
    umount looped
    ublk del "$other"
    umount "$mnt"
    # A loop file system elsewhere, and memory, are as good as any place.
    loop_mount looped file
    ublk snapshot "$device" looped/new.vhdx
    mount "$device" "$mnt"
    umount "$mnt"
    ublk snapshot "$device" /run/new.vhdx
    ublk del "$device"
    umount looped
    rm /run/new.vhdx
}

# The place hangs: the snapshot fails in time, and the device never notices. Nothing is left when the place is back.
test_snapshot_to_a_place_that_hangs() {
    local device pid longest
    take_down() {
        ! mountpoint -q hung || fsfreeze -u hung 2>/dev/null || true
        umount -q hung || true
    }
    ublk create 0.vhdx --size 1G
    device=$(ublk add 0.vhdx)
    pid=$(daemon_pid)
    loop_mount hung file
    fsfreeze -f hung
    python3 "$tests/beat.py" "$device" stop >beats &
    ublk snapshot "$device" "$PWD/hung/new.vhdx" 2>said && { fsfreeze -u hung; fail "taken"; }
    touch stop
    wait $!
    fsfreeze -u hung
    grep -q 'has not taken a new file within' said || fail "$(cat said)"
    longest=$(cat beats)
    note "the longest write beside a snapshot that hangs took $longest ms"
    [ "$longest" -lt 5000 ] || fail "the device waited for the place of its snapshot: $longest ms"
    for _ in $(seq 100); do
        [ -e hung/new.vhdx ] || break
        sleep 0.1
    done
    [ ! -e hung/new.vhdx ] || fail "something was left behind"
    ublk snapshot "$device" hung/new.vhdx
    # While it hangs the device can be taken away.
    fsfreeze -f hung
    "$VHDX_UBLK" snapshot "$device" "$PWD/hung/more.vhdx" 2>said &
    sleep 2
    (sleep 3; fsfreeze -u hung) &
    ublk del "$device" || fail "the device stays"
    wait
    [ "$(daemon_pid)" = "" ] && [ ! -e "/proc/$pid" ] || fail "the daemon stays"
    [ ! -e hung/more.vhdx ] || ublk check hung/more.vhdx >/dev/null || fail "half an image was left"
}

# The command thaws what the process that freezes for it has left frozen.
test_snapshot_freeze_ends_with_its_helper() {
    local device helper command
    take_down() {
        ! mountpoint -q hung || fsfreeze -u hung 2>/dev/null || true
        umount -q hung || true
    }
    ublk create disk.vhdx --size 256M
    device=$(ublk add disk.vhdx)
    mkfs.ext4 -q -F "$device"
    mount "$device" "$mnt"
    # The snapshot waits for its place.
    loop_mount hung file
    fsfreeze -f hung
    "$VHDX_UBLK" snapshot --freeze "$device" "$PWD/hung/new.vhdx" >said 2>&1 &
    command=$!
    for _ in $(seq 100); do
        helper=$(pgrep -P $command -f -- --hold-frozen) && [ "$(frozen_state "$mnt")" = frozen ] && break
        sleep 0.1
    done
    [ "$(frozen_state "$mnt")" = frozen ] || fail "nothing is frozen: $(cat said)"
    kill -9 "$helper"
    sleep 0.5
    [ "$(frozen_state "$mnt")" = frozen ] || fail "it was not the helper that was killed"
    fsfreeze -u hung
    wait $command || fail "$(cat said)"
    [ "$(frozen_state "$mnt")" = thawed ] || fail "the file system stays frozen"
    timeout 20 touch "$mnt/later" || fail "it cannot be written"
    umount "$mnt"
    ublk del "$device"
}

# Whether a file system is frozen: a writer waits in the kernel then, and stays until the thaw.
frozen_state() {
    local writer
    touch "$1/probe.$RANDOM" >/dev/null 2>&1 &
    writer=$!
    sleep 0.3
    if kill -0 $writer 2>/dev/null; then echo frozen; else echo thawed; fi
}

# From the next boot on, a line of the table that names the frozen image would serve the disk as it was.
test_snapshot_warns_of_a_line_of_the_table() {
    local device
    take_down() { umount -q /etc etc || true; }
    mkdir etc
    mount -t tmpfs tmpfs etc
    cp -a /etc/. etc
    mount --bind etc /etc
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx)
    printf '# disks\ndata %s\n' "$PWD/disk.vhdx" >/etc/vhdxtab
    ublk snapshot "$device" first.vhdx 2>said
    grep -q "/etc/vhdxtab: line 2 names $PWD/disk.vhdx, which is frozen now: change it to $PWD/first.vhdx" said ||
        { cat said; fail "nothing is said of the line"; }
    ublk snapshot "$device" second.vhdx 2>said
    ! grep -q vhdxtab said || { cat said; fail "no line names this image"; }
    ublk del "$device"
}
