# The daemon dies and leaves nothing but the file, which is replayed by us and by QEMU, and both agree.
# shellcheck shell=bash

log_state() {
    ublk info --json "$1" | tr -d ' \n' | grep -o '"log":{[^}]*}' | grep -o '"state":"[a-z]*"' | cut -d'"' -f4
}

# Asked to end, the daemon closes the image itself.
test_death_on_request_closes_the_image() {
    local device pid
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 20 5
    pid=$(daemon_pid)
    kill -TERM "$pid"
    for _ in $(seq 200); do
        [ -e "/proc/$pid" ] || break
        sleep 0.05
    done
    [ "$(ublk list --json)" = "[]" ] || fail "the daemon has left its device"
    [ -z "$(ls /run/vhdx-ublk/*.session /run/vhdx-ublk/*.sock 2>/dev/null)" ] || fail "something was left behind"
    [ "$(log_state disk.vhdx)" = clean ] || fail "the image was not closed"
    device=$(ublk add --read-only disk.vhdx)
    check_stamps "$device" 10 20 5
    ublk del "$device"
}

# die FLUSHED: writes, maybe flushes, kills the daemon, deletes the device and adds the file again at once.
die() {
    local device
    ublk create disk.vhdx --size 4G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2 --recovery none)
    mkfs.ext4 -q -F "$device"
    mount "$device" "$mnt"
    copy_real_files 20 "$mnt/files"
    manifest "$mnt/files" >before
    sync
    "$@"
    kill -9 "$(daemon_pid)"
    umount "$mnt" || umount -l "$mnt"
    ublk del --force "$device"
    note "the log is $(log_state disk.vhdx) after the kill"
    cp disk.vhdx copy.vhdx
    device=$(ublk add disk.vhdx)
    e2fsck -fy "$device" >fsck.log 2>&1 || [ $? -le 1 ] || fail "$(cat fsck.log)"
    mount "$device" "$mnt"
    manifest "$mnt/files" >after
    umount "$mnt"
    ublk del "$device"
    cmp before after || fail "what was synced before the kill is not there"
    [ "$(log_state disk.vhdx)" = clean ]
    qemu-img check -q disk.vhdx
}

test_death_with_everything_flushed() { die true; }

test_death_while_writing() {
    busy() {
        dd if=/dev/zero of="$mnt/more" bs=1M count=200 status=none &
        sleep 0.5
    }
    die busy
    # QEMU replays the same dirty log on its copy and reads the same file system.
    [ "$(log_state copy.vhdx)" = dirty ] || fail "the kill left no dirty log to judge"
    qemu-img check -q -r all copy.vhdx || fail "QEMU does not replay our log"
    qemu-img convert -f vhdx -O raw copy.vhdx copy.raw
    e2fsck -fy copy.raw >fsck.log 2>&1 || [ $? -le 1 ] || fail "$(cat fsck.log)"
    mount -o loop,ro copy.raw "$mnt"
    manifest "$mnt/files" >after
    umount "$mnt"
    cmp before after || fail "QEMU's replay reads other files"
}

test_death_of_a_read_only_device_changes_nothing() {
    unpack ntfs-dynamic
    local device before
    before=$(sha ntfs-dynamic.vhdx)
    device=$(ublk add --read-only ntfs-dynamic.vhdx)
    kill -9 "$(daemon_pid)"
    ublk del "$device"
    [ "$(sha ntfs-dynamic.vhdx)" = "$before" ]
}
