# Where warnings of daemons go, and that they stay bounded.
# shellcheck shell=bash

# warned TEXT: `list` shows a last warning with this text.
warned() { [[ $(ublk list --json | jq -r '.[0].last_warning.text') == *"$1"* ]]; }

test_log_is_bounded_and_list_shows_the_last_warning() {
    local device log=/run/vhdx-ublk/0.log
    ublk create disk.vhdx --size 1G
    # What earlier daemons have left nearly fills it.
    mkdir -p /run/vhdx-ublk
    head -c $(((1 << 20) - 10)) /dev/zero | tr '\0' x >"$log"
    rm -f "$log.1"
    device=$(ublk add disk.vhdx --id 0)
    [ "$(ublk list --json | jq '.[0].last_warning')" = null ] || fail "a warning of nothing: $(ublk list --json)"
    exec 8<"$device"
    kill -TERM "$(daemon_pid)"
    for _ in $(seq 100); do warned 'asked to end while' && break; sleep 0.1; done
    warned 'asked to end while' || fail "list shows no warning: $(ublk list --json)"
    ublk list | grep -q 'asked to end while.*\.\.\.' || fail "the text shows no warning, or all of it: $(ublk list)"
    # That warning has filled it: it is the last line of the full log, and a new one has begun.
    tail -n 1 "$log.1" | grep -q 'asked to end while' || fail "the full log was not put aside"
    [ "$(stat -c %s "$log.1")" -ge $((1 << 20)) ] || fail "a log that was not full was put aside"
    [ "$(stat -c %s "$log")" -lt 4096 ] || fail "the new log is not new"
    [ "$(stat -c %a "$log")" = 600 ] || fail "others may read the log"
    exec 8<&-
    ublk del "$device" 2>/dev/null || ! ublk list | grep -q "$device" || fail "the device stays"
    rm -f "$log.1"
}

test_log_says_more_or_less_as_it_is_asked_to() {
    local device log=/run/vhdx-ublk/0.log
    ublk create disk.vhdx --size 1G
    rm -f "$log"
    device=$(ublk add disk.vhdx --id 0 -v)
    ublk del "$device"
    grep -q ' vhdx-ublk .*: ending' "$log" || fail "-v says no more in the log: $(cat "$log")"
    rm -f "$log"
    device=$(ublk add disk.vhdx --id 0)
    ublk del "$device"
    [ ! -s "$log" ] || fail "a quiet life is logged: $(cat "$log")"
}
