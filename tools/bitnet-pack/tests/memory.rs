//! the packer's memory, as promised before it starts, in a process of its own.
mod common;

use bitnet_kernel::Format;
use bitnet_pack::{Options, Progress, pack};
use cap::Cap;
use common::{Place, named, sparse, stories};
use std::alloc::System;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// What the promise has for the program, its libraries and its stack, which this allocator does not see.
const PROGRAM: usize = 10 << 20;
/// More than this beside the program would mean that the promise is good for nothing.
const SLACK: usize = 4 << 20;

/// Keeps what is said.
#[derive(Default)]
struct Said(Vec<String>);

impl Progress for Said {
    fn say(&mut self, line: &str) {
        self.0.push(line.into());
    }
}

/// The promise is kept, is told, is near the truth, and has nothing
/// to do with the size of the checkpoint. Formats: the default with an i8 head, and those with the largest units.
#[test]
fn the_promise_is_kept() {
    let place = Place::new();
    let bytes = sparse(&place);
    assert!(bytes > 100_000_000);
    // The trained model first: it is small and has a tokenizer, whose conversion takes many times its file.
    let cases = [
        (stories(), Format::TL, Format::I8),
        (place.source(), Format::TL, Format::I8),
        (place.source(), Format::I8, Format::F16),
    ];
    for (source, format, head) in cases {
        let options = Options { format, head, ..named() };
        let mut said = Said::default();
        let before = ALLOCATOR.allocated();
        let report = pack(&source, &place.image(), &options, &mut said).unwrap();
        let promised = report.peak_bytes as usize;
        let used = ALLOCATOR.max_allocated() - before;
        println!("{}, {}: {used} bytes of heap, {promised} promised", source.display(), format.name());
        assert!(used + PROGRAM <= promised, "{used} bytes and the program's {PROGRAM}, {promised} promised");
        assert!(used + PROGRAM + SLACK > promised, "{used} bytes and the program's {PROGRAM}, {promised} promised");
        assert!(promised < 20 << 20);
        let line = format!("peak memory: {} MiB", promised.div_ceil(1 << 20));
        assert!(said.0.contains(&line), "{:?}", said.0);
    }
}
