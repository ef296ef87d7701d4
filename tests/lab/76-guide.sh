# The commands of the guide's pages work as they stand there, from the first to the last.
#
# Not followed, or not here:
#   boot            needs systemd: tests/boot/60-guide.sh
#   kubernetes      needs a cluster; its commands on the node are those of `boot`
#   network-images  needs servers: 65-network.sh starts them and does what the page has
#   export, iSCSI   needs LIO, which the laboratory's kernel does not have
#   watch           its units need systemd, and bpftrace needs a kernel with BPF: tests/package/run
#   wsl, windows    what runs on Windows
# shellcheck shell=bash

# shellcheck source=pages.sh
. "$tests/pages.sh"

# follow PAGE: runs standard input, or what stands on the page, and stops at the first command that fails. Folders of
# this test are in the place of the reader's.
follow() {
    mkdir -p bin backup rescued disks
    ln -sf "$VHDX_UBLK" bin/vhdx-ublk
    if [ $# = 1 ]; then commands_of "$1"; else cat; fi |
        sed -E -e "s#/mnt\\b#$mnt#g" -e "s#/(backup|rescued|disks)\\b#$PWD/\\1#g" >"$1.sh"
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
    # The page's part about a disk in use has one.
    commands_of shrink |
        sed -e '/compact .dev.ublkb0/i vhdx-ublk add ext4.vhdx; mount /dev/ublkb0 /mnt' \
            -e '/compact .dev.ublkb0/a umount /mnt; vhdx-ublk del /dev/ublkb0' |
        follow shrink -
    [ "$(stat -c %s ext4.vhdx)" -lt "$before" ] || fail "the file is not smaller"
    ublk info --json ext4.vhdx | tr -d ' \n' | grep -q '"virtual_size":1073741824,' && fail "the disk is not smaller"
    has_its_files ext4.vhdx ext4.vhdx.files
}

test_guide_grow() {
    local device served
    image ext4.vhdx 1G
    image served.vhdx 1G
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    printf 'label: gpt\n,,L\n' | sfdisk -q "$device"
    ublk del "$device"
    # The first part of the page has a disk in use.
    served=$(ublk add served.vhdx)
    mount "$served" "$mnt"
    commands_of grow | sed "s|/dev/ublkb0|$served|" | follow grow -
    [ "$(df -B 1M --output=size "$mnt" | tail -n 1)" -gt 1900 ] || fail "df does not show the room"
    umount "$mnt"
    ublk del "$served"
    has_its_files served.vhdx served.vhdx.files
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
        sed "/snapshot --freeze monday.vhdx/i dd if=/dev/urandom of=$device bs=1M seek=900 count=3 oflag=direct" |
        follow backup -
    ublk compare restored.vhdx backup/disk.raw
    ublk del "$device"
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

take_down() {
    local loop
    umount -q -i -l data 2>/dev/null || true
    for loop in $(losetup -j copy.raw -O NAME --noheadings 2>/dev/null); do losetup -d "$loop"; done
    release_sbin
    timeout 20 nvme disconnect --nqn=nqn.2026-11.org.example:disk >/dev/null 2>&1 || true
}

# partitioned FILE [OPTION...]: partition 3 has the files, partition 1 is that of the firmware.
partitioned() {
    local device
    ublk create "$@"
    device=$(ublk add "$1")
    sfdisk -q "$device" <<<$'label: gpt\nsize=64M, type=uefi\nsize=16M, type=E3C9E316-0B5C-4DB8-817D-F92DF00215AE\n,'
    udevadm settle --timeout=10
    mkfs.vfat "${device}p1" >/dev/null
    mkfs.ext4 -q -L Data "${device}p3"
    mount "${device}p3" "$mnt"
    mkdir "$mnt/Users" "$mnt/home"
    copy_real_files 20 "$mnt/Users/files"
    cp -r "$mnt/Users/files" "$mnt/home/"
    manifest "$mnt/Users/files" >"$1.files"
    umount "$mnt"
    ublk del "$device"
}

test_guide_wsl() {
    local before
    own_sbin
    image ext4.vhdx 256M
    partitioned windows.vhdx --size 512M
    before=$(sha ext4.vhdx)
    commands_of wsl Once | sed '/--partition/a vhdx-ublk umount /mnt' | follow wsl-once -
    [ "$(sha ext4.vhdx)" = "$before" ] || fail "a mount that is read-only has changed the file"
    commands_of wsl 'With mount(8)' | sed "s|/usr/local/sbin/vhdx-ublk|$VHDX_UBLK|" | follow wsl-mount -
    [ "$(sha ext4.vhdx)" = "$before" ] || fail "mount -o ro has changed the file"
    mkdir -p data disks
    mv windows.vhdx disks/data.vhdx
    commands_of wsl 'At every boot' | sed -E "s#/disks\b#$PWD/disks#g; s# /data # $PWD/data #" >fstab
    mount -T fstab -a
    manifest data/Users/files | cmp - windows.vhdx.files || fail "the line of fstab mounts something else"
    umount data
    [ "$(ublk list --json)" = '[]' ] || fail "a device is left"
}

test_guide_rescue() {
    local before
    mkdir disks
    partitioned disks/base.vhdx --size 512M
    ublk create newest.avhdx --parent disks/base.vhdx
    before=$(sha newest.avhdx)$(sha disks/base.vhdx)
    { commands_of rescue 'Look at the chain' && commands_of rescue 'Mount it'; } |
        sed '/^vhdx-ublk mount.*--partition/!{/^vhdx-ublk mount/a vhdx-ublk umount /mnt
        }' | follow rescue -
    manifest rescued/Users/files | cmp - disks/base.vhdx.files || fail "the files are not rescued"
    [ "$(sha newest.avhdx)$(sha disks/base.vhdx)" = "$before" ] || fail "something was changed"
    # Its disk is one file system, and both of its headers are lost.
    image damaged.vhdx 256M
    before=$(ublk add damaged.vhdx) && mount "$before" "$mnt" && mv "$mnt/files" "$mnt/home" && umount "$mnt" &&
        ublk del "$before"
    dd if=/dev/zero of=damaged.vhdx bs=64K seek=1 count=2 conv=notrunc status=none
    before=$(sha damaged.vhdx)
    refused ublk add damaged.vhdx
    commands_of rescue 'What is left of a damaged image' |
        sed -e '/^cp -a/a umount /mnt; vhdx-ublk del /dev/ublkb0' -e 's/^vhdx-ublk salvage.*/& || [ $? = 3 ]/' |
        follow rescue-damaged -
    manifest rescued/home | cmp - damaged.vhdx.files || fail "the files of the damaged image are not rescued"
    [ "$(sha damaged.vhdx)" = "$before" ] || fail "the damaged image was changed"
    grep -q '^/dev/loop' rescue-damaged.log || fail "the copy is not a disk: $(tail rescue-damaged.log)"
}

test_guide_upgrade() {
    ublk create disk.vhdx --size 256M
    ublk add disk.vhdx
    cp "$VHDX_UBLK" vhdx-ublk
    follow upgrade
    [ "$(grep -c '^/dev/ublkb0: vhdx-ublk .* -> .* (pause: .* ms)$' upgrade.log)" = 2 ] || fail "$(cat upgrade.log)"
    ublk del 0
}

test_guide_json() {
    follow json
    grep -qx 1073741824 json.log || fail "$(cat json.log)"
    mkdir schema
    grep -o '`vhdx-ublk generate schema DIR`' "$guide/json.md" | tr -d '`' | sed 's/DIR/schema/' | follow schema -
    jq -e '[.. | objects | select(has("virtual_size"))] != []' schema/info.json >/dev/null
}

# The commands in the first table. One never ends, and the machine may be unfit for devices.
test_guide_watch() {
    image disk.vhdx 256M
    ublk add disk.vhdx
    sed -n '/^# See it/,/^For Prometheus/p' "$guide/watch.md" | grep -o '`vhdx-ublk [^`]*`' | tr -d '`' |
        sed -e 's/.*--watch/set +o pipefail; & | head -n 2/' -e 's/.*doctor.*/& || [ $? = 1 ]/' |
        follow watch -
    [ "$(grep -c '^+ vhdx-ublk' watch.log)" -ge 7 ] || fail "$(cat watch.log)"
    grep -o '`vhdx-ublk metrics --textfile FILE`' "$guide/watch.md" | tr -d '`' | sed 's/FILE/disk.prom/' |
        follow metrics -
    sed -n '/^Alerts/,/^#/p' "$guide/watch.md" | grep -oE 'vhdx_ublk_[a-z_]+' | sort -u >alerts
    while read -r name; do
        grep -q "^${name}[ {]" disk.prom || fail "no metric has the name of the alert $name"
    done <alerts
    [ "$(wc -l <alerts)" -ge 5 ]
    ublk del 0
}

# By NVMe over TCP, from this machine to itself.
test_guide_export() {
    local section='NVMe over TCP' name=nqn.2014-08.org.nvmexpress:uuid:f8131ac9-cdef-4165-866b-5998c1e67890
    ! command -v modprobe >/dev/null || modprobe -q -a nvmet nvmet-tcp nvme-tcp || true
    [ -d /sys/kernel/config/nvmet ] || { skipped "no NVMe target in this kernel"; return 0; }
    image disk.vhdx 256M
    mkdir bin
    # What modprobe would load is in the kernel, or was loaded above.
    printf '#!/bin/sh\n' >bin/modprobe
    chmod +x bin/modprobe
    grep -q '`nvme disconnect --nqn=[^`]*` on the initiator' "$guide/export.md" ||
        fail "the page does not say how it ends"
    commands_of export "$section" |
        sed -e 's/192\.0\.2\.1/127.0.0.1/' -e "s/^nvme connect/& --hostnqn=$name --hostid=${name##*:}/" \
            -e '/^nvme list/a timeout 10 sh -c "until lsblk -n -o NAME,SIZE | grep nvme; do sleep 0.1; done"' \
            -e '/^rm "ports/i nvme disconnect --nqn=nqn.2026-11.org.example:disk' | follow export -
    grep -qE '^nvme[0-9]+n1 +256M$' export.log || fail "the initiator has no disk: $(cat export.log)"
    has_its_files disk.vhdx disk.vhdx.files
}

test_guide_pages_are_followed() {
    local page name
    for page in "$guide"/*.md; do
        name=$(basename "$page" .md)
        grep -qE "(follow|commands_of) $name\b|^#   $name " "$tests/76-guide.sh" ||
            fail "no test follows the page $name"
    done
}
