//! One thread owns the model and every conversation; requests reach it through a bounded queue.
//!
//! A turn of its loop: take what is new, drop what nobody waits for any more, give free conversations to those who wait, with
//! what others had read of the same (`cache`), read one batch of one prompt, and one token of every reply in one pass over the
//! weights. So a long prompt delays others by a batch at a time, and whoever leaves stops costing within a batch or a token.
use crate::cache::{Cache, Cut, WORTH, common};
use crate::metrics::{Active, Metrics};
use crate::order::{Event, Finish, Logprobs, Order, Orders, Scored, Ticket, Usage};
use crate::pulse::Pulse;
use anyhow::ensure;
use bitnet_host::open::{Opened, mib};
use bitnet_host::weights::{PassBytes, length};
use bitnet_kernel::Block;
use bitnet_runtime::cgroup::available_memory;
use bitnet_runtime::model::Need;
use bitnet_runtime::sampler::{Sampler, Sampling};
use bitnet_runtime::tokenizer::{TextStream, Tokenizer};
use bitnet_runtime::{Error, Image, Model, State};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// How long the engine looks away when every reply waits for its reader.
const PAUSE: Duration = Duration::from_millis(5);

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
    ticket: Ticket,
    active: Active<'t>,
    stream: TextStream<'t>,
    cached: usize,
    /// From the request to this conversation, and to the first token.
    waited: Duration,
    first_token: Option<Duration>,
    /// Tokens of the reply.
    reply: Vec<u32>,
    /// Tokens of the prompt after which another conversation went on otherwise, so that more may: worth a snapshot.
    boundary: Option<usize>,
    /// How often, of those that occurred; empty without such penalties.
    counts: Vec<u32>,
}

impl Job<'_> {
    /// The token to read next, if the prompt has been.
    fn next(&self, read: usize) -> Option<u32> {
        let at = read.checked_sub(self.order.prompt.len())?;
        self.reply.get(at).copied()
    }
    /// Whether what the next token makes has room: if not, its client reads more slowly than the model writes.
    fn has_room(&self) -> bool {
        self.order.events.capacity() >= Event::PER_TOKEN
    }
    /// Gives out an event, for which there is room, or nobody who would miss it.
    fn send(&self, event: Event) {
        let _ = self.order.events.try_send(event);
    }
    fn leave(self, finish: Finish, metrics: &Metrics) {
        let usage = Usage {
            prompt: self.order.prompt.len(),
            cached: self.cached,
            completion: self.reply.len(),
            waited: self.waited,
            first_token: self.first_token,
        };
        metrics.finished(self.order.arrived.elapsed());
        // First, or a client that asks again at once would find its own place taken.
        drop((self.ticket, self.active));
        let _ = self.order.events.try_send(Event::Done(finish, usage));
    }
}

/// Conversations that fit the memory for snapshots unless the options say how large it is, and the share of the free memory, one
/// in so many, that it has at most.
const CACHED: u64 = 16;
const CACHED_SHARE: u64 = 4;

/// How much to hold in memory.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Conversations.
    pub conversations: usize,
    /// Bytes of snapshots, if not as many as there is room for.
    pub cache_bytes: Option<u64>,
}

/// Runs until every [`Queue`](crate::order::Queue) is gone and all orders have ended. `ready` is called when the model is in memory.
///
/// # Errors
/// If there is not enough memory for so many conversations.
pub fn run(
    opened: Opened<'_>,
    tokenizer: &Tokenizer,
    room: Room,
    orders: &Orders,
    (metrics, pulse): (&Metrics, &Pulse),
    ready: impl FnOnce(),
) -> anyhow::Result<()> {
    let conversations = room.conversations;
    let image = opened.image;
    let stop_ids = image.header().text.stop;
    let (config, limits, plan) = (opened.image.header().config, opened.limits, opened.plan);
    let bytes = (conversations as u64 - 1) * ((plan.state + plan.sampler) * Block::BYTES) as u64;
    let available = available_memory().unwrap_or(u64::MAX);
    ensure!(
        bytes <= available,
        "{conversations} conversations {} need {} more memory and {} are available; use fewer --sessions{}",
        length(&config, &limits),
        mib(bytes),
        mib(available),
        if config.is_bounded() { " or a smaller --context" } else { "" }
    );
    let mut memories: Vec<(Vec<Block>, Vec<Block>)> =
        (1..conversations).map(|_| (vec![Block::ZERO; plan.state], vec![Block::ZERO; plan.sampler])).collect();
    let bytes = PassBytes::of(&image);
    let (model, state, sampler) = opened.load()?;
    let mut slots = vec![Slot::new(state, Sampler::new(config.vocab, Sampling::GREEDY, sampler)?)];
    for (state, sampler) in &mut memories {
        let state = State::new(&config, &limits, state)?;
        slots.push(Slot::new(state, Sampler::new(config.vocab, Sampling::GREEDY, sampler)?));
    }
    let cache_bytes = room.cache_bytes.unwrap_or_else(|| {
        let state = (plan.state * Block::BYTES) as u64;
        (CACHED * state).min(available_memory().unwrap_or(0) / CACHED_SHARE)
    });
    let cut = if !config.is_stateful() && config.is_bounded() { Cut::Anywhere } else { Cut::Nowhere };
    let vocab = config.vocab as usize;
    let batch = limits.batch as usize;
    let mut engine = Engine {
        model,
        tokenizer,
        stop_ids: stop_ids.ids(),
        metrics,
        image,
        cut,
        cache: Cache::new(cut, usize::try_from(cache_bytes).unwrap_or(usize::MAX)),
        bytes,
        logits: vec![0.0; vocab * batch.min(conversations)],
        adjusted: Vec::with_capacity(vocab),
        turn: 0,
    };
    ready();
    let mut queue = VecDeque::new();
    loop {
        let idle = queue.is_empty() && slots.iter().all(|slot| slot.job.is_none());
        if idle {
            pulse.rest();
            match orders.recv() {
                Ok(order) => queue.push_back(order),
                Err(_) => return Ok(()),
            }
        }
        pulse.beat();
        queue.extend(orders.try_iter());
        queue.retain(|(order, _): &(Order, Ticket)| {
            let there = !order.events.is_closed();
            if !there {
                metrics.cancelled();
            }
            there
        });
        let computed = engine.turn(&mut slots, &mut queue);
        if !computed && slots.iter().any(|slot| slot.job.is_some()) {
            queue.extend(orders.recv_timeout(PAUSE));
        }
    }
}

struct Engine<'m, 't> {
    model: Model<'m>,
    tokenizer: &'t Tokenizer,
    stop_ids: &'t [u32],
    metrics: &'t Metrics,
    image: Image<'m>,
    cut: Cut,
    cache: Cache,
    bytes: PassBytes,
    /// Those of the conversations that share a pass.
    logits: Vec<f32>,
    /// Those of one, with what the request adds to them.
    adjusted: Vec<f32>,
    turn: u64,
}

impl<'t> Engine<'_, 't> {
    /// Returns whether anything was computed.
    fn turn(&mut self, slots: &mut [Slot<'_, 't>], queue: &mut VecDeque<(Order, Ticket)>) -> bool {
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
            let turn = self.turn;
            let next = fair(turn, queue.iter().map(|(order, _)| order.prompt.len())).expect("it is not empty");
            let (order, ticket) = queue.remove(next).expect("found just now");
            self.admit(slots, order, ticket);
        }
        let prompt = self.read_prompt(slots);
        let replies = self.read_replies(slots);
        prompt || replies
    }

    /// Gives an order a free conversation.
    fn admit(&mut self, slots: &mut [Slot<'_, 't>], order: Order, ticket: Ticket) {
        let shared = || {
            let histories = slots.iter().map(|slot| &*slot.history).chain(self.cache.histories());
            histories.map(|tokens| common(tokens, &order.prompt)).max()
        };
        let boundary = shared().filter(|&n| self.cut == Cut::Nowhere && n >= WORTH);
        let (slot, cached) = self.seat(slots, &order);
        let slot = &mut slots[slot];
        slot.sampler.restart(order.sampling);
        let waited = order.arrived.elapsed();
        self.metrics.admitted(order.prompt.len(), cached, waited);
        self.metrics.cache(self.cache.bytes());
        let counted = order.presence_penalty != 0.0 || order.frequency_penalty != 0.0;
        let counts = if counted { vec![0; self.model.config().vocab as usize] } else { Vec::new() };
        let stream = TextStream::new(self.tokenizer, order.stops.clone());
        let (active, reply) = (self.metrics.active(), Vec::new());
        slot.job =
            Some(Job { order, ticket, active, stream, cached, waited, first_token: None, reply, boundary, counts });
        slot.used = self.turn;
    }

    /// A free conversation that has read, or is given, as much as any has of what a prompt begins with; and how much that is.
    fn seat(&mut self, slots: &mut [Slot<'_, 't>], order: &Order) -> (usize, usize) {
        let prompt = &order.prompt;
        let free = |i: usize| slots[i].job.is_none();
        let usable = |i: usize| self.cut.usable(&slots[i].history, prompt);
        let oldest = (0..slots.len()).filter(|&i| free(i)).min_by_key(|&i| slots[i].used).expect("one is free");
        // Of those that save as much the free one, which need not be copied.
        let best = (0..slots.len()).max_by_key(|&i| (usable(i), free(i))).expect("there are some");
        let here = usable(best);
        let anew = !order.use_cache;
        let to = if !anew && here >= WORTH && free(best) { best } else { oldest };
        // What the conversation gives up may be continued by someone, unless another has it too.
        let lost = slots[to].history.len() - common(&slots[to].history, prompt);
        let elsewhere = |(i, slot): (usize, &Slot<'_, '_>)| i != to && slot.history.starts_with(&slots[to].history);
        if lost >= WORTH && !slots.iter().enumerate().any(elsewhere) {
            self.cache.keep(&slots[to].history, &slots[to].state, &self.image);
        }
        if anew {
            slots[to].state.rewind(0);
            slots[to].history.clear();
            return (to, 0);
        }
        match self.cache.find(prompt) {
            Some((there, entry)) if there > here => {
                let slot = &mut slots[to];
                // A snapshot of this model, made with these limits.
                if slot.state.restore(&self.image, &entry.snapshot).is_ok() {
                    slot.history.clone_from(&entry.tokens);
                    self.metrics.restored();
                }
            }
            _ if here >= WORTH && to != best => {
                let [to, from] = slots.get_disjoint_mut([to, best]).expect("they are two");
                if to.state.fork_from(&from.state).is_ok() {
                    to.history.clone_from(&from.history);
                    self.metrics.forked();
                }
            }
            _ => {}
        }
        let slot = &mut slots[to];
        let cached = slot.state.rewind(common(&slot.history, prompt).min(prompt.len() - 1));
        slot.history.truncate(cached);
        (to, cached)
    }

    /// Reads a batch of the prompt whose turn it is; returns whether there was one.
    fn read_prompt(&mut self, slots: &mut [Slot<'_, 't>]) -> bool {
        let unread = |slot: &Slot<'_, '_>| {
            let prompt = slot.job.as_ref().map_or(0, |job| job.order.prompt.len());
            prompt.saturating_sub(slot.history.len())
        };
        let mut those: Vec<&mut Slot<'_, 't>> = slots.iter_mut().filter(|slot| unread(slot) > 0).collect();
        those.sort_by_key(|slot| slot.used);
        let Some(next) = fair(self.turn, those.iter().map(|slot| unread(slot))) else { return false };
        let slot = those.swap_remove(next);
        slot.used = self.turn;
        let job = slot.job.as_mut().expect("its prompt is not read");
        let prompt = &job.order.prompt;
        let from = slot.history.len();
        let batch = from + self.model.limits().batch as usize;
        let boundary = job.boundary.filter(|&n| n > from && n < batch);
        let to = prompt.len().min(boundary.unwrap_or(batch));
        let whole = to == prompt.len();
        let need = job.need(&slot.sampler);
        // The same prompt may come again, and the last token is always read.
        if self.cut == Cut::Nowhere && whole {
            self.cache.keep(&slot.history, &slot.state, &self.image);
        }
        let start = Instant::now();
        let done = self.model.read(&mut slot.state, &prompt[from..to]).and_then(|()| {
            if whole {
                let logits = self.model.logits_after(to - from - 1, need)?;
                self.logits[..logits.len()].copy_from_slice(logits);
            }
            Ok(())
        });
        let bytes = self.bytes.layers + if whole { self.bytes.head } else { 0 };
        self.metrics.pass(bytes, start.elapsed(), to - from, 0);
        match done {
            Ok(()) => {
                slot.history.extend_from_slice(&prompt[from..to]);
                // Where this conversation will end nobody knows, but others may begin with its prompt.
                if self.cut == Cut::Nowhere && (whole || job.boundary == Some(to)) {
                    self.cache.keep(&slot.history, &slot.state, &self.image);
                }
                if whole {
                    let time = job.order.arrived.elapsed();
                    job.first_token = Some(time);
                    self.metrics.first_token(time);
                    self.choose_guarded(slot, 0);
                }
            }
            Err(e) => Self::fail(slot, e, self.metrics),
        }
        true
    }

    /// Reads the last token of every reply and chooses the next, as many replies in a pass as the model's batch. Returns whether
    /// there were any.
    fn read_replies<'s>(&mut self, slots: &mut [Slot<'s, 't>]) -> bool {
        let next = |slot: &Slot<'_, '_>| slot.job.as_ref().filter(|job| job.has_room())?.next(slot.history.len());
        let mut replies: Vec<&mut Slot<'s, 't>> = slots.iter_mut().filter(|slot| next(slot).is_some()).collect();
        let any = !replies.is_empty();
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
        any
    }

    fn read_together<'s>(&mut self, slots: &mut [&mut Slot<'s, 't>]) -> Result<(), Error> {
        let vocab = self.model.config().vocab as usize;
        let job = |slot: &Slot<'_, '_>| slot.job.as_ref().and_then(|job| job.next(slot.history.len()));
        let tokens: Vec<u32> = slots.iter().filter_map(|slot| job(slot)).collect();
        let needs: Vec<Need> =
            slots.iter().map(|slot| slot.job.as_ref().map_or(Need::All, |job| job.need(&slot.sampler))).collect();
        let mut states: Vec<&mut State<'s>> = slots.iter_mut().map(|slot| &mut slot.state).collect();
        let logits = &mut self.logits[..tokens.len() * vocab];
        let start = Instant::now();
        self.model.step_each(&mut states, &tokens, &needs, logits)?;
        // Models with a memory or a recurrence read their weights once for each.
        let passes = if self.model.config().is_stateful() { tokens.len() as u64 } else { 1 };
        self.metrics.pass(passes * self.bytes.token(), start.elapsed(), 0, tokens.len());
        for (i, (slot, token)) in slots.iter_mut().zip(tokens).enumerate() {
            slot.history.push(token);
            slot.used = self.turn;
            self.choose_guarded(slot, i);
        }
        Ok(())
    }

    /// [`Self::choose`], where code of others runs, that of grammars: should it panic, that ends this reply and no other.
    fn choose_guarded(&mut self, slot: &mut Slot<'_, 't>, i: usize) {
        let metrics = self.metrics;
        if catch_unwind(AssertUnwindSafe(|| self.choose(slot, i))).is_err() {
            slot.job = None;
            metrics.failed();
        }
    }

    /// Chooses the next token of a reply from row `i` of the logits, and gives out what is certain.
    fn choose(&mut self, slot: &mut Slot<'_, 't>, i: usize) {
        let vocab = self.model.config().vocab as usize;
        let logits = &self.logits[i * vocab..][..vocab];
        let mut job = slot.job.take().expect("it asked for the logits");
        if job.order.max_tokens == 0 {
            return job.leave(Finish::Length, self.metrics);
        }
        let token = if job.is_plain() {
            slot.sampler.sample(logits, &slot.history)
        } else {
            self.adjusted.clear();
            self.adjusted.extend_from_slice(logits);
            if let Err(e) = job.adjust(&mut self.adjusted) {
                return job.fail(e, self.metrics);
            }
            slot.sampler.sample(&self.adjusted, &slot.history)
        };
        if self.stop_ids.contains(&token) {
            return self.end(job, Finish::Stop);
        }
        let whole = match job.order.constraint.as_mut().map_or(Ok(false), |constraint| constraint.push(token)) {
            Ok(whole) => whole,
            Err(e) => return job.fail(e, self.metrics),
        };
        job.reply.push(token);
        self.metrics.generated();
        if let Some(count) = job.counts.get_mut(token as usize) {
            *count += 1;
        }
        let logprobs = job.order.logprobs.map(|top| logprobs(logits, token, top));
        let mut text = String::new();
        job.stream.push(token, &mut |piece| text.push_str(piece));
        job.send(Event::Piece(text, logprobs));
        let full = slot.state.remaining() == 0;
        if whole || job.stream.stopped() {
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
            job.send(Event::Piece(text, None));
        }
        job.leave(finish, self.metrics);
    }

    /// Ends an order whose pass failed; what its conversation had read is not trusted.
    fn fail(slot: &mut Slot<'_, '_>, e: Error, metrics: &Metrics) {
        if let Some(job) = slot.job.take() {
            job.fail(e.to_string(), metrics);
        }
        slot.state.rewind(0);
        slot.history.clear();
    }
}

impl Job<'_> {
    /// The logits that choosing needs: all, where something other than the sampler looks at them.
    fn need(&self, sampler: &Sampler<'_>) -> Need {
        if self.is_plain() && self.order.logprobs.is_none() { sampler.need() } else { Need::All }
    }
    /// Whether the sampler gets the model's own logits.
    fn is_plain(&self) -> bool {
        self.order.bias.is_empty() && self.counts.is_empty() && self.order.constraint.is_none()
    }
    /// Makes of the model's logits those that the sampler gets.
    fn adjust(&mut self, logits: &mut [f32]) -> Result<(), String> {
        for &(token, bias) in &self.order.bias {
            logits[token as usize] += bias;
        }
        for (logit, &count) in logits.iter_mut().zip(&self.counts) {
            if count > 0 {
                *logit -= self.order.presence_penalty + count as f32 * self.order.frequency_penalty;
            }
        }
        self.order.constraint.as_mut().map_or(Ok(()), |constraint| constraint.mask(logits))
    }
    fn fail(self, e: String, metrics: &Metrics) {
        metrics.failed();
        self.send(Event::Failed(e));
    }
}

/// Which of several with so much to do is next, the first having waited for longest: by turns that one and the one with least to do,
/// so that a short request need not wait for long ones, and a long one not for a run of short ones.
fn fair(turn: u64, to_do: impl Iterator<Item = usize>) -> Option<usize> {
    let mut all = to_do.enumerate();
    if turn.is_multiple_of(2) { all.next() } else { all.min_by_key(|&(_, n)| n) }.map(|(i, _)| i)
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
