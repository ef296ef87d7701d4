# Promises defended here: an administrator mounts an image in one command, or in one line of fstab or of the table. The
# names of the disks, and what is on them, stay through reboots, killed daemons, upgrades of the program, a newer
# package and a power cut, and whoever uses them sees no error. The package does not leave while there is a disk.
# shellcheck shell=bash disable=SC2154 # lib.sh has the rest

# The blank in a path, and the dash in a name, are escaped differently in each file that has them.
test_disks_stay_through_reboots_kills_upgrades_packages_and_a_power_cut() {
    older_package >"$machine/share/older.deb"
    unpack ext2 ntfs-fixed ntfs-dynamic
    boot <<'INSIDE'
install_package older.deb

cp "$share"/*.vhdx /images/
before=$(cd /images && sha256sum -- *.vhdx)
for image in ext2 ntfs-fixed ntfs-dynamic; do
    kind=() inner=vhdx
    [[ $image != ntfs* ]] || kind=(-t ntfs3) inner=vhdx.ntfs3
    vhdx-ublk mount -r "${kind[@]}" "/images/$image.vhdx" /mnt
    grep -q '^bank,joesmith,superrich' /mnt/passwords.txt
    umount /mnt
    mount -t $inner "/images/$image.vhdx" /mnt -o ro
    grep -q '^bank,joesmith,superrich' /mnt/passwords.txt
    vhdx-ublk umount /mnt
done
! vhdx-ublk mount -r /images/ntfs-fixed.vhdx /mnt 2>/tmp/refusal
grep -q -- '-t ntfs3' /tmp/refusal
[ "$(vhdx-ublk list --json)" = '[]' ]
[ "$(cd /images && sha256sum -- *.vhdx)" = "$before" ]

mkdir "/images/a folder" /data /part1 /part2 /plain
vhdx-ublk create "/images/a folder/data.vhdx" --size 1G
cd "/images/a folder"
vhdx-ublk enable my-data data.vhdx queues=1
cd /
grep -x $'my-data\t/images/a\\\\040folder/data.vhdx\tqueues=1' /etc/vhdxtab
vhdx-ublk create /images/parts.vhdx --size 1G
vhdx-ublk enable parts /images/parts.vhdx
systemctl start 'vhdx-ublk@my\x2ddata' vhdx-ublk@parts
systemctl show -p StatusText 'vhdx-ublk@my\x2ddata' | grep -F /dev/ublkb
mkfs.ext4 -q /dev/vhdx/my-data
sfdisk -q /dev/vhdx/parts <<<$'label: gpt\n,400M\n,'
udevadm settle
mkfs.ext4 -q /dev/vhdx/parts-part1
mkfs.xfs -q /dev/vhdx/parts-part2
vhdx-ublk create /images/plain.vhdx --size 1G
mkfs.ext4 -q "$(vhdx-ublk add /images/plain.vhdx)"
vhdx-ublk del /images/plain.vhdx
cat >>/etc/fstab <<TABLE
/dev/vhdx/my-data /data ext4 defaults 0 2
/dev/vhdx/parts-part1 /part1 ext4 defaults 0 2
UUID=$(blkid -p -o value -s UUID /dev/vhdx/parts-part2) /part2 xfs defaults 0 0
/images/plain.vhdx /plain vhdx nofail,x-systemd.requires-mounts-for=/images 0 0
TABLE
systemctl daemon-reload
mount -a
for folder in /data /part1 /part2 /plain; do seq 200000 >$folder/numbers; done
udevadm settle
names >/names
cat /names
[ "$(grep -c ' [0-9a-f-]' /names)" -ge 11 ]
INSIDE
    note "the first power-off took $(off_seconds) s"
    all_closed

    boot <<'INSIDE'
all_there
mounted=$(mounts)

kill_daemons() {
    local unit='vhdx-ublk@my\x2ddata' kill pid killed
    for kill in 1 2; do
        pid=$(systemctl show -P MainPID "$unit")
        killed=$(milliseconds)
        kill -9 "$pid"
        within 30 restarted "$unit" "$pid"
        echo "note: the disk was served again $(($(milliseconds) - killed)) ms after kill -9, number $kill"
        sleep 1
    done
}
under_writes kills kill_daemons
under_writes upgrade vhdx-ublk upgrade --all
main() { systemctl show -P MainPID 'vhdx-ublk@my\x2ddata' vhdx-ublk@parts; }
main >/before
[ "$(programs | grep -c '(deleted)')" -eq 0 ]
under_writes 'package upgrade' install_package
dpkg-query -W vhdx-ublk
# Each disk is served by the new file, and systemd watches the process that does.
[ "$(programs)" = $'/usr/sbin/vhdx-ublk\n/usr/sbin/vhdx-ublk\n/usr/sbin/vhdx-ublk' ]
main >/after
! cmp -s /before /after
for pid in $(main); do [ "$(readlink "/proc/$pid/exe")" = /usr/sbin/vhdx-ublk ]; done
[ "$(systemctl is-active 'vhdx-ublk@my\x2ddata' vhdx-ublk@parts | sort -u)" = active ]
[ "$(mounts)" = "$mounted" ]
all_there
INSIDE
    note "the power-off after the upgrades took $(off_seconds) s"
    all_closed

    boot_and_cut <<'INSIDE'
all_there
for folder in /data /part1 /part2 /plain; do
    seq 300000 >$folder/more
    sync -f $folder/more
done
cut_power
INSIDE

    boot <<'INSIDE'
all_there
for folder in /data /part1 /part2 /plain; do seq 300000 | cmp - $folder/more; done

! dpkg --remove vhdx-ublk
[ "$(dpkg-query -W -f '${db:Status-Status}' vhdx-ublk)" = installed ]
all_there
umount /data /part1 /part2 /plain
systemctl stop 'vhdx-ublk@my\x2ddata' vhdx-ublk@parts
! test -e /dev/vhdx/my-data
[ "$(vhdx-ublk list --json)" = '[]' ]
vhdx-ublk disable my-data
! grep my-data /etc/vhdxtab
! test -e '/run/systemd/generator/vhdx-ublk@my\x2ddata.service.d'
dpkg --purge vhdx-ublk
! find /etc /usr -name '*vhdx*' | grep .
INSIDE
    all_closed
}

all_closed() {
    no_io_errors
    image_closed 'a folder/data.vhdx'
    image_closed parts.vhdx
    image_closed plain.vhdx
}
