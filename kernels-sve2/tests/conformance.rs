//! Every backend of this crate against the reference.
use bitnet_kernel::conformance::{Workspace, check};
use std::io::Write as _;

#[test]
fn every_backend_of_this_cpu_agrees_with_portable() {
    let backends = [("sve", bitnet_kernels_sve2::sve()), ("sve2", bitnet_kernels_sve2::sve2())];
    for (name, _) in backends.iter().filter(|(_, backend)| backend.is_none()) {
        // Past the harness, which shows nothing of tests that pass.
        writeln!(std::io::stderr(), "skipped: this CPU lacks {name}").expect("standard error");
    }
    let backends: Vec<_> = backends.into_iter().filter_map(|(_, backend)| backend).collect();
    check(&backends, &mut Box::new(Workspace::ZERO)).unwrap_or_else(|difference| panic!("{difference}"));
}
