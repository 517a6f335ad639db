//! `bitnet logits`: the logits of every position, in a file that numpy reads.
use crate::open::{ModelArgs, with_model};
use anyhow::{Context as _, ensure};
use bitnet_runtime::tokenizer::Tokenizer;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, separated by commas; nothing is added to them.
    #[arg(long, value_delimiter = ',', num_args = 1.., required_unless_present = "prompt")]
    ids: Option<Vec<u32>>,
    /// A text in place of ids.
    #[arg(long, conflicts_with = "ids")]
    prompt: Option<String>,
    /// The file to write: f32, one row a position (`.npy`).
    #[arg(long, short)]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    with_model(&args.model, |opened| {
        let ids = match &args.ids {
            Some(ids) => ids.clone(),
            None => {
                let tokenizer = Tokenizer::load(&opened.image, opened.source)?;
                let text = tokenizer.encode(args.prompt.as_deref().unwrap_or_default())?;
                tokenizer.bos().into_iter().chain(text).collect()
            }
        };
        ensure!(!ids.is_empty(), "there are no tokens");
        let vocab = opened.image.header().config.vocab as usize;
        let (mut model, mut state, _) = opened.load()?;
        let mut rows = Vec::with_capacity(ids.len() * vocab);
        model.prefill_each(&mut state, &ids, &mut |_, logits| rows.extend_from_slice(logits))?;
        write_npy(&args.out, vocab, &rows).with_context(|| format!("writing {}", args.out.display()))
    })
}

/// Writes `[rows, cols]` in version 1.0 of the format (numpy's documentation, "numpy.lib.format").
fn write_npy(path: &Path, cols: usize, values: &[f32]) -> std::io::Result<()> {
    let shape = format!("({}, {cols})", values.len() / cols);
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    // Magic, version and length take 10 bytes; everything before the data is a multiple of 64 and ends with a newline.
    let padded = (10 + header.len() + 1).next_multiple_of(64) - 10;
    header.extend(std::iter::repeat_n(' ', padded - 1 - header.len()));
    header.push('\n');
    let mut out = BufWriter::new(File::create(path)?);
    out.write_all(b"\x93NUMPY\x01\x00")?;
    out.write_all(&(header.len() as u16).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    out.write_all(values.as_bytes())?;
    out.flush()
}
