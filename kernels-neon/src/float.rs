//! Attention in NEON registers, for every backend of this architecture.
//!
//! NEON is part of the target, so the compiler vectorizes the bodies of [`bitnet_kernel::float`] by itself, but no conversion of half
//! precision: over such a cache attention took 4.2 instructions for a product and its sum, and takes 1.25. Over floats they are
//! 1.05 in place of 1.10, over int8 1.57 in place of 1.74 (128 columns and 512 positions, counted under QEMU).
use bitnet_kernel::float::{self, Cache, LANES, Vectors};
use core::arch::{aarch64::*, asm};

/// 16 lanes in four registers.
#[derive(Clone, Copy)]
struct Neon;

impl Vectors for Neon {
    type Wide = [float32x4_t; 4];
    type Folded = [float32x4_t; 2];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Wide {
        // SAFETY: every build for this architecture has NEON.
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::Wide {
        // SAFETY: as above; `x` is four times four floats.
        unsafe { [0, 4, 8, 12].map(|i| vld1q_f32(x.as_ptr().add(i))) }
    }
    /// By the conversion, which for finite numbers is exact, as the definition's is.
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::Wide {
        // SAFETY: as above; `x` is two times eight halves. The instructions name registers alone.
        unsafe {
            let [(a, b), (c, d)] = [0, 8].map(|i| {
                let halves = vld1q_u16(x.as_ptr().add(i));
                let (low, high): (float32x4_t, float32x4_t);
                // Stable Rust has no intrinsic of it.
                asm!("fcvtl {low:v}.4s, {halves:v}.4h", "fcvtl2 {high:v}.4s, {halves:v}.8h", halves = in(vreg) halves,
                    low = out(vreg) low, high = out(vreg) high, options(pure, nomem, nostack, preserves_flags));
                (low, high)
            });
            [a, b, c, d]
        }
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::Wide {
        // SAFETY: as above; `x` is 16 bytes.
        unsafe {
            let x = vld1q_s8(x.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
            [vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)]
                .map(|x| vcvtq_f32_s32(x))
        }
    }
    #[inline(always)]
    fn store(self, v: Self::Wide, to: &mut [f32; LANES]) {
        for (v, to) in v.into_iter().zip(to.as_chunks_mut::<4>().0) {
            // SAFETY: as above; `to` is four floats.
            unsafe { vst1q_f32(to.as_mut_ptr(), v) }
        }
    }
    #[inline(always)]
    fn add(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        // SAFETY: as above.
        unsafe { [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1]), vaddq_f32(a[2], b[2]), vaddq_f32(a[3], b[3])] }
    }
    #[inline(always)]
    fn mul(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        // SAFETY: as above.
        unsafe { [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1]), vmulq_f32(a[2], b[2]), vmulq_f32(a[3], b[3])] }
    }
    #[inline(always)]
    fn fold(self, v: Self::Wide) -> Self::Folded {
        // SAFETY: as above.
        unsafe { [vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3])] }
    }
    #[inline(always)]
    fn trees(self, v: [Self::Folded; 8]) -> [f32; 8] {
        // SAFETY: as above; `out` is two times four floats.
        unsafe {
            // Of two sums: lanes 0 + 2 and 1 + 3 of the first, then of the second.
            let halves = |a: Self::Folded, b: Self::Folded| {
                let a = vreinterpretq_f64_f32(vaddq_f32(a[0], a[1]));
                let b = vreinterpretq_f64_f32(vaddq_f32(b[0], b[1]));
                vaddq_f32(vreinterpretq_f32_f64(vtrn1q_f64(a, b)), vreinterpretq_f32_f64(vtrn2q_f64(a, b)))
            };
            let [ab, cd] = [halves(v[0], v[1]), halves(v[2], v[3])];
            let [ef, gh] = [halves(v[4], v[5]), halves(v[6], v[7])];
            let mut out = [0.0; 8];
            vst1q_f32(out.as_mut_ptr(), vpaddq_f32(ab, cd));
            vst1q_f32(out.as_mut_ptr().add(4), vpaddq_f32(ef, gh));
            out
        }
    }
}

/// See [`bitnet_kernel::Kernels::attend`].
pub fn attend(q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
    float::attend(Neon, q, keys, values, scale, out);
}
