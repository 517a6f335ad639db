//! What the tests of the whole project share: an oracle that is independent of everything it judges, the golden values,
//! and small checkpoints written on the spot.

pub mod alloc;
pub mod fuzz;
pub mod goldens;
pub mod images;
pub mod npy;
pub mod reference;
pub mod tiny;

use std::path::{Path, PathBuf};

/// The folder of golden values called `set`.
pub fn golden(set: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(set)
}

/// The bundled checkpoint called `name`.
pub fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name)
}

/// Reads a JSON file.
///
/// # Panics
/// If it cannot be read or is not JSON.
pub fn json(path: impl AsRef<Path>) -> serde_json::Value {
    let path = path.as_ref();
    let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A JSON array of token ids.
///
/// # Panics
/// If it is none.
pub fn ids(value: &serde_json::Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("not token ids: {e}"))
}

/// The largest difference between two rows of the same length.
///
/// # Panics
/// If the lengths differ.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "rows of different lengths");
    // Not f32::max, which drops a NaN.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |max, d| if d <= max { max } else { d })
}

/// The index of the largest value, the first of equals.
///
/// # Panics
/// If there is none.
pub fn argmax(row: &[f32]) -> usize {
    let first_largest = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (0..row.len()).reduce(first_largest).expect("a row without values")
}
