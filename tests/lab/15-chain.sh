# Chains: a child is read through its parents, wherever they are, and written; no parent is ever changed.
# shellcheck shell=bash
# shellcheck source=tests/lab/10-corpus.sh
. "$(dirname "${BASH_SOURCE[0]}")/10-corpus.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

state_of_both() { sha fat-differential.vhdx; sha "$1"; stat -c '%X %Y %Z' fat-differential.vhdx "$1"; }

# Serves the Windows child; its content is what the corpus' readers found, and both files stay as they are.
child_reads() {
    local parent=$1 before device
    shift
    before=$(state_of_both "$parent")
    sleep 1
    device=$(ublk add --read-only "$@" fat-differential.vhdx)
    [ "$(sha "$device")" = "$(digest_of fat-differential)" ] || fail "other content than the corpus' readers found"
    list_fat "$device"
    ublk del "$device"
    [ "$(state_of_both "$parent")" = "$before" ] || fail "a file of the chain was changed"
}

test_chain_windows_child() {
    unpack fat-parent fat-differential
    child_reads fat-parent.vhdx
    ublk info --chain --json fat-differential.vhdx | tr -d ' \n' | grep -q '"type":"differencing".*"type":"fixed"'
}

test_chain_zero_copy() {
    unpack fat-parent fat-differential
    zero_copy=on child_reads fat-parent.vhdx
    zero_copy=fallback child_reads fat-parent.vhdx
}

# Where Windows' paths lead nowhere, an option says where the parent is.
test_chain_parent_elsewhere() {
    unpack fat-parent fat-differential
    mkdir -p 'elsewhere/Test_Data'
    mv fat-parent.vhdx elsewhere/Test_Data/FAT-Parent.vhdx
    ! ublk add --read-only fat-differential.vhdx 2>said || fail "the parent is nowhere it could be found"
    grep -q -- '--parent-map' said || fail "no remedy: $(cat said)"
    child_reads elsewhere/Test_Data/FAT-Parent.vhdx --parent elsewhere/Test_Data/FAT-Parent.vhdx
    child_reads elsewhere/Test_Data/FAT-Parent.vhdx --parent-map 'c:\projects\dfvfs=elsewhere'
}

# A child's parent is named, or found beside the child, which names it from then on; nothing that is served is
# changed.
test_chain_parent_moved() {
    unpack fat-parent fat-differential
    mkdir elsewhere
    mv fat-parent.vhdx elsewhere/
    ublk relink fat-differential.vhdx elsewhere/fat-parent.vhdx
    child_reads elsewhere/fat-parent.vhdx
    mv elsewhere/fat-parent.vhdx .
    local device before
    before=$(sha fat-parent.vhdx)
    device=$(ublk add fat-differential.vhdx)
    ! ublk relink fat-differential.vhdx fat-parent.vhdx 2>said || fail "a child that is served was changed"
    grep -q "$device" said || fail "$(cat said)"
    ! ublk merge fat-differential.vhdx 2>said || fail "a child that is served was merged"
    grep -q "$device" said || fail "$(cat said)"
    ublk del "$device"
    ublk info --json fat-differential.vhdx | grep -q '"relative_path": ".*fat-parent.vhdx"'
    ublk info --json fat-differential.vhdx | grep 'relative_path' | grep -qv elsewhere ||
        fail "the path was not renewed"
    [ "$(sha fat-parent.vhdx)" = "$before" ] || fail "the parent was changed"
    child_reads fat-parent.vhdx
    device=$(ublk add --read-only fat-parent.vhdx)
    ! ublk merge fat-differential.vhdx 2>said || fail "merged into an image that is served"
    grep -q "$device" said || fail "$(cat said)"
    ublk del "$device"
    ublk merge fat-differential.vhdx >removed
    device=$(ublk add --read-only fat-parent.vhdx)
    [ "$(sha "$device")" = "$(digest_of fat-differential)" ] || fail "merged, it is another disk"
    ublk del "$device"
}

test_chain_wrong_parent_is_refused() {
    unpack fat-differential
    ublk create fat-parent.vhdx --size 4M
    ! ublk add --read-only fat-differential.vhdx 2>said || fail "an empty disk is not its parent"
    grep -q 'DataWriteGuid' said || fail "$(cat said)"
    [ "$(ublk list --json)" = "[]" ]
}

# A parent that is being read cannot be written; the child of a parent that is being written is not served.
test_chain_parent_is_locked() {
    unpack fat-parent fat-differential
    local device
    device=$(ublk add --read-only fat-differential.vhdx)
    ! ublk add fat-parent.vhdx 2>said || fail "the parent was opened for writing"
    grep -q "$device reads it" said || fail "$(cat said)"
    ublk del "$device"
    device=$(ublk add --force fat-parent.vhdx)
    ! ublk add --read-only fat-differential.vhdx 2>said || fail "the parent is being written"
    grep -q "$device" said || fail "the holder is not named: $(cat said)"
    ublk del "$device"
}

# Windows' child is written; its parent is not, and what was written is there afterwards.
test_chain_windows_child_is_written() {
    unpack fat-parent fat-differential
    local device before
    before=$(sha fat-parent.vhdx)
    device=$(ublk add fat-differential.vhdx)
    [ "$(sha "$device")" = "$(digest_of fat-differential)" ] || fail "other content than the corpus' readers found"
    mount_partition "$device" vfat rw
    head -c 300K /dev/urandom >written
    cp written "$mnt/written.bin"
    umount "$mnt"
    ublk del "$device"
    ublk check fat-differential.vhdx >checked || fail "$(cat checked)"
    device=$(ublk add --read-only fat-differential.vhdx)
    mount_partition "$device" vfat
    cmp written "$mnt/written.bin"
    umount "$mnt"
    ublk del "$device"
    [ "$(sha fat-parent.vhdx)" = "$before" ] || fail "the parent was changed"
}

# The content of FILE in the windows that are looked at, in MiB.
windows() {
    local window
    for window in $windows; do dd if="$1" bs=1M skip="${window%:*}" count="${window#*:}" status=none; done
}

same_content() { [ "$(windows "$1" | sha256sum)" = "$(windows model.raw | sha256sum)" ] || fail "$2"; }

# scribbled_chain SECTOR SIZE WINDOWS BLOCK...: a chain of a layer for each block size, each written at random, with a
# model beside it. What the device, and readers that share no code with it, find at every layer is what the model holds.
scribbled_chain() {
    local sector=$1 size=$2 windows=$3 number=0 name before='' device block chain=''
    shift 3
    truncate -s "$size" model.raw
    for block; do
        name=layer-$number.vhdx
        if [ "$number" = 0 ]; then
            ublk create "$name" --size "$size" --block-size "$block" --logical-sector-size "$sector"
        else
            ublk create "$name" --parent "layer-$((number - 1)).vhdx" --block-size "$block"
        fi
        device=$(ublk add "$name")
        "$here/scribbler.py" "$device" model.raw "$number" 60
        same_content "$device" "layer $number: the device differs from the model"
        kill_daemon "$name"
        ublk recover "$device" >recovered
        same_content "$device" "layer $number: it differs after a recovery"
        ublk del "$device"
        ublk check "$name" >checked || fail "$(cat checked)"
        [ -z "$before" ] || [ "$(sha "layer-$((number - 1)).vhdx")" = "$before" ] ||
            fail "layer $number changed its parent"
        before=$(sha "$name")
        chain="$name $chain"
        number=$((number + 1))
    done
    device=$(ublk add --read-only "$name")
    same_content "$device" "the chain reads otherwise than its leaf was written"
    ublk del "$device"
    others_read "$chain" "$(windows model.raw | sha256sum | cut -d' ' -f1)"
    reworked_chain "$name" "$chain"
    merged_chain "$name" "$number"
}

# reworked_chain LEAF CHAIN: base and leaf compacted, and the leaf made larger, the chain is what it was to all readers.
reworked_chain() {
    local leaf=$1 chain=$2 device
    ublk compact layer-0.vhdx --defragment >compacted
    ublk compact "$leaf" >compacted
    ublk resize "$leaf" --size +2M >resized
    device=$(ublk add --read-only "$leaf")
    same_content "$device" "compacted and resized, the disk differs from the model"
    ublk del "$device"
    others_read "$chain" "$(windows model.raw | sha256sum | cut -d' ' -f1)"
}

# merged_chain LEAF LAYERS: into the layer above the first, then into that: the device is what the chain was.
merged_chain() {
    local leaf=$1 device
    if [ "$2" -gt 2 ]; then
        ublk merge "$leaf" --into layer-1.vhdx >removed
        leaf=layer-1.vhdx
    fi
    device=$(ublk add --read-only "$leaf")
    same_content "$device" "merged into a child, the disk differs from the model"
    ublk del "$device"
    ublk merge "$leaf" >removed
    [ "$(echo layer-*.vhdx)" = layer-0.vhdx ] || fail "$(echo layer-*.vhdx) are left"
    device=$(ublk add layer-0.vhdx)
    same_content "$device" "merged into the base, the disk differs from the model"
    ublk del "$device"
    ublk check layer-0.vhdx >checked || fail "$(cat checked)"
    others_read layer-0.vhdx "$(windows model.raw | sha256sum | cut -d' ' -f1)"
}

# What other readers see of the chain, leaf first.
others_read() {
    local chain=$1 expected=$2
    if [ ! -x "${VHDX_READERS:-}" ]; then
        skipped "no independent readers (VHDX_READERS)"
        return
    fi
    # shellcheck disable=SC2086 # names without spaces
    "$VHDX_READERS" "$here/digest.py" "$windows" $chain >digests
    sed 's/^/note: /' digests
    [ "$(grep -c "$expected" digests)" -ge 1 ] || fail "no reader agrees with $expected"
}

# What the other readers get wrong in the smallest images that show it, the device gets right, and so does QEMU where it
# reads such an image at all.
test_chain_limits_of_other_readers() {
    local device model
    [ -x "${VHDX_READERS:-}" ] || { skipped "no independent readers (VHDX_READERS)"; return; }
    PYTHONDONTWRITEBYTECODE=1 "$VHDX_READERS" "$here/readers.py" "$VHDX_UBLK" . >limits
    sed 's/^/note: /' limits
    for model in *.raw; do
        device=$(ublk add --read-only "${model%.raw}.vhdx")
        cmp "$model" "$device" || fail "${model%.raw}.vhdx reads otherwise than the format says"
        ublk del "$device"
    done
    qemu-img compare -q -f vhdx -F raw crossing.vhdx crossing.raw
}

full_test_chain_of_five() { scribbled_chain 512 64M 0:64 1M 2M 32M 1M 2M; }
test_chain_of_three_4096() { scribbled_chain 4096 64M 0:64 2M 1M 32M; }
test_chain_across_a_chunk_border() { scribbled_chain 512 4108M '0:8 2048:12 4088:20' 2M 2M 32M; }

# Zeros that are written hide the parent's content, and so do zeros in part of a block.
test_chain_zeros_hide_the_parent() {
    local device
    ublk create base.vhdx --size 64M --block-size 2M
    device=$(ublk add base.vhdx)
    write_stamps "$device" 0 64 7
    ublk del "$device"
    ublk create child.vhdx --parent base.vhdx --block-size 2M
    device=$(ublk add child.vhdx)
    check_stamps "$device" 0 64 7
    blkdiscard --zeroout --offset 4M --length 4M "$device"
    blkdiscard --zeroout --offset 10752K --length 1K "$device"
    ublk del "$device"
    device=$(ublk add --read-only child.vhdx)
    cmp -n $((4 << 20)) <(dd if="$device" bs=1M skip=4 count=4 status=none) /dev/zero
    cmp -n 1024 <(dd if="$device" bs=512 skip=21504 count=2 status=none) /dev/zero
    stamps "$device" 0 64 7 >expected.raw
    dd if=/dev/zero of=expected.raw bs=1M seek=4 count=4 conv=notrunc status=none
    dd if=/dev/zero of=expected.raw bs=512 seek=21504 count=2 conv=notrunc status=none
    cmp -n $((64 << 20)) expected.raw "$device"
    ublk del "$device"
}

# fio verifies what it writes over a full parent, on several queues.
test_chain_verify() {
    local device
    ublk create base.vhdx --size 1G --block-size 32M
    device=$(ublk add base.vhdx)
    fio --name=fill --filename="$device" --direct=1 --rw=write --bs=1m --size=512m --minimal >/dev/null
    ublk del "$device"
    ublk create child.vhdx --parent base.vhdx --block-size 1M
    device=$(ublk add child.vhdx --queues 2)
    fio --name=verify --filename="$device" --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite \
        --bsrange=512-256k --blockalign=512 --size=1g --io_size=256m --verify=crc32c --verify_fatal=1 \
        --serialize_overlap=1 --fsync=64 \
        --minimal >fio.log 2>&1 || fail "$(cut -c1-300 fio.log)"
    ublk del "$device"
    ublk check child.vhdx >checked || fail "$(cat checked)"
}

# Who writes to a parent must know what that costs: its children are gone with the first write.
test_chain_parent_is_not_written_by_mistake() {
    local device before
    ublk create base.vhdx --size 64M
    ublk create child.vhdx --parent base.vhdx
    mkdir elsewhere
    ublk create elsewhere/other.vhdx --parent base.vhdx
    before=$(sha base.vhdx)
    ! ublk add base.vhdx 2>said || fail "a parent was opened for writing"
    grep -q "the parent of $PWD/child.vhdx:" said || fail "$(cat said)"
    grep -q -- '--force' said || fail "no remedy: $(cat said)"
    [ "$(sha base.vhdx)" = "$before" ] || fail "the parent was changed"
    device=$(ublk add --read-only base.vhdx)
    ublk del "$device"
    device=$(ublk add child.vhdx)
    ublk del "$device"
    # A child whose device has failed counts wherever it is.
    rm child.vhdx
    device=$(ublk add elsewhere/other.vhdx --recovery none)
    kill_daemon elsewhere/other.vhdx
    ! ublk add base.vhdx 2>said || fail "the parent of a failed device's image was opened for writing"
    grep -q "elsewhere/other.vhdx" said || fail "$(cat said)"
    ublk del "$device"
    ublk create child.vhdx --parent base.vhdx
    device=$(ublk add --force base.vhdx 2>said)
    grep -q "the parent of $PWD/child.vhdx:" said || fail "no warning: $(cat said)"
    write_stamps "$device" 0 4 7
    ublk del "$device"
    ! ublk check child.vhdx >said || fail "its parent was written"
    grep -q 'the chain is broken' said || fail "$(cat said)"
    # Nothing is left to lose.
    device=$(ublk add base.vhdx)
    ublk del "$device"
}

# What a served image and its parents are like can be asked at any time.
# While other devices are there, a child is served for writing, and is recovered.
test_chain_of_which_several_children_are_written() {
    local first second third
    ublk create base.vhdx --size 64M --block-size 1M
    first=$(ublk add base.vhdx)
    write_stamps "$first" 0 8 1
    ublk del "$first"
    for name in one two three; do ublk create $name.vhdx --parent base.vhdx; done
    first=$(ublk add one.vhdx)
    second=$(ublk add two.vhdx)
    write_stamps "$first" 4 2 2
    write_stamps "$second" 5 2 3
    kill_daemon one.vhdx
    third=$(ublk add three.vhdx)
    ublk recover "$first" >/dev/null
    check_stamps "$first" 4 2 2
    check_stamps "$second" 5 2 3
    check_stamps "$third" 0 8 1
    ublk del "$first" && ublk del "$second" && ublk del "$third"
    ublk check one.vhdx >/dev/null
    ublk check two.vhdx >/dev/null
}

test_chain_info_while_it_is_served() {
    local device
    ublk create base.vhdx --size 64M
    ublk create middle.vhdx --parent base.vhdx
    ublk create child.vhdx --parent middle.vhdx
    device=$(ublk add child.vhdx)
    write_stamps "$device" 0 8 7
    layers() { ublk info --chain --json "$1" | jq -c '.chain[] | [(.image | split("/") | last), .attached, .in_use]'; }
    printf '%s\n' "[\"child.vhdx\",\"$device\",true]" '["middle.vhdx",null,false]' '["base.vhdx",null,false]' >expected
    layers child.vhdx | diff expected - || fail "the chain of a served leaf is another"
    layers middle.vhdx | diff <(tail -n 2 expected) - || fail "the chain of its parent is another"
    ublk info --chain child.vhdx >said
    check_stamps "$device" 0 8 7
    ublk del "$device"
}

# The daemon's successor finds the parents where its predecessor had them.
test_chain_recovery() {
    unpack fat-parent fat-differential
    mkdir elsewhere
    mv fat-parent.vhdx elsewhere/
    local device
    device=$(ublk add --read-only --parent elsewhere/fat-parent.vhdx fat-differential.vhdx)
    kill_daemon fat-differential.vhdx
    ! ublk add elsewhere/fat-parent.vhdx 2>said || fail "the parent of a disk that somebody waits for"
    grep -q recover said || fail "$(cat said)"
    (cd / && "$VHDX_UBLK" recover "$device")
    [ "$(sha "$device")" = "$(digest_of fat-differential)" ] || fail "other content after the recovery"
    ublk del "$device"
}
