//! Writing to standard output without a panic when nobody reads it.
use std::io::{self, ErrorKind, Write};

/// Writes `text` at once, so that it is seen while the next token is computed.
pub(crate) fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes `text` to standard error. If that is closed there is nobody to tell.
pub(crate) fn note(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Whether an error is that of a pipe closed by its reader.
pub(crate) fn is_closed_pipe(e: &anyhow::Error) -> bool {
    e.chain().filter_map(|e| e.downcast_ref::<io::Error>()).any(|e| e.kind() == ErrorKind::BrokenPipe)
}
