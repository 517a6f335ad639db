//! Pruning: what it costs by activations and by chance, what becomes of the image, and options that make no sense.
mod common;

use bitnet_pack::calibrate::{HeldOut, Linear, Reference, windows};
use bitnet_pack::checkpoint::{Checkpoint, Dtype};
use bitnet_pack::{Error, Options, Pattern, Pruned, Sparsity, pack};
use bitnet_runtime::image::{Encoding, Kind};
use common::{Place, assert_says, stories};
use std::path::{Path, PathBuf};

fn text() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/stories.txt")
}

fn sparse(share: f64, pattern: Pattern) -> Options {
    Options { sparsity: Some(Sparsity { share, pattern, text: text() }), ..Options::default() }
}

/// What leaving out costs, in nats a token.
fn lost(pruned: &Pruned) -> f64 {
    pruned.score.nats - pruned.score.source_nats
}

/// A tenth of the neurons costs less than a quarter, and this less than a quarter by chance, on the same tokens. The images are
/// smaller, and those of the same options the same.
#[test]
fn neurons_by_their_activations_are_better_than_by_chance() {
    let place = Place::new();
    let run = |name: &str, share: f64| {
        let image = place.out().join(name);
        let report = pack(&stories(), &image, &sparse(share, Pattern::Neurons), &mut ()).unwrap();
        (std::fs::read(image).unwrap(), report)
    };
    let ((tenth, of_tenth), (quarter, of_quarter)) = (run("a", 0.1), run("b", 0.25));
    assert!(quarter.len() < tenth.len());
    assert!(of_quarter.sections.iter().any(|s| s.encoding == Encoding::Kept), "layers without neurons");
    let (a, b) = (of_tenth.pruned.unwrap(), of_quarter.pruned.unwrap());
    assert!(run("b", 0.25).0 == quarter, "the same options give the same bytes");
    assert!(0.0 < lost(&a) && lost(&a) < lost(&b) && b.is_large(), "{a} {b}");
    assert!(b.zeros[0] < b.zeros[1], "{b}");

    let checkpoint = Checkpoint::open(&stories(), Dtype::I2_S).unwrap();
    let model = Reference::new(&checkpoint, &()).unwrap();
    let all = windows(&checkpoint, None, &text(), 256, 64).unwrap();
    let held = all.count().div_ceil(4);
    let held = HeldOut::new(&model, all.part(all.count() - held, held), &mut ()).unwrap();
    // Multiples of an odd number, in a layer's own order.
    let chance = |layer: u32, neuron: usize| (neuron * 37 + layer as usize * 101) % 64 < 16;
    let change = |linear: Linear, weights: &mut [f32]| {
        let (Some(layer), cols) = (linear.layer, model.shape(linear).1) else { return Ok(()) };
        let neuron = |i: usize| match linear.kind {
            Kind::Gate | Kind::Up => Some(i / cols),
            Kind::Down => Some(i % cols),
            _ => None,
        };
        for (i, w) in weights.iter_mut().enumerate() {
            if neuron(i).is_some_and(|neuron| chance(layer, neuron)) {
                *w = 0.0;
            }
        }
        Ok::<_, Error>(())
    };
    let by_chance = held.score(&change, &mut ()).unwrap();
    assert_eq!((by_chance.tokens, by_chance.source_nats), (b.score.tokens, b.score.source_nats), "the same tokens");
    assert!(lost(&b) < by_chance.nats - by_chance.source_nats, "{b} {}", by_chance.nats);
}

/// Of every four weights two are left at most, and blocks of zeros are not stored.
#[test]
fn weights_and_blocks_are_left_out() {
    let place = Place::new();
    let run = |options: &Options| pack(&stories(), &place.image(), options, &mut ()).unwrap();
    let single = run(&sparse(0.5, Pattern::Of { n: 2, m: 4 })).pruned.unwrap();
    assert!(single.zeros[1] >= 0.5, "{single}");
    let blocks = run(&sparse(0.5, Pattern::Blocks(bitnet_kernel::BlockShape::Wide)));
    assert!(blocks.sections.iter().any(|s| matches!(s.encoding, Encoding::Blocks(_))));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let place = Place::new();
    let run = |options: &Options| pack(&stories(), &place.image(), options, &mut ()).unwrap_err().to_string();
    for share in [0.0, -1.0, 0.96, f64::NAN, f64::INFINITY] {
        assert_says("sparsity", &run(&sparse(share, Pattern::Neurons)), &["--sparsity", "at most 0.95"]);
    }
    for (n, m) in [(0, 4), (4, 4), (5, 4), (1, 65), (0, 0)] {
        assert_says("sparsity", &run(&sparse(0.5, Pattern::Of { n, m })), &["at least one stays"]);
    }
    assert_says("sparsity", &run(&sparse(0.3, Pattern::Of { n: 2, m: 4 })), &["leaves out 0.5"]);
    // Passes over a text compute neither its memory nor its window.
    let stateful = stories().with_file_name("stories-stateful");
    let error = pack(&stateful, &place.image(), &sparse(0.5, Pattern::Neurons), &mut ()).unwrap_err().to_string();
    assert_says("sparsity", &error, &["does not know a memory beside attention"]);
    let short = place.out().join("short");
    std::fs::write(&short, "Once there was a cat. ".repeat(90)).unwrap();
    let mut options = sparse(0.5, Pattern::Neurons);
    options.sparsity.as_mut().unwrap().text = short;
    assert_says("sparsity", &run(&options), &["windows of 256 tokens", "needs 4"]);
    assert!(!place.image().exists());
}
