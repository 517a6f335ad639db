//! Reads and checks the start of a file: everything before the tensors, and where each of these lies.
use super::{Kind, Metadata, Value};
use crate::Error;
use crate::checkpoint::{Dtype, TensorInfo};
use crate::files::Input;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::{BufReader, Read};
use std::path::Path;

/// Most keys.
const KEYS_MAX: u64 = 1 << 16;
/// Most tensors in a file.
const TENSORS_MAX: u64 = 1 << 16;
/// Longest key, and longest name of a tensor.
const NAME_BYTES_MAX: u64 = 256;
/// Most elements of an array.
const ELEMENTS_MAX: u64 = 1 << 24;
/// Largest dimension.
const DIMENSION_MAX: u64 = 1 << 40;
/// Bytes of the shortest key with its value, and of the shortest entry of a tensor.
const KEY_BYTES_MIN: u64 = 8 + 1 + 4 + 1;
const TENSOR_BYTES_MIN: u64 = 8 + 1 + 4 + 8 + 4 + 8;
/// Tensors start at multiples of this if no key says otherwise.
const ALIGNMENT: u64 = 32;

/// A file of a model.
#[derive(Debug)]
pub(in crate::checkpoint) struct Part {
    pub(in crate::checkpoint) metadata: Metadata,
    pub(in crate::checkpoint) tensors: Vec<TensorInfo>,
    /// What a person should know.
    pub(in crate::checkpoint) notes: Vec<String>,
}

/// What the types that have more than one reading are read as.
#[derive(Clone, Copy, Debug)]
struct Types {
    /// Whether the file holds a model of bitnet.cpp, for which some numbers of types mean something else.
    bitnet: bool,
    i2s: Dtype,
}

/// A tensor's entry, before anything of it is believed.
#[derive(Debug)]
struct Raw {
    name: String,
    /// As stored: the columns first.
    dimensions: Vec<u64>,
    tag: u32,
    offset: u64,
}

/// Reads the header of a file whose I2_S tensors have groups as `i2s` says.
///
/// # Errors
/// The first thing that is wrong.
pub(in crate::checkpoint) fn read(input: Input, i2s: Dtype) -> Result<Part, Error> {
    let mut cursor = Cursor::new(&input)?;
    let (tensors, keys) = start(&mut cursor)?;
    let mut values = BTreeMap::new();
    for i in 0..keys {
        let (key, value) = key(&mut cursor, i)?;
        match values.entry(key) {
            Entry::Vacant(entry) => entry.insert(value),
            Entry::Occupied(entry) => return cursor.wrong(format!("key {} occurs twice", entry.key())),
        };
    }
    let mut raw = Vec::new();
    for i in 0..tensors {
        raw.push(tensor(&mut cursor, i)?);
    }
    let end = cursor.at;
    let metadata = Metadata { input, values };
    let alignment = alignment(&metadata)?;
    let Some(data) = end.checked_next_multiple_of(alignment) else {
        return Err(Error::gguf(metadata.path(), "the header's end overflows"));
    };
    let architecture = metadata.text("general.architecture")?.unwrap_or_default();
    let scales = raw.iter().any(|t| t.name.ends_with("_scale"));
    let types = Types { bitnet: architecture.starts_with("bitnet") || scales, i2s };
    let mut notes = Vec::new();
    let tensors = place(&metadata, raw, types, (data, alignment), &mut notes)?;
    Ok(Part { metadata, tensors, notes })
}

/// Reads forward and never past the end of the file.
struct Cursor<'a> {
    path: &'a Path,
    reader: BufReader<&'a std::fs::File>,
    at: u64,
    end: u64,
}

impl<'a> Cursor<'a> {
    fn new(input: &'a Input) -> Result<Self, Error> {
        input.read_at(0, &mut [])?;
        let reader = BufReader::with_capacity(1 << 16, &input.file);
        Ok(Self { path: &input.path, reader, at: 0, end: input.bytes })
    }
    fn wrong<T>(&self, what: impl Into<String>) -> Result<T, Error> {
        Err(Error::gguf(self.path, what))
    }
    const fn left(&self) -> u64 {
        self.end - self.at
    }
    fn expect(&self, bytes: u64, what: &str) -> Result<(), Error> {
        if bytes <= self.left() {
            return Ok(());
        }
        let (at, end) = (self.at, self.end);
        self.wrong(format!("{what} at byte {at} takes {bytes} bytes, but the file ends at {end}: truncated"))
    }
    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }
    fn fill(&mut self, into: &mut [u8], what: &str) -> Result<(), Error> {
        self.expect(into.len() as u64, what)?;
        self.reader.read_exact(into).map_err(|e| Error::io(self.path, "read", e))?;
        self.at += into.len() as u64;
        Ok(())
    }
    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        self.take(what).map(u32::from_le_bytes)
    }
    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        self.take(what).map(u64::from_le_bytes)
    }
    fn skip(&mut self, bytes: u64, what: &str) -> Result<(), Error> {
        self.expect(bytes, what)?;
        let mut left = bytes;
        while left > 0 {
            let step = left.min(1 << 30);
            self.reader.seek_relative(step as i64).map_err(|e| Error::io(self.path, "read", e))?;
            left -= step;
        }
        self.at += bytes;
        Ok(())
    }
    /// A key or the name of a tensor.
    fn name(&mut self, what: &str) -> Result<String, Error> {
        let bytes = self.u64(what)?;
        if bytes == 0 || bytes > NAME_BYTES_MAX {
            return self.wrong(format!("{what} has {bytes} bytes; 1 to {NAME_BYTES_MAX} are accepted"));
        }
        let mut name = vec![0; bytes as usize];
        self.fill(&mut name, what)?;
        match String::from_utf8(name) {
            Ok(name) => Ok(name),
            Err(_) => self.wrong(format!("{what} is not UTF-8")),
        }
    }
}

/// Magic, version, and the numbers of tensors and keys.
fn start(cursor: &mut Cursor<'_>) -> Result<(u64, u64), Error> {
    if cursor.take("the magic").map(|magic: [u8; 4]| magic != *b"GGUF")? {
        return cursor.wrong("not a GGUF file");
    }
    match cursor.u32("the version")? {
        2 | 3 => {}
        1 => return cursor.wrong("GGUF version 1, which was used for a few weeks in 2023; 2 and 3 are read"),
        version if matches!(version.swap_bytes(), 1..=3) => {
            return cursor.wrong("a GGUF file for big-endian machines; only little-endian ones are read");
        }
        version => return cursor.wrong(format!("GGUF version {version}; 2 and 3 are read")),
    }
    let tensors = cursor.u64("the number of tensors")?;
    let keys = cursor.u64("the number of keys")?;
    for (what, count, most, each) in
        [("tensors", tensors, TENSORS_MAX, TENSOR_BYTES_MIN), ("keys", keys, KEYS_MAX, KEY_BYTES_MIN)]
    {
        if count > most {
            return cursor.wrong(format!("{count} {what}; at most {most} are accepted"));
        }
        if count * each > cursor.left() {
            let left = cursor.left();
            return cursor.wrong(format!("{count} {what} take {} bytes at least, but {left} are left", count * each));
        }
    }
    Ok((tensors, keys))
}

fn key(cursor: &mut Cursor<'_>, i: u64) -> Result<(String, Value), Error> {
    let key = cursor.name(&format!("the name of key {i}"))?;
    let tag = cursor.u32(&format!("the type of {key}"))?;
    let Some(kind) = Kind::from_tag(tag) else {
        return cursor.wrong(format!("key {key}: values of type {tag} are unknown"));
    };
    let value = match kind {
        Kind::Text => {
            let bytes = cursor.u64(&key)?;
            let offset = cursor.at;
            cursor.skip(bytes, &key)?;
            Value::Text { offset, bytes }
        }
        Kind::Array => array(cursor, &key)?,
        _ => scalar(cursor, &key, kind)?,
    };
    Ok((key, value))
}

fn scalar(cursor: &mut Cursor<'_>, key: &str, kind: Kind) -> Result<Value, Error> {
    let mut bytes = [0; 8];
    let length = kind.bytes() as usize;
    cursor.fill(&mut bytes[..length], key)?;
    let word = u64::from_le_bytes(bytes);
    // The sign of the shorter types is in their own highest bit.
    let shift = 64 - 8 * length as u32;
    Ok(match kind {
        Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => Value::Signed((word << shift) as i64 >> shift),
        Kind::F32 => Value::Float(f32::from_bits(word as u32).into()),
        Kind::F64 => Value::Float(f64::from_bits(word)),
        Kind::Bool if word > 1 => return cursor.wrong(format!("key {key}: {word} is neither true nor false")),
        Kind::Bool => Value::Bool(word == 1),
        _ => Value::Unsigned(word),
    })
}

fn array(cursor: &mut Cursor<'_>, key: &str) -> Result<Value, Error> {
    let tag = cursor.u32(key)?;
    let of = match Kind::from_tag(tag) {
        Some(Kind::Array) => return cursor.wrong(format!("key {key}: arrays of arrays are not read")),
        Some(of) => of,
        None => return cursor.wrong(format!("key {key}: an array of type {tag}, which is unknown")),
    };
    let count = cursor.u64(key)?;
    if count > ELEMENTS_MAX {
        return cursor.wrong(format!("key {key}: {count} elements; at most {ELEMENTS_MAX} are accepted"));
    }
    let offset = cursor.at;
    if of == Kind::Text {
        cursor.expect(count * 8, key)?;
        for _ in 0..count {
            let bytes = cursor.u64(key)?;
            cursor.skip(bytes, key)?;
        }
    } else {
        cursor.skip(count * of.bytes(), key)?;
    }
    Ok(Value::Array { of, count, offset, bytes: cursor.at - offset })
}

fn tensor(cursor: &mut Cursor<'_>, i: u64) -> Result<Raw, Error> {
    let name = cursor.name(&format!("the name of tensor {i}"))?;
    let count = cursor.u32(&name)?;
    if !(1..=4).contains(&count) {
        let what = format!("{count} dimensions; 1 to 4 are accepted");
        return Err(Error::tensor(cursor.path, &name, what));
    }
    let mut dimensions = Vec::new();
    for _ in 0..count {
        dimensions.push(cursor.u64(&name)?);
    }
    let (tag, offset) = (cursor.u32(&name)?, cursor.u64(&name)?);
    Ok(Raw { name, dimensions, tag, offset })
}

fn alignment(metadata: &Metadata) -> Result<u64, Error> {
    const KEY: &str = "general.alignment";
    let alignment = match metadata.get(KEY) {
        None => return Ok(ALIGNMENT),
        Some(Value::Unsigned(v)) => v,
        Some(_) => return metadata.refuse(KEY, "an unsigned number is expected"),
    };
    if alignment.is_power_of_two() && (8..=65_536).contains(&alignment) {
        return Ok(alignment);
    }
    metadata.refuse(KEY, "a power of two from 8 to 65,536 is expected")
}

/// Checks every entry against the file and against the others. The first number of `region` is the byte where tensors
/// start, the second their alignment.
fn place(
    metadata: &Metadata,
    mut raw: Vec<Raw>,
    types: Types,
    region: (u64, u64),
    notes: &mut Vec<String>,
) -> Result<Vec<TensorInfo>, Error> {
    let (data, alignment) = region;
    let (path, file) = (metadata.path(), metadata.input.bytes);
    raw.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = raw.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(Error::tensor(path, &pair[0].name, "the name occurs twice in the file"));
    }
    raw.sort_by_key(|t| t.offset);
    let mut sized = Vec::new();
    for (i, t) in raw.iter().enumerate() {
        let wrong = |what: String| Err(Error::tensor(path, &t.name, what));
        if let Some(d) = t.dimensions.iter().find(|&&d| d == 0 || d > DIMENSION_MAX) {
            return wrong(format!("a dimension of {d}; 1 to 2^40 is accepted"));
        }
        let Some(elements) = t.dimensions.iter().try_fold(1u64, |n, &d| n.checked_mul(d)) else {
            return wrong(format!("dimensions {:?} overflow", t.dimensions));
        };
        if !t.offset.is_multiple_of(alignment) {
            return wrong(format!("it starts at {}, which is no multiple of {alignment}", t.offset));
        }
        // Where the next one starts, or the file ends.
        let end = file.saturating_sub(data);
        let next = raw.get(i + 1).map_or(end, |next| next.offset.min(end));
        sized.push((t, elements, next - t.offset.min(next)));
    }
    let q2_0 = q2_0(path, &sized, alignment)?;
    let mut tensors = Vec::new();
    let mut end = 0u64;
    for (t, elements, extent) in sized {
        let wrong = |what: String| Error::tensor(path, &t.name, what);
        let dtype = dtype(t.tag, types, q2_0).map_err(|what| wrong(format!("type {}: {what}", t.tag)))?;
        let bytes = bytes(dtype, t, elements).map_err(wrong)?;
        // Writers place tensors one after another; readers of the reference refuse anything else.
        if t.offset != end {
            return Err(wrong(format!("it starts at {} of the tensors' bytes, where {end} is expected", t.offset)));
        }
        if bytes > extent {
            let needed = u128::from(data) + u128::from(t.offset) + u128::from(bytes);
            let last = data.saturating_add(t.offset).saturating_add(extent);
            let what =
                format!("{} of {:?} needs the bytes up to {needed}, but it ends at {last}", dtype.name(), t.dimensions);
            return Err(wrong(if last >= file { format!("{what}: truncated") } else { what }));
        }
        // No more than the file is long, so nothing overflows.
        end = (t.offset + bytes).next_multiple_of(alignment);
        let scale = scale(metadata, t, dtype, data + t.offset + bytes)?;
        let shape = t.dimensions.iter().rev().copied().collect();
        tensors.push(TensorInfo { name: t.name.clone(), dtype, shape, offset: data + t.offset, bytes, scale });
    }
    if !tensors.is_empty() && file - data > end {
        notes.push(format!("{} bytes after the last tensor are not looked at", file - data - end));
    }
    Ok(tensors)
}

/// The number of bytes of a tensor, which must have whole blocks.
fn bytes(dtype: Dtype, t: &Raw, elements: u64) -> Result<u64, String> {
    let (block, _) = dtype.block();
    let flat = matches!(dtype, Dtype::I2_S | Dtype::I2_S_64);
    // I2_S runs on over the ends of rows; the others start each row anew.
    if !flat && !t.dimensions[0].is_multiple_of(block) {
        return Err(format!("rows of {} in {}, which has blocks of {block}", t.dimensions[0], dtype.name()));
    }
    if flat && !(elements.is_multiple_of(block) && t.dimensions[0].is_multiple_of(2)) {
        return Err(format!("{:?} in {}, which has groups of {block}", t.dimensions, dtype.name()));
    }
    dtype.bytes_of(elements).ok_or(format!("dimensions {:?} overflow", t.dimensions))
}

/// The scale after an I2_S tensor that ends at `end`.
fn scale(metadata: &Metadata, t: &Raw, dtype: Dtype, end: u64) -> Result<f32, Error> {
    if !matches!(dtype, Dtype::I2_S | Dtype::I2_S_64) {
        return Ok(1.0);
    }
    let mut raw = [0; 4];
    metadata.input.read_at(end - super::super::dtype::I2_S_TAIL, &mut raw)?;
    let scale = f32::from_le_bytes(raw);
    if scale.is_finite() && scale > 0.0 {
        return Ok(scale);
    }
    Err(Error::tensor(metadata.path(), &t.name, format!("{scale} is no scale")))
}

const Q2_0: u32 = 42;

/// Which of the two layouts all Q2_0 tensors of the file have, told by the room each has.
fn q2_0(path: &Path, sized: &[(&Raw, u64, u64)], alignment: u64) -> Result<Dtype, Error> {
    let fits = |dtype: Dtype| {
        let mut tensors = sized.iter().filter(|(t, ..)| t.tag == Q2_0);
        tensors.all(|&(t, elements, extent)| {
            bytes(dtype, t, elements).is_ok_and(|b| b <= extent && extent - b < alignment)
        })
    };
    let Some((first, ..)) = sized.iter().find(|(t, ..)| t.tag == Q2_0) else { return Ok(Dtype::Q2_0) };
    match (fits(Dtype::Q2_0), fits(Dtype::Q2_0_128)) {
        (true, false) => Ok(Dtype::Q2_0),
        (false, true) => Ok(Dtype::Q2_0_128),
        (both, _) => {
            let what = if both { "both fit" } else { "neither fits" };
            let what = format!("Q2_0 has groups of 64 or of 128, which its size tells, but {what} here");
            Err(Error::tensor(path, &first.name, what))
        }
    }
}

/// Types that are known and not read.
const UNREAD: [(u32, &str); 22] = [
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (37, "I8_S"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (134, "IQ1_BN"),
    (135, "IQ2_BN"),
];

const TILED: &str = "its order of weights depends on tile sizes that are chosen for each shape when it is made and are not in \
                     the file; use the model's I2_S or TQ2_0 file, or its safetensors";

/// The type with this number.
fn dtype(tag: u32, types: Types, q2_0: Dtype) -> Result<Dtype, String> {
    Ok(match tag {
        0 => Dtype::F32,
        1 => Dtype::F16,
        2 => Dtype::Q4_0,
        3 => Dtype::Q4_1,
        6 => Dtype::Q5_0,
        7 => Dtype::Q5_1,
        8 => Dtype::Q8_0,
        12 => Dtype::Q4_K,
        13 => Dtype::Q5_K,
        14 => Dtype::Q6_K,
        30 => Dtype::BF16,
        34 => Dtype::TQ1_0,
        35 => Dtype::TQ2_0,
        36 => types.i2s,
        38 => return Err(format!("TL1 is not read: {TILED}")),
        39 if types.bitnet => return Err(format!("TL2 is not read: {TILED}")),
        41 => Dtype::Q1_0,
        Q2_0 => q2_0,
        _ => {
            let name = UNREAD.iter().find(|(t, _)| *t == tag).map(|(_, name)| *name);
            return Err(match name {
                Some(name) => format!("{name} is not read; a file of the model in Q8_0, F16 or BF16 is"),
                None => "unknown".into(),
            });
        }
    })
}
