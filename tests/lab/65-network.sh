# Devices that other machines use, and images that lie on other machines: all of them are this one.
# shellcheck shell=bash

target=/sys/kernel/config/nvmet
subsystem=nqn.2026-11.org.example:disk
initiator=nqn.2014-08.org.nvmexpress:uuid:f8131ac9-cdef-4165-866b-5998c1e67890

# Every server and client that a test has started, whether it ended as it should or not.
take_down() {
    timeout 20 nvme disconnect --nqn="$subsystem" >/dev/null 2>&1 || true
    end_export || true
    for client in far near; do
        timeout 20 umount -q "$client" 2>/dev/null || umount -ql "$client" 2>/dev/null || true
    done
    end_smb || true
    end_nfs || true
    umount -q fuse 2>/dev/null || true
    losetup -j fuse.img -O NAME --noheadings 2>/dev/null | xargs -r -n 1 losetup -d || true
}

# await SECONDS COMMAND...
await() {
    local n
    for ((n = 0; n < $1 * 10; n++)); do
        ! "${@:2}" 2>/dev/null || return 0
        sleep 0.1
    done
    fail "still not so after $1 s: ${*:2}"
}

# refused WORDS COMMAND...: it fails, and says why.
refused() {
    "${@:2}" >said 2>&1 && fail "not refused: ${*:2}"
    grep -q "$1" said || { cat said; fail "the refusal does not say '$1'"; }
}

# verify DEVICE SECONDS: what is written is read again, and nothing fails.
verify() {
    fio --name=verify --filename="$1" --rw=randwrite --bs=4k --iodepth=8 --ioengine=libaio --direct=1 \
        --time_based --runtime="$2" --size=256M --verify=crc32c --verify_fatal=1 --verify_backlog=64 --fsync=50
}

export_device() {
    (
        cd "$target"
        mkdir "hosts/$initiator" "subsystems/$subsystem" "subsystems/$subsystem/namespaces/1" ports/1
        ln -s "$PWD/hosts/$initiator" "subsystems/$subsystem/allowed_hosts/"
        echo "$1" >"subsystems/$subsystem/namespaces/1/device_path"
        echo 1 >"subsystems/$subsystem/namespaces/1/enable"
        echo tcp >ports/1/addr_trtype
        echo ipv4 >ports/1/addr_adrfam
        echo 127.0.0.1 >ports/1/addr_traddr
        echo 4420 >ports/1/addr_trsvcid
        ln -s "$PWD/subsystems/$subsystem" ports/1/subsystems/
    )
}

end_export() {
    [ -d "$target/subsystems/$subsystem" ] || return 0
    (
        cd "$target"
        rm -f "ports/1/subsystems/$subsystem"
        echo 0 >"subsystems/$subsystem/namespaces/1/enable"
        rm -f "subsystems/$subsystem/allowed_hosts/$initiator"
        rmdir ports/1 "subsystems/$subsystem/namespaces/1" "subsystems/$subsystem" "hosts/$initiator"
    )
}

# takes_less FILE BYTES: on its host.
takes_less() { [ "$(host_bytes "$1")" -lt "$2" ]; }

# The commands of src/guide/export.md: the initiator sees no error while the daemon is killed and recovered.
has_size() { [ "$(blockdev --getsize64 "$1")" = "$(numfmt --from=iec "$2")" ]; }

test_network_export_over_nvme_tcp() {
    local device remote writer before
    ! command -v modprobe >/dev/null || modprobe -q -a nvmet nvmet-tcp nvme-tcp || true
    [ -d "$target" ] || { skipped "no NVMe target in this kernel"; return 0; }
    ublk create disk.vhdx --size 1G --block-size 1M
    device=$(ublk add disk.vhdx)
    export_device "$device"
    timeout 20 nvme connect --transport=tcp --traddr=127.0.0.1 --trsvcid=4420 --nqn="$subsystem" \
        --hostnqn="$initiator" --hostid="${initiator##*:}"
    remote=/dev/$(basename "$(ls -d "$(dirname "$(grep -l "^$subsystem$" /sys/class/nvme/*/subsysnqn)")"/nvme*n1)")
    await 10 test -b "$remote"
    verify "$remote" 15 >fio.log 2>&1 &
    writer=$!
    for _ in 1 2 3; do
        sleep 3
        kill -9 "$(daemon_pid)"
        sleep 1
        ublk recover "$device"
    done
    wait "$writer" || { cat fio.log; fail "the initiator saw an error"; }
    note "while the daemon was killed three times: $(grep -o 'IOPS=[^,]*' fio.log | head -n 1)"
    refused "nvmet as $subsystem" ublk del "$device"
    write_stamps "$remote" 300 8 7
    write_stamps "$remote" 400 64 8
    before=$(host_bytes disk.vhdx)
    blkdiscard -o $((400 << 20)) -l $((64 << 20)) "$remote"
    sync "$remote"
    await 10 takes_less disk.vhdx $((before - (60 << 20)))
    # The disk grows while it is exported; the target looks at its size when it is asked to.
    ublk resize "$device" --size 2G
    echo 1 >"$target/subsystems/$subsystem/namespaces/1/revalidate_size"
    await 10 has_size "$remote" 2G
    write_stamps "$remote" 1800 8 9
    timeout 20 nvme disconnect --nqn="$subsystem"
    end_export
    ublk del "$device"
    ublk check disk.vhdx
    device=$(ublk add --read-only disk.vhdx)
    check_stamps "$device" 300 8 7
    check_stamps "$device" 1800 8 9
    ublk del "$device"
}

begin_smb() {
    ! command -v modprobe >/dev/null || modprobe -q -a cifs ksmbd || true
    mkdir -p share near far
    # Leases, as other servers give them: without, this one does not ask for the locks that a client has.
    printf '%s\n' '[global]' 'smb2 leases = yes' 'bind interfaces only = yes' 'interfaces = lo' \
        '[share]' "path = $PWD/share" 'read only = no' 'store dos attributes = yes' >ksmbd.conf
    ksmbd.adduser -a root -p secret -i "$PWD/ksmbd.users" -c "$PWD/ksmbd.conf"
    ksmbd.mountd -c "$PWD/ksmbd.conf" -u "$PWD/ksmbd.users"
    await 10 mount_smb near
    # A connection of its own is another machine to the server.
    mount_smb far nosharesock
}

mount_smb() {
    timeout 20 mount -t cifs //127.0.0.1/share "$1" \
        -o "username=root,password=secret,vers=3.1.1,cache=none${2:+,$2}"
}

end_smb() { [ ! -e ksmbd.conf ] || ksmbd.control -s >/dev/null; }

# attributes FILE: as Windows sees them.
attributes() { smbinfo filebasicinfo "$1" | sed -n 's/^File Attributes: //p'; }
is_marked_sparse() { (($(attributes "$1") & 0x200)); }

# What a guest does with an image that lies elsewhere.
use_from_afar() {
    local device=$1 before
    write_stamps "$device" 1 24 1
    write_stamps "$device" 100 8 2
    sync "$device"
    before=$(host_bytes share/disk.vhdx)
    blkdiscard -o $((4 << 20)) -l $((16 << 20)) "$device"
    blkdiscard -z -o $((20 << 20)) -l $((1 << 20)) "$device"
    sync "$device"
    verify "$device" 4 >fio.log 2>&1 || { cat fio.log; fail "a write failed"; }
    write_stamps "$device" 300 8 3
    note "$before bytes before the discard, $(host_bytes share/disk.vhdx) after all"
}

test_network_image_on_smb() {
    local device
    begin_smb
    ublk create near/disk.vhdx --size 1G --block-size 1M
    ! is_marked_sparse near/disk.vhdx || fail "create marked the file as sparse: $(attributes near/disk.vhdx)"
    device=$(ublk add near/disk.vhdx)
    use_from_afar "$device"
    refused "another program has it open" ublk check far/disk.vhdx
    refused "has it open\|running daemon" ublk add far/disk.vhdx
    refused "has it open\|running daemon" ublk add near/disk.vhdx
    refused "lies on SMB" ublk upgrade "$device"
    kill -9 "$(daemon_pid)"
    timeout 60 "$VHDX_UBLK" recover "$device"
    check_stamps "$device" 300 8 3
    ublk del "$device"
    ! is_marked_sparse near/disk.vhdx || fail "the device marked the file as sparse"
    ublk check near/disk.vhdx >said
    ! grep -q "Windows refuses" said || fail "a dense file is called sparse"
    qemu-img check -q near/disk.vhdx
    device=$(ublk add --read-only far/disk.vhdx)
    check_stamps "$device" 300 8 3
    ublk del "$device"
    # A program on another machine that only has it open refuses no other.
    exec 9<far/disk.vhdx
    device=$(ublk add near/disk.vhdx)
    refused "has it open for writing" ublk check far/disk.vhdx
    exec 9<&-
    ublk del "$device"
}

test_network_a_sparse_file_on_smb_becomes_dense() {
    local device
    begin_smb
    ublk create near/disk.vhdx --size 1G --block-size 1M --sparse yes
    device=$(ublk add --sparse yes near/disk.vhdx)
    write_stamps "$device" 1 24 1
    blkdiscard -o $((8 << 20)) -l $((8 << 20)) "$device"
    sync "$device"
    ublk del "$device"
    is_marked_sparse near/disk.vhdx || fail "it was to be sparse"
    ublk check near/disk.vhdx | grep -q "Windows refuses" || fail "a sparse file is not called so"
    ublk compact --dense near/disk.vhdx
    ! is_marked_sparse near/disk.vhdx || fail "still marked as sparse: $(attributes near/disk.vhdx)"
    [ "$(host_bytes share/disk.vhdx)" -ge "$(stat -c %s share/disk.vhdx)" ] || fail "the server has holes in it"
    ! ublk check near/disk.vhdx | grep -q "Windows refuses" || fail "a dense file is called sparse"
}

begin_nfs() {
    ! command -v modprobe >/dev/null || modprobe -q -a nfsd nfsv4 || true
    mkdir -p share near far
    mount -t tmpfs tmpfs /var/lib/nfs
    mkdir -p /var/lib/nfs/{sm,v4recovery,nfsdcld,rpc_pipefs}
    touch /var/lib/nfs/{etab,rmtab}
    mount -t rpc_pipefs rpc_pipefs /var/lib/nfs/rpc_pipefs
    mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd
    # Remembers which clients have locks, also when the server was away.
    nfsdcld -F -p /var/lib/nfs/rpc_pipefs -s /var/lib/nfs/nfsdcld >nfsdcld.log 2>&1 &
    echo $! >nfsdcld.pid
    rpc.mountd -F -N 3 >mountd.log 2>&1 &
    echo $! >mountd.pid
    exportfs -o rw,no_root_squash,insecure,fsid=0,sync "127.0.0.1:$PWD/share"
    await 10 test -e /var/lib/nfs/nfsdcld/main.sqlite
    nfs_server
    await 10 mount_nfs near 4.2
    # Another version is another client, with other locks, to the server.
    mount_nfs far 4.1
}

nfs_server() { rpc.nfsd -N 3 -V 4.1 -V 4.2 --lease-time 10 --grace-time 10 2; }
mount_nfs() { timeout 60 mount -t nfs4 -o "vers=$2" 127.0.0.1:/ "$1"; }

end_nfs() {
    [ -e mountd.pid ] || return 0
    rpc.nfsd 0
    exportfs -au
    kill "$(cat mountd.pid)" "$(cat nfsdcld.pid)" 2>/dev/null || true
    umount -l /var/lib/nfs/rpc_pipefs /var/lib/nfs
    rm mountd.pid
}

test_network_image_on_nfs() {
    local device before
    begin_nfs
    ublk create near/disk.vhdx --size 1G --block-size 1M
    device=$(ublk add near/disk.vhdx)
    use_from_afar "$device"
    before=$(host_bytes share/disk.vhdx)
    blkdiscard -o $((100 << 20)) -l $((8 << 20)) "$device"
    sync "$device"
    await 10 takes_less share/disk.vhdx "$before"
    refused "has it open for writing" ublk add near/disk.vhdx
    for opener in far share; do
        refused "open for writing\|holds a lease" ublk add --read-only "$opener/disk.vhdx"
        refused "open for writing\|holds a lease" ublk check "$opener/disk.vhdx"
    done
    kill -9 "$(daemon_pid)"
    timeout 60 "$VHDX_UBLK" recover "$device"
    check_stamps "$device" 300 8 3
    ublk del "$device"
    ublk check near/disk.vhdx
    qemu-img check -q near/disk.vhdx
}

# The server goes away under load and comes back: I/O waits, the lock is ours again, and nothing fails.
test_network_nfs_server_restarts() {
    local device writer
    begin_nfs
    ublk create near/disk.vhdx --size 1G --block-size 1M
    device=$(ublk add near/disk.vhdx)
    write_stamps "$device" 300 8 3
    verify "$device" 25 >fio.log 2>&1 &
    writer=$!
    sleep 4
    rpc.nfsd 0
    sleep 3
    nfs_server
    wait "$writer" || { cat fio.log; fail "I/O failed"; }
    # The client has the lock from the server that came back.
    refused "open for writing\|holds a lease" ublk check share/disk.vhdx
    check_stamps "$device" 300 8 3
    ublk del "$device"
    ublk check near/disk.vhdx
}

# A server that has forgotten its clients gives their locks away: nothing is written without one, and that is said.
test_network_a_lost_nfs_lock() {
    local device
    begin_nfs
    ublk create near/disk.vhdx --size 1G --block-size 1M
    device=$(ublk add near/disk.vhdx)
    write_stamps "$device" 300 8 3
    sync "$device"
    write_stamps "$device" 400 8 4
    kill "$(cat nfsdcld.pid)"
    rpc.nfsd 0
    rm -rf /var/lib/nfs/nfsdcld/*
    nfs_server
    timeout 60 dd if=/dev/zero of="$device" bs=1M count=1 seek=500 oflag=direct 2>/dev/null &&
        fail "written without a lock"
    timeout 60 sync "$device" 2>/dev/null && fail "flushed without a lock"
    ublk list --json | grep -q '"health": "poisoned"' || { ublk list --json; fail "it is not said"; }
    refused "is gone, but" ublk del "$device"
    ublk check near/disk.vhdx
    device=$(ublk add near/disk.vhdx)
    check_stamps "$device" 300 8 3
    ublk del "$device"
}
