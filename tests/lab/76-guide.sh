# The commands of the guide's pages work as they stand there, from the first to the last.
# shellcheck shell=bash

guide=$tests/../../src/guide

# commands_of PAGE: what stands in its blocks of commands.
commands_of() { sed -n '/^```text$/,/^```$/{/^```/d;p}' "$guide/$1.md"; }

# follow PAGE: runs standard input, or what stands on the page, and stops at the first command that fails. Folders of
# this test are in the place of the reader's.
follow() {
    mkdir -p bin backup
    ln -sf "$VHDX_UBLK" bin/vhdx-ublk
    if [ $# = 1 ]; then commands_of "$1"; else cat; fi |
        sed -e "s|/mnt\\b|$mnt|g" -e "s|/backup\\b|$PWD/backup|g" >"$1.sh"
    [ -s "$1.sh" ] || fail "the page $1 has no commands"
    PATH=$PWD/bin:/usr/sbin:/sbin:$PATH bash -euo pipefail -x "$1.sh" >"$1.log" 2>&1 ||
        fail "$1: $(tail -n 12 "$1.log")"
}

# image FILE SIZE: with ext4 and files in it, some of which are deleted again.
image() {
    local device
    ublk create "$1" --size "$2"
    device=$(ublk add "$1")
    mkfs.ext4 -q -F "$device"
    mount "$device" "$mnt"
    copy_real_files 60 "$mnt/files"
    sync -f "$mnt"
    find "$mnt/files" -type f -size +400k -delete
    manifest "$mnt/files" >"$1.files"
    umount "$mnt"
    ublk del "$device"
}

has_its_files() {
    local device
    device=$(ublk add --read-only "$1")
    mount -o ro,noload "$device" "$mnt"
    manifest "$mnt/files" >files
    umount "$mnt"
    ublk del "$device"
    cmp files "$2" || fail "the files of $1 have changed"
}

test_guide_shrink() {
    local before
    image ext4.vhdx 1G
    before=$(stat -c %s ext4.vhdx)
    follow shrink
    [ "$(stat -c %s ext4.vhdx)" -lt "$before" ] || fail "the file is not smaller"
    ublk info --json ext4.vhdx | tr -d ' \n' | grep -q '"virtual_size":1073741824,' && fail "the disk is not smaller"
    has_its_files ext4.vhdx ext4.vhdx.files
}

test_guide_grow() {
    local device
    image ext4.vhdx 1G
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    printf 'label: gpt\n,,L\n' | sfdisk -q "$device"
    ublk del "$device"
    follow grow
    has_its_files ext4.vhdx ext4.vhdx.files
    device=$(ublk add --read-only ext4.vhdx)
    [ "$(dumpe2fs -h "$device" 2>&1 | sed -n 's/^Block count: *//p')" -gt $((1900 << 8)) ] ||
        fail "the file system has not grown"
    ublk del "$device"
    device=$(ublk add --read-only disk.vhdx)
    sfdisk --verify "$device"
    [ "$(sfdisk --json "$device" | sed -n 's/.*"size": *\([0-9]*\).*/\1/p')" -gt $((2040 << 11)) ] ||
        fail "the partition has not grown"
    ublk del "$device"
}

test_guide_backup() {
    local device
    image disk.vhdx 1G
    device=$(ublk add disk.vhdx)
    # A user of the disk between the snapshots, as the page has it in use.
    commands_of backup |
        sed "/snapshot monday.vhdx/i dd if=/dev/urandom of=$device bs=1M seek=900 count=3 oflag=direct" |
        follow backup -
    ublk compare restored.vhdx backup/disk.raw
    grep -q 'seek=[1-9]' backup.log || fail "nothing was copied by increments: the test shows nothing"
}

test_guide_windows() {
    image disk.vhdx 256M
    ublk create checkpoint.avhdx --parent disk.vhdx
    ublk create newest.avhdx --parent checkpoint.avhdx
    cp disk.vhdx was.vhdx
    follow windows
    [ "$(stat -c '%b' "$mnt/disk.vhdx")" -ge $(($(stat -c %s "$mnt/disk.vhdx") / 512)) ] || fail "the copy has holes"
    rm "$mnt/disk.vhdx"
    ublk compare upload.vhd was.vhdx
}

# The page's machine starts from the device and has its size; it ends at once, for want of a system on the disk.
test_guide_guest() {
    command -v qemu-system-x86_64 >/dev/null || { skipped "qemu-system-x86_64 is not installed"; return; }
    image disk.vhdx 256M
    mkdir bin
    printf '#!/bin/sh\necho "info block" >monitor; echo quit >>monitor\n%s\n' \
        'exec /usr/bin/qemu-system-x86_64 "$@" -S -nodefaults -serial none -monitor stdio <monitor' \
        >bin/qemu-system-x86_64
    chmod +x bin/qemu-system-x86_64
    follow guest
    grep -q '/dev/ublkb[0-9]* (raw)' guest.log || fail "$(cat guest.log)"
    has_its_files disk.vhdx disk.vhdx.files
}
