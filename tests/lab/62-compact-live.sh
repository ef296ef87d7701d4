# The file of an image becomes shorter while it is served: nothing is lost, whoever writes or is killed meanwhile.
# shellcheck shell=bash

# job DEVICE: what its daemon does beside serving it.
job() { ublk list --json | jq -c --arg device "$1" '.[] | select(.device == $device) | .job'; }

# await_job DEVICE: until it has one that has moved something.
await_job() {
    for _ in $(seq 600); do
        ! job "$1" | jq -e '.job == "compact" and .done_bytes > 0' >/dev/null || return 0
        sleep 0.05
    done
    fail "there is no job: $(ublk list)"
}

# exchange DEVICE NUMBER: writes blocks behind the writer's, and gives those back that the number before has written,
# which lie lower in the file.
exchange() {
    write_stamps "$1" $((600 + $2 % 2 * 100)) 16 "$2"
    blkdiscard -o $((600 + ($2 + 1) % 2 * 100 << 20)) -l 16M "$1"
}

# A verifying writer works all the time. The daemon is killed in the middle of one of two compactions.
compact_under_writer() {
    local device writer number compacting kills=0 moves=0 cut=0
    ublk create disk.vhdx --size 2G --block-size "$1"
    device=$(ublk add disk.vhdx --queues 2)
    exchange "$device" 0
    begin_writer "$device"
    for number in $(seq 6); do
        exchange "$device" "$number"
        if [ $((number % 2)) = 0 ]; then
            ublk compact "$device" --json --max-rate 1G >said 2>refusal || fail "$(cat said refusal)"
            jq -e ".stopped == false" said >/dev/null || fail "$(cat said)"
            moves=$((moves + $(jq .moves said)))
            cut=$((cut + $(jq '.file_bytes_before - .file_bytes_after' said)))
        else
            ublk compact disk.vhdx --max-rate 1G >/dev/null 2>&1 &
            compacting=$!
            sleep "0.$((RANDOM % 10))$((RANDOM % 10))"
            kill -9 "$(daemon_pid)"
            ! wait $compacting || kills=$((kills - 1))
            kills=$((kills + 1))
            recovered "$device" || fail "not recovered: $(cat refusal /run/vhdx-ublk/*.log)"
        fi
    done
    end_writer
    check_stamps "$device" $((600 + number % 2 * 100)) 16 "$number"
    ublk del "$device"
    ublk check disk.vhdx >/dev/null || fail "$(ublk check disk.vhdx)"
    qemu-img check -q disk.vhdx
    [ $moves -gt 0 ] && [ $cut -gt 0 ] || fail "nothing was won: $moves moves, $cut bytes"
    note "$moves moves and $((cut >> 20)) MiB cut off under a writer, $kills kills in the middle"
    [ -z "$(ls /run/vhdx-ublk/*.session* 2>/dev/null)" ] || fail "a session outlives the clean close"
}

test_compact_live_under_a_verifying_writer() { compact_under_writer 1M; }
test_compact_live_zero_copy() { zero_copy=on compact_under_writer 2M; }

# Two of three files of a mounted file system are deleted: one command, and the file has the size of the others.
test_compact_live_follows_a_mounted_file_system() {
    local device before length kept
    ublk create disk.vhdx --size 4G --block-size 1M
    device=$(ublk add disk.vhdx)
    mkfs.ext4 -q -F -E nodiscard -J size=16 "$device"
    mount "$device" "$mnt"
    for number in $(seq 60); do
        stamps x 0 8 "$number" >"$mnt/$number"
    done
    sync
    for number in $(seq 60); do
        [ $((number % 3)) = 0 ] || rm "$mnt/$number"
    done
    sync
    manifest "$mnt" >kept
    kept=$(du -s --block-size=1 "$mnt" | cut -f1)
    before=$(stat -c %s disk.vhdx)
    ublk compact "$device" --trim --max-rate 1G >said || fail "$(cat said)"
    length=$(stat -c %s disk.vhdx)
    note "$((before >> 20)) -> $((length >> 20)) MiB for files of $((kept >> 20)) MiB," \
        "$(($(host_bytes disk.vhdx) >> 20)) MiB on the host: $(tr '\n' ';' <said)"
    [ "$length" -le $((kept + kept / 20 + (96 << 20))) ] || fail "$length bytes for files of $kept: $(cat said)"
    grep -q '^ext4: .* of free space discarded' said || fail "$(cat said)"
    manifest "$mnt" | cmp - kept || fail "files have changed"
    umount "$mnt"
    e2fsck -fn "$device" >fsck.log 2>&1 || fail "$(cat fsck.log)"
    ublk del "$device"
    ublk check disk.vhdx >/dev/null || fail "$(ublk check disk.vhdx)"
    device=$(ublk add --read-only disk.vhdx)
    mount -o ro "$device" "$mnt"
    manifest "$mnt" | cmp - kept || fail "files have changed"
    umount "$mnt"
    ublk del "$device"
}

# await_length BYTES: until the file is no longer than that.
await_length() {
    for _ in $(seq 600); do
        [ "$(stat -c %s disk.vhdx)" -gt "$1" ] || return 0
        sleep 0.1
    done
    fail "the file has $(stat -c %s disk.vhdx) bytes still: $(ublk list; cat /run/vhdx-ublk/*.log)"
}

# begun DEVICE: how often its daemon has begun to compact by itself.
begun() { grep -c 'of the file are free: compacting' "/run/vhdx-ublk/${1#/dev/ublkb}.log" || true; }

# A device that nothing uses compacts its image by itself, stops for a request, and does nothing in vain.
test_compact_live_while_the_device_is_idle() {
    local device
    ublk create disk.vhdx --size 2G --block-size 1M
    refused ublk add disk.vhdx --reclaim auto=0
    refused ublk add disk.vhdx --reclaim auto --read-only
    device=$("$VHDX_UBLK" add disk.vhdx --reclaim auto=1 -v)
    head -c 400M /dev/urandom >written
    dd if=written of="$device" bs=1M oflag=direct status=none
    blkdiscard -o 0 -l 240M "$device"
    await_job "$device"
    dd if="$device" of=/dev/null bs=4k count=1 skip=80000 iflag=direct status=none
    for _ in $(seq 100); do [ "$(job "$device")" != null ] || break; sleep 0.05; done
    [ "$(job "$device")" = null ] || fail "a request does not stop it"
    grep -q 'requests have come' "/run/vhdx-ublk/${device#/dev/ublkb}.log" || fail "it was done before"
    await_length $((180 << 20))
    for _ in $(seq 100); do [ "$(job "$device")" != null ] || break; sleep 0.05; done
    [ "$(begun "$device")" -eq 2 ] || fail "begun $(begun "$device") times"
    cmp <(tail -c 160M written) <(dd if="$device" bs=1M skip=240 count=160 status=none) || fail "the disk has changed"
    sleep 4
    [ "$(begun "$device")" -eq 2 ] || fail "it compacts what cannot become smaller"
    # It is the device's, whichever daemon serves it.
    ublk upgrade "$device" >/dev/null
    blkdiscard -o 240M -l 80M "$device"
    await_length $((100 << 20))
    kill_daemon disk.vhdx
    ublk recover "$device" >/dev/null
    blkdiscard -o 320M -l 40M "$device"
    await_length $((60 << 20))
    ublk del "$device"
    ublk check disk.vhdx >/dev/null || fail "$(ublk check disk.vhdx)"
    # One that was not to.
    device=$(ublk add disk.vhdx)
    blkdiscard "$device"
    sleep 4
    [ "$(stat -c %s disk.vhdx)" -gt $((40 << 20)) ] || fail "it compacts by itself"
    ublk del "$device"
}

# Whoever wants the image comes first.
test_compact_live_while_idle_makes_way_for_a_caller() {
    local device
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(ublk add disk.vhdx --reclaim auto=1)
    dd if=/dev/urandom of="$device" bs=1M count=400 oflag=direct status=none
    blkdiscard -o 0 -l 240M "$device"
    await_job "$device"
    ublk compact "$device" --max-rate 1G --json >said 2>refusal || fail "$(cat refusal)"
    jq -e '.stopped == false' said >/dev/null || fail "$(cat said)"
    [ "$(stat -c %s disk.vhdx)" -le $((180 << 20)) ] || fail "$(cat said)"
    ublk del "$device"
    ublk check disk.vhdx >/dev/null || fail "$(ublk check disk.vhdx)"
}

# compacting DEVICE: slowly, in the background, until something is moved.
compacting() {
    # Not the function: a signal is for the program.
    "$VHDX_UBLK" compact "$1" --max-rate 512K --progress none >said 2>&1 &
    compacting=$!
    await_job "$1"
}

# ends_early WHY: the command in the background says why it has not done all.
ends_early() {
    local status=0
    wait "$compacting" || status=$?
    [ $status = 1 ] || fail "status $status: $(cat said)"
    grep -q "^Stopped$1 before all was done; run the command again" said || fail "$(cat said)"
}

# Whatever holds the device comes first; Ctrl-C ends the job, too; then the same command finishes.
test_compact_live_is_stopped_and_done_again() {
    local device compacting number
    ublk create disk.vhdx --size 1G --block-size 1M
    device=$(ublk add disk.vhdx --name slow)
    write_stamps "$device" 0 120 1
    blkdiscard -o 0 -l 60M "$device"
    compacting "$device"
    ublk list | grep -q 'live (compacting, ' || fail "$(ublk list)"
    ! ublk compact slow 2>refusal || fail "two jobs at a time"
    grep -q 'is busy: compacting' refusal || fail "$(cat refusal)"
    kill -INT "$compacting"
    ends_early ""
    compacting "$device"
    ublk resize "$device" --size 2G >/dev/null
    ends_early " by a resize"
    compacting "$device"
    ublk upgrade "$device" >/dev/null
    ends_early " by an upgrade"
    # A caller that is killed has left as well.
    compacting "$device"
    kill -9 "$compacting"
    for number in $(seq 100); do
        [ "$(job "$device")" != null ] || break
        sleep 0.1
    done
    [ "$number" -lt 100 ] || fail "the job has no caller, and does not end"
    for number in zeros defragment dense dry-run; do
        refused ublk compact "$device" "--$number"
        grep -q "vhdx-ublk del $device" refusal || fail "no remedy"
    done
    ublk compact "$device" --max-rate 1G --json >said
    jq -e '.device == "'"$device"'" and .moves > 0 and .stopped_by == null' said >/dev/null || fail "$(cat said)"
    [ "$(stat -c %s disk.vhdx)" -lt $((80 << 20)) ] || fail "$(stat -c %s disk.vhdx) bytes for 60 MiB"
    cmp <(stamps x 0 120 1 | tail -c +$(((60 << 20) + 1))) <(dd if="$device" bs=1M skip=60 count=60 status=none) ||
        fail "the disk has changed"
    # The last blocks of the disk went to the lowest places.
    blkdiscard -o $((90 << 20)) -l 30M "$device"
    compacting "$device"
    ublk snapshot "$device" next.vhdx >/dev/null
    ends_early " by a snapshot"
    ublk del "$device"
    ublk check disk.vhdx >/dev/null || fail "$(ublk check disk.vhdx)"
}
