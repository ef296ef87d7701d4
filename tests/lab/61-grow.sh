# A disk that is served grows: nothing of it is lost, what comes is zero and can be used when the command returns.
# shellcheck shell=bash

# The long run grows and kills more often.
growths=${FULL:+25} kills=${FULL:+30}
: "${growths:=10}" "${kills:=8}"

take_down() { ! mountpoint -q /run/vhdx-ublk || umount /run/vhdx-ublk; }

# has_size DEVICE BYTES: to the kernel, to `list` and in the image.
has_size() {
    local listed inside
    [ "$(blockdev --getsize64 "$1")" -eq "$2" ] || fail "the kernel has $(blockdev --getsize64 "$1") bytes, not $2"
    listed=$(ublk list --json | jq --arg device "$1" '.[] | select(.device == $device) | .size')
    [ "$listed" -eq "$2" ] || fail "list says $listed bytes, not $2"
    inside=$(ublk list --json | jq -r --arg device "$1" '.[] | select(.device == $device) | .image')
    [ -e "$inside" ] || fail "$inside is not there"
}

# is_zero_from DEVICE BYTES: from there to the end of the disk, whole sectors.
is_zero_from() {
    local size
    size=$(blockdev --getsize64 "$1")
    cmp -n $((size - $2)) -i "$2:0" "$1" /dev/zero || fail "what has come into the disk at $2 is not zero"
}

# begin_disk BYTES BLOCK-SIZE: a disk of that size on `device`, on which a verifying writer works all the time.
begin_disk() {
    ublk create disk.vhdx --size "$1" --block-size "$2"
    device=$(ublk add disk.vhdx --queues 2)
    rm -f pauses
    begin_writer "$device"
}

# Nothing is lost, and the image is whole.
end_disk() {
    end_writer
    ublk del "$device"
    ublk check disk.vhdx >/dev/null || fail "$(ublk check disk.vhdx)"
    [ -z "$(ls /run/vhdx-ublk/*.session* 2>/dev/null)" ] || fail "a session outlives the clean close"
}

# A verifying writer works at the start of the disk, in blocks of its own and those at the end, all the time.
grow_under_writer() {
    local device writer number before after
    before=$(((1 << 30) + 512))
    begin_disk $before "$1"
    for number in $(seq "$growths"); do
        after=$((before + number * 7654400))
        ublk resize "$device" --size "$after" --json >said || { cat said; fail "it does not grow"; }
        jq -e ".size == $after and .size_before == $before" said >/dev/null || fail "$(cat said)"
        jq .pause_us said >>pauses
        has_size "$device" "$after"
        is_zero_from "$device" $((before / 4096 * 4096))
        printf 'the last sector %032d' "$number" | dd of="$device" bs=512 seek=$((after / 512 - 1)) conv=notrunc,sync \
            oflag=direct status=none
        dd if="$device" bs=512 skip=$((after / 512 - 1)) iflag=direct status=none >last
        grep -aq "$(printf %032d "$number")" last || fail "the last sector is not what was written"
        # The next growth finds zeros there.
        blkdiscard -z -o $((after - 512)) -l 512 "$device"
        before=$after
    done
    end_disk
    qemu-img check -q disk.vhdx
    [ "$(ublk info --json disk.vhdx | jq .virtual_size)" -eq "$after" ] || fail "$(ublk info disk.vhdx)"
    sort -n pauses >sorted
    note "$growths growths under a writer: pause median $(sed -n "$((growths / 2 + 1))p" sorted) us," \
        "longest $(tail -n 1 sorted) us"
}

test_grow_under_a_verifying_writer() { grow_under_writer 1M; }
test_grow_zero_copy() { zero_copy=on grow_under_writer 2M; }

# The daemon is killed in the middle of it: the device comes back with the old size or the new one.
test_grow_killed_in_the_middle() {
    local device writer growing before after now grown=0
    before=$((1 << 30))
    begin_disk $before 1M
    for _ in $(seq "$kills"); do
        after=$((before + 9999872))
        ublk resize "$device" --size "$after" >/dev/null 2>&1 &
        sleep "0.0$((RANDOM % 10))$((RANDOM % 10))"
        growing=$!
        kill -9 "$(daemon_pid)"
        recovered "$device" || fail "not recovered: $(cat refusal /run/vhdx-ublk/*.log)"
        # It may have been reading the disk, and continues then.
        wait $growing || true
        now=$(blockdev --getsize64 "$device")
        [ "$now" -eq "$before" ] || [ "$now" -eq "$after" ] || fail "$now bytes, neither $before nor $after"
        has_size "$device" "$now"
        [ "$now" -eq "$before" ] || grown=$((grown + 1))
        # The same again finishes it.
        ublk resize disk.vhdx --size "$after" >/dev/null
        has_size "$device" "$after"
        dd if="$device" bs=512 skip=$((after / 512 - 1)) iflag=direct status=none | cmp -n 512 - /dev/zero
        before=$after
    done
    end_disk
    note "$kills kills, $grown of them left the new size"
}

# The map of the disk as it was is given back: what is mapped, and what /run has, does not add up.
test_grow_keeps_no_old_map() {
    local device number mapped used
    ublk create disk.vhdx --size 64G --block-size 1M
    device=$(ublk add disk.vhdx)
    ublk resize "$device" --size 65G >/dev/null
    used=$(df --output=used -B1 /run/vhdx-ublk | tail -n 1)
    for number in $(seq 66 115); do ublk resize "$device" --size "${number}G" >/dev/null; done
    mapped=$(grep -c '[.]session\|/run/vhdx-ublk/#' "/proc/$(daemon_pid)/maps")
    [ "$mapped" -eq 1 ] || fail "after 51 growths $mapped maps are in memory"
    used=$(($(df --output=used -B1 /run/vhdx-ublk | tail -n 1) - used))
    [ "$used" -lt $((2 << 20)) ] || fail "51 growths take $used bytes of /run"
    ublk del "$device"
}

# With hardly any room in /run a growth is refused, and the device stays as it was; at no moment is it poisoned.
test_grow_with_a_full_run() {
    local device fill size=$((4 << 30)) refusals=0 grown=0
    ublk create parent.vhdx --size 4G --block-size 256M
    ublk create child.vhdx --parent parent.vhdx --block-size 256M
    mkdir -p /run/vhdx-ublk
    mount -t tmpfs -o size=4M,mode=755 tmpfs /run/vhdx-ublk
    device=$(ublk add child.vhdx)
    for number in $(seq 0 15); do
        dd if=/dev/zero of="$device" bs=4k count=1 seek=$((number << 16)) oflag=direct conv=notrunc status=none
    done
    # What is left, from nothing to enough, in steps shorter than the bits of a block.
    for fill in $(seq 1640 -16 1400); do
        head -c "${fill}K" /dev/zero >/run/vhdx-ublk/fill
        if ublk resize "$device" --size $((size + 4096)) >/dev/null 2>refusal; then
            size=$((size + 4096)) grown=$((grown + 1))
        else
            grep -q '/run' refusal || fail "$(cat refusal)"
            refusals=$((refusals + 1))
        fi
        has_size "$device" "$size"
        dd if=/dev/zero of="$device" bs=4k count=1 oflag=direct,sync conv=notrunc status=none ||
            fail "with $fill KiB taken: $(cat refusal /run/vhdx-ublk/*.log)"
    done
    [ $refusals -gt 0 ] && [ $grown -gt 0 ] || fail "$refusals refused, $grown done"
    note "$refusals growths refused for want of room in /run, $grown done"
    [ -z "$(ls /run/vhdx-ublk/*.next 2>/dev/null)" ] || fail "a session that was not used is left"
    ublk del "$device"
    take_down
    ublk check child.vhdx >/dev/null || fail "$(ublk check child.vhdx)"
}

# A fixed image is filled before requests wait: where the host cannot allocate, that takes long.
test_grow_fixed_is_filled_before_the_pause() {
    local device writer pause
    ublk create disk.vhdx --size 256M --type fixed --sparse no
    device=$(ublk add disk.vhdx --sparse no)
    write_stamps "$device" 0 64 4
    refused ublk resize "$device" --size 60T
    grep -q 'missing' refusal || fail "$(cat refusal)"
    [ "$(stat -c %s disk.vhdx)" -lt $((300 << 20)) ] || fail "what was refused has made the file longer"
    ublk resize "$device" --size 1G --json >said
    pause=$(jq .pause_us said)
    note "a fixed image grows by 768 MiB: pause $pause us"
    check_stamps "$device" 0 64 4
    is_zero_from "$device" $((256 << 20))
    write_stamps "$device" 1000 24 5
    check_stamps "$device" 1000 24 5
    ublk del "$device"
    ublk check disk.vhdx >/dev/null || fail "$(ublk check disk.vhdx)"
}

# What lay behind the old end of a child, in its parent and in its own last block, does not come into the disk.
test_grow_child_over_larger_parent() {
    local device
    ublk create parent.vhdx --size 64M --block-size 1M
    device=$(ublk add parent.vhdx)
    write_stamps "$device" 0 64 1
    ublk del "$device"
    ublk create child.vhdx --parent parent.vhdx --size $((20 << 20 | 512)) >/dev/null 2>&1 ||
        { ublk create child.vhdx --parent parent.vhdx; ublk resize child.vhdx --size $((20 << 20 | 512)) --force; }
    device=$(ublk add child.vhdx)
    check_stamps "$device" 0 20 1
    ublk resize "$device" --size 40M
    check_stamps "$device" 0 20 1
    is_zero_from "$device" $((21 << 20))
    ublk resize child.vhdx --size 90M
    is_zero_from "$device" $((21 << 20))
    write_stamps "$device" 30 50 2
    ublk snapshot "$device" next.vhdx >/dev/null
    ublk resize "$device" --size +10M
    has_size "$device" $((100 << 20))
    check_stamps "$device" 30 50 2
    is_zero_from "$device" $((80 << 20))
    ublk upgrade "$device" >/dev/null
    has_size "$device" $((100 << 20))
    ublk resize "$device" --size 128M
    write_stamps "$device" 100 28 3
    kill -9 "$(daemon_pid)"
    ublk recover "$device" >/dev/null
    has_size "$device" $((128 << 20))
    check_stamps "$device" 100 28 3
    check_stamps "$device" 30 50 2
    ublk del "$device"
    ublk check next.vhdx >/dev/null || fail "$(ublk check next.vhdx)"
}

# One command has a mounted file system in a partition grow while it is written.
grow_mounted() {
    local device before after writer status=0
    ublk create disk.vhdx --size 512M --block-size 1M
    device=$(ublk add disk.vhdx --queues 2)
    printf 'label: gpt\nsize=8MiB\n,\n' | sfdisk -q "$device"
    udevadm settle --timeout=10
    case $1 in
    xfs) mkfs.xfs -q -f "${device}p2" ;;
    ext4) mkfs.ext4 -q -F "${device}p2" ;;
    btrfs) mkfs.btrfs -q -f "${device}p2" 2>/dev/null ;;
    esac
    mount "${device}p2" "$mnt"
    before=$(df --output=size -B1 "$mnt" | tail -n 1)
    while [ ! -e stop ]; do
        stamps x 0 24 5 >"$mnt/file" && sync "$mnt/file" || exit 1
    done &
    writer=$!
    sleep 1
    ublk resize "$device" --size 2G --grow-fs --json >said || status=1
    sleep 1
    touch stop
    wait $writer || fail "a write failed"
    rm stop
    [ $status -eq 0 ] || fail "$(cat said)"
    jq -e --arg type "$1" '.grown.partition == 2 and .grown.type == $type and .size == 2147483648' said >/dev/null ||
        fail "$(cat said)"
    after=$(df --output=size -B1 "$mnt" | tail -n 1)
    [ "$after" -gt $((1700 << 20)) ] || fail "df shows $before bytes before, $after after"
    [ "$(sha256sum <"$mnt/file")" = "$(stamps x 0 24 5 | sha256sum)" ] || fail "the file has changed"
    stamps x 0 900 6 >"$mnt/large" || fail "it has no room"
    umount "$mnt"
    case $1 in
    xfs) xfs_repair -n "${device}p2" >/dev/null 2>&1 ;;
    ext4) e2fsck -fn "${device}p2" >/dev/null 2>&1 ;;
    btrfs) btrfs check --readonly "${device}p2" >/dev/null 2>&1 ;;
    esac || fail "the $1 is damaged"
    sfdisk --verify "$device" >/dev/null 2>&1 || fail "the partition table is damaged"
    ublk del "$device"
    ublk check disk.vhdx >/dev/null
}

full_test_grow_mounted_ext4() { grow_mounted ext4; }
test_grow_mounted_xfs() { grow_mounted xfs; }
full_test_grow_mounted_btrfs() { grow_mounted btrfs; }

# A file system that has the whole disk, mounted or not; users of the device learn of the size by themselves.
test_grow_whole_disk_and_uevent() {
    local device monitor
    ublk create disk.vhdx --size 256M
    device=$(ublk add disk.vhdx --name data)
    mkfs.ext4 -q -F "$device"
    ublk resize data --size 384M --grow-fs
    udevadm monitor --kernel --property >events 2>&1 &
    monitor=$!
    sleep 1
    mount "$device" "$mnt"
    ublk resize disk.vhdx --size 512M >said
    grep -q -- "--grow-fs" said || fail "$(cat said)"
    [ "$(df --output=size -B1M "$mnt" | tail -n 1)" -lt 384 ] || fail "the file system has grown unasked"
    eval "$(sed -n 's/.*grow, too: vhdx-ublk /ublk /p' said)"
    [ "$(df --output=size -B1M "$mnt" | tail -n 1)" -gt 400 ] || fail "$(df "$mnt")"
    umount "$mnt"
    sleep 1
    kill $monitor
    grep -q 'RESIZE=1' events || fail "there is no uevent with the size: $(cat events)"
    e2fsck -fn "$device" >/dev/null 2>&1 || fail "the ext4 is damaged"
    ublk del "$device"
}

# A link in a folder of another user leads to an image that is served.
test_grow_follows_no_link_of_another_user() {
    local device number
    ublk create disk.vhdx --size 256M
    device=$(ublk add disk.vhdx)
    number=${device#/dev/ublkb}
    ln -s "$PWD/disk.vhdx" link.vhdx
    ln -s "$device" node
    ublk resize link.vhdx --size 257M
    ublk resize ./node --size 258M
    chown -h 1000 link.vhdx node
    for link in link.vhdx ./link.vhdx ./node; do
        refused ublk resize "$link" --size 1G
        grep -q 'a symbolic link of another user' refusal || fail "$(cat refusal)"
        refused ublk snapshot "$link" next.vhdx
        refused ublk upgrade "$link"
        refused ublk del "$link"
    done
    has_size "$device" $((258 << 20))
    ublk del "$number"
}

test_grow_refused() {
    local device before
    ublk create disk.vhdx --size 256M
    device=$(ublk add disk.vhdx)
    for size in 128M -1M 512M+1 65T; do
        refused ublk resize "$device" --size "$size"
    done
    refused ublk resize "$device" --size 128M
    grep -q 'vhdx-ublk del' refusal || fail "$(cat refusal)"
    has_size "$device" $((256 << 20))
    ublk del "$device"
    device=$(ublk add disk.vhdx --read-only)
    before=$(sha disk.vhdx)
    refused ublk resize "$device" --size 512M
    grep -q 'read-only' refusal || fail "$(cat refusal)"
    has_size "$device" $((256 << 20))
    [ "$(sha disk.vhdx)" = "$before" ] || fail "the image has changed"
    ublk del "$device"
    refused ublk resize 7 --size 1G
    # Room for a fixed image is there before anything has changed.
    ublk create fixed.vhdx --size 64M --type fixed
    device=$(ublk add fixed.vhdx)
    write_stamps "$device" 0 64 4
    refused ublk resize "$device" --size 60T
    has_size "$device" $((64 << 20))
    write_stamps "$device" 10 20 5
    check_stamps "$device" 10 20 5
    ublk resize "$device" --size 96M
    check_stamps "$device" 10 20 5
    is_zero_from "$device" $((64 << 20))
    write_stamps "$device" 64 32 6
    check_stamps "$device" 64 32 6
    ublk del "$device"
    ublk check fixed.vhdx >/dev/null || fail "$(ublk check fixed.vhdx)"
}

# The image and the kernel have the new size, the entry the old one, as where it could not be written.
test_grow_again_ends_what_was_begun() {
    local device entry
    ublk create disk.vhdx --size 256M
    device=$(ublk add disk.vhdx)
    entry=/run/vhdx-ublk/${device#/dev/ublkb}.json
    ublk resize "$device" --size 512M
    jq '.size_bytes = 268435456' "$entry" >edited
    cat edited >"$entry"
    refused ublk resize "$device" --size 1G
    grep -q -e '--size 536870912' refusal || fail "$(cat refusal)"
    ublk resize "$device" --size 512M
    has_size "$device" $((512 << 20))
    ublk resize "$device" --size 1G
    has_size "$device" $((1 << 30))
    ublk del "$device"
    ublk check disk.vhdx >/dev/null || fail "$(ublk check disk.vhdx)"
}
