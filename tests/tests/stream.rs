//! Weights read ahead of the computation: the same logits whatever stays in memory, each pass reads them once, and whatever
//! goes wrong is an error in bounded time and never another number.
use bitnet_kernel::{Block, Format};
use bitnet_pack::{Options, Preset};
use bitnet_runtime::error::SourceError;
use bitnet_runtime::image::{self, Record};
use bitnet_runtime::model::{Matrices, Memory};
use bitnet_runtime::parallel::Serial;
use bitnet_runtime::source::{BlockDevice, Extent, ImageFile, Mapped, Pieces, Ring, RingOptions, Watch, WeightSource};
use bitnet_runtime::{Config, Error, Limits, Model, Plan, State, backend};
use bitnet_tests::golden;
use bitnet_tests::images::{Packed, Way, fingerprint};
use bitnet_tests::tiny::Tiny;
use std::ops::Range;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// The bundled checkpoint, with one head and with one in two planes.
static STORIES: LazyLock<[Packed; 2]> = LazyLock::new(|| {
    let pack = |options: &Options| Packed::pack(&bitnet_tests::model("stories-ternary"), options);
    [pack(&Options::default()), pack(&Options { split_head: true, live_ffn: true, ..Options::default() })]
});

/// Random weights of the smallest shape, with a configuration that is changed so.
fn random_weights(change: impl FnOnce(Config) -> Config) -> Packed {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny");
    let shape = Preset::Tiny.shape();
    let config = change(shape.config);
    bitnet_pack::dummy(&path, &bitnet_pack::Shape { config, ..shape }, &Options::default(), 1, &mut ()).unwrap();
    Packed::read(&path)
}

/// Four layers of a shape whose embedding is not its head, for tests that run thousands of times.
fn tiny() -> Packed {
    random_weights(|config| Config { tied: false, ..config })
}

/// What else a layer may be: stateful in every way, and with linears of which rows, columns or blocks are left out.
fn layouts() -> Vec<(&'static str, Packed)> {
    let half = Options { head: Format::F16, ..Options::default() };
    let sets = ["bitrnn_m", "bitrnn_m_a4", "bitrnn_m_late", "bitrnn_v", "shared_late", "window", "matmul_free"];
    let mut all: Vec<_> = sets.iter().map(|set| (*set, Packed::pack(&golden(set), &half))).collect();
    let memory = Some(Memory::Matrices(Matrices { heads: 2, key: 32, value: 32 }));
    all.push(("memory and norms of heads", random_weights(|config| Config { memory, qk_norms: true, ..config })));
    let dir = tempfile::tempdir().unwrap();
    Tiny::n()
        .zeros("self_attn.q_proj", |_, col| col >= 64)
        .zeros("self_attn.v_proj", |row, col| row % 2 == 1 || col % 3 == 0)
        .zeros("mlp.up_proj", |row, col| (row / 16 + col / 64) % 3 != 0)
        .linear_norms()
        .write(dir.path());
    all.push(("sparse", Packed::pack(dir.path(), &Options { format: Format::T2, ..Options::default() })));
    all
}

const OPTIONS: RingOptions = RingOptions { slots: 3, patience: Duration::from_secs(20), verify: false, spans: 0 };
const IDS: [u32; 7] = [1, 403, 407, 261, 378, 9, 17];

/// A device in memory that does what a list says: one fault a read, then none.
struct Faulty {
    blocks: Vec<Block>,
    faults: Arc<Mutex<Vec<Fault>>>,
    reads: u64,
    /// Where no bits flip: rows that are read by themselves are not compared.
    rows: Range<u32>,
}

/// What happens at the first read from this one on, counted from the start.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Fault(u64, Kind);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// The device reports a failure.
    Fails,
    /// The medium has become shorter.
    Short,
    /// Half of the buffer is filled before it fails.
    Partial,
    /// It answers after so many milliseconds.
    Late(u64),
    /// A bit of what it gives is wrong.
    Flips(u64),
}

impl Faulty {
    fn new(packed: &Packed, faults: &Arc<Mutex<Vec<Fault>>>) -> Self {
        let embedding = packed.image().sections().find(image::Kind::Embedding, None).map(Record::extent);
        let rows = embedding.map_or(0..0, |extent| extent.start..extent.end());
        Self { blocks: packed.blocks().to_vec(), faults: Arc::clone(faults), reads: 0, rows }
    }
}

impl BlockDevice for Faulty {
    fn read(&mut self, start: u32, into: &mut [Block]) -> Result<(), SourceError> {
        let out_of_range = SourceError::OutOfRange { start, blocks: into.len() as u32 };
        let (now, blocks) = (self.reads, into.len());
        self.reads += 1;
        let fault = {
            let mut faults = self.faults.lock().unwrap();
            let may = |kind| !matches!(kind, Kind::Flips(_)) || !self.rows.contains(&start);
            let at = faults.iter().position(|&Fault(read, kind)| read <= now && may(kind));
            at.map(|i| faults.remove(i))
        };
        let good = self.blocks.get(start as usize..).and_then(|b| b.get(..blocks)).ok_or(out_of_range)?;
        match fault {
            None => into.copy_from_slice(good),
            Some(Fault(_, Kind::Fails)) => return Err(SourceError::Device),
            Some(Fault(_, Kind::Short)) => return Err(out_of_range),
            Some(Fault(_, Kind::Partial)) => {
                into[..blocks / 2].copy_from_slice(&good[..blocks / 2]);
                return Err(SourceError::Device);
            }
            Some(Fault(_, Kind::Late(ms))) => {
                thread::sleep(Duration::from_millis(ms));
                into.copy_from_slice(good);
            }
            Some(Fault(_, Kind::Flips(seed))) => {
                into.copy_from_slice(good);
                let bit = seed as usize % (blocks * Block::BYTES * 8);
                zerocopy::IntoBytes::as_mut_bytes(into)[bit / 8] ^= 1 << (bit % 8);
            }
        }
        Ok(())
    }
}

/// Runs `f` with the model of `packed` and an empty conversation, streamed in pieces of `piece` blocks with `resident` blocks in
/// memory.
fn streamed<R>(
    packed: &Packed,
    (piece, resident): (u32, u64),
    (batch, options): (u32, RingOptions),
    faults: &Arc<Mutex<Vec<Fault>>>,
    f: impl FnOnce(&mut Model<'_>, &mut State<'_>, &Watch) -> R,
) -> std::io::Result<R> {
    let image = packed.image();
    let config = image.header().config;
    let limits = Limits { batch, ..image.header().plan.limits };
    let plan = Plan::new(&config, &limits);
    let mut pieces = Pieces::new(&image, piece);
    let kept = pieces.keep(resident);
    assert!(kept <= resident && kept == pieces.resident_blocks());
    // One reader, and two where the number of buffers is odd.
    let devices = (0..=options.slots % 2).map(|_| Faulty::new(packed, faults)).collect();
    let mut ring = Ring::start(devices, &image, pieces, options)?;
    let watch = ring.watch();
    let (mut scratch, mut state) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
    let mut state = State::new(&config, &limits, &mut state).unwrap();
    let mut model = Model::new(&image, limits, backend::best(), &Serial, &mut ring, &mut scratch).unwrap();
    Ok(f(&mut model, &mut state, &watch))
}

fn no_faults() -> Arc<Mutex<Vec<Fault>>> {
    Arc::new(Mutex::new(Vec::new()))
}

#[test]
fn the_logits_do_not_depend_on_what_stays_in_memory() {
    for packed in &*STORIES {
        let limits = packed.image().header().plan.limits;
        let expected = Way { kv: limits.kv, ..Way::plain(backend::best()) }.logits(packed, &IDS);
        let all = Pieces::new(&packed.image(), 0).blocks();
        for (piece, resident) in [(0, 0), (0, all / 3), (1000, 0), (1000, all / 2), (5000, all - 1), (1 << 20, all)] {
            for batch in [1, 3, 16] {
                for verify in [false, true] {
                    let options = RingOptions { verify, slots: 2 + batch as usize % 3, ..OPTIONS };
                    let found =
                        streamed(packed, (piece, resident), (batch, options), &no_faults(), |model, state, _| {
                            let mut rows = Vec::new();
                            model.prefill_each(state, &IDS, &mut |_, row| rows.push(row.to_vec())).unwrap();
                            // What follows a pass with logits of all tokens is read as ever.
                            state.rewind(3);
                            assert_eq!(model.prefill(state, &IDS[3..]).unwrap(), rows[IDS.len() - 1]);
                            rows
                        });
                    assert_eq!(fingerprint(&found.unwrap()), fingerprint(&expected), "{piece} {resident} {batch}");
                }
            }
        }
    }
}

#[test]
fn every_layout_is_streamed() {
    for (name, packed) in &layouts() {
        let config = packed.image().header().config;
        let ids: Vec<u32> = (0..40).map(|i| i * 37 % config.vocab).collect();
        let kv = packed.image().header().plan.limits.kv;
        let expected = fingerprint(&Way { kv, ..Way::plain(backend::best()) }.logits(packed, &ids));
        let all = Pieces::new(&packed.image(), 0).blocks();
        for (piece, resident, batch) in [(0, 0, 1), (0, all / 2, 5), (300, all / 3, 16)] {
            let found = streamed(packed, (piece, resident), (batch, OPTIONS), &no_faults(), |model, state, watch| {
                let mut rows = Vec::new();
                ids.chunks(7).for_each(|ids| {
                    model.prefill_each(state, ids, &mut |_, row| rows.push(row.to_vec())).unwrap();
                });
                // Token by token nothing is read that is not used, but for what is skipped: angles that do not change.
                let before = watch.stats();
                (0..4).for_each(|token| drop(model.step(state, token).unwrap().to_vec()));
                let after = watch.stats();
                let skipped = if config.window.is_some() { 4 * u64::from(watch.pieces().piece_blocks()) } else { 0 };
                assert!(after.dropped - before.dropped <= skipped, "{name}: {before:?} {after:?}");
                rows
            });
            assert_eq!(fingerprint(&found.unwrap()), expected, "{name} {piece} {resident} {batch}");
        }
    }
}

/// Weights in memory, with a list of what was fetched in order.
struct Listed<'a> {
    source: Mapped<'a>,
    fetched: &'a mut Vec<Extent>,
}

impl WeightSource for Listed<'_> {
    fn fetch(&mut self, extent: Extent) -> Result<&[Block], SourceError> {
        self.fetched.push(extent);
        self.source.fetch(extent)
    }
    fn fetch_row(&mut self, extent: Extent) -> Result<&[Block], SourceError> {
        self.source.fetch(extent)
    }
    fn piece_blocks(&self) -> u32 {
        self.source.piece_blocks()
    }
}

/// Reading ahead needs it: what a pass fetches lies in the image in the order in which it does.
#[test]
fn a_pass_fetches_in_the_order_of_the_image() {
    let stories = STORIES.iter().map(|packed| ("stories", Packed::from_blocks(packed.blocks().to_vec())));
    for (name, packed) in layouts().into_iter().chain(stories) {
        let image = packed.image();
        let config = image.header().config;
        let limits = image.header().plan.limits;
        let plan = Plan::new(&config, &limits);
        let (mut scratch, mut state) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
        let mut state = State::new(&config, &limits, &mut state).unwrap();
        let mut fetched = Vec::new();
        let mut source = Listed { source: Mapped::new(packed.blocks()), fetched: &mut fetched };
        let mut model = Model::new(&image, limits, backend::best(), &Serial, &mut source, &mut scratch).unwrap();
        model.prefill(&mut state, &[1, 2, 3]).unwrap();
        for two in fetched.windows(2) {
            let section = |extent: Extent| {
                image.sections().records().iter().rfind(|r| r.start.get() <= extent.start).map(|r| (r.kind, r.layer))
            };
            assert!(two[0].end() <= two[1].start, "{name}: {:?} then {:?}", section(two[0]), section(two[1]));
        }
        assert!(fetched.len() > 5 * config.layers as usize, "{name}");
    }
}

/// A prompt reads the weights once a batch and the head once; a token reads both once. What is read ahead for the next pass
/// is at most the buffers.
#[test]
fn every_pass_reads_the_weights_once() {
    let packed = &STORIES[0];
    let image = packed.image();
    let head = u64::from(image.sections().find(image::Kind::Head, None).unwrap().blocks.get());
    streamed(packed, (300, 0), (4, OPTIONS), &no_faults(), |model, state, watch| {
        let all = watch.pieces().streamed_blocks();
        let ahead = OPTIONS.slots as u64 * u64::from(watch.pieces().piece_blocks());
        let mut read = |passes: u64, heads: u64, f: &mut dyn FnMut(&mut Model<'_>, &mut State<'_>)| {
            let before = watch.stats().blocks;
            f(model, state);
            let found = watch.stats().blocks - before;
            // Rows of the embedding, a tile and a scale each, are read apart.
            let (rows, once) = (64 * passes, passes * all - (passes - heads) * head);
            assert!(found <= once + ahead + rows, "{found} blocks for {passes} passes of {all}");
            assert!(found + ahead >= once, "{found} blocks for {passes} passes of {all}");
        };
        read(3, 1, &mut |model, state| drop(model.prefill(state, &[1; 12]).unwrap().to_vec()));
        read(5, 5, &mut |model, state| (0..5).for_each(|t| drop(model.step(state, t).unwrap().to_vec())));
        read(1, 1, &mut |model, state| {
            model.read(state, &IDS[..4]).unwrap();
            model.logits_after(3, bitnet_runtime::model::Need::All).unwrap();
        });
        assert_eq!(watch.stats().dropped, 0);
    })
    .unwrap();
}

/// A device that waits before one of its reads.
struct Gated {
    blocks: Vec<Block>,
    start: u32,
    open: Receiver<()>,
}

impl BlockDevice for Gated {
    fn read(&mut self, start: u32, into: &mut [Block]) -> Result<(), SourceError> {
        if start == self.start {
            self.open.recv().unwrap();
        }
        into.copy_from_slice(&self.blocks[start as usize..][..into.len()]);
        Ok(())
    }
}

/// A reader that is late goes on with the first piece of the next pass, though that pass has more at its end than the one
/// before.
#[test]
fn a_late_reader_begins_where_the_next_pass_does() {
    let packed = tiny();
    let image = packed.image();
    let section = |kind| image.sections().find(kind, None).unwrap().extent();
    let row = Extent { blocks: 1, ..section(image::Kind::Embedding) };
    let start = image.sections().find(image::Kind::AttentionNorm, Some(0)).unwrap().start.get();
    let until = |end| Extent { start, blocks: end - start };
    let (body, all) = (until(section(image::Kind::FinalNorm).start), until(section(image::Kind::Head).end()));

    let (open, gate) = channel();
    let device = Gated { blocks: packed.blocks().to_vec(), start: row.start, open: gate };
    let options = RingOptions { slots: 2, patience: Duration::from_millis(20), ..OPTIONS };
    let mut ring = Ring::start(vec![device], &image, Pieces::new(&image, 0), options).unwrap();
    let watch = ring.watch();
    // However long a read takes: a fetch that gave up is tried again.
    let fetch = |ring: &mut Ring, at: u32| -> u32 {
        let piece = Extent { start: at, blocks: ring.piece_from(at) };
        while ring.fetch(piece) == Err(SourceError::Timeout) {}
        piece.end()
    };

    ring.expect(body);
    let (mut at, mut last) = (start, start);
    while at < body.end() {
        last = at;
        at += ring.piece_from(at);
    }
    assert!(last > start && at <= all.end());
    let mut at = start;
    while at < last {
        at = fetch(&mut ring, at);
    }
    // The last piece is there, and both buffers are full. The reader is kept by a row, and meanwhile the next pass begins.
    // What it read before it knew where passes begin is dropped by now.
    let needed = u64::from(last + ring.piece_from(last) - start);
    while watch.stats().blocks - watch.stats().dropped < needed {
        thread::yield_now();
    }
    let dropped = watch.stats().dropped;
    assert_eq!(ring.fetch_row(row), Err(SourceError::Timeout));
    fetch(&mut ring, last);
    ring.expect(all);
    let before = watch.stats().blocks;
    open.send(()).unwrap();
    // The row, and then what it takes for the next piece.
    while watch.stats().blocks < before + 2 {
        thread::yield_now();
    }
    let mut at = start;
    while at < all.end() {
        at = fetch(&mut ring, at);
    }
    assert_eq!(watch.stats().dropped, dropped);
}

fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |n| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    }
}

/// Emulated machines are twenty times slower.
const SEEDS: u64 = if cfg!(target_arch = "x86_64") { 2000 } else { 200 };

/// Failures, short reads and slow answers at any read: an error and the state as before, or the right logits; and afterwards,
/// without faults, the right logits again.
#[test]
fn injected_faults_end_in_errors_or_in_the_right_logits() {
    let packed = tiny();
    let vocab = packed.image().header().config.vocab;
    let ids: Vec<u32> = (0..6).map(|i| i * 31 % vocab).collect();
    let expected =
        Way { kv: packed.image().header().plan.limits.kv, ..Way::plain(backend::best()) }.logits(&packed, &ids);
    let all = Pieces::new(&packed.image(), 0).blocks();
    let (mut failed, mut passed) = (0, 0);
    for seed in 0..SEEDS {
        let mut random = random(seed);
        let faults = no_faults();
        let options = RingOptions { slots: 2 + random(3) as usize, ..OPTIONS };
        let shape = (random(300) as u32, [0, all / 2][random(2) as usize]);
        streamed(&packed, shape, (1 + random(4) as u32, options), &faults, |model, state, _| {
            *faults.lock().unwrap() = (0..1 + random(3))
                .map(|_| {
                    let kind = [Kind::Fails, Kind::Short, Kind::Partial, Kind::Late(0)][random(4) as usize];
                    Fault(random(120), kind)
                })
                .collect();
            let mut tries = 0;
            while state.position() < ids.len() {
                let at = state.position();
                let n = 1 + random((ids.len() - at) as u64) as usize;
                match model.prefill(state, &ids[at..at + n]) {
                    Ok(logits) => {
                        assert_eq!(logits, expected[at + n - 1], "seed {seed}");
                        passed += 1;
                    }
                    Err(Error::Source(SourceError::Device | SourceError::OutOfRange { .. })) => {
                        assert_eq!(state.position(), at, "seed {seed}: the state is as before");
                        failed += 1;
                        tries += 1;
                        assert!(tries <= 3, "seed {seed}: no more errors than faults");
                    }
                    Err(e) => panic!("seed {seed}: {e}"),
                }
            }
        })
        .unwrap();
    }
    println!("{failed} passes failed, {passed} passed");
    assert!(failed > SEEDS / 4 && passed > SEEDS);
}

/// With checksums a bit that flips on the way is an error; the next try reads it again.
#[test]
fn flipped_bits_are_found_before_they_are_used() {
    let packed = tiny();
    let ids = [3, 1, 2];
    let expected =
        Way { kv: packed.image().header().plan.limits.kv, ..Way::plain(backend::best()) }.logits(&packed, &ids);
    let mut found = 0;
    for seed in 0..300 {
        let mut random = random(seed);
        let faults = no_faults();
        let options = RingOptions { verify: true, ..OPTIONS };
        streamed(&packed, (200, 0), (3, options), &faults, |model, state, _| {
            *faults.lock().unwrap() = vec![Fault(random(80), Kind::Flips(random(1 << 20)))];
            for _ in 0..4 {
                state.rewind(0);
                match model.prefill(state, &[3, 1, 2]) {
                    Ok(logits) => assert_eq!(logits, expected[2], "seed {seed}"),
                    Err(Error::Source(SourceError::Checksum { .. })) => found += 1,
                    Err(e) => panic!("seed {seed}: {e}"),
                }
            }
        })
        .unwrap();
    }
    println!("{found} found");
    assert!(found > 100);
    // And an image that is damaged is not opened at all, wherever it is.
    for kind in [image::Kind::Embedding, image::Kind::RopeFrequencies, image::Kind::Head] {
        let mut blocks = packed.blocks().to_vec();
        let section = packed.image().sections().find(kind, None).unwrap().extent();
        zerocopy::IntoBytes::as_mut_bytes(&mut blocks[section.end() as usize - 1..])[5] ^= 4;
        let damaged = Packed::from_blocks(blocks);
        let options = RingOptions { verify: true, ..OPTIONS };
        let e = streamed(&damaged, (0, 0), (1, options), &no_faults(), |_, _, _| ()).unwrap_err();
        assert!(e.to_string().contains("checksum"), "{e}");
    }
}

/// A device that stalls is an error after the patience and no hang, also when the ring is dropped; when it answers, all goes on.
#[test]
fn a_stalled_device_is_an_error_in_time() {
    let packed = tiny();
    let patience = Duration::from_millis(500);
    let faults = no_faults();
    let options = RingOptions { patience, ..OPTIONS };
    let start = Instant::now();
    streamed(&packed, (0, 0), (1, options), &faults, |model, state, _| {
        // A busy machine may take longer though nothing is wrong.
        while model.step(state, 5) == Err(Error::Source(SourceError::Timeout)) {}
        let expected = model.logits().to_vec();
        state.rewind(0);
        *faults.lock().unwrap() = vec![Fault(0, Kind::Late(2000))];
        let start = Instant::now();
        let mut errors = 0;
        while let Err(e) = model.step(state, 5) {
            assert_eq!(e, Error::Source(SourceError::Timeout));
            assert_eq!(state.position(), 0);
            errors += 1;
            assert!(start.elapsed() < Duration::from_secs(60));
        }
        assert!(errors >= 1);
        assert_eq!(model.logits(), expected);
        *faults.lock().unwrap() = vec![Fault(0, Kind::Late(120_000))];
        // Read ahead by now; what the token after it needs is not.
        let late = (0..3).find_map(|_| model.step(state, 5).err());
        assert_eq!(late, Some(Error::Source(SourceError::Timeout)));
    })
    .unwrap();
    assert!(start.elapsed() < Duration::from_secs(60), "nobody waited for the device");
}

/// A file that is cut, or written to, while it is streamed: an error and no signal. One that is replaced by renaming another
/// onto its name goes on as it was.
#[test]
fn a_file_that_changes_is_an_error_and_one_that_is_replaced_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let packed = tiny();
    let image = packed.image();
    let config = image.header().config;
    let limits = image.header().plan.limits;
    let plan = Plan::new(&config, &limits);
    let run = |change: &dyn Fn(), expected: Result<(), Option<SourceError>>| {
        std::fs::write(&path, packed.bytes()).unwrap();
        let device = ImageFile::new(std::fs::File::open(&path).unwrap()).unwrap();
        let devices = vec![device.try_clone().unwrap(), device];
        let mut ring = Ring::start(devices, &image, Pieces::new(&image, 0), OPTIONS).unwrap();
        let (mut scratch, mut state) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
        let mut state = State::new(&config, &limits, &mut state).unwrap();
        let mut model = Model::new(&image, limits, backend::best(), &Serial, &mut ring, &mut scratch).unwrap();
        let before = model.step(&mut state, 7).unwrap().to_vec();
        state.rewind(0);
        // Times of files have the grain of the system's clock tick.
        thread::sleep(Duration::from_millis(20));
        change();
        let after: Vec<_> = (0..3)
            .map(|_| {
                state.rewind(0);
                model.step(&mut state, 7).map(<[f32]>::to_vec)
            })
            .collect();
        match expected {
            Ok(()) => assert!(after.iter().all(|found| found.as_ref() == Ok(&before))),
            Err(kind) => {
                // What was read ahead before the change is right; nothing after it is wrong.
                assert!(after.iter().all(|found| found.is_err() || found.as_ref() == Ok(&before)));
                let e = after[2].as_ref().unwrap_err();
                match kind {
                    Some(kind) => assert_eq!(*e, Error::Source(kind)),
                    None => assert!(matches!(e, Error::Source(SourceError::OutOfRange { .. })), "{e}"),
                }
            }
        }
    };
    let file = || std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    run(&|| {}, Ok(()));
    run(&|| file().set_len(packed.bytes().len() as u64 / 2).unwrap(), Err(None));
    run(
        &|| std::os::unix::fs::FileExt::write_at(&file(), &[7], packed.bytes().len() as u64 - 9000).map(drop).unwrap(),
        Err(Some(SourceError::Changed)),
    );
    run(
        &|| {
            let other = dir.path().join("other");
            std::fs::write(&other, vec![0; packed.bytes().len()]).unwrap();
            std::fs::rename(&other, &path).unwrap();
        },
        Ok(()),
    );
}
