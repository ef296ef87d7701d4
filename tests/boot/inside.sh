# What the scripts inside the booted system share. Sourced there by each of them.
# shellcheck shell=bash
set -euo pipefail
share=/run/laboratory/share

trap 'echo "failed in line $LINENO: $BASH_COMMAND" >&2; journalctl -b --no-pager -n 60 >&2' ERR
fail() { echo "$*" >&2; return 1; }

# The program, and what a package installs with it.
install_program() {
    local files=$share/package.d rules
    install -m 755 "$share/vhdx-ublk" /usr/sbin/vhdx-ublk
    install -m 644 "$files"/*.service /lib/systemd/system/
    for rules in "$files"/*.rules; do
        [ ! -e "$rules" ] || install -m 644 "$rules" /lib/udev/rules.d/
    done
    install -m 644 "$files/vhdxtab" /etc/vhdxtab
    install -m 644 "$files/vhdx-ublk.conf" /usr/lib/tmpfiles.d/
    ln -sf /usr/sbin/vhdx-ublk /lib/systemd/system-generators/vhdx-ublk-generator
    sync -f /usr/sbin/vhdx-ublk
    systemctl daemon-reload
    udevadm control --reload
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
