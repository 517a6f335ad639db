//! Every backend of this crate against the reference.
use bitnet_kernel::Kernels;
use bitnet_kernel::conformance::{Workspace, check};

fn run(name: &str, backend: Option<&dyn Kernels>) {
    match backend {
        Some(k) => check(k, &mut Box::new(Workspace::ZERO)).unwrap_or_else(|difference| panic!("{difference}")),
        None => println!("{name}: not on this CPU"),
    }
}

#[test]
fn dotprod() {
    run("neon-dotprod", bitnet_kernels_neon::dotprod());
}

#[test]
fn i8mm() {
    run("neon-i8mm", bitnet_kernels_neon::i8mm());
}

#[test]
fn neon() {
    run("neon", bitnet_kernels_neon::neon());
}
