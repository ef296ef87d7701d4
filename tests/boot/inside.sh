# What the scripts inside the booted system share. Sourced there by each of them.
# shellcheck shell=bash
set -euo pipefail
share=/run/laboratory/share

trap 'echo "failed in line $LINENO: $BASH_COMMAND" >&2; journalctl -b --no-pager -n 60 >&2' ERR
fail() { echo "$*" >&2; return 1; }

# install_package [FILE]: the package of the program, as an administrator installs it.
install_package() {
    DEBIAN_FRONTEND=noninteractive dpkg --install "$share/${1:-vhdx-ublk.deb}"
}

milliseconds() { echo $(($(date +%s%N) / 1000000)); }

# restarted UNIT PID: its daemon is another one, which serves.
restarted() {
    [ "$(systemctl show -P ActiveState "$1")" = active ] && [ "$(systemctl show -P MainPID "$1")" != "$2" ]
}

# within SECONDS COMMAND...: until it succeeds.
within() {
    local n
    for ((n = 0; n < $1 * 20; n++)); do
        ! "${@:2}" >/dev/null 2>&1 || return 0
        sleep 0.05
    done
    fail "not within $1 s: ${*:2}"
}

# The host kills the machine when it reads this line: what was not synced before is in no file.
cut_power() {
    echo 'cut the power'
    sleep 60
    fail "the power was not cut"
}

# --- What the story of an administrator needs ---------------------------------

# The links that lead to disks, each with the identifier of what is there.
names() {
    local link
    for link in /dev/vhdx/* /dev/disk/by-id/vhdx-* /dev/disk/by-uuid/*; do
        echo "$link $(blkid -p -o value -s UUID -s PTUUID "$link")"
    done
}

mounts() { grep -E ' /(data|part1|part2|plain) ' /proc/self/mountinfo | sort; }

# The programs of all daemons.
programs() { readlink /proc/[0-9]*/exe | grep vhdx-ublk; }

# Everything is mounted, under the names that it had, and no file system has seen an error.
all_there() {
    local folder
    [ "$(mounts | wc -l)" -eq 4 ] || fail "not all are mounted: $(mounts)"
    for folder in /data /part1 /part2 /plain; do seq 200000 | cmp - $folder/numbers; done
    udevadm settle
    names | diff /names -
    ! dmesg | grep -E 'I/O error|EXT4-fs error|XFS.*[Ee]rror'
}

# under_writes WHAT COMMAND...: while fio writes to two file systems and verifies what it has written.
under_writes() {
    local folder writers=() writer before
    before=$(mounts)
    rm -f /tmp/enough /tmp/fio.*
    for folder in data plain; do
        until [ -e /tmp/enough ]; do
            fio --name=verify --filename=/$folder/fio --size=32M --rw=randwrite --bs=4k --ioengine=psync --direct=1 \
                --runtime=3 --time_based --verify=crc32c --verify_backlog=256 --eta=never --output-format=json \
                --output="/tmp/fio.$folder.$(milliseconds)"
        done &
        writers+=($!)
    done
    sleep 1
    "${@:2}" >/tmp/said 2>&1 || { cat /tmp/said >&2; fail "failed: ${*:2}"; }
    sleep 0.5
    touch /tmp/enough
    for writer in "${writers[@]}"; do wait "$writer"; done
    cat /tmp/said
    sed -n "s/.*: vhdx-ublk .* (pause: \\(.*\\))/note: $1: requests waited \\1, as the daemon counts/p" /tmp/said
    echo "note: $1: the longest request took $(longest /tmp/fio.*) ms"
    [ "$(mounts)" = "$before" ] || fail "mounts have changed"
}

# The longest completion time in reports of fio, in ms.
longest() {
    cat "$@" | sed -n '/"clat_ns"/,/}/s/.*"max" : \([0-9]*\).*/\1/p' | sort -n | awk 'END { print int($1 / 1000000) }'
}
