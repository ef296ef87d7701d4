# Promise defended here: a machine that is asked to power off does so, whoever started the daemon, and what was
# acknowledged is in the image.
# shellcheck shell=bash disable=SC2154 # lib.sh has the rest

# systemctl sends SIGTERM to every process of a session before it unmounts: the daemon must stay until then.
test_a_machine_powers_off_with_a_device_mounted_that_was_added_by_hand() {
    boot <<'INSIDE'
install_package
modprobe -q ublk_drv || true
vhdx-ublk create /images/disk.vhdx --size 1G
systemd-run --quiet --scope --slice=user.slice vhdx-ublk add /images/disk.vhdx
mkfs.ext4 -q /dev/ublkb0
mount /dev/ublkb0 /mnt
seq 1000000 >/mnt/numbers
# After the end of this script, which has to be reported first.
systemd-run --quiet --on-active=3 systemctl poweroff
INSIDE
    note "the machine was off $(off_seconds) s later"
    image_closed disk.vhdx
    no_io_errors
    "$VHDX_UBLK" convert "$machine/disk.vhdx" "$machine/disk.raw"
    fsck.ext4 -fn "$machine/disk.raw"
    [ "$(debugfs -R 'cat /numbers' "$machine/disk.raw" 2>/dev/null | sha256sum)" = "$(seq 1000000 | sha256sum)" ] ||
        fail "what was written is not there"
}

test_a_power_cut_leaves_what_was_flushed() {
    boot_and_cut <<'INSIDE'
install_package
vhdx-ublk create /images/disk.vhdx --size 1G
vhdx-ublk add /images/disk.vhdx
mkfs.ext4 -q /dev/ublkb0
mount /dev/ublkb0 /mnt
seq 1000000 >/mnt/numbers
sync -f /mnt/numbers
sync -f /images
cut_power
INSIDE
    boot <<'INSIDE'
vhdx-ublk add /images/disk.vhdx
mount /dev/ublkb0 /mnt
[ "$(sha256sum </mnt/numbers)" = "$(seq 1000000 | sha256sum)" ]
umount /mnt
vhdx-ublk del /dev/ublkb0
INSIDE
    image_closed disk.vhdx
}
