//! How many threads help: found out on the passes that are to be done anyway.
use super::cpus::{self, Granted};
use super::{Parallel, Pool};
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// How many threads are to take part in passes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// As many as were fastest.
    Auto,
    /// So many, whatever the system grants.
    Fixed(usize),
}

/// A pool whose threads are chosen for each kind of pass: one token (decode) is bound by the memory, which fewer cores may
/// saturate, and several (prefill) by the cores.
///
/// It starts with all that the system grants. Every eighth pass then tries another number, until each has been tried three
/// times or was clearly slower: a short run is all but never slowed, and a long one is for a few passes, a second in all at
/// most. Nothing is computed for the sake of measuring.
#[derive(Debug)]
pub struct Tuned {
    pool: Pool,
    granted: Granted,
    tuning: Mutex<Tuning>,
}

#[derive(Debug)]
struct Tuning {
    prefill: Tuner,
    decode: Tuner,
    /// The tokens of the pass that runs, and its start.
    pass: Option<(usize, Instant)>,
}

impl Tuning {
    fn of(&mut self, tokens: usize) -> &mut Tuner {
        if tokens == 1 { &mut self.decode } else { &mut self.prefill }
    }
}

impl Tuned {
    /// Starts as many threads as either kind of pass may need, on cores of their own if they are to be `pinned`.
    ///
    /// # Errors
    /// As [`Pool::new`] and [`Pool::pinned`].
    pub fn new(prefill: Threads, decode: Threads, pinned: bool) -> io::Result<Self> {
        let granted = Granted::now();
        let tuner = |threads| match threads {
            Threads::Auto => Tuner::auto(granted.threads().min(Pool::THREADS_MAX)),
            Threads::Fixed(n) => Tuner::fixed(n.clamp(1, Pool::THREADS_MAX)),
        };
        let (prefill, decode) = (tuner(prefill), tuner(decode));
        let threads = prefill.threads().max(decode.threads());
        let pool = if pinned { Pool::pinned(threads, &cpus::by_worth(&granted.cores))? } else { Pool::new(threads)? };
        Ok(Self { pool, granted, tuning: Mutex::new(Tuning { prefill, decode, pass: None }) })
    }
    /// The pool itself.
    pub const fn pool(&self) -> &Pool {
        &self.pool
    }
    /// What the system granted at the start.
    pub const fn granted(&self) -> &Granted {
        &self.granted
    }
    /// How many threads passes of several tokens have now, and why.
    pub fn prefill(&self) -> Choice {
        self.tuning().prefill.choice()
    }
    /// How many threads passes of one token have now, and why.
    pub fn decode(&self) -> Choice {
        self.tuning().decode.choice()
    }
    fn tuning(&self) -> MutexGuard<'_, Tuning> {
        self.tuning.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Parallel for Tuned {
    fn threads(&self) -> usize {
        self.pool.threads()
    }
    fn for_each_chunk(&self, data: &mut [f32], chunk: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        self.pool.for_each_chunk(data, chunk, f);
    }
    fn begin(&self, tokens: usize) {
        let mut tuning = self.tuning();
        self.pool.set_threads(tuning.of(tokens).next());
        tuning.pass = Some((tokens, Instant::now()));
    }
    fn end(&self) {
        let mut tuning = self.tuning();
        if let Some((tokens, start)) = tuning.pass.take() {
            tuning.of(tokens).record(tokens, start.elapsed());
        }
    }
}

/// How many threads passes of a kind have, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Threads, the caller's included.
    pub threads: usize,
    /// Whether no other number will be tried.
    pub settled: bool,
    /// The numbers that were compared, each with its best time of a pass. Empty if there was nothing to choose.
    pub compared: Vec<(usize, Duration)>,
}

impl fmt::Display for Choice {
    /// `2 threads (52.100 ms a pass, 98.000 with 1)`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { threads, settled, compared } = self;
        write!(f, "{threads} thread{}", if *threads == 1 { "" } else { "s" })?;
        let mut before = " (";
        let own = compared.iter().filter(|(n, _)| n == threads);
        for (n, time) in own.chain(compared.iter().filter(|(n, _)| n != threads)) {
            let ms = time.as_secs_f64() * 1e3;
            if n == threads {
                write!(f, "{before}{ms:.3} ms a pass")?
            } else {
                write!(f, "{before}{ms:.3} with {n}")?
            }
            before = ", ";
        }
        match (compared.is_empty(), settled) {
            (true, true) => write!(f, " (fixed)"),
            (true, false) => write!(f, " (nothing to compare yet)"),
            (false, true) => write!(f, ")"),
            (false, false) => write!(f, "; more passes are needed to compare)"),
        }
    }
}

/// Chooses the number of threads of one kind of pass.
#[derive(Debug)]
struct Tuner {
    /// From the most to the fewest threads.
    candidates: Vec<Candidate>,
    /// Which one the running pass has.
    current: usize,
    /// Which one is the fastest so far, or was chosen.
    leader: usize,
    /// The most tokens that a pass had. Passes of fewer, such as the last of a prompt, are not compared with those.
    tokens: usize,
    /// Passes of so many tokens.
    passes: u32,
    /// Time spent in trials.
    tried: Duration,
    settled: bool,
}

#[derive(Debug)]
struct Candidate {
    threads: usize,
    best: Option<Duration>,
    trials: u32,
    out: bool,
}

impl Tuner {
    /// One pass in so many is a trial.
    const EVERY: u32 = 8;
    /// Trials of one candidate.
    const TRIALS: u32 = 3;
    /// Time for all trials together.
    const TIME: Duration = Duration::from_secs(1);
    /// A candidate that takes 5/4 of the leader's time is out at once.
    const HOPELESS: (u32, u32) = (5, 4);
    /// Fewer threads are preferred to a gain of less than 1/50: their cores can sleep, or serve others.
    const PREFERENCE: u32 = 50;

    fn fixed(threads: usize) -> Self {
        Self::among([threads])
    }

    /// From `max` downwards: every number up to four, doublings above.
    fn auto(max: usize) -> Self {
        let next = |&n: &usize| if n > 4 { Some((n / 2).max(4)) } else { Some(n - 1).filter(|&n| n > 0) };
        Self::among(core::iter::successors(Some(max), next))
    }

    fn among(threads: impl IntoIterator<Item = usize>) -> Self {
        let new = |threads| Candidate { threads, best: None, trials: 0, out: false };
        let candidates: Vec<_> = threads.into_iter().map(new).collect();
        let settled = candidates.len() == 1;
        Self { candidates, current: 0, leader: 0, tokens: 0, passes: 0, tried: Duration::ZERO, settled }
    }

    /// The most threads that can be asked for.
    fn threads(&self) -> usize {
        self.candidates[0].threads
    }

    /// How many threads the pass that begins is to have.
    fn next(&mut self) -> usize {
        let trial = !self.settled && self.passes % Self::EVERY == Self::EVERY - 1;
        self.current = if trial { self.open().unwrap_or(self.leader) } else { self.leader };
        self.candidates[self.current].threads
    }

    /// The candidate that is to be tried next, if any.
    fn open(&self) -> Option<usize> {
        let open = |&i: &usize| {
            let c = &self.candidates[i];
            i != self.leader && !c.out && c.trials < Self::TRIALS
        };
        (0..self.candidates.len()).filter(open).min_by_key(|&i| self.candidates[i].trials)
    }

    /// The pass took so long.
    fn record(&mut self, tokens: usize, elapsed: Duration) {
        if self.settled || tokens < self.tokens {
            return;
        }
        if tokens > self.tokens {
            // What is known was about smaller passes.
            let threads: Vec<_> = self.candidates.iter().map(|c| c.threads).collect();
            *self = Self { tokens, tried: self.tried, ..Self::among(threads) };
        }
        self.passes += 1;
        if self.passes == 1 {
            // The first one fetches pages and code.
            return;
        }
        let candidate = &mut self.candidates[self.current];
        candidate.best = Some(candidate.best.map_or(elapsed, |best| best.min(elapsed)));
        if self.current != self.leader {
            candidate.trials += 1;
            self.tried += elapsed;
            self.compare(elapsed);
        }
        if self.open().is_none() || self.tried > Self::TIME {
            self.settle();
        }
    }

    /// Drops what is hopeless after a trial, and finds the leader.
    fn compare(&mut self, elapsed: Duration) {
        let best = self.candidates[self.leader].best.unwrap_or(Duration::MAX);
        let (more, less) = Self::HOPELESS;
        if elapsed > best.saturating_mul(more) / less {
            // Beyond it on the same side nothing is better: fewer cores compute less, more wait for the same memory.
            let (current, leader) = (self.current, self.leader);
            let beyond = |i: usize| if current > leader { i >= current } else { i <= current };
            self.candidates.iter_mut().enumerate().filter(|(i, _)| beyond(*i)).for_each(|(_, c)| c.out = true);
        } else if elapsed < best {
            self.leader = self.current;
        }
    }

    fn settle(&mut self) {
        self.settled = true;
        let mut times = self.candidates.iter().map(|c| c.best.unwrap_or(Duration::MAX));
        let fastest = times.clone().min().unwrap_or(Duration::MAX);
        let enough = fastest.saturating_add(fastest / Self::PREFERENCE);
        self.leader = times.rposition(|time| time <= enough).unwrap_or(self.leader);
    }

    fn choice(&self) -> Choice {
        let compared = self.candidates.iter().filter_map(|c| Some((c.threads, c.best?))).collect();
        Choice { threads: self.candidates[self.leader].threads, settled: self.settled, compared }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The choice after `passes`, of which one with `n` threads takes `times[n - 1]` microseconds, the time in all, and the
    /// numbers of threads that were used.
    fn tune(times: &[u64], passes: usize) -> (Choice, u64, Vec<usize>) {
        let mut tuner = Tuner::auto(times.len());
        let used: Vec<usize> = (0..passes)
            .map(|_| {
                let n = tuner.next();
                tuner.record(1, Duration::from_micros(times[n - 1]));
                n
            })
            .collect();
        (tuner.choice(), used.iter().map(|n| times[n - 1]).sum(), used)
    }

    #[test]
    fn the_fastest_number_is_found_and_fewer_threads_if_they_do_as_well() {
        for (times, expected) in [
            (&[900, 500, 400, 300][..], 4),
            // Two cores saturate the memory.
            (&[900, 500, 498, 499], 2),
            // Threads cost more than they give.
            (&[100, 110, 120, 140], 1),
            (&[100, 200, 300, 400], 1),
            (&[900, 500, 400, 600], 3),
            (&[5], 1),
        ] {
            let (choice, _, _) = tune(times, 200);
            assert_eq!((choice.threads, choice.settled), (expected, true), "{times:?}: {choice}");
        }
    }

    #[test]
    fn short_runs_are_not_slowed_and_long_ones_by_a_second_at_most() {
        let slow = [80_000, 40_000, 30_000, 25_000];
        let (choice, _, used) = tune(&slow, 7);
        assert!(!choice.settled && used.iter().all(|&n| n == 4), "{used:?}");
        for unit in [1, 1_000] {
            let times = slow.map(|time| time * unit / 10);
            let (choice, total, _) = tune(&times, 1000);
            assert_eq!(choice.threads, 4);
            let lost = total - 1000 * times[3];
            assert!(lost <= 1_000_000 + times[0], "{lost} microseconds lost");
        }
    }

    #[test]
    fn the_last_pass_of_a_prompt_proves_nothing() {
        let mut tuner = Tuner::auto(2);
        for i in 0..400 {
            let n = tuner.next();
            let (tokens, time) = if i % 2 == 0 { (8, [200, 100][n - 1]) } else { (3, 1) };
            tuner.record(tokens, Duration::from_micros(time));
        }
        assert_eq!(tuner.choice().compared, [(2, Duration::from_micros(100)), (1, Duration::from_micros(200))]);
        // Times of larger passes replace those of smaller ones.
        let mut tuner = Tuner::auto(2);
        for (tokens, time) in [(2, 10), (2, 10), (8, 40), (8, 39)] {
            tuner.next();
            tuner.record(tokens, Duration::from_micros(time));
        }
        assert_eq!(tuner.choice().compared, [(2, Duration::from_micros(39))]);
    }

    #[test]
    fn a_choice_says_why() {
        let text = |threads, settled, compared: &[(usize, u64)]| {
            let compared = compared.iter().map(|&(n, us)| (n, Duration::from_micros(us))).collect();
            alloc::string::ToString::to_string(&Choice { threads, settled, compared })
        };
        assert_eq!(text(2, true, &[]), "2 threads (fixed)");
        assert_eq!(text(1, true, &[(2, 1500), (1, 500)]), "1 thread (0.500 ms a pass, 1.500 with 2)");
        assert_eq!(text(4, false, &[]), "4 threads (nothing to compare yet)");
    }

    #[test]
    fn kinds_of_passes_have_threads_of_their_own() {
        let tuned = Tuned::new(Threads::Fixed(3), Threads::Fixed(2), false).unwrap();
        for (tokens, expected) in [(8, 3), (1, 2), (2, 3)] {
            tuned.begin(tokens);
            assert_eq!(tuned.threads(), expected);
            tuned.end();
        }
        assert_eq!(tuned.prefill().threads, 3);
        assert!(tuned.decode().settled);
    }
}
