//! Element types of checkpoints and the numbers they stand for.
//!
//! Layouts of GGUF's block types are those of the reference implementation (ggml, MIT), written down from its published
//! descriptions; `tests/golden/gguf` has bytes of each type and what another implementation reads in them. All are decoded to
//! f32 in the same order of operations, so that a ternary or binary tensor gives the same magnitude everywhere, bit for bit.
use half::f16;
use pulp::Arch;

/// Element types that are known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the formats'")]
#[expect(non_camel_case_types, reason = "GGUF's names")]
pub enum Dtype {
    Bool,
    U8,
    I8,
    F8E4M3,
    F8E5M2,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    F64,
    I64,
    U64,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
    TQ1_0,
    TQ2_0,
    Q1_0,
    /// Groups of 64.
    Q2_0,
    /// Groups of 128.
    Q2_0_128,
    /// Groups of 128; after the last a scale and 28 bytes of padding.
    I2_S,
    /// Groups of 64, as bitnet.cpp once wrote on ARM.
    I2_S_64,
}

/// Name, type, elements in a block, bytes in a block.
const ALL: [(&str, Dtype, u64, u64); 30] = [
    ("BOOL", Dtype::Bool, 1, 1),
    ("U8", Dtype::U8, 1, 1),
    ("I8", Dtype::I8, 1, 1),
    ("F8_E4M3", Dtype::F8E4M3, 1, 1),
    ("F8_E5M2", Dtype::F8E5M2, 1, 1),
    ("I16", Dtype::I16, 1, 2),
    ("U16", Dtype::U16, 1, 2),
    ("F16", Dtype::F16, 1, 2),
    ("BF16", Dtype::BF16, 1, 2),
    ("I32", Dtype::I32, 1, 4),
    ("U32", Dtype::U32, 1, 4),
    ("F32", Dtype::F32, 1, 4),
    ("F64", Dtype::F64, 1, 8),
    ("I64", Dtype::I64, 1, 8),
    ("U64", Dtype::U64, 1, 8),
    ("Q4_0", Dtype::Q4_0, 32, 18),
    ("Q4_1", Dtype::Q4_1, 32, 20),
    ("Q5_0", Dtype::Q5_0, 32, 22),
    ("Q5_1", Dtype::Q5_1, 32, 24),
    ("Q8_0", Dtype::Q8_0, 32, 34),
    ("Q4_K", Dtype::Q4_K, 256, 144),
    ("Q5_K", Dtype::Q5_K, 256, 176),
    ("Q6_K", Dtype::Q6_K, 256, 210),
    ("TQ1_0", Dtype::TQ1_0, 256, 54),
    ("TQ2_0", Dtype::TQ2_0, 256, 66),
    ("Q1_0", Dtype::Q1_0, 128, 18),
    ("Q2_0 (groups of 64)", Dtype::Q2_0, 64, 18),
    ("Q2_0 (groups of 128)", Dtype::Q2_0_128, 128, 34),
    ("I2_S", Dtype::I2_S, 128, 32),
    ("I2_S (groups of 64)", Dtype::I2_S_64, 64, 16),
];

/// Bytes after the last block of an I2_S tensor: the scale and padding.
pub(crate) const I2_S_TAIL: u64 = 32;

/// Most elements in a block.
pub(crate) const BLOCK_MAX: usize = 256;

impl Dtype {
    fn entry(self) -> &'static (&'static str, Self, u64, u64) {
        ALL.iter().find(|(_, d, ..)| *d == self).expect("all are listed")
    }
    /// The type as files and people spell it.
    pub fn name(self) -> &'static str {
        self.entry().0
    }
    /// Elements and bytes of the smallest part that can be read alone.
    pub fn block(self) -> (u64, u64) {
        let (_, _, elements, bytes) = *self.entry();
        (elements, bytes)
    }
    /// Bytes of this many elements, whole blocks; `None` if they are no whole blocks or overflow.
    pub fn bytes_of(self, elements: u64) -> Option<u64> {
        let (block, bytes) = self.block();
        if !elements.is_multiple_of(block) {
            return None;
        }
        let tail = if matches!(self, Self::I2_S | Self::I2_S_64) { I2_S_TAIL } else { 0 };
        (elements / block).checked_mul(bytes)?.checked_add(tail)
    }
    /// Whether it is read as numbers.
    pub const fn is_float(self) -> bool {
        !matches!(
            self,
            Self::Bool
                | Self::U8
                | Self::I8
                | Self::F8E4M3
                | Self::F8E5M2
                | Self::I16
                | Self::U16
                | Self::I32
                | Self::U32
                | Self::F64
                | Self::I64
                | Self::U64
        )
    }
    /// Whether elements are floats by themselves, with no block around them.
    pub const fn is_plain_float(self) -> bool {
        matches!(self, Self::F16 | Self::BF16 | Self::F32)
    }
    /// The type that a safetensors header spells so.
    pub(super) fn from_safetensors(name: &str) -> Option<Self> {
        let plain = &ALL[..15];
        plain.iter().find(|(n, ..)| *n == name).map(|(_, d, ..)| *d)
    }

    /// Decodes elements to f32. `raw` holds whole blocks, little-endian, of which the last may have more elements than
    /// `into`. `scale` is that of an I2_S tensor.
    ///
    /// # Errors
    /// The first element whose code stands for nothing, in types that have such.
    ///
    /// # Panics
    /// If it is not read as numbers, or `raw` and `into` differ in length.
    pub fn decode(self, raw: &[u8], scale: f32, into: &mut [f32]) -> Result<(), usize> {
        let (elements, bytes) = self.block();
        let (elements, bytes) = (elements as usize, bytes as usize);
        assert_eq!(raw.len(), into.len().div_ceil(elements) * bytes);
        if elements == 1 {
            decode_plain(self, raw, into);
            return Ok(());
        }
        let mut buffer = [0.0; BLOCK_MAX];
        for (i, (raw, into)) in raw.chunks_exact(bytes).zip(into.chunks_mut(elements)).enumerate() {
            let block = &mut buffer[..elements];
            let sound = decode_block(self, raw, scale, block);
            sound.map_err(|element| i * elements + element)?;
            into.copy_from_slice(&block[..into.len()]);
        }
        Ok(())
    }
}

fn pair(raw: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([raw[at], raw[at + 1]])
}

fn half(raw: &[u8], at: usize) -> f32 {
    f16::from_bits(pair(raw, at)).to_f32()
}

fn decode_plain(dtype: Dtype, raw: &[u8], into: &mut [f32]) {
    match dtype {
        // The upper half of an f32. Written so, it vectorizes, which the crate's own does not: that looks for NaN.
        Dtype::BF16 => {
            let (pairs, _) = raw.as_chunks::<2>();
            let float = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            Arch::new().dispatch(
                #[inline(always)]
                || pairs.iter().zip(into).for_each(|(b, v)| *v = float(b)),
            );
        }
        Dtype::F16 => raw.chunks_exact(2).zip(into).for_each(|(b, v)| *v = half(b, 0)),
        Dtype::F32 => {
            raw.chunks_exact(4).zip(into).for_each(|(b, v)| *v = f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        }
        _ => panic!("{} is not read as numbers", dtype.name()),
    }
}

/// One block of any type that has blocks.
fn decode_block(dtype: Dtype, raw: &[u8], scale: f32, y: &mut [f32]) -> Result<(), usize> {
    match dtype {
        Dtype::Q4_0 => nibbles(&raw[2..], y, |q, _| (f32::from(q) - 8.0) * half(raw, 0)),
        Dtype::Q4_1 => nibbles(&raw[4..], y, |q, _| f32::from(q) * half(raw, 0) + half(raw, 2)),
        Dtype::Q5_0 => nibbles(&raw[6..], y, |q, i| (f32::from(q | fifth(raw, 2, i)) - 16.0) * half(raw, 0)),
        Dtype::Q5_1 => nibbles(&raw[8..], y, |q, i| f32::from(q | fifth(raw, 4, i)) * half(raw, 0) + half(raw, 2)),
        Dtype::Q8_0 => {
            let d = half(raw, 0);
            y.iter_mut().zip(&raw[2..]).for_each(|(y, &q)| *y = f32::from(q as i8) * d);
        }
        Dtype::Q4_K => q4_k(raw, y),
        Dtype::Q5_K => q5_k(raw, y),
        Dtype::Q6_K => q6_k(raw, y),
        Dtype::TQ1_0 => tq1_0(raw, y),
        Dtype::TQ2_0 => {
            // Two halves of 128 elements; two bits of a byte hold elements 32 apart, the lowest first.
            let d = half(raw, 64);
            for (raw, y) in raw[..64].chunks_exact(32).zip(y.chunks_exact_mut(128)) {
                for (i, y) in y.chunks_exact_mut(32).enumerate() {
                    y.iter_mut().zip(raw).for_each(|(y, byte)| *y = ternary(byte >> (2 * i) & 3) * d);
                }
            }
        }
        Dtype::Q1_0 => {
            let d = half(raw, 0);
            for (i, y) in y.iter_mut().enumerate() {
                *y = if raw[2 + i / 8] >> (i % 8) & 1 == 1 { d } else { -d };
            }
        }
        Dtype::Q2_0 | Dtype::Q2_0_128 => {
            let d = half(raw, 0);
            for (i, y) in y.iter_mut().enumerate() {
                *y = ternary(raw[2 + i / 4] >> (2 * (i % 4)) & 3) * d;
            }
        }
        Dtype::I2_S | Dtype::I2_S_64 => {
            // Two bits of a byte hold elements a quarter of the group apart, the highest first.
            let quarter = y.len() / 4;
            for (i, y) in y.chunks_exact_mut(quarter).enumerate() {
                let code = |byte: &u8| byte >> (6 - 2 * i) & 3;
                y.iter_mut().zip(raw).for_each(|(y, byte)| *y = ternary(code(byte)) * scale);
                // Without a branch for each: hardly any is wrong.
                if raw[..quarter].iter().fold(false, |found, byte| found | (code(byte) == 3)) {
                    return Err(i * quarter + raw.iter().position(|byte| code(byte) == 3).expect("one is"));
                }
            }
        }
        _ => panic!("{} has no blocks", dtype.name()),
    }
    Ok(())
}

/// -1, 0, 1 and, where it is legal, 2.
fn ternary(code: u8) -> f32 {
    f32::from(code) - 1.0
}

/// 16 bytes of two elements each, 16 apart. `value` has the nibble and the element's number.
fn nibbles(raw: &[u8], y: &mut [f32], value: impl Fn(u8, usize) -> f32) {
    for (j, byte) in raw[..16].iter().enumerate() {
        y[j] = value(byte & 15, j);
        y[j + 16] = value(byte >> 4, j + 16);
    }
}

/// Bit 4 of element `i`, from 32 bits at `at`.
fn fifth(raw: &[u8], at: usize, i: usize) -> u8 {
    (raw[at + i / 8] >> (i % 8) & 1) << 4
}

/// Scale and minimum of run `j` of eight, six bits each, from twelve bytes.
fn scale_min(raw: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (raw[j] & 63, raw[j + 4] & 63)
    } else {
        (raw[j + 4] & 15 | raw[j - 4] >> 6 << 4, raw[j + 4] >> 4 | raw[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// `d, dmin, 12 bytes of scales and minima, nibbles`: eight runs of 32; two runs share 32 bytes.
fn q4_k(raw: &[u8], y: &mut [f32]) {
    let (d, dmin) = (half(raw, 0), half(raw, 2));
    for (j, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(&raw[4..16], j);
        for (y, byte) in y.iter_mut().zip(&raw[16 + j / 2 * 32..]) {
            let q = byte >> (4 * (j % 2)) & 15;
            *y = d * scale * f32::from(q) - dmin * min;
        }
    }
}

/// As [`q4_k`], with a fifth bit for each element: bit `j` of 32 bytes.
fn q5_k(raw: &[u8], y: &mut [f32]) {
    let (d, dmin) = (half(raw, 0), half(raw, 2));
    for (j, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(&raw[4..16], j);
        let bytes = raw[48 + j / 2 * 32..].iter().zip(&raw[16..48]);
        for (y, (byte, high)) in y.iter_mut().zip(bytes) {
            let q = byte >> (4 * (j % 2)) & 15 | (high >> j & 1) << 4;
            *y = d * scale * f32::from(q) - dmin * min;
        }
    }
}

/// `128 bytes of nibbles, 64 of two more bits, 16 signed scales, d`: two halves of four runs of 32.
fn q6_k(raw: &[u8], y: &mut [f32]) {
    let d = half(raw, 208);
    for (n, y) in y.chunks_exact_mut(128).enumerate() {
        let (low, high, scales) = (&raw[64 * n..][..64], &raw[128 + 32 * n..][..32], &raw[192 + 8 * n..][..8]);
        for (i, y) in y.iter_mut().enumerate() {
            let (run, l) = (i / 32, i % 32);
            let nibble = low[l + 32 * (run % 2)] >> (4 * (run / 2)) & 15;
            let q = i32::from(nibble | (high[l] >> (2 * run) & 3) << 4) - 32;
            *y = d * f32::from(scales[2 * run + l / 16] as i8) * q as f32;
        }
    }
}

/// Five (at the end four) ternary digits a byte, as a fraction of 3⁵: digit `j` is what multiplying by `3^(j+1)` pushes out.
fn tq1_0(raw: &[u8], y: &mut [f32]) {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let d = half(raw, 52);
    let mut at = 0;
    for (bytes, digits) in [(&raw[..32], 5), (&raw[32..48], 5), (&raw[48..52], 4)] {
        for power in &POWERS[..digits] {
            for &byte in bytes {
                let code = (u16::from(byte.wrapping_mul(*power)) * 3) >> 8;
                y[at] = ternary(code as u8) * d;
                at += 1;
            }
        }
    }
}
