//! From a prompt to text, token by token.
use crate::error::Error;
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

/// One conversation and what it takes to continue it.
#[derive(Debug)]
pub struct Session<'m> {
    model: Model<'m>,
    state: State<'m>,
    sampler: Sampler<'m>,
    /// The tokens whose keys and values the state holds.
    history: Vec<u32>,
    /// The last token given out, if the model has not read it yet.
    pending: Option<u32>,
}

impl<'m> Session<'m> {
    /// Starts from what `state` is: an empty conversation.
    ///
    /// # Panics
    /// If the state has positions already, whose tokens are not known here.
    pub fn new(model: Model<'m>, state: State<'m>, sampler: Sampler<'m>) -> Self {
        assert_eq!(state.position(), 0, "a session starts with an empty conversation");
        let history = Vec::with_capacity(model.limits().context as usize);
        Self { model, state, sampler, history, pending: None }
    }
    /// The model.
    pub const fn model(&self) -> &Model<'m> {
        &self.model
    }
    /// The tokens read so far.
    pub fn history(&self) -> &[u32] {
        &self.history
    }

    /// Makes the conversation be `tokens`: what it has in common with the one before is kept, the rest is read. Returns how
    /// many tokens were read.
    ///
    /// # Errors
    /// As [`Model::prefill`]; the conversation is then the part in common.
    ///
    /// # Panics
    /// If there is no token.
    pub fn prompt(&mut self, tokens: &[u32]) -> Result<usize, Error> {
        assert!(!tokens.is_empty(), "a prompt has at least one token");
        let common = self.history.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        // The last token is always read: its logits choose the next.
        let common = common.min(tokens.len() - 1);
        self.pending = None;
        self.state.truncate(common);
        self.history.truncate(common);
        self.model.prefill_for(&mut self.state, &tokens[common..], self.sampler.need())?;
        self.history.extend_from_slice(&tokens[common..]);
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
                if self.state.remaining() == 0 {
                    break Finish::Context;
                }
                self.model.step_for(&mut self.state, token, self.sampler.need())?;
                self.history.push(token);
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
}
