//! What the programs on an operating system share: from arguments and a file to a model in memory, from a conversation to
//! tokens, and what the system says about the process.
#![deny(unsafe_code)]
pub mod open;
pub mod signature;
pub mod system;
pub mod template;
pub mod weights;
