//! The angles of rotary position embedding, as `transformers` computes them.
//!
//! It does so in f32, and over thousands of positions the rounding of an angle shows. So the same operations are done in the
//! same order and precision here; only the power is taken in f64 and rounded, since no two libraries agree on `powf`.

/// How angles are scaled for contexts longer than those of training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// All divided by a factor.
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Llama 3: long waves divided by a factor, short ones kept, those between blended.
    Llama3 {
        /// The factor.
        factor: f32,
        /// Waves longer than the original context over this are divided.
        low_freq_factor: f32,
        /// Waves shorter than the original context over this are kept.
        high_freq_factor: f32,
        /// The context of training.
        original_context: f32,
    },
}

/// `head_dim / 2` angles in radians a position.
pub fn frequencies(theta: f64, head_dim: u32, scaling: Scaling) -> Vec<f32> {
    let exponents = (0..head_dim).step_by(2).map(|i| i as f32 / head_dim as f32);
    let plain = exponents.map(|e| 1.0 / libm::pow(theta, f64::from(e)) as f32);
    plain.map(|f| scale(f, scaling)).collect()
}

fn scale(frequency: f32, scaling: Scaling) -> f32 {
    match scaling {
        Scaling::None => frequency,
        Scaling::Linear { factor } => frequency / factor,
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let wavelength = 2.0 * core::f32::consts::PI / frequency;
            if wavelength > original_context / low_freq_factor {
                frequency / factor
            } else if wavelength < original_context / high_freq_factor {
                frequency
            } else {
                let smooth = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}
