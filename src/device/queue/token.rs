//! What a completion belongs to, as the 64 bits of user data that travel through the ring.

use crate::engine::front::MAX_PIECES;
use crate::engine::port::PieceId;

/// The owner of one submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// The ublk command of a tag: its completion brings a request.
    Command {
        /// The tag.
        tag: u16,
    },
    /// The command that registers the pages of a tag's request.
    Register {
        /// The tag.
        tag: u16,
    },
    /// The command that unregisters them.
    Unregister {
        /// The tag.
        tag: u16,
    },
    /// File I/O for a piece of a request.
    FileIo(PieceId),
    /// The read of the mailbox's eventfd.
    Wake,
}

const KIND_SHIFT: u32 = 32;
const PIECE_SHIFT: u32 = 16;
const COMMAND: u64 = 1;
const FILE_IO: u64 = 2;
const WAKE: u64 = 3;
const REGISTER: u64 = 4;
const UNREGISTER: u64 = 5;

impl Token {
    /// Bits 0-15 the tag, 16-23 the piece, 32-34 the kind; the rest zero.
    pub(super) fn encode(self) -> u64 {
        match self {
            Self::Command { tag } => COMMAND << KIND_SHIFT | u64::from(tag),
            Self::Register { tag } => REGISTER << KIND_SHIFT | u64::from(tag),
            Self::Unregister { tag } => UNREGISTER << KIND_SHIFT | u64::from(tag),
            Self::FileIo(PieceId { tag, piece }) => {
                FILE_IO << KIND_SHIFT | u64::from(piece) << PIECE_SHIFT | u64::from(tag)
            }
            Self::Wake => WAKE << KIND_SHIFT,
        }
    }

    /// The token that was encoded so; the ring returns nothing else.
    pub(super) fn decode(bits: u64) -> Self {
        let [tag_low, tag_high, piece, _, kind, ..] = bits.to_le_bytes();
        let tag = u16::from_le_bytes([tag_low, tag_high]);
        let token = match u64::from(kind) {
            COMMAND => Self::Command { tag },
            REGISTER => Self::Register { tag },
            UNREGISTER => Self::Unregister { tag },
            FILE_IO => Self::FileIo(PieceId { tag, piece }),
            WAKE => Self::Wake,
            _ => unreachable!("a completion of nothing that was submitted: {bits:#x}"),
        };
        assert_eq!(token.encode(), bits, "a completion carries bits that were never set");
        token
    }
}

const _: () = assert!(MAX_PIECES <= 1 << 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_survives_the_ring_and_none_is_another() {
        let mut seen = std::collections::BTreeSet::new();
        let mut tokens = vec![Token::Wake];
        for tag in [0, 1, 63, 4095, u16::MAX] {
            tokens.extend([Token::Command { tag }, Token::Register { tag }, Token::Unregister { tag }]);
            tokens.extend([0, 1, 7, 255].map(|piece| Token::FileIo(PieceId { tag, piece })));
        }
        for token in tokens {
            assert_eq!(Token::decode(token.encode()), token);
            assert!(seen.insert(token.encode()), "{token:?} shares its bits");
        }
    }

    #[test]
    #[should_panic(expected = "nothing that was submitted")]
    fn a_foreign_completion_is_noticed() {
        Token::decode(0);
    }
}
