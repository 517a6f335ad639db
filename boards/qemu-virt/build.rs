//! Tells the linker where the script is, for the image alone.
fn main() {
    println!("cargo:rerun-if-changed=link.x");
    println!("cargo:rerun-if-changed=../support/image.x");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none") {
        let folder = std::env::var("CARGO_MANIFEST_DIR").expect("cargo says it");
        for argument in
            [&*format!("-L{folder}/../support"), &*format!("-T{folder}/link.x"), "-Tdefmt.x", "--build-id=sha1"]
        {
            println!("cargo:rustc-link-arg-bins={argument}");
        }
    }
}
