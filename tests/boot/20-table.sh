# Promises defended here: a line of /etc/vhdxtab serves a disk from boot on, under a name that stays; a daemon that is
# killed comes back by itself, and its file systems stay mounted; a machine that ends unmounts them before that; and
# whatever is wrong with a line, the machine boots.
# shellcheck shell=bash disable=SC2154 # lib.sh has the rest

# The blank in the path, and the dash in the name, are escaped differently in each file that has them.
test_a_disk_of_the_table_is_there_after_a_reboot_a_killed_daemon_and_a_power_cut() {
    boot <<'INSIDE'
install_program
mkdir "/images/a folder"
vhdx-ublk create "/images/a folder/data.vhdx" --size 1G
cd "/images/a folder"
vhdx-ublk enable my-data data.vhdx queues=1
cd /
grep -x $'my-data\t/images/a\\\\040folder/data.vhdx\tqueues=1' /etc/vhdxtab
systemctl start 'vhdx-ublk@my\x2ddata'
test -b /dev/vhdx/my-data
systemctl show -p StatusText 'vhdx-ublk@my\x2ddata' | grep -F /dev/ublkb
mkfs.ext4 -q /dev/vhdx/my-data
mkdir /data
echo '/dev/vhdx/my-data /data ext4 defaults 0 2' >>/etc/fstab
systemctl daemon-reload
mount /data
seq 100000 >/data/numbers
INSIDE
    note "the first power-off took $(off_seconds) s"
    no_io_errors
    image_closed 'a folder/data.vhdx'

    boot_and_cut <<'INSIDE'
unit='vhdx-ublk@my\x2ddata'
mountpoint -q /data
test -b /dev/vhdx/my-data
seq 100000 | cmp - /data/numbers
mounted=$(grep ' /data ' /proc/self/mountinfo)
fio --name=verify --filename=/data/fio --size=64M --rw=randwrite --bs=4k --ioengine=psync --direct=1 --runtime=12 \
    --time_based --verify=crc32c --verify_backlog=512 --eta=never --output=/tmp/fio &
fio=$!
sleep 3
for kill in 1 2; do
    pid=$(systemctl show -P MainPID "$unit")
    killed=$(milliseconds)
    kill -9 "$pid"
    within 30 restarted "$unit" "$pid"
    echo "note: the device was served again $(($(milliseconds) - killed)) ms after kill -9, number $kill"
    sleep 2
done
wait "$fio"
[ "$(grep ' /data ' /proc/self/mountinfo)" = "$mounted" ]
! dmesg | grep -E 'I/O error|EXT4-fs error'
seq 200000 >/data/more
sync -f /data/more
cut_power
INSIDE

    boot <<'INSIDE'
mountpoint -q /data
seq 100000 | cmp - /data/numbers
seq 200000 | cmp - /data/more
umount /data
systemctl stop 'vhdx-ublk@my\x2ddata'
! test -e /dev/vhdx/my-data
[ "$(vhdx-ublk list --json)" = '[]' ]
vhdx-ublk disable my-data
! grep my-data /etc/vhdxtab
! test -e '/run/systemd/generator/vhdx-ublk@my\x2ddata.service.d'
INSIDE
    image_closed 'a folder/data.vhdx'
}

# A process that no unit ends keeps the file system from being unmounted until the very end.
test_a_machine_powers_off_with_a_file_system_that_stays_in_use() {
    boot <<'INSIDE'
install_program
vhdx-ublk create /images/data.vhdx --size 1G
vhdx-ublk enable data /images/data.vhdx
systemctl start vhdx-ublk@data
mkfs.ext4 -q /dev/vhdx/data
mount /dev/vhdx/data /mnt
seq 1000000 >/mnt/numbers
systemd-run --quiet --unit=holder -p KillMode=none tail -f /mnt/numbers
INSIDE
    note "the machine was off $(off_seconds) s after the script's end"
    no_io_errors
    image data.vhdx
    "$VHDX_UBLK" check "$machine/data.vhdx"
    "$VHDX_UBLK" convert "$machine/data.vhdx" "$machine/data.raw"
    fsck.ext4 -fn "$machine/data.raw"
    [ "$(debugfs -R 'cat /numbers' "$machine/data.raw" 2>/dev/null | sha256sum)" = "$(seq 1000000 | sha256sum)" ] ||
        fail "what was written is not there"
}

test_no_line_of_the_table_stops_a_boot_or_another_line() {
    boot <<'INSIDE'
install_program
vhdx-ublk create /images/data.vhdx --size 1G
mkfs.ext4 -q "$(vhdx-ublk add /images/data.vhdx)"
vhdx-ublk del /images/data.vhdx
cat >/etc/vhdxtab <<'TABLE'
# what may go wrong
nothing
relative data.vhdx
odd /images/data.vhdx no-such-option
gone /images/gone.vhdx nofail
missing /images/missing.vhdx
data /images/data.vhdx
data /images/other.vhdx
TABLE
mkdir /data
echo '/dev/vhdx/data /data ext4 defaults 0 2' >>/etc/fstab
INSIDE
    boot <<'INSIDE'
mountpoint -q /data
for line in 'line 2: it has a name' 'line 3: the path' 'line 4: its options' \
    'line 8: the name data is that of line 7'; do
    [ "$(dmesg | grep -c "vhdx-ublk-generator: /etc/vhdxtab: $line")" -eq 1 ] || fail "no such line, or several: $line"
done
for name in gone missing; do
    [ "$(systemctl is-failed "vhdx-ublk@$name")" = failed ]
    journalctl -b -u "vhdx-ublk@$name" | grep -F "/images/$name.vhdx"
done
INSIDE
}
