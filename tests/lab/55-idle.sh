# What a device costs that has nothing to do, and what it costs in the long run.
# shellcheck shell=bash

# Context switches of all threads of a process, but for those that the kernel keeps for its rings: of these the last
# one looks around every five seconds, once a sync has brought it into being.
switches() {
    awk 'FNR == 1 { ours = $2 !~ /^iou-wrk/ } /ctxt_switches/ && ours { n += $2 } END { print n }' \
        "/proc/$1"/task/*/status
}
field_kb() { sed -n "s/^$2:[[:space:]]*\([0-9]*\) kB/\1/p" "/proc/$1/status"; }

# Whether it was only read, written, or written and flushed: no thread wakes up.
test_idle_device_never_wakes_up() {
    local device pid before after
    ublk create disk.vhdx --size 1G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2)
    pid=$(daemon_pid)
    for work in "iflag=direct if=$device of=/dev/null" "oflag=direct if=/dev/urandom of=$device" \
        "oflag=direct conv=fsync seek=64 if=/dev/urandom of=$device"; do
        # shellcheck disable=SC2086
        dd bs=1M count=32 status=none $work
        sleep 1
        before=$(switches "$pid")
        sleep 5
        after=$(switches "$pid")
        [ "$before" -eq "$after" ] || fail "after dd $work: $((after - before)) context switches in 5 s"
    done
    ublk del "$device"
}

# All memory that the daemon has touched stays in memory, its buffers and its block map included.
test_idle_daemon_is_locked_in_memory() {
    local device pid depth=()
    ublk create disk.vhdx --size 1T --block-size 2M
    zero_copy=off
    device=$(ublk add disk.vhdx --queues 1)
    pid=$(daemon_pid)
    note "resident $(field_kb "$pid" VmRSS) kB, locked $(field_kb "$pid" VmLck) kB"
    [ "$(field_kb "$pid" VmLck)" -ge $((32 << 10)) ] || fail "the buffers alone have 32 MiB"
    ublk del "$device"
}

# One page of the image in the host's cache would make every direct write end on a thread of its own.
test_host_caches_nothing_of_a_served_image() {
    local device
    ublk create disk.vhdx --size 1G --block-size 1M
    cat disk.vhdx >/dev/null
    [ "$(fincore --noheadings --output PAGES disk.vhdx)" -gt 0 ] || fail "fincore sees nothing"
    device=$(ublk add disk.vhdx)
    dd if=/dev/urandom of="$device" bs=64K count=100 oflag=direct conv=fsync 2>/dev/null
    blkdiscard --offset 1M --length 2M "$device"
    sync "$device"
    [ "$(fincore --noheadings --output PAGES disk.vhdx)" -eq 0 ] || fail "$(fincore disk.vhdx)"
    ublk del "$device"
}

# A hundred thousand requests of every kind: what is remembered of one that has ended is nothing.
test_memory_does_not_grow_with_time() {
    local device pid before after round depth=()
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2)
    pid=$(daemon_pid)
    for round in 1 2 3; do
        fio --name=work --filename="$device" --direct=1 --ioengine=io_uring --iodepth=32 --numjobs=2 --rw=randrw \
            --bs=4k --number_ios=20000 --norandommap=1 --fsync=500 --minimal >/dev/null
        blkdiscard "$device"
        [ $round -gt 1 ] || before=$(field_kb "$pid" VmRSS)
    done
    after=$(field_kb "$pid" VmRSS)
    note "resident: $before kB after the first round, $after kB after the third"
    [ $((after - before)) -le 1024 ] || fail "it has grown by $((after - before)) kB"
    ublk del "$device"
}
