//! Passes over all layers: moments of inputs, squared gradients, and the loss of a changed model.
use super::layer::{Layer, norm, norm_back};
use super::matmul::{View, parallel, product};
use super::{Change, Linear, Reference, Site, Windows};
use crate::{Error, Progress};
use bitnet_runtime::image::Kind;

/// Tokens that go through a layer together, and whose residual streams are kept for the way back.
const CHUNK: usize = 1024;
/// Tokens whose logits are in memory together.
const HEAD_CHUNK: usize = 256;

/// How much of an input's second moment is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The mean square of every column.
    Diagonal,
    /// The mean product of every two columns.
    Full,
}

/// The second moment of what linears read.
#[derive(Clone, Debug)]
pub struct Moment {
    /// The layer; `None` of the head.
    pub layer: Option<u32>,
    /// Which linears read it: [`Site::kinds`].
    pub site: Site,
    /// Columns.
    pub cols: usize,
    /// The mean of `x xᵀ`, `[cols, cols]`, or of its diagonal, `[cols]`.
    pub values: Vec<f32>,
}

impl Moment {
    fn new(layer: Option<u32>, site: Site, cols: usize, wanted: Wanted) -> Self {
        let len = if wanted == Wanted::Full { cols * cols } else { cols };
        Self { layer, site, cols, values: vec![0.0; len] }
    }
    /// Whether it has more than the diagonal.
    pub const fn is_full(&self) -> bool {
        self.values.len() > self.cols
    }
    /// The mean square of every column.
    pub fn diagonal(&self) -> Vec<f32> {
        let step = if self.is_full() { self.cols + 1 } else { 1 };
        self.values.iter().step_by(step).copied().collect()
    }
    /// Adds inputs, each divided by the number of all.
    fn add(&mut self, inputs: &[f32], all: usize) {
        let part = 1.0 / all as f32;
        if self.is_full() {
            let x = View::new(inputs, self.cols);
            self.values.iter_mut().zip(product(x.t(), x)).for_each(|(sum, v)| *sum += v * part);
            return;
        }
        let mut sums = vec![0.0f32; self.cols];
        for row in inputs.chunks_exact(self.cols) {
            sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += v * v);
        }
        self.values.iter_mut().zip(sums).for_each(|(sum, v)| *sum += v * part);
    }
}

/// Which neurons of a feed-forward layer fire after which tokens.
#[derive(Clone, Debug)]
pub struct Firing {
    /// A bit for each token, in words of a neuron after those of another.
    bits: Vec<u64>,
    /// Words of a neuron.
    words: usize,
    tokens: usize,
}

impl Firing {
    pub(crate) fn new(neurons: usize, tokens: usize) -> Self {
        let words = tokens.div_ceil(64);
        Self { bits: vec![0; neurons * words], words, tokens }
    }
    pub(crate) fn set(&mut self, neuron: usize, token: usize) {
        self.bits[neuron * self.words + token / 64] |= 1 << (token % 64);
    }
    /// Neurons.
    pub fn neurons(&self) -> usize {
        self.bits.len() / self.words
    }
    /// Tokens.
    pub const fn tokens(&self) -> usize {
        self.tokens
    }
    /// The tokens after which a neuron fires, a bit each.
    pub fn neuron(&self, neuron: usize) -> &[u64] {
        &self.bits[neuron * self.words..][..self.words]
    }
}

/// Leaves everything as it is.
fn unchanged(_: Linear, _: &mut [f32]) -> Result<(), Error> {
    Ok(())
}

fn heard(progress: &mut dyn Progress, what: &str) -> Result<(), Error> {
    if progress.cancelled() {
        return Err(Error::Interrupted);
    }
    progress.section(what);
    Ok(())
}

/// Elements of whole windows, about [`CHUNK`] tokens.
fn chunk(windows: &Windows, width: usize) -> usize {
    (CHUNK / windows.length()).max(1) * windows.length() * width
}

impl Reference<'_> {
    /// Refuses tokens that the model does not have, and texts without a window.
    fn check(&self, windows: &Windows) -> Result<(), Error> {
        let vocab = self.config().vocab;
        match windows.tokens().iter().find(|&&t| t >= vocab) {
            Some(token) => Err(Error::Options(format!("token {token} of a text, the model has {vocab}"))),
            None if windows.count() == 0 => Err(Error::Options("a text without one whole window".into())),
            None => Ok(()),
        }
    }

    /// Hands the second moment of what each linear reads to `each`: a layer's sites in order, then the head's.
    ///
    /// It costs one forward pass, and for the full moment the square of each site's width for every token on top.
    ///
    /// # Errors
    /// If weights cannot be read, a token is not the model's, the user ends it, or what `each` returns.
    pub fn moments(
        &self,
        windows: &Windows,
        wanted: Wanted,
        progress: &mut dyn Progress,
        each: &mut dyn FnMut(Moment, &mut dyn Progress) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.check(windows)?;
        let (c, tokens) = (*self.config(), windows.tokens().len());
        let mut x = self.embed(windows.tokens())?;
        for layer in 0..c.layers {
            heard(progress, &format!("activations of layer {layer}"))?;
            let sites = [
                (Site::Attention, c.hidden),
                (Site::Output, c.query_width()),
                (Site::Ffn, c.hidden),
                (Site::Down, c.ffn),
            ];
            let mut moments = sites.map(|(site, cols)| Moment::new(Some(layer), site, cols as usize, wanted));
            let weights = Layer::read(self, layer, windows.length(), &unchanged)?;
            for x in x.chunks_mut(chunk(windows, c.hidden as usize)) {
                let inside = weights.forward(x);
                moments.iter_mut().zip(&inside.inputs).for_each(|(moment, inputs)| moment.add(inputs, tokens));
            }
            moments.into_iter().try_for_each(|moment| each(moment, progress))?;
        }
        let mut moment = Moment::new(None, Site::Head, c.hidden as usize, wanted);
        moment.add(&self.final_norm(&x)?, tokens);
        each(moment, progress)
    }

    /// Hands to `each` which neurons' rows of up and columns of down a layer needs after each token: those whose gate is not
    /// cut off, and those whose result is no zero in eight bits.
    ///
    /// # Errors
    /// As [`Reference::moments`].
    pub fn firing(
        &self,
        windows: &Windows,
        progress: &mut dyn Progress,
        each: &mut dyn FnMut(u32, [Firing; 2]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.check(windows)?;
        let (c, tokens) = (*self.config(), windows.tokens().len());
        let ffn = c.ffn as usize;
        let mut x = self.embed(windows.tokens())?;
        for layer in 0..c.layers {
            heard(progress, &format!("neurons of layer {layer}"))?;
            let weights = Layer::read(self, layer, windows.length(), &unchanged)?;
            let mut firing = [Firing::new(ffn, tokens), Firing::new(ffn, tokens)];
            let mut token = 0;
            for x in x.chunks_mut(chunk(windows, c.hidden as usize)) {
                let inside = weights.forward(x);
                for (gate, down) in inside.gate.chunks_exact(ffn).zip(inside.inputs[3].chunks_exact(ffn)) {
                    let least = down.iter().fold(1e-5f32, |most, v| most.max(v.abs())) / 254.0;
                    for n in 0..ffn {
                        if gate[n] > 0.0 {
                            firing[0].set(n, token);
                        }
                        if down[n].abs() > least {
                            firing[1].set(n, token);
                        }
                    }
                    token += 1;
                }
            }
            each(layer, firing)?;
        }
        Ok(())
    }

    fn final_norm(&self, x: &[f32]) -> Result<Vec<f32>, Error> {
        let weight = self.vector(None, Kind::FinalNorm, self.config().hidden)?.expect("every model has it");
        Ok(norm(x, &weight, self.config().norm_eps))
    }

    /// What the head reads after each token.
    fn hidden(&self, windows: &Windows, change: &Change<'_>, progress: &mut dyn Progress) -> Result<Vec<f32>, Error> {
        self.check(windows)?;
        let mut x = self.embed_changed(windows.tokens(), change)?;
        for layer in 0..self.config().layers {
            heard(progress, &format!("loss, layer {layer}"))?;
            let weights = Layer::read(self, layer, windows.length(), change)?;
            for x in x.chunks_mut(chunk(windows, self.config().hidden as usize)) {
                weights.forward(x);
            }
        }
        self.final_norm(&x)
    }

    /// The logits after each token, `[tokens, vocab]`, of a model whose linears `change` changed: all in memory, for tests of
    /// small models.
    ///
    /// # Errors
    /// As [`Reference::moments`].
    pub fn logits(&self, windows: &Windows, change: &Change<'_>) -> Result<Vec<f32>, Error> {
        let hidden = self.hidden(windows, change, &mut ())?;
        let mut head = self.weights(Linear::HEAD)?;
        change(Linear::HEAD, &mut head)?;
        let cols = self.config().hidden as usize;
        Ok(product(View::new(&hidden, cols), View::new(&head, cols).t()))
    }

    /// The mean squared gradient at the output of every linear, `[rows]`, layer after layer from the first, then the head's: the
    /// diagonal of the outputs' factor of the Fisher information, which is the expected Hessian of the loss
    /// (Martens and Grosse 2015, arXiv:1503.05671). Last comes that at what the embedding gives, `[cols]`.
    ///
    /// The loss is the sum of the tokens' losses with labels drawn from the model's own distribution by a generator with this
    /// seed. It costs two forward passes and one that is as long. The residual streams of `CHUNK` tokens at all layers
    /// are in memory.
    ///
    /// # Errors
    /// As [`Reference::moments`].
    pub fn fisher(
        &self,
        windows: &Windows,
        seed: u64,
        progress: &mut dyn Progress,
    ) -> Result<Vec<(Linear, Vec<f32>)>, Error> {
        self.check(windows)?;
        let (hidden, layers) = (self.config().hidden as usize, self.config().layers);
        let linears: Vec<Linear> = self.linears().chain([Linear::HEAD]).collect();
        let mut sums: Vec<Vec<f64>> = linears.iter().map(|&linear| vec![0.0; self.shape(linear).0]).collect();
        let mut of_embedding = vec![0.0; hidden];
        let norm = self.vector(None, Kind::FinalNorm, self.config().hidden)?.expect("every model has it");
        let head = self.weights(Linear::HEAD)?;
        let mut random = Random(seed);
        let count = chunk(windows, 1);
        for tokens in windows.tokens().chunks(count) {
            let mut streams = vec![self.embed(tokens)?];
            for layer in 0..layers {
                heard(progress, &format!("gradients, layer {layer} forwards"))?;
                let mut x = streams[layer as usize].clone();
                Layer::read(self, layer, windows.length(), &unchanged)?.forward(&mut x);
                streams.push(x);
            }
            let x = streams.pop().expect("the last layer's");
            let normed = super::layer::norm(&x, &norm, self.config().norm_eps);
            let mut gradient = Vec::with_capacity(normed.len());
            let of_head = sums.last_mut().expect("the head's");
            for part in normed.chunks(HEAD_CHUNK * hidden) {
                gradient.extend(head_gradient(part, &head, hidden, &mut random, of_head));
            }
            let mut gradient = norm_back(&x, &norm, self.config().norm_eps, &gradient);
            for layer in (0..layers).rev() {
                heard(progress, &format!("gradients, layer {layer} backwards"))?;
                let weights = Layer::read(self, layer, windows.length(), &unchanged)?;
                let x = streams.pop().expect("one a layer");
                let inside = weights.forward(&mut x.clone());
                let gradients = weights.backward(&x, &inside, gradient);
                let sums = &mut sums[layer as usize * Linear::KINDS.len()..];
                sums.iter_mut().zip(&gradients.outputs).for_each(|(sums, gradient)| add_squares(sums, gradient));
                gradient = gradients.input;
            }
            add_squares(&mut of_embedding, &gradient);
        }
        let tokens = windows.tokens().len() as f64;
        let mean = |sums: Vec<f64>| sums.into_iter().map(|sum| (sum / tokens) as f32).collect();
        let sums = linears.into_iter().zip(sums).chain([(Linear::EMBEDDING, of_embedding)]);
        Ok(sums.map(|(linear, sum)| (linear, mean(sum))).collect())
    }
}

fn add_squares(sums: &mut [f64], rows: &[f32]) {
    for row in rows.chunks_exact(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(v * v));
    }
}

/// The gradient at what the head reads, of losses whose labels are drawn.
fn head_gradient(x: &[f32], head: &[f32], hidden: usize, random: &mut Random, squares: &mut [f64]) -> Vec<f32> {
    let mut logits = product(View::new(x, hidden), View::new(head, hidden).t());
    let draws: Vec<f64> = (0..x.len() / hidden).map(|_| random.fraction()).collect();
    let vocab = squares.len();
    let mut rows = vec![Vec::new(); draws.len()];
    let each = |t: usize| {
        let mut p = softmax(&logits[t * vocab..][..vocab]);
        let mut left = draws[t] * p.iter().map(|&p| f64::from(p)).sum::<f64>();
        let past = |p: &f32| {
            left -= f64::from(*p);
            left < 0.0
        };
        let label = p.iter().position(past).unwrap_or(vocab - 1);
        p[label] -= 1.0;
        p
    };
    parallel(draws.len(), each, |t, row| rows[t] = row);
    logits.clear();
    logits.extend(rows.into_iter().flatten());
    add_squares(squares, &logits);
    product(View::new(&logits, vocab), View::new(head, hidden))
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, v| max.max(*v));
    let mut p: Vec<f32> = logits.iter().map(|v| libm::expf(v - max)).collect();
    let sum = p.iter().map(|&p| f64::from(p)).sum::<f64>() as f32;
    p.iter_mut().for_each(|p| *p /= sum);
    p
}

/// SplitMix64 (Steele et al. 2014).
struct Random(u64);

impl Random {
    fn fraction(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A text on which changed models are compared with the unchanged one.
#[derive(Debug)]
pub struct HeldOut<'a> {
    model: &'a Reference<'a>,
    windows: Windows,
    hidden: Vec<f32>,
}

/// How well a changed model predicts a text. In nats, means over all predicted tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Predicted tokens.
    pub tokens: usize,
    /// The changed model's loss.
    pub nats: f64,
    /// The unchanged model's loss.
    pub source_nats: f64,
    /// The divergence of the changed model's distribution from the unchanged model's, `KL(source, changed)`.
    pub kl: f64,
    /// Share of tokens after which both models have the same best token.
    pub same_best: f64,
    /// The standard error of the difference of the losses, from that of each window; NaN with one window.
    pub error: f64,
}

impl Score {
    /// The changed model's perplexity.
    pub fn perplexity(&self) -> f64 {
        libm::exp(self.nats)
    }
    /// The unchanged model's.
    pub fn source_perplexity(&self) -> f64 {
        libm::exp(self.source_nats)
    }
}

impl<'a> HeldOut<'a> {
    /// Runs the unchanged model.
    ///
    /// # Errors
    /// As [`Reference::moments`].
    pub fn new(model: &'a Reference<'a>, windows: Windows, progress: &mut dyn Progress) -> Result<Self, Error> {
        let hidden = model.hidden(&windows, &unchanged, progress)?;
        Ok(Self { model, windows, hidden })
    }

    /// Compares a model whose weights `change` changes, linear by linear, the head last. It costs one forward pass.
    ///
    /// # Errors
    /// As [`Reference::moments`], and what `change` returns.
    pub fn score(&self, change: &Change<'_>, progress: &mut dyn Progress) -> Result<Score, Error> {
        let hidden = self.model.hidden(&self.windows, change, progress)?;
        let head = self.model.weights(Linear::HEAD)?;
        let mut changed = head.clone();
        change(Linear::HEAD, &mut changed)?;
        let (length, cols) = (self.windows.length(), self.model.config().hidden as usize);
        let vocab = head.len() / cols;
        let tokens = self.windows.tokens();
        let mut each = vec![[0.0; 4]; tokens.len()];
        for first in (0..tokens.len()).step_by(HEAD_CHUNK) {
            heard(progress, "loss, head")?;
            let count = HEAD_CHUNK.min(tokens.len() - first);
            let logits = |x: &[f32], head: &[f32]| {
                product(View::new(&x[first * cols..][..count * cols], cols), View::new(head, cols).t())
            };
            let (from, to) = (logits(&self.hidden, &head), logits(&hidden, &changed));
            let one = |t: usize| {
                let at = t * vocab..(t + 1) * vocab;
                let next = tokens.get(first + t + 1).copied().unwrap_or(0);
                compare(&from[at.clone()], &to[at], next as usize)
            };
            parallel(count, one, |t, result| each[first + t] = result);
        }
        // The last token of a window predicts nothing.
        let sum = |window: &[[f64; 4]], i: usize| window[..length - 1].iter().map(|t| t[i]).sum::<f64>();
        let windows = || each.chunks_exact(length);
        let predicted = (self.windows.count() * (length - 1)) as f64;
        let mean = |i: usize| windows().map(|w| sum(w, i)).sum::<f64>() / predicted;
        let (nats, source_nats) = (mean(0), mean(1));
        let deviations = windows().map(|w| (sum(w, 0) - sum(w, 1)) / (length - 1) as f64 - (nats - source_nats));
        let n = self.windows.count() as f64;
        let error = (deviations.map(|d| d * d).sum::<f64>() / (n * (n - 1.0))).sqrt();
        Ok(Score { tokens: predicted as usize, nats, source_nats, kl: mean(2), same_best: mean(3), error })
    }
}

/// Of one position: the loss with the changed logits, with the source's, the divergence, and whether the best is the same.
fn compare(source: &[f32], changed: &[f32], next: usize) -> [f64; 4] {
    let best = |row: &[f32]| {
        row.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &v)| if v > best.1 { (i, v) } else { best })
    };
    let ((a, max_a), (b, max_b)) = (best(source), best(changed));
    let log_sum = |row: &[f32], max: f32| libm::log(row.iter().map(|v| f64::from(libm::expf(v - max))).sum::<f64>());
    let (sum_a, sum_b) = (log_sum(source, max_a), log_sum(changed, max_b));
    let log_p = |row: &[f32], i: usize, max: f32, sum: f64| f64::from(row[i] - max) - sum;
    let kl: f64 = (0..source.len())
        .map(|i| {
            let from = log_p(source, i, max_a, sum_a);
            f64::from(libm::expf(from as f32)) * (from - log_p(changed, i, max_b, sum_b))
        })
        .sum();
    let nats = -log_p(changed, next, max_b, sum_b);
    [nats, -log_p(source, next, max_a, sum_a), kl, f64::from(u8::from(a == b))]
}
