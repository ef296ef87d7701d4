# What happens to devices between add and del: readers without a view of the kernel, hung daemons, lost
# registries, devices upon devices, users inside the kernel, hosts that fail.
# shellcheck shell=bash

registry=/run/vhdx-ublk

field() {
    ublk list --json | python3 -c 'import json, sys
print(next(d for d in json.load(sys.stdin) if d["device"] == sys.argv[1])[sys.argv[2]])' "$@"
}
pid_of() { field "$1" pid; }
is() { [ "$(field "$1" "$2")" = "$3" ]; }
expect_field() { is "$@" || { ublk list --json; fail "$1: $2 is not $3"; }; }
said() { grep -q -- "$1" said || { cat said; fail "nothing was said of: $1"; }; }

# await COMMAND...: until it succeeds, for ten seconds.
await() {
    for _ in $(seq 100); do
        ! "$@" || return 0
        sleep 0.1
    done
    fail "never: $*"
}
has_ended() { [ ! -e "/proc/$1" ]; }
kill_and_wait() { kill -9 "$@"; for pid; do await has_ended "$pid"; done; }

# A view without the driver's node, as containers have it; the registry is shared.
blind() { unshare -m bash -c 'mount -t tmpfs none /dev && exec "$@"' - "$@"; }

test_living_a_reader_removes_nothing() {
    local live waiting
    ublk create one.vhdx --size 64M
    ublk create two.vhdx --size 64M
    live=$(ublk add one.vhdx)
    waiting=$(ublk add two.vhdx --recovery queue)
    write_stamps "$waiting" 1 4 7
    kill_and_wait "$(pid_of "$waiting")"
    for how in "" "-p -f --mount-proc"; do
        # shellcheck disable=SC2086 # several words
        unshare $how true 2>/dev/null || { note "no PID namespaces in this kernel"; continue; }
        # shellcheck disable=SC2086
        unshare $how -m bash -c 'mount -t tmpfs none /dev && exec "$@"' - "$VHDX_UBLK" list >seen
        grep -q "$live *- *unknown" seen || { cat seen; fail "a reader that sees no driver says that it knows"; }
        # shellcheck disable=SC2086
        unshare $how -m bash -c 'mount -t tmpfs none /dev && exec "$@"' - "$VHDX_UBLK" info one.vhdx >/dev/null
    done
    blind "$VHDX_UBLK" add two.vhdx 2>said && fail "an image whose device waits was served twice"
    blind "$VHDX_UBLK" check --repair two.vhdx >said 2>&1 && fail "an image whose device waits was changed"
    expect_field "$live" state live
    expect_field "$waiting" health waiting
    if unshare -p -f --mount-proc true 2>/dev/null; then
        # Seen from another PID namespace, no daemon is there; the kernel says which device has one.
        unshare -p -f --mount-proc "$VHDX_UBLK" list >seen
        grep -q "$live *- *live *ok" seen || { cat seen; fail "a live device is not told to be one"; }
        grep -q "$waiting *- *quiesced *waiting" seen || { cat seen; fail "a waiting device is not told to be one"; }
        unshare -p -f --mount-proc "$VHDX_UBLK" del "$live"
        qemu-img check -q one.vhdx
    fi
    ublk recover "$waiting"
    check_stamps "$waiting" 1 4 7
    ublk del --all
}

test_living_devices_upon_devices() {
    local outer inner below
    ublk create outer.vhdx --size 512M
    # Numbers in the order that does not work: the inner one is recovered first, the outer one deleted first.
    outer=$(ublk add outer.vhdx --id 7 --recovery queue)
    mkfs.ext4 -q -F "$outer"
    # shellcheck disable=SC2154 # of lib.sh
    mount "$outer" "$mnt"
    ublk create "$mnt/inner.vhdx" --size 64M
    inner=$(ublk add "$mnt/inner.vhdx" --id 3 --recovery queue)
    write_stamps "$inner" 1 4 7
    below=$(pid_of "$outer")
    kill_and_wait "$below" "$(pid_of "$inner")"
    timeout 30 "$VHDX_UBLK" recover "$inner" 2>said && fail "an image on a device that waits was read"
    said "recover $outer"
    timeout 30 "$VHDX_UBLK" del "$inner" 2>said && fail "an image on a device that waits was closed"
    said "recover $outer"
    timeout 120 "$VHDX_UBLK" recover --all
    check_stamps "$inner" 1 4 7
    timeout 120 "$VHDX_UBLK" del --all 2>said && fail "a device was taken away under a mount"
    said "mounted at $mnt"
    qemu-img check -q "$mnt/inner.vhdx"
    umount "$mnt"
    timeout 60 "$VHDX_UBLK" del --all
    qemu-img check -q outer.vhdx
}

# The paths of a daemon that sees other mounts (a container, a service with PrivateTmp) lead nowhere else.
test_living_an_image_that_others_do_not_see() {
    local device
    ublk create disk.vhdx --size 64M
    mkdir private
    # shellcheck disable=SC2016 # the other shell expands them
    device=$(unshare -m bash -c 'mount -t tmpfs none private && cp disk.vhdx private/disk.vhdx &&
        exec "$1" add private/disk.vhdx --recovery queue' - "$VHDX_UBLK")
    write_stamps "$device" 1 4 7
    expect_field "$device" health ok
    kill_and_wait "$(pid_of "$device")"
    ublk recover "$device" 2>said && fail "a file that cannot be seen was served"
    said "another mount namespace"
    ublk del "$device" 2>said && fail "a file that cannot be seen was closed"
    said "is gone, but not everything"
    rm -f "$registry"/*.session
}

# The outer one does not come back: all is removed, and the message lists what could not be closed.
test_living_devices_upon_devices_are_given_up() {
    local outer inner
    ublk create outer.vhdx --size 512M
    outer=$(ublk add outer.vhdx --id 3 --recovery queue)
    mkfs.ext4 -q -F "$outer"
    mount "$outer" "$mnt"
    ublk create "$mnt/inner.vhdx" --size 64M
    inner=$(ublk add "$mnt/inner.vhdx" --id 7 --recovery queue)
    write_stamps "$inner" 1 4 7
    kill_and_wait "$(pid_of "$outer")" "$(pid_of "$inner")"
    timeout 200 "$VHDX_UBLK" del --all --force 2>said && fail "an image that could not be read was closed"
    said "$inner is gone, but not everything that was acknowledged is in its image"
    [ ! -e "$inner" ] || fail "$inner is still there"
    [ ! -e "$outer" ] || fail "$outer is still there"
    umount -l "$mnt"
    rm -f "$registry"/*.session
}

# One way out is named, and the commands do not send each other round in a circle.
test_living_the_image_is_cut_under_its_device() {
    local device
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx --recovery queue)
    write_stamps "$device" 1 8 7
    kill_and_wait "$(pid_of "$device")"
    truncate -s 1M disk.vhdx
    ublk del "$device" 2>said && fail "a file that is not whole was closed"
    said "salvage"
    ublk add disk.vhdx 2>said && fail "a file that is not whole was added"
    said "salvage"
    ! grep -q "vhdx-ublk del" said || { cat said; fail "add sends back to del"; }
    rm -f "$registry"/*.session
}

test_living_an_entry_that_cannot_be_read() {
    local damaged other
    ublk create one.vhdx --size 64M
    ublk create two.vhdx --size 64M
    damaged=$(ublk add one.vhdx)
    other=$(ublk add two.vhdx)
    write_stamps "$damaged" 1 4 7
    echo '{' >"$registry/${damaged#/dev/ublkb}.json"
    expect_field "$other" health ok
    ublk list | grep "$damaged" >seen
    grep -q "cannot tell\|device entry" seen || { cat seen; fail "the entry is not told to be damaged"; }
    ublk list --check >/dev/null && fail "all is said to be well"
    ublk del "$other"
    ublk del "$damaged" 2>said && fail "a device of unknown use was taken away"
    said "del --force"
    ! grep -q "rm /" said || fail "the message says to remove a file"
    ublk del --force "$damaged"
    [ ! -e "$damaged" ] || fail "$damaged is still there"
    damaged=$(ublk add --read-only one.vhdx)
    check_stamps "$damaged" 1 4 7
    ublk del "$damaged"
}

test_living_a_hung_daemon() {
    local device pid writer status=0
    ublk create disk.vhdx --size 256M
    device=$(ublk add disk.vhdx --recovery queue)
    write_stamps "$device" 1 8 7
    pid=$(pid_of "$device")
    kill -STOP "$pid"
    expect_field "$device" health stopped
    ublk list --check >/dev/null || status=$?
    [ "$status" -eq 1 ] || fail "list --check says $status of a hung daemon"
    dd if=/dev/zero of="$device" bs=4k count=1 seek=5000 oflag=direct 2>/dev/null &
    writer=$!
    timeout 20 "$VHDX_UBLK" del "$device" 2>said && fail "a device in use, of a hung daemon, was taken away"
    said "kill -CONT $pid"
    timeout 60 "$VHDX_UBLK" del --force --timeout 3 "$device" 2>said || { cat said; fail "the device stays"; }
    said "was killed"
    wait "$writer" && fail "a write that was not served has succeeded"
    [ ! -e "$device" ] || fail "$device is still there"
    has_ended "$pid" || fail "the daemon is still there"
    qemu-img check -q disk.vhdx
    device=$(ublk add --read-only disk.vhdx)
    check_stamps "$device" 1 8 7
    ublk del "$device"
}

test_living_the_registry_is_lost() {
    local live waiting
    ublk create one.vhdx --size 64M
    ublk create two.vhdx --size 64M
    live=$(ublk add one.vhdx)
    waiting=$(ublk add two.vhdx --recovery queue)
    kill_and_wait "$(pid_of "$waiting")"
    rm -rf "${registry:?}"
    mkdir -m 700 "$registry"
    expect_field "$live" state live
    expect_field "$waiting" state quiesced
    ublk del "$live" 2>said && fail "a device of an unknown image was taken away"
    said "del --force"
    ublk recover "$waiting" 2>said && fail "a device of an unknown image was recovered"
    said "del --force"
    timeout 60 "$VHDX_UBLK" del --all --force
    [ ! -e "$live" ] || fail "the kernel still has $live"
    [ ! -e "$waiting" ] || fail "the kernel still has $waiting"
    qemu-img check -q one.vhdx
}

test_living_something_else_has_the_character_device() {
    local device holder recovery
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx --recovery queue)
    kill_and_wait "$(pid_of "$device")"
    await is "$device" state quiesced
    sleep 600 <>"${device/ublkb/ublkc}" &
    holder=$!
    ublk recover "$device" >recovered 2>said &
    recovery=$!
    await grep -q "open in sleep (pid $holder)" said
    kill "$holder"
    wait "$recovery" || { cat said; fail "not recovered when the device was let go"; }
    [ "$(cat recovered)" = "$device" ]
    ublk del "$device"
}

is_detached() { ! losetup "$1" 2>/dev/null; }

# refused DEVICE WHO: `del` does not take it away and names its user.
refused() {
    ublk del "$1" 2>said && fail "$1 was taken away from its user"
    said "$2"
}

test_living_users_inside_the_kernel() {
    local device loop target keeper
    ublk create disk.vhdx --size 256M
    device=$(ublk add disk.vhdx)
    echo ',,L' | sfdisk -q "$device"
    loop=$(losetup -P -f --show "$device")
    refused "$device" "loop device $loop"
    if [ -b "${loop}p1" ]; then
        mkfs.ext4 -q -F "${loop}p1"
        mount "${loop}p1" "$mnt"
        refused "$device" "loop device $loop"
        echo there >"$mnt/file"
        sync "$mnt/file"
        umount "$mnt"
    fi
    losetup -d "$loop"
    await is_detached "$loop"
    if [ -b "${device}p1" ]; then
        mkswap "${device}p1" >/dev/null
        swapon "${device}p1"
        refused "$device" "swap"
        swapoff "${device}p1"
    fi
    mkfs.ext4 -q -F "$device"
    # shellcheck disable=SC2016 # the other shell expands them
    unshare -m bash -c 'mount "$1" "$2" && touch mounted && exec sleep 600' - "$device" "$mnt" &
    keeper=$!
    await test -e mounted
    refused "$device" "mounted at $mnt in the mount namespace of pid $keeper"
    kill "$keeper"
    await has_ended "$keeper"
    target=/sys/kernel/config/nvmet
    mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
    if [ -d "$target" ]; then
        mkdir "$target/subsystems/lab" "$target/subsystems/lab/namespaces/1"
        echo "$device" >"$target/subsystems/lab/namespaces/1/device_path"
        echo 1 >"$target/subsystems/lab/namespaces/1/enable"
        refused "$device" "nvmet as lab"
        echo 0 >"$target/subsystems/lab/namespaces/1/enable"
        rmdir "$target/subsystems/lab/namespaces/1" "$target/subsystems/lab"
    else
        note "no NVMe target in this kernel"
    fi
    ublk del "$device"
}

test_living_who_leaves_by_itself_is_waited_for() {
    local device
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx)
    cp "$(command -v sleep)" '(udev-worker)'
    # shellcheck disable=SC2288 # its name
    './(udev-worker)' 1 <"$device" &
    ublk del "$device"
    wait
}

test_living_a_full_host_is_told() {
    local device status=0
    truncate -s 64M host
    mkfs.ext4 -q -F host
    mount -o loop host "$mnt"
    ublk create "$mnt/disk.vhdx" --size 1G --block-size 1M
    fallocate -l $(($(stat -f -c '%a * %S' "$mnt") - (16 << 20))) "$mnt/ballast"
    device=$(ublk add "$mnt/disk.vhdx")
    expect_field "$device" health ok
    dd if=/dev/zero of="$device" bs=1M count=64 oflag=direct 2>/dev/null && fail "the host had room"
    expect_field "$device" health host-full
    ublk list --check >/dev/null || status=$?
    [ "$status" -eq 1 ] || fail "list --check says $status of a full host"
    grep -q "No space left on device" "$registry/${device#/dev/ublkb}.log"
    rm "$mnt/ballast"
    dd if=/dev/zero of="$device" bs=1M count=4 seek=100 oflag=direct 2>/dev/null
    expect_field "$device" health ok
    ublk list --check >/dev/null
    ublk del "$device"
    umount "$mnt"
}

# What a test of a failing host has set up, whether it ended as it should or not.
take_down() {
    umount -ql "$mnt" 2>/dev/null || true
    ! [ -e /dev/mapper/lab-living ] || dmsetup remove --force lab-living || true
    losetup -j host -O NAME --noheadings 2>/dev/null | xargs -r -n 1 losetup -d || true
}

test_living_a_failed_sync_is_told() {
    local device loop size status=0
    command -v dmsetup >/dev/null || { skipped "no dmsetup"; exit 0; }
    truncate -s 256M host
    loop=$(losetup -f --show host)
    size=$(blockdev --getsz "$loop")
    dmsetup create lab-living --table "0 $size linear $loop 0"
    dmsetup mknodes lab-living # where no udev does it
    mkfs.ext4 -q -F /dev/mapper/lab-living
    mount /dev/mapper/lab-living "$mnt"
    ublk create "$mnt/disk.vhdx" --size 64M
    device=$(ublk add "$mnt/disk.vhdx" --recovery queue)
    write_stamps "$device" 1 4 7
    dmsetup suspend --noflush lab-living
    dmsetup load lab-living --table "0 $size error"
    dmsetup resume lab-living
    dd if=/dev/zero of="$device" bs=4k count=1 oflag=direct conv=fsync 2>/dev/null && fail "the host works"
    expect_field "$device" health poisoned
    [ "$(field "$device" last_error)" != None ] || fail "no error is shown"
    ublk list --check >/dev/null || status=$?
    [ "$status" -eq 1 ] || fail "list --check says $status of a poisoned device"
    timeout 120 "$VHDX_UBLK" del "$device" 2>said && fail "it was closed cleanly"
    ublk list --check >/dev/null || status=$?
    ublk del --all || true # which reports the failure
}

test_living_every_name_of_a_device() {
    local device
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx)
    ublk del "${device#/dev/}"
    device=$(ublk add disk.vhdx)
    ublk del "${device}p1"
    device=$(ublk add disk.vhdx)
    mknod other b $((0x$(stat -c %t "$device"))) $((0x$(stat -c %T "$device")))
    ublk del "$PWD/other"
    rm other
    ublk add disk.vhdx
    mv disk.vhdx moved.vhdx
    ublk del disk.vhdx
    qemu-img check -q moved.vhdx
}

test_living_any_path() {
    local device name=$'odd \xff\n.vhdx'
    ublk create "$name" --size 64M
    device=$(ublk add "$name" --recovery queue)
    write_stamps "$device" 1 4 7
    [ "$(field "$device" image | tr -d "'" | grep -o 'hex: [0-9a-f]*' | cut -d' ' -f2)" = \
        "$(printf %s "$PWD/$name" | od -An -v -tx1 | tr -d ' \n')" ] ||
        { ublk list --json; fail "another name is listed"; }
    kill_and_wait "$(pid_of "$device")"
    ublk recover "$name"
    check_stamps "$device" 1 4 7
    ublk del "$name"
    qemu-img check -q "$name"
}

test_living_recovery_fail() {
    local device
    ublk features | grep -q 'USER_RECOVERY_FAIL_IO *[0-9.]* *yes' || { note "this kernel always waits"; return 0; }
    ublk create disk.vhdx --size 64M
    device=$(ublk add disk.vhdx --recovery fail)
    write_stamps "$device" 1 4 7
    kill_and_wait "$(pid_of "$device")"
    await is "$device" state fail-io
    timeout 20 dd if="$device" of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null &&
        fail "a device without a daemon answered"
    ublk recover "$device"
    check_stamps "$device" 1 4 7
    ublk del "$device"
}

# exits STATUS COMMAND...
exits() {
    local expected=$1 status=0
    shift
    "$@" >said 2>&1 || status=$?
    [ "$status" -eq "$expected" ] || { cat said; fail "exit status $status, not $expected: $*"; }
}

test_living_refusals_name_the_cause() {
    local device
    ublk create disk.vhdx --size 64M
    exits 1 ublk recover disk.vhdx
    said "vhdx-ublk add"
    exits 2 ublk add disk.vhdx --id 99999999
    said "numbers are 0 to 1048575"
    device=$(ublk add disk.vhdx --queues 64 --depth 4096)
    exits 1 ublk recover "$device"
    said "is served: there is nothing to recover"
    ublk del "$device"
    exits 1 ublk recover 0
    chattr +i disk.vhdx
    exits 1 ublk add disk.vhdx
    said "chattr -i"
    device=$(ublk add --read-only disk.vhdx)
    ublk del "$device"
    chattr -i disk.vhdx
    echo 2 >/proc/sys/kernel/io_uring_disabled
    exits 1 ublk add disk.vhdx
    said "kernel.io_uring_disabled"
    exits 1 ublk features
    said "kernel.io_uring_disabled"
    echo 0 >/proc/sys/kernel/io_uring_disabled
}
