//! What a request asks of the engine, what comes back, and the queue between.
use crate::constraint::Constraint;
use bitnet_runtime::sampler::Sampling;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;

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
    /// What it is held to.
    pub constraint: Option<Constraint>,
    /// Texts before which the reply ends.
    pub stops: Vec<String>,
    /// Whether what others had read of the same prompt is used.
    pub use_cache: bool,
    /// At most so many tokens.
    pub max_tokens: usize,
    /// Whether the probability of each token is wanted, and of how many others.
    pub logprobs: Option<usize>,
    /// When the request came.
    pub arrived: Instant,
    /// When it is to have ended at the latest.
    pub deadline: Instant,
    /// Where the reply goes. Whoever drops the other end has left. While there is no room for [`Event::PER_TOKEN`] the reply
    /// waits.
    pub events: Sender<Event>,
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
    /// From the request to its conversation.
    pub waited: Duration,
    /// From the request to its first token, if there was one.
    pub first_token: Option<Duration>,
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

impl Event {
    /// Events that one token can make: its text, what was held back, and the end.
    pub const PER_TOKEN: usize = 3;
    /// Events that wait for a client at most: so many tokens a reply is ahead of whoever reads it.
    pub const ROOM: usize = 64;
}

/// A place among the orders that are in, which is given back when it is dropped.
#[derive(Debug)]
pub struct Ticket(Arc<AtomicUsize>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How many orders may be in, whichever model answers them.
#[derive(Clone, Debug)]
pub struct Places {
    inside: Arc<AtomicUsize>,
    answered: usize,
    most: usize,
}

/// The end of the queue where orders go in.
#[derive(Clone, Debug)]
pub struct Queue {
    orders: mpsc::Sender<(Order, Ticket)>,
    places: Places,
}

/// The other end.
pub type Orders = mpsc::Receiver<(Order, Ticket)>;

impl Places {
    /// Places for `answered` orders at once, and at most `waiting` that wait for one of these to end.
    pub fn new(answered: usize, waiting: usize) -> Self {
        Self { inside: Arc::default(), answered, most: answered.saturating_add(waiting) }
    }
    /// A queue for orders that have a place.
    pub fn queue(&self) -> (Queue, Orders) {
        let (orders, receiver) = mpsc::channel();
        (Queue { orders, places: self.clone() }, receiver)
    }
    /// Orders that are in.
    pub fn taken(&self) -> usize {
        self.inside.load(Ordering::Relaxed)
    }
    /// Those of them that wait.
    pub fn waiting(&self) -> usize {
        self.taken().saturating_sub(self.answered)
    }
}

impl Queue {
    /// Puts an order in.
    ///
    /// # Errors
    /// If there is no room, or nobody at the other end.
    pub fn push(&self, order: Order) -> Result<(), Full> {
        let Places { inside, most, .. } = &self.places;
        let room = |n: usize| (n < *most).then_some(n + 1);
        inside.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).map_err(|_| Full::Busy)?;
        self.orders.send((order, Ticket(inside.clone()))).map_err(|_| Full::Gone)
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
