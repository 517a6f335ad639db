//! The project's readers under libFuzzer. `BITNET_FUZZ_TARGET` says which one; `cargo xtask fuzz` sets it.
#![no_main]

use bitnet_tests::fuzz::{self, Target};
use std::sync::OnceLock;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<Target> = OnceLock::new();
    let chosen = || {
        let name = std::env::var("BITNET_FUZZ_TARGET").unwrap_or_default();
        fuzz::target(&name).unwrap_or_else(|| panic!("BITNET_FUZZ_TARGET is {name:?}, no target"))
    };
    TARGET.get_or_init(chosen)(bytes);
});
