//! Small random models of what only this project has and of recurrences (`tools/train/golden.py`), and fingerprints of their logits.
use crate::images::Packed;
use crate::{golden, ids, json};
use bitnet_kernel::Format;
use bitnet_pack::Options;
use bitnet_runtime::memory::KvFormat;

/// The model of one set of golden values.
#[derive(Debug)]
pub struct Golden {
    /// The set's name.
    pub set: String,
    /// Fingerprints of the logits after every token of [`prompt`], by how keys and values are kept.
    pub fingerprints: [(KvFormat, u64); 3],
}

/// All of them, as `fingerprints.json` has them: attention to a window, memories beside it, activations of four bits and rotated ones,
/// ternary and binary attention, and a recurrence in attention's place. The fingerprints are committed: they are the promise, on every CPU.
///
/// # Panics
/// If the file is not like that.
pub fn goldens() -> Vec<Golden> {
    let all = json(concat!(env!("CARGO_MANIFEST_DIR"), "/fingerprints.json"));
    let sets = all.as_object().expect("an object with a member for each set");
    let golden = |(set, of): (&String, &serde_json::Value)| {
        let fingerprints = [("f32", KvFormat::F32), ("f16", KvFormat::F16), ("i8", KvFormat::I8)].map(|(name, kv)| {
            let digits = of[name].as_str().and_then(|text| text.strip_prefix("0x"));
            let number = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
            (kv, number.unwrap_or_else(|| panic!("{set} has no fingerprint `{name}`")))
        });
        Golden { set: set.clone(), fingerprints }
    };
    sets.iter().map(golden).collect()
}

/// The model of a set, packed as the fingerprints have it: with a head of half-precision floats.
pub fn pack(set: &str) -> Packed {
    Packed::pack(&golden(set), &Options { head: Format::F16, ..Options::default() })
}

/// The tokens of a set.
pub fn prompt(set: &str) -> Vec<u32> {
    ids(&json(golden(set).join("ids.json"))["input_ids"][0])
}
