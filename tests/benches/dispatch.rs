//! What it costs to share a job out: `cargo bench -p bitnet-tests --bench dispatch [-- THREADS]`.
//!
//! Eight chunks a job, as a pass cuts them for two threads; the caller is busy alone for a while between two jobs, as in a
//! pass. The median and the best tenth, in microseconds. With work in the chunks, the time of all chunks one after another
//! is the bound above, and that divided by the threads the bound below.
use bitnet_runtime::parallel::{Parallel, Pool, Serial, cpus};
use std::time::{Duration, Instant};

const CHUNKS: usize = 8;
const JOBS: usize = 2000;
/// Microseconds alone between jobs, and in each chunk.
const CASES: [(u64, u64); 6] = [(0, 0), (10, 0), (300, 0), (10, 20), (40, 20), (300, 20)];

fn main() {
    let threads = std::env::args().skip(1).filter(|a| !a.starts_with('-')).find_map(|a| a.parse().ok()).unwrap_or(2);
    let pool = Pool::new(threads).expect("threads");
    let cores = cpus::by_worth(&cpus::Granted::now().cores);
    let pinned = Pool::pinned(threads, &cores).expect("threads on cores of their own");
    println!("{threads} threads; microseconds a job, median (best tenth)");
    println!("{:>8} {:>8} {:>20} {:>20} {:>20}", "alone", "a chunk", "serial", "pool", "pinned");
    for (alone, chunk) in CASES {
        let measure = |parallel| measure(parallel, alone, chunk);
        let times = [measure(&Serial), measure(&pool), pinned.enter(|| measure(&pinned))];
        let [serial, pool, pinned] = times.map(|(median, tenth)| format!("{median:.2} ({tenth:.2})"));
        println!("{alone:>8} {chunk:>8} {serial:>20} {pool:>20} {pinned:>20}");
    }
}

fn measure(parallel: &dyn Parallel, alone: u64, chunk: u64) -> (f64, f64) {
    let mut data = [0.0; CHUNKS];
    let mut times: Vec<f64> = (0..JOBS)
        .map(|_| {
            busy(alone);
            let start = Instant::now();
            parallel.for_each_chunk(&mut data, 1, &|_, x| {
                busy(chunk);
                x[0] += 1.0;
            });
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    assert_eq!(data, [JOBS as f32; CHUNKS]);
    times.sort_by(f64::total_cmp);
    (times[JOBS / 2], times[JOBS / 10])
}

fn busy(microseconds: u64) {
    let (start, time) = (Instant::now(), Duration::from_micros(microseconds));
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}
