//! What an emulator logged of one product: which instructions were executed, and which loops they form.
//!
//! `qemu-aarch64 -one-insn-per-tb -d exec,nochain` writes a line for every instruction, in order, with its address and the
//! symbol that holds it. A plugin would give the same counts, but QEMU's user mode is packaged without plugins, and its
//! system mode would need a bare-metal image around the kernels.

use std::collections::{BTreeMap, HashMap};
use std::io::BufRead;

use anyhow::{Context, Result, bail};

/// One instruction that was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) address: u64,
    /// The function, as an index that means nothing else.
    function: usize,
}

/// A loop that was executed: instructions of one function from its head to the last jump back to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Loop {
    function: usize,
    head: u64,
    tail: u64,
    /// How often the head was executed.
    pub(crate) iterations: u64,
    /// Instructions executed between head and tail in all iterations.
    pub(crate) executed: u64,
}

/// A loop whose own instructions, outside the loops in it, are more than this part of all is taken whole: it does work and
/// not only counts.
const OWN_SHARE: f64 = 0.1;

/// Loops below this part of all instructions are left out: copies and the like.
const LEAST_SHARE: f64 = 0.02;

/// Reads what was executed between the end of the function whose name contains `begin` and the start of that with `end`.
pub(crate) fn read(log: impl BufRead, begin: &str, end: &str) -> Result<Vec<Step>> {
    let mut functions: HashMap<String, usize> = HashMap::new();
    let mut steps = Vec::new();
    let mut begun = false;
    for line in log.split(b'\n') {
        let line = line.context("reading the log of the emulator")?;
        let line = String::from_utf8_lossy(&line);
        let Some((address, symbol)) = executed(&line) else { continue };
        if symbol.contains(begin) {
            begun = true;
            steps.clear();
        } else if symbol.contains(end) {
            if !begun {
                bail!("the log has `{end}` without `{begin}` before it");
            }
            return Ok(steps);
        } else if begun {
            let next = functions.len();
            let function = match functions.get(symbol) {
                Some(&known) => known,
                None => *functions.entry(symbol.to_owned()).or_insert(next),
            };
            steps.push(Step { address, function });
        }
    }
    bail!("the log does not show `{begin}` and then `{end}`")
}

/// Reads a line such as `Trace 0: 0x7f… [cs_base/address/flags/cflags] symbol`, all numbers in hexadecimal.
fn executed(line: &str) -> Option<(u64, &str)> {
    let (_, rest) = line.strip_prefix("Trace ")?.split_once('[')?;
    let (numbers, symbol) = rest.split_once(']')?;
    let address = numbers.split('/').nth(1)?;
    Some((u64::from_str_radix(address.trim_start_matches("0x"), 16).ok()?, symbol.trim()))
}

/// The loops that make up the work, none within another.
///
/// These are the innermost ones, but where a loop around them executes more than a tenth of its instructions itself, it
/// stands in their place: emptying narrow sums every few steps is a part of the work.
pub(crate) fn loops(steps: &[Step]) -> Vec<Loop> {
    let all = every_loop(steps);
    let within = |a: &Loop, b: &Loop| a != b && a.function == b.function && b.head <= a.head && a.tail <= b.tail;
    let mut chosen = Vec::new();
    let mut open: Vec<&Loop> = all.iter().filter(|a| !all.iter().any(|b| within(a, b))).collect();
    while let Some(outer) = open.pop() {
        let inside: Vec<&Loop> = all.iter().filter(|a| within(a, outer)).collect();
        let inner: Vec<&Loop> = inside.iter().copied().filter(|a| !inside.iter().any(|b| within(a, b))).collect();
        let of_inner: u64 = inner.iter().map(|inner| inner.executed).sum();
        let own = outer.executed.saturating_sub(of_inner);
        if own as f64 > OWN_SHARE * outer.executed as f64 {
            chosen.push(outer.clone());
        } else {
            open.extend(inner);
        }
    }
    chosen.retain(|chosen| chosen.executed as f64 > LEAST_SHARE * steps.len() as f64);
    chosen.sort_by_key(|chosen| chosen.head);
    chosen
}

/// Every loop, whether or not in another: a jump back within a function makes one.
fn every_loop(steps: &[Step]) -> Vec<Loop> {
    let mut counts: BTreeMap<(usize, u64), u64> = BTreeMap::new();
    steps.iter().for_each(|step| *counts.entry((step.function, step.address)).or_default() += 1);
    let mut tails: BTreeMap<(usize, u64), u64> = BTreeMap::new();
    for pair in steps.windows(2) {
        let (from, to) = (pair[0], pair[1]);
        if from.function == to.function && to.address <= from.address {
            let tail = tails.entry((to.function, to.address)).or_default();
            *tail = from.address.max(*tail);
        }
    }
    let described = |(&(function, head), &tail): (&(usize, u64), &u64)| Loop {
        function,
        head,
        tail,
        iterations: counts[&(function, head)],
        executed: counts.range((function, head)..=(function, tail)).map(|(_, count)| count).sum(),
    };
    tails.iter().map(described).collect()
}

/// The addresses of one typical iteration, in the order of execution: that of middle length.
pub(crate) fn iteration(steps: &[Step], of: &Loop) -> Vec<u64> {
    let inside = |step: &&Step| step.function == of.function && (of.head..=of.tail).contains(&step.address);
    let mut iterations: Vec<Vec<u64>> = Vec::new();
    for step in steps.iter().filter(inside) {
        if step.address == of.head {
            iterations.push(Vec::new());
        }
        if let Some(last) = iterations.last_mut() {
            last.push(step.address);
        }
    }
    iterations.sort_by_key(Vec::len);
    let middle = iterations.len() / 2;
    iterations.into_iter().nth(middle).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as QEMU 10.0 writes them, with messages of other kinds between them.
    fn log(steps: &[(&str, u64)]) -> String {
        let mut text = String::from("host mmap_min_addr=0x10000\n");
        for (symbol, address) in steps {
            text += &format!("Trace 0: 0x7feda7e4f500 [81009331/{address:016x}/00000001/00000201] {symbol}\n");
        }
        text
    }

    fn steps(steps: &[(&str, u64)]) -> Vec<Step> {
        let marked = [&[("_ZN4mark5beginE", 4)], steps, &[("_ZN4mark3endE", 8)]].concat();
        read(log(&marked).as_bytes(), "begin", "end").unwrap()
    }

    #[test]
    fn what_lies_between_the_marks_is_read() {
        let all =
            [("a", 0x10), ("xbeginx", 0x20), ("xbeginx", 0x24), ("b", 0xabc0), ("", 0x30), ("end", 0x40), ("c", 0x50)];
        let found = read(log(&all).as_bytes(), "begin", "end").unwrap();
        assert_eq!(found.iter().map(|step| step.address).collect::<Vec<_>>(), [0xabc0, 0x30]);
        assert_ne!(found[0].function, found[1].function);
    }

    #[test]
    fn a_log_without_its_marks_is_an_error() {
        let complaint = |all: &[(&str, u64)]| read(log(all).as_bytes(), "begin", "end").unwrap_err().to_string();
        assert!(complaint(&[("a", 0)]).contains("does not show"));
        assert!(complaint(&[("begin", 0), ("a", 4)]).contains("does not show"), "cut off");
        assert!(complaint(&[("end", 0), ("begin", 4)]).contains("without"));
    }

    #[test]
    fn other_lines_are_no_instructions() {
        assert_eq!(executed("Trace 0: 0x7f00 [00000000/0000000000401a2c/0/ff000000] f"), Some((0x40_1a2c, "f")));
        assert_eq!(executed("Trace 1: 0x7f00 [0/10/0/0]"), Some((16, "")));
        for line in
            ["", "Trace", "Trace 0: 0x7f00 [0]", "Trace 0: [0/zz/0/0] f", "Linking TBs 0x1 -> 0x2", "IN: f [0/10/0]"]
        {
            assert_eq!(executed(line), None, "{line}");
        }
    }

    /// `heads` iterations of a loop at 16 to 28, around `inner` iterations each of one at 20 and 24.
    fn nested(heads: usize, inner: usize, own: usize) -> Vec<Step> {
        let mut all = vec![("f", 0)];
        for _ in 0..heads {
            all.push(("f", 16));
            (0..inner).for_each(|_| all.extend([("f", 20), ("f", 24)]));
            all.extend((0..own).map(|i| ("f", 28 + 4 * i as u64)));
        }
        steps(&all)
    }

    #[test]
    fn the_innermost_loop_is_found_with_its_iterations() {
        let steps = nested(3, 50, 1);
        let found = loops(&steps);
        assert_eq!(found, [Loop { function: 0, head: 20, tail: 24, iterations: 150, executed: 300 }]);
        assert_eq!(iteration(&steps, &found[0]), [20, 24]);
    }

    #[test]
    fn a_loop_that_works_itself_is_taken_whole() {
        let steps = nested(3, 10, 8);
        let found = loops(&steps);
        assert_eq!((found.len(), found[0].head, found[0].iterations), (1, 16, 3));
        let one = iteration(&steps, &found[0]);
        assert_eq!(one.len(), 1 + 20 + 8);
        assert_eq!(one[..4], [16, 20, 24, 20]);
    }

    #[test]
    fn loops_side_by_side_are_both_found_and_small_ones_are_not() {
        let mut all = Vec::new();
        (0..100).for_each(|_| all.extend([("f", 0), ("f", 4)]));
        (0..50).for_each(|_| all.extend([("f", 8), ("f", 12), ("f", 16)]));
        (0..2).for_each(|_| all.push(("f", 20)));
        let found = loops(&steps(&all));
        assert_eq!(found.iter().map(|found| (found.head, found.iterations)).collect::<Vec<_>>(), [(0, 100), (8, 50)]);
    }

    #[test]
    fn calls_and_returns_are_no_loops() {
        // `g` lies before `f`, which calls it and is returned to.
        let all: Vec<_> = (0..20).flat_map(|i| [("f", 100 + 8 * i), ("g", 0), ("g", 4), ("f", 104 + 8 * i)]).collect();
        assert_eq!(loops(&steps(&all)), []);
    }
}
