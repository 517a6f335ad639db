//! A checkpoint on disk: a directory with `config.json`, tensors in one safetensors file or in shards, and text files; or a
//! GGUF file, which holds all of it, or the parts of one; or a file of llama2.c.
pub mod dtype;
pub mod gguf;
pub(crate) mod groups;
pub(crate) mod llama2c;
mod pieces;
pub mod rope;
pub mod safetensors;
pub mod sections;
pub mod table;

pub use dtype::Dtype;
pub use safetensors::TensorInfo;
pub use table::{Storage, Table};

use crate::Error;
use crate::files::{Input, read_capped, read_json};
use crate::prune::Mask;
use crate::reorder::Order;
use bitnet_runtime::error::Foreign;
use core::fmt;
use pulp::Arch;
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

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What the refusal of a class or an architecture says beside its name: why Gemma, of which there are BitNet embedding models, is
/// not read.
fn why_not(name: &str) -> &'static str {
    let gemma = name.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("gemma"));
    let why = " (of Gemma: its embedding is scaled, it has a GELU, norms after attention and feed-forward, and layers with a window \
               and other angles)";
    if gemma { why } else { "" }
}

/// What says what the model is.
#[derive(Debug)]
enum Origin {
    /// `config.json`.
    HuggingFace(Value),
    Gguf(gguf::Metadata),
    Llama2c(llama2c::Header),
}

/// How tensors are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// As in transformers.
    HuggingFace,
    /// As in GGUF files.
    Gguf,
    /// As here in llama2.c's files, which have no names.
    Llama2c,
}

/// An opened checkpoint: its headers are read and checked, its tensors are not.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    origin: Origin,
    files: Vec<Input>,
    tensors: BTreeMap<String, (usize, TensorInfo)>,
    notes: Vec<String>,
    /// What stays of tensors that are pruned, by their names.
    masks: BTreeMap<String, Mask>,
    /// The order in which tensors are read whose rows or columns are in another, by their names.
    orders: BTreeMap<String, Order>,
}

impl Checkpoint {
    /// Opens a directory or a file. I2_S tensors have groups as `i2s` says.
    ///
    /// # Errors
    /// If it is something else, or if a header is malformed.
    pub fn open(source: &Path, i2s: Dtype) -> Result<Self, Error> {
        let metadata = source.metadata().map_err(|e| Error::io(source, "open", e))?;
        if metadata.is_dir() {
            let config_path = source.join(CONFIG);
            if config_path.exists() {
                return Self::open_directory(source, None);
            }
            return match gguf_in(source)? {
                Some(path) => Self::open_gguf(&path, i2s),
                None => Err(Error::not_readable(source, format!("no {CONFIG}; {WHAT_IS_READ}"))),
            };
        }
        // Recognised before anything beside it is looked for.
        let input = Input::open(source)?;
        match input.foreign()? {
            None | Some(Foreign::Safetensors) => {}
            Some(Foreign::Gguf) => return Self::open_gguf(source, i2s),
            Some(foreign) => return Err(Error::foreign(source, foreign)),
        }
        let parent = source.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if let Some((header, tensors)) = llama2c::recognise(&input)? {
            let mut checkpoint = Self::new(parent, Origin::Llama2c(header));
            checkpoint.add(input, tensors)?;
            return Ok(checkpoint);
        }
        Self::open_directory(parent, Some(input))
    }

    fn new(directory: &Path, origin: Origin) -> Self {
        let (tensors, masks, orders) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { directory: directory.into(), origin, files: Vec::new(), tensors, notes: Vec::new(), masks, orders }
    }

    /// A directory of transformers, all of its tensors or those of one file.
    fn open_directory(directory: &Path, file: Option<Input>) -> Result<Self, Error> {
        let config_path = directory.join(CONFIG);
        if !config_path.exists() {
            return Err(Error::not_readable(directory, format!("no {CONFIG}; {WHAT_IS_READ}")));
        }
        let config = read_json(&config_path, CONFIG_BYTES_MAX)?;
        let mut checkpoint = Self::new(directory, Origin::HuggingFace(config));
        let single = directory.join(SINGLE);
        let index = directory.join(INDEX);
        match file {
            Some(input) => checkpoint.add_safetensors(input)?,
            None if single.exists() => checkpoint.add_safetensors(Input::open(&single)?)?,
            None if index.exists() => checkpoint.add_shards(&index)?,
            None => return Err(Error::not_readable(directory, without_tensors(directory))),
        }
        Ok(checkpoint)
    }

    /// A GGUF file, with the others if it is one of several.
    fn open_gguf(path: &Path, i2s: Dtype) -> Result<Self, Error> {
        let part = gguf::read(Input::open(path)?, i2s)?;
        let count = part.metadata.u32(gguf::SPLIT_COUNT)?.unwrap_or(1).max(1);
        let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if count == 1 {
            let input = Input::open(path)?;
            let mut checkpoint = Self::new(directory, Origin::Gguf(part.metadata));
            checkpoint.add(input, part.tensors)?;
            checkpoint.notes = part.notes;
            return Ok(checkpoint);
        }
        if count as usize > SHARDS_MAX {
            return part.metadata.refuse(gguf::SPLIT_COUNT, format!("at most {SHARDS_MAX} files are accepted"));
        }
        let Some(paths) = gguf::parts(path, count) else {
            let what = format!("one of {count} files, which are found by a name like model-00001-of-{count:05}.gguf");
            return Err(Error::gguf(path, what));
        };
        let mut checkpoint: Option<Self> = None;
        for (path, number) in paths.iter().zip(0..) {
            if !path.exists() {
                return Err(Error::gguf(path, format!("missing; the model is split into {count} files")));
            }
            let part = gguf::read(Input::open(path)?, i2s)?;
            for (key, expected) in [(gguf::SPLIT_COUNT, count), (gguf::SPLIT_NUMBER, number)] {
                if part.metadata.u32(key)? != Some(expected) {
                    return part.metadata.refuse(key, format!("{expected} is expected, by the file's name"));
                }
            }
            let input = Input::open(path)?;
            let checkpoint = checkpoint.get_or_insert_with(|| Self::new(directory, Origin::Gguf(part.metadata)));
            checkpoint.add(input, part.tensors)?;
            checkpoint.notes.extend(part.notes);
        }
        let checkpoint = checkpoint.expect("there is more than one");
        let Origin::Gguf(metadata) = &checkpoint.origin else { unreachable!("it was just made") };
        let found = checkpoint.tensors.len();
        match metadata.u32(gguf::SPLIT_TENSORS)? {
            Some(expected) if expected as usize != found => {
                metadata.refuse(gguf::SPLIT_TENSORS, format!("the files have {found} tensors"))
            }
            _ => Ok(checkpoint),
        }
    }

    fn add_safetensors(&mut self, input: Input) -> Result<(), Error> {
        let tensors = safetensors::read_header(&input)?;
        self.add(input, tensors)
    }

    fn add(&mut self, input: Input, tensors: Vec<TensorInfo>) -> Result<(), Error> {
        let file = self.files.len();
        for tensor in tensors {
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
            self.add_safetensors(Input::open(&shard_path)?)?;
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
    /// What the files say of the model.
    ///
    /// # Errors
    /// [`Error::Config`] names the first key whose value is not known.
    pub fn table(&self) -> Result<Table, Error> {
        let mut table = match &self.origin {
            Origin::HuggingFace(config) => Table::read(&self.config_path(), config)?,
            Origin::Gguf(metadata) => gguf::table(metadata)?,
            Origin::Llama2c(header) => llama2c::table(header),
        };
        table.notes.extend(self.notes.iter().cloned());
        Ok(table)
    }
    /// How tensors are named.
    pub const fn naming(&self) -> Naming {
        match self.origin {
            Origin::HuggingFace(_) => Naming::HuggingFace,
            Origin::Gguf(_) => Naming::Gguf,
            Origin::Llama2c(_) => Naming::Llama2c,
        }
    }
    /// The keys of a GGUF file.
    pub(crate) const fn gguf(&self) -> Option<&gguf::Metadata> {
        match &self.origin {
            Origin::Gguf(metadata) => Some(metadata),
            _ => None,
        }
    }
    /// The file that says what the model is: `config.json`, or the one that has everything.
    pub fn config_path(&self) -> PathBuf {
        match &self.origin {
            Origin::HuggingFace(_) => self.directory.join(CONFIG),
            _ => self.files.first().map_or_else(|| self.directory.clone(), |input| input.path.clone()),
        }
    }
    /// Where tensors are looked for: a directory, or the file that has all.
    pub fn place(&self) -> PathBuf {
        match &self.origin {
            Origin::HuggingFace(_) => self.directory.clone(),
            _ => self.config_path(),
        }
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
    /// Reads bytes of a tensor from `offset` on, of numbers as they are stored.
    ///
    /// # Errors
    /// If the system refuses.
    ///
    /// # Panics
    /// If they are not all the tensor's.
    pub fn read(&self, tensor: &TensorInfo, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        match (tensor.dtype, self.orders.get(&tensor.name)) {
            (Dtype::U8, Some(order)) => {
                let shape = (tensor.shape[0] as usize, tensor.shape[1] as usize);
                order.packed(shape, offset as usize, into, |at, into| self.read_stored(tensor, at as u64, into))
            }
            _ => self.read_stored(tensor, offset, into),
        }
    }
    /// [`Checkpoint::read`] in the order of the file.
    fn read_stored(&self, tensor: &TensorInfo, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        assert!(offset + into.len() as u64 <= tensor.bytes, "{}", tensor.name);
        self.files[self.tensors[&tensor.name].0].read_at(tensor.offset + offset, into)?;
        if let (Dtype::U8, Some(mask)) = (tensor.dtype, self.masks.get(&tensor.name)) {
            mask.apply_packed(offset as usize, tensor.shape[0] as usize, into);
        }
        Ok(())
    }
    /// From now on reads what stays of tensors, and zeros in place of the rest.
    pub(crate) fn prune(&mut self, masks: BTreeMap<String, Mask>) {
        self.masks = masks;
    }
    /// From now on reads rows or columns of tensors in another order.
    pub(crate) fn reorder(&mut self, orders: BTreeMap<String, Order>) {
        self.orders = orders;
    }
    /// Whether a tensor has masters that are read as what they are ternarized to.
    pub(crate) fn ternarizes(&self, tensor: &TensorInfo) -> bool {
        self.masks.get(&tensor.name).is_some_and(Mask::ternarizes)
    }
    /// Reads numbers of a tensor from element `first` on, which must start a block. `raw` is made as long as the bytes are.
    ///
    /// # Errors
    /// If the system refuses, or if a number is not finite or stands for nothing.
    ///
    /// # Panics
    /// If they are not all the tensor's, or the tensor's type is not read as numbers.
    pub fn read_floats(
        &self,
        tensor: &TensorInfo,
        first: u64,
        raw: &mut Vec<u8>,
        into: &mut [f32],
    ) -> Result<(), Error> {
        let Some(order) = self.orders.get(&tensor.name) else {
            return self.read_floats_stored(tensor, first, raw, into);
        };
        let cols = tensor.shape.last().copied().unwrap_or(1) as usize;
        order.floats(cols, first as usize, into, |at, into| self.read_floats_stored(tensor, at as u64, raw, into))
    }
    /// [`Checkpoint::read_floats`] in the order of the file.
    fn read_floats_stored(
        &self,
        tensor: &TensorInfo,
        first: u64,
        raw: &mut Vec<u8>,
        into: &mut [f32],
    ) -> Result<(), Error> {
        let (elements, bytes) = tensor.dtype.block();
        assert!(first.is_multiple_of(elements), "{}: element {first} is inside a block", tensor.name);
        let length = (into.len() as u64).div_ceil(elements) * bytes;
        raw.reserve_exact((length as usize).saturating_sub(raw.len()));
        raw.resize(length as usize, 0);
        self.read_stored(tensor, first / elements * bytes, raw)?;
        let wrong = |at: usize, what: String| {
            let cols = tensor.shape.last().copied().unwrap_or(1).max(1);
            let (row, column) = ((first + at as u64) / cols, (first + at as u64) % cols);
            Error::tensor(self.path_of(tensor), &tensor.name, format!("row {row}, column {column}: {what}"))
        };
        let sound = tensor.dtype.decode(raw, tensor.scale, into);
        sound.map_err(|at| wrong(at, "code 3, which no weight has".into()))?;
        // Without a branch for each: this sees every number of the checkpoint.
        let all_finite = Arch::new().dispatch(
            #[inline(always)]
            || !into.iter().fold(false, |found, v| found | !v.is_finite()),
        );
        if all_finite {
            if let Some(mask) = self.masks.get(&tensor.name) {
                mask.apply(first as usize, into);
            }
            return Ok(());
        }
        let at = into.iter().position(|v| !v.is_finite()).expect("one is not finite");
        Err(wrong(at, format!("{} is not a finite number", into[at])))
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

const WHAT_IS_READ: &str = "a checkpoint is a directory with config.json and model.safetensors, a GGUF file, or a file of \
                            llama2.c";

/// The GGUF file of a directory, or the first of its parts.
fn gguf_in(directory: &Path) -> Result<Option<PathBuf>, Error> {
    let names = with_extension(directory, "gguf");
    let first = |name: &&String| !name.contains("-of-") || name.contains("-00001-of-");
    let models: Vec<&String> = names.iter().filter(first).collect();
    match models[..] {
        [] => Ok(None),
        [name] => Ok(Some(directory.join(name))),
        [a, b, ..] => {
            let what = format!("holds {} GGUF files, {a} and {b} among them; name the one to pack", models.len());
            Err(Error::not_readable(directory, what))
        }
    }
}

/// Why a directory with `config.json` and no tensors is no checkpoint.
fn without_tensors(directory: &Path) -> String {
    if let Some(name) = with_extension(directory, "gguf").first() {
        return format!("no {SINGLE} and no {INDEX}; to pack {name}, name that file");
    }
    for extension in ["bin", "pt", "pth"] {
        if let Some(name) = with_extension(directory, extension).first() {
            return format!(
                "no {SINGLE} and no {INDEX}; {name} is PyTorch, which is not read: convert it to safetensors"
            );
        }
    }
    format!("no {SINGLE} and no {INDEX}")
}

/// Names of the files with this extension, in their order.
fn with_extension(directory: &Path, extension: &str) -> Vec<String> {
    let Ok(entries) = directory.read_dir() else { return Vec::new() };
    let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|n| Path::new(n).extension().is_some_and(|e| e == extension)).collect();
    names.sort();
    names
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
