//! Linears with rows, columns or blocks of zeros: left out, and the logits stay what they are, bit for bit.
use bitnet_kernel::portable::Portable;
use bitnet_kernel::{Block, BlockShape, Format};
use bitnet_pack::tune::{Candidate, Timer};
use bitnet_pack::{Layouts, Options, Target, tune};
use bitnet_runtime::backend;
use bitnet_runtime::image::{Encoding, Image, Kind, checksum};
use bitnet_tests::images::{Packed, Way, fingerprint};
use bitnet_tests::tiny::Tiny;
use zerocopy::IntoBytes;

/// Neurons of the feed-forward layer that are left of 512, and heads' elements left of each value head.
fn pruned() -> Tiny {
    const fn neuron(i: usize) -> bool {
        i % 20 < 7
    }
    Tiny::n()
        .zeros("mlp.gate_proj", |row, _| !neuron(row))
        .zeros("mlp.up_proj", |row, _| !neuron(row))
        .zeros("mlp.down_proj", |_, col| !neuron(col))
        .zeros("self_attn.v_proj", |row, col| row % 2 == 1 || col % 3 == 0)
        .zeros("self_attn.q_proj", |_, col| col >= 64)
}

/// Packs it with and without its zeros.
fn both(tiny: &Tiny, options: &Options) -> (Packed, Packed) {
    let dir = tempfile::tempdir().unwrap();
    tiny.write(dir.path());
    let whole = Packed::pack(dir.path(), &Options { layout: Layouts::Whole, ..options.clone() });
    (whole, Packed::pack(dir.path(), options))
}

#[test]
fn zeros_are_left_out_and_nothing_changes() {
    let ids: Vec<u32> = (0..21).map(|i| i * 7 % 256).collect();
    for (format, tiny) in [
        (Format::TL, pruned()),
        (Format::T2, pruned().linear_norms().varied_norms()),
        (Format::I4, pruned().masters()),
        (Format::I8, pruned()),
    ] {
        let (whole, compact) = both(&tiny, &Options { format, ..Options::default() });
        assert!(!whole.image().header().config.sparse);
        assert!(compact.bytes().len() < whole.bytes().len());
        let expected = fingerprint(&Way::plain(&Portable).logits(&whole, &ids));
        for kernels in backend::available() {
            for (batch, threads, streamed) in [(1, 1, false), (1, 3, true), (5, 2, false), (16, 1, true)] {
                let way = Way { batch, threads, streamed, ..Way::plain(kernels) };
                assert_eq!(fingerprint(&way.logits(&compact, &ids)), expected, "{format:?} {way:?}");
            }
        }
    }
}

/// What is kept is what is not zero, in the shapes that save something.
#[test]
fn shapes_are_those_of_what_is_left() {
    let (_, compact) = both(&pruned(), &Options { format: Format::I8, ..Options::default() });
    let image = compact.image();
    let shape = |kind| {
        let linear = image.sections().find(kind, Some(1)).unwrap();
        (linear.rows.get(), linear.cols.get())
    };
    assert_eq!(shape(Kind::Gate), (182, 256));
    assert_eq!(shape(Kind::Up), (182, 256));
    assert_eq!(shape(Kind::Down), (256, 182));
    assert_eq!(shape(Kind::Value), (64, 170));
    assert_eq!(shape(Kind::Query), (256, 64));
    assert_eq!(shape(Kind::Output), (256, 256));
    let index = image.sections().find(Kind::OutputIndex, Some(1)).unwrap();
    assert_eq!((index.encoding, index.blocks.get()), (Encoding::Whole.tag(), 0));
}

/// Weights without a zero but in rows and columns that are left out take one bit each, also where leaving one out saves nothing
/// by itself; a zero elsewhere takes that away. The logits are those of two bits a weight.
#[test]
fn what_is_left_without_zeros_takes_one_bit() {
    let ids: Vec<u32> = (0..21).map(|i| i * 7 % 256).collect();
    let tiny = Tiny::l()
        .signs()
        .zeros("mlp.up_proj", |row, _| row % 20 >= 7)
        .zeros("mlp.down_proj", |_, col| col % 20 >= 7)
        .zeros("self_attn.v_proj", |row, col| row % 2 == 1 || col % 3 == 0)
        .zeros("self_attn.q_proj", |row, _| row == 5)
        .zeros("self_attn.k_proj", |row, col| row == 5 && col > 0);
    let (whole, compact) = both(&tiny, &Options::default());
    let (_, two) = both(&tiny, &Options { format: Format::T2, ..Options::default() });
    let expected = fingerprint(&Way::plain(&Portable).logits(&whole, &ids));
    assert_eq!(fingerprint(&Way::plain(&Portable).logits(&two, &ids)), expected);
    for kernels in backend::available() {
        let way = Way { batch: 5, ..Way::plain(kernels) };
        assert_eq!(fingerprint(&way.logits(&compact, &ids)), expected, "{way:?}");
    }
    let linear = |packed: &Packed, kind| {
        let image = packed.image();
        let linear = image.sections().find(kind, Some(1)).unwrap();
        (linear.tensor().unwrap().format, linear.rows.get(), linear.cols.get())
    };
    for (kind, rows, cols) in [
        (Kind::Up, 182, 256),
        (Kind::Down, 256, 182),
        (Kind::Value, 64, 170),
        (Kind::Query, 255, 256),
        (Kind::Output, 256, 256),
    ] {
        assert_eq!(linear(&compact, kind), (Format::B1, rows, cols), "{kind:?}");
        let format = if kind == Kind::Output { Format::B1 } else { Format::TL };
        assert_eq!(linear(&whole, kind).0, format, "{kind:?}");
    }
    assert_eq!(linear(&compact, Kind::Key).0, Format::TL);
    // Blocks alone are no way to leave them out.
    let blocks = Options { layout: Layouts::Blocks(BlockShape::Wide), ..Options::default() };
    let (_, blocks) = both(&tiny, &blocks);
    assert_eq!(fingerprint(&Way::plain(&Portable).logits(&blocks, &ids)), expected);
}

/// Costs from a table, by the names of layouts; of names that are not in it, a thousand.
struct Table(&'static [(&'static str, f64)]);

impl Timer for Table {
    fn costs(&mut self, candidates: &[Candidate<'_>]) -> Vec<f64> {
        let cost = |c: &Candidate<'_>| self.0.iter().find(|(name, _)| *name == c.layout.name()).map_or(1e3, |c| c.1);
        candidates.iter().map(cost).collect()
    }
    fn name(&self) -> String {
        "a table".into()
    }
}

/// Whatever layout a table of times makes the tuner choose, and whatever it was before: the logits are the same, and the way back
/// to linears with their zeros gives the weights that there were.
#[test]
fn tuning_changes_the_layout_and_nothing_else() {
    let ids: Vec<u32> = (0..21).map(|i| i * 7 % 256).collect();
    let tables: [&[(&str, f64)]; 6] = [
        &[("whole", 1.0)],
        &[("rows", 1.0), ("columns", 2.0), ("whole", 3.0)],
        &[("columns", 1.0), ("rows", 2.0)],
        &[("rows and columns", 1.0), ("rows", 2.0), ("columns", 2.0)],
        &[("16x64", 1.0), ("whole", 2.0)],
        &[("16x16", 1.0), ("whole", 2.0)],
    ];
    for (format, tiny) in
        [(Format::TL, pruned()), (Format::T2, pruned_by_blocks(false).linear_norms()), (Format::I8, pruned())]
    {
        let (whole, smallest) = both(&tiny, &Options { format, ..Options::default() });
        let expected = fingerprint(&Way::plain(&Portable).logits(&whole, &ids));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, smallest.bytes()).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        // From each layout to the next, and back to the first.
        for table in tables.iter().chain(&tables[..1]) {
            let tuned = tune(&path, &path, &mut Table(table), &mut ()).unwrap();
            let found = Packed::from_blocks(blocks(&std::fs::read(&path).unwrap()));
            assert_eq!(tuned.after, found.bytes().len() as u64);
            assert_eq!(found.image().header().tuning, tuned.tuning.to_string());
            seen.extend(tuned.tuning.choices.iter().map(|choice| choice.costs[choice.chosen].0));
            let way = Way { batch: 5, threads: 2, ..Way::plain(backend::best()) };
            assert_eq!(fingerprint(&way.logits(&found, &ids)), expected, "{format:?} {table:?}");
        }
        let back = Packed::from_blocks(blocks(&std::fs::read(&path).unwrap()));
        let weights = |packed: &Packed| {
            let records = packed.image().sections().records();
            // Rows of zeros have lost scales of their own, which nothing multiplies.
            let records = records.iter().filter(|r| r.encoding != Format::I8 as u8);
            records.map(|r| (r.kind, r.layer.get(), r.checksum.get())).collect::<Vec<_>>()
        };
        assert!(!back.image().header().config.sparse);
        assert_eq!(weights(&back), weights(&whole), "{format:?}");
        assert!(seen.len() > 1, "{format:?}: {seen:?}");
    }
}

/// What a table says decides, line by line; nothing is left of an attempt that fails.
#[test]
fn the_table_decides_and_the_image_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (path, out) = (dir.path().join("image"), dir.path().join("out"));
    let (whole, _) = both(&pruned(), &Options::default());
    std::fs::write(&path, whole.bytes()).unwrap();
    let mut table = Table(&[("whole", 9.0), ("rows", 5.0), ("columns", 7.0), ("rows and columns", 6.0)]);
    tune(&path, &out, &mut table, &mut ()).unwrap();
    let found = Packed::from_blocks(blocks(&std::fs::read(&out).unwrap()));
    let image = found.image();
    let lines: Vec<&str> = image.header().tuning.lines().collect();
    assert_eq!(lines[0], "layouts by a table; of costs within 2 %, the fewest bytes");
    assert!(lines.iter().any(|line| line.starts_with("layer 0 gate: rows (5.0; whole 9.0")), "{lines:?}");
    assert!(lines.iter().any(|line| line.starts_with("layer 1 down: columns (7.0; whole 9.0")), "{lines:?}");
    assert!(!lines.iter().any(|line| line.contains("output")), "a linear without zeros has no choice");
    let rows = |kind| image.sections().find(kind, Some(0)).unwrap().rows.get();
    assert_eq!((rows(Kind::Gate), rows(Kind::Up), rows(Kind::Down)), (182, 182, 256));

    let mut broken = whole.bytes().to_vec();
    let last = broken.len() - 1;
    broken[last] ^= 1;
    let target = dir.path().join("new");
    std::fs::write(&path, &broken).unwrap();
    assert!(tune(&path, &target, &mut table, &mut ()).unwrap_err().to_string().contains("checksum"));
    assert!(tune(&path, &path, &mut table, &mut ()).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), broken, "the old file, whole");
    assert_eq!(dir.path().read_dir().unwrap().count(), 2, "nothing beside what was there");
}

/// A model of costs decides for a CPU that is not there. On ARM, which was not measured, what saves little counts as a loss.
#[test]
fn other_cpus_have_a_model_of_costs() {
    let dir = tempfile::tempdir().unwrap();
    pruned().write(dir.path());
    for (target, value) in
        [(Target::Avx2, "whole 6.9, rows 3.5, columns 5.7)"), (Target::Neon, "whole 6.9, rows 3.6, columns 7.9)")]
    {
        let packed = Packed::pack(dir.path(), &Options { target: Some(target), ..Options::default() });
        let image = packed.image();
        let tuning = image.header().tuning;
        for says in ["gate: rows (", "query: columns (", value] {
            assert!(tuning.contains(says), "{target:?} {tuning}");
        }
    }
}

/// An image in blocks, as it is mapped.
fn blocks(bytes: &[u8]) -> Vec<Block> {
    bytes.chunks_exact(Block::BYTES).map(|b| Block(b.try_into().unwrap())).collect()
}

/// What `verify` says of an image in which a section of layer 0 is not what it was in `sound`: that its checksum is wrong, and
/// with the checksum made right, what this returns.
fn verify_repaired(sound: &Packed, broken: &Packed, kind: Kind) -> String {
    let section = *sound.image().sections().find(kind, Some(0)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, broken.bytes()).unwrap();
    let refused = bitnet_pack::verify(&path).unwrap_err().to_string();
    assert!(refused.contains("checksum"), "{refused}");
    let mut bytes = broken.bytes().to_vec();
    let content = &bytes[section.start.get() as usize * 64..][..section.blocks.get() as usize * 64];
    let sum = checksum(content).to_le_bytes();
    let place = bytes.windows(8).position(|w| w == section.checksum.get().to_le_bytes()).unwrap();
    bytes[place..place + 8].copy_from_slice(&sum);
    repair_header(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
    bitnet_pack::verify(&path).unwrap_err().to_string()
}

/// Gives a header that was changed its checksum.
fn repair_header(bytes: &mut [u8]) {
    let header = 64 + u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    bytes[24..32].fill(0);
    let sums = [&bytes[..64], &bytes[64..header]].map(|part| checksum(part).to_le_bytes());
    let sum = checksum(sums.as_flattened());
    bytes[24..32].copy_from_slice(&sum.to_le_bytes());
}

/// Masks are input: whatever they keep, a pass ends, and `verify` says what is wrong with them.
#[test]
fn masks_that_lie_are_found_and_harmless() {
    let (_, compact) = both(&pruned(), &Options { format: Format::I8, ..Options::default() });
    let index = *compact.image().sections().find(Kind::DownIndex, Some(0)).unwrap();
    let start = index.start.get() as usize;
    // A row more, a column less, a column past the end.
    for (block, bit) in [(start, 0), (start + 1, 0), (start + 1, 511)] {
        let mut blocks = compact.blocks().to_vec();
        if block == start {
            blocks[block].0[0] &= !1;
        } else {
            blocks[block].0[bit / 8] ^= 1 << (bit % 8);
        }
        let broken = Packed::from_blocks(blocks);
        let logits = Way { batch: 3, ..Way::plain(&Portable) }.logits(&broken, &[1, 2, 3]);
        assert!(logits.iter().flatten().all(|v| v.is_finite()));
        let refused = verify_repaired(&compact, &broken, Kind::DownIndex);
        assert!(refused.contains("mask of"), "{refused}");
    }
}

/// A compacted linear is gathered as int8, so it cannot have half precision.
#[test]
fn compacted_linears_have_no_floats() {
    let (_, compact) = both(&pruned(), &Options { format: Format::I8, ..Options::default() });
    let record = *compact.image().sections().find(Kind::Down, Some(0)).unwrap();
    let mut blocks = compact.blocks().to_vec();
    let at = compact.bytes().windows(32).position(|w| w == record.as_bytes()).unwrap() + 1;
    blocks[at / 64].0[at % 64] = Format::F16 as u8;
    let mut bytes = blocks.as_bytes().to_vec();
    repair_header(&mut bytes);
    let refused = Image::check(&bytes, bytes.len() as u64).unwrap_err().to_string();
    assert!(refused.contains("should be down: its encoding"), "{refused}");
}

/// Blocks of 16 by 64 and of 16 by 16, scattered.
fn pruned_by_blocks(wide: bool) -> Tiny {
    const fn dead(r: usize, c: usize) -> bool {
        (r * 7 + c * 13 + r * c) % 20 >= 7
    }
    let at: fn(usize, usize) -> bool =
        if wide { |row, col| dead(row / 16, col / 64) } else { |row, col| dead(row / 16, col / 16) };
    ["gate_proj", "up_proj", "down_proj"].iter().fold(Tiny::n(), |tiny, name| match *name {
        "gate_proj" => tiny.zeros("mlp.gate_proj", at),
        "up_proj" => tiny.zeros("mlp.up_proj", at),
        _ => tiny.zeros("mlp.down_proj", at),
    })
}

#[test]
fn blocks_of_zeros_are_left_out_and_nothing_changes() {
    let ids: Vec<u32> = (0..21).map(|i| i * 7 % 256).collect();
    for (tiny, shape) in [
        (pruned_by_blocks(true), BlockShape::Wide),
        (pruned_by_blocks(false).linear_norms(), BlockShape::Square),
        (pruned_by_blocks(false).masters(), BlockShape::Square),
    ] {
        let (whole, sparse) = both(&tiny, &Options { format: Format::T2, ..Options::default() });
        let linear = *sparse.image().sections().find(Kind::Down, Some(1)).unwrap();
        assert_eq!(linear.encoding, shape as u8, "{shape:?}");
        assert!(sparse.bytes().len() < whole.bytes().len());
        let expected = fingerprint(&Way::plain(&Portable).logits(&whole, &ids));
        for kernels in backend::available() {
            for (batch, threads, streamed) in [(1, 1, false), (1, 3, true), (5, 2, false), (16, 1, true)] {
                let way = Way { batch, threads, streamed, ..Way::plain(kernels) };
                assert_eq!(fingerprint(&way.logits(&sparse, &ids)), expected, "{shape:?} {way:?}");
            }
        }
    }
}

/// Starts and bitmaps are input too.
#[test]
fn bitmaps_that_lie_are_found_and_harmless() {
    let (_, sparse) = both(&pruned_by_blocks(false), &Options { format: Format::T2, ..Options::default() });
    let image = sparse.image();
    let section = |kind| image.sections().find(kind, Some(0)).unwrap().start.get() as usize;
    let (starts, linear) = (section(Kind::DownIndex), section(Kind::Down));
    for (kind, block, byte, bits, says) in [
        (Kind::DownIndex, starts, 0, 1, "starts of units"),
        (Kind::DownIndex, starts, 7, 0x80, "starts of units"),
        (Kind::DownIndex, starts, 63, 1, "padding"),
        (Kind::Down, linear, 0, 4, "bitmaps"),
        (Kind::Down, linear, 4, 1, "bitmaps"),
        (Kind::Down, linear + 1, 0, 0, "code 3"),
    ] {
        let mut blocks = sparse.blocks().to_vec();
        if says == "code 3" {
            blocks[block].0[byte] = 0xff
        } else {
            blocks[block].0[byte] ^= bits
        }
        let broken = Packed::from_blocks(blocks);
        for streamed in [false, true] {
            let way = Way { batch: 3, streamed, ..Way::plain(&Portable) };
            let passed = way.run(&broken, |model, state| model.prefill(state, &[1, 2, 3]).is_ok());
            assert!(passed || streamed, "{says}");
        }
        let refused = verify_repaired(&sparse, &broken, kind);
        assert!(refused.contains(says), "{refused}");
    }
}
