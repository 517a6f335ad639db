//! The roofline: products a nanosecond over products a stored byte, both on logarithmic axes, as an SVG.
//!
//! A roof is a bandwidth that the reading loop reached: below it a kernel waits for memory, and one that touches it reads
//! as fast as can be. Its flat part is left out, because no figure of this run measures what the arithmetic could do; the
//! kernels of several tokens, far to the right, show what it does.

use std::fmt::Write as _;

use super::Row;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 560.0;
/// Left, right, top and bottom of the axes' rectangle.
const FRAME: [f64; 4] = [70.0, 640.0, 50.0, 500.0];
/// One for each format, in the order in which they come; of more formats they repeat.
const COLOURS: [&str; 8] = ["#1b6ca8", "#d1495b", "#2e8b57", "#8e5ea2", "#c77f1a", "#3a9c9c", "#7a7a7a", "#b0578d"];

/// Draws the rows of the largest number of threads.
pub(super) fn roofline(rows: &[Row]) -> String {
    let threads = rows.iter().map(|row| row.threads).max().unwrap_or(1);
    let rows: Vec<&Row> = rows.iter().filter(|row| row.threads == threads).collect();
    let axes = Axes::around(&rows);
    let mut names: Vec<[&str; 3]> = Vec::new();
    for row in &rows {
        let name = [row.backend.as_str(), row.op.as_str(), row.format.as_str()];
        if !names.contains(&name) {
            names.push(name);
        }
    }
    // The legend has a line for each and may be longer than the axes.
    let height = HEIGHT.max(FRAME[2] + 16.0 * names.len() as f64 + 20.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let title = if threads == 1 { "1 thread".to_owned() } else { format!("{threads} threads") };
    text(&mut svg, [FRAME[0], 28.0], &format!("Roofline, {title}: hollow in cache, filled from memory"), "start");
    axes.grid(&mut svg);
    for state in ["hot", "cold"] {
        axes.roof(&mut svg, &rows, state);
    }
    let mut formats: Vec<&str> = Vec::new();
    for (line, name) in names.iter().enumerate() {
        if !formats.contains(&name[2]) {
            formats.push(name[2]);
        }
        let colour = COLOURS[formats.iter().position(|&format| format == name[2]).unwrap_or(0) % COLOURS.len()];
        let y = FRAME[2] + 10.0 + 16.0 * line as f64;
        mark(&mut svg, [FRAME[1] + 16.0, y - 4.0], name[1], colour, "cold");
        text(&mut svg, [FRAME[1] + 28.0, y], &name.join(" "), "start");
        for row in rows.iter().filter(|row| [&row.backend, &row.op, &row.format] == *name) {
            mark(&mut svg, axes.place(intensity(row), row.weights_per_ns), name[1], colour, &row.state);
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// Products for a byte of weights.
fn intensity(row: &Row) -> f64 {
    row.weights_per_ns / row.gb_per_s
}

/// The range of either axis, as powers of two.
#[derive(Debug)]
struct Axes {
    x: (f64, f64),
    y: (f64, f64),
}

impl Axes {
    /// Powers of two around all rows.
    fn around(rows: &[&Row]) -> Self {
        let range = |values: &dyn Fn(&Row) -> f64| {
            let logs = rows.iter().map(|row| values(row).log2()).filter(|log| log.is_finite());
            let (low, high) = logs.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), log| (l.min(log), h.max(log)));
            if low > high { (0.0, 1.0) } else { ((low - 0.3).floor(), (high + 0.3).ceil()) }
        };
        Self { x: range(&intensity), y: range(&|row| row.weights_per_ns) }
    }

    /// Where a point lies on the drawing.
    fn place(&self, x: f64, y: f64) -> [f64; 2] {
        let part = |value: f64, (low, high): (f64, f64)| (value.log2() - low) / (high - low);
        let [left, right, top, bottom] = FRAME;
        [left + part(x, self.x) * (right - left), bottom - part(y, self.y) * (bottom - top)]
    }

    fn grid(&self, svg: &mut String) {
        let [left, right, top, bottom] = FRAME;
        for log in self.x.0 as i32..=self.x.1 as i32 {
            let [x, _] = self.place(f64::from(log).exp2(), 1.0);
            line(svg, [x, top, x, bottom], "#e4e4e4");
            text(svg, [x, bottom + 18.0], &format!("{}", f64::from(log).exp2()), "middle");
        }
        for log in self.y.0 as i32..=self.y.1 as i32 {
            let [_, y] = self.place(1.0, f64::from(log).exp2());
            line(svg, [left, y, right, y], "#e4e4e4");
            text(svg, [left - 8.0, y + 4.0], &format!("{}", f64::from(log).exp2()), "end");
        }
        text(svg, [f64::midpoint(left, right), bottom + 40.0], "products a byte of weights", "middle");
        text(svg, [left, top - 8.0], "products a nanosecond", "start");
    }

    /// The bandwidth that the reading loop reached at its best, as far as the frame goes.
    fn roof(&self, svg: &mut String, rows: &[&Row], state: &str) {
        let of_state = rows.iter().filter(|row| row.state == state);
        let bandwidth = of_state.map(|row| row.read_gb_per_s).fold(0.0, f64::max);
        if bandwidth <= 0.0 {
            return;
        }
        let start = self.x.0.max(self.y.0 - bandwidth.log2());
        let end = self.x.1.min(self.y.1 - bandwidth.log2());
        if start >= end {
            return;
        }
        let at = |log: f64| self.place(log.exp2(), bandwidth * log.exp2());
        let ([x1, y1], [x2, y2]) = (at(start), at(end));
        line(svg, [x1, y1, x2, y2], if state == "cold" { "#222222" } else { "#999999" });
        // One to the left of its line and one to the right, for the lines may lie close together.
        let (label, x, anchor) = match state {
            "cold" => ("from memory", x2 + 6.0, "start"),
            _ => ("in cache", x2 - 12.0, "end"),
        };
        text(svg, [x, y2 + 14.0], &format!("{bandwidth:.0} GB/s {label}"), anchor);
    }
}

fn line(svg: &mut String, [x1, y1, x2, y2]: [f64; 4], colour: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(svg, "<path d=\"M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}\" stroke=\"{colour}\"/>");
}

fn text(svg: &mut String, [x, y]: [f64; 2], what: &str, anchor: &str) {
    let what = what.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>");
}

/// A circle for one token, a square for several.
fn mark(svg: &mut String, [x, y]: [f64; 2], op: &str, colour: &str, state: &str) {
    let fill = if state == "cold" { colour } else { "none" };
    let _ = match op {
        "matvec" => writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{fill}\" stroke=\"{colour}\"/>"),
        _ => writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"7\" height=\"7\" fill=\"{fill}\" stroke=\"{colour}\"/>",
            x - 3.5,
            y - 3.5
        ),
    };
}

#[cfg(test)]
mod tests {
    use super::super::tests::row;
    use super::*;

    #[test]
    fn every_row_of_the_most_threads_has_a_mark_inside_the_frame() {
        let fast = |state: &str| Row { weights_per_ns: 400.0, op: "matmat".to_owned(), ..row(state) };
        let one = Row { threads: 1, ..row("hot") };
        let svg = roofline(&[row("hot"), row("cold"), fast("hot"), fast("cold"), one]);
        // Four rows, and a mark of each of two kernels in the legend.
        assert_eq!((svg.matches("<circle").count(), svg.matches("<rect x=").count()), (3, 3));
        assert_eq!(svg.matches("GB/s").count(), 2, "two roofs");
        for part in svg.split("cx=\"").skip(1) {
            let x: f64 = part.split('"').next().unwrap().parse().unwrap();
            assert!((0.0..WIDTH).contains(&x), "{x}");
        }
        assert!(svg.contains("2 threads"));
    }

    #[test]
    fn a_point_on_the_roof_lies_on_its_line() {
        let rows = [row("hot"), row("cold")];
        let axes = Axes::around(&rows.iter().collect::<Vec<_>>());
        let [x1, y1] = axes.place(2.0, 52.0);
        let [x2, y2] = axes.place(4.0, 104.0);
        let [x3, y3] = axes.place(8.0, 208.0);
        assert!((x2 - x1 - (x3 - x2)).abs() < 1e-9 && (y2 - y1 - (y3 - y2)).abs() < 1e-9 && x2 > x1 && y2 < y1);
    }
}
