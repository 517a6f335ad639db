//! The four checkpoints that transformers computed: the packed model gives its logits and its tokens.
use bitnet_kernel::Format;
use bitnet_pack::Options;
use bitnet_runtime::backend;
use bitnet_runtime::memory::KvFormat;
use bitnet_tests::images::{Packed, Way};
use bitnet_tests::{argmax, golden, ids, json, max_difference, npy};

const SETS: [&str; 4] =
    ["bitnet_online_bf16", "bitnet_offline_packed", "llama_bitlinear_packed", "llama_rmsnorm_online"];
/// As close as two programs come that add in another order. A rounding that flips in int8 moves a logit by more; none does.
const TOLERANCE: f32 = 2e-3;
const GREEDY: usize = 16;

#[test]
fn logits_and_tokens_are_those_of_transformers() {
    for set in SETS {
        let dir = golden(set);
        let packed = Packed::pack(&dir, &Options { head: Format::F16, ..Options::default() });
        let prompt = ids(&json(dir.join("ids.json"))["input_ids"][0]);
        let expected = npy::read::<f32>(dir.join("logits_f32.npy"));
        let greedy = ids(&json(dir.join("expected.json"))["f32"]["greedy_ids"]);
        for kernels in backend::available() {
            let way = Way { kv: KvFormat::F32, batch: 7, ..Way::plain(kernels) };
            let found = way.logits(&packed, &prompt);
            let mut largest = 0.0f32;
            for (position, (found, expected)) in found.iter().zip(expected.rows()).enumerate() {
                largest = largest.max(max_difference(found, expected));
                assert_eq!(argmax(found), argmax(expected), "{set}, position {position}");
            }
            println!("{set} by {}: largest difference {largest}", kernels.name());
            assert!(largest <= TOLERANCE, "{set} by {}: {largest}", kernels.name());
            assert_eq!(way.greedy(&packed, &prompt, GREEDY).unwrap(), greedy[prompt.len()..], "{set}");
        }
    }
}
