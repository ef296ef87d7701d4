# Promise defended here: the page `boot` of the guide works as it stands, from the source tree, without a package.
# shellcheck shell=bash disable=SC2154 # lib.sh has the rest
# shellcheck source=../lab/pages.sh
. "$here/../lab/pages.sh"

# The file system is ext4, for which this Debian has the tools.
test_the_page_of_the_guide_serves_a_disk_from_boot_on() {
    local section='A disk, and a file system on it'
    cp "$VHDX_UBLK" "$machine/share/vhdx-ublk"
    cp -r "$here/../../tools/package.d" "$machine/share/"
    commands_of boot 'Without a package' >"$machine/share/install.sh"
    commands_of boot "$section" | grep '^vhdx-ublk' >"$machine/share/enable.sh"
    commands_of boot "$section" | sed -n '/^\/dev/s/ntfs3/ext4/p' >"$machine/share/fstab"
    grep -o '`systemctl daemon-reload; mount /data`' "$guide/boot.md" | tr -d '`' >"$machine/share/mount.sh"
    sed -n "s/.*serve it now: //p" "$guide/boot.md" >"$machine/share/start.sh"
    boot <<'INSIDE'
follow() { [ -s "$share/$1.sh" ] && bash -euo pipefail -x "$share/$1.sh"; }
install -m 755 "$share/vhdx-ublk" /usr/sbin/vhdx-ublk
mkdir -p /source/tools /data
cp -r "$share/package.d" /source/tools/package.d
cd /source
follow install
cd /images
vhdx-ublk create data.vhdx --size 1G
follow enable
follow start
sfdisk -q /dev/vhdx/data <<<$'label: gpt\n,100M\n,'
udevadm settle
mkfs.ext4 -q /dev/vhdx/data-part2
cat "$share/fstab" >>/etc/fstab
follow mount
mountpoint -q /data
seq 200000 >/data/numbers
INSIDE
    boot <<'INSIDE'
mountpoint -q /data
seq 200000 | cmp - /data/numbers
INSIDE
    no_io_errors
    image_closed data.vhdx
}
