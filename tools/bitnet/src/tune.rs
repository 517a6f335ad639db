//! `bitnet tune`: layouts of linears for the machine that runs them, from the image alone.
use crate::output;
use anyhow::Context as _;
use bitnet_host::open::BackendArgs;
use bitnet_kernel::Format;
use bitnet_pack::tune::{Costs, Measured, Retuned, Target, Timer, linear_bytes, tune};
use bitnet_pack::{Progress, inspect};
use bitnet_runtime::parallel::cpus::Granted;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Matters to models that were pruned: those that have rows, columns or blocks of zeros. Weights and results stay what they are.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image.
    image: PathBuf,
    /// Where to write the result [default: in place of the image, once it is complete and checked].
    #[arg(short, long, value_name = "IMAGE")]
    output: Option<PathBuf>,
    /// The CPU: native times layouts here, for any other a model of costs decides.
    #[arg(long, value_name = "CPU", default_value = "native", value_parser = target())]
    target_arch: Target,
    #[command(flatten)]
    backend: BackendArgs,
    /// Threads that share a product while it is timed [default: as many as the system grants].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
}

fn target() -> impl TypedValueParser<Value = Target> {
    let named = |name: String| Target::ALL.into_iter().find(|(n, _)| *n == name).expect("all are targets").1;
    PossibleValuesParser::new(Target::ALL.map(|(name, _)| name)).map(named)
}

/// Ends in order on Ctrl-C, so that the temporary file is removed; a second one ends at once.
struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    fn listen() -> Self {
        let interrupted = Arc::<AtomicBool>::default();
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            // Without a handler the worst is a temporary file that stays.
            let _ = signal_hook::flag::register_conditional_default(signal, Arc::clone(&interrupted));
            let _ = signal_hook::flag::register(signal, Arc::clone(&interrupted));
        }
        Self(interrupted)
    }
}

impl Progress for Interrupt {
    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let config = inspect(&args.image)?.config;
    let threads = args.threads.map_or_else(|| Granted::now().threads(), usize::from);
    let mut timer: Box<dyn Timer> = if args.target_arch == Target::Native {
        let timer = Measured::new(args.backend.kernels()?, threads, linear_bytes(&config, Format::TL));
        Box::new(timer.with_context(|| format!("no {threads} threads"))?)
    } else {
        Box::new(Costs(args.target_arch))
    };
    let output = args.output.as_ref().unwrap_or(&args.image);
    let Retuned { tuning, before, after } = tune(&args.image, output, timer.as_mut(), &mut Interrupt::listen())?;
    Ok(output::write(&format!("{tuning}{before} bytes before, {after} now\nwritten: {}\n", output.display()))?)
}
