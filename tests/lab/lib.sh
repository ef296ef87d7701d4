# What the laboratory's tests share. Sourced by tests/lab/run and by each test.
# shellcheck shell=bash

: "${VHDX_UBLK:?the vhdx-ublk binary}"
scratch=${VHDX_LAB_SCRATCH:?set by tests/lab/run}
log=$scratch.log
corpus=$(cd "$(dirname "${BASH_SOURCE[0]}")/../images" && pwd)
mnt=$scratch.mnt
tests=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Debian's own programs first: an interpreter that others put before it can take seconds to start.
PATH=/usr/sbin:/usr/bin:$PATH

# How `add` makes devices; tests of zero copy are the others with this set. User-mode Linux takes more than a second to
# lock the buffers of a device as it is by default: tests that are about these, or about many requests, have no `depth`.
zero_copy=auto
depth=()
[[ ${VHDX_LAB_KERNEL:-} != uml* ]] || depth=(--depth 16)

ublk() {
    if [ "$1" != add ]; then
        "$VHDX_UBLK" "$@"
    elif [[ " $* " == *" --depth "* ]]; then
        "$VHDX_UBLK" "$@" --zero-copy "$zero_copy"
    else
        "$VHDX_UBLK" "$@" --zero-copy "$zero_copy" "${depth[@]}"
    fi
}
note() { echo "note: $*"; }
fail() { echo "$*" >&2; return 1; }

# skipped WHAT: says that a part of a test is left out, for want of something. Under CI nothing may be missing.
skipped() {
    [ "${CI:-0}" = 0 ] || { echo "CI is set, and this is skipped: $*" >&2; exit 1; }
    echo "SKIPPED: $*"
}

wanted() {
    local name=$1 part
    shift
    [ $# -gt 0 ] || return 0
    for part; do [[ $name != *"$part"* ]] || return 0; done
    return 1
}

# A real file system on the laboratory's first disk: direct I/O means something there.
prepare_scratch() {
    local disk
    mkdir -p "$scratch" "$mnt"
    read -r disk _ <<<"${VHDX_LAB_DISKS:-}"
    [ -n "$disk" ] || fail "no disk: give the laboratory one with --disk"
    mkfs.ext4 -q -F -E lazy_itable_init=0 "$disk"
    mount "$disk" "$scratch"
}

release_scratch() {
    umount "$scratch"
    rmdir "$scratch" "$mnt"
    rm -f "$log"
}

begin() { cd "$scratch"; }

# Whatever a test left behind, whether it passed or not.
finish() {
    local status=$?
    cd /
    umount -q "$mnt" 2>/dev/null || true
    if [ "$(ublk list --json)" != "[]" ]; then
        [ $status -ne 0 ] || { echo "the test left a device behind"; ublk list; status=1; }
        ublk del --all --force || true
    fi
    cd "$scratch"
    ! declare -F take_down >/dev/null || take_down
    cd /
    rm -rf "${scratch:?}"/*
    exit $status
}

# mount(8) looks for its helpers in /sbin. Here that is a folder of links, for as long as the test runs.
own_sbin() {
    mkdir -p /run/sbin
    mount --bind /usr/sbin /run/sbin
    mount -t tmpfs tmpfs /usr/sbin
    ln -s /run/sbin/* /usr/sbin/
}
release_sbin() { ! mountpoint -q /run/sbin || { umount /usr/sbin && umount /run/sbin; }; }

sha() { sha256sum "$1" | cut -d' ' -f1; }
host_bytes() { echo $(($(stat -c '%b * %B' "$1"))); }

# unpack NAME...: images made by other software, in the current folder.
unpack() {
    local name
    for name; do
        xz -dc "$corpus/$name.vhdx.xz" >"$name.vhdx"
    done
}

# The first partition of a device, mapped by its start, as no kernel but a partitioned one shows it.
mount_partition() {
    local device=$1 fstype=$2 mode=${3:-ro} start
    start=$(sfdisk --json "$device" | sed -n 's/.*"start": *\([0-9]*\).*/\1/p' | head -n 1)
    mount -t "$fstype" -o "$mode,offset=$((start * 512))" "$device" "$mnt"
}

# Files worth copying: real ones, about $1 MB, in folder $2.
copy_real_files() {
    local limit_kb=$(($1 * 1024)) to=$2 used=0 file size
    mkdir -p "$to"
    while read -r size file; do
        cp --parents "$file" "$to"
        used=$((used + size / 1024 + 1))
        [ $used -lt $limit_kb ] || return 0
    done < <(find /usr/bin /usr/lib/*-linux-gnu -maxdepth 1 -type f -size +64k -printf '%s %p\n' | sort -k2)
    fail "this machine has only $used KB of files to copy"
}

manifest() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum); }

# stamps DEVICE OFFSET_MB COUNT_MB SEED: reproducible data at an offset, and its digest. One process makes it: a pipe
# costs user-mode Linux more than what goes through it.
stamps() {
    python3 -c '
import random, sys
from signal import SIG_DFL, SIGPIPE, signal
signal(SIGPIPE, SIG_DFL)
source = random.Random(int(sys.argv[2]))
for _ in range(int(sys.argv[1])):
    sys.stdout.buffer.write(source.randbytes(1 << 20))' "$3" "$4"
}
write_stamps() { stamps "$@" | dd of="$1" bs=1M seek="$2" oflag=direct iflag=fullblock conv=notrunc status=none; }
check_stamps() {
    local found expected
    found=$(dd if="$1" bs=1M skip="$2" count="$3" status=none | sha256sum)
    expected=$(stamps "$@" | sha256sum)
    [ "$found" = "$expected" ] || fail "$1 does not hold at $2 MB what was written there"
}

# The verifying writer.
stamper() { "${VHDX_STAMPER:-$(dirname "$VHDX_UBLK")/examples/stamper}" "$@"; }

# begin_writer DEVICE: it works there until end_writer, which says whether anything was lost.
begin_writer() {
    rm -f stop
    stamper "$1" stop >stamper.log 2>&1 &
    writer=$!
}
end_writer() {
    touch stop
    wait "$writer" || { cat stamper.log; cat /run/vhdx-ublk/*.log; fail "something was lost"; }
}

# recovered DEVICE: its dead daemon has the images as long as a write or a sync of them is under way.
recovered() {
    for _ in $(seq 6); do
        ! ublk recover "$1" >/dev/null 2>refusal || return 0
        grep -q 'has it open' refusal || return 1
    done
    return 1
}

daemon_pid() { ublk list --json | tr -d ' \n' | grep -o '"pid":[0-9]*' | head -n 1 | cut -d: -f2; }

# Kills the daemon and waits until it is gone, and its lock with it.
kill_daemon() {
    local pid
    pid=$(daemon_pid)
    kill -9 "$pid"
    for _ in $(seq 200); do
        [ -e "/proc/$pid" ] || break
        sleep 0.05
    done
    for _ in $(seq 200); do
        qemu-img check "$1" 2>&1 | grep -q ' lock' || return 0
        sleep 0.05
    done
    fail "the dead daemon still has $1"
}

# Why a command was refused.
refused() {
    ! "$@" 2>refusal || fail "done, and not refused: $*"
    sed 's/^/note: /' refusal
}

# 1 EFI, 2 ext4 `Work`, 3 vfat `STICK`, 4 swap.
make_partitioned() {
    local device
    ublk create "$1" --size 1G
    device=$(ublk add "$1")
    sfdisk -q "$device" <<TABLE
label: gpt
size=64M, type=uefi
size=300M, type=linux
size=100M, type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7
size=64M, type=swap
TABLE
    udevadm settle --timeout=10
    mkfs.vfat -n EFI "${device}p1" >/dev/null
    mkfs.ext4 -q -L Work "${device}p2"
    mkfs.vfat -n STICK "${device}p3" >/dev/null
    mkswap -q "${device}p4"
    ublk del "$device"
}
