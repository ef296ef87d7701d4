# What is shown of devices is what they have done.
# shellcheck shell=bash

# stat_of PATH: a value of `stats --json` of the one device, such as .requests.read
stat_of() {
    ublk stats "$device" --json | python3 -c '
import json, sys
value = json.load(sys.stdin)[0]
for key in sys.argv[1].strip(".").split("."):
    value = value[int(key)] if isinstance(value, list) else value[key]
print(json.dumps(value))' "$1"
}

# counts PATH VALUE: the value is that.
counts() {
    local found
    found=$(stat_of "$1")
    [ "$found" = "$2" ] || fail "$(ublk stats "$device" --json)"$'\n'"$1 is $found, not $2"
}

# waits_for REASON: how many requests have waited for that.
waits_for() {
    ublk stats "$device" --json | python3 -c '
import json, sys
waits = {wait["for"]: wait for wait in json.load(sys.stdin)[0]["waits"]}
wait = waits[sys.argv[1]]
assert sum(wait["buckets"]) == wait["count"] and wait["waiting"] == 0, wait
print(wait["count"])' "$1"
}

# Nothing but what a test requests comes to the device: udev has no part in the laboratory, and what scanning for
# partitions has read is subtracted.
test_stats_count_what_was_done() {
    local device read flushes parent wakes
    # The kernel would look for partitions beside the test.
    ublk create disk.vhdx --size 1G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2 --no-partitions)
    counts requests.write 0
    counts engine.grants 0
    # 64 writes of 64 KiB, each to a block of its own.
    fio --name=w --filename="$device" --rw=write:3840k --bs=64k --size=256M --io_size=4M --direct=1 \
        --ioengine=psync >fio.log
    counts requests.write 64
    counts written_bytes $((4 << 20))
    counts engine.grants 64
    [ "$(waits_for space)" -ge 1 ] || fail "the first write found space that was set aside"
    [ "$(waits_for space)" -le 4 ] || fail "$(waits_for space) of 64 first writes waited for space"
    [ "$(waits_for session)" = 1 ] || fail "the session is opened once"
    [ "$(stat_of wakes)" -gt 0 ] || fail "the engine gave space, and no thread was woken"
    # An overwrite, a read and a discard of space that is not there wake no other thread.
    wakes=$(stat_of wakes)
    dd if=/dev/urandom of="$device" bs=64k count=1 seek=0 oflag=direct conv=notrunc status=none
    dd if="$device" of=/dev/null bs=64k count=64 iflag=direct status=none
    blkdiscard --offset 512M --length 256M "$device"
    counts wakes "$wakes"
    counts requests.write 65
    counts engine.grants 64
    read=$(stat_of requests.read)
    flushes=$(stat_of requests.flush)
    for _ in 1 2 3; do sync "$device"; done
    dd if="$device" of=/dev/null bs=64k count=2 iflag=direct status=none
    counts requests.read $((read + 2))
    counts requests.failed 0
    [ "$(stat_of requests.flush)" -ge $((flushes + 1)) ] || fail "no flush was counted"
    flushes=$(stat_of requests.flush)
    [ "$(stat_of syncs.count)" = $(($(stat_of engine.syncs) + flushes - $(waits_for flush))) ] ||
        fail "each sync is timed once: $(ublk stats "$device" --json)"
    [ "$(stat_of engine.syncs)" -ge 1 ] && [ "$(stat_of engine.pages)" -ge 1 ] || fail "nothing was committed"
    ublk stats "$device" | grep -q '64 blocks got space' || fail "the text says something else"
    # A snapshot begins no count anew, and what is read from the frozen image is the frozen image's.
    parent=$(stat_of read.0.bytes)
    ublk snapshot "$device" child.vhdx
    counts engine.grants 64
    dd if="$device" of=/dev/null bs=64k count=1 iflag=direct status=none
    counts read.1.bytes $((parent + 65536))
    counts read.0.bytes 0
    [ "$(stat_of read.1.image)" = "\"$PWD/disk.vhdx\"" ] || fail "the parent is not named"
    timeout 3 "$VHDX_UBLK" stats --watch >watch.log || [ $? = 124 ]
    grep -q SYNC-MEAN watch.log && grep -q "^ *$device " watch.log || fail "--watch shows nothing: $(cat watch.log)"
    ublk del "$device"
}

# Space is set aside for first writes: behind the first of all, only their flushes wake threads.
test_a_first_write_wakes_no_thread() {
    local device wakes
    ublk create disk.vhdx --size 1G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2 --no-partitions)
    write_and_sync 0 1
    wakes=$(stat_of wakes)
    write_and_sync 1 16
    counts engine.grants 17
    [ "$(waits_for space)" = 1 ] || fail "a first write asked for space: $(ublk stats "$device" --json)"
    note "16 first writes and their flushes: $(($(stat_of wakes) - wakes)) wakes"
    [ $(($(stat_of wakes) - wakes)) -le 32 ] || fail "more than the flushes woke a thread"
    wakes=$(stat_of wakes)
    fio --name=w --filename="$device" --rw=write:1020k --bs=4k --offset=64M --size=32M --io_size=128k --direct=1 \
        --ioengine=psync >fio.log
    counts engine.grants 49
    note "32 first writes: $(($(stat_of wakes) - wakes)) wakes"
    [ $(($(stat_of wakes) - wakes)) -le 6 ] || fail "a first write in five woke a thread"
    ublk del "$device"
    # What was set aside and not used is not in the file.
    [ "$(stat -c %s disk.vhdx)" -lt $((56 << 20)) ] || fail "the file is $(stat -c %s disk.vhdx) bytes long"
}

# An overwrite and the flush behind it are the queue's own affair, on each queue; the flush behind a first write is not.
test_a_flush_with_nothing_to_log_wakes_no_thread() {
    local device wakes flushes syncs engine cpu
    ublk create disk.vhdx --size 1G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2 --no-partitions)
    write_and_sync 0 4
    wakes=$(stat_of wakes)
    flushes=$(stat_of requests.flush)
    syncs=$(stat_of syncs.count)
    engine=$(stat_of engine.syncs)
    for cpu in 0 1; do taskset -c $cpu bash -c "$(declare -f write_and_sync); device=$device write_and_sync 0 4"; done
    counts wakes "$wakes"
    counts engine.syncs "$engine"
    [ "$(stat_of requests.flush)" -ge $((flushes + 8)) ] || fail "no flush came: $(ublk stats "$device" --json)"
    counts syncs.count $((syncs + $(stat_of requests.flush) - flushes))
    write_and_sync 5 1
    [ "$(stat_of wakes)" -gt "$wakes" ] || fail "a first write was flushed, and no thread was woken"
    [ "$(stat_of engine.syncs)" -gt "$engine" ] || fail "a first write was not committed"
    note "a first write and its flush: $(($(stat_of wakes) - wakes)) wakes"
    # The leaf of a snapshot is another file. Its blocks become whole, or each write would have a bit to log.
    ublk snapshot "$device" child.vhdx
    dd if=/dev/urandom of="$device" bs=1M count=4 oflag=direct conv=notrunc,fsync status=none
    write_and_sync 0 4
    wakes=$(stat_of wakes)
    engine=$(stat_of engine.syncs)
    write_and_sync 0 4
    counts wakes "$wakes"
    counts engine.syncs "$engine"
    ublk del "$device"
}

# write_and_sync FIRST COUNT: writes 4 KiB into each of these blocks of 1 MiB, and flushes behind each.
write_and_sync() {
    local block
    for ((block = $1; block < $1 + $2; block++)); do
        dd if=/dev/urandom of="$device" bs=4k count=1 seek=$((block * 256)) oflag=direct conv=notrunc,fsync status=none
    done
}

# Monitoring sees a device that has failed, and one whose daemon is gone; the format is judged by its own parser.
test_metrics_show_a_device_that_has_failed() {
    local device
    : "${VHDX_READERS:?a Python with prometheus_client}"
    truncate -s 300M host.img
    host_loop=$(losetup --show -f host.img)
    mkfs.ext4 -q -F -O ^has_journal "$host_loop"
    host_table="0 $(blockdev --getsz "$host_loop")"
    dmsetup create vhdx-ublk-watch --table "$host_table linear $host_loop 0"
    dmsetup mknodes vhdx-ublk-watch
    mkdir -p host
    mount /dev/mapper/vhdx-ublk-watch host
    ublk create host/disk.vhdx --size 1G --block-size 1M
    device=$(ublk add host/disk.vhdx)
    write_stamps "$device" 0 4 1
    sync "$device"
    ublk metrics --textfile vhdx.prom
    parse vhdx.prom 'value("vhdx_ublk_poisoned", "") == 0 and value("vhdx_ublk_first_writes_total", "") == 4'
    parse vhdx.prom 'value("vhdx_ublk_sync_seconds_count", "") >= value("vhdx_ublk_syncs_total", "") > 0'
    # A sync that the host's disk fails poisons the device.
    dmsetup suspend --noflush --nolockfs vhdx-ublk-watch
    echo "$host_table flakey $host_loop 0 0 600 1 error_writes" | dmsetup reload vhdx-ublk-watch
    dmsetup resume vhdx-ublk-watch
    write_stamps "$device" 8 1 2 || true
    ! timeout 60 sync "$device" || fail "a flush succeeded on a disk that fails"
    ublk metrics --textfile vhdx.prom
    parse vhdx.prom 'value("vhdx_ublk_poisoned", "") == 1 and value("vhdx_ublk_up", "") == 1'
    parse vhdx.prom 'value("vhdx_ublk_requests_failed_total", "") >= 1'
    ublk stats "$device" | grep -q '^health: *poisoned' || fail "stats does not say that it is poisoned"
    ! ublk list --check >/dev/null || fail "list --check is content"
    kill -9 "$(daemon_pid)"
    for _ in $(seq 100); do ublk metrics >now.prom; grep -q 'vhdx_ublk_up{.*} 0' now.prom && break; sleep 0.1; done
    parse now.prom 'value("vhdx_ublk_up", "") == 0'
    ! ublk stats "$device" 2>error.log || fail "stats of a dead daemon"
    grep -q 'try: .*recover' error.log || fail "no remedy: $(cat error.log)"
    ublk del --force "$device" || true
}

# parse FILE CONDITION: the file is OpenMetrics, and the condition on value(SAMPLE, LABEL-VALUE) holds.
parse() {
    "$VHDX_READERS" - "$1" "$2" <<'END'
import sys

from prometheus_client.openmetrics.parser import text_string_to_metric_families

with open(sys.argv[1]) as file:
    families = list(text_string_to_metric_families(file.read()))
samples = [sample for family in families for sample in family.samples]


def value(name, label):
    found = [s.value for s in samples if s.name == name and (not label or label in s.labels.values())]
    assert len(found) == 1, (name, found)
    return found[0]


assert eval(sys.argv[2]), (sys.argv[2], [s for s in samples if "bucket" not in s.name])
END
}

host_loop=

take_down() {
    umount -q host || true
    dmsetup resume vhdx-ublk-watch 2>/dev/null || true
    dmsetup remove --retry vhdx-ublk-watch 2>/dev/null || true
    [ -z "$host_loop" ] || losetup -d "$host_loop" || true
}

# Whatever the machine lacks, the laboratory has what a device needs.
test_doctor_on_this_kernel() {
    local image=$PWD/disk.vhdx device
    ublk doctor --json >machine.json || true
    judge machine.json kernel driver permissions io_uring 'locked memory' daemons sessions
    ublk create "$image" --size 1G
    ublk doctor "$image" --json >image.json || true
    judge image.json image lock chain 'file system' 'direct I/O' 'giving space back' 'sparse for Windows'
    device=$(ublk add "$image")
    ublk doctor "$image" --json >served.json || true
    judge served.json image lock
    grep -q "in use by $device" served.json || fail "who has the image: $(cat served.json)"
    ublk del "$device"
}

# judge FILE CHECK...: these checks are there, and fine.
judge() {
    python3 - "$@" <<'END'
import json
import sys

with open(sys.argv[1]) as file:
    checks = {check["check"]: check for check in json.load(file)}
for name in sys.argv[2:]:
    assert checks[name]["fine"], checks[name]
END
}
