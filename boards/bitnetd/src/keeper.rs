//! The model: in memory, on its way there, or away, and who loads and unloads it.
//!
//! Each time the model is loaded it gets a queue and a thread of its own, and they end when nobody can send to the queue any
//! more and all replies are given. So an exchange is nothing but another queue for whoever comes next.
use crate::constraint::Vocabulary;
use crate::engine::{self, Room};
use crate::order::{Orders, Queue};
use crate::pulse::Pulse;
use crate::{App, notify, room};
use anyhow::{Context as _, anyhow};
use bitnet_host::open::{with_image, with_model};
use bitnet_host::system;
use bitnet_host::weights::available;
use bitnet_runtime::tokenizer::Tokenizer;
use std::any::Any;
use std::convert::Infallible;
use std::future::pending;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};

/// What is known of a model in memory, and the way to it.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) queue: Queue,
    pub(crate) pulse: Arc<Pulse>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: String,
    /// Tokens that end a reply.
    pub(crate) ends: Vec<u32>,
    pub(crate) vocab: u32,
    /// Made by the first request that wants it.
    pub(crate) vocabulary: OnceLock<Result<Vocabulary, String>>,
    /// The most tokens of a conversation; `None` where conversations have no end.
    pub(crate) context: Option<usize>,
    pub(crate) backend: &'static str,
    /// The most that compute.
    pub(crate) threads: usize,
    pub(crate) memory: String,
}

/// Where the model is.
#[derive(Clone, Debug)]
pub(crate) enum Phase {
    /// It is loaded for the first time. Whoever comes is told to come again.
    Loading,
    /// It is loaded again, for whoever waits.
    Coming,
    /// It is in memory.
    Ready(Arc<Ready>),
    /// It is not, until somebody wants it.
    Away,
}

#[derive(Debug)]
pub(crate) struct Keeper {
    phase: watch::Sender<Phase>,
}

impl Keeper {
    pub(crate) fn new() -> Self {
        Self { phase: watch::Sender::new(Phase::Loading) }
    }
    pub(crate) fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }
    pub(crate) fn set(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }
    /// The model, which is waited for if it was in memory before; none while it is loaded for the first time, or cannot be.
    pub(crate) async fn ready(&self) -> Option<Arc<Ready>> {
        let mut phases = self.phase.subscribe();
        let mut wanted = false;
        loop {
            let phase = phases.borrow_and_update().clone();
            match phase {
                Phase::Ready(ready) => return Some(ready),
                Phase::Loading => return None,
                Phase::Away if wanted => return None,
                Phase::Away => self.want(),
                Phase::Coming => {}
            }
            wanted = true;
            phases.changed().await.ok()?;
        }
    }
    /// Asks for a model that is away. Of several who ask at once the first does, and nothing is left of the others' asking.
    fn want(&self) {
        self.phase.send_if_modified(|phase| {
            let away = matches!(phase, Phase::Away);
            if away {
                *phase = Phase::Coming;
            }
            away
        });
    }
    /// Waits until somebody asks.
    async fn wanted(&self) {
        // An error is that there is no sender, and there is: it is here.
        let _ = self.phase.subscribe().wait_for(|phase| matches!(phase, Phase::Coming)).await;
    }
}

/// A thread with a model.
#[derive(Debug)]
struct Engine {
    ended: oneshot::Receiver<End>,
}

/// How it ended.
#[derive(Debug)]
enum End {
    /// Nobody could want anything any more.
    Done,
    Failed(anyhow::Error),
    Panicked(String),
}

impl Engine {
    async fn end(&mut self) -> End {
        (&mut self.ended).await.unwrap_or(End::Done)
    }
}

impl End {
    /// Of what a thread does.
    fn of(f: impl FnOnce() -> anyhow::Result<()>) -> Self {
        match catch_unwind(AssertUnwindSafe(f)) {
            Ok(Ok(())) => Self::Done,
            Ok(Err(e)) => Self::Failed(e),
            Err(panic) => Self::Panicked(words(&*panic)),
        }
    }
    fn error(self) -> anyhow::Error {
        match self {
            Self::Done => anyhow!("the engine ended"),
            Self::Failed(e) => e,
            Self::Panicked(words) => anyhow!("a panic: {words}"),
        }
    }
}

/// What a panic said.
fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without words".to_owned())
}

/// Keeps the model in memory as the options say, and exchanges it when `reloads` says so.
///
/// # Errors
/// If it cannot be loaded, at the start or in place of one that had to go first.
pub(crate) async fn keep(app: &Arc<App>, reloads: &mut mpsc::UnboundedReceiver<()>) -> anyhow::Result<Infallible> {
    let serve = &app.settings.serve;
    let mut engine = None;
    if serve.lazy {
        app.keeper.set(Phase::Away);
    } else {
        engine = Some(load(app).await?);
    }
    notify::ready();
    app.start_self_test();
    loop {
        tokio::select! {
            end = ended(&mut engine) => {
                let End::Panicked(words) = end else { return Err(end.error()) };
                app.say(&format!("the engine panicked ({words}); its replies are broken off, and the model is loaded again"));
                app.keeper.set(Phase::Coming);
                engine = Some(load(app).await?);
            }
            Some(()) = reloads.recv() => {
                // Several at once are one.
                while reloads.try_recv().is_ok() {}
                notify::reloading();
                engine = reload(app, engine.take()).await?;
                notify::ready();
            }
            () = app.keeper.wanted(), if engine.is_none() => {
                match load(app).await {
                    Ok(loaded) => engine = Some(loaded),
                    Err(e) => {
                        app.say(&format!("the model cannot be loaded: {e:#}"));
                        app.keeper.set(Phase::Away);
                    }
                }
            }
            () = unused(app, serve.unload_after), if engine.is_some() => {
                app.say("nobody asks: the model leaves the memory");
                app.keeper.set(Phase::Away);
                if let Some(mut engine) = engine.take() {
                    engine.end().await;
                }
                app.metrics.cache(0);
            }
        }
    }
}

async fn ended(engine: &mut Option<Engine>) -> End {
    match engine {
        Some(engine) => engine.end().await,
        None => pending().await,
    }
}

/// Waits until there was no request for so long.
async fn unused(app: &App, time: Option<Duration>) {
    let Some(time) = time else { return pending().await };
    let (mut seen, mut since) = (None, Instant::now());
    while since.elapsed() < time {
        tokio::time::sleep((time / 8).min(Duration::from_secs(10))).await;
        let requests = app.ids.load(Ordering::Relaxed);
        if app.places.taken() > 0 || seen != Some(requests) {
            (seen, since) = (Some(requests), Instant::now());
        }
    }
}

/// Loads the model anew: beside the one that is there if the memory has room for both, so that nobody waits, else after that one's
/// replies have ended, for which whoever comes meanwhile waits.
async fn reload(app: &Arc<App>, old: Option<Engine>) -> anyhow::Result<Option<Engine>> {
    let Some(mut old) = old else {
        app.say("reload: the model is not in memory; the next request loads it");
        return Ok(None);
    };
    let its = app.clone();
    let room = tokio::task::spawn_blocking(move || has_room(&its)).await.context("looking at the image")?;
    let keeps = |e: anyhow::Error| app.say(&format!("reload: {e:#}; the model that was there stays"));
    match room {
        Err(e) => {
            keeps(e);
            Ok(Some(old))
        }
        Ok(true) => {
            app.say("reload: beside the model that is there");
            match load(app).await {
                Ok(new) => Ok(Some(new)),
                Err(e) => {
                    keeps(e);
                    Ok(Some(old))
                }
            }
        }
        Ok(false) => {
            app.say("reload: the memory has no room for two models, so the replies of the one that is there end first");
            app.keeper.set(Phase::Coming);
            old.end().await;
            load(app).await.map(Some)
        }
    }
}

/// Whether the image that is there now could be loaded beside the one in memory.
fn has_room(app: &App) -> anyhow::Result<bool> {
    let model = room::with_reserve(&app.settings)?;
    with_image(&model, |image, _, plan| {
        Ok(model.weights.beside(&image, &plan).is_some_and(|bytes| bytes <= available()))
    })
}

/// Loads the model into a thread of its own, and makes it the one that is asked.
async fn load(app: &Arc<App>) -> anyhow::Result<Engine> {
    let (sender, ready) = oneshot::channel();
    let (end, ended) = oneshot::channel();
    let (queue, orders) = app.places.queue();
    let its = app.clone();
    let thread = std::thread::Builder::new().name("engine".to_owned());
    let run = move || {
        let _ = end.send(End::of(|| run_engine(&its, queue, &orders, sender)));
    };
    thread.spawn(run).context("starting the engine")?;
    let mut engine = Engine { ended };
    match ready.await {
        Ok(ready) => {
            app.say(&format!("ready, with {} kernels, {}", ready.backend, ready.memory));
            app.keeper.set(Phase::Ready(Arc::new(ready)));
            Ok(engine)
        }
        Err(_) => Err(engine.end().await.error()),
    }
}

/// Loads the model, says so, and answers orders.
fn run_engine(app: &App, queue: Queue, orders: &Orders, sender: oneshot::Sender<Ready>) -> anyhow::Result<()> {
    with_model(&room::with_reserve(&app.settings)?, |mut opened| {
        opened.verify().with_context(|| app.settings.model.image.display().to_string())?;
        let header = opened.image.header();
        let tokenizer = Tokenizer::load(&opened.image, opened.source).context("the image has no usable tokenizer")?;
        let tokenizer = Arc::new(tokenizer);
        let pulse = Arc::new(Pulse::default());
        let ready = Ready {
            queue,
            pulse: pulse.clone(),
            tokenizer: tokenizer.clone(),
            template: header.text.chat_template.to_owned(),
            ends: header.text.stop.ids().to_vec(),
            vocab: header.config.vocab,
            vocabulary: OnceLock::new(),
            context: header.config.is_bounded().then_some(opened.limits.context as usize),
            backend: opened.kernels.name(),
            threads: opened.threads.pool().threads_max(),
            memory: opened.plan_text(),
        };
        let serve = &app.settings.serve;
        let bounded = app.settings.model.weights.ram.map(|_| 0);
        let room = Room { conversations: app.settings.sessions.into(), cache_bytes: serve.prompt_cache.or(bounded) };
        if serve.measure_bandwidth {
            let (pool, threads) = (opened.threads.pool(), opened.threads.decode().threads);
            app.metrics.memory(system::read_bandwidth(pool, threads));
        }
        // Whoever waits for it may have left.
        let tell = || drop(sender.send(ready));
        engine::run(opened, &tokenizer, room, orders, (&app.metrics, &pulse), tell)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    #[test]
    fn a_panic_is_an_end_like_others() {
        assert!(matches!(End::of(|| Ok(())), End::Done));
        assert!(matches!(End::of(|| Err(anyhow!("no"))), End::Failed(e) if e.to_string() == "no"));
        assert!(matches!(End::of(|| panic!("a {}", "b")), End::Panicked(words) if words == "a b"));
        assert!(matches!(End::of(|| panic!("a")), End::Panicked(words) if words == "a"));
    }

    #[tokio::test]
    async fn whoever_wants_a_model_that_is_away_waits_for_it_once() {
        let keeper = Arc::new(Keeper::new());
        assert!(keeper.ready().await.is_none(), "while it is loaded for the first time nobody waits");
        keeper.set(Phase::Away);
        let waits = [(); 2].map(|()| {
            let its = keeper.clone();
            tokio::spawn(async move { its.ready().await.is_none() })
        });
        keeper.wanted().await;
        tokio::task::yield_now().await;
        assert!(waits.iter().all(|wait| !wait.is_finished()));
        keeper.set(Phase::Away);
        for wait in waits {
            assert!(wait.await.unwrap(), "it could not be loaded");
        }
        assert!(keeper.wanted().now_or_never().is_none(), "nobody waits any more");
    }
}
