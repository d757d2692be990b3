//! What may happen to a chain, made at random, and the cases that failed once.

use proptest::prelude::*;

/// The shape of a layer; sizes are in sectors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) sectors: u16,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) v2: bool,
    pub(super) extended: bool,
}

/// One thing that happens to the chain. Places and lengths are taken modulo the size.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Write {
        at: u32,
        len: u16,
        byte: u8,
    },
    Zero {
        at: u32,
        len: u16,
    },
    Discard {
        at: u32,
        len: u16,
    },
    Flush,
    Overlay(Shape),
    Commit {
        base: u8,
        empty: bool,
    },
    Pull {
        base: u8,
    },
    Rebase {
        onto: u8,
    },
    Resize {
        sectors: u16,
    },
    Flatten {
        compress: bool,
    },
    /// An overlay whose clusters are compressed: all that the part touches.
    Compressed {
        shape: Shape,
        zstd: bool,
        at: u32,
        len: u16,
        byte: u8,
    },
    /// Several things on one handle, which the other operations open anew each.
    Session([Guest; 4]),
    /// Power fails in the middle of what comes next, in the state of this number.
    Crash(u16),
    /// The call of this number fails in what comes next.
    FailNext(u16),
}

/// What a guest does while the chain is open.
#[derive(Clone, Copy, Debug)]
pub(super) enum Guest {
    Write {
        at: u32,
        len: u16,
        byte: u8,
    },
    Zero {
        at: u32,
        len: u16,
    },
    Flush,
    /// The whole chain is closed and opened again.
    Reopen,
}

/// A base and what happens to it.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) raw: bool,
    pub(super) base: Shape,
    pub(super) ops: Vec<Op>,
}

/// Cases that failed once.
pub(super) fn regressions() -> Vec<Case> {
    REGRESSIONS.to_vec().into_iter().map(|(raw, base, ops)| Case { raw, base, ops: ops.to_vec() }).collect()
}

pub(super) const SMALL: Shape = Shape { sectors: 9, cluster_bits: 9, refcount_order: 4, v2: false, extended: false };

/// All but the last are no faults of the past: they hold the hard corners together.
pub(super) const REGRESSIONS: [(bool, Shape, &[Op]); 5] = [
    // A raw base shorter than its overlay, written through, committed, crashed.
    (
        true,
        SMALL,
        &[
            Op::Overlay(Shape { sectors: 20, ..SMALL }),
            Op::Write { at: 3000, len: 5000, byte: 7 },
            Op::Crash(5),
            Op::Commit { base: 1, empty: true },
        ],
    ),
    // An overlay longer than its base grows after it has shrunk: what lay there does not come back.
    (
        false,
        SMALL,
        &[
            Op::Write { at: 0, len: 4608, byte: 3 },
            Op::Overlay(Shape { v2: true, ..SMALL }),
            Op::Resize { sectors: 2 },
            Op::Resize { sectors: 12 },
        ],
    ),
    // The base of a pull fails while it is read.
    (
        false,
        Shape { cluster_bits: 16, extended: true, ..SMALL },
        &[
            Op::Write { at: 100, len: 700, byte: 9 },
            Op::Overlay(Shape { refcount_order: 0, ..SMALL }),
            Op::FailNext(3),
            Op::Pull { base: 0 },
            Op::Flatten { compress: true },
        ],
    ),
    // A compressed overlay that is written in part, on a handle and on the next one, and pulled into.
    (
        false,
        SMALL,
        &[
            Op::Write { at: 0, len: 4608, byte: 3 },
            Op::Compressed { shape: Shape { sectors: 12, ..SMALL }, zstd: true, at: 700, len: 3000, byte: 8 },
            Op::Session([
                Guest::Write { at: 1000, len: 100, byte: 5 },
                Guest::Zero { at: 2048, len: 700 },
                Guest::Reopen,
                Guest::Write { at: 2100, len: 9, byte: 6 },
            ]),
            Op::Overlay(SMALL),
            Op::Pull { base: 2 },
            Op::Commit { base: 1, empty: true },
        ],
    ),
    // Power fails as a shrink cuts the file: refcounts behind its new end stayed, and became leaks when it grew again.
    (
        false,
        Shape { sectors: 79, refcount_order: 0, extended: true, ..SMALL },
        &[
            Op::Write { at: 802_356_980, len: 2317, byte: 1 },
            Op::Crash(40_595),
            Op::Resize { sectors: 1 },
            Op::Session([Guest::Write { at: 0, len: 1, byte: 1 }; 4]),
        ],
    ),
];

pub(super) fn shape() -> impl Strategy<Value = Shape> {
    (1..200_u16, prop_oneof![4 => 9..13_u32, 1 => 13..22_u32], 0..7_u32, any::<bool>(), prop::bool::weighted(0.2))
        .prop_map(|(sectors, cluster_bits, refcount_order, v2, extended)| Shape {
            sectors,
            cluster_bits,
            refcount_order,
            v2,
            extended,
        })
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (any::<u32>(), 1..9000_u16, 1..255_u8).prop_map(|(at, len, byte)| Op::Write { at, len, byte }),
        3 => (any::<u32>(), 1..9000_u16).prop_map(|(at, len)| Op::Zero { at, len }),
        2 => (any::<u32>(), 1..9000_u16).prop_map(|(at, len)| Op::Discard { at, len }),
        1 => Just(Op::Flush),
        3 => shape().prop_map(Op::Overlay),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(base, empty)| Op::Commit { base, empty }),
        2 => any::<u8>().prop_map(|base| Op::Pull { base }),
        2 => any::<u8>().prop_map(|onto| Op::Rebase { onto }),
        2 => (1..220_u16).prop_map(|sectors| Op::Resize { sectors }),
        1 => any::<bool>().prop_map(|compress| Op::Flatten { compress }),
        2 => (shape(), any::<bool>(), any::<u32>(), 1..9000_u16, 1..255_u8)
            .prop_map(|(shape, zstd, at, len, byte)| Op::Compressed { shape, zstd, at, len, byte }),
        3 => prop::array::uniform4(guest()).prop_map(Op::Session),
        3 => any::<u16>().prop_map(Op::Crash),
        3 => (0..60_u16).prop_map(Op::FailNext),
    ]
}

pub(super) fn guest() -> impl Strategy<Value = Guest> {
    prop_oneof![
        4 => (any::<u32>(), 1..9000_u16, 1..255_u8).prop_map(|(at, len, byte)| Guest::Write { at, len, byte }),
        2 => (any::<u32>(), 1..9000_u16).prop_map(|(at, len)| Guest::Zero { at, len }),
        1 => Just(Guest::Flush),
        1 => Just(Guest::Reopen),
    ]
}

pub(super) fn case() -> impl Strategy<Value = Case> {
    (prop::bool::weighted(0.25), shape(), prop::collection::vec(op(), 1..14)).prop_map(|(raw, base, ops)| Case {
        raw,
        base,
        ops,
    })
}
