//! The GGUF container, versions 2 and 3: keys and their values, a table of tensors, then the tensors.
//!
//! A file is read once from its start to its first tensor. Of a key no more is kept than a number or where its value lies;
//! strings and arrays are read when they are asked for. Every length is compared with what is left of the file before it is
//! believed, so nothing that a file claims sizes an allocation, and the time is that of reading its header. Files are read and
//! not mapped: a mapped file that another process cuts short ends this one, and its pages would count as this one's memory.
mod container;
mod table;
mod text;

pub(super) use container::read;
pub(super) use table::table;
pub(crate) use text::{text, text_bytes};

use crate::Error;
use crate::files::Input;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Keys of a file that is one of several.
pub(super) const SPLIT_COUNT: &str = "split.count";
pub(super) const SPLIT_NUMBER: &str = "split.no";
pub(super) const SPLIT_TENSORS: &str = "split.tensors.count";

/// Types of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    const ALL: [(Self, &'static str, u64); 13] = [
        (Self::U8, "u8", 1),
        (Self::I8, "i8", 1),
        (Self::U16, "u16", 2),
        (Self::I16, "i16", 2),
        (Self::U32, "u32", 4),
        (Self::I32, "i32", 4),
        (Self::F32, "f32", 4),
        (Self::Bool, "bool", 1),
        (Self::Text, "string", 0),
        (Self::Array, "array", 0),
        (Self::U64, "u64", 8),
        (Self::I64, "i64", 8),
        (Self::F64, "f64", 8),
    ];
    /// The type with this number.
    fn from_tag(tag: u32) -> Option<Self> {
        Self::ALL.get(tag as usize).map(|(kind, ..)| *kind)
    }
    const fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
    /// Bytes of a value of fixed length, 0 of one that has none.
    const fn bytes(self) -> u64 {
        Self::ALL[self as usize].2
    }
}

/// A value, or where it lies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    /// u8 to u64.
    Unsigned(u64),
    /// i8 to i64.
    Signed(i64),
    /// f32 and f64.
    Float(f64),
    Bool(bool),
    Text {
        offset: u64,
        bytes: u64,
    },
    Array {
        of: Kind,
        count: u64,
        offset: u64,
        bytes: u64,
    },
}

/// The keys of a file.
#[derive(Debug)]
pub struct Metadata {
    input: Input,
    values: BTreeMap<String, Value>,
}

/// Longest string that is read: a chat template that fits an image, and more.
const TEXT_BYTES_MAX: u64 = 1 << 18;
/// Most bytes of an array that is read: tokens or merges.
const ARRAY_BYTES_MAX: u64 = 1 << 26;

impl Metadata {
    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.input.path
    }
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }
    fn get(&self, key: &str) -> Option<Value> {
        self.values.get(key).copied()
    }
    /// An error about a key, with its value.
    pub(super) fn refuse<T>(&self, key: &str, what: impl Into<String>) -> Result<T, Error> {
        let value = match self.get(key) {
            None => "(missing)".into(),
            Some(Value::Unsigned(v)) => v.to_string(),
            Some(Value::Signed(v)) => v.to_string(),
            Some(Value::Float(v)) => v.to_string(),
            Some(Value::Bool(v)) => v.to_string(),
            Some(Value::Text { .. }) => match self.text(key) {
                Ok(Some(text)) => format!("{:?}", text.chars().take(200).collect::<String>()),
                _ => "(a string)".into(),
            },
            Some(Value::Array { of, count, .. }) => format!("({count} times {})", of.name()),
        };
        Err(Error::Config { path: self.path().into(), key: key.into(), value, what: what.into() })
    }
    pub(super) fn u32(&self, key: &str) -> Result<Option<u32>, Error> {
        let value = match self.get(key) {
            None => return Ok(None),
            Some(Value::Unsigned(v)) => u32::try_from(v).ok(),
            Some(Value::Signed(v)) => u32::try_from(v).ok(),
            Some(_) => None,
        };
        if value.is_none() { self.refuse(key, "a whole number below 2^32 is expected") } else { Ok(value) }
    }
    pub(super) fn f64(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(v)) => Ok(Some(v)),
            Some(_) => self.refuse(key, "a float is expected"),
        }
    }
    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(v)),
            Some(_) => self.refuse(key, "true or false is expected"),
        }
    }
    pub(super) fn text(&self, key: &str) -> Result<Option<String>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text { bytes, .. }) if bytes > TEXT_BYTES_MAX => Err(Error::Config {
                path: self.path().into(),
                key: key.into(),
                value: format!("(a string of {bytes} bytes)"),
                what: format!("at most {TEXT_BYTES_MAX} are read"),
            }),
            Some(Value::Text { offset, bytes }) => {
                let mut text = vec![0; bytes as usize];
                self.input.read_at(offset, &mut text)?;
                match String::from_utf8(text) {
                    Ok(text) => Ok(Some(text)),
                    Err(_) => Err(Error::Config {
                        path: self.path().into(),
                        key: key.into(),
                        value: "(a string)".into(),
                        what: "it is not UTF-8".into(),
                    }),
                }
            }
            Some(_) => self.refuse(key, "a string is expected"),
        }
    }
    /// Number of elements of an array.
    pub(super) fn count(&self, key: &str) -> Result<Option<u64>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array { count, .. }) => Ok(Some(count)),
            Some(_) => self.refuse(key, "an array is expected"),
        }
    }
    /// Bytes of an array in the file, 0 if there is none.
    pub(super) fn array_bytes(&self, key: &str) -> u64 {
        match self.get(key) {
            Some(Value::Array { bytes, .. }) => bytes,
            _ => 0,
        }
    }
    /// The elements of an array of this type as they lie in the file.
    fn array(&self, key: &str, kinds: &[Kind]) -> Result<Option<(Kind, Vec<u8>)>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array { of, bytes, offset, .. }) if kinds.contains(&of) => {
                if bytes > ARRAY_BYTES_MAX {
                    return self.refuse(key, format!("{bytes} bytes; at most {ARRAY_BYTES_MAX} are read"));
                }
                let mut raw = vec![0; bytes as usize];
                self.input.read_at(offset, &mut raw)?;
                Ok(Some((of, raw)))
            }
            Some(_) => {
                let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
                self.refuse(key, format!("an array of {} is expected", names.join(" or ")))
            }
        }
    }
    /// An array of strings.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<String>>, Error> {
        let Some((_, raw)) = self.array(key, &[Kind::Text])? else { return Ok(None) };
        let (mut texts, mut rest) = (Vec::new(), &raw[..]);
        // Lengths were walked when the header was read.
        while let Some((length, after)) = rest.split_first_chunk() {
            let (text, after) = after.split_at(u64::from_le_bytes(*length) as usize);
            match str::from_utf8(text) {
                Ok(text) => texts.push(text.into()),
                Err(_) => return self.refuse(key, format!("element {} is not UTF-8", texts.len())),
            }
            rest = after;
        }
        Ok(Some(texts))
    }
    /// An array of i32 or u32.
    pub(super) fn integers(&self, key: &str) -> Result<Option<Vec<i64>>, Error> {
        let Some((kind, raw)) = self.array(key, &[Kind::I32, Kind::U32])? else { return Ok(None) };
        let words = raw.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        Ok(Some(words.map(|w| if kind == Kind::I32 { i64::from(w as i32) } else { i64::from(w) }).collect()))
    }
    /// An array of f32.
    pub(super) fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, Error> {
        let Some((_, raw)) = self.array(key, &[Kind::F32])? else { return Ok(None) };
        Ok(Some(raw.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
    }
}

/// The files of a model that is split, told from the name of one of them: `NAME-00002-of-00003.gguf`.
pub(super) fn parts(path: &Path, count: u32) -> Option<Vec<PathBuf>> {
    let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (rest, of) = name.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    if !digits(of) || !digits(number) || of.parse() != Ok(count) {
        return None;
    }
    Some((1..=count).map(|i| path.with_file_name(format!("{stem}-{i:05}-of-{of}.gguf"))).collect())
}
