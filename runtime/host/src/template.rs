//! From a conversation to tokens, by the chat template of the model.
//!
//! Templates are Jinja, as Hugging Face writes them. What people write is plain text: it can never make a control token, even
//! if it spells one, since only the template's own words are searched for control tokens.
use anyhow::Context as _;
use bitnet_runtime::tokenizer::Tokenizer;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};

/// One turn of a conversation.
#[derive(Clone, Debug)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: &'static str,
    /// What they say.
    pub content: String,
}

/// Stands for the content of message `i` while the template is rendered: no template knows these characters, and no text
/// contains them once [`sanitize`] has run.
fn placeholder(i: usize) -> String {
    format!("{OPEN}{i}{CLOSE}")
}
const OPEN: char = '\u{f0000}';
const CLOSE: char = '\u{f0001}';
/// White space around a placeholder shows whether the template trims content.
const EDGE: char = '\u{2003}';

/// The tokens of a conversation, up to where the model's next turn begins.
///
/// `eos` is the token that ends a turn, which many templates write by name.
///
/// # Errors
/// If the template is not sound or refuses the conversation, or the vocabulary lacks something.
pub fn encode(
    template: &str,
    messages: &[Message],
    eos: Option<u32>,
    tokenizer: &Tokenizer,
) -> anyhow::Result<Vec<u32>> {
    let stand_ins: Vec<Message> = messages
        .iter()
        .enumerate()
        .map(|(i, m)| Message { role: m.role, content: format!("{EDGE}{}{EDGE}", placeholder(i)) })
        .collect();
    let rendered = render(template, &stand_ins, eos, tokenizer).context("the image's chat template")?;
    let mut parts = Parts::default();
    let mut rest = rendered.as_str();
    while let Some((before, after)) = rest.split_once(OPEN) {
        let (index, after) = after.split_once(CLOSE).context("the chat template cuts its messages apart")?;
        let index: usize = index.parse().context("the chat template changes its messages")?;
        let content = &messages.get(index).context("the chat template makes up messages")?.content;
        let (before, keeps_start) = before.strip_suffix(EDGE).map_or((before, false), |b| (b, true));
        let (after, keeps_end) = after.strip_prefix(EDGE).map_or((after, false), |a| (a, true));
        parts.template(before, tokenizer);
        let content = if keeps_start { content } else { content.trim_start() };
        parts.text.push_str(&sanitize(if keeps_end { content } else { content.trim_end() }));
        rest = after;
    }
    parts.template(rest, tokenizer);
    parts.flush(tokenizer)?;
    let mut ids = parts.ids;
    // Many templates write the first token, some leave it to the tokenizer.
    if let Some(bos) = tokenizer.bos().filter(|&bos| ids.first() != Some(&bos)) {
        ids.insert(0, bos);
    }
    Ok(ids)
}

/// Takes our own marks out of a person's text.
fn sanitize(text: &str) -> String {
    text.replace([OPEN, CLOSE], "")
}

/// Tokens so far, and text that is not yet tokens: text is tokenized in one piece from one control token to the next.
#[derive(Default)]
struct Parts {
    ids: Vec<u32>,
    text: String,
    error: Option<anyhow::Error>,
}

impl Parts {
    /// Adds the template's own words.
    fn template(&mut self, mut words: &str, tokenizer: &Tokenizer) {
        while let Some((at, len, id)) = tokenizer.find_control(words) {
            self.text.push_str(&words[..at]);
            if let Err(e) = self.flush(tokenizer) {
                self.error.get_or_insert(e);
            }
            self.ids.push(id);
            words = &words[at + len..];
        }
        self.text.push_str(words);
    }
    fn flush(&mut self, tokenizer: &Tokenizer) -> anyhow::Result<()> {
        if let Some(e) = self.error.take() {
            return Err(e);
        }
        if !self.text.is_empty() {
            self.ids.extend(tokenizer.encode(&self.text)?);
            self.text.clear();
        }
        Ok(())
    }
}

/// Renders a template with what Hugging Face's offer: Python's methods, `raise_exception`, the names of special tokens.
fn render(template: &str, messages: &[Message], eos: Option<u32>, tokenizer: &Tokenizer) -> Result<String, Error> {
    let mut environment = Environment::new();
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    // As transformers sets its own.
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    let messages: Vec<Value> =
        messages.iter().map(|m| context! { role => m.role, content => m.content.as_str() }).collect();
    // A template that never ends is an error; real ones take some thousands of steps.
    environment.set_fuel(Some(1_000_000));
    let name = |id: Option<u32>| id.and_then(|id| tokenizer.control_text(id)).unwrap_or_default();
    let (bos, eos) = (name(tokenizer.bos()), name(eos));
    environment
        .render_str(template, context! { messages, bos_token => bos, eos_token => eos, add_generation_prompt => true })
}

#[cfg(test)]
mod tests;
