//! What kind of model an image holds: every choice the forward pass makes is one of these fields, never a model's name.
use crate::error::ImageError;
use bitnet_kernel::{BlockShape, Format, Kernels};
use serde::{Deserialize, Serialize};

/// The shape and the choices of one model, as the image's header records them (in this order).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Tokens.
    pub vocab: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of the feed-forward layer.
    pub ffn: u32,
    /// Blocks of attention and feed-forward.
    pub layers: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads` (grouped-query attention, arXiv:2305.13245).
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// Positions the model was trained for.
    pub context: u32,
    /// Added to the mean square in every normalization but the linears' own.
    pub norm_eps: f32,
    /// Between gate and up.
    pub activation: Activation,
    /// Which elements of a head are rotated together.
    pub rope: Rope,
    /// Whether attention's and feed-forward's results are normalized before their last linear (BitNet b1.58).
    pub sub_norms: bool,
    /// Whether every query and every key head is normalized before it is rotated (Qwen3, arXiv:2505.09388).
    pub qk_norms: bool,
    /// Epsilon of the normalization that every linear applies to its own input, if they have one.
    pub linear_norm_eps: Option<f32>,
    /// Whether up is stored with every row by itself and down by its columns, so that only their live part is read.
    pub live_ffn: bool,
    /// Whether every linear has an index, which says whether its rows and columns of zeros are left out (see
    /// [`crate::image::kept`]).
    pub sparse: bool,
    /// What attention sees, if not everything.
    pub window: Option<Window>,
    /// The memory beside attention, if there is one.
    pub memory: Option<Memory>,
    /// Whether the memory is given a token when that leaves the window, and not at once: then it has what attention no longer sees
    /// and nothing else. The sinks, which attention always sees, it is never given.
    pub delayed_writes: bool,
    /// Whether an elementwise recurrence of `hidden` numbers a layer takes attention's place, as in the MatMul-free language model
    /// (arXiv:2406.02528). Then there is one head as wide as the residual stream, and no rotation.
    pub recurrence: bool,
    /// How the inputs of linears are quantized.
    pub quantizers: Quantizers,
    /// Whether the head's matrix is the embedding too.
    pub tied: bool,
    /// Whether the head is a linear as those of the layers are, in their formats and, if they have one, with a norm of its input.
    pub linear_head: bool,
    /// Whether the head is in two planes, of which the second is read for some rows only (see [`crate::image::split`]).
    pub split_head: bool,
    /// The union of the linears' encodings, the head's included if it is one: bit `t` for that with tag `t`. Sizes the tables in the plan.
    pub formats: u16,
}

/// The activation function of the feed-forward layer: `activation(gate) · up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `max(x, 0)²`.
    SquaredRelu,
    /// `x · sigmoid(x)`.
    Silu,
}

impl Activation {
    /// `out = activation(gate) · up`.
    pub(super) fn apply(self, kernels: &dyn Kernels, gate: &[f32], up: &[f32], out: &mut [f32]) {
        match self {
            Self::SquaredRelu => kernels.squared_relu(gate, up, out),
            Self::Silu => kernels.silu(gate, up, out),
        }
    }
}

/// Which elements of a head rotary position embedding (arXiv:2104.09864) turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rope {
    /// `i` and `i + head_dim / 2`, as Hugging Face stores weights.
    HalfSplit,
    /// `2i` and `2i + 1`, as GGUF stores Llama's.
    Interleaved,
}

/// Attention to the first positions of a conversation and to the last ones (StreamingLLM, arXiv:2309.17453).
///
/// Keys are kept as they are before rotation, and positions count within what is seen: no distance grows with the length of a
/// conversation, which has no end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// The last positions, a query's own included.
    pub positions: u32,
    /// The first positions, which are never forgotten.
    pub sinks: u32,
}

impl Window {
    /// The most positions that a query sees.
    pub const fn span(&self) -> u32 {
        self.positions + self.sinks
    }
}

/// A state of fixed size that takes part in every token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Memory {
    /// What can be asked for by its key.
    Matrices(Matrices),
    /// Far less, for far less.
    Vector(Vector),
    /// As matrices, one for each key head, by attention's own queries, keys and values before rotation, of which queries and keys
    /// are divided by their lengths: next to no weights, and more state (Liger, arXiv:2503.01496, and others).
    Shared,
}

/// BitRNN-M: the gated delta rule, arXiv:2412.06464.
///
/// `heads` matrices of `value` rows and `key` columns. See [`bitnet_kernel::float::delta_rule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matrices {
    /// Matrices a layer.
    pub heads: u32,
    /// Width of a key and of a query.
    pub key: u32,
    /// Width of a value.
    pub value: u32,
}

/// BitRNN-V: the gated recurrence of HGRN, arXiv:2311.04823. See [`bitnet_kernel::float::recur`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vector {
    /// Numbers a layer.
    pub width: u32,
}

impl Memory {
    /// What the short convolution runs over.
    pub const fn channels(&self) -> u32 {
        match self {
            Self::Matrices(matrices) => matrices.channels(),
            Self::Vector(vector) => vector.channels(),
            Self::Shared => 0,
        }
    }
    /// What its output linear reads of a token, and as many gates of that, if it has one.
    pub const fn results(&self) -> u32 {
        match self {
            Self::Matrices(matrices) => matrices.values(),
            Self::Vector(vector) => vector.width,
            Self::Shared => 0,
        }
    }
    /// Its matrices, if it has any, in a model of this configuration.
    pub const fn matrices(&self, c: &Config) -> Option<Matrices> {
        match self {
            Self::Matrices(matrices) => Some(*matrices),
            Self::Vector(_) => None,
            Self::Shared => Some(Matrices { heads: c.kv_heads, key: c.head_dim, value: c.head_dim }),
        }
    }
    /// What its first linear makes of a token, if it has one.
    pub(crate) const fn inputs(&self) -> u32 {
        self.channels() + self.results()
    }
    /// What its second linear does, if it has one.
    pub(crate) const fn gates(&self, c: &Config) -> u32 {
        match self.matrices(c) {
            Some(matrices) => 2 * matrices.heads,
            None => 0,
        }
    }
    /// What is normalized at a time.
    pub(crate) const fn norm(&self, c: &Config) -> u32 {
        match (self, self.matrices(c)) {
            (_, Some(matrices)) => matrices.value,
            (Self::Vector(vector), None) => vector.width,
            (Self::Matrices(_) | Self::Shared, None) => 0,
        }
    }
    /// Queries of a token.
    pub(crate) const fn queries(&self, c: &Config) -> u32 {
        match self {
            Self::Matrices(matrices) => matrices.heads,
            Self::Vector(_) => 0,
            Self::Shared => c.heads,
        }
    }
    /// Floats of one layer's state, but for the last inputs of the convolution.
    pub(crate) const fn state_len(&self, c: &Config) -> usize {
        match (self, self.matrices(c)) {
            (_, Some(matrices)) => matrices.values() as usize * matrices.key as usize,
            (Self::Vector(vector), None) => vector.width as usize,
            (Self::Matrices(_) | Self::Shared, None) => 0,
        }
    }
    /// Floats that decide what one layer's state becomes with a token: keys, values and gates, or what is taken in and what decides
    /// how much is kept.
    pub(crate) const fn write_len(&self, c: &Config) -> usize {
        match self.matrices(c) {
            Some(m) => (m.keys() + m.values() + 2 * m.heads) as usize,
            None => self.channels() as usize,
        }
    }
    /// Floats of one layer's last inputs of the convolution.
    pub(crate) const fn past_len(&self) -> usize {
        (bitnet_kernel::float::TAPS - 1) * self.channels() as usize
    }
}

impl Vector {
    /// What the short convolution runs over: what is taken in, and what decides how much is kept.
    pub const fn channels(&self) -> u32 {
        2 * self.width
    }
}

impl Matrices {
    /// Width of all keys (and of all queries).
    pub const fn keys(&self) -> u32 {
        self.heads * self.key
    }
    /// Width of all values.
    pub const fn values(&self) -> u32 {
        self.heads * self.value
    }
    /// What the short convolution runs over: queries, keys and values.
    pub const fn channels(&self) -> u32 {
        2 * self.keys() + self.values()
    }
}

/// How floats become the int8 vector that a linear multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Quantizer {
    /// Eight bits by the largest magnitude (BitNet b1.58).
    Int8,
    /// Four bits by the mean magnitude (BitNet a4.8).
    Int4,
    /// As `Int8`, and zero but for the half that is largest by magnitude (BitNet a4.8).
    Int8LargestHalf,
    /// Four bits by the largest magnitude.
    Int4Absmax,
    /// Floats of four bits by the largest magnitude (BitNet a4.8).
    Fp4,
    /// As `Int8`, after a rotation by a Hadamard matrix (BitNet v2, arXiv:2504.18415).
    Int8Hadamard,
    /// As `Int4`, after that.
    Int4Hadamard,
}

impl Quantizer {
    /// Whether what is quantized is rotated before.
    pub const fn rotates(self) -> bool {
        matches!(self, Self::Int8Hadamard | Self::Int4Hadamard)
    }
}

/// One quantizer for each input of linears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantizers {
    /// Of query, key and value, and of what the memory takes.
    pub attention: Quantizer,
    /// Of output.
    pub output: Quantizer,
    /// Of gate and up.
    pub ffn: Quantizer,
    /// Of down.
    pub down: Quantizer,
}

impl Quantizers {
    /// Whether one of them does: see [`Quantizer::rotates`].
    pub const fn rotate(&self) -> bool {
        self.attention.rotates() || self.output.rotates() || self.ffn.rotates() || self.down.rotates()
    }
    /// Eight bits everywhere.
    pub const INT8: Self = {
        let int8 = Quantizer::Int8;
        Self { attention: int8, output: int8, ffn: int8, down: int8 }
    };
}

impl Config {
    /// Most layers.
    pub const LAYERS_MAX: u32 = 512;
    /// Most tokens in a vocabulary.
    pub const VOCAB_MAX: u32 = 1 << 22;
    /// Longest context.
    pub const CONTEXT_MAX: u32 = 1 << 20;
    /// Widest head.
    pub const HEAD_DIM_MAX: u32 = 512;
    /// Most matrices of a memory, and the widest key and value.
    pub const MEMORY_MAX: u32 = 512;
    /// Widest vector: what every kernel multiplies exactly.
    pub const WIDTH_MAX: u32 = Format::COLS_MAX as u32;

    /// Width of all query heads together.
    pub const fn query_width(&self) -> u32 {
        self.heads * self.head_dim
    }
    /// Width of all key heads (and of all value heads) together.
    pub const fn kv_width(&self) -> u32 {
        self.kv_heads * self.head_dim
    }
    /// The widest vector that a linear reads.
    pub const fn widest(&self) -> u32 {
        let w = if self.hidden > self.ffn { self.hidden } else { self.ffn };
        let w = if w > self.query_width() { w } else { self.query_width() };
        match self.memory {
            Some(memory) if memory.results() > w => memory.results(),
            _ => w,
        }
    }
    /// Whether a conversation has a state of one size that can be read no further back than by a pass.
    pub const fn is_stateful(&self) -> bool {
        self.memory.is_some() || self.recurrence
    }
    /// Whether a conversation has an end: the planned context.
    pub const fn is_bounded(&self) -> bool {
        self.window.is_none() && !self.recurrence
    }
    /// Checks every field against the limits, so that no size computed from them can overflow.
    ///
    /// # Errors
    /// [`ImageError::Config`] names the first field that is wrong.
    pub fn check(&self) -> Result<(), ImageError> {
        let field = |field, value: u32, ok: bool| {
            let value = u64::from(value);
            if ok { Ok(()) } else { Err(ImageError::Config { field, value }) }
        };
        let width = |name, v| field(name, v, (1..=Self::WIDTH_MAX).contains(&v));
        field("vocab", self.vocab, (1..=Self::VOCAB_MAX).contains(&self.vocab))?;
        width("hidden", self.hidden)?;
        width("ffn", self.ffn)?;
        field("layers", self.layers, (1..=Self::LAYERS_MAX).contains(&self.layers))?;
        width("heads", self.heads)?;
        let grouped = 1 <= self.kv_heads && self.heads.is_multiple_of(self.kv_heads.max(1));
        field("kv_heads", self.kv_heads, grouped)?;
        if self.recurrence {
            // What is left of attention would have no meaning, and the plan has no room for it.
            field("heads", self.heads, self.heads == 1)?;
            field("head_dim", self.head_dim, self.head_dim == self.hidden)?;
            let other = self.sub_norms || self.qk_norms || self.window.is_some() || self.memory.is_some();
            field("recurrence", 1, !other)?;
        } else {
            let even = self.head_dim.is_multiple_of(2) && (2..=Self::HEAD_DIM_MAX).contains(&self.head_dim);
            field("head_dim", self.head_dim, even)?;
        }
        field("linear_head", 1, !self.linear_head || !(self.tied || self.split_head))?;
        width("heads * head_dim", self.heads.saturating_mul(self.head_dim))?;
        field("context", self.context, (1..=Self::CONTEXT_MAX).contains(&self.context))?;
        if let Some(window) = self.window {
            field("window", window.positions, (1..=Self::CONTEXT_MAX).contains(&window.positions))?;
            field("sinks", window.sinks, window.sinks <= Self::CONTEXT_MAX - window.positions)?;
        }
        match self.memory {
            Some(Memory::Matrices(m)) => {
                field("memory heads", m.heads, (1..=Self::MEMORY_MAX).contains(&m.heads))?;
                field("memory key", m.key, (1..=Self::MEMORY_MAX).contains(&m.key))?;
                field("memory value", m.value, (1..=Self::MEMORY_MAX).contains(&m.value))?;
                width("memory heads * key", m.keys())?;
                width("memory heads * value", m.values())?;
            }
            Some(Memory::Vector(v)) => width("memory width", v.width)?,
            Some(Memory::Shared) | None => {}
        }
        // The memory's linears have none, and read what the others of its layer read.
        field("memory", 1, self.memory.is_none() || self.linear_norm_eps.is_none())?;
        let may_wait = self.memory.is_some() && self.window.is_some();
        field("delayed_writes", 1, !self.delayed_writes || may_wait)?;
        let eps = |name, v: f32| field(name, v as u32, (0.0..1.0).contains(&v));
        eps("norm_eps", self.norm_eps)?;
        eps("linear_norm_eps", self.linear_norm_eps.unwrap_or(0.0))?;
        let known = Format::ALL.iter().fold(0, |set, &f| set | 1 << f as u8);
        let known = BlockShape::ALL.iter().fold(known, |set, &shape| set | 1 << shape as u8);
        // Floats are multiplied as they are, and parts of a layer's live neurons are quantized from one vector in turn.
        let rotates = self.quantizers.rotate();
        let has_floats = self.formats >> Format::F16 as u8 & 1 == 1;
        field("quantizers", 1, !rotates || !(self.live_ffn || has_floats))?;
        field("formats", u32::from(self.formats), self.formats != 0 && self.formats & !known == 0)
    }
}
