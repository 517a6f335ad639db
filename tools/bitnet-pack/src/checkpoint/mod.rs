//! A checkpoint on disk: a directory with `config.json`, tensors in one safetensors file or in shards, and text files.
pub mod rope;
pub mod safetensors;
pub mod sections;
pub mod table;

pub use safetensors::{Dtype, TensorInfo};
pub use table::{Storage, Table};

use crate::Error;
use crate::files::{Input, read_capped, read_json};
use bitnet_runtime::error::Foreign;
use core::fmt;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Longest `config.json`, and other small JSON files.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Longest JSON file about text: some `tokenizer_config.json` list every special token. Read as a whole, it takes many times
/// its length.
pub const TEXT_BYTES_MAX: u64 = 1 << 21;
/// Longest shard index.
pub const INDEX_BYTES_MAX: u64 = 1 << 24;
/// Most shards.
pub const SHARDS_MAX: usize = 1024;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An opened checkpoint: its headers are read and checked, its tensors are not.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    config: Value,
    files: Vec<Input>,
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

impl Checkpoint {
    /// Opens a directory, or a `.safetensors` file in one.
    ///
    /// # Errors
    /// If it is something else, or if a header is malformed.
    pub fn open(source: &Path) -> Result<Self, Error> {
        let metadata = source.metadata().map_err(|e| Error::io(source, "open", e))?;
        let (directory, file) = if metadata.is_dir() {
            (source.to_path_buf(), None)
        } else {
            // Recognised before anything beside it is looked for: a GGUF file has no config.json.
            let input = Input::open(source)?;
            match input.foreign()? {
                None | Some(Foreign::Safetensors) => {}
                Some(foreign) => return Err(Error::foreign(source, foreign)),
            }
            let parent = source.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            (parent.to_path_buf(), Some(input))
        };
        let config_path = directory.join("config.json");
        if !config_path.exists() {
            return Err(Error::not_readable(&directory, without_config(&directory)));
        }
        let config = read_json(&config_path, CONFIG_BYTES_MAX)?;
        let mut checkpoint = Self { directory, config, files: Vec::new(), tensors: BTreeMap::new() };
        let single = checkpoint.directory.join(SINGLE);
        let index = checkpoint.directory.join(INDEX);
        match file {
            Some(input) => checkpoint.add(input)?,
            None if single.exists() => checkpoint.add(Input::open(&single)?)?,
            None if index.exists() => checkpoint.add_shards(&index)?,
            None => return Err(Error::not_readable(&checkpoint.directory, without_tensors(&checkpoint.directory))),
        }
        Ok(checkpoint)
    }

    fn add(&mut self, input: Input) -> Result<(), Error> {
        let file = self.files.len();
        for tensor in safetensors::read_header(&input)? {
            if let Some((other, _)) = self.tensors.get(&tensor.name) {
                let other = self.files[*other].path.display();
                return Err(Error::tensor(&input.path, &tensor.name, format!("occurs in {other} too")));
            }
            self.tensors.insert(tensor.name.clone(), (file, tensor));
        }
        self.files.push(input);
        Ok(())
    }

    fn add_shards(&mut self, path: &Path) -> Result<(), Error> {
        let map = read_index(path)?;
        let mut shards: Vec<&str> = map.iter().map(|(_, shard)| shard.as_str()).collect();
        shards.sort_unstable();
        shards.dedup();
        if shards.len() > SHARDS_MAX {
            return Err(Error::safetensors(
                path,
                format!("{} shards, at most {SHARDS_MAX} are accepted", shards.len()),
            ));
        }
        for shard in &shards {
            // A name with a path in it could read any file.
            if Path::new(shard).file_name().is_none_or(|name| name != *shard) {
                return Err(Error::safetensors(path, format!("shard {shard:?} is not the name of a file beside it")));
            }
            let shard_path = self.directory.join(shard);
            if !shard_path.exists() {
                let tensor = map.iter().find(|(_, s)| s == shard).map_or("", |(t, _)| t);
                let what = format!("the shard {shard} is missing; the index names it for {tensor} and others");
                return Err(Error::safetensors(path, what));
            }
            self.add(Input::open(&shard_path)?)?;
        }
        for (tensor, shard) in &map {
            let found = self.tensors.get(tensor.as_str()).map(|(file, _)| &self.files[*file].path);
            if found.and_then(|p| p.file_name()).is_none_or(|name| name != shard.as_str()) {
                return Err(Error::tensor(
                    path,
                    tensor,
                    format!("the index places it in {shard}, which has no such tensor"),
                ));
            }
        }
        if let Some(name) = self.tensors.keys().find(|&name| map.binary_search_by(|(t, _)| t.cmp(name)).is_err()) {
            let file = &self.files[self.tensors[name].0].path;
            return Err(Error::tensor(file, name, "the shard index does not list it"));
        }
        Ok(())
    }

    /// The directory that holds everything.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
    /// `config.json`.
    pub const fn config(&self) -> &Value {
        &self.config
    }
    /// Where `config.json` lies.
    pub fn config_path(&self) -> PathBuf {
        self.directory.join("config.json")
    }
    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().map(|(_, t)| t)
    }
    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(_, t)| t)
    }
    /// The file that holds a tensor.
    pub fn path_of(&self, tensor: &TensorInfo) -> &Path {
        &self.files[self.tensors[&tensor.name].0].path
    }
    /// Reads bytes of a tensor from `offset` on.
    ///
    /// # Errors
    /// If the system refuses.
    ///
    /// # Panics
    /// If they are not all the tensor's.
    pub fn read(&self, tensor: &TensorInfo, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        assert!(offset + into.len() as u64 <= tensor.bytes, "{}", tensor.name);
        self.files[self.tensors[&tensor.name].0].read_at(tensor.offset + offset, into)
    }
    /// Another JSON file of the directory, if it is there.
    ///
    /// # Errors
    /// If it is there and cannot be read.
    pub fn json(&self, name: &str) -> Result<Option<Value>, Error> {
        let path = self.directory.join(name);
        if path.exists() { read_json(&path, TEXT_BYTES_MAX).map(Some) } else { Ok(None) }
    }
}

/// Why a directory without `config.json` is no checkpoint.
fn without_config(directory: &Path) -> String {
    if find_extension(directory, "gguf").is_some() {
        return "holds a GGUF file, which is not read yet; use the model's safetensors files".into();
    }
    "no config.json; a checkpoint is a directory with config.json and model.safetensors".into()
}

/// Why a directory with `config.json` and no tensors is no checkpoint.
fn without_tensors(directory: &Path) -> String {
    for (extension, what) in [("gguf", "GGUF"), ("bin", "PyTorch"), ("pt", "PyTorch"), ("pth", "PyTorch")] {
        if let Some(name) = find_extension(directory, extension) {
            return format!(
                "no {SINGLE} and no {INDEX}; {name} is {what}, which is not read: convert it to safetensors"
            );
        }
    }
    format!("no {SINGLE} and no {INDEX}")
}

fn find_extension(directory: &Path, extension: &str) -> Option<String> {
    let mut names: Vec<String> =
        directory.read_dir().ok()?.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names.into_iter().find(|name| Path::new(name).extension().is_some_and(|e| e == extension))
}

/// Tensor and shard, sorted by tensor.
type WeightMap = Vec<(String, String)>;

fn read_index(path: &Path) -> Result<WeightMap, Error> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Pairs,
    }
    struct Pairs(WeightMap);
    impl<'de> Deserialize<'de> for Pairs {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct PairsVisitor;
            impl<'de> Visitor<'de> for PairsVisitor {
                type Value = Pairs;
                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("an object of file names")
                }
                fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                    let mut pairs = Vec::new();
                    while let Some(pair) = map.next_entry()? {
                        if pairs.len() == safetensors::TENSORS_MAX {
                            let most = safetensors::TENSORS_MAX;
                            return Err(de::Error::custom(format_args!("more than {most} tensors")));
                        }
                        pairs.push(pair);
                    }
                    Ok(Pairs(pairs))
                }
            }
            deserializer.deserialize_map(PairsVisitor)
        }
    }
    let bytes = read_capped(path, INDEX_BYTES_MAX)?;
    let index: Result<Index, _> = serde_json::from_slice(&bytes);
    let Pairs(mut pairs) = index
        .map_err(|e| match Foreign::recognise(&bytes) {
            Some(foreign) => Error::foreign(path, foreign),
            None => Error::safetensors(path, format!("not a shard index: {e}")),
        })?
        .weight_map;
    pairs.sort();
    if let Some(pair) = pairs.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(Error::tensor(path, &pair[0].0, "the name occurs twice in the index"));
    }
    if pairs.is_empty() {
        return Err(Error::safetensors(path, "the index lists no tensors"));
    }
    Ok(pairs)
}
