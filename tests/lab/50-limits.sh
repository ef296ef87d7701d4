# The format's largest disk, hosts that can do little, and everything that must be refused.
# shellcheck shell=bash

test_limit_64_tib_in_1_mib_blocks() {
    local device pid started
    started=$(date +%s%N)
    ublk create disk.vhdx --size 64T --block-size 1M
    note "create: $((($(date +%s%N) - started) / 1000000)) ms"
    ublk info disk.vhdx >/dev/null
    started=$(date +%s%N)
    device=$(ublk add disk.vhdx)
    note "add: $((($(date +%s%N) - started) / 1000000)) ms"
    [ "$(blockdev --getsize64 "$device")" = $((64 << 40)) ]
    stamps x 0 1 9 | dd of="$device" bs=1M seek=$((64 * 1024 * 1024 - 1)) oflag=direct iflag=fullblock status=none
    pid=$(ublk list --json | tr -d ' \n' | grep -o '"pid":[0-9]*' | cut -d: -f2)
    note "resident after one write: $(sed -n 's/^VmRSS: *//p' "/proc/$pid/status")"
    kill -9 "$pid"
    started=$(date +%s%N)
    ublk recover "$device" >/dev/null
    note "recover: $((($(date +%s%N) - started) / 1000000)) ms"
    check_stamps "$device" $((64 * 1024 * 1024 - 1)) 1 9
    ublk upgrade "$device" >said
    note "$(cat said)"
    check_stamps "$device" $((64 * 1024 * 1024 - 1)) 1 9
    pid=$(ublk list --json | tr -d ' \n' | grep -o '"pid":[0-9]*' | cut -d: -f2)
    note "resident after recovery and upgrade: $(sed -n 's/^VmRSS: *//p' "/proc/$pid/status")"
    ublk del "$device"
    note "host_bytes: $(host_bytes disk.vhdx)"
    device=$(ublk add --read-only disk.vhdx)
    check_stamps "$device" $((64 * 1024 * 1024 - 1)) 1 9
    ublk del "$device"
}

# No direct I/O, no fallocate: the laboratory's root file system is such a host.
test_limit_host_without_direct_io() {
    local device folder
    [[ ${VHDX_LAB_KERNEL:-} == uml* ]] || { note "only the user-mode kernel has such a host"; return 0; }
    folder=$(mktemp -d "${TMPDIR:-/tmp}/vhdx-ublk-host.XXXXXX")
    ublk create "$folder/disk.vhdx" --size 1G --block-size 1M
    device=$(ublk add "$folder/disk.vhdx")
    mkfs.ext4 -q -F "$device"
    mount "$device" "$mnt"
    copy_real_files 30 "$mnt/files"
    manifest "$mnt/files" >before
    rm -rf "$mnt/files/usr/bin"
    fstrim "$mnt" || true
    copy_real_files 30 "$mnt/files"
    umount "$mnt"
    write_stamps "$device" 900 4 3
    blkdiscard -z -o $((901 << 20)) -l $((1 << 20)) "$device"
    ublk del "$device"
    qemu-img check -q "$folder/disk.vhdx"
    device=$(ublk add --read-only "$folder/disk.vhdx")
    mount -o ro,noload "$device" "$mnt"
    manifest "$mnt/files" >after
    umount "$mnt"
    cmp <(dd if="$device" bs=1M skip=901 count=1 status=none) <(head -c 1M /dev/zero) || fail "zeros were not written"
    ublk del "$device"
    rm -r "$folder"
    cmp before after || fail "files differ"
}

# A 512-byte guest on a host whose direct I/O wants 4096.
test_limit_host_with_4096_byte_sectors() {
    local device host
    truncate -s 2G host.img
    host=$(losetup --show -f -b 4096 --direct-io=on host.img 2>/dev/null || losetup --show -f -b 4096 host.img)
    mkfs.ext4 -q -F "$host"
    mkdir -p host
    mount "$host" host
    ublk create host/disk.vhdx --size 1G --block-size 1M
    device=$(ublk add host/disk.vhdx --queues 2)
    [ "$(blockdev --getss "$device")" = 512 ]
    fio --name=v --filename="$device" --direct=1 --ioengine=io_uring --iodepth=16 --numjobs=2 --rw=randwrite \
        --bs=512 --size=8m --offset_increment=64m --verify=crc32c --verify_fatal=1 --minimal >fio.log 2>&1 ||
        fail "$(tail fio.log)"
    ublk del "$device"
    qemu-img check -q host/disk.vhdx
    umount host
    losetup -d "$host"
}

refuses() {
    local word=$1 message status=0
    shift
    message=$(ublk "$@" 2>&1) || status=$?
    [ $status = 1 ] || fail "vhdx-ublk $*: exit status $status: $message"
    [[ $message == *"$word"* ]] || fail "vhdx-ublk $*: no word of \"$word\": $message"
}

test_refusals() {
    local device
    head -c 4M /dev/urandom >noise.vhdx
    refuses "noise.vhdx" add noise.vhdx
    ublk create disk.vhdx --size 1G
    refuses "there is a file already" create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    refuses "open" add disk.vhdx
    refuses "open" add --read-only disk.vhdx
    ! qemu-io -f vhdx -c 'read 0 512' disk.vhdx >/dev/null 2>&1 || fail "QEMU opened an image we write"
    mkfs.ext4 -q -F "$device"
    mount "$device" "$mnt"
    refuses "$mnt" del "$device"
    umount "$mnt"
    exec 9<"$device"
    refuses "pid" del "$device"
    exec 9<&-
    refuses "" add --id "${device#/dev/ublkb}" noise.vhdx
    ublk del disk.vhdx
    refuses "no" del "$device"
    [ "$(ublk list --json)" = "[]" ]
}

# No room on the host: the write fails, the device stays usable, what was flushed is there.
test_limit_no_space() {
    local device
    truncate -s 96M small.img
    mkfs.ext4 -q -F small.img
    mkdir -p small
    mount -o loop small.img small
    ublk create small/disk.vhdx --size 1G --block-size 1M
    device=$(ublk add small/disk.vhdx)
    write_stamps "$device" 0 8 5
    sync "$device"
    ! dd if=/dev/zero of="$device" bs=1M seek=16 count=512 oflag=direct status=none 2>/dev/null ||
        fail "1 GiB fits in 96 MiB"
    check_stamps "$device" 0 8 5
    blkdiscard -o $((16 << 20)) -l $((512 << 20)) "$device"
    sync "$device"
    write_stamps "$device" 100 4 6
    check_stamps "$device" 100 4 6
    ublk del "$device"
    qemu-img check -q small/disk.vhdx
    umount small
}
