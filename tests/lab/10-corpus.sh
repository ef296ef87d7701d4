# Images made by other software, read through the device: every byte as three independent readers agree on, and
# the file as it was.
# shellcheck shell=bash

digest_of() { sed -n "s/^| $1 .* \([0-9a-f]\{64\}\) |$/\1/p" "$corpus/README.md"; }

read_only_digest() {
    local name=$1 before device
    unpack "$name"
    before=$(sha "$name.vhdx") times=$(stat -c '%X %Y %Z' "$name.vhdx")
    sleep 1
    device=$(ublk add --read-only "$name.vhdx")
    [ "$(sha "$device")" = "$(digest_of "$name")" ] || fail "$name: other content than the corpus' readers found"
    [ "$(blockdev --getro "$device")" = 1 ]
    ! dd if=/dev/zero of="$device" bs=4096 count=1 oflag=direct status=none 2>/dev/null || fail "a write got through"
    "${2:-:}" "$device"
    ublk del "$device"
    [ "$(sha "$name.vhdx")" = "$before" ] || fail "$name.vhdx was changed"
    [ "$(stat -c '%X %Y %Z' "$name.vhdx")" = "$times" ] || fail "the times of $name.vhdx were changed"
    note "$name: content and file are what they were"
}

list_ext2() { mount -t ext4 -o ro,noload "$1" "$mnt"; find "$mnt" | sed 's/^/note: /' | head -n 8; umount "$mnt"; }
list_fat() { mount_partition "$1" vfat; find "$mnt" | sed 's/^/note: /' | head -n 8; umount "$mnt"; }
list_ntfs() { mount_partition "$1" ntfs3; find "$mnt" | sed 's/^/note: /' | head -n 8; umount "$mnt"; }

test_corpus_ext2() { read_only_digest ext2 list_ext2; }
test_corpus_fat_parent() { read_only_digest fat-parent list_fat; }
test_corpus_ntfs_fixed() { read_only_digest ntfs-fixed list_ntfs; }
test_corpus_ntfs_dynamic() { read_only_digest ntfs-dynamic list_ntfs; }
test_corpus_iotest_dynamic() { read_only_digest iotest-dynamic-1G; }

# A pattern over allocated and empty blocks of a Windows image; QEMU reads all four areas.
test_corpus_iotest_written_and_read_by_qemu() {
    unpack iotest-dynamic-1G
    local device
    device=$(ublk add iotest-dynamic-1G.vhdx)
    head -c 58M /dev/zero | tr '\0' '\303' | dd of="$device" bs=1M seek=99 oflag=direct iflag=fullblock status=none
    ublk del "$device"
    qemu-img check -q iotest-dynamic-1G.vhdx
    qemu-io -r -f vhdx -c 'read -P 0xa5 0 33M' -c 'read -P 0x96 33M 33M' -c 'read -P 0 66M 33M' \
        -c 'read -P 0xc3 99M 58M' -c 'read -P 0 157M 867M' iotest-dynamic-1G.vhdx >qemu.log || fail "$(cat qemu.log)"
    ! grep -q 'verification failed' qemu.log || fail "$(cat qemu.log)"
}
