# Promises defended here: a line of /etc/vhdxtab serves a disk from boot on, under a name that stays; a daemon that is
# killed comes back by itself, and its file systems stay mounted; a machine that ends unmounts them before that; and
# whatever is wrong with a line, the machine boots.
# shellcheck shell=bash disable=SC2154 # lib.sh has the rest

# A process that no unit ends keeps the file system from being unmounted until the very end. Even then the image is
# closed.
test_a_machine_powers_off_with_a_file_system_that_stays_in_use() {
    boot <<'INSIDE'
install_package
vhdx-ublk create /images/data.vhdx --size 1G
vhdx-ublk enable data /images/data.vhdx
systemctl start vhdx-ublk@data
mkfs.ext4 -q -E lazy_itable_init=0 /dev/vhdx/data
mount /dev/vhdx/data /mnt
seq 1000000 >/mnt/numbers
systemd-run --quiet --unit=holder -p KillMode=none tail -f /mnt/numbers
INSIDE
    note "the machine was off $(off_seconds) s after the script's end"
    no_io_errors
    image_closed data.vhdx
    "$VHDX_UBLK" convert "$machine/data.vhdx" "$machine/data.raw"
    fsck.ext4 -fn "$machine/data.raw"
    [ "$(debugfs -R 'cat /numbers' "$machine/data.raw" 2>/dev/null | sha256sum)" = "$(seq 1000000 | sha256sum)" ] ||
        fail "what was written is not there"
}

# A disk with noauto is served because its partition is mounted.
test_no_line_of_the_table_stops_a_boot_or_another_line() {
    boot <<'INSIDE'
install_package
vhdx-ublk create /images/data.vhdx --size 1G
mkfs.ext4 -q "$(vhdx-ublk add /images/data.vhdx)"
vhdx-ublk del /images/data.vhdx
vhdx-ublk create /images/parts.vhdx --size 1G
vhdx-ublk add --name parts /images/parts.vhdx
sfdisk -q /dev/vhdx/parts <<<$'label: gpt\n,400M\n,'
udevadm settle
mkfs.ext4 -q /dev/vhdx/parts-part2
vhdx-ublk del parts
cat >/etc/vhdxtab <<'TABLE'
# what may go wrong
nothing
relative data.vhdx
odd /images/data.vhdx no-such-option
gone /images/gone.vhdx nofail
missing /images/missing.vhdx
data /images/data.vhdx
data /images/other.vhdx
parts /images/parts.vhdx noauto
TABLE
mkdir /data /part2 /gone /lost
cat >>/etc/fstab <<'TABLE'
/dev/vhdx/data /data ext4 defaults 0 2
/dev/vhdx/parts-part2 /part2 ext4 defaults 0 2
/dev/vhdx/gone-part1 /gone ext4 nofail,x-systemd.device-timeout=5 0 2
/images/lost.vhdx /lost vhdx nofail 0 0
TABLE
INSIDE
    boot <<'INSIDE'
mountpoint -q /data
mountpoint -q /part2
for line in 'line 2: it has a name' 'line 3: the path' 'line 4: its options' \
    'line 8: the name data is that of line 7'; do
    [ "$(dmesg | grep -c "vhdx-ublk-generator: /etc/vhdxtab: $line")" -eq 1 ] || fail "no such line, or several: $line"
    [ "$(journalctl -b -o cat -t vhdx-ublk-generator | grep -c "^/etc/vhdxtab: $line")" -eq 1 ] || fail "journal: $line"
done
for name in gone missing; do
    [ "$(systemctl is-failed "vhdx-ublk@$name")" = failed ]
    [ "$(journalctl -b -o cat -u "vhdx-ublk@$name" | grep -c "^vhdx-ublk: .*/images/$name.vhdx")" -eq 1 ]
done
! mountpoint -q /lost
[ "$(systemctl is-failed lost.mount)" = failed ]
[ "$(journalctl -b -o cat -u lost.mount | grep -c '/images/lost.vhdx')" -ge 1 ]
[ "$(systemctl is-system-running)" != maintenance ]
INSIDE
    no_io_errors
    image_closed parts.vhdx
}

# The new program dies when the old one has ended: the old one serves the disk again, in the same unit. The service
# manager may have read by then that the new one is the main process, or not.
test_a_failed_upgrade_leaves_the_disk_with_its_unit() {
    boot --seconds 500 <<'INSIDE'
install_package
vhdx-ublk create /images/data.vhdx --size 1G
vhdx-ublk enable data /images/data.vhdx
systemctl start vhdx-ublk@data
mkfs.ext4 -q /dev/vhdx/data
mount /dev/vhdx/data /mnt
seq 1000 >/mnt/numbers
sync -f /mnt/numbers
pid() { vhdx-ublk list --json | tr -d ' \n' | grep -o '"pid":[0-9]*' | cut -d: -f2; }
in_step() { restarted vhdx-ublk@data "$1" && [ "$(systemctl show -P MainPID vhdx-ublk@data)" = "$(pid)" ]; }
told() { { systemctl status vhdx-ublk@data; cat "/proc/$(pid)/cgroup"; journalctl -b -n 60; } >&2; }
for pause in 1 0; do
    old=$(pid)
    cat >/root/dies.sh <<SCRIPT
#!/bin/bash
[ "\$2" != --formats ] || exec vhdx-ublk "\$@"
vhdx-ublk "\$@" >/dev/null & new=\$!
[ $pause != 0 ] || systemctl daemon-reload & # it reads no message meanwhile
while [ -e /proc/$old/fd/0 ]; do :; done
[ $pause = 0 ] || { kill -STOP \$new; sleep $pause; }
kill -9 \$new; wait \$new; exit 1
SCRIPT
    chmod +x /root/dies.sh
    ! vhdx-ublk upgrade data --binary /root/dies.sh
    within 60 in_step "$old" || { told; exit 1; }
    sleep 10
    in_step "$old" || { told; exit 1; }
    seq 1000 | cmp - /mnt/numbers
done
old=$(pid)
kill -9 "$old"
within 30 in_step "$old" || { told; exit 1; }
seq 1000 | cmp - /mnt/numbers
echo "note: the unit was started $(systemctl show -P NRestarts vhdx-ublk@data) times again"
umount /mnt
systemctl stop vhdx-ublk@data
[ "$(vhdx-ublk list --json)" = '[]' ]
INSIDE
    image_closed data.vhdx
}

# A disk that is served already, and mounted, gets its unit without being unmounted; so does one that its unit was
# stopped for. Another unit keeps its own.
test_a_unit_takes_over_a_disk_that_is_served_already() {
    boot <<'INSIDE'
install_package
vhdx-ublk create /images/data.vhdx --size 1G
vhdx-ublk create /images/other.vhdx --size 64M
vhdx-ublk enable data /images/data.vhdx
vhdx-ublk enable other /images/other.vhdx noauto
vhdx-ublk start data
mkfs.ext4 -q /dev/vhdx/data
mount /dev/vhdx/data /mnt
seq 1000 >/mnt/numbers
main() { systemctl show -P MainPID vhdx-ublk@data; }
pid() { vhdx-ublk list --json | tr -d ' \n' | grep -o '"pid":[0-9]*' | cut -d: -f2; }
in_step() { [ "$(systemctl is-active vhdx-ublk@data)" = active ] && [ "$(main)" = "$(pid)" ]; }
# udev may have started the unit by now, as the table has the disk.
systemctl start vhdx-ublk@data
in_step
journalctl -b | grep -q 'this one continues to serve /dev/ublkb0 for the daemon before it'
grep -q '^0::.*vhdx-ublk@data.service$' "/proc/$(main)/cgroup"
old=$(pid)
kill -9 "$old"
within 30 restarted vhdx-ublk@data "$old"
seq 1000 | cmp - /mnt/numbers

# Stopped in use, and started again: it stays when it is no longer in use.
systemctl stop vhdx-ublk@data
[ "$(systemctl is-active vhdx-ublk@data || true)" != active ]
systemctl start vhdx-ublk@data
in_step
umount /mnt
sleep 3
in_step
mount /dev/vhdx/data /mnt
seq 1000 | cmp - /mnt/numbers
umount /mnt
systemctl stop vhdx-ublk@data
[ "$(vhdx-ublk list --json)" = '[]' ]

# The device of another unit.
systemd-run --quiet --unit=mine -p Type=notify -p StandardOutput=null \
    /usr/sbin/vhdx-ublk add --foreground --name other /images/other.vhdx
old=$(pid)
! systemctl start vhdx-ublk@other
refused() { journalctl -b -o cat -u vhdx-ublk@other | grep -c '^vhdx-ublk: /dev/ublkb0 is served by another unit'; }
sleep 3
[ "$(systemctl is-failed vhdx-ublk@other)" = failed ]
# systemd wants the unit once more when udev has shown the device; it is not started again and again.
count=$(refused)
[ "$count" -ge 1 ] && [ "$count" -le 2 ]
sleep 3
[ "$(refused)" -eq "$count" ]
[ "$(pid)" = "$old" ]
systemctl stop mine
INSIDE
    no_io_errors
    image_closed data.vhdx
}
