# The main job, small enough for a kernel that is emulated instruction by instruction.
# shellcheck shell=bash

test_stock_kernel_main_job() {
    local device
    note "$(uname -r)"
    ublk features >features
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2)
    mkfs.ext4 -q -F "$device"
    mount "$device" "$mnt"
    copy_real_files 20 "$mnt/files"
    manifest "$mnt/files" >before
    rm "$(find "$mnt/files" -type f | head -n 1)"
    manifest "$mnt/files" >before
    fstrim "$mnt"
    umount "$mnt"
    ublk del "$device"
    qemu-img check -q disk.vhdx
    device=$(ublk add --read-only disk.vhdx)
    mount -o ro,noload "$device" "$mnt"
    manifest "$mnt/files" >after
    umount "$mnt"
    ublk del disk.vhdx
    cmp before after || fail "files differ"
}
