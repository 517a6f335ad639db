//! The kernels as `cargo xtask bench` measures them and as `cargo xtask arm` counts their instructions.
//!
//! Both start this program and read what it prints: one JSON object a line. It takes its backends from the runtime's list
//! and its formats from the kernel contract, so that new ones are there without a word here.
//!
//! - `list`: every backend of this CPU, operation and format that there is.
//! - `measure [--backend NAME]… [--op NAME]… [--format NAME]… [--shape ROWSxCOLS]… [--threads N]…`: see [`measure`].
//! - `sparse [BACKEND]`, of which `cargo bench -p bitnet-tests --bench kernels -- sparse` prints the lines: see [`sparse`].
//! - `lists`, of which `cargo bench -p bitnet-tests --bench kernels -- lists` prints the lines: see [`lists`].
//! - `once BACKEND OP FORMAT`: one product between two marks, for a trace of it. See [`once`].

mod lists;
mod measure;
mod once;
mod product;
mod sparse;

use bitnet_kernel::Kernels;
use bitnet_runtime::backend;
use measure::Choice;
use product::{FORMATS, Op};
use serde_json::json;

fn main() {
    // `cargo bench` adds an option of its own.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["list"] => {
            list();
            Ok(())
        }
        ["measure", ref options @ ..] => Choice::read(options).map(|choice| measure::all(&choice)),
        ["sparse"] => sparse::all(None),
        ["sparse", backend] => sparse::all(Some(backend)),
        ["lists"] => {
            lists::all();
            Ok(())
        }
        ["once", backend, op, format] => once::run(backend, op, format),
        _ => Err("start this as `cargo xtask bench` or `cargo xtask arm`".to_owned()),
    };
    if let Err(message) = done {
        eprintln!("{message}");
        std::process::exit(2);
    }
}

/// Prints what can be measured here.
fn list() {
    for backend in backend::available().map(Kernels::name) {
        for op in Op::ALL {
            for format in FORMATS.into_iter().filter(|&format| op.takes(format)) {
                println!("{}", json!({"backend": backend, "op": op.name(), "format": format.name()}));
            }
        }
    }
}
