//! One pass: a batch of tokens through the model, top to bottom.
use super::head::{HeadInput, Need};
use super::linear::{Input, Output, Quantized};
use super::sparse::Room;
use super::weights::Linear;
use super::{BATCH_MAX, Memory, Model, Quantizer, State, Window, ops};
use crate::error::Error;
use crate::image::Kind;
use crate::memory::{Limits, attention_width, memory_width, padded_rows, seen_len};
use crate::parallel::{Parallel, Serial, for_each_item};
use crate::source::Extent;
use bitnet_kernel::float::{self, Cache};
use bitnet_kernel::{Format, format};
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Multiplications of floats below which it is not worth waking other threads. Estimated, not timed.
pub(super) const PARALLEL_WORK_MIN: usize = 1 << 17;

/// The passes after which logits are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heads {
    Last,
    All,
}

/// Whose token `t` of a pass is, and its position: one conversation has all of them, or each of several has one.
fn place(states: &[&mut State<'_>], t: usize) -> (usize, usize) {
    match states {
        [state] => (0, state.position() + t),
        _ => (t, states[t].position()),
    }
}

impl Model<'_> {
    /// Advances the conversation by one token and returns the logits of the next, `[vocab]`.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub fn step(&mut self, state: &mut State<'_>, token: u32) -> Result<&[f32], Error> {
        self.prefill(state, &[token])
    }

    /// [`Model::step`] for a caller that needs but some of the logits.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub fn step_for(&mut self, state: &mut State<'_>, token: u32, need: Need) -> Result<&[f32], Error> {
        self.prefill_for(state, &[token], need)
    }

    /// Advances the conversation by `tokens`, several in one pass over the weights, and returns the logits after the last.
    ///
    /// The logits are those of one [`Model::step`] a token, bit for bit. After an error the state is as it was before, or as
    /// near to it as [`State::rewind`] comes.
    ///
    /// # Errors
    /// If a token is outside the vocabulary, the context is full, the state is another model's, or weights cannot be read.
    ///
    /// # Panics
    /// If there is no token.
    pub fn prefill(&mut self, state: &mut State<'_>, tokens: &[u32]) -> Result<&[f32], Error> {
        self.prefill_for(state, tokens, Need::All)
    }

    /// [`Model::prefill`] for a caller that needs but some of the logits: those it needs are the same.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    ///
    /// # Panics
    /// If there is no token, or no logit is needed.
    pub fn prefill_for(&mut self, state: &mut State<'_>, tokens: &[u32], need: Need) -> Result<&[f32], Error> {
        assert!(!tokens.is_empty() && need != Need::Best(0), "a pass needs at least one token and one result");
        self.passes(state, tokens, Heads::Last, &mut |model, tokens, last| {
            if last { model.head(tokens - 1, need) } else { Ok(()) }
        })?;
        Ok(self.logits())
    }

    /// [`Model::prefill`] that hands the logits after every token to `each`, with the token's place in `tokens`.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub fn prefill_each(
        &mut self,
        state: &mut State<'_>,
        tokens: &[u32],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        let mut done = 0;
        self.passes(state, tokens, Heads::All, &mut |model, tokens, _| {
            for t in 0..tokens {
                model.head(t, Need::All)?;
                each(done + t, model.logits());
            }
            done += tokens;
            Ok(())
        })
    }

    /// Advances the conversation by `tokens` in one pass and computes no logits: [`Model::logits_after`] does, for those tokens
    /// whose logits are wanted.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    ///
    /// # Panics
    /// If there is no token, or more than a batch.
    pub fn read(&mut self, state: &mut State<'_>, tokens: &[u32]) -> Result<(), Error> {
        assert!(
            !tokens.is_empty() && tokens.len() <= self.limits.batch as usize,
            "one pass reads 1 to a batch of tokens"
        );
        self.passes(state, tokens, Heads::Last, &mut |_, _, _| Ok(()))
    }

    /// The logits after token `t` of the last pass, `[vocab]`, those at least that are needed, as [`Model::step_for`] would have
    /// given them.
    ///
    /// # Errors
    /// If weights cannot be read or a result is no number.
    ///
    /// # Panics
    /// If the last pass failed or had fewer tokens, or no logit is needed.
    pub fn logits_after(&mut self, t: usize, need: Need) -> Result<&[f32], Error> {
        assert!(t < self.read && need != Need::Best(0), "token {t} of a pass of {}", self.read);
        self.head(t, need)?;
        Ok(self.logits())
    }

    /// Advances each of several conversations by one token, `tokens[i]` that of `states[i]`, in one pass over the weights.
    /// The logits after them go to `logits`, `[tokens][vocab]`: of each those at least that are in `needs`.
    ///
    /// The logits are those of [`Model::step_for`] with each alone, bit for bit. In a model with a memory or a
    /// recurrence they are computed one after another: a state is read and written by one conversation at a time. After an error all states
    /// are as [`Model::prefill`] leaves one.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    ///
    /// # Panics
    /// If the lengths differ, there is no token, or more than a batch, or no logit is needed.
    pub fn step_each(
        &mut self,
        states: &mut [&mut State<'_>],
        tokens: &[u32],
        needs: &[Need],
        logits: &mut [f32],
    ) -> Result<(), Error> {
        let (n, vocab) = (tokens.len(), self.config.vocab as usize);
        assert!(n > 0 && n <= self.limits.batch as usize, "one pass reads 1 to a batch of tokens");
        assert!(
            states.len() == n && needs.len() == n && logits.len() == n * vocab,
            "one of each for each conversation"
        );
        assert!(!needs.contains(&Need::Best(0)), "a pass needs at least one result");
        for (state, token) in states.iter().zip(tokens) {
            self.check(state, core::slice::from_ref(token))?;
        }
        let parallel = self.machine.parallel;
        let mut done = Ok(());
        let mut read = 0;
        if self.config.is_stateful() {
            let rows = logits.chunks_exact_mut(vocab).zip(needs);
            for ((state, token), (logits, need)) in states.iter_mut().zip(tokens).zip(rows) {
                done = self.step_for(state, *token, *need).map(|row| logits.copy_from_slice(row));
                if done.is_err() {
                    break;
                }
                read += 1;
            }
        } else {
            parallel.begin(n);
            self.machine.source.expect(self.weights.all());
            done = self.pass(states, tokens);
            if done.is_ok() {
                read = n;
                done = self.heads(needs, logits);
            }
            parallel.end();
        }
        if done.is_err() {
            for state in &mut states[..read] {
                let before = state.position() - 1;
                state.rewind(before);
            }
        }
        done
    }

    /// One pass a batch, each followed by `then(model, tokens in the batch, whether it is the last)`.
    fn passes(
        &mut self,
        state: &mut State<'_>,
        tokens: &[u32],
        heads: Heads,
        then: &mut dyn FnMut(&mut Self, usize, bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.check(state, tokens)?;
        let before = state.position();
        let mut batches = tokens.chunks(self.limits.batch as usize).peekable();
        while let Some(batch) = batches.next() {
            let parallel = self.machine.parallel;
            parallel.begin(batch.len());
            let has_head = heads == Heads::All || batches.peek().is_none();
            self.machine.source.expect(if has_head { self.weights.all() } else { self.weights.before_head() });
            let done =
                self.pass(&mut [&mut *state], batch).and_then(|()| then(self, batch.len(), batches.peek().is_none()));
            parallel.end();
            if let Err(e) = done {
                state.rewind(before);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Whether a conversation can go on with these tokens.
    fn check(&self, state: &State<'_>, tokens: &[u32]) -> Result<(), Error> {
        let vocab = self.config.vocab;
        if let Some(&token) = tokens.iter().find(|&&t| t >= vocab) {
            return Err(Error::Token { token, vocab });
        }
        if !state.fits(&self.config, &self.limits) {
            return Err(Error::State);
        }
        if tokens.len() > state.remaining() {
            return Err(Error::ContextFull { context: state.context() });
        }
        Ok(())
    }

    /// The whole pass, all but the head: several tokens of one conversation, or one token of each of several.
    fn pass(&mut self, states: &mut [&mut State<'_>], tokens: &[u32]) -> Result<(), Error> {
        let n = tokens.len();
        self.read = 0;
        for (t, &token) in tokens.iter().enumerate() {
            self.embed(t, token)?;
        }
        self.angles(states, n)?;
        for layer in 0..self.config.layers {
            if self.config.recurrence {
                self.recur(states[0], layer, n)?;
            } else {
                self.attention(states, layer, n)?;
            }
            self.feed_forward(layer, n)?;
        }
        let each = n / states.len();
        states.iter_mut().for_each(|state| state.advance(each));
        self.read = n;
        Ok(())
    }

    /// `x += output(sub_norm(attend(rope(head_norm(query(norm(x)))), rope(head_norm(key(…))), value(…))))`
    fn attention(&mut self, states: &mut [&mut State<'_>], layer: u32, n: usize) -> Result<(), Error> {
        let (c, weights) = (self.config, self.weights.layer(layer));
        let (hidden, query_width, kv_width) = (c.hidden as usize, c.query_width() as usize, c.kv_width() as usize);
        let key_at = padded_rows(query_width);
        let width = attention_width(&c) + memory_width(&c);

        self.norm(weights.norm(Kind::AttentionNorm), n)?;
        let linears = match c.memory {
            Some(Memory::Matrices(_)) => {
                &[Kind::Query, Kind::Key, Kind::Value, Kind::MemoryInput, Kind::MemoryGates][..]
            }
            Some(Memory::Vector(_)) => &[Kind::Query, Kind::Key, Kind::Value, Kind::MemoryInput],
            Some(Memory::Shared) => &[Kind::Query, Kind::Key, Kind::Value, Kind::MemoryGates],
            None => &[Kind::Query, Kind::Key, Kind::Value],
        };
        let mut found = [weights.linear(Kind::Query); 5];
        found.iter_mut().zip(linears).for_each(|(found, kind)| *found = weights.linear(*kind));
        self.linears(layer, &found[..linears.len()], c.quantizers.attention, hidden, n, width, 0)?;
        self.head_norms(weights.norm(Kind::QueryNorm), width, 0..query_width, n)?;
        self.head_norms(weights.norm(Kind::KeyNorm), width, key_at..key_at + kv_width, n)?;
        self.remember(states[0], layer, n, width)?;

        self.place_keys(states, layer, n, width)?;
        match c.window {
            Some(window) => self.attend_window(states, window, layer, n, width),
            None => self.attend_all(states, layer, n, width),
        }

        self.add_remembered(layer, n, width)?;
        self.sub_norm(weights.norm(Kind::AttentionSubNorm), query_width, n)?;
        let output = [weights.linear(Kind::Output)];
        self.linears(layer, &output, c.quantizers.output, query_width, n, padded_rows(hidden), 0)?;
        self.add_projected(n);
        Ok(())
    }

    /// Turns queries and keys by their positions, and puts keys and values into the conversations.
    fn place_keys(&mut self, states: &mut [&mut State<'_>], layer: u32, n: usize, width: usize) -> Result<(), Error> {
        let c = self.config;
        let (head_dim, query_width, kv_width) = (c.head_dim as usize, c.query_width() as usize, c.kv_width() as usize);
        let (key_at, value_at) = (padded_rows(query_width), padded_rows(query_width) + padded_rows(kv_width));
        let parallel = self.machine.among_tokens(n * width);
        let (first, several) = (states[0].position(), states.len() > 1);
        let s = &mut self.scratch;
        let rotation = &*s.rotation;
        let finite = AtomicBool::new(true);
        let put = |state: &mut State<'_>, position: usize, row: &[f32]| {
            // The cache's formats cannot hold these, and would make numbers of them.
            let (keys, values) = (&row[key_at..][..kv_width], &row[value_at..][..kv_width]);
            if ops::finite(keys) && ops::finite(values) {
                state.put(layer as usize, position, keys, values);
            } else {
                finite.store(false, Relaxed);
            }
        };
        // Of several conversations each keeps its own.
        let owners = states.iter_mut().map(Some).filter(|_| several).chain(core::iter::repeat_with(|| None));
        let rows = s.projected.chunks_exact_mut(width).take(n).zip(owners);
        for_each_item::<_, BATCH_MAX>(parallel, rows, &|t, (row, owner)| {
            let position = owner.as_ref().map_or(first + t, |state| state.position());
            let at = c.window.map_or(t, |window| position.min(window.span() as usize - 1));
            let rotation = &rotation[at * head_dim..][..head_dim];
            for head in row[..query_width].chunks_exact_mut(head_dim) {
                ops::rotate(c.rope, head, rotation);
            }
            // Those of a window are turned when they are read, by their place in it.
            if c.window.is_none() {
                for head in row[key_at..][..kv_width].chunks_exact_mut(head_dim) {
                    ops::rotate(c.rope, head, rotation);
                }
            }
            if let Some(state) = owner {
                put(state, position, row);
            }
        });
        if !several {
            let rows = s.projected.chunks_exact(width).take(n);
            rows.enumerate().for_each(|(t, row)| put(states[0], first + t, row));
        }
        if finite.into_inner() { Ok(()) } else { Err(Error::NotFinite { layer }) }
    }

    /// `norm[t] = attend(query)` over all positions up to that of token `t`.
    fn attend_all(&mut self, states: &[&mut State<'_>], layer: u32, n: usize, width: usize) {
        let (c, s) = (self.config, &mut self.scratch);
        let (head_dim, heads, query_width) = (c.head_dim as usize, c.heads as usize, c.query_width() as usize);
        let scale = 1.0 / libm::sqrtf(head_dim as f32);
        let group = heads / c.kv_heads as usize;
        let (kernels, projected) = (self.machine.kernels, &*s.projected);
        let work = (0..n).map(|t| place(states, t).1 + 1).sum::<usize>() * query_width;
        let parallel: &dyn Parallel = if work < PARALLEL_WORK_MIN { &Serial } else { self.machine.parallel };
        parallel.for_each_chunk(&mut s.norm[..n * query_width], head_dim, &|i, out| {
            let (t, head) = (i / heads, i % heads);
            let (conversation, position) = place(states, t);
            let (keys, values) = states[conversation].head(layer as usize, head / group, position + 1);
            let query = &projected[t * width + head * head_dim..][..head_dim];
            kernels.attend(query, keys, values, scale, out);
        });
    }

    /// `norm[t] = attend(query)` over the sinks and then the window of token `t`, oldest first, turned by their places in what is
    /// seen. Token by token: with each the window moves, and all in it turn.
    fn attend_window(&mut self, states: &[&mut State<'_>], window: Window, layer: u32, n: usize, width: usize) {
        let (c, s) = (self.config, &mut self.scratch);
        let (head_dim, query_width) = (c.head_dim as usize, c.query_width() as usize);
        let (span, sinks, group) = (window.span() as usize, window.sinks as usize, (c.heads / c.kv_heads) as usize);
        let scale = 1.0 / libm::sqrtf(head_dim as f32);
        let (kernels, projected, rotation) = (self.machine.kernels, &*s.projected, &*s.rotation);
        for t in 0..n {
            let (conversation, last) = place(states, t);
            let state = &*states[conversation];
            let first = sinks.max((last + 1).saturating_sub(window.positions as usize)).min(last + 1);
            let count = sinks.min(last + 1) + (last + 1).saturating_sub(first.max(sinks));
            let work = count * query_width;
            let parallel: &dyn Parallel = if work < PARALLEL_WORK_MIN { &Serial } else { self.machine.parallel };
            parallel.for_each_chunk(s.seen, seen_len(span, group, head_dim), &|kv_head, seen| {
                let (keys, rest) = seen.split_at_mut(span * head_dim);
                let (values, out) = rest.split_at_mut(span * head_dim);
                let (keys, values) = (&mut keys[..count * head_dim], &mut values[..count * head_dim]);
                let rows = keys.chunks_exact_mut(head_dim).zip(values.chunks_exact_mut(head_dim));
                for ((place, (key, value)), position) in
                    rows.enumerate().zip((0..sinks.min(last + 1)).chain(first..=last))
                {
                    state.row(layer as usize, kv_head, position, key, value);
                    ops::rotate(c.rope, key, &rotation[place * head_dim..][..head_dim]);
                }
                for (g, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    let query = &projected[t * width + (kv_head * group + g) * head_dim..][..head_dim];
                    kernels.attend(query, Cache::F32(keys), Cache::F32(values), scale, out);
                }
            });
            let heads = s.seen.chunks_exact(seen_len(span, group, head_dim)).map(|seen| &seen[2 * span * head_dim..]);
            let out = s.norm[t * query_width..][..query_width].chunks_exact_mut(group * head_dim);
            out.zip(heads).for_each(|(out, head)| out.copy_from_slice(head));
        }
    }

    /// `x += down(sub_norm(activation(gate(norm(x))) · up(norm(x))))`
    fn feed_forward(&mut self, layer: u32, n: usize) -> Result<(), Error> {
        let (c, weights) = (self.config, self.weights.layer(layer));
        let (hidden, ffn) = (c.hidden as usize, c.ffn as usize);
        let width = 2 * padded_rows(ffn);

        if c.live_ffn {
            return self.live_feed_forward(layer, n);
        }
        self.norm(weights.norm(Kind::FfnNorm), n)?;
        let linears = [weights.linear(Kind::Gate), weights.linear(Kind::Up)];
        self.linears(layer, &linears, c.quantizers.ffn, hidden, n, width, 0)?;

        let (kernels, parallel, s) = (self.machine.kernels, self.machine.among_tokens(n * ffn), &mut self.scratch);
        let (projected, finite) = (&*s.projected, AtomicBool::new(true));
        parallel.for_each_chunk(&mut s.norm[..n * ffn], ffn, &|t, out| {
            let row = &projected[t * width..][..width];
            let (gate, up) = (&row[..ffn], &row[padded_rows(ffn)..][..ffn]);
            // A squared ReLU would make zero of minus infinity.
            if !ops::finite(gate) {
                finite.store(false, Relaxed);
            }
            c.activation.apply(kernels, gate, up, out);
        });
        if !finite.into_inner() {
            return Err(Error::NotFinite { layer });
        }
        self.sub_norm(weights.norm(Kind::FfnSubNorm), ffn, n)?;
        self.linears(layer, &[weights.linear(Kind::Down)], c.quantizers.down, ffn, n, padded_rows(hidden), 0)?;
        self.add_projected(n);
        Ok(())
    }

    /// The logits of token `t` of the batch, those at least that are needed.
    fn head(&mut self, t: usize, need: Need) -> Result<(), Error> {
        let (c, tensor) = (self.config, self.weights.head());
        let (hidden, stride) = (c.hidden as usize, self.quantized_stride());
        let weight = ops::floats(self.machine.source.fetch(self.weights.final_norm())?);
        let s = &mut self.scratch;
        let norm = &mut s.norm[..hidden];
        norm.copy_from_slice(&s.x[t * hidden..][..hidden]);
        self.machine.kernels.rmsnorm(norm, weight, c.norm_eps);
        if let (Some(extent), Some(eps)) = (self.weights.head_input_norm(), c.linear_norm_eps) {
            self.machine.kernels.rmsnorm(norm, ops::floats(self.machine.source.fetch(extent)?), eps);
        }
        if tensor.format == Format::F16 {
            if !ops::finite(norm) {
                return Err(Error::NotFinite { layer: c.layers });
            }
            let mut out = Output { rows: s.logits, stride: 0, first: 0, units: s.units };
            self.machine.linear_f16(tensor, norm, &mut out)?;
            return Ok(());
        }
        let q = &mut s.quantized[..stride];
        let scale = self.machine.kernels.quantize(norm, q).ok_or(Error::NotFinite { layer: c.layers })?;
        if let Some(head) = self.weights.split_head() {
            let input = HeadInput { values: q, scale, coarse: s.coarse };
            return Ok(self.machine.split_head(&head, input, need, s.logits, &mut self.head_stats)?);
        }
        let mut x = Quantized { values: q, stride, scales: &[scale], tables: s.tables };
        let mut out = Output { rows: s.logits, stride: 0, first: 0, units: s.units };
        self.machine.linear(&[tensor], &mut x, &mut out)?;
        Ok(())
    }

    /// The logits after each token of the pass, `[tokens][vocab]`, those at least that are needed: in one pass over the head
    /// but for one in two planes.
    fn heads(&mut self, needs: &[Need], logits: &mut [f32]) -> Result<(), Error> {
        let (c, tensor, n) = (self.config, self.weights.head(), needs.len());
        if n == 1 || self.weights.split_head().is_some() {
            for (t, (logits, need)) in logits.chunks_exact_mut(c.vocab as usize).zip(needs).enumerate() {
                self.head(t, *need)?;
                logits.copy_from_slice(self.logits());
            }
            return Ok(());
        }
        let (hidden, stride) = (c.hidden as usize, self.quantized_stride());
        let weight = ops::floats(self.machine.source.fetch(self.weights.final_norm())?);
        let s = &mut self.scratch;
        let norms = &mut s.norm[..n * hidden];
        norms.copy_from_slice(&s.x[..n * hidden]);
        norms.chunks_exact_mut(hidden).for_each(|norm| self.machine.kernels.rmsnorm(norm, weight, c.norm_eps));
        if let (Some(extent), Some(eps)) = (self.weights.head_input_norm(), c.linear_norm_eps) {
            let weight = ops::floats(self.machine.source.fetch(extent)?);
            norms.chunks_exact_mut(hidden).for_each(|norm| self.machine.kernels.rmsnorm(norm, weight, eps));
        }
        let mut scales = [0.0; Limits::BATCH_MAX as usize];
        let x = if tensor.format == Format::F16 {
            if !ops::finite(norms) {
                return Err(Error::NotFinite { layer: c.layers });
            }
            Input::Floats(norms)
        } else {
            let rows = norms.chunks_exact(hidden).zip(s.quantized.chunks_exact_mut(stride));
            for ((norm, q), scale) in rows.zip(&mut scales) {
                *scale = self.machine.kernels.quantize(norm, q).ok_or(Error::NotFinite { layer: c.layers })?;
            }
            Input::Quantized(Quantized { values: s.quantized, stride, scales: &scales[..n], tables: s.tables })
        };
        self.machine.linear_in_parts(tensor, x, s.units, logits)?;
        Ok(())
    }

    /// Token `t`'s row of the embedding, into `x`.
    fn embed(&mut self, t: usize, token: u32) -> Result<(), Error> {
        let (tensor, hidden, source) =
            (self.weights.embedding(), self.config.hidden as usize, &mut self.machine.source);
        let x = &mut self.scratch.x[t * hidden..][..hidden];
        let (tile, row, scale) = tensor.row(token);
        let steps = source.fetch_row(tile)?.chunks_exact(tensor.format.step_blocks());
        for (step, x) in steps.zip(x.chunks_mut(tensor.format.step_cols())) {
            for (c, x) in x.iter_mut().enumerate() {
                *x = match tensor.format {
                    Format::F16 => bitnet_kernel::float::f16_to_f32(format::decode_f16(step, row, c)),
                    format => f32::from(format::decode(format, step, row, c)),
                };
            }
            if tensor.format.is_grouped() {
                let bits = u16::from_le_bytes(format::scales(tensor.format, step)[row]);
                let scale = bitnet_kernel::float::f16_to_f32(bits);
                x.iter_mut().for_each(|x| *x *= scale);
            }
        }
        if self.config.tied
            && let Some(head) = self.weights.split_head()
        {
            return Ok(self.machine.split_embedding(&head, token, x)?);
        }
        if let Some((extent, i)) = scale {
            let scale = ops::floats(source.fetch_row(extent)?)[i];
            x.iter_mut().for_each(|x| *x *= scale);
        }
        Ok(())
    }

    /// Cosines and sines of the angles of the positions of `n` tokens, or of all places in a window.
    fn angles(&mut self, states: &[&mut State<'_>], n: usize) -> Result<(), Error> {
        let window = self.config.window;
        if self.config.recurrence || (window.is_some() && self.scratch.rotation_is_set) {
            return Ok(());
        }
        let n = window.map_or(n, |window| window.span() as usize);
        let frequencies = ops::floats(self.machine.source.fetch(self.weights.rope_frequencies())?);
        let head_dim = self.config.head_dim as usize;
        self.scratch.rotation_is_set = true;
        for (t, rotation) in self.scratch.rotation.chunks_exact_mut(head_dim).take(n).enumerate() {
            let position = if window.is_some() { t } else { place(states, t).1 };
            let (cos, sin) = rotation.split_at_mut(head_dim / 2);
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(frequencies) {
                let angle = position as f32 * frequency;
                (*cos, *sin) = (libm::cosf(angle), libm::sinf(angle));
            }
        }
        Ok(())
    }

    /// `norm = rmsnorm(x)`, for `n` tokens.
    pub(super) fn norm(&mut self, weight: Option<Extent>, n: usize) -> Result<(), Error> {
        let weight = weight.expect("every block has its norms");
        let (hidden, eps) = (self.config.hidden as usize, self.config.norm_eps);
        let (kernels, parallel) = (self.machine.kernels, self.machine.among_tokens(n * hidden));
        let weight = ops::floats(self.machine.source.fetch(weight)?);
        let (x, norm) = (&*self.scratch.x, &mut *self.scratch.norm);
        parallel.for_each_chunk(&mut norm[..n * hidden], hidden, &|t, out| {
            out.copy_from_slice(&x[t * hidden..][..hidden]);
            kernels.rmsnorm(out, weight, eps);
        });
        Ok(())
    }

    /// `norm = rmsnorm(norm)`, for `n` tokens of `width`, in models that have this norm.
    pub(super) fn sub_norm(&mut self, weight: Option<Extent>, width: usize, n: usize) -> Result<(), Error> {
        let Some(weight) = weight else { return Ok(()) };
        let (kernels, parallel, eps) =
            (self.machine.kernels, self.machine.among_tokens(n * width), self.config.norm_eps);
        let weight = ops::floats(self.machine.source.fetch(weight)?);
        let norm = &mut self.scratch.norm[..n * width];
        parallel.for_each_chunk(norm, width, &|_, x| kernels.rmsnorm(x, weight, eps));
        Ok(())
    }

    /// Normalizes each head in the columns `heads` of `projected`, for `n` tokens of `width`, in models that do.
    fn head_norms(&mut self, weight: Option<Extent>, width: usize, heads: Range<usize>, n: usize) -> Result<(), Error> {
        let Some(weight) = weight else { return Ok(()) };
        let (head_dim, eps) = (self.config.head_dim as usize, self.config.norm_eps);
        let (kernels, parallel) = (self.machine.kernels, self.machine.among_tokens(n * heads.len()));
        let weight = ops::floats(self.machine.source.fetch(weight)?);
        parallel.for_each_chunk(&mut self.scratch.projected[..n * width], width, &|_, row| {
            for head in row[heads.clone()].chunks_exact_mut(head_dim) {
                kernels.rmsnorm(head, weight, eps);
            }
        });
        Ok(())
    }

    /// `projected = linears(norm)`, for `n` tokens of `cols`, from `at` on in rows of `width`.
    #[expect(clippy::too_many_arguments, reason = "shapes, which nothing else has in common")]
    pub(super) fn linears(
        &mut self,
        layer: u32,
        linears: &[Linear],
        quantizer: Quantizer,
        cols: usize,
        n: usize,
        width: usize,
        at: usize,
    ) -> Result<(), Error> {
        // Linears that normalize their own input have inputs of their own, the others share one.
        let apart = if self.config.linear_norm_eps.is_some() { 1 } else { linears.len() };
        let mut first = at;
        for linears in linears.chunks(apart).flat_map(|linears| linears.chunk_by(|a, b| a.is_f16() == b.is_f16())) {
            if linears[0].is_f16() {
                for linear in linears {
                    self.linear_f16(layer, linear, cols, n, width, first)?;
                    first += padded_rows(linear.rows());
                }
                continue;
            }
            let mut scales = [0.0; Limits::BATCH_MAX as usize];
            self.quantize(layer, linears[0].input_norm, quantizer, cols, &mut scales[..n])?;
            let stride = self.quantized_stride();
            let s = &mut self.scratch;
            let x = Quantized { values: s.quantized, stride, scales: &scales[..n], tables: s.tables };
            let mut out = Output { rows: s.projected, stride: width, first, units: s.units };
            let room = Room { bytes: s.gathered, starts: s.starts };
            self.machine.linears(linears, x, room, &mut out)?;
            first += linears.iter().map(|l| padded_rows(l.rows())).sum::<usize>();
        }
        Ok(())
    }

    /// `projected = linear(norm)` of one linear in [`Format::F16`], for `n` tokens of `cols`, from `first` on in rows of `width`:
    /// floats by floats, nothing is quantized.
    fn linear_f16(
        &mut self,
        layer: u32,
        linear: &Linear,
        cols: usize,
        n: usize,
        width: usize,
        first: usize,
    ) -> Result<(), Error> {
        let weight = match linear.input_norm {
            Some(extent) => Some(ops::floats(self.machine.source.fetch(extent)?)),
            None => None,
        };
        let s = &mut self.scratch;
        let mut x = &s.norm[..n * cols];
        if let (Some(weight), Some(eps)) = (weight, self.config.linear_norm_eps) {
            let input = &mut s.input[..n * cols];
            input.copy_from_slice(x);
            input.chunks_exact_mut(cols).for_each(|row| self.machine.kernels.rmsnorm(row, weight, eps));
            x = input;
        }
        if !ops::finite(x) {
            return Err(Error::NotFinite { layer });
        }
        let mut out = Output { rows: s.projected, stride: width, first, units: s.units };
        self.machine.linear_f16(linear.whole(), x, &mut out)?;
        Ok(())
    }

    /// `quantized = int8(norm)`, normalized once more if the linear does so, and rotated if the quantizer does; one scale a token.
    /// What is rotated is not there as it was any more.
    pub(super) fn quantize(
        &mut self,
        layer: u32,
        norm: Option<Extent>,
        quantizer: Quantizer,
        cols: usize,
        scales: &mut [f32],
    ) -> Result<(), Error> {
        let stride = self.quantized_stride();
        let (kernels, parallel) = (self.machine.kernels, self.machine.among_tokens(scales.len() * cols));
        let weight = match norm {
            Some(extent) => Some(ops::floats(self.machine.source.fetch(extent)?)),
            None => None,
        };
        let eps = self.config.linear_norm_eps;
        let s = &mut self.scratch;
        let inputs = s.input.chunks_mut(cols).map(Some).chain(core::iter::repeat_with(|| None));
        let rows = s.norm.chunks_exact_mut(cols).zip(s.quantized.chunks_exact_mut(stride));
        let finite = AtomicBool::new(true);
        for_each_item::<_, BATCH_MAX>(parallel, scales.iter_mut().zip(rows).zip(inputs), &|_,
                                                                                           (
            (scale, (x, q)),
            input,
        )| {
            let x = match (weight, eps, input) {
                (Some(weight), Some(eps), Some(input)) => {
                    input.copy_from_slice(x);
                    kernels.rmsnorm(input, weight, eps);
                    input
                }
                _ => x,
            };
            if quantizer.rotates() {
                float::hadamard(x);
            }
            let quantized = match quantizer {
                Quantizer::Int8 | Quantizer::Int8LargestHalf | Quantizer::Int8Hadamard => kernels.quantize(x, q),
                Quantizer::Int4 | Quantizer::Int4Hadamard => float::quantize_int4(x, q),
                Quantizer::Int4Absmax => float::quantize_int4_absmax(x, q),
                Quantizer::Fp4 => float::quantize_fp4(x, q),
            };
            match quantized {
                Some(quantized) => *scale = quantized,
                None => finite.store(false, Relaxed),
            }
            if quantizer == Quantizer::Int8LargestHalf {
                float::keep_largest_half(x, q);
            }
        });
        if finite.into_inner() { Ok(()) } else { Err(Error::NotFinite { layer }) }
    }

    /// Elements from one token's int8 activations to the next's.
    pub(super) const fn quantized_stride(&self) -> usize {
        self.scratch.quantized.len() / self.limits.batch as usize
    }

    /// `x += projected`, for `n` tokens.
    pub(super) fn add_projected(&mut self, n: usize) {
        let hidden = self.config.hidden as usize;
        let parallel = self.machine.among_tokens(n * hidden);
        let (x, projected) = (&mut *self.scratch.x, &*self.scratch.projected);
        parallel.for_each_chunk(&mut x[..n * hidden], hidden, &|t, x| {
            for (x, y) in x.iter_mut().zip(&projected[t * padded_rows(hidden)..]) {
                *x += y;
            }
        });
    }
}
