//! Reads numpy's arrays (`.npy`) and archives of them (`.npz`): little-endian f32 and i64 in C order, all that the golden
//! values hold.
use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::path::Path;

/// An array of values in C order: the last index runs fastest.
#[derive(Clone, Debug, PartialEq)]
pub struct Array<T> {
    /// The length of each dimension.
    pub shape: Vec<usize>,
    /// The product of the shape's numbers of them.
    pub values: Vec<T>,
}

/// A type of value that a file may hold.
pub trait Value: Sized {
    /// What numpy calls it.
    const DESCRIPTION: &'static str;
    /// Reads one from exactly as many bytes as it has.
    fn from_bytes(bytes: &[u8]) -> Self;
}

impl Value for f32 {
    const DESCRIPTION: &'static str = "<f4";
    fn from_bytes(bytes: &[u8]) -> Self {
        Self::from_le_bytes(bytes.try_into().expect("four bytes"))
    }
}

impl Value for i64 {
    const DESCRIPTION: &'static str = "<i8";
    fn from_bytes(bytes: &[u8]) -> Self {
        Self::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }
}

impl<T> Array<T> {
    /// The values cut along the last dimension.
    ///
    /// # Panics
    /// If there is no dimension, or the last one is zero.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[T]> {
        self.values.chunks_exact(*self.shape.last().expect("an array of at least one dimension"))
    }
}

/// Reads a `.npy` file.
///
/// # Panics
/// If it cannot be read or holds something else.
pub fn read<T: Value>(path: impl AsRef<Path>) -> Array<T> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    parse(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Reads all arrays of a `.npz` file, by their names without `.npy`.
///
/// # Panics
/// If it cannot be read or holds something else.
pub fn read_npz<T: Value>(path: impl AsRef<Path>) -> BTreeMap<String, Array<T>> {
    let path = path.as_ref();
    let fail = |what: String| -> ! { panic!("{}: {what}", path.display()) };
    let bytes = std::fs::read(path).unwrap_or_else(|e| fail(e.to_string()));
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).unwrap_or_else(|e| fail(e.to_string()));
    let mut arrays = BTreeMap::new();
    for i in 0..archive.len() {
        let mut entry = archive.by_index(i).unwrap_or_else(|e| fail(e.to_string()));
        let file = entry.name().unwrap_or_else(|e| fail(e.to_string())).into_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap_or_else(|e| fail(format!("{file}: {e}")));
        let array = parse(&bytes).unwrap_or_else(|e| fail(format!("{file}: {e}")));
        arrays.insert(file.trim_end_matches(".npy").to_owned(), array);
    }
    arrays
}

/// Reads the bytes of a `.npy` file.
///
/// # Errors
/// If they are something else, in a sentence.
pub fn parse<T: Value>(bytes: &[u8]) -> Result<Array<T>, String> {
    let rest = bytes.strip_prefix(b"\x93NUMPY").ok_or("it is not numpy's")?;
    // Version 1 has two bytes of header length, the later ones four.
    let (length, rest) = match rest {
        [1, 0, a, b, rest @ ..] => (usize::from(u16::from_le_bytes([*a, *b])), rest),
        [2 | 3, 0, a, b, c, d, rest @ ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, rest),
        _ => return Err("it is cut off, or of a version that is not known".to_owned()),
    };
    let (header, data) = rest.split_at_checked(length).ok_or("its header is cut off")?;
    let header = core::str::from_utf8(header).map_err(|e| e.to_string())?;
    let description = field(header, "descr")?.trim_matches('\'');
    if description != T::DESCRIPTION {
        return Err(format!("its values are {description}, not {}", T::DESCRIPTION));
    }
    if field(header, "fortran_order")? != "False" {
        return Err("it is in Fortran's order".to_owned());
    }
    let mut shape = Vec::new();
    for number in field(header, "shape")?.trim_matches(['(', ')']).split(',') {
        // (5,) has an empty piece after its comma, and () has one only.
        if !number.trim().is_empty() {
            shape.push(number.trim().parse::<usize>().map_err(|e| format!("shape {number}: {e}"))?);
        }
    }
    let count = shape.iter().try_fold(1, |n: usize, &side| n.checked_mul(side));
    if count.and_then(|n| n.checked_mul(size_of::<T>())) != Some(data.len()) {
        return Err(format!("{} bytes do not hold shape {shape:?}", data.len()));
    }
    Ok(Array { shape, values: data.chunks_exact(size_of::<T>()).map(T::from_bytes).collect() })
}

/// The text of a value in the header, which is a Python dictionary whose values hold no braces.
fn field<'a>(header: &'a str, name: &str) -> Result<&'a str, String> {
    let missing = || format!("its header has no {name}");
    let (_, after) = header.split_once(&format!("'{name}':")).ok_or_else(missing)?;
    let after = after.trim_start();
    let end = if after.starts_with('(') { after.find(')').map(|i| i + 1) } else { after.find([',', '}']) };
    Ok(after[..end.ok_or_else(missing)?].trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn shapes_of_none_one_and_two_dimensions() {
        for (shape, expected) in [("()", vec![]), ("(1,)", vec![1]), ("(1, 1)", vec![1, 1])] {
            let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}      \n");
            let array = parse::<f32>(&npy(&header, &1.5_f32.to_le_bytes())).unwrap();
            assert_eq!((array.shape, array.values), (expected, vec![1.5]));
        }
        let header = "{'descr': '<i8', 'fortran_order': False, 'shape': (2,)}";
        let data: Vec<u8> = [-3_i64, 1 << 40].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(parse::<i64>(&npy(header, &data)).unwrap().values, [-3, 1 << 40]);
    }

    #[test]
    fn other_files_are_refused() {
        let good = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}";
        assert!(parse::<f32>(&npy(good, &[0; 8])).is_ok());
        assert!(parse::<f32>(&npy(good, &[0; 7])).is_err());
        assert!(parse::<i64>(&npy(good, &[0; 16])).is_err());
        assert!(parse::<f32>(&npy(&good.replace("False", "True"), &[0; 8])).is_err());
        let whole = npy(good, &[0; 8]);
        for length in 0..whole.len() {
            assert!(parse::<f32>(&whole[..length]).is_err(), "cut at {length}");
        }
    }
}
