//! A model in floats, run on text: what its linears read, how much each counts, and how well a changed model predicts.
//!
//! [`Reference`] is the forward pass of `bitnet-runtime` without quantized activations, and its backward pass. It reads one
//! layer at a time from the checkpoint, so its memory is that of one layer's weights and of the residual stream of the
//! tokens. Results do not depend on the number of threads.
//!
//! What it answers:
//! - [`Reference::moments`]: of each linear's input `x`, the mean of `x xᵀ` or of its diagonal: the Hessian of a linear's own
//!   output error (Frantar et al. 2022, arXiv:2210.17323), and with its root the columns' root mean square.
//! - [`Reference::firing`]: which neurons of the feed-forward layers fire after which tokens.
//! - [`Reference::fisher`]: of each linear's output, the mean of the squared gradient of the tokens' losses.
//! - [`gptq`]: codes of a linear of which each column makes up for the errors of those before it.
//! - [`allocate`]: which of several formats each linear gets, within a number of bytes; [`Plan`] is the file of that.
//! - [`HeldOut`]: perplexity, and the divergence from the unchanged model, of a model whose linears were changed.
mod adapt;
pub mod allocate;
pub mod gptq;
mod layer;
pub mod matmul;
mod model;
mod pass;
mod plan;
mod report;
mod spool;
mod text;

pub use adapt::{Adapted, Adaptive, LinearReport, Rule};
pub(crate) use adapt::{Places, Prepared, adapt};
pub use model::{Linear, Reference, Site};
pub use pass::{Firing, HeldOut, Moment, Score, Wanted};
pub use plan::Plan;
pub use text::{Windows, windows};

use crate::Error;

/// Changes the weights of a linear, `[rows, cols]`, after they were read from the checkpoint.
pub type Change<'a> = dyn Fn(Linear, &mut [f32]) -> Result<(), Error> + 'a;
