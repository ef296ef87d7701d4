# Promises defended here: the warnings of a unit's daemon are in the journal, and are found by their disk and by the
# image that it has at the time; a journal that takes no messages holds up no disk, and later shows that some are
# missing.
# shellcheck shell=bash disable=SC2154 # lib.sh has the rest

# A request to end while the disk is in use is the cause of the warnings. The journal's socket is filled by others.
test_warnings_are_found_in_the_journal_and_a_journal_that_hangs_stops_no_disk() {
    boot <<'INSIDE'
install_package
vhdx-ublk create /images/data.vhdx --size 1G
vhdx-ublk enable data /images/data.vhdx
systemctl start vhdx-ublk@data
mkfs.ext4 -q /dev/vhdx/data
mount /dev/vhdx/data /mnt
pid=$(systemctl show -P MainPID vhdx-ublk@data)
warned() {
    journalctl --sync
    journalctl -b -o cat _UID=0 "$@" | grep -q '^asked to end while /dev/ublkb0 is in use'
}
kill -TERM "$pid"
within 10 warned VHDX_DEVICE=/dev/ublkb0
warned VHDX_IMAGE=/images/data.vhdx PRIORITY=4
vhdx-ublk snapshot data /images/later.vhdx
! warned VHDX_IMAGE=/images/later.vhdx
sleep 6 # two requests within 5 s would end the disk
kill -TERM "$pid"
within 10 warned VHDX_IMAGE=/images/later.vhdx
journalctl -b -o json -u vhdx-ublk@data >"$share/journal.json"

systemctl kill -s STOP systemd-journald
filled=0
while timeout 1 logger --journald <<<'MESSAGE=full'; do filled=$((filled + 1)); done
echo "note: the journal's socket took $filled messages"
sleep 6
kill -TERM "$pid"
sleep 1
timeout 20 vhdx-ublk list --check
timeout 20 dd if=/dev/urandom of=/mnt/written bs=1M count=8 conv=fsync status=none
systemctl kill -s CONT systemd-journald
sleep 6
kill -TERM "$pid"
missing() { journalctl -b -o cat VHDX_DEVICE=/dev/ublkb0 | grep -E '^messages are lost before this one.*: [1-9]'; }
within 20 missing || { journalctl -b -n 30 VHDX_DEVICE=/dev/ublkb0 + -u systemd-journald >&2; exit 1; }
umount /mnt
INSIDE
    no_io_errors
    image data.vhdx
    image_closed later.vhdx
    jq -es 'map(select(.VHDX_DEVICE == "/dev/ublkb0" and .PRIORITY == "4" and .SYSLOG_IDENTIFIER == "vhdx-ublk" and
        (.MESSAGE | test("^asked to end while"))) | .VHDX_IMAGE) == ["/images/data.vhdx", "/images/later.vhdx"]' \
        "$machine/share/journal.json" >/dev/null || fail "fields: $(cat "$machine/share/journal.json")"
}
