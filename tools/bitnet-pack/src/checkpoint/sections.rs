//! Which tensor each section of the image is made from. All names, types and shapes are checked here, before anything is
//! written, and no tensor may be left over.
use super::{Checkpoint, Dtype, Naming, Storage, Table, TensorInfo, llama2c};
use crate::kept::{self, Found, Kept, Live};
use crate::pack::far;
use crate::quantize::{Absmean, Distance, Evidence, Gaps, MagnitudeSum};
use crate::tune::Tuner;
use crate::{Error, Options, Progress};
use bitnet_kernel::float::TAPS;
use bitnet_runtime::Config;
use bitnet_runtime::image::{Encoding, Kind, Section, UNIT_ROWS, expected_sections};
use std::collections::BTreeSet;

/// Where a section's numbers come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// What is kept of the linear after it.
    Index,
    /// Computed.
    Values(Vec<f32>),
    /// A float vector.
    Vector(TensorInfo),
    /// Ternary codes, four rows a byte, and what they are multiplied by.
    Packed(TensorInfo, f32),
    /// Numbers that are all a multiple of one magnitude by -1, 0 or 1, and this magnitude; and what they are multiplied by
    /// in addition; and where there are zeros among them.
    Ternary(TensorInfo, f32, f32, Gaps),
    /// Numbers of which every group of 128 columns of a row is ternary but for a factor, and whether none is zero.
    Grouped(TensorInfo, bool),
    /// Float masters of a ternary matrix.
    Masters(TensorInfo),
    /// Those from this row on of masters of a ternary matrix: all of its rows have one scale.
    Part(TensorInfo, u64),
    /// A float matrix that stays dense: the embedding, the head, or a linear that is not ternary.
    Rows(TensorInfo),
}

/// A section of the image and what it is made from.
#[derive(Clone, Debug)]
pub struct Bound {
    /// What it holds.
    pub section: Section,
    /// What it is made from.
    pub source: Source,
    /// How it will be encoded.
    pub encoding: Encoding,
    /// What is kept of a linear that is compacted, and of which its index has the masks.
    pub kept: Option<Kept>,
    /// The live blocks of one that is block-sparse, and of which its index has the starts of units.
    pub live: Option<Live>,
}

impl Bound {
    /// The section as the image has it.
    pub fn stored(&self) -> Section {
        match &self.kept {
            Some(kept) if self.section.kind.is_linear() => {
                let (rows, cols) = kept.shape();
                Section { rows, cols, ..self.section }
            }
            _ => self.section,
        }
    }
    /// Blocks of the section in the image.
    pub fn blocks(&self) -> u64 {
        match (&self.live, self.stored()) {
            (Some(live), section) if section.kind.is_linear() => live.blocks(),
            (_, section) => self.encoding.blocks(section.rows, section.cols),
        }
    }
}

impl Source {
    /// The tensor that is read, if one is.
    pub const fn tensor(&self) -> Option<&TensorInfo> {
        match self {
            Self::Index | Self::Values(_) => None,
            Self::Vector(t)
            | Self::Packed(t, _)
            | Self::Ternary(t, ..)
            | Self::Grouped(t, _)
            | Self::Masters(t)
            | Self::Part(t, _)
            | Self::Rows(t) => Some(t),
        }
    }
}

/// Scales outside this are no mean magnitude of anything: a checkpoint's is between 0.001 and 10.
const SCALE_RANGE: (f32, f32) = (1e-5, 1e3);
const SCALE_USUAL: (f32, f32) = (1e-3, 10.0);

/// Finds the tensor of every section, and how each will be encoded. Sets what the tensors decide: `tied`, `formats`,
/// `linear_norm_eps`, and factors of the angles.
///
/// # Errors
/// If one is missing, left over, or of the wrong type or shape.
pub fn bind(
    checkpoint: &Checkpoint,
    table: &mut Table,
    options: &Options,
    mut tuner: Option<&mut Tuner<'_>>,
    progress: &dyn Progress,
) -> Result<Vec<Bound>, Error> {
    let naming = checkpoint.naming();
    let mut binder =
        Binder { checkpoint, naming, storage: table.storage, progress, used: BTreeSet::new(), notes: Vec::new() };
    table.config.tied = binder.tied(table)?;
    binder.linear_norms(table);
    binder.factors(table)?;
    let mut bound = Vec::new();
    for section in expected_sections(&table.config) {
        let source = binder.source(&section, table)?;
        if let Source::Rows(tensor) = &source
            && section.kind.is_linear()
            && naming == Naming::Gguf
            && table.config.sub_norms
            && !options.lossy
        {
            let lossy = format!("--lossy keeps it as --dense {}", options.dense.name());
            return binder.wrong(tensor, far(binder.distance(tensor)?, &lossy));
        }
        let encoding = options.encoding_of(section.kind, &source);
        let found = match encoding {
            Encoding::Matrix(format)
                if !matches!(source, Source::Part(..))
                    && (options.adaptive.is_none() || !matches!(source, Source::Rows(_)))
                    && section.kind.has_layouts() =>
            {
                let tuner = tuner.as_deref_mut();
                kept::find(checkpoint, &source, &section, format, options.layout, tuner, progress)?
            }
            _ => Found::Whole,
        };
        let (encoding, kept, live) = match found {
            Found::Whole => (encoding, None, None),
            Found::Kept(kept) => (encoding, Some(kept), None),
            Found::Live(live) => (Encoding::Blocks(live.shape), None, Some(live)),
        };
        bound.push(Bound { section, source, encoding, kept, live });
    }
    let left = |t: &&TensorInfo| !binder.used.contains(t.name.as_str()) && !is_computed(naming, &t.name);
    if let Some(tensor) = checkpoint.tensors().find(left) {
        let what = "unknown to this class of model; leaving it out would change what the model computes";
        return Err(Error::tensor(checkpoint.path_of(tensor), &tensor.name, what));
    }
    let (compacted, blocks) = bound.iter().fold((0, 0), |(compacted, blocks), b| {
        (compacted + usize::from(b.kept.is_some()), blocks + usize::from(b.live.is_some()))
    });
    if compacted + blocks > 0 {
        table.config.sparse = true;
        bound = indexed(&table.config, bound);
        for (n, what) in [(compacted, "rows or columns"), (blocks, "blocks")].into_iter().filter(|(n, _)| *n > 0) {
            binder.notes.push(format!("{n} linears have {what} of zeros, which are left out"));
        }
    }
    table.config.formats = formats(&bound);
    let dense = bound.iter().filter(|b| b.section.kind.is_linear() && matches!(b.source, Source::Rows(_))).count();
    if dense > 0 && options.adaptive.is_none() {
        binder.notes.push(format!("{dense} linears are not ternary and become {}", options.dense.name()));
    }
    table.notes.append(&mut binder.notes);
    Ok(bound)
}

/// The sections of a model with an index before every linear.
fn indexed(config: &Config, bound: Vec<Bound>) -> Vec<Bound> {
    let mut sections = expected_sections(config);
    let mut indexed = Vec::new();
    for bound in bound {
        let mut section = sections.next().expect("no fewer sections with an index");
        if section.kind.is_index() {
            let encoding = match (&bound.kept, &bound.live) {
                (Some(_), _) => Encoding::Kept,
                (None, Some(_)) => Encoding::Starts,
                (None, None) => Encoding::Whole,
            };
            let (kept, live) = (bound.kept.clone(), bound.live.clone());
            indexed.push(Bound { section, source: Source::Index, encoding, kept, live });
            section = sections.next().expect("the linear comes after its index");
        }
        assert_eq!(section, bound.section, "an index is all that is new");
        indexed.push(bound);
    }
    indexed
}

/// The union of the linears' formats ([`bitnet_runtime::Config::formats`]).
pub(crate) fn formats(bound: &[Bound]) -> u16 {
    let is_linear = |b: &&Bound| {
        b.section.kind.is_linear() || matches!((b.section.kind, &b.source), (Kind::Head, Source::Masters(_)))
    };
    bound.iter().filter(is_linear).fold(0, |set, b| match b.encoding {
        Encoding::Matrix(_) | Encoding::Blocks(_) => set | 1 << b.encoding.tag(),
        _ => set,
    })
}

/// A section as the checkpoint has it: an image may store a matrix by its columns.
pub fn in_checkpoint(section: &Section) -> Section {
    match section.kind {
        Kind::DownColumns => Section { kind: Kind::Down, rows: section.cols, cols: section.rows, ..*section },
        kind => Section { kind: kind.linear_kind(), ..*section },
    }
}

/// Whether a tensor holds what is computed anew: the angles of rotations.
fn is_computed(naming: Naming, name: &str) -> bool {
    match naming {
        Naming::HuggingFace => name.ends_with(".rotary_emb.inv_freq"),
        Naming::Gguf => false,
        Naming::Llama2c => name == llama2c::ANGLES,
    }
}

struct Binder<'a> {
    checkpoint: &'a Checkpoint,
    naming: Naming,
    storage: Storage,
    progress: &'a dyn Progress,
    used: BTreeSet<&'a str>,
    notes: Vec<String>,
}

impl<'a> Binder<'a> {
    fn wrong<T>(&self, tensor: &TensorInfo, what: impl Into<String>) -> Result<T, Error> {
        Err(Error::tensor(self.checkpoint.path_of(tensor), &tensor.name, what))
    }

    /// The first of `names` that the checkpoint has.
    fn find(&mut self, names: &[String]) -> Result<&'a TensorInfo, Error> {
        match names.iter().find_map(|name| self.checkpoint.tensor(name)) {
            Some(tensor) => {
                self.used.insert(&tensor.name);
                Ok(tensor)
            }
            None => Err(Error::tensor(&self.checkpoint.place(), &names.join(" or "), "missing")),
        }
    }

    fn expect_shape(&self, tensor: &TensorInfo, shape: &[u64]) -> Result<(), Error> {
        if tensor.shape == shape {
            return Ok(());
        }
        self.wrong(tensor, format!("shape {:?}, the configuration needs {shape:?}", tensor.shape))
    }

    fn expect_plain(&self, tensor: &TensorInfo) -> Result<(), Error> {
        if tensor.dtype.is_plain_float() {
            return Ok(());
        }
        self.wrong(tensor, format!("dtype {}, where F32, F16 or BF16 is expected", tensor.dtype.name()))
    }

    fn expect_float(&self, tensor: &TensorInfo) -> Result<(), Error> {
        if tensor.dtype.is_float() {
            return Ok(());
        }
        self.wrong(
            tensor,
            format!("dtype {}, where F32, F16 or BF16 (or blocks of GGUF) is expected", tensor.dtype.name()),
        )
    }

    /// Whether the head is the embedding: the configuration and the tensors have a say.
    fn tied(&mut self, table: &Table) -> Result<bool, Error> {
        let heads = top(self.naming, Kind::Head);
        let head = heads.iter().find_map(|name| self.checkpoint.tensor(name));
        let name = heads.last().expect("a head has a name");
        let (tied, note) = match (table.tie, head) {
            (Some(true), None) => (true, "head: the embedding, by tie_word_embeddings".into()),
            (Some(true), Some(head)) => {
                self.used.insert(&head.name);
                let embedding = self.find(&top(self.naming, Kind::Embedding))?;
                let same = if same_bytes(self.checkpoint, head, embedding)? { "equal" } else { "DIFFERENT" };
                (true, format!("head: the embedding, by tie_word_embeddings; {} is there too and is {same}", head.name))
            }
            (Some(false), None) => {
                let what = "missing, and config.json has tie_word_embeddings = false";
                return Err(Error::tensor(&self.checkpoint.place(), name, what));
            }
            (None, None) if self.naming == Naming::HuggingFace => {
                (true, format!("head: the embedding; there is no {name} and no tie_word_embeddings"))
            }
            (None, None) => (true, format!("head: the embedding; there is no {name}")),
            (Some(false), Some(_)) => (false, format!("head: {name}")),
            (None, Some(_)) if self.naming == Naming::HuggingFace => {
                (false, format!("head: {name}; there is no tie_word_embeddings"))
            }
            (None, Some(_)) => (false, format!("head: {name}")),
        };
        self.notes.push(note);
        Ok(tied)
    }

    /// BitNet embedding models have a norm in every linear, which their configuration does not mention.
    fn linear_norms(&mut self, table: &mut Table) {
        let section = Section { kind: Kind::QueryInputNorm, layer: Some(0), rows: 1, cols: 1 };
        let names = names(self.naming, &section, false);
        let found = names.iter().find(|name| self.checkpoint.tensor(name).is_some());
        if let (None, Some(name)) = (table.config.linear_norm_eps, found) {
            table.config.linear_norm_eps = Some(table.config.norm_eps);
            self.notes.push(format!("linears have norms of their own, by {name}; their epsilon is that of the others"));
            // Such linears are BitNet's, so floats are masters.
            if let Storage::Found { masters } = &mut self.storage {
                *masters = true;
            }
        }
    }

    /// Divides the angles by what a file brings for a longer context.
    fn factors(&mut self, table: &mut Table) -> Result<(), Error> {
        if self.naming != Naming::Gguf || self.checkpoint.tensor(FACTORS).is_none() {
            return Ok(());
        }
        let tensor = self.find(&[FACTORS.into()])?;
        self.expect_plain(tensor)?;
        self.expect_shape(tensor, &[table.frequencies.len() as u64])?;
        let mut factors = vec![0.0; table.frequencies.len()];
        self.checkpoint.read_floats(tensor, 0, &mut Vec::new(), &mut factors)?;
        for (frequency, factor) in table.frequencies.iter_mut().zip(factors) {
            if factor <= 0.0 {
                return self.wrong(tensor, format!("{factor} is no factor"));
            }
            *frequency /= factor;
        }
        Ok(())
    }

    fn source(&mut self, section: &Section, table: &Table) -> Result<Source, Error> {
        let read = in_checkpoint(section);
        let (rows, cols) = (u64::from(read.rows), u64::from(read.cols));
        let names = names(self.naming, section, table.config.tied);
        match section.kind {
            Kind::RopeFrequencies => Ok(Source::Values(table.frequencies.clone())),
            Kind::Head if table.config.linear_head => self.linear(&names, rows, cols),
            Kind::Gate | Kind::Up | Kind::UpRows if table.config.recurrence => {
                // Both are one matrix, which has one scale and one norm of its input.
                let tensor = self.find(&self.names_of(Kind::Gate, section))?;
                self.expect_plain(tensor)?;
                self.expect_shape(tensor, &[2 * rows, cols])?;
                Ok(Source::Part(tensor.clone(), if section.kind == Kind::Gate { 0 } else { rows }))
            }
            Kind::UpInputNorm if table.config.recurrence => {
                let tensor = self.find(&self.names_of(Kind::GateInputNorm, section))?;
                self.expect_plain(tensor)?;
                self.expect_shape(tensor, &[cols])?;
                Ok(Source::Vector(tensor.clone()))
            }
            Kind::RecurrenceBound => Ok(Source::Values(self.bounds(section, table)?)),
            Kind::Embedding | Kind::Head | Kind::HeadColumns | Kind::HeadApart | Kind::HeadNorms | Kind::HeadLow => {
                let tensor = self.find(&names)?;
                self.expect_float(tensor)?;
                self.expect_shape(tensor, &[table.config.vocab.into(), table.config.hidden.into()])?;
                Ok(Source::Rows(tensor.clone()))
            }
            Kind::UpRows | Kind::DownColumns => match self.linear(&names, rows, cols)? {
                Source::Grouped(tensor, _) | Source::Rows(tensor) => {
                    self.wrong(&tensor, "not ternary with one scale, which --live-ffn needs")
                }
                ternary => Ok(ternary),
            },
            Kind::MemoryTaps => {
                let channels = cols as usize / TAPS;
                let taps = self.memory_floats(section, "taps", &[channels as u64, TAPS as u64])?;
                // By taps, so that a vector of channels is loaded at once.
                let values = (0..taps.len()).map(|i| taps[i % channels * TAPS + i / channels]).collect();
                Ok(Source::Values(values))
            }
            Kind::MemoryDecay => {
                let parts = ["log_rate", "decay_bias", "write_bias"];
                let parts = parts.map(|part| self.memory_floats(section, part, &[cols / 3]));
                Ok(Source::Values(parts.into_iter().collect::<Result<Vec<_>, _>>()?.concat()))
            }
            Kind::MemoryForget => {
                let bound = self.memory_floats(section, "bound", &[cols / 2])?;
                if let Some(least) = bound.iter().find(|&least| !(0.0..1.0).contains(least)) {
                    let name = format!("layers.{}.self_attn.memory.bound", section.layer.unwrap_or_default());
                    let what = format!("{name}: {least} is the least that is kept, which is 0 or more and less than 1");
                    return Err(Error::not_readable(self.checkpoint.directory(), &what));
                }
                let bias = self.memory_floats(section, "forget_bias", &[cols / 2])?;
                Ok(Source::Values([bound, bias].concat()))
            }
            Kind::MemoryNorm => Ok(Source::Values(self.memory_floats(section, "norm", &[cols])?)),
            Kind::MemoryShare => Ok(Source::Values(self.memory_floats(section, "rho", &[cols])?)),
            kind if kind.is_linear() => self.linear(&names, rows, cols),
            _ => {
                let tensor = self.find(&names)?;
                self.expect_plain(tensor)?;
                self.expect_shape(tensor, &[cols])?;
                Ok(Source::Vector(tensor.clone()))
            }
        }
    }

    /// The names of a tensor of the same layer.
    fn names_of(&self, kind: Kind, section: &Section) -> Vec<String> {
        names(self.naming, &Section { kind, ..*section }, false)
    }

    /// The least of its state that a layer's recurrence keeps: what the shares of the layers before it and its own are, but the
    /// first's, of a softmax over the layers.
    fn bounds(&mut self, section: &Section, table: &Table) -> Result<Vec<f32>, Error> {
        let (layers, hidden) = (table.config.layers as usize, table.config.hidden as usize);
        let tensor = self.find(&either(["lower_bounds".to_owned()].into_iter()))?;
        self.expect_plain(tensor)?;
        self.expect_shape(tensor, &[layers as u64, hidden as u64])?;
        let mut values = vec![0.0; layers * hidden];
        self.checkpoint.read_floats(tensor, 0, &mut Vec::new(), &mut values)?;
        let layer = section.layer.unwrap_or_default() as usize;
        let bound = |channel: usize| {
            let of = |layer: usize| f64::from(values[layer * hidden + channel]);
            let most = (0..layers).map(of).fold(f64::NEG_INFINITY, f64::max);
            let exp = |layer| (of(layer) - most).exp();
            ((1..=layer).map(exp).sum::<f64>() / (0..layers).map(exp).sum::<f64>()) as f32
        };
        Ok((0..hidden).map(bound).collect())
    }

    /// A small tensor of a layer's memory.
    fn memory_floats(&mut self, section: &Section, part: &str, shape: &[u64]) -> Result<Vec<f32>, Error> {
        let layer = section.layer.unwrap_or_default();
        let tensor = self.find(&either([format!("layers.{layer}.self_attn.memory.{part}")].into_iter()))?;
        self.expect_plain(tensor)?;
        self.expect_shape(tensor, shape)?;
        let mut values = vec![0.0; shape.iter().product::<u64>() as usize];
        self.checkpoint.read_floats(tensor, 0, &mut Vec::new(), &mut values)?;
        Ok(values)
    }

    fn linear(&mut self, names: &[String], rows: u64, cols: u64) -> Result<Source, Error> {
        let tensor = self.find(names)?;
        if tensor.dtype != Dtype::U8 {
            self.expect_float(tensor)?;
            self.expect_shape(tensor, &[rows, cols])?;
            if self.storage == Storage::Multiply {
                return self.wrong(tensor, "float masters, but config.json says that weights are packed (offline)");
            }
            if self.checkpoint.ternarizes(tensor) {
                return self.found(tensor, true);
            }
            if let Storage::Found { masters } = self.storage {
                return self.found(tensor, masters);
            }
            return Ok(Source::Masters(tensor.clone()));
        }
        self.expect_shape(tensor, &[rows.div_ceil(4), cols])?;
        let multiply = match self.storage {
            Storage::Multiply => true,
            Storage::Divide => false,
            Storage::Online => {
                return self.wrong(tensor, "packed, but config.json says that weights are masters (online)");
            }
            Storage::Masters | Storage::Found { .. } => {
                let what = "packed, but config.json has no quantization_config: \
                            whether its weight_scale multiplies or divides is unknown";
                return self.wrong(tensor, what);
            }
        };
        let scale = self.find(&[tensor.name.replace(".weight", ".weight_scale")])?;
        Ok(Source::Packed(tensor.clone(), self.multiplier(scale, multiply)?))
    }

    /// A linear of which nothing but its numbers is known: ternary if they are.
    fn found(&mut self, tensor: &'a TensorInfo, masters: bool) -> Result<Source, Error> {
        let (magnitude, grouped, gaps) = match tensor.dtype {
            Dtype::I2_S | Dtype::I2_S_64 => (Some(tensor.scale), None, Gaps::Anywhere),
            _ => {
                let evidence = self.evidence(tensor)?;
                (evidence.magnitude(), evidence.grouped(), evidence.gaps())
            }
        };
        // A multiplier beside the weights, which some converters keep apart.
        let beside = tensor.name.strip_suffix(".weight").map(|name| format!("{name}.scale"));
        let beside = beside.and_then(|name| self.checkpoint.tensor(&name));
        match (magnitude, beside) {
            (Some(magnitude), None) => Ok(Source::Ternary(tensor.clone(), magnitude, 1.0, gaps)),
            (Some(magnitude), Some(scale)) => {
                self.used.insert(&scale.name);
                Ok(Source::Ternary(tensor.clone(), magnitude, self.multiplier(scale, true)?, gaps))
            }
            (None, Some(scale)) => self.wrong(scale, "a multiplier of weights that have not one magnitude"),
            (None, None) if grouped.is_some() => Ok(Source::Grouped(tensor.clone(), grouped == Some(true))),
            (None, None) if masters && tensor.dtype.is_plain_float() => Ok(Source::Masters(tensor.clone())),
            (None, None) => Ok(Source::Rows(tensor.clone())),
        }
    }

    /// Looks at the numbers of a matrix, as far as it takes.
    fn evidence(&self, tensor: &TensorInfo) -> Result<Evidence, Error> {
        let cols = tensor.shape[1];
        let (mut raw, mut floats) = (Vec::new(), Vec::new());
        let mut evidence = Evidence::default();
        for first in (0..tensor.shape[0]).step_by(UNIT_ROWS) {
            if self.progress.cancelled() {
                return Err(Error::Interrupted);
            }
            let rows = (UNIT_ROWS as u64).min(tensor.shape[0] - first);
            floats.resize((rows * cols) as usize, 0.0);
            self.checkpoint.read_floats(tensor, first * cols, &mut raw, &mut floats)?;
            evidence.add(&floats, cols as usize);
            if !evidence.is_open() {
                break;
            }
        }
        Ok(evidence)
    }

    /// How far a matrix is from what the absmean rule would make of it.
    fn distance(&self, tensor: &TensorInfo) -> Result<f32, Error> {
        let (mut raw, mut floats) = (Vec::new(), Vec::new());
        let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
        let mut each = |then: &mut dyn FnMut(&[f32])| {
            (0..rows).step_by(UNIT_ROWS).try_for_each(|first| {
                floats.resize((cols * (UNIT_ROWS as u64).min(rows - first)) as usize, 0.0);
                self.checkpoint.read_floats(tensor, first * cols, &mut raw, &mut floats)?;
                then(&floats);
                Ok::<_, Error>(())
            })
        };
        let mut sum = MagnitudeSum::default();
        each(&mut |values| sum.add(values))?;
        let (rule, mut distance, mut codes) = (Absmean::new(sum.mean()), Distance::default(), Vec::new());
        each(&mut |values| {
            codes.resize(values.len(), 0);
            rule.ternarize(values, &mut codes);
            distance.add(values, &codes, rule.multiplier);
        })?;
        Ok(distance.relative())
    }

    /// Reads a `weight_scale` and turns it into what the image stores.
    fn multiplier(&mut self, tensor: &TensorInfo, multiply: bool) -> Result<f32, Error> {
        self.expect_plain(tensor)?;
        if !matches!(tensor.shape[..], [] | [1]) {
            return self.wrong(tensor, format!("shape {:?}, where one number is expected", tensor.shape));
        }
        let mut value = [0.0];
        self.checkpoint.read_floats(tensor, 0, &mut Vec::new(), &mut value)?;
        let [value] = value;
        if value <= 0.0 {
            return self.wrong(tensor, format!("{value} is no scale"));
        }
        let multiplier = if multiply { value } else { 1.0 / value };
        let (word, inverse) = if multiply { ("multiplies", 1.0 / value) } else { ("divides", value) };
        let within = |x: f32, (low, high): (f32, f32)| low <= x && x <= high;
        if !within(multiplier, SCALE_RANGE) {
            let (low, high) = SCALE_RANGE;
            let what = format!("{value} {word} by the configuration: weights of {multiplier}, outside {low} to {high}");
            return self.wrong(tensor, what);
        }
        if !within(multiplier, SCALE_USUAL) && within(inverse, SCALE_USUAL) {
            let what = format!("{value} {word} by the configuration: weights of {multiplier}, which is unusual");
            self.notes.push(format!("{}: {what}", tensor.name));
        }
        Ok(multiplier)
    }
}

/// What GGUF files bring to divide angles by.
const FACTORS: &str = "rope_freqs.weight";

/// The names that a section's tensor may have.
fn names(naming: Naming, section: &Section, tied: bool) -> Vec<String> {
    let kind = match section.kind.linear_kind() {
        Kind::Head | Kind::HeadColumns | Kind::HeadApart | Kind::HeadNorms | Kind::HeadLow if tied => Kind::Embedding,
        Kind::HeadColumns | Kind::HeadApart | Kind::HeadNorms | Kind::HeadLow => Kind::Head,
        kind => kind,
    };
    let Some(layer) = section.layer else { return top(naming, kind) };
    match naming {
        Naming::HuggingFace => {
            let each = |name: &&str| format!("layers.{layer}.{name}.weight");
            either(hugging_face(kind).iter().map(each))
        }
        Naming::Gguf => gguf(kind).iter().map(|name| format!("blk.{layer}.{name}.weight")).collect(),
        Naming::Llama2c => llama2c_name(kind).iter().map(|name| format!("{name}.{layer}")).collect(),
    }
}

/// With and without the prefix that models with a head have.
fn either(names: impl Iterator<Item = String>) -> Vec<String> {
    names.flat_map(|name| [format!("model.{name}"), name]).collect()
}

/// The names of a tensor that belongs to no layer.
fn top(naming: Naming, kind: Kind) -> Vec<String> {
    let of = |hugging_face: &str, gguf: &str, llama2c: &str| match naming {
        Naming::HuggingFace => either([hugging_face.to_owned()].into_iter()),
        Naming::Gguf => vec![gguf.into()],
        Naming::Llama2c => vec![llama2c.into()],
    };
    match kind {
        Kind::Head if naming == Naming::HuggingFace => vec!["lm_head.weight".into()],
        Kind::Head => of("", "output.weight", "wcls"),
        Kind::HeadInputNorm if naming == Naming::HuggingFace => vec!["lm_head.norm.weight".into()],
        Kind::Embedding if naming == Naming::HuggingFace => {
            either(["embed_tokens.weight", "embeddings.weight"].map(str::to_owned).into_iter())
        }
        Kind::Embedding => of("", "token_embd.weight", "tok_emb"),
        Kind::FinalNorm => of("norm.weight", "output_norm.weight", "rms_final"),
        _ => Vec::new(),
    }
}

fn hugging_face(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::AttentionNorm => &["input_layernorm", "attn_norm"],
        Kind::FfnNorm => &["post_attention_layernorm", "mlp_norm"],
        Kind::AttentionSubNorm => &["self_attn.attn_sub_norm", "self_attn.inner_attn_ln"],
        Kind::FfnSubNorm => &["mlp.ffn_sub_norm", "mlp.ffn_layernorm"],
        Kind::Query => &["self_attn.q_proj"],
        Kind::Key => &["self_attn.k_proj"],
        Kind::Value => &["self_attn.v_proj"],
        Kind::Output => &["self_attn.o_proj", "attn.o_proj"],
        Kind::RecurrenceInput => &["attn.i_proj"],
        Kind::RecurrenceForget => &["attn.f_proj"],
        Kind::RecurrenceGate => &["attn.g_proj"],
        Kind::RecurrenceNorm => &["attn.g_norm"],
        Kind::RecurrenceInputInputNorm => &["attn.i_proj.norm"],
        Kind::RecurrenceForgetInputNorm => &["attn.f_proj.norm"],
        Kind::RecurrenceGateInputNorm => &["attn.g_proj.norm"],
        Kind::Gate => &["mlp.gate_proj"],
        Kind::Up => &["mlp.up_proj"],
        Kind::Down => &["mlp.down_proj"],
        Kind::MemoryInput => &["self_attn.memory.in_proj"],
        Kind::MemoryGates => &["self_attn.memory.gate_proj"],
        Kind::MemoryOutput => &["self_attn.memory.o_proj"],
        Kind::QueryNorm => &["self_attn.q_norm"],
        Kind::KeyNorm => &["self_attn.k_norm"],
        Kind::QueryInputNorm => &["self_attn.q_proj.rms_norm", "self_attn.q_proj.norm"],
        Kind::KeyInputNorm => &["self_attn.k_proj.rms_norm", "self_attn.k_proj.norm"],
        Kind::ValueInputNorm => &["self_attn.v_proj.rms_norm", "self_attn.v_proj.norm"],
        Kind::OutputInputNorm => &["self_attn.o_proj.rms_norm", "self_attn.o_proj.norm", "attn.o_proj.norm"],
        Kind::GateInputNorm => &["mlp.gate_proj.rms_norm", "mlp.gate_proj.norm"],
        Kind::UpInputNorm => &["mlp.up_proj.rms_norm", "mlp.up_proj.norm"],
        Kind::DownInputNorm => &["mlp.down_proj.rms_norm", "mlp.down_proj.norm"],
        _ => &[],
    }
}

fn gguf(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::AttentionNorm => &["attn_norm"],
        Kind::FfnNorm => &["ffn_norm"],
        Kind::AttentionSubNorm => &["attn_sub_norm"],
        Kind::FfnSubNorm => &["ffn_sub_norm"],
        Kind::Query => &["attn_q"],
        Kind::Key => &["attn_k"],
        Kind::Value => &["attn_v"],
        Kind::Output => &["attn_output"],
        Kind::Gate => &["ffn_gate"],
        Kind::Up => &["ffn_up"],
        Kind::Down => &["ffn_down"],
        Kind::QueryNorm => &["attn_q_norm"],
        Kind::KeyNorm => &["attn_k_norm"],
        Kind::QueryInputNorm => &["attn_q_norm_in"],
        Kind::KeyInputNorm => &["attn_k_norm_in"],
        Kind::ValueInputNorm => &["attn_v_norm_in"],
        Kind::OutputInputNorm => &["attn_output_norm_in"],
        Kind::GateInputNorm => &["ffn_gate_norm_in"],
        Kind::UpInputNorm => &["ffn_up_norm_in"],
        Kind::DownInputNorm => &["ffn_down_norm_in"],
        _ => &[],
    }
}

fn llama2c_name(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::AttentionNorm => &["rms_att"],
        Kind::FfnNorm => &["rms_ffn"],
        Kind::Query => &["wq"],
        Kind::Key => &["wk"],
        Kind::Value => &["wv"],
        Kind::Output => &["wo"],
        Kind::Gate => &["w1"],
        Kind::Up => &["w3"],
        Kind::Down => &["w2"],
        _ => &[],
    }
}

/// Whether two tensors are the same, bit for bit.
fn same_bytes(checkpoint: &Checkpoint, a: &TensorInfo, b: &TensorInfo) -> Result<bool, Error> {
    const CHUNK: u64 = 1 << 18;
    if a.dtype != b.dtype || a.shape != b.shape {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let mut offset = 0;
    while offset < a.bytes {
        let n = CHUNK.min(a.bytes - offset) as usize;
        checkpoint.read(a, offset, &mut left[..n])?;
        checkpoint.read(b, offset, &mut right[..n])?;
        if left[..n] != right[..n] {
            return Ok(false);
        }
        offset += n as u64;
    }
    Ok(true)
}
