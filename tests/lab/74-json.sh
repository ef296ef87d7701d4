# What commands print of devices as JSON fits their schemas.
# shellcheck shell=bash

# fits SCHEMA COMMAND...: the command succeeds, and its answer, which stays in answer.json, fits.
fits() {
    local schema=$1
    shift
    "$VHDX_UBLK" "$@" --json >answer.json || fail "$*: $(cat answer.json)"
    matches "$schema"
}

matches() {
    /usr/bin/python3 -c '
import json, sys
import jsonschema
schema, answer = (json.load(open(path)) for path in sys.argv[1:])
jsonschema.Draft202012Validator(schema).validate(answer)' "schema/$1.json" answer.json || fail "$1: $(cat answer.json)"
}

value() { jq -r "$1" answer.json; }

test_json_of_devices() {
    local device odd=$'disk\xff.vhdx' hex
    hex=$(printf %s "$PWD/$odd" | od -An -v -tx1 | tr -d ' \n')
    ublk generate schema schema
    fits create create "$odd" --size 1G
    fits add add "$odd" --name odd
    device=$(value .device)
    [ -b "$device" ] || fail "add: $(cat answer.json)"
    [ "$(value .name)" = odd ] || fail "add loses the name: $(cat answer.json)"
    for command in list stats; do
        fits $command $command
        [ "$(value '.[0].image.hex')" = "$hex" ] || fail "$command loses the image's name: $(cat answer.json)"
    done
    fits session-list session list
    [ "$(value '.[0].image.hex')" = "$hex" ] || fail "session list loses the image's name: $(cat answer.json)"
    fits features features
    fits doctor doctor || true
    fits upgrade upgrade odd
    mkfs.ext4 -q "$device"
    fits mount mount "$odd" "$mnt"
    [ "$(findmnt -n -o SOURCE "$mnt")" = "$(value .source)" ] || fail "mount: $(cat answer.json)"
    fits umount umount "$mnt"
    kill -9 "$(daemon_pid)"
    fits recover recover "$device"
    [ "$(value '.[0].device')" = "$device" ] || fail "recover: $(cat answer.json)"
    # What fails is in the array, with what does not.
    ! "$VHDX_UBLK" del "$device" nothing --json >answer.json || fail "del of nothing succeeds"
    matches del
    [ "$(value 'map(.error.kind) | join(" ")')" = " not-found" ] || fail "del: $(cat answer.json)"
    fits list list
    [ "$(value length)" = 0 ] || fail "the device is there still"
}

test_json_of_a_snapshot() {
    local device
    ublk generate schema schema
    ublk create disk.vhdx --size 1G
    device=$(ublk add disk.vhdx)
    fits snapshot snapshot "$device" child.vhdx
    [ "$(value .image)" = "$PWD/child.vhdx" ] || fail "snapshot: $(cat answer.json)"
    ublk del "$device"
}
