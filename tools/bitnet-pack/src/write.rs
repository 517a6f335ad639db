//! Writes an image: the layout first, then one section after another, and the header at the end.
//!
//! It is written under a temporary name in the target's directory, flushed to the medium, checked, and only then renamed.
//! Whatever goes wrong before, nothing appears under the target's name.
use crate::Error;
use bitnet_kernel::Block;
use bitnet_runtime::image::{
    CHAT_TEMPLATE_MAX, Encoding, HEADER_BYTES_MAX, Header, HeaderError, Kind, MAGIC, MemoryPlan, PREFIX_BYTES,
    Provenance, Record, Section, StopIds, TOKENIZER_BYTES_MAX, Text, WEIGHTS_ALIGN, encode_prefix,
};
use bitnet_runtime::{Config, Limits, Plan};
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::Xxh3Default;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{F32, U16, U32, U64};

/// Bytes of the buffer between the packer and the file.
pub const BUFFER_BYTES: usize = 1 << 20;

/// What the header says besides the section table.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The model.
    pub config: Config,
    /// What the memory plan is for.
    pub limits: Limits,
    /// A name for people.
    pub name: String,
    /// The checkpoint's class.
    pub architecture: String,
    /// The token that starts a conversation.
    pub bos: Option<u32>,
    /// Tokens that end a reply.
    pub stop: StopIds,
    /// Jinja, or empty.
    pub chat_template: String,
    /// What chose the layouts of linears, for people; empty if nothing was timed or estimated.
    pub tuning: String,
}

impl Parts {
    /// The packer, as the header names it.
    pub const PACKER: &'static str = concat!("bitnet-pack ", env!("CARGO_PKG_VERSION"));

    fn header<'a>(&'a self, records: &'a [Record]) -> Header<'a> {
        let plan = Plan::new(&self.config, &self.limits);
        Header {
            config: self.config,
            plan: MemoryPlan {
                limits: self.limits,
                state: plan.state as u64,
                scratch: plan.scratch as u64,
                sampler: plan.sampler as u64,
            },
            provenance: Provenance { name: &self.name, architecture: &self.architecture, packer: Self::PACKER },
            text: Text { bos: self.bos, stop: self.stop, chat_template: &self.chat_template },
            tuning: &self.tuning,
            sections: records.as_bytes(),
        }
    }
    fn encode(&self, records: &[Record]) -> Result<Vec<u8>, Error> {
        let mut buffer = vec![0; HEADER_BYTES_MAX as usize];
        let length = self.header(records).encode(&mut buffer).map_err(|error| {
            Error::Options(match error {
                HeaderError::ChatTemplate => {
                    format!("the chat template has {} bytes, at most {CHAT_TEMPLATE_MAX} fit", self.chat_template.len())
                }
                HeaderError::TooLong => format!("the header has more than {HEADER_BYTES_MAX} bytes"),
            })
        })?;
        buffer.truncate(length);
        Ok(buffer)
    }
}

/// Where everything lies. Known before a single weight is read.
#[derive(Clone, Debug)]
pub struct Layout {
    records: Vec<Record>,
    header_bytes: usize,
    file_bytes: u64,
}

impl Layout {
    /// Lays out `sections`, which are those that `parts.config` asks for, with their encodings and the number of their blocks.
    ///
    /// # Errors
    /// If something is beyond the format's limits.
    pub fn new(
        parts: &Parts,
        tokenizer: Option<usize>,
        sections: impl Iterator<Item = (Section, Encoding, u64)>,
    ) -> Result<Self, Error> {
        let mut records = Vec::new();
        if let Some(bytes) = tokenizer {
            if bytes > TOKENIZER_BYTES_MAX as usize {
                let limit = format!("the tokenizer has {bytes} bytes, at most {TOKENIZER_BYTES_MAX} fit");
                return Err(Error::Options(limit));
            }
            let section = Section { kind: Kind::Tokenizer, layer: None, rows: 1, cols: bytes as u32 };
            records.push(record(&section, Encoding::Bytes, Encoding::Bytes.blocks(1, bytes as u32)));
        }
        records.extend(sections.map(|(section, encoding, blocks)| record(&section, encoding, blocks)));
        let header_bytes = parts.encode(&records)?.len();
        let mut end = (PREFIX_BYTES + header_bytes).next_multiple_of(Block::BYTES) as u64;
        let first = usize::from(tokenizer.is_some());
        for (i, record) in records.iter_mut().enumerate() {
            if i == first {
                end = end.next_multiple_of(WEIGHTS_ALIGN);
            }
            let start = u32::try_from(end / Block::BYTES as u64);
            record.start = start.map_err(|_| Error::Options("the image would be longer than 256 GiB".into()))?.into();
            end += u64::from(record.blocks.get()) * Block::BYTES as u64;
        }
        Ok(Self { records, header_bytes, file_bytes: end })
    }
    /// The section table, without scales and checksums.
    pub fn records(&self) -> &[Record] {
        &self.records
    }
    /// Length of the whole image.
    pub const fn file_bytes(&self) -> u64 {
        self.file_bytes
    }
}

fn record(section: &Section, encoding: Encoding, blocks: u64) -> Record {
    Record {
        kind: section.kind as u8,
        encoding: encoding.tag(),
        layer: U16::new(section.layer.map_or(Record::NO_LAYER, |l| l as u16)),
        rows: U32::new(section.rows),
        cols: U32::new(section.cols),
        start: U32::new(0),
        blocks: U32::new(u32::try_from(blocks).unwrap_or(u32::MAX)),
        scale: F32::new(1.0),
        checksum: U64::new(0),
    }
}

/// An image that is being written.
pub struct ImageWriter {
    parts: Parts,
    layout: Layout,
    target: PathBuf,
    temporary: NamedTempFile,
    out: BufWriter<File>,
    /// Bytes written.
    position: u64,
    /// The section to come, or the one that is open.
    next: usize,
    sum: Xxh3Default,
}

impl core::fmt::Debug for ImageWriter {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("ImageWriter").field("target", &self.target).field("next", &self.next).finish_non_exhaustive()
    }
}

impl ImageWriter {
    /// Creates the temporary file beside `target`.
    ///
    /// # Errors
    /// If `target` is something that must not be replaced, or the system refuses.
    pub fn create(target: &Path, parts: Parts, layout: Layout) -> Result<Self, Error> {
        replaceable(target, Replaces::Image)?;
        let name = target.file_name().ok_or_else(|| Error::not_readable(target, "not the name of a file"))?;
        let directory = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        let prefix = format!(".{}.", name.to_string_lossy());
        builder.prefix(&prefix).suffix(".partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As any file is created: the process's mask decides, not the private mode of temporary files.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let temporary = builder.tempfile_in(directory).map_err(|e| Error::io(target, "create", e))?;
        let file = temporary.as_file().try_clone().map_err(|e| Error::io(target, "create", e))?;
        let out = BufWriter::with_capacity(BUFFER_BYTES, file);
        let target = target.to_path_buf();
        Ok(Self { parts, layout, target, temporary, out, position: 0, next: 0, sum: Xxh3Default::new() })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.position += bytes.len() as u64;
        self.out.write_all(bytes).map_err(|e| Error::io(&self.target, "write", e))
    }
    fn zeros_until(&mut self, end: u64) -> Result<(), Error> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while self.position < end {
            let n = (end - self.position).min(ZEROS.len() as u64) as usize;
            self.write(&ZEROS[..n])?;
        }
        Ok(())
    }
    fn record(&self) -> &Record {
        &self.layout.records[self.next]
    }
    /// First byte past the open section.
    fn end_of_section(&self) -> u64 {
        let extent = self.record().extent();
        (u64::from(extent.start) + u64::from(extent.blocks)) * Block::BYTES as u64
    }

    /// Starts the next section. `scale` multiplies all weights of a matrix, and is 1 for anything else.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn begin(&mut self, scale: f32) -> Result<(), Error> {
        let start = u64::from(self.record().start.get()) * Block::BYTES as u64;
        assert!(self.position <= start, "sections do not overlap");
        self.zeros_until(start)?;
        self.layout.records[self.next].scale = F32::new(scale);
        self.sum.reset();
        Ok(())
    }
    /// Appends to the section.
    ///
    /// # Errors
    /// If the system refuses.
    ///
    /// # Panics
    /// If that is more than the layout has room for.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        assert!(self.position + bytes.len() as u64 <= self.end_of_section(), "section {} is full", self.next);
        self.sum.update(bytes);
        self.write(bytes)
    }
    /// Ends the section. Less than a block may be missing, and becomes zeros.
    ///
    /// # Errors
    /// If the system refuses.
    ///
    /// # Panics
    /// If more is missing.
    pub fn end(&mut self) -> Result<(), Error> {
        let missing = (self.end_of_section() - self.position) as usize;
        assert!(missing < Block::BYTES, "section {} lacks {missing} bytes", self.next);
        self.put(&[0; Block::BYTES][..missing])?;
        self.layout.records[self.next].checksum = U64::new(self.sum.digest());
        self.next += 1;
        Ok(())
    }

    /// Writes the header and flushes to the medium. The image is complete, under its temporary name.
    ///
    /// # Errors
    /// If the system refuses.
    ///
    /// # Panics
    /// If sections are missing.
    pub fn finish(self) -> Result<Finished, Error> {
        let Self { parts, layout, target, temporary, out, position, next, .. } = self;
        assert_eq!((next, position), (layout.records.len(), layout.file_bytes));
        let header = parts.encode(&layout.records)?;
        assert_eq!(header.len(), layout.header_bytes);
        let prefix = encode_prefix(&header, layout.file_bytes);
        let failed = |e| Error::io(&target, "write", e);
        let mut file = out.into_inner().map_err(|e| failed(e.into_error()))?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        file.write_all(&prefix).and_then(|()| file.write_all(&header)).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        Ok(Finished { target, temporary })
    }
}

/// A complete image that has not its name yet. Dropping it removes it.
#[derive(Debug)]
pub struct Finished {
    target: PathBuf,
    temporary: NamedTempFile,
}

impl Finished {
    /// Where it lies for now.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }
    /// Gives it its name, in place of what had the name before.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn publish(self) -> Result<(), Error> {
        let Self { target, temporary } = self;
        temporary.persist(&target).map_err(|e| Error::io(&target, "create", e.error))?;
        // So that the name survives a loss of power too. Not every file system lets a directory be opened: then it is left.
        if let Some(directory) = target.parent().filter(|p| !p.as_os_str().is_empty())
            && let Ok(directory) = File::open(directory)
        {
            let _ = directory.sync_all();
        }
        Ok(())
    }
}

/// What may be replaced: what was written before. Anything else is most likely a slip of the hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replaces {
    Image,
    Gguf,
}

/// Refuses a target that is there and is something else.
pub(crate) fn replaceable(target: &Path, what: Replaces) -> Result<(), Error> {
    let Ok(metadata) = target.metadata() else { return Ok(()) };
    if !metadata.is_file() {
        return Err(Error::not_readable(target, "exists and is not a regular file; nothing was written"));
    }
    let (magic, name) = match what {
        Replaces::Image => (&MAGIC[..], "an image"),
        Replaces::Gguf => (&b"GGUF"[..], "a GGUF file"),
    };
    let mut start = Vec::new();
    let read = File::open(target).and_then(|f| f.take(magic.len() as u64).read_to_end(&mut start));
    if read.is_ok() && (start.is_empty() || start == magic) {
        return Ok(());
    }
    let what = format!("exists and is not {name}, so it is not replaced; remove it or choose another name");
    Err(Error::not_readable(target, what))
}
