//! Long memory: pairs of a key and a value at the start of 4,096 tokens, and at their end questions for values whose pairs have left the
//! window long ago.
use bitnet_kernel::Format;
use bitnet_pack::Options;
use bitnet_runtime::backend;
use bitnet_runtime::memory::KvFormat;
use bitnet_tests::images::{Packed, Way, fingerprint};
use bitnet_tests::{argmax, golden, ids, json};

/// Ids of values.
const VALUES: core::ops::Range<usize> = 64..128;
/// Right answers, which are as many by PyTorch.
const RIGHT: usize = 30;
/// Of the logits after the questions, with keys and values in f16.
const FINGERPRINT: u64 = 0xa92fa8bb30dbd5ad;

/// A model of two layers with a window of 256, trained by `tools/train/recall.py`: attention alone can pass on what is at most twice a
/// window away. Without its memory the same model knows nothing.
#[test]
fn what_left_the_window_long_ago_is_recalled() {
    let source = golden("recall");
    let questions = json(source.join("questions.json"));
    let [prompt, answers] = ["input_ids", "answers"].map(|key| ids(&questions[key][0]));
    let (before, asked) = prompt.split_at(prompt.len() - answers.len());
    assert_eq!((prompt.len(), answers.len()), (4096, 32));
    let options = Options { head: Format::F16, ..Options::default() };
    let recall = |packed: &Packed, way: Way| {
        way.run(packed, |model, state| {
            model.prefill(state, before).unwrap();
            asked.iter().map(|&key| model.step(state, key).unwrap().to_vec()).collect::<Vec<_>>()
        })
    };
    let right = |rows: &[Vec<f32>]| {
        let found = rows.iter().map(|row| (VALUES.start + argmax(&row[VALUES])) as u32);
        found.zip(&answers).filter(|(found, answer)| found == *answer).count()
    };
    let way = Way { batch: 16, kv: KvFormat::F16, ..Way::plain(backend::best()) };
    // By one backend: emulated ones take a minute each, and all are compared where conversations are short.
    let rows = recall(&Packed::pack(&source, &options), way);
    let found = fingerprint(&rows);
    println!("{} of {}: {found:#018x}", right(&rows), rows.len());
    assert_eq!((right(&rows), found), (RIGHT, FINGERPRINT), "{found:#018x} by {}", way.kernels.name());

    let place = tempfile::tempdir().unwrap();
    let mut config = json(source.join("config.json"));
    config.as_object_mut().unwrap().remove("memory");
    std::fs::write(place.path().join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors();
    let views = tensors.into_iter().filter(|(name, _)| !name.contains(".memory."));
    std::fs::write(place.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let rows = recall(&Packed::pack(place.path(), &options), way);
    println!("{} of {} without a memory", right(&rows), rows.len());
    assert!(right(&rows) <= 3, "chance is one of 64");
}
