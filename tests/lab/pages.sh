# What the pages of the guide have the reader type. Sourced by the tests that follow them.
# shellcheck shell=bash

guide=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../src/guide" && pwd)

# commands_of PAGE [SECTION]: what stands in its blocks of commands. In a block with prompts, the other lines are
# answers.
commands_of() {
    awk -v wanted="${2:-}" '
        /^```/ && inside { if (inside == "text") printf "%s", prompts ? commands : lines; inside = ""; next }
        /^```/ { inside = substr($0, 4); lines = commands = ""; prompts = 0; next }
        /^# / && !inside { section = substr($0, 3) }
        !inside || (wanted != "" && section != wanted) { next }
        { lines = lines $0 "\n" }
        sub(/^# /, "") { commands = commands $0 "\n"; prompts = 1 }' "$guide/$1.md"
}
