//! The suite itself: the reference agrees with itself, and a wrong backend is named.
use bitnet_kernel::conformance::{Difference, Workspace, check};
use bitnet_kernel::portable::Portable;
use bitnet_kernel::{Activations, Format, Kernels, Matrix};

fn run(k: &dyn Kernels) -> Result<(), Difference> {
    check(k, &mut Box::new(Workspace::ZERO))
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
