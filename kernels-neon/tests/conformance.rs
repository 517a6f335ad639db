//! Every backend of this crate against the reference.
use bitnet_kernel::conformance::{Workspace, check};
use std::io::Write as _;

#[test]
fn every_backend_of_this_cpu_agrees_with_portable() {
    let backends = [
        ("neon", bitnet_kernels_neon::neon()),
        ("neon-dotprod", bitnet_kernels_neon::dotprod()),
        ("neon-i8mm", bitnet_kernels_neon::i8mm()),
    ];
    for (name, _) in backends.iter().filter(|(_, backend)| backend.is_none()) {
        // Past the harness, which shows nothing of tests that pass.
        writeln!(std::io::stderr(), "skipped: this CPU lacks {name}").expect("standard error");
    }
    let backends: Vec<_> = backends.into_iter().filter_map(|(_, backend)| backend).collect();
    check(&backends, &mut Box::new(Workspace::ZERO)).unwrap_or_else(|difference| panic!("{difference}"));
}
