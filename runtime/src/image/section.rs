//! Sections: which there are, what they hold, and where.
use super::kept::mask_blocks;
use crate::model::{Config, Memory};
use crate::source::Extent;
use bitnet_kernel::blocks;
use bitnet_kernel::{Block, BlockShape, Format};
use zerocopy::little_endian::{F32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Rows of a *unit*: the part of a matrix that holds all it needs, so that it can be streamed and computed alone.
///
/// A unit is the tiles of 64 rows (fewer in a matrix's last unit) followed, in formats with row scales, by one f32 a row,
/// padded with zeros to whole blocks. Units follow one another.
pub const UNIT_ROWS: usize = 64;

/// One entry of the section table: 32 bytes, little-endian.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Record {
    /// [`Kind`].
    pub kind: u8,
    /// [`Encoding`].
    pub encoding: u8,
    /// The layer, or 65,535.
    pub layer: U16,
    /// Rows of a matrix; 1 of anything else.
    pub rows: U32,
    /// Columns of a matrix, elements of a vector, bytes of anything else.
    pub cols: U32,
    /// First block in the file.
    pub start: U32,
    /// Number of blocks.
    pub blocks: U32,
    /// What all weights of a matrix are multiplied by; 1 where rows have scales of their own.
    pub scale: F32,
    /// [`super::checksum`] of all the blocks.
    pub checksum: U64,
}

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names are the field's standard terms")]
pub enum Kind {
    /// The tokenizer, as kitoken serializes it; the only section before the weight region.
    Tokenizer = 1,
    /// `head_dim / 2` angles in radians a position, scaling for long contexts included; absent if [`Config::recurrence`].
    RopeFrequencies = 2,
    /// `[vocab, hidden]`; absent where the head is the embedding too.
    Embedding = 3,
    AttentionNorm = 16,
    Query = 17,
    Key = 18,
    Value = 19,
    AttentionSubNorm = 20,
    Output = 21,
    FfnNorm = 22,
    Gate = 23,
    Up = 24,
    FfnSubNorm = 25,
    Down = 26,
    /// Up in [`Format::T2R`], if [`Config::live_ffn`].
    UpRows = 27,
    /// `[ffn, hidden]`: down by its columns in [`Format::T2R`], if [`Config::live_ffn`].
    DownColumns = 28,
    /// What the linear before it in name applies to its own input, if [`Config::linear_norm_eps`].
    QueryInputNorm = 33,
    KeyInputNorm = 34,
    ValueInputNorm = 35,
    OutputInputNorm = 37,
    GateInputNorm = 39,
    UpInputNorm = 40,
    DownInputNorm = 42,
    /// `[head_dim]`, one for all query heads, if [`Config::qk_norms`].
    QueryNorm = 48,
    /// `[head_dim]`, one for all key heads.
    KeyNorm = 49,
    /// The rows of all queries, keys and values of [`Config::memory`], or of what its vector takes in and of what decides how much
    /// is kept; then of output gates.
    MemoryInput = 56,
    /// For matrices, rows of what decides how much is kept, one a head, then of what decides how much is written.
    MemoryGates = 57,
    /// `[4][channels]`: the short convolution of all that but the gates.
    MemoryTaps = 58,
    /// For each matrix: the logarithm of a rate, what is added to the first gate, what is added to the second; `[3][heads]`.
    MemoryDecay = 59,
    /// `[value]`, one for all matrices; of a vector `[width]`.
    MemoryNorm = 60,
    MemoryOutput = 61,
    /// `[query width]`: how much of it is added to each of attention's results.
    MemoryShare = 62,
    /// For each number of a vector: the least that is kept of it, what is added to what decides how much is kept; `[2][width]`.
    MemoryForget = 63,
    FinalNorm = 64,
    /// `[vocab, hidden]`; the high plane if [`Config::split_head`].
    Head = 65,
    /// The columns that are in neither plane, if [`Config::split_head`].
    HeadColumns = 66,
    /// `[vocab, 64]` in [`Format::I8`]: the weights there. Row scales are whole numbers, in units of the scales of the planes.
    HeadApart = 67,
    /// The low plane.
    HeadLow = 68,
    /// The norms of its rows.
    HeadNorms = 69,
    /// What the head applies to its own input, if [`Config::linear_head`] and linears do so.
    HeadInputNorm = 70,
    /// How the linear after it in name is laid out, if [`Config::sparse`]: the shape it stands for, and what its encoding
    /// says of the matrix.
    QueryIndex = 81,
    KeyIndex = 82,
    ValueIndex = 83,
    OutputIndex = 85,
    GateIndex = 87,
    UpIndex = 88,
    DownIndex = 90,
    /// What a recurrence takes in, `[hidden, hidden]`, if [`Config::recurrence`].
    RecurrenceInput = 97,
    /// How much of its state it keeps.
    RecurrenceForget = 98,
    /// What its state is multiplied by.
    RecurrenceGate = 99,
    /// `[hidden]`: the least that is kept of the state.
    RecurrenceBound = 100,
    /// `[hidden]`: of what the gate gives.
    RecurrenceNorm = 101,
    RecurrenceInputInputNorm = 113,
    RecurrenceForgetInputNorm = 114,
    RecurrenceGateInputNorm = 115,
}

impl Kind {
    /// `"attention_norm"`, as `inspect` prints it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tokenizer => "tokenizer",
            Self::RopeFrequencies => "rope_frequencies",
            Self::Embedding => "embedding",
            Self::AttentionNorm => "attention_norm",
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::AttentionSubNorm => "attention_sub_norm",
            Self::Output => "output",
            Self::FfnNorm => "ffn_norm",
            Self::Gate => "gate",
            Self::Up => "up",
            Self::FfnSubNorm => "ffn_sub_norm",
            Self::Down => "down",
            Self::UpRows => "up_rows",
            Self::DownColumns => "down_columns",
            Self::QueryInputNorm => "query_input_norm",
            Self::KeyInputNorm => "key_input_norm",
            Self::ValueInputNorm => "value_input_norm",
            Self::OutputInputNorm => "output_input_norm",
            Self::GateInputNorm => "gate_input_norm",
            Self::UpInputNorm => "up_input_norm",
            Self::DownInputNorm => "down_input_norm",
            Self::QueryNorm => "query_norm",
            Self::KeyNorm => "key_norm",
            Self::MemoryInput => "memory_input",
            Self::MemoryGates => "memory_gates",
            Self::MemoryTaps => "memory_taps",
            Self::MemoryDecay => "memory_decay",
            Self::MemoryNorm => "memory_norm",
            Self::MemoryOutput => "memory_output",
            Self::MemoryShare => "memory_share",
            Self::MemoryForget => "memory_forget",
            Self::FinalNorm => "final_norm",
            Self::Head => "head",
            Self::HeadColumns => "head_columns",
            Self::HeadApart => "head_apart",
            Self::HeadLow => "head_low",
            Self::HeadNorms => "head_norms",
            Self::QueryIndex => "query_index",
            Self::KeyIndex => "key_index",
            Self::ValueIndex => "value_index",
            Self::OutputIndex => "output_index",
            Self::GateIndex => "gate_index",
            Self::UpIndex => "up_index",
            Self::DownIndex => "down_index",
            Self::HeadInputNorm => "head_input_norm",
            Self::RecurrenceInput => "recurrence_input",
            Self::RecurrenceForget => "recurrence_forget",
            Self::RecurrenceGate => "recurrence_gate",
            Self::RecurrenceBound => "recurrence_bound",
            Self::RecurrenceNorm => "recurrence_norm",
            Self::RecurrenceInputInputNorm => "recurrence_input_input_norm",
            Self::RecurrenceForgetInputNorm => "recurrence_forget_input_norm",
            Self::RecurrenceGateInputNorm => "recurrence_gate_input_norm",
        }
    }
    /// The kind of the norm that this linear may apply to its input; any other kind is itself.
    pub const fn input_norm(self) -> Self {
        match self.linear_kind() {
            Self::Query => Self::QueryInputNorm,
            Self::Key => Self::KeyInputNorm,
            Self::Value => Self::ValueInputNorm,
            Self::Output => Self::OutputInputNorm,
            Self::Gate => Self::GateInputNorm,
            Self::Up => Self::UpInputNorm,
            Self::Down => Self::DownInputNorm,
            Self::RecurrenceInput => Self::RecurrenceInputInputNorm,
            Self::RecurrenceForget => Self::RecurrenceForgetInputNorm,
            Self::RecurrenceGate => Self::RecurrenceGateInputNorm,
            Self::Head => Self::HeadInputNorm,
            kind => kind,
        }
    }
    /// The kind of the index of this linear, in models that have such; any other kind is itself, those of a memory and of a recurrence included.
    pub const fn index(self) -> Self {
        match self.linear_kind() {
            Self::Query => Self::QueryIndex,
            Self::Key => Self::KeyIndex,
            Self::Value => Self::ValueIndex,
            Self::Output => Self::OutputIndex,
            Self::Gate => Self::GateIndex,
            Self::Up => Self::UpIndex,
            Self::Down => Self::DownIndex,
            kind => kind,
        }
    }
    /// Whether it is a linear that may be stored without rows, columns or blocks of zeros.
    pub const fn has_layouts(self) -> bool {
        matches!(self, Self::Query | Self::Key | Self::Value | Self::Output | Self::Gate | Self::Up | Self::Down)
    }
    /// Whether it says how a linear is laid out.
    pub const fn is_index(self) -> bool {
        matches!(
            self,
            Self::QueryIndex
                | Self::KeyIndex
                | Self::ValueIndex
                | Self::OutputIndex
                | Self::GateIndex
                | Self::UpIndex
                | Self::DownIndex
        )
    }
    /// Whether it is a matrix of a layer.
    pub const fn is_linear(self) -> bool {
        matches!(
            self.linear_kind(),
            Self::Query
                | Self::Key
                | Self::Value
                | Self::Output
                | Self::Gate
                | Self::Up
                | Self::Down
                | Self::MemoryInput
                | Self::MemoryGates
                | Self::MemoryOutput
                | Self::RecurrenceInput
                | Self::RecurrenceForget
                | Self::RecurrenceGate
        )
    }
    /// Which linear this is, however it is stored; any other kind is itself.
    pub const fn linear_kind(self) -> Self {
        match self {
            Self::UpRows => Self::Up,
            Self::DownColumns => Self::Down,
            kind => kind,
        }
    }
    /// Whether a section of this kind may be encoded so. A head has a ternary format only if [`Config::linear_head`].
    pub const fn allows(self, encoding: Encoding) -> bool {
        match self {
            Self::Tokenizer | Self::HeadNorms => matches!(encoding, Encoding::Bytes),
            Self::HeadApart => matches!(encoding, Encoding::Matrix(Format::I8)),
            Self::HeadLow => matches!(encoding, Encoding::Matrix(Format::I4)),
            Self::Head if matches!(encoding, Encoding::Matrix(Format::B1 | Format::TL | Format::T2)) => true,
            Self::Embedding | Self::Head => {
                matches!(encoding, Encoding::Matrix(f) if f.is_grouped() || matches!(f, Format::I4 | Format::I8 | Format::F16))
            }
            Self::UpRows | Self::DownColumns => matches!(encoding, Encoding::Matrix(Format::T2R)),
            _ if self.is_index() => matches!(encoding, Encoding::Whole | Encoding::Kept | Encoding::Starts),
            _ if self.is_linear() => {
                matches!(encoding, Encoding::Matrix(f) if !matches!(f, Format::T2R))
                    || matches!(encoding, Encoding::Blocks(_))
            }
            _ => matches!(encoding, Encoding::Vector),
        }
    }
}

/// How a section's bytes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Units of packed rows.
    Matrix(Format),
    /// f32, little-endian.
    Vector,
    /// Bytes.
    Bytes,
    /// An index without any bytes: the linear is whole.
    Whole,
    /// An index with masks of rows and columns: the linear is compacted (see [`super::kept`]).
    Kept,
    /// An index that says where the units of a block-sparse linear start: a u32 each, in blocks from the linear's start.
    Starts,
    /// Units of a block-sparse ternary matrix ([`bitnet_kernel::blocks`]).
    Blocks(BlockShape),
}

impl Encoding {
    const VECTOR: u8 = 32;
    const BYTES: u8 = 33;
    const WHOLE: u8 = 16;
    const KEPT: u8 = 17;
    const STARTS: u8 = 18;

    /// What the table records.
    pub const fn tag(self) -> u8 {
        match self {
            Self::Matrix(format) => format as u8,
            Self::Vector => Self::VECTOR,
            Self::Bytes => Self::BYTES,
            Self::Whole => Self::WHOLE,
            Self::Kept => Self::KEPT,
            Self::Starts => Self::STARTS,
            Self::Blocks(shape) => shape as u8,
        }
    }
    /// The encoding with this tag.
    pub const fn from_tag(tag: u8) -> Option<Self> {
        match tag {
            Self::VECTOR => Some(Self::Vector),
            Self::BYTES => Some(Self::Bytes),
            Self::WHOLE => Some(Self::Whole),
            Self::KEPT => Some(Self::Kept),
            Self::STARTS => Some(Self::Starts),
            _ => match (Format::from_tag(tag), BlockShape::from_tag(tag)) {
                (Some(format), _) => Some(Self::Matrix(format)),
                (None, Some(shape)) => Some(Self::Blocks(shape)),
                (None, None) => None,
            },
        }
    }
    /// Blocks of a section of `rows` by `cols`; the most that a block-sparse matrix can take. Within the limits of [`Config::check`] no size overflows 64 bits.
    pub const fn blocks(self, rows: u32, cols: u32) -> u64 {
        match self {
            Self::Matrix(format) => {
                let full = rows as usize / UNIT_ROWS;
                let rest = rows as usize % UNIT_ROWS;
                full as u64 * unit_blocks(format, UNIT_ROWS, cols) + unit_blocks(format, rest, cols)
            }
            Self::Vector => (cols as u64 * 4).div_ceil(Block::BYTES as u64),
            Self::Bytes => (cols as u64).div_ceil(Block::BYTES as u64),
            Self::Whole => 0,
            Self::Kept => (mask_blocks(rows) + mask_blocks(cols)) as u64,
            Self::Starts => (rows as u64).div_ceil(UNIT_ROWS as u64).div_ceil(Block::BYTES as u64 / 4),
            Self::Blocks(shape) => (rows as u64).div_ceil(UNIT_ROWS as u64) * block_unit_max(shape, cols),
        }
    }
}

/// Blocks of a unit of a block-sparse matrix in which all blocks are live.
const fn block_unit_max(shape: BlockShape, cols: u32) -> u64 {
    let live = UNIT_ROWS / blocks::STRIP_ROWS * shape.across(cols as usize);
    shape.unit_blocks(UNIT_ROWS, cols as usize, live) as u64
}

/// Blocks of a unit with `rows` rows.
const fn unit_blocks(format: Format, rows: usize, cols: u32) -> u64 {
    (format.matrix_blocks(rows, cols as usize) + scale_blocks(format, rows)) as u64
}

/// Blocks of a unit's row scales.
const fn scale_blocks(format: Format, rows: usize) -> usize {
    if format.has_row_scales() { rows.div_ceil(Block::BYTES / 4) } else { 0 }
}

/// A section that the configuration asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it holds.
    pub kind: Kind,
    /// Its layer.
    pub layer: Option<u32>,
    /// Rows of a matrix or of that which an index is about; 1 of a vector.
    pub rows: u32,
    /// Columns of such, elements of a vector.
    pub cols: u32,
}

/// The sections of the weight region in execution order: what a packer writes and the validator expects.
pub fn expected_sections(c: &Config) -> impl Iterator<Item = Section> + use<> {
    let c = *c;
    let once = move |kind, rows, cols| Section { kind, layer: None, rows, cols };
    let embedding = (!c.tied).then(|| once(Kind::Embedding, c.vocab, c.hidden));
    let rotation = (!c.recurrence).then(|| once(Kind::RopeFrequencies, 1, c.head_dim / 2));
    let start = rotation.into_iter().chain(embedding);
    let layers = (0..c.layers).flat_map(move |layer| layer_sections(&c, layer));
    let end = [
        once(Kind::FinalNorm, 1, c.hidden),
        once(Kind::HeadInputNorm, 1, c.hidden),
        once(Kind::HeadColumns, 1, super::split::COLUMNS as u32),
        once(Kind::Head, c.vocab, c.hidden),
        once(Kind::HeadApart, c.vocab, super::split::COLUMNS as u32),
        once(Kind::HeadNorms, 1, super::split::norms_bytes(c.vocab)),
        once(Kind::HeadLow, c.vocab, c.hidden),
    ];
    let split = |kind| matches!(kind, Kind::HeadColumns | Kind::HeadApart | Kind::HeadNorms | Kind::HeadLow);
    let has = move |kind| match kind {
        Kind::HeadInputNorm => c.linear_head && c.linear_norm_eps.is_some(),
        kind => c.split_head || !split(kind),
    };
    start.chain(layers).chain(end.into_iter().filter(move |s| has(s.kind)))
}

/// One layer's sections in execution order.
fn layer_sections(c: &Config, layer: u32) -> impl Iterator<Item = Section> + use<> {
    let (hidden, ffn, query, kv) = (c.hidden, c.ffn, c.query_width(), c.kv_width());
    let norm = |kind, cols| (true, kind, 1, cols);
    let sub_norm = |kind, cols| (c.sub_norms, kind, 1, cols);
    let head_norm = |kind| (c.qk_norms, kind, 1, c.head_dim);
    let input_norm = |linear: Kind, cols| (c.linear_norm_eps.is_some(), linear.input_norm(), 1, cols);
    let linear = |kind, rows, cols| (true, kind, rows, cols);
    let index = |linear: Kind, rows, cols| (c.sparse, linear.index(), rows, cols);
    let ffn_index = |linear: Kind, rows, cols| (c.sparse && !c.live_ffn, linear.index(), rows, cols);
    let attends = |section: (bool, Kind, u32, u32)| (section.0 && !c.recurrence, section.1, section.2, section.3);
    let recurs = |section: (bool, Kind, u32, u32)| (section.0 && c.recurrence, section.1, section.2, section.3);
    let sizes = |m: Memory| [m.inputs(), m.gates(c), m.channels(), m.norm(c), m.results()];
    let [inputs, gates, channels, recalled, results] = c.memory.map_or([0; 5], sizes);
    let memory = |kind, rows, cols| (c.memory.is_some(), kind, rows, cols);
    let own = |kind, rows, cols| (matches!(c.memory, Some(Memory::Matrices(_) | Memory::Vector(_))), kind, rows, cols);
    let matrices =
        |kind, rows, cols| (matches!(c.memory, Some(Memory::Matrices(_) | Memory::Shared)), kind, rows, cols);
    let vector = |kind, rows, cols| (matches!(c.memory, Some(Memory::Vector(_))), kind, rows, cols);
    [
        norm(Kind::AttentionNorm, hidden),
        attends(input_norm(Kind::Query, hidden)),
        attends(index(Kind::Query, query, hidden)),
        attends(linear(Kind::Query, query, hidden)),
        attends(input_norm(Kind::Key, hidden)),
        attends(index(Kind::Key, kv, hidden)),
        attends(linear(Kind::Key, kv, hidden)),
        attends(input_norm(Kind::Value, hidden)),
        attends(index(Kind::Value, kv, hidden)),
        attends(linear(Kind::Value, kv, hidden)),
        recurs(input_norm(Kind::RecurrenceInput, hidden)),
        recurs(linear(Kind::RecurrenceInput, hidden, hidden)),
        recurs(input_norm(Kind::RecurrenceForget, hidden)),
        recurs(linear(Kind::RecurrenceForget, hidden, hidden)),
        recurs(input_norm(Kind::RecurrenceGate, hidden)),
        recurs(linear(Kind::RecurrenceGate, hidden, hidden)),
        recurs(norm(Kind::RecurrenceBound, hidden)),
        recurs(norm(Kind::RecurrenceNorm, hidden)),
        own(Kind::MemoryInput, inputs, hidden),
        matrices(Kind::MemoryGates, gates, hidden),
        head_norm(Kind::QueryNorm),
        head_norm(Kind::KeyNorm),
        own(Kind::MemoryTaps, 1, bitnet_kernel::float::TAPS as u32 * channels),
        matrices(Kind::MemoryDecay, 1, gates / 2 * 3),
        vector(Kind::MemoryForget, 1, 2 * results),
        memory(Kind::MemoryNorm, 1, recalled),
        own(Kind::MemoryOutput, query, results),
        memory(Kind::MemoryShare, 1, query),
        sub_norm(Kind::AttentionSubNorm, query),
        input_norm(Kind::Output, query),
        index(Kind::Output, hidden, query),
        linear(Kind::Output, hidden, query),
        norm(Kind::FfnNorm, hidden),
        input_norm(Kind::Gate, hidden),
        index(Kind::Gate, ffn, hidden),
        linear(Kind::Gate, ffn, hidden),
        input_norm(Kind::Up, hidden),
        ffn_index(Kind::Up, ffn, hidden),
        (!c.live_ffn, Kind::Up, ffn, hidden),
        (c.live_ffn, Kind::UpRows, ffn, hidden),
        sub_norm(Kind::FfnSubNorm, ffn),
        input_norm(Kind::Down, ffn),
        ffn_index(Kind::Down, hidden, ffn),
        (!c.live_ffn, Kind::Down, hidden, ffn),
        (c.live_ffn, Kind::DownColumns, ffn, hidden),
    ]
    .into_iter()
    .filter(|&(present, ..)| present)
    .map(move |(_, kind, rows, cols)| Section { kind, layer: Some(layer), rows, cols })
}

/// A matrix in an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tensor {
    /// How weights are encoded.
    pub format: Format,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub cols: u32,
    /// First block in the file.
    pub start: u32,
    /// What all weights are multiplied by; 1 where rows have scales of their own.
    pub scale: f32,
}

impl Tensor {
    /// Units.
    pub const fn units(&self) -> u32 {
        (self.rows as usize).div_ceil(UNIT_ROWS) as u32
    }
    /// Rows of unit `u`.
    pub const fn unit_rows(&self, u: u32) -> usize {
        let rest = self.rows as usize - u as usize * UNIT_ROWS;
        if rest < UNIT_ROWS { rest } else { UNIT_ROWS }
    }
    /// Where unit `u` lies.
    pub const fn unit(&self, u: u32) -> Extent {
        let start = self.start + u * unit_blocks(self.format, UNIT_ROWS, self.cols) as u32;
        Extent { start, blocks: unit_blocks(self.format, self.unit_rows(u), self.cols) as u32 }
    }
    /// Blocks of a unit that hold weights; the rest are row scales.
    pub const fn weight_blocks(&self, rows: usize) -> usize {
        self.format.matrix_blocks(rows, self.cols as usize)
    }
    /// Where the tile of row `r` lies, the row's place in it, and the block with the row's scale and its place in that.
    ///
    /// For reading one row of an embedding. The scale's block is `None` in formats without row scales.
    pub const fn row(&self, r: u32) -> (Extent, usize, Option<(Extent, usize)>) {
        let (unit, r) = (r / UNIT_ROWS as u32, r as usize % UNIT_ROWS);
        let (start, rows) = (self.unit(unit).start, self.unit_rows(unit));
        let tile_blocks = self.format.tile_blocks(self.cols as usize) as u32;
        let tile = Extent { start: start + (r / self.format.tile_rows()) as u32 * tile_blocks, blocks: tile_blocks };
        let scale = if self.format.has_row_scales() {
            let start = start + self.weight_blocks(rows) as u32 + (r / 16) as u32;
            Some((Extent { start, blocks: 1 }, r % 16))
        } else {
            None
        };
        (tile, r % self.format.tile_rows(), scale)
    }
}

/// A block-sparse matrix in an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockTensor {
    /// The size of its blocks.
    pub shape: BlockShape,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub cols: u32,
    /// Where it lies.
    pub extent: Extent,
    /// What all weights are multiplied by.
    pub scale: f32,
}

impl BlockTensor {
    /// Units.
    pub const fn units(&self) -> u32 {
        (self.rows as usize).div_ceil(UNIT_ROWS) as u32
    }
    /// Rows of unit `u`.
    pub const fn unit_rows(&self, u: u32) -> usize {
        let rest = self.rows as usize - u as usize * UNIT_ROWS;
        if rest < UNIT_ROWS { rest } else { UNIT_ROWS }
    }
    /// The most blocks that a unit can take.
    pub const fn unit_max(&self) -> u64 {
        block_unit_max(self.shape, self.cols)
    }
    /// Turns what an index says into starts that are sound, each no less than the one before it and none past the end.
    pub fn sound_starts(&self, starts: &mut [u32]) {
        let mut before = 0;
        for start in starts {
            before = (*start).clamp(before, self.extent.blocks);
            *start = before;
        }
    }
    /// Where unit `u` lies, by starts that are sound.
    pub fn unit(&self, starts: &[u32], u: u32) -> Extent {
        let at = |u: u32| starts.get(u as usize).copied().unwrap_or(self.extent.blocks);
        Extent { start: self.extent.start + at(u), blocks: at(u + 1) - at(u) }
    }
}

/// The section table of a checked image.
#[derive(Clone, Copy, Debug)]
pub struct Sections<'a>(pub(super) &'a [Record]);

impl<'a> Sections<'a> {
    /// All entries, the tokenizer's first if there is one.
    pub const fn records(&self) -> &'a [Record] {
        self.0
    }
    /// The entry of a kind and layer.
    pub fn find(&self, kind: Kind, layer: Option<u32>) -> Option<&'a Record> {
        let layer = layer.map_or(u16::MAX, |l| l as u16);
        self.0.iter().find(|r| r.kind == kind as u8 && r.layer.get() == layer)
    }
}

impl Record {
    /// Layer of a record that belongs to none.
    pub const NO_LAYER: u16 = u16::MAX;

    /// Where the section lies.
    pub const fn extent(&self) -> Extent {
        Extent { start: self.start.get(), blocks: self.blocks.get() }
    }
    /// The block-sparse matrix it holds, or `None` for anything else.
    pub const fn block_tensor(&self) -> Option<BlockTensor> {
        match Encoding::from_tag(self.encoding) {
            Some(Encoding::Blocks(shape)) => Some(BlockTensor {
                shape,
                rows: self.rows.get(),
                cols: self.cols.get(),
                extent: self.extent(),
                scale: self.scale.get(),
            }),
            _ => None,
        }
    }
    /// The matrix it holds, or `None` for a vector, bytes or a block-sparse one.
    pub const fn tensor(&self) -> Option<Tensor> {
        match Encoding::from_tag(self.encoding) {
            Some(Encoding::Matrix(format)) => Some(Tensor {
                format,
                rows: self.rows.get(),
                cols: self.cols.get(),
                start: self.start.get(),
                scale: self.scale.get(),
            }),
            _ => None,
        }
    }
}
