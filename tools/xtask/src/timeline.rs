//! What `bitnet --timeline` writes, as figures and as a drawing: when each reader read, and when the computation computed.

use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A read or a wait, in milliseconds since the ring was started.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Span {
    /// The reader that read, from 0; `None` is a wait of the computation.
    reader: Option<usize>,
    from: f64,
    to: f64,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Timeline {
    spans: Vec<Span>,
}

/// How much went on at once, as shares of the time from the first read to the end of the last.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Overlap {
    /// At least one reader was reading.
    pub(crate) reading: f64,
    /// At least two were.
    pub(crate) both: f64,
    /// The computation computed.
    pub(crate) computing: f64,
    /// It did while a reader was reading.
    pub(crate) computing_and_reading: f64,
}

const WIDTH: f64 = 860.0;
/// Left and right of the time that is drawn.
const FRAME: [f64; 2] = [110.0, 840.0];
const LANE: f64 = 34.0;
const TOP: f64 = 40.0;
const READ: &str = "#1b6ca8";
const COMPUTE: &str = "#2e8b57";

impl Timeline {
    /// Reads the events of a file.
    pub(crate) fn parse(text: &[u8]) -> Result<Self> {
        let trace: Value = serde_json::from_slice(text).context("a timeline is JSON")?;
        let events = trace.pointer("/traceEvents").and_then(Value::as_array).context("a timeline has events")?;
        let spans: Option<Vec<Span>> = events.iter().map(Span::of).collect();
        let spans = spans.context("an event of a timeline")?;
        ensure!(spans.iter().any(|span| span.reader.is_some()), "a timeline without a read");
        Ok(Self { spans })
    }

    /// The first read's start and the last one's end.
    fn range(&self) -> (f64, f64) {
        let reads = self.spans.iter().filter(|span| span.reader.is_some());
        reads.fold((f64::INFINITY, 0.0), |(from, to), span| (from.min(span.from), to.max(span.to)))
    }

    /// Sums over all times between two starts or ends.
    pub(crate) fn overlap(&self) -> Overlap {
        let range = self.range();
        let inside = |t: f64| t.clamp(range.0, range.1);
        // Readers and waits that begin (1) or end (-1) at a time.
        let mut changes: Vec<(f64, i32, i32)> = Vec::new();
        for span in &self.spans {
            let (reader, wait) = if span.reader.is_some() { (1, 0) } else { (0, 1) };
            changes.push((inside(span.from), reader, wait));
            changes.push((inside(span.to), -reader, -wait));
        }
        changes.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (mut sums, mut readers, mut waits, mut before) = (Overlap::default(), 0, 0, range.0);
        for (at, reader, wait) in changes {
            let share = (at - before) / (range.1 - range.0);
            for (sum, is) in [
                (&mut sums.reading, readers > 0),
                (&mut sums.both, readers > 1),
                (&mut sums.computing, waits == 0),
                (&mut sums.computing_and_reading, waits == 0 && readers > 0),
            ] {
                *sum += if is { share } else { 0.0 };
            }
            (readers, waits, before) = (readers + reader, waits + wait, at);
        }
        sums
    }

    /// So many milliseconds at two thirds of all, a lane for each reader and one for the computation.
    pub(crate) fn svg(&self, milliseconds: f64) -> String {
        let range = self.range();
        let start = range.0 + (range.1 - range.0) * 2.0 / 3.0;
        let readers = 1 + self.spans.iter().filter_map(|span| span.reader).max().unwrap_or(0);
        let height = TOP + LANE * (readers + 1) as f64 + 30.0;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n\
             <text x=\"10\" y=\"20\">{milliseconds} ms of decoding: every read, and when the computation did not wait</text>\n"
        );
        let place = |t: f64| FRAME[0] + (FRAME[1] - FRAME[0]) * ((t - start) / milliseconds).clamp(0.0, 1.0);
        let mut bar = |lane: usize, from: f64, to: f64, colour: &str| {
            let (x, end) = (place(from), place(to));
            if end > x {
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\" stroke=\"white\" \
                     stroke-width=\"0.5\"/>",
                    TOP + LANE * lane as f64,
                    end - x,
                    LANE - 8.0
                );
            }
        };
        let mut waited = start;
        for span in &self.spans {
            if let Some(reader) = span.reader {
                bar(reader, span.from, span.to, READ);
            }
        }
        let mut waits: Vec<Span> = self.spans.iter().filter(|span| span.reader.is_none()).copied().collect();
        waits.sort_by(|a, b| a.from.total_cmp(&b.from));
        for wait in waits {
            bar(readers, waited, wait.from, COMPUTE);
            waited = waited.max(wait.to);
        }
        bar(readers, waited, start + milliseconds, COMPUTE);
        for lane in 0..=readers {
            let name = if lane == readers { "computation".to_owned() } else { format!("reader {}", lane + 1) };
            let _ = writeln!(svg, "<text x=\"10\" y=\"{:.1}\">{name}</text>", TOP + LANE * lane as f64 + 17.0);
        }
        let (below, step) = (TOP + LANE * (readers + 1) as f64 + 12.0, milliseconds / 6.0);
        for tick in 0..=6 {
            let t = f64::from(tick) * step;
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{below:.1}\" text-anchor=\"middle\">{t:.0}</text>",
                place(start + t)
            );
        }
        svg.push_str("</svg>\n");
        svg
    }
}

impl Span {
    fn of(event: &Value) -> Option<Self> {
        let number = |name: &str| event.get(name).and_then(Value::as_f64);
        let (from, time, thread) = (number("ts")?, number("dur")?, event.get("tid")?.as_u64()?);
        // The computation is thread 1, and readers are those after it.
        let reader = match event.get("name")?.as_str()? {
            "read" => Some(thread.checked_sub(2)? as usize),
            "wait" => None,
            _ => return None,
        };
        Some(Self { reader, from: from / 1e3, to: (from + time) / 1e3 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, thread: u32, from: u32, time: u32) -> Value {
        serde_json::json!({"name": name, "ph": "X", "tid": thread, "ts": from * 1000, "dur": time * 1000})
    }

    /// Ten milliseconds: one reader for eight, the other from 2 to 10 with a pause, a wait from 1 to 4.
    fn timeline() -> Timeline {
        let events = [event("read", 2, 0, 8), event("wait", 1, 1, 3), event("read", 3, 2, 4), event("read", 3, 9, 1)];
        Timeline::parse(serde_json::json!({ "traceEvents": events }).to_string().as_bytes()).unwrap()
    }

    #[test]
    fn shares_are_those_of_the_time() {
        let Overlap { reading, both, computing, computing_and_reading } = timeline().overlap();
        let found = [reading, both, computing, computing_and_reading].map(|share| (share * 10.0).round());
        assert_eq!(found, [9.0, 4.0, 7.0, 6.0]);
    }

    #[test]
    fn a_drawing_has_a_lane_for_each() {
        let svg = timeline().svg(3.0);
        // From 6.7 ms on: the end of the first read, the last one up to where the drawing ends, and computation throughout.
        assert_eq!(svg.matches(READ).count(), 2, "{svg}");
        assert_eq!(svg.matches(COMPUTE).count(), 1);
        assert!(svg.contains("reader 2") && svg.contains("computation"));
    }

    #[test]
    fn what_is_no_timeline_is_refused() {
        for text in ["", "{}", r#"{"traceEvents":[]}"#, r#"{"traceEvents":[{"name":"read"}]}"#] {
            assert!(Timeline::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
