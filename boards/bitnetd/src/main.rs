//! The program: options, signals, a socket of its own or of the service manager's, and [`bitnetd::serve`].
use anyhow::{Context as _, bail};
use bitnetd::Signal;
use bitnetd::config::{Settings, Task};
use std::process::ExitCode;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Threads that tokenize long prompts, beside those that compute.
const BLOCKING_THREADS: usize = 2;

fn main() -> ExitCode {
    let done = match Task::new(std::env::args_os()) {
        Ok(Task::Serve(settings)) => start(settings).map(|()| true),
        Ok(Task::Doctor(settings)) => bitnetd::doctor::run(&settings),
        Err(e) => match e.downcast::<clap::Error>() {
            Ok(e) => e.exit(),
            Err(e) => Err(e),
        },
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(settings: Settings) -> anyhow::Result<()> {
    // One line, as everything else that is logged.
    let log = settings.serve.log;
    std::panic::set_hook(Box::new(move |panic| log.say(&format!("panic: {panic}"))));
    // Before there are threads: it looks at the environment and changes it.
    let handed = handed()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .context("starting")?;
    runtime.block_on(run(settings, handed))
}

/// The socket that the service manager listens on, if it does.
fn handed() -> anyhow::Result<Option<std::net::TcpListener>> {
    let mut sockets = listenfd::ListenFd::from_env();
    match sockets.len() {
        0 => Ok(None),
        1 => sockets.take_tcp_listener(0).context("the socket of the service manager"),
        n => bail!("the service manager gives {n} sockets, and one is served"),
    }
}

async fn run(settings: Settings, handed: Option<std::net::TcpListener>) -> anyhow::Result<()> {
    let listener = match handed {
        Some(listener) => {
            settings.may_listen(listener.local_addr()?)?;
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)?
        }
        None => {
            let address = settings.serve.listen;
            TcpListener::bind(address).await.with_context(|| format!("listening at {address}"))?
        }
    };
    settings.serve.log.say(&format!("bitnetd {} at http://{}", env!("CARGO_PKG_VERSION"), listener.local_addr()?));
    let (sender, signals) = mpsc::unbounded_channel();
    for (kind, meaning) in [
        (SignalKind::terminate(), Signal::Stop),
        (SignalKind::interrupt(), Signal::Stop),
        (SignalKind::hangup(), Signal::Reload),
    ] {
        let (mut signals, sender) = (signal(kind)?, sender.clone());
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                let _ = sender.send(meaning);
            }
        });
    }
    bitnetd::serve(settings, listener, signals).await
}
