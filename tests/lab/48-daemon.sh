# The daemon itself: what it keeps of its caller's, what it makes of signals, whom it listens to.
# shellcheck shell=bash

# status_of PID FIELD: a line of /proc/PID/status, its value alone.
status_of() { sed -n "s/^$2:[[:space:]]*//p" "/proc/$1/status"; }

# await SECONDS COMMAND...: until it succeeds.
await() {
    local tries=$(($1 * 20))
    shift
    for _ in $(seq "$tries"); do
        ! "$@" || return 0
        sleep 0.05
    done
    return 1
}

has_lines() { [ "$(wc -l <"$2")" -ge "$1" ]; }
is_gone() { [ ! -e "/proc/$1" ]; }
has_no_device() { [ "$(ublk list --json)" = "[]" ]; }
logged() { grep -q "$1" /run/vhdx-ublk/*.log; }

# A caller with secrets in its environment, descriptors of its own, and limits that would kill.
test_daemon_keeps_nothing_of_its_callers() {
    local device pid fd soft
    ublk create disk.vhdx --size 1G
    mkdir callers
    echo secret >callers/file
    device=$(
        cd callers
        trap '' TERM USR1
        umask 0
        ulimit -c unlimited
        ulimit -Sn 64
        ulimit -f 2000
        ulimit -t 600
        unset RUST_BACKTRACE LLVM_PROFILE_FILE
        PASSWORD=secret RUST_LOG=warn exec "$VHDX_UBLK" add ../disk.vhdx 7<file 9>>file
    )
    pid=$(daemon_pid)
    ! tr '\0' '\n' <"/proc/$pid/environ" | grep -v '^RUST_LOG=warn$' || fail "something of the environment is left"
    for fd in /proc/"$pid"/fd/*; do
        case $(readlink "$fd") in
        *callers*) fail "$fd is the caller's: $(readlink "$fd")" ;;
        esac
    done
    [ "$(readlink "/proc/$pid/cwd")" = / ] || fail "it stays in $(readlink "/proc/$pid/cwd")"
    [ "$(status_of "$pid" Umask)" = 0077 ] || fail "umask $(status_of "$pid" Umask)"
    [ "$(cat "/proc/$pid/oom_score_adj")" = -1000 ] || fail "the kernel may choose it when memory runs out"
    for limit in 'cpu time' 'file size' 'locked memory' 'address space' 'data size'; do
        grep -q "^Max $limit *unlimited" "/proc/$pid/limits" || fail "$(grep "^Max $limit" "/proc/$pid/limits")"
    done
    soft=$(awk '/^Max open files/ { print $4 }' "/proc/$pid/limits")
    [ "$soft" -ge 4096 ] || fail "$soft descriptors"
    grep -q '^Max core file size *0 ' "/proc/$pid/limits" || fail "a core would hold the disk's data"
    note "limits: $(awk '/open files|locked|core|file size/ { printf "%s; ", $0 }' "/proc/$pid/limits" | tr -s ' ')"
    note "descriptors: $(for fd in /proc/"$pid"/fd/*; do readlink "$fd"; done | sort | uniq -c |
        awk '{ printf "%s %s, ", $1, $2 }')"
    # The caller's deafness is not the daemon's.
    kill -TERM "$pid"
    await 10 is_gone "$pid" || fail "it does not hear SIGTERM, as its caller did not"
    has_no_device || fail "it has left its device"
    [ "$device" = /dev/ublkb0 ]
}

test_daemon_has_no_right_that_it_does_not_use() {
    local device pid thread comm
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    pid=$(daemon_pid)
    for thread in /proc/"$pid"/task/*; do
        thread=${thread##*/}
        note "$(cat "/proc/$pid/task/$thread/comm"):" \
            "$(grep -E '^(Cap|NoNewPrivs|Seccomp:)' "/proc/$pid/task/$thread/status" | tr -s '\t\n' ' ')"
        [ "$(status_of "$thread" NoNewPrivs)" = 1 ] || fail "thread $thread may gain privileges"
        [ "$(status_of "$thread" Seccomp)" = 2 ] || fail "thread $thread may make every system call"
        [ "$(status_of "$thread" CapInh)" = 0000000000000000 ] || fail "inheritable capabilities"
        [ "$(status_of "$thread" CapAmb)" = 0000000000000000 ] || fail "ambient capabilities"
        # Bits: 0 chown, 1 dac_override, 3 fowner, 14 ipc_lock, 19 sys_ptrace, 21 sys_admin, 23 sys_nice,
        # 24 sys_resource.
        [ $((0x$(status_of "$thread" CapBnd) & ~0x1A8400B)) -eq 0 ] || fail "bounding $(status_of "$thread" CapBnd)"
        comm=$(cat "/proc/$pid/task/$thread/comm")
        case $comm in
        # The kernel's, for a thread whose number is in the name: no more than that thread has.
        iou-wrk-*) [ "$(status_of "$thread" CapPrm)" = "$(status_of "${comm#iou-wrk-}" CapPrm)" ] ;;
        vhdx-ublk) [ "$(status_of "$thread" CapPrm)" = 0000000001284002 ] ;;
        vhdx-engine) [ "$(status_of "$thread" CapPrm)" = 000000000100400b ] ;;
        *) [ "$(status_of "$thread" CapPrm)" = 0000000001004000 ] ;;
        esac || fail "$comm has $(status_of "$thread" CapPrm)"
    done
    # What it has is enough: an image of another user's, whose folder is closed to others.
    ublk del "$device"
    mkdir theirs
    chmod 700 theirs
    mv disk.vhdx theirs/
    chmod 600 theirs/disk.vhdx
    chown -R 65534 theirs
    device=$(ublk add theirs/disk.vhdx)
    write_stamps "$device" 10 20 5
    ublk snapshot "$device" theirs/next.vhdx
    write_stamps "$device" 15 2 6
    check_stamps "$device" 15 2 6
    [ "$(stat -c '%u %a' theirs/next.vhdx)" = "65534 600" ] || fail "$(stat -c '%u %a' theirs/next.vhdx)"
    ublk del "$device"
    ublk check theirs/next.vhdx >/dev/null
}

# Asked to end while a file system is mounted: it stays until that is unmounted, then closes the image by itself.
test_daemon_stays_while_it_is_used() {
    local device pid
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    pid=$(daemon_pid)
    mkfs.ext4 -q "$device"
    mount "$device" "$mnt"
    kill -TERM "$pid"
    await 10 logged 'asked to end while /dev/ublkb0 is in use: mounted at' || fail "it says nothing"
    sleep 7
    kill -INT "$pid"
    echo hello >"$mnt/file"
    sync
    [ "$(cat "$mnt/file")" = hello ] || fail "the device was taken away"
    umount "$mnt"
    await 20 is_gone "$pid" || fail "it stays without any use"
    has_no_device || fail "it has left its device"
    ublk check disk.vhdx >/dev/null
    device=$(ublk add disk.vhdx)
    mount -o ro "$device" "$mnt"
    [ "$(cat "$mnt/file")" = hello ] || fail "what was written is lost"
    umount "$mnt"
    ublk del "$device"
}

# A process that has the device open is a use as well, whoever runs it; who insists is obeyed.
test_daemon_asked_twice_or_with_force_ends() {
    local device pid
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    pid=$(daemon_pid)
    chmod 666 "$device"
    setpriv --reuid 65534 --clear-groups sleep 60 <"$device" &
    sleep 0.5
    kill -TERM "$pid"
    await 10 logged 'open in sleep' || fail "it does not see who has it open"
    ! is_gone "$pid" || fail "it has ended"
    ublk del "$device" 2>said && fail "a device in use was taken away"
    sleep 5
    kill -TERM "$pid"
    kill -INT "$pid"
    await 10 is_gone "$pid" || fail "who asks twice is not obeyed"
    kill $!
    device=$(ublk add disk.vhdx)
    pid=$(daemon_pid)
    exec 8<"$device"
    ublk del --force "$device"
    is_gone "$pid" || fail "del --force leaves the daemon"
    exec 8<&-
}

test_daemon_is_deaf_to_what_concerns_it_not() {
    local device pid signal
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    pid=$(daemon_pid)
    mkfs.ext4 -q "$device"
    mount "$device" "$mnt"
    for signal in HUP USR1 USR2 ALRM QUIT XCPU XFSZ VTALRM PROF PIPE IO PWR WINCH TSTP TTIN TTOU STKFLT \
        RTMIN RTMAX-1; do
        kill -s "$signal" "$pid"
        sleep 0.05
        [ "$(status_of "$pid" State | cut -c1)" != T ] || fail "SIG$signal stops it"
        echo "$signal" >"$mnt/file"
        sync "$mnt/file" || fail "SIG$signal takes the disk away"
    done
    [ "$(daemon_pid)" = "$pid" ] || fail "it was killed"
    umount "$mnt"
    ublk del "$device"
}

# HUP opens the log anew, for rotation; recover adds to the log of the daemon that was killed.
test_daemon_log_is_kept_and_opened_anew() {
    local device pid
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    pid=$(daemon_pid)
    exec 8<"$device"
    kill -TERM "$pid"
    await 10 logged 'in use' || fail "it says nothing"
    grep -q "vhdx-ublk [0-9.]*\[$pid\]: warning: asked to end" /run/vhdx-ublk/0.log ||
        fail "$(cat /run/vhdx-ublk/0.log)"
    mv /run/vhdx-ublk/0.log old.log
    kill -HUP "$pid"
    await 10 test -e /run/vhdx-ublk/0.log || fail "the log was not opened anew"
    kill -9 "$pid"
    echo evidence >>/run/vhdx-ublk/0.log
    ublk recover "$device"
    head -n 1 /run/vhdx-ublk/0.log | grep -q evidence || fail "the dead daemon's log is gone"
    grep -q "\[$(daemon_pid)\]: warning: the daemon before this one was killed" /run/vhdx-ublk/0.log ||
        fail "$(cat /run/vhdx-ublk/0.log)"
    exec 8<&-
    ublk del "$device"
    grep -q evidence /run/vhdx-ublk/0.log || fail "the log was removed"
    rm /run/vhdx-ublk/0.log
}

# A starter that is killed leaves no unknown server behind.
test_daemon_dies_with_its_starter() {
    local starter daemon holder
    ublk create disk.vhdx --size 1G
    # Another process has the image, so that the daemon waits on its way up.
    qemu-io -f vhdx -c 'sleep 20000' disk.vhdx >/dev/null &
    holder=$!
    sleep 1
    "$VHDX_UBLK" add disk.vhdx 2>/dev/null &
    starter=$!
    for _ in $(seq 100); do
        daemon=$(pgrep -P "$starter") && break
        sleep 0.05
    done
    kill -9 "$starter"
    await 3 is_gone "$daemon" || status=1
    kill "$holder"
    wait || true
    [ -z "${status:-}" ] || fail "the daemon of a starter that was killed still runs"
    has_no_device
}

# A descriptor is served, whatever its path has come to name; for writing if it is open for that.
test_daemon_serves_a_descriptor() {
    local device pid
    ublk create disk.vhdx --size 1G
    exec 8<>disk.vhdx
    mv disk.vhdx moved.vhdx
    echo 'not an image' >disk.vhdx
    device=$(ublk add --fd 8)
    exec 8<&-
    pid=$(daemon_pid)
    ublk list | grep -q moved.vhdx || fail "$(ublk list)"
    write_stamps "$device" 10 20 5
    kill_daemon moved.vhdx
    ublk recover "$device"
    check_stamps "$device" 10 20 5
    ublk del "$device"
    qemu-img check -q moved.vhdx
    device=$(ublk add --fd 9 9<moved.vhdx)
    [ "$(blockdev --getro "$device")" = 1 ] || fail "it may be written, by a descriptor that may not"
    check_stamps "$device" 10 20 5
    ublk del "$device"
    ublk add --fd 9 9>>moved.vhdx 2>said && fail "served without being read"
    grep -q 'not open for reading' said || fail "$(cat said)"
    ublk add --fd 9 2>said && fail "served without a descriptor"
    grep -q 'pass an open descriptor' said || fail "$(cat said)"
    ublk add --fd 9 9<. 2>said && fail "a folder was served"
    exec 8<>moved.vhdx
    rm moved.vhdx
    ublk add --fd 8 2>said && fail "a file without a name was served"
    grep -q 'has no name' said || fail "$(cat said)"
}

# control ARGUMENTS...: talks to the daemon, see control.py.
control() { python3 "$tests/control.py" /run/vhdx-ublk/0.sock "$@"; }

test_daemon_listens_to_several_and_not_for_ever() {
    local device dripping silent=()
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    control --drip >dripped &
    dripping=$!
    for _ in $(seq 6); do
        control --silent 5 >>connected &
        silent+=($!)
    done
    await 30 has_lines 6 connected || fail "the daemon does not listen"
    ublk snapshot "$device" next.vhdx
    wait "${silent[@]}"
    wait "$dripping" || fail "a byte now and then holds the daemon"
    grep -q 'has not sent a whole line' dripped || fail "$(cat dripped)"
    for _ in $(seq 8); do
        control --silent 8 >>connected &
    done
    await 30 has_lines 14 connected || fail "the daemon does not listen"
    ublk snapshot "$device" third.vhdx 2>said && fail "there is no bound to its clients"
    grep -q 'at a time' said || fail "$(cat said)"
    wait
    ublk del "$device"
}

test_daemon_takes_no_relative_path_and_no_endless_line() {
    local device
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    control --say '{"version":1,"command":{"snapshot":{"image":"next.vhdx"}}}' | grep -q 'absolute path' || fail "taken"
    control --say '{"version":1,"command":{"snapshot":{"image":""}}}' | grep -q 'absolute path' || fail "taken"
    control --long | grep -q 'longer than' || fail "there is no bound to a line"
    [ "$(ublk list --json | grep -c next.vhdx)" -eq 0 ] && [ ! -e /next.vhdx ] || fail "a snapshot of its own folder"
    ublk del "$device"
}

# The daemon is stopped, the caller stops waiting, the daemon continues: a snapshot that was given up is not taken.
test_daemon_does_nothing_for_a_caller_that_has_left() {
    local device pid
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    pid=$(daemon_pid)
    kill -STOP "$pid"
    timeout 2 "$VHDX_UBLK" snapshot "$device" next.vhdx && fail "a stopped daemon has answered"
    kill -CONT "$pid"
    await 10 logged 'caller that requested .*left' || fail "it says nothing"
    sleep 1
    [ ! -e next.vhdx ] || fail "the snapshot was taken all the same"
    ublk list | grep -q disk.vhdx || fail "$(ublk list)"
    # Who only says no more still waits.
    control --half '{"version":1,"command":{"snapshot":{"image":"'"$PWD"'/next.vhdx"}}}' | grep -q '"done"' ||
        fail "who waits is not answered"
    ublk del "$device"
}

# waits_for_no_io PID: every thread of it is marked with PF_MEMALLOC_NOIO, by PR_SET_IO_FLUSHER.
waits_for_no_io() {
    local stat flags
    for stat in /proc/"$1"/task/*/stat; do
        flags=$(sed 's/.*) //' "$stat" | cut -d' ' -f7)
        [ $((flags & 0x80000)) -ne 0 ] || fail "$(cut -d' ' -f1,2 "$stat") may wait for the disk to get memory"
    done
}

# Memory may lie on the disk: neither what serves it waits for that, nor what has it served again.
test_daemon_gets_memory_without_io() {
    local device
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx --respawn)
    waits_for_no_io "$(daemon_pid)"
    waits_for_no_io "$(pgrep -f -- "respawn --mark=.* -- ${device#/dev/ublkb}\$")"
    kill -9 "$(daemon_pid)"
    await 40 has_health ok || fail "not served again"
    waits_for_no_io "$(daemon_pid)"
    ublk del "$device"
}

has_health() { [ "$(ublk list --json | jq -r '.[].health')" = "$1" ]; }
