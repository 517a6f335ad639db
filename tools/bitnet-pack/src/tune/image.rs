//! An image is laid out anew from its own weights.
use super::{Timer, Tuner, Tuning};
use crate::Error;
use crate::encode::encode;
use crate::kept::{Found, Kept, Zeros};
use crate::reorder::RECORD;
use crate::report::{Progress, SectionReport};
use crate::verify::{Opened, verify_with};
use crate::weights::{Unit, Whole};
use crate::write::{ImageWriter, Layout, Parts};
use bitnet_kernel::blocks::{STRIP_ROWS, encode_unit};
use bitnet_kernel::{Block, Format};
use bitnet_runtime::Config;
use bitnet_runtime::image::{Encoding, Image, Kind, Record, Section, UNIT_ROWS, expected_sections};
use std::path::Path;
use zerocopy::IntoBytes;

/// What became of an image.
#[derive(Clone, Debug)]
pub struct Retuned {
    /// What was chosen, and why.
    pub tuning: Tuning,
    /// Length before.
    pub before: u64,
    /// Length now.
    pub after: u64,
}

/// Chooses the layout of every linear of `image` by what `timer` says, and writes the result as `output`, which may be the same
/// file. Weights stay what they are, and so do logits, bit for bit. Scales of rows that are left out are lost: where they come
/// back, they are 0, as the weights they multiply.
///
/// Linears in half precision and of grouped formats stay as they are, and so do up and down where they are stored for a live
/// feed-forward layer. Memory is that of the largest linear's masks and of one unit, and what the timer takes.
///
/// # Errors
/// If the image is not sound, or the system refuses. Then nothing is there under the name `output` that was not there before.
pub fn tune(image: &Path, output: &Path, timer: &mut dyn Timer, progress: &mut dyn Progress) -> Result<Retuned, Error> {
    verify_with(image, progress)?;
    let opened = Opened::open(image)?;
    let checked = opened.image()?;
    let header = checked.header();
    let records = checked.sections().records();
    let (tokenizer, records) = match records.split_first() {
        Some((first, rest)) if first.kind == Kind::Tokenizer as u8 => (Some(first), rest),
        _ => (None, records),
    };
    let mut tuner = Tuner::new(timer);
    let mut linears = Vec::new();
    for record in records {
        let report = SectionReport::of(record).expect("the record was checked");
        if report.kind.is_index() {
            continue;
        }
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        let section = Section { kind: report.kind, layer: report.layer, rows: report.rows, cols: report.cols };
        linears.push(Relaid::choose(&opened, &checked, record, section, &mut tuner)?);
    }
    let tuning = tuner.finish();
    // What stays true of weights whose layout stays.
    let order: String = header.tuning.split_inclusive('\n').filter(|line| line.starts_with(RECORD)).collect();

    let sparse = linears.iter().any(|linear| linear.layout != Found::Whole);
    let mut config = Config { sparse, ..header.config };
    let linear_formats = linears.iter().filter(|linear| linear.section.kind.is_linear());
    config.formats = linear_formats.fold(0, |set, linear| set | 1 << linear.encodings().0.tag());
    let parts = Parts {
        config,
        limits: header.plan.limits,
        name: header.provenance.name.into(),
        architecture: header.provenance.architecture.into(),
        bos: header.text.bos,
        stop: header.text.stop,
        chat_template: header.text.chat_template.into(),
        tuning: tuning.to_string() + &order,
    };
    let mut rest = linears.iter();
    let mut sections = Vec::new();
    for section in expected_sections(&config) {
        if section.kind.is_index() {
            let linear = rest.clone().next().expect("the linear comes after its index");
            let encoding = linear.encodings().1;
            sections.push((section, encoding, encoding.blocks(section.rows, section.cols)));
        } else {
            let linear = rest.next().expect("indices are all that changes");
            let (rows, cols) = linear.stored();
            sections.push((Section { rows, cols, ..section }, linear.encodings().0, linear.blocks()));
        }
    }
    let layout = Layout::new(&parts, tokenizer.map(|record| record.cols.get() as usize), sections.into_iter())?;
    let after = layout.file_bytes();
    progress.start(after);
    let mut writer = ImageWriter::create(output, parts, layout)?;
    let mut out = Out { writer: &mut writer, progress };
    if let Some(record) = tokenizer {
        out.copy(&opened, record)?;
    }
    for linear in &linears {
        if sparse && linear.section.kind.has_layouts() {
            out.index(&linear.layout)?;
        }
        linear.write(&opened, &checked, &mut out)?;
    }
    let finished = writer.finish()?;
    verify_with(finished.path(), progress)?;
    finished.publish()?;
    Ok(Retuned { tuning, before: checked.file_bytes(), after })
}

/// A section of the weights, and what becomes of it.
struct Relaid<'a> {
    record: &'a Record,
    /// With the shape of the whole linear.
    section: Section,
    /// The encoding of anything but a linear whose layout can change, and the format of such.
    encoding: Encoding,
    layout: Found,
    /// Whether it is stored as it was.
    same: bool,
}

impl<'a> Relaid<'a> {
    fn choose(
        opened: &Opened,
        image: &Image<'_>,
        record: &'a Record,
        section: Section,
        tuner: &mut Tuner<'_>,
    ) -> Result<Self, Error> {
        let encoding = Encoding::from_tag(record.encoding).expect("the record was checked");
        let relaid = |section, encoding, layout, same| Self { record, section, encoding, layout, same };
        let can_change = section.kind.has_layouts()
            && !matches!(encoding, Encoding::Matrix(format) if format.is_grouped() || format == Format::F16);
        let whole = if can_change { Whole::of(opened, image, record)? } else { None };
        let Some(whole) = whole else { return Ok(relaid(section, encoding, Found::Whole, true)) };
        let section = Section { rows: whole.rows, cols: whole.cols, ..section };
        // What ternary linears have elsewhere in the image; what was in blocks does not say.
        let format = match encoding {
            Encoding::Matrix(format) => format,
            _ if image.header().config.formats & 1 << Format::T2 as u16 != 0 => Format::T2,
            _ => Format::TL,
        };
        let ternary = matches!(format, Format::T2 | Format::TL);
        let mut zeros = Zeros::new(whole.rows as usize, whole.cols as usize, ternary);
        for u in 0..whole.units() {
            let unit = whole.unit(opened, u)?;
            for r in 0..unit.rows {
                let row = unit.row(r);
                zeros.note(u as usize * UNIT_ROWS + r, row.len(), |c| row[c] != 0);
            }
        }
        let layout = tuner.choose(&section, format, zeros);
        let same = layout == Found::Whole && whole.is_stored_whole();
        Ok(relaid(section, Encoding::Matrix(format), layout, same))
    }

    /// The encoding of the section, and of an index before it.
    fn encodings(&self) -> (Encoding, Encoding) {
        match self.encoding {
            Encoding::Matrix(format) => self.layout.encodings(format),
            other => (other, Encoding::Whole),
        }
    }

    /// Rows and columns of the matrix that is stored.
    fn stored(&self) -> (u32, u32) {
        match &self.layout {
            Found::Kept(kept) => kept.shape(),
            _ => (self.section.rows, self.section.cols),
        }
    }

    fn blocks(&self) -> u64 {
        match self.encoding {
            Encoding::Matrix(format) => self.layout.blocks(format, self.section.rows, self.section.cols),
            _ => self.record.blocks.get().into(),
        }
    }

    fn write(&self, opened: &Opened, image: &Image<'_>, out: &mut Out<'_>) -> Result<(), Error> {
        let (Encoding::Matrix(format), false) = (self.encoding, self.same) else {
            return out.copy(opened, self.record);
        };
        out.writer.begin(self.record.scale.get())?;
        let whole = Whole::of(opened, image, self.record)?.expect("a matrix");
        let every = |n: u32| vec![true; n as usize];
        let all = Kept { rows: every(whole.rows), cols: every(whole.cols) };
        let kept = if let Found::Kept(kept) = &self.layout { kept } else { &all };
        let mut rows = Rows::new(format, kept);
        for u in 0..whole.units() {
            let unit = whole.unit(opened, u)?;
            if let Found::Live(live) = &self.layout {
                let (n, cols) = (unit.rows, whole.cols as usize);
                let across = live.shape.across(cols);
                let mut blocks = vec![Block::ZERO; live.shape.unit_blocks(n, cols, n.div_ceil(STRIP_ROWS) * across)];
                let first = u as usize * UNIT_ROWS / STRIP_ROWS;
                let is_live = |s, b| live.is_live(first + s, b);
                let used = encode_unit(live.shape, n, cols, is_live, |r, c| unit.row(r)[c], &mut blocks);
                out.put(blocks[..used].as_bytes())?;
            } else {
                rows.add(u as usize * UNIT_ROWS, &unit, out)?;
            }
        }
        if !matches!(self.layout, Found::Live(_)) {
            rows.flush(out)?;
        }
        out.writer.end()
    }
}

/// Rows on their way into units.
struct Rows<'a> {
    format: Format,
    kept: &'a Kept,
    cols: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
}

impl<'a> Rows<'a> {
    fn new(format: Format, kept: &'a Kept) -> Self {
        Self { format, kept, cols: kept.shape().1 as usize, codes: Vec::new(), scales: Vec::new() }
    }
    /// Adds what is kept of the unit that starts at row `first`.
    fn add(&mut self, first: usize, unit: &Unit, out: &mut Out<'_>) -> Result<(), Error> {
        let stride = self.format.padded_cols(self.cols);
        for r in (0..unit.rows).filter(|r| self.kept.rows[first + r]) {
            let end = self.codes.len() + stride;
            self.codes
                .extend(unit.row(r).iter().zip(&self.kept.cols).filter(|(_, kept)| **kept).map(|(code, _)| *code));
            self.codes.resize(end, 0);
            self.scales.push(unit.row_scales(r)[0]);
            if self.scales.len() == UNIT_ROWS {
                self.flush(out)?;
            }
        }
        Ok(())
    }
    /// Writes the rows there are as a unit.
    fn flush(&mut self, out: &mut Out<'_>) -> Result<(), Error> {
        let rows = self.scales.len();
        if rows == 0 {
            return Ok(());
        }
        let mut blocks = vec![Block::ZERO; self.format.matrix_blocks(rows, self.cols)];
        encode(self.format, rows, self.cols, &self.codes, &mut blocks);
        out.put(blocks.as_bytes())?;
        if self.format.has_row_scales() {
            self.scales.resize(rows.next_multiple_of(Block::BYTES / size_of::<f32>()), 0.0);
            out.put(self.scales.as_bytes())?;
        }
        self.codes.clear();
        self.scales.clear();
        Ok(())
    }
}

/// The image that is written.
struct Out<'a> {
    writer: &'a mut ImageWriter,
    progress: &'a mut dyn Progress,
}

impl Out<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.progress.cancelled() {
            return Err(Error::Interrupted);
        }
        self.progress.advance(bytes.len() as u64);
        self.writer.put(bytes)
    }
    fn index(&mut self, layout: &Found) -> Result<(), Error> {
        self.writer.begin(1.0)?;
        match layout {
            Found::Whole => {}
            Found::Kept(kept) => self.put(kept.masks().as_bytes())?,
            Found::Live(live) => self.put(&live.starts())?,
        }
        self.writer.end()
    }
    /// Writes a section as it is.
    fn copy(&mut self, opened: &Opened, record: &Record) -> Result<(), Error> {
        const CHUNK: usize = 1 << 18;
        self.writer.begin(record.scale.get())?;
        let (mut at, mut left) = (u64::from(record.start.get()) * 64, record.blocks.get() as usize * Block::BYTES);
        let mut bytes = vec![0; CHUNK.min(left)];
        while left > 0 {
            let chunk = &mut bytes[..CHUNK.min(left)];
            opened.read(at, chunk)?;
            self.put(chunk)?;
            (at, left) = (at + chunk.len() as u64, left - chunk.len());
        }
        self.writer.end()
    }
}
