//! Tells the program which target it was built for.
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=BITNET_TARGET={}", std::env::var("TARGET").unwrap_or_default());
}
