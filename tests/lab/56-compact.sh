# A disk whose files are deleted becomes a small file again, however often that is interrupted.
# shellcheck shell=bash

# make_guest TYPE DEVICE: a file system on the device, mounted.
make_guest() {
    case $1 in
    ext4) mkfs.ext4 -q -F -E nodiscard -J size=16 "$2" ;;
    xfs) mkfs.xfs -q -f "$2" ;;
    btrfs) mkfs.btrfs -q -f "$2" ;;
    ntfs3) mkntfs -Q -F "$2" >/dev/null 2>&1 ;;
    esac
    # ntfs3 trims only where it may discard.
    if [ "$1" = ntfs3 ]; then mount -t ntfs3 -o discard "$2" "$mnt"; else mount -t "$1" "$2" "$mnt"; fi
}

check_guest() {
    case $1 in
    ext4) e2fsck -fn "$2" >/dev/null 2>&1 ;;
    xfs) xfs_repair -n "$2" >/dev/null 2>&1 ;;
    btrfs) btrfs check --readonly "$2" >/dev/null 2>&1 ;;
    ntfs3) ntfsfix -n "$2" >/dev/null 2>&1 ;;
    esac
}

# Compacts, killed again and again, each time a little later; prints how often. What a kill leaves is sound, but for
# space that nothing names.
compact_under_fire() {
    local tries status tenths=2 pid killer
    for tries in $(seq 0 40); do
        "$VHDX_UBLK" compact "$1" >said 2>&1 &
        pid=$!
        (sleep "$((tenths / 10)).$((tenths % 10))" && kill -KILL "$pid") 2>/dev/null &
        killer=$! status=0
        wait "$pid" || status=$?
        kill "$killer" 2>/dev/null || true
        [ $status = 137 ] || break
        # The kernel ends the dead program's I/O, and only then its lock.
        for _ in $(seq 100); do
            status=0
            ublk check "$1" >said 2>&1 || status=$?
            [ $status = 1 ] || break
            sleep 0.1
        done
        [ $status = 0 ] || [ $status = 3 ] || { cat said >&2; return 1; }
        tenths=$((tenths + 1 + tenths / 4))
    done
    [ $status = 0 ] || { cat said >&2; return 1; }
    echo "$tries"
}

# Of 75 files of 8 MiB, two of three are deleted, trimmed, and compacted away; the others stay as they are.
shrink_a_disk() {
    local type=$1 device before length kept kills
    ublk create disk.vhdx --size 4G --block-size 1M
    device=$(ublk add disk.vhdx)
    make_guest "$type" "$device"
    for number in $(seq 75); do
        stamps x 0 8 "$number" >"$mnt/$number"
    done
    sync "$mnt/75"
    for number in $(seq 75); do
        [ $((number % 3)) = 0 ] || rm "$mnt/$number"
    done
    sync
    manifest "$mnt" >kept
    kept=$(du -s --block-size=1 "$mnt" | cut -f1)
    [ "$type" != btrfs ] || btrfs filesystem sync "$mnt"
    fstrim "$mnt"
    umount "$mnt"
    ublk del "$device"
    before=$(stat -c %s disk.vhdx)
    kills=$(compact_under_fire disk.vhdx)
    length=$(stat -c %s disk.vhdx)
    note "$type: $((before >> 20)) -> $((length >> 20)) MiB for files of $((kept >> 20)) MiB," \
        "$(($(host_bytes disk.vhdx) >> 20)) MiB on the host, $kills kills"
    ublk check disk.vhdx >said || { cat said; fail "not sound after all"; }
    # What the file system itself takes: a journal of 16 to 64 MiB, and blocks that are only partly free.
    [ "$length" -le $((kept + kept / 20 + (96 << 20))) ] || fail "$length bytes for files of $kept"
    device=$(ublk add --read-only disk.vhdx)
    check_guest "$type" "$device" || fail "the file system is damaged"
    mount -t "$type" -o ro "$device" "$mnt"
    manifest "$mnt" | cmp - kept || fail "files have changed"
    umount "$mnt"
    ublk del "$device"
}

test_compact_shrinks_ext4() { shrink_a_disk ext4; }

full_test_compact_shrinks_xfs() { shrink_a_disk xfs; }

full_test_compact_shrinks_btrfs() {
    command -v mkfs.btrfs >/dev/null || { skipped "mkfs.btrfs is missing"; return 0; }
    shrink_a_disk btrfs
}

full_test_compact_shrinks_ntfs() {
    command -v mkntfs >/dev/null || { skipped "mkntfs is missing"; return 0; }
    shrink_a_disk ntfs3
}

# An image that is served is left alone, and the error says what to do.
test_operations_leave_a_served_image_alone() {
    local device
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 0 8 1
    for command in "compact disk.vhdx --zeros" "resize disk.vhdx --size 32M" "set disk.vhdx --disk-id new" \
        "move disk.vhdx /var/tmp" "salvage disk.vhdx copy.raw" "convert disk.vhdx copy.raw"; do
        # shellcheck disable=SC2086 # words of a command line
        ! ublk $command 2>said || fail "$command was done on a served image"
        grep -q "$device" said || { cat said; fail "$command does not name the device"; }
    done
    check_stamps "$device" 0 8 1
    ublk del "$device"
    ublk check disk.vhdx
}
