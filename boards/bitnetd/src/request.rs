//! What clients may ask for, in the shapes of OpenAI's API, and what is made of it. Whatever would change the answer and is
//! not there is refused; fields that only inform are not looked at.
use crate::constraint::Format;
use crate::error::Refusal;
use crate::order::{Event, Order};
use bitnet_host::template::Message;
use bitnet_runtime::sampler::Sampling;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;

/// Most stop texts, and bytes of each.
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 1024;
/// Most alternatives whose probability is told.
const TOP_LOGPROBS_MAX: usize = 20;

/// What both kinds of completion have.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Common {
    model: Option<String>,
    pub(crate) stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    seed: Option<i64>,
    logit_bias: Option<HashMap<String, f64>>,
    stop: Option<OneOrMany>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    n: Option<i64>,
    best_of: Option<i64>,
    response_format: Option<Value>,
    cache_prompt: Option<bool>,
    tools: Option<Value>,
    functions: Option<Value>,
    suffix: Option<Value>,
    echo: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// `/v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub(crate) struct Chat {
    messages: Vec<Turn>,
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
    #[serde(flatten)]
    pub(crate) common: Common,
}

#[derive(Debug, Deserialize)]
struct Turn {
    role: String,
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

/// `/v1/completions`.
#[derive(Debug, Deserialize)]
pub(crate) struct Completion {
    pub(crate) prompt: Prompt,
    logprobs: Option<i64>,
    #[serde(flatten)]
    pub(crate) common: Common,
}

/// A text or its tokens.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
}

impl Chat {
    /// The conversation.
    pub(crate) fn messages(&mut self) -> Result<Vec<Message>, Refusal> {
        if self.messages.is_empty() {
            return Err(Refusal::parameter("messages", "there is no message"));
        }
        let turns = std::mem::take(&mut self.messages);
        turns.into_iter().map(Turn::message).collect()
    }
    pub(crate) fn logprobs(&self) -> Result<Option<usize>, Refusal> {
        let top = at_most("top_logprobs", self.top_logprobs, TOP_LOGPROBS_MAX)?;
        match (self.logprobs.unwrap_or(false), top) {
            (true, top) => Ok(Some(top.unwrap_or(0))),
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => Err(Refusal::parameter("top_logprobs", "needs `logprobs` to be true")),
        }
    }
}

impl Completion {
    pub(crate) fn logprobs(&self) -> Result<Option<usize>, Refusal> {
        at_most("logprobs", self.logprobs, TOP_LOGPROBS_MAX)
    }
}

impl Turn {
    fn message(self) -> Result<Message, Refusal> {
        let role = match &*self.role {
            "system" | "developer" => "system",
            "user" => "user",
            "assistant" => "assistant",
            _ => return Err(Refusal::parameter("messages", "roles are system, developer, user and assistant")),
        };
        let content = match self.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                if parts.iter().any(|part| part.kind != "text" || part.text.is_none()) {
                    return Err(Refusal::parameter("messages", "this model reads text alone"));
                }
                parts.into_iter().filter_map(|part| part.text).collect()
            }
        };
        Ok(Message { role, content })
    }
}

/// An integer from 0 to `most`.
fn at_most(name: &'static str, value: Option<i64>, most: usize) -> Result<Option<usize>, Refusal> {
    let Some(value) = value else { return Ok(None) };
    let value = usize::try_from(value).ok().filter(|&value| value <= most);
    value.map(Some).ok_or_else(|| Refusal::parameter(name, format!("expected an integer from 0 to {most}")))
}

/// A number from `min` to `max`.
fn number(name: &'static str, value: Option<f64>, default: f32, min: f64, max: f64) -> Result<f32, Refusal> {
    match value {
        None => Ok(default),
        Some(value) if (min..=max).contains(&value) => Ok(value as f32),
        Some(_) => Err(Refusal::parameter(name, format!("expected a number from {min} to {max}"))),
    }
}

impl Common {
    /// Whether a stream ends with what it cost.
    pub(crate) fn include_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// What the reply is held to.
    pub(crate) fn format(&self) -> Result<Option<Format>, Refusal> {
        let Some(format) = self.response_format.as_ref().filter(|format| !format.is_null()) else { return Ok(None) };
        match format["type"].as_str() {
            Some("text") => Ok(None),
            Some("json_object") => Ok(Some(Format::Object)),
            Some("json_schema") => match &format["json_schema"]["schema"] {
                Value::Null => Err(Refusal::parameter("response_format", "json_schema has no schema")),
                schema => Ok(Some(Format::Schema(schema.clone()))),
            },
            _ => Err(Refusal::parameter("response_format", "types are text, json_object and json_schema")),
        }
    }

    /// The order for the engine. `default` tokens at most, unless the request says how many.
    pub(crate) fn order(
        self,
        prompt: Vec<u32>,
        vocab: u32,
        default: usize,
        logprobs: Option<usize>,
        time: Duration,
        events: Sender<Event>,
    ) -> Result<Order, Refusal> {
        let arrived = Instant::now();
        self.refuse_what_is_not_there()?;
        let most = at_most("max_completion_tokens", self.max_completion_tokens, usize::MAX >> 1)?;
        let max_tokens = most.or(at_most("max_tokens", self.max_tokens, usize::MAX >> 1)?).unwrap_or(default);
        let stops = match self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
        };
        // Clients send an empty text for none.
        let stops: Vec<String> = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        if stops.len() > STOPS_MAX || stops.iter().any(|stop| stop.len() > STOP_BYTES_MAX) {
            let limits = format!("at most {STOPS_MAX} texts of at most {STOP_BYTES_MAX} bytes");
            return Err(Refusal::parameter("stop", limits));
        }
        let mut bias = Vec::new();
        for (token, value) in self.logit_bias.into_iter().flatten() {
            let token = token.parse().ok().filter(|&token: &u32| token < vocab);
            let token =
                token.ok_or_else(|| Refusal::parameter("logit_bias", format!("tokens are 0 to {}", vocab - 1)))?;
            bias.push((token, number("logit_bias", Some(value), 0.0, -100.0, 100.0)?));
        }
        let sampling = Sampling {
            temperature: number("temperature", self.temperature, 1.0, 0.0, 2.0)?,
            top_k: at_most("top_k", self.top_k.map(|k| k.max(0)), u32::MAX as usize)?.unwrap_or(0) as u32,
            top_p: number("top_p", self.top_p, 1.0, 0.0, 1.0)?,
            min_p: number("min_p", self.min_p, 0.0, 0.0, 1.0)?,
            repetition_penalty: number("repetition_penalty", self.repetition_penalty, 1.0, 0.01, 100.0)?,
            // The hasher's keys are random in every process, and differ from one to the next.
            seed: self.seed.map_or_else(|| RandomState::new().build_hasher().finish(), i64::cast_unsigned),
        };
        Ok(Order {
            prompt,
            sampling,
            presence_penalty: number("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?,
            bias,
            constraint: None,
            stops,
            use_cache: self.cache_prompt.unwrap_or(true),
            max_tokens,
            logprobs,
            arrived,
            deadline: arrived + time,
            events,
        })
    }

    fn refuse_what_is_not_there(&self) -> Result<(), Refusal> {
        let some = |value: &Option<Value>| {
            value.as_ref().is_some_and(|value| !value.is_null() && value.as_array().is_none_or(|a| !a.is_empty()))
        };
        let refusals = [
            (self.n.is_some_and(|n| n != 1), "n", "one reply at a time: n is 1"),
            (self.best_of.is_some_and(|n| n != 1), "best_of", "one reply at a time: best_of is 1"),
            (some(&self.tools), "tools", "there are no tool calls"),
            (some(&self.functions), "functions", "there are no function calls"),
            (some(&self.suffix), "suffix", "text is continued, not filled in"),
            (self.echo == Some(true), "echo", "the prompt is not repeated"),
        ];
        match refusals.into_iter().find(|(refused, ..)| *refused) {
            Some((_, name, why)) => Err(Refusal::parameter(name, why)),
            None => Ok(()),
        }
    }

    /// Whether the request names another model than this one.
    pub(crate) fn names_another(&self, name: &str) -> bool {
        self.model.as_deref().is_some_and(|model| !model.is_empty() && model != name)
    }
}
