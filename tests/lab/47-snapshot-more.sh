# What people do with snapshots: look at them, go back to one.
# shellcheck shell=bash

# Three states of a device with a name: 1 in base.vhdx, 2 in monday.vhdx, 3 in tuesday.vhdx, which is served.
make_states() {
    ublk create base.vhdx --size 64M
    device=$(ublk add base.vhdx --name data --depth 32)
    write_stamps "$device" 0 8 1
    ublk snapshot data monday.vhdx >/dev/null
    write_stamps "$device" 0 8 2
    ublk snapshot data tuesday.vhdx >/dev/null
    write_stamps "$device" 0 8 3
}

test_snapshot_list_shows_what_is_served() {
    local device
    make_states
    ublk create --parent monday.vhdx branch.vhdx
    for target in data "$device" tuesday.vhdx; do
        ublk snapshot list "$target" --json >said
        [ "$(jq -r '[.layers[].image | split("/") | last] | join(" ")' said)" = \
            "base.vhdx monday.vhdx branch.vhdx tuesday.vhdx" ] || fail "$(cat said)"
        [ "$(jq -r '.layers[] | select(.served) | .image' said)" = "$PWD/tuesday.vhdx" ] || fail "$(cat said)"
        [ "$(jq -r '.layers[] | select(.served) | .served' said)" = "$device" ] || fail "$(cat said)"
        [ "$(jq -r '.layers[] | select(.in_chain | not) | .image' said)" = "$PWD/branch.vhdx" ] || fail "$(cat said)"
    done
    ublk snapshot list data | sed 's/^/note: /'
    ublk del data
}

test_snapshot_revert_serves_an_earlier_state() {
    local device before
    make_states
    before=$(sha base.vhdx)
    ublk snapshot revert data base.vhdx | tee said
    grep -q "^$device now serves $PWD/base-1.vhdx" said || fail "$(cat said)"
    [ "$(grep -c 'given up, and kept' said)" -eq 2 ] || fail "$(cat said)"
    check_stamps "$device" 0 8 1
    [ "$(ublk list --json | jq -r '.[0].name + " " + .[0].image')" = "data $PWD/base-1.vhdx" ] || fail "$(ublk list)"
    [ "$(jq .depth "/run/vhdx-ublk/${device#/dev/ublkb}.json")" -eq 32 ] || fail "the options are others"
    write_stamps "$device" 0 8 4
    [ "$(sha base.vhdx)" = "$before" ] || fail "the image that was returned to has changed"
    ublk del data
    # What was given up is still there.
    device=$(ublk add tuesday.vhdx --name data)
    check_stamps "$device" 0 8 3
    ublk snapshot revert data monday.vhdx again.vhdx --discard >/dev/null
    [ ! -e tuesday.vhdx ] && [ -e monday.vhdx ] || fail "$(ls)"
    check_stamps "$device" 0 8 2
    ublk del data
    ublk check again.vhdx >/dev/null
}

test_snapshot_revert_refuses_a_device_in_use() {
    local device
    make_states
    mkfs.ext4 -q -F "$device"
    ublk snapshot data wednesday.vhdx >/dev/null
    mount "$device" "$mnt"
    ls >before
    refused ublk snapshot revert data tuesday.vhdx
    grep -q 'mounted at' refusal || fail "$(cat refusal)"
    ls >after
    diff <(grep -v -x 'before\|after\|refusal' before) <(grep -v -x 'before\|after\|refusal' after)
    umount "$mnt"
    ublk snapshot revert data tuesday.vhdx >/dev/null
    mount "$device" "$mnt"
    umount "$mnt"
    ublk del data
    device=$(ublk add tuesday.vhdx --read-only)
    refused ublk snapshot revert "$device" base.vhdx
    grep -q 'read-only' refusal || fail "$(cat refusal)"
    ublk del "$device"
}

# Killed at any moment, it leaves the device as it was, or none, which one command adds again; nothing is lost.
test_snapshot_revert_killed_in_the_middle() {
    local device removed=0 back=0
    make_states
    for number in $(seq 5); do
        "$VHDX_UBLK" snapshot revert data monday.vhdx "new$number.vhdx" >/dev/null 2>"said$number" &
        sleep "0.$((number * 2 % 7))$((RANDOM % 10))"
        kill -9 $! 2>/dev/null || true
        wait $! || true
        # The device may be on its way down, or up; one that comes up then goes, for the command that began it is dead.
        for _ in $(seq 20); do
            ublk list --json >listed 2>/dev/null || true
            sleep 2
            ublk list --json 2>/dev/null | cmp -s listed - && jq -e 'all(.state == "live")' listed >/dev/null && break
        done
        if [ "$(ublk list --json)" = "[]" ]; then
            removed=$((removed + 1))
            device=$(ublk add tuesday.vhdx --name data)
        elif [ "$(ublk list --json | jq -r '.[0].image')" != "$PWD/tuesday.vhdx" ]; then
            back=$((back + 1))
            device=$(ublk list --json | jq -r '.[0].device')
            check_stamps "$device" 0 8 2
            ublk del data
            device=$(ublk add tuesday.vhdx --name data)
        fi
        check_stamps "$device" 0 8 3
    done
    note "5 kills: $removed left no device, $back the reverted one"
    ublk del data
    for number in $(seq 5); do
        # One that was not finished is not said to be made.
        ! grep -q 'is made' "said$number" || ublk check "new$number.vhdx" >/dev/null || fail "new$number.vhdx"
    done
    ublk check tuesday.vhdx >/dev/null
}

# The words of the commands are names of devices, too.
test_snapshot_of_a_device_called_list() {
    local device
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx --name list)
    refused ublk snapshot list next.vhdx
    grep -q 'vhdx-ublk snapshot /dev/vhdx/list' refusal || fail "$(cat refusal)"
    ublk snapshot /dev/vhdx/list next.vhdx >/dev/null
    [ "$(ublk list --json | jq -r '.[0].image')" = "$PWD/next.vhdx" ] || fail "$(ublk list)"
    ublk snapshot list list >/dev/null
    ublk del "$device"
}

# Whether the ext4 of an image has to be replayed before it is what its writers left.
needs_replay() {
    local device status=0
    device=$(ublk add --read-only "$1")
    udevadm settle --timeout=10
    dumpe2fs -h "${device}p2" 2>/dev/null | grep -q needs_recovery || status=1
    ublk del "$device"
    return $status
}

test_snapshot_freeze_has_every_file_complete() {
    local device writer
    ublk create disk.vhdx --size 512M
    device=$(ublk add disk.vhdx --name data)
    printf 'label: gpt\nsize=64MiB\n,\n' | sfdisk -q "$device"
    udevadm settle --timeout=10
    mkfs.vfat "${device}p1" >/dev/null
    mkfs.ext4 -q -F "${device}p2"
    mount "${device}p2" "$mnt"
    while [ ! -e stop ]; do date >"$mnt/$RANDOM" || exit 1; done &
    writer=$!
    sleep 1
    ublk snapshot data plain.vhdx >/dev/null
    sleep 1
    # What it prints may lie on the file system that it freezes.
    timeout 60 "$VHDX_UBLK" snapshot --freeze data frozen.vhdx >"$mnt/said"
    grep -q 'frozen.vhdx' "$mnt/said" || fail "$(cat "$mnt/said")"
    sleep 1
    touch stop
    wait $writer || fail "a write failed"
    needs_replay disk.vhdx || fail "an ext4 in use is clean: this test shows nothing"
    ! needs_replay plain.vhdx || fail "the frozen ext4 has to be replayed"
    # A vfat cannot be frozen.
    mkdir -p stick
    mount "${device}p1" stick
    refused timeout 60 "$VHDX_UBLK" snapshot data --freeze next.vhdx
    grep -q 'freeze=try' refusal && grep -q "$PWD/stick" refusal || fail "$(cat refusal)"
    [ ! -e next.vhdx ] || fail "a snapshot was taken"
    timeout 60 touch "$mnt/again" || fail "what was frozen stays frozen"
    ublk snapshot data --freeze=try next.vhdx 2>warnings
    grep -q "$PWD/stick" warnings || fail "$(cat warnings)"
    umount stick "$mnt"
    ublk del data
}

# A file system is thawed when the command is gone, however it has ended.
test_snapshot_freeze_ends_with_its_command() {
    local device holder writer
    ublk create disk.vhdx --size 256M
    device=$(ublk add disk.vhdx)
    mkfs.ext4 -q -F "$device"
    mount "$device" "$mnt"
    mkfifo pipe
    "$VHDX_UBLK" snapshot --hold-frozen "$mnt" <pipe >said &
    sleep 1000 >pipe &
    holder=$!
    for _ in $(seq 100); do grep -q ready said && break || sleep 0.1; done
    grep -q ready said || fail "nothing is frozen"
    # It waits in the kernel, where nothing ends it.
    touch "$mnt/early" &
    writer=$!
    sleep 1
    kill -0 $writer || fail "a frozen file system is written"
    kill -9 $holder
    wait $writer || fail "the write that waited has failed"
    for _ in $(seq 100); do grep -q thawed said && break || sleep 0.1; done
    grep -q thawed said || fail "$(cat said)"
    umount "$mnt"
    ublk del "$device"
}
