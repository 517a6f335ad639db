//! What this CPU and its operating system can do, asked of the CPU itself, so that a program without `std` can ask too.
use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

/// Instructions that backends are made of, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Features(u8);

impl Features {
    /// AVX2 and F16C, and YMM registers kept by the operating system.
    pub(crate) const AVX2: Self = Self(1);
    /// AVX-512 F, BW, DQ and VL, which all CPUs with BW have, and ZMM and mask registers kept by the operating system.
    pub(crate) const AVX512_BW: Self = Self(2);
    /// AVX-512 VNNI (dot products of bytes).
    pub(crate) const AVX512_VNNI: Self = Self(4);
    /// AVX-512 VBMI (tables of 64 bytes).
    pub(crate) const AVX512_VBMI: Self = Self(8);

    /// Both.
    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    /// Whether this CPU has all of these.
    pub(crate) fn present(self) -> bool {
        Self::of_cpu().0 & self.0 == self.0
    }

    /// Bits as in Intel's manual (volume 2A, CPUID): leaf 1, leaf 7, and XCR0 (volume 1, 13.3).
    #[cfg(not(miri))]
    fn of_cpu() -> Self {
        const NONE: Features = Features(0);
        // FMA, XSAVE enabled, AVX, F16C: the compiler takes FMA and F16C for granted where AVX-512 is.
        const LEAF_1: u32 = 1 << 12 | 1 << 27 | 1 << 28 | 1 << 29;
        // F, DQ, BW, VL.
        const BW: u32 = 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31;
        const YMM: u64 = 0x06;
        const ZMM: u64 = 0xe6;
        if __cpuid(0).eax < 7 || __cpuid(1).ecx & LEAF_1 != LEAF_1 {
            return NONE;
        }
        #[target_feature(enable = "xsave")]
        fn kept_registers() -> u64 {
            // SAFETY: register 0 exists wherever XGETBV does.
            unsafe { _xgetbv(0) }
        }
        // SAFETY: bit 27 of leaf 1 says that the operating system has enabled XGETBV.
        let kept = unsafe { kept_registers() };
        let leaf = __cpuid_count(7, 0);
        let mut found = NONE;
        let mut add = |feature: Features, present: bool| {
            if present {
                found = found.and(feature);
            }
        };
        add(Self::AVX2, leaf.ebx & 1 << 5 != 0 && kept & YMM == YMM);
        if leaf.ebx & BW == BW && kept & ZMM == ZMM {
            add(Self::AVX512_BW, true);
            add(Self::AVX512_VBMI, leaf.ecx & 1 << 1 != 0);
            add(Self::AVX512_VNNI, leaf.ecx & 1 << 11 != 0);
        }
        found
    }
    /// Miri has no CPU to ask: what the build may assume.
    #[cfg(miri)]
    fn of_cpu() -> Self {
        let bit = |feature: Self, present: bool| if present { feature.0 } else { 0 };
        Self(
            bit(Self::AVX2, cfg!(target_feature = "avx2"))
                | bit(Self::AVX512_BW, cfg!(all(target_feature = "avx512bw", target_feature = "avx512vl")))
                | bit(Self::AVX512_VNNI, cfg!(target_feature = "avx512vnni"))
                | bit(Self::AVX512_VBMI, cfg!(target_feature = "avx512vbmi")),
        )
    }
}
