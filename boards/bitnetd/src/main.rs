//! The program: options, signals, and [`bitnetd::serve`].
use anyhow::Context as _;
use bitnetd::config::{Cli, Settings};
use clap::Parser;
use std::process::ExitCode;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// Threads that tokenize long prompts, beside those that compute.
const BLOCKING_THREADS: usize = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build();
    let done = runtime.context("starting").and_then(|runtime| runtime.block_on(run(cli)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let settings = Settings::new(cli)?;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let address = settings.serve.listen;
    let listener = TcpListener::bind(address).await.with_context(|| format!("listening at {address}"))?;
    eprintln!("bitnetd {} at http://{}", env!("CARGO_PKG_VERSION"), listener.local_addr()?);
    let stop = async {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    };
    bitnetd::serve(settings, listener, stop).await
}
