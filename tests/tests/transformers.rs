//! The four checkpoints that transformers computed: the packed model gives its logits and its tokens.
use bitnet_kernel::Format;
use bitnet_pack::Options;
use bitnet_runtime::backend;
use bitnet_runtime::memory::KvFormat;
use bitnet_tests::images::{Packed, Way};
use bitnet_tests::reference::{Arithmetic, Force, Reference, explain};
use bitnet_tests::tiny::{Dtype, Tiny};
use bitnet_tests::{argmax, golden, ids, json, max_difference, model, npy};

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

/// Far positions: the oracle, which agrees with transformers, and the runtime still agree where the context ends.
#[test]
fn far_positions_are_those_of_the_oracle() {
    let dir = model("stories-ternary");
    let packed = Packed::pack(&dir, &Options { head: Format::F16, ..Options::default() });
    let way = Way { kv: KvFormat::F32, batch: 16, ..Way::plain(backend::best()) };
    // Any text does: what is compared are positions.
    let ids: Vec<u32> = (0..512).map(|i| if i == 0 { 1 } else { 300 + i * i % 200 }).collect();
    let found = way.logits(&packed, &ids);
    // Of 3.7 million roundings some flip between any two orders of summation; each is seen by all that come after, and moves
    // a logit by up to 0.1. So the measure is how far the oracle is from itself in its other arithmetic.
    let oracle = Reference::load(&dir);
    let [expected, other] = [Arithmetic::Integer, Arithmetic::Dequantised]
        .map(|arithmetic| oracle.trace_with(&ids, arithmetic, &Force::new()).logits);
    let compare = |a: &[Vec<f32>], b: &[Vec<f32>]| {
        let mut differences: Vec<f32> = a.iter().zip(b).map(|(a, b)| max_difference(a, b)).collect();
        differences.sort_by(f32::total_cmp);
        let same = a.iter().zip(b).filter(|(a, b)| argmax(a) == argmax(b)).count();
        (differences[256], differences[511], same)
    };
    let (median, largest, same) = compare(&found, &expected);
    let (median_of_oracle, largest_of_oracle, same_of_oracle) = compare(&other, &expected);
    println!("runtime against oracle: median {median}, largest {largest}, best token the same at {same} of 512");
    println!("oracle against itself: {median_of_oracle}, {largest_of_oracle}, {same_of_oracle}");
    // The oracle adds in double precision in both, so it flips less.
    assert!(median < 4.0 * median_of_oracle && largest < 3.0 * largest_of_oracle && same + 10 > same_of_oracle);
}

/// Classes that no golden set holds: the packed model agrees with the oracle. A-02: the activation is the configuration's,
/// and which one it is shows.
#[test]
fn classes_and_activations_are_those_of_the_oracle() {
    let cases = [
        ("squared ReLU", Tiny::n().varied_norms()),
        ("SiLU with sub-norms", Tiny::n().varied_norms().hidden_act("silu")),
        ("no sub-norms", Tiny::l().varied_norms()),
        ("norms of heads", Tiny::q()),
        ("norms of heads, norms of linears", Tiny::q().linear_norms()),
    ];
    let prompt: Vec<u32> = b"abc".map(u32::from).into();
    let found = cases.map(|(case, tiny)| {
        let dir = tempfile::tempdir().unwrap();
        // So that the embedding is exact in the image.
        tiny.dtype(Dtype::F16).write(dir.path());
        let packed = Packed::pack(dir.path(), &Options { head: Format::F16, ..Options::default() });
        let way = Way { kv: KvFormat::F32, ..Way::plain(backend::best()) };
        let found = way.logits(&packed, &prompt);
        let reference = Reference::load(dir.path());
        for flip in explain(&reference, &prompt, &found, TOLERANCE).unwrap_or_else(|e| panic!("{case}: {e}")) {
            println!("{case}: {flip}");
        }
        found
    });
    assert!(max_difference(&found[0][2], &found[1][2]) > 0.1, "the activation shows");
    assert!(max_difference(&found[2][2], &found[3][2]) > 0.1, "the norms of heads show");
}
