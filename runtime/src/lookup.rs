//! Prompt look-up: guesses of the next tokens, from what followed the last few tokens when they occurred before.
//!
//! The idea is that of Saxena's prompt look-up decoding (<https://github.com/apoorvumang/prompt-lookup-decoding>). Guesses
//! are read in one pass with the token that is certain, so that the weights are read once for several tokens. They decide
//! nothing: each token is sampled as without them, and a guess that it is not is forgotten.
use crate::memory::Limits;

/// Most tokens of a pass, the certain one included. Products of more take as much time a token as a prompt's.
const PASS_MAX: usize = 8;

/// The longest run of tokens that is looked for; the longest that is found counts, the latest of equals.
const RUN_MAX: usize = 4;

/// The shortest. One token alone is followed by anything.
const RUN_MIN: usize = 2;

/// Positions that are looked through, the latest. Some ten microseconds, and a token that has so many reads megabytes of keys.
const WINDOW: usize = 1 << 14;

/// The unit of credit: what a token takes without guesses.
const STEP: u32 = 64;

/// What a guess is taken to add to a pass: 5/8. On a busy machine with AVX2 in passes of 8 it was 0.65 of a step of the bundled
/// model on one core and 0.60 of a step of a 2B model on two; other sizes of passes varied widely. Hosts whose cores outrun
/// their memory by more lose less by a wrong guess.
const GUESS: u32 = 40;

/// Credit at the start: without any luck so much time is lost, and the [`REGAIN`] of each token.
const CREDIT: u32 = 2 * STEP;

/// The most credit: after much luck so much can be lost.
const CREDIT_MAX: u32 = 5 * STEP;

/// Credit that every token without guesses gives: the share of time, 1/64, that may be lost for ever.
const REGAIN: u32 = 1;

/// What look-up has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Passes over the weights.
    pub passes: u64,
    /// Tokens that were guessed.
    pub drafted: u64,
    /// Of these, the ones that were right, each of which saved a pass.
    pub accepted: u64,
}

impl Stats {
    /// Tokens read a pass; 1 without look-up.
    pub fn tokens_per_pass(&self) -> f64 {
        (self.passes + self.accepted) as f64 / self.passes.max(1) as f64
    }
}

/// Guesses, and how many are worth their time.
///
/// Text that does not repeat itself loses little: guesses are paid from a credit that right ones refill.
#[derive(Debug)]
pub(crate) struct Lookup {
    /// The tokens of the last pass: one that was certain, then guesses.
    pass: [u32; PASS_MAX],
    /// How many there are.
    len: usize,
    /// How many of them the conversation has reached.
    reached: usize,
    /// Guesses of the next pass at most: twice as many as were all right, or as many as were right.
    length: usize,
    credit: u32,
    pub(crate) stats: Stats,
}

impl Lookup {
    pub(crate) const fn new() -> Self {
        let stats = Stats { passes: 0, drafted: 0, accepted: 0 };
        Self { pass: [0; PASS_MAX], len: 0, reached: 0, length: 2, credit: CREDIT, stats }
    }

    /// Forgets the last pass.
    pub(crate) const fn forget(&mut self) {
        (self.len, self.reached) = (0, 0);
    }

    /// The place of `token` in the last pass, if it was guessed to come now.
    pub(crate) fn accept(&mut self, token: u32) -> Option<usize> {
        let place = self.reached;
        if self.pass[..self.len].get(place) != Some(&token) {
            return None;
        }
        self.reached += 1;
        self.stats.accepted += 1;
        self.credit = (self.credit + STEP).min(CREDIT_MAX);
        Some(place)
    }

    /// The tokens of the next pass: `token`, which follows `history`, and guesses, `most` in all and none of them among `stops`.
    pub(crate) fn propose(&mut self, history: &[u32], token: u32, most: usize, stops: &[u32]) -> &[u32] {
        if self.len > 1 {
            let right = self.reached - 1;
            self.length = if self.reached == self.len { 2 * right } else { right }.clamp(1, PASS_MAX - 1);
        }
        let guesses = self.length.min((self.credit / GUESS) as usize).min(most.saturating_sub(1));
        self.pass[0] = token;
        self.len = 1;
        if guesses > 0 {
            self.len += guess(history, &mut self.pass[..=guesses], stops);
        }
        self.reached = 1;
        let guesses = self.len - 1;
        self.stats.passes += 1;
        self.stats.drafted += guesses as u64;
        match guesses as u32 {
            0 => self.credit = (self.credit + REGAIN).min(CREDIT_MAX),
            n => self.credit -= n * GUESS,
        }
        &self.pass[..self.len]
    }

    /// Most tokens of a pass within the limits of a model, of which the conversation has room for `remaining`.
    pub(crate) fn most(limits: &Limits, remaining: usize) -> usize {
        PASS_MAX.min(limits.batch as usize).min(remaining)
    }
}

/// Fills `pass` after its first token, which follows `history`, with what followed before, up to a stop. Returns how many
/// guesses there are. A run that overlaps its own continuation repeats, as in LZ77.
fn guess(history: &[u32], pass: &mut [u32], stops: &[u32]) -> usize {
    let Some(next) = find(history, pass[0]) else { return 0 };
    for (from, i) in (next..).zip(1..pass.len()) {
        let token = if from < history.len() { history[from] } else { pass[from - history.len()] };
        if stops.contains(&token) {
            return i - 1;
        }
        pass[i] = token;
    }
    pass.len() - 1
}

/// Where to go on after the longest run that ends `history` and `token` and occurred before, the latest of equals.
fn find(history: &[u32], token: u32) -> Option<usize> {
    let first = history.len().saturating_sub(WINDOW);
    let (mut longest, mut next) = (RUN_MIN - 1, None);
    for (end, _) in history.iter().enumerate().skip(first).rev().filter(|&(_, &t)| t == token) {
        let before = history[first..end].iter().rev().zip(history.iter().rev());
        let run = 1 + before.take(RUN_MAX - 1).take_while(|(a, b)| a == b).count();
        if run > longest {
            (longest, next) = (run, Some(end + 1));
            if run == RUN_MAX {
                break;
            }
        }
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guesses<const N: usize>(history: &[u32], token: u32, stops: &[u32]) -> alloc::vec::Vec<u32> {
        let mut pass = [token; N];
        let n = guess(history, &mut pass, stops);
        pass[1..=n].to_vec()
    }

    #[test]
    fn the_longest_run_counts_and_the_latest_of_equals() {
        let text = [1, 2, 3, 4, 50, 9, 3, 4, 51, 8, 3, 4, 52, 1, 2, 3];
        // 1 2 3 4, although 3 4 came later.
        assert_eq!(guesses::<3>(&text, 4, &[]), [50, 9]);
        // 3 4 alone: the latest.
        assert_eq!(guesses::<2>(&[&text[..13], &[7, 3]].concat(), 4, &[]), [52]);
        // Five equal tokens count as four.
        let long = [0, 1, 2, 3, 4, 50, 9, 1, 2, 3, 4, 51, 0, 1, 2, 3];
        assert_eq!(guesses::<2>(&long, 4, &[]), [51]);
        // One token is no run, and nothing is before the start.
        assert_eq!(guesses::<4>(&[4, 7, 9], 4, &[]), [0; 0]);
        assert_eq!(guesses::<4>(&[], 4, &[]), [0; 0]);
        assert_eq!(guesses::<4>(&[4], 4, &[]), [0; 0]);
    }

    #[test]
    fn a_run_repeats_into_its_own_continuation() {
        assert_eq!(guesses::<6>(&[6, 7, 5, 6], 7, &[]), [5, 6, 7, 5, 6]);
        assert_eq!(guesses::<4>(&[3, 3], 3, &[]), [3, 3, 3]);
    }

    #[test]
    fn a_guess_ends_before_a_stop() {
        assert_eq!(guesses::<6>(&[6, 7, 5, 2, 9, 6], 7, &[1, 2]), [5]);
        assert_eq!(guesses::<6>(&[6, 7, 2, 5, 6], 7, &[1, 2]), [0; 0]);
    }

    #[test]
    fn only_the_window_is_looked_through() {
        let mut history = alloc::vec![0; WINDOW + 2];
        (history[1], history[2], history[WINDOW + 1]) = (6, 7, 6);
        assert_eq!(find(&history, 7), None);
        (history[1], history[2], history[3]) = (0, 6, 7);
        assert_eq!(find(&history, 7), Some(4));
    }

    /// In passes that take what is assumed, guesses that are all wrong cost two tokens' time and a 64th.
    #[test]
    fn wrong_guesses_cost_little() {
        let mut lookup = Lookup::new();
        let mut time = 0;
        for _ in 0..10_000 {
            let pass = lookup.propose(&[6, 7, 5, 5, 5, 5, 5, 5, 5, 6], 7, 8, &[]);
            time += STEP + (pass.len() as u32 - 1) * GUESS;
            assert_eq!(lookup.accept(9), None);
        }
        assert!(time <= 10_000 * (STEP + REGAIN) + CREDIT, "{time}");
        assert!(lookup.stats.drafted > 100, "it goes on trying: {:?}", lookup.stats);
        assert_eq!((lookup.stats.passes, lookup.stats.accepted), (10_000, 0));
    }

    #[test]
    fn right_guesses_lengthen_the_pass_to_its_limits() {
        for (most, expected) in [(8, 8), (5, 5), (1, 1), (0, 1)] {
            let mut lookup = Lookup::new();
            for _ in 0..20 {
                let len = lookup.propose(&[3; 20], 3, most, &[]).len();
                for place in 1..len {
                    assert_eq!(lookup.accept(3), Some(place));
                }
                assert_eq!(lookup.accept(3), None);
            }
            assert_eq!(lookup.len, expected);
            assert_eq!(lookup.stats.accepted, lookup.stats.drafted);
        }
    }
}
