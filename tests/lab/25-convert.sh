# Disks are converted into devices and out of them.
# shellcheck shell=bash

# Whatever was on a device shows nowhere, and what comes back is what went in; a device that is in use stays as it is.
test_convert_into_a_device_and_back() {
    local device
    truncate -s 100M disk.raw
    dd if=/dev/urandom of=disk.raw bs=1M seek=33 count=9 conv=notrunc status=none
    ublk convert disk.raw disk.vhdx
    ublk create target.vhdx --size 128M
    device=$(ublk add target.vhdx)
    head -c 128M /dev/urandom >"$device"
    ! ublk convert disk.vhdx "$device" 2>said || fail "a device was overwritten without --existing"
    grep -q -- '--existing' said || fail "no remedy: $(cat said)"
    ublk convert disk.vhdx "$device" --existing --verify
    ublk compare disk.raw "$device"
    cmp -n $((100 << 20)) disk.raw "$device"
    ! ublk convert disk.vhdx target.vhdx --force 2>said || fail "a served image was replaced"
    ! ublk convert target.vhdx copy.raw 2>said || fail "an image that is written was read"
    grep -q "$device" said || fail "$(cat said)"
    ublk convert "$device" back.vhdx 2>said
    [ ! -s said ] || fail "nothing uses the device: $(cat said)"
    ublk compare back.vhdx disk.vhdx
    mkfs.ext4 -q -F "$device"
    mount "$device" "$mnt"
    ublk convert "$device" back.vhdx --force 2>said
    grep -q "$device: the device is mounted" said || fail "no warning: $(cat said)"
    ! ublk convert disk.vhdx "$device" --existing 2>said || fail "a mounted device was overwritten"
    grep -q lsblk said || fail "no remedy: $(cat said)"
    umount "$mnt"
    ublk del "$device"
}

# A disk of sectors of 4096 bytes stays one: its partitions are where they were.
test_convert_keeps_the_sectors_of_a_device() {
    local loop device
    truncate -s 64M disk.raw
    loop=$(losetup --show -f -b 4096 disk.raw) || { skipped "no loop device"; return 0; }
    printf 'label: gpt\nsize=40M, name=data\n' | sfdisk -q --wipe never --no-reread --no-tell-kernel "$loop"
    dd if=/dev/urandom of="$loop" bs=1M seek=30 count=4 oflag=direct status=none
    ublk convert "$loop" disk.vhdx 2>said || fail "$(cat said)"
    ! grep -q 'sectors of 512' said || fail "it has none: $(cat said)"
    ublk info disk.vhdx --json | jq --exit-status '.logical_sector_size == 4096 and .contents.table.kind == "gpt"' ||
        fail "$(ublk info disk.vhdx)"
    ! ublk resize disk.vhdx --size 8M 2>said || fail "a partition was cut off"
    device=$(ublk add disk.vhdx)
    cmp disk.raw "$device"
    [ "$(sfdisk --json "$device" | jq -r '.partitiontable.partitions[0].name')" = data ]
    ublk del "$device"
    ublk create plain.vhdx --size 64M
    device=$(ublk add plain.vhdx)
    ublk convert disk.vhdx "$device" --existing 2>said
    grep -q "$device: it has sectors of 512 bytes, and the disk of 4096" said || fail "no warning: $(cat said)"
    ublk del "$device"
    losetup -d "$loop"
}

# A loop device over the source, and a part of the source's own disk, are the source.
test_convert_never_overwrites_its_source() {
    local loop
    truncate -s 64M disk.raw
    ublk convert disk.raw disk.vhdx
    loop=$(losetup -f --show disk.vhdx) || { skipped "no loop device"; return 0; }
    ! ublk convert disk.vhdx "$loop" --existing 2>said || { losetup -d "$loop"; fail "the source was overwritten"; }
    losetup -d "$loop"
    grep -q 'it is the source' said || fail "$(cat said)"
}

# Blocks are shared with the source where the file system can do that.
test_convert_shares_blocks() {
    command -v mkfs.xfs >/dev/null || { skipped "mkfs.xfs is missing"; return 0; }
    truncate -s 512M host.img
    mkfs.xfs -q -m reflink=1 host.img
    mount -o loop host.img "$mnt" || { skipped "no loop device or no XFS"; return 0; }
    head -c 64M /dev/urandom >"$mnt/disk.raw"
    ublk convert "$mnt/disk.raw" "$mnt/disk.vhdx" --json >made
    grep -q '"shared_bytes": 67108864' made || fail "$(cat made)"
    ublk compare "$mnt/disk.raw" "$mnt/disk.vhdx"
    ublk convert "$mnt/disk.vhdx" "$mnt/back.raw" --verify --json >made
    grep -q '"shared_bytes": 67108864' made || fail "$(cat made)"
    cmp "$mnt/disk.raw" "$mnt/back.raw"
    umount "$mnt"
}

# The advice about a qcow2 target is two commands that can be run as they are, for a chain too.
test_convert_to_qcow2_as_advised() {
    local device command
    command -v qemu-img >/dev/null || { skipped "qemu-img is missing"; return 0; }
    head -c 64M /dev/urandom >disk.raw
    ublk convert disk.raw base.vhdx
    ublk create OLD.vhdx --parent base.vhdx
    ! ublk convert OLD.vhdx NEW.qcow2 2>said || fail "a qcow2 image was made"
    grep -o '`[^`]*`' said | tr -d '`' >advice
    [ "$(wc -l <advice)" = 2 ] || fail "no two commands: $(cat said)"
    command=$(sed -n 1p advice)
    [ "${command%% *}" = vhdx-ublk ] || fail "$command"
    # shellcheck disable=SC2086 # words of a command
    device=$(ublk ${command#vhdx-ublk })
    command=$(sed -n 2p advice)
    ${command//\/dev\/ublkbN/$device}
    qemu-img compare -q -f raw -F qcow2 disk.raw NEW.qcow2
    ublk del "$device"
}
