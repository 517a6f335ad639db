//! What the operating system and the CPU say about this process.
use bitnet_runtime::parallel::{Parallel, Pool};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// The most memory this process has had at one time, in bytes, where the system tells.
pub fn peak_rss() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// The memory this process has that no file backs, in bytes, where the system tells.
pub fn anonymous_rss() -> Option<u64> {
    status_bytes("RssAnon:")
}

/// The memory that this process has now, in bytes, where the system tells.
pub fn rss() -> Option<u64> {
    status_bytes("VmRSS:")
}

/// A field in kilobytes of what the system says of this process.
fn status_bytes(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Bytes a second that `threads` threads of `pool` read from memory, the best of several passes over more than the caches
/// hold.
pub fn read_bandwidth(pool: &Pool, threads: usize) -> f64 {
    const BYTES: usize = 256 << 20;
    const PASSES: usize = 5;
    let mut words = vec![1.0_f32; BYTES / 4];
    pool.set_threads(threads);
    let sum_all = AtomicU32::new(0);
    let mut pass = || {
        let start = Instant::now();
        // Several chunks a thread, as in the model's passes.
        let chunk = words.len().div_ceil(8 * threads);
        pool.for_each_chunk(&mut words, chunk, &|_, words| {
            sum_all.fetch_add(sum(words), Ordering::Relaxed);
        });
        start.elapsed().as_secs_f64()
    };
    let best = (0..PASSES).map(|_| pass()).fold(f64::INFINITY, f64::min);
    std::hint::black_box(sum_all);
    BYTES as f64 / best
}

/// Adds their bits in many lanes, so that memory is the only limit.
fn sum(words: &[f32]) -> u32 {
    let mut lanes = [0u32; 64];
    let chunks = words.chunks_exact(lanes.len());
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(word.to_bits());
        }
    }
    lanes.iter().copied().chain(rest.iter().map(|word| word.to_bits())).fold(0, u32::wrapping_add)
}

/// Degrees Celsius of the first thermal zone, where there is one.
pub fn temperature() -> Option<f64> {
    Some(number("/sys/class/thermal/thermal_zone0/temp", 10)? / 1e3)
}

/// The clock of the first CPU in hertz, where the system tells.
pub fn clock() -> Option<f64> {
    Some(number("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", 10)? * 1e3)
}

/// What a Raspberry Pi's firmware says of voltage and heat, as bits: `vcgencmd get_throttled` has their meaning.
pub fn throttled() -> Option<f64> {
    number("/sys/devices/platform/soc/soc:firmware/get_throttled", 16)
}

/// The number that a file of the system holds.
fn number(path: &str, radix: u32) -> Option<f64> {
    let text = std::fs::read_to_string(path).ok()?;
    u64::from_str_radix(text.trim(), radix).ok().map(|n| n as f64)
}
