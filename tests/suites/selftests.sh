# The kernel's ublk selftests, in the current folder. Sourced by tests/lab/77-suites.sh and tests/suites/run.
# shellcheck shell=bash

suites=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The source of the laboratory's own kernel.
kernel_source=${XDG_CACHE_HOME:-$HOME/.cache}/vhdx-ublk/lab/uml/source

find_selftests() { # SOURCE
    [ -e "$1/tools/testing/selftests/ublk/test_common.sh" ] ||
        { echo "$1: this is not the source of a kernel with ublk selftests" >&2; return 1; }
}

# prepare_selftests SOURCE: their scripts, with our program in the place of their server.
prepare_selftests() {
    local from=$1/tools/testing/selftests/ublk
    find_selftests "$1"
    mkdir selftests
    cp -r "$from"/*.sh "$from/trace" selftests
    ln -s "$suites/kublk" selftests/kublk
    # It is to take less than the thirty seconds of a request's timeout: five are too few for a busy machine.
    sed -i 's/ELAPSED -ge 5 /ELAPSED -ge 25 /' selftests/test_generic_06.sh
    # What a disk that is served does: grow.
    sed 's|/ 2 ))|* 2 ))|' selftests/test_generic_10.sh >selftests/test_generic_10_grown.sh
    ! cmp -s selftests/test_generic_10.sh selftests/test_generic_10_grown.sh || fail "generic_10 is another test now"
}

# selftest NAME: 0 if it passes, 4 if it skips itself. Much of a test runs in the background, where a failure is
# printed and does not reach the exit status. Nor may a device be left, or an image that is not sound.
selftest() {
    local status=0 image
    mkdir -p work images
    (cd selftests && TMPDIR=$OLDPWD/work VHDX_SUITE_IMAGES=$OLDPWD/images timeout -k 10 200 bash "./test_$1.sh") \
        >"$1.log" 2>&1 </dev/null || status=$?
    ! grep -qE ': \[FAIL\]|failure:|^delete dev .* failed|removed' "$1.log" || status=1
    [ "$status" -ne 0 ] || ! grep -q ': \[SKIP\]' "$1.log" || status=4
    if [ "$(ublk list --json)" != "[]" ]; then
        { echo "the test left a device:"; ublk list; ublk del --all --force; } >>"$1.log" 2>&1 || true
        status=1
    fi
    for image in images/*.vhdx; do
        [ -e "$image" ] || continue
        ublk check "$image" >check.log 2>&1 || { echo "$image is not sound:"; cat check.log; status=1; } >>"$1.log"
    done
    rm -rf --one-file-system work images
    return $status
}

# run_selftests NAME...: each is to pass, or to be listed.
run_selftests() {
    local name reason status began passed=0 failed=0 listed=0
    for name; do
        reason=$(sed -n "s/^$name  *//p" "$suites/selftests.list")
        status=0 began=$SECONDS
        selftest "$name" || status=$?
        if [ -n "$reason" ] && [ $status -eq 0 ]; then
            note "$name passes, and is listed as not applicable: $reason"
            passed=$((passed + 1))
        elif [ -n "$reason" ]; then
            note "$name is not applicable: $reason"
            listed=$((listed + 1))
        elif [ $status -eq 0 ]; then
            note "$name passes: $((SECONDS - began)) s"
            passed=$((passed + 1))
        else
            echo "$name: status $status"
            tail -n 40 "$name.log"
            failed=$((failed + 1))
        fi
    done
    note "selftests: $passed passed, $failed failed, $listed not applicable"
    [ $failed -eq 0 ] && [ $passed -gt 0 ]
}

selftest_names() { printf '%s\n' selftests/test_*_*[0-9]*.sh | sed 's|^selftests/test_||; s|\.sh$||'; }
