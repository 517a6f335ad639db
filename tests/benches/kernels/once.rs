//! One product between two marks.
//!
//! An emulator that logs every instruction shows the symbols of [`mark_begin`] and [`mark_end`]; what lies between is the
//! product alone. The number of its products is printed, so that whoever counts knows what was multiplied.
use crate::product::{FORMATS, Inputs, Op, Output};
use bitnet_kernel::{Block, Matrix};
use bitnet_runtime::backend;
use serde_json::json;
use std::hint::black_box;

/// A tile of lanes, and twice eight tiles of planes.
const ROWS: usize = 64;
/// About the width of a small model's matrices, and whole steps of every format.
const COLS: usize = 3072;

/// Multiplies once. The weights are zero bytes, which mean something in every format, and no kernel's path depends on them.
pub(crate) fn run(backend: &str, op: &str, format: &str) -> Result<(), String> {
    let k = backend::by_name(backend).ok_or_else(|| format!("`{backend}` is no backend of this CPU"))?;
    let op = Op::ALL.into_iter().find(|o| o.name() == op).ok_or_else(|| format!("there is no operation `{op}`"))?;
    let format = FORMATS.into_iter().find(|f| f.name() == format && op.takes(*f));
    let format = format.ok_or_else(|| format!("there is no such format for {}", op.name()))?;

    let blocks = vec![Block::ZERO; format.matrix_blocks(ROWS, COLS)];
    let w = Matrix::new(format, ROWS, COLS, &blocks).expect("a whole matrix");
    let mut inputs = Inputs::new(format, COLS, op);
    let product = inputs.product(k, op);
    let mut out = Output::new(ROWS, COLS);
    mark_begin();
    product.run(w, &mut out);
    mark_end();
    println!("{}", json!({"products": op.rows_read(ROWS) * COLS * op.tokens()}));
    Ok(())
}

#[inline(never)]
fn mark_begin() {
    black_box(1);
}

/// Not the same code as [`mark_begin`], or the linker may make one function of the two.
#[inline(never)]
fn mark_end() {
    black_box(2);
}
