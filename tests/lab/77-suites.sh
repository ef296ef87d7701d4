# The test suites of others (see tests/suites): the kernel's own tests of ublk.
# shellcheck shell=bash

# shellcheck source=../suites/selftests.sh
. "$tests/../suites/selftests.sh"

# Do what others of them do, with more queues, with another target or without zero copy.
alike='^(loop_0[15]|null_0[12]|stripe_0[13]|recover_02|stress_0[235])$'

# selftests [grep options] REGEX: those with such names; only the long run has those that are like others, and those
# that are listed as not applicable.
selftests() {
    local names
    # Tests of another kernel than the one that runs may ask for what it does not have.
    [[ ${VHDX_LAB_KERNEL:-} == uml* ]] || { skipped "the source of this kernel is not at hand"; return 0; }
    [ -e "$kernel_source" ] || { skipped "the laboratory's kernel has left no source at $kernel_source"; return 0; }
    prepare_selftests "$kernel_source"
    mapfile -t names < <(selftest_names | grep -E "$@")
    [ -n "$FULL" ] || mapfile -t names < <(printf '%s\n' "${names[@]}" | grep -vE "$alike" |
        grep -vxFf <(sed '/^#/d; s/ .*//' "$suites/selftests.list"))
    run_selftests "${names[@]}"
}

test_suites_selftests() { selftests -v '^(recover|stress)_'; }
test_suites_selftests_of_recovery() { selftests '^recover_'; }
test_suites_selftests_under_stress() { selftests '^stress_'; }

# What is not there, or not built, is refused before anything is done.
test_suites_are_refused_without_their_source() {
    local run=$tests/../suites/run
    mkdir empty
    refused "$run" blktests
    grep -q 'say where blktests are' refusal || fail "$(cat refusal)"
    refused "$run" other --source empty
    grep -q 'selftests .* the kernel' refusal || fail "$(cat refusal)"
    refused "$run" xfstests --source nowhere
    grep -q 'nowhere: No such file' refusal || fail "$(cat refusal)"
    for suite in selftests blktests xfstests; do
        refused "$run" $suite --source empty
        grep -q "empty: " refusal || fail "$(cat refusal)"
    done
    mkdir -p empty/ltp && touch empty/check && chmod +x empty/check
    refused "$run" xfstests --source empty
    grep -q 'not built' refusal || fail "$(cat refusal)"
}
