# The laboratory's own kernel: what everything else here relies on.
# shellcheck shell=bash

# A new map takes the place of the one that a snapshot freezes. Were pages of the old one left in the process, their
# memory would be a file's by then, and the disk's next write would change that file.
test_kernel_moves_whole_mappings() {
    python3 "$tests/mappings.py" || fail "this kernel leaves old pages in a process; see tools/lab.d/uml-tables.h"
}
