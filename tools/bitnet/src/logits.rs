//! `bitnet logits`: the logits of every position, in a file that numpy reads.
use anyhow::{Context as _, ensure};
use bitnet_host::open::{ModelArgs, with_model};
use bitnet_runtime::tokenizer::Tokenizer;
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
        let out = args.out.display();
        let writing = || format!("writing {out}");
        // Row by row into a file of another name: memory does not grow, and nothing half written has the name.
        let folder = args.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = BufWriter::new(tempfile::NamedTempFile::new_in(folder).with_context(writing)?);
        file.write_all(&npy_header(ids.len(), vocab)).with_context(writing)?;
        let mut written = Ok(());
        model.prefill_each(&mut state, &ids, &mut |_, logits| {
            if written.is_ok() {
                written = file.write_all(logits.as_bytes());
            }
        })?;
        written.with_context(writing)?;
        let file = file.into_inner().map_err(std::io::IntoInnerError::into_error).with_context(writing)?;
        file.persist(&args.out).with_context(writing)?;
        Ok(())
    })
}

/// What comes before the rows of an f32 array in version 1.0 of the format (numpy's documentation, "numpy.lib.format").
fn npy_header(rows: usize, cols: usize) -> Vec<u8> {
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    // Magic, version and length take 10 bytes; everything before the data is a multiple of 64 and ends with a newline.
    let padded = (10 + header.len() + 1).next_multiple_of(64) - 10;
    header.extend(std::iter::repeat_n(' ', padded - 1 - header.len()));
    header.push('\n');
    [&b"\x93NUMPY\x01\x00"[..], &(header.len() as u16).to_le_bytes(), header.as_bytes()].concat()
}
