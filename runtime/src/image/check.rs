//! The one validator.
use super::header::{Header, prefix_checksum};
use super::section::{Encoding, Kind, Record, Section, Sections, Tensor, expected_sections};
use super::{HEADER_BYTES_MAX, MAGIC, PREFIX_BYTES, TOKENIZER_BYTES_MAX, VERSION, WEIGHTS_ALIGN};
use crate::error::{Foreign, ImageError};
use crate::source::Extent;
use bitnet_kernel::{Block, Format};
use zerocopy::FromBytes;

/// A header that was checked: every section lies inside the file, has the size that its shape needs, and is what the
/// configuration asks for at its place.
///
/// Limits: those of [`crate::Config::check`]; header [`HEADER_BYTES_MAX`]; tokenizer [`TOKENIZER_BYTES_MAX`]; file 256 GiB (block
/// numbers have 32 bits). Weights' codes and checksums of sections are not looked at, which would take time in
/// proportion to the file: `bitnet-pack verify` does that.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    header: Header<'a>,
    sections: Sections<'a>,
    file_bytes: u64,
    id: u64,
}

impl<'a> Image<'a> {
    /// Bytes from the start of the file that [`Image::check`] needs, told from the first 64.
    ///
    /// # Errors
    /// If they do not start an image.
    pub fn header_bytes(start: &[u8]) -> Result<usize, ImageError> {
        let prefix = prefix(start)?;
        Ok(PREFIX_BYTES + u32_at(prefix, 12) as usize)
    }

    /// Bytes of the whole file, told from the first 64: for a medium that is longer than the image on it.
    ///
    /// # Errors
    /// If they do not start an image.
    pub fn stated_bytes(start: &[u8]) -> Result<u64, ImageError> {
        Ok(u64_at(prefix(start)?, 16))
    }

    /// Checks the start of a file, at least [`Image::header_bytes`] of it, in time proportional to the number of sections.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(start: &'a [u8], file_bytes: u64) -> Result<Self, ImageError> {
        let prefix = prefix(start)?;
        let header_len = u32_at(prefix, 12);
        let too_long = |max| ImageError::HeaderLength { bytes: header_len, max };
        if header_len > HEADER_BYTES_MAX {
            return Err(too_long(HEADER_BYTES_MAX));
        }
        let rest = &start[PREFIX_BYTES..];
        let header = rest.get(..header_len as usize).ok_or(too_long(rest.len() as u32))?;
        if prefix_checksum(prefix, header) != u64_at(prefix, 24) {
            return Err(ImageError::HeaderChecksum);
        }
        if let Some(i) = prefix[32..].iter().position(|&b| b != 0) {
            return Err(ImageError::Reserved { offset: 32 + i as u64 });
        }
        let expected = u64_at(prefix, 16);
        if expected != file_bytes {
            return Err(ImageError::Length { expected, found: file_bytes });
        }
        let (decoded, left) =
            postcard::take_from_bytes::<Header<'a>>(header).map_err(|_| ImageError::HeaderEncoding)?;
        if !left.is_empty() {
            return Err(ImageError::HeaderEncoding);
        }
        let sections = <[Record]>::ref_from_bytes(decoded.sections).map_err(|_| ImageError::HeaderEncoding)?;
        let id = u64_at(prefix, 24);
        let image = Self { header: decoded, sections: Sections(sections), file_bytes, id };
        image.header.config.check()?;
        image.check_text()?;
        image.check_sections(PREFIX_BYTES as u64 + u64::from(header_len))?;
        image.check_plan()?;
        Ok(image)
    }

    fn check_text(&self) -> Result<(), ImageError> {
        let (text, vocab) = (&self.header.text, self.header.config.vocab);
        let outside = |field, value: u32| Err(ImageError::Config { field, value: value.into() });
        match text.bos {
            Some(bos) if bos >= vocab => return outside("bos", bos),
            _ => {}
        }
        if !text.stop.is_sound(vocab) {
            return outside("stop ids", text.stop.ids().iter().copied().max().unwrap_or(0));
        }
        if text.chat_template.len() > super::CHAT_TEMPLATE_MAX {
            return outside("chat template length", text.chat_template.len() as u32);
        }
        Ok(())
    }

    /// Walks the table beside what the configuration asks for. Each section starts where the one before it ends.
    fn check_sections(&self, header_end: u64) -> Result<(), ImageError> {
        let config = &self.header.config;
        let (tokenizer, weights) = match self.sections.0.split_first() {
            Some((first, rest)) if first.kind == Kind::Tokenizer as u8 => (Some(first), rest),
            _ => (None, self.sections.0),
        };
        let index_of_first = u32::from(tokenizer.is_some());
        let mut end = header_end.div_ceil(Block::BYTES as u64);
        if let Some(record) = tokenizer {
            let size = Section { kind: Kind::Tokenizer, layer: None, rows: 1, cols: record.cols.get() };
            if record.cols.get() > TOKENIZER_BYTES_MAX {
                return Err(ImageError::Section { index: 0, expected: Kind::Tokenizer, field: "length" });
            }
            check_record(0, record, &size, &mut end)?;
        }
        end = end.next_multiple_of(WEIGHTS_ALIGN / Block::BYTES as u64);

        let (mut found, mut formats) = (0, 0);
        let mut records = weights.iter();
        // What the index said of the linear to come.
        let mut layout = None;
        for expected in expected_sections(config) {
            let index = index_of_first + found;
            let Some(record) = records.next() else {
                let expected = expected_sections(config).count() as u32;
                return Err(ImageError::SectionCount { expected, found });
            };
            let found_encoding = Encoding::from_tag(record.encoding);
            let in_blocks = matches!(found_encoding, Some(Encoding::Blocks(_)));
            let kept = layout == Some(Encoding::Kept);
            // Half-precision linears are whole: what a compacted one gathers is int8.
            let is_f16 = found_encoding == Some(Encoding::Matrix(Format::F16));
            if in_blocks != (layout == Some(Encoding::Starts)) || (kept && is_f16) {
                return Err(ImageError::Section { index, expected: expected.kind, field: "encoding" });
            }
            let expected = if kept { kept_section(index, record, &expected)? } else { expected };
            layout = found_encoding.filter(|_| expected.kind.is_index());
            check_record(index, record, &expected, &mut end)?;
            if config.split_head && expected.kind == Kind::Head && record.encoding != Format::I4 as u8 {
                return Err(ImageError::Section { index, expected: Kind::Head, field: "encoding" });
            }
            let ternary = matches!(found_encoding, Some(Encoding::Matrix(Format::B1 | Format::TL | Format::T2)));
            if expected.kind == Kind::Head && ternary && !config.linear_head {
                return Err(ImageError::Section { index, expected: Kind::Head, field: "encoding" });
            }
            let multiplies = match expected.kind {
                Kind::Head => config.linear_head,
                kind => !matches!(kind, Kind::Embedding | Kind::HeadApart | Kind::HeadLow),
            };
            if multiplies && matches!(found_encoding, Some(Encoding::Matrix(_) | Encoding::Blocks(_))) {
                formats |= 1 << record.encoding;
            }
            found += 1;
        }
        if records.len() > 0 {
            return Err(ImageError::SectionCount { expected: found, found: found + records.len() as u32 });
        }
        if formats != config.formats {
            return Err(ImageError::Config { field: "formats", value: config.formats.into() });
        }
        let expected = end * Block::BYTES as u64;
        if expected != self.file_bytes {
            return Err(ImageError::Length { expected, found: self.file_bytes });
        }
        Ok(())
    }

    /// What the plan is for must be possible. The sizes beside it are what the packer's version needs and are not looked at:
    /// this version computes its own from the same numbers, and whoever gives it less memory gets an error with both.
    fn check_plan(&self) -> Result<(), ImageError> {
        let limits = self.header.plan.limits;
        match limits.check(&self.header.config) {
            Ok(()) => Ok(()),
            Err(_) => Err(ImageError::Config { field: "planned context or batch", value: limits.context.into() }),
        }
    }

    /// The header.
    pub const fn header(&self) -> &Header<'a> {
        &self.header
    }
    /// The section table.
    pub const fn sections(&self) -> Sections<'a> {
        self.sections
    }
    /// One number for the whole image: the checksum of its header, which has those of all sections.
    pub const fn id(&self) -> u64 {
        self.id
    }
    /// Length of the file.
    pub const fn file_bytes(&self) -> u64 {
        self.file_bytes
    }
    /// The head's matrix; its high plane if it is in two.
    ///
    /// # Panics
    /// Never: the check found it.
    pub fn head(&self) -> Tensor {
        let head = self.sections.find(Kind::Head, None).and_then(Record::tensor);
        head.expect("a checked image has a head")
    }
    /// Where the tokenizer lies, and its length in bytes.
    pub fn tokenizer(&self) -> Option<(Extent, usize)> {
        let record = self.sections.0.first().filter(|r| r.kind == Kind::Tokenizer as u8)?;
        Some((record.extent(), record.cols.get() as usize))
    }
}

/// What a compacted linear has of the shape `whole`: some rows and some columns, by its own entry. Whether the masks keep as
/// many is not looked at here; who reads them must stay inside both.
fn kept_section(index: u32, record: &Record, whole: &Section) -> Result<Section, ImageError> {
    let (rows, cols) = (record.rows.get(), record.cols.get());
    if (1..=whole.rows).contains(&rows) && (1..=whole.cols).contains(&cols) {
        return Ok(Section { rows, cols, ..*whole });
    }
    Err(ImageError::Section { index, expected: whole.kind, field: "shape" })
}

/// Checks one entry of the table, and moves `end` to the end of its section.
fn check_record(index: u32, record: &Record, expected: &Section, end: &mut u64) -> Result<(), ImageError> {
    let wrong = |field| ImageError::Section { index, expected: expected.kind, field };
    let layer = expected.layer.map_or(Record::NO_LAYER, |l| l as u16);
    if record.kind != expected.kind as u8 {
        return Err(wrong("kind"));
    }
    if record.layer.get() != layer {
        return Err(wrong("layer"));
    }
    let encoding = Encoding::from_tag(record.encoding).filter(|&e| expected.kind.allows(e));
    let encoding = encoding.ok_or(wrong("encoding"))?;
    if (record.rows.get(), record.cols.get()) != (expected.rows, expected.cols) {
        return Err(wrong("shape"));
    }
    let has_scale = match encoding {
        Encoding::Matrix(format) => format.has_matrix_scale(),
        Encoding::Blocks(_) => true,
        _ => false,
    };
    let scale = record.scale.get();
    if !scale.is_finite() || (!has_scale && scale != 1.0) {
        return Err(wrong("scale"));
    }
    let blocks = u64::from(record.blocks.get());
    let most = encoding.blocks(expected.rows, expected.cols);
    let fits = if matches!(encoding, Encoding::Blocks(_)) { blocks <= most } else { blocks == most };
    if !fits {
        return Err(wrong("length"));
    }
    if u64::from(record.start.get()) != *end {
        return Err(wrong("position"));
    }
    *end += blocks;
    // Everything that a record can name then fits 32-bit block numbers.
    if *end > u64::from(u32::MAX) { Err(wrong("end")) } else { Ok(()) }
}

/// The first 64 bytes of an image of this version.
fn prefix(start: &[u8]) -> Result<&[u8; PREFIX_BYTES], ImageError> {
    let magic = start.len().min(MAGIC.len());
    if start[..magic] != MAGIC[..magic] || start.is_empty() {
        return Err(Foreign::recognise(start).map_or(ImageError::Magic, ImageError::Foreign));
    }
    let prefix = start.first_chunk().ok_or(ImageError::TooShort { bytes: start.len() as u64 })?;
    match u32_at(prefix, 8) {
        VERSION => Ok(prefix),
        version => Err(ImageError::Version(version)),
    }
}

fn u32_at(bytes: &[u8; PREFIX_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; PREFIX_BYTES], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
