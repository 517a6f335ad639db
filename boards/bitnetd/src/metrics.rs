//! What the daemon counts, in the text format of Prometheus.
use bitnet_host::system;
use bitnet_runtime::cgroup::available_memory;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// Upper ends of the histograms, in seconds.
const BUCKETS: [f64; 9] = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0];

/// Durations, sorted by length.
#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS.len()],
    count: AtomicU64,
    microseconds: AtomicU64,
}

impl Histogram {
    fn add(&self, time: Duration) {
        for (bucket, end) in self.buckets.iter().zip(BUCKETS) {
            if time.as_secs_f64() <= end {
                bucket.fetch_add(1, Relaxed);
            }
        }
        self.count.fetch_add(1, Relaxed);
        self.microseconds.fetch_add(time.as_micros() as u64, Relaxed);
    }
    fn write(&self, text: &mut String, name: &str, help: &str) {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
        for (bucket, end) in self.buckets.iter().zip(BUCKETS) {
            let _ = writeln!(text, "{name}_bucket{{le=\"{end}\"}} {}", bucket.load(Relaxed));
        }
        let count = self.count.load(Relaxed);
        let _ = writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {count}");
        let _ = writeln!(text, "{name}_sum {}", self.microseconds.load(Relaxed) as f64 / 1e6);
        let _ = writeln!(text, "{name}_count {count}");
    }
}

/// One of the requests that have a conversation.
#[derive(Debug)]
pub(crate) struct Active<'m>(&'m AtomicUsize);

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// The counters.
#[derive(Debug, Default)]
pub struct Metrics {
    admitted: AtomicU64,
    finished: AtomicU64,
    cancelled: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    read_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    reply_tokens_read: AtomicU64,
    passes: AtomicU64,
    weight_bytes: AtomicU64,
    busy_nanoseconds: AtomicU64,
    /// Of the last pass over replies.
    bytes_per_second: AtomicU64,
    memory_bytes_per_second: AtomicU64,
    active: AtomicUsize,
    cache_bytes: AtomicUsize,
    restored: AtomicU64,
    forked: AtomicU64,
    queue: Histogram,
    first_token: Histogram,
    latency: Histogram,
}

impl Metrics {
    pub(crate) fn admitted(&self, prompt: usize, cached: usize, waited: Duration) {
        self.queue.add(waited);
        self.admitted.fetch_add(1, Relaxed);
        self.prompt_tokens.fetch_add(prompt as u64, Relaxed);
        self.cached_tokens.fetch_add(cached as u64, Relaxed);
    }
    pub(crate) fn finished(&self, latency: Duration) {
        self.finished.fetch_add(1, Relaxed);
        self.latency.add(latency);
    }
    pub(crate) fn cancelled(&self) {
        self.cancelled.fetch_add(1, Relaxed);
    }
    pub(crate) fn failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }
    pub(crate) fn refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }
    pub(crate) fn first_token(&self, time: Duration) {
        self.first_token.add(time);
    }
    /// A token was chosen.
    pub(crate) fn generated(&self) {
        self.generated_tokens.fetch_add(1, Relaxed);
    }
    /// One pass over the weights: its bytes, how long it took, and the tokens of prompts and of replies that it read.
    pub(crate) fn pass(&self, weight_bytes: u64, time: Duration, prompt: usize, reply: usize) {
        self.passes.fetch_add(1, Relaxed);
        self.weight_bytes.fetch_add(weight_bytes, Relaxed);
        self.busy_nanoseconds.fetch_add(time.as_nanos() as u64, Relaxed);
        self.read_tokens.fetch_add(prompt as u64, Relaxed);
        self.reply_tokens_read.fetch_add(reply as u64, Relaxed);
        if reply > 0 {
            self.bytes_per_second.store((weight_bytes as f64 / time.as_secs_f64().max(1e-9)) as u64, Relaxed);
        }
    }
    /// What the memory gives, if it was measured.
    pub(crate) fn memory(&self, bytes_per_second: f64) {
        self.memory_bytes_per_second.store(bytes_per_second as u64, Relaxed);
    }
    /// How long a request that comes now may wait, from the mean of those that ended, where `answered` are answered at once.
    pub(crate) fn wait(&self, waiting: usize, answered: usize) -> Duration {
        let mean = self.latency.microseconds.load(Relaxed) / self.latency.count.load(Relaxed).max(1);
        Duration::from_micros(mean.saturating_mul(waiting as u64 + 1) / answered.max(1) as u64)
    }
    /// Bytes of snapshots.
    pub(crate) fn cache(&self, bytes: usize) {
        self.cache_bytes.store(bytes, Relaxed);
    }
    /// A prompt began with a snapshot.
    pub(crate) fn restored(&self) {
        self.restored.fetch_add(1, Relaxed);
    }
    /// A prompt began as a copy of a conversation.
    pub(crate) fn forked(&self) {
        self.forked.fetch_add(1, Relaxed);
    }
    /// A request has a conversation, until what this gives is dropped.
    pub(crate) fn active(&self) -> Active<'_> {
        self.active.fetch_add(1, Relaxed);
        Active(&self.active)
    }

    /// All of them as text, with what the system says now.
    pub fn text(&self, waiting: usize) -> String {
        let mut text = String::new();
        let mut one = |name: &str, kind: &str, help: &str, value: f64| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        };
        for (name, help, value) in [
            ("bitnetd_requests_started_total", "Requests that got a conversation.", &self.admitted),
            ("bitnetd_requests_finished_total", "Requests that got their whole reply.", &self.finished),
            ("bitnetd_requests_cancelled_total", "Requests whose client left.", &self.cancelled),
            ("bitnetd_requests_failed_total", "Requests whose pass failed.", &self.failed),
            ("bitnetd_requests_refused_total", "Requests that found the queue full.", &self.refused),
            ("bitnetd_prompt_tokens_total", "Tokens of prompts.", &self.prompt_tokens),
            ("bitnetd_prompt_tokens_cached_total", "Those that were in memory already.", &self.cached_tokens),
            ("bitnetd_prompts_restored_total", "Prompts that began with a snapshot.", &self.restored),
            ("bitnetd_prompts_forked_total", "Prompts that began as a copy of a conversation.", &self.forked),
            ("bitnetd_prompt_tokens_read_total", "Those that were read.", &self.read_tokens),
            ("bitnetd_generated_tokens_total", "Tokens of replies.", &self.generated_tokens),
            ("bitnetd_reply_tokens_read_total", "Tokens of replies that were read in turn.", &self.reply_tokens_read),
            ("bitnetd_passes_total", "Passes over the weights.", &self.passes),
            (
                "bitnetd_weight_bytes_total",
                "Bytes of weights that the passes went over, those with them that an exact pass can leave out.",
                &self.weight_bytes,
            ),
        ] {
            one(name, "counter", help, value.load(Relaxed) as f64);
        }
        let busy = self.busy_nanoseconds.load(Relaxed) as f64 / 1e9;
        one("bitnetd_busy_seconds_total", "counter", "Time in passes over the weights.", busy);
        let speed = self.bytes_per_second.load(Relaxed) as f64;
        if speed > 0.0 {
            one("bitnetd_weight_bytes_per_second", "gauge", "Of the last pass over replies.", speed);
        }
        let memory = self.memory_bytes_per_second.load(Relaxed) as f64;
        if memory > 0.0 {
            one(
                "bitnetd_memory_bytes_per_second",
                "gauge",
                "What threads read from memory, measured at the start.",
                memory,
            );
            one("bitnetd_bandwidth_share", "gauge", "Of the last pass over replies, of that speed.", speed / memory);
        }
        one("bitnetd_requests_active", "gauge", "Requests that have a conversation.", self.active.load(Relaxed) as f64);
        one(
            "bitnetd_prompt_cache_bytes",
            "gauge",
            "Snapshots of conversations.",
            self.cache_bytes.load(Relaxed) as f64,
        );
        one("bitnetd_requests_waiting", "gauge", "Requests that wait for one.", waiting as f64);
        for (name, help, value) in [
            ("process_resident_memory_bytes", "Memory of this process, mapped weights with it.", system::rss()),
            ("bitnetd_available_memory_bytes", "Memory that can be had without swapping.", available_memory()),
        ] {
            if let Some(value) = value {
                one(name, "gauge", help, value as f64);
            }
        }
        for (name, help, value) in [
            ("bitnetd_temperature_celsius", "Of the first thermal zone.", system::temperature()),
            ("bitnetd_cpu_hertz", "Clock of the first CPU.", system::clock()),
            (
                "bitnetd_throttled",
                "Bits of the Raspberry Pi's firmware: see vcgencmd get_throttled.",
                system::throttled(),
            ),
        ] {
            if let Some(value) = value {
                one(name, "gauge", help, value);
            }
        }
        self.queue.write(&mut text, "bitnetd_queue_seconds", "From a request to its conversation.");
        self.first_token.write(&mut text, "bitnetd_first_token_seconds", "From a request to its first token.");
        self.latency.write(&mut text, "bitnetd_reply_seconds", "From a request to the end of its reply.");
        text
    }
}
