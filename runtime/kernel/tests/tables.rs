//! The partial sums of the look-up formats: both parts in range, their sum exact, over every value there is.
use bitnet_kernel::tables::{self, B1_BASE, TL_BASE, TL_WEIGHTS, Table};
use bitnet_kernel::{Block, Format};
use proptest::prelude::*;
use zerocopy::FromBytes;

/// Every partial sum of 3 ternary weights, and of 4 activations that are in or out.
const TL_SUMS: core::ops::RangeInclusive<i16> = -384..=384;
const B1_SUMS: core::ops::RangeInclusive<i16> = -512..=508;

/// The parts of `v`, the same in all 16 places.
fn split(v: i16, base: i16) -> (i8, i8) {
    let t = Table::split([v; 16], base);
    assert!(t.lo.iter().all(|&lo| lo == t.lo[0]) && t.hi.iter().all(|&hi| hi == t.hi[0]));
    assert_eq!((0..16).map(|n| t.sum(n, base)).collect::<Vec<_>>(), [v; 16]);
    (t.lo[0], t.hi[0])
}

fn sum(lo: i8, hi: i8, base: i16) -> i16 {
    base * i16::from(hi) + i16::from(lo) + 16
}

#[test]
fn every_sum_splits_in_range_and_adds_up() {
    for (sums, base) in [(TL_SUMS, TL_BASE), (B1_SUMS, B1_BASE)] {
        for v in sums {
            let (lo, hi) = split(v, base);
            assert!((-16..=15).contains(&lo) && (-16..=15).contains(&hi), "{v} splits into {lo} and {hi}");
            assert_eq!(sum(lo, hi, base), v);
        }
    }
}

#[test]
fn the_complement_is_the_negation_in_tl() {
    for v in TL_SUMS {
        let (lo, hi) = split(v, TL_BASE);
        assert_eq!(sum(!lo, !hi, TL_BASE), -v);
        assert!((-16..=15).contains(&!lo) && (-16..=15).contains(&!hi), "the complement of {v} is out of range");
    }
}

/// A step is 8 groups. The largest part 8 times is within a byte, so any other 8 are.
#[test]
fn eight_of_any_parts_add_up_in_a_byte() {
    for (sums, base) in [(TL_SUMS, TL_BASE), (B1_SUMS, B1_BASE)] {
        for v in sums {
            let (lo, hi) = split(v, base);
            for part in [lo, hi, !lo, !hi] {
                assert!(part.checked_mul(8).is_some(), "8 times {part}, a part of {v}");
            }
        }
    }
}

#[test]
fn tl_weights_are_the_digits_of_the_nibble() {
    let mut seen = [false; 14];
    for a in -1..=1i8 {
        for b in -1..=1i8 {
            for c in -1..=1i8 {
                let n = 9 * a + 3 * b + c;
                let sign = if n < 0 { -1 } else { 1 };
                assert_eq!(TL_WEIGHTS[n.unsigned_abs() as usize], [sign * a, sign * b, sign * c]);
                seen[n.unsigned_abs() as usize] = true;
            }
        }
    }
    assert_eq!(seen, [true; 14]);
    assert_eq!(TL_WEIGHTS[14..], [[0; 3]; 2], "invalid nibbles are zeros");
}

/// `table` holds the sums that nibbles name: from the meaning of a nibble, in wide integers.
fn check_table(format: Format, x: &[i8]) {
    let t = tables::table(format, x);
    for (n, weights) in TL_WEIGHTS.iter().enumerate() {
        let (want, base) = match format {
            Format::B1 => ((0..4).filter(|i| n >> i & 1 == 1).map(|i| i32::from(x[i])).sum::<i32>(), B1_BASE),
            _ => (weights.iter().zip(x).map(|(&w, &x)| i32::from(w) * i32::from(x)).sum(), TL_BASE),
        };
        assert_eq!(i32::from(t.sum(n, base)), want, "{} nibble {n} of {x:?}", format.name());
        for part in [t.lo[n], t.hi[n]] {
            assert!((-16..=15).contains(&part), "{} nibble {n} of {x:?}: {part}", format.name());
        }
    }
}

#[test]
fn tables_hold_the_sums_at_the_extremes() {
    for combination in 0..256usize {
        let x: Vec<i8> = (0..4).map(|i| [-128, -1, 0, 127][combination >> (2 * i) & 3]).collect();
        check_table(Format::B1, &x);
        check_table(Format::TL, &x[..3]);
    }
}

proptest! {
    #[test]
    fn tables_hold_the_sums(x in any::<[i8; 4]>()) {
        check_table(Format::B1, &x);
        check_table(Format::TL, &x[..3]);
    }
}

/// Two tables to a block, groups in order, and nothing where a format has none.
#[test]
fn fill_places_the_tables_in_the_order_of_the_groups() {
    let values: Vec<i8> = (0..96).map(|i| (i * 37 % 256) as u8 as i8).collect();
    for (format, cols) in [(Format::B1, 96), (Format::TL, 96), (Format::B1, 32), (Format::TL, 25)] {
        let mut blocks = vec![Block::ZERO; format.table_blocks(cols)];
        tables::fill(format, &values, &mut blocks);
        let groups = values.chunks_exact(format.table_cols());
        let halves = blocks.iter().flat_map(|block| block.0.chunks_exact(32));
        assert_eq!(halves.clone().count(), 8 * format.steps(cols));
        for (half, x) in halves.zip(groups) {
            assert_eq!(Table::read_from_bytes(half).expect("32 bytes"), tables::table(format, x));
        }
    }
    for format in [Format::T2, Format::I4, Format::I8, Format::F16] {
        tables::fill(format, &values, &mut []);
    }
}

#[test]
#[should_panic(expected = "t2 is not multiplied by tables")]
fn a_format_in_planes_has_no_table() {
    tables::table(Format::T2, &[1, 2, 3]);
}

#[test]
#[should_panic(expected = "range end index")]
fn fill_refuses_too_few_values() {
    tables::fill(Format::TL, &[0; 23], &mut [Block::ZERO; 4]);
}
