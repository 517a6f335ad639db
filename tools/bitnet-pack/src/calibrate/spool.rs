//! Quantized linears on disk, until it is known which of them the image takes.
use super::Linear;
use super::gptq::Quantized;
use crate::Error;
use bitnet_kernel::Format;
use core::ops::Range;
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

/// A file without a name, which is gone when the program is. A code takes half a byte.
#[derive(Debug)]
pub(crate) struct Spool {
    directory: PathBuf,
    file: File,
    end: u64,
    /// The parts of each, in the order of their rows.
    parts: HashMap<(Linear, Format), Vec<Part>>,
}

/// Rows that were put together.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// Where its bytes begin.
    at: u64,
    first: usize,
    rows: usize,
    cols: usize,
}

impl Spool {
    /// An empty one in a directory.
    pub(crate) fn new(directory: &Path) -> Result<Self, Error> {
        let file = tempfile::tempfile_in(directory).map_err(|e| Error::io(directory, "write in", e))?;
        Ok(Self { directory: directory.into(), file, end: 0, parts: HashMap::new() })
    }
    pub(crate) fn has(&self, linear: Linear, format: Format) -> bool {
        self.parts.contains_key(&(linear, format))
    }

    /// Adds the rows that come after those that were put before.
    pub(crate) fn put(&mut self, linear: Linear, format: Format, quantized: &Quantized) -> Result<(), Error> {
        let pairs = quantized.codes.chunks(2);
        let mut bytes: Vec<u8> = pairs.map(|pair| pair.iter().rev().fold(0, |b, &c| b << 4 | (c + 8) as u8)).collect();
        bytes.extend_from_slice(quantized.scales.as_bytes());
        let io = |e| Error::io(&self.directory, "write in", e);
        (&self.file).seek(SeekFrom::Start(self.end)).map_err(io)?;
        (&self.file).write_all(&bytes).map_err(io)?;
        let (rows, cols) = (quantized.codes.len() / quantized.cols, quantized.cols);
        let parts = self.parts.entry((linear, format)).or_default();
        let first = parts.last().map_or(0, |part| part.first + part.rows);
        parts.push(Part { at: self.end, first, rows, cols });
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Some rows, which begin and end at even ones or at the ends of what was put together.
    ///
    /// # Panics
    /// If they are not there.
    pub(crate) fn rows(&self, linear: Linear, format: Format, rows: Range<usize>) -> Result<Quantized, Error> {
        let parts = &self.parts[&(linear, format)];
        let cols = parts[0].cols;
        let mut out = Quantized { cols, codes: Vec::new(), scales: Vec::new() };
        let inside = |part: &Part| rows.start.max(part.first)..rows.end.min(part.first + part.rows);
        for (part, inside) in parts.iter().map(|part| (part, inside(part))).filter(|(_, inside)| !inside.is_empty()) {
            self.append(part, inside.start - part.first..inside.end - part.first, &mut out)?;
        }
        assert_eq!(out.codes.len(), rows.len() * cols, "{linear} in {}, rows {rows:?}", format.name());
        Ok(out)
    }

    /// Adds some rows of a part.
    fn append(&self, part: &Part, rows: Range<usize>, out: &mut Quantized) -> Result<(), Error> {
        assert!(rows.start.is_multiple_of(2));
        let groups = part.cols.div_ceil(Format::GROUP_COLS);
        let count = rows.len() * part.cols;
        let mut bytes = vec![0; count.div_ceil(2)];
        self.read(part.at + (rows.start * part.cols / 2) as u64, &mut bytes)?;
        let codes = bytes.iter().flat_map(|b| [(b & 15) as i8 - 8, (b >> 4) as i8 - 8]);
        out.codes.extend(codes.take(count));
        let mut scales = vec![0u16; rows.len() * groups];
        let first = part.at + (part.rows * part.cols).div_ceil(2) as u64 + (rows.start * groups * 2) as u64;
        self.read(first, scales.as_mut_bytes())?;
        out.scales.extend(scales);
        Ok(())
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Error> {
        let read = (&self.file).seek(SeekFrom::Start(at)).and_then(|_| (&self.file).read_exact(into));
        read.map_err(|e| Error::io(&self.directory, "read in", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_runtime::image::Kind;

    /// Odd numbers of codes, the extremes of every format, parts that start in the middle.
    #[test]
    fn what_is_put_comes_back() {
        let place = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(place.path()).unwrap();
        let make = |rows: usize, cols: usize| Quantized {
            cols,
            codes: (0..rows * cols).map(|i| (i * 7 % 16) as i8 - 8).collect(),
            scales: (0..rows * cols.div_ceil(128)).map(|i| i as u16 * 257).collect(),
        };
        let (a, b) = (Linear::new(0, Kind::Query), Linear::new(0, Kind::Down));
        let (of_a, of_b) = (make(5, 131), make(70, 3));
        spool.put(a, Format::I4G, &of_a).unwrap();
        spool.put(b, Format::I3G, &of_b).unwrap();
        assert_eq!(spool.rows(a, Format::I4G, 0..5).unwrap(), of_a);
        let part = spool.rows(b, Format::I3G, 64..70).unwrap();
        assert_eq!((&part.codes[..], &part.scales[..]), (&of_b.codes[64 * 3..], &of_b.scales[64..]));
        // More rows of the same linear, and what reaches from one part into the next.
        let more = make(4, 3);
        spool.put(b, Format::I3G, &more).unwrap();
        let both = spool.rows(b, Format::I3G, 68..72).unwrap();
        assert_eq!(both.codes, [&of_b.codes[68 * 3..], &more.codes[..2 * 3]].concat());
        assert_eq!(both.scales, [&of_b.scales[68..], &more.scales[..2]].concat());
        assert!(spool.has(a, Format::I4G) && !spool.has(a, Format::I3G));
    }
}
