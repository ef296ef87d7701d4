# What the scripts inside the booted system share. Sourced there by each of them.
# shellcheck shell=bash
set -euo pipefail
share=/run/laboratory/share

trap 'echo "failed in line $LINENO: $BASH_COMMAND" >&2; journalctl -b --no-pager -n 60 >&2' ERR
fail() { echo "$*" >&2; return 1; }

install_program() {
    install -m 755 "$share/vhdx-ublk" /usr/sbin/vhdx-ublk
    sync -f /usr/sbin/vhdx-ublk
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
