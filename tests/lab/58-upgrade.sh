# Devices change their program while they are in use: no error, nothing lost, and a way back.
# shellcheck shell=bash

# pid_of DEVICE: its daemon.
pid_of() {
    ublk list --json | tr -d ' \n' | grep -o "\"device\":\"$1\".*" | grep -o '"pid":[0-9]*' | head -n 1 | cut -d: -f2
}

# upgrade DEVICE [OPTIONS]: with another process afterwards; its pause is noted.
longest=0
upgrade() {
    local device=$1 before after pause
    before=$(pid_of "$device")
    pause=$(ublk upgrade "$@" --json | tr -d ' \n' | grep -o '"pause_us":[0-9]*' | cut -d: -f2)
    after=$(pid_of "$device")
    [ "$before" != "$after" ] || fail "the daemon of $device is still $before"
    [ "$pause" -le "$longest" ] || longest=$pause
}

# verified_upgrades COUNT [add options]: under a verifying writer and fio.
verified_upgrades() {
    local count=$1 device writer status=0
    shift
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2 "$@")
    rm -f stop
    stamper "$device" stop >stamper.log 2>&1 &
    writer=$!
    for ((i = 0; i < count; i++)); do
        sleep "0.$((RANDOM % 4))"
        upgrade "$device" || { status=1; break; }
    done
    touch stop
    wait "$writer" || status=1
    note "$count upgrades ${*:-}: longest pause $((longest / 1000)) ms; $(tail -n 1 stamper.log)"
    [ $status -eq 0 ] || { cat stamper.log /run/vhdx-ublk/*.log; fail "an upgrade was noticed"; }
    ublk del "$device"
    qemu-img check -q disk.vhdx
    [ -z "$(ls /run/vhdx-ublk/*.session 2>/dev/null)" ] || fail "the session outlives the clean close"
}

test_upgrades_are_not_noticed() { verified_upgrades 20; }
test_upgrades_with_recovery_queue() { verified_upgrades 10 --recovery queue; }
test_upgrades_with_zero_copy() { zero_copy=on verified_upgrades 10; }

# fio keeps deep queues full, and reads back what it has written.
test_upgrades_under_deep_queues() {
    local device writer status=0 count=0 depth=()
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2 --recovery queue)
    fio --name=verify --filename="$device" --direct=1 --ioengine=io_uring --iodepth=64 --numjobs=3 \
        --rw=randrw --bsrange=512-256k --blockalign=512 --verify=crc32c --verify_fatal=1 --size=192m \
        --offset_increment=256m --serialize_overlap=1 --group_reporting --minimal >fio.log 2>&1 &
    writer=$!
    while kill -0 $writer 2>/dev/null && [ $count -lt 20 ]; do
        upgrade "$device" || { status=1; break; }
        count=$((count + 1))
    done
    wait $writer || { cut -c1-300 fio.log; status=1; }
    note "$count upgrades: longest pause $((longest / 1000)) ms"
    [ $status -eq 0 ] && [ $count -gt 2 ] || { cat /run/vhdx-ublk/*.log; fail "an upgrade was noticed"; }
    ublk del "$device"
    qemu-img check -q disk.vhdx
}

# A child, a read-only device and an image without a write, all at once; a mounted file system stays.
test_upgrade_of_all_devices() {
    local child reader idle before
    ublk create base.vhdx --size 1G
    child=$(ublk add base.vhdx)
    write_stamps "$child" 10 4 7
    ublk del "$child"
    ublk create child.vhdx --parent base.vhdx
    ublk create other.vhdx --size 1G
    child=$(ublk add child.vhdx)
    write_stamps "$child" 12 4 9
    reader=$(ublk add --read-only base.vhdx)
    idle=$(ublk add other.vhdx)
    before=$(sha other.vhdx)
    ublk upgrade --all >said
    [ "$(grep -c 'pause: [0-9]* ms' said)" = 3 ] || fail "$(cat said)"
    check_stamps "$child" 10 2 7
    check_stamps "$child" 12 4 9
    check_stamps "$reader" 10 4 7
    ublk del "$idle"
    [ "$(sha other.vhdx)" = "$before" ] || fail "an image that was not written has changed"
    mkfs.ext4 -q -F "$child"
    mount "$child" "$mnt"
    copy_real_files 8 "$mnt/files"
    manifest "$mnt" >before
    ublk upgrade "$child" "$reader" >said
    manifest "$mnt" >after
    cmp before after
    touch "$mnt/written"
    umount "$mnt"
    ublk del --all
    ublk check child.vhdx >/dev/null
    ublk upgrade --all
    [ "$(ublk upgrade --all --json)" = "[]" ]
}

# script NAME BODY: a program that is asked which formats it reads, and then run.
script() {
    printf '#!/bin/bash\nreal=%q\n%s\n' "$VHDX_UBLK" "$2" >"$1"
    chmod +x "$1"
}

# A program that does not read the session, or is none of ours, changes nothing.
test_upgrade_to_a_program_that_cannot_is_refused() {
    local device pid
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 4 7
    pid=$(pid_of "$device")
    script later.sh 'echo "{\"version\":\"9.9.9\",\"sessions\":[9],\"entries\":[1],\"sockets\":[1]}"'
    ublk upgrade "$device" --binary later.sh 2>said && fail "a program that reads no such session serves it"
    grep -q 'has version 1, and vhdx-ublk 9.9.9 reads version 9' said || fail "$(cat said)"
    grep -q 'the device stays with its program' said
    ublk upgrade "$device" --binary /bin/true 2>said && fail "/bin/true serves a device"
    grep -q 'does not say which formats it reads' said || fail "$(cat said)"
    script wrong.sh '[ "$2" != --formats ] || exec "$real" "$@"; exit 3'
    ublk upgrade "$device" --binary wrong.sh 2>said && fail "a program that ends serves a device"
    [ "$(pid_of "$device")" = "$pid" ] || fail "the daemon has changed"
    check_stamps "$device" 10 4 7
    write_stamps "$device" 20 4 8
    ublk del "$device"
    device=$(ublk add disk.vhdx --recovery none)
    ublk upgrade "$device" 2>said && fail "a device that cannot be recovered was upgraded"
    grep -q 'I/O would fail while the daemon is replaced' said || fail "$(cat said)"
    check_stamps "$device" 20 4 8
    ublk del "$device"
}

# If the new program dies after the old one has ended, the old one continues, even if its file was removed.
test_upgrade_goes_back_to_the_old_program() {
    local device
    cp "$VHDX_UBLK" old
    ublk create disk.vhdx --size 1G
    device=$(./old add disk.vhdx)
    rm old
    write_stamps "$device" 10 4 7
    script dies.sh '[ "$2" != --formats ] || exec "$real" "$@"
"$real" "$@" >/dev/null & new=$!
while [ -e /proc/'"$(pid_of "$device")"'/fd/0 ]; do :; done
kill -9 $new; exit 1'
    ublk upgrade "$device" --binary dies.sh 2>said && fail "the new program has died"
    grep -q "the program before serves $device again" said || fail "$(cat said)"
    check_stamps "$device" 10 4 7
    readlink "/proc/$(pid_of "$device")/exe" | grep -q 'old (deleted)' || fail "another program serves it"
    upgrade "$device"
    check_stamps "$device" 10 4 7
    ublk del "$device"
    qemu-img check -q disk.vhdx
}

health() { ublk list --json | tr -d ' \n' | grep -o '"health":"[a-z-]*"' | cut -d'"' -f4; }

# Whatever is killed, and whenever: the device is served, or `recover` serves it; nothing acknowledged is lost.
test_upgrade_killed_at_any_moment() {
    local device writer old new command victim status=0 recovered=0
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(ublk add disk.vhdx --queues 2)
    rm -f stop
    stamper "$device" stop >stamper.log 2>&1 &
    writer=$!
    for ((i = 0; i < 16; i++)); do
        old=$(daemon_pid)
        "$VHDX_UBLK" upgrade "$device" >said 2>&1 &
        command=$!
        sleep "0.$((RANDOM % 6))$((RANDOM % 10))"
        new=$(pgrep -f -- 'upgrade --serve' || true)
        case $((i % 4)) in
            0) victim=$command ;;
            1) victim=$new ;;
            2) victim=$old ;;
            3) victim="$command $new" ;;
        esac
        # shellcheck disable=SC2086 # several
        kill -9 $victim 2>/dev/null || true
        wait $command || true
        for _ in $(seq 100); do
            [ "$(health)" != ok ] || break
            ! ublk recover "$device" >/dev/null 2>recovering || { recovered=$((recovered + 1)); break; }
            sleep 0.1
        done
        [ "$(health)" = ok ] || { ublk list; cat said recovering; status=1; break; }
    done
    touch stop
    wait $writer || status=1
    note "$i killed upgrades, $recovered recovered: $(tail -n 1 stamper.log)"
    [ $status -eq 0 ] || { cat stamper.log /run/vhdx-ublk/*.log; fail "something was lost"; }
    ublk del "$device"
    qemu-img check -q disk.vhdx
}

# What else may happen to a device at the same time is done before or after, or refused.
test_upgrade_beside_other_commands() {
    local device
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 4 7
    ublk upgrade "$device" & ublk upgrade "$device" & ublk upgrade --all
    wait
    for name in one two three; do
        ublk snapshot "$device" $name.vhdx >snapped 2>&1 & ublk upgrade "$device" >upgraded 2>&1 || true
        wait
        [ "$(health)" = ok ] || { cat snapped upgraded; fail "the device is not served"; }
    done
    check_stamps "$device" 10 4 7
    ublk upgrade "$device" >upgraded 2>&1 & ublk del "$device" >deleted 2>&1 || true
    wait
    [ "$(ublk list --json)" = "[]" ] || ublk del "$device" || { cat upgraded deleted; fail "it cannot be removed"; }
    [ -z "$(ls /run/vhdx-ublk/*.session 2>/dev/null)" ] || fail "a session is left"
    device=$(ublk add --read-only "$(ls -t ./*.vhdx | head -n 1)")
    check_stamps "$device" 10 4 7
    ublk del "$device"
}

# messages NAME: what comes to a service manager's socket of that name, in the file NAME.said.
messages() {
    python3 -c '
import socket, sys
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind(sys.argv[1])
while True:
    print(manager.recv(4096).decode(), flush=True)' "$1" >"$1.said" &
    for _ in $(seq 200); do [ ! -e "$1" ] || return 0; sleep 0.05; done
    fail "the socket does not appear"
}

# A service manager watches the new process from then on, and the new one is in the old one's control group.
test_upgrade_of_a_service() {
    local device server groups=/sys/fs/cgroup
    messages manager
    server=$!
    mountpoint -q $groups || mount -t cgroup2 cgroup2 $groups || skipped "no control groups"
    mkdir -p $groups/service
    ublk create disk.vhdx --size 1G
    (NOTIFY_SOCKET=$PWD/manager exec -a @vhdx-ublk "$VHDX_UBLK" add --foreground disk.vhdx >device) &
    for _ in $(seq 200); do [ ! -s device ] || break; sleep 0.05; done
    device=$(cat device)
    echo "$(daemon_pid)" >$groups/service/cgroup.procs
    write_stamps "$device" 10 4 7
    upgrade "$device"
    grep -qx "MAINPID=$(daemon_pid)" manager.said || fail "$(cat manager.said)"
    upgrade "$device"
    grep -qx "MAINPID=$(daemon_pid)" manager.said || fail "$(cat manager.said)"
    [ "$(cat "/proc/$(daemon_pid)/cgroup")" = 0::/service ] || fail "$(cat "/proc/$(daemon_pid)/cgroup")"
    tr '\0' ' ' <"/proc/$(daemon_pid)/cmdline" | grep -q '^@vhdx-ublk ' || fail "a shutdown does not spare it"
    check_stamps "$device" 10 4 7
    ublk del "$device"
    kill $server
    rmdir $groups/service
}

# At the moment when the successor has taken its room, every other byte of /run is taken: the device is served
# all the same. Without any room the upgrade is refused before anything has changed.
test_upgrade_with_a_full_run() {
    local device pid
    mount -t tmpfs -o size=2m none /run/vhdx-ublk
    chmod 700 /run/vhdx-ublk
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 4 7
    pid=$(pid_of "$device")
    cat >fill.py <<'PYTHON'
import glob, os, signal, sys
pid = int(sys.argv[1])
def has_room():
    links = glob.glob(f"/proc/{pid}/fd/*")
    return any(os.path.lexists(link) and os.readlink(link).startswith("/run/vhdx-ublk/#") for link in links)
while os.path.exists(f"/proc/{pid}/stat"):
    try:
        if has_room():
            os.kill(pid, signal.SIGSTOP)
            try:
                with open("/run/vhdx-ublk/filler", "wb", buffering=0) as filler:
                    while filler.write(bytes(4096)): pass
            except OSError: pass
            open("filled", "w").close()
            os.kill(pid, signal.SIGCONT)
            break
    except OSError: pass
PYTHON
    script full.sh '[ "$2" != --formats ] || exec "$real" "$@"
python3 '"$PWD"'/fill.py $$ >/dev/null & exec "$real" "$@"'
    ublk upgrade "$device" --binary full.sh || { cat /run/vhdx-ublk/*.log; fail "a full /run stops an upgrade"; }
    [ -e filled ] || note "/run was filled too late to matter"
    [ "$(pid_of "$device")" != "$pid" ] || fail "the same daemon serves it"
    check_stamps "$device" 10 4 7
    pid=$(pid_of "$device")
    while head -c 4096 /dev/zero 2>/dev/null >>/run/vhdx-ublk/filler; do :; done
    ublk upgrade "$device" 2>said && fail "there is no room for its entry"
    grep -q 'free some space in /run' said || fail "$(cat said)"
    [ "$(pid_of "$device")" = "$pid" ] || fail "the daemon has changed"
    write_stamps "$device" 20 4 8
    check_stamps "$device" 10 4 7
    rm /run/vhdx-ublk/filler
    upgrade "$device"
    check_stamps "$device" 20 4 8
    ublk del "$device"
    umount /run/vhdx-ublk
    qemu-img check -q disk.vhdx
}

# The same after a death, when nothing had taken room before: the entry is written over.
test_recover_with_a_full_run() {
    local device
    mount -t tmpfs -o size=2m none /run/vhdx-ublk
    chmod 700 /run/vhdx-ublk
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 10 4 7
    while head -c 4096 /dev/zero 2>/dev/null >>/run/vhdx-ublk/filler; do :; done
    for _ in 1 2; do
        kill_daemon disk.vhdx
        ublk recover "$device" || { cat /run/vhdx-ublk/*.log; fail "a full /run stops a recovery"; }
        check_served "$device"
        check_stamps "$device" 10 4 7
    done
    write_stamps "$device" 20 4 8
    ublk del "$device"
    umount /run/vhdx-ublk
    qemu-img check -q disk.vhdx
}

# What asks the old daemon to end when it has handed its device over, ends the next one when nothing uses it.
test_upgrade_loses_no_request_to_end() {
    local device old writer log=/run/vhdx-ublk/0.log
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(RUST_LOG=info ublk add disk.vhdx --queues 2)
    cat >ask.py <<'PYTHON'
import os, signal, sys
log, pid = open(sys.argv[1]), int(sys.argv[2])
log.seek(0, os.SEEK_END)
open("watching", "w").close()
while os.path.exists(f"/proc/{pid}/fd/0"):
    if "another process serves the device from now on" in log.readline():
        os.kill(pid, signal.SIGTERM)
        break
PYTHON
    rm -f stop
    stamper "$device" stop >stamper.log 2>&1 &
    writer=$!
    for _ in $(seq 20); do
        old=$(daemon_pid)
        rm -f watching
        python3 ask.py $log "$old" &
        for _ in $(seq 200); do [ ! -e watching ] || break; sleep 0.05; done
        RUST_LOG=info "$VHDX_UBLK" upgrade "$device" >said 2>&1 || fail "$(cat said)"
        wait $! || true
        ! grep -q "$old.*signal 15" $log || break
    done
    touch stop
    wait $writer || { cat stamper.log; fail "something was lost"; }
    # A daemon may be too quick to be asked, twenty times.
    grep -q "$old.*signal 15" $log || { note "no daemon was asked in time"; ublk del "$device"; return 0; }
    for _ in $(seq 200); do [ "$(ublk list --json)" != "[]" ] || break; sleep 0.05; done
    [ "$(ublk list --json)" = "[]" ] || { cat said $log; fail "the request to end is lost"; }
    qemu-img check -q disk.vhdx
}

# The same if the new program dies: the old one, started again, ends when nothing uses the device, and not before.
test_a_failed_upgrade_loses_no_request_to_end() {
    local device old log=/run/vhdx-ublk/0.log
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    mkfs.ext4 -q "$device"
    mount "$device" "$mnt"
    old=$(daemon_pid)
    script dies.sh '[ "$2" != --formats ] || exec "$real" "$@"
kill '"$old"'
"$real" "$@" >/dev/null & new=$!
while [ -e /proc/'"$old"'/fd/0 ]; do :; done
kill -9 $new; exit 1'
    ublk upgrade "$device" --binary dies.sh 2>said && fail "the new program has died"
    grep -q "the program before serves $device again, and ends as it was asked" said || fail "$(cat said)"
    [ "$(daemon_pid)" != "$old" ]
    seq 1000 >"$mnt/numbers"
    sync -f "$mnt/numbers"
    for _ in $(seq 100); do ! grep -q 'asked to end while' $log || break; sleep 0.05; done
    grep -q 'asked to end while' $log || { cat $log; fail "the request to end is lost"; }
    # A command of a user is newer.
    kill_daemon disk.vhdx
    ublk recover "$device"
    umount "$mnt"
    sleep 2
    check_served "$device"
    ublk upgrade "$device" >said
    mount "$device" "$mnt"
    seq 1000 | cmp - "$mnt/numbers"
    kill "$(daemon_pid)"
    for _ in $(seq 100); do ! grep -q 'asked to end while' $log || break; sleep 0.05; done
    # What was asked to end can be upgraded, and ends all the same.
    ublk upgrade "$device" >said
    check_served "$device"
    umount "$mnt"
    for _ in $(seq 100); do [ "$(ublk list --json)" != "[]" ] || break; sleep 0.1; done
    [ "$(ublk list --json)" = "[]" ] || { cat $log; fail "the request to end is lost"; }
    [ -z "$(ls /run/vhdx-ublk/*.ending 2>/dev/null)" ] || fail "a note outlives its device"
    qemu-img check -q disk.vhdx
}

check_served() { [ "$(ublk list --json | jq -r '.[].health')" = ok ] || { ublk list; fail "$1 is not served"; }; }

# A service whose upgrade fails keeps its control group, and its manager watches the program before.
test_a_failed_upgrade_of_a_service_stays_in_it() {
    local device server groups=/sys/fs/cgroup
    messages manager
    server=$!
    mountpoint -q $groups || mount -t cgroup2 cgroup2 $groups || skipped "no control groups"
    mkdir -p $groups/service
    ublk create disk.vhdx --size 1G
    (NOTIFY_SOCKET=$PWD/manager exec -a @vhdx-ublk "$VHDX_UBLK" add --foreground disk.vhdx >device) &
    for _ in $(seq 200); do [ ! -s device ] || break; sleep 0.05; done
    device=$(cat device)
    daemon_pid >$groups/service/cgroup.procs
    write_stamps "$device" 10 4 7
    script dies.sh '[ "$2" != --formats ] || exec "$real" "$@"
"$real" "$@" >/dev/null & new=$!
while [ -e /proc/'"$(pid_of "$device")"'/fd/0 ]; do :; done
kill -9 $new; exit 1'
    ublk upgrade "$device" --binary dies.sh 2>said && fail "the new program has died"
    grep -q "the program before serves $device again" said || fail "$(cat said)"
    grep -q 'NotifyAccess=all' said || fail "$(cat said)"
    [ "$(tail -n 1 manager.said)" = "MAINPID=$(daemon_pid)" ] || fail "$(cat manager.said)"
    [ "$(cat "/proc/$(daemon_pid)/cgroup")" = 0::/service ] || fail "$(cat "/proc/$(daemon_pid)/cgroup")"
    [ "$(cat /proc/self/cgroup)" != 0::/service ]
    check_stamps "$device" 10 4 7
    ublk del "$device"
    kill $server
    rmdir $groups/service
}
