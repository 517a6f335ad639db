//! Finds the sections of a layer in a checked image.
use super::Config;
use super::head::SplitHead;
use crate::image::kept::mask_blocks;
use crate::image::{BlockTensor, Encoding, Image, Kind, Record, Tensor};
use crate::source::Extent;
use bitnet_kernel::Format;

/// The sections of one model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weights<'m> {
    /// One entry a section of the weight region, in execution order.
    records: &'m [Record],
    /// Index of the first layer's first section, and sections in a layer.
    first: usize,
    per_layer: usize,
    /// Sections after the last layer.
    last: usize,
    /// Whether the head is the embedding.
    tied: bool,
}

/// One linear, with the norm of its input if it has one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Linear {
    pub layout: Layout,
    pub input_norm: Option<Extent>,
}

/// How a linear is stored.
#[derive(Clone, Copy, Debug)]
pub(super) enum Layout {
    Whole(Tensor),
    /// What is left of it, and what that is a part of.
    Kept(Tensor, Kept),
    /// Its live blocks, and where the starts of its units are.
    Blocks(BlockTensor, Extent),
}

/// The shape of a whole linear, and the masks of what a compacted one keeps of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    pub rows: u32,
    pub cols: u32,
    pub row_mask: Extent,
    pub col_mask: Extent,
}

impl Linear {
    /// Rows of the whole linear, those of zeros included.
    pub(super) const fn rows(&self) -> usize {
        match self.layout {
            Layout::Whole(tensor) => tensor.rows as usize,
            Layout::Kept(_, kept) => kept.rows as usize,
            Layout::Blocks(tensor, _) => tensor.rows as usize,
        }
    }
    /// Whether it multiplies floats, which are not quantized before.
    pub(super) const fn is_f16(&self) -> bool {
        matches!(self.layout, Layout::Whole(tensor) if matches!(tensor.format, Format::F16))
    }
    /// The matrix, of a linear that is never sparse.
    pub(super) fn whole(&self) -> Tensor {
        let Layout::Whole(tensor) = self.layout else { panic!("a linear without an index") };
        tensor
    }
}

impl<'m> Weights<'m> {
    pub(super) fn new(image: &Image<'m>) -> Self {
        let config: &Config = &image.header().config;
        let records = &image.sections().records()[usize::from(image.tokenizer().is_some())..];
        let first = usize::from(!config.recurrence) + usize::from(!config.tied);
        let last =
            if config.split_head { 6 } else { 2 + usize::from(config.linear_head && config.linear_norm_eps.is_some()) };
        let per_layer = (records.len() - first - last) / config.layers as usize;
        Self { records, first, per_layer, last, tied: config.tied }
    }
    /// The angles a position turns by.
    pub(super) const fn rope_frequencies(&self) -> Extent {
        self.records[0].extent()
    }
    /// The embedding's matrix: the head's where they are tied.
    pub(super) fn embedding(&self) -> Tensor {
        if self.tied { self.head() } else { tensor(&self.records[self.first - 1]) }
    }
    /// All that one pass reads, head included.
    pub(super) fn all(&self) -> Extent {
        let start = self.records[0].start.get();
        Extent { start, blocks: self.end()[self.last - 1].extent().end() - start }
    }
    /// What a pass reads that computes no logits.
    pub(super) fn before_head(&self) -> Extent {
        let start = self.records[0].start.get();
        Extent { start, blocks: self.final_norm().start - start }
    }
    /// The sections after the last layer.
    fn end(&self) -> &'m [Record] {
        &self.records[self.records.len() - self.last..]
    }
    pub(super) fn final_norm(&self) -> Extent {
        self.end()[0].extent()
    }
    /// What the head normalizes its input with, if it does.
    pub(super) fn head_input_norm(&self) -> Option<Extent> {
        match self.end() {
            [_, norm, _] => Some(norm.extent()),
            _ => None,
        }
    }
    /// The head's matrix; its high plane if it is in two.
    pub(super) fn head(&self) -> Tensor {
        tensor(&self.end()[if self.last == 2 { 1 } else { 2 }])
    }
    /// The head in two planes, if it is.
    pub(super) fn split_head(&self) -> Option<SplitHead> {
        match self.end() {
            [_, columns, high, apart, norms, low] => Some(SplitHead {
                columns: columns.extent(),
                high: tensor(high),
                apart: tensor(apart),
                norms: norms.extent(),
                low: tensor(low),
            }),
            _ => None,
        }
    }
    /// The sections of one layer.
    pub(super) fn layer(&self, layer: u32) -> Layer<'m> {
        Layer(&self.records[self.first + layer as usize * self.per_layer..][..self.per_layer])
    }
}

/// The sections of one layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layer<'m>(&'m [Record]);

impl Layer<'_> {
    /// A norm of this layer, which may not have it.
    pub(super) fn norm(&self, kind: Kind) -> Option<Extent> {
        self.0.iter().find(|r| r.kind == kind as u8).map(Record::extent)
    }
    /// A vector that this layer has.
    pub(super) fn vector(&self, kind: Kind) -> Extent {
        self.norm(kind).expect("a checked layer has all that the configuration asks for")
    }
    /// A linear of this layer, with what the sections before it say of it.
    pub(super) fn linear(&self, kind: Kind) -> Linear {
        let find = |kind: Kind| self.0.iter().find(|r| r.kind == kind as u8);
        let record = find(kind).expect("a checked layer has all its linears");
        let index = find(kind.index()).map(|r| (r, Encoding::from_tag(r.encoding)));
        let layout = match (index, record.block_tensor()) {
            (Some((index, _)), Some(blocks)) => Layout::Blocks(blocks, index.extent()),
            (Some((index, Some(Encoding::Kept))), None) => Layout::Kept(tensor(record), kept(index)),
            _ => Layout::Whole(tensor(record)),
        };
        let input_norm = Some(kind.input_norm()).filter(|&norm| norm != kind).and_then(|norm| self.norm(norm));
        Linear { layout, input_norm }
    }
}

/// The masks of an index.
fn kept(record: &Record) -> Kept {
    let (rows, cols, Extent { start, .. }) = (record.rows.get(), record.cols.get(), record.extent());
    let row_mask = Extent { start, blocks: mask_blocks(rows) };
    Kept { rows, cols, row_mask, col_mask: Extent { start: row_mask.end(), blocks: mask_blocks(cols) } }
}

fn tensor(record: &Record) -> Tensor {
    record.tensor().expect("a checked matrix")
}
