# What is on a disk grows with it, in one command, or stays as it is.
# shellcheck shell=bash

# await_part DEVICE N: the node of a partition, which appears a moment after its table was written.
await_part() {
    for _ in $(seq 100); do
        [ ! -b "$1p$2" ] || break
        sleep 0.05
    done
    echo "$1p$2"
}

make_volume() {
    case $1 in
    ext4) mkfs.ext4 -q -F "$2" ;;
    xfs) mkfs.xfs -q -f "$2" ;;
    btrfs) mkfs.btrfs -q -f "$2" 2>/dev/null ;;
    esac
    mount -t "$1" "$2" "$mnt"
    stamps x 0 8 5 >"$mnt/file"
    umount "$mnt"
}

check_volume() {
    case $1 in
    ext4) e2fsck -fn "$2" >/dev/null 2>&1 ;;
    xfs) xfs_repair -n "$2" >/dev/null 2>&1 ;;
    btrfs) btrfs check --readonly "$2" >/dev/null 2>&1 ;;
    esac || fail "the $1 is damaged"
    mount -t "$1" -o ro "$2" "$mnt"
    [ "$(sha256sum <"$mnt/file")" = "$(stamps x 0 8 5 | sha256sum)" ] || fail "the file has changed"
    [ "$(stat -f -c '%b * %S' "$mnt" | sed 's/^/echo $((/; s/$/))/' | bash)" -gt "$3" ] || fail "the $1 has not grown"
    umount "$mnt"
}

# grow TYPE: a disk of 400 MiB whose second partition reaches its end becomes one of 1 GiB.
grow() {
    local device
    ublk create disk.vhdx --size 400M --block-size 1M
    device=$(ublk add disk.vhdx)
    printf 'label: gpt\nsize=8MiB\n,\n' | sfdisk -q "$device"
    write_stamps "$(await_part "$device" 1)" 0 8 3
    make_volume "$1" "$(await_part "$device" 2)"
    ublk del "$device"
    ublk resize disk.vhdx --size 1G --grow-fs --json >said
    jq -e --arg type "$1" '.grown.partition == 2 and .grown.type == $type and .backup_gpt_must_move == false' said \
        >/dev/null || { cat said; fail "it is not said what has grown"; }
    [ "$(ublk list --json)" = "[]" ] || fail "a device is left"
    device=$(ublk add --read-only disk.vhdx)
    check_volume "$1" "$(await_part "$device" 2)" $((900 << 20))
    check_stamps "$(await_part "$device" 1)" 0 8 3
    sfdisk --verify "$device" >/dev/null 2>&1 || fail "the partition table is damaged"
    ublk del "$device"
    ublk check disk.vhdx
}

test_resize_grows_ext4() { grow ext4; }

test_resize_grows_xfs() { grow xfs; }

test_resize_grows_btrfs() { grow btrfs; }

# A disk without partitions; what does not grow by itself is said, and the command that is named does it.
test_resize_names_the_command_that_grows_the_file_system() {
    local device command
    ublk create disk.vhdx --size 200M --block-size 1M
    device=$(ublk add disk.vhdx)
    make_volume ext4 "$device"
    ublk del "$device"
    command=$(ublk resize disk.vhdx --size 600M --json | jq -r .next_command)
    [[ $command == "vhdx-ublk resize "*" --grow-fs" ]] || fail "the next command is $command"
    eval "ublk ${command#vhdx-ublk }" >said
    grep -q 'the ext4 grew' said || { cat said; fail "it is not said that it grew"; }
    device=$(ublk add --read-only disk.vhdx)
    check_volume ext4 "$device" $((500 << 20))
    ublk del "$device"
}

# What cannot grow is refused before anything is changed.
test_resize_refuses_what_it_cannot_grow() {
    local device before
    ublk create disk.vhdx --size 200M --block-size 1M
    device=$(ublk add disk.vhdx)
    make_volume ext4 "$device"
    ublk del "$device"
    before=$(sha disk.vhdx)
    # shellcheck disable=SC2016 # the inner shell expands it
    ! unshare -m bash -c 'mount --bind /dev/null "$(readlink -f "$(command -v resize2fs)")" &&
        "$0" resize disk.vhdx --size 400M --grow-fs' "$VHDX_UBLK" 2>said || fail "it grew without resize2fs"
    grep -q 'resize2fs is not installed' said || { cat said; fail "the missing program is not named"; }
    ! ublk resize disk.vhdx --size 100M --force --grow-fs 2>said || fail "it shrank what should grow"
    [ "$(sha disk.vhdx)" = "$before" ] || fail "the image has changed"
    device=$(ublk add disk.vhdx)
    mount "$device" "$mnt"
    echo x >"$mnt/new"
    sync -f "$mnt"
    dd if="$device" of=cut bs=1M iflag=direct status=none
    umount "$mnt"
    dd if=cut of="$device" bs=1M oflag=direct status=none
    ublk del "$device"
    before=$(sha disk.vhdx)
    ! ublk resize disk.vhdx --size 400M --grow-fs 2>said || fail "an unclean file system grew"
    grep -q 'not shut down cleanly' said || { cat said; fail "the reason is not named"; }
    [ "$(sha disk.vhdx)" = "$before" ] || fail "the image has changed"
}
