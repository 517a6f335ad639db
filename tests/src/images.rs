//! Images in memory, and every way to run them.
use crate::argmax;
use bitnet_kernel::{Block, Kernels};
use bitnet_pack::Options;
use bitnet_runtime::error::SourceError;
use bitnet_runtime::generate::Session;
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::parallel::{Pool, Serial};
use bitnet_runtime::sampler::{Sampler, Sampling};
use bitnet_runtime::source::{BlockDevice, Mapped, Streamed, WeightSource};
use bitnet_runtime::{Error, Image, Limits, Model, Plan, State};
use std::cell::Cell;
use std::path::Path;
use zerocopy::IntoBytes;

/// An image in aligned memory.
#[derive(Debug)]
pub struct Packed {
    blocks: Vec<Block>,
}

impl Packed {
    /// Packs a checkpoint.
    ///
    /// # Panics
    /// If it cannot be packed.
    pub fn pack(source: &Path, options: &Options) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("image");
        bitnet_pack::pack(source, &path, options, &mut ()).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
        Self::read(&path)
    }
    /// Reads an image.
    ///
    /// # Panics
    /// If it cannot be read or is not whole blocks.
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).expect("the image is there");
        assert!(bytes.len().is_multiple_of(Block::BYTES));
        let mut blocks = vec![Block::ZERO; bytes.len() / Block::BYTES];
        blocks.as_mut_bytes().copy_from_slice(&bytes);
        Self { blocks }
    }
    /// An image of these blocks, which need not be sound.
    pub const fn from_blocks(blocks: Vec<Block>) -> Self {
        Self { blocks }
    }
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.blocks.as_bytes()
    }
    /// Its blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }
    /// The checked image.
    ///
    /// # Panics
    /// If it is not one.
    pub fn image(&self) -> Image<'_> {
        Image::check(self.bytes(), self.bytes().len() as u64).expect("a sound image")
    }
    /// Calls `f` with an empty conversation, on one thread and with mapped weights.
    ///
    /// # Panics
    /// If the model cannot be opened.
    pub fn converse<R>(
        &self,
        kernels: &'static dyn Kernels,
        limits: Limits,
        sampling: Sampling,
        f: impl FnOnce(Session<'_>) -> R,
    ) -> R {
        let image = self.image();
        let config = image.header().config;
        let plan = Plan::new(&config, &limits);
        let blocks = |n| vec![Block::ZERO; n];
        let (mut scratch, mut state, mut sampler) = (blocks(plan.scratch), blocks(plan.state), blocks(plan.sampler));
        let mut source = Mapped::new(self.blocks());
        let state = State::new(&config, &limits, &mut state).expect("planned memory");
        let model = Model::new(&image, limits, kernels, &Serial, &mut source, &mut scratch).expect("planned memory");
        let sampler = Sampler::new(config.vocab, sampling, &mut sampler).expect("planned memory");
        f(Session::new(model, state, sampler))
    }
}

/// One way to run a model.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// The backend.
    pub kernels: &'static dyn Kernels,
    /// Threads.
    pub threads: usize,
    /// Whether weights go through a staging buffer of the smallest size.
    pub streamed: bool,
    /// Tokens in a batch.
    pub batch: u32,
    /// How keys and values are kept.
    pub kv: KvFormat,
}

impl Way {
    /// One thread, mapped, token by token, half-precision keys and values.
    pub const fn plain(kernels: &'static dyn Kernels) -> Self {
        Self { kernels, threads: 1, streamed: false, batch: 1, kv: KvFormat::F16 }
    }
    /// Opens `packed` in this way and calls `f` with the model and an empty conversation.
    ///
    /// # Panics
    /// If the model cannot be opened.
    pub fn run<R: Send>(&self, packed: &Packed, f: impl FnOnce(&mut Model<'_>, &mut State<'_>) -> R + Send) -> R {
        let image = packed.image();
        let context = image.header().plan.limits.context;
        let limits = Limits { context, batch: self.batch, kv: self.kv };
        let plan = Plan::new(&image.header().config, &limits);
        let pool = Pool::new(self.threads).expect("threads");
        pool.enter(|| {
            let mut staging = vec![Block::ZERO; Streamed::<Disk<'_>>::staging_blocks_min(&image)];
            let (mut mapped, mut streamed);
            let source: &mut dyn WeightSource = if self.streamed {
                streamed = Streamed::new(Disk(packed.blocks()), &mut staging);
                &mut streamed
            } else {
                mapped = Mapped::new(packed.blocks());
                &mut mapped
            };
            let (mut scratch, mut state) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
            let mut state = State::new(&image.header().config, &limits, &mut state).expect("planned memory");
            let mut model =
                Model::new(&image, limits, self.kernels, &pool, source, &mut scratch).expect("planned memory");
            f(&mut model, &mut state)
        })
    }
    /// The logits after every token.
    ///
    /// # Panics
    /// If the pass fails.
    pub fn logits(&self, packed: &Packed, ids: &[u32]) -> Vec<Vec<f32>> {
        self.run(packed, |model, state| {
            let mut rows = Vec::new();
            model.prefill_each(state, ids, &mut |_, logits| rows.push(logits.to_vec())).expect("a pass");
            rows
        })
    }
    /// `n` tokens after `ids`, each the best.
    ///
    /// # Errors
    /// As the model's.
    pub fn greedy(&self, packed: &Packed, ids: &[u32], n: usize) -> Result<Vec<u32>, Error> {
        self.run(packed, |model, state| {
            let mut next = argmax(model.prefill(state, ids)?) as u32;
            let mut tokens = Vec::new();
            while tokens.len() < n {
                tokens.push(next);
                next = argmax(model.step(state, next)?) as u32;
            }
            Ok(tokens)
        })
    }
}

/// A block device in memory.
#[derive(Debug)]
pub struct Disk<'a>(pub &'a [Block]);

impl BlockDevice for Disk<'_> {
    fn read(&mut self, start: u32, into: &mut [Block]) -> Result<(), SourceError> {
        let out_of_range = SourceError::OutOfRange { start, blocks: into.len() as u32 };
        let from = self.0.get(start as usize..).and_then(|b| b.get(..into.len())).ok_or(out_of_range)?;
        into.copy_from_slice(from);
        Ok(())
    }
}

/// A block device in memory that fails when it is told to.
#[derive(Debug)]
pub struct Failing<'a> {
    /// What is read.
    pub disk: Disk<'a>,
    /// Reads until one fails, and all after it do.
    pub left: &'a Cell<usize>,
}

impl BlockDevice for Failing<'_> {
    fn read(&mut self, start: u32, into: &mut [Block]) -> Result<(), SourceError> {
        self.left.set(self.left.get().checked_sub(1).ok_or(SourceError::Device)?);
        self.disk.read(start, into)
    }
}

/// One number for many floats: FNV-1a over their bits.
pub fn fingerprint<'a>(rows: impl IntoIterator<Item = &'a Vec<f32>>) -> u64 {
    let bytes = rows.into_iter().flatten().flat_map(|v| v.to_bits().to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}
