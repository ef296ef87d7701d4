# File systems in an image at rest give up their free space, and nothing else of the image changes.
# shellcheck shell=bash

# part DEVICE N: the node of a partition, which appears a moment after its table was written.
part() {
    for _ in $(seq 100); do
        [ ! -b "$1p$2" ] || break
        sleep 0.05
    done
    echo "$1p$2"
}

# table DEVICE SIZE_MB...: a GPT with a partition of each size.
table() {
    local device=$1 size
    shift
    {
        echo "label: gpt"
        for size; do echo "size=${size}MiB"; done
    } | sfdisk -q "$device"
    part "$device" $# >/dev/null
}

# make_fs TYPE NODE
make_fs() {
    case $1 in
    ext4) mkfs.ext4 -q -F -E nodiscard -J size=4 "$2" ;;
    xfs) mkfs.xfs -q -f -K "$2" ;;
    btrfs) mkfs.btrfs -q -f -K "$2" 2>/dev/null ;;
    ntfs3) mkntfs -Q -F "$2" >/dev/null 2>&1 ;;
    f2fs) mkfs.f2fs -q -f -t 0 "$2" >/dev/null ;;
    vfat) mkfs.vfat "$2" >/dev/null ;;
    esac
}

# half_empty TYPE NODE SEED: a file system with files, three quarters of which are deleted and not trimmed. Adds what
# is left to the list of what must stay.
half_empty() {
    local number options=rw
    make_fs "$1" "$2"
    [ "$1" != f2fs ] || options=nodiscard
    [ "$1" != btrfs ] || options=nodiscard
    mount -t "$1" -o "$options" "$2" "$mnt"
    for number in 0 1 2 3 4 5 6 7; do
        stamps x 0 4 "$(($3 * 10 + number))" >"$mnt/$number"
    done
    sync -f "$mnt"
    rm "$mnt"/[1-6]
    (cd "$mnt" && sha256sum 0 7 | sed "s|^|$1 |") >>kept
    umount "$mnt"
}

# check_kept TYPE NODE: the files are there, and the file system is sound.
check_kept() {
    case $1 in
    ext4) e2fsck -fn "$2" >/dev/null 2>&1 ;;
    xfs) xfs_repair -n "$2" >/dev/null 2>&1 ;;
    btrfs) btrfs check --readonly "$2" >/dev/null 2>&1 ;;
    ntfs3) ntfsfix -n "$2" >/dev/null 2>&1 ;;
    f2fs) fsck.f2fs --dry-run "$2" >/dev/null 2>&1 ;;
    vfat) fsck.vfat -n "$2" >/dev/null 2>&1 ;;
    esac || fail "the $1 is damaged"
    mount -t "$1" -o ro "$2" "$mnt"
    (cd "$mnt" && sed -n "s/^$1 //p" "$scratch/kept" | sha256sum --quiet -c) || fail "files of the $1 have changed"
    umount "$mnt"
}

# The fields of the answer for partition N.
answer() { jq -c ".trim.volumes[] | select(.partition == $1)" said; }

# unclean TYPE NODE: as a power cut leaves it.
unclean() {
    make_fs "$1" "$2"
    mount -t "$1" "$2" "$mnt"
    stamps x 0 4 5 >"$mnt/file"
    sync -f "$mnt"
    stamps x 0 4 6 >"$mnt/other"
    sync "$mnt/other"
    dd if="$2" of=cut bs=1M iflag=direct status=none
    umount "$mnt"
    dd if=cut of="$2" bs=1M oflag=direct status=none
    rm cut
}

# mark_as_dirty NODE: an NTFS as Windows leaves it that has not shut down: the flag in the information of $Volume,
# whose record is the fourth of the file table.
mark_as_dirty() {
    python3 - "$1" <<'END'
import struct, sys
with open(sys.argv[1], "r+b") as disk:
    head = disk.read(512)
    sector, sectors, table = struct.unpack_from("<HB", head, 11) + struct.unpack_from("<Q", head, 48)
    record = table * sector * sectors + 3 * 1024
    disk.seek(record)
    data = disk.read(1024)
    at = struct.unpack_from("<H", data, 20)[0]
    while struct.unpack_from("<I", data, at)[0] != 0x70:
        at += struct.unpack_from("<I", data, at + 4)[0]
    at += struct.unpack_from("<H", data, at + 20)[0] + 10
    disk.seek(record + at)
    disk.write(bytes([data[at] | 1]))
END
    sync "$1"
}

# One command takes an image whose files were deleted to the size of those that are left.
test_compact_trims_every_file_system() {
    local device types=(ext4 xfs btrfs ntfs3 vfat) number before files
    ublk create disk.vhdx --size 4G --block-size 1M
    device=$(ublk add disk.vhdx)
    table "$device" 400 400 400 400 400
    : >kept
    for number in 1 2 3 4 5; do
        half_empty "${types[number - 1]}" "$(part "$device" $number)" $number
    done
    ublk del "$device"
    before=$(host_bytes disk.vhdx)
    ublk compact disk.vhdx --trim --dry-run >said
    [ "$(grep -c 'would be trimmed' said)" = 5 ] || { cat said; fail "the outline does not name five file systems"; }
    [ "$(host_bytes disk.vhdx)" = "$before" ] || fail "an outline changes the image"
    ublk compact disk.vhdx --trim --json >said
    for number in 1 2 3 4 5; do
        [ "$(answer $number | jq '.trimmed_bytes > 50000000 and .left_alone == null')" = true ] ||
            { answer $number; fail "${types[number - 1]} was not trimmed"; }
    done
    [ "$(ublk list --json)" = "[]" ] || fail "a device is left"
    [ "$(jq .host_bytes_before said)" -ge $((before - (1 << 20))) ] || fail "what the trim won is not in the figures"
    # Files of 8 MiB on each; XFS has a log of 64 MiB, the others what their formats need.
    files=$((5 * 8 << 20))
    note "$((before >> 20)) -> $(($(host_bytes disk.vhdx) >> 20)) MiB on the host for $((files >> 20)) MiB of files"
    [ "$(stat -c %s disk.vhdx)" -le $((files + (112 << 20))) ] || fail "$(stat -c %s disk.vhdx) bytes are left"
    ublk check disk.vhdx
    device=$(ublk add --read-only disk.vhdx)
    for number in 1 2 3 4 5; do check_kept "${types[number - 1]}" "$(part "$device" $number)"; done
    ublk del "$device"
}

# A WSL disk: ext4 without partitions, in the blocks that Windows makes. The file follows the files within some percent.
test_compact_trims_a_disk_without_partitions() {
    local device number used
    ublk create disk.vhdx --size 8G --block-size 1M
    device=$(ublk add disk.vhdx)
    mkfs.ext4 -q -F -E nodiscard -J size=4 -m 0 "$device"
    mount "$device" "$mnt"
    for number in $(seq 60); do stamps x 0 16 "$number" >"$mnt/$number"; done
    sync -f "$mnt"
    for number in $(seq 1 2 60); do rm "$mnt/$number"; done
    manifest "$mnt" >kept
    used=$(du -s --block-size=1 "$mnt" | cut -f1)
    umount "$mnt"
    ublk del "$device"
    ublk compact disk.vhdx >said
    ublk compact disk.vhdx >said
    grep -q -- '--trim' said || { cat said; fail "the missing step is not named"; }
    ublk compact disk.vhdx --trim >said
    grep -q '^ext4: .* discarded' said || { cat said; fail "it is not said what was trimmed"; }
    note "$(($(stat -c %s disk.vhdx) >> 20)) MiB, $(($(host_bytes disk.vhdx) >> 20)) MiB on the host," \
        "for $((used >> 20)) MiB of files"
    [ "$(host_bytes disk.vhdx)" -le $((used + used / 20)) ] || fail "$(host_bytes disk.vhdx) bytes for files of $used"
    [ "$(stat -c %s disk.vhdx)" -le $((used + used / 12)) ] || fail "$(stat -c %s disk.vhdx) bytes for files of $used"
    ublk compact disk.vhdx --trim >said
    ! grep -q 'fstrim' said || { cat said; fail "a step is proposed that was taken"; }
    device=$(ublk add --read-only disk.vhdx)
    e2fsck -fn "$device" >/dev/null 2>&1
    mount -o ro "$device" "$mnt"
    manifest "$mnt" | cmp - kept
    umount "$mnt"
    ublk del "$device"
}

# What was not left in order, is encrypted, or is not known stays as it is, byte by byte, and the reason is said.
test_compact_leaves_alone_what_must_not_be_mounted() {
    local device number digests
    ublk create disk.vhdx --size 2G --block-size 1M
    device=$(ublk add disk.vhdx)
    table "$device" 64 300 64 64 64 64 64 100 64 128 128
    unclean ext4 "$(part "$device" 1)"
    unclean xfs "$(part "$device" 2)"
    echo -n secret | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "$(part "$device" 3)" -
    mkswap -q "$(part "$device" 4)" >/dev/null
    make_fs ntfs3 "$(part "$device" 5)"
    mark_as_dirty "$(part "$device" 5)"
    stamps x 0 8 9 | dd of="$(part "$device" 6)" bs=1M oflag=direct iflag=fullblock status=none
    make_fs ext4 "$(part "$device" 7)"
    debugfs -w -R "set_super_value state 3" "$(part "$device" 7)" 2>/dev/null # errors were found in it
    sync "$(part "$device" 7)"
    # What would have its driver use other devices.
    make_fs f2fs "$(part "$device" 8)"
    make_fs ext4 "$(part "$device" 9)"
    debugfs -w -R "set_super_value journal_inum 0" "$(part "$device" 9)" 2>/dev/null
    sync "$(part "$device" 9)"
    mkfs.btrfs -q -f -K -d single -m single "$(part "$device" 10)" "$(part "$device" 11)" 2>/dev/null
    digests=$(sha256sum "$device"p*)
    ublk del "$device"
    ublk compact disk.vhdx --trim --json >said
    for number in "1 journal" "2 journal" "3 encrypted" "4 swap" "5 Windows" "6 recognised" "7 errors" \
        "8 path" "9 another" "10 several" "11 several"; do
        # shellcheck disable=SC2086 # two words
        set -- $number
        answer "$1" | jq -e --arg why "$2" '.trimmed_bytes == null and (.left_alone | contains($why))' >/dev/null ||
            { answer "$1"; fail "partition $1 was not left alone for its $2"; }
    done
    ublk compact disk.vhdx --trim >said
    grep -q '^luks on partition 3 was left alone: it is encrypted' said || { cat said; fail "there is no reason"; }
    device=$(ublk add --read-only disk.vhdx)
    part "$device" 11 >/dev/null
    [ "$(sha256sum "$device"p*)" = "$digests" ] || fail "one was changed"
    ublk del "$device"
}

# Where trimming is not possible the other steps are taken, and the status shows it.
test_compact_goes_without_the_trim() {
    local device status=0
    ublk create parent.vhdx --size 64M --block-size 1M
    device=$(ublk add parent.vhdx)
    make_fs ext4 "$device"
    write_stamps "$device" 40 8 1
    dd if=/dev/zero of="$device" bs=1M seek=40 count=8 oflag=direct status=none
    ublk del "$device"
    ublk create child.vhdx --parent parent.vhdx
    ublk compact parent.vhdx --trim --json >said || status=$?
    [ $status = 1 ] || fail "status $status"
    jq -e '(.trim.not_possible | contains("child.vhdx")) and .zero_blocks >= 8' said >/dev/null ||
        { cat said; fail "the children do not keep it from being written, or nothing else was done"; }
    ublk check child.vhdx
}

# Ctrl-C and a kill leave no device, and an image that is sound.
test_compact_that_ends_in_the_trim_leaves_nothing() {
    local device pid signal try
    ublk create disk.vhdx --size 1G --block-size 1M
    device=$(ublk add disk.vhdx)
    : >kept
    half_empty ext4 "$device" 1
    ublk del "$device"
    for signal in INT TERM KILL; do
        for try in 1 2 3; do
            # A process in the background ignores SIGINT unless it has a session of its own.
            setsid -f bash -c 'trap - INT; echo $$ >pid; exec "$0" compact disk.vhdx --trim >/dev/null 2>&1' \
                "$VHDX_UBLK"
            for _ in $(seq 200); do
                [ "$(ublk list --json)" = "[]" ] || break
                sleep 0.02
            done
            sleep "0.$((try * 3))"
            pid=$(cat pid)
            kill "-$signal" "$pid" 2>/dev/null || true
            for _ in $(seq 200); do
                [ -e "/proc/$pid" ] || [ "$(ublk list --json)" != "[]" ] || break
                sleep 0.05
            done
            [ "$(ublk list --json)" = "[]" ] || fail "$signal left a device"
            status=0
            ublk check disk.vhdx >said || status=$?
            [ $status = 0 ] || [ $status = 3 ] || { cat said; fail "not sound after $signal"; }
        done
    done
    ublk compact disk.vhdx --trim
    device=$(ublk add --read-only disk.vhdx)
    check_kept ext4 "$device"
    ublk del "$device"
}

# Waits until what a killed command has left behind is gone.
until_left_alone() {
    for _ in $(seq 600); do
        [ "$(ublk list --json)" != "[]" ] || break
        sleep 0.05
    done
}

# What the process PID has won, and those before it: parts that are trimmed, and moves of 48 MiB.
won() {
    cat /run/vhdx-ublk/.trim-*[0-9a-f] 2>/dev/null | jq -c '[.outcome != null, ([.places[].until] | add)]'
    awk '/^write_bytes/ { print int($2 / (48 * 1048576)) }' "/proc/$1/io" 2>/dev/null
}

# Compacts disk.vhdx with --trim, and kills that as soon as it has won something, until there is nothing left to win;
# prints how often. What a kill leaves is sound, but for space that nothing names.
trim_under_fire() {
    local kills status pid before
    for kills in $(seq 0 60); do
        before=$(won self)
        "$VHDX_UBLK" compact disk.vhdx --trim >said 2>&1 &
        pid=$!
        while [ -e "/proc/$pid/exe" ] && [ "$(won $pid)" = "$before" ]; do sleep 0.02; done
        kill -KILL $pid || true
        status=0
        wait $pid || status=$?
        [ $status = 137 ] || break
        until_left_alone
        status=0
        ublk check disk.vhdx >said 2>&1 || status=$?
        [ $status = 0 ] || [ $status = 3 ] || { cat said >&2; return 1; }
    done 2>/dev/null
    [ $status = 0 ] || { cat said >&2; return 1; }
    [ "$kills" -lt 60 ] || { echo "it does not end" >&2; return 1; }
    echo "$kills"
}

# freed_disk FILES: an ext4 without partitions on disk.vhdx, of whose FILES of 16 MiB one of three is left; prints the
# bytes that are in use. What is left is listed in `kept`.
freed_disk() {
    local device number
    ublk create disk.vhdx --size 14G --block-size 1M
    device=$(ublk add disk.vhdx)
    mkfs.ext4 -q -F -E nodiscard -J size=4 -m 0 "$device"
    mount "$device" "$mnt"
    for number in $(seq "$1"); do stamps x 0 16 "$number" >"$mnt/$number"; done
    sync -f "$mnt"
    for number in $(seq "$1"); do [ $((number % 3)) = 0 ] || rm "$mnt/$number"; done
    manifest "$mnt" >kept
    du -s --block-size=1 "$mnt" | cut -f1
    umount "$mnt"
    ublk del "$device"
}

check_freed_disk() {
    local device
    ublk check disk.vhdx >said || { cat said; fail "not sound after all"; }
    device=$(ublk add --read-only disk.vhdx)
    e2fsck -fn "$device" >/dev/null 2>&1 || fail "the file system is damaged"
    mount -o ro "$device" "$mnt"
    manifest "$mnt" | cmp - kept || fail "files have changed"
    umount "$mnt"
    ublk del "$device"
}

# A command that is killed whenever it has won something is continued by the next one, and the last one ends.
test_compact_with_trim_ends_under_kills() {
    local used before kills
    used=$(freed_disk 75)
    before=$(stat -c %s disk.vhdx)
    kills=$(trim_under_fire)
    note "$((before >> 20)) -> $(($(stat -c %s disk.vhdx) >> 20)) MiB for $((used >> 20)) MiB of files, $kills kills"
    [ "$kills" -ge 6 ] || fail "it was killed $kills times only"
    [ "$(stat -c %s disk.vhdx)" -le $((used + used / 12)) ] || fail "$(stat -c %s disk.vhdx) bytes for files of $used"
    [ -z "$(find /run/vhdx-ublk -name '.trim-*')" ] || fail "a record is left"
    check_freed_disk
}

# What an interrupted command has trimmed is not trimmed again, unless the disk was written since.
test_compact_remembers_what_it_has_trimmed() {
    local pid record device
    freed_disk 30 >/dev/null
    "$VHDX_UBLK" compact disk.vhdx --trim --max-rate 1M >/dev/null 2>&1 &
    pid=$!
    for _ in $(seq 1200); do
        record=$(find /run/vhdx-ublk -name '.trim-*[0-9a-f]')
        [ -z "$record" ] || [ "$(jq '.outcome != null' "$record")" != true ] || break
        sleep 0.05
    done
    kill -KILL "$pid"
    wait "$pid" || true
    until_left_alone
    # Only a record that is used has these figures shown.
    jq '.outcome = null | .places[0].bytes = 777' "$record" >parts
    jq '.outcome[0].trimmed_bytes = 12345' "$record" >outcome
    cat parts >"$record"
    ublk compact disk.vhdx --trim --dry-run >/dev/null
    ublk compact disk.vhdx --trim --json >said
    jq -e '.trim.volumes[0].trimmed_bytes == 777 and .moves > 0' said || { cat said; fail "a part is trimmed again"; }
    [ ! -e "$record" ] || fail "the record is left"
    cat outcome >"$record"
    ublk compact disk.vhdx --trim --json >said
    jq -e '.trim.volumes[0].trimmed_bytes == 12345' said || { cat said; fail "the image is served again"; }
    check_freed_disk
    device=$(ublk add disk.vhdx)
    mount "$device" "$mnt"
    rm "$mnt/3"
    umount "$mnt"
    ublk del "$device"
    cat outcome >"$record"
    ublk compact disk.vhdx --trim --json >said
    jq -e '.trim.volumes[0].trimmed_bytes != 12345' said || { cat said; fail "an old record is trusted"; }
}
