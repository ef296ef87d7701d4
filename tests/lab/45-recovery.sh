# The daemon is killed again and again while a verifying writer works: nothing acknowledged is lost.
# shellcheck shell=bash

cycles() { if [ -n "$FULL" ]; then echo 200; elif [ "$zero_copy" = auto ]; then echo 50; else echo 20; fi; }

# kill_again_and_again RECOVERY CYCLES [stamper options]
kill_again_and_again() {
    local how=$1 cycles=$2 device pid writer status=0
    shift 2
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2 --recovery "$how")
    rm -f stop
    stamper "$device" stop "$@" >stamper.log 2>&1 &
    writer=$!
    for ((cycle = 0; cycle < cycles; cycle++)); do
        sleep "0.$((RANDOM % 4))$((RANDOM % 10))"
        pid=$(daemon_pid)
        kill -9 "$pid"
        ublk recover "$device" >/dev/null || fail "not recovered after kill $cycle"
    done
    touch stop
    wait "$writer" || status=1
    note "$cycle kills, recovery $how: $(tail -n 1 stamper.log)"
    [ $status -eq 0 ] || { cat stamper.log; cat /run/vhdx-ublk/*.log; fail "something was lost"; }
    ublk del "$device"
    qemu-img check -q disk.vhdx
    [ -z "$(ls /run/vhdx-ublk/*.session 2>/dev/null)" ] || fail "the session outlives the clean close"
}

test_recovery_reissue_loses_nothing() { kill_again_and_again reissue "$(cycles)"; }
test_recovery_queue_loses_nothing() { kill_again_and_again queue "$(cycles)" --errors; }

# Whatever several queues read at once, there is an order of all requests that explains it, kills included.
test_recovery_keeps_one_order() {
    local device writer status=0 until died
    ublk create disk.vhdx --size 1G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2 --recovery reissue)
    rm -f stop
    : >deaths
    "$(dirname "$VHDX_UBLK")/examples/historian" "$device" stop deaths >historian.log 2>&1 &
    writer=$!
    until=$((SECONDS + ${FULL:-0} * 580 + 20))
    while [ $SECONDS -lt $until ]; do
        sleep "0.$((RANDOM % 10))"
        died=$(date +%s%N)
        kill -9 "$(daemon_pid)"
        ublk recover "$device" >/dev/null || fail "not recovered"
        echo "$died $(date +%s%N)" >>deaths
    done
    touch stop
    wait "$writer" || status=1
    note "$(tail -n 1 historian.log)"
    [ $status -eq 0 ] || { tail -n 20 historian.log; fail "requests have come in no order"; }
    ublk del "$device"
}

# What was acknowledged and never flushed is in the image even if the device is never recovered.
test_recovery_by_deleting_and_adding() {
    local device
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 40 7
    kill -9 "$(daemon_pid)"
    ublk add disk.vhdx 2>said && fail "an image whose device waits was added again"
    grep -q "vhdx-ublk recover $device" said
    ublk del --force "$device"
    device=$(ublk add --read-only disk.vhdx)
    check_stamps "$device" 10 40 7
    ublk del "$device"
}

# A device that has failed keeps its entry: what another one of the image has left is committed all the same.
test_recovery_by_deleting_beside_a_failed_device() {
    local failed device
    ublk create disk.vhdx --size 1G
    failed=$(ublk add disk.vhdx --recovery none)
    kill_daemon disk.vhdx
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 40 7
    kill -9 "$(ublk list --json | jq -r ".[] | select(.device == \"$device\") | .pid")"
    ublk del --force "$device"
    [ -z "$(ls /run/vhdx-ublk/*.session 2>/dev/null)" ] || fail "the image is not closed"
    ublk del --force "$failed"
    device=$(ublk add --read-only disk.vhdx)
    check_stamps "$device" 10 40 7
    ublk del "$device"
}

# A session that does not fit is refused, and nothing is made up.
test_recovery_refuses_what_does_not_fit() {
    local device
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 4 7
    sync "$device"
    kill_daemon disk.vhdx
    qemu-img check -q -r all disk.vhdx || true
    qemu-io -f vhdx -c 'write -P 1 100M 4k' disk.vhdx >/dev/null
    ublk recover "$device" 2>said && fail "an image that somebody else wrote was recovered"
    grep -q "another program has written the image" said
    grep -q "accept-loss" said
    ublk recover --accept-loss "$device"
    check_stamps "$device" 10 4 7
    qemu-io -r -f raw -c 'read -P 1 100M 4k' "$device" | grep -q '^read 4096'
    kill_daemon disk.vhdx
    rm /run/vhdx-ublk/*.session
    ublk recover "$device" 2>said && fail "a device without a session was recovered"
    grep -q "no session file" said
    ublk del --force "$device"
}

# hold MODE: another program has the image open, and locks what QEMU would.
hold() {
    python3 -c '
import fcntl, sys, time
image = open("disk.vhdx", sys.argv[1])
for byte in (100, 200):
    fcntl.lockf(image, fcntl.LOCK_SH, 8, byte)
print("locked", flush=True)
time.sleep(120)' "$1" >held &
    for _ in $(seq 200); do
        ! grep -q locked held || return 0
        sleep 0.05
    done
    fail "the image could not be locked"
}

# A lock that a mere reader holds keeps no device waiting; one of a program that can write the image does.
test_recovery_goes_past_readers() {
    local device
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 4 7
    kill_daemon disk.vhdx
    hold r+b
    ublk recover "$device" 2>said && fail "recovered beside a program that can write the image"
    grep -q "(pid $!)" said
    kill $!
    wait $! || true
    hold rb
    ublk recover "$device" 2>said
    grep -q "locked by readers, which will see it change: .*(pid $!)" said
    check_stamps "$device" 10 4 7
    write_stamps "$device" 20 4 8
    # The next daemon must still be told from the reader.
    kill -9 "$(daemon_pid)"
    ublk recover "$device" 2>said
    check_stamps "$device" 20 4 8
    kill $!
    ublk del "$device"
    qemu-img check -q disk.vhdx
}

# A read-only device is recovered too; an image that changed meanwhile is not served under its users.
test_recovery_of_a_read_only_device() {
    local device
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 4 7
    ublk del "$device"
    device=$(ublk add --read-only disk.vhdx)
    kill_daemon disk.vhdx
    ublk recover --all
    check_stamps "$device" 10 4 7
    kill_daemon disk.vhdx
    qemu-io -f vhdx -c 'write -P 1 100M 4k' disk.vhdx >/dev/null
    ublk recover "$device" 2>said && fail "another disk was put under the device's users"
    grep -q "another program has written the image" said
    ublk del --force "$device"
}
