//! Replays the corpus of the fuzzers: what they start from, and what they once found.
use bitnet_tests::fuzz;
use cap::Cap;
use std::alloc::System;
use std::time::{Duration, Instant};

/// No file of the corpus is longer than 100 kB: whoever believes a length that it claims ends at once.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 256 << 20);

#[test]
fn no_reader_fails_on_the_corpus() {
    for (name, target) in fuzz::TARGETS {
        let directory = fuzz::corpus().join(name);
        let files = directory.read_dir().unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
        let mut paths: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        assert!(!paths.is_empty(), "{name} starts from something");
        for path in paths {
            println!("{}", path.display());
            let (bytes, start) = (std::fs::read(&path).unwrap(), Instant::now());
            target(&bytes);
            assert!(start.elapsed() < Duration::from_secs(60), "{}: {:?}", path.display(), start.elapsed());
        }
    }
}
