//! The bodies of [`bitnet_kernel::float`] with AVX2 and F16C, for every backend of this crate, and attention with AVX-512.
use bitnet_kernel::Matrix;
use bitnet_kernel::float::{self, Cache, LANES, Vectors};
use core::arch::x86_64::*;

/// 16 lanes in two registers. Invariant: a value exists only where the CPU has AVX2 and F16C.
#[derive(Clone, Copy)]
struct Avx2(());

impl Vectors for Avx2 {
    type Wide = [__m256; 2];
    type Folded = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Wide {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::Wide {
        let p = x.as_ptr();
        // SAFETY: `self` exists, so the CPU has AVX2; `x` is 16 floats.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    /// By the conversion, which for finite numbers is exact, as the definition's is.
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::Wide {
        let p = x.as_ptr().cast::<__m128i>();
        // SAFETY: `self` exists, so the CPU has F16C; `x` is 32 bytes.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p.add(1)))] }
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::Wide {
        let p = x.as_ptr();
        // SAFETY: `self` exists, so the CPU has AVX2; `x` is 16 bytes, and each half is loaded as 8.
        unsafe {
            let [low, high] = [_mm_loadl_epi64(p.cast()), _mm_loadl_epi64(p.add(8).cast())];
            [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))]
        }
    }
    #[inline(always)]
    fn store(self, v: Self::Wide, to: &mut [f32; LANES]) {
        let p = to.as_mut_ptr();
        // SAFETY: `self` exists, so the CPU has AVX2; `to` is 16 floats.
        unsafe {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn fold(self, v: Self::Wide) -> Self::Folded {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_add_ps(v[0], v[1]) }
    }
    /// 7 additions and 14 shuffles for eight trees.
    #[inline(always)]
    fn trees(self, v: [Self::Folded; 8]) -> [f32; 8] {
        // SAFETY: `self` exists, so the CPU has AVX2; `out` is 8 floats.
        unsafe {
            // Lanes 0 to 3 and 4 to 7 of two sums: the first in the low half of a register, the second in the high one.
            let halves = |a, b| {
                let low = _mm256_permute2f128_ps::<0x20>(a, b);
                _mm256_add_ps(low, _mm256_permute2f128_ps::<0x31>(a, b))
            };
            // Of two registers with four lanes a sum: two lanes of four sums.
            let quarters = |a, b| {
                let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
                let low = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
                _mm256_add_ps(low, _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)))
            };
            let [ae, bf] = [halves(v[0], v[4]), halves(v[1], v[5])];
            let [cg, dh] = [halves(v[2], v[6]), halves(v[3], v[7])];
            let (abef, cdgh) = (quarters(ae, bf), quarters(cg, dh));
            let even = _mm256_shuffle_ps::<0x88>(abef, cdgh);
            let mut out = [0.0; 8];
            _mm256_storeu_ps(out.as_mut_ptr(), _mm256_add_ps(even, _mm256_shuffle_ps::<0xdd>(abef, cdgh)));
            out
        }
    }
}

/// 16 lanes in one register. Invariant: a value exists only where the CPU has AVX-512 F and DQ, and what [`Avx2`] needs.
#[cfg(feature = "avx512")]
#[derive(Clone, Copy)]
struct Avx512(Avx2);

#[cfg(feature = "avx512")]
impl Vectors for Avx512 {
    type Wide = __m512;
    type Folded = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Wide {
        // SAFETY: `self` exists, so the CPU has AVX-512.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::Wide {
        // SAFETY: as above; `x` is 16 floats.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    /// As [`Avx2`] does.
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::Wide {
        // SAFETY: as above; `x` is 32 bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::Wide {
        // SAFETY: as above; `x` is 16 bytes.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn store(self, v: Self::Wide, to: &mut [f32; LANES]) {
        // SAFETY: as above; `to` is 16 floats.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn add(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        // SAFETY: as above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::Wide, b: Self::Wide) -> Self::Wide {
        // SAFETY: as above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn fold(self, v: Self::Wide) -> Self::Folded {
        // SAFETY: as above.
        unsafe { _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)) }
    }
    #[inline(always)]
    fn trees(self, v: [Self::Folded; 8]) -> [f32; 8] {
        self.0.trees(v)
    }
}

/// See [`bitnet_kernel::Kernels::matvec_f16`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn matvec_f16(w: Matrix<'_>, x: &[f32], y: &mut [f32]) {
    float::matvec_f16(w, x, y);
}

/// See [`bitnet_kernel::Kernels::quantize`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn quantize(x: &[f32], q: &mut [i8]) -> Option<f32> {
    float::quantize(x, q)
}

/// See [`bitnet_kernel::Kernels::rmsnorm`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn rmsnorm(x: &mut [f32], weight: &[f32], eps: f32) {
    float::rmsnorm(x, weight, eps);
}

/// See [`bitnet_kernel::Kernels::silu`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn silu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    float::silu(gate, up, out);
}

/// See [`bitnet_kernel::Kernels::squared_relu`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn squared_relu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    float::squared_relu(gate, up, out);
}

/// See [`bitnet_kernel::Kernels::convolve`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn convolve(past: &mut [f32], taps: &[f32], x: &mut [f32]) {
    float::convolve(past, taps, x);
}

/// See [`bitnet_kernel::Kernels::convolve_silu`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn convolve_silu(past: &mut [f32], taps: &[f32], x: &mut [f32]) {
    float::convolve_silu(past, taps, x);
}

/// See [`bitnet_kernel::Kernels::delta_rule`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn delta_rule(state: &mut [f32], key: &[f32], alpha: f32, beta: f32, value: f32) {
    float::delta_rule(state, key, alpha, beta, value);
}

/// See [`bitnet_kernel::Kernels::recall`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn recall(state: &[f32], query: &[f32]) -> f32 {
    float::dot(state, query)
}

/// See [`bitnet_kernel::Kernels::recur`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn recur(state: &mut [f32], bound: &[f32], forget: &[f32], input: &[f32]) {
    float::recur(state, bound, forget, input);
}

/// See [`bitnet_kernel::Kernels::attend`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn attend(q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
    float::attend(Avx2(()), q, keys, values, scale, out);
}

/// The same with AVX-512.
#[cfg(feature = "avx512")]
#[target_feature(enable = "avx2,f16c,avx512f,avx512dq")]
pub(crate) fn attend_avx512(q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
    float::attend(Avx512(Avx2(())), q, keys, values, scale, out);
}
