//! Memory for direct I/O: zeroed, 4096-aligned, a whole number of pages.

use std::ops::{Deref, DerefMut};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The unit of every buffer, and the strictest alignment that direct I/O asks of one.
pub const PAGE_BYTES: usize = 4096;

#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

const _: () = assert!(size_of::<Page>() == PAGE_BYTES && align_of::<Page>() == PAGE_BYTES);

/// An owned run of aligned pages.
#[derive(Clone)]
pub struct Buffer(Box<[Page]>);

impl Buffer {
    /// `length` zero bytes; `length` is a multiple of [`PAGE_BYTES`].
    pub fn zeroed(length: usize) -> Self {
        assert!(length.is_multiple_of(PAGE_BYTES), "{length} is no whole number of pages");
        let pages = <[Page]>::new_box_zeroed_with_elems(length / PAGE_BYTES);
        Self(pages.expect("the allocator has room for a bounded buffer"))
    }

    /// A copy of `bytes`, whose length is a multiple of [`PAGE_BYTES`].
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_bytes()
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.len())
    }
}

/// Whether all of `bytes` are zero. Compilers make vector instructions of it.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<64>();
    lines.iter().all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        for length in [0, 1, 63, 64, 65, 4096, 5000] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "byte {at} of {length}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn buffers_are_aligned_and_zero() {
        let buffer = Buffer::zeroed(3 * PAGE_BYTES);
        assert_eq!(buffer.len(), 3 * PAGE_BYTES);
        assert_eq!(buffer.as_ptr() as usize % PAGE_BYTES, 0);
        assert!(buffer.iter().all(|&byte| byte == 0));
    }
}
