//! `bitnet chat`: talk with a model.
use crate::output;
use crate::sampling::SamplingArgs;
use anyhow::{Context as _, ensure};
use bitnet_host::open::{ModelArgs, Opened, with_model};
use bitnet_host::template::{self, Message};
use bitnet_runtime::generate::{Event, Finish, Until};
use bitnet_runtime::tokenizer::{TextStream, Tokenizer};
use std::io::IsTerminal as _;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// What the model is told before the conversation.
    #[arg(long)]
    system: Option<String>,
}

/// Ctrl-C: breaks off a reply, or ends the program while it waits for input.
struct Interrupt {
    pressed: Arc<AtomicBool>,
    waiting: Arc<AtomicBool>,
}

impl Interrupt {
    fn new() -> std::io::Result<Self> {
        // While the model is loaded nothing is lost by ending.
        let interrupt = Self { pressed: Arc::default(), waiting: Arc::new(AtomicBool::new(true)) };
        let signal = signal_hook::consts::SIGINT;
        signal_hook::flag::register_conditional_default(signal, interrupt.waiting.clone())?;
        signal_hook::flag::register(signal, interrupt.pressed.clone())?;
        Ok(interrupt)
    }
    /// The next line without its end, or `None` at the end of input.
    fn read_line(&self) -> std::io::Result<Option<String>> {
        self.waiting.store(true, Ordering::SeqCst);
        let mut line = String::new();
        let read = std::io::stdin().read_line(&mut line);
        self.waiting.store(false, Ordering::SeqCst);
        self.pressed.store(false, Ordering::SeqCst);
        Ok((read? > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned()))
    }
}

/// Tokens of a prompt that are read between two looks at Ctrl-C.
const PIECE: usize = 64;

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let interrupt = Interrupt::new().context("watching for Ctrl-C")?;
    with_model(&args.model, |opened| converse(args, &interrupt, opened))
}

fn converse(args: &Args, interrupt: &Interrupt, opened: Opened<'_>) -> anyhow::Result<()> {
    let text = opened.image.header().text;
    ensure!(!text.chat_template.is_empty(), "this image has no chat template; `bitnet run` continues a text");
    let tokenizer = Tokenizer::load(&opened.image, opened.source)?;
    let (model, state, sampler) = opened.load()?;
    let mut session = args.sampling.session(model, state, sampler)?;
    let until = Until { max_tokens: args.sampling.max_tokens, stop_ids: text.stop.ids() };

    let system = args.system.clone().map(|content| Message { role: "system", content });
    let mut messages: Vec<Message> = system.into_iter().collect();
    let first = messages.len();
    let prompt = if std::io::stdin().is_terminal() { "> " } else { "" };
    if !prompt.is_empty() {
        output::write("Ctrl-C breaks off a reply, Ctrl-D ends the conversation.\n")?;
    }
    loop {
        output::write(prompt)?;
        let Some(line) = interrupt.read_line()? else { break };
        if line.trim().is_empty() {
            continue;
        }
        messages.push(Message { role: "user", content: line });
        let eos = text.stop.ids().first().copied();
        let encode = |messages: &[Message]| template::encode(text.chat_template, messages, eos, &tokenizer);
        let mut ids = encode(&messages)?;
        let model = session.model();
        let ends = model.config().is_bounded() && ids.len() >= model.limits().context as usize;
        if ends && messages.len() > first + 1 {
            output::note("(the conversation no longer fits the context; it starts again)\n");
            messages.drain(first..messages.len() - 1);
            ids = encode(&messages)?;
        }
        // Piece by piece, so that Ctrl-C is heard; what was read is kept. A message that is too long is not the end.
        let read = (1..=ids.len().div_ceil(PIECE)).try_for_each(|i| {
            ensure!(!interrupt.pressed.load(Ordering::SeqCst), "broken off");
            Ok(session.prompt(&ids[..(i * PIECE).min(ids.len())]).map(drop)?)
        });
        if let Err(e) = read {
            output::note(&format!("({e})\n"));
            messages.pop();
            continue;
        }

        let mut stream = TextStream::new(&tokenizer, &args.sampling.stops);
        let (mut reply, mut failure) = (String::new(), None);
        let finish = session.generate(until, Some(&mut stream), &mut |event| {
            if let Event::Text(text) = event {
                reply.push_str(text);
                failure = output::write(text).err();
            }
            let stop = failure.is_some() || interrupt.pressed.load(Ordering::SeqCst);
            if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if let Some(e) = failure {
            return Err(e.into());
        }
        output::write(match finish {
            Finish::Cancelled => " (broken off)\n",
            Finish::Context => " (the context is full)\n",
            Finish::Stop | Finish::Length => "\n",
        })?;
        messages.push(Message { role: "assistant", content: reply });
    }
    output::write(if prompt.is_empty() { "" } else { "\n" })?;
    Ok(())
}
