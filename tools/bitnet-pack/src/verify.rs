//! Whether an image is sound: header, lengths, zeros where zeros must be, every checksum, and every weight's code.
use crate::Error;
use crate::files::Input;
use crate::report::{Progress, SectionReport};
use bitnet_kernel::{Block, BlockMatrix, Format, Matrix};
use bitnet_runtime::Image;
use bitnet_runtime::error::ImageError;
use bitnet_runtime::image::kept::{kept, mask_blocks};
use bitnet_runtime::image::split::{self, Columns, norm};
use bitnet_runtime::image::{Encoding, HEADER_BYTES_MAX, Kind, PREFIX_BYTES, Record, UNIT_ROWS};
use bitnet_runtime::tokenizer::definition;
use kitoken::{Definition, Kitoken};
use std::path::Path;
use xxhash_rust::xxh3::Xxh3Default;
use zerocopy::{FromBytes, IntoBytes};

/// What was verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Bytes of the image.
    pub bytes: u64,
    /// Its sections.
    pub sections: usize,
    /// Weights in its matrices.
    pub weights: u64,
}

/// An image's file and the bytes of its header. Nothing has been believed yet.
#[derive(Debug)]
pub struct Opened {
    input: Input,
    header: Vec<u8>,
}

impl Opened {
    /// Reads as much of a file as a header can take.
    ///
    /// # Errors
    /// If it is no regular file, or does not start as an image does.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let input = Input::open(path)?;
        let mut start = vec![0; input.bytes.min(PREFIX_BYTES as u64) as usize];
        input.read_at(0, &mut start)?;
        let claimed = Image::header_bytes(&start).map_err(|error| Error::Image { path: path.into(), error })?;
        // The claim is capped by what is allowed and by what is there; the validator tells what is wrong with it.
        let most = (PREFIX_BYTES + HEADER_BYTES_MAX as usize).min(usize::try_from(input.bytes).unwrap_or(usize::MAX));
        let mut header = vec![0; claimed.min(most)];
        input.read_at(0, &mut header)?;
        Ok(Self { input, header })
    }
    /// The checked header.
    ///
    /// # Errors
    /// What the validator says.
    pub fn image(&self) -> Result<Image<'_>, Error> {
        Image::check(&self.header, self.input.bytes).map_err(|error| self.wrong(error))
    }
    /// Reads bytes of a section.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.input.read_at(offset, into)
    }
    fn wrong(&self, error: ImageError) -> Error {
        Error::Image { path: self.input.path.clone(), error }
    }
    fn damaged(&self, offset: u64, what: impl Into<String>) -> Error {
        Error::Damaged { path: self.input.path.clone(), offset, what: what.into() }
    }
}

/// Verifies all of an image.
///
/// # Errors
/// The first thing that is wrong.
pub fn verify(path: &Path) -> Result<Verified, Error> {
    verify_with(path, &mut ())
}

/// [`verify`], telling how far it is. Every byte is read twice, and counts half each time.
///
/// # Errors
/// The first thing that is wrong.
pub fn verify_with(path: &Path, progress: &mut dyn Progress) -> Result<Verified, Error> {
    let opened = Opened::open(path)?;
    let image = opened.image()?;
    progress.start(image.file_bytes());
    let mut verifier = Verifier { opened: &opened, progress, buffer: Vec::new() };
    let mut end = opened.header.len() as u64;
    let mut weights = 0;
    for (index, record) in image.sections().records().iter().enumerate() {
        let start = u64::from(record.start.get()) * Block::BYTES as u64;
        verifier.zeros(end, start)?;
        verifier.section(&image, index, record)?;
        end = start + u64::from(record.blocks.get()) * Block::BYTES as u64;
        weights += SectionReport::of(record).map_or(0, |s| s.weights());
    }
    let sections = image.sections().records().len();
    Ok(Verified { bytes: image.file_bytes(), sections, weights })
}

/// Bytes that are read at once where a section has no units.
const CHUNK: usize = 1 << 18;

struct Verifier<'a> {
    opened: &'a Opened,
    progress: &'a mut dyn Progress,
    buffer: Vec<Block>,
}

impl Verifier<'_> {
    fn read(&mut self, offset: u64, blocks: usize) -> Result<&[Block], Error> {
        if self.progress.cancelled() {
            return Err(Error::Interrupted);
        }
        if self.buffer.len() < blocks {
            self.buffer.resize(blocks, Block::ZERO);
        }
        let buffer = &mut self.buffer[..blocks];
        self.opened.input.read_at(offset, buffer.as_mut_bytes())?;
        self.progress.advance((blocks * Block::BYTES / 2) as u64);
        Ok(buffer)
    }

    fn zeros(&mut self, from: u64, to: u64) -> Result<(), Error> {
        let mut padding = vec![0; (to - from) as usize];
        self.opened.input.read_at(from, &mut padding)?;
        match padding.iter().position(|&b| b != 0) {
            Some(at) => Err(self.opened.damaged(from + at as u64, "padding that is not zero")),
            None => Ok(()),
        }
    }

    fn section(&mut self, image: &Image<'_>, index: usize, record: &Record) -> Result<(), Error> {
        let report = SectionReport::of(record).expect("the record was checked");
        self.progress.section(&format!("checking {}", name(&report)));
        let mut sum = Xxh3Default::new();
        let offset = u64::from(record.start.get()) * Block::BYTES as u64;
        // The checksum first: damage is better named as such than as one of its consequences.
        let mut at = 0;
        while at < record.blocks.get() as usize {
            let blocks = (record.blocks.get() as usize - at).min(CHUNK / Block::BYTES);
            sum.update(self.read(offset + (at * Block::BYTES) as u64, blocks)?.as_bytes());
            at += blocks;
        }
        if sum.digest() != record.checksum.get() {
            return Err(self.opened.wrong(ImageError::SectionChecksum { index: index as u32, kind: report.kind }));
        }
        match report.encoding {
            Encoding::Matrix(_) => self.matrix(record, &report),
            Encoding::Vector => self.vector(record, &report),
            Encoding::Kept => self.masks(image, index, record, &report),
            Encoding::Whole => Ok(()),
            Encoding::Starts => self.starts(record, &report),
            Encoding::Blocks(_) => self.blocks(image, index, record, &report),
            Encoding::Bytes if report.kind == Kind::HeadNorms => self.split_head(image, record),
            Encoding::Bytes => self.tokenizer(image),
        }
    }

    fn vector(&mut self, record: &Record, report: &SectionReport) -> Result<(), Error> {
        let offset = u64::from(record.start.get()) * Block::BYTES as u64;
        let blocks = self.read(offset, record.blocks.get() as usize)?;
        let values = <[f32]>::ref_from_bytes(blocks.as_bytes()).expect("a block is 16 floats");
        let wrong = values
            .iter()
            .enumerate()
            .find(|&(i, v)| if i < report.cols as usize { !v.is_finite() } else { v.to_bits() != 0 });
        match wrong {
            Some((i, v)) => {
                let what = format!("{}: element {i} is {v}", name(report));
                Err(self.opened.damaged(offset + 4 * i as u64, what))
            }
            None => Ok(()),
        }
    }

    /// The masks of a compacted linear keep as many rows and columns as the matrix after them has, and none past the end.
    fn masks(&mut self, image: &Image<'_>, index: usize, record: &Record, report: &SectionReport) -> Result<(), Error> {
        let offset = u64::from(record.start.get()) * Block::BYTES as u64;
        let linear = &image.sections().records()[index + 1];
        let blocks = self.read(offset, record.blocks.get() as usize)?;
        let (rows, cols) = blocks.split_at(mask_blocks(report.rows) as usize);
        let masks = [("rows", rows, report.rows, linear.rows.get()), ("columns", cols, report.cols, linear.cols.get())];
        let wrong = masks.into_iter().find_map(|(what, mask, whole, expected)| {
            let (found, last) = (kept(mask).count(), kept(mask).last());
            (found != expected as usize || last.is_some_and(|last| last >= whole as usize))
                .then(|| format!("{}: the mask of {what} keeps {found} of {whole}, not {expected}", name(report)))
        });
        wrong.map_or(Ok(()), |what| Err(self.opened.damaged(offset, what)))
    }

    /// The padding of an index of starts; the starts themselves are looked at with their units.
    fn starts(&mut self, record: &Record, report: &SectionReport) -> Result<(), Error> {
        let offset = u64::from(record.start.get()) * Block::BYTES as u64;
        let used = (report.rows as usize).div_ceil(UNIT_ROWS) * size_of::<u32>();
        let blocks = self.read(offset, record.blocks.get() as usize)?;
        match blocks.as_bytes()[used..].iter().position(|&byte| byte != 0) {
            Some(at) => Err(self.opened.damaged(offset + (used + at) as u64, "padding that is not zero")),
            None => Ok(()),
        }
    }

    /// Units of a block-sparse matrix start where their index says and are as long as their bitmaps say, and no code is 3.
    fn blocks(
        &mut self,
        image: &Image<'_>,
        index: usize,
        record: &Record,
        report: &SectionReport,
    ) -> Result<(), Error> {
        let tensor = record.block_tensor().expect("a block-sparse matrix");
        let starts = image.sections().records()[index - 1].extent();
        let recorded = self.read(u64::from(starts.start) * Block::BYTES as u64, starts.blocks as usize)?;
        let (recorded, _) = recorded.as_bytes().as_chunks::<4>();
        let recorded: Vec<u32> =
            recorded.iter().take(tensor.units() as usize).map(|bytes| u32::from_le_bytes(*bytes)).collect();
        let mut sound = recorded.clone();
        tensor.sound_starts(&mut sound);
        let at = |block: u32| u64::from(block) * Block::BYTES as u64;
        if sound != recorded || sound[0] != 0 {
            let what = format!("{}: starts of units that do not rise from zero to the end", name(report));
            return Err(self.opened.damaged(at(starts.start), what));
        }
        for u in 0..tensor.units() {
            let (extent, rows) = (tensor.unit(&sound, u), tensor.unit_rows(u));
            let blocks = self.read(at(extent.start), extent.blocks as usize)?;
            let wrong = match BlockMatrix::new(tensor.shape, rows, tensor.cols as usize, blocks) {
                None => Some((0, "bitmaps that disagree with the length")),
                Some(_) => {
                    let bitmaps = tensor.shape.bitmap_blocks(rows, tensor.cols as usize);
                    invalid(Format::T2, &blocks[bitmaps..]).map(|(block, what)| (bitmaps + block, what))
                }
            };
            if let Some((block, what)) = wrong {
                let what = format!("{}: {what} in rows from {}", name(report), u as usize * UNIT_ROWS);
                return Err(self.opened.damaged(at(extent.start) + (block * Block::BYTES) as u64, what));
            }
        }
        Ok(())
    }

    fn matrix(&mut self, record: &Record, report: &SectionReport) -> Result<(), Error> {
        let tensor = record.tensor().expect("a matrix");
        for u in 0..tensor.units() {
            let (extent, rows) = (tensor.unit(u), tensor.unit_rows(u));
            let offset = u64::from(extent.start) * Block::BYTES as u64;
            let weights = tensor.weight_blocks(rows);
            let blocks = self.read(offset, extent.blocks as usize)?;
            let (codes, scales) = blocks.split_at(weights);
            if let Some((block, what)) = invalid(tensor.format, codes) {
                let what = format!("{}: {what} in rows from {}", name(report), u as usize * UNIT_ROWS);
                return Err(self.opened.damaged(offset + (block * Block::BYTES) as u64, what));
            }
            let scales = <[f32]>::ref_from_bytes(scales.as_bytes()).expect("a block is 16 floats");
            let bad = |&(r, s): &(usize, &f32)| if r < rows { !s.is_finite() } else { s.to_bits() != 0 };
            if let Some((r, scale)) = scales.iter().enumerate().find(bad) {
                let what = format!("{}: the scale of row {} is {scale}", name(report), u as usize * UNIT_ROWS + r);
                return Err(self.opened.damaged(offset + (weights * Block::BYTES + 4 * r) as u64, what));
            }
        }
        Ok(())
    }

    /// A head in two planes: both have the same scales, steps are bytes, and no norm is less than it says, on which the second
    /// stage relies. `record` is that of the norms.
    fn split_head(&mut self, image: &Image<'_>, record: &Record) -> Result<(), Error> {
        let section = |kind| image.sections().find(kind, None).expect("the section is beside this one");
        let floats =
            |blocks: &[Block]| <[f32]>::ref_from_bytes(blocks.as_bytes()).expect("a block is 16 floats").to_vec();
        let at = |start: u32| u64::from(start) * Block::BYTES as u64;
        let columns = section(Kind::HeadColumns).extent();
        let columns = Columns::from_floats(&floats(self.read(at(columns.start), columns.blocks as usize)?));
        let parts =
            [Kind::Head, Kind::HeadApart, Kind::HeadLow].map(|kind| section(kind).tensor().expect("it is a matrix"));
        for u in 0..parts[0].units() {
            let rows = parts[0].unit_rows(u);
            let offset = at(record.start.get()) + u64::from(u) * (split::NORM_BLOCKS * Block::BYTES) as u64;
            let norms = split::norms(self.read(offset, split::NORM_BLOCKS)?).to_vec();
            let mut scales = Vec::new();
            let mut least = Vec::new();
            for tensor in parts {
                let blocks = self.read(at(tensor.unit(u).start), tensor.unit(u).blocks as usize)?;
                let (weights, row_scales) = blocks.split_at(tensor.weight_blocks(rows));
                scales.push(floats(row_scales));
                let w = Matrix::new(tensor.format, rows, tensor.cols as usize, weights).expect("a unit");
                least = (0..rows).map(|r| low_norm(&w, r, &columns)).collect();
            }
            let bits = |part: usize, r: usize| scales[part][r].to_bits();
            for (r, &norm) in norms.iter().enumerate() {
                let what = match r < rows {
                    true if bits(0, r) != bits(2, r) => "the scales of its planes differ",
                    true if split::step(scales[1][r]) as f32 != scales[1][r] || scales[1][r] == 0.0 => {
                        "its step is no whole number from 1 to 255"
                    }
                    true if u32::from(norm) < least[r] => "its norm is too low",
                    false if norm != 0 => "padding that is not zero",
                    _ => continue,
                };
                let what = format!("head_norms: row {}: {what}", u as usize * UNIT_ROWS + r);
                return Err(self.opened.damaged(offset + (r * size_of::<u16>()) as u64, what));
            }
        }
        Ok(())
    }

    fn tokenizer(&mut self, image: &Image<'_>) -> Result<(), Error> {
        let (extent, bytes) = image.tokenizer().expect("it has one");
        let offset = u64::from(extent.start) * Block::BYTES as u64;
        let blocks = self.read(offset, extent.blocks as usize)?;
        let (tokenizer, padding) = blocks.as_bytes().split_at(bytes);
        if let Some(at) = padding.iter().position(|&b| b != 0) {
            return Err(self.opened.damaged(offset + (bytes + at) as u64, "padding that is not zero"));
        }
        loads(tokenizer).map_err(|what| self.opened.damaged(offset, format!("the tokenizer does not load: {what}")))
    }
}

/// Whether the runtime can load a tokenizer; if not, why.
fn loads(serialized: &[u8]) -> Result<(), String> {
    let loaded = Definition::from_slice(serialized).map_err(|e| e.to_string())?;
    definition::check(&loaded)?;
    Kitoken::from_definition(loaded).map(drop).map_err(|e| e.to_string())
}

/// The norm of row `r` without the columns apart.
fn low_norm(w: &Matrix<'_>, r: usize, columns: &Columns) -> u32 {
    let mut row: Vec<i8> = (0..w.cols()).map(|c| w.weight(r, c)).collect();
    let _ = columns.take(&mut row);
    norm(&row)
}

fn name(report: &SectionReport) -> String {
    match report.layer {
        Some(layer) => format!("layer {layer}: {}", report.kind.name()),
        None => report.kind.name().into(),
    }
}

/// The first block with a code that stands for no weight.
fn invalid(format: Format, codes: &[Block]) -> Option<(usize, &'static str)> {
    if format.is_grouped() {
        return codes.chunks_exact(format.step_blocks()).enumerate().find_map(|(i, step)| {
            let (panel, scales) = step.split_at(format.panel_blocks());
            let scales =
                || invalid(Format::F16, scales).map(|(at, _)| (panel.len() + at, "a scale that is not finite"));
            invalid(format.base(), panel).or_else(scales).map(|(at, what)| (i * step.len() + at, what))
        });
    }
    let (what, bad): (_, fn(&Block) -> bool) = match format {
        Format::B1 | Format::I4 => return None,
        Format::T2 | Format::T2R => ("code 3", |block| any(block, |b| b & b >> 1 & 0x55 != 0)),
        Format::TL => ("nibble 14 or 15", |block| any(block, |b| b & 0x0e == 0x0e || b & 0xe0 == 0xe0)),
        Format::I8 => ("-128", |block| any(block, |b| b == 0x80)),
        Format::B1G | Format::TLG | Format::I4G | Format::I2G | Format::I3G => {
            unreachable!("its panels were looked at")
        }
        Format::F16 => ("a value that is not finite", |block| {
            block.0.chunks_exact(2).fold(false, |found, b| found | (b[1] & 0x7c == 0x7c))
        }),
    };
    let signs = |i: usize| format == Format::TL && i.is_multiple_of(format.step_blocks());
    codes.iter().enumerate().find(|(i, block)| !signs(*i) && bad(block)).map(|(i, _)| (i, what))
}

/// Whether any byte is such, without a branch for each.
fn any(block: &Block, bad: impl Fn(u8) -> bool) -> bool {
    block.0.iter().fold(false, |found, &b| found | bad(b))
}
