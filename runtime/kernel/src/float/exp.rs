//! The exponential function, from additions and multiplications alone.

/// `eˣ`, the same bits on every machine, within 1.1 units in the last place; subnormal results within one of theirs.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2` up to rounding: `n` is rounded by adding 1.5 · 2^23, `ln 2` is subtracted in two
/// parts, the first of nine bits so that its product with `n` is exact (Cody and Waite, *Software Manual for the Elementary
/// Functions*, 1980). `eʳ = 1 + r + r² q(r)`, with `q` of degree 4 fitted for the least relative error over that range: 3.1e-9
/// before rounding. A degree less gives 2.2 units, one more none that can be seen. `2ⁿ` is multiplied in as two powers, so that
/// results overflow to infinity and become subnormal as they should; NaN stays NaN. There is no branch: loops over it
/// vectorize. `libm::expf` takes 5 to 10 ns a number, this about one.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    const LN_2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];
    const Q: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_745, 0.001_381_454];
    // Results are zero below -104 and infinite above 88.8, and there they stay.
    let x = if x < -105.0 { -105.0 } else { x };
    let x = if x > 90.0 { 90.0 } else { x };
    let shifted = x * core::f32::consts::LOG2_E + ROUND;
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let rounded = shifted - ROUND;
    let r = (x - rounded * LN_2[0]) - rounded * LN_2[1];
    let q = (((Q[4] * r + Q[3]) * r + Q[2]) * r + Q[1]) * r + Q[0];
    let y = q * (r * r) + r + 1.0;
    let half = n >> 1;
    y * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `2ⁿ` for -126 to 127.
#[inline(always)]
const fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}
