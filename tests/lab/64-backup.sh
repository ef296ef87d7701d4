# tools/backup: the copy is the frozen disk, again and again; what was killed is run again, and loses nothing.
# shellcheck shell=bash

backup() { "$tests/../../tools/backup" "$@"; }

# chain: of the served image, by paths, its own first. The second is what was frozen last.
chain() { ublk info --chain --json "$(ublk list --json | jq -r '.[0].image')" | jq -r '.chain[].image'; }

# is_the_frozen_disk: the copy, byte for byte, read through a device; and so is a disk that is restored from it.
is_the_frozen_disk() {
    local frozen restored expected
    frozen=$(ublk add --read-only "$(chain | sed -n 2p)")
    expected=$(sha "$frozen")
    ublk del "$frozen"
    [ "$(sha copy.raw)" = "$expected" ] || fail "$1: the copy is another disk"
    rm -f restored.vhdx
    ublk convert copy.raw --from raw restored.vhdx --progress none >/dev/null
    restored=$(ublk add --read-only restored.vhdx)
    [ "$(sha "$restored")" = "$expected" ] || fail "$1: what is restored is another disk"
    ublk del "$restored"
}

nothing_left() {
    [ "$(chain | wc -l)" = 2 ] || fail "$1: the chain is $(chain)"
    [ "$(ublk list --json | jq length)" = 1 ] || fail "$1: $(ublk list)"
    [ "$(echo copy.raw*)" = "copy.raw copy.raw.base copy.raw.lock" ] || fail "$1: $(ls)"
}

# fio verifies every byte that it has written before, between and after the backups.
test_backup_under_a_verifying_writer() {
    local device fio number=0
    ublk create disk.vhdx --size 128M --block-size 1M
    device=$(ublk add disk.vhdx --queues 2)
    write_stamps "$device" 100 8 4
    fio --name=verify --filename="$device" --direct=1 --ioengine=io_uring --iodepth=8 --rw=randrw --bsrange=4k-64k \
        --blockalign=4k --size=96m --io_size=120m --rate=3m --verify=crc32c --verify_fatal=1 --verify_backlog=64 \
        --minimal >fio.log 2>&1 &
    fio=$!
    while [ $number -lt 2 ] || { [ $number -lt 5 ] && kill -0 $fio 2>/dev/null; }; do
        number=$((number + 1))
        blkdiscard -z -o $(((100 + number) << 20)) -l 1M "$device"
        backup --verify "$device" copy.raw >said 2>&1 || fail "round $number: $(cat said)"
        nothing_left "round $number"
        is_the_frozen_disk "round $number"
    done
    wait $fio || fail "fio: $(cat fio.log)"
    note "$number backups under fio"
    backup --keep 2 "$device" copy.raw
    is_the_frozen_disk "with more layers"
    [ "$(chain | wc -l)" = 3 ] || fail "--keep 2 leaves $(chain)"
    ublk del "$device"
}

# killer: a program in place of vhdx-ublk, and one of dd, which kill the script in the step that `step` names.
killer() {
    mkdir -p killer
    cat >killer/vhdx-ublk <<END
#!/bin/bash
"$VHDX_UBLK" "\$@" || exit
[ "\$1" != "\$(cat $PWD/step)" ] || { : >$PWD/step; kill -9 "\$(cat $PWD/script)"; }
END
    cat >killer/dd <<END
#!/bin/bash
for word; do
    [ "\$(cat $PWD/step) of=copy.raw" != "apply \$word" ] || { : >$PWD/step; kill -9 "\$(cat $PWD/script)"; exit; }
done
exec $(command -v dd) "\$@"
END
    chmod +x killer/*
    echo "$PWD/killer/vhdx-ublk"
}

# died_in STEP DEVICE: a run of the script was killed there.
died_in() {
    local status=0
    echo "$1" >step
    # shellcheck disable=SC2016 # its own process
    PATH=$PWD/killer:$PATH bash -c 'echo $$ >script; exec "$@"' bash "$tests/../../tools/backup" --verify "$2" \
        copy.raw >said 2>&1 || status=$?
    [ $status = 137 ] || fail "it was not killed in $1: $status $(cat said)"
}

# Killed in the first run and in a later one, in every step, it continues or begins anew when it is run again.
test_backup_killed_in_every_step() {
    local device step
    ublk create disk.vhdx --size 64M --block-size 1M
    device=$(ublk add disk.vhdx)
    write_stamps "$device" 0 20 1
    for step in snapshot convert compare merge; do
        rm -f copy.raw*
        VHDX_UBLK=$(killer) died_in $step "$device"
        write_stamps "$device" 10 5 $RANDOM
        backup --verify "$device" copy.raw >said 2>&1 || fail "first run, $step: $(cat said)"
        nothing_left "first run, $step"
        is_the_frozen_disk "first run, $step"
    done
    for step in snapshot add map del apply compare merge; do
        write_stamps "$device" 30 4 $RANDOM
        blkdiscard -z -o $((12 << 20)) -l 2M "$device"
        VHDX_UBLK=$(killer) died_in $step "$device"
        if [ $step = apply ]; then
            # Only what has changed was collected.
            [ "$(host_bytes copy.raw.delta)" -lt $((10 << 20)) ] ||
                fail "$(host_bytes copy.raw.delta) bytes are collected"
            # What was collected needs no device.
            VHDX_UBLK=/bin/false backup --finish copy.raw
            is_the_frozen_disk "finished"
        fi
        write_stamps "$device" 12 1 $RANDOM
        backup --verify "$device" copy.raw >said 2>&1 || fail "$step: $(cat said)"
        nothing_left "$step"
        is_the_frozen_disk "$step"
    done
    ublk del "$device"
}

# A copy whose image is not in the chain is not touched; the link follows the image that is served.
test_backup_refused_and_linked() {
    local device
    ublk create disk.vhdx --size 64M --block-size 1M
    device=$(ublk add disk.vhdx --name data)
    write_stamps "$device" 0 3 1
    ln -s disk.vhdx served
    backup --link served data copy.raw
    [ "$(realpath served)" = "$(ublk list --json | jq -r '.[0].image')" ] || fail "the link leads to $(realpath served)"
    refused backup other copy.raw
    mv copy.raw.base base
    refused backup data copy.raw
    mv base copy.raw.base
    # The image that the copy was made below is merged away.
    ublk snapshot data more.vhdx >/dev/null
    ublk merge "$(cat copy.raw.base)" >/dev/null
    cp copy.raw before.raw
    refused backup --link served data copy.raw
    cmp copy.raw before.raw
    [ "$(chain | wc -l)" = 2 ] || fail "a snapshot was taken"
    mv copy.raw old.raw
    backup --link served --freeze "$device" copy.raw
    is_the_frozen_disk "anew"
    [ "$(realpath served)" = "$(ublk list --json | jq -r '.[0].image')" ] || fail "the link leads to $(realpath served)"
    ublk del data
}
