//! The list of backends: the one place that names them all.
use bitnet_kernel::{Kernels, portable};

/// One line each, best first. A backend is a crate, a dependency line, and a line here; the rest of the project asks this list.
const BACKENDS: &[(&str, Detect)] = &[
    ("sve2", bitnet_kernels_sve2::sve2),
    ("sve", bitnet_kernels_sve2::sve),
    ("neon-i8mm", bitnet_kernels_neon::i8mm),
    ("neon-dotprod", bitnet_kernels_neon::dotprod),
    ("neon", bitnet_kernels_neon::neon),
    ("avx512-vnni", bitnet_kernels_x86::avx512_vnni),
    ("avx512-bw", bitnet_kernels_x86::avx512_bw),
    ("avx2", bitnet_kernels_x86::avx2),
    ("portable", portable::detect),
];

/// The kernels, if this CPU has their instructions.
type Detect = fn() -> Option<&'static dyn Kernels>;

/// The environment variable that forces a backend where no option does.
pub const VARIABLE: &str = "BITNET_BACKEND";

/// Every backend this CPU runs, best first.
pub fn available() -> impl Iterator<Item = &'static dyn Kernels> {
    BACKENDS.iter().filter_map(|(_, detect)| detect())
}

/// The best backend this CPU runs.
pub fn best() -> &'static dyn Kernels {
    available().next().unwrap_or(&portable::Portable)
}

/// The names of all backends, whether or not this CPU runs them.
pub fn names() -> impl Iterator<Item = &'static str> {
    BACKENDS.iter().map(|&(name, _)| name)
}

/// The backend of this name, if this CPU runs it.
pub fn by_name(name: &str) -> Option<&'static dyn Kernels> {
    available().find(|k| k.name() == name)
}
