//! From a prompt to text, token by token.
use crate::error::Error;
use crate::lookup::{Lookup, Stats};
use crate::model::{Model, State};
use crate::sampler::Sampler;
use crate::tokenizer::TextStream;
use alloc::vec::Vec;
use core::ops::ControlFlow;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token or a stop string.
    Stop,
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
    /// The caller broke it off.
    Cancelled,
}

/// When a generation ends.
#[derive(Clone, Copy, Debug)]
pub struct Until<'a> {
    /// At most so many tokens.
    pub max_tokens: usize,
    /// Tokens that end it and are not shown.
    pub stop_ids: &'a [u32],
}

/// What a generation gives out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A token was chosen.
    Token(u32),
    /// Text is certain by now: whole characters, no part of a stop string.
    Text(&'a str),
}

/// The digest of no tokens: FNV-1a with 64 bits.
const NOTHING: u64 = 0xcbf2_9ce4_8422_2325;

/// The digest of one token more.
fn digest(before: u64, token: &u32) -> u64 {
    token.to_le_bytes().iter().fold(before, |d, byte| (d ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// One conversation and what it takes to continue it.
#[derive(Debug)]
pub struct Session<'m> {
    model: Model<'m>,
    state: State<'m>,
    sampler: Sampler<'m>,
    /// The tokens that the state has read, but for the first `dropped` of them.
    history: Vec<u32>,
    /// Where conversations have no end, the oldest tokens are not kept for ever.
    dropped: usize,
    /// What tells those from others.
    digest: u64,
    /// The last token given out, if the model has not read it yet.
    pending: Option<u32>,
    /// Guesses, if wanted. The state then holds those of the last pass too, after the history's.
    lookup: Option<Lookup>,
}

impl<'m> Session<'m> {
    /// Starts from what `state` is: an empty conversation.
    ///
    /// # Panics
    /// If the state has positions already, whose tokens are not known here.
    pub fn new(model: Model<'m>, state: State<'m>, sampler: Sampler<'m>) -> Self {
        assert_eq!(state.position(), 0, "a session starts with an empty conversation");
        let history = Vec::with_capacity(model.limits().context as usize);
        Self { model, state, sampler, history, dropped: 0, digest: NOTHING, pending: None, lookup: None }
    }
    /// Has generations guess tokens from what followed the same tokens before, and read several in one pass: the same tokens and
    /// the same end, in less time where a text repeats itself. Passes have at most 8 tokens and no more than the model's batch.
    ///
    /// A model with a memory or a recurrence gains nothing and goes on as without: a guess that was wrong cannot be taken out of a state.
    #[must_use]
    pub fn with_lookup(self) -> Self {
        let lookup = (!self.model.config().is_stateful()).then(Lookup::new);
        Self { lookup, ..self }
    }
    /// What look-up has done, if it is in use.
    pub fn lookup(&self) -> Option<Stats> {
        self.lookup.as_ref().map(|lookup| lookup.stats)
    }
    /// The model.
    pub const fn model(&self) -> &Model<'m> {
        &self.model
    }
    /// The tokens read so far: where conversations have no end the last of them, at most the model's context.
    pub fn history(&self) -> &[u32] {
        &self.history
    }

    /// Makes the conversation be `tokens`: what it has in common with the one before is kept as far as [`State::rewind`] can, the
    /// rest is read. Returns how many tokens were read.
    ///
    /// # Errors
    /// As [`Model::prefill`]; the conversation is then the part that was kept, or empty if it cannot be that.
    ///
    /// # Panics
    /// If there is no token.
    pub fn prompt(&mut self, tokens: &[u32]) -> Result<usize, Error> {
        assert!(!tokens.is_empty(), "a prompt has at least one token");
        let common = match tokens.split_at_checked(self.dropped) {
            Some((first, rest)) if first.iter().fold(NOTHING, digest) == self.digest => {
                self.dropped + self.history.iter().zip(rest).take_while(|(a, b)| a == b).count()
            }
            _ => 0,
        };
        // The last token is always read: its logits choose the next.
        let common = common.min(tokens.len() - 1);
        self.pending = None;
        if let Some(lookup) = &mut self.lookup {
            lookup.forget();
        }
        let common = self.rewind(common);
        let read = self.model.prefill_for(&mut self.state, &tokens[common..], self.sampler.need()).map(drop);
        if read.is_err() {
            self.rewind(self.state.position());
        }
        read?;
        for &token in &tokens[common..] {
            self.remember(token);
        }
        Ok(tokens.len() - common)
    }

    /// Continues the conversation after [`Session::prompt`], or after a generation before, until something ends it. `each` may
    /// break it off.
    ///
    /// Nothing is allocated per token.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    ///
    /// # Panics
    /// If there was no prompt.
    pub fn generate(
        &mut self,
        until: Until<'_>,
        mut stream: Option<&mut TextStream<'_>>,
        each: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Finish, Error> {
        assert!(!self.history.is_empty(), "a generation continues a prompt");
        let mut flow = ControlFlow::Continue(());
        let mut produced = 0;
        let finish = loop {
            if produced == until.max_tokens {
                break Finish::Length;
            }
            if let Some(token) = self.pending {
                let read = self.dropped + self.history.len();
                if self.state.remaining() + self.state.position() == read {
                    break Finish::Context;
                }
                self.read(token, until.max_tokens - produced, until.stop_ids)?;
                self.remember(token);
                self.pending = None;
            }
            let token = self.sampler.sample(self.model.logits(), &self.history);
            if until.stop_ids.contains(&token) {
                break Finish::Stop;
            }
            produced += 1;
            self.pending = Some(token);
            flow = each(Event::Token(token));
            if let Some(stream) = &mut stream {
                stream.push(token, &mut |text| {
                    if flow.is_continue() {
                        flow = each(Event::Text(text));
                    }
                });
                if stream.stopped() {
                    break Finish::Stop;
                }
            }
            if flow.is_break() {
                break Finish::Cancelled;
            }
        };
        if let Some(stream) = stream
            && flow.is_continue()
        {
            stream.finish(&mut |text| {
                let _ = each(Event::Text(text));
            });
        }
        Ok(finish)
    }

    /// Adds a token that was read. A conversation longer than the model's context has no end, and then the older half goes.
    fn remember(&mut self, token: u32) {
        let most = self.model.limits().context as usize;
        if self.history.len() == most {
            let half = most.div_ceil(2);
            self.digest = self.history.drain(..half).fold(self.digest, |d, token| digest(d, &token));
            self.dropped += half;
        }
        self.history.push(token);
    }

    /// Forgets all but the first `tokens` of the conversation, or all where its state or its tokens do not go back so far. Returns
    /// how many are left.
    fn rewind(&mut self, tokens: usize) -> usize {
        let mut left = self.state.rewind(tokens);
        if left < self.dropped {
            left = self.state.rewind(0);
        }
        if left == 0 {
            (self.dropped, self.digest) = (0, NOTHING);
        }
        self.history.truncate(left - self.dropped);
        left
    }

    /// Reads the next token of the conversation: the model's logits are then those after it. `left` tokens, at least one, and
    /// none of `stops` will be asked for.
    fn read(&mut self, token: u32, left: usize, stops: &[u32]) -> Result<(), Error> {
        let (read, need) = (self.dropped + self.history.len(), self.sampler.need());
        if let Some(lookup) = &mut self.lookup {
            let place = match lookup.accept(token) {
                Some(place) => Ok(place),
                None => {
                    self.state.rewind(read);
                    let most = Lookup::most(self.model.limits(), self.state.remaining()).min(left);
                    let pass = lookup.propose(&self.history, token, most, stops);
                    self.model.read(&mut self.state, pass).map(|()| 0)
                }
            };
            if place.is_ok_and(|place| self.model.logits_after(place, need).is_ok()) {
                return Ok(());
            }
            // A guess can fail where the token does not: what counts is the token alone.
            lookup.forget();
            self.state.rewind(read);
        }
        self.model.step_for(&mut self.state, token, need).map(drop)
    }
}
