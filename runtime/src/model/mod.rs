//! The model.
mod config;

pub use config::{Activation, Config, Rope};
