//! The oracle is right: it agrees with what transformers computed.
use bitnet_tests::reference::{Arithmetic, Force, Projection, Reference, Site, Trace, explain};
use bitnet_tests::{argmax, golden, ids, json, max_difference, model, npy};

/// How far two right implementations may be apart in a logit, unless a rounding flipped.
const TOLERANCE: f32 = 2e-3;

fn agrees(set: &str) {
    let dir = golden(set);
    let reference = Reference::load(&dir);
    let prompt = ids(&json(dir.join("ids.json"))["input_ids"][0]);
    let expected = npy::read::<f32>(dir.join("logits_f32.npy"));
    let expected: Vec<&[f32]> = expected.rows().collect();
    assert_eq!(expected.len(), prompt.len());

    let trace = reference.trace(&prompt);
    let mut worst = 0.0_f32;
    for (position, (row, expected)) in trace.logits.iter().zip(&expected).enumerate() {
        assert_eq!(argmax(row), argmax(expected), "{set}: the likeliest id at position {position}");
        worst = worst.max(max_difference(row, expected));
    }
    let near = trace.doubtful(1e-3).first().map_or("none".to_owned(), ToString::to_string);
    println!("{set}: logits within {worst:.1e}; nearest to a flip: {near}");
    for flip in explain(&reference, &prompt, &expected, TOLERANCE).unwrap_or_else(|e| panic!("{set}: {e}")) {
        println!("{set}: {flip}");
    }

    let greedy = ids(&json(dir.join("expected.json"))["f32"]["greedy_ids"]);
    let (start, continuation) = greedy.split_at(prompt.len());
    assert_eq!(start, prompt);
    assert_eq!(reference.greedy(&prompt, continuation.len()), continuation, "{set}: greedy ids");

    // The hooks saw the last pass of the generation, over all but its last token.
    hidden_agree(set, &reference.trace(&greedy[..greedy.len() - 1]));
}

/// Compares the outputs of the linears and of the layers that transformers' hooks saw.
fn hidden_agree(set: &str, trace: &Trace) {
    let hidden = npy::read_npz::<f32>(golden(set).join("hidden_f32.npz"));
    assert!(!hidden.is_empty());
    for (name, array) in hidden {
        let (layer, what) = name.strip_prefix("layer").unwrap().split_once('_').unwrap();
        let layer = layer.parse().unwrap();
        let output = |projection, position| &trace.outputs[&Site { layer, projection, position }];
        let mut worst = 0.0_f32;
        for (position, expected) in array.rows().enumerate() {
            let found = match what {
                "q" => output(Projection::Q, position),
                "o_proj" => output(Projection::O, position),
                "down" => output(Projection::Down, position),
                "out" => &trace.residual[&(layer, position)],
                _ => panic!("{set}: {name} is not known"),
            };
            let largest = expected.iter().fold(0.0, |max: f32, v| max.max(v.abs()));
            worst = worst.max(max_difference(found, expected) / largest);
        }
        println!("{set}: {name} within {worst:.1e} of the largest value");
        assert!(worst <= 1e-4, "{set}: {name}");
    }
}

#[test]
fn bitnet_online_bf16() {
    agrees("bitnet_online_bf16");
}

#[test]
fn bitnet_offline_packed() {
    agrees("bitnet_offline_packed");
}

#[test]
fn llama_bitlinear_packed() {
    agrees("llama_bitlinear_packed");
}

#[test]
fn llama_rmsnorm_online() {
    agrees("llama_rmsnorm_online");
}

#[test]
fn stories_ternary() {
    let expected = json(golden("stories-ternary").join("expected.json"));
    let reference = Reference::load(model("stories-ternary"));
    let prompt = ids(&expected["prompt_ids"]);
    let logits: Vec<f32> = serde_json::from_value(expected["last_prompt_logits"].clone()).unwrap();
    let found = reference.logits(&prompt).pop().unwrap();
    let worst = max_difference(&found, &logits);
    println!("stories-ternary: the logits after the prompt within {worst:.1e}");
    assert!(worst <= TOLERANCE);
    assert_eq!(reference.greedy(&prompt, 60), ids(&expected["greedy_ids"]));
}

/// The other arithmetic is as good: it stays as near to transformers' logits.
#[test]
fn integer_arithmetic_differs_by_rounding_errors() {
    for set in ["bitnet_online_bf16", "bitnet_offline_packed", "llama_bitlinear_packed", "llama_rmsnorm_online"] {
        let reference = Reference::load(golden(set));
        let prompt = ids(&json(golden(set).join("ids.json"))["input_ids"][0]);
        let one = reference.logits(&prompt);
        let other = reference.trace_with(&prompt, Arithmetic::Integer, &Force::new()).logits;
        let worst = one.iter().zip(&other).map(|(a, b)| max_difference(a, b)).fold(0.0, f32::max);
        println!("{set}: integer and dequantised arithmetic within {worst:.1e}");
        assert!(worst <= TOLERANCE, "{set}");
    }
}

/// A rounding that goes the other way is found by its effect, and named.
#[test]
fn a_flip_is_explained() {
    let dir = golden("bitnet_online_bf16");
    let reference = Reference::load(&dir);
    let prompt = ids(&json(dir.join("ids.json"))["input_ids"][0]);
    let trace = reference.trace(&prompt);
    assert_eq!(explain(&reference, &prompt, &trace.logits, TOLERANCE).unwrap(), []);

    // The doubtful value whose flip is seen best.
    let other = |flip| reference.trace_with(&prompt, Arithmetic::Dequantised, &Force::new().flip(flip));
    let effect = |other: &Trace, position: usize| max_difference(&trace.logits[position], &other.logits[position]);
    let doubtful = trace.doubtful(1e-3);
    assert!(doubtful.windows(2).all(|two| two[0].distance <= two[1].distance));
    let seen = doubtful.iter().map(|flip| (flip, effect(&other(flip), flip.site.position)));
    let (flip, difference) = seen.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    println!("{flip}: logits differ by {difference:.1e}");
    assert!(difference > 5.0 * TOLERANCE, "a flip that does not show proves nothing");

    let other = other(flip);
    assert_eq!(explain(&reference, &prompt, &other.logits, TOLERANCE).unwrap(), [*flip]);

    // The same from the other implementation's codes, site by site.
    assert_eq!(trace.flips(flip.site, &other.inputs[&flip.site].codes), [*flip]);
    let force = other.inputs.iter().fold(Force::new(), |force, (&site, input)| force.codes(site, &input.codes));
    let forced = reference.trace_with(&prompt, Arithmetic::Dequantised, &force);
    for (forced, other) in forced.logits.iter().zip(&other.logits) {
        assert!(max_difference(forced, other) <= TOLERANCE);
    }

    // What is no flip is not explained away.
    let mut wrong = trace.logits;
    wrong[7][100] += 0.01;
    assert!(explain(&reference, &prompt, &wrong, TOLERANCE).is_err());
}
