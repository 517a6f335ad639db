//! What the AVX-512 backends share: loads and sums.
use bitnet_kernel::Block;
use core::arch::x86_64::*;

/// Bytes that a type is made of, for [`load`].
pub(crate) trait Bytes: Copy {}
impl Bytes for u8 {}
impl Bytes for i8 {}

/// The 64 bytes of `bytes` from `at` on.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn load<T: Bytes, const N: usize>(bytes: &[T; N], at: usize) -> __m512i {
    assert!(at + 64 <= N);
    // SAFETY: the assertion: the 64 bytes lie within `bytes`. It folds away wherever `at` is a constant.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().add(at).cast()) }
}

/// The 16 bytes of `bytes` from `at` on, four times.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn load_four_times<T: Bytes, const N: usize>(bytes: &[T; N], at: usize) -> __m512i {
    assert!(at + 16 <= N);
    // SAFETY: the assertion: the 16 bytes lie within `bytes`.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(bytes.as_ptr().add(at).cast()) })
}

/// The 16 bytes of `bytes` from `at` on, twice.
///
/// By its AVX name, which is a mere load. Given registers 16 to 31 the compiler takes `vbroadcasti32x4`, which on Zen 4
/// occupies a shuffle unit as well and halves the speed of look-ups.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) fn load_twice<const N: usize>(bytes: &[u8; N], at: usize) -> __m256i {
    assert!(at + 16 <= N);
    let v;
    // SAFETY: the assertion: the 16 bytes lie within `bytes`. The instruction is one of AVX2.
    unsafe {
        core::arch::asm!(
            "vbroadcasti128 {v}, [{p}]",
            v = out(ymm_reg) v,
            p = in(reg) bytes.as_ptr().add(at),
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    v
}

/// `x[i]` in all lanes, from memory.
///
/// Of words just stored LLVM would make shuffles of the register they came from, and those occupy units that a load leaves
/// to others.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn broadcast<const N: usize>(x: &[i32; N], i: usize) -> __m512i {
    assert!(i < N);
    let v;
    // SAFETY: the assertion: the word lies within `x`. The instruction is one of AVX-512 F.
    unsafe {
        core::arch::asm!(
            "vpbroadcastd {v}, dword ptr [{p}]",
            v = out(zmm_reg) v,
            p = in(reg) x.as_ptr().add(i),
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    v
}

/// The lanes.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn lanes(v: __m512i) -> [i32; 16] {
    let mut out = [0; 16];
    // SAFETY: `out` is 64 bytes.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), v) };
    out
}

/// The sums of four vectors' lanes, less `constant`.
#[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2")]
#[inline]
pub(crate) fn sums_less(v: [__m512i; 4], constant: i32) -> [i32; 4] {
    let half = |v| _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
    let q = _mm256_hadd_epi32(_mm256_hadd_epi32(half(v[0]), half(v[1])), _mm256_hadd_epi32(half(v[2]), half(v[3])));
    let q = _mm_add_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256::<1>(q));
    let q = _mm_sub_epi32(q, _mm_set1_epi32(constant));
    let mut out = [0; 4];
    // SAFETY: `out` is 16 bytes.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), q) };
    out
}

/// A mask that the optimiser cannot see through, at no cost.
///
/// LLVM inverts the masks of signs, for which there is no masked negation: one operation more for each.
#[target_feature(enable = "avx512bw")]
#[inline]
pub(crate) fn opaque(mut mask: u64) -> u64 {
    // SAFETY: no instruction at all, and only a register named.
    unsafe { core::arch::asm!("/* {0} */", inout(kreg) mask, options(pure, nomem, nostack, preserves_flags)) };
    mask
}

/// Asks for the cache line `bytes` after `block`, into the second level.
#[inline(always)]
pub(crate) fn prefetch(block: &Block, bytes: usize) {
    let p = block.0.as_ptr().wrapping_add(bytes).cast();
    // SAFETY: a prefetch reads nothing that the program sees and never faults; the address need not exist.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(p) }
}

/// Calls a function that is generic over the number of tokens with those of a slice, 1 to 4.
macro_rules! by_tokens {
    ($x:expr, $y:expr, $function:ident $(::<$($parameter:tt),*>)?($steps:expr)) => {
        match *$x {
            [a] => $y[..1].copy_from_slice(&$function::<1, $($($parameter),*)?>($steps, [a])),
            [a, b] => $y[..2].copy_from_slice(&$function::<2, $($($parameter),*)?>($steps, [a, b])),
            [a, b, c] => $y[..3].copy_from_slice(&$function::<3, $($($parameter),*)?>($steps, [a, b, c])),
            [a, b, c, d] => $y[..4].copy_from_slice(&$function::<4, $($($parameter),*)?>($steps, [a, b, c, d])),
            _ => unreachable!("1 to 4 tokens"),
        }
    };
}
pub(crate) use by_tokens;
