//! Whether the engine gets on, which is what the watchdog is told.
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Turns of the engine's loop: odd while there is work, even while it waits for some.
#[derive(Debug, Default)]
pub struct Pulse(AtomicU64);

impl Pulse {
    /// A turn begins.
    pub fn beat(&self) {
        // Only the engine writes.
        let now = self.0.load(Relaxed);
        self.0.store(now + 1 + (now & 1), Relaxed);
    }
    /// The engine waits.
    pub fn rest(&self) {
        let now = self.0.load(Relaxed);
        self.0.store(now + (now & 1), Relaxed);
    }
    /// Whether a turn has begun since `seen` was written, or there is nothing to do.
    pub(crate) fn goes_on(&self, seen: &mut u64) -> bool {
        let now = self.0.load(Relaxed);
        let before = std::mem::replace(seen, now);
        now.is_multiple_of(2) || now != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_computes_has_to_get_on() {
        let (pulse, mut seen) = (Pulse::default(), 0);
        assert!(pulse.goes_on(&mut seen) && pulse.goes_on(&mut seen), "nothing to do yet");
        pulse.beat();
        assert!(pulse.goes_on(&mut seen), "a turn has begun");
        assert!(!pulse.goes_on(&mut seen) && !pulse.goes_on(&mut seen), "and does not end");
        pulse.beat();
        assert!(pulse.goes_on(&mut seen) && !pulse.goes_on(&mut seen), "the next one");
        pulse.rest();
        assert!(pulse.goes_on(&mut seen) && pulse.goes_on(&mut seen), "all is done");
        pulse.rest();
        pulse.beat();
        assert!(pulse.goes_on(&mut seen) && !pulse.goes_on(&mut seen));
    }
}
