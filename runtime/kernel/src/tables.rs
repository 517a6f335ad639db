//! Partial sums of the look-up formats: what [`Format::TL`] and [`Format::B1`] multiply by.
//!
//! For each group of columns a table names the partial sum `v` of every nibble; it is made once per activation vector and
//! serves every row. A sum is held in two signed bytes, `v = base·hi + lo + 16`, each within `-16..=15`, so that 8 of either
//! add up in a byte lane without overflow: `8·(-16) = -128`, `8·15 = 120`. The constant comes out once: 16 a group.
//!
//! - TL has base 31: being odd, it makes negation the complement of both bytes, `31·!hi + !lo + 16 = -v`, so a sign is one
//!   xor. `|v| <= 3·128 = 384`, hence `hi = floor(v / 31)` is within `-13..=12`.
//! - B1 has base 32 and sums the activations whose bit is set, `-512..=508`: `hi` within `-16..=15`. `Σ(2b-1)x = 2Σbx - Σx`.
use crate::{Block, Format};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The 16 partial sums of one group: low parts, then high parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(32))]
pub struct Table {
    /// `v - base·hi - 16`.
    pub lo: [i8; 16],
    /// `floor(v / base)`.
    pub hi: [i8; 16],
}

/// The base of [`Format::TL`]'s split.
pub const TL_BASE: i16 = 31;
/// The base of [`Format::B1`]'s split.
pub const B1_BASE: i16 = 32;

/// The three weights that a TL nibble names, `n = 9a + 3b + c`; 14 and 15 are invalid and count as zeros.
pub const TL_WEIGHTS: [[i8; 3]; 16] = {
    let mut t = [[0; 3]; 16];
    let mut n = 0;
    while n < 14 {
        let digits = [(n + 13) / 9, (n + 13) / 3 % 3, (n + 13) % 3];
        t[n] = [digits[0] as i8 - 1, digits[1] as i8 - 1, digits[2] as i8 - 1];
        n += 1;
    }
    t
};

impl Table {
    /// All zeros.
    pub const ZERO: Self = Self { lo: [0; 16], hi: [0; 16] };

    /// Splits 16 sums. `|v|` at most 512.
    #[inline]
    pub fn split(v: [i16; 16], base: i16) -> Self {
        let mut t = Self::ZERO;
        for (n, &v) in v.iter().enumerate() {
            let hi = v.div_euclid(base);
            t.hi[n] = hi as i8;
            t.lo[n] = (v - base * hi - 16) as i8;
        }
        t
    }
    /// The partial sum of nibble `n`.
    pub const fn sum(&self, n: usize, base: i16) -> i16 {
        base * self.hi[n] as i16 + self.lo[n] as i16 + 16
    }
}

/// The table of one group of activations, `format.table_cols()` of them.
///
/// # Panics
/// If the format has no tables.
#[inline]
pub fn table(format: Format, x: &[i8]) -> Table {
    let x: [i16; 4] = core::array::from_fn(|i| x.get(i).map_or(0, |&x| i16::from(x)));
    match format {
        Format::TL => Table::split(
            core::array::from_fn(|n| {
                let [a, b, c] = TL_WEIGHTS[n];
                i16::from(a) * x[0] + i16::from(b) * x[1] + i16::from(c) * x[2]
            }),
            TL_BASE,
        ),
        Format::B1 => Table::split(core::array::from_fn(|n| (0..4).map(|i| (n as i16 >> i & 1) * x[i]).sum()), B1_BASE),
        _ => panic!("{} is not multiplied by tables", format.name()),
    }
}

/// Whether all values are within -8 to 7, as those of BitNet a4.8 are. Then `|v|` is at most 24 in TL and 32 in B1: one byte holds
/// a partial sum, and the sum of four. Where they are not, the first few say so.
pub fn are_int4(values: &[i8]) -> bool {
    values.chunks(64).all(|values| values.iter().fold(true, |all, v| all & (-8..8).contains(v)))
}

/// Fills `out`, `format.table_blocks(cols)` blocks, with the tables of `values`: two to a block, groups in order.
///
/// # Panics
/// If the format has tables and `out` does not hold exactly those of whole steps, or `values` is shorter than them.
pub fn fill(format: Format, values: &[i8], out: &mut [Block]) {
    if format.table_cols() == 0 {
        return;
    }
    let tables = <[Table]>::mut_from_bytes(out.as_mut_bytes()).expect("a block is two tables");
    let values = &values[..tables.len() * format.table_cols()];
    for (table, x) in tables.iter_mut().zip(values.chunks_exact(format.table_cols())) {
        *table = self::table(format, x);
    }
}
