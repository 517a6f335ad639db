//! The compiler for RISC-V Linux: rustup's, or Debian's where rustup cannot get the target.
//!
//! rustup has the standard library of [`TARGET`] ready, on machines that reach its server. Debian packages no such
//! library, but a compiler together with the library's source (`rustc-web`, `cargo-web`, `rust-web-src`), and cargo
//! builds the one from the other. Either way Debian's cross compiler links (packages `gcc-riscv64-linux-gnu` and
//! `libc6-dev-riscv64-cross`) and `qemu-riscv64` runs the result, as `.cargo/config.toml` says.

use std::path::Path;

use crate::setup::sysroot_has;

/// 64 bits, with floats of both sizes and compressed instructions, without vectors: what every Linux board has.
pub(crate) const TARGET: &str = "riscv64gc-unknown-linux-gnu";

/// Debian's programs and the library's source.
const CARGO: &str = "/usr/bin/cargo";
const RUSTC: &str = "/usr/bin/rustc";
const LIBRARY: &str = "/usr/lib/rustlib/src/rust/library/std/Cargo.toml";

/// The packages that bring them.
pub(crate) const COMPILER_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
/// The packages that link, whichever compiler there is.
pub(crate) const LINKER_PACKAGES: [&str; 2] = ["gcc-riscv64-linux-gnu", "libc6-dev-riscv64-cross"];

/// A way to call cargo: the program, variables before it, and arguments before all others.
#[derive(Debug)]
pub(crate) struct Way {
    /// `None` is the cargo that runs this program.
    pub(crate) program: Option<&'static str>,
    pub(crate) environment: &'static [(&'static str, &'static str)],
    pub(crate) arguments: &'static [&'static str],
}

/// As everywhere else.
pub(crate) const PINNED: Way = Way { program: None, environment: &[], arguments: &[] };

/// Building the library needs options that cargo has for its own developers, hence the variable.
const DEBIAN: Way = Way {
    program: Some(CARGO),
    environment: &[("RUSTC", RUSTC), ("RUSTC_BOOTSTRAP", "1")],
    arguments: &["-Zbuild-std"],
};

/// How cargo is called for [`TARGET`] here.
pub(crate) fn way() -> Way {
    if sysroot_has(TARGET) || !debian() { PINNED } else { DEBIAN }
}

/// Whether Debian's compiler and the library's source are there.
pub(crate) fn debian() -> bool {
    [CARGO, RUSTC, LIBRARY].iter().all(|path| Path::new(path).is_file())
}
