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
fn sve() {
    run("sve", bitnet_kernels_sve2::sve());
}

#[test]
fn sve2() {
    run("sve2", bitnet_kernels_sve2::sve2());
}
