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
    local device
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
    ublk del "$device"
}
