//! killed half-way, or with too little memory, packing leaves no image that is not whole.
mod common;

use common::{Place, named, sparse, stories};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Packs as a person does, with at most so many KiB of address space. The weights are zeros, which are stored all the same.
fn packing(place: &Place, kib: u32) -> Child {
    let command = format!("ulimit -v {kib} && exec \"$0\" pack \"$1\" -o \"$2\" --layout whole");
    Command::new("sh")
        .args(["-c", &command, env!("CARGO_BIN_EXE_bitnet-pack")])
        .args([place.source(), place.image()])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a shell")
}

/// Ends it once there is something under a temporary name.
fn kill_half_way(place: &Place) {
    let mut child = packing(place, 512 << 10);
    let start = Instant::now();
    let partial = |path: &Path| {
        path.extension().is_some_and(|e| e == "partial") && path.metadata().is_ok_and(|m| m.len() > 1 << 20)
    };
    let begun = || place.out().read_dir().unwrap().flatten().any(|entry| partial(&entry.path()));
    while !begun() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
        assert!(start.elapsed() < Duration::from_secs(60), "nothing was written");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success());
}

/// SIGKILL at a moment when the image is partly written: its name is free, or still that of the old one.
#[test]
fn killed_half_way_nothing_has_the_name() {
    let place = Place::new();
    sparse(&place);
    kill_half_way(&place);
    assert!(!place.image().exists());
    bitnet_pack::pack(&stories(), &place.image(), &named(), &mut ()).unwrap();
    let old = std::fs::read(place.image()).unwrap();
    for entry in place.out().read_dir().unwrap().flatten().filter(|e| e.path() != place.image()) {
        std::fs::remove_file(entry.path()).unwrap();
    }
    kill_half_way(&place);
    assert!(std::fs::read(place.image()).unwrap() == old, "the old image is whole");
}

/// 100 MB of weights in 64 MiB of address space, program and libraries included.
#[test]
fn a_checkpoint_larger_than_memory_is_packed() {
    let place = Place::new();
    assert!(sparse(&place) > 100_000_000);
    let output = packing(&place, 64 << 10).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    bitnet_pack::verify(&place.image()).unwrap();
    assert_eq!(place.left(), ["image.bitnet"]);
}
