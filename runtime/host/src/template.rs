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

/// Stands for part `i` of all that was said while the template is rendered: no template knows these characters, and no text
/// contains them once [`sanitize`] has run.
fn placeholder(i: usize) -> String {
    format!("{EDGE}{OPEN}{i}{CLOSE}{EDGE}")
}
const OPEN: char = '\u{f0000}';
const CLOSE: char = '\u{f0001}';
/// White space around a placeholder shows whether the template trims content.
const EDGE: char = '\u{2003}';
/// What a reply has around its thoughts, which templates of models that think take out of earlier replies.
const THOUGHTS: [&str; 2] = ["<think>", "</think>"];

/// A part of what was said that a template may take by itself.
struct Part {
    /// Without the line feeds around it, and without our own marks.
    text: String,
    /// What comes between it and the next part of the same message.
    mark: Option<&'static str>,
}

/// Splits what was said where a template may: replies at the marks of thoughts, others nowhere. Beside the parts is what the template
/// gets to see, where the marks and the line feeds around them stand as they are: templates look for them.
fn parts(messages: &[Message]) -> (Vec<Part>, Vec<Message>) {
    let mut parts = Vec::new();
    let seen = messages.iter().map(|message| {
        let whole = message.content.as_str();
        let thinks = message.role == "assistant" && whole.contains(THOUGHTS[1]);
        let marks = marks(whole).filter(|_| thinks).map(|(at, mark)| (at, Some(mark)));
        let (mut content, mut start) = (String::new(), 0);
        for (end, mark) in marks.chain([(whole.len(), None)]) {
            let said = &whole[start..end];
            let from = if thinks { said.trim_start_matches('\n') } else { said };
            let text = if thinks { from.trim_end_matches('\n') } else { said };
            content.push_str(&said[..said.len() - from.len()]);
            content.push_str(&placeholder(parts.len()));
            content.push_str(&from[text.len()..]);
            content.push_str(mark.unwrap_or_default());
            parts.push(Part { text: sanitize(text), mark });
            start = end + mark.map_or(0, str::len);
        }
        Message { role: message.role, content }
    });
    let seen = seen.collect();
    (parts, seen)
}

/// Where a text has marks of thoughts, in a time that depends on its length alone.
fn marks(text: &str) -> impl Iterator<Item = (usize, &'static str)> {
    const LAST: &str = "think>";
    text.match_indices(LAST).filter_map(|(at, _)| {
        let end = at + LAST.len();
        let mark = THOUGHTS.into_iter().find(|mark| text[..end].ends_with(mark))?;
        Some((end - mark.len(), mark))
    })
}

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
    let (said, stand_ins) = parts(messages);
    let rendered = render(template, &stand_ins, eos, tokenizer).context("the image's chat template")?;
    let mut prompt = Prompt::default();
    let mut rest = rendered.as_str();
    let mut last: Option<usize> = None;
    while let Some((before, after)) = rest.split_once(OPEN) {
        let (index, after) = after.split_once(CLOSE).context("the chat template cuts its messages apart")?;
        let index: usize = index.parse().context("the chat template changes its messages")?;
        let text = &said.get(index).context("the chat template makes up messages")?.text;
        let (before, keeps_start) = before.strip_suffix(EDGE).map_or((before, false), |b| (b, true));
        let (after, keeps_end) = after.strip_prefix(EDGE).map_or((after, false), |a| (a, true));
        // A mark that comes between the same parts as in what was said is no word of the template.
        let mark = last.filter(|last| last + 1 == index).and_then(|last| said[last].mark);
        // Where it trims what ends with a mark, the line feeds after that go with the part that has nothing.
        let ends = mark.is_some() && text.is_empty() && keeps_start && !keeps_end;
        let before = if ends { before.trim_end_matches('\n') } else { before };
        if mark.is_some_and(|mark| mark == before.trim_matches('\n')) {
            prompt.text.push_str(before);
        } else {
            prompt.template(before, tokenizer);
        }
        let text = if keeps_start { text } else { text.trim_start() };
        prompt.text.push_str(if keeps_end { text } else { text.trim_end() });
        (last, rest) = (Some(index), after);
    }
    prompt.template(rest, tokenizer);
    prompt.flush(tokenizer)?;
    let mut ids = prompt.ids;
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
struct Prompt {
    ids: Vec<u32>,
    text: String,
    error: Option<anyhow::Error>,
}

impl Prompt {
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
