# Images that may be malicious: nothing of them reaches further than their device.
# shellcheck shell=bash

test_untrusted_images_are_only_read_and_have_no_partitions() {
    local device before
    make_partitioned disk.vhdx
    device=$(ublk add disk.vhdx)
    [ -e "/sys/class/block/${device#/dev/}p2" ] || fail "this kernel finds no partitions at all"
    ublk del "$device"
    before=$(sha disk.vhdx)
    device=$(ublk add --untrusted disk.vhdx)
    udevadm settle --timeout=10
    [ ! -e "/sys/class/block/${device#/dev/}p1" ] || fail "the kernel has read its partition table"
    refused dd if=/dev/zero of="$device" bs=4k count=1 oflag=direct conv=notrunc
    dd if="$device" of=/dev/null bs=1M count=4 status=none
    kill_daemon disk.vhdx
    ublk recover "$device"
    [ ! -e "/sys/class/block/${device#/dev/}p1" ]
    ublk upgrade "$device"
    [ ! -e "/sys/class/block/${device#/dev/}p1" ]
    ublk del "$device"
    [ "$(sha disk.vhdx)" = "$before" ] || fail "the image was changed"
    refused ublk add --untrusted --force disk.vhdx
    device=$(ublk add --no-partitions disk.vhdx)
    [ ! -e "/sys/class/block/${device#/dev/}p1" ]
    dd if=/dev/zero of="$device" bs=4k count=1 seek=100000 oflag=direct conv=notrunc status=none
    ublk del "$device"
}

test_untrusted_images_read_parents_of_their_own_folder_only() {
    local device other
    mkdir received private
    ublk create private/base.vhdx --size 64M
    ublk create received/child.vhdx --parent private/base.vhdx
    ublk del "$(ublk add received/child.vhdx)"
    refused ublk add --untrusted received/child.vhdx
    grep -q 'its parent is not in its own folder' refusal
    ln -s ../private/base.vhdx received/base.vhdx
    refused ublk add --untrusted received/child.vhdx
    rm received/base.vhdx
    cp --preserve=all private/base.vhdx received/base.vhdx
    device=$(ublk add --untrusted received/child.vhdx)
    dd if="$device" of=/dev/null bs=1M count=1 status=none
    ublk list --json | grep -q received/child.vhdx
    # A device that is served again reads the same file.
    kill_daemon received/child.vhdx
    mv received/base.vhdx received/away.vhdx
    for other in 'ln -s ../private/base.vhdx' 'cp --preserve=all private/base.vhdx'; do
        $other received/base.vhdx
        refused ublk recover "$device"
        grep -q 'a parent of it is not the file' refusal
        rm received/base.vhdx
    done
    mv received/away.vhdx received/base.vhdx
    ublk recover "$device"
    dd if="$device" of=/dev/null bs=1M count=1 status=none iflag=direct
    ublk del "$device"
}

# What is mounted over the image later is not mounted for the daemon, which keeps no other file system mounted.
test_private_mounts_of_a_daemon() {
    local device other pid
    mkdir images elsewhere
    truncate -s 64M other.img
    other=$(losetup --find --show other.img)
    mkfs.ext4 -q -F "$other"
    mount "$other" elsewhere
    ublk create images/disk.vhdx --size 512M
    device=$(ublk add --private-mounts images/disk.vhdx)
    umount elsewhere
    mkfs.ext4 -q -F "$other" || fail "the daemon keeps another file system mounted"
    mkfs.ext4 -q -F "$device"
    mount "$device" images
    [ ! -e images/disk.vhdx ]
    pid=$(daemon_pid)
    [ -e "/proc/$pid/root$PWD/images/disk.vhdx" ] || fail "the daemon sees what is mounted over its image"
    ! grep "$device" "/proc/$pid/mountinfo" || fail "its own device is mounted for it"
    copy_real_files 8 "$PWD/images/files"
    ublk snapshot "$device" "$PWD/images/child.vhdx"
    [ ! -e images/child.vhdx ]
    [ -e "/proc/$pid/root$PWD/images/child.vhdx" ]
    umount images
    [ -e images/child.vhdx ]
    mount "$device" "$mnt"
    kill_daemon images/child.vhdx
    ublk recover "$device"
    ! grep "$device" "/proc/$(daemon_pid)/mountinfo" || fail "after a recovery its own device is mounted for it"
    ublk upgrade "$device"
    ! grep "$device" "/proc/$(daemon_pid)/mountinfo" || fail "after an upgrade its own device is mounted for it"
    [ "$(cd "$mnt/files" && find . -type f | wc -l)" -gt 0 ]
    umount "$mnt"
    mkfs.ext4 -q -F "$device" || fail "the file system stays mounted somewhere"
    ublk del "$device"
    losetup -d "$other"
}
