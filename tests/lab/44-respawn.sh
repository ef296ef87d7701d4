# `add --respawn`: a device comes back by itself whenever its daemon dies, until it is removed.
# shellcheck shell=bash

health() { ublk list --json | tr -d ' \n' | grep -o '"health":"[a-z-]*"' | cut -d'"' -f4; }
keepers() { pgrep -fc -- 'respawn --mark' || true; }

# served_by_another PID: another daemon than PID serves the only device, without a hand.
served_by_another() {
    for _ in $(seq 300); do
        if [ "$(daemon_pid)" != "$1" ] && [ "$(health)" = ok ]; then return 0; fi
        sleep 0.1
    done
    ublk list
    cat /run/vhdx-ublk/*.log
    fail "the device did not come back"
}

no_keeper_is_left() {
    for _ in $(seq 100); do [ "$(keepers)" != 0 ] || return 0; sleep 0.1; done
    ps ax
    fail "the process that watched the device outlives it"
}

test_a_device_comes_back_ten_times() {
    local device writer status=0 old
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2 --respawn)
    [ "$(keepers)" = 1 ] || fail "no process watches it"
    rm -f stop
    stamper "$device" stop >stamper.log 2>&1 &
    writer=$!
    fio --name=verify --filename="$device" --direct=1 --ioengine=io_uring --iodepth=32 --rw=randrw --bs=4k \
        --offset=1536m --size=256m --verify=crc32c --verify_fatal=1 --verify_backlog=256 --time_based --runtime=25 \
        --minimal >fio.log 2>&1 &
    for ((i = 0; i < 10; i++)); do
        sleep "0.$((RANDOM % 9))"
        old=$(daemon_pid)
        kill -9 "$old"
        served_by_another "$old" || { status=1; break; }
    done
    touch stop
    wait $writer || status=1
    wait $! || { cut -c1-300 fio.log; status=1; }
    note "$i kills: $(tail -n 1 stamper.log)"
    [ $status -eq 0 ] || { cat stamper.log /run/vhdx-ublk/*.log; fail "a kill was noticed"; }
    ublk del "$device"
    no_keeper_is_left
    [ -z "$(ls /run/vhdx-ublk/*.respawn 2>/dev/null)" ]
    qemu-img check -q disk.vhdx
}

# It watches whichever process serves the device, and leaves it alone while that changes or is removed.
test_respawn_beside_other_commands() {
    local device old
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx --respawn)
    write_stamps "$device" 10 4 7
    for _ in 1 2 3; do
        old=$(daemon_pid)
        ublk upgrade "$device" >said
        served_by_another "$old"
        grep -q pause said
    done
    old=$(daemon_pid)
    kill -9 "$old"
    served_by_another "$old"
    check_stamps "$device" 10 4 7
    [ "$(keepers)" = 1 ]
    old=$(daemon_pid)
    kill -9 "$old"
    ublk recover "$device" >/dev/null 2>&1 || true # one of the two is first
    served_by_another "$old"
    check_stamps "$device" 10 4 7
    kill -STOP "$(daemon_pid)"
    ublk del --force --timeout 2 "$device" 2>/dev/null || true
    no_keeper_is_left
    [ "$(ublk list --json)" = "[]" ] || { ublk list; fail "it has come back"; }
    device=$(ublk add --read-only disk.vhdx --respawn)
    old=$(daemon_pid)
    kill -9 "$old"
    ublk del "$device" 2>/dev/null || ublk del "$device"
    no_keeper_is_left
    [ "$(ublk list --json)" = "[]" ] || { ublk list; fail "it has come back"; }
    qemu-img check -q disk.vhdx
}

# After an upgrade a keeper of the new program has the device; one that does not read the entry of that says so once.
test_respawn_follows_an_upgrade() {
    local device old log=/run/vhdx-ublk/0.log entry=/run/vhdx-ublk/0.json
    cp "$VHDX_UBLK" new
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx --respawn)
    write_stamps "$device" 10 4 7
    ublk upgrade "$device" --binary new
    within 20 kept_by new
    [ "$(keepers)" = 1 ]
    rm new
    old=$(daemon_pid)
    kill -9 "$old"
    served_by_another "$old"
    check_stamps "$device" 10 4 7
    ublk upgrade "$device"
    within 20 kept_by "${VHDX_UBLK##*/}"
    sed -i 's/"format": 1/"format": 2/' $entry
    kill -9 "$(pgrep -f -- 'respawn --mark')"
    "$VHDX_UBLK" respawn --mark "$(grep -o '"mark": [0-9]*' $entry | grep -o '[0-9]*$')" -- 0 >/dev/null &
    within 30 grep -q "$device is not served again when its daemon dies: .*has format 2" $log
    no_keeper_is_left
    sed -i 's/"format": 2/"format": 1/' $entry
    check_stamps "$device" 10 4 7
    ublk del "$device"
    qemu-img check -q disk.vhdx
}

kept_by() { [[ "$(readlink "/proc/$(pgrep -f -- 'respawn --mark')/exe")" == */$1 ]]; }

# within SECONDS COMMAND...: until it succeeds.
within() {
    local n
    for ((n = 0; n < $1 * 20; n++)); do ! "${@:2}" 2>/dev/null || return 0; sleep 0.05; done
    cat /run/vhdx-ublk/*.log
    fail "not within $1 s: ${*:2}"
}

# The image of one device lies on the other: whoever is killed, both come back, and neither keeper waits for the other.
test_respawn_of_stacked_devices() {
    local below above began
    ublk create below.vhdx --size 2G
    below=$(ublk add below.vhdx --respawn)
    mkfs.ext4 -q -E lazy_itable_init=0 "$below"
    mount "$below" "$mnt"
    ublk create "$mnt/above.vhdx" --size 256M
    above=$(ublk add "$mnt/above.vhdx" --respawn)
    write_stamps "$above" 10 4 7
    for _ in 1 2 3; do
        began=$SECONDS
        # The keeper of the upper one is the first to see a death.
        kill -STOP "$(pgrep -f -- "respawn --mark=.* -- ${below#/dev/ublkb}\$")"
        ublk list --json | jq '.[].pid' | xargs kill -9
        sleep 1
        kill -CONT "$(pgrep -f -- "respawn --mark=.* -- ${below#/dev/ublkb}\$")"
        within 40 both_are_served
        note "both were served again after $((SECONDS - began)) s"
        check_stamps "$above" 10 4 7
    done
    ublk del "$above"
    umount "$mnt"
    ublk del "$below"
    no_keeper_is_left
    qemu-img check -q below.vhdx
}

both_are_served() { [ "$(ublk list --json | jq -r '[.[].health] | join(" ")')" = 'ok ok' ]; }

# What cannot be served again is given up with one line, and waits.
test_respawn_gives_up() {
    local device mark
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 4 7
    mark=$(grep -o '"mark": [0-9]*' /run/vhdx-ublk/0.json | grep -o '[0-9]*$')
    "$VHDX_UBLK" respawn --mark "$mark" --attempts 3 -- 0 >begun &
    for _ in $(seq 100); do ! grep -q ready begun || break; sleep 0.1; done
    mv disk.vhdx away.vhdx
    kill -9 "$(daemon_pid)"
    no_keeper_is_left
    [ "$(grep -c 'is not served again: 3 attempts in a row have failed' /run/vhdx-ublk/0.log)" = 1 ] ||
        fail "$(cat /run/vhdx-ublk/0.log)"
    [ "$(health)" = waiting ]
    mv away.vhdx disk.vhdx
    ublk recover "$device"
    check_stamps "$device" 10 4 7
    ublk del "$device"
}

test_respawn_is_refused_where_it_is_of_no_use() {
    ublk create disk.vhdx --size 1G
    ublk add disk.vhdx --respawn --recovery none 2>said && fail "it cannot be recovered"
    grep -q 'cannot be served again' said || fail "$(cat said)"
    NOTIFY_SOCKET=@manager ublk add disk.vhdx --respawn 2>said && fail "a service manager does the same"
    grep -q 'Restart=on-failure' said || fail "$(cat said)"
    [ "$(ublk list --json)" = "[]" ]
}
