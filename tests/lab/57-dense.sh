# Files on NTFS, which Windows refuses if they are sparse: an image stays dense there whatever its guest does.
# shellcheck shell=bash

# A file system on a loop device, in the folder `host`.
make_dense_host() {
    truncate -s 2G host.img
    dense_loop=$(losetup --show -f host.img)
    case $1 in
    ntfs3)
        mkntfs -Q -F "$dense_loop" >/dev/null 2>&1
        mkdir -p host
        mount -t ntfs3 "$dense_loop" host || return 1
        ;;
    ext4)
        mkfs.ext4 -q -F "$dense_loop"
        mkdir -p host
        mount "$dense_loop" host
        ;;
    esac
}

drop_dense_host() {
    umount host
    losetup -d "$dense_loop"
    rm -f host.img
}

# Whether every byte of the file has its place on the host.
is_dense() { [ "$(($(stat -c %b "$1") * 512))" -ge "$(stat -c %s "$1")" ]; }

# What a guest does: blocks come, go, and come back.
use_device() {
    local device
    device=$(ublk add "$@")
    write_stamps "$device" 1 64 1
    blkdiscard -o $((8 << 20)) -l $((16 << 20)) "$device"
    blkdiscard -z -o $((40 << 20)) -l $((4 << 20)) "$device"
    write_stamps "$device" 2 16 2
    ublk del "$device"
}

test_dense_an_image_on_ntfs_stays_dense() {
    grep -qw ntfs3 /proc/filesystems || modprobe -q ntfs3 || { skipped "the kernel has no ntfs3"; return; }
    make_dense_host ntfs3 || { fail "ntfs3 cannot be mounted"; return 1; }
    ublk create host/disk.vhdx --size 1G --block-size 1M
    is_dense host/disk.vhdx || fail "create made holes"
    use_device host/disk.vhdx
    is_dense host/disk.vhdx || fail "the device made holes"
    # The attributes of NTFS, little-endian: 0x200 is "sparse".
    if command -v getfattr >/dev/null; then
        local attributes
        attributes=$(getfattr --only-values -n system.ntfs_attrib host/disk.vhdx 2>/dev/null | od -An -tu4 | tr -d ' ')
        [ $((attributes & 0x200)) -eq 0 ] || fail "the file is marked as sparse: $attributes"
    fi
    ublk check host/disk.vhdx | grep -q "Windows refuses" && fail "a dense file is called sparse"
    ublk create host/holes.vhdx --size 1G --sparse yes
    is_dense host/holes.vhdx || ublk info host/holes.vhdx | grep -q "Windows refuses" ||
        fail "a sparse file on NTFS is not called so"
    drop_dense_host
}

test_dense_an_image_on_ext4_gives_its_space_back() {
    make_dense_host ext4
    ublk create host/disk.vhdx --size 1G --block-size 1M
    use_device host/disk.vhdx
    ! is_dense host/disk.vhdx || fail "nothing was given back"
    ublk create host/dense.vhdx --size 1G --block-size 1M --sparse no
    use_device --sparse no host/dense.vhdx
    is_dense host/dense.vhdx || fail "--sparse no was not obeyed"
    drop_dense_host
}
