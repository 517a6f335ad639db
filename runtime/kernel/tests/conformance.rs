//! The suite itself: the reference agrees with itself, and a wrong backend is named.
use bitnet_kernel::conformance::{Difference, Workspace, check};
use bitnet_kernel::portable::Portable;
use bitnet_kernel::{Activations, Batch, Format, Kernels, Matrix};

fn run(k: &dyn Kernels) -> Result<(), Difference> {
    check(&[k], &mut Box::new(Workspace::ZERO))
}

#[test]
fn portable_agrees_with_itself() {
    run(&Portable).unwrap();
}

/// Wrong in one row of one format.
#[derive(Debug)]
struct Wrong(Format);

impl Kernels for Wrong {
    fn name(&self) -> &'static str {
        "wrong"
    }
    fn matvec(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [i32]) {
        Portable.matvec(w, x, y);
        if w.format() == self.0 && y.len() > 3 {
            y[3] += 1;
        }
    }
}

#[test]
fn the_first_difference_is_named() {
    for format in Format::INTEGER {
        let found = run(&Wrong(format)).unwrap_err();
        assert_eq!((found.format, found.index, found.operation), (Some(format), 3, "matvec"));
        assert_eq!(found.got, found.want + 1);
        assert!(found.to_string().starts_with("wrong differs from portable: matvec"), "{found}");
    }
}

/// Wrong in the last token of a batch of grouped products, or in the last row of those that were asked for.
#[derive(Debug)]
struct WrongElsewhere(&'static str);

impl Kernels for WrongElsewhere {
    fn name(&self) -> &'static str {
        "wrong elsewhere"
    }
    fn matvec(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [i32]) {
        Portable.matvec(w, x, y);
    }
    fn matmat_grouped(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
        Portable.matmat_grouped(w, x, y);
        if self.0 == "matmat_grouped" && x.tokens().len() > 2 {
            let last = y.last_mut().unwrap();
            *last = f32::from_bits(last.to_bits() ^ 1);
        }
    }
    fn dot_rows(&self, w: Matrix<'_>, rows: &[u32], x: Activations<'_>, y: &mut [i32]) {
        Portable.dot_rows(w, rows, x, y);
        if let ("dot_rows", Some(last)) = (self.0, y.last_mut()) {
            *last += 1;
        }
    }
    fn sum_rows(&self, w: Matrix<'_>, rows: &[u32], x: &[i8], y: &mut [i32]) {
        if self.0 == "sum_rows" {
            y.fill(0);
        }
        Portable.sum_rows(w, rows, x, y);
    }
}

#[test]
fn every_operation_is_looked_at() {
    for operation in ["matmat_grouped", "dot_rows", "sum_rows"] {
        assert_eq!(run(&WrongElsewhere(operation)).unwrap_err().operation, operation);
    }
}
