# The data of requests stays in their pages: everything that verifies does so again, also where the kernel cannot
# register them by itself.
# shellcheck shell=bash

# again FILE TEST MODE: a test of another file, with devices of this kind.
again() {
    zero_copy=$3
    # shellcheck disable=SC1090
    . "$(dirname "${BASH_SOURCE[0]}")/$1.sh"
    "$2"
}

test_zero_copy_verify() { again 30-verify test_verify_mixed_sizes_two_queues on; }
test_zero_copy_verify_with_trims() { again 30-verify test_verify_with_trims on; }
test_zero_copy_fallback_verify() { again 30-verify test_verify_mixed_sizes_two_queues fallback; }
test_zero_copy_file_system() { again 20-filesystems test_fs_dynamic_512_2m_ext4 on; }
test_zero_copy_recovery() { again 45-recovery test_recovery_reissue_loses_nothing on; }
test_zero_copy_fallback_recovery() { again 45-recovery test_recovery_queue_loses_nothing fallback; }
test_zero_copy_host_without_direct_io() { again 50-limits test_limit_host_without_direct_io on; }
test_zero_copy_host_with_4096_byte_sectors() { again 50-limits test_limit_host_with_4096_byte_sectors on; }

# Zeros that are in no file, as blocks are absent; and a file that ends inside its last block.
test_zero_copy_reads_zeros() {
    local device mode
    qemu-img create -q -f vhdx -o subformat=fixed,block_state_zero=off,block_size=8M fixed.vhdx 33M
    qemu-io -f vhdx -c 'write -q -P 7 32M 512k' fixed.vhdx
    ublk create absent.vhdx --size 1G --block-size 1M
    for mode in on fallback off; do
        zero_copy=$mode
        device=$(ublk add absent.vhdx)
        write_stamps "$device" 5 1 4
        check_stamps "$device" 5 1 4
        # One request over a block that is there and one that is not.
        dd if="$device" of=both bs=512k skip=11 count=2 iflag=direct status=none
        cmp <(tail -c 512K both) <(head -c 512K /dev/zero) || fail "$mode: an absent block does not read as zeros"
        cmp <(dd if="$device" bs=1M skip=6 count=64 iflag=direct status=none) <(head -c 64M /dev/zero)
        ublk del "$device"
        # The file ends where the disk does, inside its last block.
        device=$(ublk add --read-only fixed.vhdx)
        cmp <(dd if="$device" bs=256k skip=128 count=2 iflag=direct status=none) \
            <(head -c 512K /dev/zero | tr '\0' '\7')
        cmp <(dd if="$device" bs=256k skip=130 iflag=direct status=none) <(head -c 512K /dev/zero)
        ublk del "$device"
    done
    truncate -s -256K fixed.vhdx
    refused ublk add --read-only fixed.vhdx
}
