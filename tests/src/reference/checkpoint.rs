//! Tensors of a checkpoint by name, from one safetensors file or from shards.
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// A tensor as it is stored.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

/// All tensors of a checkpoint.
#[derive(Debug)]
pub(super) struct Checkpoint(HashMap<String, Tensor>);

impl Checkpoint {
    /// Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    pub(super) fn read(dir: &Path) -> Self {
        let index = dir.join("model.safetensors.index.json");
        let files: BTreeSet<String> = if index.exists() {
            let index = crate::json(index);
            let map = index["weight_map"].as_object().expect("a weight_map");
            map.values().map(|file| file.as_str().expect("a file name").to_owned()).collect()
        } else {
            BTreeSet::from(["model.safetensors".to_owned()])
        };
        let mut tensors = HashMap::new();
        for file in files {
            let bytes = std::fs::read(dir.join(&file)).unwrap_or_else(|e| panic!("{file}: {e}"));
            let parsed = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{file}: {e}"));
            for (name, view) in parsed.tensors() {
                let tensor = Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() };
                assert!(tensors.insert(name.clone(), tensor).is_none(), "{name} is there twice");
            }
        }
        Self(tensors)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub(super) fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("the checkpoint has no {name}"))
    }

    /// The values of a tensor of floats of this shape.
    pub(super) fn floats(&self, name: &str, shape: &[usize]) -> Vec<f32> {
        let tensor = self.get(name);
        assert_eq!(tensor.shape, shape, "the shape of {name}");
        tensor.floats().unwrap_or_else(|| panic!("{name} is {:?}", tensor.dtype))
    }
}

impl Tensor {
    /// The values, if they are floats.
    pub(super) fn floats(&self) -> Option<Vec<f32>> {
        let halves = || self.bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        match self.dtype {
            Dtype::BF16 => Some(halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect()),
            Dtype::F16 => Some(halves().map(|b| f16::from_le_bytes(b).to_f32()).collect()),
            Dtype::F32 => {
                Some(self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
            }
            _ => None,
        }
    }
}
