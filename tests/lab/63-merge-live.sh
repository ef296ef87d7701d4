# Layers of a chain that is served are merged: nothing is lost or torn, and the chain keeps its length.
# shellcheck shell=bash

# served IMAGE-KEY: what `list` says of the only device.
served() { ublk list --json | jq -r ".[0].$1"; }

# chain_length: of the chain that the only device serves, by the paths of its images.
chain_length() { ublk info --chain --json "$(served image)" | jq '.chain | length'; }

# kill_in_the_middle DEVICE LAYER: of the merge of that layer; the device comes back, and the same merge ends.
kill_in_the_middle() {
    local merging
    ublk merge "$2" >/dev/null 2>said &
    merging=$!
    sleep "$((RANDOM % 3)).$((RANDOM % 10))"
    kill -9 "$(daemon_pid)"
    ! wait $merging || ended=$((ended + 1))
    recovered "$1" || fail "not recovered: $(cat refusal /run/vhdx-ublk/*.log)"
    if served merging | grep -q "$2"; then
        grep -q 'was interrupted' /run/vhdx-ublk/*.log || fail "recover says nothing of the merge"
        interrupted=$((interrupted + 1))
        ublk merge "$2" >/dev/null || fail "the merge does not go on"
    elif [ -e "$2" ]; then
        ublk merge "$2" >/dev/null || fail "not merged after all"
    fi
}

# rounds COUNT: snapshot, merge of the frozen layer, under a writer; the daemon is killed in half of them.
rounds() {
    local device writer number frozen interrupted=0 ended=0
    ublk create base.vhdx --size 1G --block-size 1M
    ublk create 0.vhdx --parent base.vhdx
    device=$(ublk add 0.vhdx --queues 2)
    begin_writer "$device"
    for number in $(seq "$1"); do
        frozen=$(basename "$(served image)")
        ublk snapshot "$device" "$number.vhdx" >/dev/null
        sleep "0.$((RANDOM % 3))"
        if [ $((number % 2)) -eq 0 ]; then
            kill_in_the_middle "$device" "$frozen"
        else
            ublk merge "$frozen" >removed || fail "round $number: not merged"
            grep -q "/$frozen\$" removed || fail "it says $(cat removed)"
        fi
        [ ! -e "$frozen" ] || fail "round $number: $frozen is still there"
        [ "$(chain_length)" -eq 2 ] || fail "round $number: the chain has $(chain_length) images"
    done
    end_writer
    note "$1 rounds under a writer: $interrupted merges interrupted by kills, $ended ended before"
    ublk del "$device"
    ublk check "$1.vhdx" >/dev/null || fail "$(ublk check "$1.vhdx")"
    ublk check base.vhdx >/dev/null || fail "$(ublk check base.vhdx)"
    [ "$(find . -name '*.vhdx' | wc -l)" -eq 2 ] || fail "files are left over: $(ls)"
    [ -z "$(ls /run/vhdx-ublk/*.session* 2>/dev/null)" ] || fail "a session outlives the clean close"
}

test_merge_live_rounds_under_a_verifying_writer() {
    if [ -n "$FULL" ]; then rounds 100; else rounds 10; fi
}

# Layers in the middle, in any order, with partly written blocks; the disk is the same all the time.
test_merge_live_layers_in_the_middle() {
    local device before number
    ublk create 0.vhdx --size 64M --block-size 2M
    device=$(ublk add 0.vhdx)
    for number in $(seq 5); do
        write_stamps "$device" $((number * 7)) 9 "$number"
        printf 'sector of %d' "$number" | dd of="$device" bs=512 seek=$((number * 4099)) conv=notrunc,sync \
            oflag=direct status=none
        blkdiscard -z -o $((number * 3 << 20)) -l 1M "$device"
        ublk snapshot "$device" "$number.vhdx" >/dev/null
    done
    before=$(sha "$device")
    for number in 2 4 1; do
        ublk merge "$number.vhdx" --json >said || fail "$(cat said)"
        jq -e ".child | endswith(\"/$number.vhdx\")" said >/dev/null || fail "$(cat said)"
        [ "$(sha "$device")" = "$before" ] || fail "the disk has changed with layer $number"
    done
    [ "$(chain_length)" -eq 3 ] || fail "the chain has $(chain_length) images"
    ublk del "$device"
    device=$(ublk add 5.vhdx)
    [ "$(sha "$device")" = "$before" ] || fail "added again, the disk has changed"
    ublk del "$device"
    for number in 0 3 5; do ublk check "$number.vhdx" >/dev/null || fail "$(ublk check "$number.vhdx")"; done
    [ "$(find . -name '*.vhdx' | wc -l)" -eq 3 ] || fail "files are left over"
}

# --keep merges the oldest layers, of a device and of a leaf at rest.
test_merge_live_keep() {
    local device before number
    ublk create 0.vhdx --size 64M
    device=$(ublk add 0.vhdx)
    for number in $(seq 6); do
        write_stamps "$device" $((number * 5)) 8 "$number"
        ublk snapshot "$device" "$number.vhdx" >/dev/null
    done
    before=$(sha "$device")
    refused ublk merge --keep 0 "$device"
    ublk merge --keep 3 "$device" >removed
    [ "$(wc -l <removed) $(chain_length)" = "3 4" ] || fail "$(cat removed)"
    [ "$(echo ?.vhdx)" = "0.vhdx 4.vhdx 5.vhdx 6.vhdx" ] || fail "not the oldest: $(ls)"
    [ "$(sha "$device")" = "$before" ] || fail "the disk has changed"
    ublk merge --keep 3 6.vhdx >removed
    [ ! -s removed ] || fail "there was nothing to do"
    ublk del "$device"
    ublk merge --keep 1 6.vhdx --json >said
    [ "$(jq length said)" -eq 2 ] || fail "$(cat said)"
    ublk merge --keep 0 6.vhdx >/dev/null
    [ "$(echo ./*.vhdx)" = ./0.vhdx ] || fail "$(ls)"
    device=$(ublk add 0.vhdx)
    [ "$(sha "$device")" = "$before" ] || fail "merged at rest, the disk has changed"
    ublk del "$device"
}

# What is refused names the way; what would lose its parent is not lost.
test_merge_live_refused() {
    local device other
    ublk create 0.vhdx --size 64M
    device=$(ublk add 0.vhdx)
    refused ublk merge 0.vhdx
    grep -q 'first image of its chain' refusal || fail "$(cat refusal)"
    ublk snapshot "$device" 1.vhdx >/dev/null
    ublk snapshot "$device" 2.vhdx >/dev/null
    refused ublk merge 2.vhdx
    grep -q "vhdx-ublk snapshot $device.*vhdx-ublk merge .*2.vhdx" refusal || fail "$(cat refusal)"
    refused ublk merge "$device"
    refused ublk merge 0.vhdx
    refused ublk merge 1.vhdx --force
    # Another child of the target, and one of the layer.
    ublk create other.vhdx --parent 0.vhdx
    refused ublk merge 1.vhdx
    grep -q other.vhdx refusal || fail "$(cat refusal)"
    rm other.vhdx
    ublk create other.vhdx --parent 1.vhdx
    refused ublk merge 1.vhdx
    grep -q other.vhdx refusal || fail "$(cat refusal)"
    # Another device reads the target.
    mkdir elsewhere
    mv other.vhdx elsewhere
    ublk create elsewhere/mine.vhdx --parent 0.vhdx
    other=$(ublk add --read-only elsewhere/mine.vhdx)
    refused ublk merge 1.vhdx
    ublk del "$other"
    rm -r elsewhere
    write_stamps "$device" 10 20 3
    ublk merge 1.vhdx >/dev/null
    check_stamps "$device" 10 20 3
    # The readers' locks are there again.
    refused ublk resize 0.vhdx --size +1M
    ublk del "$device"
}

# A disk grows while a layer is merged; snapshots and upgrades wait, and the removal of the device ends the merge.
test_merge_live_answers_others() {
    local device merging
    ublk create 0.vhdx --size 2G
    ublk create 1.vhdx --parent 0.vhdx
    device=$(ublk add 1.vhdx)
    dd if=/dev/urandom of="$device" bs=1M count=500 oflag=direct status=none
    ublk snapshot "$device" 2.vhdx >/dev/null
    "$VHDX_UBLK" merge 1.vhdx >/dev/null 2>said &
    merging=$!
    for _ in $(seq 100); do [ "$(served merging)" = null ] || break; sleep 0.01; done
    [ "$(served merging)" != null ] || fail "list does not show it: $(cat said)"
    refused ublk snapshot "$device" 3.vhdx
    grep -q 'is being merged' refusal || fail "$(cat refusal)"
    refused ublk upgrade "$device"
    ublk resize "$device" --size 3G
    refused ublk merge 1.vhdx
    kill $merging
    wait $merging || true
    for _ in $(seq 100); do [ "$(served merging)" != null ] || break; sleep 0.05; done
    [ "$(served merging)" = null ] || fail "it continues without its caller"
    [ -e 1.vhdx ] || fail "the layer is gone"
    ublk upgrade "$device" >/dev/null
    "$VHDX_UBLK" merge 1.vhdx >/dev/null 2>said &
    merging=$!
    for _ in $(seq 100); do [ "$(served merging)" = null ] || break; sleep 0.01; done
    ublk del "$device"
    ! wait $merging || fail "the merge has ended"
    device=$(ublk add 2.vhdx)
    ublk merge 1.vhdx >/dev/null
    [ "$(chain_length)" -eq 2 ] || fail "the chain has $(chain_length) images"
    ublk del "$device"
    ublk check 0.vhdx >/dev/null || fail "$(ublk check 0.vhdx)"
}

# Everyone who finishes a merge looks at what the file is, not only at its name and number.
test_merge_live_finished_removes_only_what_it_has_left() {
    local device number
    mkdir kept
    take_down() { chattr -i kept 2>/dev/null || true; }
    ublk create base.vhdx --size 64M --block-size 1M
    ublk create kept/1.vhdx --parent base.vhdx
    device=$(ublk add kept/1.vhdx)
    write_stamps "$device" 0 20 1
    ublk snapshot "$device" 2.vhdx >/dev/null
    number=$(stat -c %i kept/1.vhdx)
    # The file of the layer cannot be removed: the merge ends there.
    chattr +i kept
    refused ublk merge kept/1.vhdx
    chattr -i kept
    [ "$(served merging)" = "$PWD/kept/1.vhdx" ] || fail "$(ublk list)"
    # A child was made of it meanwhile.
    ublk create kept/other.vhdx --parent kept/1.vhdx
    refused ublk merge kept/1.vhdx
    grep -q other.vhdx refusal || fail "$(cat refusal)"
    rm kept/other.vhdx
    # Another image has its name and its number.
    ublk create another.vhdx --size 64M
    cat another.vhdx >kept/1.vhdx
    [ "$(stat -c %i kept/1.vhdx)" = "$number" ] || fail "it has another number"
    ublk merge kept/1.vhdx >/dev/null
    cmp another.vhdx kept/1.vhdx || fail "another image was removed, or written"
    [ "$(served merging) $(chain_length)" = 'null 2' ] || fail "the merge has not ended: $(ublk list)"
    check_stamps "$device" 0 20 1
    ublk del "$device"
    ublk check 2.vhdx >/dev/null || fail "$(ublk check 2.vhdx)"
}

# The file of a layer that is gone has left its number to another layer, which is not merged for it.
test_merge_live_finished_spares_a_layer_with_the_number_of_another() {
    local device entry number
    ublk create 0.vhdx --size 64M --block-size 1M
    device=$(ublk add 0.vhdx)
    for number in 1 2; do
        write_stamps "$device" $((number * 20)) 10 "$number"
        ublk snapshot "$device" "$number.vhdx" >/dev/null
    done
    kill_daemon 2.vhdx
    entry=/run/vhdx-ublk/${device#/dev/ublkb}.json
    # Not by jq, which has no room for all digits of a number.
    python3 - "$entry" "$PWD" <<'SCRIPT'
import json, sys
entry = json.load(open(sys.argv[1]))
layer, target = entry["parent_files"]
entry["merging"] = {"layer": sys.argv[2] + "/gone.vhdx", "layer_file": layer,
                    "target": sys.argv[2] + "/0.vhdx", "target_file": target}
json.dump(entry, open(sys.argv[1], "w"))
SCRIPT
    recovered "$device" || fail "not recovered: $(cat refusal)"
    ublk merge gone.vhdx >/dev/null || fail "the merge is not finished"
    [ -e 1.vhdx ] || fail "another layer was merged"
    [ "$(served merging) $(chain_length)" = 'null 3' ] || fail "$(ublk list)"
    check_stamps "$device" 20 10 1
    check_stamps "$device" 40 10 2
    ublk merge 1.vhdx >/dev/null
    [ "$(chain_length)" -eq 2 ] || fail "the chain has $(chain_length) images"
    ublk del "$device"
    ublk check 2.vhdx >/dev/null || fail "$(ublk check 2.vhdx)"
}
