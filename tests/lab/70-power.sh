# The power fails below the file system that holds the image: at every moment the image is sound, and what
# was synced on the guest's file system is there.
# shellcheck shell=bash

power() { python3 "$(dirname "${BASH_SOURCE[0]}")/power.py" "$@"; }

# Moments judged; each takes one to three seconds.
moments=${FULL:+300}
moments=${moments:-24}

recorder=vhdx-ublk-power-$$
loops=()

# attach FILE: its loop device, in `loop`, detached at the end.
attach() {
    loop=$(losetup --show -f "$1")
    loops+=("$loop")
}

# make_ext4 FILE-OR-DEVICE: with a small journal, so that few bytes are copied per moment.
make_ext4() { mkfs.ext4 -q -F -b 4096 -J size=4 -E lazy_itable_init=0,lazy_journal_init=0 "$1"; }

# A host of so many MB under dm-log-writes, its file system made before the record begins. What is copied
# again and again lies in memory: the file system on it has direct I/O all the same.
record_below() {
    local device loop
    mkdir fast host
    mount -t tmpfs -o "size=$(($1 * 3))M" tmpfs fast
    truncate -s "$1M" fast/disk.raw
    truncate -s 8G writes.log
    make_ext4 fast/disk.raw
    cp --sparse=always fast/disk.raw fast/replay.raw
    attach fast/disk.raw
    device=$loop
    attach writes.log
    dmsetup create "$recorder" --table "0 $(blockdev --getsz "$device") log-writes $device $loop"
    dmsetup mknodes "$recorder" # where no udev does it
    mount "/dev/mapper/$recorder" host
}

end_record() {
    umount host
    dmsetup remove "$recorder"
    losetup -d "${loops[@]}"
    loops=()
    rm fast/disk.raw
}

# Called by finish: nothing of this outlives the test.
take_down() {
    umount -q host || true
    dmsetup remove "$recorder" 2>/dev/null || true
    [ ${#loops[@]} = 0 ] || losetup -d "${loops[@]}"
    umount -q fast || true
}

# sound WHEN: nothing but leaks. Space freed just before a cut may not have been given back to the host yet.
sound() {
    local status=0
    ublk check host/disk.vhdx >check.log || status=$?
    [ $status = 0 ] || [ $status = 3 ] || fail "$1 the image is not sound: $(cat check.log)"
}

# judge MARK: the host after the cut is fast/copy.raw.
judge() {
    local device synced
    mount -o loop fast/copy.raw host
    sound "after mark $1"
    ! grep -q 'the log is dirty' check.log || dirty=$((dirty + 1))
    device=$(ublk add host/disk.vhdx)
    mount "$device" "$mnt"
    synced=$(power verify "$mnt" journal "$1") || fail "lost after mark $1"
    files=$((files + synced))
    umount "$mnt"
    e2fsck -fn "$device" >fsck.log 2>&1 || fail "after mark $1: $(cat fsck.log)"
    ublk del "$device"
    sound "after mark $1 and a clean close"
    ! grep -q 'the log is dirty' check.log || fail "a clean close left a log"
    umount host
}

test_power_cuts_below_the_host_file_system() {
    local device from=0 upto mark dirty=0 files=0
    record_below 256
    ublk create host/disk.vhdx --size 128M --block-size 1M
    device=$(ublk add host/disk.vhdx --queues 2)
    make_ext4 "$device"
    mount -o discard "$device" "$mnt"
    sync -f "$mnt"
    power work "$mnt" "$recorder" journal
    umount "$mnt"
    ublk del "$device"
    end_record
    power points writes.log "$moments" >points 2>chosen
    [ -s points ] || fail "nothing was recorded"
    while read -r upto mark; do
        power replay writes.log fast/replay.raw "$from" "$upto"
        from=$upto
        cp --sparse=always fast/replay.raw fast/copy.raw
        judge "$mark" </dev/null
    done <points
    note "$(cat chosen) at which the power failed, $dirty with a dirty log, $files synced files found whole"
    [ $dirty -gt 5 ] || fail "hardly any cut left a log to replay"
}

# killed_write: host/parent.vhdx as a process leaves it that has written it and was killed before its sync.
killed_write() {
    local device
    cp host/parent.vhdx changed.vhdx
    device=$(ublk add changed.vhdx)
    printf '%s' "$1" | dd of="$device" conv=notrunc,fsync status=none
    ublk del "$device"
    dd if=changed.vhdx of=host/parent.vhdx bs=1M conv=notrunc status=none
}

# The child lies on another disk: what makes it durable does nothing for the parent.
test_power_cut_behind_a_new_child_leaves_the_chain_whole() {
    local command from=0 upto mark
    record_below 64
    ublk create host/parent.vhdx --size 4M --block-size 1M
    ublk create relinked.vhdx --parent host/parent.vhdx
    sync -f host
    killed_write first
    ublk create created.vhdx --parent host/parent.vhdx
    dmsetup message "$recorder" 0 mark 1
    sync -f host
    killed_write second
    ublk relink relinked.vhdx host/parent.vhdx --ignore-mismatch
    dmsetup message "$recorder" 0 mark 2
    end_record
    power points writes.log 1000 | sort -k2,2n -k1,1n >points
    for command in created:1 relinked:2; do
        upto=$(awk -v mark="${command#*:}" '$2 == mark { print $1; exit }' points)
        power replay writes.log fast/replay.raw "$from" "$upto"
        from=$upto
        cp --sparse=always fast/replay.raw fast/copy.raw
        mount -o loop fast/copy.raw host
        ublk info --chain "${command%:*}.vhdx" >chain.log 2>&1 || fail "${command%:*}: $(cat chain.log)"
        umount host
    done
}
