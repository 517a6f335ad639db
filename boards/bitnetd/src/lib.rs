//! `bitnetd`: a daemon that serves one model over HTTP, in the shapes of OpenAI's API.
//!
//! A request comes in by [`serve`], passes the gate in `http`, becomes an [`order::Order`] in `request`, waits in a bounded
//! queue, is answered by the one thread that owns the model, in [`engine`], and goes out by `reply`.
#![forbid(unsafe_code)]
mod cache;
pub mod config;
pub mod constraint;
pub mod engine;
mod error;
mod http;
pub mod metrics;
mod notify;
pub mod order;
mod reply;
mod request;
mod stall;

use crate::config::Settings;
pub use crate::http::ROUTES;

use crate::constraint::Vocabulary;
use crate::engine::Room;
use crate::error::Refusal;
use crate::metrics::Metrics;
use crate::order::{Orders, Queue};
use crate::stall::Stall;
use anyhow::Context as _;
use axum::http::{HeaderValue, StatusCode};
use bitnet_host::open::with_model;
use bitnet_host::system;
use bitnet_runtime::tokenizer::Tokenizer;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections at one time; others wait to be accepted.
const CONNECTIONS_MAX: usize = 256;
/// Most bytes of a request's line and headers together, and most headers.
const HEAD_BYTES_MAX: usize = 32 << 10;
const HEADERS_MAX: usize = 64;

/// What all requests share.
#[derive(Debug)]
pub struct App {
    settings: Settings,
    queue: Queue,
    metrics: Metrics,
    model: OnceLock<Ready>,
    failed: AtomicBool,
    draining: AtomicBool,
    ids: AtomicU64,
    page_policy: HeaderValue,
    /// When the daemon started, in seconds of Unix time.
    boot: u64,
}

/// What is known once the model is in memory.
#[derive(Debug)]
struct Ready {
    tokenizer: Arc<Tokenizer>,
    template: String,
    /// Tokens that end a reply.
    ends: Vec<u32>,
    vocab: u32,
    /// Made by the first request that wants it.
    vocabulary: OnceLock<Result<Vocabulary, String>>,
    context: usize,
    backend: &'static str,
    memory: String,
}

impl App {
    fn ready(&self) -> Result<&Ready, Refusal> {
        let refuse = |message| Refusal::new(StatusCode::SERVICE_UNAVAILABLE, message);
        if self.draining.load(Ordering::Relaxed) {
            return Err(refuse("the daemon is stopping"));
        }
        if self.failed.load(Ordering::Relaxed) {
            return Err(refuse("the model is not running"));
        }
        self.model.get().ok_or_else(|| refuse("the model is loading"))
    }
    fn health(&self) -> (StatusCode, &'static str) {
        let word = match self.ready() {
            Ok(_) => return (StatusCode::OK, "ok"),
            Err(_) if self.draining.load(Ordering::Relaxed) => "stopping",
            Err(_) if self.failed.load(Ordering::Relaxed) => "failed",
            Err(_) => "loading",
        };
        (StatusCode::SERVICE_UNAVAILABLE, word)
    }
}

/// Seconds of Unix time.
fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Serves on `listener` until `stop` is done, then ends within the time that the settings give replies.
///
/// # Errors
/// If the model cannot be loaded.
pub async fn serve(settings: Settings, listener: TcpListener, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let (queue, orders) = Queue::new(settings.serve.sessions.into(), settings.serve.queue);
    let drain = Duration::from_secs(settings.serve.drain_seconds);
    let app = Arc::new(App {
        settings,
        queue,
        metrics: Metrics::default(),
        model: OnceLock::new(),
        failed: AtomicBool::new(false),
        draining: AtomicBool::new(false),
        ids: AtomicU64::new(0),
        page_policy: http::page_policy(),
        boot: unix_time(),
    });
    let (ended, mut engine) = tokio::sync::oneshot::channel();
    let its = app.clone();
    std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || {
            let done = run_engine(&its, &orders);
            its.failed.store(true, Ordering::Relaxed);
            let _ = ended.send(done);
        })
        .context("starting the engine")?;

    let service = TowerToHyperService::new(http::router(app.clone()));
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(app.settings.read_time());
    http.max_buf_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX);
    let stall = app.settings.stall_time();
    let mut watchdog = tokio::time::interval(notify::watchdog_interval());
    tokio::pin!(stop);
    let failed = loop {
        let permit = async {
            let permit = permits.clone().acquire_owned().await;
            (permit, listener.accept().await)
        };
        tokio::select! {
            (permit, accepted) = permit => {
                // Out of file descriptors, or the client has left: neither is the end.
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let _ = stream.set_nodelay(true);
                let connection = graceful.watch(http.serve_connection(TokioIo::new(Stall::new(stream, stall)), service.clone()));
                tokio::spawn(async move {
                    let _ = connection.await;
                    drop(permit);
                });
            }
            () = &mut stop => break None,
            done = &mut engine => break Some(done),
            _ = watchdog.tick() => {
                if app.model.get().is_some() {
                    notify::send("WATCHDOG=1");
                }
            }
        }
    };
    if let Some(done) = failed {
        return done.context("the engine ended")?.context("the engine ended");
    }
    notify::send("STOPPING=1");
    app.draining.store(true, Ordering::Relaxed);
    drop(listener);
    // What is not done by then is broken off: the process ends, and with it every connection.
    let _ = tokio::time::timeout(drain, graceful.shutdown()).await;
    Ok(())
}

/// Loads the model and answers orders.
fn run_engine(app: &App, orders: &Orders) -> anyhow::Result<()> {
    with_model(&app.settings.model, |opened| {
        let header = opened.image.header();
        let tokenizer = Tokenizer::load(&opened.image, opened.source).context("the image has no usable tokenizer")?;
        let tokenizer = Arc::new(tokenizer);
        let (ends, template) = (header.text.stop.ids().to_vec(), header.text.chat_template.to_owned());
        let (backend, memory) = (opened.kernels.name(), opened.plan_text());
        let (vocab, context) = (header.config.vocab, opened.limits.context as usize);
        let serve = &app.settings.serve;
        let room = Room { conversations: serve.sessions.into(), cache_bytes: serve.prompt_cache };
        let shared = tokenizer.clone();
        if app.settings.serve.measure_bandwidth {
            let (pool, threads) = (opened.threads.pool(), opened.threads.decode().threads);
            app.metrics.memory(system::read_bandwidth(pool, threads));
        }
        engine::run(opened, &tokenizer, room, orders, &app.metrics, &|| {
            let (tokenizer, template, memory, ends) = (shared.clone(), template.clone(), memory.clone(), ends.clone());
            let vocabulary = OnceLock::new();
            let _ = app.model.set(Ready { tokenizer, template, ends, vocab, vocabulary, context, backend, memory });
            notify::send("READY=1");
        })
    })
}
