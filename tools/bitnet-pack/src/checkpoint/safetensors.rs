//! The safetensors container: eight bytes of length, a JSON header, then the tensors one after another.
//!
//! The header is checked as a whole before anything is believed: names are unique, every range has the length that its
//! shape needs, and the ranges cover the data without a gap or an overlap. What a file claims never sizes an allocation.
use super::Dtype;
use crate::Error;
use crate::files::Input;
use bitnet_runtime::error::Foreign;
use core::fmt;
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::io::{BufReader, Read};
use std::path::Path;

/// Longest header: 256 bytes for each of the most tensors. A file that claims more would be believed with as much memory.
pub const HEADER_BYTES_MAX: u64 = 1 << 24;
/// Most tensors in one file.
pub const TENSORS_MAX: usize = 1 << 16;
/// Most dimensions of a tensor.
pub const DIMENSIONS_MAX: usize = 8;

/// A tensor of a checked header.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<u64>,
    /// First byte in the file.
    pub offset: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// What all codes of an I2_S tensor are multiplied by; 1 of any other.
    pub scale: f32,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    #[serde(deserialize_with = "dimensions")]
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A list of dimensions that ends early: each takes four times the memory of its text.
fn dimensions<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct DimensionsVisitor;
    impl<'de> Visitor<'de> for DimensionsVisitor {
        type Value = Vec<u64>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of dimensions")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u64>, A::Error> {
            let mut shape = Vec::new();
            while let Some(dimension) = list.next_element()? {
                if shape.len() == DIMENSIONS_MAX {
                    return Err(de::Error::custom(format_args!("more than {DIMENSIONS_MAX} dimensions")));
                }
                shape.push(dimension);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(DimensionsVisitor)
}

/// The header's entries in their order. A map would hide names that occur twice.
struct Entries(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;
        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let (mut entries, mut metadata) = (Vec::new(), false);
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if core::mem::replace(&mut metadata, true) {
                            return Err(de::Error::custom("__metadata__ occurs twice"));
                        }
                        map.next_value::<Metadata>()?;
                    } else if entries.len() == TENSORS_MAX {
                        return Err(de::Error::custom(format_args!("more than {TENSORS_MAX} tensors")));
                    } else {
                        let tensor = map.next_value();
                        let tensor = tensor.map_err(|e| de::Error::custom(format_args!("tensor {name:?}: {e}")))?;
                        entries.push((name, tensor));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(EntriesVisitor)
    }
}

/// `__metadata__`: an object of strings, of no interest here.
struct Metadata;

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MetadataVisitor;
        impl<'de> Visitor<'de> for MetadataVisitor {
            type Value = Metadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("__metadata__ as an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                while map.next_key::<IgnoredAny>()?.is_some() {
                    map.next_value::<String>()?;
                }
                Ok(Metadata)
            }
        }
        deserializer.deserialize_map(MetadataVisitor)
    }
}

/// Reads and checks the header of a file.
///
/// # Errors
/// The first thing that is wrong.
pub(crate) fn read_header(input: &Input) -> Result<Vec<TensorInfo>, Error> {
    let wrong = |what: String| Error::safetensors(&input.path, what);
    match input.foreign()? {
        None | Some(Foreign::Safetensors) => {}
        Some(foreign) => return Err(Error::foreign(&input.path, foreign)),
    }
    if input.bytes < 9 {
        return Err(wrong(format!("{} bytes are too few for a safetensors file", input.bytes)));
    }
    let mut start = [0; 9];
    input.read_at(0, &mut start)?;
    let length = u64::from_le_bytes(*start.first_chunk().expect("nine bytes"));
    if length > HEADER_BYTES_MAX {
        let limit = format!("the header's length is {length}, at most {HEADER_BYTES_MAX} is accepted");
        return Err(wrong(format!("{limit}; this may not be a safetensors file")));
    }
    let data = 8 + length;
    if data > input.bytes {
        return Err(wrong(format!("the file ends at byte {}, its header at {data}: truncated", input.bytes)));
    }
    if start[8] != b'{' {
        return Err(wrong("the header does not start with `{`: not a safetensors file".into()));
    }
    let Entries(entries) = parse(input, length)?;
    check(&input.path, entries, data, input.bytes)
}

fn parse(input: &Input, length: u64) -> Result<Entries, Error> {
    input.read_at(0, &mut [0; 8])?;
    let mut json = serde_json::Deserializer::from_reader(BufReader::new((&input.file).take(length)));
    // What follows the object may only be spaces, which writers pad the header with.
    let entries = Entries::deserialize(&mut json).and_then(|entries| json.end().map(|()| entries));
    entries.map_err(|e| Error::safetensors(&input.path, format!("header: {e}")))
}

/// Checks entries against one another and the file. `data` is where the tensors start.
fn check(path: &Path, entries: Vec<(String, RawTensor)>, data: u64, file: u64) -> Result<Vec<TensorInfo>, Error> {
    if entries.is_empty() {
        return Err(Error::safetensors(path, "the header lists no tensors"));
    }
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, raw) in entries {
        tensors.push(check_entry(path, name, &raw, data, file)?);
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(Error::tensor(path, &pair[0].name, "the name occurs twice in the header"));
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| (t.offset, t.bytes));
    let mut end = data;
    for tensor in order {
        let (from, to) = (tensor.offset - data, end - data);
        if tensor.offset < end {
            return Err(Error::tensor(
                path,
                &tensor.name,
                format!("starts at {from}, inside a tensor that ends at {to}"),
            ));
        }
        if tensor.offset > end {
            return Err(Error::tensor(path, &tensor.name, format!("starts at {from}, after a gap from {to} on")));
        }
        end += tensor.bytes;
    }
    if end != file {
        return Err(Error::safetensors(path, format!("the tensors end at byte {end}, the file at {file}")));
    }
    Ok(tensors)
}

fn check_entry(path: &Path, name: String, raw: &RawTensor, data: u64, file: u64) -> Result<TensorInfo, Error> {
    let wrong = |what: String| Err(Error::tensor(path, &name, what));
    let Some(dtype) = Dtype::from_safetensors(&raw.dtype) else {
        return wrong(format!("dtype {:?} is unknown", raw.dtype));
    };
    let count = raw.shape.iter().try_fold(1, |n: u64, &d| n.checked_mul(d));
    let Some(bytes) = count.and_then(|n| dtype.bytes_of(n)) else {
        return wrong(format!("shape {:?} overflows", raw.shape));
    };
    let (begin, end) = raw.data_offsets;
    if begin > end {
        return wrong(format!("data_offsets [{begin}, {end}] end before they begin"));
    }
    if end - begin != bytes {
        let claimed = end - begin;
        return wrong(format!("data_offsets span {claimed} bytes, {} {:?} needs {bytes}", raw.dtype, raw.shape));
    }
    if end > file - data {
        let needed = u128::from(data) + u128::from(end);
        return wrong(format!("it ends at byte {needed}, the file at {file}: truncated"));
    }
    Ok(TensorInfo { name, dtype, shape: raw.shape.clone(), offset: data + begin, bytes, scale: 1.0 })
}
