# Space that is given back, and zeros that take none; what is left when a file is cut or the power fails.
# shellcheck shell=bash

# What is not there is not taken away: no session, no byte.
test_trim_of_nothing_leaves_the_image_as_it_is() {
    local device before
    ublk create disk.vhdx --size 15T --block-size 1M
    ublk create parent.vhdx --size 4G --block-size 2M
    ublk create child.vhdx --parent parent.vhdx
    for image in disk child; do
        before=$(sha $image.vhdx)
        device=$(ublk add $image.vhdx)
        blkdiscard "$device"
        blkdiscard -o 4096 -l 1048576 "$device"
        ublk del "$device"
        [ "$(sha $image.vhdx)" = "$before" ] || fail "a discard of nothing has changed $image.vhdx"
    done
}

# Zeros over a whole disk, with the space to be kept or not: no block takes space, also not above a parent's data.
test_trim_zeros_take_no_space() {
    local device
    ublk create parent.vhdx --size 128M --block-size 1M
    device=$(ublk add parent.vhdx)
    write_stamps "$device" 100 8 1
    ublk del "$device"
    ublk create child.vhdx --parent parent.vhdx
    ublk create plain.vhdx --size 128M --block-size 1M
    for image in plain child; do
        device=$(ublk add $image.vhdx)
        blkdiscard -z "$device"
        cmp <(dd if="$device" bs=1M status=none) <(head -c 128M /dev/zero) || fail "$image is not zero"
        ublk del "$device"
        ublk check --json $image.vhdx | tr -d ' \n' | grep -q '"allocated_blocks":0,' ||
            fail "zeros took space in $image.vhdx"
    done
}

# A whole block that is discarded never shows the parent again, nor does it after a merge.
test_trim_of_a_child_hides_its_parent() {
    local device
    ublk create parent.vhdx --size 64M --block-size 1M
    device=$(ublk add parent.vhdx)
    write_stamps "$device" 8 8 1
    ublk del "$device"
    ublk create child.vhdx --parent parent.vhdx
    device=$(ublk add child.vhdx)
    blkdiscard -o $((8 << 20)) -l $((4 << 20)) "$device"
    cmp <(dd if="$device" bs=1M skip=8 count=4 status=none) <(head -c 4M /dev/zero) || fail "the parent is shown"
    ublk del "$device"
    ublk merge child.vhdx
    device=$(ublk add --read-only parent.vhdx)
    cmp <(dd if="$device" bs=1M skip=8 count=4 status=none) <(head -c 4M /dev/zero) || fail "the parent came back"
    [ "$(dd if="$device" bs=1M skip=12 count=4 status=none | sha256sum)" = \
        "$(stamps x 8 8 1 | tail -c 4M | sha256sum)" ] || fail "more was discarded than was asked"
    ublk del "$device"
}

# A host that takes no space back: what was discarded is free space there, and no leak.
test_trim_on_fat_leaves_no_leak() {
    local device
    truncate -s 300M fat.img
    mkfs.vfat -F 32 fat.img >/dev/null 2>&1 || { skipped "no mkfs.vfat"; return; }
    mkdir fat
    mount -o loop fat.img fat
    take_down() { umount -q fat || true; }
    ublk create fat/disk.vhdx --size 64M --block-size 1M
    device=$(ublk add fat/disk.vhdx)
    write_stamps "$device" 0 16 1
    sync "$device"
    blkdiscard -o $((4 << 20)) -l $((4 << 20)) "$device"
    ublk del "$device"
    ublk check fat/disk.vhdx >said || fail "a free block is called a leak"
    grep -q 'takes no space back' said || fail "the free space is not told"
    ! grep -q -- --repair said || fail "a repair is promised that the host cannot do"
    ublk check --repair fat/disk.vhdx
}

# A daemon that is killed between a discard and its punch: the next session gives the space back.
test_trim_that_a_kill_interrupts_leaves_no_leak() {
    local device
    ublk create disk.vhdx --size 256M --block-size 1M
    device=$(ublk add disk.vhdx --recovery none)
    write_stamps "$device" 0 64 1
    sync "$device"
    blkdiscard -o $((8 << 20)) -l $((16 << 20)) "$device"
    kill_daemon disk.vhdx
    ublk del "$device" 2>/dev/null || true
    device=$(ublk add disk.vhdx)
    ublk del "$device"
    ublk check disk.vhdx || fail "space is left that nothing names"
}

# A file that another program cuts: what is lost fails, and is said; what never was there reads as zeros.
test_trim_a_file_that_is_cut_under_its_device_fails_reads() {
    local device
    ublk create disk.vhdx --size 64M --block-size 1M
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 0 32 1
    ublk del "$device"
    device=$(ublk add disk.vhdx)
    truncate -s 20M disk.vhdx
    ! dd if="$device" of=/dev/null bs=1M skip=24 count=1 iflag=direct status=none 2>/dev/null ||
        fail "what was cut off reads as something"
    dd if="$device" of=/dev/null bs=1M count=8 iflag=direct status=none || fail "what is left cannot be read"
    dd if="$device" of=/dev/null bs=1M skip=40 count=8 iflag=direct status=none || fail "an absent block fails"
    [ "$(grep -c 'another program has cut it' "/run/vhdx-ublk/${device#/dev/ublkb}.log")" = 1 ] ||
        fail "the device's log does not say it, or says it more than once"
    ublk del "$device" --force || true
}

# returns_space FILE BYTES: until the file takes at most so many of the host. How long that takes is only printed.
returns_space() {
    local started=$SECONDS
    for _ in $(seq 300); do
        [ "$(host_bytes "$1")" -gt "$2" ] || { note "the host has it after $((SECONDS - started)) s"; return 0; }
        sleep 0.1
    done
    fail "the file takes $(host_bytes "$1") bytes still, and not $2"
}

# What is deleted in a mounted file system and trimmed goes back to the host, though nothing is flushed afterwards.
test_trim_of_a_mounted_file_system_gives_space_back_without_a_flush() {
    local device before number flushes
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(ublk add disk.vhdx)
    mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0 -J size=16 "$device"
    mount "$device" "$mnt"
    for number in $(seq 16); do stamps x 0 32 "$number" >"$mnt/$number"; done
    sync -f "$mnt"
    before=$(host_bytes disk.vhdx)
    rm "$mnt"/1[0-6] "$mnt"/[1-5]
    sync -f "$mnt"
    fstrim "$mnt"
    returns_space disk.vhdx $((before - (11 * 32 << 20)))
    umount "$mnt"
    # Of a disk that nothing flushes at all.
    blkdiscard "$device"
    write_stamps "$device" 0 64 1
    returns_space disk.vhdx $((80 << 20))
    flushes=$(ublk stats "$device" --json | jq '.[0].requests.flush')
    blkdiscard -o 0 -l 64M "$device"
    returns_space disk.vhdx $((16 << 20))
    [ "$(ublk stats "$device" --json | jq '.[0].requests.flush')" = "$flushes" ] || fail "something has flushed it"
    ublk del "$device"
    ublk check disk.vhdx >/dev/null || fail "$(ublk check disk.vhdx)"
}
