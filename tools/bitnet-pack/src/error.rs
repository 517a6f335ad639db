//! What can be wrong with an input: always what, where, and what was expected instead.
use bitnet_runtime::error::{Foreign, ImageError};
use core::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why nothing was packed, or why an image is not sound.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The system refused.
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried: `"read"`, `"create"`.
        doing: &'static str,
        /// The system's reason.
        error: io::Error,
    },
    /// The path is something else than what is read here.
    NotReadable {
        /// The file.
        path: PathBuf,
        /// What it is, and what to do.
        what: String,
    },
    /// A safetensors file or its index is malformed.
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A GGUF file is malformed.
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A tensor is missing, superfluous, of the wrong shape, or holds what it must not.
    Tensor {
        /// The file, or the directory where it is looked for.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong.
        what: String,
    },
    /// The configuration asks for something unknown, or for something that cannot be.
    Config {
        /// The file.
        path: PathBuf,
        /// The key, with dots between levels.
        key: String,
        /// Its value, as JSON.
        value: String,
        /// What was expected.
        what: String,
    },
    /// The tokenizer cannot be used.
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The options contradict one another or the checkpoint.
    Options(String),
    /// A file is not a sound image.
    Image {
        /// The file.
        path: PathBuf,
        /// What the validator says.
        error: ImageError,
    },
    /// An image's contents are not sound.
    Damaged {
        /// The file.
        path: PathBuf,
        /// The first byte concerned.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// A key or a signature is not what is asked for; files are named.
    Signature(String),
    /// The image that was written is not the one that was planned.
    Planned(String),
    /// The user ended it.
    Interrupted,
}

impl Error {
    pub(crate) fn io(path: &Path, doing: &'static str, error: io::Error) -> Self {
        Self::Io { path: path.into(), doing, error }
    }
    pub(crate) fn not_readable(path: &Path, what: impl Into<String>) -> Self {
        Self::NotReadable { path: path.into(), what: what.into() }
    }
    pub(crate) fn safetensors(path: &Path, what: impl Into<String>) -> Self {
        Self::Safetensors { path: path.into(), what: what.into() }
    }
    pub(crate) fn gguf(path: &Path, what: impl Into<String>) -> Self {
        Self::Gguf { path: path.into(), what: what.into() }
    }
    pub(crate) fn tensor(path: &Path, tensor: &str, what: impl Into<String>) -> Self {
        Self::Tensor { path: path.into(), tensor: tensor.into(), what: what.into() }
    }
    pub(crate) fn tokenizer(path: &Path, what: impl Into<String>) -> Self {
        Self::Tokenizer { path: path.into(), what: what.into() }
    }
    pub(crate) fn foreign(path: &Path, foreign: Foreign) -> Self {
        let what = match foreign {
            Foreign::Empty => "the file is empty; was a download interrupted?",
            Foreign::LfsPointer => "a git-LFS pointer, not the file itself: fetch it with `git lfs pull`",
            Foreign::Html => "a web page, not a checkpoint: the download saved an error page",
            Foreign::Gguf => "a GGUF file, where something else is expected; pack it by its own name",
            Foreign::Ggml => {
                "containers of early llama.cpp (GGML, GGJT) are not read; use the model's safetensors files"
            }
            Foreign::Zip => "a zip archive, as PyTorch writes (.bin, .pt); convert it to safetensors first",
            Foreign::Safetensors => {
                "a safetensors checkpoint, not an image; pack it first: bitnet-pack pack SOURCE -o IMAGE"
            }
        };
        Self::not_readable(path, what)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { path, doing, error } => write!(f, "cannot {doing} {}: {error}", path.display()),
            Self::NotReadable { path, what } | Self::Safetensors { path, what } | Self::Tokenizer { path, what } => {
                write!(f, "{}: {what}", path.display())
            }
            Self::Gguf { path, what } => write!(f, "{}: GGUF: {what}", path.display()),
            Self::Tensor { path, tensor, what } => write!(f, "{}: tensor {tensor}: {what}", path.display()),
            Self::Config { path, key, value, what } => {
                write!(f, "{}: {key} = {value}: {what}", path.display())
            }
            Self::Options(what) | Self::Planned(what) | Self::Signature(what) => f.write_str(what),
            Self::Image { path, error: ImageError::Foreign(foreign) } => {
                write!(f, "{}", Self::foreign(path, *foreign))
            }
            Self::Image { path, error } => write!(f, "{}: {error}", path.display()),
            Self::Damaged { path, offset, what } => write!(f, "{}: byte {offset}: {what}", path.display()),
            Self::Interrupted => f.write_str("interrupted; nothing was written"),
        }
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Io { error, .. } => Some(error),
            Self::Image { error, .. } => Some(error),
            _ => None,
        }
    }
}
