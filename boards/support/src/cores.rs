//! The other cores, and how they share a pass.
//!
//! A job is opened, cores that see it join, all take chunks from one counter, and the caller closes it when the counter has run
//! out and waits for those that joined. Nobody waits for a core that the emulator or a hypervisor has not let run. It is the way
//! of `bitnet_runtime::parallel::Pool`, whose threads, sleep and panics have no place here.
use crate::exit;
use aarch64_cpu::asm::{sev, wfe};
use aarch64_cpu::registers::{MPIDR_EL1, Readable, TPIDR_EL1};
use bitnet_runtime::parallel::{Parallel, Serial};
use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use smccc::{Hvc, Smc, psci};

/// Most cores that are used, the first included: there is a stack for each.
pub const CORES_MAX: usize = 4;

unsafe extern "C" {
    /// In `start.s`.
    fn start_secondary();
}

/// How firmware is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduit {
    /// Firmware is at EL2: the image was started at EL1.
    Hvc,
    /// Firmware is at EL3: the image was started at EL2.
    Smc,
}

/// Cores that are awake and wait for jobs: all that there are to the program.
#[derive(Debug)]
pub struct Cores {
    /// The caller's included.
    count: usize,
}

/// One call of [`Parallel::for_each_chunk`].
#[derive(Clone, Copy)]
struct Job {
    data: *mut f32,
    len: usize,
    chunk: usize,
    work: *const (dyn Fn(usize, &mut [f32]) + Sync),
}

struct Shared {
    /// Number of jobs so far, [`OPEN`], and below it the number of cores in the job.
    state: AtomicUsize,
    /// The next chunk.
    next: AtomicUsize,
    /// Cores that wait for jobs, the first not included.
    awake: AtomicUsize,
    job: UnsafeCell<MaybeUninit<Job>>,
}

const OPEN: usize = 1 << 8;
const ONE_JOB: usize = 1 << 9;
const ACTIVE: usize = OPEN - 1;

// SAFETY: the job is written by the one caller while the state is not open and no core is active, and read by cores that have
// counted themselves active while it was open.
unsafe impl Sync for Shared {}

static SHARED: Shared = Shared {
    state: AtomicUsize::new(0),
    next: AtomicUsize::new(0),
    awake: AtomicUsize::new(0),
    job: UnsafeCell::new(MaybeUninit::uninit()),
};

impl Cores {
    /// Wakes as many cores as there are, up to `most` and [`CORES_MAX`], each of which has five seconds to appear. `place` says the
    /// address of core `i`: its affinity as in `MPIDR_EL1`.
    pub fn wake(conduit: Option<Conduit>, most: usize, place: fn(usize) -> u64) -> Self {
        let mut count = 1;
        while let Some(conduit) = conduit
            && count < most.min(CORES_MAX)
        {
            let entry = (start_secondary as *const ()).addr() as u64;
            let started = match conduit {
                Conduit::Hvc => psci::cpu_on::<Hvc>(place(count), entry, count as u64),
                Conduit::Smc => psci::cpu_on::<Smc>(place(count), entry, count as u64),
            };
            if started.is_err() {
                break;
            }
            let patience = crate::time::micros() + 5_000_000;
            while SHARED.awake.load(Acquire) < count {
                if crate::time::micros() > patience {
                    // It may come any time now and use its stack and its slot: not a machine to go on with.
                    defmt::error!("core {=usize} was started and did not appear", count);
                    exit::with(exit::FAILURE);
                }
            }
            count += 1;
        }
        Self { count }
    }
}

/// What a further core does, for ever.
pub(crate) extern "C" fn worker(_core: usize) -> ! {
    SHARED.awake.fetch_add(1, Release);
    let mut done = 0;
    loop {
        let state = SHARED.state.load(Acquire);
        if state & OPEN == 0 || state / ONE_JOB == done {
            wfe();
            continue;
        }
        if SHARED.state.compare_exchange(state, state + 1, AcqRel, Relaxed).is_ok() {
            done = state / ONE_JOB;
            // SAFETY: this core is active in a job that was open.
            let job = unsafe { (*SHARED.job.get()).assume_init() };
            job.take_part();
            SHARED.state.fetch_sub(1, Release);
            sev();
        }
    }
}

impl Job {
    /// Takes chunks until there are none.
    fn take_part(&self) {
        let chunks = self.len.div_ceil(self.chunk);
        loop {
            let i = SHARED.next.fetch_add(1, Relaxed);
            if i >= chunks {
                return;
            }
            let start = i * self.chunk;
            let len = self.chunk.min(self.len - start);
            // SAFETY: the caller of the job lends the data and the closure until no core is active, and each chunk is one
            // core's, whose number the counter gave out once.
            unsafe { (*self.work)(i, core::slice::from_raw_parts_mut(self.data.add(start), len)) }
        }
    }
}

impl Parallel for Cores {
    fn threads(&self) -> usize {
        self.count
    }

    fn for_each_chunk(&self, data: &mut [f32], chunk: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        // One job at a time, and a job of one chunk needs no one.
        let state = SHARED.state.load(Acquire);
        if self.count == 1 || data.len() <= chunk || state & (OPEN | ACTIVE) != 0 || core_number() != 0 {
            return Serial.for_each_chunk(data, chunk, f);
        }
        // SAFETY: only the lifetime changes. The job is over when this function returns, or the machine stops.
        let work = unsafe {
            core::mem::transmute::<&(dyn Fn(usize, &mut [f32]) + Sync), *const (dyn Fn(usize, &mut [f32]) + Sync)>(f)
        };
        let job = Job { data: data.as_mut_ptr(), len: data.len(), chunk, work };
        // SAFETY: no job is open, no core is active, and the first core alone opens jobs.
        unsafe { (*SHARED.job.get()).write(job) };
        SHARED.next.store(0, Relaxed);
        SHARED.state.store(state + ONE_JOB + OPEN, Release);
        sev();
        job.take_part();
        SHARED.state.fetch_and(!OPEN, AcqRel);
        while SHARED.state.load(Acquire) & ACTIVE != 0 {
            core::hint::spin_loop();
        }
    }
}

/// This core's number, where `start.s` has put it.
fn core_number() -> usize {
    TPIDR_EL1.get() as usize
}

/// The affinity of core `i` where cores are numbered by the lowest part, as on QEMU's machines.
pub fn by_first_part(i: usize) -> u64 {
    i as u64
}

/// The affinity of core `i` where cores are numbered by the second part, as the Cortex-A76 does.
pub fn by_second_part(i: usize) -> u64 {
    (i as u64) << 8
}

/// The numbering that this CPU uses: bit 24 of `MPIDR_EL1` says that the lowest part numbers threads of a core.
pub fn numbering() -> fn(usize) -> u64 {
    if MPIDR_EL1.get() >> 24 & 1 == 1 { by_second_part } else { by_first_part }
}

/// The owner of the critical section, and one more than its number; 0 is nobody.
static OWNER: AtomicUsize = AtomicUsize::new(0);

struct Section;
critical_section::set_impl!(Section);

// SAFETY: the section is one core's from acquire to release, and no interrupt is ever on.
unsafe impl critical_section::Impl for Section {
    unsafe fn acquire() -> critical_section::RawRestoreState {
        let me = core_number() + 1;
        if OWNER.load(Relaxed) == me {
            return true;
        }
        while OWNER.compare_exchange_weak(0, me, Acquire, Relaxed).is_err() {
            core::hint::spin_loop();
        }
        false
    }
    unsafe fn release(nested: critical_section::RawRestoreState) {
        if !nested {
            OWNER.store(0, Release);
        }
    }
}

/// Takes the critical section from whoever has it, for the last words of a machine that ends.
pub(crate) fn break_lock() {
    OWNER.store(0, Release);
}
