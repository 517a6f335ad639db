//! `bitnet selftest`: is this CPU's arithmetic what it should be?
use crate::output;
use bitnet_host::open::BackendArgs;
use bitnet_kernel::Kernels;
use bitnet_kernel::conformance::{Workspace, check};
use bitnet_runtime::backend;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    backend: BackendArgs,
}

const REFERENCE: &str = "portable";

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let chosen: Vec<&dyn Kernels> = match args.backend.backend {
        Some(_) => vec![args.backend.kernels()?],
        // The reference is not compared with itself: that takes it longer than all others together.
        None => backend::available().filter(|k| k.name() != REFERENCE).collect(),
    };
    output::write(&format!("bitnet {}\n", crate::VERSION))?;
    let mut memory = Box::new(Workspace::ZERO);
    let mut failed = None;
    for kernels in &chosen {
        let start = Instant::now();
        let result = check(&[*kernels], &mut memory);
        let verdict = match &result {
            Ok(()) => "same as portable".to_owned(),
            Err(difference) => format!("WRONG: {difference}"),
        };
        output::write(&format!("{:<13} {verdict} ({} ms)\n", kernels.name(), start.elapsed().as_millis()))?;
        failed = failed.or(result.err());
    }
    if args.backend.backend.is_none() {
        output::write(&format!("{REFERENCE:<13} the reference\n"))?;
        let runs = |name: &str| name == REFERENCE || chosen.iter().any(|k| k.name() == name);
        for name in backend::names().filter(|name| !runs(name)) {
            output::write(&format!("{name:<13} not for this CPU\n"))?;
        }
        output::write(&format!("in use: {}\n", backend::best().name()))?;
    }
    failed.map_or(Ok(()), |difference| Err(difference.into()))
}
