# Mounting an image in one command, by mount(8) and by a line of fstab; and what is left when that fails.
# shellcheck shell=bash

has_no_device() { [ "$(ublk list --json)" = "[]" ]; }

install_helpers() {
    own_sbin
    ln -s "$VHDX_UBLK" /usr/sbin/mount.vhdx
    ln -s "$VHDX_UBLK" /usr/sbin/umount.vhdx
}

take_down() {
    umount -q -i -l "$scratch/other" 2>/dev/null || true
    release_sbin
}

# An image with one file system on the whole disk.
make_ext4() {
    local device
    ublk create "$1" --size 256M
    device=$(ublk add "$1")
    mkfs.ext4 -q -L "${2:-data}" "$device"
    ublk del "$device"
}

test_mount_images_of_other_programs() {
    local before
    unpack ext2 ntfs-dynamic ntfs-fixed fat-parent
    for image in ext2 ntfs-dynamic ntfs-fixed fat-parent; do
        before=$(sha "$image.vhdx")
        case $image in
        ntfs*) ublk mount -r -t ntfs3 "$image.vhdx" "$mnt" ;;
        *) ublk mount -r "$image.vhdx" "$mnt" ;;
        esac
        note "$image: $(findmnt -no SOURCE,FSTYPE,OPTIONS "$mnt")"
        find "$mnt" | sed 's/^/note: /' | head -n 4
        ublk umount "$mnt"
        has_no_device || fail "the device of $image stays"
        [ "$(sha "$image.vhdx")" = "$before" ] || fail "$image.vhdx was changed"
    done
}

test_mount_by_mount_and_umount() {
    install_helpers
    make_ext4 disk.vhdx
    mount -t vhdx disk.vhdx "$mnt" -o noatime,queues=1,name=data
    note "$(findmnt -no SOURCE,FSTYPE,OPTIONS "$mnt")"
    findmnt -no OPTIONS "$mnt" | grep -q noatime || fail "an option of the inner mount is lost"
    ublk list --json | tr -d ' \n' | grep -q '"name":"data".*"queues":1' || fail "the options of the device are lost"
    cat /run/mount/utab | sed 's/^/note: /'
    echo kept >"$mnt/file"
    umount "$mnt"
    has_no_device || fail "umount(8) leaves the device"
    [ ! -s /run/mount/utab ] || fail "utab still has: $(cat /run/mount/utab)"
    qemu-img check -q disk.vhdx
    mount -t vhdx.ext4 -r disk.vhdx "$mnt"
    [ "$(cat "$mnt/file")" = kept ]
    ! touch "$mnt/other" 2>/dev/null || fail "it is writable"
    umount "$mnt"
    has_no_device
}

# What a user may have put on an image gets no rights by being mounted.
test_mount_an_image_of_a_user() {
    make_ext4 disk.vhdx
    ublk mount disk.vhdx "$mnt"
    ! findmnt -no OPTIONS "$mnt" | grep -qE 'nosuid|nodev' || fail "an image of root is restricted"
    ublk umount "$mnt"
    chown 1000 disk.vhdx
    ublk mount disk.vhdx "$mnt"
    findmnt -no OPTIONS "$mnt" | grep -q 'nosuid,nodev' || fail "$(findmnt -no OPTIONS "$mnt")"
    ublk umount "$mnt"
    ublk mount -o suid,dev disk.vhdx "$mnt"
    ! findmnt -no OPTIONS "$mnt" | grep -qE 'nosuid|nodev' || fail "the options do not count"
    ublk umount "$mnt"
    chown 0 disk.vhdx
    chmod g+w disk.vhdx
    ublk mount disk.vhdx "$mnt"
    findmnt -no OPTIONS "$mnt" | grep -q 'nosuid,nodev' || fail "its group can write to it"
    ublk umount "$mnt"
    has_no_device
    chmod g-w disk.vhdx
    ublk add --untrusted disk.vhdx
    ublk mount -r disk.vhdx "$mnt"
    findmnt -no OPTIONS "$mnt" | grep -q 'nosuid,nodev' || fail "it was added as untrusted"
    ublk umount "$mnt"
    ublk del 0
}

# The superblock of an ext says what the kernel does at an error: to stop is not for a user to say.
test_mount_an_image_that_asks_for_a_panic() {
    local device bytes block
    make_ext4 disk.vhdx
    device=$(ublk add disk.vhdx)
    mount "$device" "$mnt"
    mkdir "$mnt/damaged"
    umount "$mnt"
    tune2fs -e panic "$device" >/dev/null
    dumpe2fs -h "$device" 2>/dev/null | grep -q 'Errors behavior: *Panic' || fail "it asks for no panic"
    bytes=$(dumpe2fs -h "$device" 2>/dev/null | sed -n 's/^Block size: *//p')
    block=$(debugfs -R 'blocks /damaged' "$device" 2>/dev/null | awk '{ print $1 }')
    dd if=/dev/urandom of="$device" bs="$bytes" seek="$block" count=1 conv=notrunc status=none
    ublk del "$device"
    # The kernel shows what differs from the superblock.
    ublk mount -r disk.vhdx "$mnt"
    ! grep " $mnt " /proc/self/mountinfo | grep errors= || fail "an image of root does not have its own way"
    ublk umount "$mnt"
    for options in untrusted rw; do
        [ $options = untrusted ] || chown 1000 disk.vhdx
        ublk mount -o $options disk.vhdx "$mnt"
        grep " $mnt " /proc/self/mountinfo >mounted
        grep -q errors=remount-ro mounted || fail "$options: an error would stop the machine: $(cat mounted)"
        dmesg -C
        ls "$mnt/damaged" 2>/dev/null || true
        dmesg | grep -m 1 'EXT4-fs error' >said || fail "$options: nothing is damaged"
        note "$options: $(cat said)"
        ublk umount "$mnt"
    done
}

# is_untrusted WHAT: the mount gives no rights and no writes, and the kernel has read no table.
is_untrusted() {
    findmnt -no OPTIONS "$mnt" | tr , '\n' | grep -cxE 'ro|nosuid|nodev' | grep -qx 3 ||
        fail "$1: $(findmnt -no OPTIONS "$mnt")"
    [ ! -e /sys/class/block/ublkb0p1 ] || fail "$1: the kernel has read the partition table"
}

test_mount_of_an_untrusted_image() {
    local before
    install_helpers
    make_partitioned disk.vhdx
    before=$(sha disk.vhdx)
    ublk mount -o rw,untrusted,partition=2 disk.vhdx "$mnt"
    is_untrusted "vhdx-ublk mount"
    refused ublk mount -o rw,partition=2 disk.vhdx "$mnt"
    ublk umount "$mnt"
    has_no_device
    mount -t vhdx -o untrusted,partition=2 disk.vhdx "$mnt"
    is_untrusted "mount -t vhdx"
    umount "$mnt"
    has_no_device
    echo "$PWD/disk.vhdx $mnt vhdx untrusted,partition=2 0 0" >fstab
    mount -T fstab -w "$mnt"
    is_untrusted fstab
    umount "$mnt"
    has_no_device
    [ "$(sha disk.vhdx)" = "$before" ] || fail "the image was changed"
    refused ublk mount -o untrusted,parent=elsewhere.vhdx disk.vhdx "$mnt"
    grep -q -- --untrusted refusal
    mkdir -p received private
    ublk create private/base.vhdx --size 64M
    ublk create received/child.vhdx --parent private/base.vhdx
    refused ublk mount -o untrusted received/child.vhdx "$mnt"
    grep -q 'its parent is not in its own folder' refusal
    has_no_device
    # A device that is there keeps what it was made with.
    ublk add --read-only disk.vhdx
    refused ublk mount -o untrusted,partition=2 disk.vhdx "$mnt"
    grep -q 'serves the image without --untrusted' refusal
    ublk del 0
}

test_mount_by_fstab() {
    install_helpers
    mkdir -p other
    make_ext4 disk.vhdx
    make_partitioned parts.vhdx
    cat >fstab <<TABLE
$PWD/disk.vhdx $mnt vhdx defaults,nofail,_netdev,x-systemd.device-timeout=9 0 0
$PWD/parts.vhdx $scratch/other vhdx ro,partition=STICK 0 0
$PWD/missing.vhdx /run/nowhere vhdx nofail 0 0
TABLE
    mkdir -p /run/nowhere
    mount -T fstab -a || fail "mount -a: status $?"
    note "$(findmnt -no SOURCE,OPTIONS "$mnt"), $(findmnt -no SOURCE,OPTIONS "$scratch/other")"
    mount -T fstab -a || fail "mount -a again: status $?"
    [ "$(grep -c " $mnt " /proc/self/mounts)" = 1 ] || fail "it is mounted twice"
    [ "$(findmnt -no FSTYPE "$scratch/other")" = vfat ] || fail "another partition is mounted"
    umount "$mnt" "$scratch/other"
    has_no_device
    mount -T fstab "$mnt"
    umount "$mnt"
    has_no_device
}

# Which partition: the only one, by number, by label; two mounts share a device, which goes with the last.
test_mount_partitions() {
    mkdir -p other
    make_partitioned parts.vhdx
    refused ublk mount parts.vhdx "$mnt"
    grep -q '2: ext4 .Work., 300 MiB' refusal && grep -q '3: vfat .STICK.' refusal || fail "it does not list them"
    has_no_device
    refused ublk mount --partition 4 parts.vhdx "$mnt"
    grep -q 'swap space' refusal
    refused ublk mount --partition 9 parts.vhdx "$mnt"
    has_no_device
    ublk mount --partition Work parts.vhdx "$mnt"
    ublk mount --partition 3 parts.vhdx "$scratch/other"
    echo 1 >"$mnt/a"
    echo 2 >"$scratch/other/b"
    [ "$(ublk list --json | grep -c '"id"')" = 1 ] || fail "two devices serve one image"
    ublk umount "$mnt"
    [ "$(cat "$scratch/other/b")" = 2 ]
    ublk umount "$scratch/other"
    has_no_device || fail "the device stays"
    # A device of `add` stays.
    device=$(ublk add parts.vhdx)
    ublk mount --partition 2 parts.vhdx "$mnt"
    [ "$(cat "$mnt/a")" = 1 ]
    ublk umount "$mnt"
    ublk del "$device"
}

# What mount(8) would find by itself is not mounted: it is another file system than the one that was examined.
test_mount_what_was_examined() {
    local device
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx)
    mkfs.minix -3 "$device" >/dev/null
    [ -n "$(blkid -o value -s TYPE "$device")" ] || fail "mount(8) would find nothing, either"
    ublk del "$device"
    for kind in '' '-t auto'; do
        # shellcheck disable=SC2086 # an option and its value
        refused ublk mount $kind disk.vhdx "$mnt"
        grep -q 'no file system was recognised' refusal || fail "$(cat refusal)"
    done
    make_ext4 ext4.vhdx
    refused ublk mount -t btrfs ext4.vhdx "$mnt"
    grep -q 'the file system is ext4, not btrfs' refusal || fail "$(cat refusal)"
    ublk mount -t auto ext4.vhdx "$mnt"
    [ "$(findmnt -no FSTYPE "$mnt")" = ext4 ]
    ublk umount "$mnt"
    has_no_device
}

test_mount_that_fails_leaves_nothing() {
    local device before
    ublk create empty.vhdx --size 64M
    before=$(sha empty.vhdx)
    refused ublk mount empty.vhdx "$mnt"
    has_no_device
    [ "$(sha empty.vhdx)" = "$before" ] || fail "the image was changed"
    grep -q 'no file system was recognised' refusal && grep -q -- '-t TYPE' refusal || fail "$(cat refusal)"
    refused ublk mount empty.vhdx "$scratch/no/folder"
    refused ublk mount missing.vhdx "$mnt"
    refused ublk mount -o queues=0 empty.vhdx "$mnt"
    refused ublk umount "$mnt"
    # What hides its files says what it is.
    device=$(ublk add empty.vhdx)
    printf 'LUKS\272\276\000\002' | dd of="$device" conv=notrunc status=none
    ublk del "$device"
    refused ublk mount empty.vhdx "$mnt"
    grep -q LUKS refusal && grep -q cryptsetup refusal
    device=$(ublk add empty.vhdx)
    printf '\353\130\220-FVE-FS-' | dd of="$device" conv=notrunc status=none
    ublk del "$device"
    refused ublk mount empty.vhdx "$mnt"
    grep -q BitLocker refusal
    # An option that the file system does not know.
    make_ext4 disk.vhdx
    refused ublk mount -o no_such_option disk.vhdx "$mnt"
    has_no_device
    ! mountpoint -q "$mnt" || fail "something is mounted"
}

# Sets the bit by which NTFS says that it was not left in order.
make_dirty() {
    python3 - "$1" <<'PYTHON'
import sys

with open(sys.argv[1], "r+b") as disk:
    boot = disk.read(512)
    cluster = int.from_bytes(boot[11:13], "little") * boot[13]
    record = disk.seek(int.from_bytes(boot[48:56], "little") * cluster + 3 * 1024)
    volume = bytearray(disk.read(1024))
    at = int.from_bytes(volume[20:22], "little")
    while int.from_bytes(volume[at : at + 4], "little") != 0x70:
        at += int.from_bytes(volume[at + 4 : at + 8], "little")
    volume[at + int.from_bytes(volume[at + 20 : at + 22], "little") + 10] |= 1
    disk.seek(record)
    disk.write(volume)
PYTHON
}

# An NTFS that its last user did not leave in order is not written.
test_mount_ntfs_that_is_not_in_order() {
    local device
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx)
    mkntfs -Q -F -L Data "$device" >/dev/null 2>&1
    mount -t ntfs3 "$device" "$mnt"
    echo kept >"$mnt/file"
    umount "$mnt"
    make_dirty "$device"
    ublk del "$device"
    refused ublk mount -t ntfs3 disk.vhdx "$mnt"
    grep -q 'not shut down cleanly' refusal && grep -q -- '-o ro' refusal
    has_no_device
    ublk mount -t ntfs3 -o ro disk.vhdx "$mnt"
    [ "$(cat "$mnt/file")" = kept ]
    ublk umount "$mnt"
}

# A mount in use is not unmounted, and nothing is lost by the attempt.
test_umount_in_use() {
    make_ext4 disk.vhdx
    ublk mount disk.vhdx "$mnt"
    exec 7>"$mnt/open"
    refused ublk umount "$mnt"
    mountpoint -q "$mnt" || fail "it is unmounted"
    exec 7>&-
    ublk umount "$mnt"
    has_no_device
}

# Detached while it is in use, it goes with its last user, and what that wrote is in the image.
test_umount_lazily() {
    install_helpers
    make_ext4 disk.vhdx
    mount -t vhdx disk.vhdx "$mnt"
    exec 7>"$mnt/open"
    umount -l "$mnt"
    ! mountpoint -q "$mnt" || fail "it is still mounted"
    echo late >&7
    exec 7>&-
    for _ in $(seq 100); do
        ! has_no_device || break
        sleep 0.1
    done
    has_no_device || fail "the device outlives its last user"
    ublk mount -r disk.vhdx "$mnt"
    [ "$(cat "$mnt/open")" = late ]
    ublk umount "$mnt"
}

# ntfs-3g runs in user space, and btrfs has a device number of its own: umount(8) finds the device of both.
test_mount_file_systems_of_other_kinds() {
    local kind
    install_helpers
    for kind in ntfs btrfs xfs; do
        ublk create "$kind.vhdx" --size 512M
        case $kind in
        ntfs) mkntfs -Q -F "$(ublk add "$kind.vhdx")" >/dev/null 2>&1 ;;
        *) "mkfs.$kind" -q "$(ublk add "$kind.vhdx")" >/dev/null ;;
        esac
        ublk del 0
        mount -t vhdx "$kind.vhdx" "$mnt"
        note "$(findmnt -no SOURCE,FSTYPE "$mnt")"
        echo kept >"$mnt/file"
        umount "$mnt"
        has_no_device || fail "the device of a $kind stays"
        ublk mount -r "$kind.vhdx" "$mnt"
        [ "$(cat "$mnt/file")" = kept ]
        ublk umount "$mnt"
    done
}

# Read-only, a file system that was not unmounted is mounted as it is, and the image keeps every byte.
test_mount_a_crashed_file_system_read_only() {
    local device before
    make_ext4 disk.vhdx
    device=$(ublk add disk.vhdx)
    mount "$device" "$mnt"
    echo kept >"$mnt/file"
    sync -f "$mnt"
    ublk del --force "$device"
    umount "$mnt"
    before=$(sha disk.vhdx)
    ublk mount -r disk.vhdx "$mnt" 2>said
    grep -q 'its journal is not replayed' said || fail "it does not say so: $(cat said)"
    ublk umount "$mnt"
    [ "$(sha disk.vhdx)" = "$before" ] || fail "the image was changed"
    ublk mount disk.vhdx "$mnt"
    [ "$(cat "$mnt/file")" = kept ] || fail "its journal was not replayed"
    ublk umount "$mnt"
}

# Whatever an image says, no other device of the machine is opened for it; nothing is mounted to find out.
test_mount_leads_to_no_other_device() {
    local device host
    ublk create two.vhdx --size 512M
    device=$(ublk add two.vhdx)
    truncate -s 256M other.img
    host=$(losetup --find --show other.img)
    mkfs.btrfs -q -f -d single -m single "$device" "$host"
    ublk del two.vhdx
    ublk mount two.vhdx "$mnt" 2>said && fail "a btrfs of two devices"
    grep -q 'one of several devices' said || fail "$(cat said)"
    has_no_device || fail "its device stays"
    # The image says that it is all there is, with the identifier of a btrfs of the machine.
    ublk create hostile.vhdx --size 512M
    device=$(ublk add hostile.vhdx)
    mkfs.btrfs -q -f -U 0f1e2d3c-0000-4000-8000-000000000001 "$device"
    ublk del hostile.vhdx
    wipefs -qa "$host"
    mkfs.btrfs -q -f -U 0f1e2d3c-0000-4000-8000-000000000002 "$host"
    btrfstune -f -U 0f1e2d3c-0000-4000-8000-000000000001 "$host" >/dev/null
    mkdir -p mine
    mount "$host" mine
    dmesg -C
    ublk mount hostile.vhdx "$mnt" 2>said && fail "a btrfs with the identifier of another one"
    grep -q 'another device of this machine has a btrfs' said || fail "$(cat said)"
    ! dmesg | grep -i 'btrfs' || fail "it was mounted to find out"
    umount mine
    has_no_device || fail "its device stays"
    ublk create journal.vhdx --size 512M
    device=$(ublk add journal.vhdx)
    wipefs -qa "$host"
    mke2fs -q -F -b 4096 -O journal_dev "$host"
    mkfs.ext4 -q -F -b 4096 -J device="$host" "$device"
    ublk del journal.vhdx
    ublk mount journal.vhdx "$mnt" 2>said && fail "an ext4 whose journal is elsewhere"
    grep -q 'its journal is on another device' said || fail "$(cat said)"
    has_no_device || fail "its device stays"
    losetup -d "$host"
}
