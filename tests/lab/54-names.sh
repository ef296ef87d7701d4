# The names of a device below /dev: made by udev, or by the daemon where udev does not make them.
# shellcheck shell=bash

# The rules, and others that are named, read by the real udev for as long as the test runs. While udev handles an
# event, it reads rules that are new by itself, half of a file too. It would not read them again, for it goes by the
# time of the folder, which stays as it is when the second half is written.
install_rule() {
    udevadm settle --timeout=20
    mkdir -p /run/udev/rules.d
    cp "$tests"/../../tools/package.d/*.rules "$@" /run/udev/rules.d/
    udevadm control --reload
}

# After each test: by these rules udev reads devices, which other tests count.
take_down() {
    [ ! -e /run/udev/away ] || mv /run/udev/away /run/udev/control
    udevadm settle --timeout=20
    rm -f /run/udev/rules.d/*
    udevadm control --reload
}

# Where links lead; a link that is not there leads nowhere.
leads() { for link; do printf '%s -> %s\n' "$link" "$(readlink -e "$link" || echo nowhere)"; done; }

test_names_by_udev() {
    local device id uuid
    install_rule
    make_partitioned parts.vhdx
    id=$(ublk info --json parts.vhdx | tr -d ' \n' | sed -n 's/.*"disk_id":"\([^"]*\)".*/\1/p')
    device=$(ublk add --name data parts.vhdx)
    [ "$(readlink -f /dev/vhdx/data)" = "$device" ] || fail "no link when add has returned"
    udevadm settle --timeout=20
    uuid=$(blkid -o value -s UUID "${device}p2")
    names() {
        leads /dev/vhdx/data /dev/vhdx/data-part2 "/dev/disk/by-id/vhdx-$id" "/dev/disk/by-id/vhdx-$id-part3" \
            "/dev/disk/by-uuid/$uuid" /dev/disk/by-label/Work
    }
    names >first
    sed 's/^/note: /' first
    ! grep -q nowhere first || fail "a name is missing: $(udevadm info "${device}p2")"
    kill_daemon parts.vhdx
    names | cmp first - || fail "names go with the daemon"
    ublk recover data >/dev/null
    ublk snapshot data child.vhdx >/dev/null
    udevadm trigger --action=change --settle "$device" "${device}p2"
    names | cmp first - || fail "other names after a recovery, a snapshot and an event"
    ublk create other.vhdx --size 64M
    refused ublk add --name data other.vhdx
    grep -q 'has the name data' refusal
    # As daemons leave it that are killed before their entry has the number of their disk.
    touch /run/vhdx-ublk/4000000000.udev /run/vhdx-ublk/.4000000001.udev
    ublk del /dev/vhdx/data-part2
    udevadm settle --timeout=20
    names >last
    [ "$(grep -c nowhere last)" = 6 ] || fail "names are left: $(cat last)"
    [ -z "$(ls /run/vhdx-ublk/{,.}*.udev 2>/dev/null)" ] || fail "properties are left"
    # The child has the names now, as after a reboot; a later device of the number does not get them.
    ublk add --name data child.vhdx >/dev/null
    udevadm settle --timeout=20
    names | cmp first - || fail "other names for the same disk"
    ublk del data
    ublk add other.vhdx >/dev/null
    udevadm settle --timeout=20
    leads /dev/vhdx/data "/dev/disk/by-id/vhdx-$id" >last
    [ "$(grep -c nowhere last)" = 2 ] || fail "another device has the names: $(cat last)"
    ublk del 0
}

# Where no udev runs, or it lacks the rule, the daemon makes the link.
test_names_without_udev() {
    local device
    make_partitioned parts.vhdx
    device=$(ublk add --name data parts.vhdx)
    [ "$(readlink /dev/vhdx/data)" = ../ublkb0 ] || fail "no link without the rule"
    ublk del data
    [ ! -L /dev/vhdx/data ] || fail "the link stays"
    mv /run/udev/control /run/udev/away
    device=$(ublk add --name data parts.vhdx)
    leads /dev/vhdx/data /dev/vhdx/data-part2 | sed 's/^/note: /'
    [ "$(readlink -f /dev/vhdx/data-part2)" = "${device}p2" ] || fail "no link to a partition"
    kill_daemon parts.vhdx
    ublk del --force data
    [ ! -L /dev/vhdx/data ] && [ ! -L /dev/vhdx/data-part2 ] || fail "links outlive the device of a dead daemon"
}

# A device that has lost its entry leaves its link; the next one of the number does not answer to it.
test_names_of_a_number_that_is_used_again() {
    ublk create data.vhdx --size 64M
    ublk create other.vhdx --size 64M
    ublk add --name data --recovery none data.vhdx >/dev/null
    kill_daemon data.vhdx
    rm /run/vhdx-ublk/0.json
    ublk del --force 0
    [ "$(readlink /dev/vhdx/data)" = ../ublkb0 ] || note "nothing is left to be removed"
    [ "$(ublk add other.vhdx)" = /dev/ublkb0 ]
    [ ! -L /dev/vhdx/data ] || fail "another image has the name"
    ublk del 0
}

# The same disk, larger: the same names.
test_names_survive_a_resize() {
    local device id
    install_rule
    ublk create data.vhdx --size 64M
    id=$(ublk info --json data.vhdx | tr -d ' \n' | sed -n 's/.*"disk_id":"\([^"]*\)".*/\1/p')
    for size in 64M 128M; do
        [ "$size" = 64M ] || ublk resize --size "$size" data.vhdx
        device=$(ublk add --name data data.vhdx)
        udevadm settle --timeout=20
        for link in /dev/vhdx/data "/dev/disk/by-id/vhdx-$id"; do
            [ "$(readlink -f "$link")" = "$device" ] || fail "$size: $link leads to $(readlink -f "$link")"
        done
        ublk del data
    done
}

# Desktops leave it alone, and what is on it gets no link.
test_names_of_an_untrusted_image() {
    local device id
    # The rules of newer systems examine ublk devices, too.
    sed 's/^\(KERNEL!="loop\*|\)\(ublkb\*|\)\?/\1ublkb*|/' /usr/lib/udev/rules.d/60-persistent-storage.rules \
        >60-persistent-storage.rules
    grep -q '"loop\*|ublkb\*|' 60-persistent-storage.rules || fail "the rules have changed"
    install_rule 60-persistent-storage.rules
    ublk create data.vhdx --size 64M
    id=$(ublk info --json data.vhdx | tr -d ' \n' | sed -n 's/.*"disk_id":"\([^"]*\)".*/\1/p')
    device=$(ublk add data.vhdx)
    mkfs.ext4 -q -F -L Received "$device"
    ublk del 0
    device=$(ublk add --untrusted --name data data.vhdx)
    udevadm settle --timeout=20
    udevadm info -q property "$device" >properties
    grep -qx UDISKS_IGNORE=1 properties || fail "$(cat properties)"
    [ "$(readlink -f /dev/vhdx/data)" = "$device" ] || fail "it has no name"
    [ ! -L /dev/disk/by-label/Received ] || fail "what is on it has a link"
    ! grep ID_FS_ properties || fail "it was examined"
    leads "/dev/disk/by-id/vhdx-$id" | grep nowhere || fail "it has a link by the identifier that it says it has"
    ublk del 0
    [ -z "$(ls /run/vhdx-ublk/*.untrusted 2>/dev/null)" ] || fail "its mark is left"
    device=$(ublk add --read-only data.vhdx)
    udevadm settle --timeout=20
    ! udevadm info -q property "$device" | grep UDISKS_IGNORE || fail "another device of the number is ignored"
    [ "$(readlink -f /dev/disk/by-label/Received)" = "$device" ] || fail "what is on a trusted one has no link"
    ublk del 0
}

# The loop device that shows a partition of it.
test_names_of_a_partition_of_an_untrusted_image() {
    local device plain
    install_rule
    make_partitioned parts.vhdx
    ublk mount -o untrusted,partition=Work parts.vhdx "$mnt"
    udevadm settle --timeout=20
    device=$(findmnt -no SOURCE "$mnt")
    [ "$(cat "/sys/block/${device#/dev/}/loop/backing_file")" = /dev/ublkb0 ] || fail "it is mounted as $device"
    udevadm info -q property "$device" >properties
    grep -qx UDISKS_IGNORE=1 properties || fail "$(cat properties)"
    ! grep ID_FS_ properties || fail "it was examined"
    [ ! -L /dev/disk/by-label/Work ] || fail "what is on it has a link"
    ublk umount "$mnt"
    # Other loop devices have what they had.
    truncate -s 64M plain.img
    mkfs.ext4 -q -F -L Plain plain.img
    plain=$(losetup --find --show plain.img)
    udevadm settle --timeout=20
    udevadm info -q property "$plain" >properties
    leads /dev/disk/by-label/Plain >plain.link
    losetup -d "$plain"
    grep -qx ID_FS_LABEL=Plain properties || fail "another loop device is not examined: $(cat properties)"
    ! grep -q nowhere plain.link || fail "what is on another loop device has no link"
    ! grep UDISKS_IGNORE properties || fail "another loop device is ignored"
}

test_names_rule_is_well_formed() {
    udevadm --help | grep -q verify || { note "this udev does not verify rules"; return 0; }
    udevadm verify --resolve-names=never "$tests"/../../tools/package.d/*.rules
}
