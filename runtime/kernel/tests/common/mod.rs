//! Numbers that look random, the same in every run.

/// A linear congruential generator modulo 2^31; its low 16 bits repeat soon and are left out.
#[derive(Clone, Debug)]
pub(crate) struct Lcg(pub(crate) u32);

impl Lcg {
    /// The next number below 2^15.
    pub(crate) fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_103_515_245).wrapping_add(12_345) & 0x7fff_ffff;
        self.0 >> 16
    }
}
