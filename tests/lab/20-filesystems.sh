# New images under real file systems: mkfs, mount, copy, unmount, del; fsck, QEMU and a second add agree.
# shellcheck shell=bash

make_file_system() {
    case $1 in
    ext4) mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$2" ;;
    xfs) mkfs.xfs -q -f "$2" ;;
    esac
}

check_file_system() {
    case $1 in
    ext4) e2fsck -fn "$2" ;;
    xfs) xfs_repair -n "$2" ;;
    esac
}

# across_border SECTOR BORDER_MB: data on both sides of the first chunk's end, read by somebody else.
across_border() {
    local device
    device=$(ublk add disk.vhdx --queues 2)
    write_stamps "$device" $(($2 - 2)) 4 7
    ublk del "$device"
    if [ "$1" = 512 ]; then
        qemu-img dd -f vhdx -O raw bs=1M skip=$(($2 - 2)) count=$(($2 + 2)) if=disk.vhdx of=border.raw
        check_stamps border.raw 0 4 7
        rm border.raw
    else
        device=$(ublk add --read-only disk.vhdx)
        check_stamps "$device" $(($2 - 2)) 4 7
        ublk del "$device"
    fi
}

# round_trip TYPE SIZE SECTOR BLOCK FS BORDER_MB
round_trip() {
    local type=$1 size=$2 sector=$3 block=$4 fs=$5 device closed
    ublk create disk.vhdx --type "$type" --size "$size" --block-size "$block" --logical-sector-size "$sector"
    across_border "$sector" "$6"
    device=$(ublk add disk.vhdx --queues 2)
    [ "$(blockdev --getss "$device")" = "$sector" ] || fail "the device has sectors of another size"
    make_file_system "$fs" "$device"
    mount "$device" "$mnt"
    copy_real_files 310 "$mnt/files"
    manifest "$mnt/files" >before
    umount "$mnt"
    ublk del "$device"
    closed=$(stat -c "%s %Y %Z %b" disk.vhdx)
    if [ "$sector" = 512 ]; then
        qemu-img check -q disk.vhdx
        qemu-img convert -f vhdx -O raw disk.vhdx disk.raw
        device=$(losetup --show -f -r disk.raw)
        read_back "$device" "$fs"
        losetup -d "$device"
    else
        device=$(ublk add --read-only disk.vhdx)
        read_back "$device" "$fs"
        ublk del "$device"
    fi
    [ "$(stat -c "%s %Y %Z %b" disk.vhdx)" = "$closed" ] || fail "reading changed the file"
    note "$type $size, $sector-byte sectors, $block blocks, $fs: $(wc -l <before) files agree"
    rm -f disk.vhdx disk.raw
}

read_back() {
    check_file_system "$2" "$1" >fsck.log 2>&1 || fail "$(cat fsck.log)"
    case $2 in
    ext4) mount -o ro,noload "$1" "$mnt" ;;
    xfs) mount -o ro,norecovery,nouuid "$1" "$mnt" ;;
    esac
    manifest "$mnt/files" >after
    umount "$mnt"
    cmp before after || fail "files differ"
}

test_fs_dynamic_512_2m_ext4() { round_trip dynamic 40G 512 2M ext4 4096; }
test_fs_dynamic_4096_1m_xfs() { round_trip dynamic 40G 4096 1M xfs 32768; }
test_fs_fixed_512_32m_xfs() { round_trip fixed 6G 512 32M xfs 4096; }

# Every combination.
full_test_fs_matrix() {
    local sector block fs
    for sector in 512 4096; do
        for block in 1M 2M 32M; do
            for fs in ext4 xfs; do
                round_trip dynamic 40G $sector $block $fs $((sector * 8))
                round_trip fixed 6G $sector $block $fs 4096
            done
        done
    done
}

# Deleting files gives their space back to the host.
test_fs_trim_gives_space_back() {
    local device full empty
    ublk create disk.vhdx --size 8G
    device=$(ublk add disk.vhdx)
    mkfs.ext4 -q -F "$device"
    mount "$device" "$mnt"
    copy_real_files 310 "$mnt/files"
    sync
    full=$(host_bytes disk.vhdx)
    rm -rf "$mnt/files"
    sync
    fstrim -v "$mnt"
    sync
    empty=$(host_bytes disk.vhdx)
    umount "$mnt"
    ublk del "$device"
    note "host_bytes $full before fstrim, $empty after, $(host_bytes disk.vhdx) after del"
    [ "$empty" -lt $((full / 3)) ] || fail "fstrim gave back too little: $full before, $empty after"
    qemu-img check -q disk.vhdx
}

# The kernel shows the partitions of a device: when they are made, and when it is added again.
test_partitions_of_a_device_appear() {
    local device way
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx)
    printf 'label: gpt\nsize=8MiB\nsize=16MiB\n' | sfdisk -q "$device"
    for way in made added; do
        for _ in $(seq 100); do
            [ ! -b "${device}p2" ] || break
            sleep 0.05
        done
        [ "$(cat "/sys/class/block/${device##*/}p2/size")" = 32768 ] || fail "no second partition when it is $way"
        ublk del "$device"
        [ "$way" = added ] || device=$(ublk add --read-only disk.vhdx)
    done
}
