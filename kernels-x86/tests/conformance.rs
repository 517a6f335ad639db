//! Every backend of this crate against the reference.
use bitnet_kernel::Kernels;
use bitnet_kernel::conformance::{Workspace, check};
use std::io::Write as _;

fn run(name: &str, backend: Option<&dyn Kernels>) {
    match backend {
        Some(k) => check(k, &mut Box::new(Workspace::ZERO)).unwrap_or_else(|difference| panic!("{difference}")),
        // Past the harness, which shows nothing of tests that pass.
        None => writeln!(std::io::stderr(), "skipped: this CPU lacks {name}").expect("standard error"),
    }
}

#[test]
fn avx2() {
    run("avx2", bitnet_kernels_x86::avx2());
}

#[test]
fn avx512_vnni() {
    run("avx512-vnni", bitnet_kernels_x86::avx512_vnni());
}

#[test]
fn avx512_bw() {
    run("avx512-bw", bitnet_kernels_x86::avx512_bw());
}
