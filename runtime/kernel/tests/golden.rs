//! The packed bytes of every format, as files: an image packed today is read by every later version.
//!
//! A difference here means that images already written no longer mean what they did. Where that is wanted, the files are
//! written anew with `BITNET_BLESS=1 cargo test -p bitnet-kernel --test golden`.
mod common;

use bitnet_kernel::{Block, Format, Matrix, format};
use common::Lcg;
use std::path::PathBuf;
use zerocopy::IntoBytes;

/// More than one tile of 64 rows and of 4, the last of each cut short; the last step of every format is cut short too.
const ROWS: usize = 70;
const COLS: usize = 300;

/// The next number of the generator for every weight, row after row.
fn numbers() -> Vec<u16> {
    let mut lcg = Lcg(1);
    (0..ROWS * COLS).map(|_| lcg.next() as u16).collect()
}

/// The integer weight that a number stands for.
fn weight(format: Format, number: u16) -> i8 {
    match format {
        Format::B1 | Format::B1G => (number % 2) as i8 * 2 - 1,
        Format::I2G => (number % 4) as i8 * 2 - 3,
        Format::I3G => (number % 8) as i8 - 4,
        Format::I4 | Format::I4G => (number % 16) as i8 - 8,
        Format::I8 => ((number % 255) as i16 - 127) as i8,
        Format::F16 => panic!("f16 weights are not integers"),
        _ => (number % 3) as i8 - 1,
    }
}

/// The bits of the half that a number stands for: finite, since one bit of the exponent is cleared.
fn half_bits(number: u16) -> u16 {
    number & 0x7bff
}

/// The bits of the scale of row `r` in step `i` of a grouped format.
fn scale(numbers: &[u16], i: usize, r: usize) -> u16 {
    half_bits(numbers[i * Format::PANEL_ROWS + r])
}

fn pack(format: Format) -> Vec<Block> {
    let numbers = numbers();
    let mut blocks = vec![Block::ZERO; format.matrix_blocks(ROWS, COLS)];
    match format {
        Format::F16 => format::encode_f16(ROWS, COLS, &mut blocks, |r, c| half_bits(numbers[r * COLS + c])),
        _ => format::encode(format, ROWS, COLS, &mut blocks, |r, c| weight(format, numbers[r * COLS + c])),
    }
    if format.is_grouped() {
        for (i, step) in blocks.chunks_exact_mut(format.step_blocks()).enumerate() {
            (0..Format::PANEL_ROWS).for_each(|r| format::set_scale(format, step, r, scale(&numbers, i, r)));
        }
    }
    blocks
}

fn file(format: Format) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden", &format!("{}.bin", format.name())].iter().collect()
}

fn check_bytes(format: Format) {
    let (blocks, path) = (pack(format), file(format));
    let bytes = blocks.as_bytes();
    if std::env::var_os("BITNET_BLESS").is_some() {
        std::fs::write(&path, bytes).expect("the file is written");
    }
    let golden = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(bytes.len(), golden.len(), "{}: another size", format.name());
    if let Some(at) = (0..golden.len()).find(|&i| bytes[i] != golden[i]) {
        let (name, block, byte) = (format.name(), at / Block::BYTES, at % Block::BYTES);
        panic!("{name}: byte {byte} of block {block} is {:#04x}, was {:#04x}", bytes[at], golden[at]);
    }
}

#[test]
fn b1_bytes() {
    check_bytes(Format::B1);
}

#[test]
fn t2_bytes() {
    check_bytes(Format::T2);
}

#[test]
fn tl_bytes() {
    check_bytes(Format::TL);
}

#[test]
fn i4_bytes() {
    check_bytes(Format::I4);
}

#[test]
fn i8_bytes() {
    check_bytes(Format::I8);
}

#[test]
fn f16_bytes() {
    check_bytes(Format::F16);
}

#[test]
fn b1g_bytes() {
    check_bytes(Format::B1G);
}

#[test]
fn tlg_bytes() {
    check_bytes(Format::TLG);
}

#[test]
fn i4g_bytes() {
    check_bytes(Format::I4G);
}

#[test]
fn t2r_bytes() {
    check_bytes(Format::T2R);
}

#[test]
fn i2g_bytes() {
    check_bytes(Format::I2G);
}

#[test]
fn i3g_bytes() {
    check_bytes(Format::I3G);
}

/// Read from the files, so that the decoder is held to the bytes and not to the encoder.
#[test]
fn every_weight_comes_back_from_the_files() {
    let numbers = numbers();
    for format in Format::ALL {
        let bytes = std::fs::read(file(format)).expect("the file is there");
        let mut blocks = vec![Block::ZERO; bytes.len() / Block::BYTES];
        blocks.as_mut_bytes().copy_from_slice(&bytes);
        let w = Matrix::new(format, ROWS, COLS, &blocks).expect("the size of the matrix");
        for (i, &number) in numbers.iter().enumerate() {
            let (r, c, name) = (i / COLS, i % COLS, format.name());
            match format {
                Format::F16 => assert_eq!(w.weight_f16(r, c), half_bits(number), "{name} row {r} column {c}"),
                _ => assert_eq!(w.weight(r, c), weight(format, number), "{name} row {r} column {c}"),
            }
        }
        if format.is_grouped() {
            for (i, step) in blocks.chunks_exact(format.step_blocks()).enumerate() {
                for (r, &bytes) in format::scales(format, step).iter().enumerate() {
                    assert_eq!(u16::from_le_bytes(bytes), scale(&numbers, i, r));
                }
            }
        }
    }
}

/// Tags are recorded in images.
#[test]
fn tags_are_what_they_were() {
    for (format, tag) in Format::ALL.into_iter().zip(1..) {
        assert_eq!((format as u8, Format::from_tag(tag)), (tag, Some(format)));
    }
    assert_eq!((Format::from_tag(0), Format::from_tag(13)), (None, None));
}
