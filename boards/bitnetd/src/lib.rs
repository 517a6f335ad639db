//! `bitnetd`: a daemon that serves one model over HTTP, in the shapes of OpenAI's API.
//!
//! A request comes in by [`serve`], passes the gate in `http`, becomes an [`order::Order`] in `request`, waits in a bounded
//! queue, is answered by the one thread that owns the model, in [`engine`], and goes out by `reply`. `keeper` loads the model and
//! exchanges it.
#![forbid(unsafe_code)]
#[cfg(not(panic = "unwind"))]
compile_error!("a panic that aborts would let one request end all others");

mod cache;
pub mod config;
pub mod constraint;
pub mod doctor;
pub mod engine;
mod error;
mod http;
mod keeper;
pub mod log;
pub mod metrics;
mod notify;
pub mod order;
pub mod pulse;
mod reply;
mod request;
mod room;
mod stall;

use crate::config::Settings;
pub use crate::http::ROUTES;

use crate::error::Refusal;
use crate::keeper::{Keeper, Phase, Ready};
use crate::metrics::Metrics;
use crate::order::Places;
use crate::stall::Stall;
use axum::http::{HeaderValue, StatusCode};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};

/// Connections at one time; others wait to be accepted.
const CONNECTIONS_MAX: usize = 256;
/// Most bytes of a request's line and headers together, and most headers.
const HEAD_BYTES_MAX: usize = 32 << 10;
const HEADERS_MAX: usize = 64;

/// Who may ask, which can change while the daemon runs.
#[derive(Debug)]
struct Access {
    keys: Vec<String>,
    hosts: Vec<String>,
}

impl From<&Settings> for Access {
    fn from(settings: &Settings) -> Self {
        Self { keys: settings.keys.clone(), hosts: settings.serve.hosts.clone() }
    }
}

/// What all requests share.
#[derive(Debug)]
pub struct App {
    settings: Settings,
    access: RwLock<Arc<Access>>,
    places: Places,
    metrics: Metrics,
    keeper: Keeper,
    /// Whether the kernels compute what they should, once that is known.
    self_test: OnceLock<Result<(), String>>,
    draining: AtomicBool,
    ids: AtomicU64,
    page_policy: HeaderValue,
    /// When the daemon started, in seconds of Unix time.
    boot: u64,
}

/// What whoever started the daemon may ask of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Read anew who may ask, and load the model anew.
    Reload,
    /// Let replies end, and end.
    Stop,
}

impl App {
    fn new(settings: Settings) -> Self {
        Self {
            places: Places::new(settings.sessions.into(), settings.serve.queue),
            access: RwLock::new(Arc::new(Access::from(&settings))),
            settings,
            metrics: Metrics::default(),
            keeper: Keeper::new(),
            self_test: OnceLock::new(),
            draining: AtomicBool::new(false),
            ids: AtomicU64::new(0),
            page_policy: http::page_policy(),
            boot: unix_time(),
        }
    }
    fn access(&self) -> Arc<Access> {
        self.access.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
    /// Reads the options again, for who may ask at this address from now on. What is wrong with them leaves all as it was.
    fn read_access(&self, address: SocketAddr) {
        let read = self.settings.again().and_then(|settings| settings.may_listen(address).map(|()| settings));
        match read {
            Ok(settings) => {
                let access = Access::from(&settings);
                self.say(&format!("reload: {} keys, {} names of this host", access.keys.len(), access.hosts.len()));
                *self.access.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(access);
            }
            Err(e) => self.say(&format!("reload: {e:#}; who may ask stays as it was")),
        }
    }
    fn say(&self, message: &str) {
        self.settings.serve.log.say(message);
    }
    /// Whether requests are answered, if not at once.
    fn serves(&self) -> Result<(), Refusal> {
        let refuse = |message| Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, message));
        match self.keeper.phase() {
            _ if self.draining.load(Ordering::Relaxed) => refuse("the daemon is stopping"),
            Phase::Loading => refuse("the model is loading"),
            _ => Ok(()),
        }
    }
    /// The model, which whoever comes while it is exchanged or away waits for.
    async fn ready(&self) -> Result<Arc<Ready>, Refusal> {
        self.serves()?;
        let ready = tokio::time::timeout(self.settings.serve.reply_seconds, self.keeper.ready()).await;
        let none = || Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the model cannot be loaded");
        ready.ok().flatten().ok_or_else(none)
    }
    fn health(&self) -> (StatusCode, &'static str) {
        let word = match self.keeper.phase() {
            _ if self.draining.load(Ordering::Relaxed) => "stopping",
            _ if matches!(self.self_test.get(), Some(Err(_))) => "failed",
            Phase::Loading => "loading",
            Phase::Ready(_) => return (StatusCode::OK, "ok"),
            Phase::Coming => return (StatusCode::OK, "reloading"),
            Phase::Away => return (StatusCode::OK, "unloaded"),
        };
        (StatusCode::SERVICE_UNAVAILABLE, word)
    }
    /// The self-test in a word, or what is wrong.
    fn self_test(&self) -> &str {
        match self.self_test.get() {
            None => "running",
            Some(Ok(())) => "passed",
            Some(Err(e)) => e,
        }
    }
    /// Compares the kernels with the definition of the right answer, beside all that the daemon does.
    fn start_self_test(self: &Arc<Self>) {
        let app = self.clone();
        let run = move || {
            let tested = app.settings.model.backend.kernels().and_then(doctor::self_test);
            let tested = tested.map_err(|e| format!("{e:#}"));
            if let Err(e) = &tested {
                app.say(&format!("this machine computes wrongly: {e}"));
            }
            let _ = app.self_test.set(tested);
        };
        // Without a thread for it, the test is not over, and that is what is said.
        let _ = std::thread::Builder::new().name("self-test".to_owned()).spawn(run);
    }
}

/// Seconds of Unix time.
fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Serves on `listener` until a signal says to stop or nobody can say so any more, then ends within the time that the settings
/// give replies.
///
/// # Errors
/// If the model cannot be loaded.
pub async fn serve(
    settings: Settings,
    listener: TcpListener,
    mut signals: mpsc::UnboundedReceiver<Signal>,
) -> anyhow::Result<()> {
    let app = Arc::new(App::new(settings));
    let settings = &app.settings.serve;
    let service = TowerToHyperService::new(http::router(app.clone()));
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(settings.read_seconds);
    http.max_buf_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX);
    let (reload, mut reloads) = mpsc::unbounded_channel();
    let keep = keeper::keep(&app, &mut reloads);
    let watch = watchdog(&app);
    tokio::pin!(keep, watch);
    loop {
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
                let stream = Stall::new(stream, settings.stall_seconds);
                let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service.clone()));
                tokio::spawn(async move {
                    let _ = connection.await;
                    drop(permit);
                });
            }
            signal = signals.recv() => match signal {
                Some(Signal::Reload) => {
                    if let Ok(address) = listener.local_addr() {
                        app.read_access(address);
                    }
                    let _ = reload.send(());
                }
                Some(Signal::Stop) | None => break,
            },
            failed = &mut keep => return failed.map(drop),
            () = &mut watch => {}
        }
    }
    app.say("stopping");
    notify::stopping();
    app.draining.store(true, Ordering::Relaxed);
    drop(listener);
    // What is not done by then is broken off: the process ends, and with it every connection.
    let _ = tokio::time::timeout(settings.drain_seconds, graceful.shutdown()).await;
    app.keeper.set(Phase::Away);
    Ok(())
}

/// Tells the watchdog that work goes on, as long as it does: an engine that computes has to begin another turn each time.
async fn watchdog(app: &App) {
    let Some(time) = notify::watchdog_interval() else { return pending().await };
    let mut interval = tokio::time::interval(time);
    let mut seen = 0;
    loop {
        interval.tick().await;
        let goes_on = match app.keeper.phase() {
            Phase::Ready(ready) => ready.pulse.goes_on(&mut seen),
            // Loading has a time of its own, that of the start.
            Phase::Loading | Phase::Coming | Phase::Away => true,
        };
        if goes_on {
            notify::alive();
        }
    }
}
