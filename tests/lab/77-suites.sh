# The test suites of others (see tests/suites): the kernel's own tests of ublk.
# shellcheck shell=bash

# shellcheck source=../suites/selftests.sh
. "$tests/../suites/selftests.sh"

# selftests [grep options] REGEX: those with such names.
selftests() {
    local names
    # Tests of another kernel than the one that runs may ask for what it does not have.
    [[ ${VHDX_LAB_KERNEL:-} == uml* ]] || { skipped "the source of this kernel is not at hand"; return 0; }
    [ -e "$kernel_source" ] || { skipped "the laboratory's kernel has left no source at $kernel_source"; return 0; }
    prepare_selftests "$kernel_source"
    mapfile -t names < <(selftest_names | grep -E "$@")
    run_selftests "${names[@]}"
}

test_suites_selftests() { selftests -v '^(recover|stress)_'; }
test_suites_selftests_of_recovery() { selftests '^recover_'; }
test_suites_selftests_under_stress() { selftests '^stress_'; }
