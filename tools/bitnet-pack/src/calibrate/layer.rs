//! One layer, forwards and backwards, for windows of tokens that do not see each other.
//!
//! Vectors of several tokens lie one after another, `[tokens, width]`. The backward pass is written by hand: from the
//! gradient of the losses with respect to what a layer gives it computes that with respect to what it read, and on the way
//! that of every linear's output. Gradients of weights are never needed.
use super::Change;
use super::matmul::{View, parallel, product, product_here};
use super::model::{Linear, Reference};
use crate::Error;
use bitnet_runtime::Config;
use bitnet_runtime::image::Kind;
use bitnet_runtime::model::{Activation, Rope};

/// One layer's weights.
pub(super) struct Layer {
    config: Config,
    /// In the order of [`Linear::KINDS`].
    linears: [Vec<f32>; 7],
    attention_norm: Vec<f32>,
    attention_sub_norm: Option<Vec<f32>>,
    ffn_norm: Vec<f32>,
    ffn_sub_norm: Option<Vec<f32>>,
    query_norm: Option<Vec<f32>>,
    key_norm: Option<Vec<f32>>,
    /// Cosines and sines of each position of a window, `[positions, head_dim]`.
    rotation: Vec<f32>,
    /// Tokens in a window.
    window: usize,
}

/// What the linears of a layer read and what is needed on the way back.
pub(super) struct Inside {
    /// Inputs of query, key and value; of output; of gate and up; of down.
    pub(super) inputs: [Vec<f32>; 4],
    /// Query, key, value, before the norms of heads.
    projected: [Vec<f32>; 3],
    /// Attention's result, before its sub-norm.
    attended: Vec<f32>,
    /// The residual stream between attention and the feed-forward layer.
    between: Vec<f32>,
    /// Gate's results, `[tokens, ffn]`.
    pub(super) gate: Vec<f32>,
    up: Vec<f32>,
    /// `activation(gate) · up`, before its sub-norm.
    active: Vec<f32>,
}

/// Gradients at the outputs of the linears, in the order of [`Linear::KINDS`], and at the layer's input.
pub(super) struct Gradients {
    pub(super) outputs: [Vec<f32>; 7],
    pub(super) input: Vec<f32>,
}

/// `y = x wᵀ`.
fn linear(x: &[f32], w: &[f32], cols: usize) -> Vec<f32> {
    product(View::new(x, cols), View::new(w, cols).t())
}

/// `x = y w`: the way back.
fn back(y: &[f32], w: &[f32], cols: usize) -> Vec<f32> {
    product(View::new(y, w.len() / cols), View::new(w, cols))
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let squares: f32 = x.iter().map(|v| v * v).sum();
    1.0 / libm::sqrtf(squares / x.len() as f32 + eps)
}

/// Normalizes every `weight.len()` elements.
pub(super) fn norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let r = inverse_rms(row, eps);
        out.extend(row.iter().zip(weight).map(|(v, w)| v * r * w));
    }
    out
}

/// The gradient at the input of [`norm`] from that at its result: `r (w g) - x r³ / n Σ x w g`.
pub(super) fn norm_back(x: &[f32], weight: &[f32], eps: f32, gradient: &[f32]) -> Vec<f32> {
    let n = weight.len();
    let mut out = Vec::with_capacity(x.len());
    for (row, gradient) in x.chunks_exact(n).zip(gradient.chunks_exact(n)) {
        let r = inverse_rms(row, eps);
        let along: f32 = row.iter().zip(weight).zip(gradient).map(|((x, w), g)| x * w * g).sum();
        let along = along * r * r * r / n as f32;
        out.extend(row.iter().zip(weight).zip(gradient).map(|((x, w), g)| r * w * g - x * along));
    }
    out
}

/// Turns every head of each token; by the negative angles if `back`.
fn rotate(config: &Config, rotation: &[f32], width: usize, x: &mut [f32], sign: f32) {
    let (head_dim, half) = (config.head_dim as usize, config.head_dim as usize / 2);
    let pair = |i: usize| match config.rope {
        Rope::HalfSplit => (i, i + half),
        Rope::Interleaved => (2 * i, 2 * i + 1),
    };
    for (row, angles) in x.chunks_exact_mut(width).zip(rotation.chunks_exact(head_dim).cycle()) {
        let (cos, sin) = angles.split_at(half);
        for head in row.chunks_exact_mut(head_dim) {
            for (i, (cos, sin)) in cos.iter().zip(sin).enumerate() {
                let ((a, b), sin) = (pair(i), sin * sign);
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
            }
        }
    }
}

/// The probabilities of one head of one window, `[window, window]`: softmax of `q kᵀ scale` over the positions so far.
fn attention(q: View<'_>, k: View<'_>, scale: f32) -> Vec<f32> {
    let window = q.shape().0;
    let mut p = product_here(q, k.t());
    for (t, row) in p.chunks_exact_mut(window).enumerate() {
        let (seen, unseen) = row.split_at_mut(t + 1);
        unseen.fill(0.0);
        let max = seen.iter().fold(f32::NEG_INFINITY, |max, v| max.max(*v));
        seen.iter_mut().for_each(|v| *v = libm::expf((*v - max) * scale));
        let sum: f32 = seen.iter().sum();
        seen.iter_mut().for_each(|v| *v /= sum);
    }
    p
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + libm::expf(-x))
}

/// `activation(gate)` and its derivative.
fn activation(kind: Activation, gate: f32) -> (f32, f32) {
    match kind {
        Activation::Silu => {
            let s = sigmoid(gate);
            (gate * s, s * (1.0 + gate * (1.0 - s)))
        }
        Activation::SquaredRelu => (gate.max(0.0) * gate.max(0.0), 2.0 * gate.max(0.0)),
    }
}

impl Layer {
    /// Reads a layer, for windows of `window` tokens.
    ///
    /// # Errors
    /// If it cannot be read, or the model does more than a layer here computes.
    pub(super) fn read(model: &Reference<'_>, layer: u32, window: usize, change: &Change<'_>) -> Result<Self, Error> {
        model.check_passes()?;
        let config = *model.config();
        let mut linears = [const { Vec::new() }; 7];
        for (weights, kind) in linears.iter_mut().zip(Linear::KINDS) {
            let linear = Linear::new(layer, kind);
            *weights = model.weights(linear)?;
            change(linear, weights)?;
        }
        let vector = |kind, len| model.vector(Some(layer), kind, len);
        let needed = |kind| Ok::<_, Error>(vector(kind, config.hidden)?.expect("every block has its norms"));
        let half = config.head_dim as usize / 2;
        let mut rotation = Vec::with_capacity(window * 2 * half);
        for position in 0..window {
            let angle = |i: usize| position as f32 * model.frequencies()[i];
            rotation.extend((0..half).map(|i| libm::cosf(angle(i))));
            rotation.extend((0..half).map(|i| libm::sinf(angle(i))));
        }
        Ok(Self {
            config,
            linears,
            attention_norm: needed(Kind::AttentionNorm)?,
            attention_sub_norm: vector(Kind::AttentionSubNorm, config.query_width())?,
            ffn_norm: needed(Kind::FfnNorm)?,
            ffn_sub_norm: vector(Kind::FfnSubNorm, config.ffn)?,
            query_norm: vector(Kind::QueryNorm, config.head_dim)?,
            key_norm: vector(Kind::KeyNorm, config.head_dim)?,
            rotation,
            window,
        })
    }

    fn weights(&self, kind: Kind) -> &[f32] {
        &self.linears[Linear::KINDS.iter().position(|&k| k == kind).expect("a linear of a layer")]
    }

    fn normed(&self, x: &[f32], weight: Option<&Vec<f32>>) -> Vec<f32> {
        weight.map_or_else(|| x.to_vec(), |weight| norm(x, weight, self.config.norm_eps))
    }

    fn normed_back(&self, x: &[f32], weight: Option<&Vec<f32>>, gradient: Vec<f32>) -> Vec<f32> {
        match weight {
            Some(weight) => norm_back(x, weight, self.config.norm_eps, &gradient),
            None => gradient,
        }
    }

    /// Queries and keys as they meet: normalized in models that do, and turned.
    fn turned(&self, projected: &[Vec<f32>; 3]) -> [Vec<f32>; 2] {
        let c = &self.config;
        let turn = |x: &[f32], weight: Option<&Vec<f32>>, width: u32| {
            let mut x = self.normed(x, weight);
            rotate(c, &self.rotation, width as usize, &mut x, 1.0);
            x
        };
        let [q, k, _] = projected;
        [turn(q, self.query_norm.as_ref(), c.query_width()), turn(k, self.key_norm.as_ref(), c.kv_width())]
    }

    /// Calls `each(window, key head)` on all threads and `then` with its result.
    fn heads<T: Send>(
        &self,
        tokens: usize,
        each: impl Fn(usize, usize) -> T + Sync + Send,
        mut then: impl FnMut(usize, usize, T),
    ) {
        let kv_heads = self.config.kv_heads as usize;
        let windows = tokens / self.window;
        parallel(windows * kv_heads, |i| each(i / kv_heads, i % kv_heads), |i, t| then(i / kv_heads, i % kv_heads, t));
    }

    /// The rows of a window and the columns of a head.
    fn head<'x>(&self, x: &'x [f32], width: u32, window: usize, head: usize) -> View<'x> {
        let (width, head_dim) = (width as usize, self.config.head_dim as usize);
        View::columns(&x[window * self.window * width..][..self.window * width], width, head * head_dim, head_dim)
    }

    /// Puts or adds one head of a window where [`Layer::head`] finds it.
    fn put(&self, into: &mut [f32], width: u32, (window, head): (usize, usize), values: &[f32]) {
        let (width, head_dim) = (width as usize, self.config.head_dim as usize);
        let rows = into[window * self.window * width..].chunks_exact_mut(width);
        for (row, values) in rows.zip(values.chunks_exact(head_dim)) {
            add(&mut row[head * head_dim..][..head_dim], values);
        }
    }

    fn scale(&self) -> f32 {
        1.0 / libm::sqrtf(self.config.head_dim as f32)
    }

    fn attend(&self, [q, k]: &[Vec<f32>; 2], v: &[f32]) -> Vec<f32> {
        let (query, kv) = (self.config.query_width(), self.config.kv_width());
        let group = (self.config.heads / self.config.kv_heads) as usize;
        let mut out = vec![0.0; q.len()];
        let each = |window, head| -> Vec<Vec<f32>> {
            let (k, v) = (self.head(k, kv, window, head), self.head(v, kv, window, head));
            let of = |h| {
                product_here(View::new(&attention(self.head(q, query, window, h), k, self.scale()), self.window), v)
            };
            (head * group..(head + 1) * group).map(of).collect()
        };
        self.heads(q.len() / query as usize, each, |window, head, results| {
            for (h, values) in (head * group..).zip(results) {
                self.put(&mut out, query, (window, h), &values);
            }
        });
        out
    }

    /// Gradients at turned queries, turned keys and values from that at attention's result.
    fn attend_back(&self, [q, k]: &[Vec<f32>; 2], v: &[f32], gradient: &[f32]) -> [Vec<f32>; 3] {
        let (query, kv, scale) = (self.config.query_width(), self.config.kv_width(), self.scale());
        let group = (self.config.heads / self.config.kv_heads) as usize;
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        let each = |window, head| -> Vec<[Vec<f32>; 3]> {
            let (k, v) = (self.head(k, kv, window, head), self.head(v, kv, window, head));
            let of = |h| {
                let (q, g) = (self.head(q, query, window, h), self.head(gradient, query, window, h));
                let p = attention(q, k, scale);
                let mut s = product_here(g, v.t());
                for (s, p) in s.chunks_exact_mut(self.window).zip(p.chunks_exact(self.window)) {
                    let mean: f32 = s.iter().zip(p).map(|(s, p)| s * p).sum();
                    s.iter_mut().zip(p).for_each(|(s, p)| *s = p * (*s - mean) * scale);
                }
                let (p, s) = (View::new(&p, self.window), View::new(&s, self.window));
                [product_here(s, k), product_here(s.t(), q), product_here(p.t(), g)]
            };
            (head * group..(head + 1) * group).map(of).collect()
        };
        self.heads(q.len() / query as usize, each, |window, head, results| {
            for (h, [q, k, v]) in (head * group..).zip(results) {
                self.put(&mut dq, query, (window, h), &q);
                self.put(&mut dk, kv, (window, head), &k);
                self.put(&mut dv, kv, (window, head), &v);
            }
        });
        [dq, dk, dv]
    }

    /// `x` becomes what the layer gives.
    pub(super) fn forward(&self, x: &mut [f32]) -> Inside {
        let c = &self.config;
        let (hidden, eps) = (c.hidden as usize, c.norm_eps);
        let read = norm(x, &self.attention_norm, eps);
        let projected = [Kind::Query, Kind::Key, Kind::Value].map(|kind| linear(&read, self.weights(kind), hidden));
        let attended = self.attend(&self.turned(&projected), &projected[2]);
        let output = self.normed(&attended, self.attention_sub_norm.as_ref());
        add(x, &linear(&output, self.weights(Kind::Output), c.query_width() as usize));
        let between = x.to_vec();
        let ffn = norm(x, &self.ffn_norm, eps);
        let [gate, up] = [Kind::Gate, Kind::Up].map(|kind| linear(&ffn, self.weights(kind), hidden));
        let active: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| activation(c.activation, *g).0 * u).collect();
        let down = self.normed(&active, self.ffn_sub_norm.as_ref());
        add(x, &linear(&down, self.weights(Kind::Down), c.ffn as usize));
        Inside { inputs: [read, output, ffn, down], projected, attended, between, gate, up, active }
    }

    /// The way back through a layer that read `x`.
    pub(super) fn backward(&self, x: &[f32], inside: &Inside, gradient: Vec<f32>) -> Gradients {
        let c = &self.config;
        let (hidden, eps) = (c.hidden as usize, c.norm_eps);
        let down = gradient;
        let active = back(&down, self.weights(Kind::Down), c.ffn as usize);
        let active = self.normed_back(&inside.active, self.ffn_sub_norm.as_ref(), active);
        let (mut gate, mut up) = (active.clone(), active);
        for (((dg, du), g), u) in gate.iter_mut().zip(&mut up).zip(&inside.gate).zip(&inside.up) {
            let (value, slope) = activation(c.activation, *g);
            *dg *= u * slope;
            *du *= value;
        }
        let mut ffn = back(&gate, self.weights(Kind::Gate), hidden);
        add(&mut ffn, &back(&up, self.weights(Kind::Up), hidden));
        let mut output = norm_back(&inside.between, &self.ffn_norm, eps, &ffn);
        add(&mut output, &down);

        let attended = back(&output, self.weights(Kind::Output), c.query_width() as usize);
        let attended = self.normed_back(&inside.attended, self.attention_sub_norm.as_ref(), attended);
        let turned = self.turned(&inside.projected);
        let [mut q, mut k, v] = self.attend_back(&turned, &inside.projected[2], &attended);
        rotate(c, &self.rotation, c.query_width() as usize, &mut q, -1.0);
        rotate(c, &self.rotation, c.kv_width() as usize, &mut k, -1.0);
        let q = self.normed_back(&inside.projected[0], self.query_norm.as_ref(), q);
        let k = self.normed_back(&inside.projected[1], self.key_norm.as_ref(), k);
        let mut read = back(&q, self.weights(Kind::Query), hidden);
        add(&mut read, &back(&k, self.weights(Kind::Key), hidden));
        add(&mut read, &back(&v, self.weights(Kind::Value), hidden));
        let mut input = norm_back(x, &self.attention_norm, eps, &read);
        add(&mut input, &output);
        Gradients { outputs: [q, k, v, output, gate, up, down], input }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Preset;

    /// Numbers without visible order, of about `size`.
    fn numbers(count: usize, seed: u32, size: f32) -> Vec<f32> {
        let mut x = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((x >> 8) as f32 / 8_388_608.0 - 1.0) * size
        };
        (0..count).map(|_| next()).collect()
    }

    /// Two windows of three tokens, two query heads that share a key head.
    fn layer(activation: Activation, rope: Rope, norms: bool) -> Layer {
        let (hidden, ffn, heads, kv_heads, head_dim, window) = (6, 10, 2, 1, 4, 3);
        let config = Config {
            hidden,
            ffn,
            heads,
            kv_heads,
            head_dim,
            activation,
            rope,
            norm_eps: 1e-5,
            ..Preset::Tiny.shape().config
        };
        let (query, kv) = (heads * head_dim, kv_heads * head_dim);
        let shapes =
            [(query, hidden), (kv, hidden), (kv, hidden), (hidden, query), (ffn, hidden), (ffn, hidden), (hidden, ffn)];
        let mut seed = 0;
        let mut of = |count: u32, size| {
            seed += 1;
            numbers(count as usize, seed, size)
        };
        let linears = shapes.map(|(rows, cols)| of(rows * cols, 0.8));
        let mut weight = |len| of(len, 0.5).into_iter().map(|v| 1.0 + v).collect::<Vec<f32>>();
        let (attention_norm, ffn_norm) = (weight(hidden), weight(hidden));
        let [attention_sub_norm, ffn_sub_norm, query_norm, key_norm] =
            [query, ffn, head_dim, head_dim].map(|len| norms.then(|| weight(len)));
        let angles = numbers(window * head_dim as usize / 2, 99, 3.0);
        let pairs = angles.chunks(head_dim as usize / 2);
        let rotation = pairs
            .flat_map(|a| a.iter().map(|v| libm::cosf(*v)).chain(a.iter().map(|v| libm::sinf(*v))).collect::<Vec<_>>());
        Layer {
            config,
            linears,
            attention_norm,
            attention_sub_norm,
            ffn_norm,
            ffn_sub_norm,
            query_norm,
            key_norm,
            rotation: rotation.collect(),
            window,
        }
    }

    /// Gradients at the input and at every linear's output are those of finite differences, in every kind of model; those of a
    /// linear's output by way of its weights, whose gradient is the output's times the input.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        for (activation, rope, norms) in [
            (Activation::Silu, Rope::HalfSplit, false),
            (Activation::Silu, Rope::Interleaved, true),
            (Activation::SquaredRelu, Rope::HalfSplit, true),
        ] {
            let mut layer = layer(activation, rope, norms);
            let x = numbers(6 * 6, 77, 1.0);
            let toward = numbers(6 * 6, 78, 1.0);
            let loss = |layer: &Layer, x: &[f32]| {
                let mut x = x.to_vec();
                layer.forward(&mut x);
                x.iter().zip(&toward).map(|(v, g)| f64::from(*v) * f64::from(*g)).sum::<f64>()
            };
            let inside = layer.forward(&mut x.clone());
            let gradients = layer.backward(&x, &inside, toward.clone());
            let near = |found: f32, expected: f64, what: &str| {
                let error = (f64::from(found) - expected).abs();
                assert!(error < 2e-3 + 5e-3 * expected.abs(), "{activation:?} {rope:?} {what}: {found}, {expected}");
            };
            const STEP: f32 = 1.0 / 512.0;
            for i in 0..x.len() {
                let moved = |by: f32| {
                    let mut x = x.clone();
                    x[i] += by;
                    loss(&layer, &x)
                };
                near(gradients.input[i], (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP), &format!("x {i}"));
            }
            let site = [0, 0, 0, 1, 2, 2, 3];
            for (l, site) in site.into_iter().enumerate() {
                let input = &inside.inputs[site];
                let (rows, cols) = (gradients.outputs[l].len() / 6, input.len() / 6);
                for i in (0..rows * cols).step_by(5) {
                    let tokens = gradients.outputs[l].chunks_exact(rows).zip(input.chunks_exact(cols));
                    let found: f32 = tokens.map(|(g, x)| g[i / cols] * x[i % cols]).sum();
                    let mut moved = |by: f32| {
                        layer.linears[l][i] += by;
                        let moved = loss(&layer, &x);
                        layer.linears[l][i] -= by;
                        moved
                    };
                    let expected = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
                    near(found, expected, &format!("{:?} {i}", Linear::KINDS[l]));
                }
            }
        }
    }

    /// A window does not see another, nor a token those after it.
    #[test]
    fn tokens_see_what_came_before_them_in_their_window() {
        let layer = layer(Activation::Silu, Rope::HalfSplit, true);
        let forward = |x: &[f32]| {
            let mut x = x.to_vec();
            layer.forward(&mut x);
            x
        };
        let x = numbers(36, 5, 1.0);
        let mut other = x.clone();
        other[8] += 1.0;
        let (a, b) = (forward(&x), forward(&other));
        let differ: Vec<bool> = a.chunks(6).zip(b.chunks(6)).map(|(a, b)| a != b).collect();
        assert_eq!(differ, [false, true, true, false, false, false]);
    }
}
