//! Prompt look-up changes nothing but the number of passes.
use bitnet_kernel::Kernels;
use bitnet_pack::Options;
use bitnet_runtime::generate::{Event, Finish, Session, Until};
use bitnet_runtime::lookup::Stats;
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::sampler::Sampling;
use bitnet_runtime::{Limits, backend};
use bitnet_tests::images::Packed;
use bitnet_tests::model;
use core::ops::ControlFlow;
use std::sync::LazyLock;

static STORIES: LazyLock<Packed> = LazyLock::new(|| Packed::pack(&model("stories-ternary"), &Options::default()));

/// "Once upon a time, there was a little girl": the model goes on with what it was trained on.
const START: [u32; 13] = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421];

/// The same again and again.
fn repetitive() -> Vec<u32> {
    let sentence = &START[1..];
    [&[1], sentence, sentence, sentence, sentence].concat()
}

/// A penalty below one is a reward: a text that goes round in a few words.
const ROUND: Sampling = Sampling { repetition_penalty: 0.5, ..Sampling::GREEDY };

fn limits() -> Limits {
    STORIES.image().header().plan.limits
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lookup {
    Off,
    On,
}

/// Runs `f` with a conversation about the bundled model.
fn converse<R>(
    kernels: &'static dyn Kernels,
    limits: Limits,
    sampling: Sampling,
    lookup: Lookup,
    f: impl FnOnce(&mut Session<'_>) -> R,
) -> R {
    STORIES.converse(kernels, limits, sampling, |session| match lookup {
        Lookup::Off => f(&mut { session }),
        Lookup::On => f(&mut session.with_lookup()),
    })
}

/// What can be seen of a generation: its tokens, its end, and what the model has read then.
type Seen = (Vec<u32>, Finish, Vec<u32>);

fn generate(session: &mut Session<'_>, max_tokens: usize, stop_ids: &[u32]) -> Seen {
    let mut tokens = Vec::new();
    let finish = session.generate(Until { max_tokens, stop_ids }, None, &mut |event| {
        if let Event::Token(token) = event {
            tokens.push(token);
        }
        ControlFlow::Continue(())
    });
    (tokens, finish.unwrap(), session.history().to_vec())
}

/// `f` with look-up sees what it sees without; returns what look-up did.
fn same<R: PartialEq + core::fmt::Debug>(
    kernels: &'static dyn Kernels,
    limits: Limits,
    sampling: Sampling,
    f: impl Fn(&mut Session<'_>) -> R,
) -> Stats {
    let plain = converse(kernels, limits, sampling, Lookup::Off, |session| {
        assert_eq!(session.lookup(), None);
        f(session)
    });
    let (found, stats) = converse(kernels, limits, sampling, Lookup::On, |s| (f(s), s.lookup().unwrap()));
    assert_eq!(found, plain, "{} {limits:?} {sampling:?} {stats:?}", kernels.name());
    stats
}

/// Greedy and drawn tokens, with and without a penalty that depends on the tokens before, on a text that repeats itself and on
/// one that does not.
#[test]
fn tokens_are_those_without_lookup_on_every_backend() {
    let warm = |seed, temperature, repetition_penalty| Sampling {
        temperature,
        top_k: 40,
        top_p: 0.95,
        repetition_penalty,
        seed,
        ..Sampling::GREEDY
    };
    let samplings = [
        Sampling::GREEDY,
        ROUND,
        warm(1, 0.3, 0.7),
        warm(2, 0.8, 1.1),
        warm(3, 1.5, 1.0),
        Sampling { temperature: 0.8, seed: 4, ..ROUND },
    ];
    for kernels in backend::available() {
        let mut all = Stats::default();
        // All on the backend that is used. Others differ in nothing that look-up sees, and the portable one takes most of the time.
        let some = if kernels.name() == backend::best().name() { &samplings[..] } else { &samplings[2..3] };
        for &sampling in some {
            for (prompt, batch, kv) in [(START.to_vec(), 16, KvFormat::I8), (repetitive(), 3, KvFormat::F16)] {
                let stats = same(kernels, Limits { batch, kv, ..limits() }, sampling, |session| {
                    session.prompt(&prompt).unwrap();
                    generate(session, 50, &[2])
                });
                all.passes += stats.passes;
                all.drafted += stats.drafted;
                all.accepted += stats.accepted;
            }
        }
        println!("{}: {all:?}, {:.2} tokens a pass", kernels.name(), all.tokens_per_pass());
        assert!(all.accepted > 0 && all.drafted > all.accepted, "some guesses are right and some wrong: {all:?}");
    }
}

/// Every token of a pass but the first is a pass less.
#[test]
fn a_repetitive_text_takes_fewer_passes() {
    let stats = same(backend::best(), limits(), ROUND, |session| {
        session.prompt(&repetitive()).unwrap();
        generate(session, 101, &[])
    });
    println!("{stats:?}, {:.2} tokens a pass", stats.tokens_per_pass());
    assert_eq!(stats.passes + stats.accepted, 100, "the last token is not read");
    assert!(stats.tokens_per_pass() > 1.5, "{stats:?}");
}

/// A batch of one has no room for a guess.
#[test]
fn without_room_nothing_is_guessed() {
    let stats = same(backend::best(), Limits { batch: 1, ..limits() }, ROUND, |session| {
        session.prompt(&repetitive()).unwrap();
        generate(session, 20, &[])
    });
    assert_eq!(stats, Stats { passes: 19, drafted: 0, accepted: 0 });
}

/// The context fills up in the middle of a pass that would be longer.
#[test]
fn a_context_fills_up_to_its_last_position() {
    let prompt = repetitive();
    for room in 0..20 {
        let context = (prompt.len() + room) as u32;
        let stats = same(backend::best(), Limits { context, ..limits() }, ROUND, |session| {
            session.prompt(&prompt).unwrap();
            let seen = generate(session, 100, &[]);
            assert_eq!((seen.1, seen.2.len()), (Finish::Context, context as usize));
            // And a shorter prompt goes on from what is common.
            session.prompt(&prompt[..9]).unwrap();
            (seen, generate(session, 4, &[]))
        });
        assert!(room < 15 || stats.accepted > 0, "{stats:?}");
    }
}

/// Every token that occurs is a stop once, most of them in the middle of a pass; then the conversation goes on.
#[test]
fn a_stop_inside_a_pass_is_the_end() {
    let prompt = repetitive();
    let mut accepted = 0;
    for stop in &START[1..] {
        let stats = same(backend::best(), limits(), ROUND, |session| {
            session.prompt(&prompt).unwrap();
            // Without the stop first, so that passes are long by now.
            let before = generate(session, 20, &[]);
            let ended = generate(session, 40, &[*stop]);
            (before, ended, generate(session, 20, &[]))
        });
        accepted += stats.accepted;
    }
    assert!(accepted > 0);
}

/// Lengths are exact, wherever they cut a pass, and the next generation goes on; so does one after it was broken off.
#[test]
fn generations_continue() {
    for max_tokens in 0..12 {
        same(backend::best(), limits(), Sampling { temperature: 0.3, ..ROUND }, |session| {
            session.prompt(&repetitive()).unwrap();
            let parts: Vec<_> = [20, max_tokens, 1, 9].map(|n| generate(session, n, &[])).into();
            let mut left = max_tokens + 1;
            let finish = session.generate(Until { max_tokens: 50, stop_ids: &[] }, None, &mut |_| {
                left -= 1;
                if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert_eq!(finish, Ok(Finish::Cancelled));
            (parts, session.history().to_vec(), generate(session, 10, &[]))
        });
    }
}

/// Another prompt in the middle of a pass: what the pass read too far is forgotten.
#[test]
fn a_prompt_after_a_pass_sees_nothing_of_it() {
    for common in [1, 7, 30, 49, 55] {
        same(backend::best(), limits(), ROUND, |session| {
            session.prompt(&repetitive()).unwrap();
            let (_, _, read) = generate(session, 30, &[]);
            let prompt = [&read[..common], &START[2..6]].concat();
            session.prompt(&prompt).unwrap();
            generate(session, 30, &[])
        });
    }
}
