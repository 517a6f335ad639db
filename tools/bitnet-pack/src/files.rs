//! Opening and reading input files without trusting them: no blocking on pipes, no allocation by a claimed size.
use crate::Error;
use bitnet_runtime::error::Foreign;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// A regular file, its path and its length.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) bytes: u64,
}

impl Input {
    /// Opens a regular file. The kind is looked at first: opening a pipe would wait for a writer for ever.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let metadata = path.metadata().map_err(|e| Error::io(path, "open", e))?;
        if metadata.is_dir() {
            return Err(Error::not_readable(path, "a directory, where a file is expected"));
        }
        if !metadata.is_file() {
            return Err(Error::not_readable(path, "not a regular file (a pipe, a socket or a device)"));
        }
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        Ok(Self { path: path.into(), file, bytes: metadata.len() })
    }
    /// Fills `into` from `offset` on.
    pub(crate) fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        let mut file = &self.file;
        let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(into));
        read.map_err(|e| Error::io(&self.path, "read", e))
    }
    /// The first bytes, at most 16: enough to recognise what it is.
    pub(crate) fn start(&self) -> Result<Vec<u8>, Error> {
        let mut start = vec![0; self.bytes.min(16) as usize];
        self.read_at(0, &mut start)?;
        Ok(start)
    }
    /// What else it may be taken for.
    pub(crate) fn foreign(&self) -> Result<Option<Foreign>, Error> {
        Ok(Foreign::recognise(&self.start()?))
    }
}

/// The whole of a small file.
pub(crate) fn read_capped(path: &Path, cap: u64) -> Result<Vec<u8>, Error> {
    let input = Input::open(path)?;
    if input.bytes > cap {
        return Err(Error::not_readable(path, format!("{} bytes; at most {cap} are read here", input.bytes)));
    }
    let mut bytes = Vec::new();
    let read = (&input.file).take(cap).read_to_end(&mut bytes);
    read.map_err(|e| Error::io(path, "read", e))?;
    Ok(bytes)
}

/// The whole of a small JSON file.
pub(crate) fn read_json(path: &Path, cap: u64) -> Result<serde_json::Value, Error> {
    let bytes = read_capped(path, cap)?;
    serde_json::from_slice(&bytes).map_err(|e| match Foreign::recognise(&bytes) {
        Some(foreign) => Error::foreign(path, foreign),
        None => Error::not_readable(path, format!("not valid JSON: {e}")),
    })
}
