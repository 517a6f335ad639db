//! Sixteen lanes in whatever registers a CPU has.
use super::{LANES, f16_to_f32};

/// Sixteen lanes of f32 at a time, as one backend's instructions compute them.
///
/// What is written over this trait is written once and is the same on every backend by construction: an implementation says
/// only which registers the lanes live in. Every operation is the IEEE one of each lane, without contraction. A value is the
/// proof that the CPU has the instructions, as a value of [`Kernels`](crate::Kernels) is. Methods are `#[inline(always)]`, so
/// that they become instructions inside a function with the backend's target features.
pub trait Vectors: Copy {
    /// 16 lanes.
    type Wide: Copy;
    /// 8 lanes: the sums of lanes `i` and `i + 8`.
    type Folded: Copy;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::Wide;
    /// 16 floats.
    fn load(self, x: &[f32; LANES]) -> Self::Wide;
    /// 16 half-precision floats, all of them finite.
    fn load_f16(self, x: &[u16; LANES]) -> Self::Wide;
    /// 16 bytes.
    fn load_i8(self, x: &[i8; LANES]) -> Self::Wide;
    /// The lanes in order.
    fn store(self, v: Self::Wide, to: &mut [f32; LANES]);
    /// `a + b`
    fn add(self, a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// `a · b`
    fn mul(self, a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// The first step of the tree.
    fn fold(self, v: Self::Wide) -> Self::Folded;
    /// The other steps, of eight sums at once: one by one they would be as much work as the products of a narrow head.
    fn trees(self, v: [Self::Folded; 8]) -> [f32; 8];
}

/// Lanes in arrays, for the compiler to place.
#[derive(Clone, Copy, Debug)]
pub struct Arrays;

impl Vectors for Arrays {
    type Wide = [f32; LANES];
    type Folded = [f32; LANES / 2];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Wide {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::Wide {
        *x
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::Wide {
        x.map(f16_to_f32)
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::Wide {
        x.map(f32::from)
    }
    #[inline(always)]
    fn store(self, v: Self::Wide, to: &mut [f32; LANES]) {
        *to = v;
    }
    #[inline(always)]
    fn add(self, mut a: Self::Wide, b: Self::Wide) -> Self::Wide {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    }
    #[inline(always)]
    fn mul(self, mut a: Self::Wide, b: Self::Wide) -> Self::Wide {
        a.iter_mut().zip(b).for_each(|(a, b)| *a *= b);
        a
    }
    #[inline(always)]
    fn fold(self, v: Self::Wide) -> Self::Folded {
        core::array::from_fn(|i| v[i] + v[i + 8])
    }
    #[inline(always)]
    fn trees(self, v: [Self::Folded; 8]) -> [f32; 8] {
        v.map(|v| {
            let v: [f32; 4] = core::array::from_fn(|i| v[i] + v[i + 4]);
            (v[0] + v[2]) + (v[1] + v[3])
        })
    }
}
