//! Every backend of this crate against the reference.
use bitnet_kernel::conformance::{Workspace, check_up_to};
use std::io::Write as _;

#[test]
fn every_backend_of_this_cpu_agrees_with_portable() {
    let backends = [
        ("avx2", bitnet_kernels_x86::avx2()),
        ("avx512-vnni", bitnet_kernels_x86::avx512_vnni()),
        ("avx512-bw", bitnet_kernels_x86::avx512_bw()),
    ];
    for (name, _) in backends.iter().filter(|(_, backend)| backend.is_none()) {
        // Past the harness, which shows nothing of tests that pass.
        writeln!(std::io::stderr(), "skipped: this CPU lacks {name}").expect("standard error");
    }
    let backends: Vec<_> = backends.into_iter().filter_map(|(_, backend)| backend).collect();
    // Miri takes a minute for what a CPU does in milliseconds.
    let weights = if cfg!(miri) { 30 } else { usize::MAX };
    check_up_to(&backends, &mut Box::new(Workspace::ZERO), weights).unwrap_or_else(|difference| panic!("{difference}"));
}
