# Files are copied all the time on a disk that grows, is compacted, snapshotted and merged, and whose daemon is killed.
# shellcheck shell=bash

# Each kind of round comes three times, and the daemon is killed in five of the twelve; the long run has more.
loops=${FULL:+100}
: "${loops:=12}"

served() { ublk list --json | jq -r ".[0].$1"; }

# busy_copies: a folder is copied over and over, and read back from the disk, until `stop` is there.
busy_copies() {
    local number=0
    until [ -e stop ]; do
        number=$((number + 1))
        cp -r source "$mnt/$number" && sync -f "$mnt" || return 1
        echo 1 >/proc/sys/vm/drop_caches
        diff -r source "$mnt/$number" || return 1
        rm -r "${mnt:?}/$number"
        echo $number >copies
    done
}

# operate NUMBER: what is done in that round. Done twice, it is as if it had been done once.
operate() {
    case $(($1 % 4)) in
    0) ublk resize "$device" --size $(((1 << 30) + $1 * (32 << 20))) --grow-fs ;;
    1) [ "$(basename "$(served image)")" = "$1.vhdx" ] || ublk snapshot "$device" "$1.vhdx" ;;
    2) ublk compact "$device" --trim --max-rate 1G ;;
    3) ublk merge --keep 1 "$device" ;;
    esac
}

# kill_within NUMBER: the daemon is killed in the middle of that round, and the device comes back.
kill_within() {
    local operating
    operate "$1" >said 2>&1 &
    operating=$!
    sleep "$((RANDOM % 2)).$((RANDOM % 10))"
    kill -9 "$(daemon_pid)"
    # Before the command ends: what it has asked of the file system may wait for the device.
    recovered "$device" || fail "not recovered: $(cat refusal /run/vhdx-ublk/*.log)"
    wait $operating || broken=$((broken + 1))
    # What is no image yet is in the way of the next try.
    [ $(($1 % 4)) != 1 ] || [ "$(basename "$(served image)")" = "$1.vhdx" ] || rm -f "$1.vhdx"
}

is_sound() {
    case $1 in
    ext4) e2fsck -fn "$device" ;;
    xfs) xfs_repair -n "$device" ;;
    btrfs) btrfs check --readonly "$device" ;;
    esac >fsck.log 2>&1 || fail "the $1 is damaged: $(cat fsck.log)"
}

live_loops_on() {
    local device copying image number broken=0 kills=0
    copy_real_files 24 source
    ublk create 0.vhdx --size 1G --block-size 1M
    device=$(ublk add 0.vhdx --queues 2)
    "mkfs.$1" -q "$device" >/dev/null 2>&1
    mount "$device" "$mnt"
    rm -f stop
    busy_copies >differs 2>&1 &
    copying=$!
    for number in $(seq "$loops"); do
        if [ $(((number / 4 + number) % 2)) = 0 ]; then
            kills=$((kills + 1))
            kill_within "$number"
        fi
        operate "$number" >said 2>&1 || fail "round $number: $(cat said)"
        kill -0 $copying 2>/dev/null || fail "round $number: $(cat differs)"
    done
    touch stop
    wait $copying || fail "a copy differs, or could not be made: $(cat differs)"
    note "$1: $loops rounds beside $(cat copies) copies; $kills kills, $broken of them within a command"
    umount "$mnt"
    is_sound "$1"
    image=$(served image)
    ublk del "$device"
    ublk info --chain --json "$image" | jq -r '.chain[].image' >images
    while read -r image; do ublk check "$image" >/dev/null || fail "$(ublk check "$image")"; done <images
    [ -z "$(ls /run/vhdx-ublk/*.session* 2>/dev/null)" ] || fail "a session outlives the clean close"
}

test_live_loops_on_ext4() { live_loops_on ext4; }
full_test_live_loops_on_xfs() { live_loops_on xfs; }
full_test_live_loops_on_btrfs() { live_loops_on btrfs; }
