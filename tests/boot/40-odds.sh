# Promises defended here: a unit that is stopped while its disk is mounted leaves the disk, and the image is closed when
# the use ends; without room in /run nothing is lost, and all continues when there is room; without udev a disk has its
# name all the same.
# shellcheck shell=bash disable=SC2154 # lib.sh has the rest

test_a_disk_stays_when_its_unit_is_stopped_and_when_run_is_full_and_has_its_name_without_udev() {
    boot <<'INSIDE'
install_package
vhdx-ublk create /images/data.vhdx --size 1G
vhdx-ublk create /images/other.vhdx --size 64M
vhdx-ublk enable data /images/data.vhdx
vhdx-ublk enable other /images/other.vhdx noauto
systemctl start vhdx-ublk@data
mkfs.ext4 -q -E lazy_itable_init=0 /dev/vhdx/data
mount /dev/vhdx/data /mnt
no_device() { [ "$(vhdx-ublk list --json)" = '[]' ]; }
is_closed() { vhdx-ublk info --json /images/data.vhdx | grep -q '"state": "clean"'; }

# Stopped while it is mounted.
began=$SECONDS
systemctl stop vhdx-ublk@data
echo "note: a stop of a disk in use took $((SECONDS - began)) s"
journalctl -b -o cat -u vhdx-ublk@data | grep 'asked to end while /dev/ublkb0 is in use'
seq 100000 >/mnt/numbers
sync -f /mnt/numbers
! is_closed
umount /mnt
within 20 no_device
is_closed
systemctl start vhdx-ublk@data
mount /dev/vhdx/data /mnt
seq 100000 | cmp - /mnt/numbers

# No room in /run.
dd if=/dev/zero of=/run/full bs=64k 2>/dev/null || true
dd if=/dev/zero of=/run/full bs=1 oflag=append conv=notrunc 2>/dev/null || true
! systemctl start vhdx-ublk@other
[ "$(journalctl -b -o cat -u vhdx-ublk@other | grep -c '^vhdx-ublk: /run/.*No space left on device')" -eq 1 ]
pid=$(systemctl show -P MainPID vhdx-ublk@data)
kill -9 "$pid"
sleep 2
rm /run/full
within 30 restarted vhdx-ublk@data "$pid"
seq 100000 | cmp - /mnt/numbers
systemctl reset-failed vhdx-ublk@other
systemctl start vhdx-ublk@other
systemctl stop vhdx-ublk@other

# No udev.
umount /mnt
systemctl stop vhdx-ublk@data
within 20 no_device
systemctl stop systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd.service
! test -e /dev/vhdx/data
systemctl start vhdx-ublk@data
mount /dev/vhdx/data /mnt
seq 100000 | cmp - /mnt/numbers
umount /mnt
systemctl stop vhdx-ublk@data
within 20 no_device
! test -e /dev/vhdx/data
! dmesg | grep -E 'I/O error|EXT4-fs error'
INSIDE
    image_closed data.vhdx
}
