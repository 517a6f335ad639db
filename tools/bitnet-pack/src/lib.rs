//! checkpoint → [`checkpoint`] → [`quantize`] → [`encode`] → [`write`](mod@write) → image; then [`verify`](mod@verify), [`sign`](mod@sign) and [`inspect`](mod@inspect)
//!
//! Where linears that are not ternary get formats of their own, [`calibrate`] stands between the checkpoint and quantizing;
//! where weights are to be left out or neurons to be put in another order, [`prune`] and [`reorder`] stand before all of it. [`convert`](mod@convert) makes a checkpoint of a checkpoint.
//!
//! Reads a checkpoint (safetensors, GGUF, llama2.c), checks it, and writes one image that `bitnet-runtime` runs. The
//! whole passes through in units of 64 rows, so the memory it takes is known before it starts and does not depend on the
//! size of the model.
#![forbid(unsafe_code)]

pub mod calibrate;
pub mod checkpoint;
pub mod convert;
pub mod diff;
pub mod dummy;
pub mod encode;
pub mod error;
pub mod export;
pub mod inspect;
pub mod kept;
pub mod pack;
pub mod prune;
pub mod quantize;
pub mod reorder;
pub mod report;
pub mod sign;
pub mod split;
pub mod tokenizer;
pub mod tune;
pub mod verify;
pub mod write;

mod files;
mod weights;

pub use convert::stateful::{Converted, Stateful, convert};
pub use convert::tbha::{Hybrid, convert as convert_values};
pub use diff::{Difference, SectionDifference, diff};
pub use dummy::{Preset, Shape, dummy};
pub use error::Error;
pub use export::{Exported, export};
pub use inspect::{Summary, inspect};
pub use pack::{Layouts, Options, pack, plan};
pub use prune::{Pattern, Pruned, Sparsity};
pub use reorder::Reordered;
pub use report::{Progress, Report};
pub use tune::{Target, tune};
pub use verify::{Verified, verify};
