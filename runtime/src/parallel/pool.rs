//! The thread pool: the only file of it with unsafe code.
//!
//! A job is opened, workers that are awake join it, all take chunks from one counter, and the caller closes it when the
//! counter has run out and waits for those who joined. Nobody waits for a worker that sleeps or that the system has given no
//! core: it finds the job closed. So a job costs the others nothing but one exchange each, and allocates nothing.
//!
//! Against rayon, on two cores that other work kept busy the whole time, so that these figures say little about a machine
//! with free cores: an empty job took 0.06 microseconds and rayon 0.14, by the caller alone in either. A token of a 2B model
//! took 69 ms and rayon 78, but one thread 71 and pinned threads 93 (best tenth of 36 of each, taken in turn): within the
//! noise. What decided is that rayon allocates now and then and this does not. `cargo bench -p bitnet-tests --bench dispatch`
//! measures this pool.
//!
//! Tried and lost: a spin that does not offer the core to others. A worker that was woken on its caller's core kept it from
//! its caller: 105 microseconds for an empty job after a pause of 300, and 5 with the offer.
use super::{Parallel, Serial, cpus};
use alloc::boxed::Box;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::hint::spin_loop;
use core::panic::AssertUnwindSafe;
use core::ptr;
use core::slice;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize};
use core::time::Duration;
use std::io;
use std::panic::{catch_unwind, resume_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::Instant;

/// Threads that share the work of passes: the caller's own, and workers that sleep between jobs.
///
/// A job inside a job, or one of a second caller at the same time, is done by its caller alone. A job that panics panics in
/// its caller once all threads have left it.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Where the caller of [`Pool::enter`] runs, if threads are pinned.
    home: Option<usize>,
    /// A caller has a job.
    taken: AtomicBool,
    /// The caller's, for the last workers to leave.
    patience: Patience,
}

/// What the workers and the caller see.
#[derive(Debug)]
struct Shared {
    /// [`ACTIVE`], [`OPEN`], [`WAITING`], [`STOP`], and above them the number of jobs so far.
    state: AtomicU64,
    /// The job, on its caller's stack: valid while it is open or anyone is active.
    work: AtomicPtr<Work<'static>>,
    /// Threads that may take part, the caller's included.
    width: AtomicUsize,
    /// Whether each worker sleeps or is about to.
    asleep: Box<[Asleep]>,
    /// Who waits for the last active worker.
    caller: Mutex<Option<Thread>>,
    /// What the first worker to panic panicked with.
    panic: Mutex<Option<Payload>>,
    /// Workers that have begun their lives.
    started: AtomicUsize,
    /// Whether every thread can have a core of its own, without which spinning would take one from the others.
    spins: bool,
}

/// Alone in its cache line, and in the neighbour that is fetched with it.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Asleep(AtomicBool);

type Payload = Box<dyn Any + Send>;

/// Workers that have joined the job and not left it.
const ACTIVE: u64 = 0xffff;
/// Workers may join the job.
const OPEN: u64 = 1 << 16;
/// The caller sleeps until the last worker leaves.
const WAITING: u64 = 1 << 17;
/// The pool ends.
const STOP: u64 = 1 << 18;
/// One job.
const JOB: u64 = 1 << 19;

impl Pool {
    /// The most threads of a pool.
    pub const THREADS_MAX: usize = 1024;

    /// Starts what `threads` threads need, at least one and at most [`Pool::THREADS_MAX`]: one worker fewer, for the caller
    /// is one of them. The system chooses their cores.
    ///
    /// # Errors
    /// If the system starts no more threads.
    pub fn new(threads: usize) -> io::Result<Self> {
        Self::start(threads, |_| Ok(()))
    }

    /// The same with every thread on a core of its own, in the order of `cores`, which begins anew if there are fewer. The
    /// caller's thread is on the first while it is in [`Pool::enter`].
    ///
    /// # Errors
    /// If the system starts no more threads, or a core may not be used or none is given.
    pub fn pinned(threads: usize, cores: &[usize]) -> io::Result<Self> {
        let home = *cores.first().ok_or(io::ErrorKind::InvalidInput)?;
        // A thread starts on the cores of the one that starts it.
        let restore = Restore(cpus::affinity()?);
        let mut pool = Self::start(threads, |i| cpus::set_affinity(&[cores[i % cores.len()]]))?;
        drop(restore);
        pool.home = Some(home);
        Ok(pool)
    }

    fn start(threads: usize, mut before: impl FnMut(usize) -> io::Result<()>) -> io::Result<Self> {
        let threads = threads.clamp(1, Self::THREADS_MAX);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            work: AtomicPtr::new(ptr::null_mut()),
            width: AtomicUsize::new(threads),
            asleep: (1..threads).map(|_| Asleep::default()).collect(),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
            started: AtomicUsize::new(0),
            spins: threads <= cpus::available(),
        });
        let (workers, taken) = (Vec::with_capacity(threads - 1), AtomicBool::new(false));
        // Dropped on an error, so that the workers which did start end.
        let mut pool = Self { shared, workers, home: None, taken, patience: Patience::default() };
        for i in 1..threads {
            before(i)?;
            let shared = Arc::clone(&pool.shared);
            let builder = thread::Builder::new().name(format!("bitnet-{i}"));
            pool.workers.push(builder.spawn(move || shared.work(i))?);
        }
        // A thread allocates while it starts, which must not happen in the middle of a token.
        while pool.shared.started.load(SeqCst) < threads - 1 {
            thread::yield_now();
        }
        Ok(pool)
    }

    /// The threads there are, the caller's included.
    pub fn threads_max(&self) -> usize {
        self.workers.len() + 1
    }

    /// Lets `threads` take part from the next job on, at least one and at most [`Pool::threads_max`]; the others sleep.
    pub fn set_threads(&self, threads: usize) {
        self.shared.width.store(threads.clamp(1, self.threads_max()), SeqCst);
    }

    /// Runs `f` on the caller's thread as the first of the pool's: on its core, if they are pinned.
    pub fn enter<R>(&self, f: impl FnOnce() -> R) -> R {
        let restore = self.home.and_then(|home| {
            let before = cpus::affinity().ok()?;
            // The pool was started on these cores. If one has been taken away since, then the system chooses.
            cpus::set_affinity(&[home]).ok().map(|()| Restore(before))
        });
        let result = f();
        drop(restore);
        result
    }
}

/// The cores that a thread has again when this is dropped.
#[derive(Debug)]
struct Restore(Vec<usize>);

impl Drop for Restore {
    fn drop(&mut self) {
        // Cores that have been taken away since are no longer ours to use; nothing else can fail.
        let _ = cpus::set_affinity(&self.0);
    }
}

impl Parallel for Pool {
    fn threads(&self) -> usize {
        self.shared.width.load(Relaxed)
    }

    fn for_each_chunk(&self, data: &mut [f32], chunk: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let helpers = data.len().div_ceil(chunk).min(self.threads()).saturating_sub(1);
        if helpers == 0 || self.taken.swap(true, Acquire) {
            return Serial.for_each_chunk(data, chunk, f);
        }
        let work = Work { data: data.as_mut_ptr(), len: data.len(), chunk, next: AtomicUsize::new(0), f };
        let result = self.share(&work, helpers);
        self.taken.store(false, Release);
        if let Err(payload) = result {
            resume_unwind(payload);
        }
    }
}

impl Pool {
    /// Has the workers and the caller do `work`, and returns when all have left it.
    fn share(&self, work: &Work<'_>, helpers: usize) -> Result<(), Payload> {
        let shared = &*self.shared;
        shared.work.store(ptr::from_ref(work).cast::<Work<'static>>().cast_mut(), Relaxed);
        shared.state.fetch_add(JOB + OPEN, SeqCst);
        for (worker, asleep) in self.workers.iter().zip(&shared.asleep).take(helpers) {
            if asleep.0.load(SeqCst) && asleep.0.swap(false, SeqCst) {
                worker.thread().unpark();
            }
        }
        let mine = work.run();
        let state = shared.state.fetch_and(!OPEN, AcqRel);
        let all_left = || shared.state.load(Acquire) & ACTIVE == 0;
        if state & ACTIVE != 0 && !self.patience.spin(shared.spins, all_left) {
            *lock(&shared.caller) = Some(thread::current());
            shared.state.fetch_or(WAITING, AcqRel);
            while !all_left() {
                thread::park();
            }
            shared.state.fetch_and(!WAITING, AcqRel);
        }
        mine.and(lock(&shared.panic).take().map_or(Ok(()), Err))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.fetch_or(STOP, SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches what jobs panic with.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The life of worker `i`, the first being 1.
    fn work(&self, i: usize) {
        self.started.fetch_add(1, SeqCst);
        let patience = Patience::default();
        let asleep = &self.asleep[i - 1].0;
        let mut seen = 0;
        loop {
            let news = || self.news(i, seen);
            if !patience.spin(self.spins, news) {
                loop {
                    asleep.store(true, SeqCst);
                    // Whoever opens a job or stops the pool after this look sees that we sleep, and wakes us.
                    if news() {
                        break;
                    }
                    thread::park();
                }
                asleep.store(false, Relaxed);
            }
            let mut state = self.state.load(Relaxed);
            if state & STOP != 0 {
                return;
            }
            while state & OPEN != 0 {
                match self.state.compare_exchange_weak(state, state + 1, Acquire, Relaxed) {
                    Ok(_) => {
                        self.take_part();
                        break;
                    }
                    Err(now) => state = now,
                }
            }
            seen = state / JOB;
        }
    }

    /// Whether worker `i` has something to do that it has not `seen`.
    fn news(&self, i: usize, seen: u64) -> bool {
        let state = self.state.load(SeqCst);
        state & STOP != 0 || (state / JOB != seen && i < self.width.load(SeqCst))
    }

    /// Does its share of the job that this worker has joined, and leaves it.
    fn take_part(&self) {
        // SAFETY: the pointer was stored before the job was opened, and this worker joined while it was open. The caller of
        // `share` borrows what is pointed at, and neither returns nor unwinds before every worker that joined has left,
        // which is the exchange below.
        let work: &Work<'_> = unsafe { &*self.work.load(Relaxed) };
        if let Err(payload) = work.run() {
            lock(&self.panic).get_or_insert(payload);
        }
        let state = self.state.fetch_sub(1, AcqRel);
        if state & WAITING != 0 && state & ACTIVE == 1 {
            // It was written before the flag was set. The caller may be gone by now, which does no harm to a pool's own lock.
            if let Some(caller) = &*lock(&self.caller) {
                caller.unpark();
            }
        }
    }
}

/// Nothing panics while it holds one of the locks here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A job: a slice in chunks, each for one thread.
struct Work<'a> {
    data: *mut f32,
    len: usize,
    chunk: usize,
    /// The first chunk that nobody has.
    next: AtomicUsize,
    f: &'a (dyn Fn(usize, &mut [f32]) + Sync),
}

impl Work<'_> {
    /// Does chunks until there are none left. After a panic there are none.
    fn run(&self) -> Result<(), Payload> {
        let chunks = self.len.div_ceil(self.chunk);
        catch_unwind(AssertUnwindSafe(|| {
            loop {
                let i = self.next.fetch_add(1, Relaxed);
                if i >= chunks {
                    return;
                }
                let first = i * self.chunk;
                let len = self.chunk.min(self.len - first);
                // SAFETY: `data` and `len` are those of a slice that the caller of the job borrows mutably until all have
                // left it. The counter gives each `i` to one thread, so nobody else has a reference into this chunk.
                let chunk = unsafe { slice::from_raw_parts_mut(self.data.add(first), len) };
                (self.f)(i, chunk);
            }
        }))
        .inspect_err(|_| self.next.store(chunks, Relaxed))
    }
}

/// Spinning for what is expected within microseconds, as long as nobody else needs the core.
#[derive(Debug, Default)]
struct Patience {
    /// Waits that are to come without spinning.
    rest: AtomicU32,
}

impl Patience {
    /// The longest spin: an estimate of what the caller does alone between two jobs of a pass, not yet tuned by measurement.
    const SPIN: Duration = Duration::from_micros(100);
    /// Looks before the core is offered to others, about a microsecond's worth.
    const LOOKS: u32 = 32;
    /// A core that was away for so long has other work to do.
    const AWAY: Duration = Duration::from_micros(500);
    /// Waits without spinning after that.
    const REST: u32 = 256;

    /// Waits a little for `done`, and returns whether it is. If not, it is time to sleep.
    fn spin(&self, spins: bool, done: impl Fn() -> bool) -> bool {
        if done() {
            return true;
        }
        let rest = self.rest.load(Relaxed);
        if !spins || rest > 0 {
            self.rest.store(rest.saturating_sub(1), Relaxed);
            return false;
        }
        let start = Instant::now();
        let mut before = start;
        loop {
            for _ in 0..Self::LOOKS {
                if done() {
                    return true;
                }
                spin_loop();
            }
            // A worker that was just woken can be on the core of the caller who woke it.
            thread::yield_now();
            let now = Instant::now();
            if now - before > Self::AWAY {
                self.rest.store(Self::REST, Relaxed);
                return done();
            }
            if now - start > Self::SPIN {
                return done();
            }
            before = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use std::collections::HashSet;

    const LONG: Duration = Duration::from_secs(20);

    /// Waits for what another thread does; if it never does, that is the failure.
    fn wait(done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < LONG, "another thread never came");
            thread::yield_now();
        }
    }

    /// Every element is visited once, by the function of this job alone, whoever sleeps, spins or comes late.
    #[test]
    fn every_chunk_is_done_once() {
        for threads in [1, 2, 3, 9] {
            let pool = Pool::new(threads).unwrap();
            let mut data = vec![0.0; 1000];
            for job in 0..4000_usize {
                pool.set_threads(1 + job / 7 % threads);
                let (len, chunk) = (job * 37 % 1001, 1 + job % 129);
                let data = &mut data[..len];
                data.fill(job as f32);
                pool.for_each_chunk(data, chunk, &|i, chunk_data| {
                    for (k, x) in chunk_data.iter_mut().enumerate() {
                        *x += (i * chunk + k) as f32;
                    }
                });
                assert!(data.iter().enumerate().all(|(k, &x)| x == (job + k) as f32), "job {job}, {threads} threads");
                if job % 1000 == 0 {
                    // Long enough for all workers to fall asleep.
                    thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    /// A job that is not over before all threads have come.
    fn all_come(pool: &Pool, threads: usize) -> HashSet<Vec<usize>> {
        let (come, cores) = (AtomicUsize::new(0), Mutex::new(HashSet::new()));
        pool.for_each_chunk(&mut vec![0.0; threads], 1, &|_, _| {
            cores.lock().unwrap().insert(cpus::affinity().unwrap_or_default());
            come.fetch_add(1, SeqCst);
            wait(|| come.load(SeqCst) == threads);
        });
        cores.into_inner().unwrap()
    }

    #[test]
    fn all_threads_take_part_that_may() {
        let pool = Pool::new(4).unwrap();
        for threads in [4, 2, 3, 1, 4] {
            pool.set_threads(threads);
            assert_eq!(pool.threads(), threads);
            all_come(&pool, threads);
        }
        assert_eq!(Pool::new(0).unwrap().threads_max(), 1);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn pinned_threads_have_cores_of_their_own_and_the_caller_gets_its_own_back() {
        let before = cpus::affinity().unwrap();
        let pool = Pool::pinned(before.len(), &before).unwrap();
        assert_eq!(cpus::affinity().unwrap(), before);
        let cores = pool.enter(|| all_come(&pool, before.len()));
        assert_eq!(cores, before.iter().map(|&core| vec![core]).collect());
        assert_eq!(cpus::affinity().unwrap(), before);
        assert!(Pool::pinned(2, &[]).is_err());
        assert!(Pool::pinned(2, &[usize::MAX]).is_err());
        assert_eq!(cpus::affinity().unwrap(), before);
    }

    /// The caller waits for a worker that is slow, asleep if need be.
    #[test]
    fn a_slow_worker_is_waited_for() {
        let pool = Pool::new(2).unwrap();
        for _ in 0..20 {
            let (caller, come) = (thread::current().id(), AtomicBool::new(false));
            let mut data = [0.0; 2];
            pool.for_each_chunk(&mut data, 1, &|_, x| {
                if thread::current().id() == caller {
                    wait(|| come.load(SeqCst));
                } else {
                    come.store(true, SeqCst);
                    thread::sleep(Duration::from_millis(3));
                }
                x[0] = 1.0;
            });
            assert_eq!(data, [1.0; 2]);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3).unwrap();
        let caller = thread::current().id();
        for by_caller in [true, false, true, false] {
            let panicked = AtomicBool::new(false);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.for_each_chunk(&mut [0.0; 64], 1, &|_, _| {
                    if (thread::current().id() == caller) == by_caller {
                        panicked.store(true, SeqCst);
                        resume_unwind(Box::new("seeded"));
                    }
                    wait(|| panicked.load(SeqCst));
                });
            }));
            assert_eq!(result.unwrap_err().downcast_ref(), Some(&"seeded"));
            all_come(&pool, 3);
        }
    }

    #[test]
    fn jobs_inside_jobs_and_of_two_callers_are_done() {
        let pool = Pool::new(2).unwrap();
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let mut data = [1.0; 8];
                        pool.for_each_chunk(&mut data, 2, &|_, outer| {
                            pool.for_each_chunk(outer, 1, &|i, inner| inner[0] += i as f32);
                        });
                        assert_eq!(data, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
                    }
                });
            }
        });
    }

    #[test]
    fn a_core_that_was_away_is_left_to_others() {
        let patience = Patience::default();
        assert!(!patience.spin(true, || {
            thread::sleep(2 * Patience::AWAY);
            false
        }));
        assert_eq!(patience.rest.load(Relaxed), Patience::REST);
        let start = Instant::now();
        for _ in 0..Patience::REST {
            assert!(!patience.spin(true, || false));
        }
        assert_eq!(patience.rest.load(Relaxed), 0);
        assert!(start.elapsed() < Patience::SPIN * Patience::REST / 2, "it spun");
        assert!(patience.spin(false, || true));
    }
}
