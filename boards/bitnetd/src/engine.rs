//! One thread owns the model and every conversation; requests reach it through a bounded queue.
//!
//! A turn of its loop: take what is new, drop what nobody waits for any more, give free conversations to those who wait, read
//! one batch of one prompt, and one token of every reply in one pass over the weights. So a long prompt delays others by a
//! batch at a time, and whoever leaves stops costing within a batch or a token.
use crate::metrics::Metrics;
use anyhow::{Context as _, ensure};
use bitnet_host::open::{Opened, mib};
use bitnet_kernel::Block;
use bitnet_runtime::cgroup::available_memory;
use bitnet_runtime::model::Need;
use bitnet_runtime::sampler::{Sampler, Sampling};
use bitnet_runtime::tokenizer::{TextStream, Tokenizer};
use bitnet_runtime::{Error, Model, State};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Instant;
use tokio::sync::mpsc::UnboundedSender;

/// What a request asks the engine for.
#[derive(Debug)]
pub struct Order {
    /// The tokens to continue, at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Taken from the logit of every token that the reply has already.
    pub presence_penalty: f32,
    /// The same for every time that the reply has it.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub bias: Vec<(u32, f32)>,
    /// Texts before which the reply ends.
    pub stops: Vec<String>,
    /// At most so many tokens.
    pub max_tokens: usize,
    /// Whether the probability of each token is wanted, and of how many others.
    pub logprobs: Option<usize>,
    /// When it is to have ended at the latest.
    pub deadline: Instant,
    /// Where the reply goes. Whoever drops the other end has left.
    pub events: UnboundedSender<Event>,
}

/// A token and the logarithm of its probability.
#[derive(Clone, Copy, Debug)]
pub struct Scored {
    /// The token.
    pub token: u32,
    /// Its natural logarithm, by the model's own logits at temperature 1.
    pub logprob: f32,
}

/// What the model thought of a token.
#[derive(Clone, Debug)]
pub struct Logprobs {
    /// The token that was chosen.
    pub chosen: Scored,
    /// The likeliest, best first.
    pub top: Vec<Scored>,
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token or text.
    Stop,
    /// As many tokens as were asked for, as fit the context, or as there was time for.
    Length,
}

/// What a reply cost.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Those of them that an earlier request had left in memory.
    pub cached: usize,
    /// Tokens of the reply, without one that ended it.
    pub completion: usize,
}

/// A piece of a reply.
#[derive(Debug)]
pub enum Event {
    /// Text that is certain by now, which may be none, and what was wanted about the token.
    Piece(String, Option<Logprobs>),
    /// The end.
    Done(Finish, Usage),
    /// Something went wrong.
    Failed(String),
}

/// The end of the queue where orders go in.
#[derive(Clone, Debug)]
pub struct Queue {
    orders: mpsc::Sender<Order>,
    waiting: Arc<AtomicUsize>,
    most: usize,
}

impl Queue {
    /// A queue in which at most `most` orders wait for a conversation.
    pub fn new(most: usize) -> (Self, Orders) {
        let (sender, receiver) = mpsc::channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        (Self { orders: sender, waiting: waiting.clone(), most }, Orders { receiver, waiting })
    }
    /// Orders that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
    /// Puts an order in.
    ///
    /// # Errors
    /// If there is no room, or nobody at the other end.
    pub fn push(&self, order: Order) -> Result<(), Full> {
        let room = |n: usize| (n < self.most).then_some(n + 1);
        self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).map_err(|_| Full::Busy)?;
        self.orders.send(order).map_err(|_| Full::Gone)
    }
}

/// Why an order was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// As many wait as may.
    Busy,
    /// The engine has ended.
    Gone,
}

/// The other end.
#[derive(Debug)]
pub struct Orders {
    receiver: mpsc::Receiver<Order>,
    waiting: Arc<AtomicUsize>,
}

/// A conversation in memory and the order that uses it.
struct Slot<'m, 't> {
    state: State<'m>,
    sampler: Sampler<'m>,
    /// What the state has read.
    history: Vec<u32>,
    /// The turn in which it was last used.
    used: u64,
    job: Option<Job<'t>>,
}

impl<'m> Slot<'m, '_> {
    const fn new(state: State<'m>, sampler: Sampler<'m>) -> Self {
        Self { state, sampler, history: Vec::new(), used: 0, job: None }
    }
}

struct Job<'t> {
    order: Order,
    stream: TextStream<'t>,
    started: Instant,
    cached: usize,
    /// Tokens of the reply.
    reply: Vec<u32>,
    /// How often, of those that occurred; empty without such penalties.
    counts: Vec<u32>,
}

impl Job<'_> {
    /// The token to read next, if the prompt has been.
    fn next(&self, read: usize) -> Option<u32> {
        let at = read.checked_sub(self.order.prompt.len())?;
        self.reply.get(at).copied()
    }
    fn leave(self, finish: Finish, metrics: &Metrics) {
        let usage = Usage { prompt: self.order.prompt.len(), cached: self.cached, completion: self.reply.len() };
        metrics.finished(self.started.elapsed());
        let _ = self.order.events.send(Event::Done(finish, usage));
    }
}

/// A prefix shorter than this is no reason to give up a conversation that someone may continue.
const WORTH: usize = 16;

/// Runs until every [`Queue`] is gone and all orders have ended. `ready` is called when the model is in memory.
///
/// # Errors
/// If there is not enough memory for so many conversations.
pub fn run(
    opened: Opened<'_>,
    tokenizer: &Tokenizer,
    conversations: usize,
    orders: &Orders,
    metrics: &Metrics,
    ready: &dyn Fn(),
) -> anyhow::Result<()> {
    let stop_ids = opened.image.header().text.stop;
    let (config, limits, plan) = (opened.image.header().config, opened.limits, opened.plan);
    let bytes = (conversations as u64 - 1) * ((plan.state + plan.sampler) * Block::BYTES) as u64;
    let available = available_memory().unwrap_or(u64::MAX);
    ensure!(
        bytes <= available,
        "{conversations} conversations of {} tokens need {} more memory and {} are available; use fewer --sessions or a smaller --context",
        limits.context,
        mib(bytes),
        mib(available)
    );
    let mut memories: Vec<(Vec<Block>, Vec<Block>)> =
        (1..conversations).map(|_| (vec![Block::ZERO; plan.state], vec![Block::ZERO; plan.sampler])).collect();
    let weight_bytes = opened.image.file_bytes();
    let (model, state, sampler) = opened.load()?;
    let mut slots = vec![Slot::new(state, Sampler::new(config.vocab, Sampling::GREEDY, sampler)?)];
    for (state, sampler) in &mut memories {
        let state = State::new(&config, &limits, state)?;
        slots.push(Slot::new(state, Sampler::new(config.vocab, Sampling::GREEDY, sampler)?));
    }
    let vocab = config.vocab as usize;
    let batch = limits.batch as usize;
    let mut engine = Engine {
        model,
        tokenizer,
        stop_ids: stop_ids.ids(),
        metrics,
        weight_bytes,
        logits: vec![0.0; vocab * batch.min(conversations)],
        adjusted: Vec::with_capacity(vocab),
        turn: 0,
    };
    ready();
    let mut queue = VecDeque::new();
    loop {
        let idle = queue.is_empty() && slots.iter().all(|slot| slot.job.is_none());
        if idle {
            match orders.receiver.recv() {
                Ok(order) => queue.push_back(order),
                Err(_) => return Ok(()),
            }
        }
        queue.extend(orders.receiver.try_iter());
        queue.retain(|order: &Order| {
            let there = !order.events.is_closed();
            if !there {
                orders.waiting.fetch_sub(1, Ordering::Relaxed);
                metrics.cancelled();
            }
            there
        });
        engine.turn(&mut slots, &mut queue, &orders.waiting).context("the engine")?;
        metrics.active(slots.iter().filter(|slot| slot.job.is_some()).count());
    }
}

struct Engine<'m, 't> {
    model: Model<'m>,
    tokenizer: &'t Tokenizer,
    stop_ids: &'t [u32],
    metrics: &'t Metrics,
    weight_bytes: u64,
    /// Those of the conversations that share a pass.
    logits: Vec<f32>,
    /// Those of one, with what the request adds to them.
    adjusted: Vec<f32>,
    turn: u64,
}

impl<'t> Engine<'_, 't> {
    fn turn(
        &mut self,
        slots: &mut [Slot<'_, 't>],
        queue: &mut VecDeque<Order>,
        waiting: &AtomicUsize,
    ) -> anyhow::Result<()> {
        self.turn += 1;
        for slot in slots.iter_mut() {
            if let Some(job) = &slot.job {
                if job.order.events.is_closed() {
                    slot.job = None;
                    self.metrics.cancelled();
                } else if Instant::now() >= job.order.deadline {
                    let job = slot.job.take().expect("looked at just now");
                    job.leave(Finish::Length, self.metrics);
                }
            }
        }
        while !queue.is_empty() && slots.iter().any(|slot| slot.job.is_none()) {
            let order = queue.pop_front().expect("it is not empty");
            waiting.fetch_sub(1, Ordering::Relaxed);
            self.admit(slots, order);
        }
        self.read_prompt(slots);
        self.read_replies(slots);
        Ok(())
    }

    /// Gives an order the free conversation that has read most of its prompt, or else the one that was not used for longest.
    fn admit(&self, slots: &mut [Slot<'_, 't>], order: Order) {
        let common = |slot: &Slot<'_, '_>| {
            let common = slot.history.iter().zip(&order.prompt).take_while(|(a, b)| a == b).count();
            // The last token is always read: its logits choose the next.
            common.min(order.prompt.len() - 1)
        };
        let worth = |slot: &Slot<'_, '_>| if common(slot) < WORTH { 0 } else { common(slot) };
        let free = slots.iter_mut().filter(|slot| slot.job.is_none());
        let slot = free.max_by_key(|slot| (worth(slot), u64::MAX - slot.used)).expect("one is free");
        let cached = slot.state.rewind(common(slot));
        slot.history.truncate(cached);
        slot.sampler.restart(order.sampling);
        self.metrics.admitted(order.prompt.len(), cached);
        let counted = order.presence_penalty != 0.0 || order.frequency_penalty != 0.0;
        let counts = if counted { vec![0; self.model.config().vocab as usize] } else { Vec::new() };
        let stream = TextStream::new(self.tokenizer, order.stops.clone());
        slot.job = Some(Job { order, stream, started: Instant::now(), cached, reply: Vec::new(), counts });
        slot.used = self.turn;
    }

    /// Reads a batch of the prompt whose turn it is: of those that wait the one that was not read for longest.
    fn read_prompt(&mut self, slots: &mut [Slot<'_, 't>]) {
        let unread =
            |slot: &&mut Slot<'_, '_>| slot.job.as_ref().is_some_and(|job| slot.history.len() < job.order.prompt.len());
        let Some(slot) = slots.iter_mut().filter(unread).min_by_key(|slot| slot.used) else { return };
        slot.used = self.turn;
        let job = slot.job.as_mut().expect("its prompt is not read");
        let prompt = &job.order.prompt;
        let from = slot.history.len();
        let to = prompt.len().min(from + self.model.limits().batch as usize);
        let whole = to == prompt.len();
        let need = job.need(&slot.sampler);
        let done = self.model.read(&mut slot.state, &prompt[from..to]).and_then(|()| {
            if whole {
                let logits = self.model.logits_after(to - from - 1, need)?;
                self.logits[..logits.len()].copy_from_slice(logits);
            }
            Ok(())
        });
        self.metrics.pass(self.weight_bytes, to - from, 0);
        match done {
            Ok(()) => {
                slot.history.extend_from_slice(&prompt[from..to]);
                if whole {
                    self.metrics.first_token(job.started.elapsed());
                    self.choose(slot, 0);
                }
            }
            Err(e) => Self::fail(slot, e, self.metrics),
        }
    }

    /// Reads the last token of every reply and chooses the next, as many replies in a pass as the model's batch.
    fn read_replies<'s>(&mut self, slots: &mut [Slot<'s, 't>]) {
        let next = |slot: &Slot<'_, '_>| slot.job.as_ref()?.next(slot.history.len());
        let mut replies: Vec<&mut Slot<'s, 't>> = slots.iter_mut().filter(|slot| next(slot).is_some()).collect();
        let most = self.model.limits().batch as usize;
        for together in replies.chunks_mut(most) {
            if let Err(e) = self.read_together(together) {
                // One of them may be what is wrong: each by itself.
                if let [slot] = together {
                    Self::fail(slot, e, self.metrics);
                } else {
                    for slot in together {
                        if let Err(e) = self.read_together(std::slice::from_mut(slot)) {
                            Self::fail(slot, e, self.metrics);
                        }
                    }
                }
            }
        }
    }

    fn read_together<'s>(&mut self, slots: &mut [&mut Slot<'s, 't>]) -> Result<(), Error> {
        let vocab = self.model.config().vocab as usize;
        let job = |slot: &Slot<'_, '_>| slot.job.as_ref().and_then(|job| job.next(slot.history.len()));
        let tokens: Vec<u32> = slots.iter().filter_map(|slot| job(slot)).collect();
        let needs: Vec<Need> =
            slots.iter().map(|slot| slot.job.as_ref().map_or(Need::All, |job| job.need(&slot.sampler))).collect();
        let mut states: Vec<&mut State<'s>> = slots.iter_mut().map(|slot| &mut slot.state).collect();
        let logits = &mut self.logits[..tokens.len() * vocab];
        self.model.step_each(&mut states, &tokens, &needs, logits)?;
        self.metrics.pass(self.weight_bytes, 0, tokens.len());
        for (i, (slot, token)) in slots.iter_mut().zip(tokens).enumerate() {
            slot.history.push(token);
            slot.used = self.turn;
            self.choose(slot, i);
        }
        Ok(())
    }

    /// Chooses the next token of a reply from row `i` of the logits, and gives out what is certain.
    fn choose(&mut self, slot: &mut Slot<'_, 't>, i: usize) {
        let vocab = self.model.config().vocab as usize;
        let logits = &self.logits[i * vocab..][..vocab];
        let mut job = slot.job.take().expect("it asked for the logits");
        if job.order.max_tokens == 0 {
            return job.leave(Finish::Length, self.metrics);
        }
        let token = if job.order.bias.is_empty() && job.counts.is_empty() {
            slot.sampler.sample(logits, &slot.history)
        } else {
            self.adjusted.clear();
            self.adjusted.extend_from_slice(logits);
            for &(token, bias) in &job.order.bias {
                self.adjusted[token as usize] += bias;
            }
            for (logit, &count) in self.adjusted.iter_mut().zip(&job.counts) {
                if count > 0 {
                    *logit -= job.order.presence_penalty + count as f32 * job.order.frequency_penalty;
                }
            }
            slot.sampler.sample(&self.adjusted, &slot.history)
        };
        if self.stop_ids.contains(&token) {
            return self.end(job, Finish::Stop);
        }
        job.reply.push(token);
        if let Some(count) = job.counts.get_mut(token as usize) {
            *count += 1;
        }
        let logprobs = job.order.logprobs.map(|top| logprobs(logits, token, top));
        let mut text = String::new();
        job.stream.push(token, &mut |piece| text.push_str(piece));
        let _ = job.order.events.send(Event::Piece(text, logprobs));
        let full = slot.history.len() == self.model.limits().context as usize;
        if job.stream.stopped() {
            self.end(job, Finish::Stop);
        } else if full || job.reply.len() >= job.order.max_tokens {
            self.end(job, Finish::Length);
        } else {
            slot.job = Some(job);
        }
    }

    /// Gives out what was held back, and the end.
    fn end(&self, mut job: Job<'_>, finish: Finish) {
        let mut text = String::new();
        if !job.stream.stopped() {
            job.stream.finish(&mut |piece| text.push_str(piece));
        }
        if !text.is_empty() {
            let _ = job.order.events.send(Event::Piece(text, None));
        }
        job.leave(finish, self.metrics);
    }

    /// Ends an order whose pass failed; what its conversation had read is not trusted.
    fn fail(slot: &mut Slot<'_, '_>, e: Error, metrics: &Metrics) {
        if let Some(job) = slot.job.take() {
            metrics.failed();
            let _ = job.order.events.send(Event::Failed(e.to_string()));
        }
        slot.state.rewind(0);
        slot.history.clear();
    }
}

impl Job<'_> {
    /// The logits that choosing needs: all, where something other than the sampler looks at them.
    fn need(&self, sampler: &Sampler<'_>) -> Need {
        let plain = self.order.bias.is_empty() && self.counts.is_empty() && self.order.logprobs.is_none();
        if plain { sampler.need() } else { Need::All }
    }
}

/// Logarithms of probabilities: `logit - ln(Σ exp(logit))`, the sum in double precision.
fn logprobs(logits: &[f32], token: u32, top: usize) -> Logprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    let offset = f64::from(max) + sum.ln();
    let scored = |token: u32| Scored { token, logprob: (f64::from(logits[token as usize]) - offset) as f32 };
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let better = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if top > 0 && top < order.len() {
        order.select_nth_unstable_by(top - 1, better);
    }
    order.truncate(top);
    order.sort_unstable_by(better);
    Logprobs { chosen: scored(token), top: order.into_iter().map(scored).collect() }
}
