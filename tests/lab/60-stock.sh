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
    mkdir "$mnt/files"
    cp -L /usr/lib/*-linux-gnu/libc.so.6 /usr/lib/*-linux-gnu/libcrypto.so.3 "$VHDX_UBLK" "$mnt/files"
    rm "$mnt/files/libc.so.6"
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

# Without the feature, data is copied; `--zero-copy on` is an error.
test_stock_kernel_copies() {
    [[ ${VHDX_LAB_KERNEL:-} == debian-6.12* ]] || { note "only a kernel without the feature can say so"; return 0; }
    local device before
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx --recovery none)
    write_stamps "$device" 10 4 7
    sync "$device"
    kill_daemon disk.vhdx
    ublk del --force "$device"
    before=$(sha disk.vhdx)
    zero_copy=on
    ublk add disk.vhdx 2>said && fail "this kernel does not know how"
    grep -q 'Linux 6.16 or newer' said || fail "$(cat said)"
    [ "$(ublk list --json)" = "[]" ]
    [ "$(sha disk.vhdx)" = "$before" ] || fail "its log was replayed for nothing"
    ublk info --json disk.vhdx | tr -d ' \n' | grep -q '"state":"dirty"' || fail "the log was to be dirty"
}

# The kernel that people run, too, lets a device outlive its daemon, in either way.
test_stock_kernel_recovery() {
    local device how
    ublk create disk.vhdx --size 1G --block-size 1M
    for how in reissue queue; do
        device=$(ublk add disk.vhdx --queues 2 --recovery "$how")
        write_stamps "$device" 10 8 7
        kill_daemon disk.vhdx
        ublk recover "$device"
        check_stamps "$device" 10 8 7
        write_stamps "$device" 30 8 9
        kill_daemon disk.vhdx
        ublk recover --all
        check_stamps "$device" 30 8 9
        ublk del "$device"
    done
    qemu-img check -q disk.vhdx
}

# Without QUIESCE_DEV the old daemon holds requests, and the kernel repeats them to the new one.
test_stock_kernel_upgrade() {
    local device writer status=0 old features
    features=$(ublk features | grep QUIESCE || true)
    note "${features:-QUIESCE is not known to this kernel}"
    ublk create disk.vhdx --size 1G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2)
    write_stamps "$device" 900 8 7
    rm -f stop
    "${VHDX_STAMPER:-$(dirname "$VHDX_UBLK")/examples/stamper}" "$device" stop >stamper.log 2>&1 &
    writer=$!
    for _ in 1 2 3 4 5; do
        sleep 2
        old=$(daemon_pid)
        ublk upgrade "$device" >said 2>&1 || { status=1; break; }
        note "$(cat said)"
        [ "$(daemon_pid)" != "$old" ] || status=1
    done
    touch stop
    wait $writer || status=1
    note "$(tail -n 1 stamper.log)"
    [ $status -eq 0 ] || { cat said stamper.log /run/vhdx-ublk/*.log; fail "an upgrade was noticed"; }
    ublk del "$device"
    device=$(ublk add disk.vhdx --recovery queue)
    old=$(daemon_pid)
    if [[ ${VHDX_LAB_KERNEL:-} == debian-6.12* ]]; then
        ublk upgrade "$device" 2>said && fail "requests in flight would have failed"
        grep -q 'this kernel cannot quiesce it' said || fail "$(cat said)"
        [ "$(daemon_pid)" = "$old" ] || fail "the daemon has changed"
    fi
    ublk del "$device"
    qemu-img check -q disk.vhdx
}

# What needs the driver has it loaded, and says so; in a container without it, the reason and what helps.
test_stock_kernel_driver_is_loaded() {
    local device
    [[ ${VHDX_LAB_KERNEL:-} == debian-6.12* ]] || { note "the driver of this kernel is no module"; return 0; }
    ublk create disk.vhdx --size 1G
    rmmod ublk_drv
    [ ! -e /dev/ublk-control ]
    device=$(ublk add disk.vhdx 2>said)
    grep -qx 'vhdx-ublk: the kernel has loaded ublk_drv' said || fail "$(cat said)"
    mkfs.ext4 -q -F "$device"
    ublk del "$device"
    device=$(ublk add disk.vhdx 2>said)
    [ ! -s said ] || fail "it is there: $(cat said)"
    ublk del "$device"
    rmmod ublk_drv
    ublk mount disk.vhdx "$mnt"
    ublk umount "$mnt"
    rmmod ublk_drv
    ublk compact --trim disk.vhdx >said 2>&1 || fail "$(cat said)"
    rmmod ublk_drv
    echo >/run/.containerenv
    mount --bind /dev/null /sbin/modprobe
    ublk add disk.vhdx 2>said && fail "there is no driver"
    umount /sbin/modprobe
    rm /run/.containerenv
    grep -q 'a container cannot load a driver' said || fail "$(cat said)"
    modprobe ublk_drv
}

# Without the feature of newer kernels, none of the threads that begin to serve has the right to scan.
test_stock_kernel_leaves_partitions_alone() {
    local device
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx)
    printf 'label: gpt\nsize=8M\n' | sfdisk -q "$device"
    ublk del "$device"
    device=$(ublk add disk.vhdx)
    for _ in $(seq 50); do [ ! -e "/sys/class/block/${device#/dev/}p1" ] || break; sleep 0.1; done
    [ -e "/sys/class/block/${device#/dev/}p1" ] || fail "this kernel finds no partitions at all"
    ublk del "$device"
    device=$(ublk add --no-partitions disk.vhdx)
    sleep 2
    [ ! -e "/sys/class/block/${device#/dev/}p1" ] || fail "the kernel has read its partition table"
    ublk del "$device"
}

# A kernel that cannot change the size of a device says so, and the device keeps it.
test_stock_kernel_keeps_the_size() {
    [[ ${VHDX_LAB_KERNEL:-} == debian-6.12* ]] || { note "only a kernel without the feature can say so"; return 0; }
    local device
    ublk create disk.vhdx --size 1G --block-size 1M
    device=$(ublk add disk.vhdx)
    refused ublk resize "$device" --size 2G
    grep -q 'Linux 6.16' refusal || fail "$(cat refusal)"
    grep -q 'vhdx-ublk del' refusal || fail "$(cat refusal)"
    [ "$(blockdev --getsize64 "$device")" -eq $((1 << 30)) ] || fail "the size has changed"
    write_stamps "$device" 10 4 7
    ublk del "$device"
    ublk resize disk.vhdx --size 2G
    device=$(ublk add disk.vhdx)
    check_stamps "$device" 10 4 7
    ublk del "$device"
}
