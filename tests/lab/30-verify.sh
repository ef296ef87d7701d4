# fio writes, trims and verifies through several queues.
# shellcheck shell=bash

# Every byte that four jobs have written, each in a part of its own, is read back once.
verify_job() {
    local device=$1 sector=$2
    fio --name=verify --filename="$device" --direct=1 --ioengine=io_uring --iodepth=32 --numjobs=4 \
        --rw=randrw --bsrange="$sector"-1m --blockalign="$sector" --verify=crc32c --verify_fatal=1 --size=192m \
        --offset_increment=256m --serialize_overlap=1 --group_reporting --minimal >fio.log 2>&1 ||
        fail "$(cut -c1-300 fio.log)"
}

test_verify_mixed_sizes_two_queues() {
    local device sector
    for sector in 512 4096; do
        ublk create disk.vhdx --size 2G --block-size 1M --logical-sector-size $sector
        device=$(ublk add disk.vhdx --queues 2)
        verify_job "$device" $sector
        ublk del "$device"
        [ $sector != 512 ] || qemu-img check -q disk.vhdx
        rm disk.vhdx
    done
}

# Trims run in their own part of the disk; what is written again after a trim verifies.
test_verify_with_trims() {
    local device
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2)
    fio --filename="$device" --direct=1 --ioengine=io_uring --iodepth=32 --group_reporting --minimal \
        --name=verify --rw=randwrite --bsrange=512-1m --blockalign=512 --verify=crc32c --verify_fatal=1 \
        --size=256m --numjobs=3 --offset_increment=300m --serialize_overlap=1 \
        --name=trim --rw=randtrim --bsrange=64k-8m --blockalign=64k --offset=1200m --size=512m --io_size=8g --verify=0 \
        >fio.log 2>&1 || fail "$(cut -c1-300 fio.log)"
    ublk del "$device"
    qemu-img check -q disk.vhdx
    note "$(ublk info --json disk.vhdx | tr -d ' \n' | grep -o '"blocks":{[^}]*}')"
}
